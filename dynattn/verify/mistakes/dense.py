"""`dense_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch

from dynattn import core
from dynattn.core import dense_attention
from dynattn.core import dense_attention_torch as dense
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, logits, of_bias, of_scale, of_tokens
from dynattn.verify.registry import register


def softmax_over(dim: int) -> Callable:
    """Dense attention normalised along another dimension of (B, h, L, N)."""

    def wrong(q, k, v, bias, scale):
        return (logits(q, k, scale) + (0 if bias is None else bias)).softmax(dim) @ v

    return wrong


def without_softmax(q, k, v, bias, scale):
    """Linear attention by accident."""
    return (logits(q, k, scale) + (0 if bias is None else bias)) @ v


def bias_after_softmax(q, k, v, bias, scale):
    """The bias changes weights, not logits."""
    return (logits(q, k, scale).softmax(-1) + (0 if bias is None else bias)) @ v


def detached_weights(q, k, v, bias, scale):
    """Nothing learns where to look."""
    return core.attention_weights(q, k, bias, scale).detach() @ v


def causal(q, k, v, bias, scale):
    """Query l reads keys 0 to l only."""
    hidden = torch.full(logits(q, k, scale).shape[-2:], -torch.inf, dtype=q.dtype).triu(1)
    return dense(q, k, v, hidden if bias is None else bias + hidden, scale)


def draw_case(draw: Draw) -> Call:
    """A call of random sizes, with and without what is optional."""
    B, h, L, N, d = draw.sizes(B=2, h=3, L=5, N=5, d=4)
    has_bias, scale = draw.one("bias", False, True, True), draw.scale()
    arguments = {"q": draw.normal(B, h, L, d), "k": draw.normal(B, h, N, d), "v": draw.normal(B, h, N, d)}
    return arguments, ({"bias": draw.normal(h, L, N)} if has_bias else {}) | scale


DENSE_ATTENTION = {
    **of_scale(dense),
    **of_tokens(dense),
    **of_bias(dense, "bias"),
    "softmax over the queries": softmax_over(-2),
    "softmax over the heads": softmax_over(1),
    "no softmax": without_softmax,
    "bias subtracted": altered(dense, bias=lambda a: -a.bias),
    "bias added after the softmax": bias_after_softmax,
    "later keys hidden": causal,
    "gradient cut at the weights": detached_weights,
}

register(dense_attention, draw_case, DENSE_ATTENTION)
