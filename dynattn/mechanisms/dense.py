"""Dense attention: every query reads every token. What ViT and SETR do, and what all the others are cheaper than.

    z^(m) = softmax(q^(m) k^(m)T / sqrt(d)) v^(m)                                                            DAT-2

The operation itself is `core.dense_attention`; here are the module, its record, and how timm's Vision Transformer is
recorded.
"""

from math import isqrt, log

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core, tracing


class DenseAttention(nn.Module):
    """Multi-head attention of every token to every token: (B, H, W, C) to the same, for any H and W.

    cosine: logits are cosines of queries and keys, times a factor that each head learns, as its logarithm: 10 at the
    start, at most 100 (Swin Transformer V2, arXiv 2111.09883, section 3.3). Source: DGT section 3.3, stage 4 (GSA).
    """

    implementation, forms = "auto", tuple(core.DENSE_ATTENTION)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, *, cosine: bool = False):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("heads", heads, dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), log(10))) if cosine else None

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape, scale = tuple(x.shape[1:3]), None
        q, k, v = rearrange(self.qkv(x), "B H W (three h d) -> three B h (H W) d", three=3, h=self.heads)  # DAT-1
        if self.temperature is not None:
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=log(100)).exp()
            q, k, scale = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), 1.0  # under autocast, v has less precision
        z = core.dense_attention(q, k, v, scale=scale, impl=self.implementation)  # DAT-2
        if tracing.recording():
            tracing.keep(self, DenseRecord(q[0], k[0], v[0], z[0], shape, scale=scale))
        return self.proj(core.merge_heads(z, shape))  # DAT-3


class DenseRecord(tracing.Record):
    """One dense layer: q, z (M, H W, d) of the map; k, v (M, S, d) of the map and then of `prefix` tokens beside it.

    Always exact: the keys are the source tokens. What class and register tokens ask is not kept, what they answer is.
    """

    kind = "dense"

    def __init__(
        self,
        q: Float[Tensor, "M S d"],
        k: Float[Tensor, "M S d"],
        v: Float[Tensor, "M S c"],
        z: Float[Tensor, "M S c"],
        query_shape: tuple[int, int],
        *,
        prefix: int = 0,
        scale: float | None = None,
    ):
        """q, k, v and what came out, z, with the `prefix` tokens that have no position in front, as a ViT has them.

        `scale` None is d^-0.5. Raises TypeError, ValueError where S is not prefix + H W or shapes differ otherwise.
        """
        H, W = core.pair("query_shape", query_shape)
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ValueError(f"prefix: expected a number of tokens, got {prefix!r}")
        S = prefix + H * W
        sizes = core.bind(q=(q, f"M {S} d"), k=(k, f"M {S} d"), v=(v, f"M {S} c"), z=(z, f"M {S} c"))
        self.q, self.z = q[:, prefix:], z[:, prefix:]
        self.k, self.v = k.roll(-prefix, dims=1), v.roll(-prefix, dims=1)  # prefix last
        self.query_shape, self.heads, self.prefix = (H, W), sizes["M"], prefix
        self.scale = core.scale_or_default(scale, sizes["d"])

    def weights(self, head: int = 0) -> Float[Tensor, "L S"]:
        self.check_head(head)
        return core.attention_weights(self.q[head], self.k[head], None, self.scale)  # DAT-2

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """All cells of the map, whatever their weight; what the prefix gets is missing from the sum of the weights."""
        self.check_head(head)
        query = self.query(row, col)
        weight = core.attention_weights(self.q[head, query, None], self.k[head], None, self.scale)[0]
        weight = weight[: len(weight) - self.prefix]
        return tracing.Keys(self.cells().to(weight), weight)


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


@tracing.adapter("timm.models.vision_transformer.VisionTransformer")
def record_timm_vit(model: nn.Module, keep) -> list:
    """Record timm's ViT, DeiT and their like. Their attention sees a row of tokens only: the model tells how they lie.

    Layers that are no plain `Attention`, as in parallel or differential blocks, are left out.
    """
    from timm.layers import Attention

    seen = {}

    def before_embedding(embed: nn.Module, inputs: tuple) -> None:
        seen["image"] = tuple(inputs[0].shape[-2:])

    def before_norm(norm: nn.Module, inputs: tuple) -> None:
        seen["z"] = inputs[0]

    def after_attention(attention: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
        if not all(mask is None or mask is False for mask in (*inputs[1:], *named.values())):
            raise ValueError("attn_mask: expected none while a trace is taken, got one: a record has no masks")
        qkv = attention.qkv(inputs[0])
        q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=attention.num_heads)
        q, k = attention.q_norm(q), attention.k_norm(k)
        z = rearrange(seen["z"], "B N (h d) -> B h N d", h=attention.num_heads)
        prefix = model.num_prefix_tokens
        shape = token_grid(model.patch_embed, seen["image"], q.shape[2] - prefix)
        keep(attention, DenseRecord(q[0], k[0], v[0], z[0], shape, prefix=prefix, scale=attention.scale))

    handles = [model.patch_embed.register_forward_pre_hook(before_embedding)]
    for attention in (module for module in model.blocks.modules() if type(module) is Attention):
        handles.append(attention.norm.register_forward_pre_hook(before_norm))
        handles.append(attention.register_forward_hook(after_attention, with_kwargs=True))
    return handles
