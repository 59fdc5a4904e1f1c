"""What is trained, on what, and how: everything that decides a run's result, except the seed; and which runs ship."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .. import plugins
from ..data.shapes import VERSION
from .tasks import TASKS


@dataclass(frozen=True)
class Recipe:
    """One model trained on the procedural shapes: AdamW with warm-up and cosine over a fixed number of steps."""

    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    level: str = "easy"
    size: int = 128
    train_count: int = 6000
    test_count: int = 1000
    steps: int = 500
    batch: int = 64  # of all processes together
    lr: float = 2e-3
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.05  # of matrices and kernels; biases, norms and position tables have none
    clip: float = 2.0
    label_smoothing: float = 0.05
    pace: float = 1.0  # what a model's `after_step` gets, over the learning rate of the step
    task: str = "classification"  # or "segmentation", see tasks.py

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {self.task!r}")
        for name in ("size", "train_count", "test_count", "steps", "batch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("lr", "clip"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("warmup", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value}")
        if self.batch > self.train_count:
            raise ValueError(f"batch: expected at most train_count = {self.train_count}, got {self.batch}")


@dataclass(frozen=True)
class Shipping:
    """What ships of the runs of a recipe: of which seeds, into which folder, after which steps besides the last."""

    seeds: tuple[int, ...] = ()
    folder: Path | None = None
    keep: tuple[int, ...] = ()


RECIPES: dict[str, Recipe] = {}
SHIPPED: dict[str, Shipping] = {}  # by the name of a recipe


def register_recipe(
    name: str,
    recipe: Recipe,
    *,
    seeds: Sequence[int] = (),
    folder: str | Path | None = None,
    keep: Sequence[int] = (),
) -> None:
    """Make a recipe known to `train` and the command line under a name; a name again replaces it.

    seeds: of the runs whose checkpoints ship, which `train --all` keeps up to date. folder: where they lie; None: seed
    0 of a model in `dynattn.weights`, all others in the folder of the figures. keep: steps, from 0, after which the
    weights ship too, as NAME_stepN: how a model learns.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected letters, digits and underscores, as in 'dat_mini', got {name!r}")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}")
    RECIPES[name] = recipe
    check_keep(keep, recipe.steps)
    SHIPPED[name] = Shipping(tuple(seeds), None if folder is None else Path(folder), tuple(keep))


def check_keep(keep: Sequence[int], steps: int) -> None:
    """Raises ValueError unless these are steps before the last one."""
    for step in keep:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < steps:
            raise ValueError(f"keep: expected steps from 0 to {steps - 1}, got {step!r}")


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name: those of the papers, and those that others have registered."""
    plugins.load_papers()
    return RECIPES


def get_recipe(name: str, **changes) -> Recipe:
    """The recipe of that name with some fields changed; model_options are added to its own.

    Raises: ValueError for an unknown name or a value out of range; TypeError for an unknown field.
    """
    if name not in recipes():
        raise ValueError(f"name: expected one of {', '.join(sorted(RECIPES))}, got {name!r}")
    known = [item.name for item in fields(Recipe) if item.name != "model"]
    if unknown := sorted(set(changes) - set(known)):
        raise TypeError(f"{unknown[0]}: expected one of {', '.join(known)}")
    options = RECIPES[name].model_options | changes.get("model_options", {})
    return replace(RECIPES[name], **changes | {"model_options": options})


def command(name: str, seed: int, **changes) -> str:
    """The command line that repeats a run."""
    words = ["dynattn", "train", name, "--seed", str(seed)]
    for key, value in changes.items():
        words += ["--" + key.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join(words)


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON has it: a dict, of lists where it has tuples."""
    return json.loads(json.dumps(asdict(recipe)))


def completed(told: dict[str, Any]) -> dict[str, Any]:
    """A recipe that was written down, with the defaults of fields that it did not have yet, which it went by."""
    return plain(Recipe(told["model"])) | told


def settings(recipe: Recipe, seed: int) -> dict[str, Any]:
    """All that decides a run, for its checkpoint: the recipe, the seed, and how the images look."""
    return {"seed": seed, "data_version": VERSION, **plain(recipe)}
