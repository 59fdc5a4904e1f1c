"""Numbers for the tests of operations, and the budget of their errors at low precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from dynattn import verify

DOUBLE = torch.float64


def normal(*shape: int) -> Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(shape, dtype=DOUBLE)


def somewhere(*shape: int) -> Tensor:
    """Positions (*shape, 2) on the map and up to 0.4 beyond."""
    return torch.rand(*shape, 2, dtype=DOUBLE) * 2.8 - 1.4


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same numbers as a transposed and as a strided view."""
    transposed = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    strided = tensor.repeat_interleave(2, dim=-1)[..., ::2]
    return [transposed, strided]


def errors_and_budget(
    function: Callable, loops: Callable, arguments: list, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Errors of `function` in `dtype`, and of the loops in the same `dtype`, which are what rounding must cost.

    Of the output and of every gradient: the largest error against the loops in float64 on the same rounded numbers,
    relative to the largest entry. The budget is at least half a unit in the last place.
    """
    rounded = [a.to(dtype) if isinstance(a, Tensor) else a for a in arguments]
    exact = [a.to(DOUBLE) if isinstance(a, Tensor) else a for a in rounded]
    named = lambda values: {str(i): value for i, value in enumerate(values)}  # noqa: E731
    want = verify.answer(loops, named(exact), {})

    def errors(form: Callable) -> Tensor:
        got = verify.answer(form, named(rounded), {})
        scale = {key: float(value.abs().max()) or 1.0 for key, value in want.items()}
        return torch.tensor([float((got[key].double() - want[key]).abs().max()) / scale[key] for key in want])

    return errors(function), errors(loops).clamp(min=torch.finfo(dtype).eps / 2)
