"""Numbers for the tests of operations, and the budget of their errors at low precision."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

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


NOBODY = """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Nobody:
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)
        get_current_device = lambda self: 0
        get_current_stream = lambda self, device: 0

    def compiled(self, *arguments, grid, warmup, **options):
        kernel = kernels[self] = run(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"] and kernel.metadata.shared <= 227 * 1024, (self.__name__, kernel.metadata.shared)

    driver.set_active(Nobody())
    run, JITFunction.run = JITFunction.run, compiled
    kernels = {}
"""


def compile_for_a_gpu(program: str) -> None:
    """Run a program whose calls of Triton kernels are compiled for compute capability 9.0, and nothing is launched.

    The program finds them in `kernels`, by their functions. It runs in a process of its own, which does not interpret.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(NOBODY) + textwrap.dedent(program)]
    subprocess.run(run, cwd=Path(__file__).parents[1], check=True, timeout=600, env=environment)
