"""Training everything that ships, `dynattn train --all`: which checkpoints are out of date, why, and the runs for them.

A recipe that ships is registered with its seeds (`register_recipe(name, recipe, seeds=(0, 1, 2))`). The checkpoint of
seed 0 is NAME, that of another seed NAME_seedS, that of an earlier step of seed 0 NAME_stepN; the log of the run is
beside it. A checkpoint is out of date when the
images look different since (`data.shapes.VERSION`), when its recipe is another now, or when its model has other
parameters now. Runs keep what they have reached in runs/NAME/seedS: after an interruption they go on from there.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import create_model, weights
from ..data import Shapes, cached
from ..data.shapes import VERSION
from . import checkpoints
from .recipes import SHIPPED, Recipe, completed, get_recipe, plain, recipes, settings
from .tasks import TASKS

RUNS = Path("runs")
UNRECORDED = 2  # the version of the data set of checkpoints that do not say theirs


@dataclass(frozen=True)
class Run:
    """One checkpoint that ships: the name of its recipe, and its seed."""

    name: str
    seed: int

    @property
    def recipe(self) -> Recipe:
        """By which it is trained."""
        return get_recipe(self.name)

    @property
    def file(self) -> Path:
        """The checkpoint, whether it is there or not."""
        folder = SHIPPED[self.name].folder or (weights.FOLDER if self.is_pretrained else weights.of_figures())
        return folder / f"{self.name if self.seed == 0 else f'{self.name}_seed{self.seed}'}.safetensors"

    @property
    def kept(self) -> dict[str, Path]:
        """The checkpoints of earlier steps: what the run calls them, and where they ship."""
        steps = SHIPPED[self.name].keep
        return {f"step{step}": self.file.with_stem(f"{self.file.stem}_step{step}") for step in steps}

    @property
    def is_pretrained(self) -> bool:
        """Whether `create_model(pretrained=True)` loads it."""
        return self.seed == 0 and self.name == self.recipe.model and SHIPPED[self.name].folder is None

    @property
    def folder(self) -> Path:
        """Where the run keeps what it has reached."""
        return RUNS / self.name / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """What trains it, by itself; a folder that holds another run is cleared."""
        words = [sys.executable, "-m", "dynattn", "train", self.name, "--seed", str(self.seed)]
        keep = [str(step) for step in SHIPPED[self.name].keep]
        words += ["--out", str(self.folder), "--workers", "1", *["--keep"] * bool(keep), *keep]
        return [*words, *["--fresh"] * (self.reached() is None)]

    def reached(self) -> int | None:
        """The last step that was saved; None where the folder holds no such run."""
        try:
            found = checkpoints.load(self.folder, settings(self.recipe, self.seed))
        except ValueError:  # of another run, or damaged
            return None
        return found and found["step"]

    def reasons(self) -> list[str]:
        """Why the checkpoint must be trained; empty where it is up to date."""
        if lacking := [file.name for file in (self.file, *self.kept.values()) if not file.is_file()]:
            return ["missing" if lacking[0] == self.file.name else f"{lacking[0]} is missing"]
        try:
            state, story = weights.read(self.file)
        except ValueError:
            return ["damaged"]
        made = story.get("data_version", UNRECORDED)
        found = [] if made == VERSION else [f"data set version {made}, now {VERSION}"]
        now = plain(self.recipe)
        before = completed(story["recipe"]) if story.get("recipe") else recipe_told_by(story)
        for key in now if story.get("recipe") else before:
            if key not in before or before[key] != now[key]:
                found.append(f"{key} {before.get(key)!r}, now {now[key]!r}")
        return found or other_parameters(self.recipe, state)


def recipe_told_by(story: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint without a recipe tells of it: model, options, size of the images, steps."""
    options = {key: value for key, value in story["arguments"].items() if key not in ("img_size", "num_classes")}
    size = story["arguments"]["img_size"]
    return {"model": story["name"], "model_options": options, "size": size, "steps": story["steps"]}


def other_parameters(recipe: Recipe, state: dict[str, Tensor]) -> list[str]:
    """Names in which a checkpoint and the model of its recipe differ, or whose tensors have other shapes, in words."""
    classes = len(TASKS[recipe.task].classes)
    with torch.device("meta"):
        model = create_model(recipe.model, img_size=recipe.size, num_classes=classes, **recipe.model_options)
    now = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    before = {key: tuple(value.shape) for key, value in state.items()}
    different = sorted(key for key in now | before if now.get(key) != before.get(key))
    if not different:
        return []
    shape, others = now.get(different[0], "none"), f" and {len(different) - 1} others" * (len(different) > 1)
    return [f"parameters: {different[0]} {before.get(different[0], 'none')}, now {shape}{others}"]


def shipped_runs() -> list[Run]:
    """Every run that ships, in the order in which the recipes are registered."""
    recipes()  # the papers register theirs
    return [Run(name, seed) for name, shipping in SHIPPED.items() for seed in shipping.seeds]


def print_runs() -> None:
    """Print a table of all runs: the checkpoint, its state, and why it must be trained."""
    rows = [("file", "state", "why")]
    for run in shipped_runs():
        reasons = run.reasons()
        reached = run.reached() if reasons else None
        state = "up to date" if not reasons else f"at step {reached} of {run.recipe.steps}" if reached else "to train"
        rows.append((run.file.stem, state, "; ".join(reasons)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, state, why in rows:
        print(f"{name:{widths[0]}}  {state:{widths[1]}}  {why}".rstrip())


def train_all(processes: int | None = None) -> bool:
    """Train every run whose checkpoint is out of date, and put what they reach in its place; whether all went well.

    processes: so many runs at once, of one thread each; None: one for each CPU, or one alone where there is a GPU.
    Raises: ValueError for less than one process; FileNotFoundError where the folder of the figures' checkpoints is
    missing.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes: expected at least 1, got {processes}")
    waiting = [run for run in shipped_runs() if run.reasons()]
    for run in waiting:
        if not run.file.parent.is_dir():
            raise FileNotFoundError(f"no folder {run.file.parent} for {run.file.name}{weights.missing()}")
    if not waiting:
        print("everything is up to date")
        return True
    processes = processes or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    for data in dict.fromkeys(data_of(run.recipe) for run in waiting):  # once, not by every run
        for shapes in data:
            cached(Shapes(*shapes), processes)
    waiting.sort(key=lambda run: run.recipe.steps * run.recipe.size**2, reverse=True)  # the last ones end together
    failed = []
    for number, (run, problem) in enumerate(finished(waiting, processes), 1):
        print(f"{number:3} of {len(waiting)}  {run.file.stem}: {problem or placed(run)}", flush=True)
        failed += [run] if problem else []
    return not failed


def data_of(recipe: Recipe) -> tuple[tuple[str, str, int, int], ...]:
    """The arguments of the data sets that a recipe trains and tests on."""
    counts = ("train", recipe.train_count), ("test", recipe.test_count)
    return tuple((recipe.level, split, recipe.size, count) for split, count in counts)


def finished(waiting: list[Run], processes: int) -> Iterator[tuple[Run, str]]:
    """Run after run as it ends, so many at a time, and what went wrong, empty where nothing did."""
    waiting, running = list(waiting), {}
    one_thread = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                run = waiting.pop(0)
                run.folder.mkdir(parents=True, exist_ok=True)
                with open(run.folder / "output.txt", "wb") as output:
                    started = subprocess.Popen(
                        run.command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | one_thread
                    )
                running[started] = run
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                output = run.folder / "output.txt"
                last = (output.read_text("utf-8", "replace").strip() or f"exit code {process.returncode}").splitlines()
                yield run, f"failed: {last[-1]} (all of it in {output})" if process.returncode else ""
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
            process.wait()


def placed(run: Run) -> str:
    """Put what a run reached where it ships; how well it did, in words."""
    files = {"log.csv": run.file.with_suffix(".csv"), "model.safetensors": run.file}
    for source, target in files.items() | {(f"{name}.safetensors", file) for name, file in run.kept.items()}:
        weights.write_whole(target, (run.folder / source).read_bytes())
    story = weights.metadata(run.file)
    score = f"mean IoU {story['mean_iou']:.3f}" if "mean_iou" in story else f"accuracy {story['accuracy']:.3f}"
    return f"{score} after {story['steps']} steps in {story['seconds'] / 60:.1f} min"
