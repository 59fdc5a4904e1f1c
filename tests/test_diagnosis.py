"""What the oracle says of answers that no single mistake explains, and of operations that others register."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynattn import core, ops, verify
from dynattn.verify.registry import OPERATIONS

pytestmark = pytest.mark.usefixtures("unchecked")


def told(operation: str, function) -> verify.Mismatch:
    """The mismatch of a function."""
    with pytest.raises(verify.Mismatch) as caught:
        verify.check(operation, function)
    return caught.value


def deformable(q, k, v, points, table, query_shape, query_grid="centre", scale=None, *, half=0.5, own_scale=None):
    """Deformable attention by a student."""
    bias = None
    if table is not None:
        queries = core.grid_points(query_shape, query_grid, points)
        R = half * (queries[:, None] - points[:, :, None])
        tables = table.unflatten(0, (points.shape[1], -1)).expand(len(q), -1, -1, -1, -1).flatten(0, 1)
        bias = F.grid_sample(tables, R.flip(-1).flatten(0, 1), align_corners=True)
        bias = bias.unflatten(0, (len(q), -1)).flatten(1, 2)
    scale = scale if scale is not None else q.shape[-1] ** -0.5
    return core.dense_attention_torch(q, k, v, bias, own_scale or scale)


def test_two_mistakes_are_named_together():
    """The scale forgotten and the displacement not halved: neither alone gives the answer in every case."""

    def student(q, k, v, points, table, query_shape, query_grid="centre", scale=None):
        return deformable(q, k, v, points, table, query_shape, query_grid, half=1.0, own_scale=1.0)

    found = told("deformable_attention", student)
    assert found.mistakes == []
    assert [set(pair) for pair in found.diagnosis.pairs] == [{"scale missing", "displacement not halved"}]
    assert "this is what comes out with two mistakes together: " in str(found)
    assert "no mistake of the catalogue" not in str(found)


def test_a_mistake_that_explains_the_case_shown_alone():
    """The scale is missing, and a second thing is wrong that no catalogue has: the second shows in other cases only."""

    def student(q, k, v, points, table, query_shape, query_grid="centre", scale=None):
        table = table if table is None else table + 0.1 * table**2
        return deformable(q, k, v, points, table, query_shape, query_grid, own_scale=1.0)

    found = told("deformable_attention", student)
    assert found.mistakes == found.diagnosis.pairs == []
    assert "scale missing" in found.diagnosis.here
    assert "in this case, this is what comes out with the mistake: " in str(found)
    assert "in other cases something else is wrong too" in str(found)


def test_what_is_right_already_is_said():
    """Wrong by something unknown, but only where there is a table."""

    def student(q, k, v, points, table, query_shape, query_grid="centre", scale=None):
        table = table if table is None else table.sin() + 1
        return deformable(q, k, v, points, table, query_shape, query_grid, scale)

    found = told("deformable_attention", student)
    assert ("table", None) in found.diagnosis.right
    assert "it is right in all cases with: " in str(found) and "no table" in str(found)


def test_what_is_right_with_one_group_only():
    """Heads take the groups in turn, and a table is read in a way of its own: with one group all is well but that."""

    def student(q, k, v, points, table, query_shape, query_grid="centre", scale=None):
        points = points + 0.01 * torch.arange(points.shape[1], dtype=points.dtype)[:, None, None]
        return deformable(q, k, v, points, table, query_shape, query_grid, scale)

    found = told("deformable_attention", student)
    assert ("g", 1) in found.diagnosis.right
    assert "one group (g = 1)" in str(found)


def test_where_nothing_is_right_nothing_is_said():
    found = told("dense_attention", lambda q, k, v: ops.dense_attention(q, k, v) + 1)
    assert found.diagnosis.right == [] and "it is right" not in str(found)


# ------------------------------------------------------------------------------------------------ operations of others


def mean_of_neighbours(x: Tensor, *, reach: int, impl: str = "auto") -> Tensor:
    """Each of (B, N, d) becomes the mean of those at most `reach` places away."""
    N = x.shape[1]
    rows = [x[:, max(n - reach, 0) : n + reach + 1].mean(dim=1) for n in range(N)]
    return torch.stack(rows, dim=1)


def draw_neighbours(draw: verify.Draw):
    """A call of it."""
    B, N, d = draw.sizes(B=2, N=6, d=3)
    return {"x": draw.normal(B, N, d)}, {"reach": draw.one("reach", 1, 2, 3)}


@pytest.fixture
def neighbours():
    """The oracle knows the operation."""

    def too_far(x, reach):
        return mean_of_neighbours(x, reach=reach + 1)

    verify.register(mean_of_neighbours, draw_neighbours, {"one place too far": too_far})
    yield "mean_of_neighbours"
    del OPERATIONS["mean_of_neighbours"]


def test_an_operation_of_others(neighbours):
    """Registered, it is checked, its mistakes are named, its options are known."""
    assert neighbours in verify.operations()
    verify.check(neighbours, mean_of_neighbours)
    assert told(neighbours, lambda x, reach: mean_of_neighbours(x, reach=reach + 1)).mistakes == ["one place too far"]
    with pytest.raises(TypeError, match="mean_of_neighbours needs a parameter 'reach'"):
        verify.check(neighbours, lambda x: x)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, draw_neighbours, {}), TypeError, "operation: expected a function with a name, got 3"),
        ((draw_neighbours, draw_neighbours, {}), ValueError, "operation: expected a function with an argument impl"),
        ((mean_of_neighbours, 3, {}), TypeError, "draw: expected a function, got 3"),
        ((mean_of_neighbours, draw_neighbours, {"a": 3}), TypeError, "mistakes: expected functions by name"),
    ],
)
def test_what_is_no_operation_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        verify.register(*arguments)
    assert "mean_of_neighbours" not in verify.operations()
