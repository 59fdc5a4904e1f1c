"""The pictures of the lesson on DGT. Each function draws one; its arguments are what the reader turns."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from torch import Tensor, nn

import dynattn
from dynattn.data import Shapes
from dynattn.figures import style
from dynattn.figures.drawing import ground
from dynattn.figures.measures import evaluate_groups
from dynattn.figures.subjects import Picture, load_subject, random_twin, test_picture
from dynattn.figures.tables import summary
from dynattn.lessons.controls import Pointer, Turn, choice, slider, turn
from dynattn.lessons.notebook import beside_others, numbered, panels, show
from dynattn.mechanisms import dynamic_group
from dynattn.mechanisms.dynamic_group import DynamicGroupAttention, DynamicGroupRecord, multiply_adds
from dynattn.tracing import Trace, trace
from dynattn.weights import path
from dynattn.widgets import Lens

IMAGES = (27, 22, 9, 1)  # test images, chosen for their places and backgrounds, not by what a model makes of them
QUERY = (108.0, 60.0)  # a pixel (row, col) in the background of the first
MEASURED, CHOICE = 24, 1  # test images that the verdict takes; the first is set apart to choose heads, of no use here
SEEDS = 3  # trained networks, and random ones, of the verdict
SIDE = 128  # of the images, in pixels
MOST = 8  # groups of the pictures, as many as colours
MEASURES = ("nmi", "keys", "keys_off")  # of a head, as `evaluate_groups` has them
REACH = 1.45  # of the plane that arrows are drawn in


# ------------------------------------------------------------------------------------------------ models and images


@cache
def network() -> nn.Module:
    """`dgt_mini`, trained."""
    return dynattn.create_model("dgt_mini", pretrained=True)


@cache
def picture(index: int) -> Picture:
    """A test image as the models see it, and sharper, to be shown."""
    found = test_picture(index, (SIDE, SIDE))
    return replace(found, shown=found.shown[::2, ::2], mask=found.mask[::2, ::2])  # small, to be drawn fast


@cache
def traced(index: int) -> Trace:
    """`dgt_mini` on a test image."""
    return trace(network(), picture(index).x)


def layers() -> list[tuple[str, str]]:
    """The layers of `dgt_mini` that group: in words, and by name."""
    return numbered(traced(IMAGES[0]).of_kind("dynamic_group"))


# ------------------------------------------------------------------------------------------------------ 1: the question


def question() -> Lens:
    """One query in the background: what it reads in a dense, a window and a dynamic group layer."""
    return beside_others("dgt_mini", layers()[0][1], IMAGES[0], QUERY)


# --------------------------------------------------------------------------------------------------------- the plane


def arrows(seed: int, count: int, towards: Sequence[float], spread: float = 0.35) -> Float[Tensor, "count 2"]:
    """Vectors in heaps around some angles, of different lengths: queries or keys of a head with two channels."""
    draw = np.random.default_rng(seed)
    angle = np.resize(np.array(towards), count) + spread * draw.standard_normal(count)
    return torch.from_numpy((draw.uniform(0.35, 1.2, count) * np.array([np.sin(angle), np.cos(angle)])).T.copy())


QUERIES = arrows(1, 36, (-1.9, 0.1, 1.7))
KEYS = arrows(2, 36, (-2.6, -0.9, 0.9, 2.4), spread=0.5)


def unit(place: tuple[float, float]) -> Float[Tensor, "2"]:
    """The unit vector towards a place; the middle of the plane has no direction and counts as right."""
    found = torch.tensor(place).double()
    return F.normalize(found, dim=0) if found.norm() > 1e-9 else torch.tensor([0.0, 1.0]).double()


def centroids_around(e: Float[Tensor, "2"], G: int) -> Float[Tensor, "G 2"]:
    """Unit vectors: one that is given, and others that stay where they are when it moves."""
    angle = torch.tensor([0.0, -1.5, 1.9, 2.9, -2.4, 1.0, -0.7, 0.4])[1:G].double()
    return torch.cat([e[None], torch.stack([angle.sin(), angle.cos()], dim=1)])


def plane(ax: Axes, title: str) -> None:
    """Axes for vectors of two channels, the first downwards like a row, the second to the right like a column."""
    ax.set(xlim=(-REACH, REACH), ylim=(REACH, -REACH), xticks=[], yticks=[], title=title, aspect="equal")
    ax.set(xlabel="second channel →", ylabel="← first channel")
    ax.add_patch(Wedge((0, 0), 1, 0, 360, fill=False, edgecolor="#BBBBBB", linewidth=1))


def shafts(ax: Axes, ends: Float[Tensor, "n 2"], colour: str, **options) -> None:
    """Arrows from the middle of the plane to some ends (first, second channel)."""
    for first, second in ends.tolist():
        ax.annotate("", (second, first), (0, 0), arrowprops=dict(arrowstyle="-|>", color=colour, **options))


def tips(ax: Axes, vectors: Float[Tensor, "n 2"], colours: Sequence[str], size: float = 46) -> None:
    """Vectors as thin lines from the middle with a dot at the end."""
    for (first, second), colour in zip(vectors.tolist(), colours, strict=True):
        ax.plot([0, second], [0, first], color=colour, linewidth=0.8, alpha=0.6, zorder=2)
    ax.scatter(*vectors.T.flip(0), s=size, color=list(colours), edgecolors=style.INK, linewidths=0.6, zorder=3)


# ------------------------------------------------------------------------------------------------------ 4: grouping


def draw_grouping(e: tuple[float, float], G: int, query: int) -> tuple[Figure, str]:
    """Queries of two channels, in the groups of G centroids, the first of which points to a place."""
    centroids, query = centroids_around(unit(e), G), min(query, len(QUERIES) - 1)
    groups = dynamic_group.assign_torch(QUERIES[None, None], centroids[None])[0, 0]
    figure, (ax, likes_ax) = panels(1, 1.25, height=5.0)
    plane(ax, "thick: centroids; dots: queries, in the colour of their group")
    line = torch.linspace(-REACH, REACH, 240).double()
    owners = dynamic_group.assign_torch(torch.cartesian_prod(line, line)[None, None], centroids[None])[0, 0]
    sectors = np.array([to_rgb(style.GROUPS[j]) for j in owners.tolist()]).reshape(240, 240, 3)
    ax.imshow(sectors, extent=(-REACH, REACH, REACH, -REACH), alpha=0.16, interpolation="nearest", zorder=0)
    tips(ax, QUERIES, [style.GROUPS[j] for j in groups.tolist()])
    for j in range(G):
        shafts(ax, centroids[j, None], style.GROUPS[j], linewidth=3.2, mutation_scale=18)
    ax.plot(e[1], e[0], "X", markersize=12, color=style.ORANGE, markeredgecolor=style.INK, zorder=5)
    place = dict(marker="*", markersize=20, color=style.INK, markeredgecolor=style.PAPER, zorder=6)
    ax.plot(float(QUERIES[query, 1]), float(QUERIES[query, 0]), **place)

    likes = (centroids @ QUERIES[query]).tolist()
    bars = likes_ax.bar(range(1, G + 1), likes, color=style.GROUPS[:G], alpha=0.45, width=0.6)
    best = int(groups[query])
    bars[best].set(alpha=1, edgecolor=style.INK, linewidth=2.5)
    likes_ax.axhline(0, color=style.INK, linewidth=1)
    likes_ax.set(title=r"$e_j \cdot x_Q$ of the star; the largest wins", xlabel="centroid j", ylim=(-1.25, 1.25))
    likes_ax.set_xticks(range(1, G + 1))
    sizes = torch.bincount(groups, minlength=G).tolist()
    empty = f" {sizes.count(0)} of {G} groups have no query." if 0 in sizes else ""
    return figure, (
        f"The star belongs to group {best + 1}: e · x_Q = <b>{likes[best]:.2f}</b>. Queries in the groups 1 to {G}: "
        f"{', '.join(map(str, sizes))}.{empty}"
    )


def grouping() -> Turn:
    """A centroid to drag, the number of centroids, and the query whose choice is shown."""
    return turn(
        draw_grouping,
        e=Pointer((0.15, 1.0), first=(-REACH, -REACH), last=(REACH, REACH), step=0.1),
        G=slider(1, MOST, 3),
        query=slider(0, len(QUERIES) - 1, 4),
    )


# ------------------------------------------------------------------------------------------------------- 5: selection


def draw_selection(e: tuple[float, float], k: int, lengths: str) -> tuple[Figure, str]:
    """Keys of two channels, and the k of them that a centroid likes best; `lengths` are "own" or "one"."""
    centroid, keys = unit(e), KEYS if lengths == "own" else F.normalize(KEYS, dim=1)
    k = min(k, len(keys))
    chosen = dynamic_group.select_torch(keys[None, None], centroid[None, None], k)[0, 0, 0]
    likes, taken = keys @ centroid, torch.zeros(len(keys), dtype=torch.bool).index_fill(0, chosen, True)
    bound = float(likes[chosen].min())
    figure, (ax, sorted_ax) = panels(1, 1.25, height=5.0)
    plane(ax, "thick: a centroid; orange: the keys that it selects")
    tips(ax, keys, [style.ORANGE if one else "#CCCCCC" for one in taken.tolist()])
    shafts(ax, centroid[None], style.RUST, linewidth=3.2, mutation_scale=18)
    across = torch.stack([-centroid[1], centroid[0]])
    line = torch.stack([bound * centroid - 3 * across, bound * centroid + 3 * across])
    ax.plot(*line.T.flip(0), "--", color=style.INK, linewidth=1.2)
    ax.plot(e[1], e[0], "X", markersize=12, color=style.ORANGE, markeredgecolor=style.INK, zorder=5)

    order = likes.argsort(descending=True, stable=True)
    colours = [style.ORANGE if one else "#CCCCCC" for one in taken[order].tolist()]
    sorted_ax.bar(range(1, len(keys) + 1), likes[order].numpy(), color=colours, edgecolor=style.INK, linewidth=0.5)
    sorted_ax.axhline(bound, color=style.INK, linestyle="--", linewidth=1.2)
    sorted_ax.set(title=r"$e \cdot x_K$ of all keys, sorted; dashed: the bound", xlabel="keys", ylim=(-1.25, 1.25))
    nearest = set((F.normalize(keys, dim=1) @ centroid).argsort(descending=True)[:k].tolist())
    both = len(nearest & set(chosen.tolist()))
    return figure, (
        f"{k} of {len(keys)} keys; the least liked of them has e · x_K = <b>{bound:.2f}</b>. By their angle to the "
        f"centroid, {both} of them are among the nearest {k}."
    )


def selection() -> Turn:
    """A centroid to drag, the number of keys, and whether keys keep their lengths."""
    return turn(
        draw_selection,
        e=Pointer((-0.6, 0.8), first=(-REACH, -REACH), last=(REACH, REACH), step=0.1),
        k=slider(1, len(KEYS), 9),
        lengths=choice(("their own", "own"), ("all one, as in DGT-S and B", "one"), name="lengths"),
    )


# ----------------------------------------------------------------------------------------------------- 6: attention


def with_keys(record: DynamicGroupRecord, layer: str, head: int, k: int) -> Int[Tensor, "G k"]:
    """What the groups of a trained layer would select of the whole map, if they selected k keys."""
    e = F.normalize(network().get_submodule(layer).centroids[head], dim=-1)
    return dynamic_group.select_torch(record.k[None, head, None], e[None], k)[0, 0]


def draw_attention(query: tuple[float, float], head: int, share: float, layer: str, image: int) -> tuple[Figure, str]:
    """The groups of a trained layer; the keys of the group that a query (row, col), a pixel, is in; what it misses."""
    record = traced(image)[layer]
    head, at, L = min(head, record.heads - 1), record.query(*query), record.k.shape[1]
    k, j = max(1, round(share * L)), int(record.groups[head, at])
    chosen = with_keys(record, layer, head, k)[j]
    weights = record.attention(record.q[head, at, None], head, chosen)[0]
    figure, (groups_ax, keys_ax, parts) = panels(1, 1, 1.1, height=4.7)
    for ax in (groups_ax, keys_ax):
        ground(ax, picture(image))
        style.star(ax, *record.cells()[at].tolist())
    largest = int(torch.bincount(record.groups[head]).argmax())  # it stays behind
    alphas = [0.3 if i == largest else 0.65 for i in range(record.selected.shape[1])]
    coloured = [(*to_rgb(style.GROUPS[i % MOST]), alphas[i]) for i in record.groups[head].tolist()]
    extent = (-0.5, SIDE - 0.5, SIDE - 0.5, -0.5)
    groups_ax.imshow(np.reshape(coloured, (*record.query_shape, 4)), extent=extent, interpolation="nearest")
    groups_ax.set_title(f"head {head}: groups of queries")
    colour = style.GROUPS[j % MOST]
    style.keys(keys_ax, record.cells()[chosen].numpy(), weights.numpy(), record.stride, colour)
    keys_ax.set_title(f"the {k} keys of group {j + 1}; area: attention")

    likes = record.k[head] @ F.normalize(network().get_submodule(layer).centroids[head, j], dim=-1)
    logits = record.k[head] @ record.q[head, at] * record.scale
    taken = torch.zeros(L, dtype=torch.bool).index_fill(0, chosen, True)
    parts.scatter(likes[~taken], logits[~taken], s=14, color="#BBBBBB", label="not selected")
    edge = dict(edgecolors=style.INK, linewidths=0.3)
    parts.scatter(likes[taken], logits[taken], s=18, color=colour, label="selected", **edge)
    parts.set(title="all keys", xlabel=r"what the group likes, $e_j \cdot x_K$")
    parts.set_ylabel(r"what the query likes, $x_Q \cdot x_K / \sqrt{d}$")
    parts.legend(framealpha=0.85, edgecolor="none", loc="lower right")
    dense = logits.softmax(-1)
    held, best = float(dense[chosen].sum()), float(dense.topk(k).values.sum())
    on, trained = float((record.groups[head] == j).float().mean()), record.selected.shape[2]
    return figure, (
        f"Group {j + 1} has {on:.0%} of the queries and reads {k} of {L} keys. Dense attention would give them "
        f"<b>{held:.0%}</b> of this query's attention; the best {k} for this query would get {best:.0%}. The layer was "
        f"trained with k = {trained}; it is not trained again when you turn it."
    )


def attention() -> Turn:
    """The query to point at, the head, the number of keys, the layer and the image to choose."""
    most = max(record.heads for record in traced(IMAGES[0]).of_kind("dynamic_group"))
    shares = [("1/64", 1 / 64), ("1/16", 1 / 16), ("1/4", 1 / 4), ("1/2", 1 / 2), ("1", 1.0)]
    return turn(
        draw_attention,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=8.0),
        head=slider(0, most - 1, 0),
        share=choice(*shares, name="k / L", value=1 / 4),
        layer=choice(*layers()),
        image=choice(*[(picture(i).name.split("(")[1].rstrip(")"), i) for i in IMAGES]),
    )


# ------------------------------------------------------------------------------------------------ 7: moving centroids

STEPS, BATCH = 120, 24  # of the picture of centroids that move; queries of a step
HEAPS = (-1.9, 0.1, 1.7)  # angles that queries come from


@cache
def history(G: int, tau: float, printed: bool) -> tuple[Float[np.ndarray, "steps+1 G 2"], Int[np.ndarray, "steps G"]]:
    """Centroids of two channels after each step of training, and how many queries each group had in the step.

    The library's layer moves them. It takes tau = lr / 10, so lr is ten times tau.
    """
    layer = DynamicGroupAttention(2, 1, G, as_printed=(4,) if printed else ()).double()
    layer.centroids.copy_(F.normalize(arrows(5, MOST, (-0.2,), spread=1.0), dim=1)[None, :G])
    places, sizes = [layer.centroids[0].clone()], []
    for step in range(STEPS):
        q = arrows(100 + step, BATCH, HEAPS)[None, None]
        groups = dynamic_group.assign_torch(q, layer.centroids)
        layer.collect(q, groups)
        sizes.append(torch.bincount(groups[0, 0], minlength=G))
        layer.update_centroids(10 * tau)
        places.append(layer.centroids[0].clone())
    return torch.stack(places).numpy(), torch.stack(sizes).numpy()


def draw_moving(step: int, G: int, tau: float, printed: bool) -> tuple[Figure, str]:
    """Centroids that follow queries, after some steps; `printed`: with DGT-4 by its letter."""
    places, sizes = history(G, tau, printed)
    step = min(step, STEPS)
    queries = arrows(100 + max(step - 1, 0), BATCH, HEAPS)
    groups = dynamic_group.assign_torch(queries[None, None], torch.from_numpy(places[max(step - 1, 0)])[None])[0, 0]
    figure, (ax, time) = panels(1, 1.5, height=5.0)
    plane(ax, f"after step {step}; dots: the queries of the step" if step else "at the start")
    tips(ax, queries, [style.GROUPS[j] if step else "#CCCCCC" for j in groups.tolist()], size=30)
    for j in range(G):
        shafts(ax, torch.from_numpy(places[step, j])[None], style.GROUPS[j], linewidth=3.2, mutation_scale=18)
        angle = np.rad2deg(np.unwrap(np.arctan2(places[:, j, 0], places[:, j, 1])))
        time.plot(range(STEPS + 1), angle, color=style.GROUPS[j], linewidth=2)
    for heap in HEAPS:
        time.axhline(math.degrees(heap), color="#999999", linestyle=":", linewidth=1.5)
    time.axvline(step, color=style.INK, linestyle="--", linewidth=1)
    time.set(title="angle of each centroid; dotted: the heaps of queries", xlabel="step", ylabel="degrees")
    turned = np.degrees(np.arccos(np.clip((places[1:] * places[:-1]).sum(-1), -1, 1)))  # (steps, G)
    idle = int((sizes[max(step - 1, 0)] == 0).sum())
    return figure, (
        f"In a step a centroid turns by <b>{turned[sizes > 0].mean():.2g}°</b>, the mean over all {STEPS} steps and "
        f"all groups with queries. In step {max(step, 1)}, {idle} of {G} groups have no query; their centroids stay."
    )


def moving() -> Turn:
    """The step, the number of groups, the pace, and the two readings of DGT-4 to turn."""
    return turn(
        draw_moving,
        step=slider(0, STEPS, 40),
        G=slider(1, MOST, 3),
        tau=choice(0.0001, 0.01, 0.1, 0.5, name="τ", value=0.1),
        printed=choice(("as meant", False), ("as printed", True), name="DGT-4"),
    )


# ----------------------------------------------------------------------------------------------------------- 8: cost


def draw_cost(G: int, k: int, channels: int) -> tuple[Figure, str]:
    """DGT-5 to DGT-7 against the side of the map, beside windows."""
    sides = np.array([7, 10, 14, 20, 28, 40, 56, 80, 112])
    found = np.array([multiply_adds(side * side, channels, G, min(k, side * side)) for side in sides.tolist()])
    figure, (ax, ratio) = panels(1, 1)
    ax.plot(sides, found[:, 0] / 1e9, "--", color=style.INK, label="dense, DGT-5")
    ax.plot(sides, 2 * 49 * sides**2 * channels / 1e9, "--", color=style.BLUE, label="windows of 7 × 7")
    ax.plot(sides, found[:, 1] / 1e9, "o-", color=style.ORANGE, label="dynamic groups, DGT-6")
    ax.set(xscale="log", yscale="log", title="attention of one layer, G multiply-adds", xlabel="side of the map, cells")
    ax.legend(frameon=False)
    ratio.plot(sides, found[:, 2], "o-", color=style.ORANGE)
    ratio.axhline(1, color=style.INK, linewidth=1)
    ratio.axhspan(1, 20, color=style.RED, alpha=0.08)
    ratio.annotate("here groups cost more than dense attention", (14, 9), color=style.INK)
    ratio.set(xscale="log", yscale="log", title="dynamic groups over dense, DGT-7", xlabel="side of the map, cells")
    ratio.set_ylim(min(0.005, found[:, 2].min()), 20)
    ratio.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    for one in (ax, ratio):
        one.minorticks_off()
        one.set_xticks(sides[::2], sides[::2])
    even = next(side for side in range(2, 1000) if multiply_adds(side**2, channels, G, min(k, side**2))[2] < 1)
    stages = [f"{multiply_adds(side**2, C, G, k)[2]:.2f}" for side, C in ((56, 64), (28, 128), (14, 256))]
    return figure, (
        f"Groups cost less from a map of <b>{even} × {even}</b> on. In the three stages of DGT-T this G and k have the "
        f"ratios {', '.join(stages)}."
    )


def cost() -> Turn:
    """The number of groups, of keys and of channels to turn."""
    return turn(
        draw_cost,
        G=choice(12, 24, 48, 96, value=48),
        k=choice(24, 49, 98, 196, value=98),
        channels=choice(64, 128, 256, value=64),
    )


# -------------------------------------------------------------------------------------------------------- 9: verdict


def of_heads(found: pd.DataFrame, kind: str, column: str = "value") -> Float[np.ndarray, " heads"]:
    """A measure of all heads of a network, layer by layer; column "other" has its null."""
    return found[column].xs(kind, level="kind").to_numpy()


def verdict() -> dict[str, list[pd.DataFrame]]:
    """Do groups find the object, and read it? Measured in trained and in random networks, drawn, and returned."""
    items = [Shapes("easy", "test", SIDE)[i] for i in range(MEASURED)]
    images, masks = (np.stack([item[part].numpy() for item in items]) for part in (0, 2))
    subjects = [load_subject(path("dgt_mini" + (f"_seed{seed}" if seed else ""))) for seed in range(SEEDS)]
    networks = {
        "trained": [one.model for one in subjects],
        "random weights": [random_twin(subjects[0], seed, images) for seed in range(SEEDS)],
    }
    found = {
        name: [summary(evaluate_groups(model, images, masks, choice=CHOICE)) for model in models]
        for name, models in networks.items()
    }
    figure, (groups, keys) = panels(1.35, 1, height=4.4)
    rows = [
        ("trained", "trained", "value", style.ORANGE),
        ("random weights", "random weights", "value", style.GREY),
        ("trained, another image's mask", "trained", "other", style.BLUE),
    ]
    keys.plot([0, 1], [0, 1], color=style.INK, linewidth=1)
    for place, (name, network, column, colour) in enumerate(rows):
        nmi, on, off = (np.stack([of_heads(one, kind, column) for one in found[network]]) for kind in MEASURES)
        shift = np.linspace(-0.25, 0.25, SEEDS)[:, None] + np.zeros_like(nmi)
        groups.scatter(nmi, place + shift, s=30, color=colour, edgecolors=style.INK, linewidths=0.4)
        groups.plot([nmi.mean()] * 2, [place - 0.4, place + 0.4], color=style.INK, linewidth=2.5)
        keys.scatter(off, on, s=30, color=colour, edgecolors=style.INK, linewidths=0.4, label=name)
    groups.set_yticks(range(len(rows)), [name.replace(", ", ",\n") for name, *_ in rows])
    groups.set(title="groups and object (NMI): a dot a head; line: mean", xlim=(0, None))
    groups.invert_yaxis()
    keys.set(title="share of a query's keys on the object", aspect="equal", xlim=(0, 0.6), ylim=(0, 0.6))
    keys.set(xlabel="queries off the object", ylabel="queries on the object")
    show(figure)
    return found


def in_words(found: dict[str, list[pd.DataFrame]]) -> str:
    """What `verdict` measured, and what follows."""
    lines, numbers = [], {}
    for name, networks in found.items():
        for seed, one in enumerate(networks):
            (nmi, on, off), other = (of_heads(one, kind) for kind in MEASURES), of_heads(one, "nmi", "other")
            lines.append(
                f"| {name}, seed {seed} | {nmi.mean():.2f} | {other.mean():.2f} | {on.mean():.0%} | {off.mean():.0%} | "
                f"{(on > off).sum()} of {len(on)} |"
            )
            row = nmi.mean(), other.mean(), (on > off).sum(), len(on), np.abs(on - off).mean()
            numbers.setdefault(name, []).append(row)
    own, other, same, heads, apart = np.array(numbers["trained"]).T
    random, _, random_same, random_heads, random_apart = np.array(numbers["random weights"]).T
    finds = own.min() > 1.5 * max(random.max(), other.max())
    reads = same.sum() / heads.sum() > max(0.5, random_same.sum() / random_heads.sum())
    return "\n".join(
        [
            "| network | NMI of groups and object | NMI with another image's mask | keys on the object, of queries "
            "on it | keys on the object, of the other queries | heads where queries on it have more |",
            "| --- " * 6 + "|",
            *lines,
            "",
            f"{MEASURED - CHOICE} test images, means over all heads. The two shares of a head differ by "
            f"{apart.mean():.0%} in trained networks and by {random_apart.mean():.0%} in random ones, so trained "
            f"keys depend on whether the query is on the object.",
            "",
            f"**Verdict.** Groups of queries {'find' if finds else 'do not find'} the object, and queries on the "
            f"object {'read' if reads else 'do not read'} the object more than other queries do: "
            f"{int(same.sum())} of {int(heads.sum())} heads do so, and {int(random_same.sum())} of "
            f"{int(random_heads.sum())} heads of random networks.",
        ]
    )


def library_layer(dim: int, heads: int, groups: int, keys: int) -> DynamicGroupAttention:
    """The library's layer with random weights, in float64, not in training."""
    torch.manual_seed(0)
    return DynamicGroupAttention(dim, heads, groups, keys).double().eval().requires_grad_(False)
