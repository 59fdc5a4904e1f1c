"""Grouped attention on the CPU (DGT-2): the queries of a group and the keys that it selected, gathered once.

A worker sorts the queries of a head by their groups (a counting sort), and for each group copies its keys and values to
where they lie side by side; tiles of its queries then meet them as in `tiles_numba`. All groups of a head are one
worker's: keys that several groups selected collect their gradients without locks, in one order.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dynattn.kernels.frame import as_arrays, in_parallel, working_dtype
from dynattn.kernels.simd import OPTIONS, multiply, multiply_add, padded
from dynattn.kernels.tiles_numba import KEYS, LOG2E, QUERIES, ROOM, add_block, slopes_of_logits


@njit(**OPTIONS)
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


@njit(**OPTIONS)
def distinct_rows(indices, below):
    """Whether no row of (rows, n) holds a number of range(below) twice."""
    seen = np.full(below, -1)
    for row in range(indices.shape[0]):
        for a in range(indices.shape[1]):
            if seen[indices[row, a]] == row:
                return False
            seen[indices[row, a]] = row
    return True


@njit(**OPTIONS)
def gather(source, b, m, rows, begin, end, factor, target):
    """target[t] = source[b, m, rows[begin + t]] * factor."""
    for t in range(end - begin):
        row = rows[begin + t]
        for c in range(source.shape[3]):
            target[t, c] = source[b, m, row, c] * factor


@njit(**OPTIONS)
def gather_transposed(source, b, m, rows, begin, end, factor, target):
    """target[:, t] = source[b, m, rows[begin + t]] * factor."""
    for t in range(end - begin):
        row = rows[begin + t]
        for c in range(source.shape[3]):
            target[c, t] = source[b, m, row, c] * factor


@njit(**OPTIONS)
def forward_heads(begin, end, q, k, v, groups, selected, lengths, scale, out, kept):
    """Heads begin to end - 1 of all (batch, head): out, and each softmax's largest logit and sum."""
    (_, h, L, d), (G, n) = q.shape, selected.shape[2:]
    dtype, D = out.dtype, padded(q.shape[3])
    one, to_logits = dtype.type(1), dtype.type(scale * LOG2E)
    order, first = np.empty(L, np.int64), np.empty(G + 1, np.int64)
    keys, values = np.zeros((n, d), dtype), np.zeros((n, D), dtype)
    tile, scores, summed = np.zeros((d, QUERIES), dtype), np.zeros((KEYS, ROOM), dtype), np.zeros((QUERIES, D), dtype)
    top, bottom, decay = np.empty(QUERIES, dtype), np.empty(QUERIES, dtype), np.empty(QUERIES, dtype)
    for item in range(begin, end):
        b, m = divmod(item, h)
        sort_by_group(groups[b, m], order, first)
        for j in range(G):
            if first[j] == first[j + 1]:  # nobody asks
                continue
            length = lengths[b, m, j]
            gather(k, b, m, selected[b, m, j], 0, length, one, keys)
            gather(v, b, m, selected[b, m, j], 0, length, one, values)
            for t0 in range(first[j], first[j + 1], QUERIES):
                t1 = min(t0 + QUERIES, first[j + 1])
                count = t1 - t0
                gather_transposed(q, b, m, order, t0, t1, to_logits, tile)
                for a in range(0, length, KEYS):
                    block = min(KEYS, length - a)
                    multiply(keys[a : a + block], tile[:, : padded(count)], scores[:block, : padded(count)])
                    add_block(scores, block, count, values[a : a + block], top, bottom, decay, summed, a == 0)
                for t in range(count):
                    l, share = order[t0 + t], one / bottom[t]
                    kept[b, m, l, 0], kept[b, m, l, 1] = top[t], bottom[t]
                    for c in range(d):
                        out[b, m, l, c] = summed[t, c] * share


@njit(**OPTIONS)
def backward_heads(begin, end, grad, offsets, kept, q, k, v, groups, selected, lengths, scale, dq, dk, dv):
    """Gradients of heads begin to end - 1; dk and dv, zero before, collect those of all groups."""
    (_, h, L, d), (G, n) = q.shape, selected.shape[2:]
    dtype, D = dq.dtype, padded(q.shape[3])
    one, factor, to_logits = dtype.type(1), dtype.type(scale), dtype.type(scale * LOG2E)
    order, first = np.empty(L, np.int64), np.empty(G + 1, np.int64)
    keys, values = np.zeros((n, D), dtype), np.zeros((n, d), dtype)
    key_slopes, value_slopes = np.empty((n, D), dtype), np.empty((n, D), dtype)
    queries, grads = np.zeros((QUERIES, D), dtype), np.zeros((QUERIES, D), dtype)
    tile, grad_tile = np.zeros((d, QUERIES), dtype), np.zeros((d, QUERIES), dtype)
    query_slopes = np.empty((QUERIES, D), dtype)
    weights, slopes = np.zeros((KEYS, ROOM), dtype), np.zeros((KEYS, ROOM), dtype)
    top, share, offset = np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype)
    for item in range(begin, end):
        b, m = divmod(item, h)
        sort_by_group(groups[b, m], order, first)
        for j in range(G):
            if first[j] == first[j + 1]:
                continue
            length = lengths[b, m, j]
            gather(k, b, m, selected[b, m, j], 0, length, one, keys)
            gather(v, b, m, selected[b, m, j], 0, length, one, values)
            key_slopes[:], value_slopes[:] = 0, 0
            for t0 in range(first[j], first[j + 1], QUERIES):
                t1 = min(t0 + QUERIES, first[j + 1])
                count, T = t1 - t0, padded(t1 - t0)
                gather_transposed(q, b, m, order, t0, t1, to_logits, tile)
                gather_transposed(grad, b, m, order, t0, t1, one, grad_tile)
                gather(q, b, m, order, t0, t1, factor, queries)
                gather(grad, b, m, order, t0, t1, one, grads)
                query_slopes[:] = 0
                for t in range(count):
                    l = order[t0 + t]
                    top[t], share[t], offset[t] = kept[b, m, l, 0], one / kept[b, m, l, 1], offsets[b, m, l]
                for a in range(0, length, KEYS):
                    block = min(KEYS, length - a)
                    multiply(keys[a : a + block, :d], tile[:, :T], weights[:block, :T])
                    multiply(values[a : a + block], grad_tile[:, :T], slopes[:block, :T])
                    slopes_of_logits(weights, slopes, block, count, top, share, offset)
                    multiply_add(weights[:block, :count], grads[:count], value_slopes[a : a + block])
                    multiply_add(slopes[:block, :count], queries[:count], key_slopes[a : a + block])
                    multiply_add(slopes[:block, :count].T, keys[a : a + block], query_slopes[:count])
                for t in range(count):
                    l = order[t0 + t]
                    for c in range(d):
                        dq[b, m, l, c] = query_slopes[t, c] * factor
            for a in range(length):
                s = selected[b, m, j, a]
                for c in range(d):
                    dk[b, m, s, c] += key_slopes[a, c]
                    dv[b, m, s, c] += value_slopes[a, c]


def check(name: str, indices: Tensor, least: int, most: int) -> None:
    """Raise ValueError before memory is read that is not ours."""
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < least or high > most:
        raise ValueError(f"{name}: expected values from {least} to {most}, got {low if low < least else high}")


def forward(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor, lengths: Tensor, scale: float
) -> list[Tensor]:
    """out (B, h, L, d), and for the backward (B, h, L, 2): the largest logit of each softmax, and its sum."""
    check("groups", groups, 0, selected.shape[2] - 1)
    check("selected", selected, 0, k.shape[2] - 1)
    check("lengths", lengths, 1, selected.shape[3])
    dtype, (B, h) = working_dtype(q), q.shape[:2]
    out, kept = torch.empty(q.shape, dtype=dtype), torch.empty(*q.shape[:-1], 2, dtype=dtype)
    indices = (t.contiguous().numpy() for t in (groups, selected, lengths))
    in_parallel(forward_heads, B * h, *as_arrays(dtype, q, k, v), *indices, scale, out.numpy(), kept.numpy())
    return [out.to(q.dtype), kept]


def backward(
    grad: Tensor,
    out: Tensor,
    kept: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    selected: Tensor,
    lengths: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k and v."""
    dtype, (B, h) = working_dtype(q), q.shape[:2]
    gradients = torch.empty(q.shape, dtype=dtype), *(torch.zeros(t.shape, dtype=dtype) for t in (k, v))
    offsets = torch.linalg.vecdot(grad.to(dtype), out.to(dtype))
    arrays = as_arrays(dtype, grad, offsets, kept, q, k, v)
    indices = (t.contiguous().numpy() for t in (groups, selected, lengths))
    in_parallel(backward_heads, B * h, *arrays, *indices, scale, *(t.numpy() for t in gradients))
    return [t.to(q.dtype) for t in gradients]
