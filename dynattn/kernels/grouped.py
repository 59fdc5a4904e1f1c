"""How the operator of grouped attention looks, whatever the backend (DGT-2): also that of routed attention."""

import torch
from torch import Tensor

from dynattn.kernels import operators
from dynattn.kernels.choice import smaller
from dynattn.kernels.derivatives import attention, transforming


def forward(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor, lengths: Tensor, scale: float
) -> list[Tensor]:
    """out (B, h, L, d), and for the backward (B, h, L, 2): the largest logit of each softmax, and its sum.

    groups (B, h, L); selected (B, h, G, n), of which a group reads the first `lengths` (B, h, G).
    """
    kept = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [q.new_empty(q.shape), q.new_empty(*q.shape[:-1], 2, dtype=kept)]


def backward(
    grad: Tensor,
    out: Tensor,
    kept: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    selected: Tensor,
    lengths: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k and v."""
    return [x.new_empty(x.shape) for x in (q, k, v)]


def flops(q: tuple, k: tuple, v: tuple, groups: tuple, selected: tuple, *_, **__) -> int:
    """Two products of every query with the keys of its group."""
    (B, h, L, d), n = q, selected[3]
    return 4 * B * h * L * n * d


def assign(q: Tensor, centroids: Tensor) -> Tensor:
    """Groups (B, h, L) of queries (B, h, L, d) by centroids (h, G, d)."""
    return q.new_empty(q.shape[:3], dtype=torch.int64)


def select(k: Tensor, centroids: Tensor, n: int) -> Tensor:
    """Keys (B, h, G, n) of each group, of keys (B, h, S, d) by centroids (h, G, d)."""
    return k.new_empty(*k.shape[:2], centroids.shape[1], n, dtype=torch.int64)


def pays(backend: str) -> bool:
    """The cost gate: always. Of the forms here, loops, tiles and kernels, the kernel was the fastest at every size.

    Measured on a CPU. A dense product under a mask is faster only where a group reads three quarters of a small map or
    more (196 keys, with the backward: .83 to 1 of the kernel's time at 3/4, 1.1 to 1.4 at 1/2), and lets a NaN among
    the keys of one group reach the queries of all.
    """
    return True


def distinct(selected: Tensor, below: int) -> Tensor | bool:
    """Whether no group has selected a key twice, of values in [0, below)."""
    in_memory = not torch.compiler.is_compiling() and not transforming()
    if in_memory and operators.unavailable("numba", selected.device) is None:
        from dynattn.kernels.grouped_numba import distinct_rows

        return bool(distinct_rows(selected.flatten(0, -2).contiguous().numpy(), below))
    return (selected.sort(dim=-1).values.diff(dim=-1) != 0).all()


TILE = 32  # queries of one group that are multiplied together


def in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    selected: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """The operation by plain operations of torch: queries sorted by group, each group cut into tiles of 32.

    A tile meets its group's keys in one small dense attention. `lengths` None: a group reads all that it selected.
    No size depends on the numbers in `groups`, so that the graph can be compiled, exported and mapped: there are as
    many tiles as there could be, and those behind the last query are not read again.
    """
    (B, h, L, d), S, (G, n) = q.shape, k.shape[2], selected.shape[2:]
    groups, selected = groups.flatten(0, 1), selected.flatten(0, 1)  # a row for each head of each image
    head = torch.arange(B * h, device=q.device)[:, None]

    # (heads, L): which query is the i-th of the sorted ones; those of one group in their order
    order = (groups * L + torch.arange(L, device=q.device)).argsort(dim=1)
    group = groups.gather(1, order)  # its group
    size = torch.zeros_like(selected[..., 0]).scatter_add(1, groups, torch.ones_like(groups))  # (heads, G)
    tiles = -(-size // TILE)  # of every group; the last may be a part of one
    last_tile = tiles.cumsum(dim=1)
    first_query, first_tile = size.cumsum(dim=1) - size, last_tile - tiles
    rank = torch.arange(L, device=q.device) - first_query.gather(1, group)  # of a query in its group
    place = first_tile.gather(1, group) * TILE + rank  # of a query among the tiles of its head

    most = smaller(L, (L + G * (TILE - 1)) // TILE)  # tiles: each has a query, and all but one a group are full
    number = torch.arange(most, device=q.device).minimum(last_tile[:, -1:] - 1)  # none of a group without queries
    of_tile = (number[..., None] >= last_tile[:, None]).sum(dim=-1)  # (heads, most): the group of a tile

    # From here on rows of all heads are counted through: row i of a head is row head * length + i.
    order, place, of_tile = (order + head * L).flatten(), (place + head * most * TILE).flatten(), of_tile + head * G
    keys = (selected + head[..., None] * S).flatten(0, 1)[of_tile.flatten()]  # (tiles, n)
    tiled = (
        q.new_zeros(B * h * most * TILE, d).index_copy(0, place, q.reshape(-1, d)[order]).unflatten(0, (-1, 1, TILE))
    )
    k, v, read = k.reshape(-1, d)[keys], v.reshape(-1, d)[keys], None  # (tiles, n, d)
    if lengths is not None:
        read = torch.arange(n, device=q.device) < lengths.flatten()[of_tile.flatten()][:, None]  # (tiles, n)
        # What is not read may be NaN, whose product with a weight of 0 would be NaN.
        k, v, read = k.where(read[..., None], 0), v.where(read[..., None], 0), read[:, None, None]
    z = attention(tiled, k[:, None], v[:, None], read, scale, dropout).reshape(-1, d)
    return torch.zeros_like(z[: B * h * L]).index_copy(0, order, z[place]).reshape(B, h, L, d)


HEADS = 1, 0  # where a batch of vmap becomes heads, which have centroids of their own
ASSIGN = operators.function("assign", assign, file="selection_numba", fold=HEADS)
SELECT = operators.function("select", select, file="selection_numba", fold=(*HEADS, None))
ASSIGN_TRITON = operators.function("assign_triton", assign, file="selection_triton", fold=HEADS)
SELECT_TRITON = operators.function("select_triton", select, file="selection_triton", fold=(*HEADS, None))
OPERATORS = operators.operators(
    "grouped_attention", forward, backward, flops, file="grouped", fold=(0, 0, 0, 0, 0, 0, None)
)
operators.has_plain_form("grouped_attention", in_tiles)
