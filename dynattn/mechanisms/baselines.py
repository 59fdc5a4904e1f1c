"""Attention of other papers that these five compare with.

Spatial reduction (PVT): keys and values come from a map that a strided convolution has made r times smaller on each
side; every query reads all of it. DAT's Table 6 puts it into the first two stages (row "P"). CMT's convolution is
depthwise (DGT's Table 4c).

Cross-shaped windows (CSWin): half of the heads read horizontal stripes, as wide as the map, the other half vertical
ones; a depthwise convolution of the values is added, which tells where they lie (DGT's Tables 4c and 5).
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynattn import core, tracing


class SpatialReductionAttention(nn.Module):
    """PVT's attention: (B, H, W, C) to the same, for any H and W. `ratio` is r; borders are padded with zeros.

    depthwise: CMT's lightweight attention (arXiv 2107.06263, section 3.3), whose convolution is depthwise and has no
    LayerNorm behind it. Its position bias is left out: a table of all queries by all keys fits one size of map only.
    attn_drop: the share of the attention weights that training drops.
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, ratio: int, *, depthwise: bool = False, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads, self.ratio = dim, core.divisor("heads", heads, dim), core.positive("ratio", ratio)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, ratio, ratio, groups=dim if depthwise else 1)
        self.norm = nn.Identity() if depthwise else nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        padded = core.pad_map(x, core.padding_to(shape, (self.ratio, self.ratio)))
        reduced = self.reduce(rearrange(padded, "B H W C -> B C H W"))
        tokens = self.norm(rearrange(reduced, "B C HR WR -> B (HR WR) C"))
        q = core.split_heads(self.q(x), self.heads)  # DAT-1
        k, v = rearrange(self.kv(tokens), "B N (two h d) -> two B h N d", two=2, h=self.heads)
        if self.training and self.attn_drop:
            z = core.dense_attention_torch(q, k, v, None, q.shape[-1] ** -0.5, self.attn_drop)
        else:
            z = core.dense_attention(q, k, v, impl=self.implementation)  # DAT-2
        if tracing.recording():
            tracing.keep(self, SpatialReductionRecord(q[0], k[0], v[0], z[0], shape, self.ratio))
        return self.proj(core.merge_heads(z, shape))  # DAT-3


class SpatialReductionRecord(tracing.Record):
    """One layer: q, z (M, H W, d); k, v (M, N, d) of the reduced map.

    Never exact: the values pass a convolution over r x r cells and, in PVT, a LayerNorm. The effective matrix lets
    every key stand for the mean of its cells; as `value` there is nothing better than the reduced token itself,
    repeated.
    """

    kind = "baselines"
    exact = False

    def __init__(self, q, k, v, z, query_shape, ratio):
        self.q, self.k, self.v, self.z = q, k, v, z
        self.query_shape, self.heads, self.ratio = query_shape, q.shape[0], ratio

    def merged(self, head: int = 0) -> Int[Tensor, " S"]:
        """The reduced token of every cell, the same in all heads."""
        self.check_head(head)
        (H, W), device = self.query_shape, self.k.device
        rows, cols = (torch.arange(n, device=device) // self.ratio for n in (H, W))
        return (rows[:, None] * -(-W // self.ratio) + cols).flatten()

    def cell_of(self) -> Float[Tensor, "S N"]:
        """Which reduced token a cell belongs to, as a 0/1 matrix."""
        return torch.nn.functional.one_hot(self.merged(), self.k.shape[1]).to(self.k)

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

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """All cells of the map, each with its part of the weight of its reduced token."""
        weight = self.effective_matrix(head)[self.query(row, col)]
        return tracing.Keys(self.cells().to(weight), weight)


def stripe_attention(
    q: Float[Tensor, "B H W C"],
    k: Float[Tensor, "B H W C"],
    v: Float[Tensor, "B H W C"],
    heads: int,
    stripe: tuple[int, int],
    impl: str = "auto",
    dropout: float = 0.0,
) -> Float[Tensor, "B H W C"]:
    """Dense attention inside stripes of (rows, columns), cut from the top left; the last may be smaller."""
    shape = tuple(q.shape[1:3])
    padding = core.padding_to(shape, stripe)
    cut = lambda t: core.partition_windows(core.pad_map(t, padding), stripe)  # noqa: E731
    bias = None
    if not all(core.surely(more == 0) for more in padding):  # nobody reads what was added
        added = cut(q.new_ones(q.shape[0], *shape, 1)) == 0  # (n, T, 1)
        hidden = torch.zeros_like(added, dtype=q.dtype).masked_fill(added, -torch.inf)
        bias = repeat(hidden, "n T 1 -> n 1 l T", l=hidden.shape[1])
    q, k, v = (rearrange(cut(t), "n T (h d) -> n h T d", h=heads) for t in (q, k, v))
    if dropout:
        z = core.dense_attention_torch(q, k, v, bias, q.shape[-1] ** -0.5, dropout)
    else:
        z = core.dense_attention(q, k, v, bias=bias, impl=impl)
    padded = (shape[0] + padding[0], shape[1] + padding[1])
    return core.crop(core.merge_windows(rearrange(z, "n h T d -> n T (h d)"), stripe, padded), shape)


class CrossShapedWindowAttention(nn.Module):
    """CSWin's attention: (B, H, W, C) to the same, for any H and W. `stripe` is sw, the width of the stripes.

    The first half of the heads reads horizontal stripes (sw, W), the second vertical ones (H, sw), and a depthwise
    3 x 3 convolution of the values is added to both (LePE). A map no larger than one stripe is read as a whole. Where
    sw does not divide the side, the last stripe is narrower. attn_drop: the share of the attention weights that
    training drops. Source: arXiv 2107.00652, section 3.2.
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, stripe: int, *, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads, self.stripe = dim, core.divisor("heads", heads, dim), core.positive("stripe", stripe)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        if heads % 2:
            raise ValueError(f"heads: expected an even number, got {heads}")
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        H, W = x.shape[1:3]
        stripes = (min(self.stripe, H), W), (H, min(self.stripe, W))
        qkv = rearrange(self.qkv(x), "B H W (three half c) -> half three B H W c", three=3, half=2)  # DAT-1
        how = self.implementation, self.attn_drop if self.training else 0.0
        halves = [stripe_attention(*qkv[i], self.heads // 2, stripes[i], *how) for i in range(2)]  # DAT-2
        v = rearrange(qkv[:, 2], "half B H W c -> B (half c) H W")
        z = torch.cat(halves, dim=-1) + rearrange(self.lepe(v), "B C H W -> B H W C")
        if tracing.recording():
            q, k, v = rearrange(qkv[:, :, 0], "half three H W (m d) -> three (half m) (H W) d", m=self.heads // 2)
            tracing.keep(self, CrossShapedRecord(q, k, v, core.split_heads(z, self.heads)[0], stripes, (H, W)))
        return self.proj(z)  # DAT-3


class CrossShapedRecord(tracing.Record):
    """One layer: q, k, v, z (M, H W, d); `stripes`, the (rows, columns) of either half's.

    Not exact: what LePE adds weighs the values of 3 x 3 cells, other weights for every channel. The effective matrix is
    the attention itself.
    """

    kind = "baselines"
    exact = False

    def __init__(self, q, k, v, z, stripes, query_shape):
        self.q, self.k, self.v, self.z = q, k, v, z
        self.stripes, self.query_shape, self.heads = stripes, query_shape, q.shape[0]

    def may_read(self, head: int = 0) -> Bool[Tensor, "L L"]:
        """Whether a query and a key lie in the same stripe."""
        self.check_head(head)
        (rows, cols), (H, W) = self.stripes[2 * head // self.heads], self.query_shape
        number = (torch.arange(H)[:, None] // rows + torch.arange(W)[None, :] // cols).flatten().to(self.q.device)
        return number[:, None] == number[None, :]

    def weights(self, head: int = 0) -> Float[Tensor, "L L"]:
        hidden = torch.zeros_like(self.may_read(head), dtype=self.q.dtype).masked_fill(~self.may_read(head), -torch.inf)
        return core.attention_weights(self.q[head], self.k[head], hidden, self.q.shape[-1] ** -0.5)

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The cells of the query's stripe, whatever their weight."""
        query = self.query(row, col)
        read, weight = self.may_read(head)[query], self.weights(head)[query]
        return tracing.Keys(self.cells().to(weight)[read], weight[read])
