"""The pictures of the tour: seven mechanisms in one small network, and four trained networks side by side."""

from functools import cache, partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import dynattn
from dynattn import cost, weights
from dynattn.data import Shapes
from dynattn.figures import style
from dynattn.figures.dat import draw_query, queries
from dynattn.figures.measures import attention_share, others
from dynattn.figures.subjects import Picture, test_picture
from dynattn.lessons.controls import Pointer, Turn, choice, turn
from dynattn.lessons.notebook import HEAT, show
from dynattn.tracing import Record, Trace, trace
from dynattn.widgets import Lens

SCENE, SIDE = 22, 64  # a test image; the side at which the seven mechanisms see it
LAYER = dict(img_size=SIDE, depths=(1,), dims=(32,), heads=(2,), groups=(1,), kernels=(5,), offset_zero_init=False)
MECHANISMS = {
    "dense": dict(blocks=[["window"]], window=16),  # one window as large as the map
    "window": dict(blocks=[["window"]], window=8),
    "shifted window": dict(blocks=[["shifted"]], window=8),
    "spatial reduction": dict(blocks=[["sra"]], sra_ratios=(4,)),
    "deformable": dict(blocks=[["deformable"]], strides=(4,)),
    "Deformable-DETR": dict(blocks=[["deformable_detr"]], detr_points=(8,)),
}
KINDS = {"vit_mini": "dense", "swin_mini": "window", "dat_mini": "deformable", "dgt_mini": "dynamic_group"}
CHOOSE, MEASURED = 8, 16  # test images that choose the layers, and others on which they are measured


# ----------------------------------------------------------------------------------------------- seven mechanisms


@cache
def records() -> dict[str, Record]:
    """One attention layer of each kind, with random weights, on one image."""
    scene, found = Shapes("easy", "test", SIDE)[SCENE][0], {}
    with torch.random.fork_rng(devices=[]):
        for name, options in MECHANISMS.items():
            torch.manual_seed(1)
            network = dynattn.create_model("dat_mini", **LAYER | options)
            with torch.no_grad():  # random weights hardly prefer one key to another: exaggerate
                for part in network.stages[0].blocks[0].attn.children():
                    part.weight.mul_(4) if isinstance(part, nn.Linear) else None
            (found[name],) = trace(network, scene)
        torch.manual_seed(1)
        small = dict(img_size=SIDE, depths=(1, 1), dims=(32, 64), heads=(2, 4), groups=6, keys=32)
        network = dynattn.create_model("dgt_mini", **small)
        found["dynamic groups"] = trace(network, scene).of_kind("dynamic_group")[0]
    return found


def draw_mechanism(mechanism: str, query: tuple[float, float]) -> tuple[Figure, str]:
    """What a query, a pixel (row, col), reads in one mechanism, and the layer as one matrix."""
    record = records()[mechanism]
    keys, matrix = record.keys(*query), record.effective_matrix().sqrt()
    figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor=style.PAPER)
    photo, square = figure.subplots(1, 2)
    style.photograph(photo, test_picture(SCENE, (SIDE, SIDE)).shown, (SIDE, SIDE))
    photo.scatter(*keys.xy.numpy().T, s=(900 * keys.weight / keys.weight.sum() + 8).numpy(), color=style.ORANGE)
    style.star(photo, *record.cells()[record.query(*query)].tolist())
    photo.set_title(f"{mechanism}: what the query at the star reads")
    square.imshow(matrix.numpy(), cmap=HEAT, vmin=0, vmax=float(matrix.max()), interpolation="nearest")
    square.axhline(record.query(*query), color=style.RED, linewidth=1.5)
    square.set(title=r"$A_\mathrm{eff}$; red: the row of this query", xlabel="tokens", ylabel="queries")
    square.set(xticks=[], yticks=[])
    said = "exactly" if record.exact else f"but for {record.rest(0):.0%} of it"
    return figure, f"{len(keys.weight)} keys. A_eff V is the output of the head, {said}."


def mechanisms() -> Turn:
    """The mechanism to choose, the query to point at."""
    names = [*MECHANISMS, "dynamic groups"]
    return turn(
        draw_mechanism,
        mechanism=choice(*names, value="deformable"),
        query=Pointer((40.0, 34.0), last=(SIDE - 1.0, SIDE - 1.0), step=4.0),
    )


# ------------------------------------------------------------------------------------------------- trained networks


@cache
def models() -> dict[str, nn.Module]:
    """Four networks that ship trained, by one recipe."""
    return {name: dynattn.create_model(name, pretrained=True) for name in KINDS}


@cache
def picture(index: int) -> Picture:
    """A test image as the models see it, and sharper, to be shown."""
    return test_picture(index, (128, 128))


@cache
def traces(name: str) -> list[Trace]:
    """A network on the test images."""
    return [trace(models()[name], picture(index).x) for index in range(CHOOSE + MEASURED)]


def _share(name: str, layer: str, some: range, *, other: bool = False) -> float:
    """Attention of a layer on the object, or on another image's: the mean over some test images."""
    masks = torch.stack([torch.from_numpy(picture(i).mask[::4, ::4].copy()) for i in range(CHOOSE + MEASURED)])
    under = [others(masks, i) if other else masks[i].float() for i in some]
    shares = [attention_share(traces(name)[i][layer], mask) for i, mask in zip(some, under, strict=True)]
    return float(np.mean(shares))


@cache
def shown_layer(name: str) -> str:
    """The layer on the 16 x 16 map with most attention on the object, over that on another image's."""
    layers = [one.name for one in traces(name)[0].of_kind(KINDS[name]) if one.query_shape == (16, 16)]
    some = range(CHOOSE)
    return max(layers, key=lambda layer: _share(name, layer, some) / _share(name, layer, some, other=True))


def compare() -> list[tuple]:
    """Draw two queries in one layer of each network; return a table of what they cost and what they read."""
    on, off = queries(picture(SCENE))
    figure = Figure(figsize=(12.5, 6.7), layout="constrained", facecolor=style.PAPER)
    for column, name in zip(figure.subplots(2, 4).T, KINDS, strict=True):
        record = traces(name)[SCENE][shown_layer(name)]
        column[0].set_title(f"{name}\n{KINDS[name].replace('_', ' ')}")
        for ax, place in zip(column, (on, off), strict=True):
            style.photograph(ax, picture(SCENE).shown, (128, 128))
            style.outline(ax, picture(SCENE).mask, (128, 128))
            draw_query(ax, record, *place)
    show(figure)
    rows, some = [], range(CHOOSE, CHOOSE + MEASURED)
    for name, model in models().items():
        layer, counted = shown_layer(name), partial(_share, name, shown_layer(name), some)
        wide = dynattn.create_model(name, img_size=512).to("meta")
        rows.append(
            (
                f"`{name}`",
                f"{weights.read(weights.path(name))[1]['accuracy']:.1%}",
                f"{cost.count(model, 128).macs / 1e9:.2f} G",
                f"{cost.count(wide, 512).macs / 1e9:.1f} G",
                len(traces(name)[SCENE][layer].keys(*on).weight),
                f"{counted():.0%}",
                f"{counted(other=True):.0%}",
            )
        )
    return rows


def lens() -> Lens:
    """The four networks, live, at a query in the background."""
    names = [shown_layer(name) for name in KINDS]
    record = traces("dat_mini")[SCENE][names[list(KINDS).index("dat_mini")]]
    x, y = record.cells()[record.query(*queries(picture(SCENE))[1])].tolist()  # the middle of the query's cell
    return Lens(models(), picture(SCENE).shown, row=y, col=x, layer=names)
