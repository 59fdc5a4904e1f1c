"""DGT's grouped attention, groups and selection on CUDA devices: the Triton kernels against loops and torch forms.

They run on a GPU where there is one, else in Triton's interpreter; the header of the test run says which. Without a GPU
they are also compiled for one, by the calls that would launch them there.
"""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import compile_for_a_gpu, layouts, normal
from torch import Tensor

from dynattn import bench, ops, verify
from dynattn.bench import cuda
from dynattn.kernels import grouped as operator
from dynattn.kernels import operators
from dynattn.mechanisms.dynamic_group import (
    ASSIGN,
    SELECT,
    DynamicGroupAttention,
    assign_loops,
    membership,
    select_loops,
)

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.skipif(not operators.INSTALLED["triton"], reason="Triton is not installed"),
]
ignore_flex = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
in_the_interpreter = pytest.mark.skipif(not operators.INTERPRETED, reason="about the interpreter")


def there(function):
    """A function of CPU tensors that runs where the kernels do."""

    def move(value, to):
        return value.to(to) if isinstance(value, Tensor) else value

    def run(*arguments, **options):
        return move(function(*(move(a, DEVICE) for a in arguments), **options), "cpu")

    return run


def attention(q, k, v, groups, selected, **options) -> Tensor:
    """The operation by its kernel."""
    return there(partial(ops.grouped_attention, impl="triton"))(q, k, v, groups, selected, **options)


# B, h, L, S, d, G, n
LARGE = {  # beyond a tile, a block of keys, what is sorted together, a word of marks: too large for the loops
    "one key": (1, 1, 11, 7, 19, 3, 1),  # has no gradient of q and k
    "tiles and blocks": (1, 1, 230, 150, 32, 2, 130),
    "many small groups": (1, 1, 30, 20, 8, 34, 10),
    "many channels": (1, 1, 21, 40, 150, 2, 37),
}


def inputs(B, h, L, S, d, G, n) -> list[Tensor]:
    """Uneven groups, small numbers first; distinct keys in any order."""
    groups = (torch.rand(B, h, L) ** 3 * G).long()
    selected = torch.rand(B, h, G, S).argsort(dim=-1)[..., :n]
    return [normal(B, h, L, d), normal(B, h, S, d), normal(B, h, S, d), groups, selected]


def masked(q, k, v, groups, selected, scale=None) -> Tensor:
    """The dense attention that computes the same."""
    return F.scaled_dot_product_attention(q, k, v, membership(groups, selected, k.shape[2]), scale=scale)


def compare_forms(one, other, arguments: list, tolerance: float = 1e-10) -> None:
    """Outputs and every gradient, relative to the largest entry, but for what is zero up to rounding."""
    named = {str(n): a for n, a in enumerate(arguments)}
    got, want = verify.answer(one, named, {}), verify.answer(other, named, {})
    for key in want:
        largest = max(float(want[key].abs().max()), 1e-3)
        assert float((got[key] - want[key]).abs().max()) <= tolerance * largest, key


# --------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize("name", LARGE)
def test_equals_masked_attention_beyond_a_block(name):
    """DGT-2 at sizes that the loops would take minutes for."""
    compare_forms(attention, masked, inputs(*LARGE[name]))


def test_views_equal_the_loops():
    """DGT-2 on tensors and indices of any strides: heads between the channels, as a layer has them, or all the same."""
    arguments = inputs(1, 2, 5, 4, 3, 2, 3)
    for views in zip(*map(layouts, arguments), strict=True):
        verify.compare("grouped_attention", attention, *views)
    between = [t.movedim(1, 2).contiguous().movedim(1, 2) for t in arguments[:3]]
    verify.compare("grouped_attention", attention, *between, *arguments[3:])
    verify.compare("grouped_attention", attention, *(t[:, :1].expand(-1, 2, *t.shape[2:]) for t in arguments))


def test_large_logits():
    """DGT-12 does not overflow, in any block."""
    q, k, v, groups, selected = inputs(1, 1, 9, 150, 4, 2, 140)
    found = attention(1e3 * q, 1e3 * k, v, groups, selected)
    torch.testing.assert_close(found, masked(1e3 * q, 1e3 * k, v, groups, selected))


@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_what_is_no_number_stays_with_those_who_read_it(spoilt):
    """DGT-2: a NaN must not vanish, nor reach a query that does not read it, nor the gradient of a key beside."""
    *tensors, groups, selected = inputs(1, 1, 8, 6, 2, 3, 2)
    tensors[spoilt][0, 0, 3, 1] = torch.nan
    reads = torch.arange(8) == 3 if spoilt == 0 else membership(groups, selected, 6)[0, 0, :, 3]
    leaves = [t.requires_grad_() for t in tensors]
    out = attention(*leaves, groups, selected)
    expected = reads[:, None].expand(-1, 2) if spoilt < 2 else reads[:, None] & torch.tensor([False, True])
    assert torch.equal(out[0, 0].isnan(), expected)
    touched = membership(groups, selected, 6)[0, 0][reads].any(dim=0)
    for slope in torch.autograd.grad(out, leaves[1:], torch.ones_like(out)):
        assert torch.equal(slope[0, 0].isnan().any(dim=-1) & ~touched, torch.zeros(6, dtype=torch.bool))


def test_keys_that_nobody_selects_learn_nothing():
    """DGT-15, DGT-17: exactly zero, also where only a group without a query has selected them."""
    leaves = [t.requires_grad_() for t in inputs(1, 1, 4, 6, 2, 3, 2)[:3]]
    groups, selected = torch.tensor([[[0, 0, 2, 0]]]), torch.tensor([[[[4, 1], [3, 0], [1, 5]]]])
    out = attention(*leaves, groups, selected)
    for slope in torch.autograd.grad(out.square().sum(), leaves[1:]):
        assert torch.equal(slope[0, 0].any(dim=-1).nonzero().flatten(), torch.tensor([1, 4, 5]))


@pytest.mark.parametrize("size", [(2, 1, 7, 5, 3, 4, 3), (1, 1, 20, 140, 2, 2, 135)])
def test_a_group_reads_as_many_keys_as_its_length(size):
    """DGT-2 where groups have selected different numbers of keys; what stands behind is not read."""
    q, k, v, groups, selected = inputs(*size)
    B, h, L, S, _, _, n = size
    lengths = torch.randint(1, n + 1, selected.shape[:3])
    read = torch.zeros(B, h, L, S, dtype=torch.bool)
    for b, m, l in product(range(B), range(h), range(L)):
        j = groups[b, m, l]
        read[b, m, l, selected[b, m, j, : lengths[b, m, j]]] = True
    compare_forms(
        there(lambda *tensors: operator.OPERATORS["triton"](*tensors, 0.7)[0]),
        lambda *tensors: F.scaled_dot_product_attention(*tensors[:3], read, scale=0.7),
        [q, k, v, groups, selected, lengths],
    )


# ----------------------------------------------------------------------------------------------- groups and selection


def whole(*shape: int) -> Tensor:
    """Whole numbers from -2 to 2, whose products and sums are exact: many are equal."""
    return torch.randint(-2, 3, shape).double()


# B, h, L or S, d, G
ROUND = [(2, 2, 7, 2, 2), (1, 1, 1, 1, 1), (1, 1, 5, 3, 6), (1, 1, 18, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ROUND)
def test_groups_and_selection_equal_the_loops(size, dtype):
    """DGT-1: of equally near centroids the first; of equally liked keys the first, in the order of the map."""
    B, h, S, d, G = size
    x, e = whole(B, h, S, d).to(dtype), whole(h, G, d).to(dtype)
    assert torch.equal(there(ASSIGN["triton"])(x, e), assign_loops(x, e))
    for n in {1, S // 2 + 1, S}:
        assert torch.equal(there(SELECT["triton"])(x, e, n), select_loops(x, e, n))


@pytest.mark.parametrize("n", [1, 98, 200])
def test_selection_beyond_a_block(n):
    """DGT-1 as torch finds it, where no two numbers are equal and where many are; also views."""
    k, e = normal(1, 2, 200, 40), normal(2, 5, 40)
    likes = torch.einsum("bmic,mjc->bmji", k, e)
    for view in (k, *layouts(k)[:1]):
        assert torch.equal(there(SELECT["triton"])(view, e, n), likes.topk(n).indices.sort().values)
    assert torch.equal(there(ASSIGN["triton"])(k, e), likes.argmax(dim=2))
    k, e = whole(1, 1, 200, 3).float(), whole(1, 7, 3).float()
    assert torch.equal(there(SELECT["triton"])(k, e, n), SELECT["torch"](k, e, n))


@pytest.mark.parametrize("n", [5, 4100])
def test_selection_of_more_keys_than_registers_hold(n, monkeypatch):
    """DGT-1 in several reads of a row."""
    from dynattn.kernels import selection_triton

    monkeypatch.setattr(selection_triton, "LONGEST", 64)
    for k, e in ((normal(1, 1, 4200, 2), normal(1, 1, 2)), (whole(1, 1, 4200, 2), whole(1, 1, 2))):
        assert torch.equal(there(SELECT["triton"])(k, e, n), SELECT["torch"](k, e, n))


def test_many_centroids_for_a_query():
    """DGT-1: more than are looked at together; the best may be in any block, and equals in several."""
    q, e = normal(1, 1, 9, 3), normal(1, 150, 3)
    e = torch.cat([e, e[:, [0, 70, 140]]], dim=1)
    assert torch.equal(there(ASSIGN["triton"])(q, e), ASSIGN["torch"](q, e))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e30])
def test_all_keys_alike(value):
    """DGT-1: then every centroid selects the first n, also where the numbers are the smallest or very large."""
    k, e = torch.full((1, 1, 40, 1), value), torch.ones(1, 1, 1)
    assert torch.equal(there(SELECT["triton"])(k, e, 7), torch.arange(7)[None, None, None])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_no_number_is_liked_least(dtype):
    """DGT-1: NaN as -inf, infinities and zeros of both signs where they belong; a query that is NaN is in group 0."""
    values = [3e38, torch.nan, -3e38, 1.0, torch.inf, -torch.inf, -0.0, 0.0, torch.nan]
    k = torch.tensor(values, dtype=dtype)[None, None, :, None]
    order = [4, 0, 3, 6, 7, 2, 1, 5, 8]
    for n in range(1, len(values) + 1):
        found = there(SELECT["triton"])(k, torch.ones(1, 1, 1, dtype=dtype), n)
        assert found.flatten().tolist() == sorted(order[:n]), n
    groups = there(ASSIGN["triton"])(k[:, :, :5], torch.tensor([[[1.0], [-1.0]]], dtype=dtype))
    assert groups.flatten().tolist() == [0, 0, 1, 0, 0]


def test_a_layer_on_a_cuda_device_uses_the_kernels():
    """By the device of its tensors."""
    x = SimpleNamespace(device=torch.device("cuda"))
    for forms in (ASSIGN, SELECT, ops.grouped_attention.forms):
        assert forms.chosen("auto", x) is forms["triton"]


def test_a_layer_by_its_kernels():
    """DGT-1, DGT-2: the same output and gradients as by torch, in training, at an odd size."""
    layer, x = DynamicGroupAttention(8, 2, groups=3, keys=6).double(), normal(1, 3, 5, 8)
    answers = []
    for impl in ("triton", "torch"):
        layer.implementation = impl
        module = layer.to(DEVICE if impl == "triton" else "cpu")
        out = module(x.to(module.qkv.weight.device))
        answers.append([out, *torch.autograd.grad(out.square().sum(), module.qkv.parameters())])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one.cpu(), other)


# ----------------------------------------------------------------------------------------------------------- operators


def operator_arguments(*size: int) -> list:
    """Of the operator, where the kernels run: as `inputs`, with groups of uneven length, and a scale."""
    *tensors, groups, selected = inputs(*size)
    lengths = torch.randint(1, selected.shape[3] + 1, selected.shape[:3])
    leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
    return [*leaves, *(t.to(DEVICE) for t in (groups, selected, lengths)), 0.7]


def test_opcheck():
    """Schema, fake and autograd registrations of the forward, schema and fake of the backward and of both searches."""
    arguments = operator_arguments(1, 2, 3, 4, 3, 2, 3)
    forward = operator.OPERATORS["triton"]
    torch.library.opcheck(forward, tuple(arguments))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    outputs = forward(*plain)
    backward = torch.ops.dynattn.grouped_attention_triton_backward.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, (torch.ones_like(outputs[0]), *outputs, *plain), test_utils=tests)
    centroids = normal(2, 2, 3).to(DEVICE)
    torch.library.opcheck(operator.ASSIGN_TRITON, (plain[0], centroids), test_utils=tests)
    torch.library.opcheck(operator.SELECT_TRITON, (plain[1], centroids, 2), test_utils=tests)


def test_gradcheck():
    """DGT-14, DGT-15, DGT-16, DGT-17 by finite differences."""
    arguments = operator_arguments(1, 1, 5, 4, 3, 3, 2)
    first = lambda *a: operator.OPERATORS["triton"](*a)[0]  # noqa: E731
    assert torch.autograd.gradcheck(first, arguments, eps=1e-6, atol=1e-6, fast_mode=True)


def gradients() -> list[Tensor]:
    """Output and gradients in float32, of keys that several groups selected."""
    torch.manual_seed(0)
    arguments = operator_arguments(1, 1, 40, 12, 16, 5, 9)
    leaves = [a.detach().float().requires_grad_() for a in arguments[:3]]
    out = operator.OPERATORS["triton"](*leaves, *arguments[3:])[0]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_gradients_are_the_same_every_time():
    """Bit for bit: sums have one order."""
    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


@in_the_interpreter
def test_the_answer_does_not_depend_on_the_order_of_programs(monkeypatch):
    """Bit for bit: a device runs them in any order, here backwards."""
    from triton.runtime.interpreter import interpreter_builder

    expected, place = gradients(), interpreter_builder.set_grid_idx

    def backwards(x, y, z):
        place(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    for one, other in zip(gradients(), expected, strict=True):
        assert torch.equal(one, other)


WRONG = [{3: 4}, {3: -1}, {4: 5}, {4: -1}, {5: 4}, {5: 0}]  # of groups, selected, lengths


def with_wrong(place: int, value: int) -> list:
    """Arguments of the operator with one wrong index."""
    arguments = operator_arguments(1, 1, 6, 5, 3, 4, 3)
    arguments[place] = arguments[place].clone()
    arguments[place].view(-1)[-1] = value
    return arguments


@in_the_interpreter
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_index_is_refused(wrong):
    """The operator itself looks at groups, keys and lengths: under torch.compile nobody else does."""
    ((place, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"expected values from . to ., got {value}"):
        operator.OPERATORS["triton"](*with_wrong(place, value))


@in_the_interpreter
@pytest.mark.parametrize("wrong", [{}, *WRONG])
def test_the_device_s_own_check(wrong, monkeypatch):
    """Where the answer is not waited for, an assertion stops the device."""
    from triton.runtime.interpreter import interpreter_builder

    from dynattn.kernels.grouped_triton import check_program

    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))
    ((place, value),) = wrong.items() or [(3, 0)]
    groups, selected, lengths = with_wrong(place, value)[3:6]
    call = partial(check_program[1,], groups, selected, lengths, 6, 12, 4, 4, 5, 3, BLOCK=16)
    if not wrong:
        return call()
    with pytest.raises(Exception, match="expected values from") as error:
        call()
    assert ("groups", "selected", "lengths")[place - 3] in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_index_on_the_device(wrong):
    """In a process of its own, since the device does not recover."""
    ((place, value),) = wrong.items()
    program = f"import sys; sys.path.insert(0, 'tests'); import test_grouped_triton as t, torch; \
        t.operator.OPERATORS['triton'](*t.with_wrong({place}, {value})); torch.cuda.synchronize()"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0 and "expected values from" in run.stderr


SOME, ONES, WIDE = (1, 2, 100, 90, 32, 3, 70), (1, 1, 1, 1, 1, 1, 1), (2, 1, 64, 300, 200, 2, 200)
COMPILED = [  # sizes of 1 are constants of the compiled code
    [("bfloat16", SOME), ("bfloat16", ONES), ("bfloat16", WIDE), ("float16", SOME)],
    [("float32", WIDE), ("float64", SOME)],
]


@pytest.mark.slow
@pytest.mark.parametrize("cases", COMPILED)
def test_kernels_compile_for_a_gpu(cases):
    """Without one: the calls as they are, by a driver that compiles for compute capability 9.0 and launches nothing."""
    compile_for_a_gpu(f"""
        from dynattn.kernels import grouped_triton as attention, selection_triton as search

        for dtype, (B, h, L, S, d, G, n) in {cases}:
            kernels.clear()
            dtype = getattr(torch, dtype)
            q, k, v = (torch.zeros(B, h, x, d, dtype=dtype) for x in (L, S, S))
            groups, selected = torch.zeros(B, h, L, dtype=torch.int64), torch.zeros(B, h, G, n, dtype=torch.int64)
            lengths, centroids = torch.ones(B, h, G, dtype=torch.int64), torch.zeros(h, G, d)
            out, statistics = attention.forward(q, k, v, groups, selected, lengths, 0.5)
            attention.backward(out, out, statistics, q, k, v, groups, selected, lengths, 0.5)
            sizes = groups.numel(), selected.numel(), lengths.numel(), G, S, n
            attention.check_program[1,](groups, selected, lengths, *sizes, BLOCK=1024)
            search.assign_triton(q, centroids)
            search.select_triton(k, centroids, n)
            wanted = {{name for module in (attention, search) for name in vars(module) if name.endswith("_program")}}
            several_blocks = n > (128 if dtype.itemsize == 2 else 32)
            wanted |= {{"slopes_of_keys", "slopes_of_queries"}} if several_blocks else {{"slopes_of_keys"}}
            assert (found := {{program.__name__ for program in kernels}}) == wanted, found ^ wanted
            may_fail = [program for program, one in kernels.items() if "assertfail" in one.asm["ptx"]]
            assert may_fail == [attention.check_program]
    """)


# ----------------------------------------------------------------------------------------------------------- the bench


def tiny(monkeypatch, race: cuda.Race) -> cuda.Race:
    """A race of few numbers, in a dtype that flash attention has here."""
    monkeypatch.setattr(cuda, "BATCH", 1)
    monkeypatch.setattr(cuda, "GROUPS", 3)
    monkeypatch.setattr(cuda, "CHANNELS", 16)
    return race._replace(L=20, heads=1, keys=9, dtype=torch.float32 if DEVICE == "cpu" else torch.bfloat16)


def outputs_of(race: cuda.Race) -> tuple[list, list]:
    """What a race's calls compute, and what it makes of their times, which are 1, 2 and 6."""
    outputs, times = [], iter((1.0, 2.0, 6.0))

    def time(call, waits):
        outputs.append(call())
        return next(times)

    return outputs, cuda.measured(race, time, DEVICE)


@ignore_flex
@pytest.mark.parametrize("name", [name for name, race in cuda.races().items() if race.other != "forms"])
def test_rows_run_and_compute_the_same(name, monkeypatch):
    """Outputs and gradients of the others are those of the kernel; those of dense attention only have their shapes."""
    race = tiny(monkeypatch, cuda.races()[name])
    outputs, ratios = outputs_of(race)
    assert [x.shape for x in outputs[1]] == [(1, 1, 20), (1, 1, 3, 9)]
    if race.other == "floor":
        assert ratios == [1 / cuda.floor(race), 3 / cuda.floor(race)] and len(outputs) == 2
        return
    ours, _, theirs = outputs
    assert ratios == [6.0, 2.0]
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    assert len(ours) == (4 if race.backward else 1)
    if race.other == "flex":
        with torch.device(DEVICE):
            groups = bench.grouped.inputs_of(20, 1, 9, 1, 3, 16)[3]
        order = groups.argsort(dim=-1, stable=True)
        ours[0] = ours[0].gather(2, order[..., None].expand(-1, -1, -1, 16))
    tolerance = 1e-5 if race.dtype == torch.float32 else 3e-2
    for one, other in zip(ours, theirs, strict=True):
        assert race.other == "flash" or torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@ignore_flex
@pytest.mark.parametrize("L, G, n", [(300, 5, 98), (300, 2, 130), (100, 40, 3)])
def test_flex_attention_computes_grouped_attention(L, G, n):
    """With all of its blocks: every key that a query may read is in a block that is listed for it, once."""
    q, k, v, groups, selected = (t[None] for t in (t[0] for t in inputs(1, 2, L, 140, 4, G, n)))
    sorted_q, keys, values, mask = cuda.gathered(q, k, v, groups, selected)
    out = cuda.flex(q, k, v, groups, selected)()
    order = groups.argsort(dim=-1, stable=True)
    want = masked(q, k, v, groups, selected).gather(2, order[..., None].expand(-1, -1, -1, 4))
    torch.testing.assert_close(out, want)
    place = lambda n: torch.arange(n)  # noqa: E731
    may = mask.mask_mod(torch.tensor(0), torch.tensor(1), place(L)[:, None], place(keys.shape[2])[None])
    assert torch.equal(may.sum(1), torch.full((L,), n))
    listed = mask.to_dense()[0, 1].bool()
    assert mask.kv_num_blocks.max() <= listed.shape[1]
    needed = torch.zeros_like(listed)
    for query, key in may.nonzero().tolist():
        needed[query // cuda.BLOCK, key // cuda.BLOCK] = True
    assert not (needed & ~listed).any()
    edges = mask.kv_num_blocks[0, 1] * (0 if G == 1 else 1)
    assert torch.equal(listed.sum(1), edges)


def test_floors_of_the_plan():
    """Microseconds of an H200, batch 64, as they were worked out by hand: forward, and both."""
    floors = {name: round(cuda.floor(race)) for name, race in cuda.races().items() if race.other == "floor"}
    forward = [floors[f"floor {stage}"] for stage in (1, 2, 3, "high")]
    assert forward == [25, 13, 8, 275]
    both = [floors[f"floor both {stage}"] for stage in (1, 2, 3, "high")]
    assert all(abs(a - b - c) <= 1 for a, b, c in zip(both, forward, (49, 25, 14, 435), strict=True))


def test_without_a_gpu_the_table_has_no_numbers(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["cuda"])
    first, head, *lines = capsys.readouterr().out.splitlines()
    assert first == "There is no GPU here: nothing is measured." and head.split()[0] == "measured"
    assert len(lines) == len(cuda.races())
    for line, race in zip(lines, cuda.races().values(), strict=True):
        bound = "" if race.bound is None else f"{'at most' if race.other == 'floor' else 'at least'} {race.bound:.1f} x"
        assert race.what in line and line.split("-  ")[-1].strip(" -") == bound


def test_what_misses_its_bound_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(cuda, "forms_run", lambda: False)
    monkeypatch.setattr(cuda, "measured", lambda race: [2.0, 1.0])
    cuda.main()
    lines = dict(zip(cuda.races(), capsys.readouterr().out.splitlines()[2:], strict=True))
    for name, race in cuda.races().items():
        values = ["-", "-"] if race.other == "forms" else ["2.00", "x", "1.00", "x"]
        assert " ".join(values) in " ".join(lines[name].split())
        missed = race.other == "flash"  # 6, 4 and 12 times are wanted; 1.2 of flex, and 2.5 floors at most
        assert lines[name].endswith("missed") == missed
