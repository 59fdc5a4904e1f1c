"""What is trained, on what, and how: everything that decides a run's result, except the seed."""

import json
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


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
    centroid_pace: float = 1.0  # of DGT's groups: the learning rate that their centroids move by, over the optimiser's

    def __post_init__(self):
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


SWEEP = {"dims": (24, 48, 96), "heads": (2, 4, 8), "depths": (1, 4, 2)}  # smaller than the minis, at 64 pixels
RECIPES = {
    "dat_mini": Recipe("dat_mini"),
    "swin_mini": Recipe("swin_mini"),
    "vit_mini": Recipe("vit_mini"),
    # the paper's tau, a tenth of the learning rate, lets 19 time constants pass in its 300 epochs: here too
    "dgt_mini": Recipe("dgt_mini", centroid_pace=400.0),
    # the sweep of the offset range s (DAT, figure 4) in small: the same recipe, one model for each s
    **{
        f"dat_sweep_s{s}": Recipe("dat_mini", SWEEP | {"offset_range": float(s)}, size=64, steps=400)
        for s in (0, 1, 2, 4, 8)
    },
    # DGT, Table 4(b), in small: G groups and k keys of the finest map, and each of them halved
    **{
        f"dgt_sweep_g{G}k{k}": Recipe(
            "dgt_mini", SWEEP | {"groups": G, "keys": (k, k // 4)}, size=64, steps=400, centroid_pace=500.0
        )
        for G, k in ((8, 64), (4, 64), (8, 32))
    },
    # the first of these where objects are textured and pieces of others lie about; it takes longer to learn
    "dgt_cluttered": Recipe(
        "dgt_mini",
        SWEEP | {"groups": 8, "keys": (64, 16)},
        level="cluttered",
        size=64,
        steps=800,
        centroid_pace=250.0,
    ),
}


def get_recipe(name: str, **changes) -> Recipe:
    """The recipe of that name with some fields changed; model_options are added to its own.

    Raises: ValueError for an unknown name or a value out of range; TypeError for an unknown field.
    """
    if name not in RECIPES:
        raise ValueError(f"name: expected one of {', '.join(RECIPES)}, got {name!r}")
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


def conditions(recipe: Recipe, seed: int) -> dict[str, Any]:
    """All that decides a run, for its checkpoint."""
    return {"seed": seed, **asdict(recipe)}
