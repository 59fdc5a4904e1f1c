"""DGT's four group-wise matrix products as appendix C of the paper writes them, in numba.cuda: to be read beside it.

L queries are in G groups, N_i of them in group i, and group i selected k of S keys: the rows X_Ki of X_K, X_Vi of X_V.
All groups at once compute (i: the rows of group i; ': sorted by group; "^": after the softmax)

    form  computes                                                a tile is     and reads
    1     P_i       = X_Qi X_Ki^T                     (DGT-11)    T x T of      T rows of X_Q', T selected rows of X_K
          Grad_P^_i = Grad_Yi X_Vi^T                  (DGT-16)    L x k         (of X_V), as columns
    2     Y_i       = P^_i X_Vi                       (DGT-13)    T x T of      T rows of P^', all selected rows of X_V
          Grad_Qi   = Grad_Pi X_Ki                    (DGT-14)    L x C         (of X_K), T channels of them
    3     Grad_Ki^T = X_Qi^T Grad_Pi                  (DGT-15)    T x T of      all rows of the group in X_Q' (as
                                                                  C x k, one i  columns) and in Grad_P'
    4     Grad_Vi   = P^_i^T Grad_Yi                  (DGT-17)    T x T of      all rows of the group in P^' (as
                                                                  k x C, one i  columns) and in Grad_Y'

and between them the softmax P^_i = softmax(P_i scale) (DGT-12). A CUDA block of T x T threads computes a tile, a thread
an entry. What the tile reads comes into shared memory T x T numbers at a time, and is multiplied there.

Forms 1 and 2: sorting the queries puts a group into neighbouring rows. A tile may still span several groups, which need
different keys: they are solved in order, rows of other groups being zero in shared memory, and skipped when written.
X_Ki does not exist in memory: each tile picks its rows out of X_K. With T = 4, rows 4 to 7 of P', columns 0 to 3:

      queries 4, 5 chose group 1, 6 and 7 group 2;    selected[1] = 9 2 30 17 ..,    selected[2] = 2 5 8 30 ..

      pass 1        X_Q'             X_K^T, columns of group 1       P'                  pass 2
                  4 [q q q q]          9   2   30  17              4 [p p p p]         4 [0 0 0 0]         4 [p p p p]
                  5 [q q q q]    x    [k] [k] [k] [k]        =     5 [p p p p]         5 [0 0 0 0]   x     5 [p p p p]
                  6 [0 0 0 0]         [k] [k] [k] [k]              6  . . . .          6 [q q q q]  2 5    6 [p p p p]
                  7 [0 0 0 0]         [k] [k] [k] [k]              7  . . . .          7 [q q q q]  8 30   7 [p p p p]

Forms 3 and 4: blocks belong to groups, so that no tile spans two. The sum runs over the queries of the group, T at a
time, and the tile goes straight to the selected rows of Grad_K, without memory for the G k rows of Grad_K':

      queries 4, 5, 6 chose group 1                                   Grad_K^T, columns
                    X_Q^T           Grad_P'                           .. 2 .. 9 .. 17 .. 30 ..
                  4  5  6          4 [g g g g]                           |    |    |     |
                 [q  q  q  0]   x  5 [g g g g]   =   [d d d d]   ->      d    d    d     d    added
                 [q  q  q  0]      6 [g g g g]       [d d d d]           d    d    d     d
                                     [0 0 0 0]        9 2 30 17

Where this departs from the letter of the appendix:
    DGT-12, 13, 17  are misprinted: the scale belongs inside the softmax; Y and Grad_V are made of P^, not of P.
    DGT-16          is the gradient of P^; between it and the gradient of P stands the derivative of the softmax.
    forms 3 and 4   "directly written": a key that several groups selected (G k / S of them on average: 1.5, 6 and 24
                    in DGT-T's first three stages) has the sum of their gradients. A plain store keeps one of them,
                    whichever came last; so it is an atomic add. `gradients(atomic=False)` is the text's letter.
    the sort        P' goes back to the order of P after form 1, says the text, and is sorted again before form 2. A
                    softmax of rows does not mind their order: here X_Q and Grad_Y are sorted, Y and Grad_Q put back.
The zeros change no number: row l of a product depends on row l of its left factor alone, and only rows of the group are
written. The text has both, and so has this file.

float32 only. Runs on a CUDA device, or anywhere, slowly, in numba's simulator: NUMBA_ENABLE_CUDASIM=1, set before numba
is imported. Nothing imports this file, and with it numba.cuda, before it is used.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numba import config, cuda, float32
from torch import Tensor
from torch.autograd.function import once_differentiable

ZERO = np.float32(0)
SIMULATED = bool(config.ENABLE_CUDASIM)
T = 4 if SIMULATED else 16  # side of a tile, a constant of the compiled kernels; threads are slow to simulate
MOST_BLOCKS = 65535  # along the second and third direction of a grid

# Z counts heads of images; C: channels of a head; z, l, c, i: indices of head, query, channel and group; n: number of a
# key among those that its group selected; x, y: of a thread in its block. Neighbouring x read neighbouring addresses.

# ---------------------------------------------------------------------------------------------------------------------
# Forms 1 and 2: a tile of rows of sorted queries
# ---------------------------------------------------------------------------------------------------------------------


@cuda.jit
def form_1(A, B, group, starts, selected, out):
    """out_i = A_i B_i^T. A (Z, L, C) and out (Z, L, k) sorted, B (Z, S, C). DGT-11: X_Q, X_K; DGT-16: Grad_Y, X_V."""
    a = cuda.shared.array((T, T), float32)
    b = cuda.shared.array((T, T), float32)  # on a line of its own: in the simulator, arrays of one line are one array
    x, y, z = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.z
    L, C, k = A.shape[1], A.shape[2], selected.shape[2]
    first_l, first_n = cuda.blockIdx.y * T, cuda.blockIdx.x * T
    l, n = first_l + y, first_n + x
    last_l = first_l + T - 1 if first_l + T <= L else L - 1
    for i in range(group[z, first_l], group[z, last_l] + 1):  # "different groups in order"
        if starts[z, i] == starts[z, i + 1]:
            continue  # no query chose it
        related = starts[z, i] <= l < starts[z, i + 1]
        total = ZERO
        for c in range(0, C, T):
            a[y, x] = A[z, l, c + x] if related and c + x < C else ZERO  # unrelated rows are zero
            near = first_n + y < k and c + x < C
            b[x, y] = B[z, selected[z, i, first_n + y], c + x] if near else ZERO  # a row of B is a column of B^T
            cuda.syncthreads()
            for t in range(T):
                total += a[y, t] * b[t, x]  # DGT-11, DGT-16
            cuda.syncthreads()
        if related and n < k:  # "the masked part also will be ignored"
            out[z, l, n] = total


@cuda.jit
def form_2(A, B, group, starts, selected, out):
    """out_i = A_i B_i. A (Z, L, k) and out (Z, L, C) sorted, B (Z, S, C). DGT-13: P^, X_V; DGT-14: Grad_P, X_K."""
    a = cuda.shared.array((T, T), float32)
    b = cuda.shared.array((T, T), float32)
    x, y, z = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.z
    L, C, k = A.shape[1], B.shape[2], selected.shape[2]
    first_l = cuda.blockIdx.y * T
    l, c = first_l + y, cuda.blockIdx.x * T + x
    last_l = first_l + T - 1 if first_l + T <= L else L - 1
    for i in range(group[z, first_l], group[z, last_l] + 1):
        if starts[z, i] == starts[z, i + 1]:
            continue
        related = starts[z, i] <= l < starts[z, i + 1]
        total = ZERO
        for n in range(0, k, T):
            a[y, x] = A[z, l, n + x] if related and n + x < k else ZERO
            b[y, x] = B[z, selected[z, i, n + y], c] if n + y < k and c < C else ZERO  # rows now, not columns
            cuda.syncthreads()
            for t in range(T):
                total += a[y, t] * b[t, x]  # DGT-13, DGT-14
            cuda.syncthreads()
        if related and c < C:
            out[z, l, c] = total


# ---------------------------------------------------------------------------------------------------------------------
# Forms 3 and 4: a tile of the selected keys of one group
# ---------------------------------------------------------------------------------------------------------------------


@cuda.jit
def form_3(A, B, starts, selected, out, atomic):
    """out_i^T += A_i^T B_i. A (Z, L, C) and B (Z, L, k) sorted, out (Z, S, C). DGT-15: X_Q, Grad_P."""
    a = cuda.shared.array((T, T), float32)
    b = cuda.shared.array((T, T), float32)
    x, y, i, z = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.y, cuda.blockIdx.z
    C, k = A.shape[2], B.shape[2]
    across = (k + T - 1) // T
    first_c, first_n = cuda.blockIdx.x // across * T, cuda.blockIdx.x % across * T
    c, n = first_c + y, first_n + x
    begin, end = starts[z, i], starts[z, i + 1]
    total = ZERO
    for l in range(begin, end, T):
        a[x, y] = A[z, l + y, first_c + x] if l + y < end and first_c + x < C else ZERO  # a row of A: a column of A^T
        b[y, x] = B[z, l + y, n] if l + y < end and n < k else ZERO
        cuda.syncthreads()
        for t in range(T):
            total += a[y, t] * b[t, x]  # DGT-15
        cuda.syncthreads()
    if begin < end and c < C and n < k:
        if atomic:
            cuda.atomic.add(out, (z, selected[z, i, n], c), total)  # another group may have selected the key as well
        else:
            out[z, selected[z, i, n], c] = total  # "directly written": what another group wrote is lost


@cuda.jit
def form_4(A, B, starts, selected, out, atomic):
    """out_i += A_i^T B_i. A (Z, L, k) and B (Z, L, C) sorted, out (Z, S, C). DGT-17: P^, Grad_Y."""
    a = cuda.shared.array((T, T), float32)
    b = cuda.shared.array((T, T), float32)
    x, y, i, z = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.y, cuda.blockIdx.z
    k, C = A.shape[2], B.shape[2]
    across = (C + T - 1) // T
    first_n, first_c = cuda.blockIdx.x // across * T, cuda.blockIdx.x % across * T
    n, c = first_n + y, first_c + x
    begin, end = starts[z, i], starts[z, i + 1]
    total = ZERO
    for l in range(begin, end, T):
        a[x, y] = A[z, l + y, first_n + x] if l + y < end and first_n + x < k else ZERO
        b[y, x] = B[z, l + y, c] if l + y < end and c < C else ZERO
        cuda.syncthreads()
        for t in range(T):
            total += a[y, t] * b[t, x]  # DGT-17
        cuda.syncthreads()
    if begin < end and n < k and c < C:
        if atomic:
            cuda.atomic.add(out, (z, selected[z, i, n], c), total)
        else:
            out[z, selected[z, i, n], c] = total


# ---------------------------------------------------------------------------------------------------------------------
# Attention of the four forms
# ---------------------------------------------------------------------------------------------------------------------


class Sorting(NamedTuple):
    """Queries by group: place p of the sorted order has query order[p]; group i has places starts[i] to starts[i+1]."""

    order: Tensor  # (Z, L)
    group: Tensor  # (Z, L), ascending
    starts: Tensor  # (Z, G + 1)


def sort_by_group(groups: Tensor, G: int) -> Sorting:
    """The sorting of groups (Z, L) in [0, G); within a group queries keep their order."""
    group, order = groups.sort(dim=1, stable=True)
    sizes = torch.zeros(groups.shape[0], G + 1, dtype=torch.int64, device=groups.device)
    sizes.scatter_add_(1, groups + 1, torch.ones_like(groups))
    return Sorting(order, group, sizes.cumsum(1))


def taken(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x (Z, L, C) in sorted order."""
    return x.gather(1, order[:, :, None].expand_as(x))


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x (Z, L, C), which are sorted, in the order before."""
    return torch.empty_like(x).scatter_(1, order[:, :, None].expand_as(x), x)


def tiles(size: int) -> int:
    """How many tiles cover `size` numbers."""
    return -(-size // T)


def shared_array(self, shape: tuple[int, int], dtype) -> np.ndarray:
    """The simulator's `cuda.shared.array` in one step: its own looks and then makes, and two threads may get two."""
    caller = sys._getframe(1)
    return self._allocations.setdefault((caller.f_code, caller.f_lineno), np.empty(shape, str(dtype)))


@contextmanager
def simulation() -> Iterator[None]:
    """The simulator with shared arrays that are shared, and threads that take turns fast.

    They ask in a loop whether all are at the barrier, and Python lets each ask for 5 ms.
    """
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    array, interval = FakeCUDAShared.array, sys.getswitchinterval()
    FakeCUDAShared.array = shared_array
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        FakeCUDAShared.array = array
        sys.setswitchinterval(interval)


def launch(kernel: Callable, grid: tuple[int, int, int], *arguments) -> None:
    """kernel(*arguments) by a grid of blocks of T x T threads, on the memory of tensors, which must be contiguous."""
    if max(grid[1:]) > MOST_BLOCKS:
        raise ValueError(f"q: expected at most {MOST_BLOCKS} heads, groups and tiles of queries, got a grid of {grid}")
    if SIMULATED:
        with simulation():
            kernel[grid, (T, T)](*(a.numpy() if isinstance(a, Tensor) else a for a in arguments))
        return
    device = arguments[0].device
    stream = cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)
    with cuda.gpus[device.index]:
        kernel[grid, (T, T), stream](*(cuda.as_cuda_array(a) if isinstance(a, Tensor) else a for a in arguments))


def rows_times_keys(A: Tensor, B: Tensor, sorting: Sorting, selected: Tensor) -> Tensor:
    """Form 1: (Z, L, k)."""
    Z, L, k = A.shape[0], A.shape[1], selected.shape[2]
    out = A.new_empty(Z, L, k)
    launch(form_1, (tiles(k), tiles(L), Z), A, B, sorting.group, sorting.starts, selected, out)
    return out


def rows_times_values(A: Tensor, B: Tensor, sorting: Sorting, selected: Tensor) -> Tensor:
    """Form 2: (Z, L, C)."""
    Z, L, C = A.shape[0], A.shape[1], B.shape[2]
    out = A.new_empty(Z, L, C)
    launch(form_2, (tiles(C), tiles(L), Z), A, B, sorting.group, sorting.starts, selected, out)
    return out


def columns_to_keys(
    form: Callable, A: Tensor, B: Tensor, S: int, sorting: Sorting, selected: Tensor, atomic: bool
) -> Tensor:
    """Forms 3 and 4: (Z, S, C), what no group selected being zero."""
    (Z, G, k), C = selected.shape, (A if form is form_3 else B).shape[2]
    out = A.new_zeros(Z, S, C)
    launch(form, (tiles(C) * tiles(k), G, Z), A, B, sorting.starts, selected, out, atomic)
    return out


def forward(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor, scale: float) -> tuple:
    """Y (Z, L, C), and for the backward P^' (Z, L, k) and the sorting; q (Z, L, C), k and v (Z, S, C)."""
    sorting = sort_by_group(groups, selected.shape[1])
    logits = rows_times_keys(taken(q, sorting.order), k, sorting, selected)  # DGT-11
    weights = (logits * scale).softmax(-1)  # DGT-12
    return put_back(rows_times_values(weights, v, sorting, selected), sorting.order), weights, sorting  # DGT-13


def backward(
    grad: Tensor, weights: Tensor, sorting: Sorting, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, scale: float,
    atomic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of Y and what the forward kept."""
    (q, grad), S = (taken(x, sorting.order) for x in (q, grad)), k.shape[1]
    grad_weights = rows_times_keys(grad, v, sorting, selected)  # DGT-16
    grad_logits = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    return (
        put_back(rows_times_values(grad_logits, k, sorting, selected), sorting.order),  # DGT-14
        columns_to_keys(form_3, q, grad_logits, S, sorting, selected, atomic),  # DGT-15
        columns_to_keys(form_4, weights, grad, S, sorting, selected, atomic),  # DGT-17
    )


# ---------------------------------------------------------------------------------------------------------------------
# The driver
# ---------------------------------------------------------------------------------------------------------------------


def available() -> tuple[bool, str]:
    """Whether the forms can run, and where, or why not."""
    if SIMULATED:
        return True, "numba's CUDA simulator, on the CPU"
    if not torch.cuda.is_available():
        return False, "no CUDA device that torch can use, and numba's simulator is off (NUMBA_ENABLE_CUDASIM=1)"
    if not cuda.is_available():
        return False, "numba finds no CUDA driver or no libNVVM, which comes with the CUDA toolkit"
    return True, torch.cuda.get_device_name()


class _GroupedAttention(torch.autograd.Function):
    """The four forms as one differentiable operation of torch, of tensors (Z, ..)."""

    @staticmethod
    def forward(ctx, q, k, v, groups, selected, scale):
        out, weights, sorting = forward(q, k, v, groups, selected, scale)
        ctx.save_for_backward(weights, *sorting, q, k, v, selected)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, order, group, starts, *inputs = ctx.saved_tensors
        slopes = backward(grad.contiguous(), weights, Sorting(order, group, starts), *inputs, ctx.scale)
        return *slopes, None, None, None


def grouped_attention(q, k, v, groups, selected, scale: float | None = None):
    """Attention of every query to the keys that its group selected, by forms 1 and 2; its gradient by all four.

    q (B, h, L, d), k and v (B, h, S, d) float32; groups (B, h, L) whole numbers in [0, G); selected (B, h, G, n) in
    [0, S), distinct within a group. scale: of the logits, d ** -0.5 if None. All numpy arrays or all tensors of torch,
    which then have gradients; on a CUDA device, in the simulator on the CPU. Returns (B, h, L, d) of the same kind.

    Raises RuntimeError where the forms cannot run, TypeError and ValueError for what does not fit. DGT appendix C.
    """
    arguments = prepared(q, k, v, groups, selected)
    return as_given(_GroupedAttention.apply(*arguments, scale_of(q, scale)), q)


def gradients(grad, q, k, v, groups, selected, scale: float | None = None, *, atomic: bool = True) -> tuple:
    """Gradients of q, k and v for that of the output (B, h, L, d), without autograd; else as `grouped_attention`.

    atomic=False stores the tiles of Grad_K and Grad_V instead of adding them, as the appendix says: a key that several
    groups selected keeps the gradient of one.
    """
    arguments = prepared(q, k, v, groups, selected)
    if tuple(grad.shape) != tuple(q.shape):
        raise ValueError(f"grad: expected the shape of q {tuple(q.shape)}, got {tuple(grad.shape)}")
    (grad,) = flattened({"grad": grad})
    q_, k_, v_, groups_, selected_ = (x.detach() for x in arguments)
    scale = scale_of(q, scale)
    _, weights, sorting = forward(q_, k_, v_, groups_, selected_, scale)
    slopes = backward(grad.detach(), weights, sorting, q_, k_, v_, selected_, scale, atomic)
    return tuple(as_given(slope, x) for slope, x in zip(slopes, (q, k, v), strict=True))


def scale_of(q, scale: float | None) -> float:
    """The scale of the logits."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def as_given(x: Tensor, like):
    """x (Z, ..) in the shape and of the kind of `like`."""
    x = x.reshape(like.shape)
    return x if isinstance(like, Tensor) else x.detach().cpu().numpy()


def flattened(arrays: dict) -> list[Tensor]:
    """Arrays or tensors (B, h, ..) as contiguous tensors (B h, ..) where the forms run, index arrays as int64."""
    place = "cpu" if SIMULATED else "cuda"
    found = []
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray | Tensor):
            raise TypeError(f"{name}: expected a numpy array or a tensor, got {type(x).__name__}")
        tensor = x if isinstance(x, Tensor) else torch.tensor(x, device=place)
        if tensor.device.type != place:
            raise ValueError(f"{name}: expected a tensor on {place}, got one on {tensor.device}")
        if name not in ("groups", "selected"):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {tensor.dtype}")
        elif tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name}: expected whole numbers, got {tensor.dtype}")
        else:
            tensor = tensor.long()
        found.append(tensor.flatten(0, 1).contiguous())
    return found


def prepared(q, k, v, groups, selected) -> list[Tensor]:
    """The arguments, checked, as `flattened` gives them."""
    can, why = available()
    if not can:
        raise RuntimeError(f"the four forms cannot run here: {why}")
    arrays = {"q": q, "k": k, "v": v, "groups": groups, "selected": selected}
    patterns = {"q": "B h L d", "k": "B h S d", "v": "B h S d", "groups": "B h L", "selected": "B h G n"}
    sizes: dict[str, int] = {}
    for name, pattern in patterns.items():
        shape, letters = tuple(getattr(arrays[name], "shape", ())), pattern.split()
        fits = len(shape) == len(letters) and 0 not in shape
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(letters, shape, strict=True)):
            known = ", ".join(f"{a} = {sizes[a]}" for a in letters if a in sizes)
            raise ValueError(f"{name}: expected shape ({pattern}), none empty{known and ', ' + known}, got {shape}")
    tensors = flattened(arrays)
    for name, indices, limit in (("groups", tensors[3], sizes["G"]), ("selected", tensors[4], sizes["S"])):
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: expected indices in [0, {limit}), got {low} to {high}")
    return tensors
