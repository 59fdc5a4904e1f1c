"""What a lens reads: one trace on one picture, asked for the keys of any query.

Every number that a lens shows comes from here, whether it is drawn live, in a saved page or on paper.
"""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from dynattn.data import read_image, to_input, to_rgb
from dynattn.tracing import Keys, Pooled, Record, RegionRoutes, Trace, roll_out, trace

MEAN = "mean"  # the head that stands for the mean over all heads
LIKED = ("orange", "blue", "green", "yellow", "purple")  # colours of the tokens that a query reads most
SHARP = 640  # the longer side of the photograph shown, in pixels: sharper than what a small model sees


@dataclass(frozen=True)
class TokensRead:
    """The tokens that one query reads, the most liked first, where the cells of the map became fewer tokens.

    number, weight, size (n,): of each its number, what the query gives to it, and how many cells became it. merged
    (S,): the token of every cell.
    """

    number: Int[np.ndarray, " n"]
    weight: Float[np.ndarray, " n"]
    size: Int[np.ndarray, " n"]
    merged: Int[np.ndarray, " S"]


@dataclass(frozen=True)
class Reading:
    """What one query reads in one layer and head of one panel.

    cell: (i, j) of the query's cell. keys (n, 3): x, y, weight, in pixels of the image that the model saw. counts: how
    many keys each head reads, of those that `head` stands for. tokens: those that the keys stand for, if any; where
    they are `beside` the keys, the query reads both: its keys are cells as they are.
    """

    layer: str
    head: int | str
    cell: tuple[int, int]
    keys: Float[np.ndarray, "n 3"]
    counts: tuple[int, ...]
    tokens: TokensRead | None = None
    beside: bool = False

    @property
    def heaviest(self) -> Float[np.ndarray, "3"]:
        """x, y and weight of the key that is read most."""
        return self.keys[self.keys[:, 2].argmax()]

    @property
    def by_number(self) -> Float[np.ndarray, " n"]:
        """The weights of the tokens, in the order of their numbers."""
        return self.tokens.weight[np.argsort(self.tokens.number)]


class Panel:
    """One model's trace and the photograph under it. Positions are pixels of the image that the model saw."""

    def __init__(self, name: str, traced: Trace, picture: UInt8[np.ndarray, "h w 3"]):
        self.name, self.trace, self.picture = name, traced, picture
        self._remembered: Record | None = None

    @property
    def layers(self) -> list[str]:
        """The names of the layers, in order."""
        return self.trace.layers

    @cached_property
    def titles(self) -> dict[str, str]:
        """The layers as a reader thinks of them, such as "stage 2, block 4, window", by their names.

        Stages and blocks count from 1, as papers count them. A name without blocks, or a title that two layers would
        have, stays the path.
        """
        found = {name: title(name, self.trace[name].kind_in_words) for name in self.layers}
        often = list(found.values())
        plain = {name: f"{name}, {self.trace[name].kind_in_words}" for name in self.layers}
        return {name: said if said and often.count(said) == 1 else plain[name] for name, said in found.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the image that the model saw."""
        return tuple(self.trace.image.shape[-2:])

    def layer(self, choice: Any) -> str:
        """The name of a layer that is given by its name or its number, from 0, or from -1 backwards.

        Raises ValueError for one that is not there.
        """
        numbered = isinstance(choice, int | np.integer) and not isinstance(choice, bool)
        if numbered and -len(self.layers) <= choice < len(self.layers):
            return self.layers[choice]
        if choice not in self.layers:
            numbers = f"or the numbers 0 to {len(self.layers) - 1}"
            raise ValueError(f"layer: {self.name} has no {choice!r}; it has {', '.join(self.layers)}, {numbers}")
        return choice

    def routes(self, layer: str) -> RegionRoutes | None:
        """The regions that each region of queries reads, in a layer that chooses whole regions."""
        return self.trace[layer].region_routes()

    def merged(self, layer: str, head: int | str) -> Int[np.ndarray, " S"] | None:
        """The token that every cell became part of, where a head, or all heads in the same way, read fewer tokens."""
        record = self.trace[layer]
        each = [record.merged(m) for m in (range(record.heads) if head == MEAN else [head])]
        if any(one is None or not torch.equal(one, each[0]) for one in each):
            return None
        return each[0].cpu().numpy() if int(each[0].max()) + 1 < len(each[0]) else None

    def pooled(self, layer: str) -> Int[np.ndarray, " S"] | None:
        """The token that stands for every cell, in a layer whose queries read tokens beside cells."""
        found = self.trace[layer].pooled()
        return None if found is None else found.merged.cpu().numpy()

    def record(self, layer: str) -> Record:
        """The record of a layer, as one that makes each effective matrix once.

        Only that of the layer asked for last is kept: matrices of early layers are large.
        """
        if self._remembered is None or self._remembered.name != layer:
            record = copy(self.trace[layer])
            record.effective_matrix = lru_cache(record.effective_matrix)
            record.weights = lru_cache(record.weights)
            record.cells = lru_cache(record.cells)
            self._remembered = record
        return self._remembered

    def read(self, row: float, col: float, layer: str, head: int | str) -> Reading:
        """What the query at pixel (row, col) reads, in a head or in the mean of all."""
        record = self.record(layer)
        heads = range(record.heads) if head == MEAN else [head]
        each, pooled = ([read(m) for m in heads] for read in (lambda m: near_keys(record, row, col, m), record.pooled))
        query, counts = record.query(row, col), tuple(map(len, each))
        cell, keys, merged = divmod(query, record.query_shape[1]), merge(each), self.merged(layer, head)
        if pooled[0] is not None:
            return Reading(layer, head, cell, keys, counts, pooled_read(pooled, query), beside=True)
        tokens = None if merged is None else tokens_read(keys, merged, record)
        return Reading(layer, head, cell, keys, counts, tokens)

    def marks(self, reading: Reading) -> str:
        """How a reading is drawn: "tokens", cells "beside" tokens, or keys as "cells" of the map or "points"."""
        if reading.beside and len(reading.keys):
            return "beside"
        if reading.tokens is not None:
            return "tokens"
        return "cells" if on_cells(reading.keys, self.trace[reading.layer]) else "points"

    @cached_property
    def rollouts(self) -> Float[np.ndarray, "L S"]:
        """Where each query of the last layer got what it knows: rows over the cells of the first layer, summing to 1.

        All rows of `Trace.rollout` at once, before they are spread over the pixels: what a click costs is a look-up.
        """
        records = list(self.trace)
        H, W = records[-1].query_shape
        return roll_out(torch.eye(H * W), records).numpy()

    def rollout(self, row: float, col: float) -> tuple[tuple[int, int], Float[np.ndarray, " S"]]:
        """The last layer's cell at pixel (row, col), and its row of `rollouts`."""
        last = self.trace[self.layers[-1]]
        query = last.query(row, col)
        return divmod(query, last.query_shape[1]), self.rollouts[query]


def as_array(keys: Keys) -> Float[np.ndarray, "n 3"]:
    """Keys as x, y, weight."""
    return torch.cat([keys.xy, keys.weight[:, None].to(keys.xy)], dim=1).float().cpu().numpy()


def near_keys(record: Record, row: float, col: float, head: int) -> Float[np.ndarray, "n 3"]:
    """The keys of a query as x, y, weight, without those that are tokens beside the others."""
    keys, pooled = as_array(record.keys(row, col, head)), record.pooled(head)
    return keys if pooled is None else keys[: len(keys) - pooled.weight.shape[1]]


def merge(keys: Sequence[Float[np.ndarray, "n 3"]]) -> Float[np.ndarray, "N 3"]:
    """The mean of several heads: a position that several read has its weights added."""
    if len(keys) == 1:
        return keys[0]
    joined = np.concatenate(keys)
    positions, which = unique_positions(joined[:, :2])
    weight = np.bincount(which, joined[:, 2], len(positions)) / len(keys)
    return np.concatenate([positions, weight[:, None].astype(np.float32)], axis=1)


def unique_positions(
    xy: Float[np.ndarray, "n 2"],
) -> tuple[Float[np.ndarray, "N 2"], Int[np.ndarray, " n"]]:
    """The distinct positions, cells in row-major order, and which of them each one is."""
    pairs = np.ascontiguousarray(xy + np.float32(0), dtype=np.float32)  # -0 becomes 0
    # As integers the bits of (x, y) sort by y, then by x, and far faster than pairs do.
    found, which = np.unique(pairs.view(np.int64)[:, 0], return_inverse=True)
    return found.view(np.float32).reshape(-1, 2), which


def tokens_read(keys: Float[np.ndarray, "n 3"], merged: Int[np.ndarray, " S"], record: Record) -> TokensRead:
    """The tokens that keys lie on, each with the sum of their weights; `lens.js` does the same."""
    cells = ((keys[:, 1::-1] + 0.5) / record.stride).astype(int)
    cells = np.minimum(cells, np.array(record.query_shape) - 1)
    which = merged[cells[:, 0] * record.query_shape[1] + cells[:, 1]]
    number = np.unique(which)
    weight, size = np.bincount(which, keys[:, 2])[number], np.bincount(merged)[number]
    order = np.argsort(-weight, kind="stable")
    return TokensRead(number[order], weight[order], size[order], merged)


def pooled_read(pooled: Sequence[Pooled], query: int) -> TokensRead:
    """The tokens that a query reads beside its cells, in the mean of several heads."""
    merged = pooled[0].merged.cpu().numpy()
    weight = torch.stack([one.weight[query] for one in pooled]).float().mean(dim=0).cpu().numpy()
    order = np.argsort(-weight, kind="stable")
    return TokensRead(order, weight[order], np.bincount(merged, minlength=len(order))[order], merged)


def key_for_each_token(keys: Float[np.ndarray, "n 3"], merged: Int[np.ndarray, " S"], record: Record) -> Keys:
    """The same with one key for each token, on the first of its cells."""
    read = tokens_read(keys, merged, record)
    first = torch.from_numpy(np.unique(merged, return_index=True)[1][read.number])
    return Keys(record.cells()[first], torch.from_numpy(read.weight))


def on_cells(keys: Float[np.ndarray, "n 3"], record: Record) -> bool:
    """Whether all keys are cells of the layer's own map, and no points in between."""
    cell = (keys[:, 1::-1] + 0.5) / record.stride - 0.5
    return bool((np.abs(cell - cell.round()) < 1e-3).all())


# ------------------------------------------------------------------------------------------------------------ in words

STAGE, BLOCK = re.compile(r"(?:^|\.)(?:stages?|layers?)\.(\d+)\."), re.compile(r"(?:^|\.)blocks?\.(\d+)\.")


def title(name: str, kind: str) -> str:
    """A layer's path and its kind as a reader thinks of them; empty where the path names no block."""
    block, stage = BLOCK.search(name), STAGE.search(name)
    if block is None:
        return ""
    numbers = [f"stage {int(stage[1]) + 1}"] if stage else []
    return ", ".join([*numbers, f"block {int(block[1]) + 1}", kind])


def count_name(found: int, counts: Sequence[int], cells: bool) -> str:
    """How many keys are shown, and where the number comes from: `found` positions in all, `counts` in each head."""
    one, heads, what = counts[0], len(counts), "cells" if cells else "points"
    if found == one and set(counts) == {one}:
        return f"{found} {what}"
    if not cells and set(counts) == {one} and found % one == 0:
        return f"{one} {what} × {found // one} groups"
    if set(counts) == {one}:
        return f"{found} {what} ({one} × {heads} heads{', some shared' * (found < one * heads)})"
    return f"{found} {what} of {heads} heads"


MEANING = {
    "cells": "Squares: cells that the query reads; colour: weight.",
    "points": "Dots: points that the query reads; area and colour: weight.",
    "tokens": (
        "Many cells became one token. Colours: cells of the tokens that the query reads most. White: cells of the "
        "others that it reads; the brighter, the more their token gets."
    ),
    "beside": (
        "Small squares: cells of its window that the query reads; colour: weight. Below them: every window is also one "
        "token. Colours: cells of the windows that the query reads most. White: the others; the brighter, the more "
        "their window gets."
    ),
}


def meaning(fade: float, marks: str) -> str:
    """What the marks on a panel mean, see `Panel.marks`; `lens.js` says the same."""
    rollout = "Rollout: how much each cell of the first layer gives to the query's cell of the last, over all layers."
    return " ".join([MEANING[marks]] * (fade < 1) + [rollout] * (fade > 0))


def tokens_name(tokens: TokensRead) -> str:
    """How many tokens are read, what each would get if all were alike, and those read most, by their colours."""
    most = zip(LIKED, tokens.weight.tolist(), tokens.size.tolist(), strict=False)
    each = ", ".join(f"{colour} {weight:.3g} ({size} cell{'s' * (size > 1)})" for colour, weight, size in most)
    return f"{len(tokens.number)} tokens, {1 / len(tokens.number):.3g} each if all were alike; read most: {each}"


def shows_routes(routes: RegionRoutes | None) -> bool:
    """Whether outlines say something: not where every region is read."""
    return routes is not None and len(routes.routes[0]) < routes.key_grid[0] * routes.key_grid[1]


def meaning_of_routes(routes: RegionRoutes) -> str:
    """What outlines mean."""
    said = f"Outlines: the regions that the {routes.readers} of the dashed region read; 1 is liked most."
    return said if routes.readers == "queries" else f"{said} The query reads all {routes.readers}."


def routes_name(routes: RegionRoutes | None) -> str:
    """To how many regions the region of a query is routed."""
    if routes is None:
        return ""
    number, of_all = len(routes.routes[0]), routes.key_grid[0] * routes.key_grid[1]
    who = "its region is" if routes.readers == "queries" else f"the {routes.readers} of its region are"
    return f"; {who} routed to {number} of {of_all} regions"


def pixel_name(row: float, col: float) -> str:
    """A pixel to a tenth, with what its numbers are."""
    return f"(row {_short(row)}, col {_short(col)})"


# ------------------------------------------------------------------------------------------------------- what is given


def make_panels(models: Any, image: Any = None) -> list[Panel]:
    """A panel for every model or trace.

    models: a model or a `Trace`, a sequence of them, or a mapping from names to them. image: what `dynattn.trace`
    takes; traces do without.
    Raises ValueError or TypeError for no models, other things than models, models without attention, and bad images.
    """
    named = _named(models)
    if image is None and not all(isinstance(model, Trace) for model in named.values()):
        raise TypeError(
            "image: expected a path, PIL image, uint8 array or tensor, got none; only traces have their own"
        )
    if image is not None and not isinstance(image, Tensor):
        image = read_image(image)  # once for all models: some files can be read only once
    traces = {name: model if isinstance(model, Trace) else trace(model, image) for name, model in named.items()}
    for name, traced in traces.items():
        if not traced.layers:
            raise ValueError(f"models: {name} has no attention layer that can be traced")
    picture = None if image is None else _picture(image)
    return [
        Panel(name, traced, to_rgb(traced.image) if picture is None else picture) for name, traced in traces.items()
    ]


def _named(models: Any) -> dict[str, nn.Module | Trace]:
    """The models by name: those of a mapping, else the names of their classes, numbered where they are the same."""
    if isinstance(models, nn.Module | Trace):
        models = [models]
    if not isinstance(models, Mapping | Sequence) or isinstance(models, str):
        raise TypeError(f"models: expected a model, a trace or a list of them, got {type(models).__name__}")
    given = list(models.values()) if isinstance(models, Mapping) else list(models)
    if not given:
        raise ValueError("models: expected at least one model, got none")
    for model in given:
        if not isinstance(model, nn.Module | Trace):
            raise TypeError(f"models: expected torch modules or traces, got {type(model).__name__}")
    if isinstance(models, Mapping):
        return {str(name): model for name, model in models.items()}
    names = [type(model).__name__ for model in given]
    counted = [
        f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]
    return dict(zip(counted, given, strict=True))


def _picture(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """The photograph as it is shown, at most `SHARP` pixels long."""
    if isinstance(image, Tensor):
        seen = to_input(image)[0] if image.dtype == torch.uint8 else image[0] if image.ndim == 4 else image
        shown = Image.fromarray(to_rgb(seen.float().cpu()))
    else:
        shown = image.copy()
    shown.thumbnail((SHARP, SHARP), Image.Resampling.LANCZOS)
    return np.array(shown)


# ------------------------------------------------------------------------------------------------------------ the query


@dataclass(frozen=True)
class View:
    """Where all panels are looked at: a pixel (row, col) of the first one's image, and a layer and head for each."""

    panels: list[Panel]
    row: float
    col: float
    layer: tuple[str, ...]
    head: tuple[int | str, ...]
    fade: float = 0.0

    def place(self, p: int) -> tuple[float, float]:
        """The query as a pixel of panel p's image, which may have another size."""
        (H, W), (height, width) = self.panels[0].shape, self.panels[p].shape
        return (self.row + 0.5) * height / H - 0.5, (self.col + 0.5) * width / W - 0.5

    def readings(self) -> list[Reading]:
        """What the query reads in every panel."""
        choices = enumerate(zip(self.panels, self.layer, self.head, strict=True))
        return [panel.read(*self.place(p), layer, head) for p, (panel, layer, head) in choices]

    def sentences(self) -> list[str]:
        """What is seen, in words: a line for each panel; `lens.js` says the same."""
        return [self._sentence(p, reading) for p, reading in enumerate(self.readings())]

    def _sentence(self, p: int, reading: Reading) -> str:
        panel, (row, col) = self.panels[p], self.place(p)
        record = panel.trace[reading.layer]
        said = (
            f"Query {pixel_name(row, col)}, cell {pixel_name(*reading.cell)} of {panel.titles[reading.layer]}, "
            f"{head_name(reading.head, record.heads)}: "
        )
        parts = []
        if len(reading.keys) and (reading.tokens is None or reading.beside):
            x, y, weight = reading.heaviest
            number = count_name(len(reading.keys), reading.counts, panel.marks(reading) != "points")
            parts.append(f"{number}, heaviest {weight:.3g} at {pixel_name(y, x)}")
        if reading.tokens is not None:
            parts.append(tokens_name(reading.tokens))
        said += "; then ".join(parts) or "no keys"
        said += routes_name(panel.routes(reading.layer))
        if self.fade > 0:
            last, heat = panel.rollout(row, col)
            x, y = panel.trace[panel.layers[0]].cells()[int(heat.argmax())].tolist()
            said += (
                f". Rollout of cell {pixel_name(*last)} of the last layer: heaviest {heat.max():.3g} "
                f"at {pixel_name(y, x)}"
            )
        return said


def first_view(panels: list[Panel]) -> dict[str, Any]:
    """Where a lens looks at first: the layer in the middle, the mean of its heads, a cell at the image's centre."""
    layer = tuple(panel.layers[len(panel.layers) // 2] for panel in panels)
    strides = panels[0].trace[layer[0]].stride
    row, col = (max(side // 2 - stride // 2, 0.0) for side, stride in zip(panels[0].shape, strides, strict=True))
    return {"row": row, "col": col, "layer": layer, "head": (MEAN,) * len(panels), "fade": 0.0}


def head_name(head: int | str, heads: int) -> str:
    """A head in words."""
    return f"mean of {heads} heads" if head == MEAN else f"head {head}"


def _short(pixel: float) -> str:
    """A pixel to a tenth, without what is not needed."""
    return f"{round(pixel, 1) + 0:g}"
