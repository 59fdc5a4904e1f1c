"""A team of threads for the kernels of the CPU: arrays of tensors, and a kernel that is run by all threads at once."""

import ctypes
from collections.abc import Callable
from functools import cache
from threading import Thread

import numpy as np
import torch
from torch import Tensor

import dynattn


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


ON_THREAD = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _team_of_torch() -> Callable | None:
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
    if (run := _team_of_torch()) and not dynattn.FORKED:
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
