"""The lens on paper: what it shows, as the figures of this project look."""

from io import BytesIO

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from dynattn.figures import style
from dynattn.tracing import Record, RegionRoutes

from .panel import LIKED, Panel, Reading, TokensRead, View, head_name, meaning, meaning_of_routes, shows_routes

COLOURS = colormaps["viridis"]
SMALL = 0.5  # of a cell's side: a square that leaves what is below it to be seen


def draw(view: View, dpi: int) -> Image.Image:
    """The panels side by side, with what they show in words below; 12 inches wide."""
    pairs = list(zip(view.panels, view.readings(), strict=True))
    h, w = view.panels[0].picture.shape[:2]
    labels = [f"{panel.name}, {head_name(one.head, panel.trace[one.layer].heads)}" for panel, one in pairs]
    if len(pairs) > 3:  # then there is room for the name alone; the caption has the head
        labels = [panel.name for panel, _ in pairs]
    sheet = style.sheet(1, len(pairs), "What one query reads", caption(view), column_labels=labels, aspect=h / w)
    for p, (ax, (panel, reading)) in enumerate(zip(sheet.panels[0], pairs, strict=True)):
        style.photograph(ax, panel.picture, panel.shape)
        draw_panel(ax, view, p, panel, reading)
    marks = [
        (style.mark("*", style.RED, 15, markeredgecolor=style.PAPER), "the query"),
        (style.mark("s", "none", 11, markeredgewidth=1.6), "its cell"),
    ]
    if any(one.tokens is None or one.beside for _, one in pairs):
        marks += [
            (style.mark("o", COLOURS(0.1), 6), "keys: little weight"),
            (style.mark("o", COLOURS(1.0), 11), "most weight"),
        ]
    if any(one.tokens is not None for _, one in pairs):
        most = max(len(one.tokens.number) for _, one in pairs if one.tokens is not None)
        last = min(len(LIKED), most) - 1  # the caption has the others, there is no room here
        marks.append((style.mark("s", style.GROUPS[0], 9), "token read most"))
        if last:
            marks.append((style.mark("s", style.GROUPS[last], 9), ("", "2nd", "3rd", "4th", "5th")[last]))
    style.key(sheet, marks)
    file = BytesIO()
    sheet.figure.savefig(file, dpi=dpi)
    return Image.open(file).convert("RGB")


def caption(view: View) -> str:
    """What is seen in words, and what positions are."""
    shown = f"{1 - view.fade:.0%} attention over {view.fade:.0%} rollout"
    shown = {0: "Attention", 1: "Rollout"}.get(view.fade, shown)
    seen = []
    for panel, layer, said in zip(view.panels, view.layer, view.sentences(), strict=True):
        routes = panel.routes(layer)
        outlined = f". {meaning_of_routes(routes)}" if view.fade < 1 and shows_routes(routes) else "."
        seen.append(f"{panel.name}: {said}{outlined}")
    pairs = zip(view.panels, view.readings(), strict=True)
    kinds = {panel.marks(one) for panel, one in pairs}
    marks = " ".join(meaning(0, kind) for kind in sorted(kinds, reverse=True)) if view.fade < 1 else ""
    if view.fade > 0:
        marks = f"{marks} {meaning(1, 'cells')}".strip()
    return f"{shown}; (row, col) are pixels of what the model saw. {marks} {' '.join(seen)}"


def draw_panel(ax: Axes, view: View, p: int, panel: Panel, reading: Reading) -> None:
    """Keys, rollout, the query's cell and the query over a photograph."""
    record = panel.trace[reading.layer]
    row, col = view.place(p)
    if view.fade < 1:
        if reading.tokens is not None:
            tokens(ax, reading.tokens, record, 1 - view.fade)
        if reading.beside:
            cells(ax, reading.keys, record, 1 - view.fade, small=True)
        elif panel.marks(reading) == "cells":
            cells(ax, reading.keys, record, 1 - view.fade)
        elif reading.tokens is None:
            dots(ax, reading.keys, 1 - view.fade)
        outline(ax, reading.cell, record, 1 - view.fade)
        if shows_routes(routes := panel.routes(reading.layer)):
            regions(ax, routes, row, col, 1 - view.fade)
    if view.fade > 0:
        last, heat = panel.rollout(row, col)
        first = panel.trace[panel.layers[0]]
        cells(ax, np.concatenate([first.cells().numpy(), heat[:, None]], axis=1), first, view.fade, least=0.3)
        outline(ax, last, panel.trace[panel.layers[-1]], view.fade)
    style.star(ax, col, row)


def cells(
    ax: Axes, keys: Float[np.ndarray, "n 3"], record: Record, alpha: float, least: float = 0.45, small: bool = False
) -> None:
    """A square over each key, its colour the weight; the lightest covers the picture least.

    small: squares with dark rims that leave the rims of their cells free, and cover what is below them.
    """
    share = keys[:, 2] / keys[:, 2].max(initial=np.finfo(np.float32).tiny)
    height, width = (SMALL * side if small else side for side in record.stride)
    boxes = [Rectangle((x - width / 2, y - height / 2), width, height) for x, y, _ in keys]
    colours = COLOURS(share)
    colours[:, 3] = alpha * (1 if small else least + (0.9 - least) * share)
    look = dict(linewidths=0.6, edgecolors=style.INK) if small else dict(linewidths=0)
    ax.add_collection(PatchCollection(boxes, facecolors=colours, **look, antialiaseds=False, zorder=2 + small))


def tokens(ax: Axes, read: TokensRead, record: Record, alpha: float) -> None:
    """Every token over its cells: those that are read most in colours of their own, the others white by weight."""
    colour = np.zeros((read.merged.max() + 1, 4))
    colour[read.number, :3], colour[read.number, 3] = 1, 0.5 * read.weight / read.weight.max()
    liked = read.number[: len(LIKED)]
    colour[liked] = [to_rgba(one, 0.85) for one in style.GROUPS[: len(liked)]]
    colour[:, 3] *= alpha
    height, width = record.stride
    boxes = [Rectangle((x - width / 2, y - height / 2), width, height) for x, y in record.cells().tolist()]
    rims = np.isin(read.merged, liked) * 0.6
    look = dict(facecolors=colour[read.merged], linewidths=rims, edgecolors=style.INK, zorder=2)
    ax.add_collection(PatchCollection(boxes, **look, antialiaseds=False))


def dots(ax: Axes, keys: Float[np.ndarray, "n 3"], alpha: float) -> None:
    """A dot on each key, its area and colour the weight, the heaviest below."""
    x, y, weight = keys[np.argsort(-keys[:, 2])].T
    share = weight / weight.max()
    width = ax.get_position().width * ax.figure.get_figwidth() * 72
    diameter = np.maximum(0.064 * width * share**0.5, 4)
    ax.scatter(x, y, s=(diameter + 3) ** 2, color=style.PAPER, alpha=0.6 * alpha, linewidths=0, zorder=4)
    ax.scatter(x, y, s=diameter**2, c=COLOURS(share), alpha=alpha, edgecolors=style.INK, linewidths=0.6, zorder=5)


def outline(ax: Axes, cell: tuple[int, int], record: Record, alpha: float) -> None:
    """The outline of a query's cell."""
    height, width = record.stride
    frame(ax, (cell[1] * width - 0.5, cell[0] * height - 0.5), width, height, alpha, 2.0)


def frame(ax: Axes, corner: tuple[float, float], width: float, height: float, alpha: float, line: float = 1.2) -> None:
    """A light line with dark rims, which can be seen on any photograph."""
    for thick, colour in ((2 * line, style.INK), (line, style.PAPER)):
        box = Rectangle(corner, width, height, fill=False, linewidth=thick, edgecolor=colour, alpha=alpha, zorder=6)
        ax.add_patch(box)


def regions(ax: Axes, routes: RegionRoutes, row: float, col: float, alpha: float) -> None:
    """Outlines of the regions that a query's region is routed to, numbered as they are liked; its own is dashed."""
    for rank, (top, left, bottom, right) in enumerate(routes.read(row, col), 1):
        frame(ax, (left, top), right - left, bottom - top, alpha)
        words = ax.text(left + 1, top + 1, str(rank), fontsize=7, va="top", color=style.PAPER, alpha=alpha, zorder=6)
        words.set_path_effects([withStroke(linewidth=1.6, foreground=style.INK)])
        words.set_clip_on(True)
    top, left, bottom, right = routes.own(row, col)
    box = Rectangle((left, top), right - left, bottom - top, fill=False, linestyle="--", linewidth=2.4, zorder=6)
    box.set(edgecolor=style.RED, alpha=alpha)
    ax.add_patch(box)
