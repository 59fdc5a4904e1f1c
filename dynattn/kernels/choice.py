"""Operations and their forms: which form runs, by the choice of "auto" and the switch that overrules it.

    with dynattn.implementation("torch"): ...           a block of code, of this thread or task only
    dynattn.use_implementation(model, "torch")          a model, wherever it is called
    ops.grouped_attention(..., impl="torch")            one call

The nearest one counts: the argument of a call before that of its model, that before the innermost block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from dynattn.kernels import derivatives, operators

IMPLEMENTATIONS = ("auto", "loops", "torch", *operators.BACKENDS)
_BLOCK = ContextVar("implementation", default="auto")


def check_implementation(name: str, value: object) -> None:
    """Raise ValueError unless `value` names a form, or is "auto"."""
    if value not in IMPLEMENTATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {value!r}")


@contextmanager
def implementation(form: str) -> Iterator[None]:
    """In this block every operation, and every model, takes one form where "auto" would choose.

    form: "auto", "loops", "torch", "numba" or "triton". An operation that has no such kernel at all (dense attention,
    windows) takes its torch form. A kernel that cannot run, as numba's with tensors on a GPU, raises ValueError and
    says why. Blocks may be nested: the inner one counts. Other threads and tasks are left alone. A compiled model is
    compiled again for the block; the block itself must be outside of what is compiled. Raises ValueError for a form
    that does not exist.
    """
    check_implementation("implementation", form)
    before = _BLOCK.set(form)
    try:
        yield
    finally:
        _BLOCK.reset(before)


def use_implementation(model: nn.Module, form: str) -> nn.Module:
    """Let every attention layer of a model take one form where "auto" would choose; returns the model.

    form: as in `implementation`, whose blocks it goes before; "auto" takes it back. It is an attribute
    `implementation` of the layers: copies and pickles of the model keep it, state dicts do not know it. Layers without
    such a kernel take their torch form. Raises ValueError for a form that does not exist, or a model without a layer
    of this library.
    """
    check_implementation("implementation", form)
    layers = [module for module in model.modules() if isinstance(getattr(module, "forms", None), tuple)]
    if not layers:
        raise ValueError(f"model: expected one with attention layers of dynattn, got {type(model).__name__} with none")
    for layer in layers:
        layer.implementation = form if form in ("auto", *layer.forms) else "torch"
    return model


def surely(condition: bool) -> bool:
    """Whether something holds for all sizes that a graph will meet: a graph is not tied to the size it was made with.

    Outside of compiled graphs sizes are known, and so is this.
    """
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes. A graph of sizes that it does not know keeps the question, not the answer."""
    return min(int(a), int(b)) if torch.jit.is_tracing() else torch.sym_min(a, b)


def larger(a: int, b: int) -> int:
    """The larger of two sizes, as `smaller`."""
    return max(int(a), int(b)) if torch.jit.is_tracing() else torch.sym_max(a, b)


def exporting() -> bool:
    """Whether a graph is made that shall run elsewhere: without this package, and at other sizes."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


# ---------------------------------------------------------------------------------------------------------------------
# Operations and their forms
# ---------------------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable] = {}  # the public functions, by their names


class Forms(dict):
    """The forms of an operation by their names ("loops", "torch", "numba", "triton"), and which of them runs.

    All take the same inputs; those of a form are checked before. pays(backend, *inputs): whether a kernel is the faster
    form; without it "auto" never takes a kernel.
    """

    def __init__(self, operation: str, pays: Callable[..., bool] | None = None, **forms: Callable):
        super().__init__(forms)
        self.operation, self.pays = operation, pays

    def run(self, impl: str, *inputs: object) -> Tensor:
        """What the operation puts out, by the form that `impl` names."""
        return self.chosen(impl, *inputs)(*inputs)

    def chosen(self, impl: str, *inputs: object) -> Callable:
        """The form that `impl` names, for tensors on the device of the first input.

        "auto" is what the innermost block of `implementation` names. Without one it is the kernel for that device
        (numba for the CPU, triton for CUDA) if there is one, it can run, and it pays; else the vectorised torch form.
        A graph that is exported gets the torch form.
        Raises ValueError when `impl` is no form of any operation, or none of this one, or cannot run on the device, and
        says why: nothing falls back in silence.
        """
        check_implementation("impl", impl)
        device, asked = inputs[0].device, f"impl: {impl!r}"
        if impl == "auto" and (block := _BLOCK.get()) != "auto":
            impl = block if block in self else "torch"
            asked = f"implementation({block!r})"
        if impl == "auto":
            kernel = {"cpu": "numba", "cuda": "triton"}.get(device.type)
            can = kernel in self and self.pays is not None and not exporting() and not derivatives.forward_mode()
            can = can and self.pays(kernel, *inputs) and not operators.unavailable(kernel, device)
            return self[kernel if can else "torch"]
        if impl not in self:
            there = ", ".join(map(repr, self))
            raise ValueError(f"impl: {self.operation} has no {impl!r} kernel here, only {there} or 'auto'")
        why = operators.unavailable(impl, device) if impl in operators.BACKENDS else None
        if impl in operators.BACKENDS and derivatives.forward_mode():
            why = why or "kernels have no forward-mode derivatives"
        if why:
            raise ValueError(f"{asked} cannot run {self.operation} here: {why}; use 'auto' or 'torch'")
        return self[impl]


def operation(*, pays: Callable[..., bool] | None = None, **forms: Callable) -> Callable[[Callable], Callable]:
    """Make a function an operation with these forms: `ops` offers it under its name.

    The function says the signature, with an argument `impl`; it checks what came, and ends with
    `return NAME.forms.run(impl, *inputs)`. pays: as of `Forms`.
    """

    def register(function: Callable) -> Callable:
        function.forms = Forms(function.__name__, pays, **forms)
        OPERATIONS[function.__name__] = function
        return function

    return register
