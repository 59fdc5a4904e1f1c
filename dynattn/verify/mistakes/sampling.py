"""`sample_points` for the oracle: how its cases are drawn, and its mistakes."""

import torch.nn.functional as F
from torch import Tensor

from dynattn.core import sample_points
from dynattn.core import sample_points_torch as sample
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all, moved
from dynattn.verify.registry import register


def read(x: Tensor, points: Tensor, **how) -> Tensor:
    """`sample_points` with other options of grid_sample."""
    grid = points.flip(-1)[:, None]
    return F.grid_sample(x, grid, **{"align_corners": True, **how})[:, :, 0]


def inside(points: Tensor) -> Tensor:
    """1 for points on the map, 0 for those outside."""
    return (points.abs() <= 1).all(dim=-1).to(points)


def draw_case(draw: Draw) -> Call:
    """A call of random sizes, with and without what is optional."""
    B, C, H, W, N = draw.sizes(B=2, C=3, H=5, W=5, N=6)
    return {"x": draw.normal(B, C, H, W), "points": draw.points(B, N)}, {}


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

register(sample_points, draw_case, SAMPLE_POINTS)
