"""Random calls of the operations: small, uneven sizes, everything optional present in some and absent in others.

A case is a function of its named choices (sizes, options, layout) and of a seed for the numbers in its tensors. The
choices are made at random from that seed (`case`), by Hypothesis, which looks for the simplest case that fails
(`simplest`), or by whoever repeats a case by hand. In every list of choices the simplest comes first.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from inspect import signature
from random import Random

import torch
from torch import Tensor

from dynattn import core, ops

MOST_CHOICES = 10  # of one thing
SHOWN = 8  # tensors with at most so many numbers are printed in full


class Draw:
    """The choices of one case, and float64 tensors.

    choose(name, choices) makes a choice; one that `held` names is not made: it is the first, the option's default.
    """

    def __init__(self, seed: int, choose: Callable[[str, Sequence], object], held: frozenset[str] = frozenset()):
        self.generator = torch.Generator().manual_seed(seed)
        self.choose, self.held = choose, held
        self.choices: dict[str, object] = {}

    def one(self, name: str, *choices: object) -> object:
        """One of the choices, the simplest of which comes first."""
        self.choices[name] = choices[0] if name in self.held else self.choose(name, choices)
        return self.choices[name]

    def sizes(self, **largest: int) -> tuple[int, ...]:
        """Whole numbers from 1 to the largest."""
        return tuple(self.one(name, *range(1, n + 1)) for name, n in largest.items())

    def scale(self) -> dict[str, float]:
        """`scale` as an option, absent in half of the cases."""
        scale = self.one("scale", None, 1.7, None, 0.4)
        return {} if scale is None else {"scale": scale}

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, in some cases rounded."""
        numbers = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return numbers.round() + 0.0 if self.whole else numbers  # -0.0 becomes 0.0

    def points(self, *shape: int) -> Tensor:
        """Normalised positions (*shape, 2), on the map and somewhat beyond: uniform in [-1.4, 1.4].

        Rounded ones are odd twentieths, which lie on no cell of a small map: there the gradient jumps.
        """
        points = torch.rand(*shape, 2, generator=self.generator, dtype=torch.float64) * 2.8 - 1.4
        return (2 * (10 * points).floor() + 1) / 20 if self.whole else points

    @property
    def whole(self) -> bool:
        """Whether this case has round numbers."""
        if "numbers" not in self.choices:
            self.one("numbers", "round", "any", "any", "any")
        return self.choices["numbers"] == "round"


Call = tuple[dict[str, object], dict[str, object]]  # arguments by position, options by keyword


def _sample_points(draw: Draw) -> Call:
    B, C, H, W, N = draw.sizes(B=2, C=3, H=5, W=5, N=6)
    return {"x": draw.normal(B, C, H, W), "points": draw.points(B, N)}, {}


def _dense_attention(draw: Draw) -> Call:
    B, h, L, N, d = draw.sizes(B=2, h=3, L=5, N=5, d=4)
    has_bias, scale = draw.one("bias", False, True, True), draw.scale()
    arguments = {"q": draw.normal(B, h, L, d), "k": draw.normal(B, h, N, d), "v": draw.normal(B, h, N, d)}
    return arguments, ({"bias": draw.normal(h, L, N)} if has_bias else {}) | scale


def _window_attention(draw: Draw) -> Call:
    B, h, d, H = draw.sizes(B=2, h=2, d=3, H=6)
    shape = H, draw.one("W", 1, 2, 3, 3, 5, 6)
    window = draw.one("wi", 1, 2, 2, 3, 3), draw.one("wj", 1, 2, 2, 3, 3)
    shift = draw.one("shift", *((i, j) for i in range(window[0]) for j in range(window[1])))
    has_table, scale = draw.one("table", False, True, True, True), draw.scale()
    arguments = {name: draw.normal(B, h, shape[0] * shape[1], d) for name in "qkv"}
    table = draw.normal(h, 2 * window[0] - 1, 2 * window[1] - 1) if has_table else None
    arguments |= {"table": table, "query_shape": shape}
    return arguments, {"window": window} | ({} if shift == (0, 0) else {"shift": shift}) | scale


def _deformable_attention(draw: Draw) -> Call:
    h = draw.one("h", 1, 2, 2, 4)
    g = draw.one("g", *range(1, min(h, 2) + 1))
    B, d, N, H, W = draw.sizes(B=1 if h > 2 else 2, d=3, N=4, H=3, W=3)
    own = 2 * H - 1, 2 * W - 1
    table = draw.one("table", None, own, (1, 1), own, (2, 5), own, (4, 3), own, (5, 1))
    grid, scale = draw.one("query_grid", "centre", "corner"), draw.scale()
    arguments = {
        "q": draw.normal(B, h, H * W, d),
        "k": draw.normal(B, h, N, d),
        "v": draw.normal(B, h, N, d),
        "points": draw.points(B, g, N),
        "table": None if table is None else draw.normal(h, *table),
        "query_shape": (H, W),
    }
    return arguments, ({} if grid == "centre" else {"query_grid": grid}) | scale


def _detr_attention(draw: Draw) -> Call:
    B, h, d, H, W, L, K = draw.sizes(B=2, h=2, d=2, H=4, W=4, L=4, K=4)
    v, points, weights = draw.normal(B, h, d, H, W), draw.points(B, h, L, K), draw.normal(B, h, L, K)
    return {"v": v, "points": points, "weights": weights.softmax(dim=-1)}, {}


def _grouped_attention(draw: Draw) -> Call:
    B, h, d, L, S, G = draw.sizes(B=2, h=2, d=3, L=7, S=5, G=4)
    n, scale = draw.one("n", *range(1, S + 1)), draw.scale()
    if n > S:
        raise ValueError(f"n: expected at most S = {S}, got {n}")
    arguments = {"q": draw.normal(B, h, L, d), "k": draw.normal(B, h, S, d), "v": draw.normal(B, h, S, d)}
    in_turn = (-1 - torch.arange(L)).expand(B, h, L) % G
    at_random = torch.randint(G, (B, h, L), generator=draw.generator)  # uneven: some empty, some of one query
    grouping = draw.one("grouping", "in turn", "at random", "at random", "at random")
    groups = at_random if grouping == "at random" else in_turn.contiguous()
    selected = torch.rand(B, h, G, S, generator=draw.generator).argsort()[..., :n]  # in any order
    return arguments | {"groups": groups, "selected": selected}, scale


def _routed_attention(draw: Draw) -> Call:
    B, h, d, Tq, Tk = draw.sizes(B=2, h=2, d=3, Tq=3, Tk=3)
    R, S = draw.one("R", 1, 2, 3, 3), draw.one("S", 1, 2, 3, 4, 4, 5)
    n = draw.one("n", *range(1, S + 1))
    if n > S:
        raise ValueError(f"n: expected at most S = {S}, got {n}")
    has_mask, scale = draw.one("key_mask", False, True, True), draw.scale()
    arguments = {"q": draw.normal(B, h, R, Tq, d), "k": draw.normal(B, h, S, Tk, d), "v": draw.normal(B, h, S, Tk, d)}
    routes = torch.rand(B, R, S, generator=draw.generator).argsort()[..., :n]  # in any order
    regions = torch.rand(B, S, generator=draw.generator) < 0.7  # some are hidden as a whole, and some of their tokens
    mask = regions[..., None] & (torch.rand(B, S, Tk, generator=draw.generator) < 0.7)
    some = torch.randint(Tk, (B, S, 1), generator=draw.generator) == torch.arange(Tk)
    mask |= some & torch.zeros(B, S, dtype=torch.bool).scatter(1, routes[..., 0], True)[..., None]  # none reads nothing
    return arguments | {"routes": routes}, ({"key_mask": mask} if has_mask else {}) | scale


OPERATIONS: dict[str, tuple[Callable, Callable[[Draw], Call]]] = {
    "sample_points": (ops.sample_points, _sample_points),
    "dense_attention": (ops.dense_attention, _dense_attention),
    "window_attention": (ops.window_attention, _window_attention),
    "deformable_attention": (ops.deformable_attention, _deformable_attention),
    "detr_attention": (ops.detr_attention, _detr_attention),
    "grouped_attention": (ops.grouped_attention, _grouped_attention),
    "routed_attention": (ops.routed_attention, _routed_attention),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@dataclass(frozen=True, repr=False)
class Case:
    """One call of an operation: `arguments` by position, `options` by keyword.

    `seed` and `choices` are what `case` makes it of; a caller's own has the seed None.
    """

    operation: str
    seed: int | None
    arguments: dict[str, object]
    options: dict[str, object]
    choices: dict[str, object] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, object]:
        """What the options stand for that are not given."""
        d = next(iter(self.arguments.values())).shape[-1]
        every = {"bias": None, "shift": (0, 0), "query_grid": "centre", "key_mask": None, "scale": d**-0.5}
        known = signature(OPERATIONS[self.operation][0]).parameters
        return {name: value for name, value in every.items() if name in known}

    @property
    def line(self) -> str:
        """Python that makes it again."""
        choices = "".join(f", {name}={value!r}" for name, value in self.choices.items())
        return f'verify.case("{self.operation}", {self.seed}{choices})'

    def __repr__(self) -> str:
        return self.line if self.seed is not None else f"Case({self.operation!r}, {self})"

    def __str__(self) -> str:
        given = self.arguments | self.options
        return ", ".join(f"{name} {shown(value)}" for name, value in given.items())


def shown(value: object) -> str:
    """A tensor as its shape, with its numbers if they are few and its strides if they are odd; the rest as it is."""
    if not isinstance(value, Tensor):
        return str(value)
    text = str(tuple(value.shape))
    if value.numel() <= SHOWN:
        text += f" = {_rounded(value.tolist())}".replace("'", "")
    return text if value.is_contiguous() else f"{text} with strides {value.stride()}"


def _rounded(numbers: list | float) -> list | str:
    return [_rounded(part) for part in numbers] if isinstance(numbers, list) else f"{numbers:.4g}"


@lru_cache(maxsize=1000)
def case(operation: str, seed: int, held: frozenset[str] = frozenset(), **choices: Hashable) -> Case:
    """The case of a seed; options named in `held` stay at their defaults, `choices` are made as they are given.

    Raises ValueError for an operation or a choice that is not known.
    """
    core.one_of("operation", operation, tuple(OPERATIONS))
    drawn = _drawn(operation, seed, partial(_choose, Random(seed), choices), held)
    for name in choices:
        core.one_of("choices", name, tuple(drawn.choices))
    return drawn


def _choose(random: Random, given: Mapping[str, Hashable], name: str, among: Sequence) -> object:
    """The choice that is given, else any. Of sizes any can be given, of other things one of those there are."""
    if name not in given:
        return random.choice(among)
    if type(among[0]) is int:
        return core.positive(name, given[name])
    core.one_of(name, given[name], tuple(dict.fromkeys(among)))
    return given[name]


def _drawn(operation: str, seed: int, choose: Callable[[str, Sequence], object], held: frozenset[str]) -> Case:
    """A case whose choices `choose` makes."""
    draw = Draw(seed, choose, held)
    calls = OPERATIONS[operation][1](draw)
    lay_out = LAYOUTS[draw.one("layout", *LAYOUTS)]
    arguments, options = (
        {name: lay_out(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for values in calls
    )
    return Case(operation, seed, arguments, options, draw.choices)


def simplest(failing: Case, fails: Callable[[Case], bool], held: frozenset[str]) -> Case:
    """The simplest case that fails among those with no choice beyond that of `failing`, by Hypothesis.

    First it may keep each choice as it is, so that enough of what is drawn fails; then it looks closely at the rest.
    """
    from hypothesis import HealthCheck, Phase, Verbosity, errors, find, settings

    quiet = settings(
        max_examples=100,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    for keep in (True, False):
        with suppress(errors.NoSuchExample):
            failing = find(_simpler(failing, keep, held), fails, settings=quiet, random=Random(failing.seed))
    return failing


def _simpler(than: Case, keep: bool, held: frozenset[str]):
    """Hypothesis' strategy for cases with no choice beyond, and a few seeds; with `keep`, most choices are the same.

    Choices are drawn as booleans and as lengths of lists. Whole numbers Hypothesis draws with an eye on the constants
    of all modules that are loaded, so that the search would depend on them, and keeps those in a folder.
    """
    from hypothesis.strategies import booleans, composite, lists, none

    kept = booleans()
    lengths = [lists(none(), max_size=largest) for largest in range(MOST_CHOICES)]

    @composite
    def simpler(draw):
        seed = than.seed + len(draw(lengths[3]))
        return _drawn(than.operation, seed, lambda name, among: among[below(draw, name, among)], held)

    def below(draw, name, among):
        largest = among.index(than.choices[name]) if than.choices[name] in among else len(among) - 1
        if not largest:
            return 0
        if keep and (draw(kept) or draw(kept)):
            return largest
        return len(draw(lengths[largest]))

    return simpler()
