"""DBRA: the layer against its loops, its agents, its cost, its record."""

import pytest
import torch
from helpers import normal
from test_bilevel_layer import record_of
from torch.utils.flop_counter import FlopCounterMode

from dynattn import core
from dynattn.mechanisms.deformable_bilevel import (
    ConvFFN,
    DeformableBiLevelAttention,
    deformable_bilevel_loops,
    multiply_adds,
    printed_multiply_adds,
)

PAPER = dict(scale="head", offset_channels=2, agent_norm=False)
SIZES = dict(dim=8, heads=4, groups=2, map_size=(3, 4), stride=2, kernel=3, regions=2, topk=2)


def layer(**options) -> DeformableBiLevelAttention:
    """A layer with weights of a size that makes softmaxes uneven."""
    module = DeformableBiLevelAttention(**SIZES | options).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


# ------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize(
    "options, shape",
    [({}, (3, 4)), (PAPER, (3, 4)), (dict(groups=4, stride=1, regions=3, topk=1, ratio=1), (2, 3)), ({}, (1, 2))],
    ids=str,
)
def test_a_layer_is_its_loops(options, shape, unchecked):
    """DEBI-6 to DEBI-15: DEBI-6, DEBI-7, DEBI-8, DEBI-9, DEBI-10, DEBI-11, DEBI-12, DEBI-13, DEBI-14, DEBI-15."""
    module, x = layer(**options), normal(1, *shape, 8)
    with torch.no_grad():
        expected = torch.stack([deformable_bilevel_loops(module, image) for image in x])
        for impl in ("torch", "numba"):
            module.implementation = impl
            torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_its_gradients_are_those_of_its_loops(unchecked):
    """DEBI-6 to DEBI-15 by every parameter and by the map."""
    module, x = layer(dim=4, heads=2, groups=1, map_size=(3, 3), ratio=1).train(), normal(1, 3, 3, 4).requires_grad_()
    leaves = [x, *module.parameters()]
    one = torch.autograd.grad(module(x).square().sum(), leaves)
    other = torch.autograd.grad(deformable_bilevel_loops(module, x[0]).square().sum(), leaves)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_conv_ffn():
    """DEBI-13's network: h + DW(h) between its two layers, then GELU."""
    ffn, x = ConvFFN(4, 2).double(), normal(1, 3, 2, 4)
    h = x @ ffn.expand.weight.mT + ffn.expand.bias
    h = h + ffn.depthwise(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ffn(x), torch.nn.functional.gelu(h) @ ffn.reduce.weight.mT + ffn.reduce.bias)


# ------------------------------------------------------------------------------------------------------------ agents


def test_agents_of_the_published_code_move_on_the_diagonal():
    """DEBI-6 with one channel: row and column by the same number, until the border holds one of them."""
    for options, diagonal in (({}, True), (dict(offset_channels=2), False)):
        record = record_of(layer(**options), normal(1, 5, 6, 8))
        moved = record.points - record.references
        free = (record.points.abs() < 1).all(dim=-1)
        assert free.any()
        same = (moved[..., 0] - moved[..., 1]).abs()[free] < 1e-12
        assert bool(same.all()) == diagonal


def test_agents_stay_on_the_map():
    module = layer()
    module.offset.pointwise.weight.data *= 100
    points = record_of(module, normal(1, 5, 6, 8)).points
    assert points.abs().max() == 1


def test_agents_without_offsets_miss_the_cells():
    """DEBI-6: centres of cells read as if -1 and +1 were the outermost centres. On 7 x 7 the first reads at 0.43."""
    module = layer(map_size=(7, 7), stride=1)
    module.offset.pointwise.weight.data.zero_()
    record = record_of(module, normal(1, 7, 7, 8))
    assert torch.equal(record.points, record.references.expand_as(record.points))
    assert core.to_pixels(record.points[0, 0], (7, 7)).tolist() == pytest.approx([3 / 7, 3 / 7])


def test_as_many_agents_as_strides_fit():
    """The ceiling, so that every cell is near one."""
    for shape, agents in (((5, 6), 9), ((4, 4), 4), ((1, 1), 1)):
        assert record_of(layer(), normal(1, *shape, 8)).points.shape == (2, agents, 2)


def test_padding_has_no_influence():
    """DEBI-11: agents of a map that S does not divide read cells of the map only."""
    module, x = layer(regions=3, topk=9), normal(1, 5, 4, 8)
    record = record_of(module, x)
    assert record.reading.shape == (4, 6, 20)
    torch.testing.assert_close(record.reading.sum(-1), torch.ones(4, 6).double())
    expected = core.attention_weights(*heads_of(module, x), None, module.scale)
    torch.testing.assert_close(record.reading, expected)  # all regions: dense attention of the agents


def heads_of(module, x):
    """Queries of the agents and keys of the map, by the equations."""
    with torch.no_grad():
        q, k, _ = module.qkv(x).chunk(3, dim=-1)
        points = module.points(q, (3, 2), x)
        features = x.permute(0, 3, 1, 2).unflatten(1, (2, 4)).flatten(0, 1)
        sampled = core.sample_points(features, points.flatten(0, 1)).unflatten(0, (1, 2)).flatten(1, 2).mT
        agents = module.agent_q(sampled.unflatten(1, (3, 2)))
        return core.split_heads(agents, 4)[0], core.split_heads(k, 4)[0]


# -------------------------------------------------------------------------------------------------------- the module


def test_a_map_of_another_size_resizes_the_table():
    module = layer()
    other = layer(map_size=(4, 3))
    state = module.state_dict()
    state["table"] = core.resize_table(state["table"], (7, 5))
    other.load_state_dict(state)
    x = normal(1, 4, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(x), other(x), rtol=0, atol=0)


def test_every_parameter_learns():
    """Routing has no gradient: what agents ask learns by their attention alone."""
    module = layer(topk=4).train()
    module(normal(1, 5, 6, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_dropout_of_weights():
    module, x = layer(attn_drop=0.5), normal(1, 4, 4, 8)
    with torch.no_grad():
        assert torch.equal(module(x), module(x))
        module.train()
        assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(heads=3), ValueError, "heads: expected a divisor of 8, got 3"),
        (dict(groups=3), ValueError, "groups: expected a divisor of 4, got 3"),
        (dict(stride=0), ValueError, "stride: expected at least 1, got 0"),
        (dict(kernel=4), ValueError, "kernel: expected an odd number, got 4"),
        (dict(offset_channels=3), ValueError, "offset_channels: expected one of 1, 2, got 3"),
        (dict(regions=0), ValueError, "regions: expected at least 1, got 0"),
        (dict(topk=1.5), TypeError, "topk: expected a whole number, got 1.5"),
        (dict(ratio=0), ValueError, "ratio: expected at least 1, got 0"),
        (dict(scale=None), ValueError, "scale: expected one of 'dim', 'head', got None"),
        (dict(map_size=0), ValueError, "map_size"),
        (dict(attn_drop=-1), ValueError, "attn_drop: expected a number from 0 to below 1, got -1"),
    ],
)
def test_bad_arguments(options, error, message, unchecked):
    with pytest.raises(error, match=message):
        DeformableBiLevelAttention(**SIZES | options)


@pytest.mark.parametrize("shape", [(2, 4, 4, 7), (4, 4, 8)])
def test_bad_input(shape, unchecked):
    with pytest.raises(ValueError, match="x: expected"):
        layer()(normal(*shape))


# -------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("shape, stride, kernel, topk, ratio", [((14, 14), 2, 5, 16, 3), ((28, 28), 4, 7, 8, 1)])
def test_multiply_adds_are_what_torch_counts(shape, stride, kernel, topk, ratio):
    sizes = dict(map_size=shape, stride=stride, kernel=kernel, regions=7, topk=topk, ratio=ratio)
    module = DeformableBiLevelAttention(16, 2, 2, **sizes).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, *shape, 16, device="meta"))
    agents = shape[0] // stride * (shape[1] // stride)
    assert counter.get_total_flops() == 2 * multiply_adds(shape, agents, 7, topk, 16, kernel, ratio)


def test_complexity_of_section_7_3():
    """The paper's example, stage 3: what it prints, what is wrong in it, what the whole layer costs."""
    shape, N, S, k, C, K = (14, 14), 49, 7, 16, 384, 5
    HW = shape[0] * shape[1]
    assert sum(printed_multiply_adds(shape, N, S, k, C, K)) == 80_212_608 + 76_505_856
    assert sum(printed_multiply_adds(shape, 1, S, k, C, K)) == 118_250_880
    assert multiply_adds(shape, N, S, k, C, K, 3) == 200_032_896
    dense = 4 * HW * C**2 + 2 * HW**2 * C
    assert dense == 145_108_992 < multiply_adds(shape, N, S, k, C, K, 3)
    a = k * HW * N
    bounded, printed, right = C * (2 * S**4 + 2 * a / S**2), 3 * C * (2 * a) ** (2 / 3), 3 * C * (2 * a * a) ** (1 / 3)
    assert right < bounded < printed
    assert [round(x / 1e6, 2) for x in (printed, bounded, right)] == [5.25, 4.25, 4.16]
    best = (a / 2) ** (1 / 6)
    assert round(best, 2) == 6.52 and C * (2 * best**4 + 2 * a / best**2) == pytest.approx(right)


# -------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("options", [{}, PAPER], ids=str)
def test_the_effective_matrix_is_a_product_of_two_attentions(options):
    module, x = layer(**options), normal(1, 5, 6, 8)
    record = record_of(module, x)
    assert record.kind == "deformable_bilevel" and not record.exact
    for head in range(4):
        A = record.effective_matrix(head)
        torch.testing.assert_close(A, record.weights(head) @ record.reading[head])
        torch.testing.assert_close(A.sum(1), torch.ones(30).double())
        torch.testing.assert_close(record.weights(head) @ record.v[head], record.output(head))
        assert record.rest(head) > 0


def test_the_value_is_carried_by_the_linear_maps_between_the_attentions():
    """DEBI-12 and DEBI-14 with nothing but W_o' and W_v of one head in between: then A_eff V is what comes out."""
    module, x = layer(heads=1, groups=1, agent_norm=False), normal(1, 5, 6, 8)
    for silent in (module.lce, module.ffn.reduce):
        silent.weight.data.zero_()
        silent.bias.data.zero_()
    for linear in (module.unify, module.agent_v):
        linear.bias.data.zero_()
    record = record_of(module, x)
    difference = record.output() - record.effective_matrix() @ record.value()
    with torch.no_grad():  # what is left are the features that the agents have sampled themselves
        features = core.sample_points(x.permute(0, 3, 1, 2), record.points).mT[0]
        torch.testing.assert_close(difference, record.weights() @ (features @ module.agent_v.weight.mT))


def test_keys_are_the_agents():
    record = record_of(layer(), normal(1, 5, 6, 8))
    for head in range(4):
        keys = record.keys(3, 2, head)
        torch.testing.assert_close(keys.xy, core.to_pixels(record.points[head // 2], (5, 6)).flip(-1))
        torch.testing.assert_close(keys.weight, record.attention[head, 3 * 6 + 2])
    assert record.references_xy().shape == (9, 2) and record.group(3) == 1
    with pytest.raises(ValueError, match="head: expected 0 to 3, got 4"):
        record.keys(0, 0, head=4)
