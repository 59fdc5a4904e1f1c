"""Segmentation models of libraries, in our small size, that ours are compared with: torchvision's FCN, timm's PVT."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter  # private, but what torchvision's own models call
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import FeaturePyramidNetwork

from dynattn import core
from dynattn.dense.setr import resize
from dynattn.models.registry import register_model


class Segmenter(nn.Module):
    """Semantic segmentation: (B, in_chans, H, W) to logits (B, num_classes, H, W), for any H and W.

    With `aux`, which training alone uses, also those of the auxiliary heads, in a list.
    """

    segments = True  # what it puts out is a class for each pixel
    aux_weight: float | None = None
    stem: str  # which parameters come first, and which are of layers, as patterns
    layers: str

    def __init__(self, img_size: int | tuple[int, int], in_chans: int, num_classes: int):
        super().__init__()
        self.img_size = core.pair("img_size", img_size)
        self.in_chans = core.positive("in_chans", in_chans)
        self.num_classes = core.positive("num_classes", num_classes)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """The size that images are brought to; no parameter depends on it."""
        self.img_size = core.pair("img_size", img_size)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters are one layer for layer-wise learning rates: the stem, every layer, the rest."""
        return dict(stem=self.stem, blocks=self.layers)

    def no_weight_decay(self) -> set[str]:
        """Nothing besides what has one dimension."""
        return set()


class EvenBottleneck(Bottleneck):
    """torchvision's bottleneck that puts out as many channels as it has inside, and not four times as many."""

    expansion = 1


class MiniFCN(Segmenter):
    """torchvision's FCN (arXiv 1411.4038) of about the cost of `setr_pup_mini`: the baseline of SETR's figures 5 and 6.

    A ResNet of a block a stage, the third one dilated, so that the map stays at H/8: a classifier reads it, and an
    auxiliary one the second stage, with the same weight as those of SETR.
    """

    aux_weight = 0.4
    stem, layers = r"^net\.backbone\.(?:conv1|bn1)", r"^net\.backbone\.layer(\d+)"

    def __init__(self, img_size: int | tuple[int, int] = 64, in_chans: int = 3, num_classes: int = 11):
        super().__init__(img_size, in_chans, num_classes)
        net = ResNet(EvenBottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
        net.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        backbone = IntermediateLayerGetter(net, {"layer2": "aux", "layer3": "out"})
        self.net = FCN(backbone, FCNHead(256, num_classes), FCNHead(128, num_classes))

    @classmethod
    def configuration(cls, **options) -> dict:
        """What timm wants to know of a model before it is made."""
        return dict(first_conv="net.backbone.conv1", classifier=("net.classifier.4", "net.aux_classifier.4"))

    def forward(
        self, x: Float[Tensor, "B C H W"], aux: bool = False
    ) -> Float[Tensor, "B K H W"] | tuple[Float[Tensor, "B K H W"], list[Float[Tensor, "B K H W"]]]:
        """Logits of every pixel; with `aux` also those of the auxiliary head, in a list."""
        maps = self.net.backbone(x)
        of_pixels = lambda y: resize(y, tuple(x.shape[-2:]))  # noqa: E731
        logits = of_pixels(self.net.classifier(maps["out"]))  # torchvision's own forward computes both in any case
        return (logits, [of_pixels(self.net.aux_classifier(maps["aux"]))]) if aux else logits


class MiniPVT(Segmenter):
    """timm's PVT v2 (arXiv 2106.13797) under torchvision's feature pyramid, of about the cost of `setr_pup_hlg_mini`.

    The maps of all stages get `channels` channels and know of the deeper ones; all at H/4, they are added, and a
    classifier reads the sum. It stands in for the PVT-Medium of figure 9, whose decoder is in none of our libraries.
    """

    stem, layers = r"^encoder\.patch_embed", r"^encoder\.stages\.(\d+)"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        in_chans: int = 3,
        num_classes: int = 11,
        *,
        dims: Sequence[int] = (48, 96, 144, 192),
        depths: Sequence[int] = (3, 3, 2, 1),
        channels: int = 96,
    ):
        super().__init__(img_size, in_chans, num_classes)
        size = dict(depths=depths, embed_dims=dims, num_heads=(1, 2, 3, 4), mlp_ratios=(4, 4, 4, 4))
        self.encoder = PyramidVisionTransformerV2(in_chans, num_classes=0, **size, drop_path_rate=0.05)
        self.pyramid = FeaturePyramidNetwork(list(dims), channels)
        self.classifier = FCNHead(channels, num_classes)

    @classmethod
    def configuration(cls, **options) -> dict:
        """What timm wants to know of a model before it is made."""
        return dict(first_conv="encoder.patch_embed.proj", classifier="classifier.4")

    def forward(
        self, x: Float[Tensor, "B C H W"], aux: bool = False
    ) -> Float[Tensor, "B K H W"] | tuple[Float[Tensor, "B K H W"], list[Float[Tensor, "B K H W"]]]:
        """Logits of every pixel; with `aux` also those of no auxiliary head, an empty list."""
        maps = self.encoder.forward_intermediates(x, intermediates_only=True)
        maps = list(self.pyramid(OrderedDict(enumerate(maps))).values())
        joined = torch.stack([resize(m, tuple(maps[0].shape[-2:])) for m in maps]).sum(0)
        logits = resize(self.classifier(joined), tuple(x.shape[-2:]))
        return (logits, []) if aux else logits


register_model("fcn_mini", MiniFCN)
register_model("pvt_seg_mini", MiniPVT)
