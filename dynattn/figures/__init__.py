"""The papers' figures, drawn from trained models, each with its conditions and with what chance would give.

`draw` makes those of a paper; a figure is a function in the paper's file (`dat.py`). What they share: `subjects.py`,
models and pictures; `measures.py`; `drawing.py`, captions; `style.py`, looks; `gallery.py`, the folder they go into.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynattn import core

from . import dat, gallery
from .subjects import Setting, load_subject

FIGURES = {"dat": dat.PLANS}  # by paper and number


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
    only: Sequence[int] | None = None,
    image: Any = None,
    weights: str | PathLike | None = None,
    model: str | None = None,
    out: str | PathLike = Path("figures"),
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Draw a paper's figures into the folder `out`, print what they measure, and return an entry for each.

    only: numbers of figures (None: all that the other arguments allow). image: a photograph of one's own, anything that
    `read_image` takes; there is no mask of it, so nothing is measured against an object, and figure 4, which is
    measured on many images, is left out. weights: any checkpoint of the paper's models, published (.pth) or ours
    (.safetensors); figure 4, which has checkpoints of its own, is left out. model: the name of a model that ships
    trained, or the one that `weights` must hold. seed: of the random networks.
    An entry is what conditions.json has of a figure: file, caption, weights, images, versions, measures, nulls.
    Pictures, conditions.json and README.md are replaced whole, after each figure; those of other figures stay.
    Raises ValueError, TypeError, FileNotFoundError for wrong arguments, before anything is drawn.
    """
    core.one_of("paper", paper, tuple(FIGURES))
    plans = FIGURES[paper]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed!r}")
    setting = Setting(load_subject(weights, model), image, seed, progress)
    numbers = chosen(plans, only, image is not None, weights is not None or model is not None)
    setting.check()
    networks = {network: n for number in numbers for network, n in plans[number].networks(setting).items()}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    entries = []
    total = sum(networks.values()) + len(numbers)
    with tqdm(total=total, unit="image", disable=not progress) as setting.bar:
        for number in numbers:
            setting.bar.set_description(f"figure {number}")
            drawing = plans[number].draw(setting)
            entries.append(gallery.entry(paper, number, plans[number], drawing, setting))
            gallery.write(out, entries[-1], drawing.figure)
            setting.bar.update()
    print(gallery.table(entries, out))
    return entries


def chosen(plans: dict[int, Any], only: Sequence[int] | None, has_image: bool, has_weights: bool) -> list[int]:
    """The figures to draw, in order. Raises ValueError for one that does not exist or does not go with the rest."""
    reason = "image" if has_image else "weights or model" if has_weights else None
    if only is None:
        return [number for number in plans if not (reason and plans[number].of_many)]
    if unknown := sorted(set(only) - set(plans)):
        raise ValueError(f"only: expected figures of {', '.join(map(str, plans))}, got {', '.join(map(str, unknown))}")
    if reason and (fixed := [number for number in only if plans[number].of_many]):
        raise ValueError(f"only: figure {fixed[0]} compares shipped models on the test images; it takes no {reason}")
    return sorted(set(only))
