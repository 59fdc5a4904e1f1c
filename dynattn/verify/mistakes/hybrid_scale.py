"""`hybrid_scale_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dynattn import core
from dynattn.mechanisms.hybrid_scale import Layout, hybrid_scale_attention
from dynattn.mechanisms.hybrid_scale import hybrid_scale_attention_torch as attend
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, logits, of_scale, of_tokens, swapped
from dynattn.verify.registry import register

WIDE = 1000  # the side of a window where there is none


def under(mask: Callable[..., Tensor], over: int = -1) -> Callable:
    """Attention as dense attention under a mask (L, N), which `mask(i, u, ratio, window)` says for each axis.

    It gets the rows of queries (H, 1) and of merged tokens (1, HK), then the columns. over: the axis of the softmax.
    """

    def wrong(q, k, v, query_shape, ratio, window, scale):
        key_shape, window = Layout(query_shape, ratio, window).key_shape, window or WIDE
        rows, cols = (
            mask(torch.arange(n)[:, None], torch.arange(nk)[None], ratio, window)
            for n, nk in zip(query_shape, key_shape, strict=True)
        )
        read = (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2).flatten(0, 1)
        powers = logits(q, k, scale).exp() * read
        return powers / powers.sum(over, keepdim=True).clamp(min=torch.finfo(powers.dtype).tiny) @ v

    return wrong


def own(i: Tensor, u: Tensor, ratio: int, window: int) -> Tensor:
    """The windows of the paper."""
    return i // (ratio * window) == u // window


def around(i: Tensor, u: Tensor, ratio: int, window: int) -> Tensor:
    """A window around the query, not one of a grid."""
    return (i // ratio - u).abs() <= window // 2


def moved(i: Tensor, u: Tensor, ratio: int, window: int) -> Tensor:
    """Windows that begin half a window earlier."""
    half = window // 2
    return (i + ratio * half) // (ratio * window) == (u + half) // window


def dilated(i: Tensor, u: Tensor, ratio: int, window: int) -> Tensor:
    """Merged tokens of every n-th row, where n is the number of windows."""
    windows = u.shape[1] // window + (u.shape[1] % window > 0)
    return i // (ratio * window) == u % windows


def padding_read(q, k, v, query_shape, ratio, window, scale):
    """Keys that complete a window are read, as zeros."""
    layout = Layout(query_shape, ratio, window)
    if layout.whole:
        return attend(q, k, v, query_shape, ratio, window, scale)
    more = core.padding_to(layout.key_shape, (window, window))
    whole = tuple(ratio * (n + added) for n, added in zip(layout.key_shape, more, strict=True))
    bigger = lambda x, old, new: core.split_heads(  # noqa: E731
        core.pad_map(core.merge_heads(x, old), tuple(b - a for a, b in zip(old, new, strict=True))), x.shape[1]
    )
    keys = tuple(side // ratio for side in whole)
    q = bigger(q, query_shape, whole)
    k, v = (bigger(x, layout.key_shape, keys) for x in (k, v))
    z = core.merge_heads(attend(q, k, v, whole, ratio, window, scale), whole)
    return core.split_heads(core.crop(z, query_shape), q.shape[1])


def by_columns(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Tokens of a map, column by column."""
    return x.unflatten(2, shape).transpose(2, 3).flatten(2, 3)


def nearest_only(q, k, v, query_shape, ratio, window, scale):
    """Every query reads the merged token that it is in, and no other."""
    return under(lambda i, u, ratio, window: i // ratio == u)(q, k, v, query_shape, ratio, window, scale)


def counted_by_cells(q, k, v, query_shape, ratio, window, scale):
    """A merged token weighs as many times as it has cells on the map."""
    layout = Layout(query_shape, ratio, None)
    number = layout.spread(torch.arange(k.shape[2]).reshape(1, *layout.key_shape)).flatten()
    i, u = (torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1).flatten(0, 1)
            for shape in (query_shape, layout.key_shape))  # fmt: skip
    read = own(i[:, None], u[None], ratio, window or WIDE).all(-1)
    powers = logits(q, k, scale).exp() * read * F.one_hot(number, k.shape[2]).sum(0)
    return powers / powers.sum(-1, keepdim=True) @ v


def draw_case(draw: Draw) -> Call:
    """A call of random sizes; windows that hold the whole map, and none."""
    B, h, d = draw.sizes(B=2, h=2, d=3)
    H, W = draw.one("H", *range(1, 7)), draw.one("W", *range(1, 7))
    ratio, window = draw.one("ratio", 1, 2, 2, 3), draw.one("window", None, 1, 2, 2, 3)
    N = -(-H // ratio) * -(-W // ratio)
    tensors = dict(q=draw.normal(B, h, H * W, d), k=draw.normal(B, h, N, d), v=draw.normal(B, h, N, d))
    options = {} if window is None else {"window": window}
    return tensors | {"query_shape": (H, W)}, {"ratio": ratio} | options | draw.scale()


HYBRID_SCALE_ATTENTION = {
    **of_scale(attend),
    **of_tokens(attend),
    "softmax over the queries": under(own, over=-2),
    "windows ignored": altered(attend, window=lambda a: WIDE),
    "windows of keys ratio times as large": altered(attend, window=lambda a: a.window * a.ratio),
    "a window of one token": altered(attend, window=lambda a: 1),
    "windows of M queries, not of ratio M": under(lambda i, u, ratio, window: i // window == u // window),
    "windows of M cells for queries and keys": under(lambda i, u, ratio, window: i // window == u * ratio // window),
    "windows around the query": under(around),
    "windows moved by half": under(moved),
    "windows of every n-th token": under(dilated),
    "only the own merged token is read": nearest_only,
    "padding is read": padding_read,
    "merged tokens weigh as many times as they have cells": counted_by_cells,
    "H and W swapped": altered(attend, query_shape=lambda a: swapped(a.query_shape)),
    "merged tokens column by column": altered(
        attend,
        k=lambda a: by_columns(a.k, Layout(a.query_shape, a.ratio, None).key_shape),
        v=lambda a: by_columns(a.v, Layout(a.query_shape, a.ratio, None).key_shape),
    ),
}

register(hybrid_scale_attention, draw_case, HYBRID_SCALE_ATTENTION)
