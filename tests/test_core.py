"""Coordinates, bilinear reading, dense attention and windows: the loops are the specification, torch has to follow."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DOUBLE, normal, somewhere
from torch import nn

from dynattn import core, ops, verify
from dynattn.core import sample_points_torch

# ---------------------------------------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize(
    "grid, n, expected",
    [
        ("centre", 4, [-0.75, -0.25, 0.25, 0.75]),
        ("corner", 4, [-1, -1 / 3, 1 / 3, 1]),
        ("centre", 1, [0.0]),
        ("corner", 1, [0.0]),
    ],
)
def test_axis(grid, n, expected):
    torch.testing.assert_close(core.axis(n, grid, normal()), torch.tensor(expected, dtype=DOUBLE))


def test_grid_points_are_row_major():
    points = core.grid_points((2, 3), "corner", normal())
    assert points.tolist() == [[-1, -1], [-1, 0], [-1, 1], [1, -1], [1, 0], [1, 1]]


def test_corner_grid_stands_on_pixel_centres():
    pixels = core.to_pixels(core.grid_points((5, 4), "corner", normal()), (5, 4))
    expected = torch.cartesian_prod(torch.arange(5.0), torch.arange(4.0)).double()
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("H", [1, 2, 7, 14])
def test_centre_grid_is_up_to_half_a_pixel_off(H):
    """The published code's references: number i reads pixel (i + 1/2)(H - 1) / H."""
    pixels = core.to_pixels(core.grid_points((H, 1), "centre", normal()), (H, 1))[:, 0]
    i = torch.arange(H, dtype=DOUBLE)
    torch.testing.assert_close(pixels, (i + 0.5) * (H - 1) / H, rtol=0, atol=1e-14)
    assert (pixels - i).abs().max() <= 0.5


# ---------------------------------------------------------------------------------------------------- bilinear reading


@pytest.mark.parametrize(
    "a, b, expected", [(2.0, 2, 1), (2.25, 2, 0.75), (1.25, 2, 0.25), (3, 2, 0), (1, 2, 0), (9, 2, 0)]
)
def test_hat(a, b, expected):
    """DAT-8: g(a, b) = max(0, 1 - |a - b|)."""
    assert core.hat(torch.tensor(a), b) == expected == max(0, 1 - abs(a - b))


def test_reading_by_hand():
    """DAT-8: between four cells, and over the border, where the map fades to zero."""
    x = torch.tensor([[1.0, 2.0], [4.0, 8.0]])[None, None]
    points = torch.tensor([[-1, -1], [1, -1], [-1, 1], [0, 0], [0.5, -0.5], [2, 1], [1.5, -1.5], [3, 3]])[None]
    # In pixels: (0,0) (1,0) (0,1) (.5,.5) (.75,.25) (1.5,1) (1.25,-.25) (2,2)
    expected = [1, 4, 2, 3.75, 0.25 * (0.75 * 1 + 0.25 * 2) + 0.75 * (0.75 * 4 + 0.25 * 8), 4, 0.75 * 0.75 * 4, 0]
    for impl in ("loops", "torch"):
        assert ops.sample_points(x, points, impl=impl).flatten().tolist() == pytest.approx(expected)


def test_kinks_of_the_hat():
    """DAT-8: on pixel centres and borders both forms have the one-sided slope from the right, in each direction."""
    H, W = 5, 3  # H - 1 and W - 1 are powers of two, so that pixels are exact numbers
    rows, cols = torch.arange(-2, H + 2, dtype=DOUBLE), torch.arange(-2, W + 2, dtype=DOUBLE)
    points = torch.cartesian_prod(2 * rows / (H - 1) - 1, 2 * cols / (W - 1) - 1)[None]
    x = normal(1, 2, H, W)
    verify.compare("sample_points", sample_points_torch, x, points)
    points.requires_grad_()
    (slope,) = torch.autograd.grad(ops.sample_points(x, points).sum(), points)
    rows = F.pad(x.sum(1)[0], (2, 2, 2, 3))  # of all points; one row more for the last one's neighbour
    torch.testing.assert_close(slope[0, :, 0].reshape(H + 4, W + 4), (rows[1:] - rows[:-1]) * (H - 1) / 2)


def test_points_far_outside_read_nothing():
    x, points = normal(1, 2, 3, 4), torch.tensor([[[5.0, 0], [0, -5], [1e9, 1e9]]], dtype=DOUBLE)
    found = verify.answer(ops.sample_points, {"x": x, "points": points}, {})
    assert all((value == 0).all() for value in found.values())
    verify.compare("sample_points", sample_points_torch, x, points)


def test_zero_offsets_on_pixel_centres_are_the_identity():
    """DAT-8 on a corner grid of stride 1."""
    x = normal(2, 3, 5, 7)
    sampled = ops.sample_points(x, core.grid_points((5, 7), "corner", x).expand(2, -1, -1))
    torch.testing.assert_close(sampled, x.flatten(2), rtol=0, atol=1e-14)


def test_a_linear_ramp_is_read_exactly():
    """DAT-8: bilinear reading knows linear functions, between cells too."""
    ramp = 3 * torch.arange(6, dtype=DOUBLE)[:, None] - 2 * torch.arange(4, dtype=DOUBLE) + 5
    points = torch.rand(1, 50, 2, dtype=DOUBLE) * 2 - 1
    row, col = core.to_pixels(points[0], (6, 4)).T
    for impl in ("loops", "torch"):
        torch.testing.assert_close(ops.sample_points(ramp[None, None], points, impl=impl)[0, 0], 3 * row - 2 * col + 5)


@pytest.mark.parametrize("H, W", [(5, 4), (1, 3), (1, 1)])
def test_bilinear_weights_are_the_matrix_of_sampling(H, W):
    """DAT-8 as a matrix, which effective matrices are built with."""
    x, points = normal(2, 3, H, W), somewhere(2, 9)
    by_matrix = torch.einsum("bns,bcs->bcn", core.bilinear_weights(points, (H, W)), x.flatten(2))
    torch.testing.assert_close(by_matrix, ops.sample_points(x, points), rtol=1e-12, atol=1e-14)
    inside = core.bilinear_weights(points.clamp(-1, 1), (H, W))
    torch.testing.assert_close(inside.sum(-1), torch.ones(2, 9, dtype=DOUBLE))


# ----------------------------------------------------------------------------------------------------- dense attention


def test_softmax_cannot_overflow():
    """DAT-2: logits of thousands, in both forms."""
    q, k, v = 1e3 * normal(1, 1, 2, 3), normal(1, 1, 4, 3), normal(1, 1, 4, 3)
    for impl in ("loops", "torch"):
        assert ops.dense_attention(q, k, v, scale=10.0, impl=impl).isfinite().all()
    weights = core.softmax_loops(list(torch.tensor([1e4, 1e4, -1e4])))
    assert torch.stack(weights).tolist() == [0.5, 0.5, 0]


def test_attention_weights_are_those_that_attention_uses():
    """DAT-2."""
    q, k, v, bias = normal(2, 3, 5, 4), normal(2, 3, 6, 4), normal(2, 3, 6, 4), normal(3, 5, 6)
    for b in (bias, None):
        weights = core.attention_weights(q, k, b, 0.5)
        torch.testing.assert_close(weights @ v, ops.dense_attention(q, k, v, bias=b, scale=0.5))
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=DOUBLE))


# --------------------------------------------------------------------------------------------------- heads and windows


def test_heads_own_consecutive_channels():
    """DAT-3: the concatenation of heads, and its inverse."""
    x = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    heads = core.split_heads(x, 2)
    assert heads[0, 1, 4].tolist() == x[0, 1, 1, 2:].tolist()
    assert torch.equal(core.merge_heads(heads, (2, 3)), x)


@pytest.mark.parametrize("shape, window", [((4, 6), (2, 3)), ((3, 3), (3, 3)), ((5, 2), (1, 2))])
def test_windows_come_apart_and_together(shape, window):
    x = normal(2, *shape, 3)
    windows = core.partition_windows(x, window)
    assert windows.shape == (2 * shape[0] // window[0] * shape[1] // window[1], window[0] * window[1], 3)
    assert torch.equal(windows[0], x[0, : window[0], : window[1]].flatten(0, 1))
    assert torch.equal(core.merge_windows(windows, window, shape), x)


def test_padding():
    assert core.padding_to((5, 6), (3, 3)) == (1, 0) and core.padding_to((1, 1), (4, 2)) == (3, 1)
    x = normal(1, 2, 3, 1)
    assert core.pad_map(x, (0, 0)) is x
    padded = core.pad_map(x, (1, 2))
    assert padded.shape == (1, 3, 5, 1) and torch.equal(padded[:, :2, :3], x)
    assert padded.sum() == pytest.approx(x.sum().item())


def test_relative_index_by_hand():
    rows, cols = core.relative_index((2, 3))
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (0, 2, 0, 4)
    assert (rows[0, 5], cols[0, 5]) == (0, 0)  # from the first cell to the last: displacement (-1, -2)
    assert (rows[4, 0], cols[4, 0]) == (2, 3)  # from (1, 1) to (0, 0): displacement (1, 1)
    assert (rows.diagonal() == 1).all() and (cols.diagonal() == 2).all()


def test_resizing_a_table():
    table = normal(2, 5, 3)
    assert core.resize_table(table, (5, 3)) is table
    bigger = core.resize_table(table, (9, 7))
    torch.testing.assert_close(bigger, F.interpolate(table[None], (9, 7), mode="bicubic", align_corners=False)[0])
    torch.testing.assert_close(core.resize_table(torch.ones(1, 5, 3), (8, 8)), torch.ones(1, 8, 8))


# ----------------------------------------------------------------------------------------------------------- bad input

Z = torch.zeros
BAD = [
    (
        lambda: ops.sample_points(Z(2, 3, 4), Z(2, 5, 2)),
        ValueError,
        r"x: expected 4 dimensions \(B C H W\), got shape \(2, 3, 4\)",
    ),
    (lambda: ops.sample_points(Z(1, 3, 4, 4), Z(5, 2)), ValueError, r"points: expected 3 dimensions"),
    (
        lambda: ops.sample_points(Z(1, 3, 4, 4), Z(1, 5, 3)),
        ValueError,
        r"points: expected shape \(B N 2\), got shape \(1, 5, 3\)",
    ),
    (lambda: ops.sample_points(Z(2, 3, 4, 4), Z(1, 5, 2)), ValueError, r"points: .* with B = 2, got shape \(1, 5, 2\)"),
    (lambda: ops.sample_points(Z(1, 0, 4, 4), Z(1, 5, 2)), ValueError, r"x: no dimension may be empty"),
    (lambda: ops.sample_points(Z(1, 3, 4, 4), Z(1, 0, 2)), ValueError, r"points: no dimension may be empty"),
    (
        lambda: ops.sample_points(Z(1, 3, 4, 4).int(), Z(1, 5, 2)),
        TypeError,
        r"x: expected a floating tensor, got torch.int32",
    ),
    (lambda: ops.sample_points(Z(1, 3, 4, 4), Z(1, 5, 2).long()), TypeError, r"points: expected a floating tensor"),
    (
        lambda: ops.sample_points(Z(1, 3, 4, 4), Z(1, 5, 2).double()),
        TypeError,
        r"points: expected torch.float32 on cpu as x has, got torch.float64",
    ),
    (
        lambda: ops.sample_points(Z(1, 3, 4, 4), Z(1, 5, 2, device="meta")),
        TypeError,
        r"points: .* on cpu as x has, got torch.float32 on meta",
    ),
    (lambda: ops.sample_points([[1.0]], Z(1, 5, 2)), TypeError, r"x: expected a tensor of shape \(B C H W\), got list"),
    (
        lambda: ops.sample_points(Z(1, 3, 4, 4), Z(1, 5, 2), impl="cuda"),
        ValueError,
        r"impl: expected one of 'auto', .*, got 'cuda'",
    ),
    (lambda: ops.dense_attention(Z(2, 3, 4), Z(2, 3, 4), Z(2, 3, 4)), ValueError, r"q: expected 4 dimensions"),
    (lambda: ops.dense_attention(Z(1, 2, 3, 4), Z(1, 2, 5, 6), Z(1, 2, 5, 4)), ValueError, r"k: .* with d = 4, got"),
    (lambda: ops.dense_attention(Z(1, 2, 3, 4), Z(1, 1, 5, 4), Z(1, 2, 5, 4)), ValueError, r"k: .* with h = 2, got"),
    (lambda: ops.dense_attention(Z(1, 2, 3, 4), Z(1, 2, 5, 4), Z(1, 2, 6, 4)), ValueError, r"v: .* with N = 5, got"),
    (
        lambda: ops.dense_attention(Z(1, 2, 3, 4), Z(1, 2, 0, 4), Z(1, 2, 0, 4)),
        ValueError,
        r"k: no dimension may be empty",
    ),
    (
        lambda: ops.dense_attention(*3 * [Z(1, 2, 3, 4)], bias=Z(3, 3)),
        ValueError,
        r"bias: expected 3 dimensions \(h L N\)",
    ),
    (
        lambda: ops.dense_attention(*3 * [Z(1, 2, 3, 4)], bias=Z(2, 3, 3).half()),
        TypeError,
        r"bias: expected torch.float32",
    ),
    (
        lambda: ops.dense_attention(*3 * [Z(1, 2, 3, 4)], scale=math.nan),
        ValueError,
        r"scale: expected a finite float or None, got nan",
    ),
    (
        lambda: ops.dense_attention(*3 * [Z(1, 2, 3, 4)], scale="1"),
        ValueError,
        r"scale: expected a finite float or None, got '1'",
    ),
    (lambda: ops.dense_attention(*3 * [Z(1, 2, 3, 4)], scale=True), ValueError, r"scale: .* got True"),
    (
        lambda: ops.dense_attention(*3 * [Z(1, 2, 3, 4)], impl="triton"),
        ValueError,
        r"impl: dense_attention has no 'triton' kernel here",
    ),
    (
        lambda: core.pair("window", 2.0),
        TypeError,
        r"window: expected a whole number or a pair \(rows, columns\), got 2.0",
    ),
    (lambda: core.pair("window", (1, 2, 3)), TypeError, r"window: expected a whole number or a pair"),
    (lambda: core.pair("window", (3, 0)), ValueError, r"window\[1\]: expected at least 1, got 0"),
    (lambda: core.positive("heads", True), TypeError, r"heads: expected a whole number, got True"),
    (lambda: core.divisor("heads", 3, 8), ValueError, r"heads: expected a divisor of 8, got 3"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_defaults_of_verify_are_those_of_the_operations():
    """The oracle fills in options that a function has no default for; they must be what the operations do."""
    for operation in verify.operations():
        call = verify.case(operation, 0, frozenset({"bias", "scale", "shift", "query_grid"}))
        named = verify.answer(getattr(ops, operation), call.arguments, call.options)
        filled = verify.answer(getattr(ops, operation), call.arguments, call.defaults | call.options)
        assert all(torch.equal(named[key], filled[key]) for key in named)


@pytest.mark.parametrize("descending", [False, True])
def test_an_exported_order_is_as_stable_as_any_other(monkeypatch, descending):
    """ONNX has no stable sort: of equal values the lowest number is first there too."""
    values = torch.randint(3, (2, 5, 7)).double()
    values[0, 0] = -torch.inf
    want = core.stable_order(values, descending=descending)
    assert torch.equal(want, values.argsort(dim=-1, descending=descending, stable=True))
    monkeypatch.setattr(core, "exporting", lambda: True)
    assert torch.equal(core.stable_order(values, descending=descending), want)


# ------------------------------------------------------------------------------------------- a few images at a time


class Watched(nn.Module):
    """A linear layer and a batch norm that say how many images they got."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.seen = nn.Linear(4, 6), nn.BatchNorm2d(6), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return core.by_images(self, self.of_some, x, 10 * 6)

    def of_some(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        return core.gelu(self.norm(self.linear(x).movedim(-1, 1))).movedim(1, -1)


@pytest.mark.parametrize(("part", "seen"), [(60, [1] * 5), (120, [2, 2, 1]), (299, [3, 2]), (300, [5]), (1, [1] * 5)])
def test_a_few_images_at_a_time(monkeypatch, part, seen):
    """As many as fit, in even parts, and the same numbers come out."""
    layer, x = Watched().double().eval(), normal(5, 2, 5, 4)
    whole = layer(x)
    assert layer.seen == [5]  # gradients are kept
    monkeypatch.setattr(core, "PART", part)
    layer.seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)
    assert layer.seen == seen


def test_batch_norm_sees_all_images(monkeypatch):
    """Where it learns, without gradients too, and where it alone is in training mode."""
    monkeypatch.setattr(core, "PART", 60)
    for mode in (lambda layer: layer.train(), lambda layer: layer.eval().norm.train()):
        layer = Watched().double()
        mode(layer)
        with torch.no_grad():
            layer(normal(5, 2, 5, 4))
        assert layer.seen == [5] and layer.norm.num_batches_tracked == 1


def test_gelu_overwrites_where_no_gradient_is_kept():
    x = normal(20)
    expected, given = F.gelu(x), x.clone()
    torch.testing.assert_close(core.gelu(given), expected)
    assert torch.equal(given, x)
    with torch.no_grad():
        assert core.gelu(given) is given
    torch.testing.assert_close(given, expected)
