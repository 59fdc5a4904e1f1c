"""The figures of SG-Former (Ren et al., ICCV 2023): significance, the tokens that it leaves, tables 6 and 7 in small.

Any model whose hybrid-scale layers guide self-guided ones can be drawn. The paper draws tokens as squares of different
sizes (figure 2). They are no squares: tokens that become one follow each other in rank, wherever they lie.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from torch import nn

from dynattn import cost
from dynattn.tracing import Record, Trace, trace
from dynattn.training import evaluate

from . import class_maps, fields, style, sweep
from .class_maps import ClassMaps
from .drawing import aspect_of, compared, conditions, ground, object_key, of_seeds, of_the_subject, share, unmasked
from .measures import evaluate_significance, within_token
from .run import Drawing, Paper, Plan, Setting
from .subjects import RANDOM, SEED, Picture, Subject, random_twin, with_statistics
from .tables import ALL, Measure, at, joined, summary

# Test images, chosen for a spread of classes and backgrounds, not by what a model makes of them.
TOKENS_OF, MAPS_OF, SWEEP_OF, EVOLVING_OF = (7, 19, 1), (8, 7, 19, 13, 25, 10, 1, 22), (7,), (7, 19, 22)
BESIDE, FIELDS_BESIDE = ("biformer_mini", "debiformer_mini"), ("biformer_mini", "debiformer_mini", "swin_mini")
WRITTEN = {"sgformer": "SG-Former", "biformer": "BiFormer", "debiformer": "DeBiFormer", "swin": "Swin"}
TWINS = 3  # random networks
BEYOND = 0.05  # by which the AUC must differ from that of another image's mask
REGIONS = (style.ORANGE, style.YELLOW, style.GREEN, style.NAVY, style.PURPLE, style.RUST)  # the most significant first
SWEEP_COUNTS = 1000, 120  # test images that accuracy and significance are measured on for each network of a table
EVOLVING_COUNTS = 1000, 120
# The rows of tables 6 and 7, the paper's own first: what a network is called, and the row of the paper's numbers.
SCALES = {
    "both scales": "sgformer_small_hybrid_scale",
    "local scale": "sgformer_small_single_scale_local",
    "global scale": "sgformer_small_single_scale_global",
}
GUIDANCE = {
    "hybrid map": "sgformer_small",
    "constant map": "sgformer_small_guidance_manual",
    "local map": "sgformer_small_guidance_local",
    "global map": "sgformer_small_guidance_global",
}


def twins(setting: Setting) -> dict[str, nn.Module]:
    """Random networks like the subject, of several seeds: what one of them finds may be luck."""
    seeds = range(setting.seed, setting.seed + TWINS)
    return {f"{RANDOM}, {SEED}{seed}": random_twin(setting.subject, seed, setting.few) for seed in seeds}


def written(subject: Subject) -> str:
    """A model's name as papers write it."""
    return WRITTEN.get(subject.name.partition("_")[0], subject.name)


# --------------------------------------------------------------------------------- 2: significance, and what tokens are


def guided(t: Trace) -> list[tuple[Record, Record]]:
    """The self-guided layers, each behind the hybrid-scale layer whose significance guides it."""
    records = [record for record in t if record.kind in ("hybrid_scale", "self_guided")]
    return [
        (before, record)
        for before, record in zip(records, records[1:], strict=False)
        if (before.kind, record.kind) == ("hybrid_scale", "self_guided")
    ]


def stage_of(record: Record) -> str:
    """The map of a layer, by its stage and block in words."""
    words = record.name.split(".")
    return f"stage {int(words[1]) + 1}, block {int(words[3]) + 1}" if words[:1] == ["stages"] else record.name


def drawn_layers(t: Trace) -> list[int]:
    """Which pairs of layers are drawn: the first and the last."""
    return sorted({0, len(guided(t)) - 1})


def measured_layers(pairs: Sequence[tuple[Record, Record]]) -> list[tuple[Record, Record]]:
    """Which are measured: all, of deep models the first and the last of every map."""
    if len(pairs) <= 4:
        return list(pairs)
    by_map: dict[tuple[int, int], list] = {}
    for pair in pairs:
        by_map.setdefault(pair[0].query_shape, []).append(pair)
    return [pair for found in by_map.values() for pair in found[:1] + found[1:][-1:]]


def reallocation(setting: Setting) -> Drawing:
    """Figure 2: significance over the photograph, the sub-regions that it makes, and the cells of a token of each."""
    pictures = setting.pictures(TOKENS_OF, ("chelsea",))
    traces = [trace(setting.subject.model, picture.x) for picture in pictures]
    pairs = measured_layers(guided(traces[0]))
    if setting.image is None:
        networks, measures = setting.evaluations(), measures_of(setting, pairs)
        said = verdict(measures[: len(pairs)]) + apart_in_words(networks[setting.subject.name], pairs)
    else:
        networks, said = {}, ""
        measures = [
            unmasked(
                setting,
                f"distance between two cells of one token, in sides of the image, {stage_of(record)}",
                lambda t, name=record.name: within_token(t[name])[0],
            )
            for _, record in pairs
        ]
    shown = [guided(traces[0])[i] for i in drawn_layers(traces[0])]
    caption = (
        f"{', then '.join(stage_of(before) for before, _ in shown).capitalize()}: the significance that it hands on; "
        f"the sub-regions of the next layer, {rates_in_words([record for _, record in shown])}; and of every "
        f"sub-region one token, the last by rank: all of its cells. {said}"
        f"{conditions(setting, pictures, measures)}"
    )
    columns = ["photograph"]
    for _ in shown:
        columns += ["significance", "sub-regions", "one token each"]
    options = dict(aspect=aspect_of(pictures), together=3, column_labels=columns)
    sheet = style.sheet(len(pictures), len(columns), PLANS[2].title, caption, compared(measures), **options)
    for row, picture, t in zip(sheet.panels, pictures, traces, strict=True):
        ground(row[0], picture)
        for k, i in enumerate(drawn_layers(t)):
            draw_layer(row[1 + 3 * k :], picture, *guided(t)[i])
    marks = regions_key(max(int(record.regions.max()) + 1 for _, record in shown))
    style.scale(sheet, style.HEAT, ["least", "most"], "significance", left=1.5, width=1.4)
    style.key(sheet, [*marks, *object_key(pictures)], centre=0.64)
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], networks)


def draw_layer(panels: Sequence[Axes], picture: Picture, before: Record, record: Record) -> None:
    """Significance, sub-regions and one token of each, on three panels."""
    for ax in panels[:3]:
        ground(ax, picture)
    draw_significance(panels[0], before)
    draw_regions(panels[1], record)
    draw_tokens(panels[2], record)


def draw_significance(ax: Axes, record: Record) -> None:
    """The significance that a layer hands on, cell by cell, from its least to its largest value."""
    values = record.significance.numpy()
    low, high = values.min(), values.max()
    style.cells(ax, (values - low) / ((high - low) or 1), record.image_shape)


def region_colours(record: Record) -> list[str]:
    """A colour for each sub-region, the least significant first."""
    count = int(record.regions.max()) + 1
    return [REGIONS[min(count - 1 - i, len(REGIONS) - 1)] for i in range(count)]


def draw_regions(ax: Axes, record: Record) -> None:
    """The cells of every sub-region."""
    for i, colour in enumerate(region_colours(record)):
        there = (record.regions == i).reshape(record.query_shape).numpy()
        style.squares(ax, there, record.stride, colour, alpha=0.55)


def draw_tokens(ax: Axes, record: Record) -> None:
    """All cells of one token of every sub-region: the last by rank."""
    for i, colour in enumerate(region_colours(record)):
        token = record.tokens[record.regions == i].max()
        there = (record.tokens == token).reshape(record.query_shape).numpy()
        style.squares(ax, there, record.stride, colour, alpha=0.85)


def regions_key(count: int) -> list:
    """What the colours of sub-regions mean."""
    names = ["most", *[""] * (count - 2), "least"]
    return [(style.mark("s", colour, 13), name) for colour, name in zip(REGIONS, names[:count], strict=False)]


def rates_in_words(records: Sequence[Record]) -> str:
    """How many cells become one token in each sub-region, from the least significant one on."""
    found = []
    for record in records:
        sizes = record.tokens.bincount()
        tokens = [record.tokens[record.regions == i].unique() for i in range(int(record.regions.max()) + 1)]
        found.append(", ".join(str(int(sizes[these].max())) for these in tokens))
    return f"in which {' and '.join(found)} cells become one token, the least significant first"


def measures_of(setting: Setting, pairs: Sequence[tuple[Record, Record]]) -> list[Measure]:
    """Of every layer's significance the AUC, then of every guided layer's tokens the share on the object."""
    table, name = setting.table(), setting.subject.name
    significance = [before for before, _ in pairs]
    return [
        *(share("auc", at(table, one.name), name, stage_of(one), layer=one.name) for one in significance),
        *(share("tokens", at(table, one.name), name, stage_of(one), layer=one.name) for _, one in pairs),
    ]


def verdict(measures: Sequence[Measure]) -> str:
    """Whether significance finds the object, of every layer and seed, beside the nulls.

    measures: the AUC of every layer. It finds the object where it is `BEYOND` above another image's mask and above all
    random networks; where it is as much below both, it is the wrong way round.
    """
    values = np.array([of_seeds(measure) for measure in measures])  # by layer and seed
    other = np.array([[measure.other] for measure in measures])
    random = np.array([[max(measure.random.values())] for measure in measures])
    lowest = np.array([[min(measure.random.values())] for measure in measures])
    found = (values >= other + BEYOND) & (values > random)
    reverse = (values <= other - BEYOND) & (values < lowest)
    count = values.shape[1]
    words = "; ".join(", ".join(f"{value:.2f}" for value in of_layer) for of_layer in values)
    order = f"by layer, of {count} seeds each" if count > 1 else "by layer"
    low, high = (f"{limit:.2f}" for limit in (min(min(one.random.values()) for one in measures), random.max()))
    text = (
        f"AUC {order}: {words}; another image's mask {other.min():.2f} to {other.max():.2f}, random weights {low} to "
        f"{high}. Significance finds the object in {found.sum()} of {found.size} (more than every random network, and "
        f"{BEYOND} more than the mask)"
    )
    if reverse.any():
        text += f", and is the wrong way round in {reverse.sum()}: there the object is less significant than the rest"
    if count > 1:
        text += f". The best layer of every seed has at least {values.max(axis=0).min():.2f}"
    return f"{text}. "


def apart_in_words(table: pd.DataFrame, pairs: Sequence[tuple[Record, Record]]) -> str:
    """How far the cells of a token are from each other, beside any cells."""
    found = summary(table).value
    near = [found[record.name, ALL, "together"] for _, record in pairs]
    far = found[pairs[0][1].name, ALL, "any"]
    words = ", ".join(f"{value:.2f}" for value in near)
    return (
        f"Two cells of one token are {words} sides of the image apart by layer, any two cells {far:.2f}: groups are "
        "neighbours in rank, not on the map as the paper draws them. "
    )


# --------------------------------------------------------------------------------- tables 6 and 7: scales, and guidance


def kind_of_scales(subject: Subject) -> str:
    """Which row of table 6 a network is of, by its scales."""
    first = subject.arguments["scales"][0]
    return "both scales" if len(first) > 1 else "global scale" if first[0] > 1 else "local scale"


def kind_of_guidance(subject: Subject) -> str:
    """Which row of table 7 a network is of."""
    return f"{subject.arguments['guidance']} map"


def columns_of(plan: str, kind: Callable[[Subject], str], rows: Mapping[str, str]) -> dict[str, list[Subject]]:
    """The networks of a table by their row of it, in the order of the rows, each by seed."""
    found: dict[str, list[Subject]] = {}
    for subject in PLANS[plan].subjects():
        found.setdefault(kind(subject), []).append(subject)
    return {name: sorted(found[name], key=lambda one: one.story["seed"]) for name in rows if name in found}


def scales(setting: Setting) -> Drawing:
    """Table 6 in small: accuracy, and where attention finds the object, with one scale in all blocks or with both."""
    columns = columns_of("table6", kind_of_scales, SCALES)
    return compare(setting, "table6", columns, SCALES, "auc", draw_first_significance)


def guidance(setting: Setting) -> Drawing:
    """Table 7 in small: accuracy, and the tokens on the object, where other maps guide, or none."""
    columns = columns_of("table7", kind_of_guidance, GUIDANCE)
    return compare(setting, "table7", columns, GUIDANCE, "tokens", draw_first_regions)


def draw_first_significance(ax: Axes, t: Trace) -> None:
    """The significance of the first layer."""
    draw_significance(ax, t.of_kind("hybrid_scale")[0])


def draw_first_regions(ax: Axes, t: Trace) -> None:
    """The sub-regions of the first guided layer."""
    draw_regions(ax, t.of_kind("self_guided")[0])


def swept(columns: Mapping[str, list[Subject]], kind: str, setting: Setting | None = None) -> sweep.Sweep:
    """The sweep of a table; the random network is like those of the first column."""
    first = next(iter(columns))
    chance = {f"{RANDOM}, {first}": setting.twin(columns[first][0]) if setting else None}
    return sweep.Sweep(dict(columns), chance, kind, lambda table: table, SWEEP_COUNTS)


def compare(
    setting: Setting,
    plan: str,
    columns: Mapping[str, list[Subject]],
    rows: Mapping[str, str],
    kind: str,
    draw: Callable[[Axes, Trace], None],
) -> Drawing:
    """A table as plots: accuracy with the paper's differences, and a measure with its null, under a picture of each.

    rows: where the paper's numbers of every column are. kind: of the measure. draw: what is drawn over the picture.
    """
    first = [subjects[0] for subjects in columns.values()]
    paper = {label: float(cost.published(rows[label])["value"]) for label in columns}  # percent
    setting = replace(setting, subject=first[0])  # its size decides that of the images
    compared_here = swept(columns, kind, setting)
    found = sweep.measure(setting, compared_here)
    (picture,) = setting.pictures(SWEEP_OF)
    caption = table_caption(compared_here, found, paper, picture, kind)
    sheet = style.sheet(1, len(columns), PLANS[plan].title, caption, column_labels=list(columns), plots=2)
    for ax, subject in zip(sheet.panels[0], first, strict=True):
        ground(ax, picture)
        draw(ax, trace(subject.model, picture.x))
    sweep.plot(sheet.plots[0], found.accuracies, "accuracy, %", 100)
    printed = np.array(list(paper.values()))
    style.baseline(sheet.plots[0], 100 * found.accuracies[0].trained + printed - printed[0], "the paper's differences")
    sweep.plot(sheet.plots[1], found.shares, {"auc": "significance\n(AUC)", "tokens": "tokens on\nthe object"}[kind])
    style.baseline(sheet.plots[1], np.array([measure.other for measure in found.shares]), "another image's mask")
    marks = [] if kind == "auc" else regions_key(4)
    style.key(sheet, [*marks, *object_key([picture])])
    measures = found.accuracies + found.shares
    return Drawing(sheet.figure, caption, [picture], measures, compared_here.stories, found.tables)


def table_caption(
    compared_here: sweep.Sweep, found: sweep.Found, paper: Mapping[str, float], picture: Picture, kind: str
) -> str:
    """The conditions of a table in small, its differences beside the paper's, and how many are more than chance."""
    labels, (first, *others) = list(compared_here.columns), found.accuracies
    differences, decided = [], []
    for label, measure in zip(labels[1:], others, strict=True):
        apart, error = sweep.difference(first, measure)
        said = paper[label] - paper[labels[0]]
        differences.append(f"{label}: {100 * apart:+.1f} ± {100 * error:.1f} (the paper: {said:+.1f})")
        decided += [label] * (abs(apart) > 2 * error)
    told = f"beyond two standard errors: {', '.join(decided)}" if decided else "none is beyond two standard errors"
    n, count = compared_here.images
    meaning = {
        "auc": "AUC: significance that hybrid-scale layers would hand on, mean over the layers",
        "tokens": "Tokens: share of guided layers' tokens that stand for cells on the object, mean over the layers",
    }[kind]
    return (
        f"Networks at {picture.shape[0]} × {picture.shape[1]} of seeds {compared_here.seeds}: "
        f"{sweep.errors_of(compared_here)}. Accuracy: {first.n} test images; difference to the first in points: "
        f"{'; '.join(differences) or 'there is one only'}: {told}. {meaning}, {count} test images. "
        f"Photographs: {picture.name}, first layer, seed {compared_here.stories[0]['seed']}."
    )


def of_table(plan: str, kind: Callable[[Subject], str], rows: Mapping[str, str]) -> Callable[[Setting], dict[str, int]]:
    """The networks that a table measures, and on how many images."""
    return lambda setting: sweep.networks_of(swept(columns_of(plan, kind, rows), "auc"))


# ----------------------------------------------------------------------------------------------- a map that comes about


def by_steps(setting: Setting) -> dict[int, Subject]:
    """One network after so many steps; before the first its batch norms know the statistics of a few images."""
    found = {subject.story["steps"]: subject for subject in PLANS["evolving"].subjects()}
    if 0 in found:
        with_statistics(found[0].model, setting.few)
    return dict(sorted(found.items()))


def evolving(setting: Setting) -> Drawing:
    """How significance comes about: the map of the first layer after more and more steps, accuracy, AUC by layer."""
    last = max(PLANS["evolving"].subjects(), key=lambda subject: subject.story["steps"])
    setting = replace(setting, subject=last)  # its size decides that of the images
    networks = by_steps(setting)
    pictures = setting.pictures(EVOLVING_OF)
    n, count = EVOLVING_COUNTS
    tables = {f"step {step}": setting.evaluation(f"step {step}", one.model, count) for step, one in networks.items()}
    layers = trace(last.model, pictures[0].x).of_kind("hybrid_scale")
    accuracies = [accuracy_of(setting, step, one.model, n) for step, one in networks.items()]
    significance = [[auc_at(table, step, layer) for step, table in tables.items()] for layer in layers]
    caption = (
        f"Significance of {stage_of(layers[0])} of one network while it learns, from clear (least) to yellow. The "
        "map has no gradient: it changes because the layer's input and the weights of its queries, keys and Merge do. "
        f"{evolving_in_words(significance)}One network of one seed. "
        f"Bars: standard errors over {n} (accuracy) and {count} test images. Before the first step batch norms have "
        f"the statistics of {len(setting.few)} images. Weights: {last.story['file']}, seed {last.story['seed']}, at "
        f"{pictures[0].shape[0]} × {pictures[0].shape[1]}. Test images "
        f"{', '.join(picture.name.removeprefix('test image ') for picture in pictures)}."
    )
    steps = [f"step {step}" if step else "random" for step in networks]
    sheet = style.sheet(
        len(pictures), len(steps), PLANS["evolving"].title, caption, column_labels=steps, plots=1 + len(layers)
    )
    for j, subject in enumerate(networks.values()):
        for i, picture in enumerate(pictures):
            ground(sheet.panels[i, j], picture)
            draw_first_significance(sheet.panels[i, j], trace(subject.model, picture.x))
    sweep.plot(sheet.plots[0], accuracies, "accuracy, %", 100, from_zero=True)
    for plot, measures in zip(sheet.plots[1:], significance, strict=True):
        sweep.plot(plot, measures, f"AUC,\n{stage_of(layers[sheet.plots.index(plot) - 1]).partition(',')[0]}")
        style.baseline(plot, np.array([measure.other for measure in measures]), "another image's mask")
    style.key(sheet, object_key(pictures))
    found = accuracies + [measure for measures in significance for measure in measures]
    return Drawing(sheet.figure, caption, pictures, found, [one.story for one in networks.values()], tables)


def accuracy_of(setting: Setting, step: int, model: nn.Module, n: int) -> Measure:
    """The accuracy after a step, with its standard error over the images."""
    images, labels, _ = (part[:n] for part in setting.test_set)
    value = evaluate(model, images, labels)[0]
    chance = {RANDOM: 1 / len(np.unique(labels))}
    return Measure(
        f"accuracy, step {step}", value, chance, len(labels), standard_error=(value * (1 - value) / n) ** 0.5
    )


def auc_at(table: pd.DataFrame, step: str, layer: Record) -> Measure:
    """The AUC of a layer after a step, and under another image's mask."""
    about = dict(layer=layer.name)
    return share("auc", joined({step: at(table, layer.name)}), step, f"{stage_of(layer)}, {step}", **about)


def evolving_in_words(significance: Sequence[Sequence[Measure]]) -> str:
    """Where AUC begins and ends, layer by layer."""
    found = [f"from {measures[0].trained:.2f} to {measures[-1].trained:.2f}" for measures in significance]
    return f"The AUC against the object goes {', '.join(found)} by layer. "


def of_steps(setting: Setting) -> dict[str, int]:
    """The networks of the strip, and on how many images."""
    return {f"step {subject.story['steps']}": EVOLVING_COUNTS[1] for subject in PLANS["evolving"].subjects()}


# -------------------------------------------------------------------------------------- class maps and receptive fields


def class_maps_of(setting: Setting) -> ClassMaps:
    """The class maps of SG-Former beside the others'; those of another model alone."""
    subjects = setting.beside(BESIDE)[::-1]
    return ClassMaps(setting, subjects, [written(subject) for subject in subjects])


def maps(setting: Setting) -> Drawing:
    """Where the features of the first stage speak for the class."""
    return class_maps.first_stage(class_maps_of(setting), setting.pictures(MAPS_OF), PLANS["class_maps"].title)


def of_maps(setting: Setting) -> dict[str, int]:
    """The networks whose class maps are measured, and on how many images."""
    return class_maps_of(setting).networks()


def receptive_fields(setting: Setting) -> Drawing:
    """Which pixels the centre of the last stage depends on, at two sizes, trained and random."""
    subjects = setting.beside(FIELDS_BESIDE)
    return fields.drawing(
        setting, subjects, [written(subject) for subject in subjects], PLANS["receptive_fields"].title
    )


def of_fields(setting: Setting) -> dict[str, int]:
    """The networks whose receptive fields are measured, and on how many images."""
    return fields.networks_of(setting, setting.beside(FIELDS_BESIDE))


PLANS = {
    2: Plan("tokens", "Figure 2 · Significance, and the tokens that it leaves", reallocation, of_the_subject),
    "table6": Plan(
        "scales",
        "Table 6 · One scale of attention, or two",
        scales,
        of_table("table6", kind_of_scales, SCALES),
        compares="sgformer_scales_",
    ),
    "table7": Plan(
        "guidance",
        "Table 7 · What guides: both scales, one, or nothing",
        guidance,
        of_table("table7", kind_of_guidance, GUIDANCE),
        compares="sgformer_guidance_",
    ),
    "evolving": Plan(
        "significance",
        "How significance comes about while the network learns",
        evolving,
        of_steps,
        compares="sgformer_evolving",
    ),
    "class_maps": Plan(
        "first_stage", "Class maps: where the features speak for the class", maps, of_maps, **class_maps.NEEDS
    ),
    "receptive_fields": Plan("of_the_centre", "Receptive field of the centre", receptive_fields, of_fields),
}
PAPER = Paper(
    "SG-Former",
    shipped="sgformer_mini",
    kind="hybrid_scale",
    evaluate=evaluate_significance,
    twins=twins,
    random=("of three seeds, that one and the next two",),
    plans=PLANS,
)
