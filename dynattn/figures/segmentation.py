"""Predictions for every pixel, of several models side by side with the truth, and their mean IoU with its errors.

Intersection and union are counted image by image. Both are in the tables as shares of an image, so that the IoU of a
class is the mean of "both" over the mean of "either". The standard error of the mean IoU is the jackknife's: each image
is left out once. It says what other test images would change, not what another seed would.

The null is the same prediction under the truth of the next test image of the same class: what knowing the class alone
is worth.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from torch import nn
from tqdm import tqdm

from dynattn import weights
from dynattn.data import CLASSES, normalise
from dynattn.dense.classes import class_names
from dynattn.dense.drawing import palette, shares
from dynattn.tracing import evaluating
from dynattn.training.tasks import TASKS

from . import style
from .drawing import aspect_of, compared, ground, listed
from .run import Drawing, Setting
from .subjects import RANDOM, Picture, Subject, load_subject, squeezed
from .tables import ALL, OTHER, OWN, Measure, Row, table_of

COUNT, BATCH = 1000, 50  # test images that are measured
WRITTEN = {
    "setr_naive_mini": "SETR-Naïve",
    "setr_pup_mini": "SETR-PUP",
    "setr_mla_mini": "SETR-MLA",
    "setr_pup_hlg_mini": "SETR-PUP-HLG",
    "fcn_mini": "FCN",
    "pvt_seg_mini": "PVT, FPN head",
}
NAMES = TASKS["segmentation"].classes
MARKS = (("s", style.BLUE), ("o", style.ORANGE), ("D", style.GREEN), ("^", style.YELLOW))  # of models
LEGEND, MARK, LETTER = 11.6, 0.5, 0.12  # inches: of the key, and of a class in it its mark and every letter
Truth = UInt8[np.ndarray, "n H W"]


def written(subject: Subject) -> str:
    """A model's name as papers write it."""
    return WRITTEN.get(subject.name, subject.name)


def beside(setting: Setting, names: Sequence[str]) -> list[Subject]:
    """Models beside the subject, in the order of the names: if it is the shipped one, those that ship here too."""
    ships = setting.subject.shipped and setting.subject.name == setting.paper.shipped
    if not ships:
        return [setting.subject]
    there = [name for name in names if name in weights.available() or name == setting.subject.name]
    return [setting.subject if name == setting.subject.name else load_subject(name=name) for name in there]


def answers_pixels(subject: Subject) -> str:
    """Why no segmentation can be drawn of a model; empty where it can."""
    if getattr(subject.model, "segments", False):
        return ""
    return f"needs a model that answers for each pixel; {subject.name} answers for the whole image"


# ---------------------------------------------------------------------------------------------------- what is measured


def predicted(model: nn.Module, images: UInt8[np.ndarray, "n 3 H W"]) -> Truth:
    """The class of each pixel."""
    with torch.no_grad(), evaluating(model):
        return model(normalise(torch.from_numpy(np.array(images)))).argmax(dim=1).byte().numpy()


def counts(answer: Truth, truth: Truth, classes: int) -> tuple[Int[np.ndarray, "n K"], Int[np.ndarray, "n K"]]:
    """Of each image and class the pixels in both, and in either."""
    both, either = (np.zeros((len(answer), classes), int) for _ in range(2))
    for k in range(classes):
        one, other = answer == k, truth == k
        both[:, k] = (one & other).sum(axis=(1, 2))
        either[:, k] = (one | other).sum(axis=(1, 2))
    return both, either


def next_of_class(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For each image the next one of the same class, for the last of a class the first."""
    found = np.empty_like(labels)
    for label in np.unique(labels):
        (places,) = np.nonzero(labels == label)
        found[places] = np.roll(places, -1)
    return found


def evaluate_segmentation(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"],
    *,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """How well a model that answers for each pixel finds object and background: a table (see `tables`).

    Of every class "both, NAME" and "either, NAME": pixels that are of the class in answer and truth, and in one of the
    two, as shares of the image. Under "other" the truth is that of the next image of the same class.
    """
    truth = TASKS["segmentation"].truth(np.array(labels), np.array(masks))
    parts = []
    for first in range(0, len(images), BATCH):
        parts.append(predicted(model, images[first : first + BATCH]))
        if bar is not None:
            bar.update(len(parts[-1]))
    answer = np.concatenate(parts)
    size = float(answer[0].size)
    found = {
        OWN: counts(answer, truth, len(NAMES)),
        OTHER: counts(answer, truth[next_of_class(np.array(labels))], len(NAMES)),
    }

    def rows_of(i: int) -> Iterator[Row]:
        for mask, both_either in found.items():
            for kind, pixels in zip(("both", "either"), both_either, strict=True):
                for name, number in zip(NAMES, pixels[i], strict=True):
                    yield Row("", ALL, mask, f"{kind}, {name}", number / size)

    return table_of(rows_of(i) for i in range(len(answer)))


@dataclass(frozen=True)
class Overlap:
    """Intersections and unions of each image and class."""

    both: Float[np.ndarray, "n K"]
    either: Float[np.ndarray, "n K"]

    @classmethod
    def read(cls, table: pd.DataFrame, mask: str = OWN) -> "Overlap":
        """Those of a table of `evaluate_segmentation`."""
        rows = table[table["mask"] == mask].pivot(index="image", columns="kind", values="value")
        return cls(*(rows[[f"{kind}, {name}" for name in NAMES]].to_numpy() for kind in ("both", "either")))

    @property
    def of_classes(self) -> Float[np.ndarray, " K"]:
        """The IoU of each class over all images; NaN of one that is nowhere."""
        return iou(self.both.sum(axis=0), self.either.sum(axis=0))

    @property
    def mean(self) -> float:
        """The mean over the classes."""
        return float(np.nanmean(self.of_classes))

    @property
    def left_out(self) -> Float[np.ndarray, " n"]:
        """The mean IoU without each image."""
        both, either = (part.sum(axis=0) - part for part in (self.both, self.either))
        return np.nanmean(iou(both, either), axis=1)

    @property
    def error(self) -> float:
        """The standard error of the mean IoU over the images."""
        return jackknife(self.left_out)


def iou(both: np.ndarray, either: np.ndarray) -> np.ndarray:
    """Intersection over union; NaN where there is no union. Rounding may leave a little of an empty one."""
    there = either > 1e-9
    return np.where(there, both / np.where(there, either, 1), np.nan)


def jackknife(left_out: Float[np.ndarray, " n"]) -> float:
    """The standard error of a number, from its values without each image."""
    n = len(left_out)
    return float(((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5)


def apart(one: Overlap, other: Overlap) -> tuple[float, float]:
    """By how much the mean IoU of one is above that of the other, on the same images, and the standard error of it."""
    return one.mean - other.mean, jackknife(one.left_out - other.left_out)


def count_of(setting: Setting) -> int:
    """How many test images are measured: fewer of large ones."""
    return COUNT if setting.count >= 250 else setting.count


def networks_of(setting: Setting, subjects: Sequence[Subject]) -> dict[str, int]:
    """The networks that are measured, and on how many images: none on a user's photograph."""
    known = [subject for subject in subjects if subject.knows_shapes and setting.image is None]
    return {name: count_of(setting) for subject in known for name in measured_names(subject)}


def measured_names(subject: Subject) -> tuple[str, str]:
    """A model and its random twin among the tables: not the names under which other things are recorded."""
    name = subject.story["file"].removesuffix(".safetensors")
    return f"{name}, segmentation", f"{name}, {RANDOM}, segmentation"


def tables_of(setting: Setting, subject: Subject) -> dict[str, pd.DataFrame]:
    """The tables of a model and of its random twin; each is measured once in a run."""
    trained, random = measured_names(subject)
    options = dict(count=count_of(setting), evaluate=evaluate_segmentation)
    tables = {trained: setting.evaluation(trained, subject.model, **options)}
    if random not in setting.measured:
        tables[random] = setting.evaluation(random, setting.twin(subject), **options)
    return tables | {random: setting.measured[random]}


def measure_of(name: str, tables: Mapping[str, pd.DataFrame]) -> Measure:
    """The mean IoU of a model, and what chance would give. tables: of the model and its random twin."""
    trained, random = (Overlap.read(table) for table in tables.values())
    other = Overlap.read(next(iter(tables.values())), OTHER)
    return Measure(
        f"mean IoU, {name}", trained.mean, {RANDOM: random.mean}, len(trained.both), other.mean, trained.error
    )


# ------------------------------------------------------------------------------------------------------------ drawing


def names_of(subject: Subject) -> tuple[str, ...]:
    """The classes of a model, by name."""
    return tuple(subject.story.get("classes") or class_names(subject.model.num_classes))


def draw_classes(ax: Axes, picture: Picture, labels: Int[np.ndarray, "h w"], subject: Subject) -> None:
    """A class for each pixel over the photograph, in the colours of `dynattn segment`; no colour is background."""
    ground(ax, picture, grey=True)
    names = names_of(subject)
    painted = np.dstack([palette(len(names))[labels] / 255, np.full(labels.shape, 0.68)])
    if names[0] == NAMES[0]:
        painted[labels == 0, 3] = 0
    H, W = picture.shape
    extent = (-0.5, W - 0.5, H - 0.5, -0.5)
    ax.imshow(painted, extent=extent, interpolation="nearest", aspect=ax.get_aspect(), zorder=1.5)


def answer_to(subject: Subject, picture: Picture) -> UInt8[np.ndarray, "H W"]:
    """The class of each pixel that a model sees."""
    with torch.no_grad(), evaluating(subject.model):
        return subject.model(picture.x[None])[0].argmax(dim=0).byte().numpy()


def truth_of(picture: Picture) -> UInt8[np.ndarray, "h w"]:
    """The true class of each pixel that is shown."""
    return picture.mask * np.uint8(picture.label + 1)


def classes_key(seen: Sequence[UInt8[np.ndarray, "h w"]], subject: Subject) -> list:
    """The colours of the classes that were drawn, the largest of them, as many as there is room for."""
    names = names_of(subject)
    largest = shares(np.concatenate([labels.ravel() for labels in seen]), len(names))
    there = [number for number, _ in largest if names[number] != NAMES[0]]
    room = np.cumsum([MARK + LETTER * len(names[number]) for number in there]) <= LEGEND
    there = [number for number, fits in zip(there, room, strict=True) if fits]
    return [(style.mark("s", palette(len(names))[number] / 255, 13), names[number]) for number in sorted(there)]


def plot_classes(ax: Axes, found: Mapping[str, Overlap]) -> None:
    """The IoU of every class, a mark for each model."""
    for j, ((name, overlap), (marker, colour)) in enumerate(zip(found.items(), MARKS, strict=False)):
        x = np.arange(len(NAMES)) + 0.14 * (j - (len(found) - 1) / 2)
        ax.plot(x, overlap.of_classes, linestyle="none", marker=marker, color=colour, mec=style.INK, ms=7, label=name)
    ax.set(xlim=(-0.5, len(NAMES) - 0.5), ylim=(0, 1.25), yticks=(0, 0.5, 1))  # the names of the models stand on top
    ax.set_xticks(range(len(NAMES)), NAMES, fontsize=style.SMALL + 1)
    ax.set_ylabel("IoU", fontsize=style.LABEL - 1, color=style.INK)
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(loc="upper center", ncols=len(found), frameon=False, fontsize=style.SMALL + 1, handletextpad=0.2)


def differences(found: Mapping[str, Overlap], to: str) -> str:
    """How far each model is from one of them, with standard errors over the images."""
    words = []
    for name, overlap in found.items():
        if name != to and to in found:
            value, error = apart(overlap, found[to])
            words.append(f"{name} {100 * value:+.1f} ± {100 * error:.1f}")
    said = f"Mean IoU minus that of {to}, in points, with standard errors over the images: {listed(words)}. "
    return said if words else ""


def drawing(
    setting: Setting, subjects: Sequence[Subject], indices: Sequence[int], title: str, to: str, note: str = ""
) -> Drawing:
    """Photographs, the truth, and what each model answers; mean IoU of each, and the IoU of every class.

    subjects: the models, of the same classes. indices: of the test images. to: the name of the model that the others
    are held against. note: what the caption says of their differences.
    """
    pictures, subject = setting.pictures(indices), setting.subject
    known = setting.image is None and subject.knows_shapes
    names = [written(one) for one in subjects]
    tables, found, measures = {}, {}, []
    for one, name in zip(subjects, names, strict=True):
        if known:
            its = tables_of(setting, one)
            found[name] = Overlap.read(next(iter(its.values())))
            measures.append(measure_of(name, its))
            tables |= its
    answers = [[answer_to(one, picture) for one in subjects] for picture in pictures]
    clear = "; no colour: background" if names_of(subject)[0] == NAMES[0] else ""
    if clear and not any(labels.any() for row in answers for labels in row):
        clear += ", the answer for every pixel here"
    clear += "; white: the edge of the object" * (pictures[0].mask is not None)
    title = title if len(subjects) > 1 else title.partition(":")[0]  # beside nothing
    caption = (
        f"The class of each pixel{clear}. {differences(found, to)}{note if len(found) > 1 else ''}"
        f"{conditions(setting, subjects, known)}"
        f"{seen_in_words(pictures, known, measures[0].n if measures else 0)}"
    )
    columns = ["photograph", *["truth"] * known, *names]
    options = dict(aspect=aspect_of(pictures), column_labels=columns, plots=int(known))
    sheet = style.sheet(len(pictures), len(columns), title, caption, compared(measures), **options)
    for row, picture, labels in zip(sheet.panels, pictures, answers, strict=True):
        ground(row[0], picture)
        if known:
            draw_classes(row[1], picture, truth_of(picture), subject)
        for ax, one, its in zip(row[1 + known :], subjects, labels, strict=True):
            draw_classes(ax, picture, its, one)
    if known:
        plot_classes(sheet.plots[0], found)
    seen = [labels for row in answers for labels in row] + [truth_of(picture) for picture in pictures if known]
    style.key(sheet, classes_key(seen, subject), apart=1.0)
    return Drawing(sheet.figure, caption, pictures, measures, [one.story for one in subjects], tables)


def conditions(setting: Setting, subjects: Sequence[Subject], known: bool = True) -> str:
    """The checkpoints in words; of what is measured, that one seed decides nothing."""
    made = [
        one.story["file"] + (f" (seed {one.story['seed']}, {one.story['steps']} steps)" if "seed" in one.story else "")
        for one in subjects
    ]
    H, W = setting.subject.size
    several = " One seed each: what another seed would change is not in the errors." * (known and len(subjects) > 1)
    return f"Weights: {listed(made)}, at {H} × {W}.{several} "


def seen_in_words(pictures: Sequence[Picture], known: bool, count: int) -> str:
    """Which images are drawn, and how many are measured."""
    if pictures[0].mask is None:
        text = f"{pictures[0].name}, of which the truth is not known."
        return text + (f" {shape}." if (shape := squeezed(pictures[0])) else "")
    told = ", ".join(picture.name.removeprefix("test image ") for picture in pictures)
    if not known:
        return f"Test images {told}: the model has no class for them, so nothing is measured."
    return (
        f"Test images {told}. Measured on {count} test images. Another image's mask: the truth of the next test image "
        f"of the same class, one of {len(CLASSES)}."
    )
