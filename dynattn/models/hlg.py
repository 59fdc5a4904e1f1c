"""HLG, hierarchical local-global transformers (IJCV 2024, section 3.3).

    stem        3 x 3 convolution of stride 2, one or two, with batch norm                                 H/2 x W/2
    stage 1-4   layers, whose first has a stride of 2: H/4, H/8, H/16, H/32                                Table 1
    head        LayerNorm, global average, Linear

A layer: a feed-forward network with a depthwise convolution ("DWMLP"), whose output is normed, beside an identity or a
convolution of stride 2; a small convolutional network beside an identity; local and global attention
(`mechanisms/local_global.py`). Even layers of a stage have plain windows, odd ones dilated windows. In the last stage
all tokens read all, in place of both.

The published code parts from the text in places (ledger: papers/hlg.toml). `variant="official"` follows the code, which
checkpoints need; `variant="paper"` follows the text:

    keyword        "official"     "paper"
    query_as_key   True           False         local attention has its queries as keys, or keys of its own
    conv_of        "attention"    "values"      HLG-9: what the depthwise convolution reads
    positions      "released"     "centre"      where a window is, for the bias of global attention
    se             False          True          squeeze and excitation in the feed-forward network
    smooth         True           False         the convolutional network in front of attention
    full_last      True           False         full attention in the last stage, or local and global
    mask           True           True          nobody reads what completes the windows; the code lets it be read

Each keyword can be given alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.mechanisms.dense import DenseRecord
from dynattn.mechanisms.local_global import LocalGlobalAttention
from dynattn.models.layers import Backbone, Stage, check_dtype, check_stages, drop_path_rates, initialise
from dynattn.models.published import Entry, register_published
from dynattn.models.registry import build_of, register_model

VARIANTS = {
    "official": dict(
        query_as_key=True, conv_of="attention", positions="released", se=False, smooth=True, full_last=True, mask=True
    ),
    "paper": dict(
        query_as_key=False, conv_of="values", positions="centre", se=True, smooth=False, full_last=False, mask=True
    ),
}
ATTENTION = ("query_as_key", "conv_of", "positions")


class ConvNorm(nn.Module):
    """A convolution and its batch norm: (B, H, W, C) to (B, h, w, out).

    Where the statistics of the norm are fixed, both are one convolution: a pass over the map less.
    """

    def __init__(
        self, channels: int, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, bias: bool = True
    ):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution."""
        conv, norm = self.conv, self.norm
        precise = torch.promote_types(conv.weight.dtype, torch.float32)
        scale = norm.weight.to(precise) * (norm.running_var.to(precise) + norm.eps).rsqrt()
        centre = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        bias, weight = norm.bias - centre * scale, conv.weight * scale[:, None, None, None]
        return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)

    def forward(self, x: Float[Tensor, "B H W C"], activate: bool = False) -> Float[Tensor, "B h w out"]:
        """activate: whether GELU follows."""
        conv, fixed = self.conv, isinstance(self.norm, nn.BatchNorm2d) and not self.norm.training
        weight, bias = self.folded() if fixed else (conv.weight, conv.bias)
        if conv.kernel_size == (1, 1):
            x = rearrange(F.linear(x, weight.flatten(1), bias), "B H W C -> B C H W")
        else:
            x = rearrange(x, "B H W C -> B C H W").contiguous(memory_format=torch.channels_last)
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
        x = x if fixed else self.norm(x)
        if activate:
            x = core.gelu(x) if fixed else F.gelu(x)
        return rearrange(x, "B C H W -> B H W C")


class Stem(nn.Module):
    """(B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), out): a convolution of stride 2, and more of stride 1."""

    def __init__(self, channels: int, out: int, count: int):
        super().__init__()
        sizes = [(channels, 2), *[(out, 1)] * (count - 1)]
        self.convs = nn.ModuleList(ConvNorm(wide, out, 3, stride, bias=False) for wide, stride in sizes)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        check_dtype(x, self.convs[0].conv.weight)
        for conv in self.convs:
            x = conv(x, activate=True)
        return x


class DWMlp(nn.Module):
    """Four times as wide, a depthwise 3 x 3 convolution, and as wide as wanted: (B, H, W, C) to (B, h, w, out).

    se: squeeze and excitation behind the depthwise convolution, of a sixteenth of its channels.
    """

    def __init__(self, channels: int, out: int, stride: int, se: bool):
        super().__init__()
        wide = 4 * channels
        self.expand, self.depthwise = ConvNorm(channels, wide), ConvNorm(wide, wide, 3, stride, groups=wide)
        self.se = SqueezeExcite(wide, rd_channels=max(wide // 16, 1)) if se else None
        self.reduce = nn.Conv2d(wide, out, 1)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        wide = x.shape[1] * x.shape[2] * self.reduce.in_channels
        return core.by_images(self, self.of_some, x, wide)

    def of_some(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        """The same for as many images as are near at once."""
        x = self.depthwise(self.expand(x, activate=True), activate=True)
        if self.se is not None:
            x = rearrange(self.se(rearrange(x, "B H W C -> B C H W")), "B C H W -> B H W C")
        return F.linear(x, self.reduce.weight.flatten(1), self.reduce.bias)


class Smooth(nn.ModuleList):
    """Three convolutions, of which the one in the middle mixes places, beside an identity: (B, H, W, C) to the same."""

    def __init__(self, dim: int):
        narrow = dim // 4
        super().__init__(ConvNorm(*size) for size in ((dim, narrow, 1), (narrow, narrow, 3), (narrow, dim, 1)))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        reduce, conv, expand = self
        return core.gelu(x + expand(conv(reduce(x, activate=True), activate=True)))


class FullAttention(nn.Module):
    """Attention of every token to every token, whose output is normed, beside an identity: (B, H, W, C) to the same.

    attn_drop, proj_drop, drop_path: as of `LocalGlobalAttention`.
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, *, attn_drop: float = 0.0, proj_drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("heads", heads, dim)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.bias, self.norm = core.DisplacementBias(dim, heads), nn.LayerNorm(dim, eps=1e-6)
        self.proj_drop = nn.Dropout(core.rate("proj_drop", proj_drop))
        self.drop_path = DropPath(core.rate("drop_path", drop_path))

    def added(self, shape: tuple[int, int], like: Tensor) -> Float[Tensor, "1 h L L"]:
        """The bias of every query and key of a map, by displacement."""
        apart = [torch.arange(1 - side, side, device=like.device) for side in shape]
        rows, cols = core.relative_index(shape)
        return self.bias(*apart)[None, :, rows, cols].to(like.dtype)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        q, k, v = (core.split_heads(f(x), self.heads) for f in (self.q, self.k, self.v))
        bias, scale = self.added(shape, q), q.shape[-1] ** -0.5
        if self.training and self.attn_drop:
            z = core.dense_attention_torch(q, k, v, bias, scale, self.attn_drop)
        else:
            z = core.dense_attention.forms.run(self.implementation, q, k, v, bias, scale)
        if tracing.recording():
            tracing.keep(self, DenseRecord(q[0], k[0], v[0], z[0], shape, bias=bias[0]))
        return x + self.drop_path(self.norm(self.proj_drop(self.proj(core.merge_heads(z, shape)))))


class HLGLayer(nn.Module):
    """A feed-forward network of stride 1 or 2, convolutions, attention: (B, H, W, C) to (B, h, w, out).

    smooth: whether there are convolutions in front of attention.  pad: the side of windows to which the map is
    completed by zeros that count as tokens, or None where attention masks them.
    """

    def __init__(
        self,
        channels: int,
        attn: nn.Module,
        stride: int,
        *,
        se: bool = False,
        smooth: bool = True,
        pad: int | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        dim, self.pad = attn.dim, pad
        self.mlp, self.norm = DWMlp(channels, dim, stride, se), nn.LayerNorm(dim, eps=1e-6)
        whole = stride == 1 and channels == dim
        self.down = (
            nn.Identity() if whole else nn.Sequential(ConvNorm(channels, dim, 3, stride, groups=channels), nn.GELU())
        )
        self.smooth = Smooth(dim) if smooth else None
        self.attn = attn
        self.proj_drop, self.drop_path = nn.Dropout(proj_drop), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        x = self.down(x) + self.drop_path(self.norm(self.proj_drop(self.mlp(x))))
        shape = tuple(x.shape[1:3])
        if self.pad is not None:
            x = core.pad_map(x, core.padding_to(shape, (self.pad, self.pad)))
        if self.smooth is not None:
            x = self.smooth(x)
        x = self.attn(x)
        return x if self.pad is None else core.crop(x, shape)


class HLG(Backbone):
    """HLG and its ablations: (B, in_chans, H, W) to (B, num_classes), for any H and W.

    dims, depths, heads: by stage.  stems: convolutions of the stem; checkpoints of the published code may have two.
    window: R.  dilated: whether odd layers have dilated windows (Table 13, "plain+dila").  dilated_window: the side of
    these, by default R. Table 13's "dilation rate" is read so, since the paper does not say what it counts: its 7 is
    the usual model, whose windows have a side of 7.  embedding: of a window, "mean", "max" or "conv" (Table 12).
    local: without it there is global attention only (Table 14, "+ DWMLP").
    variant, query_as_key, conv_of, positions, se, smooth, full_last, mask: see the head of this file.
    global_pool: "avg", "max", or "" where num_classes is 0.  drop_rate: dropout before the classifier.  attn_drop_rate,
    proj_drop_rate: of attention weights, and of what the branches of a layer put out.  drop_path_rate: stochastic depth
    of the last layer.
    Raises ValueError, TypeError for arguments that do not fit together. Source: HLG section 3.3, Table 1.
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
        stems: int = 1,
        window: int = 7,
        dilated: bool = True,
        dilated_window: int | None = None,
        embedding: str = "mean",
        local: bool = True,
        variant: str = "official",
        query_as_key: bool | None = None,
        conv_of: str | None = None,
        positions: str | None = None,
        se: bool | None = None,
        smooth: bool | None = None,
        full_last: bool | None = None,
        mask: bool | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool=global_pool)
        core.one_of("variant", variant, tuple(VARIANTS))
        core.rate("drop_rate", drop_rate)
        core.positive("stems", stems)
        count = check_stages(depths, heads=heads)
        if any(wide % before for before, wide in zip(dims, dims[1:count], strict=False)):
            raise ValueError(f"dims: expected each a multiple of the one before, got {tuple(dims)}")
        if dilated_window is not None and not dilated:
            raise ValueError(f"dilated_window: expected None where no window is dilated, got {dilated_window}")
        sides = core.positive("window", window), core.positive("dilated_window", dilated_window or window)
        given = dict(
            query_as_key=query_as_key,
            conv_of=conv_of,
            positions=positions,
            se=se,
            smooth=smooth,
            full_last=full_last,
            mask=mask,
        )
        how = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        self.variant = variant

        def layer(i: int, d: int, rate: float) -> HLGLayer:
            """Layer d of stage i."""
            drops = dict(proj_drop=proj_drop_rate, drop_path=rate)
            spread, full = dilated and d % 2 == 1, how["full_last"] and i == count - 1
            if full:
                attn = FullAttention(dims[i], heads[i], attn_drop=attn_drop_rate, **drops)
            else:
                options = dict(dilated=spread, local=local, embedding=embedding, attn_drop=attn_drop_rate) | drops
                options |= {name: how[name] for name in ATTENTION}
                attn = LocalGlobalAttention(dims[i], heads[i], sides[spread], **options)
            return HLGLayer(
                dims[i] if d else dims[max(i - 1, 0)],
                attn,
                1 if d else 2,
                se=how["se"],
                smooth=how["smooth"] and not full,
                pad=None if full or how["mask"] else sides[spread],
                **drops,
            )

        self.embed = Stem(in_chans, dims[0], stems)
        self.stages = nn.ModuleList(
            Stage(nn.Identity(), [layer(i, d, rate) for d, rate in enumerate(rates)])
            for i, rates in enumerate(drop_path_rates(drop_path_rate, tuple(depths)))
        )
        self.norm = nn.LayerNorm(dims[count - 1], eps=1e-6)
        self.add_head(drop_rate)
        self.apply(initialise)

    @classmethod
    def configuration(cls, **options) -> dict:
        """As of every backbone, with the first convolution of its stem."""
        return super().configuration(**options) | dict(first_conv="embed.convs.0.conv")

    def published_entries(self) -> dict[str, Entry]:
        """What the published code calls our entries."""
        return {name: Entry(self.published_name(name)) for name in self.state_dict()}

    def published_name(self, name: str) -> str:
        """What the published code calls one of our entries."""
        parts = name.split(".")
        if parts[0] == "embed":
            return ".".join(["s0_conv", parts[2], "0" if parts[3] == "conv" else "1", parts[4]])
        if parts[0] != "stages":
            return name
        stage, number, rest = int(parts[1]), parts[3], ".".join(parts[4:])
        last = isinstance(self.stages[stage].blocks[int(number)].attn, FullAttention)
        for ours, theirs in (NAMES | (NAMES_FULL if last else NAMES_LOCAL_GLOBAL)).items():
            if rest.startswith(f"{ours}."):
                rest = theirs + rest.removeprefix(ours)
                break
        return f"block{stage + 1}.{number}.{rest}"


# Of a layer, our name in front of what the published code calls it.
BIAS = dict(zip("0134679", "pos_proj pos1.0 pos1.2 pos2.0 pos2.2 pos3.0 pos3.2".split(), strict=True))
NAMES = {
    "mlp.expand.conv": "mlp.fc1",
    "mlp.expand.norm": "mlp.norm1",
    "mlp.depthwise.conv": "mlp.fc2",
    "mlp.depthwise.norm": "mlp.norm2",
    "mlp.reduce": "mlp.fc3",
    "norm": "norm2",
    "down.0.conv": "down_proj.proj.0",
    "down.0.norm": "down_proj.proj.1",
    **{f"smooth.{n}.conv": f"spatial_smooth.0.{3 * n}" for n in range(3)},
    **{f"smooth.{n}.norm": f"spatial_smooth.0.{3 * n + 1}" for n in range(3)},
    **{f"attn.{part}": part for part in "qkv"},
    "attn.proj": "global_attn.proj",
}
NAMES_LOCAL_GLOBAL = {
    "attn.norm": "norm0",
    "attn.embed": "h0_conv",
    "attn.embed_norm": "h0_norm",
    "attn.conv": "aux_q",
    "attn.conv_norm": "norm1",
    **{f"attn.local_bias.layers.{n}": f"pos_local.{theirs}" for n, theirs in BIAS.items()},
    **{f"attn.global_bias.layers.{n}": f"pos_global.{theirs}" for n, theirs in BIAS.items()},
}
NAMES_FULL = {
    "attn.norm": "norm1",
    **{f"attn.bias.layers.{n}": f"pos_global.{theirs}" for n, theirs in BIAS.items()},
}


def found_in(state: dict[str, Tensor]) -> dict:
    """What the entries of a published HLG tell of it: the arguments of `HLG` that they decide."""
    layers = [{key.split(".")[1] for key in state if key.startswith(f"block{i}.")} for i in range(1, 5)]
    return dict(
        dims=tuple(len(state[f"block{i}.0.norm2.weight"]) for i in range(1, 5)),
        depths=tuple(map(len, layers)),
        heads=tuple(len(state[f"block{i}.0.pos_global.pos3.2.weight"]) for i in range(1, 5)),
        stems=sum(key.startswith("s0_conv.") and key.endswith(".0.weight") for key in state),
        embedding="conv" if "block1.0.h0_conv.weight" in state else "mean",
        num_classes=len(state["head.weight"]) if "head.weight" in state else 0,
    )


def describe(state: dict[str, Tensor]) -> str:
    """What a published HLG is, in words."""
    found = found_in(state)
    stem = f"{found['stems']} stem convolution" + "s" * (found["stems"] > 1)
    return f"It is an HLG of {stem}, with {', '.join(map(str, found['depths']))} layers by stage."


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published HLG, with one stem convolution or two, of any depths.

    Raises ValueError for another width than those of the paper and of the published code.
    """
    found = found_in(state)
    names = {32: "hlg_mobile", 48: "hlg_mobile", 64: "hlg_tiny", 96: "hlg_small", 128: "hlg_large"}
    if (wide := found["dims"][0]) not in names:
        raise ValueError(f"state_dict: an HLG that is none of the published ones: {wide} channels in stage 1")
    name = "hlg_medium" if wide == 96 and found["depths"][2] > 6 else names[wide]
    own = dict(dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), stems=1, embedding="mean")
    own |= {"num_classes": 1000} | build_of(name)[1]
    return name, {key: value for key, value in found.items() if value != own[key]}


MOBILE = dict(dims=(48, 96, 192, 384), depths=(2, 2, 2, 2), heads=(2, 4, 8, 16))
TINY = dict(dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), heads=(2, 4, 8, 16))
SMALL = dict()
MEDIUM = dict(depths=(2, 2, 18, 2))
LARGE = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path_rate=0.3)
MINI = dict(
    img_size=128,
    num_classes=10,
    dims=(32, 64, 128),
    depths=(2, 2, 2),
    heads=(2, 4, 8),
    window=8,
    positions="centre",
    drop_path_rate=0.05,
)

register_model("hlg_mobile", HLG, **MOBILE)
register_model("hlg_tiny", HLG, **TINY)
register_model("hlg_small", HLG, **SMALL)
register_model("hlg_medium", HLG, **MEDIUM)
register_model("hlg_large", HLG, **LARGE)
register_model("hlg_mini", HLG, **MINI)

register_published("s0_conv.0.0.weight", identify, describe)
