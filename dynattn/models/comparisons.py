"""Models of other papers that ours are compared with: timm's in our small size, and with another attention."""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynattn import core
from dynattn.mechanisms.baselines import CrossShapedWindowAttention
from dynattn.mechanisms.dynamic_group import DynamicGroupAttention
from dynattn.models.dgt import GroupedModel
from dynattn.models.layers import (
    Backbone,
    Block,
    ConvStem,
    LocalConv,
    PatchEmbedding,
    Stage,
    check_classes,
    check_rate,
    check_stages,
    drop_path_rates,
    initialise,
)


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


class GroupedSwin(GroupedModel, SwinTransformer):
    """timm's Swin Transformer whose blocks have dynamic group attention."""


def swin_tiny_dgt(
    *, img_size: int | tuple[int, int] = 224, num_classes: int = 1000, groups: int = 48, keys: int = 49, **kw
) -> nn.Module:
    """timm's Swin-T with dynamic group attention and CPE in the place of windows and their bias (DGT, Table 5).

    keys: 49, as many as a window of Swin's has. Any image of whole 4 x 4 patches is accepted at run time.
    """
    size = {"drop_path_rate": 0.2, "strict_img_size": False}
    model = GroupedSwin(img_size=img_size, num_classes=num_classes, **(size | kw))

    def grouped(block: nn.Module) -> Block:
        attn = DynamicGroupAttention(block.dim, block.attn.num_heads, groups, keys, position_encoding=True)
        rate = getattr(block.drop_path1, "drop_prob", 0.0)
        return Block(block.dim, attn, drop_path=rate, ratio=block.mlp_ratio)

    for stage in model.layers:
        stage.blocks = nn.Sequential(*map(grouped, stage.blocks)).apply(initialise)
    model.img_size = core.pair("img_size", img_size)
    return model


class CSWin(GroupedModel, Backbone):
    """CSWin Transformer (arXiv 2107.00652), CSWin-T unless told otherwise: (B, 3, H, W) to (B, num_classes).

    dims, depths, heads, stripes: by stage.  attention: "cross_shaped", or "dynamic_group" with CPE in its place (DGT,
    Table 5), of `groups` and `keys`: the paper names k for Swin-T only; 98 is its number elsewhere.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 2, 21, 1),
        heads: Sequence[int] = (2, 4, 8, 16),
        stripes: Sequence[int] = (1, 2, 7, 7),
        attention: str = "cross_shaped",
        groups: int = 48,
        keys: int = 98,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        core.positive("in_chans", in_chans)
        core.one_of("attention", attention, ("cross_shaped", "dynamic_group"))
        check_classes(num_classes)
        check_rate("drop_rate", drop_rate)
        count = check_stages(depths, dims=dims, heads=heads, stripes=stripes)
        self.img_size, self.in_chans, self.num_classes = core.pair("img_size", img_size), in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [dict(num_chs=dims[i], reduction=4 * 2**i, module=f"stages.{i}") for i in range(count)]

        def layer(i: int) -> nn.Module:
            """The attention layer of stage i."""
            if attention == "cross_shaped":
                return CrossShapedWindowAttention(dims[i], heads[i], stripes[i])
            return DynamicGroupAttention(dims[i], heads[i], groups, keys, position_encoding=True)

        rates = drop_path_rates(drop_path_rate, tuple(depths))
        self.embed = PatchEmbedding(in_chans, dims[0], 7, 4)
        self.stages = nn.ModuleList()
        for i in range(count):
            merge = PatchEmbedding(dims[i - 1], dims[i], 3, 2) if i else nn.Identity()
            self.stages.append(Stage(merge, [Block(dims[i], layer(i), drop_path=rate) for rate in rates[i]]))
        self.norm = nn.LayerNorm(dims[-1])
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(initialise)
