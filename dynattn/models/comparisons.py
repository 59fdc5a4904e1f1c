"""Models of other papers that ours are compared with: timm's in our small size, and with another attention."""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from timm.models._input import update_model_input_size  # private, but what timm's own models call
from timm.models.convnext import ConvNeXt
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
    check_stages,
    initialise,
)
from dynattn.models.registry import register_model


class AfterLocalConv(nn.Module):
    """A `LocalConv` in front of a block of timm's, as `dat_mini` has it in front of its own."""

    def __init__(self, dim: int, block: nn.Module):
        super().__init__()
        self.local, self.block = LocalConv(dim), block

    def set_input_size(self, **sizes) -> None:
        """Of timm's block; the convolution takes any size."""
        self.block.set_input_size(**sizes)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return self.block(self.local(x))


class AfterLocalConvInRows(AfterLocalConv):
    """The same for a block that takes its tokens in a row, (B, H W, C)."""

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.local(x)
        return self.block(x.flatten(1, 2)).reshape(x.shape)


class ImageStem(nn.Module):
    """A `ConvStem` in the place of timm's patch embedding: (B, C, H, W) to a channels-last map, for any size."""

    patch_size = (4, 4)

    def __init__(self, channels: int, out: int, img_size: int | tuple[int, int] = 128):
        super().__init__()
        self.stem = ConvStem(channels, out)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: None = None) -> None:
        """The size that windows and tables are made for; the patches stay as they are."""
        if patch_size is not None:
            raise ValueError(f"patch_size: expected None, the stem's strides are fixed, got {patch_size!r}")
        if img_size is not None:
            self.img_size = core.pair("img_size", img_size)
        self.grid_size = tuple(-(-side // 4) for side in self.img_size)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w out"]:
        return self.stem(rearrange(x, "B C H W -> B H W C"))


class HalvedImageStem(ImageStem):
    """A `ConvStem` and one more halving, stride 8, in the place of timm's projection of patches: channels-first."""

    def __init__(self, channels: int, width: int, out: int):
        super().__init__(channels, width)
        self.down = PatchEmbedding(width, out, 3, 2, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B out h w"]:
        return rearrange(self.down(super().forward(x)), "B h w C -> B C h w")


class MiniSwin(SwinTransformer):
    """timm's Swin Transformer (arXiv 2103.14030) as wide and deep as `dat_mini`, with the same convolutions around it.

    Strides 4, 8, 16, windows of 8 x 8; what differs from `dat_mini` is the attention: shifted windows where that one
    has deformable points. Any image size is accepted at run time, masks are made for it.
    """

    def __init__(self, img_size: int | tuple[int, int] = 128, in_chans: int = 3, num_classes: int = 10, **kw):
        img_size = core.pair("img_size", img_size)
        size = dict(patch_size=4, embed_dim=32, depths=(2, 4, 4), num_heads=(2, 4, 8), window_size=8)
        size |= dict(drop_path_rate=0.05, strict_img_size=False)
        super().__init__(img_size=img_size, in_chans=in_chans, num_classes=num_classes, **(size | kw))
        self.patch_embed = ImageStem(in_chans, self.embed_dim, img_size)
        for i, stage in enumerate(self.layers):
            stage.blocks = nn.Sequential(*(AfterLocalConv(self.embed_dim * 2**i, block) for block in stage.blocks))
        self.img_size = img_size

    @classmethod
    def configuration(cls, img_size: int | tuple[int, int], **options) -> dict:
        """What timm wants to know of a model before it is made."""
        pool_size = tuple(-(-side // 16) for side in core.pair("img_size", img_size))
        return dict(pool_size=pool_size, first_conv="patch_embed.stem.convs.0.0", classifier="head.fc")

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **windows) -> None:
        """As timm's: windows grow with the map unless `windows` says otherwise."""
        super().set_input_size(img_size, **windows)
        self.img_size = self.patch_embed.img_size


class MiniViT(VisionTransformer):
    """timm's Vision Transformer (arXiv 2010.11929) of about the size of `dat_mini`, with the same convolutions.

    One stage of stride 8, 16 x 16 tokens that all read each other; blocks hand on maps, between which the convolutions
    stand. No class token, the classifier gets the mean. Any image size is accepted at run time, the position table
    (1, tokens, C) is resampled to it.
    """

    def __init__(self, img_size: int | tuple[int, int] = 128, in_chans: int = 3, num_classes: int = 10, **kw):
        img_size = core.pair("img_size", img_size)
        size = dict(patch_size=8, embed_dim=128, depth=5, num_heads=4, class_token=False, global_pool="avg")
        size |= dict(dynamic_img_size=True, dynamic_img_pad=True, drop_path_rate=0.05)
        super().__init__(img_size=img_size, in_chans=in_chans, num_classes=num_classes, **(size | kw))
        self.patch_embed.proj = HalvedImageStem(in_chans, self.embed_dim // 4, self.embed_dim)
        self.blocks = nn.Sequential(*(AfterLocalConvInRows(self.embed_dim, block) for block in self.blocks))
        self.norm = nn.Sequential(self.norm, nn.Flatten(1, 2))  # the classifier takes its tokens in a row again
        self.img_size = img_size

    @classmethod
    def configuration(cls, **options) -> dict:
        """What timm wants to know of a model before it is made."""
        return dict(first_conv="patch_embed.proj.stem.convs.0.0", classifier="head")

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: None = None) -> None:
        """As timm's: the position table is resampled."""
        if patch_size is not None:
            raise ValueError(f"patch_size: expected None, the stem's strides are fixed, got {patch_size!r}")
        super().set_input_size(img_size)
        self.img_size = tuple(self.patch_embed.img_size)

    def _pos_embed(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return super()._pos_embed(x).reshape(x.shape)


class ChannelsFirstStem(ConvStem):
    """A `ConvStem` from and to channels-first maps."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B out h w"]:
        return rearrange(super().forward(rearrange(x, "B C H W -> B H W C")), "B h w C -> B C h w")


class AfterLocalConvChannelsFirst(AfterLocalConv):
    """The same for a block that takes channels first, (B, C, H, W)."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.block(rearrange(self.local(rearrange(x, "B C H W -> B H W C")), "B H W C -> B C H W"))


class MiniConvNeXt(ConvNeXt):
    """timm's ConvNeXt (arXiv 2201.03545) in three stages, as wide as `swin_mini`, with the same convolutions around it.

    Strides 4, 8, 16. It has half as many blocks again as `swin_mini`, as ConvNeXt-T has of Swin-T: their parameters
    are about as many. The runs are short: there is no scale of the layers that starts near zero, and convolutions start
    as torch's do, because of timm's smaller weights a step of Adam changes too large a part. Any image size is accepted
    at run time.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 128,
        in_chans: int = 3,
        num_classes: int = 10,
        *,
        dims: Sequence[int] = (32, 64, 128),
        depths: Sequence[int] = (3, 6, 6),
        **kw,
    ):
        img_size, count = core.pair("img_size", img_size), check_stages(depths, dims=dims)
        if count != 3:
            raise ValueError(f"depths: expected the number of blocks of 3 stages, got {depths!r}")
        size = dict(dims=(*dims, dims[-1]), depths=(*depths, 0), drop_path_rate=0.05, ls_init_value=None)
        super().__init__(in_chans, num_classes, **(size | kw))
        self.stages, self.feature_info = self.stages[:count], self.feature_info[:count]  # timm makes four
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        self.stem = ChannelsFirstStem(in_chans, dims[0])
        for stage, dim in zip(self.stages, dims, strict=True):
            stage.blocks = nn.Sequential(*(AfterLocalConvChannelsFirst(dim, block) for block in stage.blocks))
        self.img_size = img_size

    @classmethod
    def configuration(cls, img_size: int | tuple[int, int], **options) -> dict:
        """What timm wants to know of a model before it is made."""
        pool_size = tuple(-(-side // 4) // 4 for side in core.pair("img_size", img_size))
        return dict(pool_size=pool_size, first_conv="stem.convs.0.0", classifier="head.fc")

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """The size that images are brought to; no parameter depends on it."""
        self.img_size = core.pair("img_size", img_size)
        update_model_input_size(self, self.img_size)

    def no_weight_decay(self) -> set[str]:
        """Nothing besides what has one dimension."""
        return set()


class GroupedSwin(GroupedModel, SwinTransformer):
    """timm's Swin-T with dynamic group attention and CPE in the place of windows and their bias (DGT, Table 5).

    keys: 49, as many as a window of Swin's has. Any image of whole 4 x 4 patches is accepted at run time.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        groups: int = 48,
        keys: int = 49,
        **kw,
    ):
        img_size = core.pair("img_size", img_size)
        size = dict(drop_path_rate=0.2, strict_img_size=False)
        super().__init__(img_size=img_size, in_chans=in_chans, num_classes=num_classes, **(size | kw))

        def grouped(block: nn.Module) -> Block:
            drops = dict(attn_drop=block.attn.attn_drop.p, position_encoding=True)
            attn = DynamicGroupAttention(block.dim, block.attn.num_heads, groups, keys, **drops)
            drops = dict(drop_path=getattr(block.drop_path1, "drop_prob", 0.0), proj_drop=block.attn.proj_drop.p)
            return Block(block.dim, attn, **drops, ratio=block.mlp_ratio)

        for stage in self.layers:
            stage.blocks = nn.Sequential(*map(grouped, stage.blocks)).apply(initialise)
        self.img_size = img_size

    @classmethod
    def configuration(cls, img_size: int | tuple[int, int], **options) -> dict:
        """What timm wants to know of a model before it is made."""
        pool_size = tuple(-(-side // 32) for side in core.pair("img_size", img_size))
        return dict(pool_size=pool_size, first_conv="patch_embed.proj", classifier="head.fc")

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the model one for images of this size (H, W); no parameter depends on it."""
        self.img_size = core.pair("img_size", img_size)
        self.patch_embed.set_input_size(img_size=self.img_size)
        update_model_input_size(self, self.img_size)


class CSWin(GroupedModel, Backbone):
    """CSWin Transformer (arXiv 2107.00652), CSWin-T unless told otherwise: (B, 3, H, W) to (B, num_classes).

    dims, depths, heads, stripes: by stage.  attention: "cross_shaped", or "dynamic_group" with CPE in its place (DGT,
    Table 5), of `groups` and `keys`: the paper names k for Swin-T only; 98 is its number elsewhere.  global_pool,
    rates: as of `DAT`.
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
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool=global_pool)
        core.one_of("attention", attention, ("cross_shaped", "dynamic_group"))
        core.rate("drop_rate", drop_rate)
        core.rate("attn_drop_rate", attn_drop_rate)
        core.rate("proj_drop_rate", proj_drop_rate)
        check_stages(depths, heads=heads, stripes=stripes)

        def block(i: int, d: int, rate: float) -> Block:
            """Block d of stage i."""
            size = dict(dim=dims[i], heads=heads[i], attn_drop=attn_drop_rate)
            if attention == "cross_shaped":
                attn = CrossShapedWindowAttention(**size, stripe=stripes[i])
            else:
                attn = DynamicGroupAttention(**size, groups=groups, keys=keys, position_encoding=True)
            return Block(dims[i], attn, drop_path=rate, proj_drop=proj_drop_rate)

        merge = lambda i: PatchEmbedding(dims[i - 1], dims[i], 3, 2) if i else nn.Identity()  # noqa: E731
        self.embed = PatchEmbedding(in_chans, dims[0], 7, 4)
        self.add_stages(depths, merge, block, drop_path_rate)
        self.norm = nn.LayerNorm(dims[-1])
        self.add_head(drop_rate)
        self.apply(initialise)


register_model("swin_mini", MiniSwin)
register_model("vit_mini", MiniViT)
register_model("convnext_mini", MiniConvNeXt)
register_model("swin_tiny_dgt", GroupedSwin)
register_model("cswin_tiny", CSWin)
