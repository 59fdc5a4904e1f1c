"""Random calls of the operations: small, uneven sizes, everything optional present in some and absent in others.

A case is a function of its named choices (sizes, options, layout) and of a seed for the numbers in its tensors. The
choices are made at random from that seed (`case`), by Hypothesis, which looks for the simplest case that fails
(`simplest`), or by whoever repeats a case by hand. In every list of choices the simplest comes first.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from inspect import Parameter
from random import Random

import torch
from torch import Tensor

from dynattn import core
from dynattn.verify.registry import OPERATIONS, known

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
        self.simplest: dict[str, object] = {}

    def one(self, name: str, *choices: object) -> object:
        """One of the choices, the simplest of which comes first."""
        self.simplest[name] = choices[0]
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


Call = tuple[dict[str, object], dict[str, object]]  # arguments by position, options by keyword: what a draw returns
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@dataclass(frozen=True, repr=False)
class Case:
    """One call of an operation: `arguments` by position, `options` by keyword.

    `seed` and `choices` are what `case` makes it of; a caller's own has the seed None. `simplest`: of every choice the
    simplest.
    """

    operation: str
    seed: int | None
    arguments: dict[str, object]
    options: dict[str, object]
    choices: dict[str, object] = field(default_factory=dict)
    simplest: dict[str, object] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, object]:
        """What the options stand for that are not given: `scale` None is d^-0.5 of the first argument."""
        options = OPERATIONS[self.operation].options
        found = {name: value for name, value in options.items() if value is not Parameter.empty}
        if "scale" in found and found["scale"] is None:
            found["scale"] = core.scale_or_default(None, next(iter(self.arguments.values())).shape[-1])
        return found

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
    known(operation)
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
    calls = OPERATIONS[operation].draw(draw)
    lay_out = LAYOUTS[draw.one("layout", *LAYOUTS)]
    arguments, options = (
        {name: lay_out(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for values in calls
    )
    return Case(operation, seed, arguments, options, draw.choices, draw.simplest)


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

    stays = booleans()
    lengths = [lists(none(), max_size=largest) for largest in range(MOST_CHOICES)]

    @composite
    def simpler(draw):
        seed = than.seed + len(draw(lengths[3]))
        return _drawn(than.operation, seed, lambda name, among: among[below(draw, name, among)], held)

    def below(draw, name, among):
        largest = among.index(than.choices[name]) if than.choices[name] in among else len(among) - 1
        if not largest:
            return 0
        if keep and (draw(stays) or draw(stays)):
            return largest
        return len(draw(lengths[largest]))

    return simpler()
