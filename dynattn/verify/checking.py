"""The oracle: a function and the loops on random cases, and the simplest case in which they part."""

import time
from collections.abc import Callable, Iterable
from typing import NoReturn

from dynattn import core
from dynattn.verify.cases import Case, case, simplest
from dynattn.verify.comparing import Answer, Difference, Stopped, answer_to, difference, expected, not_taken
from dynattn.verify.diagnosis import diagnose
from dynattn.verify.registry import known
from dynattn.verify.report import Mismatch

# The search for the simplest case ends after so many calls or seconds: a slow function is told what there is by then.
MOST_CALLS, MOST_SECONDS = 150, 10.0


def check(operation: str, function: Callable, *, cases: int = 20, seed: int = 0, shrink: bool = True) -> None:
    """Compare a function with the loops of an operation: `cases` random calls, outputs and every gradient.

    The function gets tensors and shapes by position in the order of `ops`, and by keyword those options that it takes
    (`scale=`, ...); an option that it does not take stays at its default in every case. Inputs are float64, of uneven
    sizes, in some cases not contiguous; the tolerance follows the dtype of the output: 1e-10 of the largest entry in
    float64. The same seed draws the same cases.
    Returns nothing; raises `Mismatch` for the first case that differs or, if it is to `shrink`, for the simplest that
    Hypothesis makes of it. What the function itself raises comes through, with a note of the case. ValueError,
    TypeError on wrong arguments.
    """
    known(operation)
    if not callable(function):
        raise TypeError(f"function: expected something to call, got {type(function).__name__}")
    core.positive("cases", cases)
    answers, held = lambda call: answer_to(call, function), not_taken(operation, function)
    check_answers(operation, answers, held=held, cases=cases, seed=seed, shrink=shrink)


def check_answers(
    operation: str, answers: Callable[[Case], Answer], *, held: frozenset[str], cases: int, seed: int, shrink: bool
) -> None:
    """As `check`, of whatever answers cases as `answer_to` does; options named in `held` stay at their defaults."""
    calls = [case(operation, number, held) for number in range(seed, seed + cases)]
    trial = _Trial(answers)
    try:
        worst = next(filter(trial.fails, calls), None) or next(filter(trial.fails_anywhere, calls), None)
        if worst is not None and shrink:
            worst = simplest(worst, trial.fails_anywhere, held)
    except Stopped:
        if not trial.failed:
            raise
        worst = next(filter(trial.fails, trial.failed), trial.failed[0])
    if worst is not None:
        _tell(worst, trial.found[worst.line], trial.answer, calls, held)


def compare(operation: str, function: Callable, *arguments: object, **options: object) -> None:
    """As `check`, on one call of your own: the arguments and options of the operation, without `impl`."""
    names = known(operation).arguments
    if len(names) != len(arguments):
        raise TypeError(f"arguments: expected {', '.join(names)}, got {len(arguments)}")
    call = Case(operation, None, dict(zip(names, arguments, strict=True)), options)
    answers = lambda call: answer_to(call, function)  # noqa: E731
    failure = _failure(call, answers)
    if failure is not None:
        _tell(call, failure, answers, [], frozenset())


class _Trial:
    """What a function answers in the cases of one check, and which are worth to go on with.

    It is asked once about each case, so that what answers at random cannot confuse the search.
    """

    def __init__(self, answers: Callable[[Case], Answer]):
        self.answers = answers
        self.given: dict[str, Answer] = {}
        self.found: dict[str, Difference | Exception | None] = {}
        self.failed: list[Case] = []
        self.kind: str | None = None  # of the first failure; then the search for a simpler case has an end
        self.most, self.latest = 0, 0.0

    def answer(self, call: Case) -> Answer:
        """The function's answer."""
        if call.line not in self.given:
            self.given[call.line] = self.answers(call)
        return self.given[call.line]

    def fails(self, call: Case) -> bool:
        """Whether a case fails as the first one did, where gradients do not count."""
        return self.fails_anywhere(call, without="gradient")

    def fails_anywhere(self, call: Case, without: str | None = None) -> bool:
        """Whether a case fails as the first one did."""
        if call.line not in self.found:
            if self.kind and (len(self.found) >= self.most or time.monotonic() > self.latest):
                return False
            self.found[call.line] = _failure(call, self.answer)
            self.failed += [call] if self.found[call.line] else []
        found = self.found[call.line]
        kind = "raises" if isinstance(found, Exception) else found and found[0]
        if kind is None or without and kind.startswith(without):
            return False
        if self.kind is None:
            self.kind, self.most, self.latest = kind, len(self.found) + MOST_CALLS, time.monotonic() + MOST_SECONDS
        return kind == self.kind


def _failure(call: Case, answers: Callable[[Case], Answer]) -> Difference | Exception | None:
    """How a call goes wrong: what is raised, or the first number that is off; None if all is right."""
    try:
        given = answers(call)
    except Exception as error:
        return error
    return difference(given, expected(call))


def _tell(
    call: Case,
    failure: Difference | Exception,
    answers: Callable[[Case], Answer],
    others: Iterable[Case],
    held: frozenset[str],
) -> NoReturn:
    """Raise what went wrong with a call; `others` are for telling mistakes apart."""
    if isinstance(failure, Exception):
        failure.add_note(f"in the case of {call}" + (f"\nagain: {call.line}" if call.seed is not None else ""))
        raise failure
    found = diagnose(answers, [call, *others], held, only_output=failure[0] == "output")
    raise Mismatch(call, *failure, found)
