"""Networks that differ in one thing, side by side: their accuracy, and one measure with its null."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from torch import nn

from dynattn.training import evaluate

from . import style
from .drawing import share
from .run import Setting
from .subjects import SEED, Subject
from .tables import OWN, Measure, joined, means


@dataclass(frozen=True)
class Sweep:
    """What is compared.

    columns: the networks of each column, of one seed or of several; the others are held against the first column.
    chance: random networks, by name. kind: what is measured beside accuracy. place: of a network's table, the rows
    that count. images: how many test images accuracy is measured on, and how many `kind`.
    """

    columns: dict[str, list[Subject]]
    chance: dict[str, nn.Module]
    kind: str
    place: Callable[[pd.DataFrame], pd.DataFrame]
    images: tuple[int, int]

    @property
    def named(self) -> dict[str, dict[str, Subject]]:
        """The networks of each column by names of their own."""
        return {
            label: {f"{label}, {SEED}{subject.story['seed']}": subject for subject in subjects}
            for label, subjects in self.columns.items()
        }

    @property
    def stories(self) -> list[dict]:
        """What the checkpoints say of themselves."""
        return [subject.story for subjects in self.columns.values() for subject in subjects]

    @property
    def seeds(self) -> str:
        """The seeds in words."""
        return ", ".join(map(str, sorted({story["seed"] for story in self.stories})))


@dataclass(frozen=True)
class Found:
    """What a sweep gave: a measure for each column, and the tables of all networks by their names."""

    accuracies: list[Measure]
    shares: list[Measure]
    tables: dict[str, pd.DataFrame]


def measure(setting: Setting, sweep: Sweep) -> Found:
    """Measure every network of a sweep, and the random ones."""
    n, count = sweep.images
    images, labels, _ = (part[:n] for part in setting.test_set)
    networks = {
        name: subject.model for column in sweep.named.values() for name, subject in column.items()
    } | sweep.chance
    tables = {name: setting.evaluation(name, model, count) for name, model in networks.items()}
    random = {name: float(means(joined({name: tables[name]}), "accuracy").value.iloc[0]) for name in sweep.chance}
    accuracies, shares = [], []
    for label, column in sweep.named.items():
        values = {name: evaluate(subject.model, images, labels)[0] for name, subject in column.items()}
        error = (np.mean(list(values.values())) * (1 - np.mean(list(values.values()))) / n) ** 0.5
        accuracies.append(of_seeds(Measure(f"accuracy, {label}", 0.0, random, n, standard_error=float(error)), values))
        rows = joined({name: sweep.place(tables[name]) for name in [*column, *sweep.chance]})
        values = means(rows, sweep.kind).value.xs(OWN, level="mask")
        values = {name: float(values[name]) for name in column}
        shares.append(of_seeds(share(sweep.kind, rows, next(iter(column)), label), values))
    return Found(accuracies, shares, tables)


def of_seeds(measure: Measure, values: dict[str, float]) -> Measure:
    """A measure of the networks of one column: their mean, with the standard error of several seeds.

    Of a single seed the error is that over the images.
    """
    each = np.array(list(values.values()))
    seeds = {name.rpartition(", ")[2]: value for name, value in values.items()}
    measure = replace(measure, trained=float(each.mean()))
    if len(each) == 1:
        return measure
    return replace(measure, seeds=seeds, standard_error=float(each.std(ddof=1) / len(each) ** 0.5))


def difference(first: Measure, other: Measure) -> tuple[float, float]:
    """By how much a column is above the first, and the standard error of that."""
    return other.trained - first.trained, float(np.hypot(first.standard_error, other.standard_error))


def errors_of(sweep: Sweep) -> str:
    """What the bars are, in words."""
    if any(len(subjects) > 1 for subjects in sweep.columns.values()):
        return "small dots are the seeds, large ones their mean, bars its standard error over the seeds"
    return "bars are standard errors over the images; what another seed would change is not in them"


def plot(ax: Axes, measures: Sequence[Measure], name: str, scale: float = 1.0, *, from_zero: bool = False) -> None:
    """A measure over the columns, with the seeds that each value is the mean of."""
    value, error = (
        scale * np.array([getattr(found, key) for found in measures]) for key in ("trained", "standard_error")
    )
    each = [[scale * seed for seed in found.seeds.values()] for found in measures]
    style.series(ax, value, error, name, from_zero=from_zero, each=each if any(each) else ())


def networks_of(sweep: Sweep) -> dict[str, int]:
    """What a plan says of the networks that it measures, and on how many images."""
    return dict.fromkeys(
        [*(name for column in sweep.named.values() for name in column), *sweep.chance], sweep.images[1]
    )
