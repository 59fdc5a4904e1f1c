"""Aggregation by rank on CUDA devices (SG-2): a program has a token. All sums have one order: there are no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynattn.kernels import indices
from dynattn.kernels.aggregation import slopes_of_weights, tokens_of

CHANNELS, SLOTS = 64, 32  # of a block


@triton.jit(debug=True)  # without which there are no assertions
def check_program(order, count, N, BLOCK: tl.constexpr):
    """A block of ranks. What is wrong ends all work on the device, as where torch indexes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cell = tl.load(order + at, mask=at < count, other=0)
    tl.device_assert((cell >= 0) & (cell < N), "order: expected values from 0 to N - 1")


@triton.jit
def token(tokens, order, weight, g, image, row_of_weights, N, t):
    """Of slots of a token: the cells that they read, their weights (0 behind the last), and what the token is."""
    first, least = tl.load(tokens + 6 * g), tl.load(tokens + 6 * g + 1)
    rate, at = tl.load(tokens + 6 * g + 2), tl.load(tokens + 6 * g + 3)
    cells = tl.load(order + image * N + tl.maximum(first + t, least), mask=t < rate, other=0)
    return cells, tl.load(weight + row_of_weights + at + t, mask=t < rate, other=0.0), first, least, rate


@triton.jit
def forward_program(
    x, order, weight, bias, tokens, out, N, C, G, images, R, n,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A block of channels of a token."""
    g, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channels, w = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), image // images
    number = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    start = tl.load(bias + w * n + tl.load(tokens + 6 * g + 4)).to(number)
    summed = tl.zeros((BLOCK_C,), number) + start
    for begin in range(0, tl.load(tokens + 6 * g + 2), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        cells, weights, _, _, rate = token(tokens, order, weight, g, image, w * R, N, t)
        at = x + (image * N + cells[:, None]) * C + channels[None, :]
        values = tl.load(at, mask=(t < rate)[:, None] & (channels < C)[None, :], other=0.0)
        summed += tl.sum(values.to(number) * weights.to(number)[:, None], 0)  # SG-2
    tl.store(out + (image * G + g) * C + channels, summed, mask=channels < C)


@triton.jit
def backward_program(
    grad, x, order, weight, tokens, dx, dots, N, C, G, images, R, slots,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Of a token: slopes of the cells that it was made of, and their products with the gradient, slot by slot."""
    g, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    w, slot = image // images, tl.load(tokens + 6 * g + 5)
    number = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    repeated = tl.zeros((), number)  # weights of slots below the lowest rank, which read what the first above reads
    for begin in range(0, tl.load(tokens + 6 * g + 2), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        _, weights, first, least, rate = token(tokens, order, weight, g, image, w * R, N, t)
        repeated += tl.sum(tl.where(first + t < least, weights.to(number), 0.0), 0)
    for begin in range(0, tl.load(tokens + 6 * g + 2), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        cells, weights, first, least, rate = token(tokens, order, weight, g, image, w * R, N, t)
        own = (t < rate) & (first + t >= least)
        weights = weights.to(number) + tl.where(first + t == least, repeated, 0.0)
        products = tl.zeros((BLOCK_T,), number)
        for c in range(0, C, BLOCK_C):
            channels = c + tl.arange(0, BLOCK_C)
            slope = tl.load(grad + (image * G + g) * C + channels, mask=channels < C, other=0.0).to(number)
            at, inside = (image * N + cells[:, None]) * C + channels[None, :], (channels < C)[None, :]
            values = tl.load(x + at, mask=(t < rate)[:, None] & inside, other=0.0)
            products += tl.sum(values.to(number) * slope[None, :], 1)
            tl.store(dx + at, slope[None, :] * weights[:, None], mask=own[:, None] & inside)
        tl.store(dots + image * slots + slot + t, products, mask=t < rate)


def forward(x, order, weight, bias, sizes, rates) -> list[Tensor]:
    """out (B, G, C)."""
    (B, N, C), tokens = x.shape, tokens_of(tuple(sizes), tuple(rates)).to(x.device)
    x, order, weight, bias = (t.contiguous() for t in (x, order, weight, bias))
    if x.device.type == "cuda":  # to wait for the device to say that all is right would cost more than the work
        check_program[triton.cdiv(order.numel(), 1024),](order, order.numel(), N, BLOCK=1024)
    else:
        indices.check("order", order, 0, N - 1)
    out = x.new_empty(B, len(tokens), C)
    counts = N, C, len(tokens), B // weight.shape[0], weight.shape[1], bias.shape[1]
    grid = len(tokens), triton.cdiv(C, CHANNELS), B
    forward_program[grid](x, order, weight, bias, tokens, out, *counts, BLOCK_C=CHANNELS, BLOCK_T=SLOTS)
    return [out]


def backward(grad, out, x, order, weight, bias, sizes, rates) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    (B, N, C), tokens = x.shape, tokens_of(tuple(sizes), tuple(rates))
    slots, dx = int(tokens[-1, 5] + tokens[-1, 2]), torch.empty_like(x, memory_format=torch.contiguous_format)
    number = torch.float64 if x.dtype == torch.float64 else torch.float32
    dots, tokens = x.new_empty(B, slots, dtype=number), tokens.to(x.device)
    inputs = (t.contiguous() for t in (grad, x, order, weight))
    counts = N, C, len(tokens), B // weight.shape[0], weight.shape[1], slots
    backward_program[len(tokens), B](*inputs, tokens, dx, dots, *counts, BLOCK_C=CHANNELS, BLOCK_T=SLOTS)
    dweight, dbias = slopes_of_weights(grad.to(number), dots, weight, sizes, rates)
    return [dx, dweight.to(weight.dtype), dbias.to(bias.dtype)]
