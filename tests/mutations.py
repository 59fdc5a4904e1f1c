"""Thirty mistakes in the library's own source, each of which some test must catch. Run by hand, it is not in the gate:

    python tests/mutations.py              all of them, one after the other (half an hour)
    python tests/mutations.py 0 7 12       some, by their numbers
    python tests/mutations.py --list       what they are

The checkout is copied to a temporary folder; there a mutation is made, and the test files that should catch it are run,
slow tests too, until one fails. A mutation that survives means that a test is missing. One whose text is not found, or
found twice, means that this list is old. The catalogue's mistakes (`tests/test_mutants.py`) are another thing: those
are mistakes of students, which the oracle must catch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """Text of a file under dynattn/ that is replaced, and the arguments of the pytest that must fail."""

    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # core
    Mutation("core.py", "return (2 * i + 1) / n - 1", "return (2 * i + 1) / (n + 1) - 1", "test_core.py"),
    Mutation("core.py", "points.flip(-1)", "points", "test_operations.py -k sample_points-torch"),
    Mutation(
        "kernels/derivatives.py",
        "attn_mask=bias, scale=scale",
        "attn_mask=bias",
        "test_operations.py -k dense_attention",
    ),
    Mutation("core.py", '"B H W (h d) -> B h (H W) d"', '"B H W (d h) -> B h (H W) d"', "test_core.py"),
    Mutation("core.py", 'size=size, mode="bicubic"', 'size=size, mode="bilinear"', "test_core.py"),
    Mutation("core.py", "i[:, None] - i[None, :] + window[0]", "i[None, :] - i[:, None] + window[0]", "test_core.py"),
    # mechanisms
    Mutation("mechanisms/window.py", "labels == labels.mT", "labels <= labels.mT", "test_operations.py -k window"),
    Mutation(
        "mechanisms/deformable.py",
        "points[:, :, None]) / 2  # (B, g, L, N, 2)",
        "points[:, :, None])  # (B, g, L, N, 2)",
        "test_operations.py -k deformable_attention-torch",
    ),
    Mutation("mechanisms/deformable.py", "* raw.tanh()", "* raw.sin()", "test_deformable.py"),
    Mutation("mechanisms/deformable.py", "points.clamp(-1, 1)", "points.clamp(-2, 2)", "test_deformable.py"),
    Mutation("mechanisms/deformable_detr.py", "(B h) d (L K) ->", "(B h) d (K L) ->", "test_operations.py -k detr"),
    Mutation(
        "kernels/grouped_torch.py",
        "rank = torch.arange(L",
        "rank = 0 * torch.arange(L",
        "test_operations.py -k grouped_attention-torch",
    ),
    Mutation("mechanisms/dynamic_group.py", "likes > least, likes", "likes < least, likes", "test_dynamic_group.py"),
    Mutation("mechanisms/dynamic_group.py", "(1 - tau, tau)", "(1 - tau, 2 * tau)", "test_dynamic_group.py"),
    Mutation("mechanisms/dynamic_group.py", "tau = 0.1 * lr", "tau = lr", "test_dynamic_group.py"),
    Mutation("kernels/routed.py", "read.sum(dim=-1)", "read.sum(dim=-1).clamp(max=2)", "test_bilevel.py"),
    # kernels
    Mutation(
        "kernels/sampling_numba.py",
        "dplaces.sum(1) * (size - 1) / 2",
        "dplaces.sum(1) * (size - 1)",
        "test_operations.py -k sample_points-numba",
    ),
    Mutation(
        "kernels/grouped_numba.py",
        "dtype, (B, h, _, d) = working_dtype(q), q.shape",
        "grad, dtype, (B, h, _, d) = 1.001 * grad, working_dtype(q), q.shape",
        "test_operations.py -k grouped_attention-numba",
    ),
    Mutation(
        "kernels/threads.py", "like.dtype == torch.float64 else", "like.dtype == 0 else", "test_operations.py -k numba"
    ),
    # tracing
    Mutation("tracing.py", "heat = 0.5 * heat + 0.5 *", "heat = 0.4 * heat + 0.6 *", "test_tracing.py"),
    Mutation("tracing.py", "module.training = mode", "module.training = True", "test_tracing.py"),
    # models
    Mutation(
        "models/layers.py",
        "return x + self.drop_path(self.mlp(self.norm2(x)))",
        "return x + self.drop_path(self.mlp(self.norm1(x)))",
        "test_window.py test_official.py",
    ),
    Mutation(
        "models/layers.py",
        "torch.linspace(0, rate, sum(depths)",
        "torch.linspace(rate, 0, sum(depths)",
        "test_models.py test_dgt_models.py",
    ),
    # official
    Mutation(
        "models/dat.py", "2 * int(block) + int(found[1]) - 1", "2 * int(block) + 2 - int(found[1])", "test_official.py"
    ),
    Mutation("models/dat.py", '"q": "proj_q",', '"q": "proj_k",', "test_official.py"),
    # data
    Mutation(
        "data/images.py",
        "return 1 / (255 * std), -mean / std",
        "return 1 / (256 * std), -mean / std",
        "test_images.py test_data.py",
    ),
    Mutation("data/shapes.py", ">= VISIBLE * area", ">= 0 * area", "test_data.py"),
    # verify
    Mutation("verify/comparing.py", "wrong = ~(error <= allowed)", "wrong = error > allowed", "test_mutants.py"),
    # cost, training
    Mutation(
        "cost.py", "model = create_model(row.model, **row.options)", "model = create_model(row.model)", "test_cost.py"
    ),
    Mutation(
        "training/loop.py",
        "(1 + math.cos(math.pi * done)) / 2",
        "(1 - math.cos(math.pi * done)) / 2",
        "test_training.py",
    ),
]


def is_caught(mutation: Mutation, folder: Path) -> bool:
    """Whether a test of a copy with the mutation fails. The copy is left as it was."""
    file = folder / "dynattn" / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file}: expected once, found {text.count(mutation.old)} times: {mutation.old}")
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        tests = [f"tests/{word}" if word.endswith(".py") else word for word in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(folder)}  # the copy, not what is installed
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        told = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print("   ", *(told or ["nothing failed"])[:1])
        return done.returncode == 1
    finally:
        file.write_text(text)


def main(arguments: list[str]) -> int:
    """Make the mutations whose numbers are given, or all; returns how many survived."""
    if arguments == ["--list"]:
        for number, mutation in enumerate(MUTATIONS):
            print(f"{number:2}  {mutation.file}: {mutation.old}  ->  {mutation.new}")
        return 0
    survived = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dynattn"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", ".git", ".pytest_cache"))
        for number in map(int, arguments or range(len(MUTATIONS))):
            print(f"{number:2}  {MUTATIONS[number].file}: {MUTATIONS[number].new}", flush=True)
            if not is_caught(MUTATIONS[number], folder):
                survived.append(number)
    print(f"{len(survived)} survived: {survived}" if survived else "All were caught.")
    return len(survived)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
