"""`detr_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange

from dynattn.mechanisms.deformable_detr import detr_attention
from dynattn.mechanisms.deformable_detr import detr_attention_torch as detr
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all, interleaved, moved
from dynattn.verify.registry import register


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


def draw_case(draw: Draw) -> Call:
    """A call of random sizes, with and without what is optional."""
    B, h, d, H, W, L, K = draw.sizes(B=2, h=2, d=2, H=4, W=4, L=4, K=4)
    v, points, weights = draw.normal(B, h, d, H, W), draw.points(B, h, L, K), draw.normal(B, h, L, K)
    return {"v": v, "points": points, "weights": weights.softmax(dim=-1)}, {}


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

register(detr_attention, draw_case, DETR_ATTENTION)
