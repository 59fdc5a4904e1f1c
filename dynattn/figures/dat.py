"""The figures of DAT (Xia et al., CVPR 2022): what the offset range does, where points go, and what queries read.

Layers are found by their records, never by their names: any model with deformable layers can be drawn, at any size.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor, nn

from dynattn.data import normalise
from dynattn.tracing import Record, Trace, trace

from . import style, sweep
from .drawing import (
    NAMES,
    aspect_of,
    compared,
    conditions,
    ground,
    object_key,
    of_layers,
    of_the_subject,
    queries,
    share,
    size_of,
    unmasked,
)
from .measures import evaluate_points, image_share, move, propagate, reach, received
from .run import Drawing, Paper, Plan, Setting
from .subjects import RANDOM, SEED, Subject, load_subject
from .tables import ALL, NETWORK, Measure, at, joined, summary

# Test images, chosen for a spread of classes, places and backgrounds, not by what a model makes of them.
SWEEP_OF, KEYS_OF, POINTS_OF, QUERIES_OF = (19,), (8, 7, 19, 13, 25, 10), (1, 9, 22, 27), (24, 7)
SWIN = "swin_mini"
TOP_KEYS = 40
NOTHING = 1e-6  # a mask of -100 leaves less
SWEEP_COUNTS = 500, 100  # test images that accuracy and attention are measured on for each s
INK = 0.06  # share of a panel that all attention of one distribution covers with its dots
LARGEST, ZERO = f"{RANDOM}, largest s", f"{RANDOM}, offsets of zero"


def twins(setting: Setting) -> dict[str, nn.Module]:
    """Random networks like the subject: as it starts training and, where that is with offsets of zero, without."""
    start = setting.twin(setting.subject)
    record = trace(start, torch.zeros(3, *setting.subject.size)).of_kind("deformable")[0]
    if not torch.equal(*torch.broadcast_tensors(record.points, record.references)):
        return {RANDOM: start}
    return {RANDOM: setting.twin(setting.subject, offset_zero_init=False), ZERO: start}


# --------------------------------------------------------------------------------------------- 4: the range of offsets


def ranges() -> dict[str, list[Subject]]:
    """The networks that differ in their offset range s alone, in its order."""
    found: dict[float, list[Subject]] = {}
    for subject in PLANS[4].subjects():
        found.setdefault(subject.arguments["offset_range"], []).append(subject)
    return {f"s = {s:g}": found[s] for s in sorted(found)}


def swept(setting: Setting | None = None) -> sweep.Sweep:
    """Figure 4's sweep; the random network, with the largest range, is made where there is a setting."""
    columns = ranges()
    largest = list(columns.values())[-1][0]
    twin = setting.twin(largest, offset_zero_init=False) if setting else None
    layers_alone = lambda table: table[table.layer != NETWORK]  # noqa: E731
    return sweep.Sweep(columns, {LARGEST: twin}, "attention", layers_alone, SWEEP_COUNTS)


def offset_range(setting: Setting) -> Drawing:
    """Figure 4: accuracy over the range s that scales the offsets, and with it the attention on the object."""
    first = [subjects[0] for subjects in ranges().values()]
    setting = replace(setting, subject=first[0])  # its size decides that of the images
    compared_here = swept(setting)
    found = sweep.measure(setting, compared_here)
    (picture,) = setting.pictures(SWEEP_OF)
    traces = [trace(subject.model, picture.x) for subject in first]
    finest = [record.name for record in by_map(traces[0])[0]]
    tables = [found.tables[name] for column in compared_here.named.values() for name in column]
    attention = summary(pd.concat(tables)).value.xs((ALL, "attention"), level=("head", "kind"))
    layer = attention[finest].idxmax()
    n, count = SWEEP_COUNTS
    labels = list(compared_here.columns)
    caption = (
        f"{verdict(labels, found)} Networks at {picture.shape[0]} × {picture.shape[1]}, seed {compared_here.seeds}: "
        f"{sweep.errors_of(compared_here)}. Accuracy: {n} test images; attention: {count}, the mean of all deformable "
        f"layers; random weights give {found.shares[0].random[LARGEST]:.2f}. Photographs: {picture.name}, {layer}; "
        f"area of a dot: attention received."
    )
    sheet = style.sheet(1, len(labels), PLANS[4].title, caption, column_labels=labels, plots=2)
    for ax, t in zip(sheet.panels[0], traces, strict=True):
        ground(ax, picture)
        draw_points(ax, t[layer])
    sweep.plot(sheet.plots[0], found.accuracies, "accuracy, %", 100)
    sweep.plot(sheet.plots[1], found.shares, "attention\non the object", from_zero=True)
    style.baseline(sheet.plots[1], np.array([share.other for share in found.shares]), "another image's mask")
    style.key(sheet, [*points_key(traces[0][layer]), *object_key([picture])])
    measures = found.accuracies + found.shares
    return Drawing(sheet.figure, caption, [picture], measures, compared_here.stories, found.tables)


def verdict(labels: Sequence[str], found: sweep.Found) -> str:
    """Whether any offset range is better than none, in one sentence."""
    better = []
    for name, measures in {"accuracy": found.accuracies, "attention on the object": found.shares}.items():
        for label, measure in zip(labels[1:], measures[1:], strict=True):
            apart, error = sweep.difference(measures[0], measure)
            better += [f"{label} in {name}"] * (apart > 2 * error)
    if not better:
        return f"At this size no range is better than {labels[0]} by more than two standard errors."
    return f"Better than {labels[0]} by more than two standard errors: {', '.join(better)}."


# ----------------------------------------------------------------------------------------------- 5: the important keys


def important_keys(setting: Setting) -> Drawing:
    """Figure 5: the deformed points of all deformable layers that get most of the propagated attention."""
    pictures = setting.pictures(KEYS_OF, ("chelsea", "flower"))
    columns = min(4, len(pictures))
    traces = [trace(setting.subject.model, picture.x) for picture in pictures]
    if setting.image is None:
        networks = setting.evaluations()
        measures = [share("propagated", setting.table(), setting.subject.name)]
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
    sheet = style.sheet(rows, columns, PLANS[5].title, caption, compared(measures), aspect=aspect_of(pictures))
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
    traces = [trace(setting.subject.model, picture.x) for picture in pictures]
    found = setting.trained() if setting.subject.knows_shapes else None
    names = [choose(records, found, "points") for records in by_map(traces[0])]
    layers = [[t[name] for name in names] for t in traces]
    if setting.image is None:
        networks, moved = setting.evaluations(), moved_by_image(setting, layers[0])
        measures = []
        for record in layers[0]:
            table = at(setting.table(), record.name)
            about = (setting.subject.name, size_of(record))
            measures += [share(kind, table, *about, layer=record.name) for kind in ("points", "attention")]
            measures.append(moved[record.name])
    else:
        networks, name = {}, "mean move of a point in pixels"
        measures = [
            unmasked(setting, f"{name}, {size_of(record)}", lambda t, name=record.name: move(t[name]))
            for record in layers[0]
        ]
    groups = layers[0][0].groups
    caption = (
        f"{' and '.join(names)}: of each map the deformable layer {chosen_by(found, 'points', setting)}"
        f"{', the first of its groups' * (groups > 2)}. Area of a dot: attention received, mean over queries and "
        f"heads. {in_words(measures)}{conditions(setting, pictures, measures)}"
    )
    labels = [f"{size_of(record)}\n{record.points.shape[1]} points" for record in layers[0]]
    alone = len(pictures) == 1
    shape = (1, len(labels)) if alone else (len(labels), len(pictures))
    beside = {"column_labels": [label.replace("\n", ", ") for label in labels]} if alone else {"row_labels": labels}
    sheet = style.sheet(*shape, PLANS[6].title, caption, compared(measures), aspect=aspect_of(pictures), **beside)
    panels = sheet.panels.T if alone else sheet.panels
    for j, picture in enumerate(pictures):
        for i, record in enumerate(layers[j]):
            ground(panels[i, j], picture)
            draw_points(panels[i, j], record)
    style.key(sheet, [*points_key(layers[0][0]), *object_key(pictures)])
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], networks)


def moved_by_image(setting: Setting, records: Sequence[Record]) -> dict[str, Measure]:
    """Of each layer: how much of the squared offsets is not the same for every image, and what random weights give."""
    networks = {setting.subject.name: setting.subject.model} | setting.other_seeds | setting.twins
    shares = {}
    for network, model in networks.items():
        traces = [trace(model, normalise(torch.from_numpy(np.array(image)))) for image in setting.few]
        for name in (record.name for record in records):
            offsets = torch.stack([t[name].points - t[name].references for t in traces])
            shares.setdefault(name, {})[network] = image_share(offsets)[0]
    return {
        record.name: Measure(
            name=f"{NAMES['image']}, {size_of(record)}",
            trained=shares[record.name][setting.subject.name],
            random={network: value for network, value in shares[record.name].items() if RANDOM in network},
            n=len(setting.few),
            seeds={network: value for network, value in shares[record.name].items() if network.startswith(SEED)},
            layer=record.name,
        )
        for record in records
    }


def in_words(measures: Sequence[Measure]) -> str:
    """Which part of the moves depends on the image, in a sentence; nothing where it was not measured."""
    found = [measure for measure in measures if measure.name.startswith(NAMES["image"])]
    if not found:
        return ""
    parts = [f"{100 * measure.trained:.0f} % on the {measure.name.partition(', ')[2]}" for measure in found]
    return (
        f"The part of the squared length of the offsets that depends on the image is {' and '.join(parts)} "
        f"({found[0].n} images); the rest is the same move for every image. "
    )


def by_map(t: Trace) -> list[list[Record]]:
    """The deformable layers, those of one map together."""
    layers = t.of_kind("deformable")
    return [
        [record for record in layers if record.query_shape == shape]
        for shape in dict.fromkeys(record.query_shape for record in layers)
    ]


def choose(layers: Sequence[Record], found: pd.DataFrame | None, kind: str) -> str:
    """Which of a map's layers to draw: the one that finds the object best; the last, as in the paper, if unmeasured."""
    if found is None:
        return layers[-1].name
    ratio = (found.value / found.other).xs((ALL, kind), level=("head", "kind"))
    return ratio[[record.name for record in layers]].idxmax()


def chosen_by(found: pd.DataFrame | None, kind: str, setting: Setting) -> str:
    """The rule of `choose` in words; a photograph of one's own has no mask that could choose."""
    if found is None:
        return "that comes last"
    rule = f"with most {kind} on the object, relative to another image's mask"
    return rule if setting.image is None else f"that had, on test images, {rule.removeprefix('with ')}"


def draw_points(ax: Axes, record: Record) -> None:
    """References, points and the attention they get: of both groups, or of the first where there are more."""
    style.rings(ax, record.references_xy().numpy())
    for g in range(record.groups if record.groups <= 2 else 1):
        xy = record.points_xy(g).numpy()
        heads = [received(record, m) for m in range(record.heads) if record.group(m) == g]
        style.lines(ax, record.references_xy().numpy(), xy, style.GROUPS[g])
        style.dots(ax, xy, INK * torch.stack(heads).mean(dim=0).numpy(), style.GROUPS[g])


def points_key(record: Record) -> list:
    """What the marks of `draw_points` mean."""
    marks = [(style.mark("o", colour), f"points of group {g + 1}") for g, colour in enumerate(style.GROUPS)]
    rings = style.mark("o", "none", 6, markeredgecolor="#777777", markeredgewidth=1.2)
    return [*marks[: 2 if record.groups == 2 else 1], (rings, "reference grid")]


# ------------------------------------------------------------------------------------------------ 7: what queries read


def attention(setting: Setting) -> Drawing:
    """Figure 7: what a query on the object and one off it read in a deformable layer, and in windows."""
    pictures = setting.pictures(QUERIES_OF, ("flower",))
    label, other = windowed(setting)
    beside_name = network_beside(setting)
    traces = [(trace(setting.subject.model, picture.x), trace(other.model, picture.x)) for picture in pictures]
    layers, windows = beside(*traces[0])
    candidates = [record.name for record in windows]
    found = found_windows = None
    if setting.subject.knows_shapes:
        found, found_windows = setting.trained(), setting.recorded(other)
        if found_windows is None:
            found_windows = summary(setting.evaluation(beside_name, other.model, layers=candidates))
    names = choose(layers, found, "attention"), choose(windows, found_windows, "attention")
    if setting.image is None:
        networks = setting.evaluations()
        others = {beside_name: other.model, f"{beside_name}, {RANDOM}": setting.twin(other)}
        others = {name: setting.evaluation(name, model, layers=candidates) for name, model in others.items()}
        own, windowed_own = at(joined(networks), names[0]), at(joined(others), names[1])
        measures = [
            share("attention", own, setting.subject.name, "DAT", layer=names[0]),
            share("attention", windowed_own, beside_name, label, layer=names[1]),
        ]
        networks |= others
    else:
        networks, name = {}, "mean distance from query to key in pixels"
        measures = [
            unmasked(setting, f"{name}, DAT", lambda t: reach(t[names[0]])),
            unmasked(setting, f"{name}, {label}", lambda t: reach(t[names[1]]), other),
        ]
    caption = (
        f"DAT: {names[0]}, {label}: {names[1]}; each of its layers on the {size_of(windows[0])} (the last with several "
        f"windows) the one {chosen_by(found, 'attention', setting)}. Area of a dot: attention, mean over heads, at the "
        f"same scale. {conditions(setting, pictures, measures)}"
    )
    asked = (
        ["query on object", "in background"]
        if pictures[0].mask is not None
        else ["query at the centre", "off the centre"]
    )
    labels = {"row_labels": ["DAT", label], "column_labels": asked * len(pictures)}
    shape = (2, 2 * len(pictures))
    sheet = style.sheet(
        *shape, PLANS[7].title, caption, compared(measures), aspect=aspect_of(pictures), together=2, **labels
    )
    for j, (picture, pair) in enumerate(zip(pictures, traces, strict=True)):
        for i, record in enumerate(t[name] for t, name in zip(pair, names, strict=True)):
            for k, query in enumerate(queries(picture)):
                ground(sheet.panels[i, 2 * j + k], picture)
                draw_query(sheet.panels[i, 2 * j + k], record, *query)
    marks = [
        (style.mark("*", style.RED, 16, markeredgecolor="white"), "query"),
        (style.mark("o", style.ORANGE, 11), "what it reads"),
        (style.window_mark(), "its window"),
    ]
    style.key(sheet, [*marks, *object_key(pictures)])
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story, other.story], networks)


def windowed(setting: Setting) -> tuple[str, Subject]:
    """What stands beside DAT: a Swin that was trained like it; for other weights the model's own window layers."""
    if setting.subject.shipped:
        return "Swin", load_subject(name=SWIN)
    return "DAT's windows", setting.subject


def network_beside(setting: Setting) -> str:
    """The name of that network in tables; the subject's own windows are measured apart from its deformable layers."""
    label, other = windowed(setting)
    return label if other is setting.subject else other.name


def beside(t: Trace, other: Trace) -> tuple[list[Record], list[Record]]:
    """Deformable layers of one and window layers of the other network on the last map that has several windows.

    One window for all, as in many a last stage, is dense attention. Where no map has both, the last of each.
    """
    windows = [record for record in other.of_kind("window") if record.window != record.query_shape]
    last = (windows or other.of_kind("window"))[-1]
    maps = by_map(t)
    deformable = next((layers for layers in maps if layers[0].stride == last.stride), maps[-1])
    return deformable, [record for record in windows or [last] if record.query_shape == last.query_shape]


def draw_query(ax: Axes, record: Record, row: float, col: float) -> None:
    """The query (its cell's centre), the window it may read, and its attention, the mean over the heads, as dots."""
    keys = [record.keys(row, col, m) for m in range(record.heads)]
    xy, same = torch.cat([read.xy for read in keys]).unique(dim=0, return_inverse=True)  # heads share their positions
    weight = torch.zeros(len(xy)).index_add(0, same, torch.cat([read.weight for read in keys]).float()) / record.heads
    xy, weight = xy[weight > NOTHING], weight[weight > NOTHING]
    if record.kind == "window":
        style.window(ax, xy.numpy(), record.stride)
    style.dots(ax, xy.numpy(), 2 * INK * weight.numpy(), style.ORANGE)
    style.star(ax, *record.cells()[record.query(row, col)].tolist())


# ------------------------------------------------------------------------------------------------ what is measured


def of_the_sweep(setting: Setting) -> dict[str, int]:
    """The networks that figure 4 measures, and on how many images."""
    return sweep.networks_of(swept())


def with_windows(setting: Setting) -> dict[str, int]:
    """Those of figure 7, with what stands beside DAT."""
    name, (_, other) = network_beside(setting), windowed(setting)
    chosen = {name: setting.count} if setting.subject.knows_shapes and setting.recorded(other) is None else {}
    beside_it = {} if setting.image is not None else dict.fromkeys([name, f"{name}, {RANDOM}"], setting.count)
    return of_layers(setting) | chosen | beside_it


PLANS = {
    4: Plan(
        "offset_range",
        "Figure 4 · Accuracy and attention over the offset range s",
        offset_range,
        of_the_sweep,
        compares="dat_sweep_s",
    ),
    5: Plan(
        "important_keys", "Figure 5 · The most important keys of all deformable layers", important_keys, of_the_subject
    ),
    6: Plan("deformed_points", "Figure 6 · Deformed points, and the grid they start from", deformed_points, of_layers),
    7: Plan("attention", "Figure 7 · What two queries read: deformed points, or a window", attention, with_windows),
}
PAPER = Paper(
    "DAT",
    shipped="dat_mini",
    kind="deformable",
    evaluate=evaluate_points,
    twins=twins,
    random=("with random offsets", "with offsets of zero, as training starts"),
    plans=PLANS,
)
