"""Groups and their keys on CUDA devices (DGT-1), without sorting what every centroid likes.

What a centroid likes is written out once, as whole numbers in the same order. A program keeps a centroid's row of them
in registers and finds the n-th largest by halving the interval that it lies in, until n numbers are left above; then it
collects what is larger, and of what is equal the first. It does not make the products itself: for the sake of one
centroid it would read all keys, which all centroids of the head can share.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynattn.kernels.grouped_triton import start_of, with_rows

ROWS, CHANNELS = 64, 32  # queries or keys that meet all centroids, and channels at a time
LONGEST = 2**14  # of a row that registers hold


@triton.jit
def likes(x, stride, index, inside, centroids, j, G, d, CHANNELS: tl.constexpr):
    """(index, j): x . e_j, in the dtype of the centroids; "tf32x3" is as good as float32."""
    number = centroids.dtype.element_ty
    sums = tl.zeros((index.shape[0], j.shape[0]), number)
    for first in range(0, d, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        rows = tl.load(x + index[:, None] * stride + c[None, :], mask=inside[:, None] & (c < d)[None, :], other=0.0)
        e = tl.load(centroids + j[None, :] * d + c[:, None], mask=(j < G)[None, :] & (c < d)[:, None], other=0.0)
        sums = tl.dot(rows.to(number), e, sums, input_precision="tf32x3", out_dtype=number)
    return sums


@triton.jit
def ranks(x):
    """Whole numbers in the order of floating ones: of -0 and 0 one, NaN as -inf, and nothing at the very least."""
    whole = tl.int64 if x.dtype == tl.float64 else tl.int32
    BITS: tl.constexpr = x.dtype.primitive_bitwidth - 1
    largest = (1 << BITS) - 1
    bits = tl.where(x == 0, 0.0, tl.where(x == x, x, float("-inf"))).to(whole, bitcast=True)
    return bits ^ ((bits >> BITS) & largest)


@triton.jit
def numbers(rank, number: tl.constexpr):
    """What has this rank."""
    BITS: tl.constexpr = number.primitive_bitwidth - 1
    return (rank ^ ((rank >> BITS) & ((1 << BITS) - 1))).to(number, bitcast=True)


@triton.jit
def assign_program(
    q, strides, centroids, groups, L, d, h, G, blocks,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of queries of a head: argmax_j e_j . q_i, of equals the first."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    queries = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    q += start_of(strides, head, h)
    centroids += head % h * G * d
    number = centroids.dtype.element_ty
    best, group = tl.full((ROWS,), float("-inf"), number), tl.zeros((ROWS,), tl.int32)
    for first in range(0, G, GROUPS):
        j = first + tl.arange(0, GROUPS)
        x = likes(q, strides[2], queries.to(tl.int64), queries < L, centroids, j, G, d, CHANNELS)
        x = tl.where((x == x) & (j < G)[None, :], x, float("-inf"))  # a query that is NaN is in the first group
        most = tl.max(x, 1)
        nearest = tl.min(tl.where(x == most[:, None], j[None, :], G), 1)
        group = tl.where(most > best, nearest, group)
        best = tl.maximum(best, most)
    tl.store(groups + head * L + queries, group.to(tl.int64), mask=queries < L)


@triton.jit
def rank_program(
    k, strides, centroids, rows, S, d, h, G, blocks,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """rows (head, G, S): the ranks of what the centroids like, for a block of keys."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    keys = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    k += start_of(strides, head, h)
    centroids += head % h * G * d
    for first in range(0, G, GROUPS):
        j = first + tl.arange(0, GROUPS)
        x = ranks(likes(k, strides[2], keys.to(tl.int64), keys < S, centroids, j, G, d, CHANNELS))
        inside = (keys < S)[:, None] & (j < G)[None, :]
        tl.store(rows + (head * G + j)[None, :] * S + keys[:, None], x, mask=inside)


@triton.jit
def count_from(rows, mine, bound, S, BLOCK: tl.constexpr, SHORT: tl.constexpr):
    """How many numbers of a row are not below a bound. SHORT: it has one block, which is `mine`."""
    counts = (mine >= bound).to(tl.int32)
    if not SHORT:
        for first in range(BLOCK, S, BLOCK):
            i = first + tl.arange(0, BLOCK)
            counts += (tl.load(rows + i, mask=i < S, other=bound - 1) >= bound).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def select_program(rows, selected, S, n, NUMBER: tl.constexpr, BLOCK: tl.constexpr, SHORT: tl.constexpr):
    """The n keys that a centroid likes best, in the order of the map; of equals the first."""
    rows += tl.program_id(0).to(tl.int64) * S
    selected += tl.program_id(0).to(tl.int64) * n
    at = tl.arange(0, BLOCK)
    largest: tl.constexpr = (1 << (NUMBER.primitive_bitwidth - 1)) - 1
    mine = tl.load(rows + at, mask=at < S, other=-largest - 1)
    low, high = tl.min(tl.where(at < S, mine, largest), 0), tl.max(mine, 0)
    if not SHORT:
        for first in range(BLOCK, S, BLOCK):
            i = first + at
            low = tl.minimum(low, tl.min(tl.load(rows + i, mask=i < S, other=largest), 0))
            high = tl.maximum(high, tl.max(tl.load(rows + i, mask=i < S, other=-largest - 1), 0))

    # The n-th largest rank is in [low, high], and `count` are not below `low`.
    count, steps = tl.full((), S, tl.int32), tl.full((), 0, tl.int32)
    while (low < high) & (count != n):
        middle = (low | high) - ((low ^ high) >> 1)  # of the ranks: as many steps as a rank has bits, if need be
        if steps % 2 == 0:  # of the numbers: soon there, as a rule
            middle = ranks(numbers(low, NUMBER) * 0.5 + numbers(high, NUMBER) * 0.5)
            middle = tl.minimum(tl.maximum(middle, low + 1), high)
        found = count_from(rows, mine, middle, S, BLOCK, SHORT)
        low, high = tl.where(found >= n, middle, low), tl.where(found >= n, high, middle - 1)
        count = tl.where(found >= n, found, count)
        steps += 1

    room = n - count_from(rows, mine, low + 1, S, BLOCK, SHORT)  # for what is equal
    equals, placed = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    PART: tl.constexpr = BLOCK if BLOCK < 1024 else 1024  # running sums take many registers
    for first in range(0, S, PART):
        i = first + tl.arange(0, PART)
        x = tl.load(rows + i, mask=i < S, other=-largest - 1)
        equal = (x == low).to(tl.int32)
        taken = ((x > low) | (x == low) & (equals + tl.cumsum(equal, 0) <= room)).to(tl.int32)
        tl.store(selected + placed + tl.cumsum(taken, 0) - 1, i.to(tl.int64), mask=taken > 0)
        equals, placed = equals + tl.sum(equal, 0), placed + tl.sum(taken, 0)


def prepared(x: Tensor, centroids: Tensor) -> tuple[Tensor, tuple, Tensor, int, dict[str, int]]:
    """x and its strides, the centroids as numbers to compute in, blocks of a head, options of its programs."""
    x, strides = with_rows(x)
    number = torch.promote_types(x.dtype, torch.float32)
    groups = min(64, max(16, triton.next_power_of_2(centroids.shape[1])))
    options = {"ROWS": ROWS, "GROUPS": groups, "CHANNELS": CHANNELS}
    return x, strides, centroids.to(number).contiguous(), triton.cdiv(x.shape[2], ROWS), options


def assign_triton(q: Tensor, centroids: Tensor) -> Tensor:
    """Groups (B, h, L) of queries (B, h, L, d) by centroids (h, G, d)."""
    (B, h, L, d), G = q.shape, centroids.shape[1]
    q, strides, centroids, blocks, options = prepared(q, centroids)
    groups = torch.empty(B, h, L, dtype=torch.int64, device=q.device)
    assign_program[B * h * blocks,](q, strides, centroids, groups, L, d, h, G, blocks, **options)
    return groups


def select_triton(k: Tensor, centroids: Tensor, n: int) -> Tensor:
    """Keys (B, h, G, n) of each group, of keys (B, h, S, d) by centroids (h, G, d)."""
    (B, h, S, d), G = k.shape, centroids.shape[1]
    k, strides, centroids, blocks, options = prepared(k, centroids)
    double = centroids.dtype == torch.float64
    rows = torch.empty(B * h * G, S, dtype=torch.int64 if double else torch.int32, device=k.device)
    rank_program[B * h * blocks,](k, strides, centroids, rows, S, d, h, G, blocks, **options)
    selected = torch.empty(B, h, G, n, dtype=torch.int64, device=k.device)
    short = S <= LONGEST
    block = triton.next_power_of_2(S) if short else 2**12
    options = {"NUMBER": tl.float64 if double else tl.float32, "BLOCK": block, "SHORT": short}
    select_program[B * h * G,](rows, selected, S, n, **options, num_warps=max(1, min(16, block // 1024)))
    return selected
