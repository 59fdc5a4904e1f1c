"""The figures of DeBiFormer (BaoLong et al., ACCV 2024): class maps beside BiFormer's, by stage, and receptive fields.

Any model with stages and routed regions can be drawn. The one that ships stands beside those that it is compared with;
another model, or a checkpoint of one's own, stands alone.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import nn

from . import class_maps, fields, style
from .class_maps import ClassMaps
from .drawing import aspect_of, compared, conditions, of_seeds
from .evidence import stages
from .run import Drawing, Paper, Plan, Setting
from .subjects import RANDOM, Picture, Subject
from .tables import Measure

# Test images, chosen for a spread of classes and backgrounds, not by what a model makes of them.
MAPS_OF, STAGES_OF = (8, 7, 19, 13, 25, 10), (1, 9, 22, 27)
BIFORMER, OTHERS = "biformer_mini", ("biformer_mini", "swin_mini", "convnext_mini")
WRITTEN = {"debiformer": "DeBiFormer", "biformer": "BiFormer", "swin": "Swin", "convnext": "ConvNeXt"}


def twins(setting: Setting) -> dict[str, nn.Module]:
    """A random network like the subject."""
    return {RANDOM: setting.twin(setting.subject)}


def written(subject: Subject) -> str:
    """A model's name as papers write it."""
    return WRITTEN.get(subject.name.partition("_")[0], subject.name)


# ---------------------------------------------------------------------------------------------------------- class maps


def verdict(pairs: Sequence[tuple[Measure, Measure]]) -> str:
    """Whether the paper's claim holds: its model's maps lie on the object more than BiFormer's; stage by stage.

    pairs: of each stage the measures of DeBiFormer and of BiFormer.
    """
    if not pairs:
        return ""
    found = []
    for ours, other in pairs:
        values = [of_seeds(measure) for measure in (ours, other)]
        apart = round(values[0].mean() - values[1].mean(), 2) + 0.0  # no -0.00
        text = f"{ours.name.split(', ')[1]}: {values[0].mean():.2f} against {values[1].mean():.2f}"
        if values[0].mean() <= ours.other and values[1].mean() <= other.other:
            found.append(f"{text}, both no more than another image's mask would have")
            continue
        if min(map(len, values)) < 2:
            found.append(f"{text}, of one seed, which decides nothing")
            continue
        error = np.hypot(*(value.std(ddof=1) / len(value) ** 0.5 for value in values))
        word = "is undecided" if abs(apart) <= 2 * error else "holds" if apart > 0 else "is the wrong way round"
        found.append(f"{text}, {apart:+.2f} ± {error:.2f}, it {word}")
    counts = sorted({len(of_seeds(measure)) for measure in pairs[0]})
    means = f" (means and standard errors over {' and '.join(map(str, counts))} seeds; two errors decide)"
    told = means if counts[0] > 1 else ""
    return f"The paper's claim, that DeBiFormer locates objects better than BiFormer{told}: {'; '.join(found)}. "


def class_maps_of(setting: Setting) -> ClassMaps:
    """BiFormer's class maps beside DeBiFormer's; those of another model alone."""
    subjects = setting.beside([BIFORMER])[::-1]
    return ClassMaps(setting, subjects, [written(subject) for subject in subjects])


def of_maps(setting: Setting) -> dict[str, int]:
    """The networks whose class maps are measured, and on how many images."""
    return class_maps_of(setting).networks()


def maps(setting: Setting) -> Drawing:
    """Figure 4: where the features of the first stage speak for the class, with BiFormer and with DeBiFormer."""
    found, said = class_maps_of(setting), ""
    if setting.image is None and len(found.subjects) == 2:
        other, ours = found.on_object("hires", 0)
        said = verdict([(ours, other)])
    return class_maps.first_stage(found, setting.pictures(MAPS_OF), PLANS[4].title, said)


# -------------------------------------------------------------------------------------------------- class maps by stage


def by_stage(setting: Setting) -> Drawing:
    """Figure 6: class maps of every stage."""
    found, pictures = class_maps_of(setting), setting.pictures(STAGES_OF)
    count = len(stages(setting.subject.model))
    halves, tables, said = [], {}, ""
    if setting.image is None:
        pairs = [found.on_object("hires", stage) for stage in range(count)]
        halves = [measure for stage in range(count) for measure in found.on_object("half", stage)]
        tables = found.all_tables()
        said = verdict([(pair[1], pair[0]) for pair in pairs if len(pair) == 2]) + shrinking(halves, found.names)
    else:
        pairs = [found.on_photograph(stage) for stage in range(count)]
    measures = [measure for pair in pairs for measure in pair]
    caption = (
        f"HiResCAM for {found.classes(pictures)} at the output of every stage. {said}{found.weights()}"
        f"{conditions(setting, pictures, measures)}"
    )
    sheet, panels = stage_panels(pictures, found.names, count, caption, compared(measures))
    for j, picture in enumerate(pictures):
        for k, subject in enumerate(found.subjects):
            for i in range(count):
                class_maps.draw_map(panels[i, j * len(found.subjects) + k], subject, picture, i)
    class_maps.key(sheet, pictures)
    stories = [subject.story for subject in found.subjects]
    return Drawing(sheet.figure, caption, pictures, measures + halves, stories, tables)


def stage_panels(
    pictures: Sequence[Picture], names: Sequence[str], count: int, caption: str, measures: Sequence[Measure]
) -> tuple[style.Sheet, np.ndarray]:
    """Figure 6's sheet and its panels, a row for each stage; of a single picture they stand the other way."""
    numbers = [f"stage {i + 1}" for i in range(count)]
    options = dict(aspect=aspect_of(pictures))
    if len(pictures) == 1:
        labels = dict(row_labels=names, column_labels=numbers)
        sheet = style.sheet(len(names), count, PLANS[6].title, caption, measures, **options, **labels)
        return sheet, sheet.panels.T
    labels = dict(row_labels=numbers, column_labels=names * len(pictures), together=len(names))
    sheet = style.sheet(count, len(names) * len(pictures), PLANS[6].title, caption, measures, **options, **labels)
    return sheet, sheet.panels


def shrinking(halves: Sequence[Measure], names: Sequence[str]) -> str:
    """Whether the maps shrink from stage to stage, as the paper sees them do."""
    found = []
    for k, name in enumerate(names):
        parts = [of_seeds(measure).mean() for measure in halves[k :: len(names)]]
        shrinks = all(after < before for before, after in pairwise(parts))
        numbers = ", ".join(f"{100 * part:.0f}" for part in parts)
        said = "it shrinks" if shrinks else "it does not shrink"
        found.append(f"{numbers} % of the image with {name}: {said}")
    return f"The paper sees maps shrink from stage to stage. Here half of a map covers {'; '.join(found)}. "


# ----------------------------------------------------------------------------------------------------- receptive fields


def receptive_fields(setting: Setting) -> Drawing:
    """Figure 5: which pixels the centre of the last stage depends on, at two sizes, trained and random."""
    subjects = setting.beside(OTHERS)
    return fields.drawing(setting, subjects, [written(subject) for subject in subjects], PLANS[5].title)


def of_fields(setting: Setting) -> dict[str, int]:
    """The networks whose receptive fields are measured, and on how many images."""
    return fields.networks_of(setting, setting.beside(OTHERS))


PLANS = {
    4: Plan(
        "class_maps", "Figure 4 · Class maps: where the features speak for the class", maps, of_maps, **class_maps.NEEDS
    ),
    5: Plan("receptive_fields", "Figure 5 · Receptive field of the centre", receptive_fields, of_fields),
    6: Plan("class_maps_by_stage", "Figure 6 · Class maps, stage by stage", by_stage, of_maps, **class_maps.NEEDS),
}
PAPER = Paper(
    "DeBiFormer",
    shipped="debiformer_mini",
    kind="bilevel",
    evaluate=class_maps.evaluate,
    twins=twins,
    random=("",),
    plans=PLANS,
)
