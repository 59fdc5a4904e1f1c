"""The papers' figures, drawn from trained models, each with its conditions and with what chance would give.

`draw` makes those of a paper; a figure is a function in the paper's file (`dat.py`). What they share: `subjects.py`,
models and pictures; `measures.py`, what is measured of an image; `tables.py`, of many images; `evidence.py`, class maps
and receptive fields of any model with stages; `class_maps.py`, `fields.py`, figures of these; `features.py`, maps as
colours; `readers.py`, what points read in dense attention; `positions.py`, tables of positions; `segmentation.py`,
classes of pixels; `run.py`, what a figure is and what those of a run share; `drawing.py`, captions; `sweep.py`,
networks that differ in one argument; `style.py`, looks; `gallery.py`, the folder they go into; `noise.py`, what counts
as a change.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynattn import core, plugins

from . import gallery
from .evidence import class_map, contribution, receptive_field
from .run import Paper, Plan, Setting
from .subjects import Subject, load_subject, squeezed

__all__ = ["FIGURES", "Paper", "Plan", "Setting", "class_map", "contribution", "draw", "receptive_field", "register"]

FIGURES: dict[str, Paper] = {}


def register(name: str, paper: Paper) -> None:
    """Make the figures of a paper known to `draw` and the command line; a name again replaces them."""
    if not isinstance(paper, Paper):
        raise TypeError(f"paper: expected a Paper, got {type(paper).__name__}")
    FIGURES[name] = paper


@contextmanager
def one_thread() -> Iterator[None]:
    """Images go through the networks one by one: too little work for two threads, which wait for each other instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def draw(
    paper: str = "dat",
    only: Sequence[int | str] | None = None,
    image: Any = None,
    weights: str | PathLike | None = None,
    model: str | None = None,
    out: str | PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Draw a paper's figures into a folder, print what they measure, and return an entry for each.

    only: numbers of figures, names of tables (None: all that the other arguments and the model allow). image: a
    photograph of one's own, anything that `read_image` takes; there is no mask of it, so nothing is measured against an
    object, and what compares models on many images, DAT's figure 4 and DGT's table 4b, is left out. weights: any
    checkpoint of the paper's models, published (.pth) or ours (.safetensors); what has checkpoints of its own is left
    out. model: the name of a model that ships trained, or the one that `weights` must hold. out: the folder, by default
    `figures`, or NAME_figures beside it for an image, a checkpoint or a model of one's own. seed: of the random
    networks.
    An entry is what conditions.json has of a figure, with four digits: file, caption, weights, images, versions,
    measures with their nulls, and of each network a summary by layer, head and kind of measure.
    Pictures, conditions.json and README.md are replaced whole, after each figure; those of other figures stay, and so
    does what differs by no more than another machine's rounding.
    Raises ValueError, TypeError, FileNotFoundError, ImportError for wrong arguments, before anything is drawn.
    """
    plugins.load_papers()
    core.one_of("paper", paper, tuple(FIGURES))
    about = FIGURES[paper]
    plans = about.plans
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed!r}")
    subject = load_subject(weights, about.shipped if weights is None and model is None else model)
    setting = Setting(about, subject, image, seed, progress)
    numbers = chosen(plans, only, image is not None, weights is not None or model is not None)
    setting.check()
    numbers = fitting(plans, numbers, only, subject)
    if setting.own and (shape := squeezed(setting.own)):
        print(shape)
    networks = {network: n for number in numbers for network, n in plans[number].networks(setting).items()}
    out = default_folder(image, weights, model) if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)

    entries = []
    total = sum(networks.values()) + len(numbers)
    with tqdm(total=total, unit="image", disable=not progress) as setting.bar:
        for number in numbers:
            setting.bar.set_description(called(number))
            drawing = plans[number].draw(setting)
            entries.append(gallery.entry(paper, number, plans[number], drawing, setting))
            gallery.write(out, entries[-1], drawing.figure)
            setting.bar.update()
    print(gallery.table(entries, out, about))
    return entries


def default_folder(image: Any, weights: str | PathLike | None, model: str | None) -> Path:
    """Where figures go: what is one's own does not replace the gallery."""
    if image is weights is model is None:
        return Path("figures")
    files = [Path(file).stem for file in (image, weights) if isinstance(file, str | PathLike)]
    names = files or [model or "own"]
    return Path("_".join([*names, "figures"]))


def called(number: int | str) -> str:
    """A figure in words; a table has a name."""
    return number if isinstance(number, str) else f"figure {number}"


def fitting(
    plans: dict[int | str, Plan], numbers: list[int | str], only: Sequence[int | str] | None, subject: Subject
) -> list[int | str]:
    """Those figures that can be drawn of the model; what is left out is told, and an error if it was asked for."""
    reasons = {number: reason for number in numbers if (reason := plans[number].unfit(subject))}
    for number, reason in reasons.items():
        if only is not None:
            raise ValueError(f"only: {called(number)} {reason}")
        print(f"{called(number)} is left out: it {reason}")
    return [number for number in numbers if number not in reasons]


def chosen(
    plans: dict[int | str, Plan], only: Sequence[int | str] | None, has_image: bool, has_weights: bool
) -> list[int | str]:
    """The figures to draw, in order; what is left out for want of checkpoints or of a package is told.

    Raises ValueError for one that does not exist or does not go with the rest, FileNotFoundError for want of
    checkpoints, ImportError for want of a package.
    """
    reason = "image" if has_image else "weights or model" if has_weights else None
    why = f"compares shipped models on the test images; it takes no {reason}"
    if unknown := [str(number) for number in only or () if number not in plans]:
        raise ValueError(f"only: expected figures of {', '.join(map(str, plans))}, got {', '.join(unknown)}")
    if only is None:
        numbers = [number for number in plans if not (reason and plans[number].compares)]
        for number in (number for number in plans if number not in numbers):
            print(f"{called(number)} is left out: it {why}")
    else:
        numbers = [number for number in plans if number in only]
    for number in tuple(numbers):
        if reason and plans[number].compares:
            raise ValueError(f"only: {called(number)} {why}")
        if lack := plans[number].lacks():
            if only is not None:
                raise type(lack)(f"only: {called(number)} {lack}")
            print(f"{called(number)} is left out: it {lack}")
            numbers.remove(number)
    return numbers
