"""Models of other papers that ours are compared with, by timm, in our small size."""

from torch import nn


def swin_mini(*, img_size: int = 128, num_classes: int = 10, **kw) -> nn.Module:
    """A small Swin Transformer (arXiv 2103.14030): strides 4, 8, 16, windows of 8 x 8, as deep and wide as dat_mini.

    Two convolutions embed the patches: in a few thousand steps the single one of the paper hardly learns.
    """
    from timm.layers import PatchEmbed
    from timm.models.swin_transformer import SwinTransformer

    class Stem(PatchEmbed):
        def __init__(self, *, in_chans: int = 3, embed_dim: int = 32, **options):
            super().__init__(in_chans=in_chans, embed_dim=embed_dim, **options)
            self.proj = nn.Sequential(
                nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1),
                nn.BatchNorm2d(embed_dim // 2),
                nn.GELU(),
                nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1),
            )

    size = {"patch_size": 4, "embed_dim": 32, "depths": (2, 4, 4), "num_heads": (2, 4, 8), "window_size": 8}
    options = size | {"drop_path_rate": 0.05, "embed_layer": Stem} | kw
    return SwinTransformer(img_size=img_size, num_classes=num_classes, **options)
