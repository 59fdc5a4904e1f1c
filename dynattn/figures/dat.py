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
from torch import Tensor

from dynattn import weights
from dynattn.tracing import Record, Trace, trace
from dynattn.training import evaluate

from . import style
from .measures import move, propagate, reach, received
from .subjects import RANDOM, Picture, Setting, Subject, load_subject

# Test images, chosen by their index for a spread of classes, places and backgrounds, before any model was trained.
SWEEP_OF, KEYS_OF, POINTS_OF, QUERIES_OF = (19,), (8, 7, 19, 13, 25, 10), (1, 9, 22, 27), (24, 11, 7, 28)
SWEEP, SWIN = "dat_sweep_s", "swin_mini"
TOP_KEYS = 40
NOTHING = 1e-6  # a mask of -100 leaves less
SWEEP_COUNTS = 500, 100  # test images that accuracy and attention are measured on for each s
INK = 0.05  # share of a panel that all attention of one distribution covers with its dots
LARGEST = f"{RANDOM}, largest s"
NAMES = {
    "points": "points on the object",
    "attention": "attention on the object",
    "propagated": "propagated attention on the object",
}


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
    """How a figure is made: the stem of its file, its title, its function, and which networks it measures on how many images.
    """

    stem: str
    title: str
    draw: Callable[[Setting], Drawing]
    networks: Callable[[Setting], dict[str, int]]
    of_many: bool = False  # compares several models on many images, so that it takes neither an image nor weights


# --------------------------------------------------------------------------------------------- 4: the range of offsets


def sweep() -> dict[str, Subject]:
    """The shipped models that differ in their offset range s alone, in its order.

    Raises FileNotFoundError where there are none.
    """
    names = [name for name in weights.available() if name.startswith(SWEEP)]
    if not names:
        raise FileNotFoundError(f"only: figure 4 needs checkpoints {SWEEP}*.safetensors in {weights.FOLDER}")
    subjects = {one.arguments["offset_range"]: one for one in (load_subject(weights.path(name)) for name in names)}
    return {f"s = {s:g}": subjects[s] for s in sorted(subjects)}


def offset_range(setting: Setting) -> Drawing:
    """Figure 4: accuracy over the range s that scales the offsets, and with it the attention on the object."""
    subjects = sweep()
    n, count = SWEEP_COUNTS
    images, labels, _ = (part[:n] for part in setting.test_set)
    found = {s: setting.evaluation(s, subject.model, count=count) for s, subject in subjects.items()}
    accuracy = np.array([evaluate(subject.model, images, labels)[0] for subject in subjects.values()])
    shares = {
        kind: np.array([one[kind] for one in found.values()])
        for kind in ("attention", "attention_se", "attention_other")
    }
    twin = setting.twin(list(subjects.values())[-1], offset_zero_init=False)
    networks = found | {LARGEST: setting.evaluation(LARGEST, twin, count=count)}
    chance = {LARGEST: networks[LARGEST]["accuracy"]}
    measures = [
        dict(name=f"accuracy, {s}", trained=float(value), random=chance, other=None, n=n)
        for s, value in zip(subjects, accuracy, strict=True)
    ] + [share("attention", networks, s, s) for s in subjects]

    (picture,) = setting.pictures(SWEEP_OF)
    seeds = ", ".join(map(str, sorted({subject.story["seed"] for subject in subjects.values()})))
    caption = (
        f"One network for each s, seed {seeds}: what another seed would change is not in the bars (standard errors: "
        f"binomial over {n} test images, and over the {count} on which attention is measured, the mean of all "
        f"deformable layers). Random weights: {networks[LARGEST]['attention']:.2f}. Photographs: {picture.name}, last "
        f"deformable layer of the finest map; area of a dot: attention received."
    )
    sheet = style.sheet(1, len(subjects), PLANS[4].title, caption, column_labels=list(subjects), strips=2)
    for ax, subject in zip(sheet.panels[0], subjects.values(), strict=True):
        ground(ax, picture)
        record = last_of_each_map(trace(subject.model, picture.x))[0]
        draw_points(ax, record)
    style.series(sheet.plots[0], 100 * accuracy, 100 * (accuracy * (1 - accuracy) / n) ** 0.5, "accuracy, %")
    style.series(
        sheet.plots[1], shares["attention"], shares["attention_se"], "attention\non the object", from_zero=True
    )
    style.baseline(sheet.plots[1], shares["attention_other"], "another image's mask")
    style.key(sheet, [*points_key(record), *object_key([picture])])
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
        measures = [share("propagated", networks, setting.subject.name)]
    else:
        networks, name = {}, f"propagated attention on the {TOP_KEYS} keys drawn"
        measures = [unmasked(setting, name, lambda t: float(top_keys(t)[1].sum()))]
    layers = traces[0].of_kind("deformable")
    caption = (
        f"The {TOP_KEYS} of {sum(record.points[..., 0].numel() for record in layers)} points, of all {len(layers)} "
        f"deformable layers and all heads, that get most attention when it is propagated from the output; area of a "
        f"circle: how much. {conditions(setting, pictures, measures)}"
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
            share(kind, networks, setting.subject.name, size_of(record), record.name)
            for record in layers[0]
            for kind in ("points", "attention")
        ]
    else:
        networks, name = {}, "mean move of a point in pixels"
        measures = [
            unmasked(setting, f"{name}, {size_of(record)}", lambda t, name=record.name: move(t[name]))
            for record in layers[0]
        ]
    groups = layers[0][0].groups
    caption = (
        f"The last deformable layer of each map{', the first of its groups' * (groups > 2)}. Area of a dot: attention "
        f"received, mean over queries and heads. {conditions(setting, pictures, measures)}"
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
    style.key(sheet, [*points_key(layers[0][0]), *object_key(pictures)])
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
        measures = [share("attention", networks, setting.subject.name, "DAT", deformable.name)]
        windows = {label: other.model, f"{label}, {RANDOM}": setting.twin(other)}
        found = {key: setting.evaluation(key, model, [window.name]) for key, model in windows.items()}
        networks |= found
        measures += [share("attention", found, label, label, window.name)]
    else:
        networks, name = {}, "mean distance from query to key in pixels"
        measures = [
            unmasked(setting, f"{name}, DAT", lambda t: reach(t[deformable.name])),
            unmasked(setting, f"{name}, {label}", lambda t: reach(t[window.name]), other),
        ]
    where = "" if pictures[0].mask is not None else "First query: the key of highest score (figure 5). "
    caption = (
        f"{where}DAT: {deformable.name}, {size_of(deformable)}. {label}: {window.name}, {size_of(window)}, the last "
        f"layer whose windows do not cover all of it. Area of a dot: attention, mean over heads, at the same scale. "
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
    marks = [
        (style.mark("*", style.RED, 16, markeredgecolor="white"), "query"),
        (style.mark("o", style.ORANGE, 11), "key"),
        (style.frame_mark(), "window"),
    ]
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

    On: the object's pixel that is nearest to its centroid. Off: of a grid of 6 x 6 pixels, an eighth inside the image,
    the one whose nearest pixel of the object is farthest. Where the object is unknown, the key of highest score stands for it.
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
    grid = torch.cartesian_prod(*((torch.arange(1, 7) + 0.5) * side / 8 - 0.5 for side in (H, W)))
    off = grid[torch.cdist(grid, there).min(dim=1).values.argmax()]
    return [tuple(on.tolist()), tuple(off.tolist())]


def draw_query(ax: Axes, record: Record, row: float, col: float) -> None:
    """The query, the window it may read, and its attention, the mean over the heads, as dots."""
    keys = [record.keys(row, col, m) for m in range(record.heads)]
    xy, same = torch.cat([one.xy for one in keys]).unique(dim=0, return_inverse=True)  # heads share their positions
    weight = torch.zeros(len(xy)).index_add(0, same, torch.cat([one.weight for one in keys]).float()) / record.heads
    xy, weight = xy[weight > NOTHING], weight[weight > NOTHING]
    if record.kind == "window":
        style.frame(ax, xy.numpy(), record.stride)
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
    return [(style.edge_mark(), "the object (mask, not seen by the model)")]


def points_key(record: Record) -> list:
    """What the marks of `draw_points` mean."""
    marks = [(style.mark("o", colour), f"points of group {g + 1}") for g, colour in enumerate(style.GROUPS)]
    rings = style.mark("o", "none", 6, markeredgecolor="#777777", markeredgewidth=1.2)
    return [*marks[: 2 if record.groups == 2 else 1], (rings, "reference grid")]


def aspect_of(pictures: Sequence[Picture]) -> float:
    """Height over width of the panels: a user's photograph keeps its own."""
    h, w = pictures[0].shown.shape[:2]
    return h / w


def size_of(record: Record) -> str:
    return "{} × {} map".format(*record.query_shape)


def share(
    kind: str, networks: dict[str, dict], trained: str, label: str = "", layer: str | None = None
) -> dict[str, Any]:
    """A share on the object as a measure: of a layer, or of the whole network."""
    values = {key: one if layer is None else one["layers"][layer] for key, one in networks.items()}
    own = values[trained]
    return {
        "name": NAMES[kind] + (label and f", {label}"),
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
    text = f"{story['file']}{' (' + ', '.join(made) + ')' if made else ''} at {H} × {W}; "
    if setting.image is not None:
        text += f"{pictures[0].name}, of which there is no mask: "
    else:
        known = [one.name.removeprefix("test image ") for one in pictures if one.mask is not None]
        unknown = [one.name for one in pictures if one.mask is None]
        text += f"test images {', '.join(known)}" + "".join(f"; {name}, not measured" for name in unknown)
        text += f". Mean of {measures[0]['n']} test images, random weights of seed {setting.seed}: "
    return text + "; ".join(map(in_words, measures)) + "."


def in_words(one: dict[str, Any]) -> str:
    random = " or ".join(f"{value:.2f}" for value in one["random"].values())
    other = "" if one["other"] is None else f", another image's mask {one['other']:.2f}"
    return f"{one['name']} {one['trained']:.2f} (random {random}{other})"


def of_the_sweep(setting: Setting) -> dict[str, int]:
    """The networks that figure 4 measures, and on how many images."""
    return dict.fromkeys([*sweep(), LARGEST], SWEEP_COUNTS[1])


def of_the_subject(setting: Setting) -> dict[str, int]:
    """Those of figures 5 and 6: none on a user's photograph."""
    return {} if setting.image is not None else dict.fromkeys([setting.subject.name, *setting.twins], setting.count)


def with_windows(setting: Setting) -> dict[str, int]:
    """Those of figure 7, with what stands beside DAT."""
    label, _ = windowed(setting)
    subject = of_the_subject(setting)
    return subject and subject | dict.fromkeys([label, f"{label}, {RANDOM}"], setting.count)


PLANS = {
    4: Plan(
        "offset_range",
        "Figure 4 · Accuracy and attention over the offset range s",
        offset_range,
        of_the_sweep,
        of_many=True,
    ),
    5: Plan(
        "important_keys", "Figure 5 · The most important keys of all deformable layers", important_keys, of_the_subject
    ),
    6: Plan(
        "deformed_points", "Figure 6 · Deformed points, and the grid they start from", deformed_points, of_the_subject
    ),
    7: Plan("attention", "Figure 7 · What two queries read: deformed points, or a window", attention, with_windows),
}
