"""How the operator of bilinear reading looks, whatever the backend (DAT-8)."""

from torch import Tensor

from dynattn.kernels import operators


def look(x: Tensor, points: Tensor) -> list[Tensor]:
    """out (B, C, N) of a map (B, C, H, W) and points (B, N, 2)."""
    return [x.new_empty(*x.shape[:2], points.shape[1])]


def flops(x: tuple, points: tuple, *_, **__) -> int:
    """None, as torch counts none for grid_sample."""
    return 0


OPERATORS = operators.operators("sample_points", look, flops, file="sampling", fold=(0, 0), outputs=["out"])
FORMS = operators.forms(OPERATORS)
