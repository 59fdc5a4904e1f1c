"""Hybrid-scale attention: the operation, its significance, the layer, its record."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import normal
from torch import Tensor

from dynattn import core, ops, tracing
from dynattn.mechanisms import hybrid_scale
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention, Layout, significance_loops

# (H, W), s, M
WINDOWS = [
    ((6, 4), 2, 1),
    ((5, 7), 2, 2),
    ((7, 5), 1, 3),
    ((4, 4), 2, None),
    ((5, 3), 3, None),
    ((1, 1), 4, 2),
    ((2, 9), 1, 4),
]


def qkv(shape: tuple[int, int], ratio: int, B: int = 2, h: int = 2, d: int = 3) -> list[Tensor]:
    """Queries of a map, keys and values of its merged tokens."""
    merged = -(-shape[0] // ratio) * -(-shape[1] // ratio)
    return [normal(B, h, n, d) for n in (shape[0] * shape[1], merged, merged)]


def layer(dim: int = 8, heads: int = 4, scales: tuple[int, ...] = (2, 1), **options) -> HybridScaleAttention:
    """A layer with weights of a size that makes softmaxes uneven."""
    module = HybridScaleAttention(dim, heads, scales, **{"window": 2} | options).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def record_of(module: torch.nn.Module, *inputs: Tensor) -> tracing.Record:
    """What a forward pass records."""
    found = []
    with torch.no_grad(), tracing.keeping(lambda _, record: found.append(record)):
        module(*inputs)
    (record,) = found
    return record


# ------------------------------------------------------------------------------------------------------- the operation


@pytest.mark.parametrize("shape, ratio, window", WINDOWS)
def test_windows_are_a_mask(shape, ratio, window):
    """SG-4: a query and a merged token are together where their windows are, padded or not."""
    q, k, v = qkv(shape, ratio)
    (H, W), (HK, WK) = shape, Layout(shape, ratio, window).key_shape
    side = window or 100
    number = lambda rows, cols, w: (torch.arange(rows)[:, None] // w * 99 + torch.arange(cols) // w).flatten()  # noqa: E731
    together = number(H, W, ratio * side)[:, None] == number(HK, WK, side)
    expected = F.scaled_dot_product_attention(q, k, v, together)
    torch.testing.assert_close(ops.hybrid_scale_attention(q, k, v, shape, ratio=ratio, window=window), expected)


def test_scale_1_without_windows_is_dense_attention():
    """SG-4: also with a window as large as the map."""
    q, k, v = qkv((3, 5), 1)
    for window in (None, 5, 7):
        found = ops.hybrid_scale_attention(q, k, v, (3, 5), ratio=1, window=window)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("reading", ["mean", "sum"])
@pytest.mark.parametrize("shape, ratio, window", WINDOWS)
def test_significance_is_its_loops(shape, ratio, window, reading):
    """SG-5, both readings, where padding asks nothing and is asked nothing."""
    q, k, v = qkv(shape, ratio)
    maps = core.merge_heads(q, shape), *(core.merge_heads(t, Layout(shape, ratio, window).key_shape) for t in (k, v))
    layout = Layout(shape, ratio, window)
    z, found = hybrid_scale.attention_and_significance(*maps, 2, layout, reading, "auto")
    expected = significance_loops(q, k, shape, ratio, window, 3**-0.5, reading)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # no count is rounded to float32 on the way
    torch.testing.assert_close(
        core.split_heads(z, 2), ops.hybrid_scale_attention(q, k, v, shape, ratio=ratio, window=window)
    )


def test_means_make_scales_equal_and_sums_do_not():
    """SG-5: on a map of whole windows, a scale weighs as much as another, or s^2 times as much."""
    for reading, expected in (("mean", [1.0, 1.0, 1.0]), ("sum", [64.0, 16.0, 1.0])):
        module = layer(dim=12, heads=3, scales=(8, 4, 1), reading=reading, window=4)
        maps = record_of(module, normal(1, 32, 32, 12)).maps
        torch.testing.assert_close(torch.stack([S.mean() for S in maps.values()]), torch.tensor(expected).double())


BAD = [
    (dict(ratio=0), ValueError, "ratio: expected at least 1, got 0"),
    (dict(ratio=2.0), TypeError, "ratio: expected a whole number, got 2.0"),
    (dict(window=0), ValueError, "window: expected at least 1, got 0"),
    (dict(query_shape=(4, 3)), ValueError, "q: expected shape"),
    (dict(ratio=4), ValueError, "k: expected shape"),
    (dict(scale=torch.inf), ValueError, "scale: expected a finite float or None, got inf"),
    (dict(v=torch.zeros(1, 2, 4, 3)), TypeError, "v: expected torch.float64"),
    (dict(impl="fast"), ValueError, "impl: expected one of"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message, unchecked):
    q, k = torch.zeros(1, 2, 16, 3).double(), torch.zeros(1, 2, 4, 3).double()
    good = dict(q=q, k=k, v=k, query_shape=(4, 4), ratio=2, window=1)
    with pytest.raises(error, match=message):
        ops.hybrid_scale_attention(**good | changes)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(heads=3), ValueError, "heads: expected a divisor of 8, got 3"),
        (dict(scales=()), TypeError, "scales: expected a scale for each group of heads, got ()"),
        (dict(scales=4), TypeError, "scales: expected a scale for each group of heads, got 4"),
        (dict(scales=(2, 2)), ValueError, "scales: expected distinct scales, as many as divide 2 heads, got (2, 2)"),
        (dict(scales=(4, 2, 1)), ValueError, "scales: expected distinct scales, as many as divide 2 heads"),
        (dict(scales=(0, 1)), ValueError, "scales: expected at least 1, got 0"),
        (dict(window=0), ValueError, "window: expected at least 1, got 0"),
        (dict(reading="max"), ValueError, "reading: expected one of 'mean', 'sum', got 'max'"),
        (dict(guidance="manual"), ValueError, "guidance: expected one of 'hybrid', 'local', 'global', 'constant'"),
        (dict(attn_drop=1.0), ValueError, "attn_drop: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_bad_arguments_of_the_layer(options, error, message, unchecked):
    with pytest.raises(error) as caught:
        HybridScaleAttention(**dict(dim=8, heads=2) | options)
    assert str(caught.value).startswith(message)


# ----------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("shape", [(8, 4), (5, 7), (1, 2)])
@pytest.mark.parametrize("impl", ["auto", "loops"])
@pytest.mark.parametrize("options", [dict(), dict(merge_norm=False, lepe=False, global_scale=False, reading="sum")])
def test_a_layer_is_its_equations(shape, impl, options):
    """SG-3, SG-4, SG-5: a strided convolution, linear maps, attention and significance by the loops."""
    module, x = layer(**options), normal(1, *shape, 8)
    module.implementation = impl
    parts, total = [], 0
    for group, s in zip(module.groups, (2, 1), strict=True):
        merged = x
        if s > 1:
            padded = F.pad(rearrange(x, "B H W C -> B C H W"), (0, -shape[1] % s, 0, -shape[0] % s))
            merged = F.conv2d(padded, group.merge.weight, group.merge.bias, stride=s).permute(0, 2, 3, 1)
            if isinstance(group.norm, torch.nn.Sequential):
                merged = F.gelu(F.layer_norm(merged, (8,), group.norm[0].weight, group.norm[0].bias))
        q, kv = (core.split_heads(f(t), n) for f, t, n in ((group.q, x, 2), (group.kv, merged, 4)))
        how = shape, s, None if s == 2 and module.global_scale else 2, 2**-0.5
        parts += [hybrid_scale.hybrid_scale_attention_loops(q, kv[:, :2], kv[:, 2:], *how)]
        total = total + significance_loops(q, kv[:, :2], *how, module.reading)
    z = core.merge_heads(torch.cat(parts, dim=1), shape)
    if module.lepe_conv is not None:
        context = module.lepe_conv(rearrange(module.lepe_linear(x), "B H W C -> B C H W"))
        z = z + rearrange(context, "B C H W -> B H W C")
    with torch.no_grad():
        found, significance = module(x)
    torch.testing.assert_close(found, module.proj(z))
    torch.testing.assert_close(significance, total)


def test_who_guides():
    """SG-5: the maps of all scales, of the smallest, of the largest, or none."""
    module, x = layer(dim=12, heads=3, scales=(4, 2, 1)), normal(2, 8, 8, 12)
    maps = {}
    with torch.no_grad():
        for module.guidance in ("hybrid", "local", "global", "constant"):
            out, maps[module.guidance] = module(x)
            assert torch.equal(module(x, weigh=False)[0].isfinite(), out.isfinite())
            torch.testing.assert_close(module(x, weigh=False)[0], out)
            assert module(x, weigh=False)[1] is None
        module.guidance = "hybrid"
        kept = record_of(module, x).maps
    torch.testing.assert_close(maps["hybrid"][0], sum(kept.values()))
    assert torch.equal(maps["local"][0], kept[1]) and torch.equal(maps["global"][0], kept[4])
    assert torch.equal(maps["constant"], torch.ones(2, 8, 8).double())


def test_the_significance_has_no_gradient():
    """SG-5: it is handed on detached."""
    module, x = layer(), normal(1, 4, 4, 8).requires_grad_()
    out, significance = module(x)
    assert out.requires_grad and not significance.requires_grad


def test_every_parameter_learns():
    module = layer(scales=(4, 2, 1), dim=12, heads=3).train()
    module(normal(1, 5, 4, 12))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters() if p.ndim > 1)


def test_dropout_of_weights():
    """In training only; its mean is the output without it."""
    module, x = layer(attn_drop=0.5), normal(1, 4, 4, 8)
    with torch.no_grad():
        still = module(x)[0]
        module.train()
        drawn = torch.stack([module(x)[0] for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - still).abs().max() < 0.2 * still.abs().max()


# ---------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 3)])
def test_a_record_is_exact_without_lepe(shape):
    """A_eff with the value of each cell's merged token is what the layer computed, in every head."""
    x = normal(2, *shape, 8)
    record = record_of(layer(lepe=False, global_scale=False), x)
    assert record.exact and record.kind == "hybrid_scale" and record.scales == [2, 2, 1, 1]
    for head in range(4):
        found = record.effective_matrix(head) @ record.value(head)
        torch.testing.assert_close(found, record.output(head))
        torch.testing.assert_close(record.effective_matrix(head).sum(1), torch.ones(len(found)).double())
        assert record.rest(head) < 1e-12
    record = record_of(layer(), x)
    assert not record.exact and record.rest(0) > 1e-3


def test_keys_are_the_merged_tokens_of_the_window():
    """Their centres; weights sum to 1, and the query's own window is read, or the whole map."""
    record = record_of(layer(window=2), normal(1, 8, 8, 8))
    record.image_shape, record.stride = (32, 32), (4.0, 4.0)
    whole, local = record.keys(0, 0, head=0), record.keys(0, 31, head=2)
    assert len(whole.weight) == 16 and float(whole.xy.min()) == 3.5  # the centre of 8 x 8 pixels
    assert sorted(map(tuple, local.xy.tolist())) == [(25.5, 1.5), (25.5, 5.5), (29.5, 1.5), (29.5, 5.5)]
    for keys in (whole, local):
        assert float(keys.weight.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="head: expected 0 to 3, got 4"):
        record.keys(0, 0, head=4)
