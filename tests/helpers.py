"""Numbers for the tests of operations, and the budget of their errors at low precision."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
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


DRAWS = 64  # of which the median is taken: one draw may be lucky or unlucky


def in_dtype(values: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """The same values, floating tensors rounded to a dtype."""
    floating = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
    return {name: value.to(dtype) if floating(value) else value for name, value in values.items()}


def in_float32(form: Callable) -> Callable:
    """A form that computes in float32 and rounds once, at its end: the least that a lower precision must cost."""

    def run(*arguments, **options) -> Tensor:
        values = in_dtype(dict(enumerate(arguments)), torch.float32)
        return form(*values.values(), **in_dtype(options, torch.float32)).to(arguments[0].dtype)

    return run


def median_errors(
    forms: Mapping[str, Callable], exact: Callable, draw: Callable[[int], verify.Case], dtype: torch.dtype
) -> dict[str, Tensor]:
    """How far each form is off in `dtype`, of the output and of every gradient: the median over `DRAWS` calls.

    Each call is judged against `exact` in float64 on the same rounded numbers: the largest error, relative to the
    largest entry. draw(number) is a call.
    """
    errors = {name: [] for name in forms}
    for number in range(DRAWS):
        call = draw(number)
        arguments, options = in_dtype(call.arguments, dtype), in_dtype(call.options, dtype)
        want = verify.answer(exact, in_dtype(arguments, DOUBLE), in_dtype(options, DOUBLE))
        for name, form in forms.items():
            got = verify.answer(form, arguments, options)
            off = {key: float((got[key].double() - want[key]).abs().max()) for key in want}
            errors[name].append([off[key] / (float(want[key].abs().max()) or 1.0) for key in want])
    return {name: torch.tensor(found).median(dim=0).values for name, found in errors.items()}


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
