"""The tests tested: `verify.check` tells every mistake of its catalogue from the loops and names it, and no more."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dynattn import core, ops, verify
from dynattn.verify.checking import check_answers
from dynattn.verify.comparing import Answer, Stopped
from dynattn.verify.registry import OPERATIONS

MISTAKES = {name: operation.mistakes for name, operation in OPERATIONS.items()}
CORRECT = {name: operation.function.forms["torch"] for name, operation in OPERATIONS.items()}
pytestmark = pytest.mark.usefixtures("unchecked")  # the loops run for every case: twice as fast without shape checks
ALL = [(operation, name) for operation, mistakes in MISTAKES.items() for name in mistakes]


def test_every_operation_is_known():
    """What `ops` offers, the oracle judges, and has a catalogue for."""
    assert verify.operations() == dir(ops)
    assert all(len(mistakes) >= 15 for mistakes in MISTAKES.values())


# ------------------------------------------------------------------------------------------------------------- mutants


@pytest.mark.parametrize("operation, name", ALL)
def test_mistake_is_caught_and_named(operation, name):
    """Killed, in outputs or in a gradient, and told apart from every other mistake."""
    with pytest.raises(verify.Mismatch) as caught:
        verify.check(operation, MISTAKES[operation][name], shrink=False)
    assert caught.value.mistakes == [name]
    assert caught.value.where.startswith("gradient of ") == name.startswith("gradient")
    assert name in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("operation", CORRECT)
def test_mistakes_are_caught_on_other_seeds(operation):
    """The cases of the default seed are not the only ones that do: of all mistakes nearly all die on any twenty."""
    alive = []
    for name, mistake in MISTAKES[operation].items():
        try:
            verify.check(operation, mistake, seed=1000, shrink=False)
            alive.append(name)
        except verify.Mismatch:
            pass
    assert len(alive) <= 1


@pytest.mark.parametrize("operation, name", ALL)
def test_mistake_takes_what_the_torch_form_takes(operation, name):
    """The same arguments, so that a mistake can stand in for the form."""
    call = verify.case(operation, 3)
    options = call.defaults | call.options
    names = OPERATIONS[operation].options  # in the order of the form
    positional = [*call.arguments.values(), *(options[name] for name in names)]
    expected = CORRECT[operation](*positional)
    assert MISTAKES[operation][name](*positional).shape == expected.shape


# ------------------------------------------------------------------------------------------------- what is right passes


@pytest.mark.parametrize("operation", CORRECT)
def test_correct_forms_pass(operation):
    for function in (CORRECT[operation], getattr(ops, operation)):
        assert verify.check(operation, function) is None
    verify.check(operation, CORRECT[operation], seed=1000)


def by_hand_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Somebody else's dense attention, without a bias."""
    powers = torch.exp((q @ k.mT) * (scale or q.shape[-1] ** -0.5))
    return (powers / powers.sum(-1, keepdim=True)) @ v


def by_hand_sampling(x: Tensor, points: Tensor) -> Tensor:
    """Somebody else's bilinear reading, by the four neighbours."""
    B, C, H, W = x.shape
    row, col = core.to_pixels(points, (H, W)).unbind(-1)
    total = 0
    for i in (row.floor(), row.floor() + 1):
        for j in (col.floor(), col.floor() + 1):
            weight = (1 - (row - i).abs()) * (1 - (col - j).abs())
            weight = weight * ((i >= 0) & (i < H) & (j >= 0) & (j < W))
            cell = (i.clamp(0, H - 1) * W + j.clamp(0, W - 1)).long()
            total = total + weight[:, None] * x.flatten(2).gather(2, cell[:, None].expand(-1, C, -1))
    return total


def by_hand_windows(q, k, v, table, query_shape, window, shift=(0, 0), scale=None):
    """Somebody else's window attention: dense, with a mask over the whole map."""
    H, W = query_shape
    labels = window_labels(query_shape, window, shift)
    i, j = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    i, j = i.flatten(), j.flatten()
    bias = torch.zeros(q.shape[1], H * W, H * W, dtype=q.dtype)
    if table is not None:
        down = (i[:, None] - i).clamp(1 - window[0], window[0] - 1) + window[0] - 1
        right = (j[:, None] - j).clamp(1 - window[1], window[1] - 1) + window[1] - 1
        bias = table[:, down, right]
    bias = bias.masked_fill(labels[:, None] != labels, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def window_labels(shape, window, shift) -> Tensor:
    """Windows that start at s - w, s, s + w, ..., so that the first of an axis is cut short; none shifts alone."""
    starts = [(s - w) % w if side > w else 0 for side, w, s in zip(shape, window, shift, strict=True)]
    rows, cols = ((torch.arange(n) - start) // w for n, start, w in zip(shape, starts, window, strict=True))
    return (rows[:, None] * 1000 + cols).flatten()


def test_functions_of_others_pass():
    """Written without the library's forms; options that they do not take stay at their defaults."""
    verify.check("dense_attention", by_hand_attention)
    verify.check("dense_attention", F.scaled_dot_product_attention)  # a builtin that tells no signature
    verify.check("sample_points", by_hand_sampling)
    verify.check("window_attention", by_hand_windows)
    verify.check("deformable_attention", lambda *arguments, **options: ops.deformable_attention(*arguments, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tolerance_follows_the_dtype_of_the_output(dtype):
    def low(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_hand_attention(q.to(dtype), k.to(dtype), v.to(dtype))

    verify.check("dense_attention", low)
    with pytest.raises(verify.Mismatch):
        verify.check("dense_attention", lambda q, k, v: low(q, k, v).double())
    with pytest.raises(verify.Mismatch) as caught:
        verify.check("dense_attention", lambda q, k, v: low(q, k, 1.2 * v))
    assert caught.value.mistakes == []


# ---------------------------------------------------------------------------------------------- what a mismatch tells


def test_message():
    """Where, how far, in which case, which mistake; enough to see it again."""

    def student(x, points):
        out = ops.sample_points(x, points).clone()
        out[0, 0, 0] += 0.25
        return out

    with pytest.raises(verify.Mismatch) as caught:
        verify.check("sample_points", student, seed=7)
    error = caught.value
    assert isinstance(error, AssertionError)
    assert (error.where, error.index, error.mistakes) == ("output", (0, 0, 0), [])
    assert error.error == pytest.approx(0.25)
    lines = str(error).splitlines()
    assert lines[0].startswith("sample_points: the output is wrong: at [0, 0, 0] (image 0, channel 0, point 0) ")
    assert "off by 0.25" in lines[0]
    assert lines[1] == "  no mistake of the catalogue gives this answer"
    assert lines[2].startswith("  in the case of x (1, 1, 1, 1) = [[[[") and lines[3] == f"  again: {error.case.line}"
    call = eval(error.case.line)
    assert str(call) == str(error.case)
    wrong, right = student(*call.arguments.values()), ops.sample_points(*call.arguments.values())
    assert f"{wrong[0, 0, 0]:.8g}, expected {right[0, 0, 0]:.8g}" in lines[0]


def test_mistakes_made_by_others_are_named():
    """By what they compute, however they are written; in float32 too."""

    def unscaled(q, k, v):
        return torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), dim=-1).float() @ v.float()

    def swapped(x, points):
        grid = rearrange(points, "B N rc -> B N 1 rc")  # grid_sample wants (x, y)
        return F.grid_sample(x, grid, align_corners=True).squeeze(-1)

    for operation, function, name in [
        ("dense_attention", unscaled, "scale missing"),
        ("sample_points", swapped, "rows and columns swapped"),
    ]:
        with pytest.raises(verify.Mismatch) as caught:
            verify.check(operation, function)
        assert caught.value.mistakes == [name]


def test_gradients_that_do_not_arrive():
    for cut in ("x", "points"):

        def student(x, points, cut=cut):
            return ops.sample_points(x.detach() if cut == "x" else x, points.detach() if cut == "points" else points)

        with pytest.raises(verify.Mismatch, match=f"the gradient of {cut} is wrong") as caught:
            verify.check("sample_points", student)
        assert caught.value.mistakes == [f"gradient cut at the {'map' if cut == 'x' else 'points'}"]
    with pytest.raises(verify.Mismatch, match="the gradient of x is wrong") as caught:
        verify.check("sample_points", torch.no_grad()(ops.sample_points))
    assert caught.value.mistakes == []


def test_wrong_shapes_and_numbers_that_are_none():
    with pytest.raises(verify.Mismatch, match=r"the output is wrong: expected shape \(.*\), got \(") as caught:
        verify.check("sample_points", lambda x, points: ops.sample_points(x, points).mT)
    assert caught.value.error == float("inf")
    with pytest.raises(verify.Mismatch, match=r"at \[0, 0, 0\] \(.*\) nan, expected"):
        verify.check("sample_points", lambda x, points: ops.sample_points(x, points) * torch.nan)


def test_errors_of_the_function_come_through():
    """With a note of the case, and nothing swallowed."""
    with pytest.raises(ZeroDivisionError) as caught:
        verify.check("sample_points", lambda x, points: 1 / 0)
    assert caught.value.__notes__[0].startswith("in the case of x (1, 1, 1, 1) = [[[[")
    assert "\nagain: verify.case(" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="function: expected to return a floating tensor, got list"):
        verify.check("sample_points", lambda x, points: [])
    with pytest.raises(TypeError, match="function: expected to return a floating tensor, got torch.int64"):
        verify.check("sample_points", lambda x, points: x.long())


def test_a_function_that_fails_elsewhere_is_still_diagnosed():
    """Wrong where there are several keys, raising where there are several images: the numbers are what is told."""

    def student(q, k, v):
        if len(q) > 1 and wrong:
            raise RuntimeError("one image at a time")
        wrong.extend([q] if k.shape[2] > 1 else [])
        return by_hand_attention(q, k, v, scale=1.0)

    wrong = []
    with pytest.raises(verify.Mismatch) as caught:
        verify.check("dense_attention", student)
    assert "scale missing" in caught.value.mistakes


# ------------------------------------------------------------------------------------------------- the simplest case


@pytest.mark.parametrize(
    "operation, name, sizes",
    [
        ("sample_points", "rows and columns swapped", {"B": 1, "C": 1, "H": 1, "W": 2, "N": 1}),
        ("sample_points", "first image for the whole batch", {"B": 2, "C": 1, "H": 1, "W": 1, "N": 1}),
        ("dense_attention", "scale missing", {"B": 1, "h": 1, "L": 1, "N": 2, "bias": False}),
        ("dense_attention", "gradient cut at the bias", {"B": 1, "h": 1, "L": 1, "N": 2, "d": 1, "bias": True}),
        ("window_attention", "bias missing", {"B": 1, "h": 1, "d": 1, "shift": (0, 0), "table": True, "scale": None}),
        ("deformable_attention", "bias missing", {"B": 1, "g": 1, "h": 1, "d": 1, "N": 2, "query_grid": "centre"}),
        ("detr_attention", "only the first point is read", {"B": 1, "h": 1, "d": 1, "L": 1, "K": 2}),
        ("grouped_attention", "only the first key is read", {"B": 1, "h": 1, "L": 1, "d": 1, "G": 1, "S": 2, "n": 2}),
        ("grouped_attention", "order of the queries not restored", {"B": 1, "h": 1, "L": 2, "d": 1, "G": 2, "n": 1}),
        (
            "routed_attention",
            "all regions are read",
            {"B": 1, "h": 1, "d": 1, "R": 1, "S": 2, "n": 1, "Tq": 1, "Tk": 1},
        ),
        ("routed_attention", "softmax for each region apart", {"B": 1, "h": 1, "R": 1, "S": 2, "n": 2, "Tk": 1}),
        ("routed_attention", "key mask inverted", {"B": 1, "h": 1, "d": 1, "R": 1, "S": 1, "n": 1, "key_mask": True}),
    ],
)
def test_the_case_is_as_simple_as_the_mistake_allows(operation, name, sizes):
    """Every size, option and layout that it does not need is at its smallest; it is named as before."""
    with pytest.raises(verify.Mismatch) as caught:
        verify.check(operation, MISTAKES[operation][name])
    choices = caught.value.case.choices
    assert sizes.items() <= choices.items() and choices["layout"] == "contiguous"
    assert caught.value.mistakes == [name]


def test_the_first_case_is_told_if_it_is_not_to_shrink():
    def student(q, k, v, scale=None):
        asked.append(len(q))
        return ops.dense_attention(q, k, v, scale=scale) * (1 if len(q) == 1 else 2)

    sizes = {}
    for shrink in (False, True):
        asked = []
        with pytest.raises(verify.Mismatch) as caught:
            verify.check("dense_attention", student, shrink=shrink)
        sizes[shrink] = sum(t.numel() for t in caught.value.case.arguments.values())
    assert sizes[True] == 2 * 3 < sizes[False]


def test_inputs_that_are_not_contiguous():
    """A function that needs its inputs in one piece is told so; one that only breaks on strided ones is caught."""
    with pytest.raises(RuntimeError, match="view size is not compatible") as caught:
        verify.check("sample_points", lambda x, points: ops.sample_points(x.view(-1).view(x.shape), points))
    assert "with strides" in caught.value.__notes__[0] and "layout='contiguous'" not in caught.value.__notes__[0]
    layouts = {verify.case("dense_attention", seed).choices["layout"] for seed in range(20)}
    assert layouts == {"contiguous", "transposed", "strided"}


def test_what_answers_at_random_is_reported_all_the_same():
    """Dropout left on: each case is asked once, so that the search neither ends nor fails."""
    generator = torch.Generator().manual_seed(0)

    def student(q, k, v):
        return ops.dense_attention(q, k, v) * (torch.rand((), generator=generator) < 0.7)

    with pytest.raises(verify.Mismatch) as caught:
        verify.check("dense_attention", student)
    assert caught.value.mistakes == []


def test_what_was_found_is_told_when_time_is_up():
    """A search for the simplest that has to stop loses neither the mismatch nor, before there is one, the stop."""
    calls = []

    def answers(call: verify.Case) -> Answer:
        calls.append(call)
        if len(calls) > most:
            raise Stopped("time is up")
        return verify.answer_to(call, MISTAKES["dense_attention"]["bias subtracted"])

    how = {"held": frozenset(), "cases": 20, "seed": 0, "shrink": True}
    most = 12
    with pytest.raises(verify.Mismatch):
        check_answers("dense_attention", answers, **how)
    assert len(calls) > most
    calls.clear()
    most = 0
    with pytest.raises(Stopped, match="time is up"):
        check_answers("dense_attention", answers, **how)


def test_the_same_seed_tells_the_same(tmp_path, monkeypatch):
    """Whatever has been checked before; and nothing is written."""
    monkeypatch.chdir(tmp_path)
    told = []
    for seed in (3, 4, 3):
        with pytest.raises(verify.Mismatch) as caught:
            verify.check("dense_attention", MISTAKES["dense_attention"]["bias missing"], seed=seed)
        told.append(str(caught.value))
    assert told[0] == told[2]
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_the_matrix_are_drawn():
    """Rectangular, prime, not divisible, one token, one head, batch one; round numbers in some."""
    drawn = [verify.case("window_attention", seed).choices for seed in range(60)]
    assert any(c["H"] != c["W"] for c in drawn) and any(c["H"] % c["wi"] and c["H"] > c["wi"] for c in drawn)
    assert {1, 5} <= {c["H"] for c in drawn} and {c["h"] for c in drawn} == {c["B"] for c in drawn} == {1, 2}
    assert any(c["H"] == c["W"] == 1 for c in drawn) and {c["numbers"] for c in drawn} == {"round", "any"}


def test_groups_of_the_matrix_are_drawn():
    """Uneven, empty, of one query, one with all keys; keys in any order, also such that several groups selected."""
    drawn = [verify.case("grouped_attention", seed) for seed in range(20)]
    sizes = [torch.bincount(c.arguments["groups"][0, 0], minlength=c.choices["G"]) for c in drawn]
    assert any((size == 0).any() for size in sizes) and any((size == 1).any() and size.max() > 2 for size in sizes)
    assert any(c.choices["G"] == 1 and c.choices["n"] == c.choices["S"] > 1 for c in drawn)
    selections = [c.arguments["selected"] for c in drawn]
    assert all(s.dtype == c.arguments["groups"].dtype == torch.int64 for s, c in zip(selections, drawn, strict=True))
    assert all((s.sort().values.diff() > 0).all() for s in selections) and any((s.diff() < 0).any() for s in selections)
    assert any(s[0, 0].unique().numel() < s[0, 0].numel() for s in selections)
    call = verify.case("grouped_attention", 2, L=2, S=9, G=3, n=9, grouping="in turn", layout="transposed")
    assert call.arguments["groups"].tolist()[0][0] == [2, 1] and call.arguments["selected"].shape[2:] == (3, 9)
    assert not call.arguments["selected"].is_contiguous() and call.line.startswith('verify.case("grouped_attention", 2')
    with pytest.raises(ValueError, match="n: expected at most S = 3, got 4"):
        verify.case("grouped_attention", 2, S=3, n=4)


def test_routes_and_masks_of_the_matrix_are_drawn():
    """All regions and one; several readers of a region; masks that hide one of a route's regions, never all of them."""
    drawn = [verify.case("routed_attention", seed) for seed in range(40)]
    choices = [c.choices for c in drawn]
    assert any(c["n"] == c["S"] > 1 for c in choices) and {c["n"] for c in choices} >= {1, 2, 3}
    assert any(c["R"] > c["S"] for c in choices) and any(c["Tq"] != c["Tk"] for c in choices)
    routes = [c.arguments["routes"] for c in drawn]
    assert all(r.dtype == torch.int64 and (r.sort().values.diff() > 0).all() for r in routes)
    assert any((r.diff() < 0).any() for r in routes) and any(r[0].unique().numel() < r[0].numel() for r in routes)
    masks = [c.options.get("key_mask") for c in drawn]
    assert None in masks and any(m is not None and m.any() and not m.all() for m in masks)
    hidden = []
    for mask, r in zip(masks, routes, strict=True):
        if mask is not None:
            readable = torch.stack([own[rows].any(dim=-1) for own, rows in zip(mask, r, strict=True)])  # (B, R, n)
            assert readable.any(dim=-1).all()
            hidden.append(not readable.all())
    assert any(hidden) and not all(hidden)
    with pytest.raises(ValueError, match="n: expected at most S = 3, got 4"):
        verify.case("routed_attention", 2, S=3, n=4)


def test_a_case_by_its_choices():
    call = verify.case("sample_points", 3, B=1, C=1, H=2, W=7, N=1, numbers="round", layout="strided")
    assert call.arguments["x"].shape == (1, 1, 2, 7) and not call.arguments["x"].is_contiguous()
    assert torch.equal(call.arguments["x"], call.arguments["x"].round())
    line = "verify.case(\"sample_points\", 3, B=1, C=1, H=2, W=7, N=1, numbers='round', layout='strided')"
    assert repr(call) == call.line == line
    assert verify.case("sample_points", 3, W=7).arguments["x"].shape[3] == 7


def test_the_place_is_told_in_words():
    """By the letters of the operation; a query of a map by its row and column too."""

    def student(q, k, v, points, table, query_shape):
        return Crooked.apply(ops.deformable_attention(q, k, v, points, table, query_shape))

    class Crooked(torch.autograd.Function):
        @staticmethod
        def forward(context, z):
            z = z.clone()
            z[:, -1, -1, 0] += 1
            return z

        @staticmethod
        def backward(context, gradient):
            return gradient

    q, k, v = (torch.rand(1, 2, n, 2, dtype=torch.float64) for n in (6, 3, 3))
    points = torch.rand(1, 1, 3, 2, dtype=torch.float64)
    words = r"at \[0, 1, 5, 0\] \(image 0, head 1, query 5 \(row 1, column 2\), channel 0\)"
    with pytest.raises(verify.Mismatch, match=words):
        verify.compare("deformable_attention", student, q, k, v, points, None, (2, 3))
    with pytest.raises(verify.Mismatch, match=r"points is wrong: at .* \(image 0, point 0, its (row|column)\)"):
        verify.check("sample_points", MISTAKES["sample_points"]["gradient cut at the points"])
    with pytest.raises(verify.Mismatch, match=r"bias is wrong: at .* \(head 0, query 0, key 0\)"):
        verify.check("dense_attention", MISTAKES["dense_attention"]["gradient cut at the bias"])
    with pytest.raises(verify.Mismatch, match=r"table is wrong: at .* \(head 0, table row \d, table column \d\)"):
        verify.check("window_attention", MISTAKES["window_attention"]["gradient cut at the table"])


def test_hypothesis_is_imported_when_it_is_needed():
    for path in Path(verify.__file__).parent.glob("*.py"):
        assert not re.search(r"^(import|from) hypothesis", path.read_text(), flags=re.MULTILINE)


def test_comparison_on_inputs_of_ones_own():
    x, points = torch.rand(1, 2, 3, 4), torch.rand(1, 5, 2)
    verify.compare("sample_points", core.sample_points_torch, x.double(), points.double())
    with pytest.raises(verify.Mismatch, match="rows and columns swapped") as caught:
        verify.compare(
            "sample_points", MISTAKES["sample_points"]["rows and columns swapped"], x.double(), points.double()
        )
    assert caught.value.case.seed is None and "verify.case" not in str(caught.value)
    with pytest.raises(TypeError, match="arguments: expected x, points, got 1"):
        verify.compare("sample_points", core.sample_points_torch, x)


def test_cases_are_the_same_every_time():
    for operation in verify.operations():
        once, again = (verify.answer(getattr(ops, operation), c.arguments, c.options) for c in both(operation))
        assert all(torch.equal(once[key], again[key]) for key in once)


def both(operation: str) -> list[verify.Case]:
    """A case, and the same drawn anew."""
    first = verify.case(operation, 5)
    verify.cases.case.cache_clear()
    return [first, verify.case(operation, 5)]


def test_checking_leaves_the_cases_alone():
    """A function cannot change what the next one is given."""
    before = {name: t.clone() for name, t in verify.case("dense_attention", 0).arguments.items()}
    with pytest.raises(RuntimeError, match="in-place"):
        verify.check("dense_attention", lambda q, k, v: (q.mul_(2) @ k.mT).softmax(-1) @ v)
    after = verify.case("dense_attention", 0).arguments
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: verify.check("sampling", abs),
            ValueError,
            r"operation: expected one of 'aggregate_tokens', .*, got 'sampling'",
        ),
        (lambda: verify.case("sampling", 0), ValueError, r"operation: expected one of"),
        (lambda: verify.case("sample_points", 0, K=1), ValueError, r"choices: expected one of 'B', 'C', .*, got 'K'"),
        (lambda: verify.case("sample_points", 0, B=0), ValueError, r"B: expected at least 1, got 0"),
        (lambda: verify.case("sample_points", 0, layout="odd"), ValueError, r"layout: expected one of 'contiguous'"),
        (lambda: verify.check("sample_points", 3), TypeError, r"function: expected something to call, got int"),
        (lambda: verify.check("sample_points", abs, cases=0), ValueError, r"cases: expected at least 1, got 0"),
        (
            lambda: verify.check("window_attention", lambda q, k, v, table, query_shape: q),
            TypeError,
            r"function: window_attention needs a parameter 'window'; there are q, k, v, table, query_shape",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------ it cannot be misled


def test_a_function_that_changes_its_arguments_is_told():
    """The right answer would otherwise be that to the changed arguments, now and in later checks."""

    def zero(q, k, v, *, bias=None, scale=None):
        q.data.zero_()
        return core.dense_attention(q, k, v, bias=bias, scale=scale)

    with pytest.raises(ValueError, match="function: expected to leave its arguments as they are, got another q"):
        verify.check("dense_attention", zero, seed=7000)
    verify.check("dense_attention", ops.dense_attention, seed=7000)


def test_gradients_are_compared_without_gradients_around():
    """Within no_grad a wrong gradient is found, and what is remembered of the loops is right."""

    def cut(q, k, v, *, bias=None, scale=None):
        return core.dense_attention(q, k.detach(), v, bias=bias, scale=scale)

    with torch.no_grad():
        verify.check("dense_attention", ops.dense_attention, seed=8000)
        with pytest.raises(verify.Mismatch, match="gradient of k"):
            verify.check("dense_attention", cut, seed=8000)
    verify.check("dense_attention", ops.dense_attention, seed=8000)
