"""Models of other papers that ours are compared with, by timm, in our small size."""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn.models.layers import ConvStem, LocalConv


class AfterLocalConv(nn.Module):
    """A `LocalConv` in front of a block of timm's, as `dat_mini` has it in front of its own."""

    def __init__(self, dim: int, block: nn.Module):
        super().__init__()
        self.local, self.block = LocalConv(dim), block

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return self.block(self.local(x))


class ImageStem(nn.Module):
    """A `ConvStem` in the place of timm's patch embedding: (B, 3, H, W) to a channels-last map."""

    def __init__(self, out: int):
        super().__init__()
        self.stem = ConvStem(3, out)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w out"]:
        return self.stem(rearrange(x, "B C H W -> B H W C"))


def swin_mini(*, img_size: int = 128, num_classes: int = 10, **kw) -> nn.Module:
    """timm's Swin Transformer (arXiv 2103.14030) as wide and deep as `dat_mini`, with the same convolutions around it.

    Strides 4, 8, 16, windows of 8 x 8; what differs from `dat_mini` is the attention: shifted windows where that one
    has deformable points.
    """
    from timm.models.swin_transformer import SwinTransformer

    size = {"patch_size": 4, "embed_dim": 32, "depths": (2, 4, 4), "num_heads": (2, 4, 8), "window_size": 8}
    model = SwinTransformer(img_size=img_size, num_classes=num_classes, **(size | {"drop_path_rate": 0.05} | kw))
    model.patch_embed = ImageStem(model.embed_dim)
    for i, stage in enumerate(model.layers):
        dim = model.embed_dim * 2**i
        stage.blocks = nn.Sequential(*(AfterLocalConv(dim, block) for block in stage.blocks))
    return model
