"""DeBiFormer (ACCV 2024): BiFormer's blocks and blocks with deformable bi-level routing attention in turn.

    stem        3 x 3 convolutions of strides 2, 2, batch norm                                    H/4 x W/4
    stage 1-3   (block with BRA, block with DBRA) x N / 2                                         Table 1
    stage 4     (block with DBRA) x N
    between     3 x 3 convolution of stride 2, batch norm: half the side, twice the channels
    head        batch norm, global average, Linear

Blocks are BiFormer's (DEBI-4, DEBI-5), with a convolution in the feed-forward network. The published code does not run
as it lies there; repaired, it parts from the text in places (ledger: papers/debiformer.toml). `variant="official"`
follows the code, which checkpoints need; `variant="paper"` follows the text:

    keyword            "official"          "paper"
    scale              "dim"               "head"            logits are divided by sqrt(C), or by sqrt(d)
    offset_channels    1                   2                 agents move on the diagonal, or by rows and columns
    agent_norm         True                False             a LayerNorm in front of DEBI-14
    agent_topk         (4, 8, 16, 49)      (4, 8, 16, S^2)   regions that an agent reads, by stage

and DeBiFormer-B has other offset groups. Each keyword can be given alone.
"""

import re
from collections.abc import Mapping, Sequence

from timm.layers import Mlp
from torch import Tensor, nn

from dynattn import core
from dynattn.mechanisms.baselines import CrossShapedWindowAttention
from dynattn.mechanisms.bilevel import BiLevelRoutingAttention
from dynattn.mechanisms.deformable import DeformableAttention
from dynattn.mechanisms.deformable_bilevel import ConvFFN, DeformableBiLevelAttention
from dynattn.mechanisms.window import WindowAttention
from dynattn.models.biformer import BiLevelBlock, BiLevelModel, FullAttention, identified
from dynattn.models.layers import Block, PatchEmbedding, Stage, check_stages, drop_path_rates, each_stage, initialise
from dynattn.models.published import register_published
from dynattn.models.registry import register_model

VARIANTS = {
    "official": dict(scale="dim", offset_channels=1, agent_norm=True),
    "paper": dict(scale="head", offset_channels=2, agent_norm=False),
}
LAYOUTS = {
    "debiformer": dict(dims=(64, 128, 256, 512), depths=(2, 2, 8, 2), heads=(2, 4, 8, 16)),
    "swin": dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24)),
}
ATTENTIONS = ("bilevel", "deformable_bilevel", "full", "window", "shifted", "deformable", "cross_shaped")
LETTERS = {"BB": ("bilevel",), "B*": ("bilevel", "deformable_bilevel"), "**": ("deformable_bilevel",)}
# Table 7: the blocks of the four stages. In stage 4 the paper's B is BiFormer's full attention.
TABLE_7 = ("BB BB BB BB", "BB BB BB B*", "BB BB BB **", "BB BB B* **", "BB B* B* **", "B* B* B* **")
# Table 5, all in Swin's layout, as far as their attentions are here. Cross-shaped windows need an even number of heads.
TABLE_5 = {
    "shifted_window": dict(blocks=[("window", "shifted")] * 4),
    "cross_shaped": dict(blocks=[("cross_shaped",)] * 4, heads=(2, 4, 8, 16)),
    "deformable": dict(blocks=[("window", "shifted")] * 2 + [("window", "deformable")] * 2),
    "bilevel": dict(blocks=[("bilevel",)] * 4),
    "deformable_bilevel": dict(blocks=[("bilevel", "deformable_bilevel")] * 3 + [("deformable_bilevel",)]),
}
STRIPES, KERNELS = (1, 2, 7, 7), (9, 7, 5, 3)  # of CSWin's blocks, and of DAT's offset networks, by stage


def table_7(row: str) -> list[tuple[str, ...]]:
    """`blocks` for a row of Table 7, e.g. "BB B* B* **"."""
    core.one_of("row", row, TABLE_7)
    stages = [LETTERS[letters] for letters in row.split()]
    return stages[:3] + [tuple("full" if kind == "bilevel" else kind for kind in stages[3])]


class DeBiFormer(BiLevelModel):
    """DeBiFormer and its ablations: (B, in_chans, H, W) to (B, num_classes), for any H and W.

    img_size: the (H, W) that sizes the bias tables.  layout: "debiformer", or "swin" (Tables 5 and 6): patches that do
    not overlap, no convolutions in the blocks, MLPs of ratio 4.  dims, depths, heads: by stage, None for the layout's;
    depths count blocks, as Table 1 does: half of them are BRA's.
    blocks: which attention each stage repeats, of `ATTENTIONS`; see `table_7` and `TABLE_5`.  regions: S, one number or
    one a stage.  topk, agent_topk: k of BRA and of DBRA by stage (Table 6).  groups: offset groups G by stage, or that
    by variant.  strides: r, and kernels: K, by stage.  ratios, agent_ratios: e of the feed-forward networks behind and
    inside the attention, by stage.  Feed-forward networks have a convolution in stages with DBRA (Table 7).
    window: side of windows, where `blocks` has them.
    variant, scale, offset_channels, agent_norm: see the head of this file.
    global_pool: "avg", "max", or "" where num_classes is 0.  drop_rate: dropout before the classifier.  attn_drop_rate,
    proj_drop_rate: of attention weights, and of what the two branches of a block put out.  drop_path_rate: stochastic
    depth of the last two blocks; pairs of blocks share it.
    Raises ValueError, TypeError for arguments that do not fit together. Source: DeBiFormer section 3.3, Table 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        layout: str = "debiformer",
        dims: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        blocks: Sequence[Sequence[str]] | None = None,
        regions: int | Sequence[int] = 7,
        topk: Sequence[int] = (1, 4, 16, 49),
        agent_topk: Sequence[int] | None = None,
        groups: Sequence[int] | Mapping[str, Sequence[int]] = (1, 2, 4, 8),
        strides: Sequence[int] = (8, 4, 2, 1),
        kernels: Sequence[int] = KERNELS,
        ratios: Sequence[int] | None = None,
        agent_ratios: Sequence[int] = (3, 3, 3, 3),
        window: int = 7,
        variant: str = "official",
        scale: str | None = None,
        offset_channels: int | None = None,
        agent_norm: bool | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        core.one_of("layout", layout, tuple(LAYOUTS))
        given = dict(dims=dims, depths=depths, heads=heads)
        dims, depths, heads = (LAYOUTS[layout][name] if value is None else value for name, value in given.items())
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool=global_pool)
        core.one_of("variant", variant, tuple(VARIANTS))
        core.rate("drop_rate", drop_rate)
        core.rate("proj_drop_rate", proj_drop_rate)
        given = dict(scale=scale, offset_channels=offset_channels, agent_norm=agent_norm)
        reading = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        groups = groups[variant] if isinstance(groups, Mapping) else groups
        swin, count = layout == "swin", check_stages(depths, heads=heads, groups=groups, strides=strides, topk=topk)
        ratios = (4 if swin else 3,) * count if ratios is None else ratios
        check_stages(depths, kernels=kernels, ratios=ratios, agent_ratios=agent_ratios)
        regions = each_stage("regions", regions, count, "routes")
        if agent_topk is None:
            agent_topk = [4, 8, 16, 49 if variant == "official" else regions[-1] ** 2][-count:]
        check_stages(depths, agent_topk=agent_topk)
        if blocks is None:
            blocks = [LETTERS["B*"]] * (count - 1) + [LETTERS["**"]]
        if len(blocks) < count or not all(blocks):
            raise ValueError(f"blocks: expected the attentions of each of {count} stages, got {blocks!r}")
        for kind in (kind for kinds in blocks for kind in kinds):
            core.one_of("blocks", kind, ATTENTIONS)
        self.variant = variant

        def attention(i: int, kind: str) -> nn.Module:
            """An attention layer of stage i."""
            size = dict(dim=dims[i], heads=heads[i], attn_drop=attn_drop_rate)
            if kind == "bilevel":
                return BiLevelRoutingAttention(**size, regions=regions[i], topk=topk[i], scale=reading["scale"])
            if kind == "full":
                return FullAttention(**size | dict(heads=8))
            if kind in ("window", "shifted"):
                return WindowAttention(**size, window=window, shift=window // 2 if kind == "shifted" else 0)
            if kind == "cross_shaped":
                return CrossShapedWindowAttention(**size, stripe=STRIPES[min(i, 3)])
            size |= dict(groups=groups[i], map_size=self.map_size(i))
            if kind == "deformable":
                return DeformableAttention(**size, kernel=KERNELS[min(i, 3)])
            how = dict(stride=strides[i], kernel=kernels[i], regions=regions[i], topk=agent_topk[i])
            return DeformableBiLevelAttention(**size, **how, ratio=agent_ratios[i], **reading)

        def block(i: int, kind: str, rate: float) -> nn.Module:
            """A block of stage i."""
            drop = dict(drop_path=rate, proj_drop=proj_drop_rate)
            if swin:
                return Block(dims[i], attention(i, kind), ratio=ratios[i], **drop)
            convolves = "deformable_bilevel" in blocks[i]
            ffn = ConvFFN(dims[i], ratios[i]) if convolves else Mlp(dims[i], dims[i] * ratios[i])
            return BiLevelBlock(dims[i], attention(i, kind), ffn, **drop)

        rates = drop_path_rates(drop_path_rate, tuple((depth + 1) // 2 for depth in depths))
        stages = [
            [block(i, blocks[i][d % len(blocks[i])], rates[i][d // 2]) for d in range(depths[i])] for i in range(count)
        ]
        assemble = self.assemble_swin if swin else self.assemble
        assemble(in_chans, dims, stages, drop_rate)

    def assemble_swin(self, in_chans: int, dims: Sequence[int], stages: list[list[nn.Module]], drop_rate: float):
        """Swin's patches, these blocks, norm and classifier."""
        self.embed = PatchEmbedding(in_chans, dims[0], 4, 4)
        downs = [nn.Identity(), *(PatchEmbedding(a, b, 2, 2, bias=False) for a, b in zip(dims, dims[1:], strict=False))]
        self.stages = nn.ModuleList(Stage(down, layers) for down, layers in zip(downs, stages, strict=False))
        self.norm = nn.LayerNorm(dims[len(stages) - 1])
        self.add_head(drop_rate)
        self.apply(initialise)

    @classmethod
    def configuration(cls, layout: str, depths: Sequence[int] | None, **options) -> dict:
        """As of every backbone, with the first convolution of its stem."""
        core.one_of("layout", layout, tuple(LAYOUTS))
        found = super().configuration(depths=depths or LAYOUTS[layout]["depths"], **options)
        return found | (dict(first_conv="embed.proj") if layout == "swin" else {})

    def map_size(self, i: int) -> tuple[int, int]:
        """The map of stage i for an image of `img_size`."""
        return tuple(-(-side // (4 * 2**i)) for side in self.img_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of this size (H, W): the bias tables are resized (bicubic)."""
        super().set_input_size(img_size)
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                if isinstance(block.attn, DeformableBiLevelAttention | DeformableAttention):
                    attn, size = block.attn, self.map_size(i)
                    table = core.resize_table(attn.table.detach(), tuple(2 * side - 1 for side in size))
                    attn.table, attn.map_size = nn.Parameter(table, attn.table.requires_grad), size

    def published_name(self, name: str) -> str:
        """What the published code calls one of our entries; two blocks of ours are one of its."""
        name = super().published_name(name)
        found = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(\w+)\.(.+)", name)
        if not found:
            return name
        stage, block, part, rest = found[1], int(found[2]), found[3], found[4]
        half = block % 2
        parts = {"position": f"pos_embed{half + 1}", "attn": f"attn{half + 1}", "ffn": f"mlp{half + 1}"}
        parts |= {f"norm{n}": f"norm{2 * half + n}" for n in (1, 2)}
        attn = self.get_submodule(f"stages.{stage}.blocks.{block}.attn")
        names = BILEVEL_NAMES if isinstance(attn, BiLevelRoutingAttention) else AGENT_NAMES
        for ours, theirs in {"attn": names, "ffn": FFN_NAMES}.get(part, {}).items():
            if rest == ours or rest.startswith(ours + "."):
                rest = theirs + rest.removeprefix(ours)
                break
        return f"stages.{stage}.{block // 2}.{parts[part]}.{rest}"


FFN_NAMES = {"expand": "linear1.0", "depthwise": "dwc", "reduce": "linear2.0"}
BILEVEL_NAMES = {"qkv": "qkv.qkv", "proj": "wo", "lce": "lepe"}
AGENT_NAMES = {
    "table": "rpe_table",
    "qkv": "qkv_conv.qkv",
    "agent_q": "proj_q",
    "agent_k": "proj_k",
    "agent_v": "proj_v",
    "unify": "unifyheads1",
    "proj": "proj_out",
    "lce": "lepe1",
    "offset.depthwise": "conv_offset_q.0",
    "offset.norm": "conv_offset_q.1.norm",
    "offset.pointwise": "conv_offset_q.3",
    "norm_ffn": "norm2",
    **{f"ffn.{ours}": f"mlp.{theirs}" for ours, theirs in FFN_NAMES.items()},
}


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published DeBiFormer."""
    names = {(64, 4): "debiformer_tiny", (64, 9): "debiformer_small", (96, 9): "debiformer_base"}
    name, options = identified(state, names, "DeBiFormer", "downsample_layers.0.3.weight")
    size = tuple((side + 1) // 2 * 4 for side in state["stages.0.0.attn2.rpe_table"].shape[1:])
    if size != (224, 224):
        options["img_size"] = size[0] if size[0] == size[1] else size
    return name, options


TINY = dict()
SMALL = dict(depths=(4, 4, 18, 6), ratios=(3, 3, 3, 2), agent_ratios=(3, 3, 3, 1), drop_path_rate=0.3)
BASE = dict(
    dims=(96, 192, 384, 768),
    depths=(4, 4, 18, 4),
    heads=(3, 6, 12, 24),
    groups={"official": (1, 2, 3, 6), "paper": (1, 2, 4, 8)},
    drop_path_rate=0.4,
)
MINI = dict(
    img_size=128,
    num_classes=10,
    dims=(32, 64, 128),
    depths=(2, 4, 2),
    heads=(2, 4, 8),
    regions=8,
    topk=(4, 16, 64),
    agent_topk=(8, 16, 64),
    groups=(1, 2, 2),
    strides=(4, 2, 1),
    kernels=(7, 5, 3),
    variant="paper",
    drop_path_rate=0.05,
)

register_model("debiformer_tiny", DeBiFormer, **TINY)
register_model("debiformer_small", DeBiFormer, **SMALL)
register_model("debiformer_base", DeBiFormer, **BASE)
register_model("debiformer_mini", DeBiFormer, **MINI)

register_published("stages.0.0.attn2.rpe_table", identify)
