"""How the operator of grouped attention looks, whatever the backend (DGT-2): also that of routed attention."""

import torch
from torch import Tensor

from dynattn.kernels import frame


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
    in_memory = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if in_memory and frame.unavailable("numba", selected.device) is None:
        from dynattn.kernels.grouped_numba import distinct_rows

        return bool(distinct_rows(selected.flatten(0, -2).contiguous().numpy(), below))
    return (selected.sort(dim=-1).values.diff(dim=-1) != 0).all()


ASSIGN = frame.function("assign", assign, file="selection_numba")
SELECT = frame.function("select", select, file="selection_numba")
ASSIGN_TRITON = frame.function("assign_triton", assign, file="selection_triton")
SELECT_TRITON = frame.function("select_triton", select, file="selection_triton")
OPERATORS = frame.operators("grouped_attention", forward, backward, flops, file="grouped")
