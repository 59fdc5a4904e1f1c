"""The kernel of deformable attention beside its torch form and its loops: time, and memory.

The sizes are those of DAT-T's first stage: 8 images, 3 heads of 32 channels, 3136 queries; two threads.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from dynattn.bench.timing import Benchmark, in_turn, multiply_adds, share_of_mm, threads, timed

ROOT = Path(__file__).parents[2]


def inputs_of(points: int, side: int = 56, batch: int = 8, heads: int = 3, d: int = 32) -> list[torch.Tensor]:
    """q, k, v, points and table of a layer of DAT-T's first stage; the points lie around a regular grid."""
    from dynattn import core

    torch.manual_seed(0)
    grid = round(points**0.5)
    q, k, v = (torch.randn(batch, heads, n, d) for n in (side * side, points, points))
    places = core.grid_points((grid, grid), "centre", q) + (torch.rand(batch, 1, points, 2) - 0.5) * 4 / grid
    return [q, k, v, places, 0.1 * torch.randn(heads, 2 * side - 1, 2 * side - 1)]


def call(impl: str, inputs: list[torch.Tensor], backward: bool) -> list[torch.Tensor]:
    """One call of deformable attention: what comes out, with all gradients if wanted."""
    from dynattn import ops

    side = round(inputs[0].shape[2] ** 0.5)
    with torch.set_grad_enabled(backward):
        inputs = [x.detach().requires_grad_(backward) for x in inputs]
        out = ops.deformable_attention(*inputs, (side, side), impl=impl)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))] if backward else [out]


def speed_up(points: int, backward: bool, rounds: int = 5) -> float:
    """Time of the torch form over that of the kernel, two threads."""
    inputs = inputs_of(points)
    with threads(2):
        ours, theirs = in_turn(*(timed(partial(call, impl, inputs, backward)) for impl in ("numba", "torch")), rounds)
    return theirs / ours


def share(points: int, backward: bool) -> float:
    """The kernel's rate as a share of torch.mm's, two threads."""
    run = partial(call, "numba", inputs_of(points), backward)
    with threads(2):
        return share_of_mm(timed(run), multiply_adds(run), timed)


def extra_bytes(impl: str, points: int) -> int:
    """What a forward and backward takes at its peak beyond inputs, output and gradients (Linux)."""
    call(impl, inputs_of(4, side=4, batch=1), backward=True)  # libraries, threads
    inputs = inputs_of(points)

    def resident(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    kept = call(impl, inputs, backward=True)
    return resident("VmHWM") - before - sum(x.numel() * x.element_size() for x in kept)


def memory(points: int) -> float:
    """Extra memory of the kernel over that of the torch form, each in a process of its own."""

    def measured(impl: str) -> int:
        program = f"from dynattn.bench import deformable; print(deformable.extra_bytes({impl!r}, {points}))"
        run = [sys.executable, "-W", "ignore", "-c", program]
        return int(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    return max(measured("numba"), 0) / measured("torch")


def over_loops(rounds: int = 3) -> float:
    """Time of the loops over that of the kernel: 16 queries, 9 points, 2 heads of 8 channels."""
    inputs = inputs_of(9, side=4, batch=1, heads=2, d=8)
    with threads(1):
        kernel, loops = (timed(partial(call, impl, inputs, False)) for impl in ("numba", "loops"))
        ours, theirs = in_turn(kernel, loops, rounds)
    return theirs / ours


def rows() -> dict[str, Benchmark]:
    """The kernels beside the torch forms, at HW = 3136 and r = 8, 4, 2, and beside the loops."""
    found = {}
    for points in (49, 196, 784):
        size = f"deformable attention, {points} points"
        found[f"forward {points}"] = Benchmark(
            f"{size}: torch / numba",
            partial(speed_up, points, False),
            1.2,
            least=True,
            share=partial(share, points, False),
        )
        found[f"both {points}"] = Benchmark(
            "  with the backward",
            partial(speed_up, points, True, 3),
            1.0,
            least=True,
            share=partial(share, points, True),
        )
        found[f"memory {points}"] = Benchmark("  extra memory: numba / torch", partial(memory, points), 0.2)
    found["loops"] = Benchmark("deformable attention, small: loops / numba", over_loops, 150, least=True)
    return found
