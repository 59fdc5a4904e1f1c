"""Speed, as ratios: of two things that are timed in turn within one run, so that a slow machine slows down both.

model     a multiply-add of dat_tiny beside one of timm's Swin-T: forward, 8 images of 224 x 224, two threads
import    `import dynattn` beside `import torch`, each in a new process
figures   `dynattn figures`, in seconds
hlg       a multiply-add of hlg_small beside one of Swin-T
ops       the kernels beside the torch forms and the loops: time, and memory; and as a share of torch.mm's rate
routed    the same of routed attention, and a multiply-add of BiFormer and DeBiFormer beside one of Swin-T
ranks     aggregation by rank beside the torch form, and a multiply-add of SG-Former beside one of Swin-T
cuda      grouped attention on a GPU beside flash attention, flex_attention and others
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

from dynattn.bench import aggregation, cuda, deformable, grouped, routed
from dynattn.bench.timing import Benchmark, in_turn, model_over_swin

ROOT = Path(__file__).parents[2]


def model(rounds: int = 7) -> float:
    """Time for a multiply-add of dat_tiny over that of timm's swin_tiny_patch4_window7_224."""
    return model_over_swin("dat_tiny", rounds)


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
# The table
# ---------------------------------------------------------------------------------------------------------------------


BENCHMARKS = {
    "model": Benchmark("multiply-add of dat_tiny / of timm's Swin-T", model, 1.25),
    "import": Benchmark("import dynattn / import torch", imports, 1.3),
    "figures": Benchmark("dynattn figures", figures, 180, "s"),
    "hlg": Benchmark("multiply-add of hlg_small / of timm's Swin-T", partial(model_over_swin, "hlg_small", 5), 1.3),
}
GROUPS = {"ops": lambda: deformable.rows() | grouped.rows(), "routed": routed.rows, "ranks": aggregation.rows}
TABLES = {"cuda": cuda.main}  # with a table of their own


def main(names: list[str]) -> None:
    """Measure what is named, or model and import, and print a table. Raises ValueError for an unknown name."""
    known = [*BENCHMARKS, *GROUPS, *TABLES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(known)}, got {unknown[0]!r}")
    for table in (name for name in names if name in TABLES):
        TABLES[table]()
    rest = [name for name in names or ["model", "import"] if name not in TABLES]
    if rest:
        print(f"{'':12} {'':45} {'measured':>10} {'wanted':>19} {'of torch.mm':>11}".rstrip())
    for name in rest:
        rows = GROUPS[name]() if name in GROUPS else {name: BENCHMARKS[name]}
        for row, benchmark in rows.items():
            value = benchmark.measure()
            verdict = "" if benchmark.holds(value) else "   missed"
            bound = "" if benchmark.bound is None else f"{benchmark.bound:>8.2f} {benchmark.unit}"
            bound = bound and f"{'at least' if benchmark.least else 'at most'} {bound}"
            share = f"{benchmark.share():>12.0%}" if benchmark.share else ""
            line = f"{row:12} {benchmark.what:45} {value:>8.2f} {benchmark.unit} {bound:>19}"
            print(f"{line}{share}{verdict}".rstrip(), flush=True)
