"""The pictures and proofs of the audit of SG-Former, `notebooks/audit/03_sgformer.ipynb`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import dynattn
from dynattn import verify
from dynattn.figures import style
from dynattn.lessons.notebook import INKS, panels
from dynattn.mechanisms.dense import DenseAttention
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention
from dynattn.mechanisms.self_guided import SelfGuidedAttention
from dynattn.mechanisms.window import WindowAttention

RATES = ((196, 56, 56, 28), (49, 14, 14, 7), (2, 1))  # of Table 1


def stage(number: int) -> tuple[int, int, dict[str, nn.Module]]:
    """Side of the map, channels, and the attention layers of a stage (from 1) of SG-Former-S, beside two others."""
    side, C, heads, s = 112 // 2**number, 32 * 2**number, 2**number, 2 ** (4 - number)
    layers = {
        "dense attention": DenseAttention(C, heads),
        "windows of 7 × 7": WindowAttention(C, heads, 7),
        "hybrid-scale": HybridScaleAttention(C, heads, (s, 1)),
        "self-guided": SelfGuidedAttention(C, heads, RATES[number - 1], parts=2),
    }
    return side, C, {name: layer.eval().requires_grad_(False) for name, layer in layers.items()}


def on_meta(name: str, **options) -> nn.Module:
    """A model without numbers: to be counted."""
    with torch.device("meta"):
        return dynattn.create_model(name, **options)


def costs(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Of each stage and layer: multiply-adds (pale) and time, both over those of windows."""
    figure, axes = panels(*[1] * len(found), height=3.8)
    for ax, (title, layers) in zip(axes, found.items(), strict=True):
        windows = layers["windows of 7 × 7"]
        for i, both in enumerate(layers.values()):
            for j, (value, unit) in enumerate(zip(both, windows, strict=True)):
                ax.bar(i + 0.38 * (j - 0.5), value / unit, 0.36, color=INKS[i], alpha=(0.45, 1.0)[j])
        ax.axhline(1, color=style.INK, linewidth=1)
        names = [name.replace(" of", "\nof").replace(" attention", "").replace("-", "-\n") for name in layers]
        ax.set_xticks(range(len(layers)), names)
        ax.set(title=title, yscale="log")
        ax.minorticks_off()
        values = [value / unit for both in layers.values() for value, unit in zip(both, windows, strict=True)]
        ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20) if min(values) / 1.5 < tick < 1.5 * max(values)]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_ylim(min(values) / 1.5, 1.5 * max(values))
    axes[0].set_ylabel("over windows'")
    return figure


def found(operation: str) -> str:
    """Every mistake that `verify` knows of an operation, in words. Raises AssertionError for one that it overlooks."""
    mistakes = verify.registry.known(operation).mistakes
    for mistake, wrong in mistakes.items():
        try:
            verify.check(operation, wrong)
        except verify.Mismatch:
            continue
        raise AssertionError(f"{operation}: {mistake} is overlooked")
    return f"`{operation}`, {len(mistakes)} mistakes, all found: {'; '.join(mistakes)}."


@contextmanager
def misguided(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, every self-guided layer reads a changed significance."""
    guided = [module for module in model.modules() if isinstance(module, SelfGuidedAttention)]
    handles = [
        module.register_forward_pre_hook(lambda module, given: (given[0], change(given[1]))) for module in guided
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
