"""What the figures of a paper are made from, and what all of one run share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from dynattn import weights
from dynattn.data import Shapes, cached
from dynattn.tracing import trace

from . import recorded
from .subjects import (
    RANDOM,
    SEED,
    Picture,
    Subject,
    load_subject,
    own_picture,
    random_twin,
    sample_picture,
    test_picture,
    test_split,
)
from .tables import Measure, joined, summary

FEW = 64  # test images for the statistics of random networks


@dataclass(frozen=True)
class Drawing:
    """A figure, the line at its foot, the pictures on it, what it measured, the stories of its weights.

    networks: the tables of the networks that it measured, by their names.
    """

    figure: Figure
    caption: str
    pictures: list[Picture]
    measures: list[Measure]
    weights: list[dict[str, Any]]
    networks: dict[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How a figure is made; networks: those that it measures, and on how many images."""

    stem: str
    title: str
    draw: Callable[["Setting"], Drawing]
    networks: Callable[["Setting"], dict[str, int]]
    unfit: Callable[[Subject], str] = lambda subject: ""  # why it cannot be drawn of a model; empty where it can
    compares: str = ""  # checkpoints whose names begin so, on many images; it is left out where there are none of them
    package: str = ""  # that it imports and that not every installation has; it is left out where there is none
    advice: str = ""  # how to get the package

    def subjects(self) -> list[Subject]:
        """The models that it compares."""
        names = [name for name in weights.available() if name.startswith(self.compares)]
        return [load_subject(weights.path(name)) for name in names if self.compares]

    def lacks(self) -> Exception | None:
        """What it needs and does not find, as the error to raise; None where there is nothing."""
        if self.package and find_spec(self.package) is None:
            return ImportError(f"needs a package that is not installed; {self.advice}")
        if not self.compares or any(name.startswith(self.compares) for name in weights.available()):
            return None
        missing = weights.missing()
        return FileNotFoundError(f"needs checkpoints {self.compares}*.safetensors, and none is found{missing}")


@dataclass(frozen=True)
class Paper:
    """What the figures of a paper are made from: plans, by the number of a figure or by the name of a table.

    shipped: the model that is drawn unless another is asked for. kind: of the records that a model must have.
    evaluate: takes a model, images, masks, labels and bar=, and returns a table, as `evaluate_points` does. twins:
    random networks like the subject, by names that begin with "random weights"; random: what distinguishes them, in
    words. level: of the test images.
    """

    name: str
    shipped: str
    kind: str
    evaluate: Callable[..., pd.DataFrame]
    twins: Callable[["Setting"], dict[str, nn.Module]]
    random: tuple[str, ...]
    plans: dict[int | str, Plan]
    level: str = "easy"


def unique(subject: Subject, network: str) -> str:
    """The name of one of a model's networks among those of several models."""
    return network if network == subject.name else f"{subject.name}, {network}"


@dataclass
class Setting:
    """All that the figures of one run share; a network is measured once, when a figure first asks for it."""

    paper: Paper
    subject: Subject
    image: Any = None
    seed: int = 0
    progress: bool = True
    bar: tqdm | None = None
    measured: dict[str, pd.DataFrame] = field(default_factory=dict)

    def check(self) -> Self:
        """Raise unless the image can be read and the model has layers of the paper's kind."""
        x = self.own.x if self.own else torch.zeros(3, *self.subject.size)
        if not trace(self.subject.model, x).of_kind(self.paper.kind):
            kind = self.paper.kind.replace("_", " ")
            advice = "another paper's figures are drawn with paper=... (--paper)"
            raise ValueError(f"weights: expected a model with {kind} layers, got {self.subject.name}; {advice}")
        return self

    # ------------------------------------------------------------------------------------------------------- pictures

    @property
    def count(self) -> int:
        """How many test images are measured: fewer of large ones."""
        side = max(self.subject.size)
        return 250 if side <= 128 else 40 if side <= 384 else 8

    @cached_property
    def test_set(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, labels and masks of the test split at the model's size."""
        return cached(self.split, progress=self.progress)

    @property
    def split(self) -> Shapes:
        """The same, made one by one."""
        return test_split(max(self.subject.size), self.count, self.paper.level)

    @cached_property
    def own(self) -> Picture | None:
        """The user's photograph, if there is one."""
        return None if self.image is None else own_picture(self.image, self.subject.size)

    def pictures(self, indices: Sequence[int], samples: Sequence[str] = ()) -> list[Picture]:
        """The user's photograph alone, else test images and sample photographs."""
        if self.own:
            return [self.own]
        size, level = self.subject.size, self.paper.level
        return [test_picture(i, size, level) for i in indices] + [sample_picture(name, size) for name in samples]

    @cached_property
    def few(self) -> UInt8[np.ndarray, "n 3 H W"]:
        """The first test images, for the statistics of random networks; beside a photograph no more are made."""
        if self.image is None:
            return self.test_set[0][:FEW]
        images = self.split
        return np.stack([images[i][0].numpy() for i in range(min(FEW, len(images)))])

    # ------------------------------------------------------------------------------------------------------- networks

    def twin(self, subject: Subject, **changes) -> nn.Module:
        """A random network like `subject`."""
        return random_twin(subject, self.seed, self.few, **changes)

    def beside(self, names: Sequence[str]) -> list[Subject]:
        """The subject and, if it is the one that the paper ships, those of these names; any other stands alone."""
        ships = self.subject.shipped and self.subject.name == self.paper.shipped
        return [self.subject, *(load_subject(name=name) for name in names if ships)]

    def networks(self, subject: Subject) -> dict[str, nn.Module]:
        """A model under its name, those of other seeds, and a random one."""
        return {subject.name: subject.model} | self.seeds_of(subject) | {RANDOM: self.twin(subject)}

    @cached_property
    def twins(self) -> dict[str, nn.Module]:
        """Random networks like the subject."""
        return self.paper.twins(self)

    @cached_property
    def other_seeds(self) -> dict[str, nn.Module]:
        """The networks that are kept beside the subject's, trained as it was from other seeds."""
        return self.seeds_of(self.subject)

    def seeds_of(self, subject: Subject) -> dict[str, nn.Module]:
        """The same of any model; there are none beside a checkpoint of the user's."""
        names = [name for name in weights.available() if name.startswith(f"{subject.name}_seed")]
        found = [load_subject(weights.path(name)) for name in names if subject.shipped]
        return {f"{SEED}{other.story['seed']}": other.model for other in found}

    def evaluation(
        self,
        network: str,
        model: nn.Module,
        count: int | None = None,
        *,
        evaluate: Callable[..., pd.DataFrame] | None = None,
        **options,
    ) -> pd.DataFrame:
        """A table of a network on the first `count` test images, once for each name of a network.

        evaluate: what measures it (None: the paper's own); options: of that.
        """
        if network not in self.measured:
            images, labels, masks = (part[: count or self.count] for part in self.test_set)
            if self.bar is not None:
                self.bar.set_description(network)
            measure = evaluate or self.paper.evaluate
            self.measured[network] = measure(model, images, masks, labels, bar=self.bar, **options)
        return self.measured[network]

    def evaluations(self) -> dict[str, pd.DataFrame]:
        """The tables of the subject, under its name, of other seeds, and of its random twins."""
        networks = {self.subject.name: self.subject.model} | self.other_seeds | self.twins
        return {network: self.evaluation(network, model) for network, model in networks.items()}

    def table(self) -> pd.DataFrame:
        """The same as one table."""
        return joined(self.evaluations())

    def recorded(self, subject: Subject) -> pd.DataFrame | None:
        """The summary of a shipped network without measuring it again, beside a photograph of one's own."""
        return recorded.measured(subject.name) if self.image is not None and subject.shipped else None

    def trained(self) -> pd.DataFrame:
        """The summary of the subject itself."""
        known = self.recorded(self.subject)
        return summary(self.evaluation(self.subject.name, self.subject.model)) if known is None else known
