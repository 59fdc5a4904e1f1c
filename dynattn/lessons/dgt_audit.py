"""The pictures and proofs of the audit of DGT, `notebooks/audit/04_dgt.ipynb`."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import matplotlib.pyplot as plt
import numba
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

from dynattn import trace, weights
from dynattn.data import Shapes, normalise
from dynattn.figures import style
from dynattn.figures.measures import evaluate_groups, mutual_information
from dynattn.figures.subjects import Subject, load_subject, random_twin
from dynattn.figures.tables import summary
from dynattn.lessons.notebook import INKS, fastest  # noqa: F401  (the notebook times with it)

PALETTE = "#E69F00 #56B4E9 #009E73 #F0E442 #0072B2 #D55E00 #CC79A7 #882255".split()  # Okabe and Ito, and a red


def simulated_forms() -> ModuleType:
    """`kernels/cuda_forms.py` in numba's CUDA simulator; the first use of numba.cuda in a process."""
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")
    numba.config.reload_config()
    from dynattn.kernels import cuda_forms

    return cuda_forms


def images_of(level: str, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Test images of a level as networks take them (count, 3, size, size), and their labels."""
    items = [Shapes(level, "test", size)[index] for index in range(count)]
    return torch.stack([normalise(item[0]) for item in items]), torch.tensor([item[1] for item in items])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that a model labels right."""
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def accuracy_without(kind: type | None, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy when all layers of a kind put out zeros, so that only the identity beside them is left."""
    silenced = [module for module in model.modules() if kind is not None and isinstance(module, kind)]
    hooks = [module.register_forward_hook(lambda module, inputs, out: 0 * out) for module in silenced]
    found = accuracy(model, images, labels)
    for hook in hooks:
        hook.remove()
    return found


def turns(moves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Each reading of DGT-4: degrees that a centroid turns in each step, and the share of queries that change group."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.8), layout="constrained")
    for (name, both), colour in zip(moves.items(), INKS, strict=False):
        for ax, values in zip(axes, both, strict=True):
            ax.plot(range(1, len(values) + 1), values, "o-", color=colour, label=name)
    axes[0].set(yscale="log", title="mean turn of a centroid in one step, degrees", xlabel="step: one image each")
    axes[1].set(title="share of the image's queries that change group", xlabel="step", ylim=(-0.02, None))
    axes[0].legend()
    return figure


def time_constants(steps: int, lr: float, warmup: float, tau_per_lr: float = 0.1) -> float:
    """The sum of tau over a cosine schedule with warm-up: by how many factors of e the start is forgotten."""
    done = np.arange(steps) / steps
    schedule = lr * np.minimum(1, done / warmup if warmup else 1) * (1 + np.cos(np.pi * done)) / 2
    return float(tau_per_lr * schedule.sum())


# --------------------------------------------------------------------------------------------------- where groups lose

OTHERS = {"dense": "dense, another function", "masked": "dense under a mask", "tiles": "tiles of 32 queries (torch)"}


def losses(sizes: Sequence[int], ratios: Mapping[str, Sequence[float]], took: Mapping[int, Mapping]) -> Figure:
    """Time of the other ways over the kernel's, by tokens; time of each part over dense attention's, by stage."""
    figure, (ax, parts) = plt.subplots(1, 2, figsize=(14, 4.4), layout="constrained")
    for (other, values), colour in zip(ratios.items(), INKS, strict=False):
        ax.plot(sizes, values, "o-", color=colour, label=OTHERS[other])
    theory = "L / k: attention alone, were time multiply-adds"
    ax.plot(sizes, [L / 98 for L in sizes], ":", color=style.INK, label=theory)
    ax.axhline(1, color=style.INK, linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="tokens L, k = 98, G = 48", title="time of the other way / of the kernel")
    ax.set_xticks(sizes, sizes)
    ax.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    ax.minorticks_off()
    ax.legend()
    bottom = np.zeros(len(took))
    for name, colour in zip(("attention", "selection", "grouping"), INKS, strict=False):
        share = np.array([one[name] / one["dense"] for one in took.values()])
        parts.bar(list(took), share, bottom=bottom, color=colour, label=name, width=0.55)
        bottom += share
    parts.axhline(1, color=style.INK, linewidth=1)
    parts.annotate("dense attention", (0.6, 1), (0, 4), textcoords="offset points")
    parts.set(xticks=list(took), xlabel="stage of DGT-T at 224 × 224", title="time over dense attention's, forward")
    parts.legend()
    return figure


def halvings(liked: Tensor, steps: Sequence[tuple[float, float, int]], keys: int) -> Figure:
    """How much keys are liked, and the interval that holds the bound after each halving: (low, high, keys reached)."""
    low = steps[-1][0]
    figure, (ax, lower) = plt.subplots(
        2, 1, figsize=(12, 5.6), sharex=True, height_ratios=[1, 1.5], layout="constrained"
    )
    edges = np.linspace(float(liked.min()), float(liked.max()), 60)
    ax.hist(liked[liked < low].numpy(), bins=edges, color="#BBBBBB", label="not selected")
    ax.hist(liked[liked >= low].numpy(), bins=edges, color=style.ORANGE, label=f"the {keys} selected")
    ax.set(ylabel="keys", title=f"$e \\cdot x_K$ of all {len(liked)} keys, for one centroid")
    ax.legend()
    for i, (a, b, reached) in enumerate(steps):
        lower.hlines(i, a, max(b, a + 0.004), color=style.BLUE, linewidth=6)
        lower.annotate(f"{reached}", (a, i), (-6, -4), textcoords="offset points", ha="right", fontsize=9)
    lower.set(ylim=(len(steps) - 0.4, -0.8), xlabel="$e \\cdot x_K$", ylabel="step")
    lower.set_title("the interval that holds the bound; beside it, how many keys reach its lower end", fontsize=12)
    return figure


def accuracy_by_keys(factors: Sequence[float], accuracies: Sequence[float], count: int) -> Figure:
    """Accuracy on `count` images against the number of keys of a group."""
    figure, ax = plt.subplots(figsize=(8, 3.6), layout="constrained")
    share = [(count * a + 2) / (count + 4) for a in accuracies]  # Agresti and Coull: no bar of length zero
    bars = [math.sqrt(a * (1 - a) / (count + 4)) for a in share]
    ax.errorbar(factors, accuracies, bars, color=style.ORANGE, marker="o", capsize=4)
    ax.set(
        xscale="log", xlabel="keys of a group, as a multiple of those in training", ylabel="accuracy", ylim=(0, 1.02)
    )
    ax.set_xticks(factors, [f"{f:g}" if f >= 1 else f"1/{1 / f:g}" for f in factors])
    ax.minorticks_off()
    return figure


# ------------------------------------------------------------------------------------------------------ the four forms


class Form(NamedTuple):
    """One of the four forms with its factors, what a tile of its result reads of each, and where the tile is."""

    run: Callable[[Tensor, Tensor], Tensor]
    left: Tensor
    right: Tensor
    reads_left: Tensor
    reads_right: Tensor
    tile: tuple


def poisoned(x: Tensor, keep: Tensor) -> Tensor:
    """x with NaN wherever keep is false."""
    return torch.where(keep, x, math.nan).contiguous()


def prove(form: Form) -> int:
    """Assert that a tile is made of what is read, and of all of it; returns how many pieces were tried."""
    run, left, right, reads_left, reads_right, tile = form
    whole = run(left, right)[tile]
    assert torch.equal(run(poisoned(left, reads_left[None]), poisoned(right, reads_right[None]))[tile], whole)
    tried = 0
    for is_left, reads in ((True, reads_left), (False, reads_right)):
        for piece in reads.any(dim=1).nonzero()[:, 0]:  # a row at a time
            hole = torch.zeros_like(reads)
            hole[piece] = reads[piece]
            spoilt = [poisoned(x, ~hole[None]) if mine == is_left else x for x, mine in ((left, True), (right, False))]
            assert run(*spoilt)[tile].isnan().any()
            tried += 1
    return tried


def box(rows: Sequence[int] | Tensor, columns: range, shape: tuple[int, int]) -> Tensor:
    """A mask of some rows and neighbouring columns of a matrix."""
    found = torch.zeros(shape, dtype=torch.bool)
    found[torch.as_tensor(rows), columns.start : columns.stop] = True
    return found


def matrix(ax: Axes, reads: Tensor, colours: Callable[[int, int], list[str]], title: str, rows=(), columns=()) -> None:
    """A matrix as cells; a cell that is read has the colours of the groups that read it, side by side."""
    tall, wide = reads.shape
    for i, j in np.ndindex(tall, wide):
        cell = colours(i, j) if reads[i, j] else []
        ax.add_patch(plt.Rectangle((j, i), 1, 1, facecolor="#EEEEEE"))
        for part, colour in enumerate(cell):
            ax.add_patch(plt.Rectangle((j + part / len(cell), i), 1 / len(cell), 1, facecolor=colour, linewidth=0))
        ax.add_patch(plt.Rectangle((j, i), 1, 1, fill=False, edgecolor="white", linewidth=1.2))
    ax.set(xlim=(-0.1, wide + 0.1), ylim=(tall + 0.1, -0.1), title=title, aspect="equal")
    ax.set_xticks([x + 0.5 for x in range(len(columns))], columns, fontsize=10)
    ax.set_yticks([y + 0.5 for y in range(len(rows))], rows, fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def forms_picture(forms: Sequence[Form], picks: Tensor, row_group: Tensor, order: Tensor, T: int) -> Figure:
    """What a tile of each form reads and writes; rows 4 to 7 in forms 1 and 2, the first group in forms 3 and 4."""
    (L, n), (S, C) = forms[1].reads_left.shape, forms[0].reads_right.shape
    in_tile, numbers = sorted(set(row_group[4:8].tolist())), [str(int(o)) for o in order]
    of_row = lambda i, _: [INKS[int(row_group[i])]]  # noqa: E731
    first = lambda *_: [INKS[0]]  # noqa: E731

    def of_key(s: int, width: int) -> list[str]:
        return [INKS[j] for j in in_tile if s in picks[j, :width].tolist()]

    figure, axes = plt.subplots(4, 3, figsize=(13, 17), layout="constrained")
    one, two, three, four = forms
    tile = range(T)
    matrix(axes[0, 0], one.reads_left, of_row, "Form 1 reads rows of $X_Q'$", numbers)
    matrix(axes[0, 1], one.reads_right.T, lambda _, s: of_key(s, T), "and columns of $X_K^T$,", columns=range(S))
    matrix(axes[0, 2], box(range(4, 8), tile, (L, n)), of_row, "writes a tile of $P'$ (DGT-11, DGT-16)", numbers)
    matrix(axes[1, 0], two.reads_left, of_row, "Form 2 reads rows of $\\hat{P}'$", numbers)
    matrix(axes[1, 1], two.reads_right, lambda s, _: of_key(s, n), "and rows of $X_V$,", range(S))
    matrix(axes[1, 2], box(range(4, 8), tile, (L, C)), of_row, "writes a tile of $Y'$ (DGT-13, DGT-14)", numbers)
    to_keys = box(picks[0, :T], tile, (S, C))
    matrix(axes[2, 0], three.reads_left.T, first, "Form 3 reads columns of $X_Q'^T$", columns=numbers)
    matrix(axes[2, 1], three.reads_right, first, "and rows of $\\mathrm{Grad}_{P'}$,", numbers)
    matrix(axes[2, 2], to_keys.T, first, "adds to columns of $\\mathrm{Grad}_{K^T}$ (DGT-15)", columns=range(S))
    matrix(axes[3, 0], four.reads_left.T, first, "Form 4 reads columns of $\\hat{P}'^T$", columns=numbers)
    matrix(axes[3, 1], four.reads_right, first, "and rows of $\\mathrm{Grad}_{Y'}$,", numbers)
    matrix(axes[3, 2], to_keys, first, "adds to rows of $\\mathrm{Grad}_V$ (DGT-17)", range(S))
    return figure


# ------------------------------------------------------------------------------------------------------------- trained


def measure_groups(model: nn.Module, level: str, count: int, size: int) -> pd.DataFrame:
    """The summary of what `evaluate_groups` finds in a network, on the first `count` test images of a level."""
    items = [Shapes(level, "test", size)[index] for index in range(count)]
    images, masks = (np.stack([item[part].numpy() for item in items]) for part in (0, 2))
    return summary(evaluate_groups(model, images, masks, np.array([item[1] for item in items])))


def random_network(subject: Subject, level: str, count: int, size: int) -> nn.Module:
    """The same network with random weights, which has seen the images once."""
    return random_twin(subject, 0, np.stack([Shapes(level, "test", size)[index][0].numpy() for index in range(count)]))


def of_head(found: pd.DataFrame, layer: str, head: int) -> pd.DataFrame:
    """The measures of a head by their kind."""
    return found.xs((layer, head), level=("layer", "head"))


def all_heads(found: pd.DataFrame) -> float:
    """The mean of all heads' mutual information."""
    return float(found.value.xs("nmi", level="kind").mean())


def looks(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """(2, cells): whether a cell is lighter than the median cell of its image, and whether its pixels vary more."""
    grey = image.float().mean(dim=0)[None]
    light, square = (F.adaptive_avg_pool2d(x, shape).flatten() for x in (grey, grey.square()))
    return torch.stack([x > x.median() for x in (light, square - light.square())])


def known_of_looks(model: nn.Module, layer: str, head: int, level: str, indices: Sequence[int], size: int) -> Tensor:
    """(2,): what a head's groups know of light and dark, and of texture: mean NMI over test images."""
    found = []
    for index in indices:
        image = Shapes(level, "test", size)[index][0]
        record = trace(model, image)[layer]
        found.append(mutual_information(record.groups[head], looks(image, record.query_shape)))
    return torch.as_tensor(np.mean([np.asarray(one) for one in found], axis=0))


def reading_heads(found: pd.DataFrame) -> tuple[int, int, int]:
    """Heads in which the object reads the object, in which it reads the background, and neither (two errors)."""
    on, off = (found.xs(kind, level="kind") for kind in ("keys", "keys_off"))
    apart, margin = on.value - off.value, 2 * np.hypot(on.standard_error, off.standard_error)
    return int((apart > margin).sum()), int((apart < -margin).sum()), int((apart.abs() <= margin).sum())


def sweep() -> dict[str, list[float]]:
    """Accuracies of the shipped sweep over groups and keys, one for each seed, the full network first."""
    found = {}
    for name in weights.available():
        if name.startswith("dgt_sweep"):
            found.setdefault(name.split("_seed")[0], []).append(weights.read(weights.path(name))[1]["accuracy"])
    return dict(sorted(found.items(), key=lambda one: one[0] != "dgt_sweep_g8k64"))


def in_clutter(model: nn.Module, heads: Mapping[str, tuple[str, int]], count: int = 6) -> Figure:
    """The groups of some heads (layer, head) on cluttered images, and the outline of the object."""
    figure, axes = plt.subplots(1 + len(heads), count, figsize=(15, 2.6 * (1 + len(heads))), layout="constrained")
    for column, i in zip(axes.T, range(count), strict=True):
        sharp, _, mask = Shapes("cluttered", "test", 512)[i]
        records = trace(model, Shapes("cluttered", "test", 64)[i][0])
        for ax in column:
            style.photograph(ax, sharp.movedim(0, -1).numpy(), (64, 64), veil=0.0 if ax is column[0] else 0.35)
            style.outline(ax, mask.numpy(), (64, 64))
        for ax, (layer, m) in zip(column[1:], heads.values(), strict=True):
            record = records[layer]
            coloured = np.array([to_rgb(PALETTE[int(j) % 8]) for j in record.groups[m]])
            extent = (-0.5, 63.5, 63.5, -0.5)
            ax.imshow(coloured.reshape(*record.query_shape, 3), extent=extent, alpha=0.6, interpolation="nearest")
    for ax, name in zip(axes[:, 0], ("picture", *heads), strict=True):
        ax.set_ylabel(name)
    return figure


def cluttered_subjects() -> dict[str, Subject]:
    """The networks of both levels: trained on easy images, and in clutter."""
    return {
        "easy": load_subject(weights.path("dgt_sweep_g8k64")),
        "cluttered": load_subject(weights.path("dgt_cluttered")),
    }
