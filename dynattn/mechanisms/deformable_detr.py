"""Deformable-DETR's attention as a backbone layer (DAT, appendix A): the comparison of Table 8.

Every query has K points of its own in every head, and their weights are not a similarity of query and key but a linear
map of the query alone:

    z_q^(m) = sum_k A_qk^(m) W_v phi(x; p_q + Delta p_qk^(m)),    A_q^(m) = softmax_k(x W_att)               DAT-11

There are no keys and no position bias; offsets count in cells of the map.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core, tracing

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def detr_attention_loops(v, points, weights):
    """DAT-11 one query, one point and one channel at a time."""
    (B, h, d, H, W), (L, K) = v.shape, points.shape[2:4]
    z = []
    for b in range(B):
        for m in range(h):
            for l in range(L):
                at = [core.to_pixels(points[b, m, l, k], (H, W)) for k in range(K)]
                for c in range(d):
                    z.append(sum(weights[b, m, l, k] * core.read_bilinear(v[b, m, c], *at[k]) for k in range(K)))
    return torch.stack(z).reshape(B, h, L, d)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


def detr_attention_torch(v, points, weights):
    """DAT-11: sample all points of all queries, then sum over K."""
    B, h, _, _, _ = v.shape
    sampled = core.sample_points(v.flatten(0, 1), rearrange(points, "B h L K two -> (B h) (L K) two"))
    sampled = rearrange(sampled, "(B h) d (L K) -> B h d L K", B=B, h=h, K=points.shape[3])
    return torch.einsum("bhlk,bhdlk->bhld", weights, sampled)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


@core.operation(loops=detr_attention_loops, torch=detr_attention_torch)
def detr_attention(
    v: Float[Tensor, "B h d H W"],
    points: Float[Tensor, "B h L K 2"],
    weights: Float[Tensor, "B h L K"],
    *,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Each query sums what it reads at its own K points with the given weights.

    Shapes: v (B, h, d, H, W), the projected map of each head; points (B, h, L, K, 2), normalised (row, col), zeros
    outside; weights (B, h, L, K). Returns (B, h, L, d). Raises TypeError, ValueError on wrong arguments.
    Source: DAT appendix A, equation 11.
    """
    core.bind(v=(v, "B h d H W"), points=(points, "B h L K 2"), weights=(weights, "B h L K"))
    return detr_attention.forms.run(impl, v, points, weights)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


class DeformableDetrAttention(nn.Module):
    """Deformable-DETR's attention on one map: (B, H, W, C) to the same. `points` is K, for each query and head.

    At the start the points of head m stand on a ray of its own, k + 1 cells away, and all weights are equal.
    attn_drop: the share of the weights that training drops.
    """

    implementation, forms = "auto", tuple(detr_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, points: int, *, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads, self.points = dim, core.divisor("heads", heads, dim), core.positive("points", points)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        self.offset = nn.Linear(dim, heads * points * 2)
        self.attention = nn.Linear(dim, heads * points)
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        angle = torch.arange(heads) * 2 * math.pi / heads
        ray = torch.stack([angle.sin(), angle.cos()], dim=-1)[:, None] * torch.arange(1, points + 1)[:, None]
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.attention.weight)
        nn.init.zeros_(self.attention.bias)
        with torch.no_grad():
            self.offset.bias.copy_(ray.flatten())

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        v = rearrange(self.v(x), "B H W (h d) -> B h d H W", h=self.heads)
        offsets = rearrange(self.offset(x), "B H W (h K two) -> B h (H W) K two", h=self.heads, two=2)
        offsets = core.stretch(offsets, [2 / core.larger(side - 1, 1) for side in shape])
        points = core.grid_points(shape, "corner", x)[:, None] + offsets  # p_q + Delta p_qk
        weights = rearrange(self.attention(x), "B H W (h K) -> B h (H W) K", h=self.heads).softmax(dim=-1)
        weights = F.dropout(weights, self.attn_drop, self.training)
        v, weights = v.to(points.dtype), weights.to(points.dtype)  # autocast lowers linear maps, but no position
        z = detr_attention(v, points, weights, impl=self.implementation)  # DAT-11
        if tracing.recording():
            tracing.keep(self, DeformableDetrRecord(v[0], points[0], weights[0], z[0], shape))
        return self.proj(core.merge_heads(z, shape))  # DAT-3


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class DeformableDetrRecord(tracing.Record):
    """One layer: v (M, d, H, W); points (M, L, K, 2), normalised (row, col); attention (M, L, K); z (M, L, d)."""

    kind = "deformable_detr"

    def __init__(self, v, points, attention, z, query_shape):
        self.v, self.points, self.attention, self.z = v, points, attention, z
        self.query_shape, self.heads = query_shape, v.shape[0]

    def weights(self, head: int = 0) -> Float[Tensor, "L K"]:
        self.check_head(head)
        return self.attention[head]

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """Row q: the bilinear weights of its K points, times their attention. Exact: the bias of v is in the value."""
        self.check_head(head)
        reads = core.bilinear_weights(self.points[head], self.query_shape)  # (L, K, S)
        return torch.einsum("lk,lks->ls", self.attention[head], reads)

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        self.check_head(head)
        return rearrange(self.v[head], "d H W -> (H W) d")

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The K points of the query at image pixel (row, col), and their weights."""
        self.check_head(head)
        query = self.query(row, col)
        points = core.to_pixels(self.points[head, query], self.query_shape)
        return tracing.Keys(self.to_image(points), self.attention[head, query])
