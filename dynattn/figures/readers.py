"""What points of the image read in dense attention: layer by layer, head by head, and through all layers (rollout).

Of a query the share of its attention that falls on the object. That has a mean over the queries on the object, and one
over the others: where both are the same, attention does not know the object. Its null are the masks of the other
images, for queries and keys alike: a query reads what is near, and near a point of a mask is more of the mask.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from dynattn.tracing import Record, Trace, roll_out, trace

from . import style
from .drawing import (
    NAMES,
    aspect_of,
    compared,
    conditions,
    ground,
    listed,
    object_key,
    queries,
    share,
    unmasked,
    with_twin,
)
from .measures import evaluate, on_map, reach
from .run import Drawing, Setting
from .subjects import RANDOM, Picture
from .tables import ALL, NETWORK, OTHER, OWN, Measure, Row, at

PLACES = "on the object", "off it"  # of the two points in a picture
LAYERS = 6  # of deeper models so many are drawn and measured, evenly from the first to the last


def chosen(count: int, most: int = LAYERS) -> list[int]:
    """At most so many numbers from 0 to count - 1, evenly, the last among them."""
    return [int(place) for place in np.ceil(np.linspace(0, count - 1, min(count, most)))]


def drawn_layers(t: Trace) -> list[Record]:
    """The dense layers that are drawn."""
    records = t.of_kind("dense")
    return [records[i] for i in chosen(len(records))]


def of_head(record: Record, head: int) -> Float[Tensor, "L L"]:
    """Attention from every cell to every cell; what tokens beside the map get is missing."""
    return record.weights(head)[:, : record.query_shape[0] * record.query_shape[1]].float()


def mean_attention(record: Record) -> Float[Tensor, "L L"]:
    """The same, the mean over the heads."""
    return sum(of_head(record, m) for m in range(record.heads)) / record.heads


def rolled(t: Trace) -> Float[Tensor, "L S"]:
    """Rollout from every cell of the last layer to the cells of the first."""
    records = list(t)
    L = records[-1].query_shape[0] * records[-1].query_shape[1]
    return roll_out(torch.eye(L), records)


def shares_read(
    attention: Float[Tensor, "L S"], readers: Bool[Tensor, "n L"], read: Bool[Tensor, "n S"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The share of attention on each mask: mean over the queries on it, and over the others; NaN without such queries.

    readers, read: the same masks on the map of the queries and on that of the keys.
    """
    share = read.double() @ attention.double().mT  # (n, L)
    on, off = ((share * there).sum(dim=1) / there.sum(dim=1) for there in (readers.double(), (~readers).double()))
    return on, off


def evaluate_readers(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: np.ndarray | None = None,
    *,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """How much of what they read lies on the object, for queries on it and off it: a table (see `tables`).

        reads, reads_off      attention of a drawn layer, mean over its heads, and of the last one each head by itself
        rolled, rolled_off    rollout through all layers, of the whole network
        area                  as `evaluate` has it

    labels: not needed. Raises ValueError where images and masks do not fit together, or for a model without dense
    layers.
    """
    on_maps: dict[tuple[int, int], Bool[Tensor, "n L"]] = {}

    def there(record: Record, masks: Bool[Tensor, "n H W"]) -> Bool[Tensor, "n L"]:
        if record.query_shape not in on_maps:
            on_maps[record.query_shape] = on_map(record, masks)
        return on_maps[record.query_shape]

    def measure(t: Trace, masks: Bool[Tensor, "n H W"], i: int) -> Iterator[Row]:
        records, other = drawn_layers(t), torch.arange(len(masks)) != i
        if not records:
            raise ValueError(f"model: expected one with dense layers, got {type(model).__name__}")

        def rows(layer: str, head: int, kind: str, found: Sequence[Tensor]) -> Iterator[Row]:
            for name, values in zip((kind, f"{kind}_off"), found, strict=True):
                yield Row(layer, head, OWN, name, float(values[i]))
                yield Row(layer, head, OTHER, name, float(values[other].nanmean()))

        for record in records:
            on = there(record, masks)
            yield from rows(record.name, ALL, "reads", shares_read(mean_attention(record), on, on))
        last, on = records[-1], there(records[-1], masks)
        for m in range(last.heads):
            yield from rows(last.name, m, "reads", shares_read(of_head(last, m), on, on))
        start, end = (there(list(t)[i], masks) for i in (0, -1))
        yield from rows(NETWORK, ALL, "rolled", shares_read(rolled(t), end, start))

    return evaluate(model, images, masks, None, measure, bar=bar)


# ---------------------------------------------------------------------------------------------------------- the figures


def reads(setting: Setting, places: Sequence[tuple[str, int, str, str]]) -> tuple[list[Measure], dict]:
    """Measures by (layer, head, kind, label), and the tables of the networks."""
    table = setting.table()
    name = setting.subject.name
    found = [
        share(kind, at(table, layer, head), name, label, layer=layer or None) for layer, head, kind, label in places
    ]
    return found, setting.evaluations()


def verdict(on: Measure, off: Measure) -> str:
    """How much points on the object and points off it read of it, and whether the two differ by more than chance.

    Chance: what the two differ by under random weights, or for another image's mask. In rollout they do, since a point
    keeps a part of itself.
    """
    error = math.hypot(on.standard_error, off.standard_error)
    gap = on.trained - off.trained
    chance = max(on.random[RANDOM] - off.random[RANDOM], on.other - off.other, 0.0)
    said = "more than chance" if gap - chance > 2 * math.sqrt(2) * error else "not clearly more than chance"
    return (
        f"points on the object give it {on.trained:.2f} ± {on.standard_error:.3f} of their attention, points off it "
        f"{off.trained:.2f} (another image's mask {on.other:.2f}, random weights {on.random[RANDOM]:.2f}). The two "
        f"differ by {gap:.2f}, by chance by {chance:.2f}: {said}. "
    )


def from_elsewhere(setting: Setting, places: Sequence[tuple[str, int, str, str]]) -> str:
    """What points off the object give to it, in words: the null of what points on it give."""
    found, _ = reads(setting, [(layer, head, f"{kind}_off", label) for layer, head, kind, label in places])
    words = [f"{one.trained:.2f} ({label or 'rollout'})" for one, (*_, label) in zip(found, places, strict=True)]
    return f"Points off the object give it {listed(words)}. "


def read_by(record: Record, point: tuple[float, float], head: int | None = None) -> Float[Tensor, "h w"]:
    """What the point's query reads of cells, in one head or of all, over the mean of all cells."""
    query, L = record.query(*point), record.query_shape[0] * record.query_shape[1]
    heads = range(record.heads) if head is None else [head]
    heat = sum(record.weights(m)[query, :L].float() for m in heads).reshape(record.query_shape)
    return heat / heat.mean()


def rolled_to(t: Trace, point: tuple[float, float]) -> Float[Tensor, "h w"]:
    """Where the last layer got from what it knows at the point, on the map of the first layer, in the same units."""
    records = list(t)
    start = torch.zeros(1, records[-1].query_shape[0] * records[-1].query_shape[1])
    start[0, records[-1].query(*point)] = 1.0
    heat = roll_out(start, records)[0]
    return len(heat) * heat.reshape(records[0].query_shape)


@dataclass(frozen=True)
class Strip:
    """A row of a figure: a picture with a point, and what is drawn of it. label: of the row."""

    label: str
    picture: Picture
    point: tuple[float, float]
    maps: Sequence[Float[Tensor, "h w"]]


def drawn(
    setting: Setting,
    title: str,
    columns: Sequence[str],
    strips: Sequence[Strip],
    record: Record,
    measures: Sequence[Measure],
    tables: dict,
    caption: str,
    together: int = 1,
) -> Drawing:
    """Rows of maps over the photograph, all in the same colours. record: whose cell the point is in.

    together: so many columns stand close.
    """
    pictures = list({strip.picture.name: strip.picture for strip in strips}.values())
    caption = (
        f"{caption}Colours are the same in all panels: clear where a cell gets no more than the mean of all cells. "
        f"{conditions(setting, pictures, measures)}"
    )
    options = dict(aspect=aspect_of(pictures), column_labels=["photograph", *columns], together=together)
    if any(strip.label for strip in strips):
        options |= dict(row_labels=[strip.label for strip in strips])
    sheet = style.sheet(len(strips), 1 + len(columns), title, caption, compared(measures), **options)
    most = max(2.0, *(float(values.max()) for strip in strips for values in strip.maps))
    for row, strip in zip(sheet.panels, strips, strict=True):
        for ax in row:
            ground(ax, strip.picture, veil=0.35 if ax is row[0] else 0.65, grey=ax is not row[0])
            style.star(ax, *record.cells()[record.query(*strip.point)].tolist())
        for ax, values in zip(row[1:], strip.maps, strict=True):
            style.cells(ax, ((values - 1) / (most - 1)).clamp(0, 1).numpy(), strip.picture.shape)
    known = bool(object_key(pictures))
    style.scale(sheet, style.HEAT, ["mean", f"{most:.0f} × mean"], "read", left=1.9 if known else 4.0)
    star = style.mark("*", style.RED, 15, markeredgecolor=style.PAPER)
    style.key(sheet, [(star, "the point that reads"), *object_key(pictures)], centre=0.66)
    return Drawing(sheet.figure, caption, pictures, list(measures), [setting.subject.story], tables)


def traced(setting: Setting, pictures: Sequence[Picture]) -> dict[str, list[Trace]]:
    """The traces of all pictures, of the subject and of a random network."""
    return {network: [trace(model, p.x) for p in pictures] for network, model in with_twin(setting).items()}


def points_read(setting: Setting, indices: Sequence[int], title: str) -> Drawing:
    """Figure 11: what two points read, in the last layer and by rollout, trained and random."""
    pictures = setting.pictures(indices)
    traces = traced(setting, pictures)
    last = traces["trained"][0].of_kind("dense")[-1]
    if setting.image is None:
        places = [(last.name, ALL, kind, "last layer") for kind in ("reads", "reads_off")]
        places += [(NETWORK, ALL, kind, "") for kind in ("rolled", "rolled_off")]
        measures, tables = reads(setting, places)
        said = f"Last layer: {verdict(*measures[:2])}Rollout: {verdict(*measures[2:])}Errors are over the images. "
    else:
        measures, tables, said = [distance_in(setting, last.name, "last layer")], {}, ""
    caption = (
        f"What the starred point reads, mean over the heads: {last.name} as it is, and rollout (Abnar and Zuidema), in "
        f"every layer half attention and half identity, multiplied through all layers. {said}"
    )
    strips = [
        Strip(
            label, picture, point, [part for t in both for part in (read_by(t[last.name], point), rolled_to(t, point))]
        )
        for picture, *both in zip(pictures, *traces.values(), strict=True)
        for label, point in zip(PLACES if picture.mask is not None else ("", ""), queries(picture), strict=True)
    ]
    columns = ["last layer", "rollout", "random, last layer", "random, rollout"]
    return drawn(setting, title, columns, strips, last, measures, tables, caption, together=2)


def distance_in(setting: Setting, layer: str, label: str) -> Measure:
    """On the user's photograph: how far a layer's queries are from what they read."""
    side = max(setting.subject.size)
    return unmasked(setting, f"{NAMES['distance']}, {label}", lambda t: reach(t[layer]) / side)


def both_networks(
    traces: dict[str, list[Trace]], pictures: Sequence[Picture], maps: Callable[[Trace, tuple], Sequence[Tensor]]
) -> list[Strip]:
    """Of each picture and point a row of the trained network, and below it one of the random network."""
    return [
        Strip(network.split()[0], picture, point, maps(traces[network][i], point))
        for i, picture in enumerate(pictures)
        for point in queries(picture)
        for network in traces
    ]


def heads_read(setting: Setting, indices: Sequence[int], title: str) -> Drawing:
    """Figure 13: what two points read in each head of the last layer."""
    pictures = setting.pictures(indices)
    traces = traced(setting, pictures)
    last = traces["trained"][0].of_kind("dense")[-1]
    heads = chosen(last.heads)
    names = [f"head {m + 1}" for m in heads]
    if setting.image is None:
        places = [(last.name, m, "reads", name) for m, name in zip(heads, names, strict=True)]
        places += [(last.name, ALL, "reads", "mean")]
        (measures, tables), off = reads(setting, places), from_elsewhere(setting, places)
    else:
        measures, tables, off = [distance_in(setting, last.name, "mean of heads")], {}, ""
    some = "" if len(heads) == last.heads else f", {len(heads)} of its {last.heads} heads"
    strips = both_networks(traces, pictures, lambda t, point: [read_by(t[last.name], point, m) for m in (*heads, None)])
    caption = f"What the starred point reads in the last layer, {last.name}{some}. {off}"
    return drawn(setting, title, [*names, "mean of heads"], strips, last, measures, tables, caption)


def layers_read(setting: Setting, indices: Sequence[int], title: str) -> Drawing:
    """Figure 14: what two points read in every layer, and by rollout."""
    pictures = setting.pictures(indices)
    traces = traced(setting, pictures)
    every = traces["trained"][0].of_kind("dense")
    layers = drawn_layers(traces["trained"][0])
    names = [f"layer {every.index(record) + 1}" for record in layers]
    if setting.image is None:
        places = [(record.name, ALL, "reads", name) for record, name in zip(layers, names, strict=True)]
        places += [(NETWORK, ALL, "rolled", "")]
        (measures, tables), off = reads(setting, places), from_elsewhere(setting, places)
    else:
        measures, tables = [distance_in(setting, r.name, name) for r, name in zip(layers, names, strict=True)], {}
        off = ""
    strips = both_networks(
        traces, pictures, lambda t, point: [*(read_by(t[r.name], point) for r in layers), rolled_to(t, point)]
    )
    some = "Attention layer by layer" if len(layers) == len(every) else f"{len(layers)} of {len(every)} layers"
    caption = f"{some}, mean over the heads, and rollout through all layers: what the starred point reads. {off}"
    return drawn(setting, title, [*names, "rollout"], strips, layers[-1], measures, tables, caption)
