"""How the operator of bilinear reading looks, whatever the backend (DAT-8)."""

from torch import Tensor

from dynattn.kernels import operators


def forward(x: Tensor, points: Tensor) -> list[Tensor]:
    """out (B, C, N) of a map (B, C, H, W) and points (B, N, 2)."""
    return [x.new_empty(*x.shape[:2], points.shape[1])]


def backward(grad: Tensor, out: Tensor, x: Tensor, points: Tensor) -> list[Tensor]:
    """Gradients of the map and the points."""
    return [x.new_empty(x.shape), points.new_empty(points.shape)]


def flops(x: tuple, points: tuple, *_, **__) -> int:
    """None, as torch counts none for grid_sample."""
    return 0


OPERATORS = operators.operators("sample_points", forward, backward, flops, file="sampling", fold=(0, 0))
