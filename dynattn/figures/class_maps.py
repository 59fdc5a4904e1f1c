"""Class maps of several models side by side: the pictures, and how much of the maps lies on the object.

Any models with stages will do; what they are called, and what is claimed of them, is told by the paper that draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import nn
from tqdm import tqdm

from dynattn.data import CLASSES

from . import style
from .drawing import NAMES, aspect_of, compared, conditions, ground, listed, object_key, of_seeds, share
from .evidence import class_map, evaluate_maps, half, stages
from .run import Drawing, Setting, unique
from .subjects import RANDOM, Picture, Subject
from .tables import Measure, at, joined

MAPS = 64  # test images whose class maps are measured
NEEDS = dict(package="pytorch_grad_cam", advice="class maps are made by grad-cam: pip install 'dynattn[vision]'")


def evaluate(model: nn.Module, *arrays: np.ndarray, known: bool = True, bar: tqdm | None = None) -> pd.DataFrame:
    """`evaluate_maps` of images, masks and labels; known: whether the labels are classes of the model."""
    images, masks, labels = arrays
    return evaluate_maps(model, images, masks, labels if known else None, bar=bar)


@dataclass(frozen=True)
class ClassMaps:
    """The models of a run whose class maps stand side by side; names: what they are called."""

    setting: Setting
    subjects: Sequence[Subject]
    names: Sequence[str]

    @property
    def count(self) -> int:
        """How many test images the maps are measured on: fewer of large ones."""
        return min(MAPS, self.setting.count)

    def networks(self) -> dict[str, int]:
        """The networks that are measured, and on how many images: none on a user's photograph."""
        if self.setting.image is not None:
            return {}
        return {
            map_name(subject, network): self.count
            for subject in self.subjects
            for network in self.setting.networks(subject)
        }

    def tables(self, subject: Subject) -> dict[str, pd.DataFrame]:
        """The table of each of a model's networks, measured once in a run."""
        options = dict(evaluate=evaluate, known=subject.knows_shapes)
        return {
            network: self.setting.evaluation(map_name(subject, network), model, self.count, **options)
            for network, model in self.setting.networks(subject).items()
        }

    def all_tables(self) -> dict[str, pd.DataFrame]:
        """The tables of all networks, by names of their own."""
        return {
            map_name(subject, network): table
            for subject in self.subjects
            for network, table in self.tables(subject).items()
        }

    def on_object(self, kind: str, stage: int) -> list[Measure]:
        """A measure of a stage's maps on the test images, of each model."""
        found = []
        for subject, name in zip(self.subjects, self.names, strict=True):
            layer, number = stage_name(subject, stage), range(len(stages(subject.model)))[stage] + 1
            table = at(joined(self.tables(subject)), layer)
            found.append(share(kind, table, subject.name, f"stage {number}, {name}", layer=layer))
        return found

    def on_photograph(self, stage: int) -> list[Measure]:
        """How much of the user's photograph holds half of a stage's map, of each model; there is no mask."""
        found = []
        for subject, name in zip(self.subjects, self.names, strict=True):
            models = {subject.name: subject.model, RANDOM: self.setting.twin(subject)}
            values = {key: half(class_map(model, self.setting.own.x, stage=stage)) for key, model in models.items()}
            label, random = f"{NAMES['half']}, stage {stage + 1}, {name}", {RANDOM: values[RANDOM]}
            found.append(Measure(label, values[subject.name], random, n=1, layer=stage_name(subject, stage)))
        return found

    def classes(self, pictures: Sequence[Picture]) -> str:
        """Which class the maps are of."""
        if pictures[0].label is not None and self.setting.subject.knows_shapes:
            return "the true class"
        answers = [asked(subject, pictures[0]) for subject in self.subjects]
        known = self.setting.subject.knows_shapes
        words = [CLASSES[answer] if known else f"number {answer}" for answer in answers]
        said = ", ".join(f"{name}: {word}" for name, word in zip(self.names, words, strict=True))
        return f"the class that the model answers{f' ({said})' if len(pictures) == 1 else ''}"

    def weights(self) -> str:
        """The checkpoints of the models beside the paper's, in words."""
        told = ""
        for subject, name in zip(self.subjects, self.names, strict=True):
            if subject is not self.setting.subject:
                made = [f"{key} {subject.story[key]}" for key in ("seed", "steps") if key in subject.story]
                told += f"{name}: {subject.story['file']} ({', '.join(made)}). "
        return told


def map_name(subject: Subject, network: str) -> str:
    """A network's name among the tables: not the one under which other things are recorded."""
    return f"{unique(subject, network)}, class maps"


def stage_name(subject: Subject, stage: int) -> str:
    """The module that a stage is."""
    return stages(subject.model)[stage]["module"]


def asked(subject: Subject, picture: Picture) -> int:
    """The class of a map: the true one, or the model's answer where nobody knows it."""
    if picture.label is not None and subject.knows_shapes:
        return picture.label
    with torch.no_grad():
        return int(subject.model(picture.x[None]).argmax())


def draw_map(ax: Axes, subject: Subject, picture: Picture, stage: int) -> None:
    """A class map over a picture, with the object's outline if it is known."""
    ground(ax, picture)
    style.heat(ax, class_map(subject.model, picture.x, stage=stage, label=asked(subject, picture)))


def key(sheet: style.Sheet, pictures: Sequence[Picture]) -> None:
    """The colours of the maps, and the outline."""
    known = bool(object_key(pictures))
    style.scale(sheet, style.HEAT, ["none", "most"], "speaks for the class", left=3.0 if known else 5.6)
    if known:
        style.key(sheet, object_key(pictures), centre=0.66)


def gradients(measures: Sequence[Measure]) -> str:
    """What Grad-CAM finds in the first stage, and in the last, where it is usually taken: of each model both."""
    half, values = len(measures) // 2, [f"{of_seeds(one).mean():.2f}" for one in measures]
    names = [one.name.split(", ")[2] for one in measures]
    early = listed([f"{value} with {name}" for value, name in zip(values[:half], names, strict=False)])
    nulls = [f"null {one.other:.2f}" for one in measures[half:]]
    late = listed([f"{a} with {b} ({c})" for a, b, c in zip(values[half:], names, nulls, strict=False)])
    return (
        f"Grad-CAM, mean of the seeds, has {early} in the first stage; in the last stage, where it is usually taken, "
        f"{late}. Large dots and bold numbers are of the networks that are drawn. "
    )


def first_stage(maps: ClassMaps, pictures: Sequence[Picture], title: str, verdict: str = "") -> Drawing:
    """A figure of the class maps of the first stage: the photographs, and below them the maps of each model.

    verdict: what is claimed of the models' maps, and whether it holds, for the caption.
    """
    setting = maps.setting
    if setting.image is None:
        first, *gradient = (maps.on_object(kind, stage) for kind, stage in (("hires", 0), ("grad", 0), ("grad", -1)))
        gradient = [measure for measures in gradient for measure in measures]
        measures, tables, said = first + gradient, maps.all_tables(), verdict + gradients(gradient)
    else:
        measures, tables, said = maps.on_photograph(0), {}, ""
    caption = (
        f"HiResCAM for {maps.classes(pictures)} at the output of the first stage. Numbers: the share of a map "
        f"that lies on the object. {said}{maps.weights()}{conditions(setting, pictures, measures)}"
    )
    rows, alone = ["photograph", *maps.names], len(pictures) == 1
    beside_it = {"column_labels": rows} if alone else {"row_labels": rows}
    shape = (1, len(rows)) if alone else (len(rows), len(pictures))
    sheet = style.sheet(*shape, title, caption, compared(measures), aspect=aspect_of(pictures), **beside_it)
    panels = sheet.panels.T if alone else sheet.panels
    for j, picture in enumerate(pictures):
        ground(panels[0, j], picture)
        for i, subject in enumerate(maps.subjects):
            draw_map(panels[i + 1, j], subject, picture, 0)
    key(sheet, pictures)
    return Drawing(sheet.figure, caption, pictures, measures, [subject.story for subject in maps.subjects], tables)
