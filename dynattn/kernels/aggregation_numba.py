"""Aggregation by rank on the CPU (SG-2): tokens are read where they lie, none is copied in between."""

import torch
from torch import Tensor

from dynattn.kernels import indices
from dynattn.kernels.aggregation import slopes_of_weights, tokens_of
from dynattn.kernels.simd import compiled, lanes_of, load, ramp, store, total
from dynattn.kernels.threads import as_arrays, in_parallel, working_dtype


@compiled
def forward_items(begin, end, x, order, weight, bias, tokens, out):
    """Items begin to end - 1 of all (image, token)."""
    (B, _, C), G, lanes = x.shape, tokens.shape[0], lanes_of(out)
    wide, whole = C - C % (4 * lanes), C - C % lanes
    for item in range(begin, end):
        b, g = divmod(item, G)
        first, least, rate, at, region = tokens[g, 0], tokens[g, 1], tokens[g, 2], tokens[g, 3], tokens[g, 4]
        w, image, row, places = b * weight.shape[0] // B, x[b], out[b, g], order[b]
        start = bias[w, region]
        for c in range(0, wide, 4 * lanes):
            s0 = ramp(out, start, 0.0)
            s1, s2, s3 = s0, s0, s0
            for t in range(rate):
                one, l = weight[w, at + t], places[max(first + t, least)]
                s0 = s0 + load(image, (l, c)) * one  # SG-2
                s1 = s1 + load(image, (l, c + lanes)) * one
                s2 = s2 + load(image, (l, c + 2 * lanes)) * one
                s3 = s3 + load(image, (l, c + 3 * lanes)) * one
            store(row, c, s0)
            store(row, c + lanes, s1)
            store(row, c + 2 * lanes, s2)
            store(row, c + 3 * lanes, s3)
        for c in range(wide, whole, lanes):
            s0 = ramp(out, start, 0.0)
            for t in range(rate):
                s0 = s0 + load(image, (places[max(first + t, least)], c)) * weight[w, at + t]
            store(row, c, s0)
        for c in range(whole, C):
            s = start
            for t in range(rate):
                s += image[places[max(first + t, least)], c] * weight[w, at + t]
            row[c] = s


@compiled
def backward_items(begin, end, grad, x, order, weight, tokens, dx, dots):
    """Of items begin to end - 1 of all (image, token): slopes of the tokens, and products with the gradient."""
    (B, _, C), G, lanes = x.shape, tokens.shape[0], lanes_of(dx)
    whole = C - C % lanes
    for item in range(begin, end):
        b, g = divmod(item, G)
        first, least, rate, at, slot = tokens[g, 0], tokens[g, 1], tokens[g, 2], tokens[g, 3], tokens[g, 5]
        w, image, slope, places, dimage = b * weight.shape[0] // B, x[b], grad[b, g], order[b], dx[b]
        repeated = max(least - first, 0)  # slots of the token that is read several times, but for its last
        one = weight[w, at] * 0
        for t in range(repeated):
            one += weight[w, at + t]
        for t in range(repeated, rate):
            one += weight[w, at + t]
            l, products, dot = places[first + t], ramp(dx, 0.0, 0.0), one * 0
            for c in range(0, whole, lanes):
                slopes = load(slope, c)
                store(dimage, (l, c), slopes * one)
                products = products + slopes * load(image, (l, c))
            for c in range(whole, C):
                dimage[l, c] = slope[c] * one
                dot += slope[c] * image[l, c]
            dots[b, slot + t] = dot + total(products)
            one = weight[w, at] * 0
        dots[b, slot : slot + repeated] = dots[b, slot + repeated]


def forward(x, order, weight, bias, sizes, rates) -> list[Tensor]:
    """out (B, G, C)."""
    indices.check("order", order, 0, x.shape[1] - 1)
    dtype, tokens = working_dtype(x), tokens_of(tuple(sizes), tuple(rates))
    out = torch.empty(x.shape[0], len(tokens), x.shape[2], dtype=dtype)
    arrays = *as_arrays(dtype, x), order.numpy(), *as_arrays(dtype, weight, bias)
    in_parallel(forward_items, x.shape[0] * len(tokens), *arrays, tokens.numpy(), out.numpy())
    return [out.to(x.dtype)]


def backward(grad, out, x, order, weight, bias, sizes, rates) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    dtype, tokens = working_dtype(x), tokens_of(tuple(sizes), tuple(rates))
    dx, slots = torch.empty(x.shape, dtype=dtype), int(tokens[-1, 5] + tokens[-1, 2])
    dots = torch.empty(x.shape[0], slots, dtype=dtype)
    arrays = *as_arrays(dtype, grad, x), order.numpy(), *as_arrays(dtype, weight)
    in_parallel(backward_items, x.shape[0] * len(tokens), *arrays, tokens.numpy(), dx.numpy(), dots.numpy())
    dweight, dbias = slopes_of_weights(grad.to(dtype), dots, weight, sizes, rates)
    return [dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)]
