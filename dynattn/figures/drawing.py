"""What the figures of any paper share: how they measure a share, what is on their panels, what their captions say."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import nn

from dynattn.tracing import Record, Trace, trace

from . import style
from .run import Setting
from .subjects import RANDOM, SEED, Picture, Subject, squeezed
from .tables import NONE, OTHER, OWN, Measure, means

NAMES = {
    "points": "points on the object",
    "attention": "attention on the object",
    "propagated": "propagated attention on the object",
    "nmi": "groups and object (NMI)",
    "keys": "keys on the object, of queries on it",
    "keys_off": "keys on the object, of queries off it",
    "same": "heads where on it > off it (share)",
    "distance": "from a query to its keys, in sides of the image",
    "auc": "AUC of significance",
    "tokens": "tokens on the object",
    "together": "between two cells of one token, in sides of the image",
    "image": "offsets that depend on the image",
    "hires": "HiResCAM on the object",
    "grad": "Grad-CAM on the object",
    "reads": "attention on the object, of points on it",
    "reads_off": "attention on the object, of points off it",
    "rolled": "rollout on the object, of points on it",
    "rolled_off": "rollout on the object, of points off it",
    "apart": "colour variance between object and rest",
    "half": "part of the image with half of the class map",
}


def of_the_subject(setting: Setting) -> dict[str, int]:
    """Networks that a figure of the subject measures, and on how many images: none on a user's photograph."""
    if setting.image is not None:
        return {}
    return dict.fromkeys([setting.subject.name, *setting.other_seeds, *setting.twins], setting.count)


def of_layers(setting: Setting) -> dict[str, int]:
    """Those of a figure whose layers are chosen by what they measure."""
    measured = setting.subject.knows_shapes and setting.recorded(setting.subject) is None
    chosen = {setting.subject.name: setting.count} if measured else {}
    return of_the_subject(setting) | chosen


def with_twin(setting: Setting) -> dict[str, nn.Module]:
    """What is drawn: the subject, and a random network."""
    return {"trained": setting.subject.model, RANDOM: setting.twins[RANDOM]}


def ground(ax: Axes, picture: Picture, *, veil: float = 0.35, grey: bool = False) -> None:
    """The photograph under a veil, with the object's outline if it is known.

    grey: without colours of its own, where colours over it mean something.
    """
    shown = np.repeat(picture.shown.mean(-1, keepdims=True), 3, -1).astype(np.uint8) if grey else picture.shown
    style.photograph(ax, shown, picture.shape, veil=veil)
    if picture.mask is not None:
        style.outline(ax, picture.mask, picture.shape)


def object_key(pictures: Sequence[Picture]) -> list:
    """The outline's place in the key, where there is one."""
    if all(picture.mask is None for picture in pictures):
        return []
    return [(style.edge_mark(), "the object (mask, not seen by the model)")]


def aspect_of(pictures: Sequence[Picture]) -> float:
    """Height over width of the panels: a user's photograph keeps its own."""
    h, w = pictures[0].shown.shape[:2]
    return h / w


def queries(picture: Picture) -> list[tuple[float, float]]:
    """Two image pixels (row, col): one on the object, one in the background.

    On: the object's pixel that is nearest to its centroid. Off: of a grid of 6 x 6 pixels, an eighth inside the image,
    the one whose nearest pixel of the object is farthest. Where no mask tells, the object is taken to be at the centre.
    """
    H, W = picture.shape
    there = torch.tensor([[(H - 1) / 2, (W - 1) / 2]])
    if picture.mask is not None:
        h, w = picture.mask.shape
        there = (4 * torch.from_numpy(picture.mask[::4, ::4]).nonzero() + 0.5) * torch.tensor([H / h, W / w]) - 0.5
    on = there[(there - there.mean(dim=0)).norm(dim=1).argmin()]
    grid = torch.cartesian_prod(*((torch.arange(1, 7) + 0.5) * side / 8 - 0.5 for side in (H, W)))
    off = grid[torch.cdist(grid, there).min(dim=1).values.argmax()]
    return [tuple(on.tolist()), tuple(off.tolist())]


def size_of(record: Record) -> str:
    """The map of a layer, in words."""
    return "{} × {} map".format(*record.query_shape)


def share(kind: str, table: pd.DataFrame, trained: str, label: str = "", **about) -> Measure:
    """The mean of a kind of measure over images, in the places that the table holds of each network.

    trained: the network that is drawn; others are seeds or random by their names. about: other fields of the measure.
    """
    found = means(table, kind)
    mask = OWN if (trained, OWN) in found.index else NONE
    values = found.value.xs(mask, level="mask")
    return Measure(
        name=NAMES[kind] + (label and f", {label}"),
        trained=float(values[trained]),
        random={network: float(value) for network, value in values.items() if RANDOM in network},
        n=int(found.n[trained, mask]),
        other=float(found.value[trained, OTHER]) if mask == OWN else None,
        standard_error=float(found.standard_error[trained, mask]),
        seeds={network: float(value) for network, value in values.items() if network.startswith(SEED)},
        **about,
    )


def of_seeds(measure: Measure) -> np.ndarray:
    """The value of every seed; of the drawn one first."""
    return np.array([measure.trained, *measure.seeds.values()])


def unmasked(setting: Setting, name: str, value: Callable[[Trace], float], subject: Subject | None = None) -> Measure:
    """A measure that needs no mask, on the user's photograph."""
    networks = {RANDOM: setting.twin(subject)} if subject else setting.twins
    return Measure(
        name=name,
        trained=value(trace((subject or setting.subject).model, setting.own.x)),
        random={key: value(trace(network, setting.own.x)) for key, network in networks.items()},
        n=1,
    )


def compared(measures: Sequence[Measure]) -> list[Measure]:
    """The measures to be drawn beside their nulls: not those of one photograph that have random weights alone."""
    return [measure for measure in measures if measure.n > 1 or len(measure.nulls) > len(measure.random)]


def conditions(
    setting: Setting, pictures: Sequence[Picture], measures: Sequence[Measure], measured: str = "shares, "
) -> str:
    """Weights, images, size, seeds, as the end of a caption; without masks what was measured, too."""
    story, (H, W) = setting.subject.story, pictures[0].shape
    made = ", ".join(f"{key} {story[key]}" for key in ("seed", "steps") if key in story)
    text = f"Weights: {story['file']}{made and f' ({made})'} at {H} × {W}; random weights: seed {setting.seed}. "
    several = f"; random weights {' and '.join(setting.paper.random)}" * (len(measures[0].random) > 1)
    if setting.image is not None:
        values = [f"{measure.name} {measure.trained:.2f} ({at_random(measure)})" for measure in measures]
        text += f"{pictures[0].name}, of which there is no mask: {'; '.join(values)}{several}."
        return text + (f" {shape}." if (shape := squeezed(pictures[0])) else "")
    known = [picture.name.removeprefix("test image ") for picture in pictures if picture.mask is not None]
    unknown = [picture.name for picture in pictures if picture.mask is None]
    text += f"Test images {', '.join(known)}. "
    if unknown:
        kind = "Unlike what it was trained on, not measured" if setting.subject.knows_shapes else "Not measured"
        text += f"{kind}: {' and '.join(unknown)}. "
    return text + f"Measures: {measured}means over {measures[0].n} test images{several}."


def listed(words: Sequence[str]) -> str:
    """Words one after another: a, b and c."""
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + list(words[-1:]))


def at_random(measure: Measure) -> str:
    """What random weights gave, in words."""
    return f"{RANDOM} {' / '.join(format(value, '.2f') for value in measure.random.values())}"
