"""Deformable-DETR's attention, the comparison of Table 8: the operation against its loops, its limits, the module."""

import pytest
import torch
from einops import rearrange
from helpers import DOUBLE, normal

from dynattn import core, ops
from dynattn.mechanisms.deformable_detr import (
    DeformableDetrAttention,
)


# B, h, d, (H, W), L, K
def test_one_point_with_weight_one_and_no_offset_is_the_value_itself():
    """DAT-11 with K = 1, A = 1, Delta p = 0."""
    v = normal(2, 3, 4, 5, 3)
    points = core.grid_points((5, 3), "corner", v)[:, None].expand(2, 3, -1, -1, -1)
    found = ops.detr_attention(v, points, torch.ones(2, 3, 15, 1, dtype=DOUBLE))
    torch.testing.assert_close(found, rearrange(v, "B h d H W -> B h (H W) d"), rtol=0, atol=1e-14)


def test_points_on_every_cell_with_equal_weights_give_the_mean():
    """DAT-11: then it is dense attention without logits."""
    v = normal(1, 1, 2, 3, 4)
    points = core.grid_points((3, 4), "corner", v).expand(1, 1, 5, -1, -1)
    found = ops.detr_attention(v, points, torch.full((1, 1, 5, 12), 1 / 12, dtype=DOUBLE))
    torch.testing.assert_close(found, v.mean((3, 4))[:, :, None].expand(-1, -1, 5, -1))


# ---------------------------------------------------------------------------------------------------------- the module


def layer() -> DeformableDetrAttention:
    """A float64 layer whose offsets and weights depend on the query."""
    module = DeformableDetrAttention(8, 4, 3).double().eval()
    with torch.no_grad():
        for linear in (module.offset, module.attention):
            linear.weight.normal_()
            linear.bias.normal_()
    return module


@pytest.mark.parametrize("H, W", [(1, 1), (1, 6), (2, 3), (3, 1), (5, 7), (7, 7), (8, 6), (11, 4), (13, 13), (4, 17)])
def test_any_map_size(H, W):
    module, x = layer(), normal(2, H, W, 8)
    assert module(x).shape == x.shape


def test_module_equals_its_parts():
    """DAT-11, DAT-3: offsets are in cells of the map, (row, col), for every query, head and point."""
    module, x, (H, W) = layer(), normal(2, 3, 4, 8), (3, 4)
    tokens = x.flatten(1, 2)
    v = rearrange(x @ module.v.weight.T + module.v.bias, "B H W (h d) -> B h d H W", h=4)
    offsets = rearrange(module.offset(tokens), "B L (h K two) -> B h L K two", h=4, K=3)
    cells = torch.cartesian_prod(torch.arange(H), torch.arange(W))[:, None] + offsets
    points = 2 * cells / torch.tensor([H - 1, W - 1]) - 1
    weights = rearrange(module.attention(tokens), "B L (h K) -> B h L K", h=4).softmax(-1)
    z = ops.detr_attention(v, points, weights, impl="loops")
    torch.testing.assert_close(module(x), module.proj(core.merge_heads(z, (H, W))))


def test_start_on_rays():
    """Head m looks along a ray of its own, its points 1, 2, ... cells away, all of equal weight."""
    module = DeformableDetrAttention(8, 4, 2)
    offsets = module.offset(torch.randn(8)).reshape(4, 2, 2)
    expected = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])[:, None] * torch.tensor([1, 2])[:, None]
    torch.testing.assert_close(offsets, expected.float(), rtol=0, atol=1e-6)
    assert (module.attention(torch.randn(8)) == 0).all()


def test_every_parameter_learns():
    module, x = layer(), normal(1, 4, 4, 8)
    (module(x) * normal(1, 4, 4, 8)).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in module.parameters())


def test_works_under_autocast():
    """Linear maps answer in bfloat16, positions stay in float32."""
    module, x = layer().float(), normal(1, 4, 4, 8).float()
    with torch.no_grad():
        module.offset.weight.mul_(0.1)
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x)
        full = module(x)
    assert (low - full).abs().max() < 0.1 * full.abs().max()


# ----------------------------------------------------------------------------------------------------------- bad input

Z = torch.zeros


def attend(**changes) -> None:
    """The operation on good arguments, some of them changed."""
    ops.detr_attention(**dict(v=Z(1, 2, 3, 4, 5), points=Z(1, 2, 6, 7, 2), weights=Z(1, 2, 6, 7)) | changes)


BAD = [
    (
        lambda: attend(v=Z(1, 2, 3, 20)),
        ValueError,
        r"v: expected 5 dimensions \(B h d H W\), got shape \(1, 2, 3, 20\)",
    ),
    (lambda: attend(v=Z(1, 2, 3, 4, 5).long()), TypeError, r"v: expected a floating tensor, got torch.int64"),
    (lambda: attend(v=Z(1, 2, 3, 0, 5)), ValueError, r"v: no dimension may be empty"),
    (lambda: attend(points=Z(1, 2, 6, 7, 3)), ValueError, r"points: expected shape \(B h L K 2\), got"),
    (lambda: attend(points=Z(1, 3, 6, 7, 2)), ValueError, r"points: .* h = 2"),
    (lambda: attend(points=Z(2, 2, 6, 7, 2)), ValueError, r"points: .* B = 1"),
    (lambda: attend(points=Z(1, 2, 6, 7, 2).double()), TypeError, r"points: expected torch.float32 on cpu as v has"),
    (lambda: attend(points=Z(1, 2, 6, 7, 2, device="meta")), TypeError, r"points: .* got torch.float32 on meta"),
    (lambda: attend(weights=Z(1, 2, 6, 8)), ValueError, r"weights: .* K = 7"),
    (lambda: attend(weights=Z(1, 2, 5, 7)), ValueError, r"weights: .* L = 6"),
    (lambda: attend(weights=Z(1, 2, 6)), ValueError, r"weights: expected 4 dimensions"),
    (lambda: attend(points=Z(1, 2, 6, 0, 2), weights=Z(1, 2, 6, 0)), ValueError, r"points: no dimension may be empty"),
    (lambda: attend(impl="numba"), ValueError, r"impl: detr_attention has no 'numba' kernel here"),
    (lambda: attend(impl="triton"), ValueError, r"impl: detr_attention has no 'triton' kernel here"),
    (lambda: attend(impl="torhc"), ValueError, r"impl: expected one of .*, got 'torhc'"),
    (lambda: DeformableDetrAttention(8, 3, 2), ValueError, r"heads: expected a divisor of 8, got 3"),
    (lambda: DeformableDetrAttention(8, 4, 0), ValueError, r"points: expected at least 1, got 0"),
    (lambda: layer()(normal(1, 8, 4, 4)), ValueError, r"x: expected shape \(B H W 8\), got shape \(1, 8, 4, 4\)"),
    (lambda: layer()(Z(1, 4, 4, 8).int()), TypeError, r"x: expected a floating tensor, got torch.int32"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()
