"""The fast paths: every kernel against the loops, outputs and every gradient, and as operators of torch.

Triton's kernels run on a GPU where there is one, else in Triton's interpreter; the header of the test run says which.
"""

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from helpers import DOUBLE, compile_for_a_gpu, layouts, normal, somewhere
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynattn import core, ops, verify
from dynattn.kernels import deformable as deformable_operator
from dynattn.kernels import operators, simd
from dynattn.kernels import sampling as sampling_operator
from dynattn.kernels import threads as team

ROOT = Path(__file__).parents[1]
DEVICE = {"numba": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
BACKENDS = ["numba", "triton"]
pytestmark = pytest.mark.usefixtures("unchecked")


def on_device(function, backend: str):
    """A function of CPU tensors that runs where the backend does."""
    move = lambda value, to: value.to(to) if isinstance(value, Tensor) else value  # noqa: E731

    def run(*arguments, **options):
        there = DEVICE[backend]
        out = function(*(move(a, there) for a in arguments), **{k: move(o, there) for k, o in options.items()})
        return move(out, "cpu")

    return run


def deformable_case(B=2, h=4, g=2, shape=(3, 4), N=5, d=2, table=(5, 7)) -> list:
    """Arguments of deformable attention; points reach beyond the map."""
    H, W = shape
    entries = None if table is None else normal(h, *table)
    return [normal(B, h, H * W, d), normal(B, h, N, d), normal(B, h, N, d), somewhere(B, g, N), entries, shape]


LARGE = {  # more than a tile of queries, a block of keys, a register of columns: too large for the loops
    "tiles and blocks": dict(B=1, h=2, g=1, shape=(11, 21), N=150, d=32, table=(21, 41)),
    "a long row": dict(B=1, h=1, g=1, shape=(2, 130), N=75, d=16, table=(3, 259)),
    "many channels": dict(B=1, h=1, g=1, shape=(10, 10), N=30, d=70, table=(19, 19)),
}


def compare_forms(one, other, arguments: list, tolerance: float = 1e-10) -> None:
    """Outputs and every gradient, relative to the largest entry."""
    named = {str(n): a for n, a in enumerate(arguments)}
    got, want = verify.answer(one, named, {}), verify.answer(other, named, {})
    for key in want:
        largest = float(want[key].abs().max()) or 1.0
        assert float((got[key] - want[key]).abs().max()) <= tolerance * largest, key


# --------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize("grid", ["centre", "corner"])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_deformable_attention_beyond_a_block(backend, name, grid):
    """Against the torch form, which the loops have proved."""
    run = partial(ops.deformable_attention, query_grid=grid)
    function = on_device(partial(run, impl=backend), backend)
    compare_forms(function, partial(run, impl="torch"), deformable_case(**LARGE[name]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_far_outside_and_on_the_edges(backend):
    """Where nothing is read the bias is 0, however far; on a cell of the table the derivative is that to the right."""
    places = [[-1, -1], [1, 1], [0, 0], [-0.5, 0.5], [3, 0], [0, -3.5], [1e9, -1e9], [-1e30, 0]]
    points = torch.tensor(places, dtype=DOUBLE).reshape(1, 1, 8, 2)
    for grid, shape in (("centre", (2, 4)), ("corner", (2, 3))):  # places in the table are exact in binary
        arguments = deformable_case(B=1, h=1, g=1, shape=shape, N=8, table=(3, 2 * shape[1] - 1))
        arguments[3] = points
        function = on_device(partial(ops.deformable_attention, impl=backend), backend)
        verify.compare("deformable_attention", function, *arguments, query_grid=grid)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7, 9), (1, 1, 1, 1, 1), (1, 2, 1, 8, 3), (1, 33, 4, 1, 5), (1, 2, 13, 11, 40)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_points_at_odd_sizes(backend, shape):
    """DAT-8 against grid_sample, which the loops have proved."""
    B, C, H, W, N = shape
    points = somewhere(B, N)
    points[0, 0] = torch.tensor([1e20, 0.0])
    compare_forms(
        on_device(partial(ops.sample_points, impl=backend), backend),
        partial(ops.sample_points, impl="torch"),
        [normal(B, C, H, W), points],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Views with any strides give the numbers that their copies give."""
    q, k, v, points, table, shape = deformable_case()
    run = on_device(partial(ops.deformable_attention, impl=backend), backend)
    expected = run(q, k, v, points, table, shape)
    for views in zip(*map(layouts, (q, k, v, points, table)), strict=True):
        assert torch.allclose(run(*views, shape), expected, rtol=1e-12, atol=1e-12)
    x, points = normal(2, 3, 5, 4), somewhere(2, 6)
    run = on_device(partial(ops.sample_points, impl=backend), backend)
    for views in zip(*map(layouts, (x, points)), strict=True):
        assert torch.allclose(run(*views), run(x, points), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_stays_none(backend):
    """A point at NaN or infinity must not be read from memory, and must not vanish."""
    arguments = deformable_case(B=1, h=1, g=1)
    arguments[3][0, 0, 2, 1] = torch.nan
    run = on_device(partial(ops.deformable_attention, impl=backend), backend)
    assert run(*arguments).isnan().all()
    x, points = normal(1, 2, 4, 4), somewhere(1, 3)
    points[0, 1] = torch.tensor([torch.nan, 0.0])
    out = on_device(partial(ops.sample_points, impl=backend), backend)(x, points)
    assert out[..., 1].isnan().all() and out[..., [0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_outside_is_not_multiplied_by_zero(backend):
    """A point that reads nothing reads no infinity either."""
    x, points = normal(1, 1, 3, 3), torch.full((1, 1, 2), 3.0, dtype=DOUBLE)
    x[0, 0, 0, 0] = torch.inf
    assert on_device(partial(ops.sample_points, impl=backend), backend)(x, points).item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_and_minus_infinity(backend):
    """No overflow; a key that the table forbids has no weight, also when its whole block is forbidden."""
    q, k, v, points, table, shape = deformable_case(B=1, h=1, g=1, shape=(2, 3), N=80, table=(3, 5))
    run = on_device(partial(ops.deformable_attention, impl=backend), backend)
    expected = ops.deformable_attention(1e3 * q, 1e3 * k, v, points, table, shape, impl="torch")
    assert torch.allclose(run(1e3 * q, 1e3 * k, v, points, table, shape), expected)
    points[:, :, :72] = 0.0
    points[:, :, 72:] = 9.0  # these read nothing of the table
    forbidding = torch.full_like(table, -1e30)
    expected = ops.deformable_attention(q, k, v, points, forbidding, shape, impl="torch")
    assert torch.allclose(run(q, k, v, points, forbidding, shape), expected)


# ----------------------------------------------------------------------------------------------------------- operators


def operator_arguments(operation: str, table: bool = True) -> list:
    """Small arguments of an operator, tensors that want gradients."""
    if operation == "sample_points":
        arguments = [normal(2, 3, 4, 5), somewhere(2, 6)]
    else:
        q, k, v, points, entries, shape = deformable_case(B=1, h=2, shape=(3, 4), N=3, table=(5, 7) if table else None)
        arguments = [q, k, v, points, entries, shape, "centre", 0.7]
    return [a.requires_grad_() if isinstance(a, Tensor) else a for a in arguments]


OPERATORS = {"sample_points": sampling_operator.OPERATORS, "deformable_attention": deformable_operator.OPERATORS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATORS)
def test_gradcheck(operation, backend):
    arguments = operator_arguments(operation)
    first = on_device(lambda *a: OPERATORS[operation][backend](*a)[0], backend)
    assert torch.autograd.gradcheck(first, arguments, eps=1e-6, atol=1e-6, fast_mode=backend == "triton")


def test_the_backward_operator_has_no_derivatives():
    """That of a backend, which nobody calls by hand: the message names the switch."""
    x, points = normal(1, 2, 3, 4).requires_grad_(), somewhere(1, 5)
    (out,) = sampling_operator.OPERATORS["numba"](x, points)
    slope = torch.ops.dynattn.sample_points_numba_backward(torch.ones_like(out), out, x, points)[0]
    with pytest.raises(RuntimeError, match=r'sample_points_numba_backward: .* dynattn.implementation\("torch"\)'):
        slope.sum().backward()


def test_forward_mode_is_refused_and_auto_does_without():
    """A tangent would be lost in a kernel without a word."""
    x, points = normal(1, 2, 3, 4), somewhere(1, 5)
    tangent = lambda impl: torch.func.jvp(lambda x: ops.sample_points(x, points, impl=impl), (x,), (x,))[1]  # noqa: E731
    assert torch.allclose(tangent("auto"), ops.sample_points(x, points))
    with pytest.raises(ValueError, match="'numba' cannot run sample_points here: kernels have no forward-mode"):
        tangent("numba")


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops(backend):
    """The forward's are those of the torch form; the backward computes the logits again, as flash attention does."""
    q, k, v, points, table, shape = (
        a.to(DEVICE[backend]).requires_grad_() if isinstance(a, Tensor) else a for a in deformable_case()
    )

    def count(impl: str, backward: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            out = ops.deformable_attention(q, k, v, points, table, shape, impl=impl)
            if backward:
                out.sum().backward()
        return counter.get_total_flops()

    B, h, L, d, N = 2, 4, 12, 2, 5
    assert count(backend, False) == count("torch", False) == 4 * B * h * L * N * d
    assert count(backend, True) == count(backend, False) * 7 // 2


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATORS)
def test_compile_with_dynamic_shapes(operation):
    """fullgraph, forward and backward, at sizes that the first call did not have; annotations are not checked there."""
    program = f"""
        import torch
        from dynattn import ops
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        def sample_points(size, impl):
            x, points = torch.randn(2, 3, size, size + 2), torch.rand(2, size + 1, 2) * 2 - 1
            return [x, points], lambda x, points: ops.sample_points(x, points, impl=impl)
        def deformable_attention(size, impl):
            shape, N = (size, size + 1), size + 2
            q, k, v = torch.randn(2, 2, size * (size + 1), 4), torch.randn(2, 2, N, 4), torch.randn(2, 2, N, 4)
            tensors = [q, k, v, torch.rand(2, 1, N, 2) * 2 - 1, torch.randn(2, 2 * size - 1, 2 * size + 1)]
            return tensors, lambda *tensors: ops.deformable_attention(*tensors, shape, impl=impl)
        for impl in ("numba", "auto"):
            call = lambda size, *tensors: {operation}(size, impl)[1](*tensors)
            compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
            for size in (3, 5, 8):
                tensors, function = {operation}(size, impl)
                tensors = [tensor.requires_grad_() for tensor in tensors]
                one, other = compiled(size, *tensors), function(*tensors)
                torch.testing.assert_close(one, other)
                for a, b in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (one, other)), strict=True):
                    torch.testing.assert_close(a, b)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=600)


# ------------------------------------------------------------------------------------------------------------- threads


def test_the_answer_does_not_depend_on_threads():
    """Bit for bit, and from run to run: a head is one worker's."""
    arguments = [a.float().requires_grad_() if isinstance(a, Tensor) else a for a in deformable_case(B=3)]
    tensors = [a for a in arguments if isinstance(a, Tensor)]

    def answer(threads):
        torch.set_num_threads(threads)
        out = ops.deformable_attention(*arguments, impl="numba")
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    first = answer(1)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, answer(threads), strict=True))
    torch.set_num_threads(1)


def test_triton_s_gradient_of_the_table_is_the_same_every_time():
    """Integers are added, whose sum has no order."""
    arguments = [a.float().requires_grad_() if isinstance(a, Tensor) else a for a in deformable_case()]
    run = on_device(partial(ops.deformable_attention, impl="triton"), "triton")
    gradients = [torch.autograd.grad(run(*arguments).square().sum(), arguments[4])[0] for _ in range(2)]
    assert torch.equal(*gradients)


@numba.njit(nogil=True)
def count_up(begin, end, counts):
    """A kernel: adds 1 to each of its items, and fails at one that stands at 7."""
    for item in range(begin, end):
        counts[item] += 1
        if counts[item] == 8:
            raise ValueError("seven")


@pytest.mark.parametrize("of_torch", [True, False], ids=["torch's threads", "own threads"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_one_thread_s(of_torch, threads, monkeypatch):
    if not of_torch:
        monkeypatch.setattr(team, "_team_of_torch", lambda: None)
    torch.set_num_threads(threads)
    for count in (1, 2, 19, 1000):
        counts = np.zeros(count, np.int64)
        team.in_parallel(count_up, count, counts)
        assert (counts == 1).all()
    counts[count // 3] = 7
    with pytest.raises(ValueError, match="seven"):
        team.in_parallel(count_up, count, counts)
    torch.set_num_threads(1)


@pytest.mark.skipif(not torch.backends.openmp.is_available() or sys.platform != "linux", reason="wants torch's OpenMP")
def test_torch_s_threads_are_found():
    assert team._team_of_torch() is not None


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current GPU, which need not be theirs."""
    entered, plain = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or plain(tensor))
    x = torch.randn(1, 2, 3, 3).requires_grad_()
    out = ops.sample_points(x, torch.rand(1, 4, 2), impl="numba")
    torch.autograd.grad(out, x, grad := torch.ones_like(out))
    assert len(entered) == 2 and torch.equal(entered[0], x) and torch.equal(entered[1], grad)


@pytest.mark.slow
def test_kernels_in_a_forked_process():
    """The threads of the parent are not the child's."""
    program = """
        import os, torch
        from dynattn import ops
        torch.set_num_threads(2)
        x, points = torch.randn(4, 40, 5, 5), torch.rand(4, 6, 2)
        expected = ops.sample_points(x, points, impl="numba")
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(ops.sample_points(x, points, impl="numba"), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=120)


@pytest.mark.slow
def test_compiled_code_is_kept_for_the_next_process():
    program = """
        import torch
        from dynattn import ops
        from dynattn.kernels import sampling_numba
        ops.sample_points(torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 2), impl="numba")
        print(sum(sampling_numba.forward_items.stats.cache_hits.values()))
    """
    for _ in range(2):
        run = [sys.executable, "-c", textwrap.dedent(program)]
        hits = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
    assert int(hits) == 1


def test_stale_code_is_forgotten(tmp_path, monkeypatch):
    """numba looks at the file of a function, not at those of the functions that it calls."""
    monkeypatch.setattr(simd, "__file__", str(tmp_path / "simd.py"))
    (tmp_path / "__pycache__").mkdir()
    for name, age in (("simd.py", 5), ("__pycache__/old.nbi", 9), ("__pycache__/new.nbi", 1)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    simd.forget_stale_code(tmp_path / "__pycache__")
    assert [path.name for path in tmp_path.glob("__pycache__/*")] == ["new.nbi"]


def test_auto_is_the_kernel_where_it_pays(monkeypatch):
    """By the number of pairs of queries and keys; never without the backend."""
    used = []
    for name in ("torch", "numba"):
        monkeypatch.setitem(ops.deformable_attention.forms, name, lambda q, *_, name=name: used.append(name) or q)
    large = deformable_case(B=8, h=8, g=1, shape=(64, 64), N=1, d=1, table=None)
    ops.deformable_attention(*deformable_case())
    ops.deformable_attention(*large)
    monkeypatch.setitem(operators.INSTALLED, "numba", False)
    ops.deformable_attention(*large)
    assert used == ["torch", "numba", "torch"]


def test_what_cannot_run_says_why(monkeypatch):
    x, points = normal(1, 1, 2, 2), somewhere(1, 1)
    monkeypatch.setattr(operators, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl: 'triton' cannot run sample_points here: .* CUDA devices, .* on cpu"):
        ops.sample_points(x, points, impl="triton")
    with pytest.raises(ValueError, match="impl: 'numba' cannot run sample_points here: .* on the CPU, .* on meta"):
        ops.sample_points(x.to("meta"), points.to("meta"), impl="numba")
    monkeypatch.setitem(operators.INSTALLED, "numba", False)
    with pytest.raises(ValueError, match="impl: 'numba' cannot run sample_points here: numba is not installed"):
        ops.sample_points(x, points, impl="numba")


@pytest.mark.slow
def test_importing_does_not_import_numba():
    """It costs a second, and comes with the first call."""
    program = "import sys; from dynattn import ops; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
@pytest.mark.skipif(not operators.INSTALLED["triton"], reason="Triton is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_triton_s_kernels_compile_for_a_gpu(dtype):
    """Without one: the calls as they are. Nothing in float64 goes through float32, the scale neither."""
    compile_for_a_gpu(f"""
        from dynattn.kernels import deformable_triton as attention, sampling_triton as sampling

        PROGRAMS = {{
            *(attention.forward_program, attention.slopes_of_queries, attention.slopes_of_keys),
            *(sampling.forward_program, sampling.slopes_of_points, sampling.slopes_of_cells),
        }}

        def calls(B, h, G, H, W, N, d, with_table):
            q, k = (torch.zeros(B, h, L, d, dtype=torch.{dtype}) for L in (H * W, N))
            points, table = torch.zeros(B, G, N, 2), torch.zeros(h, 2 * H - 1, 2 * W - 1) if with_table else None
            inputs = q, k, k, points, table, (H, W), "centre", 0.3
            out, statistics = attention.forward(*inputs)
            attention.backward(out, out, statistics, *inputs)
            x, points = torch.zeros(B, h, H, W, dtype=torch.{dtype}), points[:, 0]
            (out,) = sampling.forward(x, points)
            sampling.backward(out, out, x, points)

        for sizes in ((1, 2, 1, 7, 5, 6, 32, True), (2, 6, 3, 8, 8, 40, 20, False), (1, 1, 1, 1, 1, 1, 1, True)):
            calls(*sizes)
            assert set(kernels) == PROGRAMS
            if "{dtype}" == "float64":
                assert not [program.__name__ for program, one in kernels.items() if "cvt.f64.f32" in one.asm["ptx"]]
            kernels.clear()
    """)


# ------------------------------------------------------------------------------------------------ what they consist of


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_of_small_matrices(dtype):
    """Every remainder of rows and columns, any layout of the first."""
    lanes = simd.REGISTER_BYTES // np.dtype(dtype).itemsize
    generator = np.random.default_rng(0)
    for M in (1, 5, 8, 12, 13, 25):
        for N in (lanes, 2 * lanes, 3 * lanes, 7 * lanes):
            a, b = generator.standard_normal((M, 5)).astype(dtype), generator.standard_normal((5, N)).astype(dtype)
            guarded = np.full((M + 2, N + lanes), 7, dtype)
            c = guarded[1:-1, :N]
            simd.multiply_add(a, b, c)
            simd.multiply_add(np.asfortranarray(a), b, c)
            np.testing.assert_allclose(c, 7 + 2 * (a @ b), rtol=1e-4 if dtype == np.float32 else 1e-12)
            guarded[1:-1, :N] = 7
            assert (guarded == 7).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials(dtype):
    from numba import njit

    @njit
    def apply(x, y):
        for i in range(0, x.size, simd.REGISTER_BYTES // x.itemsize):
            simd.store(y, i, simd.exp2(simd.load(x, i)))

    x = np.linspace(-120, 100, 4096).astype(dtype)
    x[:3] = np.nan, -np.inf, 0
    y = np.empty_like(x)
    apply(x, y)
    assert np.isnan(y[0]) and 0 <= y[1] < 1e-37 and y[2] == 1
    np.testing.assert_allclose(y[3:], np.exp2(x[3:].astype(np.float64)), rtol=1.5 * np.finfo(dtype).eps)


def test_torch_s_own_answer_is_kept_for_auto_on_other_devices():
    """On a device without a kernel "auto" is the torch form: here torch's device without memory."""
    q, k, v, points, table, shape = (a.to("meta") if isinstance(a, Tensor) else a for a in deformable_case())
    assert ops.deformable_attention(q, k, v, points, table, shape).shape == q.shape
    assert core.sample_points(torch.empty(1, 2, 3, 4, device="meta"), torch.empty(1, 5, 2, device="meta")).shape == (
        1,
        2,
        5,
    )
