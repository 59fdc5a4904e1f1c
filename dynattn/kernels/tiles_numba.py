"""Attention of a tile of queries to a block of keys on the CPU: what the kernels of all mechanisms do in the same way.

Logits stand as (keys, queries) in units of log2, a query in each lane, so that the softmax runs over whole vectors.
Of a softmax so far are known its largest logit (`top`) and its sum (`bottom`), as in flash attention.
"""

import math

from dynattn.kernels.simd import (
    LANES,
    compiled,
    exp2,
    lanes_of,
    load,
    maximum,
    product,
    ramp,
    store,
)

QUERIES, KEYS = 96, 72  # of a tile and of a block: whole register blocks of the matrix product; logits of 32 KiB
ROOM = QUERIES + LANES  # numbers in a row of logits: vectors may write over the end
LOG2E = math.log2(math.e)
LOWEST = -3e38  # below every logit


@compiled
def copy(source, factor, target):
    """A matrix into a part of another, multiplied."""
    for i in range(source.shape[0]):
        for c in range(source.shape[1]):
            target[i, c] = source[i, c] * factor


@compiled
def add_block(scores, block, count, values, top, bottom, decay, summed, first):
    """Let `count` queries read a block of keys: scores (keys, queries) become weights, summed (queries, D) grows.

    With `first` nothing has been read before, and what stands in top, bottom and summed does not matter.
    """
    lanes = lanes_of(scores)
    if first:
        top[:], bottom[:] = LOWEST, 0
    for t in range(0, count, lanes):
        old = load(top, t)
        new = old
        for a in range(block):
            new = maximum(new, load(scores, (a, t)))
        sum_ = ramp(top, 0, 0)
        for a in range(block):
            weight = exp2(load(scores, (a, t)) - new)
            store(scores, (a, t), weight)
            sum_ = sum_ + weight
        shrink = exp2(old - new)
        store(top, t, new)
        store(decay, t, shrink)
        store(bottom, t, load(bottom, t) * shrink + sum_)
    for t in range(0 if first else count):
        if decay[t] != 1:
            for c in range(0, summed.shape[1], lanes):
                store(summed, (t, c), load(summed, (t, c)) * decay[t])
    product(scores[:block, :count].T, values, summed[:count], not first)


@compiled
def slopes_of_logits(weights, slopes, block, count, top, share, offset):
    """Logits S to weights P = exp(S - top) share, slopes dP by the weights to slopes P (dP - offset) by the logits."""
    lanes = lanes_of(weights)
    for t in range(0, count, lanes):
        largest, by, shift = load(top, t), load(share, t), load(offset, t)
        for a in range(block):
            weight = exp2(load(weights, (a, t)) - largest) * by
            store(weights, (a, t), weight)
            store(slopes, (a, t), weight * (load(slopes, (a, t)) - shift))
