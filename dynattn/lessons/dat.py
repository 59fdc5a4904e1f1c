"""The pictures of the lesson on DAT. Each function draws one; its arguments are what the reader turns."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import dynattn
from dynattn import core
from dynattn.data import Shapes
from dynattn.figures import style
from dynattn.figures.drawing import ground
from dynattn.figures.measures import image_share, points_share
from dynattn.figures.subjects import Picture, load_subject, random_twin, test_picture
from dynattn.lessons.controls import Pointer, Turn, choice, slider, turn
from dynattn.lessons.notebook import beside_others, numbered, panels, show
from dynattn.mechanisms import deformable
from dynattn.mechanisms.deformable import multiply_adds, relative_bias
from dynattn.tracing import Trace, trace
from dynattn.widgets import Lens

IMAGES = (27, 22, 9, 1)  # test images, chosen for their places and backgrounds, not by what a model makes of them
QUERY = (108.0, 60.0)  # a pixel (row, col) in the background of the first
MEASURED = 24  # test images that the verdict is measured on
SIDE = 128  # of the images, in pixels


# ------------------------------------------------------------------------------------------------ models and images


@cache
def network() -> nn.Module:
    """`dat_mini`, trained."""
    return dynattn.create_model("dat_mini", pretrained=True)


@cache
def picture(index: int) -> Picture:
    """A test image as the models see it, and sharper, to be shown."""
    return test_picture(index, (SIDE, SIDE))


@cache
def traced(index: int) -> Trace:
    """`dat_mini` on a test image."""
    return trace(network(), picture(index).x)


def layers() -> list[tuple[str, str]]:
    """The deformable layers of `dat_mini`: in words, and by name."""
    return numbered(traced(IMAGES[0]).of_kind("deformable"))


# ------------------------------------------------------------------------------------------------------ 1: the question


def question() -> Lens:
    """One query in the background: what it reads in a dense, a window and a deformable layer.

    The deformable layer is one whose points depend on the image: `verdict` measures it.
    """
    return beside_others("dat_mini", layers()[2][1], IMAGES[0], QUERY)


# ------------------------------------------------------------------------------------------------------ 2: sampling

MAP = torch.tensor([[1, 2, 2, 1, 0], [2, 6, 7, 2, 1], [1, 7, 9, 6, 1], [0, 2, 5, 3, 1], [0, 1, 1, 1, 0]]).double()


def draw_sampling(point: tuple[float, float]) -> tuple[Figure, str]:
    """A map of numbers read at a point (row, col) between its cells."""
    row, col = point
    H, W = MAP.shape
    weight = core.bilinear_weights(torch.tensor([[row, col]]).double() * 2 / (H - 1) - 1, (H, W))[0].reshape(H, W)
    figure, (cells, hats) = panels(1, 1.2)
    cells.imshow(MAP, cmap="Greys", vmin=0, vmax=16)
    for i in range(H):
        for j in range(W):
            near = bool(weight[i, j] > 0)
            cells.text(
                j,
                i - 0.1 * near,
                f"{MAP[i, j]:g}",
                ha="center",
                va="center",
                fontsize=15,
                weight="bold" if near else "normal",
            )
            if near:
                cells.text(j, i + 0.27, f"× {weight[i, j]:.2f}", ha="center", color=style.RUST, fontsize=11)
    cells.plot(col, row, "X", markersize=15, color=style.ORANGE, markeredgecolor=style.INK)
    cells.set(
        title="the map z, and the point", xlabel="column", ylabel="row", xlim=(-1.3, W + 0.3), ylim=(H + 0.3, -1.3)
    )
    a = np.linspace(-1, W, 401)
    for j, colour in zip(range(W), style.GROUPS, strict=False):
        hats.plot(a, np.maximum(0, 1 - np.abs(a - j)), color=colour, linewidth=2)
        share = max(0.0, 1 - abs(col - j))
        hats.plot([col], [share], "o", color=colour, markersize=10, markeredgecolor=style.INK) if share else None
    hats.axvline(col, color=style.INK, linestyle="--", linewidth=1)
    hats.set(title="one hat g for each column; dashed: the point", xlabel="column", xlim=(-1.3, W + 0.3), ylim=(0, 1.1))
    terms = [f"{float(weight[i, j]):.2f} · {MAP[i, j]:g}" for i, j in weight.nonzero().tolist()]
    value = float((weight * MAP).sum())
    return figure, f"φ(z; ({row:.1f}, {col:.1f})) = {' + '.join(terms) or '0'} = <b>{value:.2f}</b>"


def sampling() -> Turn:
    """A point to drag between the cells of a map."""
    point = Pointer((1.3, 2.6), first=(-1.2, -1.2), last=(5.2, 5.2), step=0.1)
    return turn(draw_sampling, point=point)


# ------------------------------------------------------------------------------------------------------- 3: offsets


@cache
def layer_inputs(index: int) -> dict[str, Tensor]:
    """What each deformable layer of `dat_mini` gets for a test image: (1, H, W, C)."""
    found, handles = {}, []
    for name, module in network().named_modules():
        if name in dict(map(reversed, layers())):
            keep = lambda module, inputs, name=name: found.update({name: inputs[0]})  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        network()(picture(index).x[None])
    for handle in handles:
        handle.remove()
    return found


def draw_offsets(layer: str, image: int, s: float, r: int) -> tuple[Figure, str]:
    """The points of a trained layer on an image, if its offset range were s and its stride r."""
    module, x = deepcopy(network().get_submodule(layer)), layer_inputs(image)[layer]
    module.offset_range, module.stride = s, r
    module.offset.depthwise.stride = (r, r)
    shape = tuple(x.shape[1:3])
    with torch.no_grad():
        _, points, references = module.sample(x, module.q(x))
    on_image = lambda p: ((core.to_pixels(p, shape) + 0.5) * SIDE / shape[0] - 0.5).flip(-1)  # noqa: E731
    start, ends = on_image(references), [on_image(points[0, g]) for g in range(module.groups)]
    figure, axes = panels(1, 1, height=5.4)
    for ax, end, colour in zip(axes, ends, style.GROUPS, strict=False):
        ground(ax, picture(image))
        style.rings(ax, start.numpy(), size=22)
        style.lines(ax, start.numpy(), end.numpy(), colour)
        style.dots(ax, end.numpy(), np.full(len(end), 0.0012), colour)
        ax.set_title(f"offset group {style.GROUPS.index(colour) + 1}: {len(end)} points")
    far = s / len(set(references[:, 0].tolist())) * (shape[0] - 1) / 2
    moved = float(torch.cat([(end - start).norm(dim=1) for end in ends]).mean())
    return figure, (
        f"A point can move {far:.1f} cells of the map in each direction, which is s / H_G. Mean move on this image: "
        f"{moved:.1f} pixels. {len(start)} points in each group, {shape[0] * shape[1]} cells. The layer was trained "
        f"with s = {network().get_submodule(layer).offset_range:g} and r = {network().get_submodule(layer).stride}; it "
        f"is not trained again when you turn them."
    )


def offsets() -> Turn:
    """The layer, the image, the offset range and the stride to turn."""
    chosen = layers()[-2][1]
    trained = network().get_submodule(chosen)
    return turn(
        draw_offsets,
        layer=choice(*layers(), value=chosen),
        image=choice(*[(picture(i).name.split("(")[1].rstrip(")"), i) for i in IMAGES], value=IMAGES[1]),
        s=slider(0.0, 8.0, float(trained.offset_range), 0.5),
        r=choice(1, 2, 4, value=trained.stride),
    )


# ----------------------------------------------------------------------------------------------------- 4: attention


def draw_attention(query: tuple[float, float], head: int, layer: str) -> tuple[Figure, str]:
    """What a query (row, col), a pixel, reads in one head, and the two parts of its logits."""
    record = traced(IMAGES[0])[layer]
    module, at = network().get_submodule(layer), record.query(*query)
    head = min(head, record.heads - 1)
    group = record.group(head)
    table = module.table_for(record.query_shape, torch.float32).detach()
    bias = relative_bias(record.points[None], table, record.query_shape, module.reference)[0, head, at]
    content = record.q[head, at] @ record.k[head].T * record.q.shape[-1] ** -0.5
    figure, (photo, entries, parts) = panels(1.15, 1, 1)
    ground(photo, picture(IMAGES[0]))
    keys = record.keys(*query, head)
    style.dots(photo, keys.xy.numpy(), 0.12 * keys.weight.numpy(), style.GROUPS[group])
    style.star(photo, *record.cells()[at].tolist())
    photo.set_title(f"what the query reads, head {head}")

    queries = core.grid_points(record.query_shape, module.reference, table)
    read = core.to_pixels((queries[at] - record.points[group]) / 2, table.shape[1:])
    limit = float(table[head].abs().max())
    entries.imshow(table[head], cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
    entries.scatter(*read.T.flip(0), s=26, facecolors="none", edgecolors=style.INK)
    entries.set(
        title=r"the table $\hat{B}$; circles: where it is read",
        xlabel="← query left of the point",
        ylabel="← query above",
    )
    entries.set(xticks=[], yticks=[])

    parts.scatter(content, bias, s=10 + 900 * keys.weight.numpy(), color=style.GROUPS[group], edgecolors=style.INK)
    parts.set(title="one dot a point; area: attention", xlabel="q · k / √d", ylabel="φ(B^; R)")
    best = int(keys.weight.argmax())
    return figure, (
        f"{len(keys.weight)} points; the heaviest gets {float(keys.weight[best]):.0%}: "
        f"q · k / √d = {float(content[best]):.2f} and φ(B^; R) = {float(bias[best]):.2f}. The logits of the points "
        f"spread by {float(content.std()):.2f} through q · k and by {float(bias.std()):.2f} through the bias."
    )


def attention() -> Turn:
    """The query to point at, the head and the layer to choose."""
    return turn(
        draw_attention,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=8.0),
        head=slider(0, max(record.heads for record in traced(IMAGES[0]).of_kind("deformable")) - 1, 0),
        layer=choice(*layers()),
    )


# ----------------------------------------------------------------------------------------------------------- 5: cost


def draw_cost(channels: int, kernel: int) -> tuple[Figure, str]:
    """DAT-10 against the side of the map, for strides 1, 2 and 4, beside windows and dense attention."""
    sides = np.array([7, 14, 28, 56, 112])
    figure, (ax, share) = panels(1.5, 1)
    HW, C = sides**2, channels
    ax.plot(sides, (4 * HW * C**2 + 2 * HW**2 * C) / 1e9, "--", color=style.INK, label="dense")
    ax.plot(sides, (4 * HW * C**2 + 2 * 49 * HW * C) / 1e9, "--", color=style.BLUE, label="windows of 7 × 7")
    for r, colour in zip((1, 2, 4), (style.ORANGE, style.GREEN, style.PURPLE), strict=True):
        cost = [multiply_adds((side, side), (side // r) ** 2, C, kernel) for side in sides.tolist()]
        ax.plot(sides, [sum(both) / 1e9 for both in cost], "o-", color=colour, label=f"deformable, r = {r}")
        share.plot(sides, [100 * network / (attention + network) for attention, network in cost], "o-", color=colour)
    ax.set(xscale="log", yscale="log", title="G multiply-adds of one layer", xlabel="side of the map, cells")
    share.set(xscale="log", title="of it the offset network, %", xlabel="side of the map, cells", ylim=(0, None))
    ax.legend(frameon=False)
    for one in (ax, share):
        one.minorticks_off()
        one.set_xticks(sides, sides)
    attention, network = multiply_adds((56, 56), 56**2, C, kernel)
    windows = 4 * 56**2 * C**2 + 2 * 49 * 56**2 * C
    return figure, (
        f"On a map of 56 × 56 with r = 1, deformable attention costs {(attention + network) / windows:.1f} times what "
        f"windows cost. At r = 4 it is {sum(multiply_adds((56, 56), 14**2, C, kernel)) / windows:.2f} times."
    )


def cost() -> Turn:
    """The channels and the kernel of the offset network to turn."""
    return turn(draw_cost, channels=choice(96, 192, 384, 768, value=384), kernel=choice(3, 5, 9, value=5))


# -------------------------------------------------------------------------------------------------------- 6: verdict


def moved_by_image(model: nn.Module, images: Sequence[int]) -> dict[str, dict[str, float]]:
    """By deformable layer: how much of its offsets depends on the image, and its points on the object."""
    traces = [trace(model, picture(index).x) for index in images]
    masks = [torch.from_numpy(picture(index).mask[::4, ::4].copy()).float() for index in images]
    found = {}
    for name in (record.name for record in traces[0].of_kind("deformable")):
        records = [t[name] for t in traces]
        share, shift = image_share(torch.stack([one.points - one.references for one in records]))
        own = [points_share(one, mask) for one, mask in zip(records, masks, strict=True)]
        other = [points_share(one, mask) for one, mask in zip(records, masks[1:] + masks[:1], strict=True)]
        found[name] = dict(image=share, shift=shift, points=float(np.mean(own)), points_other=float(np.mean(other)))
    return found


def verdict() -> dict[str, dict[str, dict[str, float]]]:
    """Does the image move the points? Measured for the trained network and for random weights, drawn, and returned."""
    subject, images = load_subject(name="dat_mini"), range(MEASURED)
    shown = np.stack([Shapes("easy", "test", SIDE)[index][0].numpy() for index in images])
    networks = {"trained": subject.model, "random weights": random_twin(subject, 0, shown, offset_zero_init=False)}
    found = {name: moved_by_image(model, images) for name, model in networks.items()}
    figure, (image, points) = panels(1, 1, height=3.9)
    place = np.arange(len(layers()))
    for (name, rows), colour, shift in zip(found.items(), (style.ORANGE, style.GREY), (-0.2, 0.2), strict=True):
        image.bar(place + shift, [100 * one["image"] for one in rows.values()], 0.38, color=colour, label=name)
    own, other = ([100 * one[key] for one in found["trained"].values()] for key in ("points", "points_other"))
    points.bar(place - 0.2, own, 0.38, color=style.ORANGE, label="the image's own mask")
    points.bar(place + 0.2, other, 0.38, color=style.BLUE, label="another image's mask")
    for ax, title in ((image, "offsets that depend on the image, %"), (points, "trained: points on the object, %")):
        ax.set_xticks(place, [words for words, _ in layers()])
        ax.set_title(title)
        ax.legend(frameon=False)
    image.set_ylim(0, 100)
    show(figure)
    return found


def in_words(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """What `verdict` measured, and what follows."""
    rows = list(zip(layers(), found["trained"].values(), found["random weights"].values(), strict=True))
    lines = [
        f"| {words} | {own['image']:.0%} | {random['image']:.0%} | {own['shift']:.0%} | {own['points']:.1%} | "
        f"{own['points_other']:.1%} |"
        for (words, _), own, random in rows
    ]
    moved, least = (pick(rows, key=lambda row: row[1]["image"]) for pick in (max, min))
    better = sum(own["points"] > 1.2 * own["points_other"] for _, own, _ in rows)
    return "\n".join(
        [
            "| layer | offsets that depend on the image | random weights | one shift for all points "
            "| points on the object | another image's mask |",
            "| --- " * 6 + "|",
            *lines,
            "",
            f"{MEASURED} test images. **Verdict.** The image moves the points most in layer {moved[0][0]} "
            f"({moved[1]['image']:.0%}) and least in layer {least[0][0]} ({least[1]['image']:.0%}). There the points "
            f"are a grid that moves by nearly the same step for every image. In {better} of {len(rows)} layers the "
            f"points lie on the object at least 1.2 times as often as on another image's.",
        ]
    )


def library_layer(dim: int, heads: int, **options) -> nn.Module:
    """The library's layer with one offset group for a map of 6 x 8, with random weights, in float64."""
    torch.manual_seed(0)
    return deformable.DeformableAttention(dim, heads, 1, (6, 8), **options).double().requires_grad_(False)
