"""Bi-level routing as a layer: regions of a map, the choice of regions, the module, its record."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import normal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynattn import core, ops, tracing
from dynattn.mechanisms import bilevel
from dynattn.mechanisms.bilevel import BiLevelRoutingAttention, multiply_adds, route

SHAPES = [(6, 4), (5, 7), (1, 1), (2, 9), (7, 7), (3, 1)]


def layer(dim: int = 8, heads: int = 2, **options) -> BiLevelRoutingAttention:
    """A layer with weights of a size that makes softmaxes uneven."""
    module = BiLevelRoutingAttention(dim, heads, **{"regions": 3, "topk": 2} | options).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def record_of(module: torch.nn.Module, x: Tensor) -> tracing.Record:
    """What a forward pass records."""
    found = []
    with torch.no_grad(), tracing.keeping(lambda _, record: found.append(record)):
        module(x)
    (record,) = found
    return record


# ------------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("S", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_regions_hold_every_cell_once(shape, S):
    """No region is empty, padding belongs to none, and `join` takes `cut` back."""
    regions, cells = core.Regions(shape, S), torch.arange(shape[0] * shape[1])
    numbers = cells.reshape(1, 1, -1, 1) + 1
    cut = regions.cut(numbers)[0, 0, :, :, 0]
    assert sorted(cut[cut > 0].tolist()) == (cells + 1).tolist()
    assert (cut > 0).any(dim=1).all() and len(cut) <= S * S
    assert torch.equal(regions.join(regions.cut(numbers)), numbers)
    inside = regions.inside(numbers)
    assert torch.equal(cut > 0, torch.ones_like(cut) > 0 if inside is None else inside)
    for number, of_region in enumerate(core.region_cells(shape, S)):
        assert (cut[number][cut[number] > 0] - 1).tolist() == of_region
        assert (regions.numbers(cells.device)[of_region] == number).all()


def test_regions_of_a_map_that_S_divides():
    """S x S of them, row-major, without padding."""
    regions = core.Regions((4, 6), 2)
    assert (regions.side, regions.grid, regions.padding) == ((2, 3), (2, 2), (0, 0))
    cut = regions.cut(torch.arange(24).reshape(1, 1, 24, 1))[0, 0, :, :, 0]
    assert cut[1].tolist() == [3, 4, 5, 9, 10, 11] and cut[2, 0] == 12
    assert regions.inside(cut) is None


# ------------------------------------------------------------------------------------------------------------- routing


def test_routes_are_the_most_liked_regions():
    """DEBI-9 and DEBI-10: by the mean over the tokens, over the channels of all heads together."""
    q, k = normal(2, 3, 4, 5, 2), normal(2, 3, 6, 4, 2)
    A = torch.einsum("bmrc,bmsc->brs", q.mean(3), k.mean(3))
    for n in (1, 3, 6):
        assert torch.equal(route(q.mean(3), k.mean(3), n), A.topk(n).indices)
    assert route(q.mean(3), k.mean(3), 9).shape == (2, 4, 6)


def test_of_equals_the_lowest_numbers_are_read():
    """DEBI-10 in float32, where a matrix product may sum equal numbers in another order at another place."""
    for C in (7, 32, 48, 70):
        one = torch.randn(1, 1, 1, C)
        k = torch.cat([one - 1e-2 * one.sign(), one.expand(-1, -1, 40, -1), one * 0], dim=2)
        routes = route(one.expand(-1, -1, 49, -1), k, 5)
        assert (routes == torch.arange(1, 6)).all()


def test_what_is_no_number_is_chosen_last():
    q, k = normal(1, 1, 2, 2), normal(1, 1, 4, 2)
    k[0, 0, 2, 0] = torch.nan
    assert (route(q, k, 3) != 2).all()


def test_padding_is_in_no_mean():
    """DEBI-9: the last regions of a map that S does not divide are smaller."""
    regions, x = core.Regions((5, 5), 2), normal(1, 1, 25, 3)
    means = torch.stack([x[0, 0, cells].mean(0) for cells in core.region_cells((5, 5), 2)])
    torch.testing.assert_close(regions.means(x)[0, 0], means)
    assert regions.means(x.half()).dtype == torch.float32


def test_routing_has_no_gradient():
    """Shown in three ways: the choice is of whole numbers; its slopes are those of the chosen regions held fixed; and
    between two choices the output jumps."""
    shape, q, k, v = (4, 4), *(normal(1, 2, 16, 3) for _ in "qkv")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    regions = core.Regions(shape, 2)
    routes = route(regions.means(q), regions.means(k), 2)
    assert not routes.is_floating_point() and not routes.requires_grad
    whole = ops.bilevel_attention(q, k, v, shape, shape, regions=2, topk=2)
    fixed = regions.join(ops.routed_attention(*(regions.cut(x) for x in leaves), routes))
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), leaves) for z in (whole, fixed)), strict=True):
        torch.testing.assert_close(a, b)

    # Two regions of keys, one token each: what is chosen flips where both are liked the same.
    q, v = torch.ones(1, 1, 1, 1).double(), torch.tensor([[[[1.0], [5.0]]]]).double()
    answers, slopes = [], []
    for liked in (-1e-9, 1e-9):
        k = torch.tensor([[[[1.0], [1.0 + liked]]]], dtype=torch.float64, requires_grad=True)
        z = ops.bilevel_attention(q, k, v, (1, 1), (1, 2), regions=2, topk=1)
        answers.append(float(z.detach()))
        slopes.append(torch.autograd.grad(z.sum(), k)[0].abs().max().item())
    assert answers == [1.0, 5.0] and slopes == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["loops", "torch", "numba"])
def test_all_regions_are_dense_attention(shape, impl):
    """DEBI-2: with every region read, or with one region, nothing is left of the regions, padded or not."""
    q, k, v = (normal(1, 2, shape[0] * shape[1], 3) for _ in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v)
    for regions, topk in ((3, 9), (1, 1)):
        z = ops.bilevel_attention(q, k, v, shape, shape, regions=regions, topk=topk, impl=impl)
        torch.testing.assert_close(z, expected)


BAD = [
    (dict(regions=0), ValueError, "regions: expected at least 1, got 0"),
    (dict(regions=2.0), TypeError, "regions: expected a whole number, got 2.0"),
    (dict(topk=0), ValueError, "topk: expected at least 1, got 0"),
    (dict(query_shape=(4, 3)), ValueError, "q: expected shape"),
    (dict(key_shape=(4, 5)), ValueError, "k: expected shape"),
    (dict(query_shape=16), ValueError, "q: expected shape"),
    (dict(query_shape="4"), TypeError, "query_shape: expected a whole number or a pair"),
    (dict(scale=torch.inf), ValueError, "scale: expected a finite float or None, got inf"),
    (dict(v=torch.zeros(1, 2, 16, 3)), TypeError, "v: expected torch.float64"),
    (dict(impl="fast"), ValueError, "impl: expected one of"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(changes, error, message, unchecked):
    x = torch.zeros(1, 2, 16, 3).double()
    good = dict(q=x, k=x, v=x, query_shape=(4, 4), key_shape=(4, 4), regions=2, topk=2)
    with pytest.raises(error, match=message):
        ops.bilevel_attention(**good | changes)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(heads=3), "heads: expected a divisor of 8, got 3"),
        (dict(regions=0), "regions: expected at least 1, got 0"),
        (dict(topk=0), "topk: expected at least 1, got 0"),
        (dict(scale="heads"), "scale: expected one of 'dim', 'head', got 'heads'"),
        (dict(attn_drop=1.0), "attn_drop: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_bad_arguments_of_the_layer(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(**dict(dim=8, heads=2) | options)


# -------------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("impl", ["loops", "torch", "numba"])
@pytest.mark.parametrize("shape", [(6, 4), (5, 7), (1, 2)])
def test_a_layer_is_its_equations(shape, impl):
    """DEBI-1, DEBI-2, DEBI-3: linear maps, attention by the loops, a depthwise convolution of the values."""
    module, x = layer(), normal(2, *shape, 8)
    module.implementation = impl
    q, k, v = (x @ w.mT + b for w, b in zip(module.qkv.weight.split(8), module.qkv.bias.split(8), strict=True))
    heads = [core.split_heads(t, 2) for t in (q, k, v)]
    z = core.merge_heads(bilevel.bilevel_attention_loops(*heads, shape, shape, 3, 2, 8**-0.5), shape)
    lce = F.conv2d(rearrange(v, "B H W C -> B C H W"), module.lce.weight, module.lce.bias, padding=2, groups=8)
    expected = (z + rearrange(lce, "B C H W -> B H W C")) @ module.proj.weight.mT + module.proj.bias
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


def test_the_scale_of_a_head_is_larger_by_the_root_of_the_heads():
    scales = [BiLevelRoutingAttention(32, 8, scale=scale).scale for scale in ("dim", "head")]
    assert scales == [32**-0.5, 4**-0.5]


def test_dropout_of_weights():
    """In training only, of weights, not of LCE; its mean is the output without it."""
    module, x = layer(attn_drop=0.5), normal(1, 4, 4, 8)
    with torch.no_grad():
        still = module(x)
        module.train()
        drawn = torch.stack([module(x) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - still).abs().max() < 0.2 * still.abs().max()


def test_every_parameter_learns():
    module = layer().train()
    module(normal(1, 5, 4, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("regions, topk, shape", [(7, 4, (14, 14)), (7, 1, (56, 56)), (2, 3, (4, 8))])
def test_multiply_adds_are_what_torch_counts(regions, topk, shape):
    module = BiLevelRoutingAttention(16, 2, regions=regions, topk=topk)
    with torch.device("meta"):
        x = torch.zeros(1, *shape, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.to("meta")(x)
    assert counter.get_total_flops() == 2 * multiply_adds(shape, regions, topk, 16)


# --------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("shape", [(6, 4), (5, 7), (1, 1)])
def test_the_effective_matrix_leaves_LCE_out(shape):
    """A_eff V is the attention; `rest` is the size of the convolution beside it."""
    module, x = layer(), normal(1, *shape, 8)
    record = record_of(module, x)
    assert record.kind == "bilevel" and not record.exact
    with torch.no_grad():
        v = module.qkv(x)[..., 16:]
        lce = core.split_heads(rearrange(module.lce(rearrange(v, "B H W C -> B C H W")), "B C H W -> B H W C"), 2)[0]
    for head in range(2):
        A = record.effective_matrix(head)
        torch.testing.assert_close(A.sum(1), torch.ones(len(A)).double())
        torch.testing.assert_close(record.output(head) - A @ record.value(head), lce[head])
        assert record.rest(head) == pytest.approx(float(lce[head].norm() / record.output(head).norm()))


def test_keys_are_the_tokens_of_the_routed_regions():
    module = layer(regions=2, topk=2)
    record = record_of(module, normal(1, 5, 4, 8))
    cells = core.region_cells((5, 4), 2)
    numbers = record.routing.queries.numbers(torch.device("cpu"))
    for row, col in ((0, 0), (4, 3), (2, 1)):
        assert record.region(row, col) == numbers[row * 4 + col]
        keys = record.keys(row, col, head=1)
        routes = record.routing.routes[record.region(row, col)].tolist()
        read = [cell for region in routes for cell in cells[region]]
        assert keys.xy.tolist() == [[cell % 4, cell // 4] for cell in read]
        torch.testing.assert_close(keys.weight, record.effective_matrix(1)[row * 4 + col, read])
        torch.testing.assert_close(keys.weight.sum(), torch.ones(()).double())
