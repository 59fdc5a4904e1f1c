"""Groups and their keys on the CPU (DGT-1), without writing out and sorting what every centroid likes.

What the centroids like stands as (keys, groups), a group in each lane. The n-th largest number of 16 groups is found at
once, by halving the interval that it lies in; then one walk over the keys collects what is larger, and of what is equal
the first.
"""

import numpy as np
import torch
from torch import Tensor

from dynattn.kernels.simd import (
    bits_at_least,
    compiled,
    lanes_of,
    load,
    maximum,
    multiply,
    padded,
    ramp,
    store,
    where_at_least,
)
from dynattn.kernels.threads import as_arrays, in_parallel, working_dtype

QUERIES = 96  # of a tile
LARGEST = 3e38  # that is halved


@compiled
def transposed(centroids, target):
    """target (d, groups) of centroids (G, d); what is behind the last group stays zero."""
    for j in range(centroids.shape[0]):
        for c in range(centroids.shape[1]):
            target[c, j] = centroids[j, c]


@compiled
def assign_heads(begin, end, q, centroids, groups):
    """Heads begin to end - 1 of all (batch, head): argmax_j e_j . q_i, of equals the first."""
    (_, h, L, d), G = q.shape, centroids.shape[1]
    e, likes = np.zeros((d, padded(G)), centroids.dtype), np.empty((QUERIES, padded(G)), centroids.dtype)
    for item in range(begin, end):
        b, m = divmod(item, h)
        transposed(centroids[m], e)
        for l in range(0, L, QUERIES):
            count = min(QUERIES, L - l)
            multiply(q[b, m, l : l + count], e, likes[:count])
            for t in range(count):
                best, most = 0, -np.inf
                for j in range(G):
                    if likes[t, j] > most:  # NaN is not
                        best, most = j, likes[t, j]
                groups[b, m, l + t] = best


@compiled
def nth_largest(likes, n, j, low, high):
    """low[j:]: the n-th largest number of a register of columns; low and high are numbers that stand in the column."""
    lanes = lanes_of(likes)
    S = likes.shape[0]
    bottom = top = load(likes, (0, j))
    for i in range(1, S):
        x = load(likes, (i, j))
        top = maximum(top, x)
        bottom = where_at_least(x, bottom, bottom, x)
    store(low, j, bottom)
    store(high, j, top)
    one, none, half = ramp(likes, 1, 0), ramp(likes, 0, 0), likes.dtype.type(0.5)
    largest = likes.dtype.type(LARGEST)
    middles, counts = np.empty(lanes, likes.dtype), np.empty(lanes, likes.dtype)
    aboves, belows = np.empty(lanes, likes.dtype), np.empty(lanes, likes.dtype)
    open_lanes = True
    while open_lanes:
        for lane in range(lanes):
            # In the dtype of the column: between neighbouring numbers it must not be rounded after it is compared.
            least, most = max(low[j + lane], -largest), min(high[j + lane], largest)  # of what may be infinite
            middle = least * half + most * half  # their difference may be too large for a number
            middles[lane] = middle if low[j + lane] < middle < high[j + lane] else high[j + lane]
        middle, count, above, below = load(middles, 0), none, top, bottom
        for i in range(S):
            x = load(likes, (i, j))
            count = count + where_at_least(x, middle, one, none)
            near = where_at_least(x, middle, x, top)
            above = where_at_least(above, near, near, above)  # the smallest that is not below the middle
            below = maximum(below, where_at_least(x, middle, bottom, x))  # the largest that is
        store(counts, 0, count)
        store(aboves, 0, above)
        store(belows, 0, below)
        open_lanes = False
        for lane in range(lanes):
            if low[j + lane] < high[j + lane]:
                if counts[lane] >= n:
                    low[j + lane] = aboves[lane]
                    if counts[lane] == n:
                        high[j + lane] = aboves[lane]
                else:
                    high[j + lane] = belows[lane]
                open_lanes = open_lanes or low[j + lane] < high[j + lane]


@compiled
def select_heads(begin, end, k, centroids, selected):
    """Heads begin to end - 1: the keys that each centroid likes best, in the order of the map."""
    (_, h, S, d), (G, n) = k.shape, selected.shape[2:]
    dtype, width = centroids.dtype, padded(centroids.shape[1])
    lanes = lanes_of(centroids)
    e, likes = np.zeros((d, width), dtype), np.empty((S, width), dtype)
    low, high, larger = np.empty(width, dtype), np.empty(width, dtype), np.empty(width, dtype)
    place, equals = np.empty(width, np.int64), np.empty(width, np.int64)
    for item in range(begin, end):
        b, m = divmod(item, h)
        transposed(centroids[m], e)
        multiply(k[b, m], e, likes)
        lowest, one, none = ramp(likes, -np.inf, 0), ramp(likes, 1, 0), ramp(likes, 0, 0)
        for i in range(S):
            for j in range(0, width, lanes):
                store(likes, (i, j), maximum(lowest, load(likes, (i, j))))
        for j in range(0, width, lanes):
            nth_largest(likes, n, j, low, high)
        place[:] = 0
        for j0 in range(0, width, lanes):  # of those equal to the n-th largest, as many as those above leave room for
            bound, above = load(low, j0), ramp(likes, 0, 0)
            for i in range(S):
                above = above + where_at_least(bound, load(likes, (i, j0)), none, one)
            store(larger, j0, above)
        for j in range(G):
            equals[j] = n - int(larger[j])
        for i in range(S):
            for j0 in range(0, width, lanes):
                bits, j = bits_at_least(load(likes, (i, j0)), load(low, j0)), j0
                while bits and j < G:
                    if bits & 1:
                        if likes[i, j] > low[j] or equals[j] > 0:
                            if likes[i, j] == low[j]:
                                equals[j] -= 1
                            selected[b, m, j, place[j]] = i
                            place[j] += 1
                    bits >>= 1
                    j += 1


def assign(q: Tensor, centroids: Tensor) -> Tensor:
    """Groups (B, h, L) of queries (B, h, L, d) by centroids (h, G, d)."""
    groups = torch.empty(q.shape[:3], dtype=torch.int64)
    arrays = as_arrays(working_dtype(q), q, centroids.contiguous())
    in_parallel(assign_heads, q.shape[0] * q.shape[1], *arrays, groups.numpy())
    return groups


def select(k: Tensor, centroids: Tensor, n: int) -> Tensor:
    """Keys (B, h, G, n) of each group, of keys (B, h, S, d) by centroids (h, G, d)."""
    selected = torch.empty(*k.shape[:2], centroids.shape[1], n, dtype=torch.int64)
    arrays = as_arrays(working_dtype(k), k, centroids.contiguous())
    in_parallel(select_heads, k.shape[0] * k.shape[1], *arrays, selected.numpy())
    return selected
