"""Attention of other papers that these five compare with.

Spatial reduction (PVT): keys and values come from a map that a strided convolution has made r times smaller on each
side; every query reads all of it. DAT's Table 6 puts it into the first two stages (row "P").
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core, tracing


class SpatialReductionAttention(nn.Module):
    """PVT's attention: (B, H, W, C) to the same, for any H and W. `ratio` is r; borders are padded with zeros."""

    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.dim, self.heads, self.ratio = dim, core.divisor("heads", heads, dim), core.positive("ratio", ratio)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, ratio, ratio)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        padded = core.pad_map(x, core.padding_to(shape, (self.ratio, self.ratio)))
        reduced = self.reduce(rearrange(padded, "B H W C -> B C H W"))
        tokens = self.norm(rearrange(reduced, "B C HR WR -> B (HR WR) C"))
        q = core.split_heads(self.q(x), self.heads)  # DAT-1
        k, v = rearrange(self.kv(tokens), "B N (two h d) -> two B h N d", two=2, h=self.heads)
        z = core.dense_attention(q, k, v)  # DAT-2
        if tracing.recording():
            tracing.keep(self, SpatialReductionRecord(q[0], k[0], v[0], z[0], shape, self.ratio))
        return self.proj(core.merge_heads(z, shape))  # DAT-3


class SpatialReductionRecord(tracing.Record):
    """One layer: q, z (M, H W, d); k, v (M, N, d) of the reduced map.

    Never exact: the values pass a convolution over r x r cells and a LayerNorm. The effective matrix lets every key
    stand for the mean of its cells; as `value` there is nothing better than the reduced token itself, repeated.
    """

    kind = "baselines"
    exact = False

    def __init__(self, q, k, v, z, query_shape, ratio):
        self.q, self.k, self.v, self.z = q, k, v, z
        self.query_shape, self.heads, self.ratio = query_shape, q.shape[0], ratio

    def cell_of(self) -> Float[Tensor, "S N"]:
        """Which reduced token a cell belongs to, as a 0/1 matrix."""
        H, W = self.query_shape
        WR = -(-W // self.ratio)
        owner = (torch.arange(H)[:, None] // self.ratio) * WR + torch.arange(W)[None, :] // self.ratio
        return torch.nn.functional.one_hot(owner.flatten(), self.k.shape[1]).to(self.k)

    def weights(self, head: int = 0) -> Float[Tensor, "L N"]:
        self.check_head(head)
        return core.attention_weights(self.q[head], self.k[head], None, self.q.shape[-1] ** -0.5)

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """Attention to a reduced token, shared equally by the cells it was made of."""
        owner = self.cell_of()
        return self.weights(head) @ (owner / owner.sum(dim=0)).T

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        self.check_head(head)
        return self.cell_of() @ self.v[head]

    def output(self, head: int = 0) -> Float[Tensor, "L d"]:
        self.check_head(head)
        return self.z[head]

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """All cells of the map, each with its part of the weight of its reduced token."""
        weight = self.effective_matrix(head)[self.query(row, col)]
        return tracing.Keys(self.cells().to(weight), weight)
