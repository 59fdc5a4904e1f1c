"""What a function answers to a case, and where two answers part."""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature

import torch
from torch import Tensor

from dynattn.verify.cases import Case
from dynattn.verify.registry import OPERATIONS

# How far a tensor may be off, relative to its largest entry, by the dtype of the function's output. What cancels to
# zero is allowed a few roundings of the largest number around.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Answer = dict[str, Tensor]  # "output" and "gradient of NAME", in the order of the arguments
Difference = tuple[str, tuple[int, ...], float, str]  # where, index, error, what


class Stopped(BaseException):
    """Raised by what answers cases when it cannot answer any more; no Exception, which would be a failure to shrink."""


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


def _leaf(value: object) -> object:
    """A floating tensor, of the same memory, that collects a gradient; everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def answer_to(call: Case, function: Callable) -> Answer:
    """The answer of a function to a call; options at their defaults are passed where the function has no default."""
    parameters = _parameters(function)
    needed = {
        name: value
        for name, value in call.defaults.items()
        if name in parameters and parameters[name].default is Parameter.empty
    }
    return answer(function, call.arguments, needed | call.options)


def not_taken(operation: str, function: Callable) -> frozenset[str]:
    """The options of an operation that a function has no parameter for; raises TypeError where one is needed."""
    parameters = _parameters(function)
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return frozenset()
    options = OPERATIONS[operation].options
    for name, default in options.items():
        if default is Parameter.empty and name not in parameters:
            raise TypeError(f"function: {operation} needs a parameter {name!r}; there are {', '.join(parameters)}")
    return frozenset(name for name in options if name not in parameters)


def _parameters(function: Callable) -> Mapping[str, Parameter]:
    try:
        return signature(function).parameters
    except ValueError:  # a builtin that does not tell
        return {}


_EXPECTED: dict[str, Answer] = {}  # by the line that makes a case again


def expected(call: Case) -> Answer:
    """What the loops answer; computed once for calls that come from a seed."""
    if call.seed is not None and call.line in _EXPECTED:
        return _EXPECTED[call.line]
    found = answer(OPERATIONS[call.operation].function, call.arguments, call.options | {"impl": "loops"})
    if call.seed is not None:
        _EXPECTED[call.line] = found
    return found


def difference(given: Answer, wanted: Answer, where: Iterable[str] | None = None) -> Difference | None:
    """The first number of an answer that is off, or None when all agree. where: the parts to look at, None for all."""
    dtype = given["output"].dtype
    rounding = 4 * torch.finfo(dtype).eps * max(float(tensor.abs().max()) for tensor in wanted.values())
    for name in wanted if where is None else where:
        got, want = given[name], wanted[name]
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
