"""A query block meets a key block on the CPU: what the attention kernels of all mechanisms do in the same way.

Logits stand as (keys, queries) in units of log2, a query in each lane, so that the softmax runs over whole vectors.
The words are those of flash attention. A row holds the logits of one query. Of its softmax are known, of the key blocks
so far, the row maximum and the row sum; the log-sum-exp is row_max + log2(row_sum). A larger logit rescales what is
accumulated. In the backward pass the delta of a row is the product of its output and its gradient.
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

QUERIES, KEYS = (
    96,
    72,
)  # of a query block, of a key block: whole register blocks of the matrix product, 32 KiB of logits
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
def add_block(scores, block, count, values, row_max, row_sum, rescale, accumulator, first):
    """Let `count` queries read a key block: scores (keys, queries) become weights, accumulator (queries, D) grows.

    With `first` nothing has been read before, and what stands in row_max, row_sum and accumulator does not matter.
    """
    lanes = lanes_of(scores)
    if first:
        row_max[:], row_sum[:] = LOWEST, 0
    for t in range(0, count, lanes):
        old = load(row_max, t)
        new = old
        for a in range(block):
            new = maximum(new, load(scores, (a, t)))
        sum_ = ramp(row_max, 0, 0)
        for a in range(block):
            weight = exp2(load(scores, (a, t)) - new)
            store(scores, (a, t), weight)
            sum_ = sum_ + weight
        factor = exp2(old - new)
        store(row_max, t, new)
        store(rescale, t, factor)
        store(row_sum, t, load(row_sum, t) * factor + sum_)
    for t in range(0 if first else count):
        if rescale[t] != 1:
            for c in range(0, accumulator.shape[1], lanes):
                store(accumulator, (t, c), load(accumulator, (t, c)) * rescale[t])
    product(scores[:block, :count].T, values, accumulator[:count], not first)


@compiled
def slopes_of_logits(weights, slopes, block, count, row_max, share, delta):
    """Logits S become weights P = exp(S - row_max) share; their slopes dP those of the logits, P (dP - delta)."""
    lanes = lanes_of(weights)
    for t in range(0, count, lanes):
        maximum_, share_, delta_ = load(row_max, t), load(share, t), load(delta, t)
        for a in range(block):
            weight = exp2(load(weights, (a, t)) - maximum_) * share_
            store(weights, (a, t), weight)
            store(slopes, (a, t), weight * (load(slopes, (a, t)) - delta_))
