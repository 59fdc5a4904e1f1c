"""Bi-level routing attention (BRA, from BiFormer; DeBiFormer section 3.2): regions are chosen first, tokens read then.

The map is cut into S x S regions. The means of their queries and keys tell which regions belong together; every region
of queries is routed to the k regions of keys that it likes most, the same for all heads, and its queries read the
tokens of these, wherever they lie:

    q = x W_q        k = x W_k        v = x W_v                                                              DEBI-1
    A^r = q^r (k^r)^T            q^r, k^r: the mean query and the mean key of every region                   DEBI-9
    I^r = topk(A^r)              of equals those with the lowest numbers                                     DEBI-10
    k^g = gather(k, I),  v^g = gather(v, I)      tokens of the regions I_(r,1), ..., I_(r,n), side by side   DEBI-11
    z^(m) = softmax(q^(m) k^g(m)^T / sqrt(d)) v^g(m)      one softmax over all of them                       DEBI-2
    z = Concat(z^(1), ..., z^(M)) W_o                                                                        DEBI-3

W_o gets z and LCE(v), a depthwise 5 x 5 of the values: local context enhancement. Routing has no gradient: which
regions are read is a choice of whole numbers. DEBI-11 and DEBI-2 are DGT's grouped attention with regions for groups,
and run on its kernel. Beside the letters of `core`:

    R r   regions of queries, one region       Tq t   tokens of such a region, one query
    S s   regions of keys, one region          Tk u   tokens of such a region, one key
    n     regions that a region of queries reads

Cost on an H x W map: 4 HW C^2 + S^4 C + 2 k (HW)^2 C / S^2 + 25 HW C.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.kernels import grouped as kernel
from dynattn.kernels import operators
from dynattn.kernels.routed import readable_first

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def routed_attention_loops(q, k, v, routes, key_mask, scale):
    """DEBI-11 and DEBI-2, one query, one key and one channel at a time."""
    (B, h, R, Tq, d), Tk = q.shape, k.shape[3]
    z = []
    for b in range(B):
        for m in range(h):
            for r in range(R):
                keys = [(s, u) for s in routes[b, r].tolist() for u in range(Tk)]  # DEBI-11
                keys = [(s, u) for s, u in keys if key_mask is None or key_mask[b, s, u]]
                for t in range(Tq):
                    logits = [sum(q[b, m, r, t, c] * k[b, m, s, u, c] for c in range(d)) * scale for s, u in keys]
                    pairs = list(zip(core.softmax_loops(logits), keys, strict=True))
                    z += [sum(weight * v[b, m, s, u, c] for weight, (s, u) in pairs) for c in range(d)]  # DEBI-2
    return torch.stack(z).reshape(B, h, R, Tq, d)


def bilevel_attention_loops(q, k, v, query_shape, key_shape, regions, topk, scale):
    """DEBI-9 to DEBI-11 and DEBI-2, one region, one query, one key and one channel at a time."""
    B, h, _, d = q.shape
    mean = lambda x, cells: [sum(x[m, l, c] for l in cells) / len(cells) for m in range(h) for c in range(d)]  # noqa: E731
    ours, theirs = core.region_cells(query_shape, regions), core.region_cells(key_shape, regions)
    z = torch.zeros_like(q)
    for b in range(B):
        means = [mean(k[b].detach(), cells) for cells in theirs]
        for cells in ours:
            of_query = mean(q[b].detach(), cells)
            A = [float(sum(a * c for a, c in zip(of_query, of_key, strict=True))) for of_key in means]  # DEBI-9
            chosen = sorted(range(len(theirs)), key=lambda s: -A[s])[:topk]  # DEBI-10: equals stay in order
            keys = [l for s in chosen for l in theirs[s]]  # DEBI-11
            for m in range(h):
                for i in cells:
                    logits = [sum(q[b, m, i, c] * k[b, m, j, c] for c in range(d)) * scale for j in keys]
                    weights = core.softmax_loops(logits)
                    for c in range(d):
                        z[b, m, i, c] = sum(w * v[b, m, j, c] for w, j in zip(weights, keys, strict=True))  # DEBI-2
    return z


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


def routed_attention_torch(q, k, v, routes, key_mask, scale, dropout=0.0):
    """DEBI-11 by copies of whole regions, then one dense attention for each region of queries (DEBI-2)."""
    (B, h, R), S, n = q.shape[:3], k.shape[2], routes.shape[2]
    head = torch.arange(B * h, device=q.device).reshape(B, h, 1, 1)
    rows = (routes[:, None] + head * S).flatten()  # among the regions of all heads

    def gather(x: Tensor) -> Tensor:
        """Of (B, h, S, Tk, ...) the regions that each region of queries reads, their tokens side by side."""
        return rearrange(x.flatten(0, 2).index_select(0, rows), "(Bh R n) Tk ... -> Bh R (n Tk) ...", R=R, n=n)

    read = None
    if key_mask is not None:
        # What may not be read may be NaN, whose product with a weight of 0 would be NaN.
        k, v = (x.masked_fill(~key_mask[:, None, :, :, None], 0) for x in (k, v))
        read = gather(key_mask[:, None].expand(-1, h, -1, -1))[:, :, None]  # (B h, R, 1, n Tk)
    k, v = gather(k), gather(v)  # DEBI-11
    return core.dense_attention_torch(q.flatten(0, 1), k, v, read, scale, dropout).unflatten(0, (B, h))  # DEBI-2


@torch.no_grad()
def route(q: Float[Tensor, "B h R d"], k: Float[Tensor, "B h S d"], topk: int) -> Int[Tensor, "B R n"]:
    """The n = min(topk, S) regions of keys that every region of queries reads, the most liked first; no gradient.

    q, k: the mean query and the mean key of every region, as `core.Regions.means` has them. A matrix product may sum
    equal numbers in another order at another place. Hence it is computed in double precision and rounded: what is equal
    stays so, and the lowest numbers win.
    """
    A = torch.einsum("bhrd,bhsd->brs", q.double(), k.double()).to(q.dtype)  # DEBI-9
    A = A.where(~A.isnan(), -torch.inf)
    return core.stable_order(A, descending=True)[..., : core.smaller(topk, A.shape[2])]  # DEBI-10


def membership(
    routes: Int[Tensor, "B R n"], key_mask: Bool[Tensor, "B S Tk"] | None, S: int, Tk: int
) -> Bool[Tensor, "B R S Tk"]:
    """Which keys the queries of every region may read: the mask of the dense attention that computes the same."""
    regions = torch.zeros(*routes.shape[:2], S, dtype=torch.bool, device=routes.device).scatter(2, routes, True)
    read = regions[..., None].expand(-1, -1, -1, Tk)
    return read if key_mask is None else read & key_mask[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


def _kernel(backend: str) -> Callable:
    """The operator of grouped attention as a form: regions are groups, which select the tokens of their routes."""

    def form(q, k, v, routes, key_mask, scale):
        R, Tq = q.shape[2:4]
        groups = torch.arange(R, device=q.device).repeat_interleave(Tq)
        keys, lengths = readable_first(routes, key_mask, k.shape[3])
        out = _grouped(backend, *(x.flatten(2, 3) for x in (q, k, v)), groups, keys, lengths, scale)
        return out.unflatten(2, (R, Tq))

    return form


def _grouped(backend, q, k, v, groups, keys, lengths, scale) -> Float[Tensor, "B h L d"]:
    """The operator, for groups (L), keys (B, R, N) and lengths (B, R) that all heads share."""
    B, h = q.shape[:2]
    keys, lengths = (x[:, None].expand(-1, h, *x.shape[1:]) for x in (keys, lengths))
    return operators.apply(kernel.OPERATORS[backend], q, k, v, groups.expand(B, h, -1), keys, lengths, scale)[0]


KERNELS = {backend: _kernel(backend) for backend in kernel.OPERATORS}


def check_values(routes: Int[Tensor, "B R n"], key_mask: Bool[Tensor, "B S Tk"] | None, S: int) -> None:
    """Raise ValueError unless routes, in [0, S), are distinct and each row of them has a key to read."""
    core.check_distinct("routes", routes, S, "regions for every region of queries")
    if key_mask is None:
        return
    has_key = key_mask.any(dim=-1).gather(1, routes.flatten(1)).reshape(routes.shape).any(dim=-1)  # (B, R)
    if torch.compiler.is_compiling() or core.transforming():
        core.require(has_key.all(), "key_mask: expected a key to read for every region of queries")
    elif not has_key.all():
        b, r = (~has_key).nonzero()[0].tolist()
        where = f"region {r} of image {b}, which is routed to {routes[b, r].tolist()}"
        raise ValueError(f"key_mask: expected a key that may be read for every region of queries, got none for {where}")


@core.operation(loops=routed_attention_loops, torch=routed_attention_torch, **KERNELS, pays=kernel.pays)
def routed_attention(
    q: Float[Tensor, "B h R Tq d"],
    k: Float[Tensor, "B h S Tk d"],
    v: Float[Tensor, "B h S Tk d"],
    routes: Int[Tensor, "B R n"],
    *,
    key_mask: Bool[Tensor, "B S Tk"] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h R Tq d"]:
    """Every query reads all tokens of the regions that its own region is routed to, in one softmax.

    Shapes: q (B, h, R, Tq, d), R regions of Tq queries; k, v (B, h, S, Tk, d), S regions of Tk keys; routes (B, R, n),
    int64 in [0, S), distinct within a row, the same for all heads; key_mask (B, S, Tk), True where a key may be read,
    at least one for every row of routes, or None. `scale` None is d^-0.5.
    Returns (B, h, R, Tq, d), differentiable in q, k and v. Keys that may not be read have no influence, whatever their
    numbers, and slopes of 0. Raises TypeError, ValueError on wrong arguments.
    Source: BiFormer; DeBiFormer section 3.2, equations 11 and 2.
    """
    sizes = core.bind(q=(q, "B h R Tq d"), k=(k, "B h S Tk d"), v=(v, "B h S Tk d"))
    B, R, S, Tk = (sizes[name] for name in ("B", "R", "S", "Tk"))
    core.check_kind("routes", routes, torch.int64, q)
    if routes.ndim != 3 or tuple(routes.shape[:2]) != (B, R) or routes.shape[2] == 0:
        raise ValueError(f"routes: expected shape ({B}, {R}, n), n at least 1, got {tuple(routes.shape)}")
    core.check_indices("routes", routes, q, tuple(routes.shape), S)
    if key_mask is not None:
        core.check_kind("key_mask", key_mask, torch.bool, q)
        if tuple(key_mask.shape) != (B, S, Tk):
            raise ValueError(f"key_mask: expected shape {(B, S, Tk)}, got {tuple(key_mask.shape)}")
    check_values(routes, key_mask, S)
    scale = core.scale_or_default(scale, sizes["d"])
    return routed_attention.forms.run(impl, q, k, v, routes, key_mask, scale)


def bilevel_attention_torch(q, k, v, query_shape, key_shape, regions, topk, scale, dropout=0.0):
    """DEBI-9 to DEBI-11 and DEBI-2: maps are cut into regions, which are routed and read; then the map is joined."""
    ours, theirs = core.Regions(query_shape, regions), core.Regions(key_shape, regions)
    routes, inside = route(ours.means(q), theirs.means(k), topk), theirs.inside(k)  # DEBI-9, DEBI-10
    key_mask = None if inside is None else inside.expand(q.shape[0], -1, -1)
    q, k, v = ours.cut(q), theirs.cut(k), theirs.cut(v)
    return ours.join(routed_attention_torch(q, k, v, routes, key_mask, scale, dropout))  # DEBI-11, DEBI-2


def _kernel_on_maps(backend: str) -> Callable:
    """The operator of grouped attention on the maps as they lie, without copies: a region is a list of cells."""

    def form(q, k, v, query_shape, key_shape, regions, topk, scale):
        ours, theirs = core.Regions(query_shape, regions), core.Regions(key_shape, regions)
        routes, inside = route(ours.means(q), theirs.means(k), topk), theirs.inside(k)  # DEBI-9, DEBI-10
        cells, key_mask = theirs.cells(k.device), None if inside is None else inside.expand(q.shape[0], -1, -1)
        keys, lengths = readable_first(routes, key_mask, cells.shape[1])
        return _grouped(backend, q, k, v, ours.numbers(q.device), cells.flatten()[keys], lengths, scale)

    return form


@core.operation(
    loops=bilevel_attention_loops,
    torch=bilevel_attention_torch,
    pays=kernel.pays,
    **{backend: _kernel_on_maps(backend) for backend in kernel.OPERATORS},
)
def bilevel_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h N d"],
    v: Float[Tensor, "B h N d"],
    query_shape: tuple[int, int],
    key_shape: tuple[int, int],
    *,
    regions: int,
    topk: int,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Every query reads the tokens of the regions that the mean query of its own region likes most.

    Shapes: q (B, h, H W, d), row-major, of a map of `query_shape`; k, v (B, h, H' W', d), of one of `key_shape`, which
    may be another. regions: S, each map is cut into at most S x S of equal sides; topk: how many of the keys' regions
    are read, or all where there are fewer. `scale` None is d^-0.5; it does not matter to the choice of regions.
    Returns (B, h, H W, d), differentiable in q, k and v with the regions as they are chosen.
    Raises TypeError, ValueError on wrong arguments. Source: BiFormer; DeBiFormer equations 9 to 11 and 2.
    """
    (H, W), (H2, W2) = core.pair("query_shape", query_shape), core.pair("key_shape", key_shape)
    core.positive("regions", regions)
    core.positive("topk", topk)
    sizes = core.bind({"L": H * W, "N": H2 * W2}, q=(q, "B h L d"), k=(k, "B h N d"), v=(v, "B h N d"))
    scale = core.scale_or_default(scale, sizes["d"])
    return bilevel_attention.forms.run(impl, q, k, v, (H, W), (H2, W2), regions, topk, scale)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


def attention_scale(scale: str, dim: int, heads: int) -> float:
    """What multiplies the logits: "dim" is C^-0.5, as the published code has it, "head" d^-0.5, as the text has it."""
    core.one_of("scale", scale, ("dim", "head"))
    return (dim if scale == "dim" else dim // heads) ** -0.5


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing multi-head attention: (B, H, W, C) to the same, for any H and W.

    dim, heads: C and M.  regions: S, the map is cut into S x S.  topk: k, how many of them a region reads.
    scale: "dim" or "head", see `attention_scale`.  attn_drop: the share of the attention weights that training drops,
    always in the torch form. `regions` and `topk` may be changed at any time.
    """

    implementation, forms = "auto", tuple(bilevel_attention.forms)  # see `dynattn.use_implementation`

    def __init__(
        self, dim: int, heads: int, *, regions: int = 7, topk: int = 4, scale: str = "dim", attn_drop: float = 0.0
    ):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("heads", heads, dim)
        self.regions, self.topk = core.positive("regions", regions), core.positive("topk", topk)
        self.scale, self.attn_drop = attention_scale(scale, dim, heads), core.rate("attn_drop", attn_drop)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lce = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape, M, qkv = tuple(x.shape[1:3]), self.heads, self.qkv(x)  # DEBI-1
        q, k, v = rearrange(qkv, "B H W (three h d) -> three B h (H W) d", three=3, h=M)
        how = shape, shape, self.regions, self.topk, self.scale
        if self.training and self.attn_drop:
            z = bilevel_attention_torch(q, k, v, *how, dropout=self.attn_drop)
        else:
            z = bilevel_attention.forms.run(self.implementation, q, k, v, *how)
        context = self.lce(rearrange(qkv[..., 2 * self.dim :], "B H W C -> B C H W"))
        z = z + rearrange(context, "B (h d) H W -> B h (H W) d", h=M)
        if tracing.recording():
            tracing.keep(self, BiLevelRecord(q, k, v, z, *how))
        return self.proj(core.merge_heads(z, shape))  # DEBI-3

    def extra_repr(self) -> str:
        return f"heads={self.heads}, regions={self.regions}, topk={self.topk}"


def multiply_adds(shape: tuple[int, int], regions: int, topk: int, channels: int) -> int:
    """Of BRA on an H x W map of C channels that S divides: linear maps, routing, attention, LCE."""
    HW, S, C = shape[0] * shape[1], regions, channels
    return 4 * HW * C**2 + S**4 * C + 2 * topk * HW**2 * C // S**2 + 25 * HW * C


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class Routing:
    """Which regions of keys every region of queries is routed to, and where they lie: what two kinds of records keep.

    routes (R, n); `queries`, `sources`: the `core.Regions` of both maps.
    """

    def __init__(self, q: Tensor, k: Tensor, query_shape, key_shape, regions: int, topk: int):
        self.queries, self.sources = core.Regions(query_shape, regions), core.Regions(key_shape, regions)
        self.routes = route(self.queries.means(q), self.sources.means(k), topk)[0]

    def on_image(
        self, query_stride: Sequence[float], key_stride: Sequence[float], readers: str = "queries"
    ) -> tracing.RegionRoutes:
        """The same on the image; strides: pixels for each cell of the two maps, by rows and columns."""
        maps = ((self.queries, query_stride), (self.sources, key_stride))
        sides = [tuple(n * step for n, step in zip(one.side, stride, strict=True)) for one, stride in maps]
        routes = tuple(map(tuple, self.routes.tolist()))
        return tracing.RegionRoutes(sides[0], self.queries.grid, sides[1], self.sources.grid, routes, readers)

    def read(self) -> Bool[Tensor, "L N"]:
        """Which keys every query reads."""
        ours, theirs = (one.numbers(self.routes.device) for one in (self.queries, self.sources))
        return membership(self.routes[None], None, int(theirs.max()) + 1, 1)[0, :, :, 0][ours][:, theirs]

    def weights(self, q: Float[Tensor, "L d"], k: Float[Tensor, "N d"], scale: float) -> Float[Tensor, "L N"]:
        """The attention of one head to all keys, 0 to those of other regions."""
        return (q @ k.mT * scale).masked_fill(~self.read(), -torch.inf).softmax(dim=-1)  # DEBI-2


class BiLevelRecord(tracing.Record):
    """One layer of bi-level routing attention.

    q, k, v (M, L, d); z (M, L, d), attention and LCE together; routing.routes (R, n), the regions that each region
    reads, the most liked first. A_eff leaves LCE out: `rest` says how large that is.
    """

    kind, exact = "bilevel", False

    def __init__(self, q, k, v, z, shape, _, regions, topk, scale):
        self.query_shape, self.heads, self.scale = shape, q.shape[1], scale
        self.q, self.k, self.v, self.z = q[0], k[0], v[0], z[0]
        self.routing = Routing(q[:1], k[:1], shape, shape, regions, topk)

    def weights(self, head: int = 0) -> Float[Tensor, "L L"]:
        self.check_head(head)
        return self.routing.weights(self.q[head], self.k[head], self.scale)

    def region_routes(self) -> tracing.RegionRoutes:
        """The regions that each region of queries reads, on the image."""
        return self.routing.on_image(self.stride, self.stride)

    def region(self, row: float, col: float) -> int:
        """The number of the region that the query at image pixel (row, col) is in."""
        return int(self.routing.queries.numbers(self.q.device)[self.query(row, col)])

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The tokens of the regions that the query's region is routed to, whatever their weight."""
        self.check_head(head)
        query, routes = self.query(row, col), self.routing.routes[self.region(row, col)]
        numbers = self.routing.sources.numbers(self.q.device)
        read = torch.cat([(numbers == s).nonzero()[:, 0] for s in routes])
        weight = core.attention_weights(self.q[head, query, None], self.k[head, read], None, self.scale)[0]
        return tracing.Keys(self.cells().to(weight)[read], weight)
