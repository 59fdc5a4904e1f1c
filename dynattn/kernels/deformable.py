"""How the operator of deformable attention looks, whatever the backend (DAT-9)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynattn.kernels import operators
from dynattn.kernels.choice import surely


def look(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    points: Tensor,
    table: Tensor | None,
    query_shape: Sequence[int],
    query_grid: str,
    scale: float,
) -> list[Tensor]:
    """out (B, h, L, d), and for the backward (B, h, L, 2): the row maximum and the row sum of each softmax."""
    number = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [q.new_empty(q.shape), q.new_empty(*q.shape[:-1], 2, dtype=number)]


def flops(q: tuple, k: tuple, *_, **__) -> int:
    """Two products of queries and keys; reading the bias is not counted, as in the torch form."""
    (B, h, L, d), N = q, k[2]
    return 4 * B * h * L * N * d


def pays(backend: str, pairs: int) -> bool:
    """Whether a kernel is faster than grid_sample and dense attention, by the (query, key) pairs of all heads.

    Measured on two cores: below some hundred thousand pairs the call costs more than it saves. CUDA is not measured.
    A graph for any size has the kernel: it loses little where it loses.
    """
    return backend == "triton" or not surely(pairs < 2**18)


def table_places(
    points: Tensor, table: Tensor | None, shape: tuple[int, int], centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where queries read the table, in its pixels (row, col) and float64.

    The place for query (0, 0) and every point (B, g, N, 2), the step from query to query (2,), the table's size (2,).
    A query at q and a point at p read R = (q - p) / 2, which is pixel (R + 1)(I - 1) / 2 of a table with I rows.
    """
    size = torch.tensor(table.shape[1:] if table is not None else (1, 1), dtype=torch.float64)
    side = torch.tensor(shape, dtype=torch.float64)
    step = 2 / side if centre else 2 / (side - 1).clamp(min=1)
    start = torch.where(side == 1, 0.0, (step / 2 if centre else 0 * side) - 1)
    places = (start.to(points.device) - points.detach().double() + 2) * (size.to(points.device) - 1) / 4
    return places, step * (size - 1) / 4, size


# A batch of vmap becomes heads, with groups of points and a table of their own: the table has no dimension of images.
FOLD = (1, 1, 1, 1, 0, None, None, None)
OPERATORS = operators.operators(
    "deformable_attention", look, flops, file="deformable", fold=FOLD, outputs=["out", "statistics"]
)
FORMS = operators.forms(OPERATORS)
