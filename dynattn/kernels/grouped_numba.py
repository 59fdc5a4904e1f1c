"""Grouped attention on the CPU (DGT-2): the queries of a group meet the keys that it selected, wherever these lie.

A worker sorts the queries of a head by their groups (a counting sort); tiles of a group's queries then meet its keys as
in `tiles_numba`. Nothing is gathered before: the matrix products read rows by their numbers, and add to rows by their
numbers, which is why the keys of a group must be distinct. All groups of a head are one worker's: keys that several
groups selected collect their gradients without locks, in one order.
"""

import numpy as np
import torch
from torch import Tensor

from dynattn.kernels.operators import check
from dynattn.kernels.simd import (
    LANES,
    compiled,
    lanes_of,
    load,
    multiply,
    multiply_add,
    padded,
    prefetch,
    product,
    store,
    transpose,
)
from dynattn.kernels.threads import as_arrays, in_parallel, working_dtype
from dynattn.kernels.tiles_numba import LOG2E, add_block, slopes_of_logits

QUERIES, KEYS = 64, 104  # of a tile and of a block: most groups are one tile, and the paper's 98 keys one block
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
def distinct_rows(indices, below, lengths=None):
    """Whether no row of (rows, n), or of its first `lengths`, holds a number of range(below) twice."""
    seen = np.full(below, -1)
    for row in range(indices.shape[0]):
        for a in range(indices.shape[1] if lengths is None else lengths[row]):
            if seen[indices[row, a]] == row:
                return False
            seen[indices[row, a]] = row
    return True


@compiled
def forward_heads(begin, end, q, k, v, groups, selected, lengths, scale, out, kept):
    """Heads begin to end - 1 of all (batch, head): out, and each softmax's largest logit and sum."""
    (_, h, L, d), G, dtype = q.shape, selected.shape[2], out.dtype
    one, to_logits = dtype.type(1), dtype.type(scale * LOG2E)
    order, first = np.empty(L, np.int64), np.empty(G + 1, np.int64)
    tile, scores, summed = np.empty((d, QUERIES), dtype), np.empty((KEYS, ROOM), dtype), np.empty((QUERIES, d), dtype)
    top, bottom, decay = np.empty(QUERIES, dtype), np.empty(QUERIES, dtype), np.empty(QUERIES, dtype)
    for item in range(begin, end):
        b, m = divmod(item, h)
        queries, keys, values, answers = q[b, m], k[b, m], v[b, m], out[b, m]
        for matrix in (queries, keys, values):  # most rows will be read, in no order that the processor could foresee
            prefetch(matrix)
        sort_by_group(groups[b, m], order, first)
        for j in range(G):
            for t0 in range(first[j], first[j + 1], QUERIES):
                asking = order[t0 : min(t0 + QUERIES, first[j + 1])]
                count, T = asking.size, padded(asking.size)
                transpose((queries, asking), to_logits, tile)
                for a in range(0, lengths[b, m, j], KEYS):
                    some = selected[b, m, j, a : min(a + KEYS, lengths[b, m, j])]
                    multiply((keys, some), tile, scores[: some.size, :T])
                    add_block(scores, some.size, count, (values, some), top, bottom, decay, summed, a == 0)
                for t in range(count):
                    l, share = asking[t], one / bottom[t]
                    kept[b, m, l, 0], kept[b, m, l, 1] = top[t], bottom[t]
                    for c in range(0, d, lanes_of(out)):
                        store(answers, (l, c), load(summed, (t, c)) * share)


@compiled
def backward_heads(begin, end, offsets, kept, grad, q, k, v, groups, selected, lengths, scale, dq, dk, dv):
    """Gradients of heads begin to end - 1; dk and dv, zero before, collect those of all groups."""
    (_, h, L, d), G, dtype = q.shape, selected.shape[2], dq.dtype
    one, factor, to_logits = dtype.type(1), dtype.type(scale), dtype.type(scale * LOG2E)
    order, first = np.empty(L, np.int64), np.empty(G + 1, np.int64)
    tile, grad_tile = np.empty((d, QUERIES), dtype), np.empty((d, QUERIES), dtype)
    weights, slopes = np.empty((KEYS, ROOM), dtype), np.empty((KEYS, ROOM), dtype)
    top, share, offset = np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype)
    for item in range(begin, end):
        b, m = divmod(item, h)
        queries, keys, values, grads = q[b, m], k[b, m], v[b, m], grad[b, m]
        by_queries, by_keys, by_values = dq[b, m], dk[b, m], dv[b, m]
        for matrix in (queries, keys, values, grads, by_keys, by_values):
            prefetch(matrix)
        sort_by_group(groups[b, m], order, first)
        for j in range(G):
            for t0 in range(first[j], first[j + 1], QUERIES):
                asking = order[t0 : min(t0 + QUERIES, first[j + 1])]
                count, T = asking.size, padded(asking.size)
                transpose((queries, asking), to_logits, tile)
                transpose((grads, asking), factor, grad_tile)  # all slopes of logits are those of q k^T
                for t in range(count):
                    l = asking[t]
                    top[t], share[t], offset[t] = kept[b, m, l, 0], one / kept[b, m, l, 1], offsets[b, m, l] * factor
                for a in range(0, lengths[b, m, j], KEYS):
                    some = selected[b, m, j, a : min(a + KEYS, lengths[b, m, j])]
                    multiply((keys, some), tile, weights[: some.size, :T])
                    multiply((values, some), grad_tile, slopes[: some.size, :T])
                    slopes_of_logits(weights, slopes, some.size, count, top, share, offset)
                    multiply_add(weights[: some.size, :count], (grads, asking), (by_values, some))
                    multiply_add(slopes[: some.size, :count], (queries, asking), (by_keys, some))
                    product(slopes[: some.size, :count].T, (keys, some), (by_queries, asking), a > 0)


def whole_registers(*tensors: Tensor) -> list[Tensor]:
    """With zeros behind the channels, up to a whole multiple of a register."""
    return [torch.nn.functional.pad(t, (0, more)) if (more := -t.shape[-1] % LANES) else t for t in tensors]


def forward(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor, lengths: Tensor, scale: float
) -> list[Tensor]:
    """out (B, h, L, d), and for the backward (B, h, L, 2): the largest logit of each softmax, and its sum."""
    check("groups", groups, 0, selected.shape[2] - 1)
    check("selected", selected, 0, k.shape[2] - 1)
    check("lengths", lengths, 1, selected.shape[3])
    dtype, (B, h, L, d) = working_dtype(q), q.shape
    arrays = as_arrays(dtype, *whole_registers(q, k, v))
    out, kept = torch.empty(arrays[0].shape, dtype=dtype), torch.empty(B, h, L, 2, dtype=dtype)
    indices = (t.contiguous().numpy() for t in (groups, selected, lengths))
    in_parallel(forward_heads, B * h, *arrays, *indices, scale, out.numpy(), kept.numpy())
    return [out[..., :d].contiguous().to(q.dtype), kept]


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
    """Gradients of q, k and v. Raises ValueError where a group has selected a key twice."""
    groups, selected, lengths = (t.contiguous().numpy() for t in (groups, selected, lengths))
    if not distinct_rows(selected.reshape(-1, selected.shape[3]), k.shape[2], lengths.reshape(-1)):
        raise ValueError("selected: expected distinct keys in every group, got one twice")
    dtype, (B, h, _, d) = working_dtype(q), q.shape
    offsets = torch.linalg.vecdot(grad.to(dtype), out.to(dtype))
    arrays = as_arrays(dtype, *whole_registers(grad, q, k, v))
    dq, *others = (array.shape for array in arrays[1:])
    gradients = torch.empty(dq, dtype=dtype), *(torch.zeros(shape, dtype=dtype) for shape in others)
    indices, found = (groups, selected, lengths), (t.numpy() for t in gradients)
    in_parallel(backward_heads, B * h, *as_arrays(dtype, offsets, kept), *arrays, *indices, scale, *found)
    return [t[..., :d].contiguous().to(q.dtype) for t in gradients]
