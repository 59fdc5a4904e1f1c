"""DGT, the Dynamic Group Transformer (IJCAI 2022): queries in groups, each with the keys its centroid selects.

    stem        3 x 3 convolutions of strides 2, 1, 1, each with GELU and batch norm              H/2 x W/2
    stage 1-3   merge, (DGT block) x N                                                            Table 1
    stage 4     merge, (GSA block) x N: the same with attention of every token to every token
    merge       3 x 3 convolution of stride 2, LayerNorm: half the side, twice the channels
    head        1 x 1 convolution to 1280, batch norm, SiLU; global average, dropout, Linear

A block, l of the paper left out:

    X~ = X + CPE(X)                                                                               DGT-8
    X^ = X~ + DG-Attention(LN(X~))                                                                DGT-9
    X  = X^ + IRFFN(LN(X^))                                                                       DGT-10

DGT-S and DGT-B norm what comes out of a branch instead, X~ + LN(DG-Attention(X~)), and take cosines for dot products,
as Swin V2 does (section 3.3). No code was published, and the text names the parts only. What follows is the one form of
a block that has all three printed numbers of parameters; what they leave open (GELU before batch norm, LayerNorm
in the merges, SiLU in the head, a temperature for each head) is CMT's and Swin V2's, which the paper builds on.
"""

from collections.abc import Collection, Sequence

from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynattn import core
from dynattn.mechanisms.baselines import CrossShapedWindowAttention, SpatialReductionAttention
from dynattn.mechanisms.dense import DenseAttention
from dynattn.mechanisms.dynamic_group import DynamicGroupAttention
from dynattn.mechanisms.window import WindowAttention
from dynattn.models.layers import (
    Backbone,
    Block,
    PatchEmbedding,
    check_dtype,
    check_stages,
    each_stage,
    initialise,
)
from dynattn.models.registry import register_model

BLOCKS = ("dgt", "swin", "cswin", "cmt")
STRIPES = (1, 2, 7, 7)  # of CSWin's blocks, by stage
REDUCTIONS = (8, 4, 2, 1)  # of CMT's blocks, by stage


class Stem(nn.Module):
    """Three 3 x 3 convolutions, the first of stride 2: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), out)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        widths = [(channels, 2), (out, 1), (out, 1)]
        self.convs = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, out, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(out))
                for width, stride in widths
            )
        )

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w out"]:
        check_dtype(x, self.convs[0][0].weight)
        return rearrange(self.convs(rearrange(x, "B H W C -> B C H W")), "B C H W -> B H W C")


class ConditionalPosition(nn.Module):
    """CPE: a depthwise 3 x 3 convolution, which tells a token what is beside it and, by the border's zeros, where."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return rearrange(self.conv(rearrange(x, "B H W C -> B C H W")), "B C H W -> B H W C")


class IRFFN(nn.Module):
    """CMT's inverted residual feed-forward network: wider, a depthwise 3 x 3 beside an identity, narrower again."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        wide = dim * ratio
        self.expand = nn.Sequential(nn.Conv2d(dim, wide, 1), nn.GELU(), nn.BatchNorm2d(wide))
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.activate = nn.Sequential(nn.GELU(), nn.BatchNorm2d(wide))
        self.reduce = nn.Sequential(nn.Conv2d(wide, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = self.expand(rearrange(x, "B H W C -> B C H W"))
        x = self.activate(x + self.depthwise(x))
        return rearrange(self.reduce(x), "B C H W -> B H W C")


class DGTBlock(nn.Module):
    """CPE, attention, IRFFN, around any attention that maps (B, H, W, C) to itself (figure 2b).

    Stochastic depth drops attention and IRFFN with probability `drop_path`, never the CPE; `proj_drop` is the dropout
    of what these two put out. `post_norm` norms what comes out of them instead of what goes in.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        post_norm: bool = False,
    ):
        super().__init__()
        self.cpe = ConditionalPosition(dim)
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.norm2, self.ffn = nn.LayerNorm(dim), IRFFN(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()
        self.post_norm = post_norm

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = x + self.cpe(x)  # DGT-8
        if self.post_norm:
            x = x + self.drop_path(self.norm1(self.proj_drop(self.attn(x))))
            return x + self.drop_path(self.norm2(self.proj_drop(self.ffn(x))))
        x = x + self.drop_path(self.proj_drop(self.attn(self.norm1(x))))  # DGT-9
        return x + self.drop_path(self.proj_drop(self.ffn(self.norm2(x))))  # DGT-10


class GroupedModel(nn.Module):
    """What a model with dynamic group attention offers besides: its layers, their centroids, their number of keys.

    The centroids have no gradient: an optimiser does not move them. In a loop of your own, write one of these lines:

        model.update_centroids_with(optimizer)   # once, before the loop
        model.update_centroids(lr)               # after every optimizer.step()
    """

    def grouped_layers(self) -> list[DynamicGroupAttention]:
        """The layers that group, in order."""
        return [module for module in self.modules() if isinstance(module, DynamicGroupAttention)]

    def update_centroids(self, lr: float = 1e-3) -> None:
        """Move every layer's centroids to the queries seen since the last call: after each step of an optimiser."""
        for layer in self.grouped_layers():
            layer.update_centroids(lr)

    def update_centroids_with(self, optimizer: Optimizer, pace: float = 1.0) -> RemovableHandle:
        """Move the centroids after every step that an optimiser takes, by its largest learning rate times `pace`.

        Call it once. It works in every loop that calls optimizer.step(): timm's script, accelerate, Lightning, with
        gradient accumulation, with a gradient scaler (a step that it skips moves nothing). If something wraps the
        model, as DistributedDataParallel does, call it on the model inside, in every process.
        Returns a handle; its `remove()` ends it. Raises TypeError for an optimiser that wraps another one and runs no
        hooks of its own (accelerate's, timm's Lookahead), ValueError for a pace that is not positive.
        """
        if not getattr(getattr(type(optimizer), "step", None), "hooked", False):  # so torch marks those that run hooks
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer: expected one of torch.optim.Optimizer, got {kind}; if it wraps one, give that")
        if not pace > 0:
            raise ValueError(f"pace: expected a positive number, got {pace}")

        def move(optimizer: Optimizer, *_) -> None:
            self.update_centroids(pace * max(float(group["lr"]) for group in optimizer.param_groups))

        return optimizer.register_step_post_hook(move)

    def after_step(self, lr: float) -> None:
        """What `dynattn.training` calls after every step of its optimiser."""
        self.update_centroids(lr)

    def set_keys(self, keys: int) -> None:
        """Let every group read k keys, or all where a map has fewer; no parameter depends on it.

        The paper has 98 at 224 pixels, 512 for ADE20K, 500 for COCO.
        """
        core.positive("keys", keys)
        for layer in self.grouped_layers():
            layer.keys = keys


class DGT(GroupedModel, Backbone):
    """DGT and its ablations: (B, in_chans, H, W) to (B, num_classes), for any H and W.

    img_size: what images are brought to; no parameter depends on it.  dims, depths, heads: by stage.  groups, keys: G
    and k, one number or one for every stage that groups, all but the last (Table 4b).
    The centroids have no gradient: see `update_centroids_with` for a training loop of your own.
    block: "dgt", or what stands in its place in the stages that group (Table 4c): "swin", attention in windows of side
    `window`, shifted in turn, and an MLP; "cswin", in cross-shaped windows, and an MLP; "cmt", of keys from a reduced
    map, in a block that is DGT's otherwise. The paper does not say more: the last stage stays as it is, and each has
    its own paper's sizes for that stage.
    post_norm, cosine: of DGT-S and DGT-B.  variant: "paper", no code was published.  as_printed: which of
    the equations 4, 12, 13 and 17 to take with their misprints.  head_dim: channels before the classifier.
    global_pool: "avg", "max", or "" where num_classes is 0.  drop_rate: dropout before the classifier.  attn_drop_rate,
    proj_drop_rate: of attention weights, and of what the two branches of a block put out.  drop_path_rate: stochastic
    depth of the last block.
    Raises ValueError, TypeError for arguments that do not fit together. Source: DGT section 3.3, Table 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 2, 17, 2),
        heads: Sequence[int] = (2, 4, 8, 16),
        groups: int | Sequence[int] = 48,
        keys: int | Sequence[int] = 98,
        block: str = "dgt",
        window: int = 7,
        post_norm: bool = False,
        cosine: bool = False,
        variant: str = "paper",
        as_printed: int | Collection[int] = (),
        head_dim: int = 1280,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ):
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool=global_pool)
        core.one_of("variant", variant, ("paper",))
        core.positive("head_dim", head_dim)
        core.one_of("block", block, BLOCKS)
        if as_printed and block != "dgt":
            raise ValueError(f"as_printed: expected none where block={block!r} groups nothing, got {as_printed}")
        core.rate("drop_rate", drop_rate)
        core.rate("attn_drop_rate", attn_drop_rate)
        core.rate("proj_drop_rate", proj_drop_rate)
        if as_printed and attn_drop_rate:
            raise ValueError(f"attn_drop_rate: expected 0 where equations are taken as printed, got {attn_drop_rate}")
        count = check_stages(depths, heads=heads)
        groups, keys = each_stage("groups", groups, count - 1, "groups"), each_stage("keys", keys, count - 1, "groups")
        self.head_hidden_size = head_dim

        def layer(i: int, d: int, rate: float) -> nn.Module:
            """Block d of stage i."""
            size = dict(dim=dims[i], heads=heads[i], attn_drop=attn_drop_rate)
            drop = dict(drop_path=rate, proj_drop=proj_drop_rate)
            if i == count - 1:
                attn = DenseAttention(**size, cosine=cosine)
            elif block == "swin":
                shift = window // 2 if d % 2 else 0
                return Block(dims[i], WindowAttention(**size, window=window, shift=shift), **drop)
            elif block == "cswin":
                return Block(dims[i], CrossShapedWindowAttention(**size, stripe=STRIPES[min(i, 3)]), **drop)
            elif block == "cmt":
                attn = SpatialReductionAttention(**size, ratio=REDUCTIONS[min(i, 3)], depthwise=True)
            else:
                attn = DynamicGroupAttention(
                    **size, groups=groups[i], keys=keys[i], cosine=cosine, as_printed=as_printed
                )
            return DGTBlock(dims[i], attn, **drop, post_norm=post_norm)

        widths = dims[0] // 2, *dims
        self.embed = Stem(in_chans, widths[0])
        self.add_stages(depths, lambda i: PatchEmbedding(widths[i], widths[i + 1], 3, 2), layer, drop_path_rate)
        self.norm = nn.Identity()  # a LayerNorm here would miss the parameters of DGT-S
        self.widen = nn.Sequential(nn.Conv2d(dims[-1], head_dim, 1), nn.BatchNorm2d(head_dim), nn.SiLU())
        self.add_head(drop_rate)
        self.apply(initialise)

    @classmethod
    def configuration(cls, **options) -> dict:
        """As of every backbone, with the first convolution of its stem."""
        return super().configuration(**options) | dict(first_conv="embed.convs.0.0")

    def forward_head(
        self, x: Float[Tensor, "B c h w"], pre_logits: bool = False
    ) -> Float[Tensor, "B out"] | Float[Tensor, "B out h w"]:
        """1280 channels, then as every backbone: global pooling, dropout, the classifier."""
        return super().forward_head(self.widen(x), pre_logits)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] | None = None,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the head if wanted; returns the stages as numbers."""
        before = len(self.stages)
        chosen = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < before:
            self.widen = nn.Identity()
        return chosen


TINY = dict()
SMALL = dict(dims=(96, 192, 384, 768), heads=(3, 6, 12, 24), post_norm=True, cosine=True, drop_path_rate=0.4)
BASE = dict(dims=(128, 256, 512, 1024), heads=(4, 8, 16, 32), post_norm=True, cosine=True, drop_path_rate=0.5)
MINI = dict(
    img_size=128,
    num_classes=10,
    dims=(32, 64, 128),
    depths=(1, 4, 3),
    heads=(2, 4, 8),
    groups=8,
    keys=(256, 64),
    head_dim=256,
    drop_path_rate=0.05,
)

register_model("dgt_tiny", DGT, **TINY)
register_model("dgt_small", DGT, **SMALL)
register_model("dgt_base", DGT, **BASE)
register_model("dgt_mini", DGT, **MINI)
