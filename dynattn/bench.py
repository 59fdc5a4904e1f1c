"""Speed, as ratios: of two things that are timed in turn within one run, so that a slow machine slows down both.

    model     a multiply-add of dat_tiny beside one of timm's Swin-T: forward, 8 images of 224 x 224, two threads
    import    `import dynattn` beside `import torch`, each in a new process
    figures   `dynattn figures`, in seconds
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Benchmark(NamedTuple):
    """What is measured, by what, and the most that it may be."""

    what: str
    measure: Callable[[], float]
    most: float
    unit: str = "x"


BENCHMARKS = {
    "model": Benchmark("multiply-add of dat_tiny / of timm's Swin-T", model, 1.25),
    "import": Benchmark("import dynattn / import torch", imports, 1.3),
    "figures": Benchmark("dynattn figures", figures, 180, "s"),
}


def main(names: list[str]) -> None:
    """Measure what is named, or all but the figures, and print a table. Raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(BENCHMARKS)}, got {unknown[0]!r}")
    print(f"{'':10} {'':45} {'measured':>10} {'at most':>10}")
    for name in names or ["model", "import"]:
        what, measure, most, unit = BENCHMARKS[name]
        value = measure()
        verdict = "" if value <= most else "   too slow"
        print(f"{name:10} {what:45} {value:>8.2f} {unit} {most:>8.2f} {unit}{verdict}", flush=True)
