"""DGT's dynamic group attention: groups, selection and the operation against their loops; the module, its centroids."""

import math
import os
import subprocess
import sys
import textwrap
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import DOUBLE, layouts, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dynattn import core, ops, tracing, verify
from dynattn.kernels import grouped as operator
from dynattn.mechanisms import dynamic_group
from dynattn.mechanisms.dynamic_group import (
    ASSIGN,
    SELECT,
    DynamicGroupAttention,
    as_printed_attention,
    assign_loops,
    grouped_attention_loops,
    membership,
    multiply_adds,
    select_loops,
)

ROOT = Path(__file__).parents[1]
FAST = ["torch", "numba"]


def whole(*shape: int) -> Tensor:
    """Whole numbers from -2 to 2, whose products and sums are exact: many are equal."""
    return torch.randint(-2, 3, shape).double()


# ------------------------------------------------------------------------------------------------ groups and selection

# B, h, L or S, d, G
ROUND = [(2, 2, 7, 2, 3), (1, 1, 1, 1, 1), (1, 1, 5, 3, 9), (1, 3, 6, 1, 2), (1, 1, 18, 2, 17)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("size", ROUND)
def test_groups_equal_the_loops(size, impl, dtype):
    """DGT-1: of equally near centroids the first, which rounding does not hide here."""
    B, h, L, d, G = size
    for _ in range(5):
        q, e = whole(B, h, L, d).to(dtype), whole(h, G, d).to(dtype)
        assert torch.equal(ASSIGN[impl](q, e), assign_loops(q, e))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("size", ROUND)
def test_selection_equals_the_loops(size, impl, dtype):
    """DGT-1 for every n: the keys of the largest products, of equals the first, in the order of the map."""
    B, h, S, d, G = size
    k, e = whole(B, h, S, d).to(dtype), whole(h, G, d).to(dtype)
    for n in range(1, S + 1):
        assert torch.equal(SELECT[impl](k, e, n), select_loops(k, e, n))
    everything = torch.arange(S).expand(B, h, G, S)
    assert torch.equal(SELECT[impl](k, e, S), everything)


@pytest.mark.parametrize("n", [1, 98, 99, 200])
@pytest.mark.parametrize("G", [1, 15, 16, 17, 48])
def test_selection_beyond_a_register(G, n):
    """DGT-1 by torch.topk, on numbers of which no two are equal, and by torch's form on numbers of which many are."""
    k, e = normal(2, 2, 200, 32), normal(2, G, 32)
    likes = torch.einsum("bmic,mjc->bmji", k, e)
    for impl in FAST:
        assert torch.equal(SELECT[impl](k, e, n), likes.topk(n).indices.sort().values)
    k, e = whole(1, 2, 200, 3).float(), whole(2, G, 3).float()
    assert torch.equal(SELECT["numba"](k, e, n), SELECT["torch"](k, e, n))
    assert torch.equal(ASSIGN["numba"](k, e), ASSIGN["torch"](k, e))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e30])
def test_all_keys_alike(value):
    """DGT-1: then every centroid selects the first n, also where the numbers are the smallest or very large."""
    k, e = torch.full((1, 1, 40, 1), value), torch.ones(1, 3, 1)
    for impl, n in product(FAST, (1, 7, 40)):
        assert torch.equal(SELECT[impl](k, e, n), torch.arange(n).expand(1, 1, 3, n))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("below", [1.0, 1 + 2**-23, -1 - 2**-23, -1 - 2**-22])
def test_neighbouring_numbers(below, impl):
    """DGT-1 where nothing lies between two keys: a middle that is rounded to the lower one once hung the search."""
    below = torch.tensor(below)
    above = torch.nextafter(below, torch.tensor(math.inf))
    k = torch.stack([below, above, below, above, below])[None, None, :, None]
    for n, selected in enumerate([[1], [1, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]], 1):
        assert SELECT[impl](k, torch.ones(1, 1, 1), n).flatten().tolist() == selected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", FAST)
def test_equal_keys_and_equal_centroids_of_any_numbers(impl, dtype):
    """DGT-1: numbers that must be rounded. A matrix product sums in another order at another place."""
    for S, G, d in product((5, 11, 50, 61, 113), (1, 3, 5, 48), (8, 32)):
        e, k = F.normalize(torch.randn(1, G, d, dtype=dtype), dim=-1), torch.randn(1, 1, 1, d, dtype=dtype)
        for keys in (k.expand(1, 1, S, d), k.expand(1, 1, S, d).contiguous(), k.mT.repeat(1, 1, 1, S).mT):
            assert torch.equal(SELECT[impl](keys, e, 4), torch.arange(4).expand(1, 1, G, 4))
        assert (ASSIGN[impl](torch.randn(1, 1, S, d, dtype=dtype), torch.cat([e, e], dim=1)) < G).all()


@pytest.mark.parametrize(
    ("likes", "order"),
    [
        ([-math.inf, math.nan, 1, -math.inf], [2, 0, 1, 3]),
        ([math.inf, math.nan, -math.inf, 3, math.inf, -3.3e38], [0, 4, 3, 5, 1, 2]),
        ([-1e300, -1e200, math.nan, -1e100, -1e301], [3, 1, 0, 4, 2]),
        ([1e300, math.inf, -1e300, 5], [1, 0, 3, 2]),
        ([math.nan, math.nan, math.nan], [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("impl", ["loops", *FAST, "triton"])
def test_what_is_no_number_counts_as_the_least(impl, likes, order):
    """DGT-1: as -inf; also beside what is infinite, and where halving an interval would take for ever."""
    k = torch.tensor(likes, dtype=torch.float64)[None, None, :, None]
    for n in range(1, len(order) + 1):
        assert SELECT[impl](k, torch.ones(1, 1, 1).double(), n).flatten().tolist() == sorted(order[:n])
    assert ASSIGN[impl](torch.ones(1, 1, 1, 1).double(), k[0].mT.reshape(1, -1, 1)).item() == order[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_what_is_no_number_is_liked_least(impl, n):
    """DGT-1: one NaN among the keys must not become everybody's key, nor hang the search, whatever is beside it."""
    k = torch.tensor([3e38, math.nan, -3e38, 1.0, math.inf])[None, None, :, None]
    order = [4, 0, 3, 2, 1]
    assert SELECT[impl](k, torch.ones(1, 1, 1), n).flatten().tolist() == sorted(order[:n])
    groups = ASSIGN[impl](k, torch.tensor([[[1.0], [-1.0]]]))
    assert groups.flatten().tolist() == [0, 0, 1, 0, 0]


def test_the_norm_of_a_query_does_not_change_its_group_but_that_of_a_key_its_choice():
    """DGT-1: argmax over unit centroids does not see it; a top-k over keys does, and so prefers large ones."""
    q, e, factor = normal(1, 2, 30, 4), F.normalize(normal(2, 6, 4), dim=-1), 5 * torch.rand(1, 2, 30, 1) + 0.1
    assert torch.equal(ASSIGN["torch"](q, e), ASSIGN["torch"](q * factor, e))
    likes = q[0, 0] @ e[0, 0]
    least = likes.where(likes > 0, math.inf).argmin()
    grown = q.clone()
    grown[0, 0, least] *= 1000
    assert SELECT["torch"](q, e, 1)[0, 0, 0, 0] != least == SELECT["torch"](grown, e, 1)[0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------- the operation

# B, h, L, S, d, G, n
SIZES = {
    "several of each": (2, 2, 7, 5, 3, 4, 3),
    "one of everything": (1, 1, 1, 1, 1, 1, 1),
    "more groups than queries": (1, 2, 3, 4, 2, 9, 2),
    "one group with all keys": (1, 1, 5, 5, 2, 1, 5),
    "keys of another map": (1, 3, 5, 11, 1, 2, 7),
    "more than a register of channels": (1, 1, 3, 3, 19, 2, 2),
}
LARGE = {  # beyond a tile of queries and a block of keys: too large for the loops
    "tiles and blocks": (1, 2, 230, 150, 32, 3, 150),
    "many small groups": (2, 2, 100, 90, 16, 48, 33),
    "many channels": (1, 1, 99, 80, 70, 2, 73),
}


def inputs(B, h, L, S, d, G, n) -> list[Tensor]:
    """Uneven groups, small numbers first; distinct keys in any order."""
    groups = (torch.rand(B, h, L) ** 3 * G).long()
    return [normal(B, h, L, d), normal(B, h, S, d), normal(B, h, S, d), groups, chosen(B, h, G, S)[..., :n]]


def chosen(B: int, h: int, G: int, S: int) -> Tensor:
    """Every number below S once in each group, in any order."""
    return torch.rand(B, h, G, S).argsort(dim=-1)


def masked(q, k, v, groups, selected, scale=None) -> Tensor:
    """The dense attention that computes the same."""
    return F.scaled_dot_product_attention(q, k, v, membership(groups, selected, k.shape[2]), scale=scale)


def compare_forms(one, other, arguments: list, tolerance: float = 1e-10) -> None:
    """Outputs and every gradient, relative to the largest entry."""
    named = {str(n): a for n, a in enumerate(arguments)}
    got, want = verify.answer(one, named, {}), verify.answer(other, named, {})
    for key in want:
        largest = float(want[key].abs().max()) or 1.0
        assert float((got[key] - want[key]).abs().max()) <= tolerance * largest, key


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("name", LARGE)
def test_equals_masked_attention_beyond_a_block(name, impl):
    """DGT-2 at sizes that the loops would take minutes for."""
    compare_forms(partial(ops.grouped_attention, impl=impl), masked, inputs(*LARGE[name]))


def test_gradients_as_the_paper_writes_them():
    """DGT-14 to DGT-17 for one group by hand: DGT-14, DGT-15, DGT-16, DGT-17 and the softmax between dP^ and dP."""
    x_Q, x_K, x_V, dY = normal(6, 3), normal(4, 3), normal(4, 3), normal(6, 3)
    P = x_Q @ x_K.T  # DGT-11
    weights = (P / 3**0.5).softmax(-1)  # DGT-12
    dweights = dY @ x_V.T  # DGT-16
    dP = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) / 3**0.5
    expected = [dP @ x_K, (x_Q.T @ dP).T, weights.T @ dY]  # DGT-14, DGT-15, DGT-17
    for impl in ("loops", *FAST):
        leaves = [t[None, None].clone().requires_grad_() for t in (x_Q, x_K, x_V)]
        groups, selected = torch.zeros(1, 1, 6, dtype=torch.int64), torch.arange(4)[None, None, None]
        Y = ops.grouped_attention(*leaves, groups, selected, impl=impl)
        torch.testing.assert_close(Y[0, 0], weights @ x_V)  # DGT-13
        for found, want in zip(torch.autograd.grad(Y[0, 0], leaves, dY), expected, strict=True):
            torch.testing.assert_close(found[0, 0], want)


@pytest.mark.parametrize("impl", FAST)
def test_large_logits(impl):
    """DGT-12 does not overflow, in any block."""
    q, k, v, groups, selected = inputs(*LARGE["tiles and blocks"])
    found = ops.grouped_attention(1e3 * q, 1e3 * k, v, groups, selected, impl=impl)
    torch.testing.assert_close(found, masked(1e3 * q, 1e3 * k, v, groups, selected))


@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_what_is_no_number_stays_with_those_who_read_it(impl):
    """DGT-2: a NaN must not vanish, nor reach a query that does not read it."""
    for spoilt in (1, 2) if impl == "torch" else (0, 1, 2):  # torch's own attention answers 0 to a query that is NaN
        q, k, v, groups, selected = inputs(1, 1, 8, 6, 2, 3, 2)
        (q, k, v)[spoilt][0, 0, 3, 1] = math.nan
        reads = torch.arange(8) == 3 if spoilt == 0 else membership(groups, selected, 6)[0, 0, :, 3]
        found = ops.grouped_attention(q, k, v, groups, selected, impl=impl)[0, 0].isnan()
        expected = reads[:, None].expand(-1, 2) if spoilt < 2 else reads[:, None] & torch.tensor([False, True])
        assert torch.equal(found, expected)


def test_keys_that_nobody_selects_learn_nothing():
    """DGT-15, DGT-17: exactly zero, also where only a group without a query has selected them."""
    q, k, v, _, _ = (t.requires_grad_() if t.is_floating_point() else t for t in inputs(1, 1, 4, 6, 2, 3, 2))
    groups, selected = torch.tensor([[[0, 0, 2, 0]]]), torch.tensor([[[[4, 1], [3, 0], [1, 5]]]])
    for impl in ("loops", *FAST):
        out = ops.grouped_attention(q, k, v, groups, selected, impl=impl)
        for slope in torch.autograd.grad(out.square().sum(), (k, v)):
            assert torch.equal(slope[0, 0].any(dim=-1).nonzero().flatten(), torch.tensor([1, 4, 5]))


def test_membership():
    """DGT-1 as a mask: a query may read what its group has selected."""
    groups, selected = torch.tensor([[[1, 0, 1]]]), torch.tensor([[[[3, 0], [2, 3]]]])
    expected = [[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1]]
    assert membership(groups, selected, 4)[0, 0].int().tolist() == expected


# --------------------------------------------------------------------------------------------------- as torch operators


def operator_arguments(*size: int) -> list:
    """Of the operator: as `inputs`, with groups of uneven length, and a scale."""
    *tensors, groups, selected = inputs(*size)
    lengths = torch.randint(1, selected.shape[3] + 1, selected.shape[:3])
    return [*(t.requires_grad_() for t in tensors), groups, selected, lengths, 0.7]


def test_a_group_reads_as_many_keys_as_its_length():
    """DGT-2 where groups have selected different numbers of keys; what stands behind is not read."""
    q, k, v, groups, selected, lengths, scale = operator_arguments(*SIZES["several of each"])
    read = torch.zeros(2, 2, 7, 5, dtype=torch.bool)
    for b, m, l in product(range(2), range(2), range(7)):
        j = groups[b, m, l]
        read[b, m, l, selected[b, m, j, : lengths[b, m, j]]] = True
    compare_forms(
        lambda *tensors: operator.OPERATORS["numba"](*tensors, groups, selected, lengths, scale)[0],
        lambda *tensors: F.scaled_dot_product_attention(*tensors, read, scale=scale),
        [t.detach() for t in (q, k, v)],
    )


def test_opcheck():
    """Schema, fake and autograd registrations of the forward, schema and fake of the backward and of both searches."""
    arguments = operator_arguments(*SIZES["several of each"])
    forward = operator.OPERATORS["numba"]
    torch.library.opcheck(forward, tuple(arguments))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    outputs = forward(*plain)
    backward = torch.ops.dynattn.grouped_attention_numba_backward.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (torch.ones_like(outputs[0]), *outputs, *plain), test_utils=tests)
    torch.library.opcheck(operator.ASSIGN, (plain[0], normal(2, 3, 3)), test_utils=tests)
    torch.library.opcheck(operator.SELECT, (plain[1], normal(2, 3, 3), 2), test_utils=tests)


@pytest.mark.parametrize("name", ["several of each", "one of everything", "more groups than queries"])
def test_gradcheck(name):
    """DGT-14, DGT-15, DGT-16, DGT-17 by finite differences."""
    arguments = operator_arguments(*SIZES[name])
    first = lambda *a: operator.OPERATORS["numba"](*a)[0]  # noqa: E731
    assert torch.autograd.gradcheck(first, arguments, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_second_derivatives(impl):
    """The kernel has those of the torch form."""
    q, k, v, groups, selected = inputs(1, 1, 4, 3, 2, 2, 2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    form = lambda *x: ops.grouped_attention(*x, groups, selected, impl=impl)  # noqa: E731
    assert torch.autograd.gradgradcheck(form, leaves, fast_mode=True)


@pytest.mark.slow
def test_compile_with_dynamic_shapes():
    """fullgraph, forward and backward, at sizes that the first call did not have; wrong indices are refused as well."""
    program = """
        import torch
        from dynattn import ops
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        for impl in ("numba", "auto"):
            function = lambda *a: ops.grouped_attention(*a, impl=impl)
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
            for size in (3, 5, 8):
                tensors = [torch.randn(2, 2, L, 4, requires_grad=True) for L in (2 * size, size + 1, size + 1)]
                groups = torch.randint(size, (2, 2, 2 * size))
                selected = torch.rand(2, 2, size, size + 1).argsort()[..., : size - 1]
                one, other = compiled(*tensors, groups, selected), function(*tensors, groups, selected)
                torch.testing.assert_close(one, other)
                for a, b in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (one, other)), strict=True):
                    torch.testing.assert_close(a, b)
            for wrong in ((groups + size, selected), (groups, selected - 1)):
                try:
                    compiled(*tensors, *wrong)
                except (RuntimeError, ValueError) as error:
                    assert "expected values from 0 to" in str(error), error
                else:
                    raise AssertionError("memory of others was read")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=600)


@pytest.mark.slow
def test_the_module_compiles():
    """In one graph in eval mode; in training too."""
    program = """
        import torch
        from dynattn.mechanisms.dynamic_group import DynamicGroupAttention
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        module = DynamicGroupAttention(8, 2, groups=5, keys=6)
        for training in (False, True):
            module.train(training)
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
            for H, W in ((3, 4), (5, 7)):
                x = torch.randn(2, H, W, 8)
                one, counts = compiled(x), module.counts
                assert counts is None if not training else counts.sum() == 2 * 2 * H * W, counts
                module.sums = module.counts = None
                other = module(x)
                assert not training or torch.equal(counts, module.counts)
                module.sums = module.counts = None
                torch.testing.assert_close(one, other)
                for a, b in zip(*(torch.autograd.grad(y.square().sum(), module.qkv.weight) for y in (one, other))):
                    torch.testing.assert_close(a, b)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=600)


@pytest.mark.parametrize("impl", FAST)
def test_the_answer_does_not_depend_on_threads(impl):
    """Bit for bit, and from run to run: keys that many groups selected collect their gradients in one order."""
    *tensors, groups, selected = inputs(2, 3, 300, 90, 16, 7, 60)
    leaves, e = [t.float().requires_grad_() for t in tensors], normal(3, 7, 16).float()

    def answer(threads):
        torch.set_num_threads(threads)
        out = ops.grouped_attention(*leaves, groups, selected, impl=impl)
        search = [ASSIGN[impl](leaves[0].detach(), e), SELECT[impl](leaves[1].detach(), e, 60)]
        return [out, *torch.autograd.grad(out.square().sum(), leaves), *search]

    first = answer(1)
    for threads in (1, 2, 3) if impl == "numba" else (1, 1):
        assert all(torch.equal(a, b) for a, b in zip(first, answer(threads), strict=True))
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # beartype does, to look into lists
def test_a_students_file_is_checked(tmp_path):
    """Indices reach the process that answers, and no gradient of them is asked for."""
    from dynattn.verify import student

    text = """
        import torch
        def grouped_attention(q, k, v, groups, selected, *, scale=None):
            out = torch.zeros_like(q)
            for b in range(q.shape[0]):
                for m in range(q.shape[1]):
                    for j in range(selected.shape[2]):
                        own, keys = groups[b, m] == j, selected[b, m, j]
                        P = q[b, m, own] @ k[b, m, keys].T * (q.shape[-1] ** -0.5 if scale is None else scale)
                        out[b, m, own] = P.softmax(-1) @ v[b, m, KEYS]
            return out
    """
    told = []
    for keys in ("keys", "groups[b, m, :1].expand_as(keys)"):
        path = tmp_path / "answers.py"
        path.write_text(textwrap.dedent(text).replace("KEYS", keys))
        if os.name == "posix":
            told += list(student.examine(path, "grouped_attention", cases=5))
    assert [verdict.passed for verdict in told] == [True, False][: len(told)], told


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("impl", ["loops", *FAST])
@pytest.mark.parametrize("G", [1, 3])
def test_all_keys_are_dense_attention(G, impl):
    """DGT-2: one group, or any, that selected every key in any order reads what dense attention reads."""
    q, k, v = normal(2, 2, 7, 3), normal(2, 2, 5, 3), normal(2, 2, 5, 3)
    groups, selected = torch.randint(G, (2, 2, 7)), chosen(2, 2, G, 5)
    found = ops.grouped_attention(q, k, v, groups, selected, impl=impl)
    torch.testing.assert_close(found, ops.dense_attention(q, k, v), rtol=1e-10, atol=1e-12)


def test_windows_are_groups():
    """DGT-2: with windows for groups and their tokens for keys it is window attention."""
    q, k, v = (normal(1, 2, 24, 3) for _ in range(3))
    i, j = torch.arange(24) // 6, torch.arange(24) % 6
    groups = i // 2 * 2 + j // 3
    selected = groups.argsort(stable=True).reshape(4, 6)
    found = ops.grouped_attention(q, k, v, groups.expand(1, 2, -1), selected.expand(1, 2, -1, -1))
    torch.testing.assert_close(found, ops.window_attention(q, k, v, None, (4, 6), window=(2, 3)))


@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_one_key_is_its_value(impl):
    """DGT-13: with n = 1 the softmax is 1."""
    q, k, v, groups, selected = inputs(2, 2, 7, 5, 3, 4, 1)
    rows = selected[..., 0].gather(2, groups)[..., None].expand(-1, -1, -1, 3)
    torch.testing.assert_close(ops.grouped_attention(q, k, v, groups, selected, impl=impl), v.gather(2, rows))


@pytest.mark.parametrize("impl", FAST)
def test_numbers_of_groups_and_order_of_keys_mean_nothing(impl):
    """DGT-2: groups under other numbers, queries in another order, keys of a group in another."""
    q, k, v, groups, selected = inputs(*SIZES["several of each"])
    form = partial(ops.grouped_attention, impl=impl)
    expected, other, order = form(q, k, v, groups, selected), torch.randperm(4), torch.randperm(7)
    torch.testing.assert_close(form(q, k, v, other.argsort()[groups], selected[:, :, other]), expected)
    torch.testing.assert_close(form(q, k, v, groups, selected.flip(-1)), expected)
    torch.testing.assert_close(form(q[:, :, order], k, v, groups[:, :, order], selected), expected[:, :, order])


# ---------------------------------------------------------------------------------------------------------- as printed


def printed(equations: set[int], tensors: list[Tensor], groups: Tensor, selected: Tensor) -> list[Tensor]:
    """Output and gradients of q, k, v; with no equation as printed, what is right."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    Y = as_printed_attention(*leaves, groups, selected, leaves[0].shape[-1] ** -0.5, equations)
    return [Y, *torch.autograd.grad((Y * torch.linspace(-1, 1, Y.numel(), dtype=DOUBLE).view_as(Y)).sum(), leaves)]


def test_nothing_as_printed_is_the_operation():
    """DGT-11, DGT-12, DGT-13 over all keys with a mask, and their gradients."""
    arguments = inputs(*SIZES["several of each"])
    compare_forms(lambda *a: as_printed_attention(*a, 0.7, ()), partial(ops.grouped_attention, scale=0.7), arguments)


def test_equation_12_as_printed():
    """DGT-12: softmax(P) / sqrt(d). Weights sum to 1 / sqrt(d), and are peaked: logits are sqrt(d) times larger."""
    q, k, v, groups, selected = inputs(1, 2, 50, 40, 16, 3, 20)
    found = as_printed_attention(q, k, v, groups, selected, 0.25, {12})
    torch.testing.assert_close(found, ops.grouped_attention(q, k, v, groups, selected, scale=1.0) / 4)
    everything = torch.eye(40, dtype=DOUBLE).expand(1, 2, -1, -1)
    wrong, right = (as_printed_attention(q, k, everything, groups, selected, 0.25, e) for e in ({12}, ()))
    torch.testing.assert_close(wrong.sum(-1), torch.full((1, 2, 50), 0.25, dtype=DOUBLE))
    torch.testing.assert_close(right.sum(-1), torch.ones(1, 2, 50, dtype=DOUBLE))
    assert 4 * wrong.amax(-1).mean() > 1.5 * right.amax(-1).mean()


def test_equation_13_as_printed():
    """DGT-13: Y = P V without any softmax, linear in the queries, with weights of either sign."""
    q, k, v, groups, selected = inputs(*SIZES["several of each"])
    found = as_printed_attention(q, k, v, groups, selected, 0.5, {13})
    P = torch.einsum("bmic,bmac->bmia", q, k) * membership(groups, selected, 5)
    torch.testing.assert_close(found, P @ v)
    torch.testing.assert_close(as_printed_attention(-2 * q, k, v, groups, selected, 0.5, {13}), -2 * found)
    torch.testing.assert_close(as_printed_attention(q, k, v, groups, selected, 0.5, {12, 13}), found)
    assert not torch.allclose(found, ops.grouped_attention(q, k, v, groups, selected, scale=0.5))


def test_equation_17_as_printed():
    """DGT-17: dV = P^T dY with the logits. Only the gradient of the values differs from the right one."""
    *tensors, groups, selected = inputs(*SIZES["several of each"])
    for others in (set(), {12}):
        right, wrong = printed(others, tensors, groups, selected), printed(others | {17}, tensors, groups, selected)
        for n in range(3):
            torch.testing.assert_close(right[n], wrong[n])
        assert not torch.allclose(right[3], wrong[3])
    q, k, _ = tensors
    P = (q @ k.mT) * membership(groups, selected, 5)
    dY = torch.linspace(-1, 1, right[0].numel(), dtype=DOUBLE).view_as(right[0])
    torch.testing.assert_close(wrong[3], P.mT @ dY)


# ---------------------------------------------------------------------------------------------------------- the module


def layer(dim: int = 8, heads: int = 2, groups: int = 5, keys: int = 6, **options) -> DynamicGroupAttention:
    """A float64 layer in eval mode."""
    return DynamicGroupAttention(dim, heads, groups, keys, **options).double().eval()


def by_hand(module: DynamicGroupAttention, x: Tensor) -> Tensor:
    """The layer from its parts: projections, cosines, groups, selection and attention in loops, concatenation."""
    H, W, heads = x.shape[1], x.shape[2], module.heads
    if module.cpe is not None:
        x = x + F.conv2d(x.movedim(-1, 1), module.cpe.weight, module.cpe.bias, padding=1, groups=x.shape[-1]).movedim(
            1, -1
        )
    qkv = x.flatten(1, 2) @ module.qkv.weight.T + module.qkv.bias
    q, k, v = (rearrange(t, "B L (h d) -> B h L d", h=heads) for t in qkv.chunk(3, dim=-1))
    scale = q.shape[-1] ** -0.5
    if module.temperature is not None:
        q, k, scale = F.normalize(q, dim=-1) * module.temperature.exp(), F.normalize(k, dim=-1), 1.0
    groups = assign_loops(q.detach(), module.centroids)
    selected = select_loops(k.detach(), module.centroids, min(module.keys, H * W))
    z = grouped_attention_loops(q, k, v, groups, selected, scale)
    return rearrange(z, "B h (H W) d -> B H W (h d)", H=H) @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("options", [{}, {"cosine": True}, {"position_encoding": True}])
def test_module_equals_its_parts(options):
    """DGT-1, DGT-2 put together by hand, outputs and the gradients of all parameters."""
    module, x = layer(4, 2, 3, 4, **options), normal(2, 3, 2, 4)
    weight, found = normal(2, 3, 2, 4), []
    for form in (module, lambda x: by_hand(module, x)):
        output = form(x)
        found.append([output, *torch.autograd.grad((output * weight).sum(), list(module.parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("H, W", [(1, 1), (1, 6), (2, 3), (3, 1), (5, 7), (7, 7), (8, 6), (11, 4), (13, 13), (4, 17)])
def test_any_map_size(H, W):
    """DGT-1 where there are fewer tokens than keys, or than groups: min(k, L) are read."""
    for options in ({}, {"cosine": True, "groups": 48}, {"position_encoding": True, "keys": 98}):
        module, x = layer(**options), normal(2, H, W, 8)
        assert module(x).shape == x.shape
        q = normal(2, 2, H * W, 4)
        groups, selected = module.group(q, q)
        assert groups.shape == (2, 2, H * W) and selected.shape == (2, 2, module.groups, min(module.keys, H * W))


def test_k_may_change_at_any_time():
    """DGT-1: no parameter depends on it; with all keys the groups do not matter."""
    module, x = layer(), normal(1, 4, 5, 8)
    few = module(x)
    module.keys = 500
    q, k, v = rearrange(module.qkv(x), "B H W (three h d) -> three B h (H W) d", three=3, h=2)
    dense = module.proj(core.merge_heads(ops.dense_attention(q, k, v), (4, 5)))
    torch.testing.assert_close(module(x), dense)
    assert not torch.allclose(few, dense)


def test_inputs_that_are_not_contiguous():
    module, x = layer(position_encoding=True), normal(2, 3, 4, 8)
    expected = module(x)
    for view in layouts(x):
        torch.testing.assert_close(module(view), expected)


def test_auto_is_the_kernel_on_the_cpu(monkeypatch):
    """DGT-2: the module and the operation take the fastest form; without numba that of torch."""
    from dynattn.kernels import operators

    used = []
    for name, table in product(FAST, (dynamic_group.grouped_attention.forms, ASSIGN, SELECT)):
        form = table[name]
        monkeypatch.setitem(table, name, lambda *a, name=name, form=form: used.append(name) or form(*a))
    module, x = layer(), normal(1, 3, 3, 8)
    expected = module(x)
    monkeypatch.setitem(operators.INSTALLED, "numba", False)
    torch.testing.assert_close(module(x), expected)
    assert used == ["numba"] * 3 + ["torch"] * 3


def test_cosines():
    """Temperatures are 10 at first, at most 100, one a head; norms change neither attention nor the choice of keys."""
    module, x = layer(cosine=True), normal(1, 4, 4, 8)
    assert module.temperature.shape == (2, 1, 1) and torch.allclose(
        module.temperature.exp(), torch.tensor(10.0).double()
    )
    nn.init.zeros_(module.qkv.bias)
    factor = torch.rand(1, 4, 4, 1, dtype=DOUBLE) + 0.1
    one, other = (record_of(module, t) for t in (x, x * factor))
    assert torch.equal(one.selected, other.selected) and torch.equal(one.groups, other.groups)
    torch.testing.assert_close(one.effective_matrix(1), other.effective_matrix(1))
    plain = layer()
    nn.init.zeros_(plain.qkv.bias)
    assert not torch.equal(record_of(plain, x).selected, record_of(plain, x * factor).selected)
    with torch.no_grad():
        module.temperature.fill_(math.log(100))
        hot = module(x)
        module.temperature.fill_(9.0)
    torch.testing.assert_close(module(x), hot)


def record_of(module: DynamicGroupAttention, x: Tensor) -> dynamic_group.DynamicGroupRecord:
    """What the layer keeps of a map."""
    kept = []
    with tracing.keeping(lambda _, record: kept.append(record)):
        module(x)
    return kept[0]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_works_under_autocast(cosine, impl, monkeypatch):
    """Linear maps and attention in bfloat16, groups and selection in float32, the gradient as it should be."""
    module, x = layer(cosine=cosine).float().train(), normal(1, 6, 5, 8).float()
    monkeypatch.setitem(dynamic_group.grouped_attention.forms, "numba", dynamic_group.grouped_attention.forms[impl])
    for table in (ASSIGN, SELECT):
        form = table[impl]

        def precise(x, e, *n, form=form):
            assert x.dtype == e.dtype == torch.float32
            return form(x, e, *n)

        monkeypatch.setitem(table, "numba", precise)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16 and module.sums.dtype == torch.float32
    low.float().sum().backward()
    assert module.qkv.weight.grad.isfinite().all()
    full = module(x)
    assert (low - full).abs().mean() < 0.05 * full.abs().max()  # a few queries may be in another group


def test_low_precision_is_grouped_in_float32():
    """A module in bfloat16 or float16 throughout."""
    for dtype in (torch.bfloat16, torch.float16):
        module, x = layer().to(dtype).train(), normal(2, 20, 20, 8).to(dtype)
        assert module(x).dtype == dtype
        assert module.counts.sum() == 2 * 2 * 400 and module.counts.dtype == torch.float32
        module.update_centroids(1.0)
        assert module.centroids.dtype == dtype


def test_what_is_no_number_in_an_image():
    """A NaN pixel spoils its own query and those that read it; not the other image, and not the centroids."""
    module, x = layer(groups=3).train(), normal(2, 4, 4, 8)
    expected = module(x)[0]
    module.sums = module.counts = None
    x[1, 2, 2, 3] = math.nan
    torch.testing.assert_close(module(x)[0], expected)
    module.update_centroids(1.0)
    assert module.centroids.isfinite().all()
    assert module(torch.full_like(x, math.nan)).isnan().all()


# ----------------------------------------------------------------------------------------------------------- centroids


def moved_by_hand(module: DynamicGroupAttention, x: Tensor, old: float, new: float) -> Tensor:
    """DGT-3 and DGT-4, one group at a time, with the shares of what was and of what comes."""
    q = (x.flatten(1, 2) @ module.qkv.weight.T + module.qkv.bias).detach()[..., : module.dim]
    q = rearrange(q, "B L (h d) -> B h L d", h=module.heads)
    groups, centroids = assign_loops(q, module.centroids), module.centroids.clone()
    for m, j in product(range(module.heads), range(module.groups)):
        members = [query / query.norm() for query in q[:, m][groups[:, m] == j]]
        if members:
            mean = sum(members) / len(members)  # DGT-3
            e = old * centroids[m, j] + new * mean
            centroids[m, j] = e / e.norm()  # DGT-4
    return centroids


@pytest.mark.parametrize("lr", [0.0, 1e-3, 2.0])
def test_update(lr):
    """DGT-3, DGT-4: a tenth of the learning rate is the share of the new mean; rows stay unit; sums start anew."""
    module, x = layer(groups=4).train(), normal(2, 3, 4, 8)
    expected = moved_by_hand(module, x, 1 - 0.1 * lr, 0.1 * lr)
    module(x)
    before = module.centroids.clone()
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(2, 4, dtype=DOUBLE))
    module.update_centroids(lr)
    torch.testing.assert_close(module.centroids, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.centroids.norm(dim=-1), torch.ones(2, 4, dtype=DOUBLE))
    assert torch.allclose(module.centroids, before, atol=1e-12) == (lr == 0)
    after = module.centroids.clone()
    module.update_centroids(lr)  # nothing has come since
    assert torch.equal(module.centroids, after)


def test_equation_4_as_printed():
    """DGT-4: with tau on the old centroid, one step at a usual rate replaces it by the mean of its batch."""
    right, wrong = layer(groups=3).train(), layer(groups=3, as_printed=(4,)).train()
    wrong.load_state_dict(right.state_dict())
    x = normal(4, 4, 5, 8)
    mean, before = moved_by_hand(right, x, 0.0, 1.0), right.centroids.clone()
    for module in (right, wrong):
        module(x)
        module.update_centroids(1e-3)
    torch.testing.assert_close(wrong.centroids, moved_by_hand(layer_at(wrong, before), x, 1e-4, 1 - 1e-4))
    assert (wrong.centroids - mean).norm(dim=-1).max() < 1e-3 < (wrong.centroids - before).norm(dim=-1).max()
    assert (right.centroids - before).norm(dim=-1).max() < 1e-3


def layer_at(module: DynamicGroupAttention, centroids: Tensor) -> DynamicGroupAttention:
    """The same layer before its centroids moved."""
    earlier = layer(groups=module.groups)
    earlier.load_state_dict(module.state_dict() | {"centroids": centroids})
    return earlier


def test_many_updates_come_to_the_mean():
    """DGT-3, DGT-4: of one group that has all queries, to the direction of their mean, nearer with every step."""
    module, x = layer(groups=1).train(), normal(2, 4, 4, 8)
    goal, distances = moved_by_hand(module, x, 0.0, 1.0), []
    for _ in range(40):
        module(x)
        module.update_centroids(5.0)
        distances.append(float((module.centroids - goal).norm()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.01 * distances[0]


def test_empty_groups_keep_their_centroids():
    """DGT-4: exactly, whatever the others do."""
    module, x = layer(groups=40).train(), normal(1, 2, 3, 8)
    before = module.centroids.clone()
    module(x)
    empty = module.counts == 0
    assert empty.sum() >= 2 * (40 - 6)
    module.update_centroids(3.0)
    assert torch.equal(module.centroids[empty], before[empty])
    assert ((module.centroids != before).any(dim=-1) == ~empty).all()


def test_groups_of_a_step_are_those_of_the_step_before():
    """DGT-3: one pass, no k-means within an image: the forward does not move what it groups by."""
    module, x = layer().train(), normal(1, 4, 4, 8)
    before = module.centroids.clone()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    assert torch.equal(module.centroids, before)


@pytest.mark.parametrize("parts", [(1, 1, 1, 1), (3, 1)])
def test_accumulated_gradients_are_one_large_batch(parts):
    """DGT-3: queries of all forwards since the last update count, each once."""
    one, other = layer().train(), layer().train()
    other.load_state_dict(one.state_dict())
    x = normal(4, 3, 4, 8)
    one(x).sum().backward()
    for part in x.split(parts):
        other(part).sum().backward()
    for module in (one, other):
        module.update_centroids(1.0)
    torch.testing.assert_close(one.centroids, other.centroids)
    torch.testing.assert_close(one.qkv.weight.grad, other.qkv.weight.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_once(use_reentrant):
    """DGT-3: the forward that a backward pass repeats has the same groups, and is not counted."""
    module, x = layer().train(), normal(2, 3, 4, 8).requires_grad_()
    module(x).square().sum().backward()
    expected = module.sums.clone(), module.counts.clone(), module.qkv.weight.grad.clone(), x.grad.clone()
    module.sums = module.counts = module.qkv.weight.grad = x.grad = None
    checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    for found, want in zip((module.sums, module.counts, module.qkv.weight.grad, x.grad), expected, strict=True):
        torch.testing.assert_close(found, want)
    assert module.counts.sum() == 2 * 2 * 12


@pytest.mark.slow
def test_ranks_move_together(tmp_path):
    """DGT-3 under DistributedDataParallel: queries of all ranks count, also with accumulated gradients."""
    program = """
        import sys, torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from dynattn.mechanisms.dynamic_group import DynamicGroupAttention
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        x = torch.randn(3, 4, 3, 4, 4)
        torch.manual_seed(rank)
        module = DynamicGroupAttention(4, 2, groups=3, keys=5)
        parallel = DistributedDataParallel(module)  # gives all ranks the centroids of the first
        torch.manual_seed(0)
        alone = DynamicGroupAttention(4, 2, groups=3, keys=5)
        assert torch.equal(module.centroids, alone.centroids)
        for batch in x:
            parallel(batch[rank:3:2][:1]).sum().backward()
            parallel(batch[rank + 2 : rank + 3]).sum().backward()
            module.update_centroids(5.0)
            before = alone.centroids.clone()
            alone(batch)
            dist.barrier()
            counts = alone.counts.clone()
            with_itself = [torch.empty_like(module.centroids) for _ in range(2)]
            dist.all_gather(with_itself, module.centroids)
            assert torch.equal(*with_itself)
            alone.sums, alone.counts = alone.sums / 2, alone.counts / 2  # here both ranks have all of it
            alone.update_centroids(5.0)
            assert (alone.centroids - before).abs().max() > 0.01
            torch.testing.assert_close(module.centroids, alone.centroids)
        dist.destroy_process_group()
    """
    line = [sys.executable, "-c", textwrap.dedent(program)]
    ranks = [subprocess.Popen([*line, str(rank), str(tmp_path / "meet")], cwd=ROOT) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def test_centroids_are_frozen_in_eval():
    """DGT-4: nothing is collected, and so nothing moves."""
    module, x = layer(), normal(1, 4, 4, 8)
    before = module.centroids.clone()
    module(x)
    module.update_centroids(1.0)
    assert module.sums is None and torch.equal(module.centroids, before)


def test_state_dict():
    """Centroids are saved, what is collected is not; a fresh layer that loads them answers the same."""
    module, x = layer(cosine=True, position_encoding=True).train(), normal(1, 4, 4, 8)
    module(x)
    module.update_centroids(1.0)
    module(x)
    parameters = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "cpe.weight", "cpe.bias", "temperature"}
    assert module.state_dict().keys() == parameters | {"centroids"}
    assert dict(module.named_parameters()).keys() == parameters
    fresh = layer(cosine=True, position_encoding=True)
    assert not torch.allclose(fresh(x), module.eval()(x))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x))


def test_averaged_centroids_group_as_unit_ones():
    """DGT-1: an average of weights leaves rows of unequal norms; they are made unit where they are used."""
    module, x = layer(), normal(1, 5, 5, 8)
    expected = module(x)
    module.centroids *= 3 * torch.rand(2, 5, 1) + 0.1
    torch.testing.assert_close(module(x), expected)
    averaged = torch.optim.swa_utils.AveragedModel(module, use_buffers=True)
    averaged.update_parameters(layer())
    assert averaged(x).shape == x.shape


# ---------------------------------------------------------------------------------------------------------- the record


class Model(nn.Module):
    """A layer behind a convolution of stride 2."""

    def __init__(self, **options):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 8, 2, 2), DynamicGroupAttention(8, 2, groups=4, keys=6, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.stem(x).movedim(1, -1)).mean((1, 2))


@pytest.mark.parametrize("options", [{}, {"cosine": True}, {"as_printed": (12,)}, {"as_printed": (13, 17)}])
def test_record(options):
    """DGT-2 as a matrix: exact, as sparse as the selection, and what the layer has put out."""
    torch.manual_seed(1)
    trace = tracing.trace(Model(**options).double(), torch.randn(3, 8, 10))
    record = trace["attn"]
    assert trace.layers == ["attn"] and (record.kind, record.query_shape, record.heads) == ("dynamic_group", (4, 5), 2)
    assert record.groups.shape == (2, 20) and record.selected.shape == (2, 4, 6) and record.exact
    allowed = membership(record.groups[None], record.selected[None], 20)[0]
    for m in range(2):
        A = record.effective_matrix(m)
        assert A.shape == (20, 20) and torch.equal(A != 0, allowed[m])
        torch.testing.assert_close(A @ record.value(m), record.output(m))
        assert record.rest(m) < 1e-6
        torch.testing.assert_close(record.weights(m), A.gather(1, record.selected[m][record.groups[m]]))
        total = {(): 1.0, (12,): 0.5}.get(options.get("as_printed", ()))
        assert total is None or torch.allclose(record.weights(m).sum(-1), torch.tensor(total).double())


def test_keys_of_the_record():
    """DGT-1: what a pixel reads are the cells that its group has selected, wherever they lie, with their weights."""
    trace = tracing.trace(Model(), torch.randn(3, 8, 10))
    record = trace["attn"]
    for (row, col), head in product([(0, 0), (7, 9), (3, 4)], range(2)):
        query = row // 2 * 5 + col // 2
        cells = record.selected[head, record.groups[head, query]]
        keys = record.keys(row, col, head)
        expected = torch.stack([cells % 5, cells // 5], dim=-1) * 2 + 0.5  # (x, y)
        torch.testing.assert_close(keys.xy, expected.float())
        torch.testing.assert_close(keys.weight, record.effective_matrix(head)[query, cells])
        assert keys.weight.sum().item() == pytest.approx(1)
    assert trace.rollout(3, 3).sum().item() == pytest.approx(1, rel=1e-5)
    for call in (record.keys, lambda *_: record.effective_matrix(2)):
        with pytest.raises(ValueError, match="head: expected 0 to 1, got 2"):
            call(0, 0, 2)


# ---------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("L, C, expected", [(3136, 64, 0.0466), (784, 128, 0.1865), (196, 256, 0.7467)])
def test_complexity_of_the_paper(L, C, expected):
    """DGT-5, DGT-6, DGT-7: the paper's ratios .05, .19 and .75 for DGT-T at 224, with all channels in C."""
    dense, grouped, ratio = multiply_adds(L, C, 48, 98)
    assert ratio == grouped / dense
    assert dense == 2 * L * L * C
    assert round(grouped / dense, 4) == expected
    assert round(grouped / dense, 2) == {0.0466: 0.05, 0.1865: 0.19, 0.7467: 0.75}[expected]


def test_complexity_as_torch_counts():
    """DGT-6 but for its comparisons: two products of attention, one of the grouping, one of the selection."""
    B, h, L, d, G, n = 1, 2, 40, 8, 5, 7
    q, e = normal(B, h, L, d), normal(h, G, d)
    with FlopCounterMode(display=False) as counter:
        likes = q @ e.mT, q @ e.mT  # of queries, of keys; the torch form sums the products by itself
        groups, selected = likes[0].argmax(-1), likes[1].mT.topk(n).indices
        ops.grouped_attention(q, q, q, groups, selected, impl="numba")
    assert counter.get_total_flops() / 2 == multiply_adds(L, h * d, G, n)[1] - n * G * math.log2(L)
    with FlopCounterMode(display=False) as counter:
        ops.dense_attention(q, q, q)
    assert counter.get_total_flops() / 2 == multiply_adds(L, h * d, G, n)[0]


def test_flops_of_the_backward():
    """Logits are computed again, as flash attention does it: five products for the forward's two."""
    *tensors, groups, selected = inputs(1, 2, 30, 20, 4, 3, 6)
    leaves = [t.requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as counter:
        ops.grouped_attention(*leaves, groups, selected, impl="numba").sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 30 * 6 * 4 * 7 // 2


# ----------------------------------------------------------------------------------------------------------- bad input

Z = torch.zeros


def attend(**changes) -> None:
    """The operation on good arguments, some of them changed."""
    good = dict(q=Z(1, 2, 6, 3), k=Z(1, 2, 5, 3), v=Z(1, 2, 5, 3), groups=torch.arange(6).expand(1, 2, 6) % 4)
    good |= dict(selected=torch.tensor([0, 4, 2]).expand(1, 2, 4, 3))
    ops.grouped_attention(**good | changes)


def build(**changes) -> None:
    """A layer from good arguments, some of them changed."""
    DynamicGroupAttention(**dict(dim=8, heads=2, groups=5, keys=6) | changes)


def with_one(tensor: Tensor, value: int) -> Tensor:
    """A copy whose last number is another."""
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


GROUPS, SELECTED = Z(1, 2, 6).long(), torch.tensor([0, 4, 2]).repeat(1, 2, 4, 1)
BAD = [
    (lambda: attend(q=Z(2, 6, 3)), ValueError, r"q: expected 4 dimensions \(B h L d\)"),
    (lambda: attend(q=Z(1, 2, 6, 3).int()), TypeError, r"q: expected a floating tensor, got torch.int32"),
    (lambda: attend(k=Z(1, 2, 5, 4)), ValueError, r"k: .* d = 3"),
    (lambda: attend(v=Z(1, 2, 4, 3)), ValueError, r"v: .* S = 5"),
    (lambda: attend(v=Z(1, 2, 5, 3).double()), TypeError, r"v: expected torch.float32 on cpu as q has"),
    (lambda: attend(k=Z(1, 2, 0, 3), v=Z(1, 2, 0, 3)), ValueError, r"k: no dimension may be empty"),
    (lambda: attend(groups=Z(1, 2, 6)), TypeError, r"groups: expected a tensor of torch.int64, got torch.float32"),
    (lambda: attend(groups=GROUPS.int()), TypeError, r"groups: expected a tensor of torch.int64, got torch.int32"),
    (lambda: attend(groups=[0] * 6), TypeError, r"groups: expected a tensor of torch.int64, got list"),
    (lambda: attend(groups=GROUPS[..., :5]), ValueError, r"groups: expected shape \(1, 2, 6\), got \(1, 2, 5\)"),
    (lambda: attend(groups=with_one(GROUPS, 4)), ValueError, r"groups: expected values from 0 to 3, got 4"),
    (lambda: attend(groups=with_one(GROUPS, -1)), ValueError, r"groups: expected values from 0 to 3, got -1"),
    (
        lambda: attend(selected=SELECTED.float()),
        TypeError,
        r"selected: expected a tensor of torch.int64, got torch.float32",
    ),
    (lambda: attend(groups=GROUPS.to("meta")), TypeError, r"groups: expected a tensor on cpu as q is, got one on meta"),
    (lambda: attend(selected=SELECTED.tolist()), TypeError, r"selected: expected a tensor of torch.int64, got list"),
    (lambda: attend(selected=SELECTED[0]), ValueError, r"selected: expected shape \(B h G n\), got \(2, 4, 3\)"),
    (lambda: attend(selected=SELECTED[..., :0]), ValueError, r"selected: expected shape \(B h G n\)"),
    (
        lambda: attend(selected=SELECTED[:, :1]),
        ValueError,
        r"selected: expected shape \(1, 2, 4, 3\), got \(1, 1, 4, 3\)",
    ),
    (lambda: attend(selected=with_one(SELECTED, 5)), ValueError, r"selected: expected values from 0 to 4, got 5"),
    (lambda: attend(selected=with_one(SELECTED, -1)), ValueError, r"selected: expected values from 0 to 4, got -1"),
    (lambda: attend(selected=with_one(SELECTED, 0)), ValueError, r"selected: expected distinct keys in every group"),
    (lambda: attend(scale=float("inf")), ValueError, r"scale: expected a finite float or None, got inf"),
    (lambda: attend(impl="fast"), ValueError, r"impl: expected one of .*, got 'fast'"),
    (lambda: build(heads=3), ValueError, r"heads: expected a divisor of 8, got 3"),
    (lambda: build(groups=0), ValueError, r"groups: expected at least 1, got 0"),
    (lambda: build(keys=0), ValueError, r"keys: expected at least 1, got 0"),
    (lambda: build(keys=2.0), TypeError, r"keys: expected a whole number, got 2.0"),
    (lambda: build(as_printed=(4, 14)), ValueError, r"as_printed: expected some of 4, 12, 13, 17, got \(4, 14\)"),
    (lambda: layer()(normal(1, 8, 6, 5)), ValueError, r"x: expected shape \(B H W 8\), got shape \(1, 8, 6, 5\)"),
    (lambda: layer()(normal(6, 5, 8)), ValueError, r"x: expected 4 dimensions"),
    (lambda: layer()(Z(1, 6, 5, 8).long()), TypeError, r"x: expected a floating tensor, got torch.int64"),
    (lambda: layer().update_centroids(-1.0), ValueError, r"lr: expected a finite number of at least 0, got -1.0"),
    (lambda: layer().update_centroids(math.nan), ValueError, r"lr: expected a finite number of at least 0, got nan"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("wrong", [{3: 4}, {3: -1}, {4: 5}, {4: -1}, {5: 4}, {5: 0}])
def test_the_kernel_reads_no_memory_of_others(wrong):
    """The operator itself looks at groups, keys and lengths: under torch.compile nobody else does."""
    arguments = [Z(1, 2, 6, 3), Z(1, 2, 5, 3), Z(1, 2, 5, 3), GROUPS, SELECTED, torch.full((1, 2, 4), 3), 1.0]
    operator.OPERATORS["numba"](*arguments)
    for place, value in wrong.items():
        arguments[place] = with_one(arguments[place], value)
        with pytest.raises(ValueError, match=f"expected values from . to ., got {value}"):
            operator.OPERATORS["numba"](*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("impl", FAST)
def test_a_compiled_graph_looks_at_the_values(impl, unchecked):
    """A graph cannot raise what depends on numbers before it runs; the torch form would read another head's keys."""
    torch.compiler.reset()
    attend = torch.compile(lambda *arguments: ops.grouped_attention(*arguments, impl=impl), backend="aot_eager")
    q, k, v = normal(1, 2, 6, 3), normal(1, 2, 5, 3), normal(1, 2, 5, 3)
    torch.testing.assert_close(attend(q, k, v, GROUPS, SELECTED), ops.grouped_attention(q, k, v, GROUPS, SELECTED))
    for groups, selected, message in (
        (with_one(GROUPS, 4), SELECTED, "groups: expected values from 0 to 3"),
        (GROUPS, with_one(SELECTED, 5), "selected: expected values from 0 to 4"),
        (GROUPS, with_one(SELECTED, -1), "selected: expected values from 0 to 4"),
        (GROUPS, SELECTED * 0, "selected: expected distinct keys in every group, got one twice"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            attend(q, k, v, groups, selected)


def test_derivatives_by_torch_func(unchecked):
    """Of the torch form, which has all of them."""
    q, k, v = normal(1, 2, 6, 3), normal(1, 2, 5, 3), normal(1, 2, 5, 3)
    loss = lambda q: ops.grouped_attention(q, k, v, GROUPS, SELECTED, impl="torch").square().sum()  # noqa: E731
    slopes = torch.func.grad(loss)(q)
    direction = normal(1, 2, 6, 3)
    _, slope = torch.func.jvp(loss, (q,), (direction,))
    curvature = torch.func.hessian(loss)(q).reshape(q.numel(), q.numel())
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(slopes, torch.autograd.grad(loss(leaf), leaf)[0])
    torch.testing.assert_close(slope, (slopes * direction).sum())
    torch.testing.assert_close(curvature, curvature.T)


@pytest.mark.parametrize("keys", [0, -1, 1.5, None])
def test_keys_that_are_changed_to_nonsense(keys, unchecked):
    layer = DynamicGroupAttention(8, 2, 3, 4)
    layer.keys = keys
    with pytest.raises((ValueError, TypeError), match="keys: expected"):
        layer(torch.randn(1, 3, 3, 8))


def test_inference_mode_collects_nothing():
    """What it made could not be added to outside of it."""
    layer, x = DynamicGroupAttention(8, 2, 3, 4).train(), torch.randn(1, 3, 3, 8)
    with torch.inference_mode():
        layer(x)
    assert layer.sums is None
    layer(x).sum().backward()
    layer.update_centroids()
