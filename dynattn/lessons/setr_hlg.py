"""The pictures of the lesson on SETR and HLG. Each function draws one; the reader turns its arguments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynattn
from dynattn import core, cost
from dynattn.data import CLASSES, Shapes, to_input
from dynattn.figures import style
from dynattn.figures.drawing import ground
from dynattn.figures.subjects import Picture
from dynattn.lessons.controls import Pointer, Turn, choice, turn
from dynattn.lessons.notebook import HEAT, panels, show
from dynattn.mechanisms.local_global import (
    Layout,
    LocalGlobalAttention,
    LocalGlobalRecord,
    bias_of_windows,
    local_attention_loops,
    place_loops,
)
from dynattn.models.hlg import FullAttention
from dynattn.models.setr import SETR
from dynattn.models.setr_hlg import SharedAttention
from dynattn.models.vit import Layer, TokenAttention
from dynattn.tracing import Trace, trace
from dynattn.training.tasks import batches, class_maps
from dynattn.widgets import Lens

DECODERS = {"Naive": "setr_naive_mini", "PUP": "setr_pup_mini", "MLA": "setr_mla_mini"}
SMALL, BACKBONE = "setr_pup_hlg_mini", "hlg_mini"  # HLG's layers in a network for pixels, and in one for images
SCENES = (13, 10, 28, 37)  # test images, chosen for the places of their objects, not by what a model makes of them
QUERY = (38.0, 26.0)  # a pixel (row, col) of the first
SIDE, SHARP = 64, 256  # of the images, in pixels; of what is shown
COUNTED = 200  # test images that scores are measured on
DRAWS = 400  # of images with replacement, for an error of a mean IoU
GREEN, VIOLET = "#009E73", "#8E5EA2"
WAYS = {"zeros": "nothing is read", "alike": "all keys get the same weight"}


# ------------------------------------------------------------------------------------------------ networks and images


@cache
def network(name: str) -> nn.Module:
    """A trained network that ships."""
    return dynattn.create_model(name, pretrained=True)


@cache
def scene(index: int) -> Picture:
    """A test image with a textured object among pieces of others, as the networks see it, and sharper to be shown."""
    seen, label, _ = Shapes("cluttered", "test", SIDE, COUNTED)[index]
    shown, _, mask = Shapes("cluttered", "test", SHARP, COUNTED)[index]
    x = to_input(seen, (SIDE, SIDE))[0]
    return Picture(f"{CLASSES[label]} ({index})", x, shown.movedim(0, -1).numpy(), mask.numpy(), label)


@cache
def traced(name: str, index: int) -> Trace:
    """A network's trace on a test image."""
    return trace(network(name), scene(index).x)


def scene_choice() -> object:
    """Buttons for the test images."""
    return choice(*[(scene(i).name.split(" ")[0], i) for i in SCENES], name="image")


def overlay(ax: Axes, values: np.ndarray, **look) -> None:
    """A value or a colour for every cell of a map, over a photograph."""
    ax.imshow(values, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5), interpolation="nearest", **look)


def weighted(ax: Axes, weight: Float[Tensor, "H W"], title: str) -> None:
    """Attention to the cells of a map, dark where it is most; nothing where there is none."""
    share = (weight / weight.max()).numpy()
    overlay(ax, share, cmap=HEAT, vmin=0, vmax=1.25, alpha=np.where(share > 0, 0.35 + 0.5 * share, 0.0))
    ax.set_title(title)


def perplexity(weight: Float[Tensor, " n"]) -> float:
    """Over how many keys a plain mean would be spread as much."""
    return float(torch.special.entr(weight).sum().exp())


# ------------------------------------------------------------------------------------------------------------- scores

Confusion = Int[Tensor, "n K K"]  # of every image: how many pixels of a class (row) are given a class (column)


@cache
def test_scenes() -> tuple[UInt8[np.ndarray, "n 3 H W"], UInt8[np.ndarray, "n H W"]]:
    """Test images of the cluttered level, and the class of every pixel: 0 is background."""
    items = [Shapes("cluttered", "test", SIDE, COUNTED)[i] for i in range(COUNTED)]
    images, masks = (np.stack([item[part].numpy() for item in items]) for part in (0, 2))
    return images, class_maps(np.array([int(item[1]) for item in items]), masks)


def truth_of(index: int) -> Int[Tensor, "H W"]:
    """The class of every pixel of a test scene."""
    return torch.from_numpy(test_scenes()[1][index]).long()


@cache
def test_objects() -> tuple[UInt8[np.ndarray, "n 3 H W"], Int[np.ndarray, " n"]]:
    """Test images of the easy level, and their classes."""
    items = [Shapes("easy", "test", 128)[i] for i in range(COUNTED)]
    return np.stack([item[0].numpy() for item in items]), np.array([int(item[1]) for item in items])


def confusion(predicted: Int[Tensor, "n ..."], truth: Int[Tensor, "n ..."], K: int) -> Confusion:
    """Counts of pixels, or of images, by true and predicted class, for every image."""
    pairs = (truth * K + predicted).reshape(len(truth), -1)
    return torch.stack([torch.bincount(one, minlength=K * K) for one in pairs]).reshape(-1, K, K)


def mean_iou(counts: Float[Tensor, "*draws K K"]) -> Float[Tensor, "*draws"]:
    """The mean over the classes that are there or predicted."""
    right = counts.diagonal(dim1=-2, dim2=-1)
    union = counts.sum(-1) + counts.sum(-2) - right
    there = union > 0
    return (right / union.clamp(min=1)).sum(-1) / there.sum(-1)


def accuracy(counts: Float[Tensor, "*draws K K"]) -> Float[Tensor, "*draws"]:
    """The share of right answers."""
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-2, -1))


Score = Callable[[Tensor], Tensor]


def difference(new: Confusion, old: Confusion, score: Score) -> tuple[float, float]:
    """By how much a score of all images is more, and its standard error: over images drawn with replacement."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(new), (DRAWS, len(new)), generator=draw)
    often = torch.stack([torch.bincount(one, minlength=len(new)) for one in drawn]).double()
    apart = [score(torch.einsum("dn,nij->dij", often, one.double())) for one in (new, old)]
    more = score(new.sum(0).double()) - score(old.sum(0).double())
    return float(more), float((apart[0] - apart[1]).std())


@torch.no_grad()
def classes_of_pixels(model: nn.Module, read: Callable[[nn.Module, Tensor], Tensor] | None = None) -> Confusion:
    """What a network says of the pixels of the test scenes; read(model, x): its logits, by default its own."""
    images, truth = test_scenes()
    asked = model if read is None else Reader(model, read)
    found = [confusion(logits.argmax(1), right, 11) for logits, right in batches(asked, images, truth, 50)]
    return torch.cat(found)


class Reader(nn.Module):
    """Logits of a network that are not its own answer."""

    def __init__(self, model: nn.Module, read: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.model, self.read = model, read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.model, x)


@torch.no_grad()
def classes_of_images(model: nn.Module) -> Confusion:
    """What a network says of the test images of the easy level."""
    images, truth = test_objects()
    return torch.cat([confusion(logits.argmax(1), right, 10) for logits, right in batches(model, images, truth, 25)])


@cache
def of_decoder(name: str) -> Confusion:
    """What one of the networks for pixels says, as it is."""
    return classes_of_pixels(network(name))


# ------------------------------------------------------------------------------------------------------ 1: the question


def question() -> Lens:
    """One query: what it reads in SETR, and in HLG in a plain and in a dilated layer."""
    models = {"SETR": network("setr_pup_mini"), "HLG, plain": network(SMALL), "HLG, dilated": network(SMALL)}
    layer = ["encoder.blocks.1.attn", *(f"backbone.stages.0.blocks.{i}.attn" for i in (0, 1))]
    image, (row, col) = Shapes("cluttered", "test", 512, COUNTED)[SCENES[0]][0], QUERY
    return Lens(models, image, row=row, col=col, layer=layer)


# ------------------------------------------------------------------------------------------------------ 3: patch sizes

PATCHES = (4, 8, 16, 32)


@cache
def with_patch(patch: int) -> cost.Cost:
    """The cost of a small SETR with patches of this side. Weights do not matter."""
    model = dynattn.create_model("setr_pup_mini", patch=patch, steps=patch.bit_length() - 1)
    return cost.count(model, SIDE)


def by_patch(truth: UInt8[np.ndarray, "n H W"], patch: int) -> Int[Tensor, "n H W"]:
    """The class that most pixels of a patch have, for all of its pixels."""
    classes = nn.functional.one_hot(torch.from_numpy(truth).long(), 11)
    often = rearrange(classes, "n (h y) (w x) K -> n h w K (y x)", y=patch, x=patch).sum(-1)
    return often.argmax(-1).repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)


@cache
def resolved(patch: int) -> float:
    """Mean IoU of `by_patch` on the test scenes."""
    truth = test_scenes()[1]
    return float(mean_iou(confusion(by_patch(truth, patch), torch.from_numpy(truth).long(), 11).sum(0).double()))


def draw_patches(patch: int, image: int) -> tuple[Figure, str]:
    """An image in patches; the best class map with one class for each; cost and mean IoU against the side."""
    picture, grid = scene(image), np.arange(0, SIDE + 1, patch) - 0.5
    figure, (photo, best, ax) = panels(1, 1, 1.25)
    for one in (photo, best):
        ground(one, picture)
    photo.hlines(grid, -0.5, SIDE - 0.5, color=style.PAPER, linewidth=1)
    photo.vlines(grid, -0.5, SIDE - 0.5, color=style.PAPER, linewidth=1)
    photo.set_title("patches: one token each")
    draw_classes(best, by_patch(test_scenes()[1][image][None], patch)[0], picture.label, "its most common class")
    scores, prices = [resolved(p) for p in PATCHES], [with_patch(p).macs / 1e6 for p in PATCHES]
    ax.plot(PATCHES, scores, "o-", color=GREEN, label="mean IoU, the most common class")
    own = float(mean_iou(of_decoder("setr_pup_mini").sum(0).double()))
    ax.plot(network("setr_pup_mini").encoder.patch, own, "*", color=style.RED, markersize=17, label="setr_pup_mini")
    ax.plot(PATCHES, [price / max(prices) for price in prices], "s--", color=style.INK, label="cost, of patch 4")
    ax.axvline(patch, color=style.INK, linestyle=":")
    ax.set(xscale="log", xlabel="side of a patch; dotted: yours", ylim=(0, 1.05))
    ax.set_xticks(PATCHES, PATCHES)
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper right")
    N = (SIDE // patch) ** 2
    return figure, (
        f"{SIDE} × {SIDE} pixels in patches of {patch} × {patch} are {N} tokens: <b>{N * N:,}</b> attention weights in "
        f"each head and layer, {with_patch(patch).macs / 1e6:,.0f} M multiply-adds for the network. With its "
        f"most common class for every patch, mean IoU is <b>{resolved(patch):.3f}</b>. The trained setr_pup_mini, with "
        f"patches of {network('setr_pup_mini').encoder.patch}, has {own:.3f}, on the same {COUNTED} test images."
    )


def patches() -> Turn:
    """The side of a patch and the image."""
    return turn(draw_patches, patch=choice(*PATCHES, value=8), image=scene_choice())


# ---------------------------------------------------------------------------------------------------------- 4: decoders


def at_own_size(model: SETR, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K h w"]:
    """Logits as the decoder leaves them, before the last resize."""
    maps = model.encoder(x, model.layers)
    return model.decoder(maps if model.kind == "mla" else maps[-1])


def draw_classes(ax: Axes, classes: Int[Tensor, "h w"], label: int, title: str) -> None:
    """The pixels that are given the object's class, green, and those that are given another one, orange."""
    colours = np.zeros((*classes.shape, 4))
    for which, colour in ((classes == label + 1, GREEN), ((classes > 0) & (classes != label + 1), style.ORANGE)):
        colours[which.numpy()] = (*to_rgb(colour), 0.75)
    overlay(ax, colours)
    ax.set_title(title)


def object_iou(classes: Int[Tensor, "H W"], image: int) -> float:
    """IoU of an image's object, and what is given its class."""
    said, true = classes == scene(image).label + 1, truth_of(image) > 0
    return float((said & true).sum() / (said | true).sum())


@torch.no_grad()
def draw_decoders(size: str, image: int) -> tuple[Figure, str]:
    """What the three networks say of an image, at its size or as their decoders leave it."""
    picture, x = scene(image), scene(image).x[None]
    figure, axes = panels(1, 1, 1, 1, height=3.8)
    for ax in axes:
        ground(ax, picture)
    axes[0].set_title(f"the truth: {CLASSES[picture.label]}")
    said, here, sizes = [], [], []
    for ax, (decoder, name) in zip(axes[1:], DECODERS.items(), strict=True):
        model = network(name)
        logits = at_own_size(model, x)[0] if size == "own" else model(x)[0]
        draw_classes(ax, logits.argmax(0), picture.label, f"{decoder}, {logits.shape[1]} × {logits.shape[2]}")
        sizes.append(str(logits.shape[1]))
        here.append(f"{decoder} {object_iou(model(x)[0].argmax(0), image):.2f}")
        more, error = difference(of_decoder(name), of_decoder(DECODERS["PUP"]), mean_iou)
        apart = "" if decoder == "PUP" else f" ({more:+.3f} ± {error:.3f} from PUP)"
        said.append(f"{decoder} <b>{float(mean_iou(of_decoder(name).sum(0).double())):.3f}</b>{apart}")
    return figure, (
        f"Green: the object's class; orange: another one; line: the true outline. Maps of {', '.join(sizes)} cells a "
        f"side. After the last resize, IoU of this object: {', '.join(here)}. Mean IoU of {COUNTED} test images: "
        f"{', '.join(said)}."
    )


def decoders() -> Turn:
    """The size at which classes are shown, and the image."""
    return turn(
        draw_decoders,
        size=choice(("of the image", "image"), ("as the decoder leaves it", "own"), name="size"),
        image=scene_choice(),
    )


# --------------------------------------------------------------------------------------------------------- 5: positions


def alike(table: Float[Tensor, "C H W"], i: int, j: int) -> Float[Tensor, "H W"]:
    """The cosine between what is learned for the position (i, j) and for every position."""
    rows = nn.functional.normalize(rearrange(table.detach(), "C H W -> H W C"), dim=-1)
    return rows @ rows[i, j]


def by_distance(table: Float[Tensor, "C H W"]) -> tuple[Int[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """The mean cosine of two positions by how many cells they are apart: in rows or columns, whichever is more."""
    rows = rearrange(nn.functional.normalize(table.detach(), dim=0), "C H W -> (H W) C")
    i, j = (part.flatten() for part in torch.meshgrid(*map(torch.arange, table.shape[1:]), indexing="ij"))
    apart = torch.maximum((i[:, None] - i).abs(), (j[:, None] - j).abs())
    distances = torch.arange(1, int(apart.max()) + 1)
    return distances.numpy(), np.array([float((rows @ rows.T)[apart == d].mean()) for d in distances])


@cache
def untrained(seed: int) -> Float[Tensor, "C H W"]:
    """The table that training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dynattn.create_model("setr_pup_mini").encoder.embed.table.detach()


def draw_positions(query: tuple[float, float], decoder: str) -> tuple[Figure, str]:
    """Which positions are learned to be alike, for one position and by distance, beside tables that are not trained."""
    table = network(DECODERS[decoder]).encoder.embed.table
    stride = SIDE / table.shape[1]
    i, j = (min(int((at + 0.5) // stride), table.shape[1] - 1) for at in query)
    found = alike(table, i, j)
    figure, (ax, line) = panels(1, 1.3)
    image = ax.imshow(found.numpy(), extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5), cmap="PuOr_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=ax, label="cosine", shrink=0.8)
    style.star(ax, (j + 0.5) * stride - 0.5, (i + 0.5) * stride - 0.5)
    ax.set(title="the star's position and all others", xticks=[], yticks=[])
    for name, one, look in [
        ("trained", table, dict(color=style.ORANGE, marker="o")),
        *((f"not trained, seed {seed}", untrained(seed), dict(color=style.GREY, marker="x")) for seed in (0, 1)),
    ]:
        line.plot(*by_distance(one), label=name, **look)
    line.axhline(0, color=style.INK, linewidth=1)
    line.set(xlabel="cells apart", title="mean cosine of two positions")
    line.legend(frameon=False)
    near, far = by_distance(table)[1][[0, -1]]
    null = by_distance(untrained(0))[1]
    return figure, (
        f"The table of {DECODERS[decoder]}, on average over all positions: neighbours have a cosine of "
        f"<b>{near:.2f}</b>, positions {table.shape[1] - 1} cells apart <b>{far:.2f}</b>. Before "
        f"training: {null[0]:.2f} and {null[-1]:.2f}."
    )


def positions() -> Turn:
    """The position to point at, and the network."""
    return turn(
        draw_positions,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=8.0),
        decoder=choice(*DECODERS, value="PUP"),
    )


# ------------------------------------------------------------------------------------------------------------ 6: layers


def reading_layer(number: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """The logits of setr_pup_mini's head on a layer, from 1: of an auxiliary one, or of the decoder on the last."""

    def read(model: SETR, x: Tensor) -> Tensor:
        logits, others = model(x, aux=True)
        return dict(zip((*model.aux_layers, *model.layers), (*others, logits), strict=True))[number]

    return read


@cache
def of_layer(number: int) -> Confusion:
    """What the head on a layer says."""
    return classes_of_pixels(network("setr_pup_mini"), reading_layer(number))


@torch.no_grad()
def draw_layers(query: tuple[float, float], layer: int, image: int) -> tuple[Figure, str]:
    """What a query reads in one layer, and what the heads on three layers make of the image."""
    model, picture = network("setr_pup_mini"), scene(image)
    record = list(traced("setr_pup_mini", image))[layer - 1]
    at, (H, W) = record.query(*query), record.query_shape
    of_each = torch.stack([record.weights(m)[at, : H * W] for m in range(record.heads)])
    weight = of_each.mean(0)
    heads = (*model.aux_layers, *model.layers)
    figure, axes = panels(1, *[1] * len(heads), height=3.8)
    for ax in axes:
        ground(ax, picture)
    weighted(axes[0], weight.reshape(H, W), f"layer {layer}: what the star reads")
    style.star(axes[0], *record.cells()[at].tolist())
    here, said = [], []
    for ax, number in zip(axes[1:], heads, strict=True):
        classes = reading_layer(number)(model, picture.x[None])[0].argmax(0)
        draw_classes(ax, classes, picture.label, f"from layer {number}")
        here.append(f"{object_iou(classes, image):.2f}")
        said.append(f"<b>{float(mean_iou(of_layer(number).sum(0).double())):.3f}</b>")
    own, alone = float(weight[at]), 1 / (H * W + record.prefix)
    return figure, (
        f"Layer {layer}, mean of {record.heads} heads: the star reads its own cell with {own:.3f} ({alone:.3f} if all "
        f"were alike), and much as a plain mean over <b>{mean_perplexity(of_each):.0f}</b> of {H * W} cells. "
        f"Heads on layers {', '.join(map(str, heads))}: IoU of this object {', '.join(here)}; mean IoU of {COUNTED} "
        f"images {', '.join(said)}."
    )


def layers() -> Turn:
    """The query to point at, the layer and the image."""
    return turn(
        draw_layers,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=8.0),
        layer=choice(*range(1, len(network("setr_pup_mini").encoder.blocks) + 1), value=2),
        image=scene_choice(),
    )


# ----------------------------------------------------------------------------------------------------------- 8: windows


def window_of_cells(side: int, R: int, dilated: bool) -> Int[Tensor, "H W"]:
    """The number of the window of every cell of a square map."""
    number = torch.tensor([place_loops(i, side, R, dilated)[0] for i in range(side)])
    return number[:, None] * (-(-side // R)) + number


def draw_windows(query: tuple[float, float], kind: str, R: int, side: int) -> tuple[Figure, str]:
    """The cells of the query's window, all windows, and how many keys the query reads by the window's side."""
    numbers, stride, D = window_of_cells(side, R, kind == "dilated"), SIDE / side, -(-side // R)
    i, j = (min(int((at + 0.5) // stride), side - 1) for at in query)
    mine = numbers == numbers[i, j]
    figure, (photo, grid, line) = panels(1, 1, 1.25)
    picture = scene(SCENES[0])
    for ax in (photo, grid):
        ground(ax, picture)
    overlay(photo, mine.numpy(), cmap=HEAT, vmin=0, vmax=1.6, alpha=0.8 * mine.numpy())
    photo.set_title("dark: its window, read cell by cell")
    colours = np.array([(*to_rgb(colour), 0.65) for colour in style.GROUPS[:7]])
    row, col = numbers // D, numbers % D
    overlay(grid, colours[((2 * row + col) % 7).numpy()])
    for y, x in mine.nonzero().tolist():
        grid.add_patch(Rectangle((x * stride - 0.5, y * stride - 0.5), stride, stride, fill=False, linewidth=1.2))
    grid.set_title("every window is one token; framed: its own")
    for ax in (photo, grid):
        style.star(ax, (j + 0.5) * stride - 0.5, (i + 0.5) * stride - 0.5)
    sides = np.arange(1, side + 1)
    line.plot(sides, sides**2, "--", color=style.BLUE, label="cells of the window, R²")
    line.plot(sides, np.ceil(side / sides) ** 2, "--", color=GREEN, label="windows, D²")
    keys = sides**2 + np.ceil(side / sides) ** 2
    line.plot(sides, keys, color=style.ORANGE, linewidth=3, label="keys of a query")
    line.axhline(side**2, color=style.INK, linewidth=1, label="dense attention")
    line.axvline(R, color=style.INK, linestyle=":")
    line.set(xscale="log", yscale="log", xlabel="side R of a window; dotted: yours", title=f"{side} × {side} cells")
    ticks = [n for n in (1, 2, 4, 8, 16, 32) if n <= side]
    line.set_xticks(ticks, ticks)
    line.minorticks_off()
    line.legend(frameon=False, fontsize=10)
    tall, wide = (int(places[-1] - places[0]) + 1 for places in (mine.any(by).nonzero()[:, 0] for by in (1, 0)))
    return figure, (
        f"D = {D}: {D * D} windows of at most {R} × {R} cells. The query reads {int(mine.sum())} cells, out of "
        f"{tall} rows and {wide} columns, and {D * D} windows: <b>{int(mine.sum()) + D * D}</b> keys in place of "
        f"{side * side}. Fewest keys on this map: R = <b>{int(sides[keys.argmin()])}</b>."
    )


def windows() -> Turn:
    """The query to point at, the kind and the side of windows, and the map."""
    return turn(
        draw_windows,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=4.0),
        kind=choice("plain", "dilated", name="windows"),
        R=choice(2, 4, 7, 8, 16, value=4),
        side=choice(16, 32, 56, value=16, name="cells on a side"),
    )


# ------------------------------------------------------------------------------------------------------ 9: three kinds

PAIRS = {  # layers with plain and with dilated windows that follow each other
    "stage 1": ("backbone.stages.0.blocks.0.attn", "backbone.stages.0.blocks.1.attn"),
    "stage 2": ("backbone.stages.1.blocks.0.attn", "backbone.stages.1.blocks.1.attn"),
    "decoder": ("decoder.layers.0.attn", "decoder.layers.1.attn"),
}


def of_heads(record: LocalGlobalRecord, query: int) -> tuple[Float[Tensor, "M L"], Float[Tensor, "M N"]]:
    """What each head of a query gives to the cells of its window, and to all windows."""
    near = torch.stack([record.local(head)[query] for head in range(record.heads)])
    return near, record.everywhere[:, query]


def mean_perplexity(weights: Float[Tensor, "M N"]) -> float:
    """Over how many keys a head reads much as a plain mean, in the mean of the heads."""
    return float(np.mean([perplexity(one / one.sum()) for one in weights]))


def alike_tokens(record: LocalGlobalRecord) -> float:
    """The mean cosine of the values of two different windows."""
    values = nn.functional.normalize(record.v_g, dim=-1)
    N = values.shape[1]
    return float(((values @ values.mT).sum((1, 2)) - N).mean() / (N * N - N))


def draw_keys(query: tuple[float, float], pair: str, grid: str, image: int) -> tuple[Figure, str]:
    """The three kinds of keys of a query: its plain window, its dilated window, and all windows as tokens."""
    found = dict(zip(("plain", "dilated"), (traced(SMALL, image)[name] for name in PAIRS[pair]), strict=True))
    figure, axes = panels(1, 1, 1, height=4.7)
    said, shape = [], found["plain"].query_shape
    at = found["plain"].query(*query)
    for ax, (kind, record) in zip(axes, found.items(), strict=False):
        ground(ax, scene(image))
        near = of_heads(record, at)[0]
        weighted(ax, near.mean(0).reshape(shape), f"{kind} window")
        count = int((near > 0).any(0).sum())
        said.append(f"its {kind} window much as a plain mean over <b>{mean_perplexity(near):.1f}</b> of {count} cells")
    record = found[grid]
    of_each = of_heads(record, at)[1]
    far = of_each.mean(0)
    ground(axes[2], scene(image))
    weighted(axes[2], far[record.window].reshape(shape), f"all {grid} windows, each one token")
    for ax in axes:
        style.star(ax, *record.cells()[at].tolist())
    own, like = float(far[record.window[at]]), {kind: alike_tokens(one) for kind, one in found.items()}
    return figure, (
        f"The star reads {', '.join(said)}, and all {grid} windows as one over "
        f"<b>{mean_perplexity(of_each):.1f}</b> of {len(far)}. "
        f"Of these its own window gets {own:.3f}, the one it reads most {float(far.max()):.3f}; "
        f"alike would be {1 / len(far):.3f}. Values of two windows have a cosine of <b>{like['plain']:.2f}</b> where "
        f"windows are plain, <b>{like['dilated']:.2f}</b> where they are dilated. Means of {record.heads} heads."
    )


def keys() -> Turn:
    """The query to point at, the two layers, which windows are pooled, and the image."""
    return turn(
        draw_keys,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=4.0),
        pair=choice(*PAIRS, name="layers"),
        grid=choice("plain", "dilated", name="pooled windows"),
        image=scene_choice(),
    )


# ------------------------------------------------------------------------------------------------------------- 10: cost


def attention_weights(L: int, R: int, form: str) -> int:
    """How many weights a head has, on a square map of L cells whose side R divides.

    form: "dense"; "windows", of R x R cells; or "local-global": windows, and every window for every query.
    """
    return {"dense": L * L, "windows": L * R * R, "local-global": L * (R * R + L // (R * R))}[form]


class Largest(TorchDispatchMode):
    """Inside, how many numbers the largest tensor has that torch makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **options or {})
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def largest(call: Callable[[], object]) -> int:
    """How many numbers the largest tensor has that a call makes."""
    with Largest() as seen, torch.no_grad():
        call()
    return seen.numbers


def draw_cost(R: int) -> tuple[Figure, str]:
    """Attention weights of a head against the side of the map."""
    sides = np.array([n * R for n in (2, 4, 8, 16, 32, 64) if 8 <= n * R <= 512])
    forms = {"dense": style.INK, "windows": style.BLUE, "local-global": style.ORANGE}
    count = {form: np.array([attention_weights(int(side) ** 2, R, form) for side in sides]) for form in forms}
    figure, (ax, keys_of) = panels(1.2, 1)
    for form, colour in forms.items():
        ax.plot(sides, count[form] * 4 / 2**20, "o-", color=colour, label=form)
        keys_of.plot(sides, count[form] / sides**2, "o-", color=colour, label=form)
    ax.set(title="attention weights of a head, MB in float32")
    keys_of.set(title="keys that a query reads")
    for one in (ax, keys_of):
        one.set(xscale="log", yscale="log", xlabel="side of the map, cells")
        one.minorticks_off()
        one.set_xticks(sides, sides)
        one.legend(frameon=False)
    growth = {form: count[form][-1] / count[form][-3] for form in forms}
    return figure, (
        f"From {sides[-3]} × {sides[-3]} to {sides[-1]} × {sides[-1]} cells the cells grow "
        f"{(sides[-1] // sides[-3]) ** 2} times. Weights grow: dense <b>{growth['dense']:.0f}</b> times, windows "
        f"<b>{growth['windows']:.0f}</b>, local-global <b>{growth['local-global']:.0f}</b>. On the largest map dense "
        f"attention has {count['dense'][-1] / count['local-global'][-1]:.0f} times as many as local-global attention."
    )


def costs() -> Turn:
    """The side of the windows."""
    return turn(draw_cost, R=choice(4, 7, 8, 14, value=7, name="side R of a window"))


# ---------------------------------------------------------------------------------------------------------- 11: verdict

LocalGlobal = (LocalGlobalAttention, SharedAttention)


@contextmanager
def patched(thing: object, name: str, new: object) -> Iterator[None]:
    """Inside, a module answers to a method's name with another function."""
    setattr(thing, name, new)
    try:
        yield
    finally:
        delattr(thing, name)


def instead(how: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """What is read instead: "zeros", or "alike", the plain mean of the keys that may be read."""
    if how == "zeros":
        return v.new_zeros(*q.shape)
    hidden = None if bias is None else torch.zeros_like(bias).masked_fill(bias == -torch.inf, -torch.inf)
    return core.dense_attention_torch(q, k, v, hidden, 0.0)


def taking(layer: nn.Module, part: str, how: str) -> Callable:
    """The `attend` of a local-global layer, whose local or global attention, `part`, reads something else."""
    attend, turn_of = layer.attend, cycle(("local", "global") if layer.local else ("global",))

    def changed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return instead(how, q, k, v, bias) if next(turn_of) == part else attend(q, k, v, bias)

    return changed


@contextmanager
def hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    """Inside, a module puts out something else."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def third(which: int) -> Callable:
    """A hook that puts zeros in the place of queries (0) or values (2), which one linear map makes."""

    def hook(module: nn.Module, given: tuple, qkv: Tensor) -> Tensor:
        parts = list(qkv.chunk(3, dim=-1))
        parts[which] = torch.zeros_like(parts[which])
        return torch.cat(parts, dim=-1)

    return hook


def changes_of(layer: nn.Module, part: str, how: str) -> list:
    """Context managers in which a part of a layer reads nothing, or all of its keys alike; none for another layer.

    part: "plain", "dilated" or "local" windows, "global", all windows, or "full", attention of all cells to all.
    """
    if isinstance(layer, LocalGlobal):
        if part == "global":
            return [patched(layer, "attend", taking(layer, "global", how))]
        if part == "local" or part == ("dilated" if layer.dilated else "plain"):
            return [patched(layer, "attend", taking(layer, "local", how))]
    if isinstance(layer, FullAttention) and part == "full":
        zero = lambda module, given, out: torch.zeros_like(out)  # noqa: E731
        flat = patched(layer, "added", lambda shape, like: like.new_zeros(1, 1, 1, 1))
        return [hooked(layer.v, zero)] if how == "zeros" else [hooked(layer.q, zero), flat]
    if isinstance(layer, TokenAttention) and part == "full":
        return [hooked(layer.qkv, third(2 if how == "zeros" else 0))]
    return []


@contextmanager
def without(model: nn.Module, part: str, how: str, only: Sequence[int] | None = None) -> Iterator[None]:
    """Inside, a part of the attention reads nothing or all keys alike; in all layers that have it, or in some of them.

    only: numbers of these layers, from 1, in the order of the network.
    """
    found = [one for layer in model.modules() if (one := changes_of(layer, part, how))]
    with ExitStack() as stack:
        for number, ones in enumerate(found, 1):
            for one in ones if only is None or number in only else ():
                stack.enter_context(one)
        yield


@contextmanager
def positions_as(model: SETR, new: Float[Tensor, "C H W"]) -> Iterator[None]:
    """Inside, a network has another table of positions."""
    own = model.encoder.embed.table.data
    model.encoder.embed.table.data = new
    try:
        yield
    finally:
        model.encoder.embed.table.data = own


PARTS = {  # of HLG
    "plain": "plain windows",
    "dilated": "dilated windows",
    "local": "plain and dilated windows",
    "global": "all windows as tokens",
    "full": "full attention, last stage",
}
Ask = Callable[[nn.Module], Confusion]


@dataclass(frozen=True)
class Asked:
    """A network, what it is asked, and the score of its answers."""

    name: str
    ask: Ask
    score: Score
    what: str


HLG_NETWORKS = (
    Asked(BACKBONE, classes_of_images, accuracy, "right classes"),
    Asked(SMALL, classes_of_pixels, mean_iou, "mean IoU"),
)


def compared(asked: Asked, changes: dict[tuple[str, str], Callable[[nn.Module], object]]) -> pd.DataFrame:
    """The score of a network as it is and with changes, by what is changed and how; `more`, and its `error`."""
    model = network(asked.name)
    whole = asked.ask(model)
    value = lambda found: float(asked.score(found.sum(0).double()))  # noqa: E731
    rows = [dict(part="nothing", how="", value=value(whole), more=0.0, error=0.0)]
    for (part, how), change in changes.items():
        with change(model):
            found = asked.ask(model)
        more, error = difference(found, whole, asked.score)
        rows.append(dict(part=part, how=how, value=value(found), more=more, error=error))
    return pd.DataFrame(rows).assign(network=asked.name, what=asked.what)


@cache
def verdict() -> pd.DataFrame:
    """What HLG's two networks lose where a part of their attention is taken away."""
    taken = {
        (words, how): (lambda model, p=part, h=how: without(model, p, h))
        for part, words in PARTS.items()
        for how in WAYS
    }
    return pd.concat([compared(asked, taken) for asked in HLG_NETWORKS], ignore_index=True)


@cache
def need() -> pd.DataFrame:
    """What setr_pup_mini loses without positions, and without what its layers read."""
    table = network("setr_pup_mini").encoder.embed.table.detach()
    order = torch.randperm(table[0].numel(), generator=torch.Generator().manual_seed(0))
    mixed = table.flatten(1)[:, order].reshape(table.shape)
    taken = {
        ("positions", "zeros"): lambda model: positions_as(model, torch.zeros_like(table)),
        ("positions", "at other places"): lambda model: positions_as(model, mixed),
    }
    count = len(network("setr_pup_mini").encoder.blocks)
    for number in range(1, count + 1):
        for how in WAYS:
            only = lambda model, n=number, h=how: without(model, "full", h, only=[n])  # noqa: E731
            taken[f"attention of layer {number}", how] = only
    for how in WAYS:
        taken["attention of all layers", how] = lambda model, h=how: without(model, "full", h)
    return compared(Asked("setr_pup_mini", classes_of_pixels, mean_iou, "mean IoU"), taken)


def score_in_words(row: object) -> str:
    """A score, and by how much it is more than that of the network as it is."""
    return f"{row.value:.3f} ({row.more:+.3f} ± {row.error:.3f})"


def clearly(rows: pd.DataFrame) -> pd.Series:
    """Where a change is worse by more than two standard errors."""
    return rows.more < -2 * rows.error


def table_in_words(found: pd.DataFrame) -> str:
    """Every change of a network or more: a row for each part, a column for each network and way."""
    networks = list(dict.fromkeys(zip(found.network, found.what, strict=True)))
    columns = [(name, how) for name, _ in networks for how in dict.fromkeys(found[found.network == name].how) if how]
    ways = {how: f"{how}" for _, how in columns} | {"alike": "weights alike"}
    head = " | ".join(f"{name}, {ways[how]}" for name, how in columns)
    lines = [f"| taken away | {head} |", "| --- " * (len(columns) + 1) + "|"]
    by = {(row.network, row.part, row.how): row for row in found.itertuples()}
    for part in dict.fromkeys(found.part):
        if part != "nothing":
            cells = [by.get((name, part, how)) for name, how in columns]
            lines.append(f"| {part} | {' | '.join('' if c is None else score_in_words(c) for c in cells)} |")
    whole = [f"`{name}` {by[name, 'nothing', ''].value:.3f} ({what})" for name, what in networks]
    lines += ["", f"As they are: {', '.join(whole)}. {COUNTED} test images; ± a standard error, over images."]
    return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names) if names else "none"


def in_words(found: pd.DataFrame) -> str:
    """What `verdict` measured, and what follows."""
    lines = [table_in_words(found), ""]
    for name, rows in found[found.part != "nothing"].groupby("network", sort=False):
        worse = {how: rows[(rows.how == how) & clearly(rows)].sort_values("more").part.tolist() for how in WAYS}
        rest = {how: [part for part in dict.fromkeys(rows.part) if part not in worse[how]] for how in WAYS}
        lines += [
            f"**Verdict, `{name}`**, by more than two standard errors. With zeros it is worse without: "
            f"{listed(worse['zeros'])}; no clear loss without: {listed(rest['zeros'])}. With a plain mean of the same "
            f"keys it is worse for: {listed(worse['alike'])}; no clear loss for: {listed(rest['alike'])}. Not clear is "
            "not equal: see the errors.",
            "",
        ]
    return "\n".join(lines)


def need_in_words(found: pd.DataFrame) -> str:
    """What `need` measured, and what follows."""
    rows = found[found.part != "nothing"]
    worse = rows[clearly(rows)]
    said = lambda how: listed([row.part for row in worse[worse.how == how].itertuples()])  # noqa: E731
    return "\n".join(
        [
            table_in_words(found),
            "",
            f"**Verdict.** Worse by more than two standard errors with zeros: {said('zeros')}; at other places: "
            f"{said('at other places')}; with weights alike: {said('alike')}.",
        ]
    )


def draw_verdict(found: pd.DataFrame) -> None:
    """The difference that every change makes, a panel for each network."""
    names = list(dict.fromkeys(found.network))
    figure, axes = panels(*[1] * len(names), height=4.0)
    for ax, name in zip(axes, names, strict=True):
        rows = found[(found.network == name) & (found.part != "nothing")]
        parts = list(dict.fromkeys(rows.part))
        for n, (how, colour) in enumerate(zip(WAYS, (style.ORANGE, style.BLUE), strict=True)):
            of = rows[rows.how == how].set_index("part").reindex(parts)
            places = np.arange(len(parts)) + 0.2 * (2 * n - 1)
            ax.barh(places, of.more, 0.38, xerr=2 * of.error, color=colour, label=WAYS[how])
        ax.set_yticks(range(len(parts)), parts)
        ax.invert_yaxis()
        ax.axvline(0, color=style.INK, linewidth=1)
        ax.set(title=f"{name}: {rows.what.iloc[0]}, change", xlabel="lines: two standard errors")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    show(figure)


# ------------------------------------------------------------------------------------------------- layers for the page

LOOPS = (place_loops, local_attention_loops)  # that section 7 shows


def encoder_layer(dim: int, heads: int) -> nn.Module:
    """Section 3: a layer of SETR's encoder, with random weights, in float64."""
    torch.manual_seed(0)
    return Layer(dim, TokenAttention(dim, heads)).double().eval().requires_grad_(False)


def local_global_layer(dim: int, heads: int, R: int, dilated: bool) -> LocalGlobalAttention:
    """Section 7: a layer of HLG as the text has it, with random weights, in float64."""
    torch.manual_seed(0)
    options = dict(query_as_key=False, conv_of="values", positions="centre", dilated=dilated)
    return LocalGlobalAttention(dim, heads, R, **options).double().eval().requires_grad_(False)


def biases(net: LocalGlobalAttention, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Section 7: B_W of all windows, and B_G, of a map of this shape."""
    layout, like = Layout(shape, net.window, net.dilated), net.q.weight
    return layout.bias(net.local_table(layout, like.device), like, 1), bias_of_windows(
        net.global_bias, layout, net.positions, like
    )
