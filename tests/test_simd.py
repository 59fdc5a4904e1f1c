"""What the kernels of the CPU are made of: matrices of which some rows are taken, transposition by vectors."""

from itertools import product

import numpy as np
import pytest
import torch
from helpers import DOUBLE, normal

from dynattn.kernels import grouped as operator
from dynattn.kernels import grouped_numba, simd, threads

DTYPES = [np.float32, np.float64]
SOME = [(False, False, False), (True, False, False), (False, True, True), (True, True, True)]  # of a, b, c in a @ b = c


def matrix(rows: int, columns: int, dtype: type, more: int = 5) -> np.ndarray:
    """Random numbers; a part of wider rows, which nothing may write to."""
    wide = np.random.default_rng(rows * columns).standard_normal((rows, columns + more)).astype(dtype)
    return wide[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_some_rows(dtype):
    """Each operand as it is or as some rows, of a and b also twice; other rows of c stay."""
    lanes = simd.REGISTER_BYTES // np.dtype(dtype).itemsize
    generator = np.random.default_rng(0)
    tolerance = 1e-4 if dtype == np.float32 else 1e-12
    for M, N, K in ((1, lanes, 3), (13, 2 * lanes, 5), (9, 7 * lanes, 1)):
        for (some_a, some_b, some_c), add in product(SOME, (False, True)):
            a, b, c = matrix(M, K, dtype), matrix(K, N, dtype), matrix(M, N, dtype)
            all_a, all_b, all_c = matrix(20, K, dtype), matrix(20, N, dtype), matrix(20, N, dtype)
            rows_a, rows_b = generator.integers(0, 20, M), generator.integers(0, 20, K)
            rows_c = generator.permutation(20)[:M]
            left, right = all_a[rows_a] if some_a else a, all_b[rows_b] if some_b else b
            expected = (all_c.copy()[rows_c] if some_c else c.copy()) * add + left @ right
            before = all_c.base.copy(), c.base.copy()
            simd.product(
                (all_a, rows_a) if some_a else a,
                (all_b, rows_b) if some_b else b,
                (all_c, rows_c) if some_c else c,
                add,
            )
            np.testing.assert_allclose(all_c[rows_c] if some_c else c, expected, rtol=tolerance, atol=tolerance)
            after, before = (all_c.base, before[0]) if some_c else (c.base, before[1])
            others = np.setdiff1d(np.arange(20), rows_c) if some_c else slice(0)
            np.testing.assert_array_equal(after[others], before[others])
            np.testing.assert_array_equal(after[:, N:], before[:, N:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposition(dtype):
    """Of every number of rows; behind the last it is read again, and no other."""
    lanes = simd.REGISTER_BYTES // np.dtype(dtype).itemsize
    source, target = matrix(50, 2 * lanes, dtype), np.empty((2 * lanes, 3 * lanes), dtype)
    for count in range(1, 2 * lanes + 1):
        rows = np.random.default_rng(count).integers(0, 50, count)
        simd.transpose((source, rows), dtype(0.5), target)
        np.testing.assert_array_equal(target[:, :count], source[rows].T * dtype(0.5))
        whole = -(-count // lanes) * lanes
        np.testing.assert_array_equal(target[:, count:whole], target[:, [count - 1] * (whole - count)])
        simd.transpose(source[:count], dtype(2), target)
        np.testing.assert_array_equal(target[:, :count], source[:count].T * dtype(2))


def test_one_compilation_serves_all_strides():
    """Of q, k and v side by side, as a layer has them, and of their copies."""
    qkv = normal(3, 1, 2, 40, 32)
    groups, selected = torch.randint(0, 3, (1, 2, 40)), torch.rand(1, 2, 3, 40).argsort(-1)[..., :7]
    lengths = torch.full((1, 2, 3), 7)

    def run(tensors: torch.Tensor) -> torch.Tensor:
        return operator.OPERATORS["numba"](*tensors, groups, selected, lengths, 0.3)[0]

    expected = run(qkv)
    known = len(threads.COMPILED), len(grouped_numba.forward_heads.signatures)
    across = qkv.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)  # heads between the channels
    assert across.stride(3) > across.stride(0) and torch.equal(run(across), expected)
    assert torch.equal(run(qkv.mT.contiguous().mT), expected)  # channels far apart
    assert (len(threads.COMPILED), len(grouped_numba.forward_heads.signatures)) == known


@pytest.mark.parametrize("place", ["read", "behind what is read"])
def test_gradients_want_distinct_keys(place):
    """Gradients are added to rows by their numbers: of two that are equal one would be lost."""
    q, k, v = (normal(1, 1, 6, 3).requires_grad_() for _ in range(3))
    selected = torch.tensor([[[[0, 2, 4, 5], [5, 3, 3, 1]]]])
    lengths = torch.tensor([[[4, 4 if place == "read" else 2]]])
    groups = torch.tensor([[[0, 1, 1, 0, 1, 0]]])
    out = operator.OPERATORS["numba"](q, k, v, groups, selected, lengths, 0.5)[0]
    read = [selected[0, 0, j, : lengths[0, 0, j]] for j in groups[0, 0]]
    want = torch.stack([(q[0, 0, i] @ k[0, 0, s].mT * 0.5).softmax(0) @ v[0, 0, s] for i, s in enumerate(read)])
    torch.testing.assert_close(out[0, 0], want)
    slopes = normal(6, 3)
    if place == "read":
        with pytest.raises(ValueError, match="selected: expected distinct keys in every group, got one twice"):
            (out[0, 0] * slopes).sum().backward()
        return
    got, expected = (torch.autograd.grad((x * slopes).sum(), (q, k, v)) for x in (out[0, 0], want))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.dtype == DOUBLE
