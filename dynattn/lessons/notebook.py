"""What the notebooks share: computed text and tables, figures in a tenth of the bytes, the library's own code.

    from dynattn.lessons.notebook import HEAT, INKS, agree, normal, say, set_up, show, source, table
    from dynattn.lessons.notebook import ledger, measured, recorded  # what the repository holds of a paper

Needs the extra `notebooks` (IPython).
"""

import inspect
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image, Markdown, display
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

from dynattn import create_model, papers, verify, weights
from dynattn.data import Shapes
from dynattn.figures import style
from dynattn.figures.tables import Measure
from dynattn.tracing import Record
from dynattn.widgets import Lens

PLACES = (Path("../figures"), Path("../../figures"))  # from a lesson's folder, and from an audit's
GALLERY = next((place for place in PLACES if place.is_dir()), PLACES[0])  # what `dynattn figures` drew
INKS = [style.ORANGE, style.BLUE, "#009E73", "#CC79A7", style.GREY]  # Okabe and Ito: all colour vision tells them apart
HEAT = LinearSegmentedColormap.from_list("heat", ["white", style.ORANGE, "#8A2B06", "#1A0800"])
JPEG = {"format": "jpeg", "pil_kwargs": {"quality": 88}}


def set_up(seed: int = 0) -> None:
    """The same numbers and looks in every notebook."""
    torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
    torch.manual_seed(seed)
    plt.rcParams.update({"figure.dpi": 90, "font.size": 12, "axes.titlesize": 13, "text.color": style.INK})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def say(text: str) -> None:
    """Markdown with computed numbers in it."""
    display(Markdown(text))


def table(head: Sequence, rows: Iterable[Sequence]) -> None:
    """A table of computed numbers."""
    say("\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)))


def source(*things: Callable | type) -> None:
    """The library's own code."""
    say("\n".join(f"```python\n{inspect.getsource(thing)}```" for thing in things))


def show(figure: Figure, dpi: int = 90) -> None:
    """A figure of photographs, as JPEG: a fifth of the size."""
    plt.close(figure)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, bbox_inches="tight", **JPEG)
    display(Image(picture.getvalue()))


def recorded(paper: str, gallery: Path = GALLERY) -> dict[int | str, dict[str, Any]]:
    """The entries of a paper's figures by their numbers, as conditions.json has them.

    Raises AssertionError where one was drawn with other weights than those that ship, or on a photograph of one's own.
    """
    entries = json.loads((gallery / "conditions.json").read_text())
    entries = {entry["figure"]: entry for entry in entries if entry["paper"] == paper}
    for number, entry in entries.items():
        for one in entry["weights"]:
            name = Path(one["file"]).stem
            story = weights.read(weights.path(name))[1] if name in weights.available() else {"command": "none"}
            same = all(story.get(key) == one.get(key) for key in ("command", "accuracy"))  # some have no accuracy
            assert same and entry["networks"], f"figure {number} is of others: run `dynattn figures --paper {paper}`"
    return entries


def measured(entries: Mapping[Any, dict]) -> None:
    """What figures measured, beside the nulls, by the names that the figures are given here."""
    rows = []
    for figure, entry in entries.items():
        for measure in map(Measure.read, entry["measures"]):
            random = " / ".join(f"{value:.2f}" for value in measure.random.values())
            other = "" if measure.other is None else f"{measure.other:.2f}"
            rows.append((figure, measure.name, f"{measure.trained:.2f}", random, other, measure.n))
    table(("figure", "measure", "trained", "random weights", "another image's mask", "images"), rows)


def ledger(paper: str, **numbers: str) -> None:
    """Every row of a paper's ledger, with computed numbers in the places of their names. All names must be given."""
    rows = []
    for number, row in enumerate(papers.ledger(paper), 1):
        said = (text.format(**numbers) for text in (row.paper, row.code, row.consequence))
        named = (", ".join(f"`{name}`" for name in names) for names in (row.argument, row.test))
        rows.append((number, *said, *named))
    table(("", "the paper says", "the code does", "consequence", "argument", "test"), rows)


def agree(
    operation: Callable, arguments: Mapping, forms: Sequence[str] = ("torch",), judge: str = "loops", **options
) -> None:
    """Forms of an operation against the loops in float64, output and every gradient: asserted, and by how much."""
    found = {form: verify.answer(partial(operation, impl=form), arguments, options) for form in (judge, *forms)}
    rows = []
    for name, want in found[judge].items():
        apart = [float((found[form][name] - want).abs().max() / want.abs().max()) for form in forms]
        assert max(apart) < 1e-10
        rows.append((name, *(f"{a:.1e}" for a in apart)))
    table((f"largest relative difference from {judge}", *forms), rows)


def found(operation: str) -> str:
    """Every mistake that `verify` knows of an operation, in words. Raises AssertionError for one that it overlooks."""
    mistakes = verify.registry.known(operation).mistakes
    for mistake, wrong in mistakes.items():
        try:
            verify.check(operation, wrong)
        except verify.Mismatch:
            continue
        raise AssertionError(f"{operation}: {mistake} is overlooked")
    return f"`{operation}`, {len(mistakes)} mistakes, all found: {'; '.join(mistakes)}."


def on_meta(name: str, **options) -> nn.Module:
    """A model without numbers: to be counted."""
    with torch.device("meta"):
        return create_model(name, **options)


def normal(*shape: int) -> Float[Tensor, "..."]:
    """Normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def fastest(call: Callable[[], object], rounds: int = 5) -> float:
    """Milliseconds of the fastest of some rounds, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return 1000 * min(times)


# ------------------------------------------------------------------------------------------- what every lesson draws


def panels(*widths: float, height: float = 4.6, width: float = 12.5) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side, no wider than a page."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=style.PAPER)
    return figure, list(np.atleast_1d(figure.subplots(1, len(widths), width_ratios=widths)))


def costs(found: Mapping[str, Mapping[str, tuple[float, float]]], unit: str) -> Figure:
    """Of each stage and layer: multiply-adds (pale) and time, both over those of the layer that is called `unit`."""
    figure, axes = panels(*[1] * len(found), height=3.8)
    for ax, (title, layers) in zip(axes, found.items(), strict=True):
        for i, both in enumerate(layers.values()):
            for j, (value, one) in enumerate(zip(both, layers[unit], strict=True)):
                ax.bar(i + 0.38 * (j - 0.5), value / one, 0.36, color=INKS[i], alpha=(0.45, 1.0)[j])
        ax.axhline(1, color=style.INK, linewidth=1)
        names = [name.replace(" of", "\nof").replace(" attention", "").replace("-", "-\n") for name in layers]
        ax.set_xticks(range(len(layers)), names)
        ax.set(title=title, yscale="log")
        ax.minorticks_off()
        values = [value / one for both in layers.values() for value, one in zip(both, layers[unit], strict=True)]
        low, high = min(values) / 1.5, 1.5 * max(values)
        ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low < tick < high]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_ylim(low, high)
    axes[0].set_ylabel(f"over {unit}")
    return figure


def numbered(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Layers to choose from: their number and map in words, and their names."""
    return [(f"{i} ({one.query_shape[0]} × {one.query_shape[1]})", one.name) for i, one in enumerate(records, 1)]


def beside_others(name: str, layer: str, image: int, query: tuple[float, float]) -> Lens:
    """A lens on a layer of a small model, and on a dense and a window layer of those that were trained alike."""
    names = {"vit_mini": "blocks.3.block.attn", "swin_mini": "layers.1.blocks.3.block.attn", name: layer}
    models = {one: create_model(one, pretrained=True) for one in names}
    row, col = query
    return Lens(models, Shapes("easy", "test", 512)[image][0], row=row, col=col, layer=list(names.values()))
