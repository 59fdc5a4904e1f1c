"""SETR-PUP-HLG (IJCV 2024, section 3.4): HLG whose stages a decoder of two more HLG layers reads, for segmentation.

    backbone    HLG, with a LayerNorm behind every stage
    decoder     all stages at one size, side by side; 3 x 3, batch norm, ReLU; a layer with plain windows and one with
                dilated windows; dropout; classifier; bilinear to the image
    auxiliary   a small head on the third stage, which training alone uses, with a weight of 0.4

The decoder's layers are older than those of the backbone (HLG-5 to HLG-8 as they are written, without the shortcut of
HLG-9): each norms what its parts read, and has one set of maps, one projection and one bias for both attentions.

Text and code differ (ledger: papers/hlg.toml). `variant="official"` follows the code, `variant="paper"` the text:

    keyword          "official"  "paper"
    fuse_stage       1           3         the stage to whose size all are brought: H/4 or H/16
    decoder_window   7           8         the side of the decoder's windows
    groups           8           0         dilated windows on each side of the map; 0: as `decoder_window` says
    positions        "released"  "centre"  where a window is, for the bias of global attention

Each keyword can be given alone; the backbone follows `variant` and `positions` too. The text ends in "progressive
upsampling" of layers that it does not describe; here, as in the code, one upsampling leads to the image.
"""

import re
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import Mlp
from timm.models._input import update_model_input_size  # private, but what timm's own models call
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.dense.setr import ConvHead, Head, convolution, enlarge, resize
from dynattn.mechanisms.local_global import (
    POSITIONS,
    Layout,
    LocalGlobalRecord,
    bias_of_windows,
    window_embedding_torch,
)
from dynattn.models.hlg import BIAS, HLG, Smooth, found_in
from dynattn.models.layers import initialise
from dynattn.models.published import Entry, register_published
from dynattn.models.registry import build_of, register_model

VARIANTS = {
    "official": dict(fuse_stage=1, decoder_window=7, groups=8, positions="released"),
    "paper": dict(fuse_stage=3, decoder_window=8, groups=0, positions="centre"),
}


class Groups(Layout):
    """Dilated windows, `window` on each side of the map, as large as they come out; fewer where there are fewer cells.

    Every one has a cell: their sides are the ceilings of the shares.
    """

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows: D."""
        return tuple(core.smaller(self.window, side) for side in self.shape)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a window: R."""
        return tuple(-(-side // D) for side, D in zip(self.shape, self.grid, strict=True))

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns that are added at the bottom and right."""
        return tuple(D * R - side for D, R, side in zip(self.grid, self.sides, self.shape, strict=True))


def bias_as_released(network: core.DisplacementBias, layout: Layout, like: Tensor) -> Float[Tensor, "1 h L N"]:
    """B_G of the published decoder: where a cell and a window are apart, counted in rows of another length.

    The table has the displacements of all cells, 2 W - 1 in a row; a cell (i, j) and a window (I', J') of the I x J
    windows read its entry (i - I' + I - 1) (2 J - 1) + (j - J' + J - 1).
    """
    (H, W), (I, J) = (tuple(D * R for D, R in zip(layout.grid, layout.sides, strict=True)), layout.grid)
    i, j, row, col = (torch.arange(n, device=like.device) for n in (*layout.shape, I, J))
    down, right = i[:, None] - row + I - 1, j[:, None] - col + J - 1  # (H, I), (W, J)
    entry = down[:, None, :, None] * (2 * J - 1) + right[None, :, None, :]  # (H, W, I, J)
    rows = ((layout.shape[0] + I - 2) * (2 * J - 1) + layout.shape[1] + J - 2) // (2 * W - 1) + 1  # that are read
    of = network(torch.arange(rows, device=like.device) - H + 1, torch.arange(1 - W, W, device=like.device))
    return of.flatten(1)[:, entry.flatten(2).flatten(0, 1)][None].to(like.dtype)


class SharedAttention(nn.Module):
    """Local, then global attention, each normed and beside an identity: (B, H, W, C) to the same, for any H and W.

    dim, heads: C and the heads.  window: R of plain windows; R of dilated ones, or with `groups` how many there are on
    each side.  positions: where B_G takes a window to be, at its "centre" or as "released".  attn_drop, proj_drop: the
    shares of weights and of the projection's output that training drops.
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`
    local = True  # for the record

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        *,
        dilated: bool,
        groups: bool = False,
        positions: str = "centre",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.dim, self.heads, self.window = dim, core.divisor("decoder_heads", heads, dim), window
        self.dilated, self.groups, self.positions = dilated, groups, positions
        self.attn_drop, self.scale = core.rate("attn_drop", attn_drop), (dim // heads) ** -0.5
        self.norm, self.global_norm, self.embed_norm = (nn.LayerNorm(dim, eps=1e-5) for _ in range(3))
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.proj, self.bias = nn.Linear(dim, dim), core.DisplacementBias(dim, heads)
        self.proj_drop = nn.Dropout(core.rate("proj_drop", proj_drop))

    def layout(self, shape: tuple[int, int]) -> Layout:
        """How the windows lie on a map."""
        return (Groups if self.groups else Layout)(shape, self.window, self.dilated)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Float[Tensor, "n h L d"]:
        """Attention of every query to every key that the bias does not hide."""
        if self.training and self.attn_drop:
            return core.dense_attention_torch(q, k, v, bias, self.scale, self.attn_drop)
        return core.dense_attention.forms.run(self.implementation, q, k, v, bias, self.scale)

    def local_table(self, layout: Layout, device: torch.device) -> Float[Tensor, "h I J"]:
        """B_W by displacement, in places of the window."""
        return self.bias(*(torch.arange(1 - side, side, device=device) for side in layout.sides))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        layout, n = self.layout(tuple(x.shape[1:3])), self.norm(x)
        q, (k, v) = self.q(n), self.kv(n).chunk(2, dim=-1)
        parts = (rearrange(layout.cut(t), "n T (h d) -> n h T d", h=self.heads) for t in (q, k, v))
        z = self.attend(*parts, layout.bias(self.local_table(layout, q.device), q, q.shape[0]))
        z = layout.join(rearrange(z, "n h T d -> n T (h d)"))
        x = x + self.proj_drop(self.proj(z))  # HLG-5
        n = self.global_norm(x)
        query = core.split_heads(self.q(n), self.heads)  # HLG-6
        g = self.embed_norm(window_embedding_torch(n, None, None, self.window, self.dilated, "mean", layout))
        k_g, v_g = (rearrange(t, "B N (h d) -> B h N d", h=self.heads) for t in self.kv(g).chunk(2, dim=-1))  # HLG-8
        if self.positions == "released":
            bias = bias_as_released(self.bias, layout, q)
        else:
            bias = bias_of_windows(self.bias, layout, self.positions, q)
        y = self.attend(query, k_g, v_g, bias)
        if tracing.recording():
            tracing.keep(self, LocalGlobalRecord(self, layout, (q, k, v, z), (query, k_g, v_g, y), bias))
        return x + self.proj_drop(self.proj(core.merge_heads(y, layout.shape)))  # HLG-7


class DecoderLayer(nn.Module):
    """Convolutions, attention, a feed-forward network four times as wide: (B, H, W, C) to the same."""

    def __init__(self, attn: SharedAttention, proj_drop: float):
        super().__init__()
        self.smooth, self.attn = Smooth(attn.dim), attn
        self.norm, self.mlp = nn.LayerNorm(attn.dim, eps=1e-5), Mlp(attn.dim, 4 * attn.dim, drop=proj_drop)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.attn(self.smooth(x))
        return x + self.mlp(self.norm(x))


class FusionHead(Head):
    """Maps (B, in_chans[i], h, w), each half as large as the one before, to logits (B, num_classes, h, w) of one.

    stage: to whose size the maps are brought, from 1.  channels: of the joined maps.  layers: that follow.  drop: the
    share of channels that training drops before the classifier.
    """

    def __init__(
        self,
        in_chans: Sequence[int],
        num_classes: int,
        *,
        stage: int,
        channels: int,
        layers: Sequence[nn.Module],
        drop: float,
    ):
        super().__init__()
        self.stage = stage
        self.fuse = nn.Sequential(*convolution(sum(in_chans), channels, 3, bias=True))
        self.layers, self.drop = nn.Sequential(*layers), nn.Dropout2d(drop)
        self.classifier = nn.Conv2d(channels, core.positive("num_classes", num_classes), 1)

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B K h w"]:
        (h, w), found = maps[self.stage - 1].shape[-2:], []
        for i, x in enumerate(maps, 1):
            if i < self.stage:
                x = resize(x, (h, w))
            found.append(enlarge(x, 2 ** max(0, i - self.stage))[..., :h, :w])  # a cell stays where it is
        x = rearrange(self.fuse(torch.cat(found, dim=1)), "B C h w -> B h w C")
        return self.classifier(self.drop(rearrange(self.layers(x), "B h w C -> B C h w")))


class SETRPupHLG(nn.Module):
    """Semantic segmentation: (B, in_chans, H, W) to logits (B, num_classes, H, W), for any H and W.

    dims, depths, heads, stems, window, drop_path_rate: of the backbone, as of `HLG`.
    channels, decoder_heads: of the decoder.  aux_stage: that the auxiliary head reads, from 1; aux_channels: of it.
    aux: whether there is an auxiliary head.  aux_weight: of its loss, for who trains the model.
    variant, fuse_stage, decoder_window, groups, positions: see the head of this file.
    drop_rate: of channels, before the classifier.  attn_drop_rate, proj_drop_rate: of attention weights, and of what
    the branches of layers put out, in backbone and decoder.
    Raises ValueError, TypeError for arguments that do not fit together. Source: section 3.4, the published code.
    """

    segments = True  # what it puts out is a class for each pixel

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        in_chans: int = 3,
        num_classes: int = 150,
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        stems: int = 1,
        window: int = 7,
        channels: int = 512,
        decoder_heads: int = 16,
        aux: bool = True,
        aux_stage: int = 3,
        aux_channels: int = 256,
        aux_weight: float = 0.4,
        variant: str = "official",
        fuse_stage: int | None = None,
        decoder_window: int | None = None,
        groups: int | None = None,
        positions: str | None = None,
        drop_rate: float = 0.1,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        core.one_of("variant", variant, tuple(VARIANTS))
        core.positive("num_classes", num_classes)
        core.positive("channels", channels)
        given = dict(fuse_stage=fuse_stage, decoder_window=decoder_window, groups=groups, positions=positions)
        how = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        core.one_of("positions", how["positions"], POSITIONS)
        self.img_size, self.in_chans, self.num_classes = core.pair("img_size", img_size), in_chans, num_classes
        self.variant, self.aux_weight, self.aux_stage = variant, aux_weight, aux_stage
        drops = dict(attn_drop_rate=attn_drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        self.backbone = HLG(
            self.img_size,
            in_chans,
            0,
            dims=dims,
            depths=depths,
            heads=heads,
            stems=stems,
            window=window,
            variant=variant,
            positions=how["positions"],
            **drops,
        )
        count = len(self.backbone.stages)
        core.one_of("aux_stage", aux_stage, tuple(range(1, count + 1)))
        core.one_of("fuse_stage", how["fuse_stage"], tuple(range(1, count + 1)))
        self.num_features = self.head_hidden_size = dims[count - 1]
        self.feature_info = [info | dict(module=f"backbone.{info['module']}") for info in self.backbone.feature_info]
        self.norms = nn.ModuleList(nn.LayerNorm(wide, eps=1e-6) for wide in dims[: count - 1])
        groups = how["groups"] and core.positive("groups", how["groups"])
        side = core.positive("decoder_window", how["decoder_window"])

        def layer(dilated: bool) -> DecoderLayer:
            """A layer of the decoder, with plain or with dilated windows."""
            grouped = dilated and bool(groups)
            attn = SharedAttention(
                channels,
                decoder_heads,
                groups if grouped else side,
                dilated=dilated,
                groups=grouped,
                positions=how["positions"],
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
            )
            return DecoderLayer(attn, proj_drop_rate).apply(initialise)

        self.decoder = FusionHead(
            dims[:count],
            num_classes,
            stage=how["fuse_stage"],
            channels=channels,
            layers=[layer(False), layer(True)],
            drop=core.rate("drop_rate", drop_rate),
        )
        self.aux = nn.ModuleList(
            ConvHead(dims[aux_stage - 1], num_classes, channels=aux_channels) for _ in range(bool(aux))
        )

    @classmethod
    def configuration(cls, img_size: int | tuple[int, int], depths: Sequence[int], aux: bool, **options) -> dict:
        """What timm wants to know of a model before it is made."""
        found = HLG.configuration(img_size=img_size, depths=depths)
        classifiers = ("decoder.classifier", *["aux.0.classifier"] * bool(aux))
        return found | dict(first_conv=f"backbone.{found['first_conv']}", classifier=classifiers)

    # What it computes ------------------------------------------------------------------------------------------------

    def forward(
        self, x: Float[Tensor, "B C H W"], aux: bool = False
    ) -> Float[Tensor, "B K H W"] | tuple[Float[Tensor, "B K H W"], list[Float[Tensor, "B K H W"]]]:
        """Logits of every pixel; with `aux` also those of the auxiliary head, in a list."""
        if self.decoder is None:
            raise ValueError("model: its decoder was cut off with the stages that it read; it has features only")
        maps = [
            rearrange(norm(m), "B h w c -> B c h w")
            for norm, m in zip((*self.norms, self.backbone.norm), self.backbone.stage_maps(x), strict=True)
        ]
        of_pixels = lambda y, stage: enlarge(y, 2 ** (stage + 1))[..., : x.shape[-2], : x.shape[-1]]  # noqa: E731
        logits = of_pixels(self.decoder(maps), self.decoder.stage)
        if not aux:
            return logits
        return logits, [of_pixels(head(maps[self.aux_stage - 1]), self.aux_stage) for head in self.aux]

    # What timm's models have -----------------------------------------------------------------------------------------

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The map of the last stage, normed."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: Float[Tensor, "B c h w"], pre_logits: bool = False) -> Float[Tensor, "B c h w"]:
        """The map itself with `pre_logits`. Raises ValueError without: the decoder reads all stages."""
        if not pre_logits:
            raise ValueError("model: its decoder reads all stages, and forward_head has the last one only")
        return x

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs of the backbone, highest resolution first: see its `forward_intermediates`."""
        return self.backbone.forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the decoder if wanted; returns the stages as numbers.

        Where stages go, the decoder goes with them: it reads all.
        """
        count = len(self.backbone.stages)
        chosen = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.backbone.stages) < count:
            self.decoder, self.norms, self.aux = None, nn.ModuleList(), nn.ModuleList()
        return chosen

    def get_classifier(self) -> nn.Module:
        """The last layer of the decoder."""
        return self.decoder.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New last layers of decoder and auxiliary head, for `num_classes`. `global_pool` is accepted and unused."""
        self.num_classes = core.positive("num_classes", num_classes)
        for head in (self.decoder, *self.aux):
            head.reset_classifier(num_classes)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of this size (H, W). Any size is accepted at run time without it."""
        self.img_size = self.backbone.img_size = core.pair("img_size", img_size)
        update_model_input_size(self, self.img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the input of each layer of the backbone only, and computes it again."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters are one layer for layer-wise learning rates: the stem, every layer, the heads."""
        blocks = r"^backbone\.stages\.(\d+)" if coarse else r"^backbone\.stages\.(\d+)\.blocks\.(\d+)"
        return dict(stem=r"^backbone\.embed", blocks=blocks)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: none but those that it never reaches."""
        return set()

    # Published checkpoints -------------------------------------------------------------------------------------------

    def published_entries(self) -> dict[str, Entry]:
        """What the published code calls our entries."""
        return {name: Entry(self.published_name(name)) for name in self.state_dict()}

    def published_name(self, name: str) -> str:
        """What the published code calls one of our entries, without its "backbone."."""
        part, _, rest = name.partition(".")
        if part == "backbone":
            return self.backbone.published_name(rest)
        if part == "norms":
            return f"norm_out_{rest}"
        if part == "aux":
            rest = rest.partition(".")[2].replace("layers.0", "convs.0.conv").replace("layers.1", "convs.0.bn")
            return f"auxiliary_head.{rest.replace('classifier', 'conv_seg')}"
        rest = rest.replace("fuse.0", "conv_0").replace("fuse.1", "syncbn_fc_0").replace("classifier", "conv_seg")
        if found := re.fullmatch(r"layers\.(\d)\.(.+)", rest):
            number, rest = found.groups()
            for ours, theirs in NAMES.items():
                if rest.startswith(f"{ours}."):
                    rest = theirs + rest.removeprefix(ours)
                    break
            rest = f"decode_transformer.{number}.{rest}"
        return f"decode_head.{rest}"


# Of a layer of the decoder, our name in front of what the published code calls it.
NAMES = {
    **{f"smooth.{n}.conv": f"spatial_smooth.0.{3 * n}" for n in range(3)},
    **{f"smooth.{n}.norm": f"spatial_smooth.0.{3 * n + 1}" for n in range(3)},
    "attn.norm": "norm0",
    "attn.global_norm": "norm1",
    "attn.embed_norm": "attn.norm",
    "norm": "norm2",
    **{f"attn.bias.layers.{n}": f"attn.pos.{theirs}" for n, theirs in BIAS.items()},
}


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published SETR-PUP-HLG, of one stem convolution or two.

    Raises ValueError for another width than those of the paper.
    """
    found = found_in(state)
    wide, deep = found["dims"][0], found["depths"][2]
    names = {96: "setr_pup_hlg_medium" if deep > 6 else "setr_pup_hlg_small", 128: "setr_pup_hlg_large"}
    if wide not in names:
        raise ValueError(f"state_dict: a SETR-PUP-HLG that is none of the published ones: {wide} channels in stage 1")
    found |= dict(num_classes=len(state["decode_head.conv_seg.weight"]), aux="auxiliary_head.conv_seg.weight" in state)
    own = dict(depths=(2, 2, 6, 2), stems=1, num_classes=150, aux=True) | build_of(names[wide])[1]
    return names[wide], {key: found[key] for key in ("num_classes", "depths", "stems", "aux") if found[key] != own[key]}


SMALL = dict()
MEDIUM = dict(depths=(2, 2, 18, 2))
LARGE = dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path_rate=0.3)
MINI = dict(
    img_size=64,
    num_classes=11,
    dims=(32, 64, 128),
    depths=(2, 2, 2),
    heads=(2, 4, 8),
    window=4,
    channels=64,
    decoder_heads=4,
    aux_stage=2,
    aux_channels=48,
    decoder_window=4,
    groups=4,
    positions="centre",
    drop_path_rate=0.05,
)

register_model("setr_pup_hlg_small", SETRPupHLG, **SMALL)
register_model("setr_pup_hlg_medium", SETRPupHLG, **MEDIUM)
register_model("setr_pup_hlg_large", SETRPupHLG, **LARGE)
register_model("setr_pup_hlg_mini", SETRPupHLG, **MINI)

register_published("decode_head.decode_transformer.0.norm0.weight", identify)
