"""What several models share: patch embeddings, the feed-forward network, the transformer block, the classifier.

Maps are channels-last (B, H, W, C) between layers. A map whose side is odd is padded with zeros before a stride of 2,
so that every stage has the ceiling of half the side before.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._input import update_model_input_size  # private, but what timm's own models call
from torch import Tensor, nn

from dynattn import core


class PatchEmbedding(nn.Module):
    """A strided convolution and a LayerNorm: (B, H, W, C) to (B, ceil(H / stride), ceil(W / stride), out).

    kernel == stride: patches that do not overlap, the border padded with zeros to whole patches. kernel > stride:
    overlapping ones, padded by kernel // 2 on all sides.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, *, bias: bool = True):
        super().__init__()
        overlaps = kernel > stride
        self.stride, self.overlaps = stride, overlaps
        self.proj = nn.Conv2d(channels, out, kernel, stride, kernel // 2 if overlaps else 0, bias=bias)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        check_dtype(x, self.proj.weight)
        if not self.overlaps:
            x = core.pad_map(x, core.padding_to(tuple(x.shape[1:3]), (self.stride, self.stride)))
        x = self.proj(rearrange(x, "B H W C -> B C H W"))
        return self.norm(rearrange(x, "B C H W -> B H W C"))


class ConvStem(nn.Module):
    """Stride 4 by two 3 x 3 convolutions and a third of stride 1, with batch norm; then a LayerNorm.

    Early convolutions let a transformer find shapes after hundreds of steps instead of thousands: for small nets that
    train on little data. (B, H, W, C) to (B, ceil(H / 4), ceil(W / 4), out).
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        widths = [(channels, out // 2, 2), (out // 2, out, 2), (out, out, 1)]
        self.convs = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.GELU())
                for a, b, stride in widths
            )
        )
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        check_dtype(x, self.convs[0][0].weight)
        x = self.convs(rearrange(x, "B H W C -> B C H W"))
        return self.norm(rearrange(x, "B C H W -> B H W C"))


class LocalConv(nn.Module):
    """x + BatchNorm(depthwise 3 x 3 of x): tells a block's tokens what stands beside them."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        y = self.norm(self.conv(rearrange(x, "B H W C -> B C H W")))
        return x + rearrange(y, "B C H W -> B H W C")


class Block(nn.Module):
    """A pre-norm transformer block (DAT-4, DAT-5) around any attention that maps (B, H, W, C) to itself.

    Stochastic depth drops either branch with probability `drop_path`; `proj_drop` is the dropout of what attention and
    the layers of the feed-forward network put out; `ratio` widens that network; `local_conv` puts a `LocalConv` in
    front.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        ratio: float = 4.0,
        local_conv: bool = False,
    ):
        super().__init__()
        self.local = LocalConv(dim) if local_conv else nn.Identity()
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.local(x)
        x = x + self.drop_path(self.proj_drop(self.attn(self.norm1(x))))  # DAT-4
        return x + self.drop_path(self.mlp(self.norm2(x)))  # DAT-5


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Stochastic depth that grows linearly over all blocks from 0 to `rate`, by stage and block."""
    core.rate("drop_path_rate", rate)
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())  # also where the model is made on "meta"
    return [[next(rates) for _ in range(depth)] for depth in depths]


def check_stages(depths: object, **by_stage: object) -> int:
    """The number of stages; raises TypeError, ValueError unless all have blocks, and a value in each of `by_stage`."""
    if not isinstance(depths, Sequence) or not depths:
        raise TypeError(f"depths: expected the number of blocks of every stage, got {depths!r}")
    for depth in depths:
        core.positive("depths", depth)
    count = len(depths)
    for name, values in by_stage.items():
        if not isinstance(values, Sequence) or len(values) < count:
            raise ValueError(f"{name}: expected {count} values, one for each stage of depths, got {values!r}")
    return count


def check_classes(num_classes: object) -> None:
    """Raise TypeError or ValueError unless it is a number of classes; 0 is a model without classifier."""
    if num_classes != 0:
        core.positive("num_classes", num_classes)


def check_pool(global_pool: object, num_classes: int) -> None:
    """Raise ValueError unless a map can be pooled so, and a classifier, if there is one, gets a vector."""
    core.one_of("global_pool", global_pool, ("avg", "max", ""))
    if num_classes and not global_pool:
        raise ValueError(
            f"global_pool: expected 'avg' or 'max' in front of a classifier, got ''; give num_classes=0 with it, "
            f"not {num_classes}"
        )


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Raise TypeError unless x has the dtype of the first weight that it meets, which is what the model computes in.

    Only there is it known: sharded models (FSDP) keep their parameters in another one and convert them on the way.
    """
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x: expected {weight.dtype}, as the model's parameters are, got {x.dtype}")


def initialise(module: nn.Module) -> None:
    """Truncated normal weights of std 0.02 and zero biases for Linear layers, as ViT, DeiT and Swin start."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def each_stage(name: str, value: int | Sequence[int], count: int, does: str) -> Sequence[int]:
    """A number for each of `count` stages, from one for all or one each; raises TypeError, ValueError otherwise.

    does: what such a stage does, for the message.
    """
    values = [value] * count if isinstance(value, int) else value
    if not isinstance(values, Sequence) or len(values) < count:
        raise ValueError(f"{name}: expected a number, or {count}, one for each stage that {does}, got {value!r}")
    for number in values:
        core.positive(name, number)
    return values


class Backbone(nn.Module):
    """The interface of a hierarchical backbone, as timm has it: a model has `embed`, `stages`, `norm`, `drop`, `head`.

    A stage maps (B, H, W, C) to the next map; `feature_info` tells channels, reduction and module of each.
    """

    feature_info: list[dict]

    def __init__(
        self,
        img_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        global_pool: str,
    ):
        """What the constructors of all models check and keep; `add_stages` and `add_head` make what they share.

        dims, depths: channels and number of blocks by stage; the strides are 4, 8, 16 and so on. global_pool: "avg" or
        "max" of the last map, or "" for the map itself, where num_classes is 0.
        """
        super().__init__()
        core.positive("in_chans", in_chans)
        check_classes(num_classes)
        check_pool(global_pool, num_classes)
        count = check_stages(depths, dims=dims)
        self.img_size, self.in_chans, self.num_classes = core.pair("img_size", img_size), in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[count - 1]
        self.global_pool = global_pool
        self.feature_info = [dict(num_chs=dims[i], reduction=4 * 2**i, module=f"stages.{i}") for i in range(count)]

    def add_stages(
        self,
        depths: Sequence[int],
        down: Callable[[int], nn.Module],
        block: Callable[[int, int, float], nn.Module],
        drop_path_rate: float,
    ) -> None:
        """The stages, of blocks whose stochastic depth grows from 0 to `drop_path_rate`.

        down(i): what brings the map to stage i. block(i, d, rate): block d of stage i, of this rate.
        """
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, tuple(depths))):
            blocks = [block(i, d, rate) for d, rate in enumerate(rates)]
            self.stages.append(Stage(down(i), blocks))

    def add_head(self, drop_rate: float) -> None:
        """Dropout and a classifier for `head_hidden_size` channels."""
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes else nn.Identity()

    @classmethod
    def configuration(cls, img_size: int | tuple[int, int], depths: Sequence[int], **options) -> dict:
        """What timm wants to know of a model before it is made: the last map, the first convolution, the classifier."""
        pool_size = tuple(-(-side // (4 * 2 ** (len(depths) - 1))) for side in core.pair("img_size", img_size))
        return dict(pool_size=pool_size, first_conv="embed.proj", classifier="head")

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of this size (H, W): what depends on it is resized, as a checkpoint would be.

        Any size is accepted at run time without it; `trace` brings images to this one.
        """
        self.img_size = core.pair("img_size", img_size)
        update_model_input_size(self, self.img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the input of each block only, and computes it again in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters are one layer for layer-wise learning rates: the stem, every block (or stage), the head."""
        blocks = [(r"^stages\.(\d+)\.down", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^embed", blocks=r"^stages\.(\d+)" if coarse else blocks)  # 99999: with the block before

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: position tables, temperatures."""
        return {name for name, _ in self.named_parameters() if name.endswith(("table", "temperature"))}

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B h w c"]]:
        """The output of every stage, channels-last, highest resolution first."""
        self.check_input(x)
        x, maps = self.embed(rearrange(x, "B C H W -> B H W C")), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def check_input(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is a floating (B, in_chans, H, W) of some size.

        The stem checks that it is of the dtype that the model computes in. NaN is let through: to look for it costs a
        pass over the image.
        """
        core.bind(x=(x, f"B {self.in_chans} H W"))

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The last stage's map, normalised."""
        return rearrange(self.norm(self.stage_maps(x)[-1]), "B h w c -> B c h w")

    def forward_head(
        self, x: Float[Tensor, "B c h w"], pre_logits: bool = False
    ) -> Float[Tensor, "B out"] | Float[Tensor, "B out h w"]:
        """Global pooling, dropout, then the classifier (`pre_logits`: without it); the map where nothing is pooled."""
        pooled = self.drop(self.pool(x))
        return pooled if pre_logits else self.head(pooled)

    def pool(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c"] | Float[Tensor, "B c h w"]:
        """The map's average or maximum, or the map, as `global_pool` says."""
        if self.global_pool == "avg":
            return x.mean(dim=(2, 3))
        return x.amax(dim=(2, 3)) if self.global_pool == "max" else x

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"] | Float[Tensor, "B c h w"]:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, highest resolution first, as timm's models give them.

        indices: which stages (None all, n the last n); norm: apply the final norm to the last; output_fmt "NCHW" or
        "NHWC". Returns the list, or (final features, list) unless `intermediates_only`. All stages always run
        (`stop_early` is accepted and leaves the result the same).
        """
        core.one_of("output_fmt", output_fmt, ("NCHW", "NHWC"))
        chosen = self.chosen_stages(indices)
        maps = self.stage_maps(x)
        final = self.norm(maps[-1])
        if norm:
            maps[-1] = final
        as_wanted = (lambda m: rearrange(m, "B h w c -> B c h w")) if output_fmt == "NCHW" else (lambda m: m)
        intermediates = [as_wanted(maps[i]) for i in chosen]
        return intermediates if intermediates_only else (rearrange(final, "B h w c -> B c h w"), intermediates)

    def chosen_stages(self, indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
        """The stages that timm's `indices` mean: None all, n the last n, negative ones from the end.

        Raises ValueError where there is no such stage.
        """
        return chosen_of(indices, len(self.stages), "stages")

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and norm and head if wanted; returns the stages as numbers.

        Where stages go, norm and head go with them: both are made for the last map. `forward` pools what is left.
        """
        chosen = self.chosen_stages(indices)
        last = max(chosen)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0)
        return chosen

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for `num_classes`, on the same device and of the same dtype; 0 removes it.

        global_pool: None to pool as before, "avg", "max", or, where num_classes is 0, "" for the map itself.
        """
        check_classes(num_classes)
        global_pool = self.global_pool if global_pool is None else global_pool
        check_pool(global_pool, num_classes)
        self.num_classes, self.global_pool = num_classes, global_pool
        reference = next(self.parameters())
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.head.apply(initialise).to(reference.device, reference.dtype)


def chosen_of(indices: int | list[int] | tuple[int, ...] | None, count: int, what: str) -> list[int]:
    """What timm's `indices` mean, of so many stages or layers: None all, n the last n, negative ones from the end.

    Raises ValueError where there is no such one.
    """
    if indices is None:
        chosen = list(range(count))
    elif isinstance(indices, int):
        chosen = list(range(count - indices, count))
    else:
        chosen = [i % count if -count <= i < count else i for i in indices]
    if not chosen or not all(0 <= i < count for i in chosen):
        raise ValueError(f"indices: expected {what} 0 to {count - 1}, got {indices!r}")
    return chosen


class Stage(nn.Module):
    """Down-sampling (or nothing, in the first stage), then blocks, which `grad_checkpointing` computes twice."""

    def __init__(self, down: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.down, self.blocks = down, nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w c"]:
        x = self.down(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
