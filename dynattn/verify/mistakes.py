"""The catalogue of mistakes: for every operation, ways in which implementations of it go wrong.

Each entry has the arguments of the operation's torch form and computes what the mistake computes. `check` looks a wrong
function up in here; the tests hold `check` to tell every one of them from the loops, and to name it.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dynattn import core
from dynattn.core import dense_attention_torch as dense
from dynattn.core import sample_points_torch as sample
from dynattn.mechanisms.deformable import deformable_attention_torch as deformable
from dynattn.mechanisms.deformable_detr import detr_attention_torch as detr
from dynattn.mechanisms.window import shift_of
from dynattn.mechanisms.window import window_attention_torch as windowed


def altered(form: Callable, **changes: Callable) -> Callable:
    """`form` with arguments replaced: for each name a function of all arguments. What is None stays None."""

    @wraps(form)
    def wrong(*positional, **named):
        given = signature(form).bind(*positional, **named).arguments
        a = SimpleNamespace(**given)
        return form(**given | {name: change(a) for name, change in changes.items() if given[name] is not None})

    return wrong


def interleaved(form: Callable) -> Callable:
    """`form` whose output lists the heads of a channel side by side, where the channels of a head belong."""

    @wraps(form)
    def wrong(*positional, **named):
        z = form(*positional, **named)
        return rearrange(rearrange(z, "B h L d -> B L (d h)"), "B L (h d) -> B h L d", h=z.shape[1])

    return wrong


def first_for_all(tensor: Tensor, dim: int) -> Tensor:
    """The first slice of a dimension in place of every slice."""
    return tensor.narrow(dim, 0, 1).expand_as(tensor)


def swapped(pair: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) as (columns, rows)."""
    return pair[1], pair[0]


def moved(points: Tensor, shape: tuple[int, int], change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Points whose pixel p on an axis of n cells has become change(p, n)."""
    n = points.new_tensor(shape)
    return 2 * change((points + 1) * (n - 1) / 2, n) / (n - 1).clamp(min=1) - 1


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled dot products (B, h, L, N)."""
    return torch.einsum("bhld,bhnd->bhln", q, k) * scale


def of_scale(form: Callable) -> dict[str, Callable]:
    """The scale goes wrong in the same ways in every attention."""
    return {
        "scale missing": altered(form, scale=lambda a: 1.0),
        "scale applied twice": altered(form, scale=lambda a: a.scale**2),
        "scale given but ignored": altered(form, scale=lambda a: a.q.shape[-1] ** -0.5),
        "scale of all channels, not of one head's": altered(form, scale=lambda a: a.scale * a.q.shape[1] ** -0.5),
    }


# ---------------------------------------------------------------------------------------------------------------------
# sample_points
# ---------------------------------------------------------------------------------------------------------------------


def read(x: Tensor, points: Tensor, **how) -> Tensor:
    """`sample_points` with other options of grid_sample."""
    grid = points.flip(-1)[:, None]
    return F.grid_sample(x, grid, **{"align_corners": True, **how})[:, :, 0]


def inside(points: Tensor) -> Tensor:
    """1 for points on the map, 0 for those outside."""
    return (points.abs() <= 1).all(dim=-1).to(points)


SAMPLE_POINTS = {
    "rows and columns swapped": altered(sample, points=lambda a: a.points.flip(-1)),
    "rows counted from below": altered(sample, points=lambda a: a.points * a.points.new_tensor([-1, 1])),
    "positions taken as 0 to 1": altered(sample, points=lambda a: 2 * a.points - 1),
    "align_corners=False": lambda x, points: read(x, points, align_corners=False),
    "border padding instead of zeros": lambda x, points: read(x, points, padding_mode="border"),
    "reflection instead of zeros": lambda x, points: read(x, points, padding_mode="reflection"),
    "nearest cell": lambda x, points: read(x, points, mode="nearest"),
    "half a pixel off": altered(sample, points=lambda a: moved(a.points, a.x.shape[2:], lambda p, n: p + 0.5)),
    "scaled by H, not H - 1": altered(
        sample, points=lambda a: moved(a.points, a.x.shape[2:], lambda p, n: p * n / (n - 1).clamp(min=1))
    ),
    "neighbours' weights exchanged": altered(
        sample, points=lambda a: moved(a.points, a.x.shape[2:], lambda p, n: 2 * p.floor() + 1 - p)
    ),
    "zero at once outside, no fading": lambda x, points: sample(x, points) * inside(points)[:, None],
    "first image for the whole batch": altered(sample, x=lambda a: first_for_all(a.x, 0)),
    "first channel for all": altered(sample, x=lambda a: first_for_all(a.x, 1)),
    "gradient cut at the points": altered(sample, points=lambda a: a.points.detach()),
    "gradient cut at the map": altered(sample, x=lambda a: a.x.detach()),
}


# ---------------------------------------------------------------------------------------------------------------------
# dense_attention
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# window_attention
# ---------------------------------------------------------------------------------------------------------------------


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


WINDOW_ATTENTION = {
    **of_scale(windowed),
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
    "bias missing": altered(windowed, table=lambda a: None),
    "bias read with rows and columns swapped": on_the_map(swap_bias=True),
    "bias at the displacement of key minus query": altered(windowed, table=lambda a: a.table.flip(1, 2)),
    "bias index not shifted to be positive": altered(
        windowed, table=lambda a: a.table.roll((a.window[0] - 1, a.window[1] - 1), (1, 2))
    ),
    "bias scaled too": altered(windowed, table=lambda a: a.table * a.scale),
    "bias added after the softmax": on_the_map(finish=bias_on_weights),
    "bias of the first head for all": altered(windowed, table=lambda a: first_for_all(a.table, 0)),
    "heads and channels interleaved": interleaved(windowed),
    "first image's keys for the whole batch": altered(windowed, k=lambda a: first_for_all(a.k, 0)),
    "gradient cut at the table": altered(windowed, table=lambda a: a.table.detach()),
    "gradient cut at the values": altered(windowed, v=lambda a: a.v.detach()),
}


# ---------------------------------------------------------------------------------------------------------------------
# deformable_attention
# ---------------------------------------------------------------------------------------------------------------------


def bias_read(
    displacement: Callable[[Tensor, Tensor], Tensor] = lambda queries, points: (queries - points) / 2,
    order: str = "(H W)",
    attend: Callable = dense,
    **how,
) -> Callable:
    """Deformable attention whose table is read at another displacement, or for queries in another order."""

    def wrong(q, k, v, points, table, query_shape, query_grid, scale):
        if table is None:
            return attend(q, k, v, None, scale)
        queries = core.grid_points(query_shape, query_grid, points)
        queries = rearrange(queries, f"(H W) two -> {order} 1 two", H=query_shape[0])
        R = displacement(queries, points[:, :, None])  # (B, g, L, N, 2)
        tables = rearrange(table, "(g m) I J -> g m I J", g=points.shape[1]).expand(len(q), -1, -1, -1, -1)
        bias = F.grid_sample(tables.flatten(0, 1), R.flip(-1).flatten(0, 1), **{"align_corners": True, **how})
        return attend(q, k, v, rearrange(bias, "(B g) m L N -> B (g m) L N", B=len(q)), scale)

    return wrong


DEFORMABLE_ATTENTION = {
    **of_scale(deformable),
    "softmax over the queries": bias_read(attend=softmax_over(-2)),
    "points: rows and columns swapped": altered(deformable, points=lambda a: a.points.flip(-1)),
    "points clamped to the map": altered(deformable, points=lambda a: a.points.clamp(-1, 1)),
    "first image's points for the whole batch": altered(deformable, points=lambda a: first_for_all(a.points, 0)),
    "first group's points for all heads": altered(deformable, points=lambda a: first_for_all(a.points, 1)),
    "heads take groups in turn": altered(
        deformable, points=lambda a: a.points[:, torch.arange(a.q.shape[1]) % a.points.shape[1]]
    ),
    "displacement not halved": bias_read(lambda queries, points: queries - points),
    "displacement from point to query negated": bias_read(lambda queries, points: (points - queries) / 2),
    "displacement: rows and columns swapped": bias_read(lambda queries, points: (queries - points).flip(-1) / 2),
    "displacement without the query": bias_read(lambda queries, points: (0 * queries - points) / 2),
    "query grid: centre and corner exchanged": altered(
        deformable, query_grid=lambda a: {"centre": "corner", "corner": "centre"}[a.query_grid]
    ),
    "query grid given but ignored": altered(deformable, query_grid=lambda a: "centre"),
    "queries counted column by column": bias_read(order="(W H)"),
    "H and W swapped": altered(deformable, query_shape=lambda a: swapped(a.query_shape)),
    "table read with align_corners=False": bias_read(align_corners=False),
    "table read with border padding": bias_read(padding_mode="border"),
    "table read at its nearest entry": bias_read(mode="nearest"),
    "bias missing": altered(deformable, table=lambda a: None),
    "bias scaled too": altered(deformable, table=lambda a: a.table * a.scale),
    "bias added after the softmax": bias_read(attend=bias_after_softmax),
    "bias of the first head for all": altered(deformable, table=lambda a: first_for_all(a.table, 0)),
    "keys read as values": altered(deformable, v=lambda a: a.k),
    "heads and channels interleaved": interleaved(deformable),
    "gradient cut at the points": altered(deformable, points=lambda a: a.points.detach()),
    "gradient cut at the table": altered(deformable, table=lambda a: a.table.detach()),
    "gradient cut at the weights": bias_read(attend=detached_weights),
}


# ---------------------------------------------------------------------------------------------------------------------
# detr_attention
# ---------------------------------------------------------------------------------------------------------------------


def values_read(**how) -> Callable:
    """Deformable-DETR's attention whose values are sampled in another way."""

    def wrong(v, points, weights):
        grid = points.flip(-1).flatten(0, 1)
        sampled = F.grid_sample(v.flatten(0, 1), grid, **{"align_corners": True, **how})  # (B h, d, L, K)
        return torch.einsum("bhlk,bhdlk->bhld", weights, sampled.unflatten(0, v.shape[:2]))

    return wrong


def heads_before_images(v, points, weights):
    """Maps are folded as (h B), points as (B h)."""
    maps = rearrange(v, "B h d H W -> (h B) d H W")
    return detr(rearrange(maps, "(B h) d H W -> B h d H W", h=v.shape[1]), points, weights)


DETR_ATTENTION = {
    "points: rows and columns swapped": altered(detr, points=lambda a: a.points.flip(-1)),
    "points read as (K L), not (L K)": altered(
        detr, points=lambda a: rearrange(a.points, "B h L K two -> B h (K L) two").unflatten(2, a.points.shape[2:4])
    ),
    "only the first point is read": altered(detr, points=lambda a: first_for_all(a.points, 3)),
    "first query's points for all": altered(detr, points=lambda a: first_for_all(a.points, 2)),
    "first head's points for all": altered(detr, points=lambda a: first_for_all(a.points, 1)),
    "points half a pixel off": altered(detr, points=lambda a: moved(a.points, a.v.shape[3:], lambda p, n: p + 0.5)),
    "align_corners=False": values_read(align_corners=False),
    "border padding instead of zeros": values_read(padding_mode="border"),
    "nearest cell": values_read(mode="nearest"),
    "all points weigh the same": altered(detr, weights=lambda a: torch.full_like(a.weights, 1 / a.weights.shape[-1])),
    "weights ignored: points are summed": altered(detr, weights=lambda a: torch.ones_like(a.weights)),
    "softmax of the weights again": altered(detr, weights=lambda a: a.weights.softmax(-1)),
    "weights normalised over the queries": altered(detr, weights=lambda a: a.weights / a.weights.sum(2, keepdim=True)),
    "weights of the points in reverse": altered(detr, weights=lambda a: a.weights.flip(-1)),
    "first head's weights for all": altered(detr, weights=lambda a: first_for_all(a.weights, 1)),
    "heads and images folded in different orders": heads_before_images,
    "heads and channels interleaved": interleaved(detr),
    "gradient cut at the points": altered(detr, points=lambda a: a.points.detach()),
    "gradient cut at the weights": altered(detr, weights=lambda a: a.weights.detach()),
    "gradient cut at the values": altered(detr, v=lambda a: a.v.detach()),
}

MISTAKES: dict[str, dict[str, Callable]] = {
    "sample_points": SAMPLE_POINTS,
    "dense_attention": DENSE_ATTENTION,
    "window_attention": WINDOW_ATTENTION,
    "deformable_attention": DEFORMABLE_ATTENTION,
    "detr_attention": DETR_ATTENTION,
}
