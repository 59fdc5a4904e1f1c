"""Deformable attention on the CPU (DAT-9): the bias is read from the table where it is added, and never stored.

A query block meets a key block at a time, as in flash attention: logits (keys, queries) in the first-level cache, one
query a lane, so that the softmax runs over whole vectors. Along a row of queries the place in the bias table
moves in even steps, from key to key only its start differs: neighbours read neighbours, and one bilinear read is four
vector loads. A worker does all of a head by itself: gradients need no locks, and sums have one order.
"""

import math

import numpy as np
import torch
from torch import Tensor

from dynattn.kernels.deformable import table_places
from dynattn.kernels.simd import (
    LANES,
    compiled,
    lanes_of,
    leading,
    load,
    multiply,
    multiply_add,
    padded,
    ramp,
    shifted,
    store,
    total,
)
from dynattn.kernels.threads import as_arrays, in_parallel, working_dtype
from dynattn.kernels.tiles_numba import KEYS, LOG2E, LOWEST, QUERIES, ROOM, add_block, copy, slopes_of_logits

NOWHERE = -9  # the cell of what is not read
MARGIN = 2  # zeros around a table: one cell where the border fades, one for rounding

# ---------------------------------------------------------------------------------------------------------------------
# Where queries read the table
# ---------------------------------------------------------------------------------------------------------------------


def padded_tables(table: Tensor | None, heads: int, dtype: torch.dtype) -> np.ndarray:
    """Each head's table in units of log2, with a margin of zeros and room for the last vector; empty for no table."""
    if table is None:
        return np.zeros((heads, 0, 0), torch.zeros((), dtype=dtype).numpy().dtype)
    margin = (MARGIN, MARGIN + LANES, MARGIN, MARGIN)
    return torch.nn.functional.pad((table.detach().to(dtype) * LOG2E).clamp(min=LOWEST), margin).numpy()


@compiled
def inside(start, step, length, size):
    """The part [begin, end) of range(length) in which -1 <= start + step * j < size: where a read is not zero."""
    if step == 0:
        return 0, (length if -1 <= start < size else 0)
    begin = math.ceil(min(max((-1 - start) / step, 0.0), float(length)))
    end = math.ceil(min(max((size - start) / step, float(begin)), float(length)))
    return begin, end


@compiled
def find_runs(places, step, width, cols, first, cell, part):
    """Cut a row of queries, for each key n, into runs whose neighbours read neighbouring columns of the table.

    Run r of key n starts at query column first[n, r], which reads table column cell[n, r] and `part` of the way to the
    next. Where a run reads nothing its cell is NOWHERE, and its part 0 (NaN for a place that is no number). Behind the
    last run stands the width. At the paper's sizes there are two: queries lie a little closer together than cells.
    """
    for n in range(places.shape[0]):
        if not math.isfinite(places[n, 0] + places[n, 1]):
            first[n, 0], cell[n, 0], part[n, 0], first[n, 1] = 0, NOWHERE, math.nan, width
            continue
        begin, end = inside(places[n, 1], step, width, cols)
        r, j = 0, begin
        if begin > 0:
            first[n, 0], cell[n, 0], part[n, 0] = 0, NOWHERE, 0
            r = 1
        while j < end:
            col = places[n, 1] + step * j
            left = math.floor(col)
            first[n, r], cell[n, r], part[n, r] = j, left, col - left
            # from query to query the part grows by step - 1; the run goes on while it is in [0, 1)
            room = math.inf if step == 1 else (part[n, r] if step < 1 else part[n, r] - 1) / (1 - step)
            j = end if room >= end - j - 1 else j + int(room) + 1
            r += 1
        if end < width:
            first[n, r], cell[n, r], part[n, r] = end, NOWHERE, 0
            r += 1
        first[n, r] = width


@compiled
def row_place(place, step, i, rows):
    """The table row above query row i, and how far below it that lies; NOWHERE if nothing is read there."""
    row = place + step * i
    if not -1 <= row < rows:
        return NOWHERE, 0.0
    above = math.floor(row)
    return above, row - above


@compiled
def read_bias(table, places, step, runs, keys, i, j, stop, bias, t):
    """bias[n, t : t + stop - j] = phi(B^; R) of query columns j to stop - 1 in row i, for each key n (DAT-9, DAT-8).

    Vectors write over the end of each run; what comes next writes there again.
    """
    first, cell, part = runs
    lanes, rows = lanes_of(bias), table.shape[0] - 2 * MARGIN
    for n in range(keys[0], keys[1]):
        line = n - keys[0]
        above, low = row_place(places[n, 0], step[0], i, rows)
        r, begin = 0, j
        while begin < stop:
            while first[n, r + 1] <= begin:
                r += 1
            end = min(first[n, r + 1], stop)
            at = t + begin - j
            if above == NOWHERE or cell[n, r] == NOWHERE:
                for u in range(0, end - begin, lanes):
                    store(bias, (line, at + u), ramp(bias, part[n, r] * 0, 0))
            else:
                ahead = begin - first[n, r]
                y, x = above + MARGIN, cell[n, r] + MARGIN + ahead
                share, more = ramp(bias, part[n, r] + (step[1] - 1) * ahead, step[1] - 1), (step[1] - 1) * lanes
                for u in range(0, end - begin, lanes):
                    near, far = load(table, (y, x + u)), load(table, (y, x + u + 1))
                    near = near + (load(table, (y + 1, x + u)) - near) * low
                    far = far + (load(table, (y + 1, x + u + 1)) - far) * low
                    store(bias, (line, at + u), near + (far - near) * share)
                    share = share + more
            begin = end


@compiled
def spread_bias(table, places, step, runs, keys, i, j, stop, slopes, t, table_slopes, place_slopes):
    """The backward of `read_bias`: adds what the slopes of the logits mean for the table and for each key's place."""
    first, cell, part = runs
    lanes, rows = lanes_of(slopes), table.shape[0] - 2 * MARGIN
    for n in range(keys[0], keys[1]):
        line = n - keys[0]
        above, low = row_place(places[n, 0], step[0], i, rows)
        if above == NOWHERE:
            continue
        by_row, by_col = ramp(slopes, 0, 0), ramp(slopes, 0, 0)
        r, begin = 0, j
        while begin < stop:
            while first[n, r + 1] <= begin:
                r += 1
            end = min(first[n, r + 1], stop)
            at = t + begin - j
            if cell[n, r] != NOWHERE:
                ahead = begin - first[n, r]
                y, x = above + MARGIN, cell[n, r] + MARGIN + ahead
                share, more = ramp(slopes, part[n, r] + (step[1] - 1) * ahead, step[1] - 1), (step[1] - 1) * lanes
                before = ramp(slopes, 0, 0)
                for u in range(0, end - begin + 1, lanes):
                    slope = leading(load(slopes, (line, at + u)), end - begin - u)
                    near, far = load(table, (y, x + u)), load(table, (y, x + u + 1))
                    down_near, down_far = load(table, (y + 1, x + u)) - near, load(table, (y + 1, x + u + 1)) - far
                    by_row = by_row + slope * (down_near + (down_far - down_near) * share)
                    by_col = by_col + slope * (far + down_far * low - near - down_near * low)
                    right = slope * share
                    to_cell = slope - right + shifted(before, right)
                    store(table_slopes, (y, x + u), load(table_slopes, (y, x + u)) + to_cell * (1 - low))
                    store(table_slopes, (y + 1, x + u), load(table_slopes, (y + 1, x + u)) + to_cell * low)
                    before = right
                    share = share + more
            begin = end
        place_slopes[n, 0] += total(by_row)
        place_slopes[n, 1] += total(by_col)


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


@compiled
def logits(q_block, k, table, places, step, runs, key_block, first_query, count, width, scores):
    """scores[n, t] = (q k^T + bias) in units of log2 for a query block (d, queries) and a key block, from-to."""
    begin, end = key_block
    k_block, scores_of_block = k[begin:end], scores[: end - begin, : q_block.shape[1]]
    if not table.size:
        multiply(k_block, q_block, scores_of_block)
        return
    t = 0
    while t < count:  # a row of queries after the other
        i, j = divmod(first_query + t, width)
        stop = min(width, j + count - t)
        read_bias(table, places, step, runs, key_block, i, j, stop, scores, t)
        t += stop - j
    multiply_add(k_block, q_block, scores_of_block)


@compiled
def forward_heads(begin, end, q, k, v, tables, places, step, width, scale, out, statistics):
    """Heads begin to end - 1 of all (batch, head): out, and row maximum and row sum of each softmax."""
    (_, h, L, d), N, G = q.shape, k.shape[2], places.shape[1]
    dtype, D = out.dtype, padded(d)
    one, to_logits = dtype.type(1), dtype.type(scale * LOG2E)
    values, accumulator = np.zeros((N, D), dtype), np.empty((QUERIES, D), dtype)
    q_block, scores = np.zeros((d, QUERIES), dtype), np.empty((KEYS, ROOM), dtype)
    row_max, row_sum, rescale = np.empty(QUERIES, dtype), np.empty(QUERIES, dtype), np.empty(QUERIES, dtype)
    runs = room_for_runs(N, width)
    for item in range(begin, end):
        b, m = divmod(item, h)
        g = m * G // h
        copy(v[b, m], one, values)
        if tables.size:
            find_runs(places[b, g], step[1], width, columns_of(tables), *runs)
        for l in range(0, L, QUERIES):
            count = min(QUERIES, L - l)
            T = padded(count)
            copy(q[b, m, l : l + count].T, to_logits, q_block)
            for n in range(0, N, KEYS):
                key_block = n, min(n + KEYS, N)
                logits(q_block[:, :T], k[b, m], tables[m], places[b, g], step, runs, key_block, l, count, width, scores)
                v_block = values[n : key_block[1]]
                block = key_block[1] - n
                add_block(scores, block, count, v_block, row_max, row_sum, rescale, accumulator, n == 0)
            for t in range(count):
                statistics[b, m, l + t, 0], statistics[b, m, l + t, 1] = row_max[t], row_sum[t]
                share = one / row_sum[t]
                for c in range(d):
                    out[b, m, l + t, c] = accumulator[t, c] * share


@compiled
def backward_heads(
    begin, end, grad, deltas, statistics, q, k, v, tables, places, step, width, scale, dq, dk, dv, dplaces, dtables
):
    """Gradients of heads begin to end - 1, all five; those by places and tables apart for each head."""
    (_, h, L, d), N, G = q.shape, k.shape[2], places.shape[1]
    dtype, D = dq.dtype, padded(d)
    one, factor, to_logits = dtype.type(1), dtype.type(scale), dtype.type(scale * LOG2E)
    keys, key_slopes, value_slopes = np.zeros((N, D), dtype), np.empty((N, D), dtype), np.empty((N, D), dtype)
    queries, query_slopes = np.zeros((QUERIES, D), dtype), np.empty((QUERIES, D), dtype)
    grads, table_slopes = np.zeros((QUERIES, D), dtype), np.empty(tables.shape[1:], dtype)
    q_block, grad_block = np.zeros((d, QUERIES), dtype), np.zeros((d, QUERIES), dtype)
    weights, slopes = np.empty((KEYS, ROOM), dtype), np.empty((KEYS, ROOM), dtype)
    row_max, share, delta = np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype), np.zeros(QUERIES, dtype)
    runs = room_for_runs(N, width)
    for item in range(begin, end):
        b, m = divmod(item, h)
        g = m * G // h
        copy(k[b, m], one, keys)
        if tables.size:
            find_runs(places[b, g], step[1], width, columns_of(tables), *runs)
        key_slopes[:], value_slopes[:], table_slopes[:] = 0, 0, 0
        for l in range(0, L, QUERIES):
            count = min(QUERIES, L - l)
            T = padded(count)
            copy(q[b, m, l : l + count].T, to_logits, q_block)
            copy(q[b, m, l : l + count], factor, queries)
            copy(grad[b, m, l : l + count].T, one, grad_block)
            copy(grad[b, m, l : l + count], one, grads)
            query_slopes[:] = 0
            for t in range(count):
                row_max[t], share[t] = statistics[b, m, l + t, 0], one / statistics[b, m, l + t, 1]
                delta[t] = deltas[b, m, l + t]
            for n in range(0, N, KEYS):
                key_block = n, min(n + KEYS, N)
                block = key_block[1] - n
                logits(
                    q_block[:, :T], k[b, m], tables[m], places[b, g], step, runs, key_block, l, count, width, weights
                )
                multiply(v[b, m, n : key_block[1]], grad_block[:, :T], slopes[:block, :T])
                slopes_of_logits(weights, slopes, block, count, row_max, share, delta)
                multiply_add(weights[:block, :count], grads[:count], value_slopes[n : key_block[1]])
                multiply_add(slopes[:block, :count], queries[:count], key_slopes[n : key_block[1]])
                multiply_add(slopes[:block, :count].T, keys[n : key_block[1]], query_slopes[:count])
                t = 0
                while t < count and tables.size:
                    i, j = divmod(l + t, width)
                    stop = min(width, j + count - t)
                    spread_bias(
                        tables[m],
                        places[b, g],
                        step,
                        runs,
                        key_block,
                        i,
                        j,
                        stop,
                        slopes,
                        t,
                        table_slopes,
                        dplaces[b, m],
                    )
                    t += stop - j
            copy(query_slopes[:count, :d], factor, dq[b, m, l : l + count])
        copy(key_slopes[:, :d], one, dk[b, m])
        copy(value_slopes[:, :d], one, dv[b, m])
        if tables.size:
            dtables[b, m] = table_slopes[MARGIN:-MARGIN, MARGIN : -MARGIN - LANES]


@compiled
def columns_of(tables):
    """Columns of a table without its margin."""
    return tables.shape[2] - 2 * MARGIN - LANES


@compiled
def room_for_runs(N, width):
    """Empty arrays for the runs of N keys: first, cell, part."""
    shape = (N, width + 3)
    return np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


def forward(q, k, v, points, table, query_shape, query_grid, scale) -> list[Tensor]:
    """As the operator looks."""
    dtype, (B, h) = working_dtype(q), q.shape[:2]
    out, statistics = torch.empty(q.shape, dtype=dtype), torch.empty(*q.shape[:-1], 2, dtype=dtype)
    places, step, _ = (t.numpy() for t in table_places(points, table, query_shape, query_grid == "centre"))
    tables = padded_tables(table, h, dtype)
    arrays = as_arrays(dtype, q, k, v)
    in_parallel(
        forward_heads, B * h, *arrays, tables, places, step, query_shape[1], scale, out.numpy(), statistics.numpy()
    )
    return [out.to(q.dtype), statistics]


def backward(grad, out, statistics, q, k, v, points, table, query_shape, query_grid, scale) -> list[Tensor]:
    """Gradients of q, k, v, points and table."""
    dtype = working_dtype(q)
    (B, h), (G, N) = q.shape[:2], points.shape[1:3]
    dq, dk, dv = (torch.empty(t.shape, dtype=dtype) for t in (q, k, v))
    dplaces = torch.zeros(B, h, N, 2, dtype=torch.float64)
    dtables = torch.zeros(B, h, *(table.shape[1:] if table is not None else (0, 0)), dtype=dtype)
    places, step, size = (t.numpy() for t in table_places(points, table, query_shape, query_grid == "centre"))
    tables = padded_tables(table, h, dtype)
    deltas = torch.linalg.vecdot(grad.to(dtype), out.to(dtype))
    arrays = as_arrays(dtype, grad, deltas, statistics, q, k, v)
    gradients = (t.numpy() for t in (dq, dk, dv, dplaces, dtables))
    in_parallel(backward_heads, B * h, *arrays, tables, places, step, query_shape[1], scale, *gradients)
    pixels = -(torch.from_numpy(size) - 1) / 4  # of the table, for a unit of a point's position
    by_points = dplaces.unflatten(1, (G, h // G)).sum(2) * pixels / LOG2E  # the table read was in units of log2
    gradients = dq, dk, dv, by_points, *([] if table is None else [dtables.sum(0)])
    return [gradient.to(q.dtype) for gradient in gradients]
