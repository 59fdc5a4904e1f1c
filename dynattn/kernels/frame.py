"""From kernels to operators of torch: what every fast path has in common.

An operation with kernels has a file that says how its operator looks (`deformable.py`: shapes of what comes out, FLOPs)
and a file for each backend (`deformable_numba.py`, `deformable_triton.py`) with

    forward(*inputs) -> (out, *kept)                      kept: what the backward needs besides the inputs
    backward(grad_out, out, *kept, *inputs) -> one gradient for each input that is a floating tensor, in order

`operators` makes of them `torch.ops.dynattn.NAME_numba` and `NAME_triton`, which autograd, torch.compile, the FLOP
counter and opcheck know. A backend is imported at its first call. There are no gradients of gradients and no forward
mode: `impl="torch"` has them, within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from threading import Thread

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BACKENDS = ("numba", "triton")
LIBRARY = torch.library.Library("dynattn", "DEF")
INSTALLED = {name: find_spec(name) is not None for name in BACKENDS}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels in Python, on any device: for tests


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if not INSTALLED[backend]:
        return f"{backend} is not installed"
    if backend == "numba" and device.type != "cpu":
        return f"its kernel runs on the CPU, the tensors are on {device}"
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        return f"its kernel runs on CUDA devices, the tensors are on {device}"
    return None


def check(name: str, indices: Tensor, least: int, most: int) -> None:
    """Raise ValueError before memory is read that is not ours."""
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < least or high > most:
        raise ValueError(f"{name}: expected values from {least} to {most}, got {low if low < least else high}")


def operators(
    name: str, forward: Callable, backward: Callable, flops: Callable[..., int], file: str
) -> dict[str, Callable]:
    """The custom operators of an operation, by backend.

    forward, backward: annotated like those of the backends, they make empty tensors of the right shape (the "fake"
    registration). flops: from the shapes of the inputs, of the forward; the backward counts two and a half times that,
    as torch counts it for attention. file: kernels/FILE_BACKEND.py has the backend.
    """
    return {
        backend: _operator(f"{name}_{backend}", forward, backward, flops, f"{file}_{backend}") for backend in BACKENDS
    }


def function(name: str, fake: Callable, file: str) -> Callable:
    """The custom operator, without gradients, of a function `name` in kernels/FILE.py; it looks like `fake`."""
    return _define(name, fake, file, name)


def _define(name: str, fake: Callable, file: str, function: str) -> Callable:
    """A custom operator of torch that looks like `fake` and does what a function of kernels/FILE.py does.

    As torch.library.custom_op, without its wrapper, which imports torch's compiler, for seconds, at the first call.
    """

    def run(*arguments):
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current GPU; nothing for other tensors
            return getattr(import_module(f"dynattn.kernels.{file}"), function)(*arguments)

    LIBRARY.define(name + torch.library.infer_schema(fake, mutates_args=()))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dynattn::{name}", fake)
    return getattr(torch.ops.dynattn, name).default


def _operator(name: str, forward: Callable, backward: Callable, flops: Callable, file: str) -> Callable:
    arity = len(signature(forward).parameters)
    ahead = _define(name, forward, file, "forward")
    back = _define(f"{name}_backward", backward, file, "backward")

    def keep(ctx, inputs, output):
        values = (*output, *inputs)
        ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in values]

    def gradients(ctx, grads):
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if other is None else other[0] for other in ctx.others]
        found = iter(back(grads[0], *saved))
        learns = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
        return tuple(next(found) if learns(x) else None for x in saved[-arity:])

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: a kernel has first derivatives only; impl='torch' with sdpa_kernel(MATH) has all")

    torch.library.register_autograd(f"dynattn::{name}", gradients, setup_context=keep)
    torch.library.register_autograd(f"dynattn::{name}_backward", refuse)
    register_flop_formula(ahead.overloadpacket)(lambda *shapes, **_: flops(*shapes))
    register_flop_formula(back.overloadpacket)(lambda *shapes, **_: flops(*shapes[-arity:]) * 5 // 2)
    return ahead


# ---------------------------------------------------------------------------------------------------------------------
# The CPU
# ---------------------------------------------------------------------------------------------------------------------


def working_dtype(like: Tensor) -> torch.dtype:
    """What a CPU kernel computes in: float64 for float64, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def as_arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    """Tensors as arrays of one dtype whose last axis is contiguous; without a copy where they are so."""
    tensors = [tensor.detach().to(dtype) for tensor in tensors]
    return [(tensor if tensor.stride(-1) == 1 else tensor.contiguous()).numpy() for tensor in tensors]


COMPILED: dict[tuple, Callable] = {}  # by kernel, and dtype and dimensions of each argument


def for_any_strides(kernel: Callable, *arguments) -> Callable:
    """A numba function compiled once for arrays of these dtypes, whatever their strides."""
    key = kernel, *((a.dtype, a.ndim) if isinstance(a, np.ndarray) else type(a) for a in arguments)
    if key not in COMPILED:
        from numba import typeof, types

        kinds = tuple(k.copy(layout="A") if isinstance(k := typeof(a), types.Array) else k for a in arguments)
        kernel.compile(kinds)
        COMPILED[key] = kernel.overloads[kinds].entry_point
    return COMPILED[key]


PROCESS = os.getpid()
ON_THREAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _team() -> Callable | None:
    """Runs a function on each thread of torch's own team (OpenMP); None where torch has none that we can call."""
    try:
        run = ctypes.CDLL(None).GOMP_parallel  # of GNU's library; LLVM's and Intel's have it too
    except (AttributeError, OSError, TypeError):
        return None
    run.argtypes, run.restype = (ON_THREAD, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


def _on_threads(count: int, work: Callable[..., None]) -> None:
    """work() by so many threads at once; this one is among them.

    Torch's threads wait for their next work in a loop, for milliseconds, and threads of our own would share the cores
    with them. A forked process has threads of its own: a team does not survive a fork.
    """
    if (run := _team()) and os.getpid() == PROCESS:
        return run(ON_THREAD(work), None, count, 0)
    others = [Thread(target=work, name="dynattn") for _ in range(count - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()


def in_parallel(kernel: Callable, count: int, *arguments) -> None:
    """kernel(begin, end, *arguments) over all of range(count), in pieces, by as many threads as torch uses.

    The kernel must release the GIL and write for each item what no other item writes: then the answer does not depend
    on the number of threads.
    """
    kernel = for_any_strides(kernel, 0, count, *arguments)
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return kernel(0, count, *arguments)
    parts = min(count, 4 * threads)
    pieces = iter([(count * i // parts, count * (i + 1) // parts) for i in range(parts)])
    errors = []

    def work(_=None) -> None:
        try:
            for begin, end in pieces:  # whoever is done takes the next
                kernel(begin, end, *arguments)
        except BaseException as error:  # a team knows no exceptions
            errors.append(error)

    _on_threads(threads, work)
    if errors:
        raise errors[0]
