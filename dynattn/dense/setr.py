"""SETR's decoders: from maps of any backbone to logits, for every cell of a map (paper section 3.4).

    Naive   LayerNorm, 1 x 1, batch norm, ReLU, classifier
    PUP     LayerNorm, then 3 x 3, batch norm, ReLU and twice the size, in turn; classifier
    MLA     four maps, each LayerNorm and 1 x 1; from the deepest on each is added to the next one up; 3 x 3; then for
            each two of 3 x 3 and four times the size; all side by side; classifier

Naive and PUP are one class: one layer with a kernel of 1, or several with kernels of 3. Their auxiliary heads are the
same with one layer; those of MLA are classifiers of its own maps. A decoder stops where one bilinear resize is left, to
the size of the image: see `resize`.

The paper's batch norm is synchronised over processes. Here it is plain; where there are several,
`nn.SyncBatchNorm.convert_sync_batchnorm(model)` changes that.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core


def resize(x: Float[Tensor, "B C h w"], size: tuple[int, int], corners: bool = False) -> Float[Tensor, "B C H W"]:
    """A map of another size, bilinear. corners: whether the centres of the corner cells stay at the corners."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=corners)


def enlarge(x: Float[Tensor, "B C h w"], factor: int, corners: bool = False) -> Float[Tensor, "B C H W"]:
    """A map of `factor` times the size."""
    return resize(x, tuple(side * factor for side in x.shape[-2:]), corners)


def convolution(channels: int, out: int, kernel: int, bias: bool) -> list[nn.Module]:
    """A convolution that keeps the size, batch norm and ReLU."""
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm of the channels of (B, C, H, W)."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return rearrange(super().forward(rearrange(x, "B C H W -> B H W C")), "B H W C -> B C H W")


class Head(nn.Module):
    """What every decoder has: a `classifier`, which can be changed."""

    classifier: nn.Conv2d

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for `num_classes`, on the same device and of the same dtype."""
        old = self.classifier
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, padding=old.padding, bias=old.bias is not None)
        self.classifier = new.to(old.weight.device, old.weight.dtype)


class ProgressiveHead(Head):
    """LayerNorm, layers that enlarge the map, classifier: (B, in_chans, h, w) to (B, num_classes, H, W).

    factors: by how much each layer enlarges the map, 1 where it does not. The map grows by their product.
    kernel: of the layers.  channels: that they put out.
    """

    def __init__(
        self, in_chans: int, num_classes: int, *, factors: Sequence[int], kernel: int = 3, channels: int = 256
    ):
        super().__init__()
        self.factors = tuple(core.positive("factors", factor) for factor in factors)
        self.norm = ChannelNorm(in_chans, eps=1e-6)
        widths = [core.positive("in_chans", in_chans), *[core.positive("channels", channels)] * len(self.factors)]
        self.layers = nn.ModuleList(
            nn.Sequential(*convolution(a, b, kernel, bias=True)) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.classifier = nn.Conv2d(widths[-1], core.positive("num_classes", num_classes), 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K H W"]:
        x = self.norm(x)
        for layer, factor in zip(self.layers, self.factors, strict=True):
            x = enlarge(layer(x), factor)
        return self.classifier(x)


class MapHead(Head):
    """A classifier without bias, 1 x 1: (B, in_chans, h, w) to (B, num_classes, h, w). The auxiliary head of MLA."""

    def __init__(self, in_chans: int, num_classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(in_chans, num_classes, 1, bias=False)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        return self.classifier(x)


class ConvHead(Head):
    """3 x 3, batch norm, ReLU, classifier: (B, in_chans, h, w) to (B, num_classes, h, w). The auxiliary head of HLG.

    channels: between the two convolutions.
    """

    def __init__(self, in_chans: int, num_classes: int, *, channels: int = 256):
        super().__init__()
        self.layers = nn.Sequential(*convolution(in_chans, core.positive("channels", channels), 3, bias=False))
        self.classifier = nn.Conv2d(channels, core.positive("num_classes", num_classes), 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        return self.classifier(self.layers(x))


class MultiLevelHead(Head):
    """Multi-level aggregation: maps (B, in_chans[i], h, w), the shallowest first, to (B, num_classes, H, W).

    factor: by how much the maps are enlarged before they are joined.  channels: of the joined maps, in the end half as
    many.  kernel: of the classifier. Maps of different sizes are resized to the first.
    """

    def __init__(
        self, in_chans: Sequence[int], num_classes: int, *, factor: int = 4, kernel: int = 3, channels: int = 256
    ):
        super().__init__()
        self.factor, half = core.positive("factor", factor), core.positive("channels", channels) // 2
        core.one_of("kernel", kernel, (1, 3))
        one = lambda a, b, kernel: nn.Sequential(*convolution(a, b, kernel, bias=False))  # noqa: E731
        self.norms = nn.ModuleList(ChannelNorm(width, eps=1e-6) for width in in_chans)
        self.reduce = nn.ModuleList(one(width, channels, 1) for width in in_chans)
        self.smooth = nn.ModuleList(one(channels, channels, 3) for _ in in_chans)
        self.refine = nn.ModuleList(nn.Sequential(one(channels, half, 3), one(half, half, 3)) for _ in in_chans)
        classes = core.positive("num_classes", num_classes)
        self.classifier = nn.Conv2d(half * len(in_chans), classes, kernel, padding=kernel // 2)

    def levels(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B C h w"]]:
        """The maps that know of all deeper ones. The auxiliary heads read these."""
        total, sums = None, []
        for level in reversed(range(len(maps))):
            x = resize(self.reduce[level](self.norms[level](maps[level])), tuple(maps[0].shape[-2:]))
            total = x if total is None else total + x
            sums.append(total)
        return [smooth(x) for smooth, x in zip(self.smooth, reversed(sums), strict=True)]

    def join(self, levels: Sequence[Float[Tensor, "B C h w"]]) -> Float[Tensor, "B K H W"]:
        """The logits of these maps."""
        large = [enlarge(refine(x), self.factor, corners=True) for refine, x in zip(self.refine, levels, strict=True)]
        return self.classifier(torch.cat(large, dim=1))

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B K H W"]:
        return self.join(self.levels(maps))
