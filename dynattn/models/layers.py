"""What several models share: patch embeddings, the feed-forward network, the transformer block, the classifier.

Maps are channels-last (B, H, W, C) between layers. A map whose side is odd is padded with zeros before a stride of 2,
so that every stage has the ceiling of half the side before.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
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

    Stochastic depth drops either branch with probability `drop_path`; `ratio` widens the feed-forward network;
    `local_conv` puts a `LocalConv` in front.
    """

    def __init__(
        self, dim: int, attn: nn.Module, *, drop_path: float = 0.0, ratio: float = 4.0, local_conv: bool = False
    ):
        super().__init__()
        self.local = LocalConv(dim) if local_conv else nn.Identity()
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.local(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))  # DAT-4
        return x + self.drop_path(self.mlp(self.norm2(x)))  # DAT-5


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Stochastic depth that grows linearly over all blocks from 0 to `rate`, by stage and block."""
    check_rate("drop_path_rate", rate)
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())  # also where the model is made on "meta"
    return [[next(rates) for _ in range(depth)] for depth in depths]


def check_rate(name: str, rate: object) -> None:
    """Raise ValueError unless it is a share of what may be dropped, from 0 to below 1."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got {rate!r}")


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


def initialise(module: nn.Module) -> None:
    """Truncated normal weights of std 0.02 and zero biases for Linear layers, as ViT, DeiT and Swin start."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Backbone(nn.Module):
    """The interface of a hierarchical backbone, as timm has it: a model has `embed`, `stages`, `norm`, `drop`, `head`.

    A stage maps (B, H, W, C) to the next map; `feature_info` tells channels, reduction and module of each.
    """

    feature_info: list[dict]

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B h w c"]]:
        """The output of every stage, channels-last, highest resolution first."""
        self.check_input(x)
        x, maps = self.embed(rearrange(x, "B C H W -> B H W C")), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def check_input(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is a (B, in_chans, H, W) of some size, in the model's dtype.

        NaN is let through: to look for it costs a pass over the image.
        """
        core.bind(x=(x, f"B {self.in_chans} H W"))
        dtype = next(self.embed.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected {dtype}, as the model's parameters are, got {x.dtype}")

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        """The last stage's map, normalised."""
        return rearrange(self.norm(self.stage_maps(x)[-1]), "B h w c -> B c h w")

    def forward_head(self, x: Float[Tensor, "B c h w"], pre_logits: bool = False) -> Float[Tensor, "B out"]:
        """Global average, dropout, then the classifier (`pre_logits`: without it)."""
        pooled = self.drop(x.mean(dim=(2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
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
        count = len(self.stages)
        if indices is None:
            chosen = list(range(count))
        elif isinstance(indices, int):
            chosen = list(range(count - indices, count))
        else:
            chosen = [i % count if -count <= i < count else i for i in indices]
        if not chosen or not all(0 <= i < count for i in chosen):
            raise ValueError(f"indices: expected stages 0 to {count - 1}, got {indices!r}")
        return chosen

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and norm and head if wanted; returns the stages as numbers."""
        chosen = self.chosen_stages(indices)
        self.stages = self.stages[: max(chosen) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for `num_classes`; 0 removes it. Only global average pooling ("avg") is supported."""
        core.one_of("global_pool", global_pool, (None, "avg"))
        check_classes(num_classes)
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.head.apply(initialise).to(reference.device, reference.dtype)


class Stage(nn.Module):
    """Down-sampling (or nothing, in the first stage), then blocks."""

    def __init__(self, down: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.down, self.blocks = down, nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w c"]:
        return self.blocks(self.down(x))
