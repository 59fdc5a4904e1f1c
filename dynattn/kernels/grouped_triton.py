"""Grouped attention on CUDA devices (DGT-2): the queries of a group, a block at a time, and the keys that it selected.

A counting sort lists the queries of each head by group. A program of the forward has a group: it reads blocks of
its queries, and the selected keys and values from where they lie. The backward computes the weights again, for a
block of selected keys to a program; if that is all of them, the gradient of the queries comes with it.

A key that several groups selected has the sum of their gradients, in the order of the groups: each program writes what
it adds to rows of its own, and rows for the same key lie side by side; for its place, it counts the groups before it
that selected the key. Atomic additions would need no rows, but have no order, unless of integers: in the first stage of
DGT-T (64 images, bfloat16) these would be 205 MB to clear, add to and read; the rows are 77 MB to write and read.

Nothing here waits for the device, so that a CUDA graph can hold it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynattn.kernels.deformable_triton import dot
from dynattn.kernels.grouped import look_of_out
from dynattn.kernels.indices import check
from dynattn.kernels.operators import INTERPRETED

CHUNK, MARKS = 128, 128  # queries sorted and keys marked by a program
PROGRAMS = 4096  # of the forward, if there is work for so many: enough for a large GPU
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
WORD: tl.constexpr = tl.constexpr(31)  # groups in an int32: one bit is the sign

# ---------------------------------------------------------------------------------------------------------------------
# Indices: checked, queries sorted by group, groups of a key marked
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(debug=True)  # without which there are no assertions
def check_program(groups, selected, lengths, queries, keys, count, G, S, n, BLOCK: tl.constexpr):
    """A block of each index tensor. What is wrong ends all work on the device, as where torch indexes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = tl.load(groups + at, mask=at < queries, other=0)
    tl.device_assert((j >= 0) & (j < G), "groups: expected values from 0 to G - 1")
    s = tl.load(selected + at, mask=at < keys, other=0)
    tl.device_assert((s >= 0) & (s < S), "selected: expected values from 0 to S - 1")
    length = tl.load(lengths + at, mask=at < count, other=1)
    tl.device_assert((length >= 1) & (length <= n), "lengths: expected values from 1 to n")


@triton.jit
def chunk_of_queries(groups, head, first, L, CHUNK: tl.constexpr):
    """The groups of a chunk; of each query, how many of the chunk are in its group, and how many of these before it."""
    at = tl.arange(0, CHUNK)
    own = tl.load(groups + head * L + first + at, mask=first + at < L, other=-1)
    same = (own[:, None] == own[None, :]).to(tl.int32)
    before = (at[None, :] < at[:, None]).to(tl.int32)
    return own, tl.sum(same, 1), tl.sum(same * before, 1)


@triton.jit
def count_program(groups, counts, L, G, chunks, CHUNK: tl.constexpr):
    """counts (head, G, chunks): queries of a chunk in each group."""
    head, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    first = chunk * CHUNK
    own, together, _ = chunk_of_queries(groups, head, first, L, CHUNK)
    inside = first + tl.arange(0, CHUNK) < L
    tl.store(counts + (head * G + own) * chunks + chunk, together, mask=inside)


@triton.jit
def place_program(groups, ends, order, L, G, chunks, CHUNK: tl.constexpr):
    """order (head, L): queries by group, in their own order within one."""
    head, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    first = chunk * CHUNK
    own, together, before = chunk_of_queries(groups, head, first, L, CHUNK)
    queries = first + tl.arange(0, CHUNK)
    end = tl.load(ends + (head * G + own) * chunks + chunk, mask=queries < L, other=0)
    tl.store(order + head * L + end - together + before, queries, mask=queries < L)


@triton.jit
def bounds(ends, group, G, chunks):
    """Where the queries of a group (its number among those of all heads) begin and end in the order of their head."""
    first = tl.load(ends + group * chunks - 1, mask=group % G > 0, other=0)
    return first, tl.load(ends + group * chunks + chunks - 1)


@triton.jit
def mark_program(ends, selected, lengths, marks, counts, S, G, n, chunks, words, BLOCK: tl.constexpr):
    """marks (head, S, words): a bit for each group that has queries and selected the key; counts (head, S) of them."""
    blocks = tl.cdiv(n, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    begin, end = bounds(ends, group, G, chunks)
    slots = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    near = slots < tl.where(begin < end, tl.load(lengths + group), 0)
    j = (group % G).to(tl.int32)
    key = group // G * S + tl.load(selected + group * n + slots, mask=near, other=0)
    bit = tl.full((BLOCK,), 1, tl.int32) << (j % WORD)
    before = tl.atomic_or(marks + key * words + j // WORD, bit, mask=near, sem="relaxed")
    tl.atomic_add(counts + key, tl.full((BLOCK,), 1, tl.int32), mask=near & ((before & bit) == 0), sem="relaxed")


@triton.jit
def bits_set(x):
    """How many bits of non-negative int32 numbers are 1."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit
def rows_of_keys(marks, last, key, near, group, S, G, words):
    """The rows, among those of the head, for what a group adds to its keys. key: number among those of all heads."""
    j = (group % G).to(tl.int32)
    row = tl.load(last + key - 1, mask=near & (key % S > 0), other=0)  # behind all rows of the keys before
    for word in range(0, j // WORD + 1):
        earlier = tl.where(word < j // WORD, 0x7FFFFFFF, (1 << (j % WORD)) - 1)
        row += bits_set(tl.load(marks + key * words + word, mask=near, other=0) & earlier)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The attention
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def start_of(strides, head, h):
    """How far the first number of a head lies behind that of the tensor."""
    return head // h * strides[0] + head % h * strides[1]


@triton.jit
def read_rows(base, stride, index, inside, d, D: tl.constexpr):
    """(index, D): rows of a matrix whose rows lie `stride` apart; zeros outside and behind the d-th column."""
    columns = tl.arange(0, D)
    mask = inside[:, None] & (columns < d)[None, :]
    return tl.load(base + index[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def write_rows(base, stride, index, inside, d, x):
    """What `read_rows` reads."""
    columns = tl.arange(0, x.shape[1])
    mask = inside[:, None] & (columns < d)[None, :]
    tl.store(base + index[:, None] * stride + columns[None, :], x, mask=mask)


@triton.jit
def query_block_at(order, places, end):
    """The queries at places in the order of their head, and which of these are still of the group."""
    return tl.load(order + places, mask=places < end, other=0).to(tl.int64), places < end


@triton.jit
def forward_program(
    Q, K, V, Q_strides, K_strides, V_strides, order, ends, selected, lengths, out, out_strides, statistics,
    L, d, h, G, n, chunks, parts, scale: tl.float64,
    EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Every parts-th query block of a group: the output, row maximum (for exp2) and row sum of each softmax."""
    part, group = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    head = group // G
    number = statistics.dtype.element_ty
    to_logits = tl.full((), scale, number) * LOG2E
    begin, end = bounds(ends, group, G, chunks)
    length = tl.load(lengths + group).to(tl.int32)
    Q, K, V = Q + start_of(Q_strides, head, h), K + start_of(K_strides, head, h), V + start_of(V_strides, head, h)
    out += start_of(out_strides, head, h)
    for first in range(begin + part * BLOCK_L, end, parts * BLOCK_L):
        queries, inside = query_block_at(order + head * L, first + tl.arange(0, BLOCK_L), end)
        q = read_rows(Q, Q_strides[2], queries, inside, d, D)
        row_max = tl.full((BLOCK_L,), float("-inf"), number)
        row_sum, accumulator = tl.zeros((BLOCK_L,), number), tl.zeros((BLOCK_L, D), number)
        for a in range(0, length, BLOCK_N):
            slots = a + tl.arange(0, BLOCK_N)
            near = slots < length
            keys = tl.load(selected + group * n + slots, mask=near, other=0)
            k, v = read_rows(K, K_strides[2], keys, near, d, D), read_rows(V, V_strides[2], keys, near, d, D)
            scores = dot(q, tl.trans(k), tl.zeros((BLOCK_L, BLOCK_N), number), EXACT) * to_logits  # DGT-11
            scores = tl.where(near[None, :], scores, float("-inf"))
            new = tl.maximum(row_max, tl.max(scores, 1))
            weights, rescale = tl.exp2(scores - new[:, None]), tl.exp2(row_max - new)  # DGT-12
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            accumulator = dot(weights.to(v.dtype), v, accumulator * rescale[:, None], EXACT)  # DGT-13
            row_max = new
        write_rows(out, out_strides[2], queries, inside, d, accumulator / row_sum[:, None])
        at = head * L + queries
        tl.store(statistics + at * 2, row_max, mask=inside)
        tl.store(statistics + at * 2 + 1, row_sum, mask=inside)


@triton.jit
def softmax_of(statistics, at, inside, grad, out):
    """Of each query: the row maximum, one over the row sum, and delta, which its slopes are relative to."""
    row_max = tl.load(statistics + at * 2, mask=inside, other=0.0)
    share = 1 / tl.load(statistics + at * 2 + 1, mask=inside, other=1.0)
    return row_max, share, tl.sum(grad.to(row_max.dtype) * out.to(row_max.dtype), 1)


@triton.jit
def slopes_of_logits(x, y, dx, dy, row_max, share, delta, read, to_logits, EXACT: tl.constexpr):
    """Weights and the slopes of what the scale is a factor of: (queries, keys), or (keys, queries) with x a key.

    Zero where no query reads no key.
    """
    nothing = tl.zeros(read.shape, row_max.dtype)
    weights = tl.exp2(dot(x, tl.trans(y), nothing, EXACT) * to_logits - row_max) * share  # DGT-11, DGT-12
    weights = tl.where(read, weights, 0.0)
    slopes = dot(dx, tl.trans(dy), nothing, EXACT)  # DGT-16
    return weights, tl.where(read, weights * (slopes - delta), 0.0)


@triton.jit
def slopes_of_queries(
    Q, K, V, grad, out, Q_strides, K_strides, V_strides, grad_strides, out_strides,
    statistics, order, ends, selected, lengths, dq,
    L, d, h, G, n, chunks, parts, scale: tl.float64,
    EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Every parts-th query block of a group: its gradient, over all keys of the group."""
    part, group = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    head = group // G
    number = statistics.dtype.element_ty
    factor = tl.full((), scale, number)
    begin, end = bounds(ends, group, G, chunks)
    length = tl.load(lengths + group).to(tl.int32)
    Q, K, V = Q + start_of(Q_strides, head, h), K + start_of(K_strides, head, h), V + start_of(V_strides, head, h)
    grad, out = grad + start_of(grad_strides, head, h), out + start_of(out_strides, head, h)
    for first in range(begin + part * BLOCK_L, end, parts * BLOCK_L):
        queries, inside = query_block_at(order + head * L, first + tl.arange(0, BLOCK_L), end)
        at = head * L + queries
        q = read_rows(Q, Q_strides[2], queries, inside, d, D)
        g = read_rows(grad, grad_strides[2], queries, inside, d, D)
        z = read_rows(out, out_strides[2], queries, inside, d, D)
        row_max, share, delta = softmax_of(statistics, at, inside, g, z)
        accumulator = tl.zeros((BLOCK_L, D), number)
        for a in range(0, length, BLOCK_N):
            slots = a + tl.arange(0, BLOCK_N)
            near = slots < length
            keys = tl.load(selected + group * n + slots, mask=near, other=0)
            k, v = read_rows(K, K_strides[2], keys, near, d, D), read_rows(V, V_strides[2], keys, near, d, D)
            read = inside[:, None] & near[None, :]
            _, slopes = slopes_of_logits(
                q, k, g, v, row_max[:, None], share[:, None], delta[:, None], read, factor * LOG2E, EXACT
            )
            accumulator = dot(slopes.to(k.dtype), k, accumulator, EXACT)  # DGT-14
        write_rows(dq, d, at, inside, d, accumulator * factor)


@triton.jit
def slopes_of_keys(
    Q, K, V, grad, out, Q_strides, K_strides, V_strides, grad_strides, out_strides,
    statistics, order, ends, selected, lengths, dq,
    marks, last, by_group,
    L, S, d, h, G, n, chunks, words, scale: tl.float64,
    WHOLE: tl.constexpr, EXACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A block of a group's keys: what all its queries add to the gradients of keys and values, in rows of its own.

    WHOLE: the block has all keys; then the gradient of the queries is complete as well.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    head = group // G
    number = statistics.dtype.element_ty
    factor = tl.full((), scale, number)
    begin, end = bounds(ends, group, G, chunks)
    slots = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    near = slots < tl.where(begin < end, tl.load(lengths + group), 0)
    keys = tl.load(selected + group * n + slots, mask=near, other=0)
    Q, K, V = Q + start_of(Q_strides, head, h), K + start_of(K_strides, head, h), V + start_of(V_strides, head, h)
    grad, out = grad + start_of(grad_strides, head, h), out + start_of(out_strides, head, h)
    k, v = read_rows(K, K_strides[2], keys, near, d, D), read_rows(V, V_strides[2], keys, near, d, D)
    by_key, by_value = tl.zeros((BLOCK_N, D), number), tl.zeros((BLOCK_N, D), number)
    for first in range(begin, end, BLOCK_L):
        queries, inside = query_block_at(order + head * L, first + tl.arange(0, BLOCK_L), end)
        at = head * L + queries
        q = read_rows(Q, Q_strides[2], queries, inside, d, D)
        g = read_rows(grad, grad_strides[2], queries, inside, d, D)
        z = read_rows(out, out_strides[2], queries, inside, d, D)
        row_max, share, delta = softmax_of(statistics, at, inside, g, z)
        read = near[:, None] & inside[None, :]
        weights, slopes = slopes_of_logits(
            k, q, v, g, row_max[None, :], share[None, :], delta[None, :], read, factor * LOG2E, EXACT
        )
        by_value = dot(weights.to(g.dtype), g, by_value, EXACT)  # DGT-17
        by_key = dot(slopes.to(q.dtype), q, by_key, EXACT)  # DGT-15
        if WHOLE:
            accumulator = dot(tl.trans(slopes.to(k.dtype)), k, tl.zeros((BLOCK_L, D), number), EXACT)  # DGT-14
            write_rows(dq, d, at, inside, d, accumulator * factor)
    row = rows_of_keys(marks, last, head * S + keys, near, group, S, G, words)
    by_group += head * G * n * 2 * d
    write_rows(by_group, 2 * d, row.to(tl.int64), near, d, by_key * factor)
    write_rows(by_group + d, 2 * d, row.to(tl.int64), near, d, by_value)


@triton.jit
def sum_program(by_group, last, dk, dv, S, d, rows, blocks, BLOCK: tl.constexpr, D: tl.constexpr):
    """A block of keys of a head: the sums of what their groups add."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    keys = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(last + head * S + keys - 1, mask=(keys < S) & (keys > 0), other=0)
    end = tl.load(last + head * S + keys, mask=keys < S, other=0)
    number = tl.float64 if dk.dtype.element_ty == tl.float64 else tl.float32
    by_key, by_value = tl.zeros((BLOCK, D), number), tl.zeros((BLOCK, D), number)
    by_group += head * rows * 2 * d
    for i in range(0, tl.max(end - begin, 0)):
        row, near = (begin + i).to(tl.int64), begin + i < end
        by_key += read_rows(by_group, 2 * d, row, near, d, D).to(number)
        by_value += read_rows(by_group + d, 2 * d, row, near, d, D).to(number)
    at = head * S + keys
    write_rows(dk, d, at, keys < S, d, by_key)
    write_rows(dv, d, at, keys < S, d, by_value)


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


def check_indices(groups: Tensor, selected: Tensor, lengths: Tensor, S: int) -> None:
    """Nothing is read with a wrong index. ValueError; on a CUDA device an assertion there, as where torch indexes.

    To wait for the device to say that all is right would cost more than the attention.
    """
    G, n = selected.shape[2:]
    if groups.device.type == "cuda":
        sizes = groups.numel(), selected.numel(), lengths.numel()
        check_program[triton.cdiv(max(sizes), 1024),](groups, selected, lengths, *sizes, G, S, n, BLOCK=1024)
    else:
        check("groups", groups, 0, G - 1)
        check("selected", selected, 0, S - 1)
        check("lengths", lengths, 1, n)


def with_rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A tensor (B, h, rows, d) whose rows are contiguous, and its other strides; without a copy where they are so."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride()[:3]


def sort_by_group(groups: Tensor, G: int) -> tuple[Tensor, Tensor, int]:
    """order (B h, L): queries by group; ends (B h, G chunks): places behind those of a group in the first chunks."""
    (B, h, L), chunks = groups.shape, triton.cdiv(groups.shape[2], CHUNK)
    counts = torch.zeros(B * h, G * chunks, dtype=torch.int32, device=groups.device)
    order = torch.empty(B * h, L, dtype=torch.int32, device=groups.device)
    grid = (B * h * chunks,)
    count_program[grid](groups, counts, L, G, chunks, CHUNK=CHUNK, num_warps=8)
    ends = counts.cumsum(1, dtype=torch.int32)
    place_program[grid](groups, ends, order, L, G, chunks, CHUNK=CHUNK, num_warps=8)
    return order, ends, chunks


def options_for(q: Tensor, G: int, n: int, backward: bool) -> dict[str, int]:
    """Blocks that registers hold (as sm_90 is compiled for): a query block has about as many as a group, at most.

    The backward had better have all keys in a block.
    """
    L, d = q.shape[2:]
    D, keys = (max(16, triton.next_power_of_2(size)) for size in (d, n))
    rows = max(16, 2**13 // D if q.element_size() == 2 else min(32, 2**12 // D))
    queries = next((queries for queries, least in ((128, 256), (64, 48), (32, 12)) if L >= least * G), 16)
    block = keys if backward and keys <= min(128, rows) else min(64, rows, keys)
    blocks = {"BLOCK_L": min(queries, rows, 32 if backward else 128), "BLOCK_N": block, "D": D}
    return blocks | {"EXACT": INTERPRETED, "num_warps": 4 if D <= 64 else 8}


def parts_of(heads: int, G: int, L: int, BLOCK_L: int) -> int:
    """How many programs share a group."""
    return max(1, min(triton.cdiv(PROGRAMS, heads * G), triton.cdiv(L, BLOCK_L)))


def forward(q, k, v, groups, selected, lengths, scale) -> list[Tensor]:
    """As the operator looks; the row maximum is of logits for exp2. Keys are distinct within a group."""
    (B, h, L, d), S, (G, n) = q.shape, k.shape[2], selected.shape[2:]
    groups, selected, lengths = groups.contiguous(), selected.contiguous(), lengths.contiguous()
    check_indices(groups, selected, lengths, S)
    order, ends, chunks = sort_by_group(groups, G)
    tensors, strides = zip(*map(with_rows, (q, k, v)), strict=True)
    out = look_of_out(q, q.dtype)
    statistics = q.new_empty(B, h, L, 2, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    options = options_for(q, G, n, backward=False)
    parts = parts_of(B * h, G, L, options["BLOCK_L"])
    sizes = L, d, h, G, n, chunks, parts, scale
    inputs = *tensors, *strides, order, ends, selected, lengths
    forward_program[B * h * G * parts,](*inputs, out, out.stride()[:3], statistics, *sizes, **options)
    return [out, statistics]


def backward(grad, out, statistics, q, k, v, groups, selected, lengths, scale) -> list[Tensor]:
    """Gradients of q, k and v. Takes memory for 2 G n rows of keys a head."""
    (B, h, L, d), S, (G, n) = q.shape, k.shape[2], selected.shape[2:]
    groups, selected, lengths = groups.contiguous(), selected.contiguous(), lengths.contiguous()
    statistics = statistics.contiguous()
    order, ends, chunks = sort_by_group(groups, G)
    words = triton.cdiv(G, WORD.value)
    marks, counts = (torch.zeros(B * h, S, w, dtype=torch.int32, device=q.device) for w in (words, 1))
    grid = (B * h * G * triton.cdiv(n, MARKS),)
    mark_program[grid](ends, selected, lengths, marks, counts, S, G, n, chunks, words, BLOCK=MARKS)
    last = counts[..., 0].cumsum(1, dtype=torch.int32)

    tensors, strides = zip(*map(with_rows, (q, k, v, grad, out)), strict=True)
    dq, dk, dv = (q.new_empty(x.shape) for x in (q, k, v))
    by_group = q.new_empty(B * h, G * n, 2, d)
    inputs = *tensors, *strides, statistics, order, ends, selected, lengths, dq
    options = options_for(q, G, n, backward=True)
    whole = options["BLOCK_N"] >= n
    if not whole:
        parts = parts_of(B * h, G, L, options["BLOCK_L"])
        slopes_of_queries[B * h * G * parts,](*inputs, L, d, h, G, n, chunks, parts, scale, **options)
    sizes = L, S, d, h, G, n, chunks, words, scale
    grid = (B * h * G * triton.cdiv(n, options["BLOCK_N"]),)
    slopes_of_keys[grid](*inputs, marks, last, by_group, *sizes, WHOLE=whole, **options)
    keys = max(8, 2**11 // options["D"])
    blocks = triton.cdiv(S, keys)
    sum_program[B * h * blocks,](by_group, last, dk, dv, S, d, G * n, blocks, BLOCK=keys, D=options["D"])
    return [dq, dk, dv]
