"""The operations that the oracle knows: how each is called, how its cases are drawn, how it goes wrong."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import NamedTuple

from dynattn import core


class Operation(NamedTuple):
    """One operation: the public function, what draws its cases, and its catalogue of mistakes."""

    function: Callable
    draw: Callable
    mistakes: Mapping[str, Callable]

    @property
    def arguments(self) -> list[str]:
        """Names of what is given by position."""
        kinds = signature(self.function).parameters.values()
        return [parameter.name for parameter in kinds if parameter.kind is not Parameter.KEYWORD_ONLY]

    @property
    def options(self) -> dict[str, object]:
        """The options by name with their defaults, without `impl`. `Parameter.empty` stands for no default."""
        kinds = signature(self.function).parameters.values()
        return {p.name: p.default for p in kinds if p.kind is Parameter.KEYWORD_ONLY and p.name != "impl"}


OPERATIONS: dict[str, Operation] = {}


def operations() -> list[str]:
    """Names that `check` knows, sorted."""
    return sorted(OPERATIONS)


def register(operation: Callable, draw: Callable, mistakes: Mapping[str, Callable]) -> None:
    """Teach the oracle an operation. Its name is the function's `__name__`.

    operation: the public function. It takes tensors and shapes by position, options by keyword, and `impl="loops"`,
    which is the specification. An option `scale` whose default is None stands for d^-0.5, d the last size of the first
    argument.
    draw: gets a `cases.Draw` and returns two dicts: the arguments by position, in order, and the options.
    mistakes: by name, functions with the arguments and options of the operation that compute what a mistake computes.
    Registering a name again replaces what was registered.
    Raises TypeError for other things, ValueError for an operation without `impl`.
    """
    name = getattr(operation, "__name__", None)
    if not callable(operation) or not isinstance(name, str):
        raise TypeError(f"operation: expected a function with a name, got {operation!r}")
    if "impl" not in signature(operation).parameters:
        raise ValueError(f"operation: expected a function with an argument impl, got {name}{signature(operation)}")
    if not callable(draw):
        raise TypeError(f"draw: expected a function, got {draw!r}")
    if not isinstance(mistakes, Mapping) or not all(callable(mistake) for mistake in mistakes.values()):
        raise TypeError(f"mistakes: expected functions by name, got {mistakes!r}")
    OPERATIONS[name] = Operation(operation, draw, dict(mistakes))


def known(name: object) -> Operation:
    """The operation of a name; raises ValueError for another name."""
    core.one_of("operation", name, tuple(operations()))
    return OPERATIONS[name]
