"""The pictures of the audit of DAT, `notebooks/audit/01_dat.ipynb`; what they show is computed in its cells."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import getsource
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn

from dynattn import core, official, weights
from dynattn.data import Shapes
from dynattn.figures import style
from dynattn.figures.measures import evaluate_points
from dynattn.figures.tables import summary
from dynattn.kernels import deformable as kernel
from dynattn.kernels import deformable_numba as on_cpu
from dynattn.lessons.notebook import INKS
from dynattn.lessons.published import deterministic, published_state  # noqa: F401  (the notebook shows them)
from dynattn.tracing import Record

READINGS = {"text": style.BLUE, "code": style.ORANGE}


def readings(references: Mapping[str, str], farthest: Callable[[float, str], float], side: int = 6) -> Figure:
    """Where references read on a map of `side` cells, and how far points get: the text's reading and the code's.

    references: the grid of each reading.  farthest(s, reading): pixels, on the map of the models.
    """
    figure, (places, ranges) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    values = [0.5, 1, 2, 4, 8, 14, 16]
    for name, colour in READINGS.items():
        cells = core.to_pixels(core.grid_points((side, side), references[name], torch.zeros(1)), (side, side))
        size, face = (80, "none") if name == "text" else (36, colour)
        places.scatter(*cells.T.flip(0), marker="s", s=size, facecolors=face, edgecolors=colour, linewidths=1.8)
        reach = [farthest(s, name) for s in values]
        ranges.plot(values, reach, "o-", color=colour, linewidth=2)
        ranges.annotate(name, (16, reach[-1]), (7, -4), textcoords="offset points", color=colour)
    lines = dict(color="#DDDDDD", linewidth=1, zorder=0)
    places.hlines(np.arange(side + 1) - 0.5, -0.5, side - 0.5, **lines)
    places.vlines(np.arange(side + 1) - 0.5, -0.5, side - 0.5, **lines)
    places.set(title="where references read", xlabel="column", ylabel="row", aspect="equal")
    places.set(xlim=(-0.6, side - 0.4), ylim=(side - 0.4, -0.6))
    ranges.axvline(2, color=style.INK, linewidth=1, linestyle="--")
    ranges.set(title="farthest move", xlabel="s; dashed: the models", ylabel="pixels of the map", xlim=(0, 19.5))
    ranges.set_xticks([2, 4, 8, 14])
    return figure


# ----------------------------------------------------------------------------------------------- what the kernel reads


class KernelReads:
    """What the CPU kernel reads of one head's bias table, for the points of one square record.

    record: of a deformable layer.  tables: its bias tables (h, I, I), for the record's map.  head: one of its heads.
    """

    def __init__(self, record: Record, tables: Tensor, head: int):
        self.entries, self.size, self.side = tables[head].numpy(), tables.shape[1], record.query_shape[1]
        places, steps, _ = kernel.table_places(record.points[None], tables, (self.side, self.side), True)
        self.places, self.step = places[0, record.group(head)].numpy(), float(steps[0])
        self.found = on_cpu.room_for_runs(len(self.places), self.side)
        on_cpu.find_runs(self.places, self.step, self.side, self.size, *self.found)

    def runs(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The runs of key n: queries by column, the left of the two table columns each reads, the right one's share."""
        first, cell, part = (array[n] for array in self.found)
        r = 0
        while first[r] < self.side:
            ahead = np.arange(first[r + 1] - first[r])
            yield first[r] + ahead, cell[r] + ahead, part[r] + (self.step - 1) * ahead
            r += 1

    def bias(self, n: int, i: int) -> np.ndarray:
        """The bias of the queries in row i of the map for key n."""
        above, low = on_cpu.row_place(self.places[n, 0], self.step, i, self.size)
        line = self.entries[above] + (self.entries[above + 1] - self.entries[above]) * low
        return np.concatenate([line[left] + (line[left + 1] - line[left]) * share for _, left, share in self.runs(n)])

    def touched(self, n: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns of the table that rows of queries read for key n."""
        above = [on_cpu.row_place(self.places[n, 0], self.step, i, self.size)[0] for i in rows]
        left = [column for _, columns, _ in self.runs(n) for column in columns]
        return tuple(np.unique([first, np.add(first, 1)]) for first in (above, left))


def table_reads(reads: KernelReads, keys: Sequence[int], rows: range) -> Figure:
    """The windows of the table that all queries, and some rows of them, read for some keys; the first key in detail."""
    entries, side = reads.entries, reads.side
    figure = plt.figure(figsize=(15, 6.8), layout="constrained")
    panels = figure.subplot_mosaic([["table", "places"], ["table", "shares"]], width_ratios=[6.2, 8.2])
    grey = dict(cmap="Greys", vmin=entries.min(), vmax=entries.max() + np.ptp(entries), interpolation="nearest")
    ax = panels["table"]
    ax.imshow(entries, **grey)
    for n, colour in zip(keys, (INKS[0], *INKS[2:]), strict=False):
        for some, face, dashes in ((range(side), "none", (0, (4, 3))), (rows, (colour, 0.7), "solid")):
            i, j = reads.touched(n, some)
            box = (j[0] - 0.5, i[0] - 0.5), len(j), len(i)
            ax.add_patch(plt.Rectangle(*box, facecolor=face, edgecolor=colour, linewidth=2, linestyle=dashes))
        ax.text(j[0] + 0.3, i[0] - 1.1, f"key {n}", color=colour, weight="bold", fontsize=14)
    ax.set(title="the bias table", xlabel="column of the table", ylabel="row of the table")

    n = keys[0]
    i, j = reads.touched(n, rows)
    extent = j[0] - 0.5, j[-1] + 0.5, i[-1] + 0.5, i[0] - 0.5
    level, mark = i[0] - 4, dict(edgecolors=style.INK, linewidths=0.7, zorder=4)
    ax = panels["places"]
    ax.imshow(entries[np.ix_(i, j)], extent=extent, **grey)
    ax.hlines(i - 0.5, *extent[:2], color="white", linewidth=1.5)
    ax.vlines(j - 0.5, *extent[2:], color="white", linewidth=1.5)
    for (queries, left, share), colour in zip(reads.runs(n), INKS, strict=False):
        for row in rows:
            ax.scatter(left + share, 0 * left + reads.places[n, 0] + reads.step * row, s=40, color=colour, **mark)
        ax.plot([j[0] + queries, left], [level, i[0] - 0.5], color=colour, linewidth=1.6)
        ax.scatter(j[0] + queries, 0 * queries + level, marker="s", s=90, color=colour, **mark)
        panels["shares"].plot(queries, share, "o-", color=colour, markeredgecolor=style.INK, markeredgewidth=0.7)
    words = f"a row of {side} queries; a line leads to the left of the two columns that each reads"
    ax.text(extent[0], level - 1.1, words)
    ax.set(xlim=extent[:2], ylim=(extent[2] + 0.3, level - 1), yticks=i)
    ax.set_title(f"key {n}: the places that the {len(rows) * side} queries of a tile read", pad=30)
    ax.spines[:].set_visible(False)
    panels["shares"].set(ylim=(0, 1.05), yticks=[0, 0.5, 1], xlabel="column of the query")
    panels["shares"].set_title("the share of the right one of the two columns")
    return figure


def softmax_walk(logits: Tensor, states: Sequence[tuple[float, float]], tile: int) -> Figure:
    """The order of tiles and blocks in the kernel, and one query's softmax: (maximum, sum) after each block of keys.

    logits: (N,) of the query.  tile: the number of the tile that is worked at.
    """
    N, block, height = len(logits), on_cpu.KEYS, on_cpu.QUERIES
    blocks, tiles = range(0, N, block), 7
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.4), width_ratios=[1, 1.7], layout="constrained")
    edge = dict(edgecolor="#777777", linewidth=1, clip_on=False)
    for row in range(tiles):
        done, here = row < tile, row == tile
        colours = [style.ORANGE if k == 1 else "#FFDCA8" if k < 1 else "white" for k in range(len(blocks))]
        for n, colour in zip(blocks, colours, strict=True):
            face = colour if here else "#DDDDDD" if done else "white"
            left.add_patch(plt.Rectangle((n, row), min(block, N - n), 1, facecolor=face, **edge))
        for x, width in ((N + 14, 16), (N + 36, 16), (N + 58, 44)):
            face = style.BLUE if here else "#DDDDDD" if done else "white"
            left.add_patch(plt.Rectangle((x, row), width, 1, facecolor=face, **edge))
    for x, name in ((N + 22, "max"), (N + 44, "sum"), (N + 80, "output")):
        left.text(x, -0.15, name, rotation=90, ha="center", va="bottom")
    left.set(xlim=(0, N + 103), ylim=(tiles, 0), xlabel="keys", ylabel="tiles of queries", xticks=[*blocks, N])
    left.set(yticks=[])
    left.spines[:].set_visible(False)
    left.set_title(f"tiles of {height} queries, blocks of {block} keys", loc="left", pad=12)

    right.plot(range(N), logits, "o", color="#999999", markersize=5)
    for start, (row_max, row_sum) in zip(blocks, states, strict=True):
        end = min(start + block, N)
        right.hlines(row_max, start - 0.5, end - 0.5, color=style.BLUE, linewidth=3)
        right.axvline(end - 0.5, color="#BBBBBB", linewidth=1)
        words, place = (
            f"max {row_max:.2f}\nsum {row_sum:.1f}".replace("-", "−"),
            dict(xycoords=("data", "axes fraction")),
        )
        right.annotate(words, ((start + end) / 2, 1.015), ha="center", va="bottom", **place)
    right.set(xlim=(-0.5, N - 0.5), xticks=[*blocks, N], xlabel="keys", ylabel="logit")
    right.set_title("one query: its logits, and after each block the maximum so far, in blue", pad=46)
    return figure


def times(took: Mapping[tuple[int, bool], Mapping[str, np.ndarray]], pays_from: int) -> Figure:
    """Milliseconds of each form against the number of points. took[points, backward][form]: of every round."""
    numbers = sorted({points for points, _ in took})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for ax, backward, title in zip(axes, (False, True), ("forward, ms", "forward and backward, ms"), strict=True):
        for (form, name), colour in zip(FORMS.items(), INKS, strict=False):
            for points in numbers:
                each = took[points, backward][form]
                ax.plot([points] * len(each), each, "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
            fastest = [took[points, backward][form].min() for points in numbers]
            ax.plot(numbers, fastest, color=colour, linewidth=2)
            ax.annotate(name, (numbers[-1], fastest[-1]), (8, -4), textcoords="offset points", color=colour)
        ax.axvline(pays_from, color=style.INK, linestyle="--", linewidth=1)
        ax.set(xscale="log", yscale="log", title=title, xlim=(13, 1000))
        ax.set_xlabel("points; dashed: from here on “auto” takes the kernel")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.set_xticks(numbers, numbers)
    return figure


FORMS = {"torch": "torch form", "numba": "kernel"}


# ------------------------------------------------------------------------------------------------- the published code


def layers(model: nn.Module, kind: type) -> list[nn.Module]:
    """The layers of a model that are of a kind."""
    return [module for module in model.modules() if isinstance(module, kind)]


def bars(changes: Mapping[str, float]) -> Figure:
    """How much each misreading moves the logits; those of the text in blue."""
    figure, ax = plt.subplots(figsize=(11, 4.8), layout="constrained")
    for i, (name, change) in enumerate(sorted(changes.items(), key=lambda one: one[1])):
        ax.barh(name, 100 * change, color=style.BLUE if name.startswith("text") else style.ORANGE)
        ax.annotate(f"{100 * change:.2g} %", (100 * change, i), (5, -4), textcoords="offset points", fontsize=11)
    ax.set(xlabel="change of the logits, % of their norm", xscale="log", xlim=(0.02, 200))
    return figure


def measure_points(name: str, count: int) -> pd.DataFrame:
    """The summary of what `evaluate_points` finds in a kept checkpoint, on the first `count` test images."""
    items = [Shapes("easy", "test", 128)[index] for index in range(count)]
    images, masks = (np.stack([item[part].numpy() for item in items]) for part in (0, 2))
    return summary(evaluate_points(official.model_from(weights.path(name))[1], images, masks))


def of_all_layers(found: pd.DataFrame, kind: str) -> pd.Series:
    """The mean over the layers of a summary: `value`, `other`; `standard_error` is an upper bound of the mean's own."""
    return found.xs(kind, level="kind").mean()


def best_ratio(found: pd.DataFrame, kind: str) -> float:
    """The most that a layer's share is above its null."""
    shares = found.xs(kind, level="kind")
    return float((shares.value / shares.other).max())


def shared_and_own(picture, own: Record, shared: Record, queries: Sequence[tuple[float, float]]) -> Figure:
    """What some queries (row, col) read: in a layer where each has its own points, and in one where they share them."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    for ax, record in zip(axes, (own, shared), strict=True):
        style.photograph(ax, picture.shown, picture.shape)
        for query, colour in zip(queries, INKS, strict=False):
            keys = record.keys(*query).xy.numpy()
            if record is own:
                style.lines(ax, np.repeat([query[::-1]], len(keys), axis=0), keys, colour)
            style.dots(ax, keys, np.full(len(keys), 0.002), colour if record is own else "#DDDDDD")
            ax.plot(*query[::-1], marker="*", markersize=20, color=colour, markeredgecolor="white", zorder=7)
    axes[0].set_title("Deformable-DETR, untrained: points of each query")
    axes[1].set_title("DAT, trained: the same points for all")
    return figure


def dynattn_check(function: Callable, *imports: str) -> subprocess.CompletedProcess:
    """`dynattn check` of a file that holds some imports and one function, as a student would hand it in."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.py"
        file.write_text("\n".join(imports) + "\n\n\n" + getsource(function))
        return subprocess.run([sys.executable, "-m", "dynattn", "check", file], capture_output=True, text=True)
