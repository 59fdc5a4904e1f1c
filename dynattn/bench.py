"""Speed, as ratios: of two things that are timed in turn within one run, so that a slow machine slows down both.

model     a multiply-add of dat_tiny beside one of timm's Swin-T: forward, 8 images of 224 x 224, two threads
import    `import dynattn` beside `import torch`, each in a new process
figures   `dynattn figures`, in seconds
ops       the kernels beside the torch forms and the loops: time, and memory
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]


def in_turn(one: Callable[[], float], other: Callable[[], float], rounds: int) -> tuple[float, float]:
    """The shortest times of two things, measured A B A B: other load on the machine only ever adds."""
    times = [(one(), other()) for _ in range(rounds)]
    return min(a for a, _ in times), min(b for _, b in times)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch, or as many as there are cores; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model(rounds: int = 7) -> float:
    """Time for a multiply-add of dat_tiny over that of timm's swin_tiny_patch4_window7_224."""
    import timm

    from dynattn import cost, create_model

    images = torch.randn(8, 3, 224, 224)
    models = [create_model("dat_tiny").eval(), timm.create_model("swin_tiny_patch4_window7_224").eval()]

    def forward(model: torch.nn.Module) -> float:
        start = perf_counter()
        model(images)
        return perf_counter() - start

    with threads(2), torch.inference_mode():
        for one in models:  # the first call allocates
            forward(one)
        ours, theirs = in_turn(lambda: forward(models[0]), lambda: forward(models[1]), rounds)
    return (ours / cost.count(models[0], 224).macs) / (theirs / cost.count(models[1], 224).macs)


def imports(rounds: int = 5) -> float:
    """Time of `import dynattn` over that of `import torch`."""

    def fresh(name: str) -> Callable[[], float]:
        program = f"from time import perf_counter; t = perf_counter(); import {name}; print(perf_counter() - t)"
        run = [sys.executable, "-c", program]
        return lambda: float(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    ours, theirs = in_turn(fresh("dynattn"), fresh("torch"), rounds)
    return ours / theirs


def figures() -> float:
    """Seconds that `dynattn figures` takes."""
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        run = [sys.executable, "-m", "dynattn", "figures", "--out", folder]
        subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


def deformable_inputs(points: int, side: int = 56, batch: int = 8, heads: int = 3, d: int = 32) -> list[torch.Tensor]:
    """q, k, v, points and table of a layer of DAT-T's first stage; the points lie around a regular grid."""
    from dynattn import core

    torch.manual_seed(0)
    grid = round(points**0.5)
    q, k, v = (torch.randn(batch, heads, n, d) for n in (side * side, points, points))
    places = core.grid_points((grid, grid), "centre", q) + (torch.rand(batch, 1, points, 2) - 0.5) * 4 / grid
    return [q, k, v, places, 0.1 * torch.randn(heads, 2 * side - 1, 2 * side - 1)]


def deformable(impl: str, inputs: list[torch.Tensor], backward: bool) -> list[torch.Tensor]:
    """One call of deformable attention: what comes out, with all gradients if wanted."""
    from dynattn import ops

    side = round(inputs[0].shape[2] ** 0.5)
    with torch.set_grad_enabled(backward):
        inputs = [x.detach().requires_grad_(backward) for x in inputs]
        out = ops.deformable_attention(*inputs, (side, side), impl=impl)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))] if backward else [out]


def speed_up(points: int, backward: bool, rounds: int = 5) -> float:
    """Time of the torch form over that of the kernel, two threads."""
    inputs = deformable_inputs(points)

    def timed(impl: str) -> Callable[[], float]:
        def run() -> float:
            start = perf_counter()
            deformable(impl, inputs, backward)
            return perf_counter() - start

        run()  # the first call compiles, and allocates
        return run

    with threads(2):
        ours, theirs = in_turn(timed("numba"), timed("torch"), rounds)
    return theirs / ours


def extra_bytes(impl: str, points: int) -> int:
    """What a forward and backward takes at its peak beyond inputs, output and gradients (Linux)."""
    deformable(impl, deformable_inputs(4, side=4, batch=1), backward=True)  # libraries, threads
    inputs = deformable_inputs(points)

    def resident(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    kept = deformable(impl, inputs, backward=True)
    return resident("VmHWM") - before - sum(x.numel() * x.element_size() for x in kept)


def memory(points: int) -> float:
    """Extra memory of the kernel over that of the torch form, each in a process of its own."""

    def measured(impl: str) -> int:
        program = f"from dynattn import bench; print(bench.extra_bytes({impl!r}, {points}))"
        run = [sys.executable, "-W", "ignore", "-c", program]
        return int(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    return max(measured("numba"), 0) / measured("torch")


def over_loops(rounds: int = 3) -> float:
    """Time of the loops over that of the kernel: 16 queries, 9 points, 2 heads of 8 channels."""
    inputs = deformable_inputs(9, side=4, batch=1, heads=2, d=8)

    def timed(impl: str, calls: int) -> Callable[[], float]:
        def run() -> float:
            start = perf_counter()
            for _ in range(calls):
                deformable(impl, inputs, backward=False)
            return (perf_counter() - start) / calls

        run()
        return run

    with threads(1):
        ours, theirs = in_turn(timed("numba", 20), timed("loops", 1), rounds)
    return theirs / ours


def operations() -> dict[str, "Benchmark"]:
    """The kernels beside the torch forms, at HW = 3136 and r = 8, 4, 2, and beside the loops."""
    rows = {}
    for points in (49, 196, 784):
        size = f"deformable attention, {points} points"
        rows[f"forward {points}"] = Benchmark(
            f"{size}: torch / numba", partial(speed_up, points, False), 1.5, least=True
        )
        rows[f"both {points}"] = Benchmark("  with the backward", partial(speed_up, points, True, 3), 1.3, least=True)
        rows[f"memory {points}"] = Benchmark("  extra memory: numba / torch", partial(memory, points), 0.2)
    rows["loops"] = Benchmark("deformable attention, small: loops / numba", over_loops, 200, least=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


class Benchmark(NamedTuple):
    """What is measured, by what, and the most that it may be, or the least."""

    what: str
    measure: Callable[[], float]
    bound: float
    unit: str = "x"
    least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the bound."""
        return value >= self.bound if self.least else value <= self.bound


BENCHMARKS = {
    "model": Benchmark("multiply-add of dat_tiny / of timm's Swin-T", model, 1.25),
    "import": Benchmark("import dynattn / import torch", imports, 1.3),
    "figures": Benchmark("dynattn figures", figures, 180, "s"),
}
GROUPS = {"ops": operations}


def main(names: list[str]) -> None:
    """Measure what is named, or model and import, and print a table. Raises ValueError for an unknown name."""
    known = [*BENCHMARKS, *GROUPS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(known)}, got {unknown[0]!r}")
    print(f"{'':12} {'':45} {'measured':>10} {'wanted':>19}")
    for name in names or ["model", "import"]:
        rows = GROUPS[name]() if name in GROUPS else {name: BENCHMARKS[name]}
        for row, benchmark in rows.items():
            value = benchmark.measure()
            verdict = "" if benchmark.holds(value) else "   missed"
            bound = f"{'at least' if benchmark.least else 'at most'} {benchmark.bound:>8.2f} {benchmark.unit}"
            print(f"{row:12} {benchmark.what:45} {value:>8.2f} {benchmark.unit} {bound:>19}{verdict}", flush=True)
