"""How the operators of grouped attention look, whatever the backend (DGT-1, DGT-2); routed attention has them too."""

import torch
from torch import Tensor

from dynattn.kernels import operators
from dynattn.kernels.grouped_torch import in_tiles


def look(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor, lengths: Tensor, scale: float
) -> list[Tensor]:
    """out (B, h, L, d), and for the backward (B, h, L, 2): the row maximum and the row sum of each softmax.

    groups (B, h, L); selected (B, h, G, n), of which a group reads the first `lengths` (B, h, G).
    """
    number = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [look_of_out(q, q.dtype), q.new_empty(*q.shape[:-1], 2, dtype=number)]


def look_of_out(q: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty out (B, h, L, d). Heads of a query lie side by side in memory, so that layers merge them for free."""
    B, h, L, d = q.shape
    return q.new_empty(B, L, h, d, dtype=dtype).transpose(1, 2)


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


def pays(backend: str, *_) -> bool:
    """The cost gate: always. Of the forms here, loops, tiles and kernels, the kernel was the fastest at every size.

    Measured on a CPU. A dense product under a mask is faster only where a group reads three quarters of a small map or
    more (196 keys, with the backward: .83 to 1 of the kernel's time at 3/4, 1.1 to 1.4 at 1/2), and lets a NaN among
    the keys of one group reach the queries of all.
    """
    return True


HEADS = 1, 0  # where a batch of vmap becomes heads, which have centroids of their own
ASSIGN = operators.function("assign", assign, file="selection_numba", fold=HEADS)
SELECT = operators.function("select", select, file="selection_numba", fold=(*HEADS, None))
ASSIGN_TRITON = operators.function("assign_triton", assign, file="selection_triton", fold=HEADS)
SELECT_TRITON = operators.function("select_triton", select, file="selection_triton", fold=(*HEADS, None))
OPERATORS = operators.operators(
    "grouped_attention", look, flops, file="grouped", fold=(0, 0, 0, 0, 0, 0, None), outputs=["out", "statistics"]
)
operators.has_plain_form("grouped_attention", in_tiles)
