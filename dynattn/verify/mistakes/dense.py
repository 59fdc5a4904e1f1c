"""Mistakes of `dense_attention`."""

from collections.abc import Callable

import torch

from dynattn import core
from dynattn.core import dense_attention_torch as dense
from dynattn.verify.mistakes.common import altered, first_for_all, interleaved, logits, of_scale


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


DENSE_ATTENTION = {
    **of_scale(dense),
    "softmax over the queries": softmax_over(-2),
    "softmax over the heads": softmax_over(1),
    "no softmax": without_softmax,
    "bias missing": altered(dense, bias=lambda a: None),
    "bias subtracted": altered(dense, bias=lambda a: -a.bias),
    "bias scaled too": altered(dense, bias=lambda a: a.bias * a.scale),
    "bias added after the softmax": bias_after_softmax,
    "bias of the first head for all": altered(dense, bias=lambda a: first_for_all(a.bias, 0)),
    "keys and values exchanged": altered(dense, k=lambda a: a.v, v=lambda a: a.k),
    "keys read as values": altered(dense, v=lambda a: a.k),
    "first image's keys for the whole batch": altered(dense, k=lambda a: first_for_all(a.k, 0)),
    "first head's keys for all": altered(dense, k=lambda a: first_for_all(a.k, 1)),
    "later keys hidden": causal,
    "heads and channels interleaved": interleaved(dense),
    "gradient cut at the weights": detached_weights,
    "gradient cut at the values": altered(dense, v=lambda a: a.v.detach()),
    "gradient cut at the bias": altered(dense, bias=lambda a: a.bias.detach()),
}
