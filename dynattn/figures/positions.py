"""How similar the learned positions of patches are: tiles, and how well similarity tells which patches are near.

Random weights have a table too, the one that training starts with: it knows no places.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor, nn

from . import style
from .drawing import with_twin
from .measures import roc_area
from .run import Drawing, Setting
from .subjects import RANDOM, Subject
from .tables import Measure

TILES = 10  # tiles on each side, at most
NEAR = 2  # cells: how far patches are at most that count as near


def position_table(model: nn.Module) -> Float[Tensor, "C h w"] | None:
    """The learned position of every patch: of our encoder, or of timm's ViT, whose rows in front have no place.

    None where there is no such table.
    """
    table = getattr(getattr(getattr(model, "encoder", None), "embed", None), "table", None)
    if table is not None:
        return table.detach()
    rows = getattr(model, "pos_embed", None)
    if not isinstance(rows, Tensor) or rows.ndim != 3:
        return None
    side = isqrt(rows.shape[1])
    return rows.detach()[0, -(side**2) :].T.reshape(-1, side, side)


def none_learned(subject: Subject) -> str:
    """Why there are no position embeddings of a model; empty where there are."""
    if position_table(subject.model) is not None:
        return ""
    return f"needs a model with a table of absolute positions; {subject.name} has none"


def similarity(table: Float[Tensor, "C h w"]) -> Float[Tensor, "N N"]:
    """The cosine between the positions of every two patches."""
    unit = torch.nn.functional.normalize(table.flatten(1).double(), dim=0)
    return unit.mT @ unit


def distances(shape: tuple[int, int]) -> Float[Tensor, "N N"]:
    """How many cells every two patches are apart, in a straight line."""
    cells = torch.cartesian_prod(*(torch.arange(n) for n in shape)).double()
    return torch.cdist(cells, cells)


def nearest_found(cosine: Float[Tensor, "N N"], apart: Float[Tensor, "N N"]) -> float:
    """The share of patches whose most similar other patch touches them."""
    best = cosine.clone().fill_diagonal_(-2).argmax(dim=1)
    return float((apart[torch.arange(len(best)), best] < 1.5).double().mean())


def near_found(cosine: Float[Tensor, "N N"], apart: Float[Tensor, "N N"]) -> float:
    """How often a patch at most `NEAR` cells away is more similar than one farther away: AUC, mean over patches."""
    areas = []
    for i in range(len(cosine)):
        other = torch.arange(len(cosine)) != i
        areas.append(roc_area(cosine[i, other], (apart[i, other] <= NEAR)[None]))
    return float(torch.cat(areas).nanmean())


def tiles(setting: Setting, title: str) -> Drawing:
    """Figure 10: how similar the position embeddings of all patches are, as tiles; and by distance."""
    tables = {network: position_table(model) for network, model in with_twin(setting).items()}
    shape = tuple(tables["trained"].shape[1:])
    cosines, apart = {network: similarity(table) for network, table in tables.items()}, distances(shape)
    count = shape[0] * shape[1]
    measures = []
    for name, measure in (
        ("most similar other patch touches it", nearest_found),
        (f"similarity finds patches within {NEAR} cells (AUC)", near_found),
    ):
        values = {network: measure(cosine, apart) for network, cosine in cosines.items()}
        measures.append(Measure(name, values["trained"], {RANDOM: values[RANDOM]}, count))
    touching = float(((apart > 0) & (apart < 1.5)).double().sum() / (count * (count - 1)))
    step = -(-max(shape) // TILES)
    story, (H, W) = setting.subject.story, setting.subject.size
    some = f", of every {step}th patch in both directions" if step > 1 else ""
    caption = (
        f"Each tile is of one patch: the cosine between its position embedding and those of all {count} patches{some}. "
        "Random: the table as training starts. Convolutions in a network mix neighbours too; SETR itself has none. "
        "Below: mean over all pairs of patches that are so many cells apart; the "
        f"farthest are the corners alone. By chance the most similar other patch touches in {touching:.2f}, and the "
        f"AUC is 0.5. Measures: means over {count} patches; no image is needed. "
        f"Weights: {story['file']} at {H} × {W}; random weights: seed {setting.seed}."
    )
    labels = [f"trained: {setting.subject.name}", RANDOM]
    sheet = style.sheet(1, 2, title, caption, measures, column_labels=labels, plots=1, gap=0.45)
    low = min(float(cosine.min()) for cosine in cosines.values())
    for ax, cosine in zip(sheet.panels[0], cosines.values(), strict=True):
        style.tiles(ax, cosine.reshape(*shape, *shape)[step // 2 :: step, step // 2 :: step].numpy(), low)
    plot_by_distance(sheet.plots[0], cosines, apart)
    style.scale(sheet, style.VIRIDIS, [f"{low:.1f}", "1"], "cosine", left=5.3)
    return Drawing(sheet.figure, caption, [], measures, [story])


def plot_by_distance(ax: Axes, cosines: Mapping[str, Tensor], apart: Float[Tensor, "N N"]) -> None:
    """Mean cosine over the distance, in whole cells, of each network."""
    cells = apart.round().long()
    at = range(1, int(cells.max()) + 1)
    looks = dict(trained=dict(color=style.ORANGE, mec=style.INK), random=dict(color=style.PAPER, mec=style.INK))
    for (network, cosine), look in zip(cosines.items(), looks.values(), strict=True):
        ax.plot(at, [float(cosine[cells == d].mean()) for d in at], marker="o", ms=7, linestyle="none", **look)
        ax.lines[-1].set_label(network)
    ax.axhline(0, color=style.GREY, linewidth=0.8, zorder=0)
    ax.set_xlim(0.4, at[-1] + 0.6)
    ax.set_xticks(at, [f"{d} cells apart" if d == at[-1] else str(d) for d in at])
    ax.set_ylabel("cosine", fontsize=style.LABEL - 1, color=style.INK)
    ax.legend(fontsize=style.SMALL + 1, frameon=False, loc="upper right", handletextpad=0.2)
