"""DGT's four forms of group-wise matrix products (appendix C) against plain loops over a dense, masked attention.

The kernels run on a GPU where there is one. Elsewhere the tests that need them are skipped, and `test_in_the_simulator`
runs this file once more in a process whose numba simulates CUDA; what it prints says which it was.
"""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import cuda, float32

from dynattn.kernels import cuda_forms

CAN, WHERE = cuda_forms.available()
ROOT = Path(__file__).parents[1]
T = cuda_forms.T
runs = pytest.mark.skipif(not CAN, reason=f"{WHERE}; test_in_the_simulator runs it")


def case(B=1, h=1, L=2 * T + 1, S=2 * T + 3, d=T, G=3, n=T, groups=None, seed=0) -> dict:
    """Arguments as numpy arrays; groups: of the queries of every head, else random."""
    generator = np.random.default_rng(seed)
    q, k, v = (generator.standard_normal((B, h, size, d)).astype(np.float32) for size in (L, S, S))
    if groups is None:
        groups = generator.integers(0, G, (B, h, L))
    selected = generator.random((B, h, G, S)).argsort(-1)[..., :n]
    groups = np.broadcast_to(np.array(groups), (B, h, L))
    return dict(q=q, k=k, v=v, groups=groups, selected=selected)


@pytest.mark.skipif(not cuda_forms.SIMULATED, reason="of the simulator; test_in_the_simulator runs it")
def test_threads_of_a_block_share_their_arrays(monkeypatch):
    """The simulator looks for an array and then makes it, so that now and then two threads got one each."""
    empty = np.empty

    def slow_empty(*arguments):
        time.sleep(1e-3)  # time for the other threads to look
        return empty(*arguments)

    monkeypatch.setattr(np, "empty", slow_empty)

    @cuda.jit
    def which(out):
        a = cuda.shared.array((T, T), float32)
        out[cuda.threadIdx.y, cuda.threadIdx.x] = id(a)

    out = torch.zeros(T, T, dtype=torch.int64)
    cuda_forms.launch(which, (1, 1, 1), out)
    assert len(out.unique()) == 1


CASES = {
    "one of everything": dict(L=1, S=1, d=1, G=1, n=1),
    "whole tiles": dict(L=2 * T, S=2 * T, d=T, n=T),
    "nothing is a whole tile": dict(B=2, h=2, L=2 * T + 1, d=T + 2, n=T + 1),
    "fewer than a tile": dict(L=T - 1, S=T - 1, d=T - 2, G=2, n=T - 2),
    "several tiles of everything": dict(L=3 * T - 1, S=4 * T, d=2 * T + 1, G=2, n=2 * T + 1),
    "one group, which reads all keys": dict(L=T + 1, S=T + 2, d=3, G=1, n=T + 2),
    "a group of one": dict(L=T + 2, G=2, groups=[1] * (T - 1) + [0] + [1] * 2),
    "a group a query": dict(L=T + 1, d=3, G=T + 1, n=2, groups=np.arange(T + 1)[::-1]),
    "empty groups, at the ends too": dict(L=T + 3, G=9, groups=[5] * (T - 1) + [1] * 2 + [7] * 2),
    "a single key": dict(G=4, n=1),
}


def dense_masked(q, k, v, groups, selected, scale, grad) -> tuple:
    """Y and the gradients of q, k, v: every query looks at every key, and those that its group did not select are -inf.

    Plain loops in float64. What it says of gradients, finite differences check below.
    """
    q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
    (B, h, L, d), S = q.shape, k.shape[2]
    y, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        for m in range(h):
            for l in range(L):
                mine = set(selected[b, m, groups[b, m, l]].tolist())
                logits, weights, dweights = [-math.inf] * S, [0.0] * S, [0.0] * S
                for n in mine:
                    logits[n] = scale * sum(q[b, m, l, c] * k[b, m, n, c] for c in range(d))  # DGT-11
                for n in range(S):
                    weights[n] = math.exp(logits[n] - max(logits))
                total = sum(weights)
                for n in range(S):
                    weights[n] /= total  # DGT-12
                    for c in range(d):
                        y[b, m, l, c] += weights[n] * v[b, m, n, c]  # DGT-13
                        dweights[n] += grad[b, m, l, c] * v[b, m, n, c]  # DGT-16
                        dv[b, m, n, c] += weights[n] * grad[b, m, l, c]  # DGT-17
                mean = sum(weights[n] * dweights[n] for n in range(S))
                for n in range(S):
                    slope = scale * weights[n] * (dweights[n] - mean)
                    for c in range(d):
                        dq[b, m, l, c] += slope * k[b, m, n, c]  # DGT-14
                        dk[b, m, n, c] += slope * q[b, m, l, c]  # DGT-15
    return y, dq, dk, dv


def grad_like(q) -> np.ndarray:
    """A gradient of the output."""
    return np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)


def close(got, want, tolerance=2e-6) -> None:
    """Relative to the largest entry."""
    got = np.asarray(got.detach().cpu() if isinstance(got, torch.Tensor) else got)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * (np.abs(want).max() or 1))


def tensors(arguments: dict) -> dict:
    """Arrays as tensors where the forms run."""
    device = "cpu" if cuda_forms.SIMULATED else "cuda"
    return {name: torch.tensor(x, device=device) for name, x in arguments.items()}


# -------------------------------------------------------------------------------------------------- where the forms run


@pytest.mark.slow
@pytest.mark.skipif(CAN, reason=f"the tests of this process run the forms: {WHERE}")
def test_in_the_simulator(capsys):
    """All tests of this file, in numba's simulator, which must be chosen before numba is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, cwd=ROOT, env=environment | {"NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    with capsys.disabled():
        print(f"\nDGT's four forms ran in numba's CUDA simulator: {run.stdout.splitlines()[-1]}")


@runs
def test_where_the_forms_run(capsys):
    with capsys.disabled():
        print(f"\nDGT's four forms run on: {WHERE}")


@pytest.mark.slow
@pytest.mark.skipif(cuda_forms.SIMULATED, reason="it is another process's affair")
def test_without_a_gpu_or_the_simulator_it_says_why():
    """It imports, and refuses; the package does not import numba.cuda by itself."""
    program = """if True:
        import sys
        import dynattn
        from dynattn import ops
        assert "numba.cuda" not in sys.modules
        import numpy as np, torch
        torch.cuda.is_available = lambda: False
        from dynattn.kernels import cuda_forms
        assert cuda_forms.available()[0] is False
        one = np.ones((1, 1, 1, 1), np.float32)
        index = np.zeros((1, 1, 1, 1), int)
        try:
            cuda_forms.grouped_attention(one, one, one, index[0], index)
        except RuntimeError as error:
            print(error)
    """
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("the four forms cannot run here: no CUDA device") and "CUDASIM=1" in run.stdout


@pytest.mark.skipif(cuda_forms.SIMULATED, reason="the simulator compiles nothing")
@pytest.mark.parametrize("form", ["form_1", "form_2", "form_3", "form_4"])
def test_kernels_compile_for_a_gpu(form):
    """Without one: types always, and to PTX for compute capability 9.0 where the CUDA toolkit's libNVVM is."""
    from numba import boolean, cuda, float32, int64
    from numba.cuda.cudadrv.error import NvvmSupportError

    numbers, indices, places = float32[:, :, ::1], int64[:, :, ::1], int64[:, ::1]
    of_rows = (numbers, numbers, places, places, indices, numbers)
    of_groups = (numbers, numbers, places, indices, numbers, boolean)
    signature = of_rows if form in ("form_1", "form_2") else of_groups
    try:
        ptx, _ = cuda.compile_ptx(getattr(cuda_forms, form).py_func, signature, cc=(9, 0))
    except NvvmSupportError:
        pytest.skip("types fit; no libNVVM to go on with")
    assert "bar.sync" in ptx and "fma.rn.f32" in ptx
    assert ".f64" not in ptx  # all arithmetic in float32
    assert ("atom" in ptx) == (form in ("form_3", "form_4"))


# --------------------------------------------------------------------------------------------------------- equivalence


@runs
@pytest.mark.parametrize("name", CASES)
def test_against_dense_masked_attention(name):
    """Y and all gradients: DGT-11 to DGT-17."""
    arguments = case(**CASES[name])
    grad, scale = grad_like(arguments["q"]), 0.7
    expected = dense_masked(**arguments, scale=scale, grad=grad)
    close(cuda_forms.grouped_attention(**arguments, scale=scale), expected[0])
    for got, want in zip(cuda_forms.gradients(grad, **arguments, scale=scale), expected[1:], strict=True):
        close(got, want)


def test_the_reference_s_gradients():
    """By finite differences of its output."""
    arguments = {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in case(L=3, S=4, d=2).items()}
    grad = grad_like(arguments["q"])
    _, *slopes = dense_masked(**arguments, scale=0.7, grad=grad)
    for name, slope in zip("qkv", slopes, strict=True):
        for place in np.ndindex(slope.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = arguments[name].copy()
                moved[place] += step
                sides.append((dense_masked(**arguments | {name: moved}, scale=0.7, grad=grad)[0] * grad).sum())
            assert abs((sides[0] - sides[1]) / 2e-5 - slope[place]) < 1e-8


@runs
def test_each_form_by_itself():
    """Against a matrix product a group."""
    arguments = tensors(case(B=2, L=2 * T + 1, d=T + 1, G=4, n=T + 2, groups=[0, 2] * T + [3]))
    q, k, _, groups, selected = (x.flatten(0, 1) for x in arguments.values())
    sorting = cuda_forms.sort_by_group(groups, 4)
    a = cuda_forms.taken(q, sorting.order)  # X_Q' or Grad_Y'
    p = torch.randn(2, 2 * T + 1, T + 2).to(a.device)  # P' or Grad_P'
    of_keys, of_channels = torch.zeros_like(p), torch.zeros_like(a)
    by_form_3, by_form_4 = torch.zeros_like(k), torch.zeros_like(k)
    for z in range(2):
        for i in range(4):
            rows, keys = sorting.group[z] == i, selected[z, i]
            of_keys[z, rows] = a[z, rows] @ k[z, keys].T  # DGT-11, DGT-16
            of_channels[z, rows] = p[z, rows] @ k[z, keys]  # DGT-13, DGT-14
            by_form_3[z, keys] += (a[z, rows].T @ p[z, rows]).T  # DGT-15
            by_form_4[z, keys] += p[z, rows].T @ a[z, rows]  # DGT-17
    close(cuda_forms.rows_times_keys(a, k, sorting, selected), of_keys.cpu().numpy())
    close(cuda_forms.rows_times_values(p, k, sorting, selected), of_channels.cpu().numpy())
    rest = (k.shape[1], sorting, selected, True)
    close(cuda_forms.columns_to_keys(cuda_forms.form_3, a, p, *rest), by_form_3.cpu().numpy())
    close(cuda_forms.columns_to_keys(cuda_forms.form_4, p, a, *rest), by_form_4.cpu().numpy())


def test_sorting_by_group():
    """Stable, with the place of empty groups."""
    sorting = cuda_forms.sort_by_group(torch.tensor([[3, 1, 3, 0, 1, 3]]), 5)
    assert sorting.order.tolist() == [[3, 1, 4, 0, 2, 5]]
    assert sorting.group.tolist() == [[0, 1, 1, 3, 3, 3]]
    assert sorting.starts.tolist() == [[0, 1, 3, 3, 6, 6]]
    x = torch.randn(1, 6, 2)
    assert torch.equal(cuda_forms.put_back(cuda_forms.taken(x, sorting.order), sorting.order), x)


@runs
def test_scale_stands_inside_the_softmax():
    """DGT-12: by default 1 / sqrt(d), of the logits; the output is a mean of values, not a part of one."""
    arguments = case(h=2)
    ones = arguments | {"v": np.ones_like(arguments["v"])}
    close(cuda_forms.grouped_attention(**ones), np.ones(arguments["q"].shape))
    want = dense_masked(**arguments, scale=arguments["q"].shape[-1] ** -0.5, grad=arguments["q"])[0]
    close(cuda_forms.grouped_attention(**arguments), want)


@runs
def test_torch_s_gradients_and_layouts():
    """Autograd goes through the forms; strided views give what their copies give."""
    arguments = tensors(case(h=2, L=T + 1, S=T + 2, d=3, n=2))
    learned = [arguments[name].requires_grad_() for name in "qkv"]
    out = cuda_forms.grouped_attention(**arguments)
    grad = torch.tensor(grad_like(out), device=out.device)
    found = torch.autograd.grad(out, learned, grad)
    direct = cuda_forms.gradients(grad, **arguments)
    for one, other in zip(found, direct, strict=True):
        close(one, other.cpu().numpy())
    views = {name: x.detach().transpose(0, -1).contiguous().transpose(0, -1) for name, x in arguments.items()}
    assert torch.equal(cuda_forms.grouped_attention(**views), out)


@runs
def test_what_is_no_number_stays_in_its_row_and_group():
    """A query spoils its own output, and the gradients of the keys that its group selected; no neighbour in a tile."""
    arguments = case(L=T, S=2 * T, G=2, n=T, groups=[0, 1] + [0] * (T - 2))  # a tile has both groups
    arguments["selected"] = np.arange(2 * T).reshape(1, 1, 2, T)
    grad = grad_like(arguments["q"])
    expected = cuda_forms.grouped_attention(**arguments), *cuda_forms.gradients(grad, **arguments)
    arguments["q"][0, 0, 1] = grad[0, 0, 1] = np.nan
    found = cuda_forms.grouped_attention(**arguments), *cuda_forms.gradients(grad, **arguments)
    spoilt = np.arange(T) == 1, np.arange(T) == 1, np.arange(2 * T) >= T, np.arange(2 * T) >= T
    for got, want, rows in zip(found, expected, spoilt, strict=True):
        assert np.isnan(got[0, 0, rows]).all()
        np.testing.assert_array_equal(got[0, 0, ~rows], want[0, 0, ~rows])


# ---------------------------------------------------------------------------------------------- "are directly written"


@runs
def test_a_plain_store_loses_what_other_groups_wrote(capsys):
    """Forms 3 and 4 as the appendix says them: right for keys of one group, wrong for those of several."""
    arguments = case(L=4 * T, S=4 * T, d=T, G=4, n=2 * T, seed=3)
    chosen = [set(arguments["selected"][0, 0, i].tolist()) for i in set(arguments["groups"].flat)]
    readers = np.array([sum(n in keys for keys in chosen) for n in range(4 * T)])
    grad = grad_like(arguments["q"])
    _, dk, dv = cuda_forms.gradients(grad, **arguments)
    _, stored_dk, stored_dv = cuda_forms.gradients(grad, **arguments, atomic=False)
    report = []
    for name, right, stored in (("Grad_K", dk[0, 0], stored_dk[0, 0]), ("Grad_V", dv[0, 0], stored_dv[0, 0])):
        close(stored[readers <= 1], right[readers <= 1])
        lost = np.linalg.norm(right - stored, axis=-1) / np.abs(right).max()
        assert (readers > 1).any() and (lost[readers > 1] > 1e-3).all()
        report.append(f"{np.linalg.norm(right - stored) / np.linalg.norm(right):.0%} of {name}")
    shared = (readers > 1).mean()
    with capsys.disabled():
        print(f"\nA plain store is off by {' and '.join(report)} (2-norm); {shared:.0%} of keys have several readers")


# ----------------------------------------------------------------------------------------------------------- bad input


@runs
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": np.zeros((1, 2), np.float32)}, ValueError, r"q: expected shape \(B h L d\), none empty, got \(1, 2\)"),
        ({"q": [[1.0]]}, ValueError, r"q: expected shape"),
        ({"k": np.zeros((1, 1, 5, 9), np.float32)}, ValueError, r"k: expected shape \(B h S d\), .* d = 4, got"),
        ({"v": np.zeros((1, 1, 2, 4), np.float32)}, ValueError, r"v: expected shape \(B h S d\), .* S = 5, .* got"),
        ({"k": np.zeros((1, 1, 0, 4), np.float32)}, ValueError, r"k: expected shape .*none empty"),
        ({"q": np.zeros((1, 1, 3, 4))}, TypeError, r"q: expected float32, got torch.float64"),
        ({"groups": np.zeros((1, 1, 3))}, TypeError, r"groups: expected whole numbers, got torch.float64"),
        ({"groups": np.full((1, 1, 3), 2)}, ValueError, r"groups: expected indices in \[0, 2\), got 2 to 2"),
        ({"groups": np.full((1, 1, 3), -1)}, ValueError, r"groups: expected indices in \[0, 2\), got -1 to -1"),
        ({"selected": np.full((1, 1, 2, 1), 5)}, ValueError, r"selected: expected indices in \[0, 5\), got 5 to 5"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    """Refused before any memory is read."""
    arguments = case(L=3, S=5, d=4, G=2, n=1) | changes
    with pytest.raises(error, match=message):
        cuda_forms.grouped_attention(**arguments)


@runs
def test_bad_gradient_and_place():
    arguments = case(L=3, S=5, d=4, G=2, n=1)
    with pytest.raises(ValueError, match=r"grad: expected the shape of q \(1, 1, 3, 4\), got \(1, 1, 3, 3\)"):
        cuda_forms.gradients(arguments["q"][..., :3], **arguments)
    with pytest.raises(ValueError, match=r"q: expected a tensor on (cpu|cuda), got one on meta"):
        cuda_forms.grouped_attention(**arguments | {"q": torch.empty(1, 1, 3, 4, device="meta")})
