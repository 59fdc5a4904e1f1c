"""From kernels to operators of torch: what every fast path has in common.

An operation with kernels has a file that says how its operator looks (`deformable.py`: the signature, shapes of what
comes out, FLOPs) and a file for each backend (`deformable_numba.py`, `deformable_triton.py`) with

    forward(*inputs) -> (out, *more)                      more: what the backward needs besides the inputs
    backward(grad_out, out, *more, *inputs) -> one gradient for each input that is a floating tensor, in order

`operators` makes of them `torch.ops.dynattn.NAME_numba` and `NAME_triton`, which autograd, torch.compile, vmap, the
FLOP counter and opcheck know. A backend is imported at its first call. Kernels have first derivatives only: those of a
gradient come from a plain form of torch, which `has_plain_form` names. There is no forward mode.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, Signature, signature

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynattn.kernels.derivatives import differentiable_gradients, transforming

BACKENDS = ("numba", "triton")
LIBRARY = torch.library.Library("dynattn", "DEF")
INSTALLED = {name: find_spec(name) is not None for name in BACKENDS}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels in Python, on any device: for tests
FOUNDATIONS = {"numba": "dynattn.kernels.simd", "triton": "triton"}  # what all kernels of a backend import

_BROKEN: dict[str, str | None] = {}  # why a backend that is installed does not work, as far as it was tried
_TRANSFORMED: dict[Callable, type[torch.autograd.Function]] = {}  # by operator, the same for torch.func
_PLAIN: dict[str, Callable] = {}  # by the name of an operation, the same by plain operations of torch


# ---------------------------------------------------------------------------------------------------------------------
# Whether a kernel can run
# ---------------------------------------------------------------------------------------------------------------------


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if not INSTALLED[backend]:
        return f"{backend} is not installed"
    if backend == "numba" and device.type != "cpu":
        return f"its kernel runs on the CPU, the tensors are on {device}"
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        return f"its kernel runs on CUDA devices, the tensors are on {device}"
    return broken(backend)


def broken(backend: str) -> str | None:
    """Why a backend that is installed does not work here; None if it does. The first call imports it."""
    if torch.compiler.is_compiling():  # a graph would be made again when the answer is found
        return None
    if backend not in _BROKEN:
        try:
            import_module(FOUNDATIONS[backend])
            _BROKEN[backend] = None
        except Exception as error:
            _BROKEN[backend] = f"{backend} is installed, but does not work: {error}"
    return _BROKEN.get(backend)


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------


def operators(
    name: str, look: Callable, flops: Callable[..., int], file: str, fold: Sequence[int | None], outputs: Sequence[str]
) -> dict[str, Callable]:
    """The custom operators of an operation, by backend.

    look: the signature, annotated, and the only place that says it; it makes empty outputs of the right shape (the
    "fake" registration). flops: from the shapes of the inputs, of the forward; the backward counts two and a half times
    that, as torch counts it for attention. file: kernels/FILE_BACKEND.py has the backend. fold: for every input the
    dimension that a batch of vmap is folded into, None for what is no tensor; the outputs have that of the first.
    outputs: names of the outputs.
    """
    return {
        backend: _operator(name, f"{name}_{backend}", look, flops, f"{file}_{backend}", fold, outputs)
        for backend in BACKENDS
    }


def forms(table: dict[str, Callable]) -> dict[str, Callable]:
    """Operators, by backend, as forms of an operation that has the same inputs: each puts out its first output."""
    return {backend: lambda *inputs, backend=backend: apply(table[backend], *inputs)[0] for backend in table}


def function(name: str, look: Callable, file: str, fold: Sequence[int | None]) -> Callable:
    """The custom operator, without gradients, of a function `name` in kernels/FILE.py."""
    return _define(name, look, file, name, fold)


def apply(operator: Callable, *inputs: object) -> list[Tensor]:
    """What an operator puts out, also inside transforms of torch.func, which need another face of it."""
    return list(_TRANSFORMED[operator].apply(*inputs)) if transforming() else operator(*inputs)


def has_plain_form(name: str, form: Callable) -> None:
    """Say what computes an operation by plain operations of torch: form(*inputs) -> out."""
    _PLAIN[name] = form


def _define(name: str, look: Callable, file: str, function: str, fold: Sequence[int | None] | None) -> Callable:
    """A custom operator of torch that looks like `look` and does what a function of kernels/FILE.py does.

    As torch.library.custom_op, without its wrapper, which imports torch's compiler, for seconds, at the first call.
    """

    def run(*arguments):
        with torch.cuda.device_of(arguments[0]):  # Triton launches on the current GPU; nothing for other tensors
            return getattr(import_module(f"dynattn.kernels.{file}"), function)(*arguments)

    LIBRARY.define(name + torch.library.infer_schema(look, mutates_args=()))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dynattn::{name}", look)
    operator = getattr(torch.ops.dynattn, name).default
    if fold is not None:
        rule = lambda info, dims, *inputs: _folded(operator, fold, info.batch_size, dims, inputs)  # noqa: E731
        torch.library.register_vmap(f"dynattn::{name}", rule)
    return operator


def _folded(
    operator: Callable, fold: Sequence[int | None], size: int, dims: Sequence[int | None], inputs: Sequence[object]
) -> tuple:
    """The batching rule: one call for a whole batch of vmap, which is folded into another dimension."""

    def folded(x: object, dim: int | None, into: int | None) -> object:
        if not isinstance(x, Tensor):
            return x
        x = x.unsqueeze(into).expand(*x.shape[:into], size, *x.shape[into:]) if dim is None else x.movedim(dim, into)
        return x.flatten(into, into + 1)

    outputs = operator(*(folded(*how) for how in zip(inputs, dims, fold, strict=True)))
    several = isinstance(outputs, list | tuple)
    unfolded = [x.unflatten(fold[0], (size, -1)) for x in (outputs if several else [outputs])]
    return (tuple(unfolded), (fold[0],) * len(unfolded)) if several else (unfolded[0], fold[0])


def _differentiable(value: object) -> bool:
    """Whether the backward of an operator has a gradient for an input."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _look_of_backward(look: Callable, outputs: Sequence[str]) -> Callable:
    """How the backward looks: it gets the gradient of the first output, all outputs and all inputs."""

    def empty_gradients(grad, *values):
        return [x.new_empty(x.shape) for x in values[len(outputs) :] if _differentiable(x)]

    given = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=Tensor) for name in ("grad", *outputs)]
    inputs = signature(look).parameters.values()
    empty_gradients.__signature__ = Signature([*given, *inputs], return_annotation=list[Tensor])
    return empty_gradients


def _operator(
    operation: str, name: str, look: Callable, flops: Callable, file: str, fold: Sequence, outputs: Sequence[str]
) -> Callable:
    """The operator of a forward pass, with its derivatives."""
    arity = len(signature(look).parameters)
    ahead = _define(name, look, file, "forward", fold)
    back = _define(f"{name}_backward", _look_of_backward(look, outputs), file, "backward", fold=None)

    def keep(ctx, inputs, output):
        values = (*output, *inputs)
        ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in values]

    def gradients(ctx, grads):
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if other is None else other[0] for other in ctx.others]
        several = torch._C._functorch.is_legacy_batchedtensor(grads[0])  # by torch.autograd.grad(is_grads_batched=True)
        if torch.is_grad_enabled() or transforming() or several:  # these gradients shall have derivatives
            wanted = [bool(want) for want in ctx.needs_input_grad[:arity]]
            return tuple(differentiable_gradients(_PLAIN[operation], grads[0], saved[-arity:], wanted))
        found = iter(back(grads[0], *saved))
        return tuple(next(found) if _differentiable(x) else None for x in saved[-arity:])

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name}_backward: a kernel has first derivatives only; differentiate the operation itself, which has all, "
            f'or take its torch form: with dynattn.implementation("torch")'
        )

    torch.library.register_autograd(f"dynattn::{name}", gradients, setup_context=keep)
    torch.library.register_autograd(f"dynattn::{name}_backward", refuse)
    register_flop_formula(ahead.overloadpacket)(lambda *shapes, **_: flops(*shapes))
    register_flop_formula(back.overloadpacket)(lambda *shapes, **_: flops(*shapes[-arity:]) * 5 // 2)

    class Transformed(torch.autograd.Function):
        """The same for transforms of torch.func, which do not know what torch.library registers."""

        forward = staticmethod(lambda *inputs: tuple(ahead(*inputs)))
        setup_context = staticmethod(keep)
        backward = staticmethod(lambda ctx, *grads: gradients(ctx, grads))
        vmap = staticmethod(lambda info, dims, *x: _folded(partial(apply, ahead), fold, info.batch_size, dims, x))

    _TRANSFORMED[ahead] = Transformed
    return ahead
