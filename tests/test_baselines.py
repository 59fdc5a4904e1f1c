"""Spatial-reduction attention, the other papers' comparison."""

import pytest
import torch
from einops import rearrange
from helpers import normal

from dynattn import core, ops
from dynattn.mechanisms.baselines import SpatialReductionAttention


def layer(ratio: int = 2) -> SpatialReductionAttention:
    return SpatialReductionAttention(8, 4, ratio).double().eval()


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("H, W", [(1, 1), (1, 6), (2, 3), (3, 1), (5, 7), (7, 7), (8, 6), (11, 4), (13, 13), (4, 17)])
def test_any_map_size(H, W, ratio):
    module, x = layer(ratio), normal(2, H, W, 8)
    assert module(x).shape == x.shape


@pytest.mark.parametrize("H, W", [(4, 6), (5, 3)])
def test_equals_its_parts(H, W):
    """DAT-1, DAT-2, DAT-3 with keys from cells that a convolution has joined two by two; borders are zeros."""
    module, x = layer(), normal(2, H, W, 8)
    padded = torch.zeros(2, H + H % 2, W + W % 2, 8, dtype=x.dtype)
    padded[:, :H, :W] = x
    patches = rearrange(padded, "B (I r) (J s) C -> B (I J) C r s", r=2, s=2)
    reduced = torch.einsum("bncrs,ocrs->bno", patches, module.reduce.weight) + module.reduce.bias
    k, v = module.kv(module.norm(reduced)).chunk(2, dim=-1)
    heads = lambda t: rearrange(t, "B N (h d) -> B h N d", h=4)  # noqa: E731
    z = ops.dense_attention(heads(module.q(x.flatten(1, 2))), heads(k), heads(v), impl="loops")
    torch.testing.assert_close(module(x), module.proj(core.merge_heads(z, (H, W))))


def test_every_parameter_learns():
    module, x = layer(), normal(1, 5, 4, 8)
    (module(x) * normal(1, 5, 4, 8)).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in module.parameters())


BAD = [
    (lambda: SpatialReductionAttention(8, 3, 2), ValueError, r"heads: expected a divisor of 8, got 3"),
    (lambda: SpatialReductionAttention(8, 4, 0), ValueError, r"ratio: expected at least 1, got 0"),
    (lambda: SpatialReductionAttention(8, 4, 2.0), TypeError, r"ratio: expected a whole number, got 2.0"),
    (lambda: layer()(normal(1, 8, 4, 4)), ValueError, r"x: expected shape \(B H W 8\), got shape \(1, 8, 4, 4\)"),
    (lambda: layer()(normal(4, 4, 8)), ValueError, r"x: expected 4 dimensions"),
    (lambda: layer()(torch.zeros(1, 4, 4, 8).int()), TypeError, r"x: expected a floating tensor, got torch.int32"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()
