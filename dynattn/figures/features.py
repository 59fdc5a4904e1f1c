"""What layers know, as colours: the maps behind a model's layers and in its decoder, three principal components each.

The pixels of a map of all images are taken together: one set of axes, and one range from the least to the largest value
of the three components, so that a colour means the same in every image (the published script of SETR does it so). A map
of another layer has axes of its own: its colours cannot be compared with these. Every cell is drawn in its colour; that
script smooths them.

How much the colours say of the object is the share of their variance that is between the pixels on it and the others,
0 where the colours on and off it are alike. Its null is the mean over the masks of the other images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import tqdm

from dynattn.data import normalise
from dynattn.dense import MultiLevelHead, ProgressiveHead, resize
from dynattn.tracing import evaluating

from . import style
from .drawing import aspect_of, compared, conditions, ground, listed, object_key, of_the_subject, share, with_twin
from .run import Drawing, Setting
from .subjects import RANDOM, Picture, Subject
from .tables import ALL, OTHER, OWN, Measure, Row, at, joined, table_of

BATCH = 25
ROW = 8  # panels side by side where all layers are drawn
MEASURED_SIDE = 32  # of larger maps every second cell is measured, or every fourth, and so on
Maps = dict[str, Float[Tensor, "n C h w"]]


def no_layers(subject: Subject) -> str:
    """Why there are no maps of a model's layers; empty where there are."""
    if hasattr(subject.model, "forward_intermediates"):
        return ""
    return f"needs a model with forward_intermediates, as timm's have it; {subject.name} has none"


# ----------------------------------------------------------------------------------------------------------- the maps


def layer_maps(model: nn.Module, x: Float[Tensor, "n 3 H W"]) -> Maps:
    """The maps behind all layers, or behind all stages of a model with stages: Z1, Z2 and so on. Without gradients."""
    with torch.no_grad(), evaluating(model):
        maps = model.forward_intermediates(x, intermediates_only=True)
    return {f"Z{number}": found for number, found in enumerate(maps, 1)}


def decoder_maps(model: nn.Module, x: Float[Tensor, "n 3 H W"]) -> Maps:
    """The maps right after each bilinear upsampling in SETR's decoder, U1 and so on, and the logits, at image size.

    Of another model that answers for each pixel the logits alone; of one that does not, nothing.
    """
    if not getattr(model, "segments", False):
        return {}
    parts: list[tuple[nn.Module, int]] = []
    decoder = getattr(model, "decoder", None)
    if isinstance(decoder, ProgressiveHead):
        parts = [(layer, factor) for layer, factor in zip(decoder.layers, decoder.factors, strict=True) if factor > 1]
    elif isinstance(decoder, MultiLevelHead):
        parts = [(level, decoder.factor) for level in decoder.refine]
    kept: list[Tensor] = []
    handles = [part.register_forward_hook(lambda module, inputs, output: kept.append(output)) for part, _ in parts]
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    corners = isinstance(decoder, MultiLevelHead)
    maps = {
        f"U{number}": resize(found, tuple(factor * side for side in found.shape[-2:]), corners)
        for number, (found, (_, factor)) in enumerate(zip(kept, parts, strict=True), 1)
    }
    return maps | {"logits": logits}


def all_maps(model: nn.Module, x: Float[Tensor, "n 3 H W"]) -> Maps:
    """Those of the layers, then those of the decoder."""
    return layer_maps(model, x) | decoder_maps(model, x)


def chosen(names: Sequence[str], count: int) -> list[str]:
    """So many of them, evenly from the first to the last."""
    places = np.ceil(np.linspace(0, len(names) - 1, min(count, len(names)))).astype(int)
    return [names[i] for i in places]


# ----------------------------------------------------------------------------------------------------------- colours


@dataclass(frozen=True)
class Colours:
    """How a map's channels become red, green and blue.

    kept: the share of the variance of all channels that is in the three.
    """

    mean: Float[Tensor, " C"]
    axes: Float[Tensor, "C 3"]
    low: float
    high: float
    kept: float

    @classmethod
    def fitted(cls, maps: Float[Tensor, "n C h w"]) -> Self:
        """Of all pixels of all images together. A component points to where its largest weight is positive."""
        pixels = maps.movedim(1, -1).flatten(0, -2).double()
        mean = pixels.mean(dim=0)
        centred = pixels - mean
        values, axes = torch.linalg.eigh(centred.mT @ centred / len(pixels))  # the least variance first
        axes = F.pad(axes.flip(1)[:, :3], (0, max(0, 3 - axes.shape[1])))
        axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
        components, total = centred @ axes, values.sum()
        kept = float(values[-3:].sum() / total) if total > 0 else 1.0
        return cls(mean, axes, float(components.min()), float(components.max()), kept)

    def of(self, maps: Float[Tensor, "*n C h w"]) -> Float[Tensor, "*n h w 3"]:
        """The colours of maps, from 0 to 1 where the axes were fitted to them."""
        components = (maps.movedim(-3, -1).double() - self.mean) @ self.axes
        return ((components - self.low) / ((self.high - self.low) or 1.0)).clamp(0, 1)


def coloured(maps: Maps) -> dict[str, UInt8[np.ndarray, "n h w 3"]]:
    """The pictures of maps, layer by layer."""
    return {name: (255 * Colours.fitted(m).of(m)).round().byte().numpy() for name, m in maps.items()}


# ----------------------------------------------------------------------------------------------- what colours tell


def between(colours: Float[Tensor, "L 3"], masks: Bool[Tensor, "n L"]) -> Float[Tensor, " n"]:
    """The share of the variance of colours that is between the pixels on each mask and those off it.

    NaN where all pixels or none are on it; 0 where all colours are the same.
    """
    centred = colours.double() - colours.double().mean(dim=0)
    total = centred.square().sum()
    on = masks.sum(dim=1).double()
    sums = (masks.double() @ centred).square().sum(dim=1)  # off the mask the sum is as large
    explained = sums * len(colours) / (on * (len(colours) - on))
    return explained / total if total > 0 else torch.zeros_like(explained)


def thinned(maps: Float[Tensor, "n C h w"]) -> Float[Tensor, "n C h w"]:
    """A map of at most `MEASURED_SIDE` cells on each side: of a larger one every second cell, or every fourth."""
    step = -(-max(maps.shape[-2:]) // MEASURED_SIDE)
    return maps[..., step // 2 :: step, step // 2 :: step]


def evaluate_features(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: np.ndarray | None = None,
    *,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """How much the colours of a model's maps say of the object: a table (see `tables`), a row for each map and image.

    The layer is the name of the map (`all_maps`); the kind is "apart", the share of the variance of colours between the
    object and the rest (`between`), where the colours are those of all images together. labels: not needed.
    Raises ValueError where images and masks do not fit together.
    """
    if len(images) != len(masks) or len(images) < 2 or images.shape[-2:] != masks.shape[-2:]:
        raise ValueError(f"masks: expected one for each of at least 2 images {images.shape}, got {masks.shape}")
    found: dict[str, list[Tensor]] = {}
    for first in range(0, len(images), BATCH):
        x = normalise(torch.from_numpy(np.array(images[first : first + BATCH])))
        for name, maps in all_maps(model, x).items():
            found.setdefault(name, []).append(thinned(maps))
        if bar is not None:
            bar.update(len(x))
    there = torch.from_numpy(np.array(masks)).float()

    def rows_of(i: int) -> Iterator[Row]:
        for name, (colours, on) in prepared.items():
            shares = between(colours[i].flatten(0, 1), on)
            other = torch.cat([shares[:i], shares[i + 1 :]]).nanmean()
            yield Row(name, ALL, OWN, "apart", float(shares[i]))
            yield Row(name, ALL, OTHER, "apart", float(other))

    prepared = {}
    for name, parts in found.items():
        maps = torch.cat(parts)
        covered = F.adaptive_avg_pool2d(there, tuple(maps.shape[-2:])).flatten(1)  # shares of cells
        prepared[name] = Colours.fitted(maps).of(maps), covered > 0.5
    return table_of(rows_of(i) for i in range(len(images)))


# ---------------------------------------------------------------------------------------------------------- the figures


def networks_of(setting: Setting) -> dict[str, int]:
    """The networks whose features are measured, and on how many images: none on a user's photograph."""
    return {f"{name}, features": count for name, count in of_the_subject(setting).items()}


def colour_measures(setting: Setting, names: Sequence[str]) -> tuple[list[Measure], dict]:
    """What the colours of some maps say of the object, and the tables of the networks."""
    networks = {setting.subject.name: setting.subject.model} | setting.other_seeds | setting.twins
    tables = {
        name: setting.evaluation(f"{name}, features", model, evaluate=evaluate_features)
        for name, model in networks.items()
    }
    table = joined(tables)
    found = [share("apart", at(table, name), setting.subject.name, name, layer=name) for name in names]
    return found, {f"{name}, features": its for name, its in tables.items()}


def kept_in_colours(setting: Setting, names: Sequence[str]) -> list[Measure]:
    """On the user's photograph: how much of a map's variance its three colours hold."""
    maps = {network: all_maps(model, setting.own.x[None]) for network, model in with_twin(setting).items()}
    kept = {network: {name: Colours.fitted(its[name]).kept for name in names} for network, its in maps.items()}
    return [
        Measure(f"variance in three colours, {name}", kept["trained"][name], {RANDOM: kept[RANDOM][name]}, n=1)
        for name in names
    ]


def measured_colours(setting: Setting, names: Sequence[str]) -> tuple[list[Measure], dict]:
    """The measures of a figure of colours, and its tables."""
    return (kept_in_colours(setting, names), {}) if setting.image is not None else colour_measures(setting, names)


def stacked(pictures: Sequence[Picture]) -> Float[Tensor, "n 3 H W"]:
    """What the model sees of all pictures."""
    return torch.stack([picture.x for picture in pictures])


COLOURS = (
    "Colours: the first three principal components of a map's channels, over the pixels of all pictures {together}, "
    "with one range for all; each map has axes of its own, so that colours of two maps cannot be compared. "
)


def several_images(setting: Setting, indices: Sequence[int], title: str) -> Drawing:
    """Figure 7: layers of several images as colours."""
    pictures = setting.pictures(indices)
    x = stacked(pictures)
    maps, twin = (layer_maps(model, x) for model in with_twin(setting).values())
    names = chosen(list(maps), 4)
    measures, tables = measured_colours(setting, names)
    shown, random = (coloured({name: its[name] for name in names}) for its in (maps, twin))
    caption = (
        f"{COLOURS.format(together='here')}The map has {size_in_words(maps[names[0]])} cells in "
        f"{'every layer' if same_size(maps) else 'the first'}. {told_apart(measures)}"
        f"{conditions(setting, pictures, measures, '')}"
    )
    columns = ["photograph", *names, f"random, {names[-1]}"]
    options = dict(aspect=aspect_of(pictures), column_labels=columns)
    sheet = style.sheet(len(pictures), len(columns), title, caption, compared(measures), **options)
    for i, (row, picture) in enumerate(zip(sheet.panels, pictures, strict=True)):
        ground(row[0], picture)
        for ax, colours in zip(row[1:], [*(shown[name][i] for name in names), random[names[-1]][i]], strict=True):
            draw_colours(ax, picture, colours)
    style.key(sheet, object_key(pictures))
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], tables)


def draw_colours(ax: Axes, picture: Picture, colours: np.ndarray) -> None:
    """A map as colours over a whole panel, with the object's edge."""
    ground(ax, picture)
    style.colours(ax, colours, picture.shape)


def size_in_words(maps: Float[Tensor, "n C h w"]) -> str:
    """Rows and columns."""
    return "{} × {}".format(*maps.shape[-2:])


def same_size(maps: Mapping[str, Tensor]) -> bool:
    """Whether all maps have one size."""
    return len({tuple(found.shape[-2:]) for found in maps.values()}) == 1


def told_apart(measures: Sequence[Measure]) -> str:
    """How many maps know the object better than chance: more than a random network and another image's mask."""
    if measures[0].other is None:
        return ""
    known = [one.layer for one in measures if one.trained - 2 * one.standard_error > max(one.nulls)]
    told = f"{listed(known)}" if known else "none"
    return (
        "Numbers: the share of the variance of colours that is between the object and the rest of an image, with axes "
        "fitted to all images that are measured. By more "
        f"than two standard errors above random weights and another image's mask: {told}. "
    )


def all_layers(setting: Setting, indices: Sequence[int], title: str) -> Drawing:
    """Figure 12: all layers and the decoder's maps of one image as colours, trained and random."""
    pictures = setting.pictures(indices)
    x = stacked(pictures)
    found = {network: all_maps(model, x) for network, model in with_twin(setting).items()}
    names = list(found["trained"])
    measures, tables = measured_colours(setting, chosen(names, ROW))
    shown = {network: coloured(maps) for network, maps in found.items()}
    drawn = ["photograph", *names]
    rows_each = -(-len(drawn) // ROW)
    columns = min(ROW, len(drawn))
    caption = (
        f"All layers (Z), and what follows in the decoder: U, right after each bilinear upsampling, and the logits at "
        f"the size of the image. {COLOURS.format(together='here')}{told_apart(measures)}"
        f"{conditions(setting, pictures, measures, '')}"
    )
    blocks = [(network, i) for i in range(len(pictures)) for network in shown]
    options = dict(
        aspect=aspect_of(pictures),
        row_labels=[label for network, _ in blocks for label in [network.split()[0], *[""] * (rows_each - 1)]],
        column_labels=drawn if rows_each == 1 else (),
    )
    sheet = style.sheet(len(blocks) * rows_each, columns, title, caption, compared(measures), **options)
    for k, (network, i) in enumerate(blocks):
        panels = sheet.panels[k * rows_each : (k + 1) * rows_each].ravel()
        ground(panels[0], pictures[i])
        for ax, name in zip(panels[1:], names, strict=False):
            draw_colours(ax, pictures[i], shown[network][name][i])
            if rows_each > 1:
                style.tag(ax, name)
        for ax in panels[len(drawn) :]:
            ax.axis("off")
    style.key(sheet, object_key(pictures))
    return Drawing(sheet.figure, caption, pictures, measures, [setting.subject.story], tables)
