"""`deformable_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dynattn import core
from dynattn.core import dense_attention_torch as dense
from dynattn.mechanisms.deformable import deformable_attention
from dynattn.mechanisms.deformable import deformable_attention_torch as deformable
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all, of_bias, of_scale, of_tokens, swapped
from dynattn.verify.mistakes.dense import bias_after_softmax, detached_weights, softmax_over
from dynattn.verify.registry import register


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


def draw_case(draw: Draw) -> Call:
    """A call of random sizes, with and without what is optional."""
    h = draw.one("h", 1, 2, 2, 4)
    g = draw.one("g", *range(1, min(h, 2) + 1))
    B, d, N, H, W = draw.sizes(B=1 if h > 2 else 2, d=3, N=4, H=3, W=3)
    own = 2 * H - 1, 2 * W - 1
    table = draw.one("table", None, own, (1, 1), own, (2, 5), own, (4, 3), own, (5, 1))
    grid, scale = draw.one("query_grid", "centre", "corner"), draw.scale()
    arguments = {
        "q": draw.normal(B, h, H * W, d),
        "k": draw.normal(B, h, N, d),
        "v": draw.normal(B, h, N, d),
        "points": draw.points(B, g, N),
        "table": None if table is None else draw.normal(h, *table),
        "query_shape": (H, W),
    }
    return arguments, ({} if grid == "centre" else {"query_grid": grid}) | scale


DEFORMABLE_ATTENTION = {
    **of_scale(deformable),
    **of_tokens(deformable),
    **of_bias(deformable, "table"),
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
    "bias added after the softmax": bias_read(attend=bias_after_softmax),
    "gradient cut at the points": altered(deformable, points=lambda a: a.points.detach()),
    "gradient cut at the weights": bias_read(attend=detached_weights),
}

register(deformable_attention, draw_case, DEFORMABLE_ATTENTION)
