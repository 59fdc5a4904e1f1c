"""DAT, the Deformable Attention Transformer (CVPR 2022): local attention, then deformable attention, in four stages.

    stem        4 x 4 patches, LayerNorm                                          H/4 x W/4
    stage 1, 2  (window, shifted window) x N                                      the early stages stay local
    stage 3, 4  (window, deformable) x N                                          Table 1
    between     2 x 2 patches, LayerNorm: half the side, twice the channels
    head        LayerNorm, global average, Linear

The published code and the text disagree in places (ledger: papers/dat.toml). `variant="official"` follows the code,
which the published checkpoints need; `variant="paper"` follows the text:

    keyword         "official"        "paper"
    reference       "centre"          "corner"        references at cell centres, or from -1 to +1
    offset_unit     "half_cell"       "cell"          what one unit of s is
    offset_norm     True              False           LayerNorm inside the offset network
    kernels         (9, 7, 5, 3)      (5, 5, 5, 5)    of the offset network, by stage
    shift           "up"              "down"          shifted windows move by ceil(w / 2), or by floor(w / 2) as Swin's

Each keyword can be given alone, e.g. `create_model("dat_tiny", variant="paper", offset_norm=True,
kernels=(9, 7, 5, 3))` reads the text with the published weights.
"""

import re
from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from dynattn import core
from dynattn.mechanisms.baselines import SpatialReductionAttention
from dynattn.mechanisms.deformable import DeformableAttention
from dynattn.mechanisms.deformable_detr import DeformableDetrAttention
from dynattn.mechanisms.window import WindowAttention
from dynattn.models.layers import (
    Backbone,
    Block,
    ConvStem,
    PatchEmbedding,
    check_stages,
    initialise,
)
from dynattn.models.published import Entry, register_published
from dynattn.models.registry import build_of, register_model

VARIANTS = {
    "official": dict(reference="centre", offset_unit="half_cell", offset_norm=True, kernels=(9, 7, 5, 3), shift="up"),
    "paper": dict(reference="corner", offset_unit="cell", offset_norm=False, kernels=(5, 5, 5, 5), shift="down"),
}
ATTENTIONS = ("window", "shifted", "deformable", "deformable_detr", "sra")


class DAT(Backbone):
    """DAT and its ablations: (B, in_chans, H, W) to (B, num_classes), for any H and W.

    img_size: the (H, W) that sizes the bias tables.  dims, depths, heads: by stage.  groups: offset groups G by stage.
    window: side of the local windows.  blocks: which attention each stage repeats, e.g. ("window", "deformable");
    of "window", "shifted", "deformable", "deformable_detr", "sra".
    deformable_stages: shorthand for `blocks`: these stages (1 to 4) have ("window", "deformable"), the others
    ("window", "shifted") (Table 7).  early: "shifted" or "sra", the attention of stages 1 and 2 (Table 6, row P),
    with `sra_ratios` by stage.
    strides: r by stage (Table 8 has 2 in stage 3).  offset_range: s, one number or one a stage.  offsets,
    position_bias: Table 6.  detr_points: K by stage for "deformable_detr" (Table 8).
    conv_embedding: overlapping 7 x 7 stem and 3 x 3 down-sampling (DAT-T*, Table 9).
    global_pool: "avg", "max", or "" where num_classes is 0.  drop_rate: dropout before the classifier.  attn_drop_rate,
    proj_drop_rate: of attention weights, and of what the layers of a block put out.  drop_path_rate: stochastic depth
    of the last block.
    variant, reference, offset_unit, offset_norm, kernels, shift: see the head of this file.
    For small nets that train on little data: conv_stem, local_convs (`ConvStem`, `LocalConv`), and offset_zero_init,
    clamp (`DeformableAttention`).
    Raises ValueError, TypeError for arguments that do not fit together. Source: DAT section 3.3, Table 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        groups: Sequence[int] = (1, 2, 3, 6),
        window: int = 7,
        blocks: Sequence[Sequence[str]] | None = None,
        deformable_stages: Sequence[int] = (3, 4),
        early: str = "shifted",
        sra_ratios: Sequence[int] = (8, 4, 2, 1),
        strides: Sequence[int] = (4, 2, 1, 1),
        offset_range: float | Sequence[float] = 2.0,
        offsets: bool = True,
        position_bias: str | None = "relative",
        detr_points: Sequence[int] = (49, 49, 49, 49),
        conv_embedding: bool = False,
        conv_stem: bool = False,
        local_convs: bool = False,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        variant: str = "official",
        reference: str | None = None,
        offset_unit: str | None = None,
        offset_norm: bool | None = None,
        kernels: Sequence[int] | None = None,
        shift: str | None = None,
        offset_zero_init: bool = False,
        clamp: bool = False,
    ):
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool=global_pool)
        core.one_of("variant", variant, tuple(VARIANTS))
        core.one_of("early", early, ("shifted", "sra"))
        core.rate("drop_rate", drop_rate)
        core.rate("attn_drop_rate", attn_drop_rate)
        core.rate("proj_drop_rate", proj_drop_rate)
        if not isinstance(deformable_stages, Sequence):
            raise TypeError(f"deformable_stages: expected numbers of stages, got {deformable_stages!r}")
        given = dict(
            reference=reference, offset_unit=offset_unit, offset_norm=offset_norm, kernels=kernels, shift=shift
        )
        reading = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        core.one_of("shift", reading["shift"], ("up", "down"))
        core.one_of("reference", reading["reference"], ("centre", "corner"))
        core.one_of("offset_unit", reading["offset_unit"], ("half_cell", "cell"))
        count = check_stages(depths, heads=heads, groups=groups, strides=strides, kernels=reading["kernels"])
        ranges = [offset_range] * count if isinstance(offset_range, int | float) else offset_range
        check_stages(depths, offset_range=ranges)
        if blocks is None:
            blocks = [_default_blocks(stage, deformable_stages, early) for stage in range(1, count + 1)]
        if len(blocks) < count or not all(blocks):
            raise ValueError(f"blocks: expected the attentions of each of {count} stages, got {blocks!r}")
        for kind in (kind for kinds in blocks for kind in kinds):
            core.one_of("blocks", kind, ATTENTIONS)

        self.variant = variant
        shift_cells = (window + 1) // 2 if reading["shift"] == "up" else window // 2

        def attention(i: int, kind: str) -> nn.Module:
            """The attention layer of stage i."""
            size = dict(dim=dims[i], heads=heads[i], attn_drop=attn_drop_rate)
            if kind in ("window", "shifted"):
                return WindowAttention(**size, window=window, shift=shift_cells if kind == "shifted" else 0)
            if kind == "sra":
                return SpatialReductionAttention(**size, ratio=sra_ratios[i])
            if kind == "deformable_detr":
                return DeformableDetrAttention(**size, points=detr_points[i])
            return DeformableAttention(
                **size,
                groups=groups[i],
                map_size=self.map_size(i),
                stride=strides[i],
                kernel=reading["kernels"][i],
                offset_range=ranges[i],
                offsets=offsets,
                position_bias=position_bias,
                reference=reading["reference"],
                offset_unit=reading["offset_unit"],
                offset_norm=reading["offset_norm"],
                offset_zero_init=offset_zero_init,
                clamp=clamp,
            )

        def embedding(i: int) -> nn.Module:
            """What makes the map of stage i smaller: the stem for i = -1."""
            channels, out = (in_chans, dims[0]) if i < 0 else (dims[i], dims[i + 1])
            if i < 0 and conv_stem:
                return ConvStem(channels, out)
            stride = 4 if i < 0 else 2
            kernel = (7 if i < 0 else 3) if conv_embedding else stride
            return PatchEmbedding(channels, out, kernel, stride, bias=i < 0)

        def block(i: int, d: int, rate: float) -> nn.Module:
            """Block d of stage i."""
            attn = attention(i, blocks[i][d % len(blocks[i])])
            return Block(dims[i], attn, drop_path=rate, proj_drop=proj_drop_rate, local_conv=local_convs)

        self.embed = embedding(-1)
        self.add_stages(depths, lambda i: embedding(i - 1) if i else nn.Identity(), block, drop_path_rate)
        self.norm = nn.LayerNorm(dims[-1])
        self.add_head(drop_rate)
        self.head.apply(initialise)

    def map_size(self, i: int) -> tuple[int, int]:
        """The map of stage i for an image of `img_size`."""
        return tuple(-(-side // (4 * 2**i)) for side in self.img_size)

    @classmethod
    def configuration(cls, conv_stem: bool, **options) -> dict:
        """As of every backbone, with the first convolution of its stem."""
        return super().configuration(**options) | dict(first_conv="embed.convs.0.0" if conv_stem else "embed.proj")

    def published_entries(self) -> dict[str, Entry]:
        """What the published code calls our entries."""
        modules = dict(self.named_modules())
        return {name: published_entry(name, modules) for name in self.state_dict()}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of this size (H, W): the bias tables are resized (bicubic)."""
        super().set_input_size(img_size)
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                if isinstance(block.attn, DeformableAttention):
                    set_map_size(block.attn, self.map_size(i))


def set_map_size(attn: DeformableAttention, map_size: tuple[int, int]) -> None:
    """Give a layer the bias table that it would resize its own to for such a map."""
    if "table" in attn._parameters:
        table = attn.table_for(map_size, attn.table.dtype).detach()
        attn.table = nn.Parameter(table, requires_grad=attn.table.requires_grad)
    attn.map_size = map_size


def _default_blocks(stage: int, deformable_stages: Sequence[int], early: str) -> tuple[str, ...]:
    """The pair of attentions that a stage repeats (Tables 1, 6 and 7)."""
    if stage in deformable_stages:
        return ("window", "deformable")
    return ("sra",) if early == "sra" and stage <= 2 else ("window", "shifted")


TINY = dict()
SMALL = dict(depths=(2, 2, 18, 2), drop_path_rate=0.3)
BASE = dict(
    dims=(128, 256, 512, 1024),
    depths=(2, 2, 18, 2),
    heads=(4, 8, 16, 32),
    groups=(1, 2, 4, 8),
    drop_path_rate=0.5,
)
BASE_384 = BASE | dict(img_size=384, window=12)
TINY_CONV = dict(conv_embedding=True)
MINI = dict(
    img_size=128,
    num_classes=10,
    dims=(32, 64, 128),
    depths=(2, 4, 4),
    heads=(2, 4, 8),
    groups=(1, 2, 2),
    window=8,
    deformable_stages=(2, 3),
    strides=(4, 2, 2),
    kernels=(9, 5, 5),
    conv_embedding=True,
    conv_stem=True,
    local_convs=True,
    drop_path_rate=0.05,
    offset_range=4.0,
    offset_zero_init=True,
    clamp=True,
)

register_model("dat_tiny", DAT, **TINY)
register_model("dat_small", DAT, **SMALL)
register_model("dat_base", DAT, **BASE)
register_model("dat_base_384", DAT, **BASE_384)
register_model("dat_tiny_conv", DAT, **TINY_CONV)
register_model("dat_mini", DAT, **MINI)


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def published_entry(name: str, modules: dict[str, nn.Module]) -> Entry:
    """What the published code calls one of our entries; `name` itself for what only the small models have."""
    head, _, last = name.rpartition(".")
    if found := re.fullmatch(r"(embed|stages\.(\d+)\.down)\.(proj|norm)", head):
        place = "patch_proj" if found[1] == "embed" else f"down_projs.{int(found[2]) - 1}"
        return Entry(f"{place}.{'0' if found[3] == 'proj' else '1.norm'}.{last}")
    if head in ("norm", "head"):
        return Entry(f"{'cls_norm.norm' if head == 'norm' else 'cls_head'}.{last}")
    found = re.fullmatch(r"(stages\.\d+)\.blocks\.(\d+)\.((norm|mlp|attn).+)", name)
    if not found:
        return Entry(name)
    stage, block, rest = found.group(1, 2, 3)
    if found := re.fullmatch(r"norm([12])\.(\w+)", rest):
        return Entry(f"{stage}.layer_norms.{2 * int(block) + int(found[1]) - 1}.norm.{found[2]}")
    if found := re.fullmatch(r"mlp\.fc([12])\.(\w+)", rest):
        return Entry(f"{stage}.mlps.{block}.chunk.linear{found[1]}.{found[2]}")
    attention, path = modules[f"{stage}.blocks.{block}.attn"], f"{stage}.attns.{block}"
    return attention_entry(attention, path, rest.removeprefix("attn."))


def attention_entry(attention: nn.Module, path: str, rest: str) -> Entry:
    """The same for an entry `rest` of an attention layer, which is published under `path`."""
    as_linear = lambda t: t[:, :, 0, 0] if t.shape[2:] == (1, 1) else t  # noqa: E731  (they have 1 x 1 convolutions)
    if rest == "table" and isinstance(attention, WindowAttention):
        side = 2 * attention.window - 1
        return Entry(
            f"{path}.relative_position_bias_table",
            lambda t: core.resize_table(rearrange(t, "(I J) h -> h I J", I=int(len(t) ** 0.5)), (side, side)),
        )
    if rest == "table" and isinstance(attention, DeformableAttention):
        return Entry(f"{path}.rpe_table", lambda t: fit_deformable_table(t, attention))
    names = {
        "qkv": "proj_qkv",
        "proj": "proj_out",
        "q": "proj_q",
        "k": "proj_k",
        "v": "proj_v",
        "offset.depthwise": "conv_offset.0",
        "offset.norm": "conv_offset.1.norm",
        "offset.pointwise": "conv_offset.3",
        "dwconv": "rpe_table",
    }
    module, _, last = rest.rpartition(".")
    keep_shape = module in ("offset.depthwise", "dwconv")
    return Entry(f"{path}.{names.get(module, module)}.{last}", (lambda t: t) if keep_shape else as_linear)


def fit_deformable_table(table: Tensor, attention: DeformableAttention) -> Tensor:
    """A published table for the map that our layer was made for."""
    size = tuple(attention.table.shape[1:])
    if tuple(table.shape[1:]) == size or attention.position_bias == "relative":
        return core.resize_table(table, size)
    old = int(table.shape[1] ** 0.5)
    return core.resize_fixed(table, (old, old), attention.map_size, attention.stride)


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published DAT."""
    stem = state["patch_proj.0.weight"]
    blocks = {int(found[1]) for key in state if (found := re.match(r"stages\.2\.layer_norms\.(\d+)\.", key))}
    depth = (max(blocks) + 1) // 2 if blocks else 0
    window = (int(len(state["stages.0.attns.0.relative_position_bias_table"]) ** 0.5) + 1) // 2
    names = {(96, 6, 4, 7): "dat_tiny", (96, 6, 7, 7): "dat_tiny_conv", (96, 18, 4, 7): "dat_small"}
    names |= {(128, 18, 4, 7): "dat_base", (128, 18, 4, 12): "dat_base_384"}
    found = (stem.shape[0], depth, stem.shape[-1], window)
    if found not in names:
        raise ValueError(
            "state_dict: a DAT that is none of the published ones: "
            f"{found[0]} stem channels, {depth} blocks in stage 3, a {found[2]} x {found[2]} stem, windows of {window}"
        )
    name, options = names[found], {}
    defaults = {"num_classes": 1000, "img_size": 224} | build_of(names[found])[1]
    classes = state["cls_head.weight"].shape[0] if "cls_head.weight" in state else 0
    tables = [t for key, t in sorted(state.items()) if re.match(r"stages\.2\.attns\.\d+\.rpe_table$", key)]
    size = tuple((side + 1) // 2 * 16 for side in tables[0].shape[1:]) if tables else (defaults["img_size"],) * 2
    for key, value in (("num_classes", classes), ("img_size", size[0] if size[0] == size[1] else size)):
        if value != defaults[key]:
            options[key] = value
    return name, options


register_published("patch_proj.0.weight", identify)
