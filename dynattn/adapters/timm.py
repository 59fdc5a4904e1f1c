"""How timm's transformers are recorded: those whose layer is softmax(q k^T + bias) v over tokens of the image.

A hook sees what an attention module got. From it q, k and v are made again, as the module makes them; z, what the heads
put out, is what the module hands to its next part. So nothing of timm is replaced, and every record can be held to the
numbers that the model computed.

    Vision Transformer, DeiT and their like; EVA and RoPE (DINOv3); BEiT; relative positions   tokens in a row, dense
    PiT                                                                                        the same, in stages
    SAM                                                                                        windows, and dense
    Swin, Swin V2                                                                              windows that shift
"""

from collections.abc import Callable
from inspect import signature
from math import isqrt, log

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.mechanisms.dense import DenseRecord
from dynattn.mechanisms.window import Layout, WindowRecord


def class_path(module: nn.Module) -> str:
    """The full name of a module's own class: a subclass may compute something else."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def arguments(module: nn.Module, inputs: tuple, named: dict) -> dict:
    """What a forward got, by the names of its parameters; what was left to its default is missing."""
    return signature(module.forward).bind(*inputs, **named).arguments


def project(attention: nn.Module, x: Float[Tensor, "B N C"]) -> list[Float[Tensor, "B h N d"]]:
    """q, k and v of every head, normed where the module norms them."""
    if getattr(attention, "qkv", None) is not None:
        qkv = attention.qkv(x)
        if getattr(attention, "q_bias", None) is not None:
            qkv = qkv + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=attention.num_heads)
    else:
        several = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        q, k, v = (rearrange(one, "B N (h d) -> B h N d", d=attention.head_dim) for one in several)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return [q, k, v]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens in a row: each of these answers q, k and what is added to the logits
# ---------------------------------------------------------------------------------------------------------------------


def plain(attention: nn.Module, q: Tensor, k: Tensor, given: dict) -> tuple:
    """Nothing is added."""
    return q, k, None


def rotated(attention: nn.Module, q: Tensor, k: Tensor, given: dict) -> tuple:
    """Rotary position embedding: queries and keys of the map are turned by their place."""
    from timm.layers import apply_rot_embed_cat

    rope, n, half = given.get("rope"), attention.num_prefix_tokens, attention.rotate_half
    if rope is not None:
        turned = (apply_rot_embed_cat(t[:, :, n:], rope, half=half) for t in (q, k))
        q, k = (torch.cat([t[:, :, :n], one], dim=2).type_as(t) for t, one in zip((q, k), turned, strict=True))
    return q, k, None


def beit_bias(attention: nn.Module, q: Tensor, k: Tensor, given: dict) -> tuple:
    """A table of relative positions, the layer's own or the model's or both."""
    biases = [given.get("shared_rel_pos_bias")]
    if attention.relative_position_bias_table is not None:
        biases.append(attention._get_rel_pos_bias())
    biases = [bias for bias in biases if bias is not None]
    return q, k, sum(biases).reshape(-1, q.shape[2], q.shape[2]) if biases else None  # with a batch of 1, or without


def relative_bias(attention: nn.Module, q: Tensor, k: Tensor, given: dict) -> tuple:
    """The bias of a module of its own; where a layer has none, the model's."""
    bias = given.get("shared_rel_pos") if attention.rel_pos is None else attention.rel_pos.get_bias()
    return q, k, None if bias is None else bias[0]


TOKENS = {
    "timm.layers.attention.Attention": plain,
    "timm.layers.attention.AttentionRope": rotated,
    "timm.models.eva.EvaAttention": rotated,
    "timm.models.beit.Attention": beit_bias,
    "timm.models.vision_transformer_relpos.RelPosAttention": relative_bias,
}


def watch_tokens(attention: nn.Module, watch: tracing.Watch, grid: Callable[[int], tuple]) -> None:
    """Record an attention over tokens in a row. grid(tokens): rows and columns of the map, tokens in front of it."""
    rule, seen = TOKENS[class_path(attention)], {}

    def before_norm(norm: nn.Module, inputs: tuple) -> None:
        seen["z"] = inputs[0]

    def after_attention(attention: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
        given = arguments(attention, inputs, named)
        if given.get("attn_mask") is not None or given.get("is_causal"):
            raise ValueError("attn_mask: expected none while a trace is taken, got one: a record has no masks")
        q, k, v = project(attention, given["x"])
        q, k, bias = rule(attention, q, k, given)
        k, v = (t.repeat_interleave(attention.num_heads // t.shape[1], dim=1) for t in (k, v))  # grouped queries
        z = rearrange(seen["z"], "B N (h d) -> B h N d", h=attention.num_heads)
        shape, prefix = grid(q.shape[2])
        record = DenseRecord(q[0], k[0], v[0], z[0], shape, prefix=prefix, scale=attention.scale, bias=bias)
        tracing.keep(attention, record)

    watch.before(getattr(attention, "norm", attention.proj), before_norm)
    watch.after(attention, after_attention)


def token_grid(embed: nn.Module, image: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Rows and columns of the tokens that a patch embedding of timm's makes of an image of this size.

    One that cannot tell is taken for square if the image is. Raises ValueError where this is not `tokens` in all.
    """
    if hasattr(embed, "dynamic_feat_size"):
        H, W = embed.dynamic_feat_size(image)
    else:
        H = W = isqrt(tokens) if image[0] == image[1] else 0
    if H * W != tokens:
        raise ValueError(
            f"model: cannot tell how {tokens} tokens lie on an image of {image[0]} x {image[1]} pixels; "
            f"expected {type(embed).__name__}.dynamic_feat_size(image) to say it, as timm's PatchEmbed does"
        )
    return H, W


@tracing.adapter(
    "timm.models.vision_transformer.VisionTransformer",
    "timm.models.eva.Eva",
    "timm.models.beit.Beit",
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos",
)
def record_vit(model: nn.Module, watch: tracing.Watch) -> None:
    """Record models of one resolution. Their attention sees a row of tokens only: the model tells how they lie.

    Layers of other kinds, as in parallel or differential blocks, are left out.
    """
    seen = {}

    def before_embedding(embed: nn.Module, inputs: tuple) -> None:
        seen["image"] = tuple(inputs[0].shape[-2:])

    def grid(tokens: int) -> tuple:
        prefix = model.num_prefix_tokens
        return token_grid(model.patch_embed, seen["image"], tokens - prefix), prefix

    watch.before(model.patch_embed, before_embedding)
    for module in model.blocks.modules():
        if class_path(module) in TOKENS:
            watch_tokens(module, watch, grid)


@tracing.adapter("timm.models.pit.Transformer")
def record_pit(stage: nn.Module, watch: tracing.Watch) -> None:
    """Record a stage of PiT: a map, which is pooled first, behind its class tokens."""
    seen = {}

    def before_stage(stage: nn.Module, inputs: tuple) -> None:
        seen["map"], seen["prefix"] = inputs[0][0].shape, inputs[0][1].shape[1]

    def after_pool(pool: nn.Module, inputs: tuple, named: dict, output: tuple) -> None:
        seen["map"] = output[0].shape

    watch.before(stage, before_stage)
    if stage.pool is not None:
        watch.after(stage.pool, after_pool)
    for module in stage.blocks.modules():
        if class_path(module) in TOKENS:
            watch_tokens(module, watch, lambda tokens: (tuple(seen["map"][-2:]), seen["prefix"]))


# ---------------------------------------------------------------------------------------------------------------------
# SAM: windows without a shift, or the whole map
# ---------------------------------------------------------------------------------------------------------------------


class DecomposedRecord(DenseRecord):
    """A dense layer that adds a bias for the key's row and one for its column: by_row (M, L, H), by_col (M, L, W).

    Kept apart: the bias of all pairs at SAM's own size would take 800 MB a layer.
    """

    def __init__(self, *tensors, by_row: Float[Tensor, "M L H"], by_col: Float[Tensor, "M L W"], scale: float):
        super().__init__(*tensors, scale=scale)
        self.by_row, self.by_col = by_row, by_col

    def added(self, head: int, queries: slice) -> Float[Tensor, "n S"]:
        """What is added to the logits of some queries."""
        return (self.by_row[head, queries, :, None] + self.by_col[head, queries, None, :]).flatten(1)


@tracing.adapter("timm.models.vision_transformer_sam.Block")
def record_sam(block: nn.Module, watch: tracing.Watch) -> None:
    """Record SAM's image encoder. Queries of a window at the edge read its padding, as `WindowRecord` says."""
    attention, seen = block.attn, {}

    def before_block(block: nn.Module, inputs: tuple) -> None:
        seen["shape"] = tuple(inputs[0].shape[1:3])

    def before_projection(projection: nn.Module, inputs: tuple) -> None:
        seen["z"] = inputs[0]

    def after_attention(attention: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
        from timm.layers import apply_rot_embed_cat
        from timm.models.vision_transformer_sam import get_rel_pos

        H, W = inputs[0].shape[1:3]
        q, k, v = project(attention, inputs[0].flatten(1, 2))
        z = rearrange(seen["z"], "n T (h d) -> n h T d", h=attention.num_heads)
        if attention.rope is not None:
            q, k = (apply_rot_embed_cat(t, attention.rope.get_embed()).type_as(v) for t in (q, k))
        by_row = by_col = q.new_zeros(())
        if attention.use_rel_pos:
            of_row, of_col = get_rel_pos(H, H, attention.rel_pos_h), get_rel_pos(W, W, attention.rel_pos_w)
            by_row = torch.einsum("nhijd,iud->nhiju", q.unflatten(2, (H, W)), of_row).flatten(2, 3)
            by_col = torch.einsum("nhijd,jvd->nhijv", q.unflatten(2, (H, W)), of_col).flatten(2, 3)
        by_row, by_col = by_row.expand(*q.shape[:3], H), by_col.expand(*q.shape[:3], W)
        if block.window_size > 0:
            bias = (by_row[..., :, None] + by_col[..., None, :]).flatten(3)
            layout = Layout(seen["shape"], (H, W), (0, 0))
            tracing.keep(attention, WindowRecord(q, k, v, z, bias, layout, scale=attention.scale))
        else:
            tensors = (q[0], k[0], v[0], z[0], (H, W))
            record = DecomposedRecord(*tensors, by_row=by_row[0], by_col=by_col[0], scale=attention.scale)
            tracing.keep(attention, record)

    watch.before(block, before_block)
    watch.before(attention.proj, before_projection)
    watch.after(attention, after_attention)


# ---------------------------------------------------------------------------------------------------------------------
# Swin and Swin V2: windows that shift
# ---------------------------------------------------------------------------------------------------------------------


class TimmLayout(Layout):
    """Windows as timm's Swin lays them: the map is rolled first and padded then."""

    @property
    def roll(self) -> tuple[int, int]:
        return self.shift

    def cut(self, x: Num[Tensor, "B H W C"]) -> Num[Tensor, "n T C"]:
        rolled = x.roll((-self.roll[0], -self.roll[1]), dims=(1, 2))
        return core.partition_windows(core.pad_map(rolled, self.padding), self.window)

    def join(self, x: Num[Tensor, "n T C"]) -> Num[Tensor, "B H W C"]:
        padded = core.merge_windows(x, self.window, self.padded)
        return padded[:, : self.shape[0], : self.shape[1]].roll(self.roll, dims=(1, 2))


def scaled_dots(attention: nn.Module, q: Tensor, k: Tensor, window: tuple[int, int]) -> tuple:
    """Swin: a table of relative positions. Answers q, k, the bias (h, T, T) and the scale."""
    rows, cols = core.relative_index(window)
    table = rearrange(attention.relative_position_bias_table, "(I J) h -> h I J", I=2 * window[0] - 1)
    return q, k, table[:, rows, cols], attention.scale


def cosines(attention: nn.Module, q: Tensor, k: Tensor, window: tuple[int, int]) -> tuple:
    """Swin V2: cosines times a factor that each head learns, at most 100, and a bias from a network (section 3.3)."""
    q, k = F.normalize(q, dim=-1) * attention.logit_scale.clamp(max=log(100)).exp(), F.normalize(k, dim=-1)
    table = attention.cpb_mlp(attention.relative_coords_table)[0]
    rows, cols = core.relative_index(window)
    return q, k, 16 * rearrange(table, "I J h -> h I J")[:, rows, cols].sigmoid(), 1.0


def with_mask(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Float[Tensor, "n h T T"]:
    """A bias (h, T, T) with a shift's mask (n, T, T), 0 or -100, where timm means "may not be read".

    It is -inf here, as long as the weights that -100 leaves are nothing: cosines times 100 can make them something.
    """
    if mask is None:
        return bias[None]
    hidden = mask[:, None] < 0
    left = core.attention_weights(q, k, bias + mask[:, None], scale) * hidden
    if left.max() > torch.finfo(left.dtype).eps ** 2:
        return bias + mask[:, None]
    return bias.masked_fill(hidden, -torch.inf)


SWIN = {
    "timm.models.swin_transformer.WindowAttention": scaled_dots,
    "timm.models.swin_transformer_v2.WindowAttention": cosines,
}


@tracing.adapter(
    "timm.models.swin_transformer.SwinTransformerBlock", "timm.models.swin_transformer_v2.SwinTransformerV2Block"
)
def record_swin(block: nn.Module, watch: tracing.Watch) -> None:
    """Record a block of Swin. Its attention sees windows only: the block tells where they lie, `proj` gets heads."""
    attention, seen = block.attn, {}
    if class_path(attention) not in SWIN:
        return

    def before_block(block: nn.Module, inputs: tuple) -> None:
        seen["layout"] = TimmLayout(tuple(inputs[0].shape[1:3]), tuple(block.window_size), tuple(block.shift_size))

    def before_projection(projection: nn.Module, inputs: tuple) -> None:
        seen["z"] = inputs[0]

    def after_attention(attention: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
        given, layout = arguments(attention, inputs, named), seen["layout"]
        q, k, v = project(attention, given["x"])
        q, k, bias, scale = SWIN[class_path(attention)](attention, q, k, layout.window)
        bias = with_mask(q, k, bias, given.get("mask"), scale)
        z = rearrange(seen["z"], "n T (h d) -> n h T d", h=attention.num_heads)
        tracing.keep(attention, WindowRecord(q, k, v, z, bias, layout, scale=scale))

    watch.before(block, before_block)
    watch.before(attention.proj, before_projection)
    watch.after(attention, after_attention)
