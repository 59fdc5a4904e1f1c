"""The figures of DGT (Liu et al., IJCAI 2022): groups of queries with the keys they select, and table 4b in small.

Layers and heads are found by their records and by what they measure, never by their names: any model with dynamic group
layers can be drawn, with any number of groups and keys.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor, nn

from dynattn import cost
from dynattn.tracing import Record, Trace, trace

from . import style, sweep
from .drawing import NAMES, aspect_of, compared, conditions, ground, object_key, of_layers, share, unmasked
from .measures import by_overlap, distances, entropy, evaluate_groups, window_distance
from .run import Drawing, Paper, Plan, Setting
from .subjects import RANDOM, SEED, Picture, Subject, random_twin
from .tables import OWN, Measure, at, best, joined, means, summary

# Test images, chosen for a spread of classes and backgrounds, not by what a model makes of them.
GROUPS_OF, PAIRS_OF, SWEEP_OF = (7, 19), (1, 22), (7,)
SHOWN = 3  # groups of a picture
BOXED = 0.16  # inches between panels with boxes around them
TWINS = 3  # random networks: the groups of one may happen to be few
SWEEP_COUNTS = 1000, 120  # test images that accuracy and groups are measured on for each network of table 4b
RULES = {
    "nmi": "where groups and object have the largest NMI",
    "keys": "where queries on the object have more keys on it than the others have, by the largest margin",
}
NEAREST = "the one nearest to the object (intersection over union), the one nearest to the rest"
MEASURED = "NMI: 2 I / (H + H') of an image's groups and its object; "


def twins(setting: Setting) -> dict[str, nn.Module]:
    """Random networks like the subject, of several seeds."""
    seeds, images = range(setting.seed, setting.seed + TWINS), setting.few
    return {f"{RANDOM}, {SEED}{seed}": random_twin(setting.subject, seed, images) for seed in seeds}


# ------------------------------------------------------------------------------------------- which head, which groups


def choose(t: Trace, found: pd.DataFrame | None, rule: str, layer: str | None = None) -> tuple[str, int]:
    """A layer, or the one that is given, and its head: by what was measured on images that are not measured otherwise.

    Without it the last layer, and the head whose groups are most even.
    """
    if found is not None:
        return chosen(found, rule, layer)
    name = layer or t.of_kind("dynamic_group")[-1].name
    sizes = [torch.bincount(groups, minlength=t[name].selected.shape[1]).double() for groups in t[name].groups]
    return name, int(torch.stack([entropy(size) for size in sizes]).argmax())


def chosen(found: pd.DataFrame, rule: str, layer: str | None = None) -> tuple[str, int]:
    """The (layer, head) that the images which choose have found by a rule, of all or within a layer."""
    return best(found.value.xs(f"choose_{rule}", level="kind"), layer)


def chosen_by(found: pd.DataFrame | None, rule: str) -> str:
    """The rule of `choose` in words."""
    if found is None:
        return "of the most even groups"
    images = int(found.n.xs("choose_nmi", level="kind").iloc[0])
    return f"{RULES[rule]}, on {images} test images set apart"


def first_layer(t: Trace) -> str:
    """The name of the first layer with groups: that of the first stage."""
    return t.of_kind("dynamic_group")[0].name


def at_head(table: pd.DataFrame, rule: str, layer: str | None) -> pd.DataFrame:
    """A network's rows of its own head, chosen by a rule in one layer or in all."""
    return at(table, *chosen(summary(table), rule, layer))


def at_heads(tables: dict[str, pd.DataFrame], rule: str, layer: str | None) -> pd.DataFrame:
    """The same of several networks, as one table."""
    return joined({network: at_head(table, rule, layer) for network, table in tables.items()})


def measures_of(setting: Setting, rule: str, layer: str | None, t: Trace, place: tuple[str, int]) -> list[Measure]:
    """What a figure of groups measures: of the images with masks, or of the user's photograph.

    Of each network its own head, by the same rule.
    """
    name, head = place
    record, where = t[name], f"{name}, head {head}"
    if setting.image is not None:
        even = lambda t: float(entropy(torch.bincount(t[name].groups[head]).double()).exp())  # noqa: E731
        far = unmasked(setting, NAMES["distance"], lambda t: distances(t[name])[head])
        return [
            replace(far, window=window_distance(record)),
            unmasked(setting, f"number of groups (e to the entropy), of {record.selected.shape[1]}", even),
        ]
    subject = setting.subject.name
    heads = at_heads(setting.evaluations(), rule, layer)
    limit = float(means(heads, "keys_limit").value[subject, OWN])
    return [
        share("nmi", heads, subject, layer=where),
        share("keys", heads, subject, layer=where, limit=limit),
        share("keys_off", heads, subject, layer=where),
        share("distance", heads, subject, layer=where, window=window_distance(record)),
    ]


# ------------------------------------------------------------------------------------------------------------- drawing


def queries_of(record: Record, head: int, g: int) -> Int[Tensor, " i"]:
    """Which cells' queries are in a group."""
    return (record.groups[head] == g).nonzero()[:, 0]


def draw_cells(ax: Axes, record: Record, cells: Int[Tensor, " i"], colour: str, alpha: float = 0.6) -> None:
    """Some cells of a layer's map, as a region."""
    there = np.zeros(record.query_shape, dtype=bool)
    there.flat[cells.numpy()] = True
    style.squares(ax, there, record.stride, colour, alpha=alpha)


def draw_pair(
    panels: Sequence[Axes], record: Record, head: int, g: int, weights: Float[Tensor, "L n"], colour: str
) -> None:
    """A group's queries on one panel; on the other its keys, with the attention they get from these queries."""
    queries, cells = queries_of(record, head, g), record.cells()[record.selected[head, g]]
    draw_cells(panels[0], record, queries, colour)
    style.keys(panels[1], cells.numpy(), weights[queries].mean(dim=0).numpy(), record.stride, colour)


def group_names(pictures: Sequence[Picture]) -> list[str]:
    """Of the groups that are drawn."""
    known = any(picture.mask is not None for picture in pictures)
    return ["object", "background", "next largest"] if known else ["largest", "second", "third"]


def rule_of_groups(pictures: Sequence[Picture]) -> str:
    """Which groups are drawn, in words."""
    known, unknown = f"{NEAREST}, and the next largest", f"the {SHOWN} largest"
    masks = [picture.mask is not None for picture in pictures]
    if all(masks):
        return known
    return f"{known}; of photographs without a mask {unknown}" if any(masks) else unknown


def same_way(found: pd.DataFrame, column: str = "value") -> list[bool]:
    """Of every head whether queries on the object have more keys on it than the others, as the paper describes it.

    column: of the summary; "other" asks the same of the null.
    """
    heads = found[column].unstack("kind").dropna(subset=["keys", "keys_off"])
    return list(heads["keys"] > heads["keys_off"])


def found_by_subject(setting: Setting) -> pd.DataFrame | None:
    """What decides which head is drawn."""
    return setting.trained() if setting.subject.knows_shapes else None


# --------------------------------------------------------------------------------------------- 3: groups and their keys


def groups(setting: Setting) -> Drawing:
    """Figure 3: groups of queries, each in a dashed box with the keys it selects."""
    pictures = setting.pictures(GROUPS_OF)
    traces = [trace(setting.subject.model, picture.x) for picture in pictures]
    found = found_by_subject(setting)
    name, head = choose(traces[0], found, "keys")
    measures = measures_of(setting, "keys", None, traces[0], (name, head))
    if setting.image is None:
        measures = of_all_heads(setting, measures)
    G = traces[0][name].selected.shape[1]
    caption = f"{name}, head {head}: {chosen_by(found, 'keys')}"
    if found is not None:
        heads = same_way(found)
        caption += f"; they do, by some margin, in {sum(heads)} of {len(heads)} heads, in the others they have fewer"
    caption += (
        f". Of its {G} groups {rule_of_groups(pictures)}. Area of a key: attention, mean over the group's queries. "
    )
    caption += conditions(setting, pictures, measures, MEASURED)
    shown = min(SHOWN, G)
    sheet = style.sheet(
        2,
        shown * len(pictures),
        PLANS[3].title,
        caption,
        compared(measures),
        row_labels=["queries", "keys"],
        column_labels=group_names(pictures)[:shown] * len(pictures),
        aspect=aspect_of(pictures),
        together=shown,
        gap=BOXED,
    )
    for j, (picture, t) in enumerate(zip(pictures, traces, strict=True)):
        panels = sheet.panels[:, shown * j : shown * (j + 1)]
        draw_groups(panels.T, picture, t[name], head)
        for i in range(shown):
            style.box(sheet, panels[:, i], style.GROUPS[i])
    marks = [(style.mark("s", style.ORANGE, 14), "queries"), (style.mark("s", style.ORANGE, 7), "key, area: attention")]
    style.key(sheet, [*marks, *object_key(pictures)])
    networks = setting.evaluations() if setting.image is None else {}
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], networks)


def of_all_heads(setting: Setting, measures: list[Measure]) -> list[Measure]:
    """The measures of figure 3 with those beside them that are not of the head that is drawn."""
    found, name = setting.evaluations(), setting.subject.name
    layer, head = chosen(summary(found[name]), "nmi")
    largest = share("nmi", at_heads(found, "nmi", None), name, "best head", layer=f"{layer}, head {head}")
    mean = share("nmi", setting.table(), name, "mean of all heads")
    nmi, on, off, far = measures
    return [nmi, largest, mean, on, off, heads_alike(found, name), far]


def heads_alike(tables: dict[str, pd.DataFrame], trained: str) -> Measure:
    """The share of all heads in which queries on the object read it more than the others do."""
    shares = {network: float(np.mean(same_way(summary(table)))) for network, table in tables.items()}
    return Measure(
        name=NAMES["same"],
        trained=shares[trained],
        random={network: value for network, value in shares.items() if RANDOM in network},
        n=int(summary(tables[trained]).n.xs("nmi", level="kind").iloc[0]),
        other=float(np.mean(same_way(summary(tables[trained]), "other"))),
        seeds={network: value for network, value in shares.items() if network.startswith(SEED)},
    )


def draw_groups(pairs: Sequence, picture: Picture, record: Record, head: int) -> None:
    """The groups of one picture, each on its pair of panels; where there are no more groups, the picture alone."""
    weights, mask = record.weights(head), None if picture.mask is None else torch.from_numpy(picture.mask)
    order = by_overlap(record, head, mask)
    for i, panels in enumerate(pairs):
        for ax in panels:
            ground(ax, picture)
        if i < len(order):
            draw_pair(panels, record, head, order[i], weights, style.GROUPS[i])


# ------------------------------------------------------------------------------------------------ 6: more such pictures


def pairs(setting: Setting) -> Drawing:
    """Figure 6: a picture, then pairs of columns: a group of queries in the first stage and the keys it selects."""
    pictures = setting.pictures(PAIRS_OF, ("chelsea", "flower"))
    traces = [trace(setting.subject.model, picture.x) for picture in pictures]
    found = found_by_subject(setting)
    layer = first_layer(traces[0])
    name, head = choose(traces[0], found, "nmi", layer)
    measures = measures_of(setting, "nmi", layer, traces[0], (name, head))
    G = traces[0][name].selected.shape[1]
    shown = min(SHOWN, G)
    caption = (
        f"First stage, as in the paper: {name}, head {head} of {traces[0][name].heads}, counted from 0: "
        f"{chosen_by(found, 'nmi')}. Of its {G} groups {rule_of_groups(pictures)}. Area of a key: attention, mean over "
        f"the group's queries. {conditions(setting, pictures, measures, MEASURED)}"
    )
    sheet = style.sheet(
        len(pictures),
        1 + 2 * shown,
        PLANS[6].title,
        caption,
        compared(measures),
        column_labels=["picture", *["queries", "its keys"] * shown],
        aspect=aspect_of(pictures),
        together=2,
    )
    for row, picture, t in zip(sheet.panels, pictures, traces, strict=True):
        ground(row[0], picture)
        draw_groups(row[1:].reshape(shown, 2), picture, t[name], head)
    for i in range(shown):
        style.box(sheet, sheet.panels[:, 1 + 2 * i : 3 + 2 * i].flatten(), style.GROUPS[i])
    marks = [(style.mark("s", style.GROUPS[i], 13), name) for i, name in enumerate(group_names(pictures)[:shown])]
    style.key(sheet, [*marks, *object_key(pictures)])
    networks = setting.evaluations() if setting.image is None else {}
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], networks)


# ----------------------------------------------------------------------------------- table 4b: fewer groups, fewer keys


def sizes_of(subject: Subject) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """G and k of a model's stages, each number once."""
    layers = subject.model.grouped_layers()
    return tuple(dict.fromkeys(layer.groups for layer in layers)), tuple(dict.fromkeys(layer.keys for layer in layers))


def sizes() -> dict[str, list[Subject]]:
    """The networks that differ in G, in k or in their seed: those of one G and k together, the most keys and groups
    first.
    """
    found: dict[tuple, list[Subject]] = {}
    for subject in PLANS["table4b"].subjects():
        found.setdefault(sizes_of(subject), []).append(subject)
    order = sorted(found, key=lambda sizes: (-sum(sizes[1]), -sum(sizes[0])))
    name = lambda sizes: " / ".join(map(str, sizes))  # noqa: E731
    by_seed = lambda subject: subject.story["seed"]  # noqa: E731
    return {f"G = {name(sizes[0])}, k = {name(sizes[1])}": sorted(found[sizes], key=by_seed) for sizes in order}


def published_accuracies(subjects: Sequence[Subject]) -> list[float]:
    """What the paper has in table 4b for the same changes of G and k, in percent; NaN where it has no such row."""
    (full_groups, full_keys), values = sizes_of(subjects[0]), []
    halved = lambda sizes: tuple(size // 2 for size in sizes)  # noqa: E731
    rows = {
        (full_groups, full_keys): "dgt_tiny",
        (halved(full_groups), full_keys): "dgt_tiny_g24",
        (full_groups, halved(full_keys)): "dgt_tiny_k49",
    }
    for subject in subjects:
        name = rows.get(sizes_of(subject))
        values.append(float(cost.published(name)["value"]) if name else np.nan)
    return values


def swept(setting: Setting | None = None) -> sweep.Sweep:
    """Table 4b's sweep; the random networks, like the first column's, are made where there is a setting."""
    columns = sizes()
    label, seed = next(iter(columns)), setting.seed if setting else 0
    models = list(setting.twins.values()) if setting else [None] * TWINS
    chance = {f"{RANDOM}, {label}, {SEED}{seed + i}": model for i, model in enumerate(models)}
    layer = first_of(columns)
    return sweep.Sweep(columns, chance, "nmi", lambda table: at_head(table, "nmi", layer), SWEEP_COUNTS)


def first_of(columns: dict[str, list[Subject]]) -> str:
    """The name of the first layer with groups, which is the same in all networks of the sweep."""
    model = next(iter(columns.values()))[0].model
    first = model.grouped_layers()[0]
    return next(name for name, module in model.named_modules() if module is first)


def groups_and_keys(setting: Setting) -> Drawing:
    """Table 4b in small: accuracy, and NMI of object and groups in the first stage, where G or k is half as large."""
    first = [subjects[0] for subjects in sizes().values()]
    setting = replace(setting, subject=first[0])  # its size decides that of the images
    compared_here = swept(setting)
    found = sweep.measure(setting, compared_here)
    (picture,) = setting.pictures(SWEEP_OF)
    traces = [trace(subject.model, picture.x) for subject in first]
    layer, labels = first_layer(traces[0]), list(compared_here.columns)
    paper = np.array(published_accuracies(first))
    caption = sweep_caption(compared_here, found, paper, picture, layer)
    sheet = style.sheet(1, len(labels), PLANS["table4b"].title, caption, column_labels=labels, plots=2)
    for ax, t, column in zip(sheet.panels[0], traces, compared_here.named.values(), strict=True):
        ground(ax, picture)
        draw_all(ax, picture, t[layer], chosen(summary(found.tables[next(iter(column))]), "nmi", layer)[1])
    sweep.plot(sheet.plots[0], found.accuracies, "accuracy, %", 100)
    said = 100 * found.accuracies[0].trained + paper - paper[0]
    style.baseline(sheet.plots[0], said, "the paper's differences")
    sweep.plot(sheet.plots[1], found.shares, "groups and\nobject (NMI)", from_zero=True)
    style.baseline(sheet.plots[1], np.array([measure.other for measure in found.shares]), "another image's mask")
    marks = [(style.mark("s", style.GROUPS[i], 13), text) for i, text in enumerate(group_names([picture]))]
    style.key(sheet, [*marks, *object_key([picture])])
    measures = found.accuracies + found.shares
    return Drawing(sheet.figure, caption, [picture], measures, compared_here.stories, found.tables)


def draw_all(ax: Axes, picture: Picture, record: Record, head: int) -> None:
    """All groups of a head, by their closeness to the object."""
    for i, g in enumerate(by_overlap(record, head, torch.from_numpy(picture.mask))):
        alpha = 0.25 if i == 1 else 0.6  # the background stays behind
        draw_cells(ax, record, queries_of(record, head, g), style.GROUPS[i % len(style.GROUPS)], alpha)


def sweep_caption(
    compared_here: sweep.Sweep, found: sweep.Found, paper: Sequence[float], picture: Picture, layer: str
) -> str:
    """The conditions of table 4b, and its differences beside the paper's."""
    first, *others = found.accuracies
    differences = []
    for label, measure, said in zip(list(compared_here.columns)[1:], others, paper[1:], strict=True):
        apart, error = sweep.difference(first, measure)
        text = f"{label}: {100 * apart:+.1f} ± {100 * error:.1f}"
        differences.append(text + ("" if np.isnan(said) else f" (the paper: {said - paper[0]:+.1f})"))
    n, count = compared_here.images
    return (
        f"Networks at {picture.shape[0]} × {picture.shape[1]} of seeds {compared_here.seeds}: "
        f"{sweep.errors_of(compared_here)}. Accuracy: {first.n} test images; difference to the first in points: "
        f"{'; '.join(differences) or 'there is one only'}. NMI: {layer}, of each network the head with the largest on "
        f"the first {count // 5} of {count} test images, measured on the others. Photographs: {picture.name}, all "
        f"groups of that head, seed {compared_here.stories[0]['seed']}: {NEAREST}, the others by size."
    )


# ------------------------------------------------------------------------------------------------ what is measured


def of_the_sweep(setting: Setting) -> dict[str, int]:
    """The networks that table 4b measures, and on how many images."""
    return sweep.networks_of(swept())


PLANS = {
    3: Plan("groups", "Figure 3 · Groups of queries, and the keys that each selects", groups, of_layers),
    6: Plan("pairs", "Figure 6 · Groups of queries in the first stage, and their keys", pairs, of_layers),
    "table4b": Plan(
        "groups_and_keys",
        "Table 4b · Fewer groups G, or fewer keys k",
        groups_and_keys,
        of_the_sweep,
        compares="dgt_sweep_",
    ),
}
PAPER = Paper(
    "DGT",
    shipped="dgt_mini",
    kind="dynamic_group",
    evaluate=evaluate_groups,
    twins=twins,
    random=("of three seeds, that one and the next two",),
    plans=PLANS,
)
