"""The figures of SETR (Zheng et al., CVPR 2021; Zhang et al., IJCV 2024): what its layers know, what its points read.

Any model with dense attention can be drawn, also another paper's; where a figure needs more, a table of positions or
an answer for each pixel, it says so. Figures 13 and 14 are named "attention maps" in the paper, and its text points to
rollout; the published scripts draw the last layer as it is, head by head. Here 11 has both, 13 the heads, and 14 the
layers.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from dynattn import cost, weights

from . import features, positions, readers, segmentation, style
from .drawing import listed, of_the_subject
from .readers import evaluate_readers
from .run import Drawing, Paper, Plan, Setting
from .segmentation import Overlap
from .subjects import RANDOM, Subject, load_subject

# Test images, chosen for a spread of classes, not by what a model makes of them.
SEEN, FEATURES_OF, LAYERS_OF = (7, 19, 1), (7, 23, 1, 28), (7, 1)
POINTS_OF, HEADS_OF, AUX_OF = (13, 19), (28,), (7,)
DECODERS = ("naive", "pup", "mla")
NOTE = (
    "In the paper SETR is above the FCN, but only with weights that were trained before: from random ones SETR-PUP has "
    "42.27, the FCN 73.93 (Table 3). Here nothing was trained before. "
)
BESIDE = ("fcn_mini", *(f"setr_{decoder}_mini" for decoder in DECODERS))


def twins(setting: Setting) -> dict[str, nn.Module]:
    """A random network like the subject."""
    return {RANDOM: setting.twin(setting.subject)}


# ------------------------------------------------------------------------------------ 5 and 6: segmentation, beside FCN


def beside(setting: Setting) -> list[Subject]:
    """The FCN and SETR with its three decoders; another model stands alone."""
    return segmentation.beside(setting, BESIDE)


def segmented(setting: Setting) -> Drawing:
    """Figures 5 and 6 in small: photograph, truth, FCN, and SETR with each decoder."""
    to = segmentation.WRITTEN["fcn_mini"]
    return segmentation.drawing(setting, beside(setting), SEEN, PLANS[5].title, to=to, note=NOTE)


def of_segmentation(setting: Setting) -> dict[str, int]:
    """The networks that are measured, and on how many images."""
    return segmentation.networks_of(setting, beside(setting))


# ---------------------------------------------------------------------------- table 3: with and without auxiliary heads


def with_and_without() -> dict[str, Subject]:
    """The networks by their columns, as far as they are here: each decoder with auxiliary heads, and without."""
    found = {}
    for decoder in DECODERS:
        for name, label in ((f"setr_{decoder}_mini", ""), (f"setr_{decoder}_mini_no_aux", ", no aux")):
            if name in weights.available():
                written = segmentation.WRITTEN[f"setr_{decoder}_mini"].removeprefix("SETR-")
                found[f"{written}{label}"] = load_subject(weights.path(name))
    return found


def auxiliary(setting: Setting) -> Drawing:
    """Table 3 in small: mean IoU of each decoder, trained with auxiliary heads and without."""
    columns = with_and_without()
    (picture,) = setting.pictures(AUX_OF)
    tables = {label: segmentation.tables_of(setting, subject) for label, subject in columns.items()}
    found = {label: Overlap.read(next(iter(its.values()))) for label, its in tables.items()}
    measures = [segmentation.measure_of(label, its) for label, its in tables.items()]
    paper = [float(cost.published(f"setr_naive_large{end}")["value"]) for end in ("", "_no_aux")]
    words = []
    for label in columns:
        if f"{label}, no aux" in columns:
            value, error = segmentation.apart(found[label], found[f"{label}, no aux"])
            words.append(f"{label} {100 * value:+.1f} ± {100 * error:.1f}")
    caption = (
        f"Mean IoU with auxiliary heads minus without, in points: {listed(words) or 'there is no pair'} (the paper, "
        f"Naïve, Cityscapes, 80,000 steps: {paper[0] - paper[1]:+.2f}). Bars and errors are over the "
        f"{measures[0].n} test images. "
        f"{segmentation.conditions(setting, list(columns.values()))}White: the edge of the object. "
        f"Photographs: {picture.name}."
    )
    sheet = style.sheet(1, len(columns), PLANS["table3"].title, caption, column_labels=list(columns), plots=1)
    answers = [segmentation.answer_to(subject, picture) for subject in columns.values()]
    for ax, subject, labels in zip(sheet.panels[0], columns.values(), answers, strict=True):
        segmentation.draw_classes(ax, picture, labels, subject)
    value, error = (100 * np.array([getattr(one, key) for one in measures]) for key in ("trained", "standard_error"))
    style.series(sheet.plots[0], value, error, "mean IoU, %", each=[[]] * len(measures))  # no order, so no line
    style.key(sheet, segmentation.classes_key(answers, setting.subject), apart=1.0)
    stories = [subject.story for subject in columns.values()]
    return Drawing(
        sheet.figure, caption, [picture], measures, stories, {k: v for its in tables.values() for k, v in its.items()}
    )


def of_auxiliary(setting: Setting) -> dict[str, int]:
    """The networks that table 3 measures, and on how many images."""
    return segmentation.networks_of(setting, list(with_and_without().values()))


def of_images(
    draw: Callable[[Setting, Sequence[int], str], Drawing], number: int, indices: Sequence[int]
) -> Callable[[Setting], Drawing]:
    """A figure of some test images, or of the user's photograph, under its title."""
    return lambda setting: draw(setting, indices, PLANS[number].title)


PLANS = {
    5: Plan(
        "segmentation",
        "Figures 5 and 6 · Segmentation: SETR beside an FCN",
        segmented,
        of_segmentation,
        unfit=segmentation.answers_pixels,
    ),
    7: Plan(
        "features",
        "Figure 7 · Features of several layers, as colours",
        of_images(features.several_images, 7, FEATURES_OF),
        features.networks_of,
        unfit=features.no_layers,
    ),
    10: Plan(
        "positions",
        "Figure 10 · Similarity of position embeddings",
        lambda setting: positions.tiles(setting, PLANS[10].title),
        lambda setting: {},
        unfit=positions.none_learned,
    ),
    11: Plan(
        "points", "Figure 11 · What picked points read", of_images(readers.points_read, 11, POINTS_OF), of_the_subject
    ),
    12: Plan(
        "layers",
        "Figure 12 · Features of all layers and of the decoder",
        of_images(features.all_layers, 12, LAYERS_OF),
        features.networks_of,
        unfit=features.no_layers,
    ),
    13: Plan(
        "heads",
        "Figure 13 · Attention maps of the last layer, head by head",
        of_images(readers.heads_read, 13, HEADS_OF),
        of_the_subject,
    ),
    14: Plan(
        "attention",
        "Figure 14 · Attention maps layer by layer, and rollout",
        of_images(readers.layers_read, 14, HEADS_OF),
        of_the_subject,
    ),
    "table3": Plan(
        "auxiliary",
        "Table 3 · With auxiliary heads, and without",
        auxiliary,
        of_auxiliary,
        compares="setr_naive_mini_no_aux",  # the paper has this row
    ),
}
PAPER = Paper(
    "SETR",
    shipped="setr_pup_mini",
    kind="dense",
    evaluate=evaluate_readers,
    twins=twins,
    random=("of one seed",),
    plans=PLANS,
    level="cluttered",
)
