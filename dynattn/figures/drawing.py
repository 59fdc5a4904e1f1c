"""What the figures of any paper share: what a figure is, how it measures a share, what its caption says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from dynattn import weights
from dynattn.tracing import Record, Trace, trace

from . import style
from .subjects import RANDOM, SEED, Picture, Setting, Subject, load_subject, squeezed

NAMES = {
    "points": "points on the object",
    "attention": "attention on the object",
    "propagated": "propagated attention on the object",
    "nmi": "groups and object (NMI)",
    "keys": "keys on the object, of queries on it",
    "keys_off": "keys on the object, of queries off it",
    "same": "heads where on it > off it (share)",
}


@dataclass(frozen=True)
class Drawing:
    """A figure, the line at its foot, what is on it, what it measured.

    A measure has: name; trained; random, a number for each kind of random network; other, the same under the masks of
    the other images (None where no mask is asked); n, how many images. It may have: other_seeds, of networks trained
    alike, or seeds, whose mean `trained` is; standard_error; layer; limit, the most that there could be; window, what a
    window would give. networks: all that the paper's evaluation found, by network.
    """

    figure: Figure
    caption: str
    pictures: list[Picture]
    measures: list[dict[str, Any]]
    weights: list[dict[str, Any]]
    networks: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How a figure is made; networks: those that it measures, and on how many images."""

    stem: str
    title: str
    draw: Callable[[Setting], Drawing]
    networks: Callable[[Setting], dict[str, int]]
    compares: str = ""  # checkpoints whose names begin so, on many images; it is left out where there are none of them

    def subjects(self) -> list[Subject]:
        """The models that it compares."""
        names = [name for name in weights.available() if name.startswith(self.compares)]
        return [load_subject(weights.path(name)) for name in names if self.compares]

    def lacks(self) -> str:
        """What it needs and does not find; empty where there is nothing."""
        if not self.compares or any(name.startswith(self.compares) for name in weights.available()):
            return ""
        return f"needs checkpoints {self.compares}*.safetensors, and none is found{weights.missing()}"


@dataclass(frozen=True)
class Paper:
    """What the figures of a paper are made from: plans, by the number of a figure or by the name of a table.

    shipped: the model that is drawn unless another is asked for. kind: of the records that a model must have.
    evaluate: takes a model, images, masks, labels and bar=, as `evaluate_points` does. twins: random networks like the
    subject, by names that begin with "random weights"; random: what distinguishes them, in words.
    """

    name: str
    shipped: str
    kind: str
    evaluate: Callable[..., dict]
    twins: Callable[[Setting], dict[str, nn.Module]]
    random: tuple[str, ...]
    plans: dict[int | str, Plan]


def of_the_subject(setting: Setting) -> dict[str, int]:
    """Networks that a figure of the subject measures, and on how many images: none on a user's photograph."""
    if setting.image is not None:
        return {}
    return dict.fromkeys([setting.subject.name, *setting.other_seeds, *setting.twins], setting.count)


def of_layers(setting: Setting) -> dict[str, int]:
    """Those of a figure whose layers are chosen by what they measure."""
    measured = setting.subject.knows_shapes and not setting.recorded(setting.subject)
    chosen = {setting.subject.name: setting.count} if measured else {}
    return of_the_subject(setting) | chosen


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


def aspect_of(pictures: Sequence[Picture]) -> float:
    """Height over width of the panels: a user's photograph keeps its own."""
    h, w = pictures[0].shown.shape[:2]
    return h / w


def size_of(record: Record) -> str:
    """The map of a layer, in words."""
    return "{} × {} map".format(*record.query_shape)


def share(
    kind: str, networks: dict[str, dict], trained: str, label: str = "", layer: str | None = None
) -> dict[str, Any]:
    """A share on the object as a measure: of a layer, or of the whole network."""
    values = {key: one if layer is None else one["layers"][layer] for key, one in networks.items()}
    own = values[trained]
    seeds = {key: value[kind] for key, value in values.items() if key.startswith(SEED)}
    return {
        "name": NAMES[kind] + (label and f", {label}"),
        "trained": own[kind],
        **({"other_seeds": seeds} if seeds else {}),
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


def compared(measures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measures that have nulls beside random weights, to be drawn beside them."""
    return [one for one in measures if one["other"] is not None or "window" in one]


def conditions(
    setting: Setting, pictures: Sequence[Picture], measures: Sequence[dict], measured: str = "shares, "
) -> str:
    """Weights, images, size, seeds, as the end of a caption; without masks what was measured, too."""
    story, (H, W) = setting.subject.story, pictures[0].shape
    made = ", ".join(f"{key} {story[key]}" for key in ("seed", "steps") if key in story)
    text = f"Weights: {story['file']}{made and f' ({made})'} at {H} × {W}; random weights: seed {setting.seed}. "
    several = f"; random weights {' and '.join(setting.paper.random)}" * (len(measures[0]["random"]) > 1)
    if setting.image is not None:
        values = [f"{one['name']} {one['trained']:.2f} ({at_random(one)})" for one in measures]
        text += f"{pictures[0].name}, of which there is no mask: {'; '.join(values)}{several}."
        return text + (f" {shape}." if (shape := squeezed(pictures[0])) else "")
    known = [one.name.removeprefix("test image ") for one in pictures if one.mask is not None]
    unknown = [one.name for one in pictures if one.mask is None]
    text += f"Test images {', '.join(known)}. "
    if unknown:
        kind = "Unlike what it was trained on, not measured" if setting.subject.knows_shapes else "Not measured"
        text += f"{kind}: {' and '.join(unknown)}. "
    return text + f"Measures: {measured}means over {measures[0]['n']} test images{several}."


def at_random(one: dict[str, Any]) -> str:
    """What random weights gave, in words."""
    return f"{RANDOM} {' / '.join(format(value, '.2f') for value in one['random'].values())}"
