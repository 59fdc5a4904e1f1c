"""The equivalence oracle: does a function compute what the paper's loops compute, outputs and every gradient?

    from dynattn import verify
    verify.check("sample_points", my_function)

`check` runs the function and the loops on random cases. Where they part it looks for the simplest case in which they
do, and says at which number, and which mistake of the catalogue (`verify.mistakes`) gives the same wrong answer.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, signature
from typing import NoReturn

import torch
from torch import Tensor

from dynattn import core
from dynattn.verify.cases import OPERATIONS, Case, case, simplest
from dynattn.verify.mistakes import MISTAKES
from dynattn.verify.report import Mismatch

__all__ = ["Case", "Mismatch", "answer", "case", "check", "compare", "operations"]

# How far a tensor may be off, relative to its largest entry, by the dtype of the function's output. What cancels to
# zero is allowed a few roundings of the largest number around.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# The search for the simplest case ends after so many calls or seconds: a slow function is told what there is by then.
MOST_CALLS, MOST_SECONDS = 150, 10.0

Answer = dict[str, Tensor]  # "output" and "gradient of NAME", in the order of the arguments
Difference = tuple[str, tuple[int, ...], float, str]  # where, index, error, what


class Stopped(BaseException):
    """Raised by what answers cases when it cannot answer any more; no Exception, which would be a failure to shrink."""


def operations() -> list[str]:
    """Names that `check` knows."""
    return list(OPERATIONS)


@torch.inference_mode(False)
@torch.enable_grad()
def answer(function: Callable, arguments: Mapping[str, object], options: Mapping[str, object]) -> Answer:
    """What a function puts out, and the gradient of every floating tensor it was given.

    `arguments` go in by position, `options` by keyword. Gradients are those of the sum of the output weighted by fixed
    random numbers; zeros where none arrives. Raises TypeError when the output is no floating tensor.
    """
    given = {name: _leaf(value) for name, value in {**arguments, **options}.items()}
    before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)}
    output = function(*(given[name] for name in arguments), **{name: given[name] for name in options})
    for name, value in before.items():
        if not torch.allclose(given[name].detach(), value, rtol=0, atol=0, equal_nan=True):
            with torch.no_grad():
                given[name].detach().copy_(value)
            raise ValueError(f"function: expected to leave its arguments as they are, got another {name} afterwards")
    if not isinstance(output, Tensor) or output.dtype not in TOLERANCE:
        what = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"function: expected to return a floating tensor, got {what}")
    leaves = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
    gradients = [None] * len(leaves)
    if output.requires_grad:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = (output * weights.to(output)).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"output": output.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf).detach() if gradient is None else gradient
    return found


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
    core.one_of("operation", operation, tuple(OPERATIONS))
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
        _tell(worst, trial.found[worst.line], trial.answer, calls)


def compare(operation: str, function: Callable, *arguments: object, **options: object) -> None:
    """As `check`, on one call of your own: the arguments and options of the operation, without `impl`."""
    core.one_of("operation", operation, tuple(OPERATIONS))
    kinds = signature(OPERATIONS[operation][0]).parameters.values()
    names = [parameter.name for parameter in kinds if parameter.kind is not Parameter.KEYWORD_ONLY]
    if len(names) != len(arguments):
        raise TypeError(f"arguments: expected {', '.join(names)}, got {len(arguments)}")
    call = Case(operation, None, dict(zip(names, arguments, strict=True)), options)
    answers = lambda call: answer_to(call, function)  # noqa: E731
    failure = _failure(call, answers)
    if failure is not None:
        _tell(call, failure, answers, others=())


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
    return _difference(given, _expected(call))


def _tell(
    call: Case, failure: Difference | Exception, answers: Callable[[Case], Answer], others: Iterable[Case]
) -> NoReturn:
    """Raise what went wrong with a call; `others` are for telling mistakes apart."""
    if isinstance(failure, Exception):
        failure.add_note(f"in the case of {call}" + (f"\nagain: {call.line}" if call.seed is not None else ""))
        raise failure
    raise Mismatch(call, *failure, _diagnose(answers, [call, *others], only_output=failure[0] == "output"))


def _leaf(value: object) -> object:
    """A floating tensor, of the same memory, that collects a gradient; everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _parameters(function: Callable) -> Mapping[str, Parameter]:
    try:
        return signature(function).parameters
    except ValueError:  # a builtin that does not tell
        return {}


def not_taken(operation: str, function: Callable) -> frozenset[str]:
    """The options of an operation that a function has no parameter for; raises TypeError where one is needed."""
    parameters = _parameters(function)
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return frozenset()
    own = signature(OPERATIONS[operation][0]).parameters.values()
    options = {p.name: p.default for p in own if p.kind is Parameter.KEYWORD_ONLY and p.name != "impl"}
    for name, default in options.items():
        if default is Parameter.empty and name not in parameters:
            raise TypeError(f"function: {operation} needs a parameter {name!r}; there are {', '.join(parameters)}")
    return frozenset(name for name in options if name not in parameters)


def answer_to(call: Case, function: Callable) -> Answer:
    """The answer of a function to a call; options at their defaults are passed where the function has no default."""
    parameters = _parameters(function)
    needed = {
        name: value
        for name, value in call.defaults.items()
        if name in parameters and parameters[name].default is Parameter.empty
    }
    return answer(function, call.arguments, needed | call.options)


def _remembered(answer_to: Callable) -> Callable:
    """`answer_to(call, ...)`, computed once for calls that come from a seed."""
    known: dict[tuple, Answer] = {}

    @wraps(answer_to)
    def remember(call: Case, *which: str) -> Answer:
        if call.seed is None:
            return answer_to(call, *which)
        key = call.line, *which
        if key not in known:
            known[key] = answer_to(call, *which)
        return known[key]

    return remember


@_remembered
def _expected(call: Case) -> Answer:
    """What the loops answer."""
    return answer(OPERATIONS[call.operation][0], call.arguments, call.options | {"impl": "loops"})


@_remembered
def _mistaken(call: Case, name: str) -> Answer:
    """What a catalogued mistake answers."""
    return answer_to(call, MISTAKES[call.operation][name])


def _difference(given: Answer, expected: Answer, where: Iterable[str] | None = None) -> Difference | None:
    """The first number of an answer that is off, or None when all agree."""
    dtype = given["output"].dtype
    rounding = 4 * torch.finfo(dtype).eps * max(float(tensor.abs().max()) for tensor in expected.values())
    for name in expected if where is None else where:
        got, want = given[name], expected[name]
        if got.shape != want.shape:
            return name, (), float("inf"), f"expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
        allowed = TOLERANCE[dtype] * float(want.abs().max()) + rounding
        error = (got.double() - want.double()).abs()
        wrong = ~(error <= allowed)  # NaN is wrong too
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            off = float(error[index])
            what = f"{float(got[index]):.8g}, expected {float(want[index]):.8g}"
            what += f"; off by {off:.2g}, allowed {allowed:.2g}; {int(wrong.sum())} of {wrong.numel()} numbers are off"
            return name, index, off, what
    return None


def _diagnose(answers: Callable[[Case], Answer], calls: list[Case], only_output: bool) -> list[str]:
    """The catalogued mistakes that answer as the function does, to every call, the first of which went wrong."""
    where = ["output"] if only_output else None
    suspects = list(MISTAKES[calls[0].operation])
    for call in calls:
        try:
            given = answers(call)
        except (Exception, Stopped):  # it fails there in a way of its own, which tells nothing
            continue
        suspects = [name for name in suspects if _difference(given, _mistaken(call, name), where) is None]
    return suspects
