"""Dense attention: every query reads every token. What ViT and SETR do, and what all the others are cheaper than.

    z^(m) = softmax(q^(m) k^(m)T / sqrt(d)) v^(m)                                                            DAT-2

The operation itself is `core.dense_attention`; here are the module and its record.
"""

from math import log

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core, tracing


class DenseAttention(nn.Module):
    """Multi-head attention of every token to every token: (B, H, W, C) to the same, for any H and W.

    cosine: logits are cosines of queries and keys, times a factor that each head learns, as its logarithm: 10 at the
    start, at most 100 (Swin Transformer V2, arXiv 2111.09883, section 3.3). attn_drop: the share of the attention
    weights that training drops. Source: DGT section 3.3, stage 4 (GSA).
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, *, cosine: bool = False, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("heads", heads, dim)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), log(10))) if cosine else None

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape, scale = tuple(x.shape[1:3]), None
        q, k, v = rearrange(self.qkv(x), "B H W (three h d) -> three B h (H W) d", three=3, h=self.heads)  # DAT-1
        if self.temperature is not None:
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=log(100)).exp()
            q, k, scale = q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), 1.0  # under autocast, v has less precision
        if self.training and self.attn_drop:
            z = core.dense_attention_torch(q, k, v, None, core.scale_or_default(scale, q.shape[-1]), self.attn_drop)
        else:
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
        bias: Float[Tensor, "M S S"] | None = None,
    ):
        """q, k, v and what came out, z, with the `prefix` tokens that have no position in front, as a ViT has them.

        `scale` None is d^-0.5; `bias` is added to the logits, where the layer adds one.
        Raises TypeError, ValueError where S is not prefix + H W or shapes differ otherwise.
        """
        H, W = core.pair("query_shape", query_shape)
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ValueError(f"prefix: expected a number of tokens, got {prefix!r}")
        S = prefix + H * W
        shapes = dict(q=(q, f"M {S} d"), k=(k, f"M {S} d"), v=(v, f"M {S} c"), z=(z, f"M {S} c"))
        sizes = core.bind(**shapes, **({} if bias is None else {"bias": (bias, f"M {S} {S}")}))
        self.q, self.z = q[:, prefix:], z[:, prefix:]
        self.k, self.v = k.roll(-prefix, dims=1), v.roll(-prefix, dims=1)  # prefix last
        self.query_shape, self.heads, self.prefix = (H, W), sizes["M"], prefix
        self.scale = core.scale_or_default(scale, sizes["d"])
        self.bias = None if bias is None else bias[:, prefix:].roll(-prefix, dims=2)  # (M, H W, S)

    def added(self, head: int, queries: slice) -> Float[Tensor, "n S"] | None:
        """What is added to the logits of some queries."""
        return None if self.bias is None else self.bias[head, queries]

    def of_queries(self, head: int, queries: slice) -> Float[Tensor, "n S"]:
        """The weights of some queries."""
        bias = self.added(head, queries)
        return core.attention_weights(self.q[head, queries], self.k[head], bias, self.scale)  # DAT-2

    def weights(self, head: int = 0) -> Float[Tensor, "L S"]:
        self.check_head(head)
        return self.of_queries(head, slice(None))

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """All cells of the map, whatever their weight; what the prefix gets is missing from the sum of the weights."""
        self.check_head(head)
        query = self.query(row, col)
        weight = self.of_queries(head, slice(query, query + 1))[0]
        weight = weight[: len(weight) - self.prefix]
        return tracing.Keys(self.cells().to(weight), weight)
