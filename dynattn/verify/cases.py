"""Random calls of the operations: small, uneven sizes, everything optional present in some and absent in others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from random import Random

import torch
from torch import Tensor

from dynattn import core, ops


class Draw:
    """Random sizes and float64 tensors, all from one seed."""

    def __init__(self, seed: int):
        self.random, self.generator = Random(seed), torch.Generator().manual_seed(seed)

    def size(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return self.random.randint(low, high)

    def one(self, *choices: object) -> object:
        """One of the choices."""
        return self.random.choice(choices)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def points(self, *shape: int) -> Tensor:
        """Normalised positions (*shape, 2), on the map and somewhat beyond: uniform in [-1.4, 1.4]."""
        return torch.rand(*shape, 2, generator=self.generator, dtype=torch.float64) * 2.8 - 1.4

    def scale(self) -> dict[str, float]:
        """`scale` as an option, in half of the cases."""
        return self.one({}, {"scale": round(self.random.uniform(0.3, 2.0), 2)})


Call = tuple[dict[str, object], dict[str, object]]  # arguments by position, options by keyword


def _sample_points(draw: Draw) -> Call:
    B, C, H, W = draw.size(1, 2), draw.size(1, 3), draw.size(1, 5), draw.size(1, 5)
    return {"x": draw.normal(B, C, H, W), "points": draw.points(B, draw.size(1, 6))}, {}


def _dense_attention(draw: Draw) -> Call:
    B, h, L, N, d = draw.size(1, 2), draw.size(1, 3), draw.size(1, 5), draw.size(1, 5), draw.size(1, 4)
    arguments = {"q": draw.normal(B, h, L, d), "k": draw.normal(B, h, N, d), "v": draw.normal(B, h, N, d)}
    bias = draw.one({}, {"bias": draw.normal(h, L, N)}, {"bias": draw.normal(h, L, N)})
    return arguments, bias | draw.scale()


def _window_attention(draw: Draw) -> Call:
    B, h, d, shape = draw.size(1, 2), draw.size(1, 2), draw.size(1, 3), (draw.size(1, 6), draw.one(1, 2, 3, 3, 5, 6))
    window = draw.one(1, 2, 2, 3, 3), draw.one(1, 2, 2, 3, 3)
    arguments = {name: draw.normal(B, h, shape[0] * shape[1], d) for name in "qkv"}
    table = draw.normal(h, 2 * window[0] - 1, 2 * window[1] - 1)
    arguments |= {"table": draw.one(None, table, table, table), "query_shape": shape}
    shift = draw.one({}, *3 * [{"shift": tuple(draw.size(0, w - 1) for w in window)}])
    return arguments, {"window": window} | shift | draw.scale()


def _deformable_attention(draw: Draw) -> Call:
    h, g = draw.one((1, 1), (2, 1), (2, 2), (4, 2))
    B = 1 if h > 2 else draw.size(1, 2)
    d, N, shape = draw.size(1, 3), draw.size(1, 4), (draw.size(1, 3), draw.size(1, 3))
    table = draw.one((2 * shape[0] - 1, 2 * shape[1] - 1), (draw.size(1, 5), draw.size(1, 5)))
    arguments = {
        "q": draw.normal(B, h, shape[0] * shape[1], d),
        "k": draw.normal(B, h, N, d),
        "v": draw.normal(B, h, N, d),
        "points": draw.points(B, g, N),
        "table": draw.one(None, *4 * [draw.normal(h, *table)]),
        "query_shape": shape,
    }
    return arguments, draw.one({}, {"query_grid": "corner"}) | draw.scale()


def _detr_attention(draw: Draw) -> Call:
    B, h, d, H, W = draw.size(1, 2), draw.size(1, 2), draw.size(1, 2), draw.size(1, 4), draw.size(1, 4)
    L, K = draw.size(1, 4), draw.size(1, 4)
    v, points, weights = draw.normal(B, h, d, H, W), draw.points(B, h, L, K), draw.normal(B, h, L, K)
    return {"v": v, "points": points, "weights": weights.softmax(dim=-1)}, {}


OPERATIONS: dict[str, tuple[Callable, Callable[[Draw], Call]]] = {
    "sample_points": (ops.sample_points, _sample_points),
    "dense_attention": (ops.dense_attention, _dense_attention),
    "window_attention": (ops.window_attention, _window_attention),
    "deformable_attention": (ops.deformable_attention, _deformable_attention),
    "detr_attention": (ops.detr_attention, _detr_attention),
}


@dataclass(frozen=True)
class Case:
    """One call of an operation: `arguments` by position, `options` by keyword. `seed` is None for a caller's own."""

    operation: str
    seed: int | None
    arguments: dict[str, object]
    options: dict[str, object]

    @property
    def defaults(self) -> dict[str, object]:
        """What the options stand for that are not given."""
        d = next(iter(self.arguments.values())).shape[-1]
        every = {"bias": None, "shift": (0, 0), "query_grid": "centre", "scale": d**-0.5}
        known = signature(OPERATIONS[self.operation][0]).parameters
        return {name: value for name, value in every.items() if name in known}

    def __str__(self) -> str:
        given = self.arguments | self.options
        shown = (f"{name} {tuple(t.shape) if isinstance(t, Tensor) else t}" for name, t in given.items())
        return f"{'' if self.seed is None else f'seed {self.seed}: '}{', '.join(shown)}"


@lru_cache(maxsize=1000)
def case(operation: str, seed: int, without: frozenset[str] = frozenset()) -> Case:
    """The case of a seed; options named in `without` stay at their defaults.

    Raises ValueError for an operation that is not known.
    """
    core.one_of("operation", operation, tuple(OPERATIONS))
    arguments, options = OPERATIONS[operation][1](Draw(seed))
    return Case(operation, seed, arguments, {name: value for name, value in options.items() if name not in without})
