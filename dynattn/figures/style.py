"""How the figures look: sheets of photographs with points over them, legible from the last row of a lecture room.

Colours are Okabe and Ito's, which all kinds of colour vision tell apart; every mark has a light and a dark edge, so
that it stands out from any photograph. Sizes are in inches and points of a sheet 12 inches wide.
"""

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from .tables import Measure

ORANGE, BLUE, RED, INK, GREY, PAPER = "#F28E00", "#38A8F0", "#E8112D", "#222222", "#555555", "white"
GREEN, YELLOW, PURPLE, NAVY, RUST = "#00B07C", "#F0E442", "#CC79A7", "#0072B2", "#A8480A"
GROUPS = (ORANGE, BLUE, GREEN, YELLOW, PURPLE, NAVY, RUST, INK)  # of queries, or of offsets
HEAT = LinearSegmentedColormap.from_list("heat", ["#8B0A1E00", "#E8112D99", "#F28E00D0", "#F0E442E0"])
FIELD = LinearSegmentedColormap.from_list("field", ["#0B0B1E", "#27306E", "#2F7FB8", "#7FD0C6", "#FCF7C8"])
VIRIDIS = colormaps["viridis"]
WIDTH = 12.0
DPI = 160
TITLE, LABEL, SMALL = 19, 15, 11.5  # points
GAP, EDGE, KEY, PLOT, MEASURE = 0.1, 0.2, 0.5, 1.75, 0.26  # inches: between panels, at the rim; height of the rest
LINE = 0.235  # inches: height of a line of a table
DECADES = 4  # of a receptive field, from white to black


@dataclass(frozen=True)
class Sheet:
    """A figure, its rows x columns panels, the plots and the table under them, and how high its key stands.

    key_height: as a share of the height.
    """

    figure: Figure
    panels: np.ndarray
    plots: list[Axes]
    key_height: float
    table: Axes | None = None


def sheet(
    rows: int,
    columns: int,
    title: str,
    caption: str,
    measures: Sequence[Measure] = (),
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    aspect: float = 1.0,
    together: int = 1,
    gap: float = GAP,
    plots: int = 0,
    lines: int = 0,
) -> Sheet:
    """A sheet: title, column labels, rows x columns empty panels, plots, key, table, measures, caption, from the top.

    measures: drawn as `compare` draws them. aspect: a panel's height over its width. together: so many columns stand
    close, counted from the right, apart from the next. gap: between panels. plots: as wide as all panels; their x is
    the number of the column. lines: of the table.
    """
    wrapped = textwrap.wrap(caption, 138, break_on_hyphens=False)
    left = 1.2 if plots else 0.7 if row_labels else EDGE
    apart = [together > 1 and (columns - j) % together == 0 for j in range(1, columns)]
    gaps = np.array([0.0] + [3 * GAP if one else gap for one in apart])
    panel = min((WIDTH - left - EDGE - gaps.sum()) / columns, 5.5 / aspect)
    width = columns * panel + gaps.sum()
    left += (WIDTH - left - EDGE - width) / 2
    x = left + np.arange(columns) * panel + gaps.cumsum()
    y = (0.7 + 0.35 * bool(column_labels)) + np.arange(rows) * (panel * aspect + gap)
    plots_at = y[-1] + panel * aspect + 0.15 * bool(plots)
    key_at = plots_at + plots * PLOT
    table_at = key_at + KEY + 0.15 * bool(lines)
    measures_at = table_at + LINE * lines + 0.15 * bool(lines)
    caption_at = measures_at + bool(measures) * (0.62 + MEASURE * len(measures))
    height = caption_at + 0.205 * len(wrapped) + EDGE

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)

    def axes(x: float, top: float, width: float, tall: float) -> Axes:
        """Axes at inches from the left and from the top."""
        return figure.add_axes([x / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height])

    def words(x: float, top: float, text: str, **options) -> None:
        """Text at inches from the left and from the top."""
        figure.text(x / WIDTH, 1 - top / height, text, **{"color": INK, "fontsize": LABEL} | options)

    words(left, 0.22, title, va="top", fontsize=TITLE, weight="bold")
    for j, text in enumerate(column_labels):
        words(x[j] + panel / 2, y[0] - 0.09, text, ha="center", va="bottom")
    for i, text in enumerate(row_labels):
        place = dict(rotation=90, ha="right", va="center", multialignment="center")
        words(left - 0.1, y[i] + panel * aspect / 2, text, **place)
    words(EDGE, caption_at, "\n".join(wrapped), va="top", fontsize=SMALL, color=GREY)
    panels = np.array([[axes(x[j], y[i], panel, panel * aspect) for j in range(columns)] for i in range(rows)])
    lower = [axes(left, plots_at + i * PLOT, width, PLOT - 0.3) for i in range(plots)]
    for plot in lower:
        margin = 0.5 * panel / (panel + GAP)
        plot.set_xlim(-margin, columns - 1 + margin)
        plot.spines[["top", "right"]].set_visible(False)
        plot.tick_params(labelsize=SMALL + 1, colors=INK)
        plot.yaxis.set_label_coords(-0.55 / width, 0.5)
    if measures:
        compare(axes(4.6, measures_at + 0.3, WIDTH - 4.6 - 4 * EDGE, MEASURE * len(measures)), measures)
    below = axes(EDGE, table_at, WIDTH - 2 * EDGE, LINE * lines) if lines else None
    return Sheet(figure, panels, lower, 1 - (key_at + 0.5 * KEY - 0.03) / height, below)


def compare(ax: Axes, measures: Sequence[Measure]) -> None:
    """Each measure on a line from 0 to 1: trained, beside random weights and another image's mask."""
    kinds = {
        "trained": dict(marker="o", markersize=11, color=ORANGE, markeredgecolor=INK, zorder=5),
        "other seeds": dict(marker="o", markersize=6, color=ORANGE, markeredgecolor=INK, zorder=6),
        "random weights": dict(marker="o", markersize=8, color=PAPER, markeredgecolor=INK, zorder=3),
        "another image's mask": dict(marker="x", markersize=8, color=BLUE, markeredgewidth=2, zorder=4),
        "window of as many keys": dict(marker="s", markersize=8, color=PAPER, mec=BLUE, markeredgewidth=2, zorder=4),
        "most possible": dict(marker="|", markersize=15, color=INK, markeredgewidth=2, zorder=4),
    }
    rows, marks = np.arange(len(measures))[::-1], {}
    for row, measure in zip(rows, measures, strict=True):
        several = [[measure.trained], measure.seeds.values(), measure.random.values()]
        single = [[] if value is None else [value] for value in (measure.other, measure.window, measure.limit)]
        values = dict(zip(kinds, several + single, strict=True))
        ax.plot([0, 1], [row, row], color="#DDDDDD", linewidth=1, zorder=1)
        nearest = min(measure.nulls, key=lambda value: abs(value - measure.trained))
        ax.plot([nearest, measure.trained], [row, row], color=ORANGE, linewidth=3, alpha=0.5, zorder=2)
        for kind, numbers in values.items():
            if numbers:
                place = dict(linestyle="none", clip_on=False)
                (marks[kind],) = ax.plot(list(numbers), [row] * len(numbers), **place, **kinds[kind])
        place = dict(textcoords="offset points", va="center_baseline", fontsize=SMALL + 1, color=INK, weight="bold")
        ax.annotate(f"{measure.trained:.2f}", (1, row), (8, 0), **place)
    ax.set(xlim=(0, 1), ylim=(-0.6, len(measures) - 0.4))
    ax.set_yticks(rows, [measure.name for measure in measures], fontsize=SMALL + 1, color=INK)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"], fontsize=SMALL, color=GREY)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    place = dict(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=len(marks), frameon=False, borderaxespad=0.1)
    if len(marks) > 4:  # too long for the axes: over the whole sheet
        left, _, width, _ = ax.get_position().bounds
        place |= dict(bbox_to_anchor=((0.5 - left) / width, 1.0), columnspacing=1.0)
    kinds = [kind for kind in kinds if kind in marks]
    ax.legend([marks[kind] for kind in kinds], kinds, fontsize=SMALL + 1, handletextpad=0.2, **place)


def key(sheet: Sheet, marks: Sequence[tuple[Line2D, str]], *, centre: float = 0.5, apart: float = 2.0) -> None:
    """What the marks mean, in one line between panels and caption.

    centre: of the line, as a share of the width. apart: space between two of them, in letters.
    """
    sheet.figure.legend(
        [mark for mark, _ in marks],
        [text for _, text in marks],
        loc="center",
        bbox_to_anchor=(centre, sheet.key_height),
        ncols=len(marks),
        frameon=False,
        fontsize=SMALL + 1.5,
        handletextpad=0.4,
        columnspacing=apart,
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
    ax: Axes, xy: Float[np.ndarray, "n 2"], share: Float[np.ndarray, " n"], colour: str, *, alpha: float = 0.9
) -> None:
    """Filled points, each on its share of the panel's area (at least a speck), the largest below."""
    width, height = ax.figure.get_size_inches() * 72
    box = ax.get_position()
    area = share * box.width * width * box.height * height
    area = np.maximum(area, 2.5)
    order = np.argsort(-area)
    xy, area = xy[order], area[order]
    ax.scatter(*xy.T, s=(area**0.5 + 2) ** 2, color=PAPER, alpha=0.55, linewidths=0, zorder=4)
    ax.scatter(*xy.T, s=area, color=colour, alpha=alpha, edgecolors=INK, linewidths=0.55, zorder=5)


def rings(ax: Axes, xy: Float[np.ndarray, "n 2"], size: float = 9) -> None:
    """Small hollow points."""
    ax.scatter(*xy.T, s=size, facecolors="none", edgecolors=INK, linewidths=1.4, alpha=0.5, zorder=3)
    ax.scatter(*xy.T, s=size, facecolors="none", edgecolors=PAPER, linewidths=0.7, zorder=3)


def lines(ax: Axes, start: Float[np.ndarray, "n 2"], end: Float[np.ndarray, "n 2"], colour: str) -> None:
    """A line from each start to its end."""
    segments = np.stack([start, end], axis=1)
    ax.add_collection(LineCollection(segments, colors=INK, linewidths=1.9, alpha=0.35, zorder=3))
    ax.add_collection(LineCollection(segments, colors=colour, linewidths=1.0, alpha=0.85, zorder=3))


def squares(
    ax: Axes, cells: Bool[np.ndarray, "h w"], stride: tuple[float, float], colour: str, *, alpha: float = 0.6
) -> None:
    """Cells of a map as one region, below the object's outline: translucent, with an edge around it."""
    h, w = cells.shape
    rows, cols = (np.arange(n + 1) * side - 0.5 for n, side in ((h, stride[0]), (w, stride[1])))
    limits = ax.get_xlim(), ax.get_ylim()
    ax.pcolormesh(cols, rows, np.where(cells, 1.0, np.nan), cmap=ListedColormap([colour]), alpha=alpha, zorder=1.5)
    padded = np.pad(cells, 1)
    down, across = (np.argwhere(np.diff(padded, axis=axis)) for axis in (0, 1))
    edges = [[(cols[j - 1], rows[i]), (cols[j], rows[i])] for i, j in down]
    edges += [[(cols[j], rows[i - 1]), (cols[j], rows[i])] for i, j in across]
    ax.add_collection(LineCollection(edges, colors=INK, linewidths=1.0, capstyle="round", zorder=1.6))
    ax.set(xlim=limits[0], ylim=limits[1])


def keys(
    ax: Axes, xy: Float[np.ndarray, "n 2"], share: Float[np.ndarray, " n"], stride: tuple[float, float], colour: str
) -> None:
    """Cells of a map, each a square whose area is its share; the largest fills its cell, the smallest stays visible."""
    side = 0.94 * np.sqrt(np.maximum(share / share.max(), 0.12))[:, None] * np.array(stride[::-1])
    places = [Rectangle(corner, *size) for corner, size in zip(xy - side / 2, side, strict=True)]
    ax.add_collection(PatchCollection(places, facecolor=colour, edgecolor=INK, linewidth=0.5, alpha=0.9, zorder=4))


def box(sheet: Sheet, panels: Sequence[Axes], colour: str) -> None:
    """A dashed box around panels that belong together."""
    places = [panel.get_position() for panel in panels]
    low = np.min([[place.x0, place.y0] for place in places], axis=0)
    high = np.max([[place.x1, place.y1] for place in places], axis=0)
    margin = 0.55 * GAP / sheet.figure.get_size_inches()
    sheet.figure.add_artist(
        Rectangle(
            low - margin,
            *(high - low + 2 * margin),
            fill=False,
            linewidth=2.4,
            edgecolor=colour,
            linestyle=(0, (4, 2)),
            transform=sheet.figure.transFigure,
            zorder=10,
        )
    )


def star(ax: Axes, x: float, y: float) -> None:
    """A query."""
    ax.plot(x, y, marker="*", markersize=21, color=RED, markeredgecolor=PAPER, markeredgewidth=1.3, zorder=7)


def window(ax: Axes, xy: Float[np.ndarray, "n 2"], stride: tuple[float, float]) -> None:
    """A dashed box around cells, given by their centres and sides (rows, columns)."""
    side = np.array(stride[::-1])
    corner, size = xy.min(axis=0) - side / 2, np.ptp(xy, axis=0) + side
    for width, colour, dashes in ((3.2, INK, "-"), (1.7, PAPER, (0, (4, 2.5)))):
        box = Rectangle(corner, *size, fill=False, linewidth=width, edgecolor=colour, linestyle=dashes, zorder=3)
        ax.add_patch(box)


def series(
    ax: Axes,
    value: np.ndarray,
    error: np.ndarray,
    name: str,
    *,
    from_zero: bool = False,
    each: Sequence[Sequence[float]] = (),
) -> None:
    """Values over the columns, with error bars and each value beside its dot.

    each: what a value is the mean of; such values are not joined by a line, and stand above their bars.
    """
    x = np.arange(len(value))
    line = dict(linestyle="none") if each else dict(linewidth=1.6)
    ax.errorbar(x, value, error, color=INK, marker="o", markersize=9, capsize=4, mfc=ORANGE, zorder=3, **line)
    for i, values in enumerate(each):
        place = i - 0.06 + 0.02 * np.arange(-len(values), 0)  # beside the error bar
        ax.plot(place, values, linestyle="none", marker="o", markersize=6, color=ORANGE, mec=INK, zorder=2)
    for i, number in zip(x, value, strict=True):
        text = f"{number:.1f}" if value.max() > 1 else f"{number:.2f}"
        place = (
            dict(xy=(i, number + error[i]), xytext=(0, 4), ha="center") if each else dict(xy=(i, number), xytext=(9, 9))
        )
        ax.annotate(text, textcoords="offset points", fontsize=SMALL + 1, color=INK, **place)
    reached = np.concatenate([value - error, value + error, *each])
    low, high = reached.min(), reached.max()
    bottom = 0 if from_zero else low
    height = (high - bottom) or 1  # all the same
    ax.set_ylim(0 if from_zero else low - 0.25 * height, high + 0.35 * height)
    ax.set_ylabel(name, fontsize=LABEL - 1, color=INK)
    ax.set_xticks(x, [""] * len(x))


def baseline(ax: Axes, value: np.ndarray, name: str) -> None:
    """A null beside a series, its name between the last two columns."""
    ax.plot(range(len(value)), value, color=BLUE, linestyle="--", marker="o", markersize=4, linewidth=1.4, zorder=2)
    low, high = ax.get_ylim()
    x, y = len(value) - 1.5 if len(value) > 1 else 0, value[-2:].mean()
    up = y < low + 0.25 * (high - low)  # there is no room below
    place = dict(textcoords="offset points", ha="center", fontsize=SMALL + 1, color=GREY, va="bottom" if up else "top")
    ax.annotate(name, (x, y), (0, 6 if up else -6), **place)


def edge_mark() -> Line2D:
    """The outline's mark for `key`."""
    halo = patheffects.withStroke(linewidth=4.2, foreground=INK)
    return Line2D([], [], color=PAPER, linewidth=2.2, path_effects=[halo])


def window_mark() -> Line2D:
    """The mark of `window` for `key`."""
    return Line2D([], [], color=INK, linewidth=1.7, linestyle=(0, (4, 2.5)))


def heat(ax: Axes, values: Float[np.ndarray, "H W"]) -> None:
    """A map from 0 to 1 over the photograph, below the object's outline: clear where it is 0, then red to yellow."""
    H, W = values.shape
    colours = HEAT(values**0.7)  # most of a map is far below its largest value
    about = dict(extent=(-0.5, W - 0.5, H - 0.5, -0.5), interpolation="bilinear", aspect=ax.get_aspect(), zorder=1.5)
    ax.imshow(colours, **about)


def cells(ax: Axes, values: Float[np.ndarray, "h w"], shape: tuple[int, int]) -> None:
    """A number from 0 to 1 for every cell of a map over the photograph, each cell in one colour, in those of `heat`."""
    H, W = shape
    about = dict(extent=(-0.5, W - 0.5, H - 0.5, -0.5), interpolation="nearest", aspect=ax.get_aspect(), zorder=1.5)
    ax.imshow(HEAT(values**0.5), **about)  # most cells are far below the largest


def colours(ax: Axes, values: UInt8[np.ndarray, "h w 3"], shape: tuple[int, int]) -> None:
    """A map of colours in the place of the photograph, each cell in one colour."""
    H, W = shape
    extent = (-0.5, W - 0.5, H - 0.5, -0.5)
    ax.imshow(values, extent=extent, interpolation="nearest", aspect=ax.get_aspect(), zorder=1.5)


def tag(ax: Axes, text: str) -> None:
    """A name in the corner of a panel."""
    box = dict(boxstyle="square,pad=0.15", facecolor=PAPER, edgecolor="none", alpha=0.85)
    ax.text(0.03, 0.97, text, transform=ax.transAxes, fontsize=SMALL, color=INK, va="top", bbox=box, zorder=5)


def tiles(ax: Axes, values: Float[np.ndarray, "I J h w"], low: float) -> None:
    """Rows and columns of maps with a gap between them, in colours from `low` to 1."""
    rows, columns, h, w = values.shape
    gap = max(1, round(max(h, w) / 12))
    page = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap), np.nan)
    for i in range(rows):
        for j in range(columns):
            page[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = values[i, j]
    ax.imshow(page, cmap=VIRIDIS, vmin=low, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def contributions(ax: Axes, field: Float[np.ndarray, "H W"]) -> None:
    """A receptive field, in decades of its largest value."""
    largest = field.max() or 1.0
    decades = np.log10(np.maximum(field / largest, 10.0**-DECADES))
    ax.imshow(decades, cmap=FIELD, vmin=-DECADES, vmax=0, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def central_square(ax: Axes, side: float, shape: tuple[int, int], dashes: object) -> None:
    """The edge of a square around the centre; side: over that of the image."""
    H, W = shape
    corner, size = ((W - 1 - side * W) / 2, (H - 1 - side * H) / 2), (side * W, side * H)
    for width, colour, style in ((2.6, INK, "-"), (1.4, PAPER, dashes)):
        ax.add_patch(Rectangle(corner, *size, fill=False, linewidth=width, edgecolor=colour, linestyle=style, zorder=3))


def square_mark(dashes: object) -> Line2D:
    """The mark of `central_square` for `key`."""
    return Line2D([], [], color=INK, linewidth=1.7, linestyle=dashes)


def scale(
    sheet: Sheet, colours: Colormap, labels: Sequence[str], text: str, *, left: float, width: float = 2.0
) -> None:
    """A bar of colours where the key stands, with labels from its start to its end; left, width: inches."""
    figure_height = sheet.figure.get_size_inches()[1]
    place = [left / WIDTH, sheet.key_height - 0.065 / figure_height, width / WIDTH, 0.13 / figure_height]
    ax = sheet.figure.add_axes(place, facecolor="#8A8A8A")
    ax.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=colours, extent=(0, 1, 0, 1))
    ax.set_yticks([])
    ax.set_xticks(np.linspace(0, 1, len(labels)), labels, fontsize=SMALL, color=INK)
    ax.tick_params(length=0, pad=2)
    ax.spines[:].set_visible(False)
    ax.annotate(text, (0, 0.5), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=SMALL + 1.5)


def table(ax: Axes, rows: Sequence[Sequence[str]], left: Sequence[float], bold: Collection[tuple[int, int]]) -> None:
    """Rows of words: the first two are heads, with a line below. left: of each column, as a share of the width.

    A column that starts with a share is left-aligned if it is the first or second, else centred on it.
    """
    ax.set(xlim=(0, 1), ylim=(len(rows), 0))
    ax.axis("off")
    for i, row in enumerate(rows):
        for j, (x, text) in enumerate(zip(left, row, strict=True)):
            weight = "bold" if (i, j) in bold else "normal"
            place = dict(ha="left" if j < 2 else "center", va="center", fontsize=SMALL + 1, color=INK)
            ax.text(x, i + 0.5, text, weight=weight, **place)
    ax.axhline(2, color=GREY, linewidth=0.8)
