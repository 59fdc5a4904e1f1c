"""Bilinear reads at fractional positions on CUDA devices (DAT-8). All sums have one order: there are no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS, POINTS, CELLS = 32, 32, 64


@triton.jit
def places(points, n, N, H, W):
    """Rows and columns of points in pixels; outside the map for what is behind the last point."""
    row = tl.load(points + 2 * n, mask=n < N, other=-3.0)
    col = tl.load(points + 2 * n + 1, mask=n < N, other=-3.0)
    return (row + 1) * (H - 1) / 2, (col + 1) * (W - 1) / 2, n < N


@triton.jit
def reads(x, rows, cols, channels, near, C, H, W):
    """(channels, points): the four cells around each place, zeros outside, and how far behind the first it lies."""
    above, left = tl.floor(rows), tl.floor(cols)
    i, j = above.to(tl.int32), left.to(tl.int32)
    near = near & (rows >= -1) & (rows < H) & (cols >= -1) & (cols < W)
    at = x + channels[:, None] * H * W + (i * W + j)[None, :]
    inside = (channels < C)[:, None]
    a = tl.load(at, mask=inside & (near & (i >= 0) & (j >= 0))[None, :], other=0.0)
    b = tl.load(at + 1, mask=inside & (near & (i >= 0) & (j + 1 < W))[None, :], other=0.0)
    c = tl.load(at + W, mask=inside & (near & (i + 1 < H) & (j >= 0))[None, :], other=0.0)
    d = tl.load(at + W + 1, mask=inside & (near & (i + 1 < H) & (j + 1 < W))[None, :], other=0.0)
    number = rows.dtype
    return a.to(number), b.to(number), c.to(number), d.to(number), (rows - above)[None, :], (cols - left)[None, :]


@triton.jit
def forward_program(x, points, out, C, N, H, W, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block of points in a block of channels of an image."""
    image = tl.program_id(2).to(tl.int64)
    n, channels = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows, cols, near = places(points + image * N * 2, n, N, H, W)
    a, b, c, d, low, right = reads(x + image * C * H * W, rows, cols, channels, near, C, H, W)
    value = (1 - low) * ((1 - right) * a + right * b) + low * ((1 - right) * c + right * d)  # DAT-8
    at = out + image * C * N + channels[:, None] * N + n[None, :]
    tl.store(at, value, mask=(channels < C)[:, None] & (n < N)[None, :])


@triton.jit
def slopes_of_points(x, points, grad, dpoints, C, N, H, W, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block of points of an image: the sum over its channels."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols, near = places(points + image * N * 2, n, N, H, W)
    by_row, by_col = tl.zeros((BLOCK_N,), rows.dtype), tl.zeros((BLOCK_N,), rows.dtype)
    for first in range(0, C, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        a, b, c, d, low, right = reads(x + image * C * H * W, rows, cols, channels, near, C, H, W)
        at = grad + image * C * N + channels[:, None] * N + n[None, :]
        slope = tl.load(at, mask=(channels < C)[:, None] & (n < N)[None, :], other=0.0).to(rows.dtype)
        by_row += tl.sum(slope * ((1 - right) * (c - a) + right * (d - b)), 0)
        by_col += tl.sum(slope * ((1 - low) * (b - a) + low * (d - c)), 0)
    at = dpoints + (image * N + n) * 2
    tl.store(at, by_row * (H - 1) / 2, mask=n < N)
    tl.store(at + 1, by_col * (W - 1) / 2, mask=n < N)


@triton.jit
def slopes_of_cells(
    points, grad, dx, C, N, H, W,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A block of cells in a block of channels of an image: grad times the matrix of bilinear weights."""
    image = tl.program_id(2).to(tl.int64)
    cells = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    number = dx.dtype.element_ty
    summed = tl.zeros((BLOCK_C, BLOCK_S), tl.float64 if number == tl.float64 else tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        rows, cols, near = places(points + image * N * 2, n, N, H, W)
        by_row = tl.maximum(1 - tl.abs(rows[:, None] - (cells // W)[None, :]), 0)
        by_col = tl.maximum(1 - tl.abs(cols[:, None] - (cells % W)[None, :]), 0)
        at = grad + image * C * N + channels[:, None] * N + n[None, :]
        slope = tl.load(at, mask=(channels < C)[:, None] & near[None, :], other=0.0)
        weights = tl.where(near[:, None], by_row * by_col, 0.0)
        summed = tl.dot(slope.to(weights.dtype), weights, summed, input_precision="ieee", out_dtype=summed.dtype)
    at = dx + image * C * H * W + channels[:, None] * H * W + cells[None, :]
    tl.store(at, summed, mask=(channels < C)[:, None] & (cells < H * W)[None, :])


def precise(points: Tensor, x: Tensor) -> Tensor:
    """Points in the dtype that places are computed in: at least float32."""
    return points.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def forward(x, points) -> list[Tensor]:
    """out (B, C, N)."""
    (B, C, H, W), N = x.shape, points.shape[1]
    out = x.new_empty(B, C, N)
    grid = triton.cdiv(N, POINTS), triton.cdiv(C, CHANNELS), B
    forward_program[grid](x.contiguous(), precise(points, x), out, C, N, H, W, BLOCK_C=CHANNELS, BLOCK_N=POINTS)
    return [out]


def backward(grad, out, x, points) -> list[Tensor]:
    """Gradients of x and points."""
    (B, C, H, W), N = x.shape, points.shape[1]
    x, grad, sizes = x.contiguous(), grad.contiguous(), (C, N, H, W)
    dx, places_ = torch.empty_like(x), precise(points, x)
    dpoints = torch.empty_like(places_)
    blocks = {"BLOCK_C": CHANNELS, "BLOCK_N": POINTS}
    slopes_of_points[triton.cdiv(N, POINTS), B](x, places_, grad, dpoints, *sizes, **blocks)
    grid = triton.cdiv(H * W, CELLS), triton.cdiv(C, CHANNELS), B
    slopes_of_cells[grid](places_, grad, dx, *sizes, BLOCK_S=CELLS, **blocks)
    return [dx, dpoints.to(points.dtype)]
