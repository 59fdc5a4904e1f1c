"""Mistakes of `deformable_attention`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dynattn import core
from dynattn.core import dense_attention_torch as dense
from dynattn.mechanisms.deformable import deformable_attention_torch as deformable
from dynattn.verify.mistakes.common import altered, first_for_all, interleaved, of_scale, swapped
from dynattn.verify.mistakes.dense import bias_after_softmax, detached_weights, softmax_over


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
