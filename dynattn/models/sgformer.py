"""SG-Former (ICCV 2023): blocks with hybrid-scale and with self-guided attention in turn.

    stem        3 x 3 convolutions of strides 2, 1, 2 with group norm, LayerNorm, position table           H/4 x W/4
    stage 1-3   (block with hybrid-scale attention, block with self-guided attention) x N / 2, LayerNorm  Table 1
    stage 4     (block with full attention) x N
    between     1 x 1, depthwise 3 x 3 of stride 2, 1 x 1, with group norm: half the side
    head        LayerNorm, global average, Linear

A block:

    X'  = X + Attention(LN(X))                                                                                   SG-6
    X'' = X' + FFN(LN(X'))              FFN: with a depthwise convolution beside an identity                     SG-7

A block with hybrid-scale attention hands its significance on to the next block, and to no other. The published code
parts from the text in places (ledger: papers/sgformer.toml). `variant="official"` follows the code, which checkpoints
need; `variant="paper"` follows the text:

    keyword        "official"     "paper"
    reading        "mean"         "sum"         SG-5: means over queries and heads, or sums
    aggregate      "before"       "after"       tokens become fewer before or after they are projected to keys
    shared         True           False         sub-regions of one rate have one F together, or one each
    global_scale   True           False         the largest scale reads the whole map, or windows of s M x s M
    merge_norm     True           False         LayerNorm and GELU behind the merging convolution
    lepe           True           False         a convolution beside every attention

and SG-Former-B has four and three scales in stages 1 and 2. Each keyword can be given alone.
"""

import re
from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynattn import core, tracing
from dynattn.mechanisms.deformable_bilevel import ConvFFN
from dynattn.mechanisms.dense import DenseRecord
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention
from dynattn.mechanisms.self_guided import SelfGuidedAttention
from dynattn.models.layers import Backbone, Stage, check_dtype, check_stages, drop_path_rates, initialise
from dynattn.models.published import Entry, register_published
from dynattn.models.registry import register_model

VARIANTS = {
    "official": dict(reading="mean", aggregate="before", shared=True, global_scale=True, merge_norm=True, lepe=True),
    "paper": dict(reading="sum", aggregate="after", shared=False, global_scale=False, merge_norm=False, lepe=False),
}
HYBRID = ("reading", "global_scale", "merge_norm", "lepe")
GUIDED = ("aggregate", "shared", "lepe")


def initialise_published(module: nn.Module) -> None:
    """Linear layers as everywhere, convolutions normal by what a channel puts out, as the published code starts."""
    initialise(module)
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Convolutions(nn.Module):
    """Convolutions without bias, each with a norm, GELU in between: channels-last to channels-last.

    norm: "group" (of one group) or "batch".  layers: kernel, stride, channels out, groups of each convolution.
    """

    def __init__(self, channels: int, norm: str, *layers: tuple[int, int, int, int]):
        super().__init__()
        parts: list[nn.Module] = []
        for kernel, stride, out, groups in layers:
            conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
            parts += [nn.GELU()] * bool(parts) + [
                conv,
                nn.GroupNorm(1, out) if norm == "group" else nn.BatchNorm2d(out),
            ]
            channels = out
        self.convs = nn.Sequential(*parts)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        check_dtype(x, self.convs[0].weight)
        wide = x.shape[1] * x.shape[2] * self.convs[0].out_channels // self.convs[0].stride[0] ** 2
        return core.by_images(self, self.of_some, x, wide)

    def of_some(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        """The same for as many images as are near at once."""
        x = rearrange(x, "B H W C -> B C H W").contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        return rearrange(self.convs(x), "B C H W -> B H W C")


def sines(shape: tuple[int, int], channels: int) -> Float[Tensor, "C H W"]:
    """The position table at the start: a quarter of the channels each are sines and cosines of columns and of rows."""
    count = -(-channels // 4)
    frequency = 10000.0 ** (-torch.arange(count) / count)
    angles = [torch.arange(side)[None, :] * frequency[:, None] for side in shape]
    rows, cols = (torch.cat([a.sin(), a.cos()]) for a in angles)
    table = [cols[:, None, :].expand(-1, shape[0], -1), rows[:, :, None].expand(-1, -1, shape[1])]
    return torch.cat(table)[:channels]


class Stem(nn.Module):
    """(B, H, W, C) to (B, ceil(H / 4), ceil(W / 4), out): convolutions, LayerNorm, a table of positions that learns.

    map_size: of the table, or None for a stem without one.
    """

    def __init__(self, channels: int, out: int, norm: str, map_size: tuple[int, int] | None):
        super().__init__()
        self.proj = Convolutions(channels, norm, (3, 2, out, 1), (3, 1, out, 1), (3, 2, out, 1))
        self.norm, self.table = nn.LayerNorm(out), None if map_size is None else nn.Parameter(sines(map_size, out))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        x = self.norm(self.proj(x))
        if self.table is None:
            return x
        table = core.resize_table(self.table, tuple(x.shape[1:3]))
        return x + rearrange(table, "C H W -> H W C").to(x.dtype)


class FullAttention(nn.Module):
    """Attention of every token to every token, with the convolution beside it: (B, H, W, C) to the same.

    lepe, attn_drop: as of `HybridScaleAttention`.
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, *, lepe: bool = True, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("heads", heads, dim)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.lepe_linear = nn.Linear(dim, dim) if lepe else None
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if lepe else None

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        q, (k, v) = core.split_heads(self.q(x), self.heads), self.kv(x).chunk(2, dim=-1)
        k, v = (core.split_heads(t, self.heads) for t in (k, v))
        if self.training and self.attn_drop:
            z = core.dense_attention_torch(q, k, v, None, q.shape[-1] ** -0.5, self.attn_drop)
        else:
            z = core.dense_attention(q, k, v, impl=self.implementation)
        if self.lepe_conv is not None:
            context = self.lepe_conv(rearrange(self.lepe_linear(x), "B H W C -> B C H W"))
            z = z + rearrange(context, "B (h d) H W -> B h (H W) d", h=self.heads)
        if tracing.recording():
            record = DenseRecord(q[0], k[0], v[0], z[0], shape)
            record.exact = self.lepe_conv is None  # the convolution is a path of its own
            tracing.keep(self, record)
        return self.proj(core.merge_heads(z, shape))


class SGBlock(nn.Module):
    """Attention and a feed-forward network, each beside an identity: a map and the significance that came with it, to
    a map and the significance for the next block.

    weigh: whether the next block reads the significance.  Stochastic depth drops either branch with probability
    `drop_path`; `proj_drop` is the dropout of what they put out.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        ratio: int,
        *,
        weigh: bool = False,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.weigh = weigh
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), attn
        self.norm2, self.ffn = nn.LayerNorm(dim, eps=1e-6), ConvFFN(dim, ratio)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B H W C"], significance: Float[Tensor, "B H W"] | None
    ) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H W"] | None]:
        y, found = self.norm1(x), None
        if isinstance(self.attn, HybridScaleAttention):
            y, found = self.attn(y, self.weigh)
        elif isinstance(self.attn, SelfGuidedAttention):
            y = self.attn(y, significance)
        else:
            y = self.attn(y)
        x = x + self.drop_path(self.proj_drop(y))  # SG-6
        return x + self.drop_path(self.proj_drop(self.ffn(self.norm2(x)))), found  # SG-7


class SGStage(Stage):
    """A stage that hands the significance of a block to the next one, and ends with a norm."""

    def __init__(self, down: nn.Module, blocks: list[nn.Module], norm: nn.Module):
        super().__init__(down, blocks)
        self.norm = norm

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w c"]:
        x, significance = self.down(x), None
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, significance = checkpoint(block, x, significance, use_reentrant=False)
            else:
                x, significance = block(x, significance)
        return self.norm(x)


class SGFormer(Backbone):
    """SG-Former and its ablations: (B, in_chans, H, W) to (B, num_classes), for any H and W.

    img_size: the (H, W) that sizes the position table; at another size it is resized (bicubic).  dims, depths, heads:
    by stage; depths count blocks, which take turns.  scales: s of the groups of heads, for every stage but the last,
    the largest first, or that by variant; one scale in each is "single scale" of Table 6.  rates: r of the sub-regions,
    the least significant first, for every stage but the last.  window: M.  mlp_ratio: e.
    norm: "group" or "batch", behind the convolutions of the stem and between the stages.  positions: whether there is a
    table of positions.  guidance: what guides (Table 7), see `HybridScaleAttention`.  guided: without it, all blocks
    are hybrid-scale ones, as Table 6 seems to have them.
    variant, reading, aggregate, shared, global_scale, merge_norm, lepe: see the head of this file.
    global_pool: "avg", "max", or "" where num_classes is 0.  drop_rate: dropout before the classifier.  attn_drop_rate,
    proj_drop_rate: of attention weights, and of what the two branches of a block put out.  drop_path_rate: stochastic
    depth of the last block.
    Raises ValueError, TypeError for arguments that do not fit together. Source: SG-Former section 3, Table 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 16, 1),
        heads: Sequence[int] = (2, 4, 8, 16),
        scales: Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]] = ((8, 1), (4, 1), (2, 1)),
        rates: Sequence[Sequence[int]] = ((196, 56, 56, 28), (49, 14, 14, 7), (2, 1)),
        window: int = 7,
        mlp_ratio: int = 4,
        norm: str = "group",
        positions: bool = True,
        guidance: str = "hybrid",
        guided: bool = True,
        variant: str = "official",
        reading: str | None = None,
        aggregate: str | None = None,
        shared: bool | None = None,
        global_scale: bool | None = None,
        merge_norm: bool | None = None,
        lepe: bool | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool=global_pool)
        core.one_of("variant", variant, tuple(VARIANTS))
        core.rate("drop_rate", drop_rate)
        core.rate("proj_drop_rate", proj_drop_rate)
        core.one_of("norm", norm, ("group", "batch"))
        scales = scales[variant] if isinstance(scales, Mapping) else scales
        count = check_stages(depths, heads=heads)
        check_stages([1] * (count - 1) or [1], scales=scales, rates=rates)
        given = dict(
            reading=reading,
            aggregate=aggregate,
            shared=shared,
            global_scale=global_scale,
            merge_norm=merge_norm,
            lepe=lepe,
        )
        how = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        self.variant = variant

        def attention(i: int, d: int) -> nn.Module:
            """The attention of block d of stage i."""
            size = dict(dim=dims[i], heads=heads[i], attn_drop=attn_drop_rate)
            if i == count - 1:
                return FullAttention(**size, lepe=how["lepe"])
            if d % 2 and guided:
                return SelfGuidedAttention(**size, rates=rates[i], parts=2, **{name: how[name] for name in GUIDED})
            options = {name: how[name] for name in HYBRID}
            return HybridScaleAttention(**size, scales=scales[i], window=window, guidance=guidance, **options)

        def down(i: int) -> nn.Module:
            """What brings the map to stage i."""
            wide = dims[i]
            return Convolutions(dims[i - 1], norm, (1, 1, wide, 1), (3, 2, wide, wide), (1, 1, wide, 1))

        self.embed = Stem(in_chans, dims[0], norm, self.table_size() if positions else None)
        self.stages = nn.ModuleList()
        for i, drops in enumerate(drop_path_rates(drop_path_rate, tuple(depths))):
            layers = [attention(i, d) for d in range(len(drops))]
            reads = [isinstance(layer, SelfGuidedAttention) for layer in (*layers[1:], None)]  # what comes before it
            blocks = [
                SGBlock(dims[i], layer, mlp_ratio, weigh=weigh, drop_path=rate, proj_drop=proj_drop_rate)
                for layer, weigh, rate in zip(layers, reads, drops, strict=True)
            ]
            last = nn.LayerNorm(dims[i], eps=1e-6) if i < count - 1 else nn.Identity()
            self.stages.append(SGStage(down(i) if i else nn.Identity(), blocks, last))
        self.norm = nn.LayerNorm(dims[count - 1], eps=1e-6)
        self.add_head(drop_rate)
        self.apply(initialise_published)

    @classmethod
    def configuration(cls, **options) -> dict:
        """As of every backbone, with the first convolution of its stem."""
        return super().configuration(**options) | dict(first_conv="embed.proj.convs.0")

    def table_size(self) -> tuple[int, int]:
        """The map behind the stem for an image of `img_size`."""
        return tuple(-(-side // 4) for side in self.img_size)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of this size (H, W): the table of positions is resized (bicubic)."""
        super().set_input_size(img_size)
        if (table := self.embed.table) is not None:
            resized = core.resize_table(table.detach(), self.table_size())
            self.embed.table = nn.Parameter(resized, table.requires_grad)

    def published_entries(self) -> dict[str, Entry]:
        """What the published code calls our entries; the position table is resized."""

        def table(entry: Tensor) -> Tensor:
            side = isqrt(entry.shape[1])
            square = rearrange(entry, "1 (H W) C -> C H W", H=side)
            return core.resize_table(square, tuple(self.embed.table.shape[1:]))

        names = {name: Entry(self.published_name(name)) for name in self.state_dict()}
        return names if self.embed.table is None else names | {"embed.table": Entry("pos_embed", table)}

    def published_name(self, name: str) -> str:
        """What the published code calls one of our entries."""
        found = re.fullmatch(r"(?:embed\.proj|stages\.(\d)\.down)\.convs\.(\d)\.(\w+)", name)
        if found:
            stage, number, kind = int(found[1] or 0) + 1, int(found[2]), found[3]
            part = "c" if number % 3 == 0 else "bn"
            place = f"conv.{number // 3 * 2}" if stage == 1 else f"conv{number // 3 + 1}"
            return f"patch_embed{stage}.{place}.{part}.{kind}"
        if name.startswith("embed.norm"):
            return name.replace("embed", "patch_embed1")
        if name.startswith("norm."):
            return name.replace("norm", f"norm{len(self.stages)}")
        if found := re.fullmatch(r"stages\.(\d)\.norm\.(\w+)", name):
            return f"norm{int(found[1]) + 1}.{found[2]}"
        if not (found := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name)):
            return name
        rest = found[3]
        for ours, theirs in {
            r"ffn\.expand": "mlp.fc1",
            r"ffn\.reduce": "mlp.fc2",
            r"ffn\.depthwise": "mlp.dwconv.dwconv",
            r"attn\.groups\.0\.merge": "attn.sr",
            r"attn\.groups\.0\.norm\.0": "attn.norm",
        }.items():
            rest = re.sub(f"^{ours}", theirs, rest)
        rest = re.sub(r"^attn\.groups\.(\d)\.(q|kv)", lambda m: f"attn.{m[2]}{int(m[1]) + 1}", rest)
        rest = re.sub(r"^attn\.kv\.(\d)", lambda m: f"attn.kv{int(m[1]) + 1}", rest)
        rest = re.sub(r"^attn\.f\.(\d)", lambda m: f"attn.f{int(m[1]) + 1}", rest)
        return f"block{int(found[1]) + 1}.{found[2]}.{rest}"


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published SG-Former."""
    names = {(64, 16): "sgformer_small", (64, 28): "sgformer_medium", (96, 24): "sgformer_base"}
    blocks = {key.split(".")[1] for key in state if key.startswith("block3.")}
    found = len(state["patch_embed1.conv.0.c.weight"]), len(blocks)
    if found not in names:
        size = f"{found[0]} channels in stage 1, {found[1]} blocks in stage 3"
        raise ValueError(f"state_dict: an SG-Former that is none of the published ones: {size}")
    classes, side = len(state["head.weight"]) if "head.weight" in state else 0, isqrt(state["pos_embed"].shape[1])
    options = ({} if classes == 1000 else {"num_classes": classes}) | ({} if side == 56 else {"img_size": 4 * side})
    return names[found], options


SMALL = dict()
MEDIUM = dict(depths=(2, 6, 28, 2), heads=(2, 4, 8, 16), drop_path_rate=0.2)
BASE = dict(
    dims=(96, 192, 384, 768),
    depths=(4, 6, 24, 2),
    heads=(4, 6, 12, 24),
    scales={"official": ((8, 1), (4, 1), (2, 1)), "paper": ((8, 4, 2, 1), (4, 2, 1), (2, 1))},
    drop_path_rate=0.4,
)
MINI = dict(
    img_size=128,
    num_classes=10,
    dims=(32, 64, 128),
    depths=(2, 4, 2),
    heads=(2, 4, 8),
    scales=((4, 1), (2, 1)),
    rates=((64, 16, 16, 8), (16, 4, 4, 2)),
    window=8,
    norm="batch",
    positions=False,
    variant="paper",
    drop_path_rate=0.05,
)

register_model("sgformer_small", SGFormer, **SMALL)
register_model("sgformer_medium", SGFormer, **MEDIUM)
register_model("sgformer_base", SGFormer, **BASE)
register_model("sgformer_mini", SGFormer, **MINI)

register_published("patch_embed1.conv.0.c.weight", identify)
