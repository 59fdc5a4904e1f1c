"""The pictures of the lesson on SG-Former. Each function draws one; the reader turns its arguments."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import dynattn
from dynattn import weights
from dynattn.data import CLASSES, Shapes
from dynattn.figures import style
from dynattn.figures.drawing import ground
from dynattn.figures.measures import evaluate_significance, on_map
from dynattn.figures.sgformer import BEYOND
from dynattn.figures.subjects import load_subject, random_twin
from dynattn.figures.tables import summary
from dynattn.lessons.controls import Pointer, Turn, choice, slider, turn
from dynattn.lessons.notebook import HEAT, numbered, panels, show
from dynattn.lessons.pictures import IMAGES, MEASURED, QUERY, SIDE, image_choice, picture
from dynattn.mechanisms import self_guided
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention, HybridScaleRecord, Layout
from dynattn.mechanisms.self_guided import SelfGuidedAttention, SelfGuidedRecord
from dynattn.models.sgformer import SGFormer
from dynattn.tracing import Trace, trace
from dynattn.training.tasks import batches
from dynattn.weights import path
from dynattn.widgets import Lens

NAME = "sgformer_mini"
COUNTED = 200  # test images that accuracy is measured on where layers are changed
RATES = (64, 32, 16, 8, 4, 2, 1)  # that a reader can take
GREEN = "#009E73"


# ------------------------------------------------------------------------------------------------ models and images


@cache
def network() -> nn.Module:
    """`sgformer_mini`, trained."""
    return dynattn.create_model(NAME, pretrained=True)


@cache
def traced(index: int) -> Trace:
    """`sgformer_mini` on a test image."""
    return trace(network(), picture(index).x)


def layers(kind: str) -> list[tuple[str, str]]:
    """The layers of one kind in `sgformer_mini`: in words, and by name."""
    return numbered(traced(IMAGES[0]).of_kind(kind))


Change = Callable[[str, nn.Module], RemovableHandle]  # of a layer by its name, by a hook


@contextmanager
def changed(model: nn.Module, change: Change) -> Iterator[None]:
    """Inside, every self-guided layer is changed."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SelfGuidedAttention)]
    handles = [change(name, layer) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def guiding(new: Callable[[str, Float[Tensor, "B H W"]], Float[Tensor, "B H W"]]) -> Change:
    """A change: a layer reads `new(name, S)` in the place of the significance S that it is given."""
    return lambda name, layer: layer.register_forward_pre_hook(lambda module, given: (given[0], new(name, given[1])))


def silent(name: str, layer: nn.Module) -> RemovableHandle:
    """A change: a layer puts out zeros."""
    return layer.register_forward_hook(lambda module, given, z: torch.zeros_like(z))


def guided_by(model: nn.Module, maps: Mapping[str, Float[Tensor, "H W"]]) -> AbstractContextManager[None]:
    """Inside, self-guided layers, by their names, read these maps of significance instead of what they are given."""
    return changed(model, guiding(lambda name, S: maps[name].to(S).expand_as(S) if name in maps else S))


def overlay(ax: Axes, values: np.ndarray, **look) -> None:
    """A value or a colour for every cell of a map, over a photograph."""
    ax.imshow(values, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5), interpolation="nearest", **look)


def heat(ax: Axes, values: Float[Tensor, "H W"], title: str) -> None:
    """A map over the photograph, dark where its rank is high."""
    share = (ranks(values.flatten()).reshape(values.shape) - 1) / max(values.numel() - 1, 1)
    overlay(ax, share.numpy(), cmap=HEAT, alpha=0.35 + 0.6 * share.numpy())
    ax.set_title(title)


def ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The rank of every value from 1, the mean rank where several are equal."""
    ordered = values.sort().values
    left, right = (torch.searchsorted(ordered, values, right=right).double() for right in (False, True))
    return (left + right + 1) / 2


# ------------------------------------------------------------------------------------------------------ 1: the question


def question() -> Lens:
    """One query in the background: what it reads in four layers."""
    sg = network()
    models = {name: dynattn.create_model(name, pretrained=True) for name in ("vit_mini", "swin_mini")}
    models |= {f"{NAME}, hybrid": sg, f"{NAME}, guided": sg}
    layer = ["blocks.3.block.attn", "layers.1.blocks.3.block.attn", "stages.1.blocks.0.attn", "stages.0.blocks.1.attn"]
    image, (row, col) = Shapes("easy", "test", 512)[IMAGES[0]][0], QUERY
    return Lens(models, image, row=row, col=col, layer=layer, head=["mean", "mean", 0, 0])


# ---------------------------------------------------------------------------------------------------------- 4: scales


def reading(record: HybridScaleRecord, query: int, s: int, M: int) -> tuple[Layout, Float[Tensor, "HK WK"]]:
    """What a query of the heads that merge nothing would give to merged tokens, the means of s x s keys (SG-3, SG-4).

    0 outside its window of M x M merged tokens.
    """
    head, layout = record.scales.index(1), Layout(record.query_shape, s, M)
    shape = layout.key_shape
    merged = record.k[head].reshape(shape[0], s, shape[1], s, -1).mean(dim=(1, 3))
    i, j = divmod(query, record.query_shape[1])
    rows, cols = (torch.arange(n) // M == at // (s * M) for n, at in zip(shape, (i, j), strict=True))
    inside = rows[:, None] & cols
    logits = (merged @ record.q[head][query]) * record.q[head].shape[-1] ** -0.5
    return layout, logits.masked_fill(~inside, -torch.inf).flatten().softmax(0).reshape(shape)


def draw_scales(query: tuple[float, float], s: int, M: int, layer: str, image: int) -> tuple[Figure, str]:
    """The window of a query at one scale and the merged tokens in it; what it reads and reaches at every scale."""
    record = traced(image)[layer]
    at, (H, W), stride = record.query(*query), record.query_shape, record.stride[0]
    s = min(s, H)
    layout, weight = reading(record, at, s, M)
    figure, (photo, line) = panels(1, 1.3, height=4.7)
    ground(photo, picture(image))
    for u, w in (weight > 0).nonzero().tolist():
        look = dict(facecolor=HEAT(float(weight[u, w] / weight.max())), alpha=0.75, edgecolor=style.INK, linewidth=0.5)
        photo.add_patch(Rectangle((w * s * stride - 0.5, u * s * stride - 0.5), s * stride, s * stride, **look))
    side = s * M
    top, left = (n // side * side for n in divmod(at, W))
    tall, wide = min(side, H - top), min(side, W - left)
    frame = dict(fill=False, edgecolor=style.RED, linestyle="--", linewidth=2.5, zorder=5)
    photo.add_patch(Rectangle((left * stride - 0.5, top * stride - 0.5), wide * stride, tall * stride, **frame))
    style.star(photo, *record.cells()[at].tolist())
    photo.set_title("dashed: its window; dark: read most")

    scales = [n for n in (1, 2, 4, 8) if n <= H]
    found = [(min(n * M, H) * min(n * M, W), min(M, -(-H // n)) * min(M, -(-W // n))) for n in scales]
    line.plot(scales, [cells for cells, _ in found], "o-", color=style.ORANGE, label="cells that it reaches")
    line.plot(scales, [keys for _, keys in found], "o-", color=style.BLUE, label="keys that it reads: the cost")
    line.axvline(s, color=style.INK, linestyle=":")
    line.set(
        xscale="log", yscale="log", xlabel="scale s; dotted: yours", title=f"windows of M = {M} on {H} × {W} cells"
    )
    line.set_xticks(scales, scales)
    line.minorticks_off()
    line.legend(frameon=False)
    layer_scales = sorted(set(record.scales), reverse=True)
    return figure, (
        f"The query reads <b>{int((weight > 0).sum())}</b> keys, each of {s} × {s} cells, from {tall} × {wide} of "
        f"{H} × {W} cells{': the whole map' if tall * wide == H * W else ''}. This layer was trained with the scales "
        f"{' and '.join(map(str, layer_scales))}, half of its heads each. Here a mean of keys stands for the "
        f"convolution that merges."
    )


def scales() -> Turn:
    """The query to point at, the scale, the window, the layer and the image to choose."""
    return turn(
        draw_scales,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=4.0),
        s=choice(1, 2, 4, 8, value=2),
        M=choice(2, 4, 8, 16, value=8),
        layer=choice(*layers("hybrid_scale")),
        image=image_choice(),
    )


# ---------------------------------------------------------------------------------------------------- 5: significance


def summed(record: HybridScaleRecord, reading: str) -> tuple[dict[int, Float[Tensor, "H W"]], Float[Tensor, "H W"]]:
    """The map of every scale and their sum (SG-5): by sums as printed, or by means, which are 1 for every scale."""
    maps = record.maps if reading == "sum" else {s: S / S.mean() for s, S in record.maps.items()}
    return maps, sum(maps.values())


def top_quarter(values: Float[Tensor, "H W"]) -> set[int]:
    """The cells that have the highest values."""
    return set(values.flatten().topk(values.numel() // 4).indices.tolist())


def draw_significance(reading: str, layer: str, image: int) -> tuple[Figure, str]:
    """The significance of every scale, and what guides the next layer."""
    record = traced(image)[layer]
    maps, S = summed(record, reading)
    figure, axes = panels(1, 1, 1, height=4.7)
    for ax in axes:
        ground(ax, picture(image))
    shown = sorted(maps.items(), reverse=True)
    for ax, (s, one) in zip(axes, shown, strict=False):
        heat(ax, one, f"from scale {s}; mean: {float(one.mean()):.2g}")
    heat(axes[2], S, "S, their sum; dark: high rank")
    like = {s: float(np.corrcoef(ranks(one.flatten()), ranks(S.flatten()))[0, 1]) for s, one in shown}
    large = inspect.signature(SGFormer).parameters["scales"].default[0][0]
    most = {s: top_quarter(one) & top_quarter(S) for s, one in shown}
    share = [f"{len(both) / len(top_quarter(S)):.0%} of that of scale {s}" for s, both in most.items()]
    printed = f"By sums the map of a scale s has s² times the mean: {large**2} to 1 in stage 1 of SG-Former-S."
    return figure, (
        f"The order of the cells by S follows scale {shown[0][0]} with a rank correlation of "
        f"<b>{like[shown[0][0]]:.2f}</b>, scale {shown[1][0]} with <b>{like[shown[1][0]]:.2f}</b>. The most "
        f"significant quarter of the cells by S holds {' and '.join(share)}. {printed}"
    )


def significance() -> Turn:
    """The reading of SG-5, the layer and the image to choose."""
    return turn(
        draw_significance,
        reading=choice(("sums, as printed", "sum"), ("means, as published", "mean")),
        layer=choice(*layers("hybrid_scale")),
        image=image_choice(),
    )


# ------------------------------------------------------------------------------------------------- 7: tokens that move


@dataclass(frozen=True)
class Reallocation:
    """What becomes of the cells of a map: the sub-region and the token of each, and the rates of the sub-regions."""

    regions: Int[Tensor, " N"]
    tokens: Int[Tensor, " N"]
    rates: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many tokens are left."""
        return int(self.tokens.max()) + 1

    def on(self, mask: Bool[Tensor, " N"]) -> float:
        """The share of the tokens that stand for cells on a mask, each by how much of it does."""
        cells, inside = (torch.bincount(part, minlength=self.count) for part in (self.tokens, self.tokens[mask]))
        return float((inside / cells).mean())


def reallocate(S: Float[Tensor, "H W"], rates: Sequence[int]) -> Reallocation:
    """SG-2 without weights: sort, cut into as many sub-regions as there are rates, and make groups of ranks."""
    order = self_guided.rank(S[None])[0]
    regions, tokens = torch.empty_like(order), torch.empty_like(order)
    start, count = 0, 0
    for region, (size, rate) in enumerate(
        zip(self_guided.sub_regions(len(order), [1] * len(rates)), rates, strict=True)
    ):
        cells, missing = order[start : start + size], -size % rate
        regions[cells] = region
        tokens[cells] = count + (torch.arange(size) + missing) // rate  # a short group begins with copies
        start, count = start + size, count + (size + missing) // rate
    return Reallocation(regions, tokens, tuple(rates))


def rates_between(first: int, last: int, n: int) -> tuple[int, ...]:
    """n rates from that of the least significant sub-region to that of the most, in steps that are alike."""
    steps = np.linspace(math.log2(first), math.log2(last), n) if n > 1 else [math.log2(first)]
    return tuple(2 ** round(step) for step in steps)


def region_colours(n: int) -> list[tuple[float, ...]]:
    """Light for the least significant sub-region, dark for the most."""
    return [HEAT(0.12 + 0.68 * i / max(n - 1, 1))[:3] for i in range(n)]


def draw_regions(ax: Axes, found: Reallocation, shape: tuple[int, int], title: str) -> None:
    """Every cell in the colour of its sub-region."""
    colours = region_colours(len(found.rates))
    overlay(ax, np.reshape([(*colours[i], 0.75) for i in found.regions.tolist()], (*shape, 4)))
    ax.set_title(title)


def draw_tokens(
    cell: tuple[float, float], n: int, first: int, last: int, by: str, layer: str, image: int
) -> tuple[Figure, str]:
    """What guides a layer, the sub-regions that it makes, and the tokens; the token of one cell is framed.

    n, first, last: how many sub-regions, the rates of the least and the most significant one; n = 0: as trained.
    by: "own", the significance of the image, "other", that of another image, or "constant", the same for all cells.
    """
    record = traced(image)[layer]
    S = record.significance
    if by != "own":
        other = traced(IMAGES[(IMAGES.index(image) + 1) % len(IMAGES)])[layer].significance
        S = other if by == "other" else torch.ones_like(S)
    rates = rates_between(first, last, n) if n else tuple(network().get_submodule(layer).rates)
    found, (H, W), at = reallocate(S, rates), record.query_shape, record.query(*cell)
    figure, axes = panels(1, 1, 1, height=4.9)
    for ax in axes:
        ground(ax, picture(image))
    heat(axes[0], S, "significance; dark: high rank")
    draw_regions(axes[1], found, (H, W), f"sub-regions: {len(rates)}; dark: most significant")
    colours = [(*to_rgb(style.GROUPS[token % 7]), 0.6) for token in found.tokens.tolist()]
    overlay(axes[2], np.reshape(colours, (H, W, 4)))
    axes[2].set_title("colours repeat; framed: one token")
    mine, (height, width) = found.tokens == found.tokens[at], record.stride
    for x, y in record.cells()[mine].tolist():
        frame = dict(fill=False, edgecolor=style.INK, linewidth=1.6, zorder=4)
        axes[2].add_patch(Rectangle((x - width / 2, y - height / 2), width, height, **frame))
    for ax in axes[::2]:
        style.star(ax, *record.cells()[at].tolist())
    mask = on_map(record, torch.from_numpy(picture(image).mask))
    rows, cols = (torch.arange(H * W)[mine] // W, torch.arange(H * W)[mine] % W)
    tall, wide = (int(part.max() - part.min()) + 1 for part in (rows, cols))
    hint = {0: " These rates are the trained ones.", 1: " With one sub-region only the first rate counts."}.get(n, "")
    return figure, (
        f"Rates {', '.join(map(str, rates))}: {H * W} cells become <b>{found.count}</b> tokens. The object has "
        f"{float(mask.float().mean()):.0%} of the cells and <b>{found.on(mask):.0%}</b> of the tokens. The token at "
        f"the star has {int(mine.sum())} cells, which lie in a box of {tall} × {wide}.{hint}"
    )


def tokens() -> Turn:
    """A cell to point at, the number of sub-regions, the first and the last rate, what guides, layer, image."""
    named = [(str(rate), rate) for rate in RATES]
    return turn(
        draw_tokens,
        cell=Pointer((64.0, 60.0), last=(SIDE - 1.0, SIDE - 1.0), step=4.0),
        n=choice(("as trained", 0), *[(str(n), n) for n in (1, 2, 4, 8)], name="sub-regions"),
        first=choice(*named, name="rate, least significant", value=64),
        last=choice(*named, name="rate, most significant", value=8),
        by=choice(("its map", "own"), ("another image's", "other"), ("one number", "constant"), name="guided by"),
        layer=choice(*layers("self_guided")),
        image=image_choice(),
    )


# --------------------------------------------------------------------------------------------------- 8: paint the map


def perplexity(attention: Float[Tensor, "h L G"]) -> float:
    """Over how many keys a plain mean would be spread as much: the mean of all queries and heads."""
    return float(torch.special.entr(attention).sum(-1).exp().mean())


class Painting:
    """The significance of a layer as the reader paints it: of every image and layer the strokes are kept."""

    def __init__(self):
        self.maps: dict[tuple[int, str], Float[Tensor, "H W"]] = {}
        self.last: tuple | None = None

    def stroke(self, brush: tuple[float, float], ink: str, width: int, layer: str, image: int) -> Float[Tensor, "H W"]:
        """The map after a stroke at the brush, where it has moved since the last one.

        ink: "high" and "low" put cells above and below all others, "found" brings back what the network found.
        """
        record = traced(image)[layer]
        S = self.maps.setdefault((image, layer), record.significance.clone())
        if self.last is not None and self.last[0] != brush and self.last[1:] == (layer, image):
            y, x = record.cells().reshape(*S.shape, 2).flip(-1).unbind(-1)
            near = torch.hypot((y - brush[0]) / record.stride[0], (x - brush[1]) / record.stride[1]) <= width / 2
            found = record.significance
            spread = float(found.max() - found.min())
            levels = {"high": found + 2 * spread, "low": found - 2 * spread, "found": found}  # their order stays
            S[near] = levels[ink][near]
        self.last = (brush, layer, image)
        return S

    def draw(self, brush: tuple[float, float], ink: str, width: int, layer: str, image: int) -> tuple[Figure, str]:
        """The painted map, the sub-regions that it makes, and where there are more tokens than before."""
        S, record = self.stroke(brush, ink, width, layer, image), traced(image)[layer]
        rates, shape = network().get_submodule(layer).rates, record.query_shape
        before, after = reallocate(record.significance, rates), reallocate(S, rates)
        figure, axes = panels(1, 1, 1, height=4.9)
        for ax in axes:
            ground(ax, picture(image))
        heat(axes[0], S, "paint here; dark: high rank")
        for line, colour in ((4.5, style.PAPER), (2.0, style.RED)):
            disc = dict(fill=False, edgecolor=colour, linewidth=line, zorder=6)
            axes[0].add_patch(Circle(brush[::-1], width / 2 * record.stride[0], **disc))
        draw_regions(axes[1], after, shape, "sub-regions; dark: most tokens")
        share = [(1 / torch.tensor(one.rates))[one.regions] for one in (before, after)]
        moved = (share[1] - share[0]).reshape(shape)
        most = max(float(moved.abs().max()), 1e-6)
        overlay(axes[2], moved.numpy(), cmap="PuOr_r", vmin=-most, vmax=most, alpha=np.where(moved == 0, 0.0, 0.75))
        axes[2].set_title("orange: finer than before; violet: coarser")
        mask = on_map(record, torch.from_numpy(picture(image).mask))
        with torch.no_grad(), guided_by(network(), {layer: S}):
            logits = network()(picture(image).x[None])[0]
        label = picture(image).label
        sure = [float(one.softmax(-1)[label]) for one in (traced(image).logits, logits)]
        painted = int((record.significance != S).sum())
        spread = perplexity(record.attention)
        return figure, (
            f"{painted} of {len(mask)} cells are painted. {int((before.regions != after.regions).sum())} are in "
            f"another sub-region than before. The object has {before.on(mask):.0%} of the tokens before and "
            f"<b>{after.on(mask):.0%}</b> now. The network gives the true class, {CLASSES[label]}, "
            f"{sure[0]:.1%} before and <b>{sure[1]:.1%}</b> now. A query of this layer reads {after.count} tokens, "
            f"much as a plain mean over {spread:.0f} of them would."
        )


def paint() -> Turn:
    """The brush to drag, what it does, its width in cells, the layer and the image."""
    shown = turn(
        Painting().draw,
        brush=Pointer((12.0, 16.0), last=(SIDE - 1.0, SIDE - 1.0), step=4.0),
        ink=choice(("raise", "high"), ("lower", "low"), ("bring back", "found")),
        width=slider(1, 33, 9, step=2, name="brush"),
        layer=choice(*layers("self_guided")),
        image=image_choice(),
    )
    shown.set(brush=(100.0, 28.0))  # a first stroke, to be seen
    return shown


# ------------------------------------------------------------------------------------------------------ 9: no gradient

WALK = np.linspace(0, 1, 481)  # the significance of one cell, from below all others to above


@cache
def walk(rates: tuple[int, ...]) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " others"]]:
    """An output of a layer on 4 x 4 cells while the significance of one cell grows; and that of the other cells."""
    _, guided = library_layers(8, 2, 4, rates)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 4, 8, generator=draw, dtype=torch.float64)
    S = torch.rand(1, 4, 4, generator=draw, dtype=torch.float64) * 0.9 + 0.05
    values = []
    with torch.no_grad():
        for share in WALK.tolist():
            S[0, 1, 2] = share
            values.append(float(guided(x, S)[0, 0, 0, 0]))
    others = np.delete(S.flatten().numpy(), 6)
    return np.array(values), np.sort(others)


def draw_gradient(share: float, rates: tuple[int, ...]) -> tuple[Figure, str]:
    """An output against the significance of one cell, and its slope."""
    values, others = walk(rates)
    at = int(round(share * (len(WALK) - 1)))
    jumps = np.flatnonzero(np.abs(np.diff(values)) > 1e-9)
    figure, (ax,) = panels(1, height=4.0)
    for start, stop in zip([0, *(jumps + 1)], [*(jumps + 1), len(WALK)], strict=True):
        ax.plot(WALK[start:stop], values[start:stop], color=style.ORANGE, linewidth=3)
    for other in others:
        ax.axvline(other, color=style.INK, linestyle=":", linewidth=1)
    ax.plot(WALK[at] + np.array([-0.05, 0.05]), [values[at]] * 2, color=style.BLUE, linewidth=2, zorder=4)
    ax.plot(WALK[at], values[at], "o", color=style.INK, zorder=5)
    room = 0.15 * float(np.ptp(values)) + 1e-3
    ax.set(xlim=(0, 1), ylim=(values.min() - room, values.max() + room), ylabel="output of the layer")
    ax.set(xlabel="significance of one cell; dotted: those of the other cells")
    ax.set_title("orange: an output; blue: its gradient, 0 wherever there is one")
    passed = int((others < WALK[at]).sum())
    return figure, (
        f"The cell has rank <b>{passed + 1}</b> of {len(others) + 1}. From the lowest to the highest rank the output "
        f"jumps {len(jumps)} times, by {np.abs(np.diff(values)).sum():.2g} in all, and does not move in between."
    )


def gradient() -> Turn:
    """The significance of one cell, and the rates."""
    named = [(", ".join(map(str, rates)), rates) for rates in ((4, 4, 2, 1), (8, 1), (4, 4), (1,))]
    return turn(draw_gradient, share=slider(0.0, 1.0, 0.4, step=0.01), rates=choice(*named))


# -------------------------------------------------------------------------------------------------- 10: ranks that flip

NOISE = tuple(10.0**power for power in range(-10, -1))  # added to the image


@dataclass(frozen=True)
class Disturbed:
    """What noise does: cells that have another rank, and another token, in every guided layer; changes of the logits.

    free: of the network as it is. given: of the network that is told the ranks without noise.
    """

    ranks: dict[str, int]
    tokens: dict[str, int]
    free: float
    given: float


@cache
def double_network() -> nn.Module:
    """The network in float64."""
    return deepcopy(network()).double()


def ranks_of(record: SelfGuidedRecord) -> Float[Tensor, "H W"]:
    """The rank of every cell of a guided layer: whole numbers, which guide in any precision as its significance did."""
    return record.order.argsort().reshape(record.query_shape).double()


@cache
def undisturbed(image: int) -> Trace:
    """The network in float64 on a test image."""
    return trace(double_network(), picture(image).x.double())


def compared(image: int, model: nn.Module, x: Float[Tensor, "3 H W"]) -> Disturbed:
    """What a network makes of a picture, beside what the network in float64 makes of it without noise."""
    still, now = undisturbed(image), trace(model, x)
    names = [record.name for record in still.of_kind("self_guided")]
    with torch.no_grad(), guided_by(model, {name: ranks_of(still[name]) for name in names}):
        given = model(x[None])[0]
    pairs = {name: (still[name], now[name]) for name in names}
    return Disturbed(
        ranks={name: int((ranks_of(a) != ranks_of(b)).sum()) for name, (a, b) in pairs.items()},
        tokens={name: int((a.tokens != b.tokens).sum()) for name, (a, b) in pairs.items()},
        free=float((now.logits - still.logits).abs().max()),
        given=float((given - still.logits).abs().max()),
    )


@cache
def disturbed(image: int, noise: float) -> Disturbed:
    """Of normal noise of that size, in float64."""
    x = picture(image).x.double()
    draw = torch.Generator().manual_seed(0)
    return compared(image, double_network(), x + noise * torch.randn(x.shape, generator=draw, dtype=torch.float64))


@cache
def rounded(image: int) -> Disturbed:
    """Of computing in float32."""
    return compared(image, network(), picture(image).x)


def draw_flips(power: int, image: int) -> tuple[Figure, str]:
    """Changes of the logits against noise, with ranks as they come and with ranks given; ranks that flip."""
    found, mine, single = [disturbed(image, noise) for noise in NOISE], disturbed(image, 10.0**power), rounded(image)
    figure, (ax, bars) = panels(1.4, 1, height=4.5)
    for which, colour, label in (("free", style.ORANGE, "ranks as they come"), ("given", style.BLUE, "ranks given")):
        ax.plot(NOISE, [getattr(one, which) for one in found], "o-", color=colour, label=label)
        eps = torch.finfo(torch.float32).eps
        ax.plot(eps, getattr(single, which), "D", color=colour, markersize=10, markeredgecolor=style.INK)
    ax.axvline(10.0**power, color=style.INK, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="noise on the image; diamonds: float32 instead", ylabel="largest change")
    ax.set_title("change of the logits")
    ax.legend(frameon=False)
    places, names = np.arange(len(mine.ranks)), [label for label, _ in layers("self_guided")]
    bars.bar(places - 0.2, list(mine.ranks.values()), 0.4, color=style.ORANGE, label="another rank")
    bars.bar(places + 0.2, list(mine.tokens.values()), 0.4, color=GREEN, label="another token")
    bars.set_xticks(places, names)
    bars.set(title=f"cells, by guided layer, noise 1e{power}", ylim=(0, max(*mine.ranks.values(), 4) * 1.25))
    bars.legend(frameon=False)
    return figure, (
        f"Noise of 1e{power} gives another rank to <b>{sum(mine.ranks.values())}</b> cells and another token to "
        f"{sum(mine.tokens.values())}. The logits move by {mine.free:.1e}; with the ranks given by "
        f"<b>{mine.given:.1e}</b>. In float32, {sum(single.ranks.values())} cells have another rank than in float64: "
        f"logits move by {single.free:.1e}, with the ranks given by {single.given:.1e}."
    )


def flips() -> Turn:
    """The noise and the image."""
    return turn(draw_flips, power=slider(-10, -2, -6, name="noise: 10 to the"), image=image_choice())


# ----------------------------------------------------------------------------------------------------------- 11: cost


def hybrid_multiply_adds(L: int, C: int, scales: Sequence[int], M: int) -> int:
    """Of a hybrid-scale layer on L cells: linear maps, the convolutions that merge, attention in windows."""
    c, total = C // len(scales), L * C * C  # the last linear map
    for s in scales:
        merging = L * C * C if s > 1 else 0
        total += L * C * c + merging + 2 * (L // s**2) * C * c + 2 * L * min(M * M, L // s**2) * c
    return total


def guided_multiply_adds(L: int, C: int, rates: Sequence[int]) -> tuple[int, int]:
    """Of a self-guided layer on L cells that aggregates first (SG-1); and how many tokens it reads."""
    sizes = self_guided.sub_regions(L, [1] * len(rates))
    G = sum(-(-size // rate) for size, rate in zip(sizes, rates, strict=True))
    read = sum(-(-size // rate) * rate for size, rate in zip(sizes, rates, strict=True))
    return 2 * (L + G) * C * C + read * C + 2 * L * G * C, G


def draw_cost(rates: tuple[int, ...], s: int, M: int, channels: int) -> tuple[Figure, str]:
    """Multiply-adds of both layers against the side of the map, beside windows and dense attention; and the tokens."""
    sides = np.array([16, 32, 48, 64, 96, 128, 192, 256])
    L, linear = sides**2, 4 * sides**2 * channels**2
    both = [guided_multiply_adds(int(one), channels, rates) for one in L]
    guided, count = (np.array(part) for part in zip(*both, strict=True))
    hybrid = np.array([hybrid_multiply_adds(int(one), channels, (s, 1), M) for one in L])
    dense = linear + 2 * L**2 * channels
    figure, (ax, left) = panels(1.2, 1)
    ax.plot(sides, dense / 1e9, "--", color=style.INK, label="dense attention")
    ax.plot(sides, (linear + 2 * M * M * L * channels) / 1e9, "--", color=style.BLUE, label=f"windows of {M} × {M}")
    ax.plot(sides, guided / 1e9, "o-", color=style.ORANGE, label="self-guided")
    ax.plot(sides, hybrid / 1e9, "o-", color=GREEN, label=f"hybrid-scale, {s} and 1")
    ax.set(xscale="log", yscale="log", xlabel="side of the map, cells", title="one layer, G multiply-adds")
    ax.legend(frameon=False)
    left.plot(sides, count, "o-", color=style.ORANGE, label="tokens of a self-guided layer")
    left.plot(sides, L, "--", color=style.INK, label="cells")
    left.set(xscale="log", yscale="log", xlabel="side of the map, cells", title="what a query reads")
    left.legend(frameon=False)
    for one in (ax, left):
        one.minorticks_off()
        one.set_xticks(sides, sides)
    growth = [one[-1] / one[3] for one in (guided, hybrid, dense)]
    return figure, (
        f"On 64 × 64 cells a query reads <b>{count[3]}</b> of {L[3]} tokens. From 64 × 64 to 256 × 256 the cells grow "
        f"{L[-1] // L[3]} times, a self-guided layer <b>{growth[0]:.0f}</b> times, a hybrid-scale layer "
        f"<b>{growth[1]:.0f}</b> times, dense attention {growth[2]:.0f} times."
    )


def cost() -> Turn:
    """The rates, the larger scale, the window, and the channels."""
    sets = ((196, 56, 56, 28), (64, 16, 16, 8), (16, 4, 4, 2), (2, 1), (1,))
    return turn(
        draw_cost,
        rates=choice(*[(", ".join(map(str, rates)), rates) for rates in sets]),
        s=choice(2, 4, 8, value=8),
        M=choice(4, 7, 8, 16, value=7),
        channels=choice(64, 128, 256, value=64),
    )


# -------------------------------------------------------------------------------------------------------- 12: verdict


def seeds() -> list[str]:
    """The trained networks that are here, one a seed."""
    return [one for one in weights.available() if one == NAME or one.startswith(f"{NAME}_seed")]


def measured(model: nn.Module, images: UInt8[np.ndarray, "n 3 H W"], masks: Bool[np.ndarray, "n H W"]) -> pd.DataFrame:
    """By layer, means over images: `own`, `other`, AUC of significance against the object's mask and those of other
    images; of the layer that it guides `tokens`, `elsewhere`, the share of tokens on the object and on the masks of
    other images, `together`, `any`, how far two cells of a token and any two are apart; `area`, the share of the image.
    """
    found = summary(evaluate_significance(model, images, masks)).reset_index("head", drop=True)
    of_kind = lambda kind: found.xs(kind, level="kind")  # noqa: E731
    auc, tokens = of_kind("auc"), of_kind("tokens")
    columns = dict(own=auc.value, other=auc.other, tokens=tokens.value, elsewhere=tokens.other)
    columns |= dict(together=of_kind("together").value, any=of_kind("any").value)
    columns = {name: column.to_numpy() for name, column in columns.items()}
    area = of_kind("area").value.to_numpy()[0]
    return pd.DataFrame(columns | dict(area=area, guided=tokens.index, layer=range(1, len(auc) + 1)))


@cache
def verdict() -> pd.DataFrame:
    """Does significance find the object? Every seed, and random weights, by layer."""
    items = [Shapes("easy", "test", SIDE)[i] for i in range(MEASURED)]
    images, masks = (np.stack([item[part].numpy() for item in items]) for part in (0, 2))
    subjects = [load_subject(path(one)) for one in seeds()]
    networks = {f"seed {subject.story['seed']}": subject.model for subject in subjects}
    networks |= {f"random {seed}": random_twin(subjects[0], seed, images) for seed in range(len(subjects))}
    found = [measured(model, images, masks).assign(network=name) for name, model in networks.items()]
    told = [subject.story["accuracy"] for subject in subjects] + [np.nan] * len(subjects)
    return pd.concat([one.assign(accuracy=right) for one, right in zip(found, told, strict=True)], ignore_index=True)


def draw_verdict(found: pd.DataFrame) -> None:
    """Every network a mark in every layer: on the object's mask, on another image's, and with random weights."""
    figure, (ax,) = panels(1, height=4.2, width=9)
    trained = ~found.network.str.startswith("random")
    kinds = [
        ("trained, the object's mask", found[trained], "own", dict(marker="o", color=style.ORANGE)),
        ("trained, another image's mask", found[trained], "other", dict(marker="s", color=style.BLUE)),
        ("random weights, the object's mask", found[~trained], "own", dict(marker="X", color=style.GREY)),
    ]
    for n, (label, rows, column, look) in enumerate(kinds):
        ax.scatter(rows.layer + 0.15 * (n - 1), rows[column], s=80, label=label, edgecolors=style.INK, **look)
    ax.axhline(0.5, color=style.INK, linewidth=1)
    ax.set(title="AUC of significance; line: chance", xlabel="hybrid-scale layer", ylim=(0.2, 1))
    ax.set_xticks(sorted(found.layer.unique()))
    ax.legend(framealpha=0.85, edgecolor="none", loc="lower right")
    show(figure)


def in_words(found: pd.DataFrame) -> str:
    """What `verdict` measured, and what follows."""
    trained, at_random = (found[found.network.str.startswith("random") == there] for there in (False, True))
    lines, sure, turned = [], [], []
    for layer, rows in trained.groupby("layer"):
        nulls = at_random[at_random.layer == layer]
        sure.append(bool(((rows.own >= rows.other + BEYOND) & (rows.own > nulls.own.max())).all()))
        below = rows[(rows.own <= rows.other - BEYOND) & (rows.own < nulls.own.min())]
        turned += [f"in layer {layer} of {row.network} it is {row.own:.2f}" for row in below.itertuples()]
        own, chance = (" / ".join(f"{one:.2f}" for one in part.own) for part in (rows, nulls))
        tokens, by_chance = (" / ".join(f"{one:.0%}" for one in part.tokens) for part in (rows, nulls))
        lines.append(f"| {layer} | {own} | {rows.other.mean():.2f} | {chance} | {tokens} | {by_chance} |")
    seeds = trained.groupby("network")
    rising = sum(rows.own.is_monotonic_increasing for _, rows in seeds)
    accuracy = " / ".join(f"{rows.accuracy.iloc[0]:.1%}" for _, rows in seeds)
    finds = f"In {sum(sure)} of {len(sure)} layers significance **finds** the object in every network"
    if not any(sure):
        finds = "In no layer does significance **clearly find** the object in every network"
    upside_down = f" But {', and '.join(turned)}: **the other way round**, lower than all nulls." if turned else ""
    return "\n".join(
        [
            "| hybrid-scale layer | AUC, by seed | AUC, other images' masks | AUC, random weights | tokens of the next "
            "layer on the object, by seed | ... random weights |",
            "| --- " * 6 + "|",
            *lines,
            "",
            f"{MEASURED} test images, means over images. The object has {trained.area.mean():.0%} of the image. Random "
            f"weights are not all at chance: they have {at_random.own.min():.2f} to {at_random.own.max():.2f}. What "
            f"they attend to depends on the tokens too, and the object's tokens differ from the background's.",
            "",
            f"**Verdict.** {finds}, with a higher AUC than random weights give, and {BEYOND} more than other masks."
            f"{upside_down} It rises with depth in {rising} of {len(seeds)} networks. "
            f"Right classes, of all test images: {accuracy}.",
        ]
    )


@cache
def need() -> pd.DataFrame:
    """Does a network need its self-guided layers? Of every seed and change of all of them at once: `accuracy`, and the
    difference, `more`, from that of the network as it is, with its standard error, `error`: over images.
    """
    items = [Shapes("easy", "test", SIDE)[i] for i in range(COUNTED)]
    images, labels = np.stack([item[0].numpy() for item in items]), np.array([int(item[1]) for item in items])
    changes = {
        "as it is": guiding(lambda name, S: S),
        "one number in the place of S": guiding(lambda name, S: torch.ones_like(S)),
        "zeros in the place of their output": silent,
    }
    rows = []
    for subject in map(load_subject, map(path, seeds())):
        answers = {}
        for what, change in changes.items():
            with torch.no_grad(), changed(subject.model, change):
                right = [logits.argmax(1) == truth for logits, truth in batches(subject.model, images, labels, 25)]
            answers[what] = torch.cat(right).double()
            more = answers[what] - answers["as it is"]
            numbers = dict(accuracy=float(answers[what].mean()), more=float(more.mean()))
            error = float(more.std()) / len(more) ** 0.5
            rows.append(dict(network=f"seed {subject.story['seed']}", layers=what, **numbers, error=error))
    return pd.DataFrame(rows)


def need_in_words(found: pd.DataFrame) -> str:
    """What `need` measured, and in how many networks each change costs accuracy, beyond two standard errors."""
    names = list(found.network.unique())
    lines = ["| self-guided layers: right classes | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    said = []
    for what, rows in found.groupby("layers", sort=False):
        plain = what == "as it is"
        cells = [
            f"{row.accuracy:.1%}" + ("" if plain else f" ({100 * row.more:+.1f} ± {100 * row.error:.1f})")
            for row in rows.itertuples()
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
        if not plain:
            worse, better = int((rows.more < -2 * rows.error).sum()), int((rows.more > 2 * rows.error).sum())
            said.append(f"with {what}, {worse} of {len(rows)} networks are worse and {better} better")
    lines += [
        "",
        f"{COUNTED} test images; in brackets: points more, ± a standard error. By more than two such errors:",
    ]
    return "\n".join(lines) + f" {'; '.join(said)}."


def library_layers(
    dim: int, heads: int, window: int, rates: Sequence[int]
) -> tuple[HybridScaleAttention, SelfGuidedAttention]:
    """Sections 3 and 6: the library's layers as the text has them, with random weights, in float64."""
    torch.manual_seed(0)
    options = dict(window=window, global_scale=False, reading="sum", merge_norm=False, lepe=False)
    hybrid = HybridScaleAttention(dim, heads, (2, 1), **options)
    guided = SelfGuidedAttention(dim, heads, tuple(rates), shared=False, lepe=False)
    return tuple(layer.double().eval().requires_grad_(False) for layer in (hybrid, guided))
