"""The equivalence oracle: does a function compute what the paper's loops compute, outputs and every gradient?

    from dynattn import verify
    verify.check("sample_points", my_function)

`check` runs the function and the loops on random cases. Where they part it says at which number, in which case, and
which mistake of the catalogue (`verify.mistakes`) gives the same wrong answer.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, signature

import torch
from torch import Tensor

from dynattn import core
from dynattn.verify.cases import OPERATIONS, Case, case
from dynattn.verify.mistakes import MISTAKES

__all__ = ["Case", "Mismatch", "answer", "case", "check", "compare", "operations"]

# How far a tensor may be off, relative to its largest entry, by the dtype of the function's output. What cancels to
# zero is allowed a few roundings of the largest number around.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Answer = dict[str, Tensor]  # "output" and "gradient of NAME", in the order of the arguments


class Mismatch(AssertionError):
    """A function that does not do what the operation does.

    case: the call that shows it; where: "output" or "gradient of NAME"; index: the first number that is wrong;
    error: by how much; mistakes: names of the catalogued mistakes that give the same answer, usually one or none.
    """

    def __init__(self, case: Case, where: str, index: tuple[int, ...], error: float, what: str, mistakes: list[str]):
        self.case, self.where, self.index, self.error, self.mistakes = case, where, index, error, mistakes
        again = f'\n  which verify.case("{case.operation}", {case.seed}) makes again' if case.seed is not None else ""
        known = f"this is what comes out with the mistake: {' or: '.join(mistakes)}"
        super().__init__(
            f"{case.operation}: the {where} is wrong: {what}\n"
            f"  {known if mistakes else 'no mistake of the catalogue gives this answer'}\n"
            f"  in the case of {case}{again}"
        )


def operations() -> list[str]:
    """Names that `check` knows."""
    return list(OPERATIONS)


def answer(function: Callable, arguments: Mapping[str, object], options: Mapping[str, object]) -> Answer:
    """What a function puts out, and the gradient of every floating tensor it was given.

    `arguments` go in by position, `options` by keyword. Gradients are those of the sum of the output weighted by fixed
    random numbers; zeros where none arrives. Raises TypeError when the output is no floating tensor.
    """
    given = {name: _leaf(value) for name, value in {**arguments, **options}.items()}
    output = function(*(given[name] for name in arguments), **{name: given[name] for name in options})
    if not isinstance(output, Tensor) or not output.is_floating_point():
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


def check(operation: str, function: Callable, *, cases: int = 20, seed: int = 0) -> None:
    """Compare a function with the loops of an operation: `cases` random calls, outputs and every gradient.

    The function gets tensors and shapes by position in the order of `ops`, and by keyword those options that it takes
    (`scale=`, ...); an option that it does not take stays at its default in every case. Inputs are float64; the
    tolerance follows the dtype of the output: 1e-10 of the largest entry in float64.
    Returns nothing; raises `Mismatch` for the first difference. What the function itself raises comes through, with a
    note of the case. ValueError, TypeError on wrong arguments.
    """
    core.one_of("operation", operation, tuple(OPERATIONS))
    if not callable(function):
        raise TypeError(f"function: expected something to call, got {type(function).__name__}")
    without = _not_taken(operation, function)
    calls = [case(operation, number, without) for number in range(seed, seed + core.positive("cases", cases))]
    for call in calls:
        _compare(call, function, calls)


def compare(operation: str, function: Callable, *arguments: object, **options: object) -> None:
    """As `check`, on one call of your own: the arguments and options of the operation, without `impl`."""
    core.one_of("operation", operation, tuple(OPERATIONS))
    kinds = signature(OPERATIONS[operation][0]).parameters.values()
    names = [parameter.name for parameter in kinds if parameter.kind is not Parameter.KEYWORD_ONLY]
    if len(names) != len(arguments):
        raise TypeError(f"arguments: expected {', '.join(names)}, got {len(arguments)}")
    call = Case(operation, None, dict(zip(names, arguments, strict=True)), options)
    _compare(call, function, [call])


def _compare(call: Case, function: Callable, calls: list[Case]) -> None:
    """Raise `Mismatch` unless the function answers a call as the loops do; `calls` are for telling mistakes apart."""
    try:
        given = _answer_to(call, function)
    except Exception as error:
        error.add_note(f"in the case of {call}")
        raise
    difference = _difference(given, _expected(call))
    if difference is not None:
        others = [other for other in calls if other is not call]
        mistakes = _diagnose(function, [call, *others], only_output=difference[0] == "output")
        raise Mismatch(call, *difference, mistakes)


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


def _not_taken(operation: str, function: Callable) -> frozenset[str]:
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


def _answer_to(call: Case, function: Callable) -> Answer:
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
        key = call.operation, call.seed, *sorted(call.options), *which
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
    return _answer_to(call, MISTAKES[call.operation][name])


def _difference(
    given: Answer, expected: Answer, where: Iterable[str] | None = None
) -> tuple[str, tuple[int, ...], float, str] | None:
    """The first number of an answer that is off: (where, index, error, what), or None when all agree."""
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
            what = f"at [{', '.join(map(str, index))}] {float(got[index]):.8g}, expected {float(want[index]):.8g}"
            what += f"; off by {off:.2g}, allowed {allowed:.2g}; {int(wrong.sum())} of {wrong.numel()} numbers are off"
            return name, index, off, what
    return None


def _diagnose(function: Callable, calls: list[Case], only_output: bool) -> list[str]:
    """The catalogued mistakes that answer as the function does, to every call, the first of which went wrong."""
    where = ["output"] if only_output else None
    suspects = list(MISTAKES[calls[0].operation])
    for call in calls:
        try:
            given = _answer_to(call, function)
        except Exception:  # it fails there in a way of its own, which tells nothing
            continue
        suspects = [name for name in suspects if _difference(given, _mistaken(call, name), where) is None]
    return suspects
