"""`window_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch
from torch import Tensor

from dynattn import core
from dynattn.mechanisms.window import shift_of, window_attention
from dynattn.mechanisms.window import window_attention_torch as windowed
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, logits, of_bias, of_scale, of_tokens, swapped
from dynattn.verify.registry import register


def on_the_map(
    *,
    direction: int = 1,
    shift_single: bool = False,
    dilated: bool = False,
    masked: bool = True,
    swap_bias: bool = False,
    finish: Callable | None = None,
) -> Callable:
    """Window attention as dense attention over the whole map, so that its parts can be changed one by one.

    `finish` makes weights of the logits; `own` tells which keys lie in the query's window, `seen` which it may read.
    """
    finish = finish or masked_softmax

    def axis(side: int, w: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of every cell on an axis: its window, its place therein, and whether the roll took it around the edge."""
        padded, s = -(-side // w) * w, s if shift_single else shift_of(side, w, s)
        rolled = (torch.arange(side) - direction * s) % padded
        windows = padded // w
        place = (rolled % windows, rolled // windows) if dilated else (rolled // w, rolled % w)
        return *place, rolled >= padded - s

    def wrong(q, k, v, table, shape, window, shift, scale):
        rows, cols = (axis(*arguments) for arguments in zip(shape, window, shift, strict=True))
        i, j = (t.flatten() for t in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        same = lambda part: (part[0][i, None] == part[0][i]) & (part[1][j, None] == part[1][j])  # noqa: E731
        own = same((rows[0], cols[0]))
        seen = own & same((rows[2], cols[2])) if masked else own
        bias = 0
        if table is not None:
            down = rows[1][i, None] - rows[1][i] + window[0] - 1
            right = cols[1][j, None] - cols[1][j] + window[1] - 1
            if swap_bias:
                down, right = right, down
            bias = table[:, down.clamp(0, 2 * window[0] - 2), right.clamp(0, 2 * window[1] - 2)]
        return finish(logits(q, k, scale), own, seen, bias) @ v

    return wrong


def masked_softmax(logits, own, seen, bias):
    """How it should be."""
    return (logits + bias).masked_fill(~seen, -torch.inf).softmax(-1)


def over_queries(logits, own, seen, bias):
    """Each key spreads over the queries that see it."""
    return (logits + bias).masked_fill(~seen, -torch.inf).softmax(-2)


def bias_on_weights(logits, own, seen, bias):
    """The bias changes weights, not logits."""
    return logits.masked_fill(~seen, -torch.inf).softmax(-1) + seen * bias


def hidden_as_zero(logits, own, seen, bias):
    """Logits that should vanish are multiplied by 0: their keys keep a weight of exp(0)."""
    return ((logits + bias) * seen).masked_fill(~own, -torch.inf).softmax(-1)


def masked_afterwards(logits, own, seen, bias):
    """Weights are zeroed after the softmax: rows do not sum to 1."""
    return (logits + bias).masked_fill(~own, -torch.inf).softmax(-1) * seen


def padding_is_read(q, k, v, table, shape, window, shift, scale):
    """Zero keys of the padding take part in the softmax."""
    padding = core.padding_to(shape, window)
    padded = shape[0] + padding[0], shape[1] + padding[1]
    pad = lambda t: core.split_heads(core.pad_map(core.merge_heads(t, shape), padding), q.shape[1])  # noqa: E731
    z = core.merge_heads(windowed(pad(q), pad(k), pad(v), table, padded, window, shift, scale), padded)
    return core.split_heads(z[:, : shape[0], : shape[1]], q.shape[1])


def draw_case(draw: Draw) -> Call:
    """A call of random sizes, with and without what is optional."""
    B, h, d, H = draw.sizes(B=2, h=2, d=3, H=6)
    shape = H, draw.one("W", 1, 2, 3, 3, 5, 6)
    window = draw.one("wi", 1, 2, 2, 3, 3), draw.one("wj", 1, 2, 2, 3, 3)
    shift = draw.one("shift", *((i, j) for i in range(window[0]) for j in range(window[1])))
    has_table, scale = draw.one("table", False, True, True, True), draw.scale()
    arguments = {name: draw.normal(B, h, shape[0] * shape[1], d) for name in "qkv"}
    table = draw.normal(h, 2 * window[0] - 1, 2 * window[1] - 1) if has_table else None
    arguments |= {"table": table, "query_shape": shape}
    return arguments, {"window": window} | ({} if shift == (0, 0) else {"shift": shift}) | scale


WINDOW_ATTENTION = {
    **of_scale(windowed),
    **of_tokens(windowed),
    **of_bias(windowed, "table"),
    "shift ignored": altered(windowed, shift=lambda a: (0, 0)),
    "shift of rows and columns swapped": altered(windowed, shift=lambda a: swapped(a.shift)),
    "shift without mask": on_the_map(masked=False),
    "roll in the wrong direction": on_the_map(direction=-1),
    "a single window is shifted too": on_the_map(shift_single=True),
    "hidden keys get logit 0, not -inf": on_the_map(finish=hidden_as_zero),
    "mask after the softmax": on_the_map(finish=masked_afterwards),
    "padding is read": padding_is_read,
    "every n-th token instead of neighbours": on_the_map(dilated=True),
    "window sides swapped": altered(
        windowed, window=lambda a: swapped(a.window), shift=lambda a: swapped(a.shift), table=lambda a: a.table.mT
    ),
    "H and W swapped": altered(windowed, shape=lambda a: swapped(a.shape)),
    "softmax over the queries": on_the_map(finish=over_queries),
    "bias read with rows and columns swapped": on_the_map(swap_bias=True),
    "bias at the displacement of key minus query": altered(windowed, table=lambda a: a.table.flip(1, 2)),
    "bias index not shifted to be positive": altered(
        windowed, table=lambda a: a.table.roll((a.window[0] - 1, a.window[1] - 1), (1, 2))
    ),
    "bias added after the softmax": on_the_map(finish=bias_on_weights),
}

register(window_attention, draw_case, WINDOW_ATTENTION)
