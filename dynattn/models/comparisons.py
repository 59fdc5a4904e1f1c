"""Models of other papers that ours are compared with, by timm, in our small size."""

from einops import rearrange
from jaxtyping import Float
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynattn import core
from dynattn.models.layers import ConvStem, LocalConv, PatchEmbedding


class AfterLocalConv(nn.Module):
    """A `LocalConv` in front of a block of timm's, as `dat_mini` has it in front of its own."""

    def __init__(self, dim: int, block: nn.Module):
        super().__init__()
        self.local, self.block = LocalConv(dim), block

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return self.block(self.local(x))


class AfterLocalConvInRows(AfterLocalConv):
    """The same for a block that takes its tokens in a row, (B, H W, C)."""

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.local(x)
        return self.block(x.flatten(1, 2)).reshape(x.shape)


class ImageStem(nn.Module):
    """A `ConvStem` in the place of timm's patch embedding: (B, 3, H, W) to a channels-last map."""

    def __init__(self, out: int):
        super().__init__()
        self.stem = ConvStem(3, out)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w out"]:
        return self.stem(rearrange(x, "B C H W -> B H W C"))


class HalvedImageStem(ImageStem):
    """A `ConvStem` and one more halving, stride 8, in the place of timm's projection of patches: channels-first."""

    def __init__(self, width: int, out: int):
        super().__init__(width)
        self.down = PatchEmbedding(width, out, 3, 2, bias=False)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B out h w"]:
        return rearrange(self.down(super().forward(x)), "B h w C -> B C h w")


class MapTransformer(VisionTransformer):
    """timm's Vision Transformer whose blocks hand on maps, between which convolutions may stand; no class token."""

    def _pos_embed(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return super()._pos_embed(x).reshape(x.shape)


def swin_mini(*, img_size: int | tuple[int, int] = 128, num_classes: int = 10, **kw) -> nn.Module:
    """timm's Swin Transformer (arXiv 2103.14030) as wide and deep as `dat_mini`, with the same convolutions around it.

    Strides 4, 8, 16, windows of 8 x 8; what differs from `dat_mini` is the attention: shifted windows where that one
    has deformable points.
    """
    size = {"patch_size": 4, "embed_dim": 32, "depths": (2, 4, 4), "num_heads": (2, 4, 8), "window_size": 8}
    model = SwinTransformer(img_size=img_size, num_classes=num_classes, **(size | {"drop_path_rate": 0.05} | kw))
    model.patch_embed = ImageStem(model.embed_dim)
    for i, stage in enumerate(model.layers):
        dim = model.embed_dim * 2**i
        stage.blocks = nn.Sequential(*(AfterLocalConv(dim, block) for block in stage.blocks))
    model.img_size = core.pair("img_size", img_size)
    return model


def vit_mini(*, img_size: int | tuple[int, int] = 128, num_classes: int = 10, **kw) -> nn.Module:
    """timm's Vision Transformer (arXiv 2010.11929) of about the size of `dat_mini`, with the same convolutions.

    One stage of stride 8, 16 x 16 tokens that all read each other; no class token, the classifier gets their mean.
    Any image size is accepted at run time, the position table (1, tokens, C) is resampled to it.
    """
    size = {"patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "class_token": False, "global_pool": "avg"}
    size |= {"dynamic_img_size": True, "dynamic_img_pad": True, "drop_path_rate": 0.05}
    model = MapTransformer(img_size=img_size, num_classes=num_classes, **(size | kw))
    dim = model.embed_dim
    model.patch_embed.proj = HalvedImageStem(dim // 4, dim)
    model.blocks = nn.Sequential(*(AfterLocalConvInRows(dim, block) for block in model.blocks))
    model.norm = nn.Sequential(model.norm, nn.Flatten(1, 2))  # the classifier takes its tokens in a row again
    model.img_size = core.pair("img_size", img_size)
    return model
