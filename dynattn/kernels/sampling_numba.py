"""Bilinear reads at fractional positions on the CPU (DAT-8): a point's neighbours are found once for all channels."""

import math

import numpy as np
import torch
from torch import Tensor

from dynattn.kernels.simd import compiled
from dynattn.kernels.threads import as_arrays, in_parallel, working_dtype

CHANNELS = 16  # of an item of work


@compiled
def neighbours(place, size):
    """Two cells and how much of each a position reads: zero outside [0, size), NaN for a position that is no number."""
    if not -1 <= place < size:
        nothing = math.nan if math.isnan(place) or math.isinf(place) else 0.0
        return 0, 0, nothing, nothing, 0.0, 0.0
    low = math.floor(place)
    part = place - low
    before, after = 1.0 if low >= 0 else 0.0, 1.0 if low + 1 < size else 0.0
    return max(low, 0), min(low + 1, size - 1), (1 - part) * before, part * after, before, after


@compiled
def find_cells(points, H, W, cells, weights, edges):
    """Of every point the rows and columns that it reads (N, 4), their weights, and whether they are on the map."""
    for n in range(points.shape[0]):
        row, col = (points[n, 0] + 1) * (H - 1) / 2, (points[n, 1] + 1) * (W - 1) / 2
        cells[n, 0], cells[n, 1], weights[n, 0], weights[n, 1], edges[n, 0], edges[n, 1] = neighbours(row, H)
        cells[n, 2], cells[n, 3], weights[n, 2], weights[n, 3], edges[n, 2], edges[n, 3] = neighbours(col, W)


@compiled
def forward_items(begin, end, x, points, out):
    """Items begin to end - 1 of all (image, block of channels)."""
    (_, C, H, W), N = x.shape, points.shape[1]
    blocks = (C + CHANNELS - 1) // CHANNELS
    cells, weights, edges = np.empty((N, 4), np.int64), np.empty((N, 4), out.dtype), np.empty((N, 4), out.dtype)
    for item in range(begin, end):
        b, block = divmod(item, blocks)
        find_cells(points[b], H, W, cells, weights, edges)
        for c in range(block * CHANNELS, min(C, (block + 1) * CHANNELS)):
            for n in range(N):
                if weights[n, 0] + weights[n, 1] == 0 or weights[n, 2] + weights[n, 3] == 0:  # nothing, not 0 x cell 0
                    out[b, c, n] = 0
                    continue
                top, bottom, left, right = cells[n, 0], cells[n, 1], cells[n, 2], cells[n, 3]
                above = weights[n, 2] * x[b, c, top, left] + weights[n, 3] * x[b, c, top, right]
                below = weights[n, 2] * x[b, c, bottom, left] + weights[n, 3] * x[b, c, bottom, right]
                out[b, c, n] = weights[n, 0] * above + weights[n, 1] * below  # DAT-8


@compiled
def backward_items(begin, end, grad, x, points, dx, dplaces):
    """Gradients of items begin to end - 1; those by the places (row, col) apart for each block of channels."""
    (_, C, H, W), N = x.shape, points.shape[1]
    blocks = (C + CHANNELS - 1) // CHANNELS
    cells, weights, edges = np.empty((N, 4), np.int64), np.empty((N, 4), dx.dtype), np.empty((N, 4), dx.dtype)
    for item in range(begin, end):
        b, block = divmod(item, blocks)
        find_cells(points[b], H, W, cells, weights, edges)
        for c in range(block * CHANNELS, min(C, (block + 1) * CHANNELS)):
            for n in range(N):
                if edges[n, 0] + edges[n, 1] == 0 or edges[n, 2] + edges[n, 3] == 0:
                    continue
                top, bottom, left, right = cells[n, 0], cells[n, 1], cells[n, 2], cells[n, 3]
                slope = grad[b, c, n]
                dx[b, c, top, left] += slope * weights[n, 0] * weights[n, 2]
                dx[b, c, top, right] += slope * weights[n, 0] * weights[n, 3]
                dx[b, c, bottom, left] += slope * weights[n, 1] * weights[n, 2]
                dx[b, c, bottom, right] += slope * weights[n, 1] * weights[n, 3]
                above = weights[n, 2] * x[b, c, top, left] + weights[n, 3] * x[b, c, top, right]
                below = weights[n, 2] * x[b, c, bottom, left] + weights[n, 3] * x[b, c, bottom, right]
                before = weights[n, 0] * x[b, c, top, left] + weights[n, 1] * x[b, c, bottom, left]
                after = weights[n, 0] * x[b, c, top, right] + weights[n, 1] * x[b, c, bottom, right]
                dplaces[b, block, n, 0] += slope * (below * edges[n, 1] - above * edges[n, 0])
                dplaces[b, block, n, 1] += slope * (after * edges[n, 3] - before * edges[n, 2])


def forward(x, points) -> list[Tensor]:
    """out (B, C, N)."""
    dtype = working_dtype(x)
    B, C, N = *x.shape[:2], points.shape[1]
    out = torch.empty(B, C, N, dtype=dtype)
    in_parallel(forward_items, B * -(-C // CHANNELS), *as_arrays(dtype, x, points), out.numpy())
    return [out.to(x.dtype)]


def backward(grad, out, x, points) -> list[Tensor]:
    """Gradients of x and points."""
    dtype = working_dtype(x)
    (B, C, H, W), N = x.shape, points.shape[1]
    blocks = -(-C // CHANNELS)
    dx, dplaces = torch.zeros(x.shape, dtype=dtype), torch.zeros(B, blocks, N, 2, dtype=dtype)
    in_parallel(backward_items, B * blocks, *as_arrays(dtype, grad, x, points), dx.numpy(), dplaces.numpy())
    size = torch.tensor([H, W], dtype=dtype)
    return [dx.to(x.dtype), (dplaces.sum(1) * (size - 1) / 2).to(points.dtype)]
