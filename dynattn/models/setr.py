"""SETR (CVPR 2021; IJCV 2024): a ViT whose layers a decoder reads, for semantic segmentation.

    encoder     ViT, DeiT or BEiT, one map of H/16 x W/16 from the first layer to the last; no norm behind it
    decoder     "naive", "pup" or "mla" (`dynattn/dense/setr.py`), then a bilinear resize to the image
    auxiliary   heads on earlier layers, which training alone uses, with a weight of 0.4

Text and code differ (ledger: papers/setr.toml). `variant="official"` follows the code, which checkpoints need;
`variant="paper"` is what the printed multiply-adds fit:

    keyword            "official"   "paper"
    classify_last      False        True      PUP: the classifier stands behind the last upsampling, or in front of it:
                                              the logits are the same, since both are linear
    classifier_kernel  3            1         MLA: of the classifier

Each keyword can be given alone. In "mla" the class token is dropped in front of the first layer.
"""

import re
from collections.abc import Sequence
from math import isqrt

from jaxtyping import Float
from timm.models._input import update_model_input_size  # private, but what timm's own models call
from torch import Tensor, nn

from dynattn import core
from dynattn.dense.setr import MapHead, MultiLevelHead, ProgressiveHead, resize
from dynattn.models.layers import chosen_of
from dynattn.models.published import Entry, register_published
from dynattn.models.registry import register_model
from dynattn.models.vit import ViT, load_encoder, split_positions

__all__ = ["SETR", "identify", "load_encoder"]

DECODERS = ("naive", "pup", "mla")
VARIANTS = {
    "official": dict(classify_last=False, classifier_kernel=3),
    "paper": dict(classify_last=True, classifier_kernel=1),
}


class SETR(nn.Module):
    """Semantic segmentation: (B, in_chans, H, W) to logits (B, num_classes, H, W), for any H and W.

    img_size: the (H, W) that sizes the table of positions; at another size it is resized (bilinear).
    decoder: "naive", "pup" or "mla".  encoder: "vit", which DeiT is too, or "beit".  patch, dim, depth, heads: of it.
    layers: that the decoder reads, counted from 1; one, and for "mla" several, the shallowest first.
    aux_layers: that the auxiliary heads read. "mla" has none: its heads read the decoder's own maps, one each.
    aux: whether there are auxiliary heads; without them training has the main loss alone (Table 3, "w.o.aux").
    aux_weight: of each auxiliary loss, for who trains the model.
    steps: for "pup", in how many upsamplings the patch's side is made up for; 2 is "2step" of Table 3.
    channels: of the decoder.  conv_stem, local_convs: as of `ViT`, for small models.
    variant, classify_last, classifier_kernel: see the head of this file.
    layer_scale: what BEiT's factors start from.  attn_drop_rate, proj_drop_rate: of attention weights, and of what the
    two branches of a layer put out.  drop_path_rate: stochastic depth of the last layer.
    Raises ValueError, TypeError for arguments that do not fit together. Source: SETR sections 3.2, 3.4 and 4.1.
    """

    segments = True  # what it puts out is a class for each pixel
    unused_entries = re.compile(r"(decode_head|auxiliary_head\.\d+)\.conv_seg\.(weight|bias)")  # nothing reads them

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        in_chans: int = 3,
        num_classes: int = 150,
        *,
        decoder: str = "pup",
        encoder: str = "vit",
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        layers: Sequence[int] = (12,),
        aux_layers: Sequence[int] = (),
        aux: bool = True,
        aux_weight: float = 0.4,
        steps: int = 4,
        channels: int = 256,
        conv_stem: bool = False,
        local_convs: bool = False,
        variant: str = "official",
        classify_last: bool | None = None,
        classifier_kernel: int | None = None,
        layer_scale: float = 0.1,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        core.one_of("decoder", decoder, DECODERS)
        core.one_of("encoder", encoder, ("vit", "beit"))
        core.one_of("variant", variant, tuple(VARIANTS))
        core.positive("in_chans", in_chans)
        core.positive("num_classes", num_classes)
        core.rate("proj_drop_rate", proj_drop_rate)
        check_layers("layers", layers, depth, one=decoder != "mla")
        if aux_layers:
            check_layers("aux_layers", aux_layers, depth)
        given = dict(classify_last=classify_last, classifier_kernel=classifier_kernel)
        how = VARIANTS[variant] | {name: value for name, value in given.items() if value is not None}
        self.img_size, self.in_chans, self.num_classes = core.pair("img_size", img_size), in_chans, num_classes
        self.kind, self.variant, self.layers, self.aux_weight = decoder, variant, tuple(layers), aux_weight
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [dict(num_chs=dim, reduction=patch, module=f"encoder.blocks.{i}") for i in range(depth)]
        self.encoder = ViT(
            self.img_size,
            in_chans,
            kind=encoder,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=heads,
            class_token=decoder != "mla",
            conv_stem=conv_stem,
            local_convs=local_convs,
            layer_scale=layer_scale,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        self.aux_layers = tuple(aux_layers) if aux and decoder != "mla" else ()
        size = dict(num_classes=num_classes, channels=channels)
        if decoder == "mla":
            factor = max(1, patch // 4)
            self.decoder = MultiLevelHead([dim] * len(layers), factor=factor, kernel=how["classifier_kernel"], **size)
            self.aux = nn.ModuleList(MapHead(channels, num_classes) for _ in layers if aux)
        elif decoder == "pup":
            factors = upsamplings(patch, steps)
            factors = factors if how["classify_last"] else (*factors[:-1], 1)
            self.decoder = ProgressiveHead(dim, factors=factors, **size)
            last = min(4, patch)
            self.aux = nn.ModuleList(ProgressiveHead(dim, factors=(last,), **size) for _ in self.aux_layers)
        else:
            self.decoder, *others = (
                ProgressiveHead(dim, factors=(1,), kernel=1, **size) for _ in (None, *self.aux_layers)
            )
            self.aux = nn.ModuleList(others)

    @classmethod
    def configuration(
        cls,
        img_size: int | tuple[int, int],
        patch: int,
        decoder: str,
        layers: Sequence,
        aux_layers: Sequence,
        aux: bool,
        conv_stem: bool,
        **options,
    ) -> dict:
        """What timm wants to know of a model before it is made."""
        count = len(layers if decoder == "mla" else aux_layers) if aux else 0
        classifiers = ("decoder.classifier", *(f"aux.{i}.classifier" for i in range(count)))
        pool_size = tuple(-(-side // patch) for side in core.pair("img_size", img_size))
        first = "encoder.embed.proj.stem.convs.0.0" if conv_stem else "encoder.embed.proj"
        return dict(pool_size=pool_size, first_conv=first, classifier=classifiers)

    # What it computes ------------------------------------------------------------------------------------------------

    def forward(
        self, x: Float[Tensor, "B C H W"], aux: bool = False
    ) -> Float[Tensor, "B K H W"] | tuple[Float[Tensor, "B K H W"], list[Float[Tensor, "B K H W"]]]:
        """Logits of every pixel; with `aux` also those of the auxiliary heads, in a list."""
        self.check_input(x)
        if self.decoder is None:
            raise ValueError("model: its decoder was cut off with the layers that it read; it has features only")
        *maps, last = self.encoder(x, (*self.aux_layers, *self.layers)) if aux else self.encoder(x, self.layers)
        if self.kind == "mla":
            levels = self.decoder.levels([*maps, last])
            logits, read = self.decoder.join(levels), levels
        else:
            logits, read = self.decoder(last), maps
        size = tuple(side * self.encoder.patch for side in last.shape[-2:])  # of the image and its padding
        of_pixels = lambda y: resize(y, size)[..., : x.shape[-2], : x.shape[-1]]  # noqa: E731
        if not aux:
            return of_pixels(logits)
        return of_pixels(logits), [of_pixels(head(m)) for head, m in zip(self.aux, read, strict=False)]

    def check_input(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is a floating (B, in_chans, H, W) of some size."""
        core.bind(x=(x, f"B {self.in_chans} H W"))

    # What timm's models have -----------------------------------------------------------------------------------------

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The map behind the last layer."""
        self.check_input(x)
        return self.encoder(x, (len(self.encoder.blocks),))[0]

    def forward_head(self, x: Float[Tensor, "B c h w"], pre_logits: bool = False) -> Float[Tensor, "B _ H W"]:
        """Logits of every pixel from the last layer's map (`pre_logits`: the map itself).

        Raises ValueError for "mla", whose decoder reads several layers.
        """
        if pre_logits:
            return x
        if self.kind == "mla":
            raise ValueError('decoder: "mla" reads several layers, and forward_head has the last one only')
        return resize(self.decoder(x), tuple(side * self.encoder.patch for side in x.shape[-2:]))

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps behind layers, all of one size, as timm's models give them.

        indices: which layers, from 0 (None all, n the last n). There is no norm behind them: `norm` changes nothing.
        Returns the list, or (last map, list) unless `intermediates_only`. `stop_early` leaves the result the same.
        """
        core.one_of("output_fmt", output_fmt, ("NCHW", "NHWC"))
        self.check_input(x)
        chosen = self.chosen_layers(indices)
        count = len(self.encoder.blocks)
        *maps, last = self.encoder(x, [*(i + 1 for i in chosen), max(chosen) + 1 if intermediates_only else count])
        if output_fmt == "NHWC":
            maps = [m.movedim(1, -1) for m in maps]
        return maps if intermediates_only else (last, maps)

    def chosen_layers(self, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
        """The layers, from 0, that timm's `indices` mean. Raises ValueError where there is no such layer."""
        return chosen_of(indices, len(self.encoder.blocks), "layers")

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers after the last of `indices`, and the decoder if wanted; returns the layers as numbers.

        Where layers go that the decoder reads, it goes with them. There is no norm to remove.
        """
        chosen = self.chosen_layers(indices)
        self.encoder.blocks = self.encoder.blocks[: max(chosen) + 1]
        if prune_head or len(self.encoder.blocks) < max(*self.layers, *self.aux_layers):
            self.decoder, self.aux = None, nn.ModuleList()
        return chosen

    def get_classifier(self) -> nn.Module:
        """The last layer of the decoder."""
        return self.decoder.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New last layers of decoder and auxiliary heads, for `num_classes`. `global_pool` is accepted and unused."""
        self.num_classes = core.positive("num_classes", num_classes)
        for head in (self.decoder, *self.aux):
            head.reset_classifier(num_classes)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of this size (H, W): tables are resized, as a checkpoint's would be."""
        self.img_size = core.pair("img_size", img_size)
        self.encoder.set_input_size(self.img_size)
        update_model_input_size(self, self.img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the input of each layer only, and computes it again in the backward pass."""
        self.encoder.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters are one layer for layer-wise learning rates: the stem, every layer, the heads."""
        return dict(stem=r"^encoder\.embed", blocks=r"^encoder\.blocks\.(\d+)")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: position tables and the class token."""
        spared = ("table", "class_bias", "class_token", "class_position")
        return {name for name, _ in self.named_parameters() if name.endswith(spared)}

    # Published checkpoints -------------------------------------------------------------------------------------------

    def published_entries(self) -> dict[str, Entry]:
        """What the published code calls our entries; the table of positions is resized."""
        entries = {name: Entry(self.published_name(name)) for name in self.state_dict()}
        if (table := self.encoder.embed.table) is not None:
            size = tuple(table.shape[1:])
            entries["encoder.embed.class_position"] = Entry("pos_embed", lambda t: split_positions(t, size)[0])
            entries["encoder.embed.table"] = Entry("pos_embed", lambda t: split_positions(t, size)[1])
        entries["encoder.embed.class_token"] = Entry("cls_token", lambda t: t.flatten())
        return entries

    def published_name(self, name: str) -> str:
        """What the published code calls one of our entries, without its "backbone."."""
        part, _, rest = name.partition(".")
        if part == "encoder":
            return rest.replace("embed.proj", "patch_embed.proj")
        place, head = "decode_head", self.decoder
        if part == "aux":
            number, _, rest = rest.partition(".")
            place, head = f"auxiliary_head.{number}", self.aux[int(number)]
        if isinstance(head, MapHead):
            return f"{place}.{rest.replace('classifier', 'aux')}"
        if isinstance(head, ProgressiveHead):
            rest = re.sub(r"^layers\.(\d+)\.0", r"conv_\1", rest)
            rest = re.sub(r"^layers\.(\d+)\.1", r"syncbn_fc_\1", rest)
            return f"{place}.{rest.replace('classifier', f'conv_{len(head.layers)}')}"
        if not (found := re.fullmatch(r"(norms|reduce|smooth|refine)\.(\d)\.(.+)", rest)):
            return f"{place}.{rest.replace('classifier', 'cls')}"
        group, level, rest = found[1], int(found[2]), found[3]
        if group == "refine":
            layer, index, rest = rest.split(".")
            return f"{place}.mlahead.head{level + 2}.{3 * int(layer) + int(index)}.{rest}"
        theirs = {"norms": f"norm_{level}", "reduce": f"mla.mla_p{level + 2}_1x1", "smooth": f"mla.mla_p{level + 2}"}
        return f"{theirs[group]}.{rest}"


def check_layers(name: str, layers: object, depth: int, one: bool = False) -> None:
    """Raise TypeError or ValueError unless they are numbers of layers from 1 to `depth`, and if wanted only one."""
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(layer, int) for layer in layers):
        raise TypeError(f"{name}: expected numbers of layers, as in (3, 6, 9), got {layers!r}")
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"{name}: expected layers from 1 to {depth}, got {layers!r}")
    if one and len(layers) > 1:
        raise ValueError(f"{name}: this decoder reads one layer, got {layers!r}")


def upsamplings(patch: int, steps: int) -> tuple[int, ...]:
    """Equal factors that make up for the side of a patch, so many. Raises ValueError where there are none."""
    factor = round(patch ** (1 / core.positive("steps", steps)))
    if factor**steps != patch:
        raise ValueError(f"steps: expected a number of equal steps from 1 to {patch}, the patch's side, got {steps}")
    return (factor,) * steps


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published SETR."""
    widths = {(768, 12): "base", (1024, 24): "large"}
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    found = len(state["patch_embed.proj.weight"]), depth
    if found not in widths:
        raise ValueError(f"state_dict: a SETR that is none of the published ones: {found[0]} channels, {depth} layers")
    options = {}
    if "decode_head.cls.weight" in state:
        decoder, classifier = "mla", state["decode_head.cls.weight"]
        if classifier.shape[-1] == 1:
            options["classifier_kernel"] = 1
    else:
        decoder = "pup" if state["decode_head.conv_0.weight"].shape[-1] == 3 else "naive"
        convolutions = sorted(key for key in state if re.fullmatch(r"decode_head\.conv_\d\.weight", key))
        classifier = state[convolutions[-1]]
        if decoder == "pup" and len(convolutions) != 5:
            options["steps"] = len(convolutions) - 1
    if len(classifier) != 150:
        options["num_classes"] = len(classifier)
    if (side := 16 * isqrt(state["pos_embed"].shape[1] - 1)) != 512:
        options["img_size"] = side
    if not any(key.startswith("auxiliary_head.") for key in state):
        options["aux"] = False
    return f"setr_{decoder}_{widths[found]}", options


BASE = dict(dim=768, depth=12, heads=12, layer_scale=0.1)
LARGE = dict(dim=1024, depth=24, heads=16, layer_scale=1e-5)
READ = {
    ("naive", "base"): dict(layers=(12,), aux_layers=(3, 6, 9)),
    ("naive", "large"): dict(layers=(24,), aux_layers=(10, 15, 20)),
    ("pup", "base"): dict(layers=(12,), aux_layers=(5, 8, 10, 12)),
    ("pup", "large"): dict(layers=(24,), aux_layers=(10, 15, 20, 24)),
    ("mla", "base"): dict(layers=(3, 6, 9, 12)),
    ("mla", "large"): dict(layers=(6, 12, 18, 24)),
}

for (_decoder, _size), _layers in READ.items():
    register_model(
        f"setr_{_decoder}_{_size}", SETR, decoder=_decoder, **(BASE if _size == "base" else LARGE), **_layers
    )

MINI = dict(
    img_size=64,
    num_classes=11,
    patch=8,
    dim=96,
    depth=4,
    heads=4,
    channels=48,
    conv_stem=True,
    local_convs=True,
)

register_model("setr_naive_mini", SETR, decoder="naive", layers=(4,), aux_layers=(2, 3), **MINI)
register_model("setr_pup_mini", SETR, decoder="pup", steps=3, layers=(4,), aux_layers=(2, 3), **MINI)
register_model("setr_mla_mini", SETR, decoder="mla", layers=(1, 2, 3, 4), **MINI)

register_published("decode_head.norm.weight", identify)
register_published("mla.mla_p2.0.weight", identify)
