"""Deformable attention on CUDA devices (DAT-9): as `deformable_numba`, with a query block to a program.

The bias of a block is read from the table by four gathers while the logits are in registers. Gradients are sums in a
fixed order: of queries over keys (`slopes_of_queries`), of keys, values and places over queries (`slopes_of_keys`).
Only the table is written to from everywhere; it collects whole multiples of a quantum: a sum of integers has no order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynattn.kernels.deformable import table_places
from dynattn.kernels.operators import INTERPRETED

QUERIES, KEYS = 64, 32


@triton.jit
def matrix(base, rows, columns, limit, width, D: tl.constexpr):
    """A block of rows of a contiguous (limit, width) matrix, D >= width columns; zeros outside."""
    inside = (rows < limit)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def dot(a, b, sum, EXACT: tl.constexpr):
    """sum + a b; EXACT for where the hardware's product of 16-bit numbers is not at hand."""
    if EXACT:
        a, b = a.to(sum.dtype), b.to(sum.dtype)
    return tl.dot(a, b, sum, input_precision="ieee", out_dtype=sum.dtype)


@triton.jit
def table_reads(table, rows, cols, I, J):
    """The four entries around fractional places of a table (I, J), zeros outside, and how far behind the first."""
    above, left = tl.floor(rows), tl.floor(cols)
    low, right = rows - above, cols - left
    i, j = above.to(tl.int32), left.to(tl.int32)
    near_i, near_j = (rows >= -1) & (rows < I), (cols >= -1) & (cols < J)
    at = table + i * J + j
    a = tl.load(at, mask=near_i & near_j & (i >= 0) & (j >= 0), other=0.0)
    b = tl.load(at + 1, mask=near_i & near_j & (i >= 0) & (j + 1 < J), other=0.0)
    c = tl.load(at + J, mask=near_i & near_j & (i + 1 < I) & (j >= 0), other=0.0)
    d = tl.load(at + J + 1, mask=near_i & near_j & (i + 1 < I) & (j + 1 < J), other=0.0)
    return a, b, c, d, low, right


@triton.jit
def logits(
    q, k, queries, keys, N, table, places, step_i, step_j, I, J, width, scale, BIAS: tl.constexpr, EXACT: tl.constexpr
):
    """(queries, keys): scale q k^T + phi(B^; R), and the places in the table; no key behind the last."""
    sums = tl.zeros((q.shape[0], k.shape[0]), places.dtype.element_ty)
    sums = dot(q, tl.trans(k), sums, EXACT) * scale
    row0 = tl.load(places + keys * 2, mask=keys < N, other=0.0)
    col0 = tl.load(places + keys * 2 + 1, mask=keys < N, other=0.0)
    rows = row0[None, :] + (step_i * (queries // width).to(row0.dtype))[:, None]
    cols = col0[None, :] + (step_j * (queries % width).to(row0.dtype))[:, None]
    if BIAS:
        a, b, c, d, low, right = table_reads(table, rows, cols, I, J)
        near, far = a + (c - a) * low, b + (d - b) * low
        sums += near + (far - near) * right
    return tl.where((keys < N)[None, :], sums, float("-inf")), rows, cols


@triton.jit
def forward_program(
    Q, K, V, table, places, out, statistics,
    L, N, d, h, G, step_i: tl.float64, step_j: tl.float64, I, J, width, scale: tl.float64,
    BIAS: tl.constexpr, EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A query block of a head: its output, the row maximum and the row sum of each softmax."""
    item = tl.program_id(1).to(tl.int64)
    head = item % h
    places += (item // h * G + head * G // h) * N * 2
    table += head * I * J
    queries, columns = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, D)
    q = matrix(Q + item * L * d, queries, columns, L, d, D)
    number = places.dtype.element_ty
    step_i, step_j, scale = tl.full((), step_i, number), tl.full((), step_j, number), tl.full((), scale, number)
    row_max = tl.full((BLOCK_L,), float("-inf"), number)
    row_sum, accumulator = tl.zeros((BLOCK_L,), number), tl.zeros((BLOCK_L, D), number)
    for n in range(0, N, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k, v = matrix(K + item * N * d, keys, columns, N, d, D), matrix(V + item * N * d, keys, columns, N, d, D)
        scores, _, _ = logits(q, k, queries, keys, N, table, places, step_i, step_j, I, J, width, scale, BIAS, EXACT)
        new = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        rescale = tl.exp(row_max - new)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        accumulator = dot(weights.to(v.dtype), v, accumulator * rescale[:, None], EXACT)
        row_max = new
    inside = (queries < L)[:, None] & (columns < d)[None, :]
    tl.store(out + item * L * d + queries[:, None] * d + columns[None, :], accumulator / row_sum[:, None], mask=inside)
    tl.store(statistics + item * L * 2 + queries * 2, row_max, mask=queries < L)
    tl.store(statistics + item * L * 2 + queries * 2 + 1, row_sum, mask=queries < L)


@triton.jit
def softmax_slopes(
    q, k, v, grad, queries, keys, L, N, statistics, delta, table, places, step_i, step_j, I, J, width, scale,
    BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Weights (queries, keys) and the slopes of their logits, and the places in the table."""
    scores, rows, cols = logits(q, k, queries, keys, N, table, places, step_i, step_j, I, J, width, scale, BIAS, EXACT)
    row_max = tl.load(statistics + queries * 2, mask=queries < L, other=0.0)
    row_sum = tl.load(statistics + queries * 2 + 1, mask=queries < L, other=1.0)
    weights = tl.exp(scores - row_max[:, None]) / row_sum[:, None]
    weights = tl.where((queries < L)[:, None], weights, 0.0)
    slopes = dot(grad, tl.trans(v), tl.zeros(weights.shape, weights.dtype), EXACT)
    row_delta = tl.load(delta + queries, mask=queries < L, other=0.0)
    return weights, weights * (slopes - row_delta[:, None]), rows, cols


@triton.jit
def slopes_of_queries(
    Q, K, V, grad, statistics, delta, table, places, dq, largest,
    L, N, d, h, G, step_i: tl.float64, step_j: tl.float64, I, J, width, scale: tl.float64,
    BIAS: tl.constexpr, EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A query block of a head: its gradient, and the largest slope of a logit."""
    item = tl.program_id(1).to(tl.int64)
    head = item % h
    places += (item // h * G + head * G // h) * N * 2
    table += head * I * J
    queries, columns = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, D)
    q = matrix(Q + item * L * d, queries, columns, L, d, D)
    g = matrix(grad + item * L * d, queries, columns, L, d, D)
    number = places.dtype.element_ty
    step_i, step_j, scale = tl.full((), step_i, number), tl.full((), step_j, number), tl.full((), scale, number)
    accumulator, largest_slope = tl.zeros((BLOCK_L, D), number), tl.zeros((BLOCK_L,), number)
    for n in range(0, N, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        k, v = matrix(K + item * N * d, keys, columns, N, d, D), matrix(V + item * N * d, keys, columns, N, d, D)
        _, slopes, _, _ = softmax_slopes(
            q, k, v, g, queries, keys, L, N, statistics + item * L * 2, delta + item * L, table, places,
            step_i, step_j, I, J, width, scale, BIAS, EXACT,
        )  # fmt: skip
        largest_slope = tl.maximum(largest_slope, tl.max(tl.abs(slopes), 1))
        accumulator = dot(slopes.to(k.dtype), k, accumulator, EXACT)
    inside = (queries < L)[:, None] & (columns < d)[None, :]
    tl.store(dq + item * L * d + queries[:, None] * d + columns[None, :], accumulator * scale, mask=inside)
    tl.store(largest + item * tl.num_programs(0) + tl.program_id(0), tl.max(largest_slope, 0))


@triton.jit
def collect(table, values, inside, quantum):
    """Add to integers that count quanta: a sum without an order."""
    tl.atomic_add(table, tl.floor(values / quantum + 0.5).to(tl.int64), mask=inside)


@triton.jit
def slopes_of_keys(
    Q, K, V, grad, statistics, delta, table, places, dk, dv, dplaces, counts, quantum,
    L, N, d, h, G, step_i: tl.float64, step_j: tl.float64, I, J, width, scale: tl.float64,
    BIAS: tl.constexpr, EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A key block of a head: gradients of keys, values and places, and what they add to the table's."""
    item = tl.program_id(1).to(tl.int64)
    head = item % h
    places += (item // h * G + head * G // h) * N * 2
    table += head * I * J
    counts += head * I * J
    keys, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    k, v = matrix(K + item * N * d, keys, columns, N, d, D), matrix(V + item * N * d, keys, columns, N, d, D)
    number = places.dtype.element_ty
    step_i, step_j, scale = tl.full((), step_i, number), tl.full((), step_j, number), tl.full((), scale, number)
    by_key, by_value = tl.zeros((BLOCK_N, D), number), tl.zeros((BLOCK_N, D), number)
    by_row, by_col = tl.zeros((BLOCK_N,), number), tl.zeros((BLOCK_N,), number)
    unit = tl.load(quantum)
    for l in range(0, L, BLOCK_L):
        queries = l + tl.arange(0, BLOCK_L)
        q = matrix(Q + item * L * d, queries, columns, L, d, D)
        g = matrix(grad + item * L * d, queries, columns, L, d, D)
        weights, slopes, rows, cols = softmax_slopes(
            q, k, v, g, queries, keys, L, N, statistics + item * L * 2, delta + item * L, table, places,
            step_i, step_j, I, J, width, scale, BIAS, EXACT,
        )  # fmt: skip
        by_value = dot(tl.trans(weights).to(g.dtype), g, by_value, EXACT)
        by_key = dot(tl.trans(slopes).to(q.dtype), q, by_key, EXACT)
        if BIAS:
            a, b, c, e, low, right = table_reads(table, rows, cols, I, J)
            near = (rows >= -1) & (rows < I) & (cols >= -1) & (cols < J)
            by_row += tl.sum(tl.where(near, slopes * (c - a + (e - c - b + a) * right), 0.0), 0)
            by_col += tl.sum(tl.where(near, slopes * (b - a + (e - c - b + a) * low), 0.0), 0)
            i, j = tl.floor(rows).to(tl.int32), tl.floor(cols).to(tl.int32)
            near = near & (queries < L)[:, None] & (keys < N)[None, :]
            at = counts + i * J + j
            collect(at, slopes * (1 - low) * (1 - right), near & (i >= 0) & (j >= 0), unit)
            collect(at + 1, slopes * (1 - low) * right, near & (i >= 0) & (j + 1 < J), unit)
            collect(at + J, slopes * low * (1 - right), near & (i + 1 < I) & (j >= 0), unit)
            collect(at + J + 1, slopes * low * right, near & (i + 1 < I) & (j + 1 < J), unit)
    inside = (keys < N)[:, None] & (columns < d)[None, :]
    at = item * N * d + keys[:, None] * d + columns[None, :]
    tl.store(dk + at, by_key * scale, mask=inside)
    tl.store(dv + at, by_value, mask=inside)
    tl.store(dplaces + (item * N + keys) * 2, by_row, mask=keys < N)
    tl.store(dplaces + (item * N + keys) * 2 + 1, by_col, mask=keys < N)


def common(q, k, points, table, query_shape, query_grid, scale) -> tuple[list, dict, Tensor, Tensor, Tensor]:
    """What all programs get: sizes, options, the places in the table, the table, its size."""
    (_, h, L, d), (G, N) = q.shape, points.shape[1:3]
    number = torch.float64 if q.dtype == torch.float64 else torch.float32
    places, step, size = table_places(points, table, query_shape, query_grid == "centre")
    places = places.to(number).contiguous()
    entries = places.new_zeros(1) if table is None else table.to(number).contiguous()
    I, J = (0, 0) if table is None else table.shape[1:]
    sizes = [L, N, d, h, G, *step.tolist(), I, J, query_shape[1], scale]
    blocks = {"BLOCK_L": QUERIES, "BLOCK_N": KEYS, "D": max(16, triton.next_power_of_2(d))}
    return sizes, {"BIAS": table is not None, "EXACT": INTERPRETED, **blocks}, places, entries, size


def forward(q, k, v, points, table, query_shape, query_grid, scale) -> list[Tensor]:
    """As the operator looks."""
    sizes, options, places, entries, _ = common(q, k, points, table, query_shape, query_grid, scale)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, statistics = torch.empty_like(q), places.new_empty(*q.shape[:-1], 2)
    grid = triton.cdiv(q.shape[2], QUERIES), q.shape[0] * q.shape[1]
    forward_program[grid](q, k, v, entries, places, out, statistics, *sizes, **options)
    return [out, statistics]


def backward(grad, out, statistics, q, k, v, points, table, query_shape, query_grid, scale) -> list[Tensor]:
    """Gradients of q, k, v, points and, if there is one, the table."""
    (B, h, L, _), (G, N) = q.shape, points.shape[1:3]
    sizes, options, places, entries, size = common(q, k, points, table, query_shape, query_grid, scale)
    q, k, v, grad = (t.contiguous() for t in (q, k, v, grad))
    delta = (grad.to(places.dtype) * out.to(places.dtype)).sum(-1)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    blocks = triton.cdiv(L, QUERIES)
    largest, dplaces = places.new_empty(B * h, blocks), places.new_empty(B, h, N, 2)
    inputs = q, k, v, grad, statistics, delta, entries, places
    slopes_of_queries[blocks, B * h](*inputs, dq, largest, *sizes, **options)
    counts = torch.zeros(entries.shape, dtype=torch.int64, device=q.device)
    bits = 61 - math.ceil(math.log2(B * L * N))  # so many additions of the largest slope cannot overflow
    quantum = largest.max().clamp(min=torch.finfo(places.dtype).tiny * 2.0**bits) * 2.0**-bits
    grid = triton.cdiv(N, KEYS), B * h
    slopes_of_keys[grid](*inputs, dk, dv, dplaces, counts, quantum, *sizes, **options)
    by_points = dplaces.unflatten(1, (G, h // G)).sum(2) * -(size.to(dplaces) - 1) / 4
    gradients = [dq, dk, dv, by_points.to(points.dtype)]
    return gradients if table is None else [*gradients, (counts.double() * quantum.double()).to(table.dtype)]
