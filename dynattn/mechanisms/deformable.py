"""Deformable attention (DAT, section 3.2): all queries read a few points that the image itself has moved.

A regular grid of reference points p lies over the map x, one for every r x r cells. An offset network looks at the
queries around each reference and moves it; keys and values are read where the points now are, between the cells.

    q = x W_q        k~ = x~ W_k        v~ = x~ W_v                                                          DAT-6
    Delta p = theta_offset(q)           x~ = phi(x; p + Delta p)                                             DAT-7
    phi(z; (p_x, p_y)) = sum_(r_x, r_y) g(p_x, r_x) g(p_y, r_y) z[r_y, r_x, :],  g(a, b) = max(0, 1 - |a - b|)
                                                                                     DAT-8, `core.sample_points`
    z^(m) = softmax(q^(m) k~^(m)T / sqrt(d) + phi(B^; R)) v~^(m)                                             DAT-9
    z = Concat(z^(1), ..., z^(M)) W_o                                                                        DAT-3

The channels fall into G groups with points of their own (one offset network serves all); M / G heads read each.
R is half the displacement from query to point, in [-1, 1]; B^ a table of (2H - 1) x (2W - 1) read by the same phi.
Cost (DAT-10), N_s points, k the kernel of the offset network:

    Omega = 2 HW N_s C + 2 HW C^2 + 2 N_s C^2  +  (k^2 + 2) N_s C
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.kernels import deformable as kernel
from dynattn.kernels import operators

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def deformable_attention_loops(q, k, v, points, table, query_shape, query_grid, scale):
    """DAT-9 one query, one point and one channel at a time."""
    (B, h, L, d), (G, N) = q.shape, points.shape[1:3]
    queries = core.grid_points(query_shape, query_grid, points)
    z = []
    for b in range(B):
        for m in range(h):
            g = m * G // h
            for l in range(L):
                logits = []
                for n in range(N):
                    logit = sum(q[b, m, l, c] * k[b, m, n, c] for c in range(d)) * scale
                    if table is not None:
                        R = (queries[l] - points[b, g, n]) / 2  # in [-1, 1] while the point is on the map
                        row, col = core.to_pixels(R, table.shape[1:])
                        logit = logit + core.read_bilinear(table[m], row, col)  # phi(B^; R)
                    logits.append(logit)
                weights = core.softmax_loops(logits)
                z += [sum(weights[n] * v[b, m, n, c] for n in range(N)) for c in range(d)]
    return torch.stack(z).reshape(B, h, L, d)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


def relative_bias(
    points: Float[Tensor, "B g N 2"], table: Float[Tensor, "h I J"], query_shape: tuple[int, int], query_grid: str
) -> Float[Tensor, "B h L N"]:
    """phi(B^; R) of DAT-9: every head's table read at half the displacement from each query to each point."""
    B, G = points.shape[:2]
    points = points.to(torch.promote_types(points.dtype, torch.float32))  # less is no place in a table
    queries = core.grid_points(query_shape, query_grid, points)
    R = (queries[:, None] - points[:, :, None]) / 2  # (B, g, L, N, 2)
    tables = repeat(table, "(g m) I J -> (B g) m I J", B=B, g=G)
    bias = core.sample_points_torch(tables, rearrange(R, "B g L N two -> (B g) (L N) two"))
    return rearrange(bias, "(B g) m (L N) -> B (g m) L N", B=B, L=queries.shape[0])


def deformable_attention_torch(q, k, v, points, table, query_shape, query_grid, scale, dropout=0.0):
    """DAT-9 as dense attention to the sampled keys, with the bias read by grid_sample."""
    bias = None if table is None else relative_bias(points, table, query_shape, query_grid)
    return core.dense_attention_torch(q, k, v, bias, scale, dropout)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


operators.has_plain_form("deformable_attention", deformable_attention_torch)


def pays(backend: str, q: Tensor, k: Tensor, *_) -> bool:
    """Whether a kernel is the faster form, by the pairs of a query and a key."""
    (B, h, L, _), N = q.shape, k.shape[2]
    return kernel.pays(backend, B * h * L * N)


@core.operation(loops=deformable_attention_loops, torch=deformable_attention_torch, **kernel.FORMS, pays=pays)
def deformable_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h N d"],
    v: Float[Tensor, "B h N d"],
    points: Float[Tensor, "B g N 2"],
    table: Float[Tensor, "h I J"] | None,
    query_shape: tuple[int, int],
    *,
    query_grid: str = "centre",
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Attention of all queries of a map to sampled keys, with the bias that depends on where they were sampled.

    Shapes: q (B, h, H W, d), row-major; k, v (B, h, N, d); points (B, g, N, 2), normalised (row, col), where head m
    uses group m g // h; table (h, I, J), usually (2H - 1, 2W - 1), or None for no bias; query_shape (H, W).
    `query_grid`: "centre", queries at (2i + 1) / H - 1 as DAT's code has them, or "corner", 2i / (H - 1) - 1.
    Returns (B, h, H W, d), differentiable in all five tensors. Raises TypeError, ValueError on wrong arguments.
    Source: DAT section 3.2, equation 9.
    """
    core.one_of("query_grid", query_grid, ("centre", "corner"))
    H, W = core.pair("query_shape", query_shape)
    shapes = {"q": (q, "B h L d"), "k": (k, "B h N d"), "v": (v, "B h N d"), "points": (points, "B g N 2")}
    sizes = core.bind({"L": H * W}, **shapes, **({} if table is None else {"table": (table, "h I J")}))
    if sizes["h"] % sizes["g"]:
        raise ValueError(f"points: expected a number of groups that divides {sizes['h']} heads, got {sizes['g']}")
    scale = core.scale_or_default(scale, sizes["d"])
    z = deformable_attention.forms.run(impl, q, k, v, points, table, (H, W), query_grid, scale)
    return z.to(q.dtype)  # under autocast forms differ


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


class OffsetNetwork(nn.Module):
    """theta_offset of DAT-7: a depthwise k x k convolution, GELU, and 1 x 1 to two numbers without bias (figure 2b).

    `norm`: the published code has a LayerNorm after the first convolution, the text has none. `zero_init`: start with
    offsets of zero. Queries of one group (B, c, H, W) to raw offsets (B, 2, ceil(H / r), ceil(W / r)), row first.
    """

    def __init__(self, channels: int, kernel: int, stride: int, *, norm: bool = True, zero_init: bool = False):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.pointwise = nn.Linear(channels, 2, bias=False)
        if zero_init:
            nn.init.zeros_(self.pointwise.weight)

    def forward(self, q: Float[Tensor, "B c H W"]) -> Float[Tensor, "B HG WG 2"]:
        x = rearrange(self.depthwise(q), "B c HG WG -> B HG WG c")
        return self.pointwise(F.gelu(self.norm(x)))


class DeformableAttention(nn.Module):
    """Deformable multi-head attention: (B, H, W, C) to the same, for any H and W.

    dim, heads: C and M.  groups: G, divides both.  map_size: the (H, W) that sizes the bias table; at another size the
    table is resized (bicubic).  stride: r, cells between reference points.  kernel: k of the offset network.
    offset_range: s, the largest offset in units of `offset_unit`; 0 keeps the points on their references.
    offsets: False reads the map itself, without sampling (Table 6; the unused network still counts, as in the paper).
    position_bias: "relative" (DAT-9), "fixed" (a table of its own for each query and point), "dwconv" (a depthwise
    3 x 3 of the queries added to the output), or None (Table 6).

    Where text and published code part (ledger: papers/dat.toml), the defaults are the code's:
    reference: "centre" of the cells, or "corner", from -1 to +1, as the text has it.
    offset_unit: "half_cell", 1 / H_G, or "cell", one step of the reference grid, as the text implies.
    offset_norm: LayerNorm in the offset network or not.
    For small nets that should place points well: offset_zero_init, and clamp, which keeps points on the map.
    attn_drop: the share of the attention weights that training drops, always in the torch form.
    """

    implementation, forms = "auto", tuple(deformable_attention.forms)  # see `dynattn.use_implementation`

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int,
        map_size: tuple[int, int],
        *,
        stride: int = 1,
        kernel: int = 5,
        offset_range: float = 2.0,
        offsets: bool = True,
        position_bias: str | None = "relative",
        reference: str = "centre",
        offset_unit: str = "half_cell",
        offset_norm: bool = True,
        offset_zero_init: bool = False,
        clamp: bool = False,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        self.heads, self.groups = core.divisor("heads", heads, dim), core.divisor("groups", groups, heads)
        self.stride = core.positive("stride", stride)
        if core.positive("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {kernel}")  # an even one has no centre to pad around
        core.one_of("position_bias", position_bias, ("relative", "fixed", "dwconv", None))
        core.one_of("reference", reference, ("centre", "corner"))
        core.one_of("offset_unit", offset_unit, ("half_cell", "cell"))
        if not 0 <= offset_range < math.inf:
            raise ValueError(f"offset_range: expected a finite number of at least 0, got {offset_range}")
        self.dim, self.map_size = dim, core.pair("map_size", map_size)
        self.offset_range, self.offsets, self.position_bias = offset_range, offsets, position_bias
        self.reference, self.offset_unit, self.clamp = reference, offset_unit, clamp
        self.attn_drop = core.rate("attn_drop", attn_drop)

        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.offset = OffsetNetwork(dim // groups, kernel, stride, norm=offset_norm, zero_init=offset_zero_init)
        self.offset.requires_grad_(offsets)  # DistributedDataParallel waits for the gradient of all that want one
        if position_bias == "dwconv":
            self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        elif position_bias is not None:
            (H, W), relative = self.map_size, position_bias == "relative"
            self.forms = tuple((deformable_attention if relative else core.dense_attention).forms)
            size = (2 * H - 1, 2 * W - 1) if relative else (H * W, -(-H // stride) * -(-W // stride))
            self.table = nn.Parameter(torch.empty(heads, *size))
            nn.init.trunc_normal_(self.table, std=0.01)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        q = self.q(x)  # DAT-6
        sampled, points, references = self.sample(x, q)
        # Under autocast the linear maps answer in less precision than positions have; elsewhere `to` does nothing.
        heads_of = lambda t: rearrange(t, "B N (h d) -> B h N d", h=self.heads).to(points.dtype)  # noqa: E731
        k, v = heads_of(self.k(sampled)), heads_of(self.v(sampled))  # DAT-6
        q_heads, table = heads_of(q.flatten(1, 2)), self.table_for(shape, points.dtype)
        dropout, scale = self.attn_drop if self.training else 0.0, k.shape[-1] ** -0.5
        if self.position_bias == "fixed":
            if dropout:
                z = core.dense_attention_torch(q_heads, k, v, table, scale, dropout)
            else:
                z = core.dense_attention(q_heads, k, v, bias=table, impl=self.implementation)
        elif dropout:
            z = deformable_attention_torch(q_heads, k, v, points, table, shape, self.reference, scale, dropout)
        else:
            how = dict(query_grid=self.reference, impl=self.implementation)
            z = deformable_attention(q_heads, k, v, points, table, shape, **how)  # DAT-9
        if self.position_bias == "dwconv":
            z = z + rearrange(
                self.dwconv(rearrange(q, "B H W C -> B C H W")), "B (h d) H W -> B h (H W) d", h=self.heads
            )
        if tracing.recording():
            tracing.keep(self, DeformableRecord(self, x, q_heads, k, v, z, points, references, table))
        return self.proj(core.merge_heads(z, shape))  # DAT-3

    def sample(
        self, x: Float[Tensor, "B H W C"], q: Float[Tensor, "B H W C"]
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B g N 2"], Float[Tensor, "N 2"]]:
        """DAT-7: the sampled features x~, the points p + Delta p of each group, and the references p."""
        B, H, W, _ = x.shape
        grid = (-(-H // self.stride), -(-W // self.stride))
        references = core.grid_points(grid, self.reference, x)
        if not self.offsets:
            points = references.expand(B, self.groups, -1, -1)
            pooled = F.avg_pool2d(rearrange(x, "B H W C -> B C H W"), self.stride, ceil_mode=True)
            return rearrange(pooled, "B C HG WG -> B (HG WG) C"), points, references
        raw = self.offset(rearrange(q, "B H W (g c) -> (B g) c H W", g=self.groups))  # DAT-7
        cell = [1 / n if self.offset_unit == "half_cell" else 2 / core.larger(n - 1, 1) for n in grid]
        delta = core.stretch(self.offset_range * raw.tanh(), cell)  # Delta p <- s tanh(Delta p)
        points = references + rearrange(delta, "(B g) HG WG two -> B g (HG WG) two", B=B)
        if self.clamp:
            points = points.clamp(-1, 1)
        features = rearrange(x, "B H W (g c) -> (B g) c H W", g=self.groups)
        sampled = core.sample_points(features, points.flatten(0, 1), impl=self.implementation)  # DAT-7, DAT-8
        return rearrange(sampled, "(B g) c N -> B N (g c)", B=B), points, references

    def table_for(self, shape: tuple[int, int], dtype: torch.dtype) -> Float[Tensor, "h I J"] | None:
        """The bias table for a map of `shape`: its own at `map_size`, else resized (bicubic)."""
        if self.position_bias in (None, "dwconv"):
            return None
        table = self.table.to(dtype)
        if self.position_bias == "relative":
            return core.resize_table(table, (2 * shape[0] - 1, 2 * shape[1] - 1))
        if shape == self.map_size:
            return table
        return core.resize_fixed(table, self.map_size, shape, self.stride)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, groups={self.groups}, stride={self.stride}, offset_range={self.offset_range}, "
            f"position_bias={self.position_bias!r}, reference={self.reference!r}, offset_unit={self.offset_unit!r}"
        )


def multiply_adds(shape: tuple[int, int], points: int, channels: int, kernel: int) -> tuple[int, int]:
    """Omega of DAT-10 for an H x W map, N_s points and C channels: of the attention, and of its offset network."""
    HW, N, C = shape[0] * shape[1], points, channels
    return 2 * HW * N * C + 2 * HW * C**2 + 2 * N * C**2, (kernel**2 + 2) * N * C  # DAT-10


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class DeformableRecord(tracing.Record):
    """One deformable layer.

    points (G, N, 2) and references (N, 2), normalised (row, col); q (M, L, d); k, v (M, N, d); z (M, L, d), what the
    heads put out; attention (M, L, N). A head's row of A_eff lies on the points of its own group. `exact` is False
    when groups differ in their points (W_v mixes the channels of all groups, so every head has a part of its values
    from the others' points), when a point reads the zeros outside the map (the bias of v is added to those too), or
    when "dwconv" adds a path of its own; `rest` says how large that is.
    """

    kind = "deformable"

    def __init__(self, layer: DeformableAttention, x, q, k, v, z, points, references, table):
        self.query_shape, self.heads, self.groups = tuple(x.shape[1:3]), layer.heads, layer.groups
        self.points, self.references = points[0], references
        self.q, self.k, self.v, self.z = q[0], k[0], v[0], z[0]
        self.sampled, self.stride_of_points = layer.offsets, layer.stride
        self.has_conv_path = layer.position_bias == "dwconv"
        if layer.position_bias == "relative":
            bias = relative_bias(points[:1], table, self.query_shape, layer.reference)[0]
        else:
            bias = table
        self.attention = core.attention_weights(self.q, self.k, bias, self.q.shape[-1] ** -0.5)
        self.source_values = core.split_heads(layer.v(x[:1]), layer.heads)[0]  # x W_v of every cell, bias included

    def group(self, head: int) -> int:
        """The offset group whose points a head reads."""
        self.check_head(head)
        return head * self.groups // self.heads

    def weights(self, head: int = 0) -> Float[Tensor, "L N"]:
        self.check_head(head)
        return self.attention[head]

    def reads(self, group: int = 0) -> Float[Tensor, "N S"]:
        """The bilinear weights with which the points of a group read the cells of the map (DAT-8)."""
        if self.sampled:
            return core.bilinear_weights(self.points[group], self.query_shape)
        H, W = self.query_shape
        cells = torch.eye(H * W, dtype=self.points.dtype, device=self.points.device).reshape(H * W, 1, H, W)
        return F.avg_pool2d(cells, self.stride_of_points, ceil_mode=True).flatten(1).T

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """A_eff = attention x bilinear weights."""
        return self.weights(head) @ self.reads(self.group(head))

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        self.check_head(head)
        return self.source_values[head]

    @property
    def exact(self) -> bool:
        inside = all(bool((1 - self.reads(g).sum(dim=1)).abs().max() < 1e-5) for g in range(self.groups))
        return inside and bool((self.points == self.points[:1]).all()) and not self.has_conv_path

    def points_xy(self, group: int = 0) -> Float[Tensor, "N 2"]:
        """The deformed points of a group in image pixels (x, y); without sampling, the centres of the cells pooled."""
        if not self.sampled:
            return self.reads(group) @ self.cells().to(self.points)
        return self.to_image(core.to_pixels(self.points[group], self.query_shape))

    def references_xy(self) -> Float[Tensor, "N 2"]:
        """Where the points would be without offsets, in image pixels (x, y)."""
        return self.to_image(core.to_pixels(self.references, self.query_shape))

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The sampled points and the attention that the query at image pixel (row, col) gives each."""
        return tracing.Keys(self.points_xy(self.group(head)), self.attention[head, self.query(row, col)])
