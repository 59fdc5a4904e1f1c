"""Which mistakes explain a wrong answer: one of the catalogue, two together, or one in this case only."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import permutations

from dynattn.verify.cases import Case, case
from dynattn.verify.comparing import Answer, Stopped, answer_to, difference, expected
from dynattn.verify.registry import OPERATIONS

MORE_CASES = 8  # that must be right too before a function is said to be right with a choice
FIRST_SEED = 10_000  # of these cases


@dataclass(frozen=True)
class Diagnosis:
    """What explains a wrong answer.

    mistakes: names that give the same answer in every case. pairs: two mistakes that do so together, looked for where
    no single one does. here: names that give the same answer in the case that is shown, but not in others.
    right: (name, value) of choices with which the function is right in every case that was tried.
    """

    mistakes: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    here: list[str] = field(default_factory=list)
    right: list[tuple[str, object]] = field(default_factory=list)


def diagnose(
    answers: Callable[[Case], Answer], calls: list[Case], held: frozenset[str], only_output: bool
) -> Diagnosis:
    """What explains the answers to calls, the first of which went wrong. only_output: gradients do not count."""
    where = ["output"] if only_output else None
    given: list[tuple[Case, Answer]] = []
    for call in calls:
        with suppress(Exception, Stopped):  # it fails there in a way of its own, which tells nothing
            given.append((call, answers(call)))
    catalogue = OPERATIONS[calls[0].operation].mistakes

    def fits(mistake: Callable, pairs: list[tuple[Case, Answer]]) -> bool:
        """Whether a mistake gives these answers."""
        try:
            return all(difference(own, answer_to(call, mistake), where) is None for call, own in pairs)
        except Exception:  # two mistakes need not fit together
            return False

    here = [name for name, mistake in catalogue.items() if fits(mistake, given[:1])]
    mistakes = [name for name in here if fits(catalogue[name], given[1:])]
    if mistakes:
        return Diagnosis(mistakes)
    right = right_where(answers, calls, held)
    pairs = [names for names, both in together(catalogue) if fits(both, given[:1]) and fits(both, given[1:])]
    return Diagnosis([], pairs, here, right)


def together(catalogue: dict[str, Callable]) -> Iterator[tuple[tuple[str, str], Callable]]:
    """Two mistakes at once, wherever one of them can be made around another: their names, and what they compute."""
    seen = set()
    for outer, inner in permutations(catalogue, 2):
        around = getattr(catalogue[outer], "around", None)
        if around is not None and frozenset((outer, inner)) not in seen:
            seen.add(frozenset((outer, inner)))
            yield (outer, inner), around(catalogue[inner])


def right_where(answers: Callable[[Case], Answer], calls: list[Case], held: frozenset[str]) -> list[tuple[str, object]]:
    """The simplest choices, by name and value, with which every case is right: those drawn, and some more."""

    def right(call: Case) -> bool:
        try:
            return difference(answers(call), expected(call)) is None
        except (Exception, Stopped):
            return False

    drawn = [call for call in calls[1:] if call.seed is not None]
    is_right = {call.line: right(call) for call in drawn}
    found = []
    for name, value in (drawn[0].simplest if drawn else {}).items():
        chosen = [call for call in drawn if name in call.choices and call.choices[name] == value]
        if name == "numbers" or not chosen or not all(is_right[call.line] for call in chosen):
            continue
        more = []
        for seed in range(FIRST_SEED, FIRST_SEED + MORE_CASES):
            with suppress(ValueError):  # of choices that do not fit together
                more.append(case(drawn[0].operation, seed, held, **{name: value}))
        if more and all(map(right, more)):
            found.append((name, value))
    return found
