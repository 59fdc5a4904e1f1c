"""The figures of DGT (Liu et al., IJCAI 2022): groups of queries with the keys they select, and table 4b in small.

Layers and heads are found by their records and by what they measure, never by their names: any model with dynamic group
layers can be drawn, with any number of groups and keys.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor, nn

from dynattn import cost
from dynattn.tracing import Record, Trace, trace
from dynattn.training import evaluate

from . import style
from .drawing import (
    NAMES,
    Drawing,
    Paper,
    Plan,
    aspect_of,
    compared,
    conditions,
    ground,
    object_key,
    of_layers,
    share,
    unmasked,
)
from .measures import by_overlap, distances, entropy, evaluate_groups, window_distance
from .subjects import RANDOM, SEED, Picture, Setting, Subject, random_twin

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


def choose(t: Trace, found: dict | None, rule: str, layer: str | None = None) -> tuple[str, int]:
    """A layer, or the one that is given, and its head: by what was measured on images that are not measured otherwise.

    Without it the last layer, and the head whose groups are most even.
    """
    if found is not None:
        return (layer, found["layers"][layer]["chosen"][rule]) if layer else tuple(found["chosen"][rule])
    name = layer or t.of_kind("dynamic_group")[-1].name
    sizes = [torch.bincount(groups, minlength=t[name].selected.shape[1]).double() for groups in t[name].groups]
    return name, int(torch.stack([entropy(size) for size in sizes]).argmax())


def chosen_by(found: dict | None, rule: str) -> str:
    """The rule of `choose` in words."""
    return "of the most even groups" if found is None else f"{RULES[rule]}, on {found['choice']} test images set apart"


def first_layer(t: Trace) -> str:
    """The name of the first layer with groups: that of the first stage."""
    return t.of_kind("dynamic_group")[0].name


def at_head(found: dict, rule: str, layer: str | None) -> dict[str, float]:
    """What a network's own head measures, chosen by a rule in one layer or in all."""
    name, head = (layer, found["layers"][layer]["chosen"][rule]) if layer else found["chosen"][rule]
    values = found["layers"][name]
    return {kind: value[head] for kind, value in values.items() if isinstance(value, list)} | {"n": found["n"]}


def measures_of(setting: Setting, rule: str, layer: str | None, t: Trace, place: tuple[str, int]) -> list[dict]:
    """What a figure of groups measures: of the images with masks, or of the user's photograph.

    Of each network its own head, by the same rule.
    """
    name, head = place
    record, where = t[name], f"{name}, head {head}"
    reach = "from a query to its keys, in sides of the image"
    if setting.image is not None:
        even = lambda t: float(entropy(torch.bincount(t[name].groups[head]).double()).exp())  # noqa: E731
        return [
            unmasked(setting, reach, lambda t: distances(t[name])[head]) | {"window": window_distance(record)},
            unmasked(setting, f"number of groups (e to the entropy), of {record.selected.shape[1]}", even),
        ]
    networks = {key: at_head(one, rule, layer) for key, one in setting.evaluations().items()}
    trained = networks[setting.subject.name]
    found = [share(kind, networks, setting.subject.name) for kind in ("nmi", "keys", "keys_off")]
    found[1]["limit"] = trained["keys_limit"]
    random = {key: one["distance"] for key, one in networks.items() if RANDOM in key}
    seeds = {key: networks[key]["distance"] for key in setting.other_seeds}
    far = dict(name=reach, trained=trained["distance"], random=random, other=None, window=window_distance(record))
    found.append(far | {"n": trained["n"]} | ({"other_seeds": seeds} if seeds else {}))
    return [one | {"layer": where} for one in found]


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


def same_way(found: dict, null: str = "") -> list[bool]:
    """Of every head whether queries on the object have more keys on it than the others, as the paper describes it."""
    return [
        keys > off
        for layer in found["layers"].values()
        for keys, off in zip(layer[f"keys{null}"], layer[f"keys_off{null}"], strict=True)
    ]


def found_by_subject(setting: Setting) -> dict | None:
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


def of_all_heads(setting: Setting, measures: list[dict]) -> list[dict]:
    """The measures of figure 3 with those beside them that are not of the head that is drawn."""
    found, name = setting.evaluations(), setting.subject.name
    layer, head = found[name]["chosen"]["nmi"]
    best = share("nmi", {key: at_head(one, "nmi", None) for key, one in found.items()}, name, "best head")
    mean = share("nmi", {key: of_every_head(one) for key, one in found.items()}, name, "mean of all heads")
    shares = {
        key: {
            "same": float(np.mean(same_way(one))),
            "same_other": float(np.mean(same_way(one, "_other"))),
            "same_se": None,
            "n": one["n"],
        }
        for key, one in found.items()
    }
    nmi, on, off, far = measures
    return [nmi, best | {"layer": f"{layer}, head {head}"}, mean, on, off, share("same", shares, name), far]


def of_every_head(found: dict) -> dict[str, float | None]:
    """A network's groups and objects, mean over all heads of all layers: nothing is chosen."""
    heads = {kind: [x for layer in found["layers"].values() for x in layer[kind]] for kind in ("nmi", "nmi_other")}
    return {kind: float(np.mean(values)) for kind, values in heads.items()} | {"nmi_se": None, "n": found["n"]}


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
    return tuple(dict.fromkeys(one.groups for one in layers)), tuple(dict.fromkeys(one.keys for one in layers))


def sweep() -> dict[str, list[Subject]]:
    """The shipped models that differ in G, in k or in their seed: those of one G and k together, the most keys and
    groups first.
    """
    found: dict[tuple, list[Subject]] = {}
    for one in PLANS["table4b"].subjects():
        found.setdefault(sizes_of(one), []).append(one)
    order = sorted(found, key=lambda sizes: (-sum(sizes[1]), -sum(sizes[0])))
    name = lambda sizes: " / ".join(map(str, sizes))  # noqa: E731
    by_seed = lambda one: one.story["seed"]  # noqa: E731
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
    for one in subjects:
        name = rows.get(sizes_of(one))
        values.append(float(cost.published(name)["value"]) if name else np.nan)
    return values


def groups_and_keys(setting: Setting) -> Drawing:
    """Table 4b in small: accuracy, and NMI of object and groups in the first stage, where G or k is half as large."""
    subjects = sweep()
    first = [seeds[0] for seeds in subjects.values()]
    setting = replace(setting, subject=first[0])  # its size decides that of the images
    (picture,) = setting.pictures(SWEEP_OF)
    traces = [trace(one.model, picture.x) for one in first]
    layer = first_layer(traces[0])
    n, count = SWEEP_COUNTS
    images, labels, _ = (part[:n] for part in setting.test_set)
    named, twins = networks_of(subjects, setting)
    networks = {
        name: setting.evaluation(name, one.model, count) for seeds in named.values() for name, one in seeds.items()
    }
    chance = {
        name: setting.evaluation(name, model, count) for name, model in zip(twins, setting.twins.values(), strict=True)
    }
    accuracies, nmis = [], []
    for label, seeds in named.items():
        values = {name: evaluate(one.model, images, labels)[0] for name, one in seeds.items()}
        random = {name: one["accuracy"] for name, one in chance.items()}
        accuracies.append(of_seeds(f"accuracy, {label}", values, n, random=random, other=None))
        heads = {name: at_head(networks[name], "nmi", layer) for name in seeds}
        values = {name: one["nmi"] for name, one in heads.items()}
        random = {name: at_head(one, "nmi", layer)["nmi"] for name, one in chance.items()}
        other = float(np.mean([one["nmi_other"] for one in heads.values()]))
        measured = next(iter(heads.values()))["n"]
        nmis.append(of_seeds(f"{NAMES['nmi']}, {label}", values, measured, random=random, other=other))

    paper = np.array(published_accuracies(first))
    caption = sweep_caption(subjects, accuracies, paper, picture, layer, count)
    sheet = style.sheet(1, len(subjects), PLANS["table4b"].title, caption, column_labels=list(subjects), plots=2)
    for ax, t, label in zip(sheet.panels[0], traces, subjects, strict=True):
        ground(ax, picture)
        found = networks[next(iter(named[label]))]
        draw_all(ax, picture, t[layer], found["layers"][layer]["chosen"]["nmi"])
    plot_seeds(sheet.plots[0], accuracies, "accuracy, %", 100)
    style.baseline(sheet.plots[0], 100 * accuracies[0]["trained"] + paper - paper[0], "the paper's differences")
    plot_seeds(sheet.plots[1], nmis, "groups and\nobject (NMI)", 1, from_zero=True)
    style.baseline(sheet.plots[1], np.array([one["other"] for one in nmis]), "another image's mask")
    marks = [(style.mark("s", style.GROUPS[i], 13), text) for i, text in enumerate(group_names([picture]))]
    style.key(sheet, [*marks, *object_key([picture])])
    stories = [one.story for seeds in subjects.values() for one in seeds]
    return Drawing(sheet.figure, caption, [picture], accuracies + nmis, stories, networks | chance)


def networks_of(subjects: dict[str, list[Subject]], setting: Setting) -> tuple[dict[str, dict], list[str]]:
    """The networks of the sweep by their names, those of one G and k together; and names of random ones."""
    named = {label: {f"{label}, {SEED}{one.story['seed']}": one for one in seeds} for label, seeds in subjects.items()}
    return named, [f"{RANDOM}, {next(iter(subjects))}, {SEED}{setting.seed + i}" for i in range(TWINS)]


def of_seeds(name: str, values: dict[str, float], n: int, **nulls) -> dict:
    """A measure whose `trained` is the mean of networks of several seeds; of a single one no error is known."""
    each = np.array(list(values.values()))
    error = float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else None
    seeds = {key.rpartition(", ")[2]: value for key, value in values.items()}
    return dict(name=name, trained=float(each.mean()), seeds=seeds, standard_error=error, n=n) | nulls


def draw_all(ax: Axes, picture: Picture, record: Record, head: int) -> None:
    """All groups of a head, by their closeness to the object."""
    for i, g in enumerate(by_overlap(record, head, torch.from_numpy(picture.mask))):
        alpha = 0.25 if i == 1 else 0.6  # the background stays behind
        draw_cells(ax, record, queries_of(record, head, g), style.GROUPS[i % len(style.GROUPS)], alpha)


def plot_seeds(ax: Axes, measures: Sequence[dict], name: str, scale: float, *, from_zero: bool = False) -> None:
    """The means of some measures over the columns, with the seeds that they are of."""
    value, error = (scale * np.array([one[key] or 0 for one in measures]) for key in ("trained", "standard_error"))
    each = [[scale * seed for seed in one["seeds"].values()] for one in measures]
    style.series(ax, value, error, name, from_zero=from_zero, each=each)


def sweep_caption(
    subjects: dict[str, list[Subject]],
    measures: Sequence[dict],
    paper: Sequence[float],
    picture: Picture,
    layer: str,
    count: int,
) -> str:
    """The conditions of table 4b, and its differences beside the paper's."""
    first, *others = measures
    differences = []
    for label, one, said in zip(list(subjects)[1:], others, paper[1:], strict=True):
        text = f"{label}: {100 * (one['trained'] - first['trained']):+.1f}"
        errors = [first["standard_error"], one["standard_error"]]
        if None not in errors:
            text += f" ± {100 * np.hypot(*errors):.1f}"
        differences.append(text + ("" if np.isnan(said) else f" (the paper: {said - paper[0]:+.1f})"))
    seeds = sorted({one.story["seed"] for seeds in subjects.values() for one in seeds})
    return (
        f"Networks at {picture.shape[0]} × {picture.shape[1]} of seeds {', '.join(map(str, seeds))}: small dots; large "
        f"ones their mean, with its standard error. Accuracy: {measures[0]['n']} test images; difference to the first "
        f"in points: {'; '.join(differences) or 'there is one only'}. NMI: {layer}, of each network the head with the "
        f"largest on the first {count // 5} of {count} test images, measured on the others. Photographs: "
        f"{picture.name}, all groups of that head, seed {seeds[0]}: {NEAREST}, the others by size."
    )


# ------------------------------------------------------------------------------------------------ what is measured


def of_the_sweep(setting: Setting) -> dict[str, int]:
    """The networks that table 4b measures, and on how many images."""
    named, twins = networks_of(sweep(), setting)
    return dict.fromkeys([*(name for seeds in named.values() for name in seeds), *twins], SWEEP_COUNTS[1])


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
