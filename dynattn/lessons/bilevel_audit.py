"""The pictures and proofs of the audit of BiFormer and DeBiFormer, `notebooks/audit/02_bilevel.ipynb`."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from dynattn.lessons.notebook import INKS, panels
from dynattn.mechanisms.bilevel import BiLevelRoutingAttention
from dynattn.mechanisms.deformable_bilevel import DeformableBiLevelAttention
from dynattn.mechanisms.dense import DenseAttention
from dynattn.mechanisms.window import WindowAttention


def stage(number: int) -> tuple[int, int, dict[str, nn.Module]]:
    """Side of the map, channels, and the attention layers of a stage (from 1) of DeBiFormer-T, beside two others."""
    side, C, heads = 112 // 2**number, 32 * 2**number, 2**number
    agents = dict(stride=(8, 4, 2)[number - 1], kernel=(9, 7, 5)[number - 1], topk=(4, 8, 16)[number - 1])
    layers = {
        "dense attention": DenseAttention(C, heads),
        "windows of 7 × 7": WindowAttention(C, heads, 7),
        "BRA": BiLevelRoutingAttention(C, heads, topk=(1, 4, 16)[number - 1]),
        "DBRA": DeformableBiLevelAttention(C, heads, 2 ** (number - 1), (side, side), **agents),
    }
    return side, C, {name: layer.eval().requires_grad_(False) for name, layer in layers.items()}


def sizes(x: Sequence[float], lines: Mapping[str, Sequence[float]], title: str, across: str) -> Figure:
    """Lines over logarithmic axes."""
    figure, (ax,) = panels(1, height=4.0, width=8.0)
    for (name, values), colour in zip(lines.items(), INKS, strict=False):
        ax.plot(x, values, "o-", color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel=across, title=title)
    ax.set_xticks(x, x)
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def one_query(count: int, q: Tensor, step: Tensor, at: int) -> Iterator[tuple[float, Tensor]]:
    """q with one of its rows moved along a line, at `count` places from 0 to 1."""
    for share in np.linspace(0, 1, count):
        moved = q.clone()
        moved[:, :, at] = moved[:, :, at] + share * step
        yield float(share), moved
