"""The pictures of the lesson on BiFormer and DeBiFormer. Each function draws one; the reader turns its arguments."""

import math
from copy import deepcopy
from functools import cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import dynattn
from dynattn import core, weights
from dynattn.data import Shapes, normalise
from dynattn.figures import style
from dynattn.figures.drawing import ground
from dynattn.figures.evidence import class_map, share_under
from dynattn.figures.subjects import load_subject, random_twin
from dynattn.lessons.controls import Pointer, Turn, choice, slider, turn
from dynattn.lessons.notebook import HEAT, numbered, panels, show
from dynattn.lessons.pictures import IMAGES, MEASURED, QUERY, SIDE, image_choice, picture
from dynattn.mechanisms import bilevel, deformable_bilevel
from dynattn.mechanisms.bilevel import BiLevelRecord, BiLevelRoutingAttention, Routing
from dynattn.mechanisms.deformable_bilevel import DeformableBiLevelAttention, DeformableBiLevelRecord
from dynattn.tracing import RegionRoutes, Trace, trace
from dynattn.weights import path
from dynattn.widgets import Lens
from dynattn.widgets.panel import shows_routes

NAMES = ("biformer_mini", "debiformer_mini")
KINDS = {"biformer_mini": "bilevel", "debiformer_mini": "deformable_bilevel"}


# ------------------------------------------------------------------------------------------------ models and images


@cache
def network(name: str) -> nn.Module:
    """A small model, trained."""
    return dynattn.create_model(name, pretrained=True)


@cache
def traced(name: str, index: int) -> Trace:
    """A small model on a test image."""
    return trace(network(name), picture(index).x)


def layers(name: str) -> list[tuple[str, str]]:
    """The layers of a small model that route: in words, and by name."""
    return numbered(traced(name, IMAGES[0]).of_kind(KINDS[name]))


# ------------------------------------------------------------------------------------------------------ 1: the question


def question() -> Lens:
    """One query in the background: what it reads in four layers."""
    layer = {
        "vit_mini": "blocks.3.block.attn",
        "swin_mini": "layers.1.blocks.3.block.attn",
        "biformer_mini": "stages.1.blocks.1.attn",
        "debiformer_mini": "stages.1.blocks.1.attn",
    }
    models = {name: network(name) for name in layer}
    row, col = QUERY
    return Lens(models, Shapes("easy", "test", 512)[IMAGES[0]][0], row=row, col=col, layer=list(layer.values()))


# -------------------------------------------------------------------------------------------------------- 4: routing


def outlines(ax: Axes, routes: RegionRoutes, query: tuple[float, float], numbers: bool = True) -> None:
    """The regions that a query's region reads, numbered as they are liked, and the region itself, dashed."""
    boxes = [(box, "-", style.PAPER) for box in routes.read(*query)] + [(routes.own(*query), "--", style.RED)]
    for (top, left, bottom, right), line, colour in boxes:
        place = dict(xy=(left, top), width=right - left, height=bottom - top, fill=False, zorder=4)
        rim = style.INK if line == "-" else style.PAPER
        ax.add_patch(Rectangle(**place, edgecolor=rim, linewidth=3.2, alpha=0.8))
        ax.add_patch(Rectangle(**place, edgecolor=colour, linewidth=1.6, linestyle=line))
    for rank, (top, left, *_) in enumerate(routes.read(*query) if numbers else (), 1):
        words = dict(fontsize=8, va="top", color=style.PAPER, zorder=5)
        ax.text(left + 1, top + 1, str(rank), **words, bbox=dict(facecolor=style.INK, pad=1.0, edgecolor="none"))


def turned_routes(record: BiLevelRecord, S: int, k: int) -> tuple[Routing, Float[Tensor, "R S"]]:
    """The routing of a trained layer with another number of regions and routes, and all affinities (DEBI-9)."""
    shape = record.query_shape
    routing = Routing(record.q[None], record.k[None], shape, shape, S, min(k, S * S))
    means = [one.means(x[None]) for one, x in ((routing.queries, record.q), (routing.sources, record.k))]
    q, key = (x[0].movedim(0, 1).flatten(1) for x in means)  # (regions, C)
    return routing, q @ key.mT


def draw_routing(query: tuple[float, float], S: int, k: int, layer: str, image: int) -> tuple[Figure, str]:
    """The regions that a query's region reads, how much it likes all of them, and what the query itself likes."""
    record = traced("biformer_mini", image)[layer]
    routing, affinity = turned_routes(record, S, k)
    routes, at = routing.on_image(record.stride, record.stride), record.query(*query)
    region = routes.region(*query)
    figure, (photo, heat_ax, agree_ax) = panels(1, 1, 1, height=4.7)
    for ax in (photo, heat_ax):
        ground(ax, picture(image))
    outlines(photo, routes, query, numbers=S <= 8)
    style.star(photo, *record.cells()[at].tolist())
    photo.set_title("dashed: its region; numbered: read" if S <= 8 else "what the dashed region reads")
    extent = (-0.5, SIDE - 0.5, SIDE - 0.5, -0.5)
    likes = affinity[region]
    shown = dict(extent=extent, cmap=HEAT, alpha=0.75, interpolation="nearest")
    heat_ax.imshow(likes.reshape(routing.sources.grid).numpy(), **shown)
    heat_ax.set_title("its affinity, DEBI-9; dark: high")

    logits = torch.stack([record.q[m, at] @ record.k[m].mT for m in range(record.heads)]) * record.scale
    dense = logits.softmax(dim=-1).mean(dim=0)  # of the query, over all tokens, mean of the heads
    numbers = routing.sources.numbers(dense.device)
    count = math.prod(routing.sources.grid)
    held = torch.zeros(count).index_add(0, numbers, dense.float())
    chosen = torch.zeros(count, dtype=torch.bool).index_fill(0, routing.routes[region], True)
    agree_ax.scatter(likes[~chosen].numpy(), held[~chosen].numpy(), s=18, color="#BBBBBB", label="not read")
    taken = dict(s=26, color=style.ORANGE, label="read", edgecolors=style.INK)
    agree_ax.scatter(likes[chosen].numpy(), held[chosen].numpy(), **taken)
    agree_ax.set(title="every region is a dot", xlabel="affinity: the mean query likes the mean key")
    agree_ax.set_ylabel("dense attention of the query")
    agree_ax.legend(framealpha=0.85, edgecolor="none")
    read = int(chosen.sum())
    best = float(held.topk(read).values.sum())
    trained = f"S = {network('biformer_mini').get_submodule(layer).regions}, k = {len(record.routing.routes[0])}"
    return figure, (
        f"The region reads {read} of {count} regions, {read / count:.0%} of the map. Dense attention would give them "
        f"<b>{float(held[chosen].sum()):.0%}</b> of this query's attention; the best {read} regions for this query "
        f"would get {best:.0%}. The layer was trained with {trained}; it is not trained again when you turn it."
    )


def routing() -> Turn:
    """The query to point at, the number of regions and of routes, the layer and the image to choose."""
    return turn(
        draw_routing,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=16.0),
        S=choice(1, 2, 4, 8, 16, value=8),
        k=choice(1, 4, 16, 64, 256, value=4),
        layer=choice(*layers("biformer_mini")),
        image=image_choice(),
    )


# ------------------------------------------------------------------------------------------------------ 6: no gradient

WALK = np.linspace(0, 1, 721)  # shares of a circle that a query goes round


@cache
def walk(k: int) -> tuple[Float[np.ndarray, " steps"], list[tuple[int, ...]], Float[np.ndarray, " steps"]]:
    """The query of one region goes round a circle: an output, the regions it reads, and the slope that torch computes.

    A map of 4 x 4 tokens of two channels, each of them a region.
    """
    draw, regions = torch.Generator().manual_seed(3), core.Regions((4, 4), 4)
    q, key, v = (torch.randn(1, 1, 16, 2, generator=draw, dtype=torch.float64) for _ in range(3))
    values, routes, slopes = [], [], []
    for share in WALK:
        t = torch.tensor(2 * np.pi * share, requires_grad=True)
        mine = torch.cat([torch.stack([t.cos(), t.sin()]).reshape(1, 1, 1, 2), q[:, :, 1:]], dim=2)
        out = bilevel.bilevel_attention(mine, key, v, (4, 4), (4, 4), regions=4, topk=k)[0, 0, 0, 0]
        slopes.append(2 * np.pi * float(torch.autograd.grad(out, t)[0]))
        values.append(float(out.detach()))
        routes.append(tuple(bilevel.route(regions.means(mine), regions.means(key), k)[0, 0].sort()[0].tolist()))
    return np.array(values), routes, np.array(slopes)


def draw_gradient(share: float, k: int) -> tuple[Figure, str]:
    """An output of a query that moves, where its routes change, and the tangent that torch's gradient gives."""
    values, routes, slopes = walk(k)
    at = int(round(share * (len(WALK) - 1)))
    jumps = [i for i in range(1, len(WALK)) if routes[i] != routes[i - 1]]
    figure, (ax,) = panels(1, height=4.2)
    for start, stop in zip([0, *jumps], [*jumps, len(WALK)], strict=True):
        ax.plot(WALK[start:stop], values[start:stop], color=style.ORANGE, linewidth=3)
    for i in jumps:
        ax.axvline((WALK[i] + WALK[i - 1]) / 2, color=style.INK, linestyle=":", linewidth=1)
    near = np.array([-0.06, 0.06])
    ax.plot(WALK[at] + near, values[at] + slopes[at] * near, color=style.BLUE, linewidth=2)
    ax.plot(WALK[at], values[at], "o", color=style.INK, zorder=5)
    room = 0.15 * float(np.ptp(values)) + 1e-3
    ax.set(xlim=(0, 1), ylim=(values.min() - room, values.max() + room), xlabel="share of the circle", ylabel="output")
    ax.set_title("orange: an output; dotted: other regions are read; blue: the gradient")
    steps = np.abs(np.diff(values))
    at_jumps = steps[[i - 1 for i in jumps]].sum()
    return figure, (
        f"The query reads the regions {', '.join(map(str, routes[at]))}. On the circle they change {len(jumps)} times. "
        f"<b>{at_jumps / steps.sum():.0%}</b> of all movement of the output is in these jumps, which no gradient sees."
    )


def gradient() -> Turn:
    """How far the query has gone, and the number of routes."""
    return turn(draw_gradient, share=slider(0.0, 1.0, 0.2, step=0.01), k=choice(1, 2, 4, 16, value=2))


# --------------------------------------------------------------------------------------------------------- 8: agents


def set_agents(layer: DeformableBiLevelAttention, r: int, S: int, k: int) -> None:
    """An agent for every r x r cells, each of which reads k of S x S regions: no weight depends on these."""
    layer.stride, layer.regions, layer.topk = r, S, k
    layer.lce.stride = layer.offset.depthwise.stride = (r, r)


@cache
def turned(image: int, name: str, r: int, S: int, k: int) -> DeformableBiLevelRecord:
    """A trained layer on an image, with other agents."""
    model = deepcopy(network("debiformer_mini"))
    set_agents(model.get_submodule(name), r, S, k)
    return trace(model, picture(image).x)[name]


def draw_agents(
    query: tuple[float, float], r: int, S: int, k: int, head: int, agent: int, layer: str, image: int
) -> tuple[Figure, str]:
    """Agents and what the query gives to them; what one of them reads; what the query gets from the map by all.

    agent: 0 is the one that the query gives most, 1 the next.
    """
    record = turned(image, layer, r, S, k)
    head, at = min(head, record.heads - 1), record.query(*query)
    given = record.attention[head, at]
    points, rest = record.points_xy(record.group(head)), record.references_xy()
    figure, axes = panels(1, 1, 1, height=4.9)
    for ax in axes:
        ground(ax, picture(image))
        style.star(ax, *record.cells()[at].tolist())
    for (x, y), (x0, y0) in zip(points.tolist(), rest.tolist(), strict=True):
        axes[0].plot([x0, x], [y0, y], color=style.PAPER, linewidth=1.2, zorder=3)
    chosen = int(given.argsort(descending=True, stable=True)[min(agent, len(given) - 1)])
    area = 20 + 380 * (given / given.max()).numpy()
    axes[0].scatter(*points.T.numpy(), s=area, color=style.ORANGE, edgecolors=style.INK, zorder=4)
    axes[0].set_title("agents; area: what the star gives")

    x, y = rest[chosen].tolist()
    routes = record.region_routes()
    outlines(axes[1], routes, (y, x), numbers=k <= 16)
    weight = record.reading[head, chosen]
    read = weight.nonzero()[:, 0]
    style.keys(axes[1], record.cells()[read].numpy(), weight[read].numpy(), record.stride, style.ORANGE)
    for ax in axes[:2]:
        ax.plot(*points[chosen].tolist(), "D", color="white", markeredgecolor=style.INK, markersize=9, zorder=6)
    axes[1].set_title("what the agent at the diamond reads")
    got = record.effective_matrix(head)[at]
    extent = (-0.5, SIDE - 0.5, SIDE - 0.5, -0.5)
    share = (got / got.max()).reshape(record.query_shape).numpy()
    axes[2].imshow(share, extent=extent, cmap=HEAT, alpha=0.35 + 0.6 * share, interpolation="nearest")
    axes[2].set_title("both attentions; dark: most")
    moved, own = float((points - rest).norm(dim=1).mean()), network("debiformer_mini").get_submodule(layer)
    return figure, (
        f"{len(points)} agents, moved by {moved:.1f} pixels in the mean. The one at the diamond has "
        f"<b>{float(given[chosen]):.0%}</b> of this query's attention and reads {len(routes.routes[0])} of "
        f"{math.prod(routes.key_grid)} regions; dashed: the region that it starts from. The map on the right is only "
        f"the product of the two attentions. All else (what agents sampled, LCE, feed-forward network, other heads) is "
        f"{record.rest(head):.0%} as large as the head's output. The layer was trained with r = {own.stride}, "
        f"S = {own.regions}, k = {own.topk}."
    )


def agents() -> Turn:
    """The query to point at, the agents, the regions that they read, the head, the layer and the image."""
    most = max(record.heads for record in traced("debiformer_mini", IMAGES[0]).of_kind("deformable_bilevel"))
    return turn(
        draw_agents,
        query=Pointer(QUERY, last=(SIDE - 1.0, SIDE - 1.0), step=8.0),
        r=choice(1, 2, 4, 8, value=4),
        S=choice(2, 4, 8, value=8),
        k=choice(1, 4, 8, 16, 64, value=8),
        head=slider(0, most - 1, 0),
        agent=choice(("heaviest", 0), ("second", 1), ("third", 2)),
        layer=choice(*layers("debiformer_mini")),
        image=image_choice(),
    )


# ----------------------------------------------------------------------------------------------------------- 9: cost


def draw_cost(S: int, k: int, r: int, channels: int) -> tuple[Figure, str]:
    """Multiply-adds of the two layers against the side of the map, beside dense attention; and against S."""
    sides = np.array([16, 32, 48, 64, 96, 128, 192, 256])
    L = sides**2

    def both(side: int, S: int) -> tuple[float, float]:
        shape, N = (side, side), (side // r) ** 2
        regions = math.prod(core.Regions((side // r, side // r), S).grid)  # of agents: no more than there are agents
        spared = (S * S - regions) * S * S * channels
        return (
            bilevel.multiply_adds(shape, S, min(k, S * S), channels),
            deformable_bilevel.multiply_adds(shape, N, S, min(k, S * S), channels, 5, 3) - spared,
        )

    found = np.array([both(int(side), S) for side in sides]) / 1e9
    linear = 4 * L * channels**2
    dense = (linear + 2 * L**2 * channels) / 1e9
    figure, (ax, by_regions) = panels(1, 1)
    ax.plot(sides, dense, "--", color=style.INK, label="dense attention")
    ax.plot(sides, (linear + 2 * 49 * L * channels) / 1e9, "--", color=style.BLUE, label="windows of 7 × 7")
    ax.plot(sides, found[:, 0], "o-", color=style.ORANGE, label="BRA")
    ax.plot(sides, found[:, 1], "o-", color="#009E73", label="DBRA")
    ax.set(xscale="log", yscale="log", xlabel="side of the map, cells", title="one layer, G multiply-adds")
    ax.legend(frameon=False)
    cuts = np.array([1, 2, 4, 8, 16, 32])
    at_64 = np.array([both(64, int(one)) for one in cuts]) / 1e9
    by_regions.plot(cuts, at_64[:, 0], "o-", color=style.ORANGE)
    by_regions.plot(cuts, at_64[:, 1], "o-", color="#009E73")
    by_regions.axvline(S, color=style.INK, linestyle=":")
    by_regions.set(xscale="log", yscale="log", xlabel="S", title="on a map of 64 × 64, G multiply-adds; dotted: your S")
    for one, ticks in ((ax, sides), (by_regions, cuts)):
        one.minorticks_off()
        one.set_xticks(ticks, ticks)
    least, growth = cuts[at_64.argmin(axis=0)], found[-1] / found[3]
    return figure, (
        f"On 64 × 64 cells BRA is cheapest with <b>S = {least[0]}</b>, DBRA with <b>S = {least[1]}</b>. From 64 × 64 "
        f"to 256 × 256 the cells grow {sides[-1] ** 2 // 64**2} times, the cost of BRA {growth[0]:.0f} times, of DBRA "
        f"{growth[1]:.0f} times, of dense attention {dense[-1] / dense[3]:.0f} times."
    )


def cost() -> Turn:
    """The number of regions, of routes, the cells of an agent, and the channels."""
    return turn(
        draw_cost,
        S=choice(1, 2, 4, 8, 16, value=8),
        k=choice(1, 4, 16, 64, value=4),
        r=choice(1, 2, 4, 8, value=8),
        channels=choice(64, 128, 256, value=64),
    )


# -------------------------------------------------------------------------------------------------------- 10: verdict


def seeds_of(name: str) -> list[str]:
    """The trained networks of a small model that are here, one a seed."""
    return [one for one in weights.available() if one == name or one.startswith(f"{name}_seed")]


def on_object(routes: RegionRoutes, mask: Float[np.ndarray, "H W"]) -> tuple[float, float]:
    """The share of the object's pixels in what regions read: of regions mostly on the object, and of those off it.

    NaN where there are no such regions.
    """

    def shares(side: tuple[float, float], grid: tuple[int, int]) -> Float[np.ndarray, " regions"]:
        """How much of each region is object."""
        row, col = (np.minimum(np.arange(mask.shape[i]) // side[i], grid[i] - 1) for i in (0, 1))
        numbers, count = (row[:, None] * grid[1] + col).astype(int).ravel(), grid[0] * grid[1]
        return np.bincount(numbers, mask.ravel(), count) / np.bincount(numbers, minlength=count)

    own, keys = shares(routes.query_side, routes.query_grid), shares(routes.key_side, routes.key_grid)
    read = keys[np.array(routes.routes)].mean(axis=1)
    on, off = own > 0.5, own == 0
    return float(read[on].mean()) if on.any() else np.nan, float(read[off].mean()) if off.any() else np.nan


def measured(model: nn.Module) -> dict[str, float]:
    """What a network's routes and its class maps know of the object: means over test images and layers that choose."""
    items = [Shapes("easy", "test", SIDE)[i] for i in range(MEASURED)]
    masks = np.stack([item[2].numpy().astype(float) for item in items])
    rows = []
    for i, (image, label, _) in enumerate(items):
        x, other = normalise(image), np.delete(masks, i, axis=0).mean(axis=0)
        routes = [one for record in trace(model, x) if (one := record.region_routes()) is not None]
        routes = [one for one in routes if shows_routes(one)]
        found = class_map(model, x, label=label)
        of_routes = np.array([on_object(one, masks[i]) for one in routes]).mean(axis=0)
        rows.append((*of_routes, share_under(found, masks[i]), share_under(found, other)))
    return dict(zip(("on", "off", "own", "other"), np.nanmean(rows, axis=0).tolist(), strict=True))


@cache
def verdict() -> pd.DataFrame:
    """Do routes find the object, and which network's class maps do? All seeds, and random weights, of both models."""
    images = np.stack([Shapes("easy", "test", SIDE)[i][0].numpy() for i in range(MEASURED)])
    rows = []
    for name in NAMES:
        subjects = [load_subject(path(one)) for one in seeds_of(name)]
        for seed, subject in enumerate(subjects):
            rows.append(dict(model=name, network=f"seed {seed}", **measured(subject.model)))
        rows.append(dict(model=name, network="random weights", **measured(random_twin(subjects[0], 0, images))))
    return pd.DataFrame(rows)


def draw_verdict(found: pd.DataFrame) -> None:
    """Every network a dot: what its regions read, and where its class maps lie."""
    figure, (routes, maps) = panels(1, 1, height=4.2)
    colours = dict(zip(NAMES, (style.ORANGE, "#009E73"), strict=True))
    for ax, (x, y) in ((routes, ("off", "on")), (maps, ("other", "own"))):
        for (name, network), row in found.set_index(["model", "network"]).iterrows():
            trained = network != "random weights"
            look = dict(marker="o", color=colours[name]) if trained else dict(marker="X", color=style.GREY)
            label = name if network == "seed 0" else f"{name}, random weights" if not trained else None
            edge = colours[name] if not trained else style.INK
            ax.scatter(row[x], row[y], s=90, edgecolors=edge, linewidths=1.2, label=label, **look)
        most = 1.1 * found[[x, y]].to_numpy().max()
        ax.plot([0, most], [0, most], color=style.INK, linewidth=1)
        ax.set(xlim=(0, most), ylim=(0, most))
    routes.set(title="object in what a region reads", xlabel="regions off the object", ylabel="regions on the object")
    maps.set(title="share of the class map on the object", xlabel="on another image's mask", ylabel="on its own mask")
    routes.legend(framealpha=0.85, edgecolor="none")
    show(figure)


def in_words(found: pd.DataFrame) -> str:
    """What `verdict` measured, and what follows."""
    lines = [
        f"| `{row.model}`, {row.network} | {row.on:.0%} | {row.off:.0%} | {row.own:.0%} | {row.other:.0%} |"
        for row in found.itertuples()
    ]
    random = found.network == "random weights"
    trained, at_random = found[~random].groupby("model"), found[random].set_index("model")
    said = []
    for name in NAMES:
        on, off = (trained.get_group(name)[column] for column in ("on", "off"))
        apart, chance = on - off, at_random.loc[name, "on"] - at_random.loc[name, "off"]
        numbers = f"{on.mean():.0%} of what they read is object, against {off.mean():.0%}"
        if apart.min() > max(0.0, chance) or apart.max() < min(0.0, chance):
            way = "more" if apart.mean() > 0 else "**less**"
            found = f"read {way} of the object than regions off it: {numbers}"
        else:
            found = f"do not clearly read more or less of it than regions off it: {numbers}, and the seeds disagree"
        by_chance = f"With random weights the difference is {100 * chance:+.0f} points."
        said.append(f"In `{name}` regions on the object {found}. {by_chance}")
    ours, theirs = (trained.get_group(name)["own"] for name in reversed(NAMES))
    apart = ours.min() > theirs.max() or theirs.min() > ours.max()
    shares = f"{ours.mean():.0%} of its map lies on the object, {theirs.mean():.0%} of BiFormer's"
    if apart:
        order = "better" if ours.mean() > theirs.mean() else "worse"
        verdict = f"By these class maps DeBiFormer locates the object **{order}** than BiFormer in small"
    else:
        verdict = "By these class maps it is **undecided** which of the two locates the object better in small"
    seeds = f"means of {len(ours)} and {len(theirs)} seeds, which {'do not overlap' if apart else 'overlap'}"
    return "\n".join(
        [
            "| network | object in what regions on it read | ... regions off it | class map on the object | ... on "
            "another image's mask |",
            "| --- " * 5 + "|",
            *lines,
            "",
            f"{MEASURED} test images. {' '.join(said)}",
            "",
            f"**Verdict.** {verdict}: {shares} ({seeds}).",
        ]
    )


def library_layers(dim: int, heads: int, shape: tuple[int, int], **options) -> tuple[nn.Module, nn.Module]:
    """Sections 3 and 7: the library's BRA, and DBRA with an agent for 2 x 2 cells, with random weights, in float64."""
    torch.manual_seed(0)
    bra = BiLevelRoutingAttention(dim, heads, **options)
    dbra = DeformableBiLevelAttention(dim, heads, 1, shape, stride=2, **options)
    return tuple(layer.double().eval().requires_grad_(False) for layer in (bra, dbra))
