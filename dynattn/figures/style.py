"""How the figures look: sheets of photographs with points over them, legible from the last row of a lecture room.

Colours are Okabe and Ito's, which all kinds of colour vision tell apart; every mark has a light and a dark edge, so
that it stands out from any photograph. Sizes are in inches and points of a sheet 12 inches wide.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ORANGE, BLUE, GREEN, RED, INK, PAPER = "#F28E00", "#38A8F0", "#009E73", "#E8112D", "#222222", "white"
GROUPS = (ORANGE, BLUE)  # of offset groups
WIDTH = 12.0
DPI = 200
TITLE, LABEL, SMALL = 19, 15, 11.5  # points
GAP = 0.1
HALO = [patheffects.withStroke(linewidth=2.6, foreground=INK, alpha=0.75)]


def sheet(
    rows: int, columns: int, title: str, caption: str, *, row_labels: Sequence[str] = (), aspect: float = 1.0
) -> tuple[Figure, np.ndarray]:
    """A figure with a title, a caption at its foot and rows x columns empty panels; `aspect` is height over width."""
    left = 0.62 if row_labels else 0.15
    panel = min((WIDTH - left - 0.15 - GAP * (columns - 1)) / columns, 6.0 / aspect)
    lines = textwrap.wrap(caption, 138, break_on_hyphens=False)
    head, key, foot = 0.62, 0.42, 0.22 + 0.2 * len(lines)
    height = head + rows * panel * aspect + GAP * (rows - 1) + key + foot
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    left += (WIDTH - left - 0.15 - GAP * (columns - 1) - panel * columns) / 2
    axes = np.empty((rows, columns), dtype=object)
    for i in range(rows):
        bottom = height - head - (i + 1) * panel * aspect - i * GAP
        for j in range(columns):
            box = (left + j * (panel + GAP), bottom, panel, panel * aspect)
            axes[i, j] = figure.add_axes([box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height])
        if row_labels:
            middle = (bottom + panel * aspect / 2) / height
            figure.text(
                (left - 0.14) / WIDTH, middle, row_labels[i],
                rotation=90, ha="right", va="center", ma="center", fontsize=LABEL, color=INK, linespacing=1.15,
            )  # fmt: skip
    figure.text(left / WIDTH, 1 - 0.2 / height, title, ha="left", va="top", fontsize=TITLE, color=INK, weight="bold")
    figure.text(
        0.15 / WIDTH, 0.12 / height, "\n".join(lines), ha="left", va="bottom", fontsize=SMALL, color="#444444",
        linespacing=1.25,
    )  # fmt: skip
    figure.key_height = (foot + key / 2) / height  # where `key` puts the legend
    return figure, axes


def key(figure: Figure, marks: Sequence[tuple[Line2D, str]]) -> None:
    """What the marks mean, in one line between panels and caption."""
    figure.legend(
        [mark for mark, _ in marks],
        [text for _, text in marks],
        loc="center",
        bbox_to_anchor=(0.5, figure.key_height),
        ncols=len(marks),
        frameon=False,
        fontsize=SMALL + 1.5,
        handletextpad=0.4,
        columnspacing=2.0,
        labelcolor=INK,
    )


def mark(marker: str, colour: str, size: float = 9, **options) -> Line2D:
    """A mark for `key`."""
    edge = {"markeredgecolor": INK, "markeredgewidth": 0.6} | options
    return Line2D([], [], linestyle="none", marker=marker, markersize=size, color=colour, **edge)


def photograph(ax: Axes, shown: UInt8[np.ndarray, "h w 3"], shape: tuple[int, int], *, veil: float = 0.35) -> None:
    """A picture as the ground of a panel, in the pixels of the (H, W) image that the model saw.

    Half its colour is taken out and a grey veil drawn over it, so that marks stand out.
    """
    H, W = shape
    grey = shown @ np.array([0.299, 0.587, 0.114])
    calm = (0.5 * shown + 0.5 * grey[..., None]) * (1 - veil) + 120 * veil
    ax.imshow(calm.astype(np.uint8), extent=(-0.5, W - 0.5, H - 0.5, -0.5), interpolation="lanczos")
    ax.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5), xticks=[], yticks=[])
    ax.set_aspect((shown.shape[0] / shown.shape[1]) / (H / W))
    for spine in ax.spines.values():
        spine.set_visible(False)


def outline(ax: Axes, mask: Bool[np.ndarray, "h w"], shape: tuple[int, int]) -> None:
    """The edge of the object: a white line with a dark halo."""
    h, w = mask.shape
    x, y = ((np.arange(n) + 0.5) * side / n - 0.5 for n, side in ((w, shape[1]), (h, shape[0])))
    padded = np.pad(mask.astype(float), 1)
    x, y = (np.concatenate([[a[0] - 1e-3], a, [a[-1] + 1e-3]]) for a in (x, y))
    for width, colour in ((3.4, INK), (1.7, PAPER)):
        ax.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=width, zorder=2)


def dots(
    ax: Axes, xy: Float[np.ndarray, "n 2"], area: Float[np.ndarray, " n"], colour: str, *, alpha: float = 0.9
) -> None:
    """Filled points of an area in square points, the largest below."""
    order = np.argsort(-area)
    xy, area = xy[order], area[order]
    ax.scatter(*xy.T, s=area + 5, color=PAPER, alpha=0.55, linewidths=0, zorder=4, clip_on=True)
    ax.scatter(*xy.T, s=area, color=colour, alpha=alpha, edgecolors=INK, linewidths=0.55, zorder=5, clip_on=True)


def rings(ax: Axes, xy: Float[np.ndarray, "n 2"], size: float = 9) -> None:
    """Small hollow points."""
    ax.scatter(*xy.T, s=size, facecolors="none", edgecolors=INK, linewidths=1.4, alpha=0.5, zorder=3)
    ax.scatter(*xy.T, s=size, facecolors="none", edgecolors=PAPER, linewidths=0.7, zorder=3)


def lines(ax: Axes, start: Float[np.ndarray, "n 2"], end: Float[np.ndarray, "n 2"], colour: str) -> None:
    """A line from each start to its end."""
    segments = np.stack([start, end], axis=1)
    ax.add_collection(LineCollection(segments, colors=INK, linewidths=2.0, alpha=0.45, zorder=3))
    ax.add_collection(LineCollection(segments, colors=colour, linewidths=1.1, zorder=3))


def star(ax: Axes, x: float, y: float) -> None:
    """A query."""
    ax.plot(x, y, marker="*", markersize=21, color=RED, markeredgecolor=PAPER, markeredgewidth=1.3, zorder=7)


def note(ax: Axes, text: str) -> None:
    """A word in the upper left corner of a panel."""
    ax.text(
        0.03, 0.965, text, transform=ax.transAxes, ha="left", va="top", fontsize=SMALL, color=PAPER, zorder=8,
        path_effects=HALO,
    )  # fmt: skip
