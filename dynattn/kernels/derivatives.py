"""Derivatives of derivatives, of functions whose fast form has only first ones.

A gradient penalty, a Hessian or torch.func differentiates a backward pass. Kernels and torch's fused attention cannot
do that. Then, and only then, the gradients are computed by a plain form of torch, which has all derivatives: a
backward pass knows by `torch.is_grad_enabled()` whether somebody will differentiate it (create_graph=True).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def transforming() -> bool:
    """Whether a transform of torch.func is at work, as vmap or grad. A compiled graph decides it by itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken, as by torch.func.jvp."""
    return torch.autograd.forward_ad._current_level >= 0


def differentiable_gradients(
    form: Callable, grad: Tensor, inputs: Sequence[object], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the `wanted` inputs of `form`, by autograd, so that they have derivatives themselves."""

    def of_wanted(*chosen: Tensor) -> Tensor:
        given = iter(chosen)
        return form(*(next(given) if want else x for x, want in zip(inputs, wanted, strict=True)))

    with torch.enable_grad():
        _, pull_back = torch.func.vjp(of_wanted, *(x for x, want in zip(inputs, wanted, strict=True) if want))
        found = iter(pull_back(grad))
    return [next(found) if want else None for want in wanted]


class _Again(torch.autograd.Function):
    """The same `out`; if its gradient shall be differentiated, it is computed by the plain form, from the inputs."""

    @staticmethod
    def forward(ctx, plain, out, *inputs):
        ctx.plain, ctx.others = plain, [None if isinstance(x, Tensor) else (x,) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        if not torch.is_grad_enabled():
            return None, grad, *(None for _ in ctx.others)
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
        return None, None, *differentiable_gradients(ctx.plain, grad, inputs, ctx.needs_input_grad[2:])


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """torch's scaled_dot_product_attention with all derivatives; bias is added to the logits, or says what is read.

    dropout: the share of the weights that is dropped.
    """
    if dropout or transforming() or forward_mode():  # what was dropped must be the same in a second derivative
        return plain_attention(q, k, v, bias, scale, dropout)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if torch.compiler.is_exporting():  # what is fused here may be plain there, with other strides
        return out.clone(memory_format=torch.contiguous_format)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not out.requires_grad:
        return out
    return _Again.apply(plain_attention, out, q, k, v, bias, scale)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(scale q k^T + bias) v, which keeps the weights."""
    logits = q @ k.mT * scale
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    return F.dropout(logits.softmax(dim=-1), dropout) @ v
