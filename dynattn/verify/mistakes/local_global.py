"""`local_attention` and `window_embedding` for the oracle: how their cases are drawn, and their mistakes."""

from collections.abc import Callable

import torch
from torch import Tensor

from dynattn import core
from dynattn.mechanisms.local_global import Layout, local_attention, window_embedding
from dynattn.mechanisms.local_global import local_attention_torch as attend
from dynattn.mechanisms.local_global import window_embedding_torch as embed
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all, logits, of_bias, of_scale, of_tokens, swapped
from dynattn.verify.registry import register

Places = tuple[Tensor, Tensor]  # of every cell on an axis: its window, and its place therein


def published(i: Tensor, side: int, R: int, dilated: bool) -> Places:
    """What is right: dilated windows begin beside each other."""
    D = -(-side // R)
    return (i % D, i // D) if dilated else (i // R, i % R)


def on_the_map(places: Callable[..., Places] = published, finish: Callable | None = None) -> Callable:
    """Local attention as dense attention over the whole map, so that its parts can be changed one by one.

    finish(logits, bias, own) makes weights of them; `own` tells which keys lie in the query's window.
    """

    def wrong(q, k, v, table, shape, window, dilated, scale):
        sides = [places(torch.arange(side), side, window, dilated) for side in shape]
        pairs = [torch.meshgrid(*both, indexing="ij") for both in zip(*sides, strict=True)]  # windows, places
        (I, J), (i, j) = ([part.flatten() for part in pair] for pair in pairs)
        own = (I[:, None] == I) & (J[:, None] == J)
        bias = torch.zeros(1, dtype=q.dtype)
        if table is not None:
            most = 2 * window - 2
            rows, cols = ((part[:, None] - part + window - 1).clamp(0, most) for part in (i, j))
            bias = table[:, rows, cols]
        return (finish or softmax)(logits(q, k, scale), bias, own) @ v

    return wrong


def softmax(logits: Tensor, bias: Tensor, own: Tensor) -> Tensor:
    """How it should be."""
    return (logits + bias).masked_fill(~own, -torch.inf).softmax(-1)


def over_queries(logits: Tensor, bias: Tensor, own: Tensor) -> Tensor:
    """Each key spreads over the queries that read it."""
    return (logits + bias).masked_fill(~own, -torch.inf).softmax(-2)


def of_the_whole_map(logits: Tensor, bias: Tensor, own: Tensor) -> Tensor:
    """Weights are zeroed after the softmax: rows do not sum to 1."""
    return (logits + bias).softmax(-1) * own


def bias_on_weights(logits: Tensor, bias: Tensor, own: Tensor) -> Tensor:
    """The bias changes weights, not logits."""
    return logits.masked_fill(~own, -torch.inf).softmax(-1) + own * bias


def rate_is_window(i: Tensor, side: int, R: int, dilated: bool) -> Places:
    """Every R-th token, in windows of any size."""
    return (i % R, i // R) if dilated else (i // R, i % R)


def of_the_map_itself(i: Tensor, side: int, R: int, dilated: bool) -> Places:
    """Every n-th token, where n is the number of whole windows: the last tokens have windows as they come."""
    D = max(side // R, 1)
    return (i % D, i // D) if dilated else (i // R, i % R)


def moved(i: Tensor, side: int, R: int, dilated: bool) -> Places:
    """Windows begin half a window earlier."""
    return published(i + R // 2, side + R // 2, R, dilated)


def whole(x: Tensor, shape: tuple[int, int], window: int) -> Tensor:
    """Tokens of a map (B, h, H W, d) with zeros where windows are completed."""
    padded = core.pad_map(core.merge_heads(x, shape), core.padding_to(shape, (window, window)))
    return core.split_heads(padded, x.shape[1])


def padding_read(q, k, v, table, shape, window, dilated, scale):
    """Keys that complete a window are read, as zeros: published."""
    padded = tuple(side + more for side, more in zip(shape, core.padding_to(shape, (window, window)), strict=True))
    q, k, v = (whole(x, shape, window) for x in (q, k, v))
    z = core.merge_heads(attend(q, k, v, table, padded, window, dilated, scale), padded)
    return core.split_heads(core.crop(z, shape), q.shape[1])


def draw_attention(draw: Draw) -> Call:
    """A call of random sizes, plain or dilated, with and without a bias."""
    B, h, d = draw.sizes(B=2, h=2, d=3)
    shape = draw.one("H", *range(1, 8)), draw.one("W", *range(1, 8))
    window, dilated = draw.one("window", 1, 2, 2, 3, 3), draw.one("dilated", False, True)
    has_table = draw.one("table", False, True, True, True)
    arguments = {name: draw.normal(B, h, shape[0] * shape[1], d) for name in "qkv"}
    table = draw.normal(h, 2 * window - 1, 2 * window - 1) if has_table else None
    options = {"window": window} | ({"dilated": True} if dilated else {}) | draw.scale()
    return arguments | {"table": table, "query_shape": shape}, options


LOCAL_ATTENTION = {
    **of_scale(attend),
    **of_tokens(attend),
    **of_bias(attend, "table"),
    "softmax over the queries": on_the_map(finish=over_queries),
    "softmax over the whole map": on_the_map(finish=of_the_whole_map),
    "bias added after the softmax": on_the_map(finish=bias_on_weights),
    "plain windows for dilated ones": altered(attend, dilated=lambda a: False),
    "dilated windows for plain ones": altered(attend, dilated=lambda a: True),
    "plain and dilated exchanged": altered(attend, dilated=lambda a: not a.dilated),
    "every R-th token in a dilated window": on_the_map(rate_is_window),
    "dilated without the last, incomplete windows": on_the_map(of_the_map_itself),
    "windows moved by half": on_the_map(moved),
    "windows ignored": on_the_map(finish=lambda logits, bias, own: (logits + bias).softmax(-1)),
    "padding is read": padding_read,
    "H and W swapped": altered(attend, shape=lambda a: swapped(a.shape)),
    "bias at the displacement of key minus query": altered(attend, table=lambda a: a.table.flip(1, 2)),
    "bias read with rows and columns swapped": altered(attend, table=lambda a: a.table.mT),
    "keys are the queries": altered(attend, k=lambda a: a.q),
}


def tokens_of(x: Tensor, window: int, dilated: bool) -> tuple[Tensor, Tensor]:
    """The tokens of every window (B, N, T, C), and which are no padding (N, T)."""
    layout = Layout(tuple(x.shape[1:3]), window, dilated)
    inside = layout.inside(x.device)
    tokens = layout.windows(x).flatten(1, 2).flatten(2, 3)
    return tokens, torch.ones(tokens.shape[1:3], dtype=torch.bool) if inside is None else inside


def instead(kind: str, pool: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]) -> Callable:
    """An embedding of that kind by something else: pool(tokens (B, N, T, C), inside (N, T), weight (C, T), bias)."""

    def wrong(x, weight, bias, window, dilated, by):
        if by != kind:
            return embed(x, weight, bias, window, dilated, by)
        kernel = None if weight is None else weight.flatten(1)
        return pool(*tokens_of(x, window, dilated), kernel, bias)

    return wrong


def hidden(tokens: Tensor, inside: Tensor, value: float) -> Tensor:
    """The tokens, with a value in the place of padding."""
    return tokens.masked_fill(~inside[..., None], value)


def by_columns(x, weight, bias, window, dilated, by):
    """Windows are listed column by column."""
    z, (I, J) = embed(x, weight, bias, window, dilated, by), Layout(tuple(x.shape[1:3]), window, dilated).grid
    return z.unflatten(1, (I, J)).transpose(1, 2).flatten(1, 2)


def draw_embedding(draw: Draw) -> Call:
    """A call of random sizes. No two numbers of a map are equal: the gradient of a maximum would not be one."""
    B, C = draw.sizes(B=2, C=3)
    shape = draw.one("H", *range(1, 8)), draw.one("W", *range(1, 8))
    window, dilated = draw.one("window", 1, 2, 2, 3, 3), draw.one("dilated", False, True)
    by = draw.one("by", "mean", "max", "conv", "conv")
    x, count = draw.normal(B, *shape, C), B * shape[0] * shape[1] * C
    if draw.whole:  # in any order, three of four below zero
        x = ((torch.randperm(count, generator=draw.generator) - 3 * count // 4) / 8.0).double().reshape(x.shape)
    kernel = (draw.normal(C, window, window), draw.normal(C)) if by == "conv" else (None, None)
    arguments = dict(zip(("x", "weight", "bias"), (x, *kernel), strict=True))
    return arguments, {"window": window} | ({"dilated": True} if dilated else {}) | ({} if by == "mean" else {"by": by})


WINDOW_EMBEDDING = {
    "plain windows for dilated ones": altered(embed, dilated=lambda a: False),
    "dilated windows for plain ones": altered(embed, dilated=lambda a: True),
    "plain and dilated exchanged": altered(embed, dilated=lambda a: not a.dilated),
    "windows column by column": by_columns,
    "first image's map for the whole batch": altered(embed, x=lambda a: first_for_all(a.x, 0)),
    "first channel for all": altered(embed, x=lambda a: first_for_all(a.x, 3)),
    "mean and maximum exchanged": altered(embed, by=lambda a: {"mean": "max", "max": "mean"}.get(a.by, a.by)),
    "sum of a window, not its mean": instead("mean", lambda x, inside, *_: hidden(x, inside, 0).sum(2)),
    "padding counts in the mean": instead("mean", lambda x, inside, *_: hidden(x, inside, 0).mean(2)),
    "padding counts in the maximum, as zeros": instead("max", lambda x, inside, *_: hidden(x, inside, 0).amax(2)),
    "minimum, not maximum": instead("max", lambda x, inside, *_: hidden(x, inside, torch.inf).amin(2)),
    "largest absolute value, not maximum": instead(
        "max", lambda x, inside, *_: x.gather(2, hidden(x.abs(), inside, -1).argmax(2, keepdim=True))[:, :, 0]
    ),
    "only the first token of a window, not the mean": instead("mean", lambda x, *_: x[:, :, 0]),
    "weights of the convolution ignored": instead(
        "conv", lambda x, inside, w, b: hidden(x, inside, 0).mean(2) + 0 * w.sum() + b
    ),
    "softmax of the convolution's weights": instead(
        "conv", lambda x, inside, w, b: torch.einsum("bntc,ct->bnc", x, w.softmax(1)) + b
    ),
    "convolution divided by the number of cells": instead(
        "conv", lambda x, inside, w, b: torch.einsum("bntc,ct->bnc", x, w) / inside.sum(1)[:, None] + b
    ),
    "one kernel for all channels": altered(embed, weight=lambda a: first_for_all(a.weight, 0)),
    "kernel turned by half a turn": altered(embed, weight=lambda a: a.weight.flip(1, 2)),
    "kernel with rows and columns swapped": altered(embed, weight=lambda a: a.weight.mT),
    "bias missing": altered(embed, bias=lambda a: torch.zeros_like(a.bias)),
    "bias of the first channel for all": altered(embed, bias=lambda a: first_for_all(a.bias, 0)),
    "bias added for every cell": instead(
        "conv", lambda x, inside, w, b: torch.einsum("bntc,ct->bnc", x, w) + b * inside.sum(1)[:, None]
    ),
    "gradient cut at the map": altered(embed, x=lambda a: a.x.detach()),
    "gradient cut at the weights": altered(embed, weight=lambda a: a.weight.detach()),
    "gradient cut at the bias": altered(embed, bias=lambda a: a.bias.detach()),
}

register(local_attention, draw_attention, LOCAL_ATTENTION)
register(window_embedding, draw_embedding, WINDOW_EMBEDDING)
