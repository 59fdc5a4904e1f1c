"""Dynamic group attention (DGT, section 3.1): queries that are alike share the keys that suit them.

Queries are put into G groups by the nearest of G unit centroids e; each group selects the k keys of the whole map that
its centroid likes best, and its queries attend to these, wherever they lie.

    id_j = Top-k(e_j, {x_K^i}),  x_K_j = {x_K^i | i in id_j},  x_V_j = {x_V^i | i in id_j}                    DGT-1
    Y_j = SA(x_Q_j, x_K_j, x_V_j), scattered back to where its queries came from                             DGT-2
    e'_j = 1 / N_j sum_i Norm(x_Q_j^i)                                                                       DGT-3
    e_j <- Norm((1 - tau) e_j + tau e'_j)                                                                    DGT-4

In a group: P = x_Q x_K^T (DGT-11), P^ = softmax(P / sqrt(d)) (DGT-12), Y = P^ x_V (DGT-13), and backwards

    dx_Q = dP x_K  (DGT-14)    dx_K^T = x_Q^T dP  (DGT-15)    dP^ = dY x_V^T  (DGT-16)    dx_V = P^^T dY  (DGT-17)

where the printed equations 4, 12, 13 and 17 differ, which `as_printed` computes, and 16: ledger, papers/dgt.toml.
Cost of L queries (DGT-5, DGT-6, DGT-7): 2 L^2 C for all keys; here 2 k L C + 2 L G C + k G log L.
"""

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.kernels import grouped as kernel
from dynattn.kernels import operators

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def assign_loops(q: Float[Tensor, "B h L d"], centroids: Float[Tensor, "h G d"]) -> Int[Tensor, "B h L"]:
    """The group of every query: argmax_j e_j . q_i; of equals the first, and NaN counts as -inf."""
    (B, h, L, d), G = q.shape, centroids.shape[1]
    groups = []
    for b in range(B):
        for m in range(h):
            for i in range(L):
                likes = [float(sum(centroids[m, j, c] * q[b, m, i, c] for c in range(d))) for j in range(G)]
                likes = [-math.inf if math.isnan(x) else x for x in likes]
                groups.append(likes.index(max(likes)))
    return torch.tensor(groups).reshape(B, h, L)


def select_loops(k: Float[Tensor, "B h S d"], centroids: Float[Tensor, "h G d"], n: int) -> Int[Tensor, "B h G n"]:
    """DGT-1: the n keys that each centroid likes best, in the order of the map; of equals the first, NaN as -inf."""
    (B, h, S, d), G = k.shape, centroids.shape[1]
    selected = []
    for b in range(B):
        for m in range(h):
            for j in range(G):
                likes = [float(sum(centroids[m, j, c] * k[b, m, i, c] for c in range(d))) for i in range(S)]
                likes = [-math.inf if math.isnan(x) else x for x in likes]
                best = sorted(range(S), key=lambda i: -likes[i])[:n]  # equals stay in order
                selected += sorted(best)
    return torch.tensor(selected).reshape(B, h, G, n)


def grouped_attention_loops(q, k, v, groups, selected, scale):
    """DGT-2, that is DGT-11 to DGT-13, one query, one key and one channel at a time."""
    B, h, L, d = q.shape
    Y = []
    for b in range(B):
        for m in range(h):
            for i in range(L):
                keys = selected[b, m, groups[b, m, i]].tolist()
                P = [sum(q[b, m, i, c] * k[b, m, a, c] for c in range(d)) for a in keys]  # DGT-11
                weights = core.softmax_loops([p * scale for p in P])  # DGT-12
                Y += [sum(w * v[b, m, a, c] for w, a in zip(weights, keys, strict=True)) for c in range(d)]  # DGT-13
    return torch.stack(Y).reshape(B, h, L, d)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


def likes_torch(x: Float[Tensor, "B h S d"], centroids: Float[Tensor, "h G d"]) -> Float[Tensor, "B h G S"]:
    """e_j . x_i, equal for equal x: a matrix product may sum them in another order at another place."""
    likes = torch.stack([(x * e[:, None]).contiguous().sum(dim=-1) for e in centroids.unbind(1)], dim=2)
    return likes.where(~likes.isnan(), -torch.inf)


def assign_torch(q: Float[Tensor, "B h L d"], centroids: Float[Tensor, "h G d"]) -> Int[Tensor, "B h L"]:
    """The group of every query: argmax_j e_j . q_i."""
    return likes_torch(q, centroids).argmax(dim=2)


def select_torch(k: Float[Tensor, "B h S d"], centroids: Float[Tensor, "h G d"], n: int) -> Int[Tensor, "B h G n"]:
    """DGT-1 by the n-th largest of the likes: all that is above it, and of its equals the first."""
    likes, S = likes_torch(k, centroids), k.shape[2]
    least = likes.topk(n).values[..., -1:]
    above, equal = likes > least, likes == least
    chosen = above | (equal & (equal.cumsum(dim=-1) <= n - above.sum(dim=-1, keepdim=True)))
    return torch.arange(S, device=k.device).where(chosen, S).topk(n, largest=False).values


def grouped_attention_torch(q, k, v, groups, selected, scale, dropout=0.0):
    """DGT-2 in tiles: queries sorted by group, each group cut into tiles of 32, each tile with its group's keys."""
    return kernel.in_tiles(q, k, v, groups, selected, None, scale, dropout)


def membership(groups: Int[Tensor, "B h L"], selected: Int[Tensor, "B h G n"], S: int) -> Bool[Tensor, "B h L S"]:
    """Which keys every query may read: the mask of the dense attention that computes the same."""
    mask = torch.zeros(*selected.shape[:3], S, dtype=torch.bool, device=selected.device).scatter(3, selected, True)
    return mask.gather(2, groups[..., None].expand(-1, -1, -1, S))


def as_printed_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h S d"],
    v: Float[Tensor, "B h S c"],
    groups: Int[Tensor, "B h L"],
    selected: Int[Tensor, "B h G n"],
    scale: float,
    as_printed: Collection[int],
) -> Float[Tensor, "B h L c"]:
    """DGT-11 to DGT-17 with some of the equations 12, 13 and 17 as they are printed, over all keys with a mask.

    12: the scale behind the softmax. 13: P, not P^, weighs the values. 17: P, not P^, carries the slopes to the values.
    """
    read = membership(groups, selected, k.shape[2])
    P = q @ k.mT  # DGT-11
    weights = as_printed_weights(P.masked_fill(~read, -torch.inf), scale, as_printed)
    if 17 not in as_printed:
        return weights @ v  # DGT-13
    wrong = P.detach().masked_fill(~read, 0) @ (v - v.detach())  # nothing, but for its slope by v
    return weights @ v.detach() + wrong  # DGT-17


def as_printed_weights(P: Float[Tensor, "... S"], scale: float, as_printed: Collection[int]) -> Float[Tensor, "... S"]:
    """What weighs the values, from logits that are -inf where nothing is read."""
    weights = P.softmax(-1) * scale if 12 in as_printed else (P * scale).softmax(-1)  # DGT-12
    return P.masked_fill(P.isneginf(), 0) if 13 in as_printed else weights


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


def _kernel(backend: str) -> Callable:
    """The operator of a backend as a form."""

    def form(q, k, v, groups, selected, scale):
        lengths = torch.full(selected.shape[:3], selected.shape[3], dtype=torch.int64, device=q.device)
        return operators.apply(kernel.OPERATORS[backend], q, k, v, groups, selected, lengths, scale)[0]

    return form


KERNELS = {backend: _kernel(backend) for backend in kernel.OPERATORS}
# Groups and keys have no gradient, hence these are no operations of `ops`; but which form runs is chosen in one way.
ASSIGN = core.Forms(
    "assign", kernel.pays, loops=assign_loops, torch=assign_torch, numba=kernel.ASSIGN, triton=kernel.ASSIGN_TRITON
)
SELECT = core.Forms(
    "select", kernel.pays, loops=select_loops, torch=select_torch, numba=kernel.SELECT, triton=kernel.SELECT_TRITON
)


@core.operation(loops=grouped_attention_loops, torch=grouped_attention_torch, **KERNELS, pays=kernel.pays)
def grouped_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h S d"],
    v: Float[Tensor, "B h S d"],
    groups: Int[Tensor, "B h L"],
    selected: Int[Tensor, "B h G n"],
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Every query reads the keys that its group has selected.

    Shapes: q (B, h, L, d); k, v (B, h, S, d); groups (B, h, L), int64 in [0, G); selected (B, h, G, n), int64 in
    [0, S), distinct within a group. `scale` None is d^-0.5. Returns (B, h, L, d), differentiable in q, k and v.
    Raises TypeError, ValueError on wrong arguments. Source: DGT section 3.1, equation 2; appendix C.
    """
    sizes = core.bind(q=(q, "B h L d"), k=(k, "B h S d"), v=(v, "B h S d"))
    B, h, L, S = (sizes[name] for name in "BhLS")
    core.check_kind("selected", selected, torch.int64, q)
    if selected.ndim != 4 or 0 in selected.shape[2:]:
        raise ValueError(f"selected: expected shape (B h G n), got {tuple(selected.shape)}")
    G, n = selected.shape[2:]
    core.check_indices("groups", groups, q, (B, h, L), G)
    core.check_indices("selected", selected, q, (B, h, G, n), S)
    core.check_distinct("selected", selected, S, "keys in every group")
    scale = core.scale_or_default(scale, sizes["d"])
    return grouped_attention.forms.run(impl, q, k, v, groups, selected, scale)  # DGT-2


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


class DynamicGroupAttention(nn.Module):
    """Dynamic group multi-head attention: (B, H, W, C) to the same, for any H and W.

    dim, heads: C and H.  groups: G.  keys: k, may be changed at any time; min(k, L) are read.  cosine: normalised
    queries and keys with a learned temperature for each head (DGT-S and B).  position_encoding: a conditional one (CPE,
    a depthwise 3 x 3) in front, for the places of other blocks (Table 5).  as_printed: numbers of the equations 4, 12,
    13 and 17 that shall be taken as the paper prints them; see the ledger, papers/dgt.toml.  attn_drop: the share of
    the attention weights that training drops, always in the torch form.

    Centroids (heads, G, d) are a buffer of unit rows, random at first. In training each forward adds its queries to
    their groups' sums; `update_centroids`, once an optimiser step, moves them (DGT-3, DGT-4) and starts the sums anew.
    Groups without a query, or with one that is NaN, keep theirs. Groups and selection have no gradient and are computed
    in float32 or better. Inside transforms of torch.func nothing is added to the sums.
    """

    implementation, forms = "auto", tuple(grouped_attention.forms)  # see `dynattn.use_implementation`

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int = 48,
        keys: int = 98,
        *,
        cosine: bool = False,
        position_encoding: bool = False,
        as_printed: int | Collection[int] = (),
        attn_drop: float = 0.0,
    ):
        super().__init__()
        d = dim // core.divisor("heads", heads, dim)
        self.dim, self.heads, self.attn_drop = dim, heads, core.rate("attn_drop", attn_drop)
        self.groups, self.keys = core.positive("groups", groups), core.positive("keys", keys)
        self.as_printed = frozenset([as_printed] if isinstance(as_printed, int) else as_printed)
        if not self.as_printed <= {4, 12, 13, 17}:
            raise ValueError(f"as_printed: expected some of 4, 12, 13, 17, got {as_printed!r}")
        self.cpe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if position_encoding else None
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if cosine else None
        self.register_buffer("centroids", F.normalize(torch.randn(heads, groups, d), dim=-1))
        # Of the queries since the last update. No buffers: those DistributedDataParallel would replace by rank 0's.
        self.sums, self.counts, self.waiting = None, None, 0

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape = tuple(x.shape[1:3])
        if self.cpe is not None:
            x = x + rearrange(self.cpe(rearrange(x, "B H W C -> B C H W")), "B C H W -> B H W C")
        q, k, v = rearrange(self.qkv(x), "B H W (three h d) -> three B h (H W) d", three=3, h=self.heads)
        scale = q.shape[-1] ** -0.5
        if self.temperature is not None:  # at most 100, as in Swin V2
            q = F.normalize(q, dim=-1) * self.temperature.clamp(max=math.log(100)).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        groups, selected = self.group(q, k)
        q, k = q.to(v.dtype), k.to(v.dtype)  # cosines are float32 under autocast
        if self.as_printed - {4}:
            z = as_printed_attention(q, k, v, groups, selected, scale, self.as_printed)
        elif self.training and self.attn_drop:
            z = grouped_attention_torch(q, k, v, groups, selected, scale, self.attn_drop)
        else:
            z = grouped_attention.forms.run(self.implementation, q, k, v, groups, selected, scale)  # DGT-2
        if tracing.recording():
            tracing.keep(self, DynamicGroupRecord(q, k, v, z, groups, selected, scale, shape, self.as_printed))
        return self.proj(core.merge_heads(z, shape))

    @torch.no_grad()
    def group(
        self, q: Float[Tensor, "B h L d"], k: Float[Tensor, "B h L d"]
    ) -> tuple[Int[Tensor, "B h L"], Int[Tensor, "B h G n"]]:
        """Groups of the queries and the keys that each selects (DGT-1)."""
        precise = torch.promote_types(q.dtype, torch.float32)
        with core.without_autocast(q.device):
            q, k, e = q.to(precise), k.to(precise), F.normalize(self.centroids.to(precise), dim=-1)
            groups = ASSIGN.run(self.implementation, q, e)
            n = core.smaller(core.positive("keys", self.keys), k.shape[2])  # it may be changed at any time
            selected = SELECT.run(self.implementation, k, e, n)  # DGT-1
            if self.training and core.counts():
                self.collect(q, groups)
        return groups, selected

    def start_sums(self) -> None:
        """Zero sums, in float32 or better, unless there are some."""
        if self.sums is None:
            self.sums = torch.zeros_like(self.centroids, dtype=torch.promote_types(self.centroids.dtype, torch.float32))
            self.counts = self.sums.new_zeros(self.sums.shape[:2])

    def collect(self, q: Float[Tensor, "B h L d"], groups: Int[Tensor, "B h L"]) -> None:
        """Add normalised queries to the sums of their groups, and their number."""
        self.start_sums()
        index = (groups + torch.arange(self.heads, device=q.device)[:, None] * self.groups).flatten()
        units = F.normalize(q, dim=-1).reshape(-1, q.shape[-1])  # DGT-3: Norm(x)
        self.sums.view(-1, q.shape[-1]).index_add_(0, index, units.to(self.sums))
        self.counts.view(-1).index_add_(0, index, torch.ones_like(index, dtype=self.counts.dtype))
        if not torch.compiler.is_compiling():  # a graph that reads the number would be made again for each
            advice = "call model.update_centroids(lr) after each step of the optimiser: help(dynattn.models.dgt.DGT)"
            message = f"dynamic groups: 50 forward passes in training, and the centroids were not moved; {advice}"
            self.waiting = core.remind(self.waiting, 50, message)

    @torch.no_grad()
    def update_centroids(self, lr: float = 1e-3) -> None:
        """Move the centroids towards the mean of the queries collected since the last call (DGT-3, DGT-4).

        lr: the learning rate of this step; tau is a tenth of it. With torch.distributed running, queries of all ranks
        count. Nothing happens where nothing was collected, as in eval mode.
        """
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr: expected a finite number of at least 0, got {lr}")
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.sums is None and not several:
            return
        self.start_sums()  # a rank without a batch still takes part
        for total in (self.sums, self.counts) if several else ():
            torch.distributed.all_reduce(total)
        tau = 0.1 * lr
        mean = self.sums / self.counts.clamp(min=1)[..., None]  # DGT-3
        old, new = (tau, 1 - tau) if 4 in self.as_printed else (1 - tau, tau)
        moved = F.normalize(old * self.centroids + new * mean, dim=-1)  # DGT-4
        sound = (self.counts > 0) & mean.isfinite().all(dim=-1)  # one batch with a NaN must not stay for ever
        self.centroids.copy_(torch.where(sound[..., None], moved, self.centroids))
        self.sums, self.counts, self.waiting = None, None, 0

    def multiply_adds(self, shape: tuple[int, int, int, int]) -> int:
        """Of an input (B, H, W, C): DGT-6 but for its comparisons, and the linear maps and convolution around it."""
        B, L, C, k = shape[0], shape[1] * shape[2], shape[3], min(self.keys, shape[1] * shape[2])
        parts = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear | nn.Conv2d))
        return B * L * (2 * k * C + 2 * self.groups * C + parts)  # DGT-6

    def extra_repr(self) -> str:
        return f"heads={self.heads}, groups={self.groups}, keys={self.keys}"


def multiply_adds(L: int, C: int, groups: int, keys: int) -> tuple[float, float, float]:
    """Omega of dense attention (DGT-5), of dynamic groups (DGT-6), and their ratio (DGT-7)."""
    dense, ours = 2 * L**2 * C, 2 * keys * L * C + 2 * L * groups * C + keys * groups * math.log2(L)  # DGT-5, DGT-6
    return dense, ours, ours / dense  # DGT-7


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class DynamicGroupRecord(tracing.Record):
    """One dynamic group layer.

    q, k, v, z (M, L, d); groups (M, L), the group of every query; selected (M, G, n), the keys of every group, cells of
    the map in ascending order. Exact.
    """

    kind = "dynamic_group"

    def __init__(self, q, k, v, z, groups, selected, scale, query_shape, as_printed):
        self.query_shape, self.heads, self.scale, self.as_printed = query_shape, q.shape[1], scale, as_printed
        self.q, self.k, self.v, self.z = q[0], k[0], v[0], z[0]
        self.groups, self.selected = groups[0], selected[0]

    def weights(self, head: int = 0) -> Float[Tensor, "L n"]:
        """Attention of every query to the keys of its group, in the order of `selected`."""
        self.check_head(head)
        A = self.q.new_empty(self.q.shape[1], self.selected.shape[2])
        for j in self.groups[head].unique():
            inside = self.groups[head] == j
            A[inside] = self.attention(self.q[head, inside], head, self.selected[head, j])
        return A

    def attention(self, q: Float[Tensor, "i d"], head: int, cells: Int[Tensor, " n"]) -> Float[Tensor, "i n"]:
        """Of some queries to the keys of some cells."""
        return as_printed_weights(q @ self.k[head, cells].mT, self.scale, self.as_printed)  # DGT-11

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        A = self.weights(head)
        return A.new_zeros(len(A), self.k.shape[1]).scatter(1, self.selected[head, self.groups[head]], A)

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The keys of the group that the query at image pixel (row, col) is in, and its attention to each."""
        self.check_head(head)
        query = self.query(row, col)
        cells = self.selected[head, self.groups[head, query]]
        return tracing.Keys(self.cells().to(self.q)[cells], self.attention(self.q[head, query, None], head, cells)[0])
