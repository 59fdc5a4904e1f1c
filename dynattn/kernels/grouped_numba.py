"""Grouped attention on the CPU (DGT-2): the queries of a group meet the keys that it selected, wherever these lie.

A worker sorts the queries of a head by their groups (a counting sort); query blocks of a group then meet its keys as in
`tiles_numba`. Nothing is gathered before: the matrix products read rows by their numbers, and add to rows by their
numbers, which is why the keys of a group must be distinct. All groups of a head are one worker's: keys that several
groups selected collect their gradients without locks, in one order.
"""

import numpy as np
import torch
from torch import Tensor

from dynattn.kernels.grouped import look_of_out
from dynattn.kernels.indices import check
from dynattn.kernels.indices_numba import distinct_rows
from dynattn.kernels.simd import (
    LANES,
    compiled,
    exp2,
    lanes_of,
    largest,
    load,
    maximum,
    multiply,
    multiply_add,
    padded,
    prefetch,
    product,
    ramp,
    store,
    total,
    transpose,
)
from dynattn.kernels.threads import as_arrays, in_parallel, working_dtype
from dynattn.kernels.tiles_numba import LOG2E, LOWEST, add_block, slopes_of_logits

FEW = 4  # queries of a block, for which it pays to have the keys in the lanes
QUERIES, KEYS = 64, 104  # of a query block, of a key block: most groups are one, and the paper's 98 keys are one
ROOM = QUERIES + LANES  # numbers in a row of logits: a power of two would use few sets of the cache


@compiled
def sort_by_group(groups, order, first):
    """order: queries by group, in their own order within one; group j has places first[j] to first[j + 1] - 1."""
    first[:] = 0
    for l in range(groups.size):
        first[groups[l] + 1] += 1
    for j in range(1, first.size):
        first[j] += first[j - 1]
    place = first.copy()
    for l in range(groups.size):
        order[place[groups[l]]] = l
        place[groups[l]] += 1


@compiled
def take(matrix, numbers, block):
    """Rows of a matrix side by side; what stands in the block behind their channels stays."""
    d, lanes = matrix.shape[1], lanes_of(matrix)
    whole = d - d % lanes
    for i in range(numbers.size):
        for c in range(0, whole, lanes):
            store(block, (i, c), load(matrix, (numbers[i], c)))
        for c in range(whole, d):
            block[i, c] = matrix[numbers[i], c]


@compiled
def give(block, factors, matrix, numbers):
    """The rows of a block, each with its factor, to rows of a matrix."""
    d, lanes = matrix.shape[1], lanes_of(matrix)
    whole = d - d % lanes
    for i in range(numbers.size):
        for c in range(0, whole, lanes):
            store(matrix, (numbers[i], c), load(block, (i, c)) * factors[i])
        for c in range(whole, d):
            matrix[numbers[i], c] = block[i, c] * factors[i]


@compiled
def few_read(q_rows, keys, values, numbers, turned, scores, row_max, row_sum, accumulator, first):
    """Let a few queries (count, d) read a key block, a key in each lane: accumulator (count, d) grows.

    In `tiles_numba.add_block` a query has a lane, and most of these would be idle.
    """
    lanes, block, wide = lanes_of(scores), numbers.size, padded(numbers.size)
    transpose((keys, numbers), turned.dtype.type(1), turned)
    multiply(q_rows, turned[:, :wide], scores[: q_rows.shape[0], :wide])
    for t in range(q_rows.shape[0]):
        scores[t, block:wide] = LOWEST
        top = load(scores, (t, 0))
        for a in range(lanes, wide, lanes):
            top = maximum(top, load(scores, (t, a)))
        new = largest(top) if first else max(row_max[t], largest(top))
        sums = ramp(scores, 0, 0)
        for a in range(0, wide, lanes):
            weights = exp2(load(scores, (t, a)) - new)
            store(scores, (t, a), weights)
            sums = sums + weights
        if first:
            row_sum[t] = total(sums)
        else:
            factor = np.exp2(row_max[t] - new)
            row_sum[t] = row_sum[t] * factor + total(sums)
            for c in range(0, accumulator.shape[1], lanes):
                store(accumulator, (t, c), load(accumulator, (t, c)) * factor)
        row_max[t] = new
    product(scores[: q_rows.shape[0], :block], (values, numbers), accumulator, not first)


@compiled
def forward_heads(begin, end, q, k, v, groups, selected, lengths, scale, out, statistics):
    """Heads begin to end - 1 of all (batch, head): out, and row maximum and row sum of each softmax.

    Where registers do not fit the channels, the rows that vectors read are taken side by side, with zeros behind.
    """
    (_, h, L, d), G, dtype = q.shape, selected.shape[2], out.dtype
    one, to_logits, D = dtype.type(1), dtype.type(scale * LOG2E), padded(d)
    order, first = np.empty(L, np.int64), np.empty(G + 1, np.int64)
    q_block, scores = np.empty((D, QUERIES), dtype), np.empty((KEYS, ROOM), dtype)
    q_rows, v_rows, accumulator = (
        np.zeros((QUERIES, D), dtype),
        np.zeros((KEYS, D), dtype),
        np.empty((QUERIES, D), dtype),
    )
    turned, scores_of_few = np.empty((D, padded(KEYS)), dtype), np.empty((FEW, padded(KEYS)), dtype)
    row_max, row_sum, rescale = np.empty(QUERIES, dtype), np.empty(QUERIES, dtype), np.empty(QUERIES, dtype)
    for item in range(begin, end):
        b, m = divmod(item, h)
        queries, keys, values = q[b, m], k[b, m], v[b, m]
        for matrix in (queries, keys, values):  # most rows will be read, in no order that the processor could foresee
            prefetch(matrix)
        sort_by_group(groups[b, m], order, first)
        for j in range(G):
            for t0 in range(first[j], first[j + 1], QUERIES):
                query_block = order[t0 : min(t0 + QUERIES, first[j + 1])]
                count, T = query_block.size, padded(query_block.size)
                few = count <= FEW and d == D
                if few:
                    for t in range(count):
                        for c in range(d):
                            q_rows[t, c] = queries[query_block[t], c] * to_logits
                elif d == D:
                    transpose((queries, query_block), to_logits, q_block)
                else:
                    take(queries, query_block, q_rows)
                    transpose(q_rows[:count], to_logits, q_block)
                for a in range(0, lengths[b, m, j], KEYS):
                    key_block = selected[b, m, j, a : min(a + KEYS, lengths[b, m, j])]
                    block, sums = key_block.size, (row_max, row_sum, rescale, accumulator)
                    if few:
                        sums_of_few = row_max, row_sum, accumulator[:count]
                        few_read(q_rows[:count], keys, values, key_block, turned, scores_of_few, *sums_of_few, a == 0)
                        continue
                    multiply((keys, key_block), q_block[:d], scores[:block, :T])
                    if d == D:
                        add_block(scores, block, count, (values, key_block), *sums, a == 0)
                    else:
                        take(values, key_block, v_rows)
                        add_block(scores, block, count, v_rows[:block], *sums, a == 0)
                for t in range(count):
                    l = query_block[t]
                    statistics[b, m, l, 0], statistics[b, m, l, 1] = row_max[t], row_sum[t]
                    rescale[t] = one / row_sum[t]
                give(accumulator, rescale, out[b, m], query_block)


@compiled
def backward_heads(begin, end, deltas, statistics, grad, q, k, v, groups, selected, lengths, scale, dq, dk, dv):
    """Gradients of heads begin to end - 1; dk and dv, zero before, collect those of all groups."""
    (_, h, L, d), G, dtype = q.shape, selected.shape[2], dq.dtype
    one, factor, to_logits = dtype.type(1), dtype.type(scale), dtype.type(scale * LOG2E)
    order, first = np.empty(L, np.int64), np.empty(G + 1, np.int64)
    q_block, grad_block = np.empty((d, QUERIES), dtype), np.empty((d, QUERIES), dtype)
    weights, slopes = np.empty((KEYS, ROOM), dtype), np.empty((KEYS, ROOM), dtype)
    row_max, share, delta = np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype)
    for item in range(begin, end):
        b, m = divmod(item, h)
        queries, keys, values, grads = q[b, m], k[b, m], v[b, m], grad[b, m]
        by_queries, by_keys, by_values = dq[b, m], dk[b, m], dv[b, m]
        for matrix in (queries, keys, values, grads, by_keys, by_values):
            prefetch(matrix)
        sort_by_group(groups[b, m], order, first)
        for j in range(G):
            for t0 in range(first[j], first[j + 1], QUERIES):
                query_block = order[t0 : min(t0 + QUERIES, first[j + 1])]
                count, T = query_block.size, padded(query_block.size)
                transpose((queries, query_block), to_logits, q_block)
                transpose((grads, query_block), factor, grad_block)  # all slopes of logits are those of q k^T
                for t in range(count):
                    l = query_block[t]
                    row_max[t], share[t] = statistics[b, m, l, 0], one / statistics[b, m, l, 1]
                    delta[t] = deltas[b, m, l] * factor
                for a in range(0, lengths[b, m, j], KEYS):
                    key_block = selected[b, m, j, a : min(a + KEYS, lengths[b, m, j])]
                    multiply((keys, key_block), q_block, weights[: key_block.size, :T])
                    multiply((values, key_block), grad_block, slopes[: key_block.size, :T])
                    slopes_of_logits(weights, slopes, key_block.size, count, row_max, share, delta)
                    multiply_add(weights[: key_block.size, :count], (grads, query_block), (by_values, key_block))
                    multiply_add(slopes[: key_block.size, :count], (queries, query_block), (by_keys, key_block))
                    product(slopes[: key_block.size, :count].T, (keys, key_block), (by_queries, query_block), a > 0)


def whole_registers(*tensors: Tensor) -> list[Tensor]:
    """With zeros behind the channels, up to a whole multiple of a register."""
    return [torch.nn.functional.pad(t, (0, more)) if (more := -t.shape[-1] % LANES) else t for t in tensors]


def forward(q, k, v, groups, selected, lengths, scale) -> list[Tensor]:
    """As the operator looks."""
    check("groups", groups, 0, selected.shape[2] - 1)
    check("selected", selected, 0, k.shape[2] - 1)
    check("lengths", lengths, 1, selected.shape[3])
    dtype, (B, h, L, _) = working_dtype(q), q.shape
    out, statistics = look_of_out(q, dtype), torch.empty(B, h, L, 2, dtype=dtype)
    indices = (t.numpy() for t in (groups, selected, lengths))
    in_parallel(forward_heads, B * h, *as_arrays(dtype, q, k, v), *indices, scale, out.numpy(), statistics.numpy())
    return [out.to(q.dtype), statistics]


def backward(grad, out, statistics, q, k, v, groups, selected, lengths, scale) -> list[Tensor]:
    """Gradients of q, k and v. Raises ValueError where a group has selected a key twice."""
    groups, selected, lengths = (t.contiguous().numpy() for t in (groups, selected, lengths))
    if not distinct_rows(selected.reshape(-1, selected.shape[3]), k.shape[2], lengths.reshape(-1)):
        raise ValueError("selected: expected distinct keys in every group, got one twice")
    dtype, (B, h, _, d) = working_dtype(q), q.shape
    deltas = torch.linalg.vecdot(grad.to(dtype), out.to(dtype))
    arrays = as_arrays(dtype, *whole_registers(grad, q, k, v))
    dq, *others = (array.shape for array in arrays[1:])
    gradients = torch.empty(dq, dtype=dtype), *(torch.zeros(shape, dtype=dtype) for shape in others)
    indices, found = (groups, selected, lengths), (t.numpy() for t in gradients)
    in_parallel(backward_heads, B * h, *as_arrays(dtype, deltas, statistics), *arrays, *indices, scale, *found)
    return [t[..., :d].contiguous().to(q.dtype) for t in gradients]
