"""The figures of DeBiFormer (BaoLong et al., ACCV 2024): class maps beside BiFormer's, by stage, and receptive fields.

Any model with stages and routed regions can be drawn. The one that ships stands beside those that it is compared with;
another model, or a checkpoint of one's own, stands alone.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import nn
from tqdm import tqdm

from dynattn.data import CLASSES

from . import fields, style
from .drawing import NAMES, aspect_of, compared, conditions, ground, object_key, of_seeds, share
from .evidence import class_map, evaluate_maps, half, stages
from .run import Drawing, Paper, Plan, Setting, unique
from .subjects import RANDOM, Picture, Subject
from .tables import Measure, at, joined

# Test images, chosen for a spread of classes and backgrounds, not by what a model makes of them.
MAPS_OF, STAGES_OF = (8, 7, 19, 13, 25, 10), (1, 9, 22, 27)
BIFORMER, OTHERS = "biformer_mini", ("biformer_mini", "swin_mini", "convnext_mini")
MAPS = 64  # test images whose class maps are measured
WRITTEN = {"debiformer": "DeBiFormer", "biformer": "BiFormer", "swin": "Swin", "convnext": "ConvNeXt"}


def twins(setting: Setting) -> dict[str, nn.Module]:
    """A random network like the subject."""
    return {RANDOM: setting.twin(setting.subject)}


def written(subject: Subject) -> str:
    """A model's name as papers write it."""
    return WRITTEN.get(subject.name.partition("_")[0], subject.name)


# ---------------------------------------------------------------------------------------------------------- class maps


def evaluate(model: nn.Module, *arrays: np.ndarray, known: bool = True, bar: tqdm | None = None) -> pd.DataFrame:
    """`evaluate_maps` of images, masks and labels; known: whether the labels are classes of the model."""
    images, masks, labels = arrays
    return evaluate_maps(model, images, masks, labels if known else None, bar=bar)


def count_of(setting: Setting) -> int:
    """How many test images the class maps are measured on: fewer of large ones."""
    return min(MAPS, setting.count)


def tables_of(setting: Setting, subject: Subject) -> dict[str, pd.DataFrame]:
    """The table of each of a model's networks, measured once in a run."""
    return {
        network: setting.evaluation(unique(subject, network), model, count_of(setting), known=subject.knows_shapes)
        for network, model in setting.networks(subject).items()
    }


def of_maps(setting: Setting) -> dict[str, int]:
    """The networks whose class maps are measured, and on how many images: none on a user's photograph."""
    if setting.image is not None:
        return {}
    count, subjects = count_of(setting), setting.beside([BIFORMER])
    return {unique(subject, network): count for subject in subjects for network in setting.networks(subject)}


def stage_name(subject: Subject, stage: int) -> str:
    """The module that a stage is."""
    return stages(subject.model)[stage]["module"]


def on_object(setting: Setting, subject: Subject, kind: str, stage: int) -> Measure:
    """A measure of a stage's class maps on the test images."""
    layer, number = stage_name(subject, stage), range(len(stages(subject.model)))[stage] + 1
    table = at(joined(tables_of(setting, subject)), layer)
    return share(kind, table, subject.name, f"stage {number}, {written(subject)}", layer=layer)


def on_photograph(setting: Setting, subject: Subject, stage: int) -> Measure:
    """How much of the user's photograph holds half of a stage's class map; there is no mask."""
    models = {subject.name: subject.model, RANDOM: setting.twin(subject)}
    values = {name: half(class_map(model, setting.own.x, stage=stage)) for name, model in models.items()}
    label = f"{NAMES['half']}, stage {stage + 1}, {written(subject)}"
    return Measure(label, values[subject.name], {RANDOM: values[RANDOM]}, n=1, layer=stage_name(subject, stage))


def asked(setting: Setting, subject: Subject, picture: Picture) -> int:
    """The class of a map: the true one, or the model's answer where nobody knows it."""
    if picture.label is not None and subject.knows_shapes:
        return picture.label
    with torch.no_grad():
        return int(subject.model(picture.x[None]).argmax())


def class_in_words(setting: Setting, subjects: Sequence[Subject], pictures: Sequence[Picture]) -> str:
    """Which class the maps are of."""
    if pictures[0].label is not None and setting.subject.knows_shapes:
        return "the true class"
    answers = [asked(setting, subject, pictures[0]) for subject in subjects]
    words = [CLASSES[answer] if setting.subject.knows_shapes else f"number {answer}" for answer in answers]
    said = ", ".join(f"{written(subject)}: {word}" for subject, word in zip(subjects, words, strict=True))
    return f"the class that the model answers{f' ({said})' if len(pictures) == 1 else ''}"


def weights_of(subjects: Sequence[Subject]) -> str:
    """The checkpoints of the models beside the paper's, in words."""
    told = [(written(subject), subject.story) for subject in subjects]
    made = lambda story: ", ".join(f"{key} {story[key]}" for key in ("seed", "steps") if key in story)  # noqa: E731
    return "".join(f"{name}: {story['file']} ({made(story)}). " for name, story in told)


def draw_map(ax: Axes, subject: Subject, picture: Picture, label: int, stage: int) -> None:
    """A class map over a picture, with the object's outline if it is known."""
    ground(ax, picture)
    style.heat(ax, class_map(subject.model, picture.x, stage=stage, label=label))


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


def maps(setting: Setting) -> Drawing:
    """Figure 4: where the features of the first stage speak for the class, with BiFormer and with DeBiFormer."""
    subjects = setting.beside([BIFORMER])[::-1]
    pictures = setting.pictures(MAPS_OF)
    measures, tables, said = [], {}, ""
    if setting.image is None:
        kinds = (("hires", 0), ("grad", 0), ("grad", -1))
        measures = [on_object(setting, subject, kind, stage) for kind, stage in kinds for subject in subjects]
        tables = {
            unique(subject, network): table
            for subject in subjects
            for network, table in tables_of(setting, subject).items()
        }
        said = verdict([(measures[1], measures[0])] if len(subjects) == 2 else [])
        said += gradients(measures[len(subjects) :])
    else:
        measures = [on_photograph(setting, subject, 0) for subject in subjects]
    caption = (
        f"HiResCAM for {class_in_words(setting, subjects, pictures)} at the output of the first stage, which has mixed "
        f"the least of the map. {said}{weights_of(subjects[:-1])}{conditions(setting, pictures, measures)}"
    )
    rows, alone = ["photograph", *map(written, subjects)], len(pictures) == 1
    beside_it = {"column_labels": rows} if alone else {"row_labels": rows}
    shape = (1, len(rows)) if alone else (len(rows), len(pictures))
    sheet = style.sheet(*shape, PLANS[4].title, caption, compared(measures), aspect=aspect_of(pictures), **beside_it)
    panels = sheet.panels.T if alone else sheet.panels
    for j, picture in enumerate(pictures):
        ground(panels[0, j], picture)
        for i, subject in enumerate(subjects):
            draw_map(panels[i + 1, j], subject, picture, asked(setting, subject, picture), 0)
    map_key(sheet, pictures)
    return Drawing(sheet.figure, caption, pictures, measures, [subject.story for subject in subjects], tables)


def gradients(measures: Sequence[Measure]) -> str:
    """What Grad-CAM finds in the first stage, and in the last, where it is usually taken: of each model both."""
    half, values = len(measures) // 2, [f"{of_seeds(one).mean():.2f}" for one in measures]
    names = [one.name.split(", ")[2] for one in measures]
    early = " and ".join(f"{value} with {name}" for value, name in zip(values[:half], names, strict=False))
    nulls = [f"null {one.other:.2f}" for one in measures[half:]]
    late = " and ".join(f"{a} with {b} ({c})" for a, b, c in zip(values[half:], names, nulls, strict=False))
    return (
        f"Grad-CAM has {early} on the object in the first stage; in the last stage, as is usual, {late}. Large dots "
        "and bold numbers are of the networks that are drawn. "
    )


def map_key(sheet: style.Sheet, pictures: Sequence[Picture]) -> None:
    """The colours of the maps, and the outline."""
    known = bool(object_key(pictures))
    style.scale(sheet, style.HEAT, ["none", "most"], "speaks for the class", left=3.0 if known else 5.6)
    if known:
        style.key(sheet, object_key(pictures), centre=0.66)


# -------------------------------------------------------------------------------------------------- class maps by stage


def by_stage(setting: Setting) -> Drawing:
    """Figure 6: class maps of every stage."""
    subjects = setting.beside([BIFORMER])[::-1]
    pictures = setting.pictures(STAGES_OF)
    count = len(stages(setting.subject.model))
    measures, halves, tables, said = [], [], {}, ""
    if setting.image is None:
        measures = [on_object(setting, subject, "hires", stage) for stage in range(count) for subject in subjects]
        halves = [on_object(setting, subject, "half", stage) for stage in range(count) for subject in subjects]
        for subject in subjects:
            tables |= {unique(subject, name): table for name, table in tables_of(setting, subject).items()}
        pairs = zip(measures[1::2], measures[::2], strict=True) if len(subjects) == 2 else []
        said = verdict(list(pairs)) + shrinking(halves, subjects)
    else:
        measures = [on_photograph(setting, subject, stage) for stage in range(count) for subject in subjects]
    classes = class_in_words(setting, subjects, pictures)
    caption = (
        f"HiResCAM for {classes} at the output of every stage. {said}{weights_of(subjects[:-1])}"
        f"{conditions(setting, pictures, measures)}"
    )
    sheet, panels = stage_panels(pictures, subjects, count, caption, compared(measures))
    for j, picture in enumerate(pictures):
        for k, subject in enumerate(subjects):
            for i in range(count):
                ax = panels[i, j * len(subjects) + k]
                draw_map(ax, subject, picture, asked(setting, subject, picture), i)
    map_key(sheet, pictures)
    stories = [subject.story for subject in subjects]
    return Drawing(sheet.figure, caption, pictures, measures + halves, stories, tables)


def stage_panels(
    pictures: Sequence[Picture], subjects: Sequence[Subject], count: int, caption: str, measures: Sequence[Measure]
) -> tuple[style.Sheet, np.ndarray]:
    """Figure 6's sheet and its panels, a row for each stage; of a single picture they stand the other way."""
    names, numbers = [written(subject) for subject in subjects], [f"stage {i + 1}" for i in range(count)]
    options = dict(aspect=aspect_of(pictures))
    if len(pictures) == 1:
        labels = dict(row_labels=names, column_labels=numbers)
        sheet = style.sheet(len(subjects), count, PLANS[6].title, caption, measures, **options, **labels)
        return sheet, sheet.panels.T
    labels = dict(row_labels=numbers, column_labels=names * len(pictures), together=len(subjects))
    sheet = style.sheet(count, len(names) * len(pictures), PLANS[6].title, caption, measures, **options, **labels)
    return sheet, sheet.panels


def shrinking(halves: Sequence[Measure], subjects: Sequence[Subject]) -> str:
    """Whether the maps shrink from stage to stage, as the paper sees them do."""
    found = []
    for k, subject in enumerate(subjects):
        parts = [of_seeds(measure).mean() for measure in halves[k :: len(subjects)]]
        shrinks = all(after < before for before, after in pairwise(parts))
        numbers = ", ".join(f"{100 * part:.0f}" for part in parts)
        said = "it shrinks" if shrinks else "it does not shrink"
        found.append(f"{numbers} % of the image with {written(subject)}: {said}")
    return f"The paper sees maps shrink from stage to stage. Here half of a map covers {'; '.join(found)}. "


# ----------------------------------------------------------------------------------------------------- receptive fields


def receptive_fields(setting: Setting) -> Drawing:
    """Figure 5: which pixels the centre of the last stage depends on, at two sizes, trained and random."""
    subjects = setting.beside(OTHERS)
    return fields.drawing(setting, subjects, [written(subject) for subject in subjects], PLANS[5].title)


def of_fields(setting: Setting) -> dict[str, int]:
    """The networks whose receptive fields are measured, and on how many images."""
    return fields.networks_of(setting, setting.beside(OTHERS))


NEEDS = dict(package="pytorch_grad_cam", advice="class maps are made by grad-cam: pip install 'dynattn[vision]'")
PLANS = {
    4: Plan("class_maps", "Figure 4 · Class maps: where the features speak for the class", maps, of_maps, **NEEDS),
    5: Plan("receptive_fields", "Figure 5 · Receptive field of the centre", receptive_fields, of_fields),
    6: Plan("class_maps_by_stage", "Figure 6 · Class maps, stage by stage", by_stage, of_maps, **NEEDS),
}
PAPER = Paper(
    "DeBiFormer",
    shipped="debiformer_mini",
    kind="bilevel",
    evaluate=evaluate,
    twins=twins,
    random=("",),
    plans=PLANS,
)
