"""BiFormer's routed attention: the operation against its loops, through every kernel, and at its limits."""

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import normal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynattn import core, ops, verify
from dynattn.kernels import operators
from dynattn.mechanisms.bilevel import membership, readable_first

ROOT = Path(__file__).parents[1]
HAS_TRITON = operators.INSTALLED["triton"] and find_spec("dynattn.kernels.grouped_triton") is not None
KERNELS = ["numba", "triton"] if HAS_TRITON else ["numba"]
FAST = ["torch", *KERNELS]

# B, h, R, S, Tq, Tk, d, n
SIZES = {
    "several of each": (2, 2, 3, 4, 3, 2, 3, 2),
    "one of everything": (1, 1, 1, 1, 1, 1, 1, 1),
    "one query for each region": (1, 2, 5, 5, 1, 4, 2, 3),
    "one key in each region": (2, 1, 2, 7, 3, 1, 2, 5),
    "fewer regions of keys": (1, 3, 7, 2, 2, 5, 1, 1),
    "all regions": (1, 1, 2, 3, 5, 3, 2, 3),
    "more than a register of channels": (1, 1, 2, 3, 2, 2, 19, 2),
}
LARGE = {  # beyond a tile of queries and a block of keys: too large for the loops
    "tiles and blocks": (1, 2, 2, 5, 101, 31, 32, 4),
    "many small regions": (1, 2, 16, 20, 4, 4, 16, 9),
    "many channels": (1, 1, 3, 2, 40, 77, 70, 1),
}


def inputs(B, h, R, S, Tq, Tk, d, n) -> list[Tensor]:
    """q, k, v, and n distinct regions in any order for each region of queries."""
    routes = torch.rand(B, R, S).argsort(dim=-1)[..., :n].contiguous()
    return [normal(B, h, R, Tq, d), normal(B, h, S, Tk, d), normal(B, h, S, Tk, d), routes]


def mask_for(routes: Tensor, S: int, Tk: int) -> Tensor:
    """About half of the keys, some regions not at all; of the regions that stand first in the routes at least one."""
    first = torch.zeros(len(routes), S, dtype=torch.bool).scatter(1, routes[..., 0], True)
    mask = (torch.rand(len(routes), S, Tk) < 0.6) & (first | (torch.rand(len(routes), S) < 0.7))[..., None]
    mask[:, :, -1] |= first
    return mask


def run(impl: str, **options):
    """The operation of CPU tensors, by a form that may run on a GPU."""
    there = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    move = lambda x, to: x.to(to) if isinstance(x, Tensor) else x  # noqa: E731

    def attend(*arguments, **more):
        named = {name: move(x, there) for name, x in (options | more).items()}
        return move(ops.routed_attention(*(move(x, there) for x in arguments), **named, impl=impl), "cpu")

    return attend


def masked(q, k, v, routes, key_mask=None, scale=None) -> Tensor:
    """The dense attention that computes the same."""
    read = membership(routes, key_mask, *k.shape[2:4]).flatten(2).repeat_interleave(q.shape[3], 1)[:, None]
    tokens = (x.flatten(2, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(*tokens, read, scale=scale).view_as(q)


def compare_forms(one, other, arguments: list, tolerance: float = 1e-10) -> None:
    """Outputs and every gradient, relative to the largest entry."""
    named = {str(n): a for n, a in enumerate(arguments)}
    got, want = verify.answer(one, named, {}), verify.answer(other, named, {})
    for key in want:
        largest = float(want[key].abs().max()) or 1.0
        assert float((got[key] - want[key]).abs().max()) <= tolerance * largest, key


# --------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("name", LARGE)
def test_equals_masked_attention_beyond_a_block(name, impl, has_mask):
    """DEBI-2 at sizes that the loops would take minutes for."""
    *tensors, routes = inputs(*LARGE[name])
    key_mask = mask_for(routes, *tensors[1].shape[2:4]) if has_mask else None
    compare_forms(
        lambda q, k, v: run(impl)(q, k, v, routes, key_mask=key_mask),
        lambda q, k, v: masked(q, k, v, routes, key_mask),
        tensors,
    )


@pytest.mark.parametrize("impl", FAST)
def test_large_logits(impl):
    """DEBI-2 does not overflow, in any block."""
    q, k, v, routes = inputs(*LARGE["tiles and blocks"])
    key_mask = mask_for(routes, 5, 31)
    found = run(impl)(1e3 * q, 1e3 * k, v, routes, key_mask=key_mask)
    torch.testing.assert_close(found, masked(1e3 * q, 1e3 * k, v, routes, key_mask))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by Triton's interpreter
@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_what_is_no_number_stays_with_those_who_read_it(impl):
    """DEBI-11: a NaN must not vanish, nor reach a query whose region is not routed to it."""
    for spoilt in (1, 2) if impl == "torch" else (0, 1, 2):  # torch's own attention answers 0 to a query that is NaN
        q, k, v, routes = inputs(1, 1, 4, 5, 3, 2, 2, 2)
        (q, k, v)[spoilt][0, 0, 3, 1, 1] = torch.nan
        reads = (routes[0] == 3).any(dim=-1)[:, None].expand(-1, 3)
        if spoilt == 0:
            reads = torch.zeros(4, 3, dtype=torch.bool)
            reads[3, 1] = True
        found = run(impl)(q, k, v, routes)[0, 0].isnan()
        expected = reads[..., None] & torch.tensor([spoilt < 2, True])
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by Triton's interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_what_may_not_be_read_has_no_influence(impl, value):
    """DEBI-2 over the keys of the mask: whatever numbers stand at the others, as in padding that nobody has filled."""
    q, k, v, routes = inputs(*SIZES["several of each"])
    key_mask = mask_for(routes, 4, 2)
    hidden = ~key_mask[:, None, :, :, None]
    given = [x.requires_grad_() for x in (q, k, v)]
    spoilt = [q.detach().clone().requires_grad_(), *(x.detach().masked_fill(hidden, value) for x in (k, v))]
    spoilt[1:] = (x.requires_grad_() for x in spoilt[1:])
    one, other = (run(impl)(*tensors, routes, key_mask=key_mask) for tensors in (given, spoilt))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    slopes = zip(*(torch.autograd.grad(z.square().sum(), t) for z, t in ((one, given), (other, spoilt))), strict=True)
    for number, (a, b) in enumerate(slopes):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert number == 0 or (b.masked_select(hidden) == 0).all()


@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_regions_that_no_route_leads_to_learn_nothing(impl):
    """DEBI-11: exactly zero; a region that several read collects from all of them."""
    q, k, v, _ = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(1, 1, 3, 5, 2, 2, 2, 2))
    routes = torch.tensor([[[4, 1], [1, 3], [3, 1]]])
    slopes = torch.autograd.grad(run(impl)(q, k, v, routes).square().sum(), (k, v))
    for slope in slopes:
        assert torch.equal(slope[0, 0].flatten(1).any(dim=-1).nonzero().flatten(), torch.tensor([1, 3, 4]))
    apart = [run(impl)(q[:, :, r, None], k, v, routes[:, r, None]).square().sum() for r in range(3)]
    for n, slope in enumerate(slopes):
        torch.testing.assert_close(slope, sum(torch.autograd.grad(z, (k, v), retain_graph=True)[n] for z in apart))


def test_membership():
    """DEBI-11 as a mask: the keys of the routes that may be read."""
    routes = torch.tensor([[[2, 0], [0, 1]]])
    expected = [[[1, 1], [0, 0], [1, 1]], [[1, 1], [1, 1], [0, 0]]]
    assert membership(routes, None, 3, 2)[0].int().tolist() == expected
    key_mask = torch.tensor([[[True, False], [False, False], [True, True]]])
    expected = [[[1, 0], [0, 0], [1, 1]], [[1, 0], [0, 0], [0, 0]]]
    assert membership(routes, key_mask, 3, 2)[0].int().tolist() == expected


def test_keys_that_may_be_read_come_first():
    """DEBI-11 as the kernels want it: in the order of the routes, and of each region's tokens."""
    routes = torch.tensor([[[2, 0], [0, 1]]])
    keys, lengths = readable_first(routes, None, 2)
    assert keys.tolist() == [[[4, 5, 0, 1], [0, 1, 2, 3]]] and lengths.tolist() == [[4, 4]]
    key_mask = torch.tensor([[[False, True], [True, False], [True, False]]])
    keys, lengths = readable_first(routes, key_mask, 2)
    assert keys.tolist() == [[[4, 1, 5, 0], [1, 2, 0, 3]]] and lengths.tolist() == [[2, 2]]


# --------------------------------------------------------------------------------------------------- as torch operators


@pytest.mark.parametrize("impl", ["torch", "numba"])
@pytest.mark.parametrize("has_mask", [False, True])
def test_second_derivatives(impl, has_mask):
    """The kernel has those of the torch form."""
    *tensors, routes = inputs(1, 1, 2, 3, 2, 2, 2, 2)
    attend = run(impl, key_mask=mask_for(routes, 3, 2) if has_mask else None)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, routes), leaves, fast_mode=True)


@pytest.mark.slow
def test_compile_with_dynamic_shapes():
    """fullgraph, forward and backward, at sizes that the first call did not have; what is wrong is refused as well."""
    program = """
        import torch
        from dynattn import ops
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        function = lambda q, k, v, routes, mask: ops.routed_attention(q, k, v, routes, key_mask=mask, impl="numba")
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for size in (3, 8):
            S, Tk = size + 1, size - 1
            shapes = (2, 2, size, 2 * size, 32), (2, 2, S, Tk, 32), (2, 2, S, Tk, 32)
            tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
            routes = torch.rand(2, size, S).argsort()[..., : size - 1]
            some = torch.rand(2, S, Tk) < 0.5
            some[:, :, 0] = True
            for mask in (None, some):
                one, other = compiled(*tensors, routes, mask), function(*tensors, routes, mask)
                torch.testing.assert_close(one, other)
                for a, b in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (one, other)), strict=True):
                    torch.testing.assert_close(a, b)
        outside, unread = "routes: expected values from 0 to", "key_mask: expected a key to read"
        cases = (routes + S, None, outside), (routes - S, None, outside), (routes, some & False, unread)
        for wrong, mask, told in cases:
            try:
                compiled(*tensors, wrong, mask)
            except (RuntimeError, ValueError) as error:
                assert told in str(error), error
            else:
                raise AssertionError("memory of others was read")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=600)


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_flops(impl):
    """Two products with the keys of the routes; the kernel's backward computes the logits again."""
    *tensors, routes = inputs(1, 2, 3, 5, 4, 6, 2, 2)
    for backward in (False, True):
        leaves = [x.clone().requires_grad_(backward) for x in tensors]
        with FlopCounterMode(display=False) as counter:
            out = ops.routed_attention(*leaves, routes, impl=impl)
            if backward:
                out.sum().backward()
        forward = 4 * 2 * (3 * 4) * (2 * 6) * 2
        assert counter.get_total_flops() == (forward * 7 // 2 if backward else forward)


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_the_answer_does_not_depend_on_threads(impl):
    """Bit for bit, and from run to run: regions that many read collect their gradients in one order."""
    *tensors, routes = inputs(2, 3, 49, 49, 4, 4, 16, 16)
    leaves, key_mask = [x.float().requires_grad_() for x in tensors], mask_for(routes, 49, 4)

    def answer(threads):
        torch.set_num_threads(threads)
        out = ops.routed_attention(*leaves, routes, key_mask=key_mask, impl=impl)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = answer(1)
    for threads in (1, 2, 3) if impl == "numba" else (1, 1):
        assert all(torch.equal(a, b) for a, b in zip(first, answer(threads), strict=True))
    torch.set_num_threads(1)


def test_auto_is_the_kernel(monkeypatch):
    """As for grouped attention; never without the backend."""
    used = []
    for name in ("torch", "numba"):
        monkeypatch.setitem(ops.routed_attention.forms, name, lambda q, *_, name=name: used.append(name) or q)
    arguments = inputs(*SIZES["several of each"])
    ops.routed_attention(*arguments)
    monkeypatch.setitem(operators.INSTALLED, "numba", False)
    ops.routed_attention(*arguments)
    assert used == ["numba", "torch"]
    assert ops.routed_attention.forms.keys() == {"loops", "torch", "numba", "triton"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # beartype does, to look into lists
def test_a_students_file_is_checked(tmp_path):
    """Routes and mask reach the process that answers; without the option, no case has a mask."""
    from dynattn.verify import student

    text = """
        import torch
        def routed_attention(q, k, v, routes, *, OPTIONS):
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            out = []
            for b in range(q.shape[0]):
                keys, values = (x[b][:, routes[b]].flatten(2, 3) for x in (k, v))
                P = q[b] @ keys.mT * scale
                MASK
                out.append(P.softmax(-1) @ values)
            return torch.stack(out)
    """
    use = "P = P if key_mask is None else P.masked_fill(~key_mask[b, WHICH].flatten(1)[:, None], -torch.inf)"
    told = []
    for options, mask in [
        ("scale=None", "pass"),
        ("key_mask=None, scale=None", use.replace("WHICH", "routes[b]")),
        ("key_mask=None, scale=None", use.replace("WHICH", "routes[b, :1].expand_as(routes[b])")),
    ]:
        path = tmp_path / "answers.py"
        path.write_text(textwrap.dedent(text).replace("OPTIONS", options).replace("MASK", mask))
        if os.name == "posix":
            told += list(student.examine(path, "routed_attention", cases=8))
    assert [verdict.passed for verdict in told] == [True, True, False][: len(told)], list(map(str, told))


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_all_regions_are_dense_attention(impl):
    """DEBI-11 with n = S, in any order: every query reads every key, or every key of the mask."""
    q, k, v, routes = inputs(2, 2, 3, 4, 3, 2, 3, 4)
    tokens = [x.flatten(2, 3) for x in (q, k, v)]
    found = run(impl)(q, k, v, routes).flatten(2, 3)
    torch.testing.assert_close(found, ops.dense_attention(*tokens), rtol=1e-10, atol=1e-12)
    key_mask = mask_for(routes, 4, 2)
    found = run(impl)(q, k, v, routes, key_mask=key_mask)
    for b in range(2):
        read = key_mask[b].flatten()
        expected = ops.dense_attention(tokens[0][b : b + 1], *(x[b : b + 1, :, read] for x in tokens[1:]))
        torch.testing.assert_close(found[b].flatten(1, 2), expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["loops", *FAST])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 3), (2, 11)])
def test_a_region_that_reads_itself_is_a_window(shape, impl):
    """DEBI-11 with n = 1 and I = r; tokens that pad a region are masked keys."""
    window, (H, W) = (2, 3), shape
    padding = core.padding_to(shape, window)
    padded = H + padding[0], W + padding[1]
    maps = [normal(2, H, W, 2 * 3) for _ in range(3)]

    def regions(x: Tensor, heads: int) -> Tensor:
        cut = core.partition_windows(core.pad_map(x, padding), window)
        return rearrange(cut, "(B R) T (h d) -> B h R T d", B=len(x), h=heads)

    q, k, v = (regions(x, 2) for x in maps)
    inside = regions(torch.ones(2, H, W, 1), 1)[:, 0, ..., 0] > 0
    routes = torch.arange(q.shape[2])[:, None].expand(2, -1, 1)
    z = run(impl)(q, k, v, routes, key_mask=inside)
    z = core.merge_windows(rearrange(z, "B h R T d -> (B R) T (h d)"), window, padded)[:, :H, :W]
    expected = ops.window_attention(*(core.split_heads(x, 2) for x in maps), None, shape, window=window)
    torch.testing.assert_close(core.split_heads(z, 2), expected, rtol=1e-10, atol=1e-12)


def test_regions_are_groups():
    """DEBI-11: grouped attention of the same queries, to the tokens of the routes."""
    q, k, v, routes = inputs(*SIZES["several of each"])
    groups = (torch.arange(9) // 3).expand(2, 2, -1)
    selected = torch.stack([2 * routes, 2 * routes + 1], dim=-1).flatten(2)[:, None].expand(-1, 2, -1, -1)
    grouped = ops.grouped_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), groups, selected)
    torch.testing.assert_close(run("loops")(q, k, v, routes), grouped.view_as(q))


@pytest.mark.parametrize("impl", ["loops", *FAST])
def test_one_key_is_its_value(impl):
    """DEBI-2: with one key to read the softmax is 1, be it the only one or the only one of the mask."""
    q, k, v, routes = inputs(2, 2, 3, 4, 3, 1, 2, 1)
    expected = torch.stack([v[b][:, routes[b, :, 0]] for b in range(2)]).expand_as(q)
    torch.testing.assert_close(run(impl)(q, k, v, routes), expected)
    q, k, v, routes = inputs(1, 2, 3, 4, 3, 5, 2, 4)
    key_mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    key_mask[0, 2, 3] = True
    torch.testing.assert_close(run(impl)(q, k, v, routes, key_mask=key_mask), v[:, :, 2, None, 3, None].expand_as(q))


@pytest.mark.parametrize("impl", FAST)
def test_numbers_of_regions_and_order_of_routes_mean_nothing(impl):
    """DEBI-2: regions of keys under other numbers, routes in another order, regions of queries and heads in another."""
    q, k, v, routes = inputs(*SIZES["several of each"])
    key_mask = mask_for(routes, 4, 2)
    attend = run(impl)
    expected, other = attend(q, k, v, routes, key_mask=key_mask), torch.randperm(4)
    same = attend(q, k[:, :, other], v[:, :, other], other.argsort()[routes], key_mask=key_mask[:, other])
    torch.testing.assert_close(same, expected)
    torch.testing.assert_close(attend(q, k, v, routes.flip(-1), key_mask=key_mask), expected)
    torch.testing.assert_close(attend(q.flip(2), k, v, routes.flip(1), key_mask=key_mask), expected.flip(2))
    torch.testing.assert_close(attend(q.flip(1), k.flip(1), v.flip(1), routes, key_mask=key_mask), expected.flip(1))
    no_mask = attend(q, k, v, routes, key_mask=torch.ones_like(key_mask))
    torch.testing.assert_close(no_mask, attend(q, k, v, routes))


# ----------------------------------------------------------------------------------------------------------- bad input

Z = torch.zeros
ROUTES = torch.tensor([[[0, 3], [2, 1], [3, 2]]]).repeat(2, 1, 1)
MASK = torch.ones(2, 4, 5, dtype=torch.bool)


def attend(**changes) -> None:
    """The operation on good arguments, some of them changed."""
    good = dict(q=Z(2, 1, 3, 6, 2), k=Z(2, 1, 4, 5, 2), v=Z(2, 1, 4, 5, 2), routes=ROUTES, key_mask=MASK)
    ops.routed_attention(**good | changes)


def with_one(tensor: Tensor, value: int) -> Tensor:
    """A copy whose last number is another."""
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def hidden(*regions: int) -> Tensor:
    """A mask that forbids these regions of the second image."""
    mask = MASK.clone()
    mask[1, list(regions)] = False
    return mask


BAD = [
    ({"q": Z(2, 3, 6, 2)}, ValueError, r"q: expected 5 dimensions \(B h R Tq d\), got shape \(2, 3, 6, 2\)"),
    ({"q": Z(2, 1, 3, 6, 2).int()}, TypeError, r"q: expected a floating tensor, got torch.int32"),
    ({"q": [0.0]}, TypeError, r"q: expected a tensor of shape \(B h R Tq d\), got list"),
    ({"q": Z(2, 1, 3, 0, 2)}, ValueError, r"q: no dimension may be empty"),
    ({"k": Z(2, 1, 4, 5, 3)}, ValueError, r"k: expected shape \(B h S Tk d\) with d = 2, got shape \(2, 1, 4, 5, 3\)"),
    ({"k": Z(2, 2, 4, 5, 2)}, ValueError, r"k: .* with h = 1"),
    ({"v": Z(2, 1, 4, 6, 2)}, ValueError, r"v: .* with Tk = 5"),
    ({"v": Z(2, 1, 3, 5, 2)}, ValueError, r"v: .* with S = 4"),
    ({"v": Z(2, 1, 4, 5, 2).double()}, TypeError, r"v: expected torch.float32 on cpu as q has, got torch.float64"),
    ({"routes": ROUTES.int()}, TypeError, r"routes: expected a tensor of torch.int64, got torch.int32"),
    ({"routes": [[0]]}, TypeError, r"routes: expected a tensor of torch.int64, got list"),
    ({"routes": ROUTES[:1]}, ValueError, r"routes: expected shape \(2, 3, n\), n at least 1, got \(1, 3, 2\)"),
    ({"routes": ROUTES[:, :2]}, ValueError, r"routes: expected shape \(2, 3, n\), .* got \(2, 2, 2\)"),
    ({"routes": ROUTES[..., :0]}, ValueError, r"routes: expected shape \(2, 3, n\), .* got \(2, 3, 0\)"),
    ({"routes": ROUTES[0]}, ValueError, r"routes: expected shape \(2, 3, n\), .* got \(3, 2\)"),
    ({"routes": ROUTES.to("meta")}, TypeError, r"routes: expected a tensor on cpu as q is, got one on meta"),
    ({"routes": with_one(ROUTES, 4)}, ValueError, r"routes: expected values from 0 to 3, got 4"),
    ({"routes": with_one(ROUTES, -1)}, ValueError, r"routes: expected values from 0 to 3, got -1"),
    ({"routes": with_one(ROUTES, 3)}, ValueError, r"routes: expected distinct regions for every region of queries"),
    ({"key_mask": MASK.float()}, TypeError, r"key_mask: expected a tensor of torch.bool, got torch.float32"),
    ({"key_mask": True}, TypeError, r"key_mask: expected a tensor of torch.bool, got bool"),
    ({"key_mask": MASK[:, :3]}, ValueError, r"key_mask: expected shape \(2, 4, 5\), got \(2, 3, 5\)"),
    ({"key_mask": MASK[:, None]}, ValueError, r"key_mask: expected shape \(2, 4, 5\), got \(2, 1, 4, 5\)"),
    ({"key_mask": MASK.to("meta")}, TypeError, r"key_mask: expected a tensor on cpu as q is, got one on meta"),
    (
        {"key_mask": hidden(1, 2)},
        ValueError,
        r"key_mask: expected a key .*, got none for region 1 of image 1, which is routed to \[2, 1\]",
    ),
    ({"key_mask": ~MASK}, ValueError, r"key_mask: .* got none for region 0 of image 0, which is routed to \[0, 3\]"),
    ({"scale": float("nan")}, ValueError, r"scale: expected a finite float or None, got nan"),
    ({"impl": "fast"}, ValueError, r"impl: expected one of .*, got 'fast'"),
]


@pytest.mark.parametrize("impl", ["loops", "torch", "auto"])
@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(unchecked, changes, error, message, impl, monkeypatch):
    """Before any work is done."""
    for name in ops.routed_attention.forms:
        monkeypatch.setitem(ops.routed_attention.forms, name, lambda *_: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        attend(**{"impl": impl} | changes)


def test_hidden_regions_are_no_error_where_another_is_read(unchecked):
    """A region may be hidden as a whole, and one that no route leads to."""
    for regions in ((0, 1), (0, 2), (1, 3)):
        attend(key_mask=hidden(*regions))
    mask = hidden(1, 2, 3)
    attend(routes=ROUTES[:, :, :1] * 0, key_mask=mask)


def test_the_kernel_reads_no_memory_of_others():
    """What the operator itself looks at, under torch.compile, covers routes and masks that are wrong."""
    q, k, v, routes = inputs(*SIZES["several of each"])
    for wrong, mask, told in (
        (with_one(routes, 4), None, "selected: expected values from 0 to 7, got 9"),
        (with_one(routes, -1), None, "selected: expected values from 0 to 7, got -2"),
        (routes, Z(2, 4, 2) > 0, "lengths: expected values from 1 to 4, got 0"),
    ):
        with pytest.raises(ValueError, match=told):
            ops.routed_attention.forms["numba"](q, k, v, wrong, mask, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_a_compiled_graph_looks_at_the_values(impl, unchecked):
    torch.compiler.reset()
    function = lambda q, k, v, routes, mask: ops.routed_attention(q, k, v, routes, key_mask=mask, impl=impl)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager")
    q, k, v, routes = inputs(*SIZES["several of each"])
    every = torch.ones(k.shape[0], k.shape[2], k.shape[3], dtype=torch.bool)
    torch.testing.assert_close(compiled(q, k, v, routes, every), function(q, k, v, routes, every))
    for wrong, mask, message in (
        (with_one(routes, 4), every, "routes: expected values from 0 to 3"),
        (routes * 0, every, "routes: expected distinct regions"),
        (routes, ~every, "key_mask: expected a key to read"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            compiled(q, k, v, wrong, mask)


@pytest.mark.parametrize("d", [16, 20, 32])
@pytest.mark.parametrize("Tq", [1, 4, 5])
def test_few_queries_of_a_region_meet_several_key_blocks(Tq, d):
    """Up to four have the keys in the lanes; the logits of the later blocks are larger, and some keys are masked."""
    q, k, v = normal(2, 2, 3, Tq, d), normal(2, 2, 5, 61, d), normal(2, 2, 5, 61, d)
    k = k * torch.arange(1, 6).reshape(5, 1, 1)
    routes = torch.arange(4).expand(2, 3, 4)
    mask = torch.rand(2, 5, 61) < 0.8
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found, expected = [], []
    for impl, answers in (("numba", found), ("torch", expected)):
        z = ops.routed_attention(*inputs, routes, key_mask=mask, impl=impl)
        answers += [z, *torch.autograd.grad(z.square().sum(), inputs)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
