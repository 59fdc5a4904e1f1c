"""Receptive fields of several models side by side: the pictures, a table of thresholds, and who has the largest.

Any models with stages will do; what they are called is told by the paper that draws them.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from . import style
from .drawing import listed, of_seeds
from .evidence import SHARES, contribution, receptive_field
from .run import Drawing, Setting, unique
from .subjects import RANDOM, SEED, Picture, Subject, own_picture, test_picture
from .tables import ALL, NETWORK, NONE, Measure, Row, table_of

FIELDS, LARGE = 24, 6  # test images; of large ones
APART = 0.02  # sides that differ by less, a pixel at either edge of a small image, count as equal
SQUARES = {0.5: (0, (4, 2.5)), 0.99: (0, (1, 1.5))}  # of the thresholds, those that are drawn, and their dashes
Fields = dict[str, list[np.ndarray]]  # of a model: by its networks, of every size
Sides = dict[tuple[int, int, float], Measure]  # by the numbers of the model and of the size, and the part that it holds


def sizes_of(setting: Setting) -> list[tuple[int, int]]:
    """The images that receptive fields are measured on: as large as the model is made for, and twice that."""
    H, W = setting.subject.size
    return [(H, W), (2 * H, 2 * W)]


def count_of(setting: Setting) -> int:
    """How many images: fewer of large ones."""
    if setting.image is not None:
        return 1
    return min(FIELDS if max(setting.subject.size) <= 128 else LARGE, setting.count)


def pictures_at(setting: Setting, size: tuple[int, int]) -> list[Picture]:
    """The first test images at a size, or the user's photograph."""
    if setting.image is not None:
        return [own_picture(setting.image, size)]
    return [test_picture(i, size) for i in range(count_of(setting))]


def networks_of(setting: Setting, subjects: Sequence[Subject]) -> dict[str, int]:
    """The networks whose fields are measured, and on how many images of both sizes."""
    count = 2 * count_of(setting)
    return {field_name(subject, network): count for subject in subjects for network in setting.networks(subject)}


def field_name(subject: Subject, network: str) -> str:
    """A network's name among the tables: not the one that class maps have."""
    return f"{unique(subject, network)}, receptive field"


def counted(setting: Setting, pictures: Sequence[Picture]) -> Iterator[Tensor]:
    """What the model sees of each, with an update of the progress bar when it is done."""
    for picture in pictures:
        yield picture.x
        if setting.bar is not None:
            setting.bar.update()


def fields_of(setting: Setting, subject: Subject, pictures: Sequence[Sequence[Picture]]) -> Fields:
    """Receptive fields of a model's networks, of every size of the pictures."""
    found = {}
    for network, model in setting.networks(subject).items():
        if setting.bar is not None:
            setting.bar.set_description(field_name(subject, network))
        found[network] = [receptive_field(model, counted(setting, at_size)) for at_size in pictures]
    return found


def squares(field: Float[np.ndarray, "H W"]) -> dict[float, float]:
    """The sides of the squares that hold the parts, over that of the image; 0 of a field that is zero everywhere."""
    return {part: side if np.isfinite(side) else 0.0 for part, side in contribution(field).items()}


def side_of(fields: Fields, subject: Subject, name: str, size: int, part: float, n: int) -> Measure:
    """The side of the square that holds a part of all contribution, of all networks of a model at a size."""
    values = {network: squares(found[size])[part] for network, found in fields.items()}
    H, W = fields[subject.name][size].shape
    return Measure(
        name=f"side of the square with {100 * part:.0f} %, {name}, {H} × {W}",
        trained=values[subject.name],
        random={RANDOM: values[RANDOM]},
        n=n,
        seeds={network: value for network, value in values.items() if network.startswith(SEED)},
    )


def drawing(setting: Setting, subjects: Sequence[Subject], names: Sequence[str], title: str) -> Drawing:
    """A figure of the receptive fields of several models, at two sizes, trained and random.

    names: what the models are called. The first is the paper's.
    """
    pictures = [pictures_at(setting, size) for size in sizes_of(setting)]
    fields = [fields_of(setting, subject, pictures) for subject in subjects]
    sides = {
        (s, size, part): side_of(fields[s], subjects[s], names[s], size, part, len(pictures[size]))
        for s in range(len(subjects))
        for size in range(2)
        for part in SHARES
    }
    caption = caption_of(setting, subjects, names, pictures[0], sides)
    labels = [f"{H} × {W}" for H, W in sizes_of(setting)]
    sheet, panels = field_panels(names, labels, title, caption)
    for s, subject in enumerate(subjects):
        for k, network in enumerate((subject.name, RANDOM)):
            for size in range(2):
                draw_field(panels[size, 2 * s + k], fields[s][network][size])
    powers = [f"$10^{{{-power}}}$" if power else "1" for power in range(style.DECADES, -1, -1)]
    style.scale(sheet, style.FIELD, powers, "contribution", left=2.6, width=2.4)
    marks = [(style.square_mark(dashes), f"square with {100 * part:.0f} %") for part, dashes in SQUARES.items()]
    style.key(sheet, marks, centre=0.66)
    write_table(sheet.table, names, labels, sides)
    tables = {} if setting.image is not None else tables_of(subjects, fields)
    stories = [subject.story for subject in subjects]
    return Drawing(sheet.figure, caption, pictures[0], list(sides.values()), stories, tables)


def field_panels(
    names: Sequence[str], labels: Sequence[str], title: str, caption: str
) -> tuple[style.Sheet, np.ndarray]:
    """The sheet and its panels, by size, then trained and random of each model; of a single model all in a row."""
    lines = 2 + 2 * len(names)
    if len(names) == 1:
        columns = [f"{kind}, {label}" for label in labels for kind in ("trained", "random")]
        sheet = style.sheet(1, 4, title, caption, column_labels=columns, together=2, lines=lines)
        return sheet, sheet.panels.reshape(2, 2)
    columns = [label for name in names for label in (name, "random")]
    options = dict(row_labels=labels, column_labels=columns, together=2, lines=lines)
    sheet = style.sheet(2, len(columns), title, caption, **options)
    return sheet, sheet.panels


def caption_of(
    setting: Setting, subjects: Sequence[Subject], names: Sequence[str], pictures: Sequence[Picture], sides: Sides
) -> str:
    """What is drawn, who has the largest field, the conditions."""
    images = f"of {pictures[0].name}" if setting.image is not None else f"mean over {len(pictures)} test images"
    made = ", ".join(subject.story["file"] for subject in subjects)
    H, W = setting.subject.size
    return (
        f"How much the centre of the last stage's map changes with each pixel, {images}, in decades of the largest. "
        f"The centre is four cells where the map has even sides. {orders(names, sides)}Table: side of the central "
        f"square that holds a part of all contribution, over the side of the image, and its area; "
        f"{seeds_in_words(names, sides)}; in bold the largest of trained and of random networks. "
        f"Weights: {made}, made for {H} × {W}; random weights: seed {setting.seed}."
    )


def draw_field(ax: Axes, field: Float[np.ndarray, "H W"]) -> None:
    """A receptive field with the squares of two shares."""
    style.contributions(ax, field)
    found = squares(field)
    for part, dashes in SQUARES.items():
        style.central_square(ax, found[part], field.shape, dashes)


def value_of(measure: Measure, trained: bool) -> float:
    """Of a trained model the mean over its seeds, or that of the random network."""
    return float(of_seeds(measure).mean()) if trained else measure.random[RANDOM]


def orders(names: Sequence[str], sides: Sides) -> str:
    """Who has the largest field, by size and by weights, and whether that order is always the same; empty of one."""
    if len(names) == 1:
        return ""
    said = []
    for part in SQUARES:
        found = {
            (trained, size): ranked(names, [value_of(sides[s, size, part], trained) for s in range(len(names))])
            for trained in (True, False)
            for size in range(2)
        }
        flips = {
            "with the size of the image": any(found[trained, 0] != found[trained, 1] for trained in (True, False)),
            "with training": any(found[True, size] != found[False, size] for size in range(2)),
        }
        changes = " and ".join(word for word, flip in flips.items() if flip)
        told = f"the order changes {changes}" if changes else "the order is always the same"
        first = sum(order.startswith(f"{names[0]} >") for order in found.values())
        listed = f"trained: {found[True, 0]}; at twice the size: {found[True, 1]}"
        alone = f"{names[0]} alone is first in {first} of 4 orders. "
        said.append(f"By the square with {100 * part:.0f} % {told} ({listed}). {alone}")
    return "".join(said) + f"Less than {APART} apart counts as equal. "


def ranked(names: Sequence[str], values: Sequence[float]) -> str:
    """The names by their values, the largest first; equal is what is less than `APART` below the one before."""
    order = np.argsort(-np.array(values), kind="stable")
    groups = [[order[0]]]
    for before, s in pairwise(order):
        if values[before] - values[s] < APART:
            groups[-1].append(s)
        else:
            groups.append([s])
    return " > ".join(" = ".join(names[s] for s in sorted(group)) for group in groups)


def seeds_in_words(names: Sequence[str], sides: Sides) -> str:
    """What a value of the table is."""
    counts = {name: len(of_seeds(sides[s, 0, SHARES[0]])) for s, name in enumerate(names)}
    several = [name for name, count in counts.items() if count > 1]
    if not several:
        return "one seed of each model"
    return f"of {listed(several)} the mean of {counts[several[0]]} seeds (drawn: the first)"


def write_table(ax: Axes, names: Sequence[str], labels: Sequence[str], sides: Sides) -> None:
    """The thresholds, a row for each model and its random network; in bold the largest of trained, and of random."""
    left = [0.005, 0.105, *(0.225 + 0.1 * i + 0.02 * (i > 3) for i in range(8))]
    columns = [(size, part) for size in range(2) for part in SHARES]
    rows = [["", "", labels[0], "", "", "", labels[1], "", "", ""]]
    rows += [["side (area) with", "", *(f"{100 * part:.0f} %" for _, part in columns)]]
    bold = {(0, 2), (0, 6)}  # and the largest, where there are several models
    for s, name in enumerate(names):
        for trained in (True, False):
            values = [value_of(sides[s, size, part], trained) for size, part in columns]
            words = [f"{value:.2f} ({value**2:.2f})" for value in values]
            rows.append([name if trained else "", "trained" if trained else "random", *words])
    for j, (size, part) in enumerate(columns if len(names) > 1 else ()):
        for trained in (True, False):
            values = [round(value_of(sides[s, size, part], trained), 2) for s in range(len(names))]
            bold |= {(2 + 2 * s + (not trained), 2 + j) for s in range(len(names)) if values[s] == max(values)}
    style.table(ax, rows, left, bold)


def tables_of(subjects: Sequence[Subject], fields: Sequence[Fields]) -> dict[str, pd.DataFrame]:
    """The sides of all squares as a table of each network."""
    found = {}
    for subject, networks in zip(subjects, fields, strict=True):
        for network, at_sizes in networks.items():
            rows = [
                Row(NETWORK, ALL, NONE, f"side, {100 * part:.0f} %, {field.shape[0]} × {field.shape[1]}", side)
                for field in at_sizes
                for part, side in squares(field).items()
            ]
            found[field_name(subject, network)] = table_of([rows])
    return found
