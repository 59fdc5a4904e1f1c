"""The figures of DAT (Xia et al., CVPR 2022): what the offset range does, where points go, and what queries read.

Layers are found by their records, never by their names: any model with deformable layers can be drawn, at any size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from dynattn import weights
from dynattn.tracing import Record, Trace, trace
from dynattn.training import evaluate

from . import style
from .measures import move, positions, propagate, reach, received
from .subjects import RANDOM, Picture, Setting, Subject, load_subject

# Test images, chosen by their index for a spread of classes, places and backgrounds, before any model was trained.
SWEEP_OF, KEYS_OF, POINTS_OF, QUERIES_OF = (19,), (8, 7, 19, 13, 25, 10), (1, 9, 22, 27), (24, 11, 7, 28)
SWEEP, SWIN = "dat_sweep_s", "swin_mini"
TOP_KEYS = 40
INK = 0.05  # share of a panel that all attention of one distribution covers with its dots
LARGEST = f"{RANDOM}, largest s"
NAMES = {"points": "points on the object", "attention": "attention on the object"}


@dataclass(frozen=True)
class Drawing:
    """A figure, the line at its foot, what is on it, what it measured.

    A measure has: name; trained; random, a number for each kind of random network; other, the same under the masks of
    the other images (None where there are no masks). networks: all that `evaluate_points` found, by network.
    """

    figure: Figure
    caption: str
    pictures: list[Picture]
    measures: list[dict[str, Any]]
    weights: list[dict[str, Any]]
    networks: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How a figure is made: the stem of its file, its title, its function, and how many networks it measures."""

    stem: str
    title: str
    draw: Callable[[Setting], Drawing]
    networks: Callable[[Setting], Sequence[str]]
    of_many: bool = False  # compares several models on many images, so that it takes neither an image nor weights


# --------------------------------------------------------------------------------------------- 4: the range of offsets


def sweep() -> dict[str, Subject]:
    """The shipped models that differ in their offset range s alone, in its order.

    Raises FileNotFoundError where there are none.
    """
    names = [name for name in weights.available() if name.startswith(SWEEP)]
    if not names:
        raise FileNotFoundError(f"only: figure 4 needs checkpoints {SWEEP}*.safetensors in {weights.FOLDER}")
    subjects = sorted((load_subject(weights.path(name)) for name in names), key=lambda one: one.arguments["offset_range"])
    return {f"s = {subject.arguments['offset_range']:g}": subject for subject in subjects}


def offset_range(setting: Setting) -> Drawing:
    """Figure 4: accuracy over the range s that scales the offsets, and with it the attention on the object."""
    subjects = sweep()
    images, labels, _ = setting.test_set
    found = {s: setting.evaluation(s, subject.model) for s, subject in subjects.items()}
    accuracy = np.array([evaluate(subject.model, images, labels)[0] for subject in subjects.values()])
    attention, error, other = (
        np.array([one[key] for one in found.values()]) for key in ("attention", "attention_se", "attention_other")
    )
    networks = found | {LARGEST: setting.evaluation(LARGEST, setting.twin(list(subjects.values())[-1], offset_zero_init=False))}

    (picture,) = setting.pictures(SWEEP_OF)
    seeds = ", ".join(map(str, sorted({subject.story["seed"] for subject in subjects.values()})))
    caption = (
        f"One network for each s (seed {seeds}), alike in everything else, so differences between seeds are not in the "
        f"bars. Accuracy on {len(labels)} test images, bars: binomial standard error. Attention on the object: mean over "
        f"{setting.count} test images, all deformable layers, queries and heads, bars: standard error over the images; "
        f"random weights give {networks[LARGEST]['attention']:.2f}. Photographs: {picture.name}, last deformable layer "
        f"of the finest map; areas of dots: attention received; lines: from the reference to the point."
    )
    sheet = style.sheet(1, len(subjects), PLANS[4].title, caption, column_labels=list(subjects), strips=2)
    for ax, subject in zip(sheet.panels[0], subjects.values(), strict=True):
        ground(ax, picture)
        draw_points(ax, last_of_each_map(trace(subject.model, picture.x))[0])
    style.series(sheet.plots[0], 100 * accuracy, 100 * (accuracy * (1 - accuracy) / len(labels)) ** 0.5, "accuracy, %")
    style.series(sheet.plots[1], attention, error, "attention\non the object", from_zero=True)
    style.baseline(sheet.plots[1], other, "another image's mask")
    chance = {LARGEST: networks[LARGEST]["accuracy"]}
    measures = [
        dict(name=f"accuracy, {s}", trained=float(value), random=chance, other=None, n=len(labels))
        for s, value in zip(subjects, accuracy, strict=True)
    ]
    measures += [share("attention", networks, s, label=s) for s in subjects]
    return Drawing(
        sheet.figure, caption, [picture], measures, [subject.story for subject in subjects.values()], networks
    )


# ----------------------------------------------------------------------------------------------- 5: the important keys


def important_keys(setting: Setting) -> Drawing:
    """Figure 5: the deformed points of all deformable layers that get most of the propagated attention."""
    pictures = setting.pictures(KEYS_OF, ("chelsea", "flower"))
    columns = min(4, len(pictures))
    traces = [trace(setting.subject.model, picture.x) for picture in pictures]
    if setting.image is None:
        networks = setting.evaluations()
        measures = [share("propagated", networks, setting.subject.name, "propagated attention on the object")]
    else:
        networks, name = {}, f"propagated attention on the {TOP_KEYS} keys drawn"
        measures = [unmasked(setting, name, lambda t: float(top_keys(t)[1].sum()))]
    caption = (
        f"The {TOP_KEYS} points with most attention of all {len(traces[0].of_kind('deformable'))} deformable layers and "
        f"all heads, area of a circle: its score. Score: each cell of the last layer's map starts with the same mass; "
        f"layer by layer, half of it moves along the heads' mean attention to the points and on to the cells they "
        f"read, half stays. {conditions(setting, pictures, measures)}"
    )
    rows = -(-len(pictures) // columns)
    sheet = style.sheet(rows, columns, PLANS[5].title, caption, aspect=aspect_of(pictures))
    for ax, picture, t in zip(sheet.panels.flat, pictures, traces, strict=True):
        ground(ax, picture)
        xy, score = top_keys(t)
        style.dots(ax, xy.numpy(), 0.16 * score.numpy(), style.ORANGE, alpha=0.62)
    style.key(sheet, [(style.mark("o", style.ORANGE, 13), "important key"), *object_key(pictures)])
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], networks)


def top_keys(t: Trace) -> tuple[Float[Tensor, "k 2"], Float[Tensor, " k"]]:
    """Image pixels (x, y) and scores of the points that figure 5 shows; the scores of all points sum to 1."""
    scores = propagate(t)
    xy = torch.cat([t[name].points_xy(g) for name, score in scores.items() for g in range(len(score))])
    score = torch.cat([score.flatten() for score in scores.values()]) / len(scores)
    best = score.argsort(descending=True)[:TOP_KEYS]
    return xy[best], score[best]


# ----------------------------------------------------------------------------------------------- 6: the deformed points


def deformed_points(setting: Setting) -> Drawing:
    """Figure 6: where a deformable layer of each map has moved its points, from which grid."""
    pictures = setting.pictures(POINTS_OF, ("chelsea",))
    layers = [[record for record in last_of_each_map(trace(setting.subject.model, one.x))] for one in pictures]
    if setting.image is None:
        networks = setting.evaluations()
        measures = [
            share(kind, networks, setting.subject.name, layer=record.name, label=size_of(record))
            for record in layers[0]
            for kind in ("points", "attention")
        ]
    else:
        networks = {}
        measures = [
            unmasked(setting, f"mean move of a point in pixels, {size_of(record)}", lambda t, i=i: move(last_of_each_map(t)[i]))
            for i, record in enumerate(layers[0])
        ]
    groups = layers[0][0].groups
    drawn = "both groups" if groups == 2 else "one group" if groups > 2 else "all points"
    names = " and ".join(record.name for record in layers[0])
    caption = (
        f"Last deformable layer of each map ({names}), {drawn}. Area of a dot: the attention that the point gets, mean "
        f"over queries and heads; line: from its reference. {conditions(setting, pictures, measures)}"
    )
    labels = [f"{size_of(record)}\n{record.points.shape[1]} points" for record in layers[0]]
    alone = len(pictures) == 1
    shape = (1, len(labels)) if alone else (len(labels), len(pictures))
    names = {"column_labels": [label.replace("\n", ", ") for label in labels]} if alone else {"row_labels": labels}
    sheet = style.sheet(*shape, PLANS[6].title, caption, aspect=aspect_of(pictures), **names)
    panels = sheet.panels.T if alone else sheet.panels
    for j, picture in enumerate(pictures):
        for i, record in enumerate(layers[j]):
            ground(panels[i, j], picture)
            draw_points(panels[i, j], record)
    marks = [(style.mark("o", style.ORANGE), "points of group 1"), (style.mark("o", style.BLUE), "of group 2")]
    marks = marks[: 2 if groups == 2 else 1]
    rings = style.mark("o", "none", 6, markeredgecolor="#777777", markeredgewidth=1.2)
    style.key(sheet, [*marks, (rings, "reference grid"), *object_key(pictures)])
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], networks)


def last_of_each_map(t: Trace) -> list[Record]:
    """The last deformable layer on each map, finest first as they run."""
    return list({record.query_shape: record for record in t.of_kind("deformable")}.values())


def draw_points(ax: Axes, record: Record) -> None:
    """References, points and the attention they get: of both groups, or of the first where there are more."""
    style.rings(ax, record.references_xy().numpy())
    for g in range(record.groups if record.groups <= 2 else 1):
        xy = record.points_xy(g).numpy()
        heads = [received(record, m) for m in range(record.heads) if record.group(m) == g]
        style.lines(ax, record.references_xy().numpy(), xy, style.GROUPS[g])
        style.dots(ax, xy, INK * torch.stack(heads).mean(dim=0).numpy(), style.GROUPS[g])


# ------------------------------------------------------------------------------------------------ 7: what queries read


def attention(setting: Setting) -> Drawing:
    """Figure 7: what a query on the object and one off it read in a deformable layer, and in windows."""
    pictures = setting.pictures(QUERIES_OF, ("flower",))
    label, other = windowed(setting)
    traces = [(trace(setting.subject.model, one.x), trace(other.model, one.x)) for one in pictures]
    pairs = [compared(*both) for both in traces]
    deformable, window = pairs[0]
    if setting.image is None:
        networks = setting.evaluations()
        measures = [share("attention", networks, setting.subject.name, layer=deformable.name, label="DAT")]
        windows = {label: other.model, f"{label}, {RANDOM}": setting.twin(other)}
        found = {key: setting.evaluation(key, model, [window.name]) for key, model in windows.items()}
        networks |= found
        measures += [share("attention", found, label, layer=window.name, label=label)]
    else:
        networks, name = {}, "mean distance from query to key in pixels"
        measures = [
            unmasked(setting, f"{name}, DAT", lambda t: reach(t[deformable.name])),
            unmasked(setting, f"{name}, {label}", lambda t: reach(t[window.name]), other),
        ]
    where = "on and off the object" if pictures[0].mask is not None else "at the key of highest score (figure 5) and far off"
    caption = (
        f"Queries {where}. DAT: {deformable.name}, the last deformable layer of a "
        f"{size_of(deformable)}, all groups. {label}: {window.name}, the last layer whose window is smaller than its map "
        f"(dashed: what the query may read). Area of a dot: attention, mean over heads, to the same scale. "
        f"{conditions(setting, pictures, measures)}"
    )
    asked = ["query on the object", "query off it"] if pictures[0].mask is not None else ["first query", "second query"]
    if len(pictures) == 1:
        shape, names = (2, 2), {"row_labels": ["DAT", label], "column_labels": asked}
    else:
        shape = (4, len(pictures))
        names = {"row_labels": [f"{who}\n{query}" for query in asked for who in ("DAT", label)]}
    sheet = style.sheet(*shape, PLANS[7].title, caption, aspect=aspect_of(pictures), **names)
    panels = sheet.panels.T.reshape(4, 1) if len(pictures) == 1 else sheet.panels
    for j, (picture, (t, _), pair) in enumerate(zip(pictures, traces, pairs, strict=True)):
        for i, query in enumerate(queries(picture, t)):
            for k, record in enumerate(pair):
                ground(panels[2 * i + k, j], picture)
                draw_query(panels[2 * i + k, j], record, *query)
    marks = [(style.mark("*", style.RED, 16, markeredgecolor="white"), "query"), (style.mark("o", style.ORANGE, 11), "key")]
    style.key(sheet, [*marks, *object_key(pictures)])
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story, other.story], networks)


def windowed(setting: Setting) -> tuple[str, Subject]:
    """What stands beside DAT: a Swin that was trained like it; for other weights the model's own window layers."""
    if setting.subject.shipped:
        return "Swin", load_subject(name=SWIN)
    return "Own windows", setting.subject


def compared(t: Trace, other: Trace) -> tuple[Record, Record]:
    """A deformable and a window layer of the same stride if there are: the last ones, as long as windows are windows.

    In the last stage one window often covers the whole map: that is dense attention.
    """
    windows = [record for record in other.of_kind("window") if record.window != record.query_shape]
    window = (windows or other.of_kind("window"))[-1]
    deformable = t.of_kind("deformable")
    return ([record for record in deformable if record.stride == window.stride] or deformable)[-1], window


def queries(picture: Picture, t: Trace) -> list[tuple[float, float]]:
    """Two image pixels (row, col): one on the object, one far off it.

    On: the object's pixel that is nearest to its centroid. Off: of a grid of 8 x 8 pixels the one whose nearest pixel
    of the object is farthest. Where the object is unknown, the key of highest score stands for it.
    """
    H, W = picture.shape
    if picture.mask is None:
        x, y = top_keys(t)[0][0].tolist()
        there = torch.tensor([[min(max(y, 0), H - 1), min(max(x, 0), W - 1)]])
    else:
        h, w = picture.mask.shape
        there = (torch.from_numpy(picture.mask[::4, ::4]).nonzero() * 4 + 0.5) * torch.tensor([H / h, W / w]) - 0.5
        there = there.clamp(min=0)
    on = there[(there - there.mean(dim=0)).norm(dim=1).argmin()]
    grid = torch.cartesian_prod((torch.arange(8) + 0.5) * H / 8 - 0.5, (torch.arange(8) + 0.5) * W / 8 - 0.5)
    off = grid[torch.cdist(grid, there).min(dim=1).values.argmax()]
    return [tuple(on.tolist()), tuple(off.tolist())]


def draw_query(ax: Axes, record: Record, row: float, col: float) -> None:
    """The query, what it may read, and its attention, the mean over the heads, as dots."""
    keys = [record.keys(row, col, m) for m in range(record.heads)]
    if record.kind == "window":
        style.frame(ax, keys[0].xy.numpy(), record.stride)
        xy, weight = keys[0].xy, torch.stack([one.weight for one in keys]).mean(dim=0)
    else:
        xy, weight = torch.cat([one.xy for one in keys]), torch.cat([one.weight for one in keys]) / record.heads
        xy, same = xy.unique(dim=0, return_inverse=True)  # the heads of a group share their points
        weight = torch.zeros(len(xy)).index_add(0, same, weight)
    style.dots(ax, xy.numpy(), 2 * INK * weight.numpy(), style.ORANGE)
    style.star(ax, col, row)


# ----------------------------------------------------------------------------------------------------- what they share


def ground(ax: Axes, picture: Picture) -> None:
    """The photograph, with the object's outline if it is known."""
    style.photograph(ax, picture.shown, picture.shape)
    if picture.mask is not None:
        style.outline(ax, picture.mask, picture.shape)


def object_key(pictures: Sequence[Picture]) -> list:
    """The outline's place in the key, where there is one."""
    if all(picture.mask is None for picture in pictures):
        return []
    return [(style.edge_mark(), "edge of the object (not shown to the model)")]


def aspect_of(pictures: Sequence[Picture]) -> float:
    """Height over width of the panels: a user's photograph keeps its own."""
    h, w = pictures[0].shown.shape[:2]
    return h / w


def size_of(record: Record) -> str:
    return "{} × {} map".format(*record.query_shape)


def share(
    kind: str, networks: dict[str, dict], trained: str, name: str | None = None, layer: str | None = None, label: str = ""
) -> dict[str, Any]:
    """A share on the object as a measure: of a layer, or of the whole network."""
    values = {key: one if layer is None else one["layers"][layer] for key, one in networks.items()}
    own = values[trained]
    return {
        "name": name or f"{NAMES[kind]}, {label}",
        "trained": own[kind],
        "random": {key: value[kind] for key, value in values.items() if RANDOM in key},
        "other": own[f"{kind}_other"],
        "standard_error": own[f"{kind}_se"],
        "layer": layer,
        "n": networks[trained]["n"],
    }


def unmasked(setting: Setting, name: str, value: Callable[[Trace], float], subject: Subject | None = None) -> dict:
    """A measure that needs no mask, on the user's photograph."""
    networks = {RANDOM: setting.twin(subject)} if subject else setting.twins
    return {
        "name": name,
        "trained": value(trace((subject or setting.subject).model, setting.own.x)),
        "random": {key: value(trace(network, setting.own.x)) for key, network in networks.items()},
        "other": None,
        "n": 1,
    }


def conditions(setting: Setting, pictures: Sequence[Picture], measures: Sequence[dict]) -> str:
    """Weights, images, size, seed, and what was measured beside its nulls, as the end of a caption."""
    story, (H, W) = setting.subject.story, pictures[0].shape
    made = [f"{key} {story[key]}" for key in ("seed", "steps") if key in story]
    text = f"Weights: {story['file']}{' (' + ', '.join(made) + ')' if made else ''}, {setting.subject.name} at {H} × {W}. "
    if setting.image is None:
        indices = ", ".join(one.name.removeprefix("test image ") for one in pictures if one.mask is not None)
        unmeasured = [one.name for one in pictures if one.mask is None]
        text += f"Test images {indices}"
        text += f"; {' and '.join(unmeasured)}, not measured" if unmeasured else ""
        text += f". Means over {measures[0]['n']} test images: "
    else:
        text += f"Photograph: {pictures[0].name}, for which there is no mask. "
    return text + "; ".join(map(in_words, measures)) + f". Random weights: seed {setting.seed}."


def in_words(one: dict[str, Any]) -> str:
    random = " / ".join(f"{value:.2f}" for value in one["random"].values())
    other = "" if one["other"] is None else f", another image's mask {one['other']:.2f}"
    return f"{one['name']} {one['trained']:.2f} (random weights {random}{other})"


def of_the_subject(setting: Setting) -> list[str]:
    return [] if setting.image is not None else [setting.subject.name, *setting.twins]


PLANS = {
    4: Plan("offset_range", "Figure 4 · Accuracy and attention over the offset range s", offset_range,
            lambda setting: [*sweep(), LARGEST], of_many=True),
    5: Plan("important_keys", "Figure 5 · The most important keys of all deformable layers", important_keys,
            of_the_subject),
    6: Plan("deformed_points", "Figure 6 · Deformed points, and the grid they start from", deformed_points,
            of_the_subject),
    7: Plan("attention", "Figure 7 · What two queries read: deformed points, or a window", attention,
            lambda setting: [] if setting.image is not None else [*of_the_subject(setting), "windows", "its twin"]),
}  # fmt: skip
