"""DAT's deformable attention: the operation against its loops, its limits, and the module with all its readings."""

from functools import wraps

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import DOUBLE, normal, somewhere
from torch.utils.flop_counter import FlopCounterMode

from dynattn import core, ops
from dynattn.core import resize_fixed
from dynattn.mechanisms import deformable
from dynattn.mechanisms.deformable import (
    DeformableAttention,
    OffsetNetwork,
    multiply_adds,
    relative_bias,
)

# ------------------------------------------------------------------------------------------------------- the operation

# B, h, g, d, (H, W), N, table
SIZES = [
    (2, 4, 2, 2, (3, 2), 3, (5, 3)),  # rectangular, groups of two heads
    (1, 1, 1, 1, (1, 1), 1, (1, 1)),  # one of everything
    (1, 3, 3, 2, (1, 5), 2, (1, 9)),  # a group for every head, one row
    (2, 2, 1, 3, (2, 2), 7, (3, 3)),  # more points than cells
    (1, 2, 2, 1, (3, 2), 2, (2, 4)),  # a table of another size
    (1, 2, 1, 2, (3, 2), 4, None),  # no bias
]


def inputs(B, h, g, d, shape, N, table) -> tuple:
    q, k, v = normal(B, h, shape[0] * shape[1], d), normal(B, h, N, d), normal(B, h, N, d)
    return q, k, v, somewhere(B, g, N), None if table is None else normal(h, *table), shape


def test_head_reads_the_points_of_its_group():
    """DAT-9: head m uses group m g // h, so neighbours share points."""
    q, k, v, points, table, shape = inputs(1, 4, 2, 2, (2, 3), 4, (3, 5))
    both = ops.deformable_attention(q, k, v, points, table, shape)
    for m in range(4):
        one = slice(m, m + 1)
        alone = ops.deformable_attention(q[:, one], k[:, one], v[:, one], points[:, [m // 2]], table[one], shape)
        torch.testing.assert_close(both[:, one], alone)


# ------------------------------------------------------------------------------------------------------ limits and bias


@pytest.mark.parametrize("H, W", [(3, 3), (4, 2), (1, 5), (7, 7)])
def test_no_offsets_on_a_corner_grid_is_dense_attention_with_swins_bias(H, W):
    """DAT-9: integer displacements land on entries of the table, so the relative bias of Swin is a special case."""
    q, k, v, table = (
        normal(2, 2, H * W, 3),
        normal(2, 2, H * W, 3),
        normal(2, 2, H * W, 3),
        normal(2, 2 * H - 1, 2 * W - 1),
    )
    points = core.grid_points((H, W), "corner", q).expand(2, 1, -1, -1)
    found = ops.deformable_attention(q, k, v, points, table, (H, W), query_grid="corner")
    rows, cols = core.relative_index((H, W))
    torch.testing.assert_close(found, ops.dense_attention(q, k, v, bias=table[:, rows, cols]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        found, ops.window_attention(q, k, v, table, (H, W), window=(H, W)), rtol=1e-10, atol=1e-12
    )


def test_no_table_is_dense_attention():
    """DAT-9 without its bias is DAT-2."""
    q, k, v, points, _, shape = inputs(*SIZES[0])
    found = ops.deformable_attention(q, k, v, points, None, shape)
    torch.testing.assert_close(found, ops.dense_attention(q, k, v))


@pytest.mark.parametrize("query_grid", ["centre", "corner"])
def test_bias_where_a_query_stands_is_the_centre_of_the_table(query_grid):
    """DAT-9: displacement 0 reads entry (H - 1, W - 1), on either grid."""
    H, W = 3, 4
    table = normal(2, 2 * H - 1, 2 * W - 1)
    points = core.grid_points((H, W), query_grid, table).expand(1, 1, -1, -1)
    bias = relative_bias(points, table, (H, W), query_grid)
    expected = table[:, H - 1, W - 1, None].expand(-1, H * W)
    torch.testing.assert_close(bias[0].diagonal(dim1=1, dim2=2), expected)


def test_integer_displacements_of_the_published_code_fall_between_entries():
    """DAT-9 on cell centres: displacement delta reads at (H - 1) + delta (H - 1) / H, an entry only for delta = 0."""
    H = 5
    table = torch.arange(2 * H - 1, dtype=DOUBLE)[None, :, None]  # what is read is where it was read
    points = core.grid_points((H, 1), "centre", table).expand(1, 1, -1, -1)
    delta = torch.arange(H)[:, None] - torch.arange(H)[None, :]
    bias = relative_bias(points, table, (H, 1), "centre")[0, 0]
    torch.testing.assert_close(bias, (H - 1) + delta.double() * (H - 1) / H)


# ---------------------------------------------------------------------------------------------------------- the module

TEN_SIZES = [(1, 1), (1, 6), (2, 3), (3, 1), (5, 7), (7, 7), (8, 6), (11, 4), (13, 13), (4, 17)]


def layer(**options) -> DeformableAttention:
    """A float64 layer on 6 x 5 maps whose offsets, tables and biases are far from zero."""
    module = DeformableAttention(8, 4, 2, (6, 5), **{"kernel": 3, **options}).double().eval()
    with torch.no_grad():
        module.offset.pointwise.weight.normal_()
        if hasattr(module, "table"):
            module.table.normal_()
    return module


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"position_bias": "fixed", "stride": 3}, {"position_bias": "dwconv"}]
)
def test_any_map_size(options):
    """DAT-6: ten sizes, of which one is the layer's own; the offset network gives a point for every reference."""
    module = layer(**options)
    for H, W in TEN_SIZES:
        x = normal(2, H, W, 8)
        assert module(x).shape == x.shape
        sampled, points, references = module.sample(x, module.q(x))
        count = -(-H // module.stride) * -(-W // module.stride)
        assert (sampled.shape, points.shape, references.shape) == ((2, count, 8), (2, 2, count, 2), (count, 2))


def by_hand(module: DeformableAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer from its parts: projections, offset network, sampling, attention in loops, concatenation."""
    H, W, G = x.shape[1], x.shape[2], module.groups
    grid = -(-H // module.stride), -(-W // module.stride)
    q = x @ module.q.weight.T + module.q.bias  # DAT-6
    maps = rearrange(x, "B H W (g c) -> B g c H W", g=G)
    groups = rearrange(q, "B H W (g c) -> B g c H W", g=G)
    points, sampled = [], []
    for g in range(G):  # one network for all groups
        raw = module.offset(groups[:, g])
        offset = module.offset_range * raw.tanh() / torch.tensor(grid, dtype=DOUBLE)  # DAT-7
        points.append(core.grid_points(grid, "centre", x) + offset.flatten(1, 2))
        sampled.append(ops.sample_points(maps[:, g], points[-1], impl="loops"))  # DAT-8
    features = torch.cat(sampled, dim=1).mT
    heads = lambda t: rearrange(t, "B N (h d) -> B h N d", h=module.heads)  # noqa: E731
    k, v = heads(features @ module.k.weight.T + module.k.bias), heads(features @ module.v.weight.T + module.v.bias)
    points = torch.stack(points, dim=1)
    z = ops.deformable_attention(heads(q.flatten(1, 2)), k, v, points, module.table, (H, W), impl="loops")  # DAT-9
    return rearrange(z, "B h (H W) d -> B H W (h d)", H=H) @ module.proj.weight.T + module.proj.bias  # DAT-3


@pytest.mark.parametrize("stride", [1, 2])
def test_module_equals_its_parts(stride):
    """DAT-3, DAT-6, DAT-7, DAT-8, DAT-9 put together by hand, outputs and the gradients of all parameters."""
    torch.manual_seed(1)
    module = DeformableAttention(4, 2, 2, (3, 2), kernel=3, stride=stride).double()
    x = normal(1, 3, 2, 4)
    weight, found = normal(1, 3, 2, 4), []
    for form in (module, lambda x: by_hand(module, x)):
        output = form(x)
        found.append([output, *torch.autograd.grad((output * weight).sum(), list(module.parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_offset_network_in_loops():
    """DAT-7: a depthwise convolution, LayerNorm, GELU, and a linear map to (row, col) without bias."""
    network, q = OffsetNetwork(3, 3, 2).double(), normal(1, 3, 5, 4)
    padded, out = F.pad(q, (1, 1, 1, 1)), network(q)
    for i, j in ((0, 0), (2, 1), (1, 0)):
        patch = padded[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        features = (patch * network.depthwise.weight[:, 0]).sum((1, 2)) + network.depthwise.bias
        hidden = F.gelu(F.layer_norm(features, (3,), network.norm.weight, network.norm.bias))
        torch.testing.assert_close(out[0, i, j], network.pointwise.weight @ hidden)
    assert network.pointwise.bias is None
    assert isinstance(OffsetNetwork(3, 3, 1, norm=False).norm, torch.nn.Identity)


def gradient_of_offsets(module: DeformableAttention, x: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, x.numel(), dtype=DOUBLE).reshape(x.shape)
    return list(torch.autograd.grad((module(x) * weight).sum(), list(module.offset.parameters())))


def test_gradients_reach_the_offset_network_on_both_ways(monkeypatch):
    """DAT-7, DAT-9: users ask whether they do. They do: through sampling and through the bias, and the two add up."""
    module, x = layer(), normal(2, 6, 5, 8)
    both = gradient_of_offsets(module, x)
    sample, attend = core.sample_points, deformable.deformable_attention
    without = lambda points_at, function: wraps(function)(  # noqa: E731  (the points' way is cut)
        lambda *inputs, **kw: function(*(x.detach() if i == points_at else x for i, x in enumerate(inputs)), **kw)
    )
    with monkeypatch.context() as patch:
        patch.setattr(core, "sample_points", without(1, sample))
        by_bias = gradient_of_offsets(module, x)
    with monkeypatch.context() as patch:
        patch.setattr(deformable, "deformable_attention", without(3, attend))
        by_sampling = gradient_of_offsets(module, x)
    for total, one, other in zip(both, by_bias, by_sampling, strict=True):
        assert one.abs().max() > 1e-4 and other.abs().max() > 1e-4
        torch.testing.assert_close(total, one + other, rtol=1e-9, atol=1e-12)
    without_bias = gradient_of_offsets(layer(position_bias=None), x)
    assert all(gradient.abs().max() > 1e-4 for gradient in without_bias)


def shifts_in_pixels(module: DeformableAttention, shape: tuple[int, int]) -> torch.Tensor:
    """How far the points of a layer are from their references, in pixels of the map."""
    x = 10 * normal(1, *shape, 8)
    _, points, references = module.sample(x, module.q(x))
    return core.to_pixels(points, shape) - core.to_pixels(references, shape)


def saturated(**options) -> DeformableAttention:
    """A layer whose offsets all are at their limit."""
    module = layer(**options)
    with torch.no_grad():
        module.offset.pointwise.weight.mul_(1e6)
    return module


@pytest.mark.parametrize("H", [7, 14])
def test_offset_range_of_the_published_code(H):
    """DAT-7: s = 2 in units of 1 / H moves a point by at most (H - 1) / H of a pixel."""
    moved = shifts_in_pixels(saturated(offset_range=2.0), (H, H)).abs()
    assert moved.max().item() == pytest.approx((H - 1) / H)


def test_farthest_point_is_half_a_pixel_outside():
    """DAT-7: 1 + 1 / H is the end, where the map has faded by about half."""
    H = 14
    module = saturated(offset_range=2.0)
    x = 10 * normal(1, H, H, 8)
    points = module.sample(x, module.q(x))[1]
    assert points.abs().max().item() == pytest.approx(1 + 1 / H)
    assert core.to_pixels(torch.tensor([1 + 1 / H, 0]), (H, H))[0].item() == pytest.approx(H - 1 + (H - 1) / (2 * H))


@pytest.mark.parametrize("stride, cells", [(1, 1), (2, 13 / 6)])
def test_offset_range_as_the_text_has_it(stride, cells):
    """DAT-7: with unit "cell", s = 1 moves a point by one step of the corner grid: r pixels, a bit more at the rim."""
    moved = shifts_in_pixels(
        saturated(offset_range=1.0, offset_unit="cell", reference="corner", stride=stride), (14, 14)
    )
    assert moved.abs().max().item() == pytest.approx(cells)


@pytest.mark.parametrize("reference", ["centre", "corner"])
@pytest.mark.parametrize("unit", ["half_cell", "cell"])
def test_offset_range_zero_keeps_points_on_the_grid(reference, unit):
    """DAT-7: s = 0 means no offsets (the published code would leave them unscaled)."""
    module = layer(offset_range=0.0, reference=reference, offset_unit=unit)
    assert shifts_in_pixels(module, (6, 5)).abs().max() == 0
    assert torch.equal(
        module.sample(normal(1, 4, 3, 8), normal(1, 4, 3, 8))[2], core.grid_points((4, 3), reference, normal())
    )


def test_zero_init_starts_on_the_grid_and_learns():
    """DAT-7: offsets are zero at first, their gradient is not."""
    module = DeformableAttention(8, 4, 2, (6, 5), offset_zero_init=True).double()
    assert shifts_in_pixels(module, (6, 5)).abs().max() == 0
    x = normal(1, 6, 5, 8)
    gradients = dict(zip(dict(module.offset.named_parameters()), gradient_of_offsets(module, x), strict=True))
    assert gradients["pointwise.weight"].abs().max() > 0


def test_clamp_keeps_points_on_the_map():
    """DAT-7."""
    x = 10 * normal(1, 6, 5, 8)
    far, near = saturated(offset_range=9.0), saturated(offset_range=9.0, clamp=True)
    near.load_state_dict(far.state_dict())
    outside, inside = (module.sample(x, module.q(x))[1] for module in (far, near))
    assert outside.abs().max() > 1 and torch.equal(inside, outside.clamp(-1, 1))


def test_corner_reference_without_offsets_samples_the_map_itself():
    """DAT-8: what the text describes is the identity; cell centres are not."""
    x = normal(2, 6, 5, 8)
    for reference, same in (("corner", True), ("centre", False)):
        module = layer(offset_range=0.0, reference=reference)
        assert torch.allclose(module.sample(x, module.q(x))[0], x.flatten(1, 2), rtol=0, atol=1e-12) == same


@pytest.mark.parametrize("stride", [1, 2])
def test_offsets_false_reads_the_map_without_sampling(stride):
    """DAT-6, Table 6: keys are the map, pooled where there are fewer; the offset network gets no gradient."""
    module, x = layer(offsets=False, stride=stride, position_bias=None), normal(2, 6, 5, 8)
    pooled = F.avg_pool2d(x.movedim(-1, 1), stride, ceil_mode=True).flatten(2).mT
    heads = lambda t: rearrange(t, "B N (h d) -> B h N d", h=4)  # noqa: E731
    z = ops.dense_attention(heads(module.q(x.flatten(1, 2))), heads(module.k(pooled)), heads(module.v(pooled)))
    torch.testing.assert_close(module(x), module.proj(core.merge_heads(z, (6, 5))))
    module(x).sum().backward()
    assert all(parameter.grad is None for parameter in module.offset.parameters())
    assert sum(p.numel() for p in module.offset.parameters()) > 0  # it still counts, as in the paper


def test_position_biases():
    """DAT-9, Table 6: relative, fixed, depthwise convolution of the queries, none."""
    modules = {kind: layer(position_bias=kind, clamp=True) for kind in ("relative", "fixed", "dwconv", None)}
    assert modules["relative"].table.shape == (4, 11, 9) and modules["fixed"].table.shape == (4, 30, 30)
    assert not hasattr(modules["dwconv"], "table") and not hasattr(modules[None], "table")
    assert layer(position_bias="fixed", stride=2).table.shape == (4, 30, 9)

    x = normal(1, 6, 5, 8)
    for module in modules.values():
        module.load_state_dict(modules[None].state_dict(), strict=False)
    plain = modules[None](x)
    for kind in ("relative", "fixed"):
        with torch.no_grad():
            assert not torch.allclose(modules[kind](x), plain)
            modules[kind].table.fill_(0.3)  # the same for all keys, which a softmax does not see
        torch.testing.assert_close(modules[kind](x), plain)
    conv = modules["dwconv"]
    extra = F.conv2d(conv.q(x).movedim(-1, 1), conv.dwconv.weight, conv.dwconv.bias, padding=1, groups=8).movedim(1, -1)
    torch.testing.assert_close(conv(x) - plain, extra @ conv.proj.weight.T)


def test_fixed_bias_belongs_to_query_and_point():
    """DAT-9, Table 6: row l, column n of a head's table is added to the logit of query l and point n."""
    module, x = layer(position_bias="fixed", stride=2, offset_range=0.0, reference="corner"), normal(1, 6, 5, 8)
    before, seen = module.table.detach().clone(), []
    for change in (0.0, 50.0):
        with torch.no_grad():
            module.table.copy_(before)
            module.table[:, 7, 4] += change
        seen.append(module(x).flatten(1, 2)[0])
    assert torch.equal((seen[0] != seen[1]).any(-1).nonzero()[:, 0], torch.tensor([7]))  # only query 7 notices
    sampled = module.sample(x, module.q(x))[0][0]
    torch.testing.assert_close(seen[1][7], module.proj(module.v(sampled[4])))  # and reads point 4 only


def test_tables_follow_the_map():
    """DAT-9: at another size the table is resized, bicubic; at its own it is used as it is."""
    relative, fixed = layer(), layer(position_bias="fixed", stride=2)
    assert relative.table_for((6, 5), DOUBLE) is relative.table and fixed.table_for((6, 5), DOUBLE) is fixed.table
    assert torch.equal(relative.table_for((9, 4), DOUBLE), core.resize_table(relative.table, (17, 7)))
    assert fixed.table_for((9, 4), DOUBLE).shape == (4, 36, 10)
    assert relative.table_for((6, 5), torch.bfloat16).dtype == torch.bfloat16
    constant = resize_fixed(torch.ones(2, 30, 9), (6, 5), (4, 7), 2)
    torch.testing.assert_close(constant, torch.ones(2, 28, 8))
    table = normal(1, 30, 30)  # queries and points of a 6 x 5 map: the same change for both
    both_ways = resize_fixed(table.mT, (6, 5), (3, 7), 1).mT
    torch.testing.assert_close(both_ways, resize_fixed(table, (6, 5), (3, 7), 1))


def test_works_under_autocast():
    """Linear maps answer in bfloat16, positions stay in float32."""
    for options in ({}, {"position_bias": "fixed"}, {"position_bias": "dwconv"}, {"offsets": False}):
        module, x = layer(**options).float(), normal(1, 6, 5, 8).float()
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x)
            assert module.sample(x, module.q(x))[1].dtype == torch.float32
        full = module(x)
        assert (low - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("stride, kernel", [(1, 3), (2, 5)])
def test_cost_formula(stride, kernel):
    """DAT-10, against what torch counts."""
    C, H, W = 8, 6, 5
    module = DeformableAttention(C, 4, 2, (H, W), stride=stride, kernel=kernel)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, H, W, C))
    assert counter.get_total_flops() / 2 == sum(multiply_adds((H, W), 6 * 5 if stride == 1 else 9, C, kernel))


def test_cost_of_the_papers_example():
    """DAT-10: 79.63M is right; the offset network's 5.08M slipped by ten, it is 0.508M."""
    attention, offsets = multiply_adds((14, 14), 49, 384, 5)
    assert (round(attention / 1e6, 2), round(offsets / 1e6, 3)) == (79.63, 0.508)


# ----------------------------------------------------------------------------------------------------------- bad input

Z = torch.zeros


def attend(**changes) -> None:
    """The operation on good arguments, some of them changed."""
    good = dict(
        q=Z(1, 4, 6, 2), k=Z(1, 4, 3, 2), v=Z(1, 4, 3, 2), points=Z(1, 2, 3, 2), table=Z(4, 5, 3), query_shape=(3, 2)
    )
    ops.deformable_attention(**good | changes)


def build(**changes) -> None:
    """A layer from good arguments, some of them changed."""
    DeformableAttention(**dict(dim=8, heads=4, groups=2, map_size=(6, 5)) | changes)


BAD = [
    (lambda: attend(q=Z(4, 6, 2)), ValueError, r"q: expected 4 dimensions \(B h 6 d\)"),
    (lambda: attend(q=Z(1, 4, 5, 2)), ValueError, r"q: expected shape \(B h 6 d\), got shape \(1, 4, 5, 2\)"),
    (lambda: attend(q=Z(1, 4, 6, 2).int()), TypeError, r"q: expected a floating tensor, got torch.int32"),
    (lambda: attend(k=Z(1, 4, 3, 5)), ValueError, r"k: .* d = 2"),
    (
        lambda: attend(k=Z(1, 4, 3, 2).double()),
        TypeError,
        r"k: expected torch.float32 on cpu as q has, got torch.float64",
    ),
    (lambda: attend(v=Z(1, 4, 4, 2)), ValueError, r"v: .* N = 3"),
    (lambda: attend(v=Z(1, 4, 3, 2, device="meta")), TypeError, r"v: .* on cpu as q has, got torch.float32 on meta"),
    (lambda: attend(points=Z(1, 2, 3, 3)), ValueError, r"points: expected shape \(B g N 2\), got"),
    (
        lambda: attend(points=Z(1, 3, 3, 2)),
        ValueError,
        r"points: expected a number of groups that divides 4 heads, got 3",
    ),
    (
        lambda: attend(points=Z(1, 8, 3, 2)),
        ValueError,
        r"points: expected a number of groups that divides 4 heads, got 8",
    ),
    (lambda: attend(points=Z(1, 2, 4, 2)), ValueError, r"points: .* N = 3"),
    (lambda: attend(points=Z(2, 2, 3, 2)), ValueError, r"points: .* B = 1"),
    (
        lambda: attend(points=Z(1, 2, 0, 2), k=Z(1, 4, 0, 2), v=Z(1, 4, 0, 2)),
        ValueError,
        r"k: no dimension may be empty",
    ),
    (lambda: attend(table=Z(2, 5, 3)), ValueError, r"table: .* h = 4"),
    (lambda: attend(table=Z(4, 5)), ValueError, r"table: expected 3 dimensions \(h I J\)"),
    (lambda: attend(table=Z(4, 0, 3)), ValueError, r"table: no dimension may be empty"),
    (lambda: attend(query_shape=(3, 0)), ValueError, r"query_shape\[1\]: expected at least 1, got 0"),
    (lambda: attend(query_shape=6.0), TypeError, r"query_shape: expected a whole number or a pair"),
    (lambda: attend(query_shape=(2, 2)), ValueError, r"q: expected shape \(B h 4 d\)"),
    (lambda: attend(query_grid="center"), ValueError, r"query_grid: expected one of 'centre', 'corner', got 'center'"),
    (lambda: attend(scale=float("nan")), ValueError, r"scale: expected a finite float or None, got nan"),
    (lambda: attend(impl="fast"), ValueError, r"impl: expected one of .*, got 'fast'"),
    (lambda: build(heads=3), ValueError, r"heads: expected a divisor of 8, got 3"),
    (lambda: build(heads=0), ValueError, r"heads: expected at least 1, got 0"),
    (lambda: build(groups=3), ValueError, r"groups: expected a divisor of 4, got 3"),
    (lambda: build(groups=2.0), TypeError, r"groups: expected a whole number, got 2.0"),
    (lambda: build(map_size=(6, -1)), ValueError, r"map_size\[1\]: expected at least 1, got -1"),
    (lambda: build(stride=0), ValueError, r"stride: expected at least 1, got 0"),
    (lambda: build(kernel=4), ValueError, r"kernel: expected an odd number, got 4"),
    (lambda: build(offset_range=-1.0), ValueError, r"offset_range: expected a finite number of at least 0, got -1.0"),
    (lambda: build(offset_range=float("nan")), ValueError, r"offset_range: .* got nan"),
    (lambda: build(position_bias="Relative"), ValueError, r"position_bias: expected one of .*None, got 'Relative'"),
    (lambda: build(reference="edge"), ValueError, r"reference: expected one of 'centre', 'corner', got 'edge'"),
    (lambda: build(offset_unit="pixel"), ValueError, r"offset_unit: expected one of 'half_cell', 'cell', got 'pixel'"),
    (lambda: layer()(normal(6, 5, 8)), ValueError, r"x: expected 4 dimensions \(B H W 8\), got shape \(6, 5, 8\)"),
    (lambda: layer()(normal(1, 8, 6, 5)), ValueError, r"x: expected shape \(B H W 8\), got shape \(1, 8, 6, 5\)"),
    (lambda: layer()(normal(1, 0, 5, 8)), ValueError, r"x: no dimension may be empty"),
    (lambda: layer()(Z(1, 6, 5, 8).long()), TypeError, r"x: expected a floating tensor, got torch.int64"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()
