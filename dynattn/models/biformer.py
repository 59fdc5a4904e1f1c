"""BiFormer (CVPR 2023): bi-level routing attention in three stages, full attention in the last.

    stem        3 x 3 convolutions of strides 2, 2, batch norm                                    H/4 x W/4
    stage 1-3   (block with bi-level routing attention) x N                                       k = 1, 4, 16 regions
    stage 4     (block with full attention) x N
    between     3 x 3 convolution of stride 2, batch norm: half the side, twice the channels
    head        batch norm, global average, Linear

A block, its depthwise 3 x 3 tells tokens where they are:

    z = z + DW(z)
    z' = MHSA(LN(z)) + z                                                                          DEBI-4
    z  = MLP(LN(z')) + z'                                                                         DEBI-5

`variant="official"` divides logits by sqrt(C), as the published code does in all stages but the last; "paper" by
sqrt(d), the width of a head, as the text of DeBiFormer has it. Ledger: papers/debiformer.toml.
"""

import re
from collections.abc import Callable, Sequence

from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.mechanisms.bilevel import BiLevelRoutingAttention
from dynattn.mechanisms.dense import DenseRecord
from dynattn.models.layers import Backbone, Stage, check_dtype, check_stages, drop_path_rates, each_stage, initialise
from dynattn.models.published import Entry, register_published
from dynattn.models.registry import register_model

SCALES = {"official": "dim", "paper": "head"}


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of a channels-last map."""

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return rearrange(super().forward(rearrange(x, "B H W C -> B C H W")), "B C H W -> B H W C")


class ConvDown(nn.Module):
    """3 x 3 convolutions of stride 2, each with batch norm, GELU in between: (B, H, W, C) to (B, h, w, widths[-1])."""

    def __init__(self, channels: int, *widths: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.GELU()] * bool(layers) + [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width)]
            channels = width
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        check_dtype(x, self.convs[0].weight)
        return rearrange(self.convs(rearrange(x, "B H W C -> B C H W")), "B C H W -> B H W C")


class FullAttention(nn.Module):
    """Attention of every token to every token, and a depthwise 5 x 5 of the input beside it: (B, H, W, C) to itself.

    attn_drop: the share of the attention weights that training drops. Source: the published code of BiFormer, stage 4.
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, *, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("full_heads", heads, dim)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.lce = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        q, k, v = rearrange(self.qkv(x), "B H W (three h d) -> three B h (H W) d", three=3, h=self.heads)  # DEBI-1
        if self.training and self.attn_drop:
            z = core.dense_attention_torch(q, k, v, None, q.shape[-1] ** -0.5, self.attn_drop)
        else:
            z = core.dense_attention(q, k, v, impl=self.implementation)  # DEBI-2
        context = self.lce(rearrange(x, "B H W C -> B C H W"))
        z = z + rearrange(context, "B (h d) H W -> B h (H W) d", h=self.heads)
        if tracing.recording():
            record = DenseRecord(q[0], k[0], v[0], z[0], shape)
            record.exact = False  # the convolution is a path of its own
            tracing.keep(self, record)
        return self.proj(core.merge_heads(z, shape))  # DEBI-3


class BiLevelBlock(nn.Module):
    """A depthwise 3 x 3, attention, a feed-forward network, each beside an identity: (B, H, W, C) to itself.

    Stochastic depth drops attention and feed-forward network with probability `drop_path`, never the convolution;
    `proj_drop` is the dropout of what these two put out.
    """

    def __init__(self, dim: int, attn: nn.Module, ffn: nn.Module, *, drop_path: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), attn
        self.norm2, self.ffn = nn.LayerNorm(dim, eps=1e-6), ffn
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = x + rearrange(self.position(rearrange(x, "B H W C -> B C H W")), "B C H W -> B H W C")
        x = x + self.drop_path(self.proj_drop(self.attn(self.norm1(x))))  # DEBI-4
        return x + self.drop_path(self.proj_drop(self.ffn(self.norm2(x))))  # DEBI-5


class BiLevelModel(Backbone):
    """What BiFormer and DeBiFormer share: the convolutions around the blocks, and the head."""

    def assemble(self, in_chans: int, dims: Sequence[int], blocks: Sequence[Sequence[nn.Module]], drop_rate: float):
        """Stem, stages of these blocks, norm and classifier."""
        self.embed = ConvDown(in_chans, dims[0] // 2, dims[0])
        downs = [nn.Identity(), *(ConvDown(dims[i - 1], dims[i]) for i in range(1, len(blocks)))]
        self.stages = nn.ModuleList(Stage(down, list(layers)) for down, layers in zip(downs, blocks, strict=True))
        self.norm = BatchNorm(dims[len(blocks) - 1])
        self.add_head(drop_rate)
        self.apply(initialise)

    @classmethod
    def configuration(cls, **options) -> dict:
        """As of every backbone, with the first convolution of its stem."""
        return super().configuration(**options) | dict(first_conv="embed.convs.0")

    def published_entries(self) -> dict[str, Entry]:
        """What the published code calls our entries. 1 x 1 convolutions become linear, tables are resized."""

        def fitted(ours: Tensor) -> Callable[[Tensor], Tensor]:
            if ours.ndim == 3:
                return lambda table: core.resize_table(table, tuple(ours.shape[1:]))
            return lambda tensor: tensor[:, :, 0, 0] if tensor.ndim == 4 and ours.ndim == 2 else tensor

        return {name: Entry(self.published_name(name), fitted(ours)) for name, ours in self.state_dict().items()}

    def published_name(self, name: str) -> str:
        """What the published code calls one of our entries: the convolutions between the stages, norm and head."""
        name = re.sub(r"^embed\.convs", "downsample_layers.0", name)
        return re.sub(r"^stages\.(\d+)\.down\.convs", r"downsample_layers.\1", name)


class BiFormer(BiLevelModel):
    """BiFormer: (B, in_chans, H, W) to (B, num_classes), for any H and W.

    img_size: what images are brought to; no parameter depends on it.  dims, depths, heads: by stage.  full_heads: heads
    of the last stage's full attention.  regions: S, one number or one for every stage but the last.  topk: k, how many
    regions are read, for every stage but the last.  mlp_ratio: e.
    variant: "official" or "paper", see the head of this file.  global_pool: "avg", "max", or "" where num_classes is 0.
    drop_rate: dropout before the classifier.  attn_drop_rate, proj_drop_rate: of attention weights, and of what the two
    branches of a block put out.  drop_path_rate: stochastic depth of the last block.
    Raises ValueError, TypeError for arguments that do not fit together. Source: BiFormer; DeBiFormer section 3.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        heads: Sequence[int] = (2, 4, 8, 16),
        full_heads: int = 8,
        regions: int | Sequence[int] = 7,
        topk: Sequence[int] = (1, 4, 16),
        mlp_ratio: float = 3.0,
        variant: str = "official",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool=global_pool)
        core.one_of("variant", variant, tuple(SCALES))
        core.rate("drop_rate", drop_rate)
        core.rate("proj_drop_rate", proj_drop_rate)
        count = check_stages(depths, heads=heads)
        regions, topk = (
            each_stage("regions", regions, count - 1, "routes"),
            each_stage("topk", topk, count - 1, "routes"),
        )
        self.variant = variant

        def attention(i: int) -> nn.Module:
            """The attention layer of stage i."""
            if i == count - 1:
                return FullAttention(dims[i], full_heads, attn_drop=attn_drop_rate)
            how = dict(regions=regions[i], topk=topk[i], scale=SCALES[variant], attn_drop=attn_drop_rate)
            return BiLevelRoutingAttention(dims[i], heads[i], **how)

        def block(i: int, rate: float) -> nn.Module:
            """A block of stage i."""
            ffn = Mlp(dims[i], int(dims[i] * mlp_ratio))
            return BiLevelBlock(dims[i], attention(i), ffn, drop_path=rate, proj_drop=proj_drop_rate)

        rates = drop_path_rates(drop_path_rate, tuple(depths))
        self.assemble(in_chans, dims, [[block(i, rate) for rate in rates[i]] for i in range(count)], drop_rate)

    def published_name(self, name: str) -> str:
        """What the published code calls one of our entries."""
        name = super().published_name(name)
        found = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", name)
        if not found:
            return name
        stage, block, rest = found.groups()
        names = {"position": "pos_embed", "ffn.fc1": "mlp.0", "ffn.fc2": "mlp.3", "attn.lce": "attn.lepe"}
        if int(stage) < len(self.stages) - 1:
            names |= {"attn.qkv": "attn.qkv.qkv", "attn.proj": "attn.wo"}
        module, _, last = rest.rpartition(".")
        return f"stages.{stage}.{block}.{names.get(module, module)}.{last}"


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published BiFormer."""
    names = {(64, 8): "biformer_tiny", (64, 18): "biformer_small", (96, 18): "biformer_base"}
    return identified(state, names, "BiFormer", "downsample_layers.0.3.weight")


def identified(state: dict[str, Tensor], names: dict, what: str, stem: str) -> tuple[str, dict]:
    """A name by the channels of stage 1 and the blocks of stage 3, and the number of classes."""
    found = len(state[stem]), len({key.split(".")[2] for key in state if key.startswith("stages.2.")})
    if found not in names:
        size = f"{found[0]} channels in stage 1, {found[1]} blocks in stage 3"
        raise ValueError(f"state_dict: a {what} that is none of the published ones: {size}")
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    return names[found], {} if classes == 1000 else {"num_classes": classes}


TINY = dict()
SMALL = dict(depths=(4, 4, 18, 4), drop_path_rate=0.15)
BASE = dict(dims=(96, 192, 384, 768), depths=(4, 4, 18, 4), heads=(3, 6, 12, 24), drop_path_rate=0.4)
MINI = dict(
    img_size=128,
    num_classes=10,
    dims=(32, 64, 128),
    depths=(2, 4, 2),
    heads=(2, 4, 8),
    regions=8,
    topk=(4, 16),
    variant="paper",
    drop_path_rate=0.05,
)

register_model("biformer_tiny", BiFormer, **TINY)
register_model("biformer_small", BiFormer, **SMALL)
register_model("biformer_base", BiFormer, **BASE)
register_model("biformer_mini", BiFormer, **MINI)

register_published("stages.0.0.attn.qkv.qkv.weight", identify)
