"""Self-guided attention: aggregation by rank, the layer, its record; significance from one layer to the next."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import compile_for_a_gpu, normal
from test_hybrid_scale import layer as hybrid_layer
from test_hybrid_scale import record_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynattn import core, ops
from dynattn.kernels import aggregation, operators
from dynattn.mechanisms.self_guided import SelfGuidedAttention, aggregate_tokens_loops, rank, sub_regions

KERNELS = [name for name in operators.BACKENDS if operators.INSTALLED[name]]
FAST = ["torch", *KERNELS]


def layer(dim: int = 8, heads: int = 2, rates: tuple[int, ...] = (4, 2, 2, 1), **options) -> SelfGuidedAttention:
    """A layer with weights of a size that makes softmaxes uneven."""
    module = SelfGuidedAttention(dim, heads, rates, **options).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def inputs(B: int, N: int, C: int, sizes: list[int], rates: list[int]) -> list:
    """Arguments of `aggregate_tokens`."""
    return [normal(B, N, C), torch.rand(B, N).argsort(1), normal(sum(rates)), normal(len(rates)), sizes, rates]


def on_device(impl: str, *arguments) -> Tensor:
    """The operation of CPU tensors, by a form that may run on a GPU."""
    there = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    move = lambda x: x.to(there) if isinstance(x, Tensor) else x  # noqa: E731
    return ops.aggregate_tokens(*map(move, arguments), impl=impl).cpu()


# ------------------------------------------------------------------------------------------------------- the operation


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("C", [64, 83])
def test_stage_1_of_a_small_map(impl, C):
    """SG-2 beyond a block of channels and slots, with short groups: outputs and gradients of the plain sums."""
    given = inputs(2, 130, C, [32, 65, 33], [37, 40, 7])
    leaves = [given[n].requires_grad_() for n in (0, 2, 3)]

    def plain(x, order, weight, bias, sizes, rates):
        rows, start, at = [], 0, 0
        for size, rate in zip(sizes, rates, strict=True):
            ranks = [start] * (-size % rate) + list(range(start, start + size))
            for first in range(0, len(ranks), rate):
                cells = F.one_hot(order[:, ranks[first : first + rate]], 130).double()
                rows.append(torch.einsum("brn,r->bn", cells, weight[at : at + rate]))
            start, at = start + size, at + rate
        counts = torch.tensor([-(-s // r) for s, r in zip(sizes, rates, strict=True)])
        return torch.stack(rows, 1) @ x + bias.repeat_interleave(counts)[:, None]

    one, other = on_device(impl, *given), plain(*given)
    torch.testing.assert_close(one, other)
    cotangent = normal(*one.shape)
    for a, b in zip(*(torch.autograd.grad(z, leaves, cotangent) for z in (one, other)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_rate_1_sorts(impl):
    """SG-2 with rate 1, weight 1: the tokens in their order; with one group, their weighted sum."""
    x, order, weight, bias, _, _ = inputs(2, 6, 3, [6], [1])
    found = on_device(impl, x, order, torch.ones(1).double(), 0 * bias, [6], [1])
    torch.testing.assert_close(found, torch.stack([one[rows] for one, rows in zip(x, order, strict=True)]))
    weight = normal(6)
    whole = on_device(impl, x, order, weight, bias, [6], [6])
    torch.testing.assert_close(whole[:, 0], torch.einsum("brc,r->bc", found, weight) + bias)


@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_a_short_group_begins_with_copies_of_its_least_significant_token(impl):
    """SG-2 where the rate does not divide: 5 tokens by 3 are 0 0 1 and 2 3 4."""
    x = torch.arange(5.0).double().reshape(1, 5, 1)
    weight = torch.tensor([100.0, 10.0, 1.0]).double()
    found = on_device(impl, x, torch.arange(5)[None], weight, torch.zeros(1).double(), [5], [3])
    assert found.flatten().tolist() == [1.0, 234.0]


@pytest.mark.parametrize("impl", ["torch", *KERNELS])
def test_second_derivatives(impl):
    """The kernels have those of the torch form."""
    x, order, weight, bias, sizes, rates = inputs(1, 5, 2, [2, 3], [2, 2])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    function = lambda x, weight, bias: on_device(impl, x, order, weight, bias, sizes, rates)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_a_batch_of_weights_by_vmap(impl):
    """Each with its own weights, or the same for all."""
    x, order, weight, bias, sizes, rates = inputs(2, 7, 3, [3, 4], [2, 3])
    run = lambda x, w, b: ops.aggregate_tokens(x, order, w, b, sizes, rates, impl=impl)  # noqa: E731
    xs, ws, bs = normal(3, 2, 7, 3), normal(3, 5), normal(3, 2)
    expected = torch.stack([run(*one) for one in zip(xs, ws, bs, strict=True)])
    torch.testing.assert_close(torch.func.vmap(run)(xs, ws, bs), expected)
    shared = torch.stack([run(x, weight, bias) for x in xs])
    torch.testing.assert_close(torch.func.vmap(run, in_dims=(0, None, None))(xs, weight, bias), shared)


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_flops(impl):
    """A product for every slot; the kernel's backward counts two and a half times as much."""
    given = inputs(2, 7, 3, [3, 4], [2, 3])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.aggregate_tokens(*given, impl=impl)
    assert counter.get_total_flops() == 2 * 2 * 3 * (4 + 6)


def test_the_answer_does_not_depend_on_threads():
    """Bit for bit, outputs and gradients."""
    given = inputs(3, 97, 20, [24, 48, 25], [9, 5, 2])
    leaves = [given[n].requires_grad_() for n in (0, 2, 3)]

    def answer(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = ops.aggregate_tokens(*given, impl="numba")
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = answer(1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, answer(threads), strict=True))
    torch.set_num_threads(1)


def test_auto_is_the_kernel(monkeypatch):
    """Never without the backend."""
    used, given = [], inputs(1, 5, 2, [2, 3], [2, 2])
    for name in ("torch", "numba"):
        monkeypatch.setitem(ops.aggregate_tokens.forms, name, lambda x, *_, name=name: used.append(name) or x)
    ops.aggregate_tokens(*given)
    monkeypatch.setitem(operators.INSTALLED, "numba", False)
    ops.aggregate_tokens(*given)
    assert used == ["numba", "torch"]
    assert ops.aggregate_tokens.forms.keys() == {"loops", "torch", "numba", "triton"}


Z, ORDER = torch.zeros, torch.tensor([[2, 0, 1, 3], [3, 2, 1, 0]])
BAD = [
    ({"x": Z(2, 4)}, ValueError, r"x: expected 3 dimensions \(B N C\), got shape \(2, 4\)"),
    ({"x": Z(2, 4, 3).int()}, TypeError, r"x: expected a floating tensor, got torch.int32"),
    ({"order": ORDER.int()}, TypeError, r"order: expected a tensor of torch.int64, got torch.int32"),
    ({"order": ORDER[:1]}, ValueError, r"order: expected shape \(2, 4\), got \(1, 4\)"),
    ({"order": ORDER + 1}, ValueError, r"order: expected values from 0 to 3, got 4"),
    ({"order": ORDER // 2}, ValueError, r"order: expected distinct cells for every image, got one twice"),
    ({"weight": Z(4)}, ValueError, r"weight: expected shape \(3\), got shape \(4,\)"),
    ({"weight": Z(3).double()}, TypeError, r"weight: expected torch.float32"),
    ({"bias": Z(1)}, ValueError, r"bias: expected shape \(2\), got shape \(1,\)"),
    ({"rates": ()}, TypeError, r"rates: expected an aggregation rate for each sub-region, got \(\)"),
    ({"rates": (0, 1)}, ValueError, r"rates: expected at least 1, got 0"),
    ({"rates": 2}, TypeError, r"rates: expected an aggregation rate for each sub-region, got 2"),
    ({"sizes": (4,)}, TypeError, r"sizes: expected 2 sizes, one for each rate, got \(4,\)"),
    ({"sizes": (-1, 5)}, ValueError, r"sizes: expected whole numbers of at least 0, got -1"),
    ({"sizes": (2, 3)}, ValueError, r"sizes: expected a sum of 4, the tokens of x, got 5"),
    ({"impl": "fast"}, ValueError, r"impl: expected one of .*, got 'fast'"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(unchecked, changes, error, message, monkeypatch):
    """Before any work is done."""
    for name in ops.aggregate_tokens.forms:
        monkeypatch.setitem(ops.aggregate_tokens.forms, name, lambda *_: pytest.fail("work was done"))
    good = dict(x=Z(2, 4, 3), order=ORDER, weight=Z(3), bias=Z(2), sizes=(2, 2), rates=(2, 1))
    with pytest.raises(error, match=message):
        ops.aggregate_tokens(**good | changes)


@pytest.mark.parametrize("impl", KERNELS)
def test_the_kernel_reads_no_memory_of_others(impl):
    """What the operator itself looks at covers an order that is wrong."""
    if impl == "triton" and not operators.INTERPRETED:
        pytest.skip("ends the process")
    x, order, weight, bias, sizes, rates = inputs(1, 5, 2, [2, 3], [2, 2])
    with pytest.raises(ValueError, match="order: expected values from 0 to 4, got 5"):
        ops.aggregate_tokens.forms[impl](x, order + 1, weight, bias, sizes, rates)


@pytest.mark.slow
@pytest.mark.skipif(not operators.INSTALLED["triton"], reason="Triton is not installed")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_kernels_compile_for_a_gpu(dtype):
    """Without one: the calls as they are, by a driver that compiles for compute capability 9.0 and launches nothing."""
    compile_for_a_gpu(f"""
        from dynattn.kernels import aggregation_triton as ranks

        x, order = torch.zeros(2, 30, 70, dtype=torch.{dtype}), torch.zeros(2, 30, dtype=torch.int64)
        weight, bias = torch.zeros(1, 9, dtype=x.dtype), torch.zeros(1, 3, dtype=x.dtype)
        (out,) = ranks.forward(x, order, weight, bias, [7, 15, 8], [4, 3, 2])
        ranks.backward(out, out, x, order, weight, bias, [7, 15, 8], [4, 3, 2])
        ranks.check_program[1,](order, 60, 30, BLOCK=1024)
        wanted = {{name for name in vars(ranks) if name.endswith("_program")}}
        assert (found := {{program.__name__ for program in kernels}}) == wanted, found ^ wanted
        may_fail = [program for program, one in kernels.items() if "assertfail" in one.asm["ptx"]]
        assert may_fail == [ranks.check_program]
    """)


# --------------------------------------------------------------------------------------------------- rank, sub-regions


def test_rank_is_stable():
    """SG-2: least significant first, of equals the first cell, for every image."""
    S = torch.tensor([[[3.0, 1.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert rank(S).tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 3136])
def test_sub_regions_hold_every_token(tokens):
    """SG-2: equal parts, the most significant one has what is left."""
    for shares in ((1, 1, 1, 1), (1, 2, 1), (1, 1), (1,)):
        sizes = sub_regions(tokens, shares)
        assert sum(sizes) == tokens and sizes[:-1] == [tokens // sum(shares) * share for share in shares[:-1]]


def test_shared_sub_regions_are_the_same_groups():
    """Table 1's rates of stage 1: two sub-regions of one rate are one with the same groups, and F in common."""
    module, apart = layer(rates=(4, 2, 2, 1)), layer(rates=(4, 2, 2, 1), shared=False)
    assert (module.rates, module.shares) == ([4, 2, 1], [1, 2, 1]) and apart.shares == [1, 1, 1, 1]
    state = module.state_dict()
    state |= {f"f.{n}.{kind}": state[f"f.{m}.{kind}"] for n, m in ((3, 2), (2, 1)) for kind in ("weight", "bias")}
    apart.load_state_dict(state)
    x, S = normal(2, 4, 8, 8), normal(2, 4, 8)
    torch.testing.assert_close(module(x, S), apart(x, S))


# ----------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (1, 1), (1, 3)])
@pytest.mark.parametrize("impl", ["loops", "torch", "numba"])
@pytest.mark.parametrize("options", [dict(parts=2), dict(aggregate="after", shared=False, lepe=False)])
def test_a_layer_is_its_equations(shape, impl, options):
    """SG-1, SG-2: linear maps, aggregation and attention by the loops; before or after the projection."""
    module, x, S = layer(**options), normal(2, *shape, 8), normal(2, *shape)
    module.implementation = impl
    tokens, N = x.flatten(1, 2), shape[0] * shape[1]
    order = torch.stack([torch.tensor(sorted(range(N), key=lambda n: one[n])) for one in S.flatten(1)])
    F_ = torch.cat([f.weight[0] for f in module.f]), torch.cat([f.bias for f in module.f])
    iam = lambda t: aggregate_tokens_loops(t, order, *F_, sub_regions(N, module.shares), module.rates)  # noqa: E731
    project = lambda t: [torch.cat([f(t).chunk(2, -1)[n] for f in module.kv], -1) for n in range(2)]  # noqa: E731
    k, v = project(iam(tokens)) if module.aggregate == "before" else map(iam, project(tokens))
    q, k, v = (rearrange(t, "B N (h d) -> B h N d", h=2) for t in (module.q(tokens), k, v))
    z = core.merge_heads(core.dense_attention_loops(q, k, v, None, 0.5), shape)
    if module.lepe_conv is not None:
        context = module.lepe_conv(rearrange(module.lepe_linear(x), "B H W C -> B C H W"))
        z = z + rearrange(context, "B C H W -> B H W C")
    with torch.no_grad():
        torch.testing.assert_close(module(x, S), module.proj(z))


def test_before_and_after_differ_by_biases_only():
    """SG-1, SG-2: F and the projections act on different axes; without biases the two are the same."""
    one, other = layer(), layer(aggregate="after")
    other.load_state_dict(one.state_dict())
    x, S = normal(1, 4, 4, 8), normal(1, 4, 4)
    assert (one(x, S) - other(x, S)).abs().max() > 1e-3
    for module in (one, other):
        for f in (*module.f, *module.kv):
            torch.nn.init.zeros_(f.bias)
    torch.testing.assert_close(one(x, S), other(x, S))


def test_all_rates_1_are_dense_attention():
    """SG-1: with rate 1, weight 1 and no bias every query reads every token, in whatever order."""
    module, x = layer(rates=(1, 1), lepe=False), normal(1, 3, 5, 8)
    torch.nn.init.ones_(module.f[0].weight)
    torch.nn.init.zeros_(module.f[0].bias)
    tokens = x.flatten(1, 2)
    q, (k, v) = module.q(tokens), module.kv[0](tokens).chunk(2, -1)
    q, k, v = (rearrange(t, "B N (h d) -> B h N d", h=2) for t in (q, k, v))
    z = core.merge_heads(F.scaled_dot_product_attention(q, k, v), (3, 5))
    for S in (normal(1, 3, 5), torch.zeros(1, 3, 5).double()):
        torch.testing.assert_close(module(x, S), module.proj(z))


def test_significance_reaches_the_next_layer_and_no_gradient_comes_back():
    """SG-5 and SG-2: tokens move with the significance; the layer that found it learns nothing from that.

    Shown in three ways: the map has no gradient; slopes of the first layer's queries and keys through it are zero; with
    ranks in the place of the significance nothing changes.
    """
    first, second, x = hybrid_layer(), layer(), normal(1, 4, 4, 8)
    _, significance = first(x)
    assert not significance.requires_grad
    out = second(x.requires_grad_(), significance)
    slopes = torch.autograd.grad(out.sum(), list(first.parameters()), allow_unused=True)
    assert all(slope is None for slope in slopes)
    ranks = rank(significance).argsort(dim=1).reshape(1, 4, 4).double()
    assert torch.equal(second(x, ranks), out)
    assert (second(x, -significance) - out).abs().max() > 1e-3


def test_every_parameter_learns():
    module = layer(parts=2).train()
    module(normal(1, 5, 4, 8), normal(1, 5, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(heads=3), ValueError, "heads: expected a divisor of 8, got 3"),
        (dict(rates=()), TypeError, "rates: expected an aggregation rate for each sub-region, got ()"),
        (dict(rates=(2, 0)), ValueError, "rates: expected at least 1, got 0"),
        (dict(aggregate="both"), ValueError, "aggregate: expected one of 'before', 'after', got 'both'"),
        (dict(parts=3), ValueError, "parts: expected a divisor of 2, got 3"),
        (dict(attn_drop=1.0), ValueError, "attn_drop: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_bad_arguments_of_the_layer(options, error, message, unchecked):
    with pytest.raises(error) as caught:
        SelfGuidedAttention(**dict(dim=8, heads=2, rates=(2, 1)) | options)
    assert str(caught.value).startswith(message)


def test_a_significance_of_another_map(unchecked):
    module, x = layer(), normal(2, 4, 4, 8)
    for wrong in (normal(2, 4, 5), normal(1, 4, 4)):
        with pytest.raises(ValueError, match=r"significance: expected shape \(2, 4, 4\), a number for every cell of x"):
            module(x, wrong)
    with pytest.raises(TypeError, match="significance: expected a tensor of shape"):
        module(x, None)


# ---------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (1, 1)])
def test_a_record(shape):
    """SG-2 as a matrix; every cell has one token; without biases and LePE A_eff is all that there is."""
    module, x, S = layer(lepe=False), normal(2, *shape, 8), normal(2, *shape)
    for f in (*module.f, *module.kv):
        torch.nn.init.zeros_(f.bias)
    record = record_of(module, x, S)
    N, sizes = shape[0] * shape[1], sub_regions(shape[0] * shape[1], [1, 2, 1])
    assert record.kind == "self_guided" and not record.exact and torch.equal(record.significance, S[0])
    assert record.regions.bincount(minlength=3).tolist() == sizes
    expected = ops.aggregate_tokens(
        torch.eye(N).double()[None], record.order[None], torch.cat([f.weight[0] for f in module.f]),
        torch.zeros(3).double(), sizes, [4, 2, 1],
    )  # fmt: skip
    torch.testing.assert_close(record.aggregation, expected[0])
    assert ((record.aggregation != 0).sum(0) == 1).all()
    assert torch.equal(record.aggregation.abs().argmax(0), record.tokens)
    for head in range(2):
        assert record.rest(head) < 1e-12
        torch.testing.assert_close(record.shares(head).sum(1), torch.ones(N).double())
        assert (record.shares(head) >= 0).all()
    assert record_of(layer(), x, S).rest(0) > 1e-3


def test_keys_are_shares_of_tokens():
    """All cells; those of one token have the same weight."""
    record = record_of(layer(), normal(1, 4, 4, 8), normal(1, 4, 4))
    keys = record.keys(1, 2, head=1)
    assert len(keys.weight) == 16 and float(keys.weight.sum()) == pytest.approx(1)
    for token in range(int(record.tokens.max()) + 1):
        assert keys.weight[record.tokens == token].unique().numel() == 1


def test_tokens_of_a_group_are_neighbours_in_rank_not_on_the_map():
    """Figure 2 draws squares; the groups are scattered."""
    record = record_of(layer(), normal(1, 4, 4, 8), normal(1, 4, 4))
    ranks = record.order.argsort()
    for token in range(int(record.tokens.max()) + 1):
        of_token = ranks[record.tokens == token].sort().values
        assert (of_token.diff() == 1).all()
    assert aggregation.groups_of([4, 8, 4], [4, 2, 1]) == [1, 4, 4]
