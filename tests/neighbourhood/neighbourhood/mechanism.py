"""Neighbourhood attention: a query at (i, j) reads the cells (u, v) with |u - i| <= r and |v - j| <= r."""

import torch
from einops import rearrange
from torch import Tensor, nn

from dynattn import core, tracing


def may_read(shape: tuple[int, int], radius: int) -> Tensor:
    """Which cells (H W) every query (H W) reads."""
    i, j = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    near = lambda a: (a.flatten()[:, None] - a.flatten()).abs() <= radius  # noqa: E731
    return near(i) & near(j)


def neighbourhood_attention_loops(q, k, v, shape, radius, scale):
    """One query, one key and one channel at a time."""
    (B, h, _, d), (H, W) = q.shape, shape
    z = []
    for b in range(B):
        for m in range(h):
            for l in range(H * W):
                i, j = divmod(l, W)
                near = [s for s in range(H * W) if max(abs(s // W - i), abs(s % W - j)) <= radius]
                logits = [sum(q[b, m, l, c] * k[b, m, s, c] for c in range(d)) * scale for s in near]
                pairs = list(zip(core.softmax_loops(logits), near, strict=True))
                z += [sum(weight * v[b, m, s, c] for weight, s in pairs) for c in range(d)]
    return torch.stack(z).reshape(q.shape)


def neighbourhood_attention_torch(q, k, v, shape, radius, scale):
    """Dense attention under a mask."""
    hidden = torch.zeros(1, 1, dtype=q.dtype).masked_fill(~may_read(shape, radius), -torch.inf)
    return core.dense_attention_torch(q, k, v, hidden.to(q), scale)


@core.operation(loops=neighbourhood_attention_loops, torch=neighbourhood_attention_torch)
def neighbourhood_attention(q, k, v, query_shape, *, radius=1, scale=None, impl="auto"):
    """Every query reads the cells at most `radius` rows and columns away: (B, h, H W, d) to the same."""
    H, W = core.pair("query_shape", query_shape)
    sizes = core.bind(q=(q, f"B h {H * W} d"), k=(k, f"B h {H * W} d"), v=(v, f"B h {H * W} d"))
    radius, scale = core.positive("radius", radius), core.scale_or_default(scale, sizes["d"])
    return neighbourhood_attention.forms.run(impl, q, k, v, (H, W), radius, scale)


class NeighbourhoodAttention(nn.Module):
    """(B, H, W, C) to the same."""

    implementation, forms = "auto", tuple(neighbourhood_attention.forms)

    def __init__(self, dim: int, heads: int, radius: int):
        super().__init__()
        self.heads, self.radius = heads, radius
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape[1:3])
        q, k, v = rearrange(self.qkv(x), "B H W (three h d) -> three B h (H W) d", three=3, h=self.heads)
        z = neighbourhood_attention(q, k, v, shape, radius=self.radius, impl=self.implementation)
        if tracing.recording():
            tracing.keep(self, NeighbourhoodRecord(q[0], k[0], v[0], z[0], shape, self.radius))
        return self.proj(core.merge_heads(z, shape))


class NeighbourhoodRecord(tracing.Record):
    """One layer: q, k, v, z (M, H W, d). Exact."""

    kind = "neighbourhood"

    def __init__(self, q, k, v, z, query_shape, radius):
        self.q, self.k, self.v, self.z = q, k, v, z
        self.query_shape, self.heads, self.radius = query_shape, len(q), radius

    def weights(self, head: int = 0) -> Tensor:
        self.check_head(head)
        hidden = torch.zeros(()).masked_fill(~may_read(self.query_shape, self.radius), -torch.inf)
        return core.attention_weights(self.q[head], self.k[head], hidden, self.q.shape[-1] ** -0.5)
