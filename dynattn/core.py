"""What every mechanism rests on: coordinates, bilinear reading, heads, dense attention, windows, regions.

Glossary, for the whole package. Loop variables, einsum letters and shape comments all use it.

    B b      batch                           H W       rows and columns of a map
    C        channels                        i j       row and column of a query
    h m      heads, one head                 L N l n   queries and keys; one query, one key
    d c      channels of a head, one         S         source tokens: what keys may be chosen from
    g        groups of a mechanism           w s       window side and shift
    G j      groups of queries, one group    R r       regions of a map, one region
    n        keys or regions that one reads  Tq Tk     queries and keys in a region
    (row, col)  order of every coordinate inside the package; (x, y) only where a plot or grid_sample wants it.

A position is written in one of three units, and the name says which:
    pixel       of the map: 0 is the centre of the first cell, H - 1 of the last
    normalised  -1 is the centre of the first cell, +1 of the last (`align_corners=True`)
    image       a pixel of the input image, centres at integers
Equation tags such as DAT-8 (paper, number) stand wherever an equation becomes code.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from operator import index

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from dynattn.kernels import derivatives, indices, operators, sampling
from dynattn.kernels.choice import (  # noqa: F401  (for mechanisms)
    OPERATIONS,
    Forms,
    exporting,
    larger,
    operation,
    smaller,
    surely,
)
from dynattn.kernels.derivatives import transforming  # noqa: F401

# einops keeps a table of the classes that it has met; a compiled graph is made again when the table grows.
rearrange(nn.Parameter(torch.empty(1)), "a -> a")

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def bind(known: dict[str, int] | None = None, **arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Hold tensors to shape patterns and return the sizes, e.g. `bind(q=(q, "B h L d"), k=(k, "B h S d"))["L"]`.

    A letter stands for one size, the same everywhere, which may be `known`; a number for itself. All tensors must be
    floating and share dtype and device. Raises TypeError or ValueError that names the argument, what came and what
    would be right.
    """
    known = known or {}
    sizes: dict[str, int] = dict(known)
    shown = lambda pattern: " ".join(str(known.get(letter, letter)) for letter in pattern.split())  # noqa: E731
    first_name, first = None, None
    for name, (tensor, pattern) in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor of shape ({shown(pattern)}), got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {tensor.dtype}")
        letters = pattern.split()
        if tensor.ndim != len(letters):
            what = f"{len(letters)} dimensions ({shown(pattern)})"
            raise ValueError(f"{name}: expected {what}, got shape {tuple(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                meaning = "" if letter.isdigit() or letter in known else f" with {letter} = {expected}"
                raise ValueError(f"{name}: expected shape ({shown(pattern)}){meaning}, got shape {tuple(tensor.shape)}")
            if size == 0:
                raise ValueError(f"{name}: no dimension may be empty, got shape {tuple(tensor.shape)}")
        if first is None:
            first_name, first = name, tensor
        elif (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise TypeError(
                f"{name}: expected {first.dtype} on {first.device} as {first_name} has, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    return sizes


def check_kind(name: str, tensor: object, dtype: torch.dtype, like: Tensor) -> None:
    """Raise TypeError unless `tensor` is one of that dtype, on the device of `like`, which is q."""
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        raise TypeError(f"{name}: expected a tensor of {dtype}, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if tensor.device != like.device:
        raise TypeError(f"{name}: expected a tensor on {like.device} as q is, got one on {tensor.device}")


def check_indices(name: str, given: object, like: Tensor, shape: tuple[int, ...], below: int) -> None:
    """Raise TypeError, ValueError unless what is given is int64 of that shape, in [0, below), on the device of q."""
    check_kind(name, given, torch.int64, like)
    if tuple(given.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")
    if given.is_meta:  # there are no values
        return
    if torch.compiler.is_compiling():
        require(((given >= 0) & (given < below)).all(), f"{name}: expected values from 0 to {below - 1}")
    else:
        indices.check(name, given, 0, below - 1)


def check_distinct(name: str, given: Tensor, below: int, what: str) -> None:
    """Raise ValueError where a row of indices, in [0, below), holds one twice. what: that is, for the message."""
    require(indices.distinct(given, below), f"{name}: expected distinct {what}, got one twice")


def require(held: Tensor | bool, message: str) -> None:
    """Raise ValueError unless something holds; a compiled graph raises RuntimeError, when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(held, message)
    elif not (isinstance(held, Tensor) and held.is_meta) and not indices.beneath(torch.as_tensor(held)).all():
        raise ValueError(message)


def remind(count: int, limit: int, message: str) -> int:
    """One more than `count`; a warning where that is `limit`."""
    if count + 1 == limit:
        warnings.warn(message, stacklevel=3)
    return count + 1


def counts() -> bool:
    """Whether this forward pass is one of training, from which a layer may collect.

    A backward pass that computes the forward again (activation checkpointing) must not count it twice. What inference
    mode makes cannot be added to outside of it. A compiled graph cannot ask for that mode, and counts.
    """
    if torch.compiler.is_compiling():  # a graph that is computed again adds nothing again
        return not exporting()
    again = torch._C._current_graph_task_id() != -1
    return not again and not transforming() and not torch.is_inference_mode_enabled()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A block that autocast leaves alone. Where tensors have no numbers, on "meta", there is no autocast."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def one_of(name: str, value: object, allowed: tuple) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def positive(name: str, value: object) -> int:
    """`value` as an int; raises unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    value = value if isinstance(value, int | torch.SymInt) else index(value)  # a graph for any size has no numbers
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def divisor(name: str, value: object, whole: int) -> int:
    """`value` as an int; raises unless it is a whole number of at least 1 that divides `whole`."""
    if whole % (value := positive(name, value)):
        raise ValueError(f"{name}: expected a divisor of {whole}, got {value}")
    return value


def rate(name: str, value: object) -> float:
    """`value`, if it is a share of what may be dropped, from 0 to below 1; else raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got {value!r}")
    return value


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) from a whole number (a square) or a pair of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if not isinstance(value, tuple | list | torch.Size) or len(value) != 2:
        raise TypeError(f"{name}: expected a whole number or a pair (rows, columns), got {value!r}")
    return positive(f"{name}[0]", value[0]), positive(f"{name}[1]", value[1])


def scale_or_default(scale: float | None, d: int) -> float:
    """`scale`, or the 1 / sqrt(d) of scaled dot products (DAT-2)."""
    if scale is None:
        return d**-0.5
    number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not number or not (torch.compiler.is_compiling() or math.isfinite(scale)):  # graphs cannot ask this of a number
        raise ValueError(f"scale: expected a finite float or None, got {scale!r}")
    return float(scale)


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates
# ---------------------------------------------------------------------------------------------------------------------


def axis(n: int, grid: str, like: Tensor) -> Float[Tensor, " n"]:
    """n evenly spaced normalised positions: "corner" from -1 to +1, "centre" (2i + 1) / n - 1, half a cell inside.

    A single position is 0 either way.
    """
    i = torch.arange(n, dtype=like.dtype, device=like.device)
    if grid == "centre":
        return (2 * i + 1) / n - 1
    return 2 * i / (n - 1) - 1 if n > 1 else torch.zeros_like(i)


def grid_points(shape: tuple[int, int], grid: str, like: Tensor) -> Float[Tensor, "N 2"]:
    """All positions (row, col) of a regular grid, row-major, in the dtype and on the device of `like`."""
    rows, cols = torch.meshgrid(axis(shape[0], grid, like), axis(shape[1], grid, like), indexing="ij")
    return torch.stack([rows, cols], dim=-1).flatten(0, 1)


def stretch(points: Float[Tensor, "*batch 2"], by: Sequence[float]) -> Float[Tensor, "*batch 2"]:
    """Rows times one number, columns times another. A traced graph would keep the numbers of a tensor of both."""
    return torch.stack([points[..., 0] * by[0], points[..., 1] * by[1]], dim=-1)


def to_pixels(points: Float[Tensor, "*batch 2"], shape: tuple[int, int]) -> Float[Tensor, "*batch 2"]:
    """Normalised (row, col) to pixels of an H x W map: (p + 1)(H - 1) / 2."""
    return stretch(points + 1, (shape[0] - 1, shape[1] - 1)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Bilinear reading (DAT equation 8)
# ---------------------------------------------------------------------------------------------------------------------


def hat(a: Tensor, b: int) -> Tensor:
    """g(a, b) = max(0, 1 - |a - b|) of DAT-8. At its three kinks the derivative is the one from the right."""
    if b <= a < b + 1:
        return 1 - (a - b)
    if b - 1 <= a < b:
        return 1 - (b - a)
    return 0 * a


def read_bilinear(z: Float[Tensor, "H W"], row: Tensor, col: Tensor) -> Tensor:
    """phi(z; (row, col)) of DAT-8 for one channel, in pixels: the sum over every location of the map."""
    H, W = z.shape
    return sum(hat(row, i) * hat(col, j) * z[i, j] for i in range(H) for j in range(W))  # DAT-8


def sample_points_loops(x, points):
    """DAT-8 as it is written: for every point and channel, every location of the map."""
    (B, C, H, W), N = x.shape, points.shape[1]
    pixels = to_pixels(points, (H, W))
    out = [read_bilinear(x[b, c], *pixels[b, n]) for b in range(B) for c in range(C) for n in range(N)]
    return torch.stack(out).reshape(B, C, N)


def sample_points_torch(x, points):
    """DAT-8 on the four neighbours that matter, by torch's grid_sample."""
    precise = torch.promote_types(x.dtype, torch.float32)  # it sums gradients in the dtype that it reads in
    grid = rearrange(points.flip(-1), "B N xy -> B 1 N xy").to(precise)
    out = F.grid_sample(x.to(precise), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return out[:, :, 0].to(x.dtype)


operators.has_plain_form("sample_points", sample_points_torch)


@operation(loops=sample_points_loops, torch=sample_points_torch, **sampling.FORMS)
def sample_points(
    x: Float[Tensor, "B C H W"], points: Float[Tensor, "B N 2"], *, impl: str = "auto"
) -> Float[Tensor, "B C N"]:
    """Read a map at fractional positions: bilinear, zeros outside, differentiable in the map and in the positions.

    Shapes: x (B, C, H, W); points (B, N, 2) as (row, col), where -1 and +1 are the centres of the first and the last
    cell (align_corners=True). A point more than one cell outside reads 0; in between the border fades.
    Returns (B, C, N). Raises TypeError, ValueError on wrong arguments. "auto" is torch's grid_sample everywhere: on two
    cores it takes .4 to .9 of the kernel's time. Source: DAT section 3.2, equation 8.
    """
    bind(x=(x, "B C H W"), points=(points, "B N 2"))
    return sample_points.forms.run(impl, x, points)


def bilinear_weights(points: Float[Tensor, "*batch N 2"], shape: tuple[int, int]) -> Float[Tensor, "*batch N S"]:
    """The matrix of DAT-8: row n holds the weights with which point n reads the S = H W cells of a map."""
    H, W = shape
    pixels = to_pixels(points, shape)
    cells_i, cells_j = (torch.arange(n, dtype=points.dtype, device=points.device) for n in shape)
    weight_i = (1 - (pixels[..., 0, None] - cells_i).abs()).clamp(min=0)  # (*batch, N, H)
    weight_j = (1 - (pixels[..., 1, None] - cells_j).abs()).clamp(min=0)  # (*batch, N, W)
    return torch.einsum("...ni,...nj->...nij", weight_i, weight_j).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Heads and dense attention (DAT equations 2 and 3)
# ---------------------------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """GELU of what nobody else reads: without gradients in its place, since new memory takes a CPU as long to get.

    x: never what a layer puts out, which a hook of a user may hold.
    """
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # which decides by itself what lies where
    return F.gelu(x) if graph or torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


PART = 2_000_000  # numbers of a map, 8 MB of float32: a CPU keeps that near, and need not ask for new memory


def by_images(
    layer: nn.Module, function: Callable, x: Float[Tensor, "B H W C"], numbers: int
) -> Float[Tensor, "B h w out"]:
    """function(x), on a CPU without gradients for a few images at a time: what lies in between then stays in the cache.

    layer: whose function it is; where a part of it is in training mode, all images are computed at once, since batch
    norm looks at all of them. numbers: that the largest map in between has for one image. A hook on a part of the layer
    is called with a few images too.
    """
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if graph or torch.is_grad_enabled() or x.device.type != "cpu" or any(part.training for part in layer.modules()):
        return function(x)
    parts = -(-x.shape[0] // max(1, PART // numbers))
    return function(x) if parts < 2 else torch.cat([function(images) for images in x.chunk(parts)])


def split_heads(x: Float[Tensor, "B H W C"], heads: int) -> Float[Tensor, "B h L d"]:
    """A channels-last map to row-major tokens of each head; head m owns channels [m d, (m + 1) d)."""
    return rearrange(x, "B H W (h d) -> B h (H W) d", h=heads)


def merge_heads(x: Float[Tensor, "B h L d"], shape: tuple[int, int]) -> Float[Tensor, "B H W C"]:
    """The concatenation of DAT-3: the inverse of `split_heads`."""
    return rearrange(x, "B h (H W) d -> B H W (h d)", H=shape[0], W=shape[1])


def softmax_loops(logits: list[Tensor]) -> list[Tensor]:
    """Softmax of a list of scalars; the largest is subtracted so that exp cannot overflow."""
    top = max(logit.detach() for logit in logits)
    powers = [(logit - top).exp() for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def dense_attention_loops(q, k, v, bias, scale):
    """DAT-2 one number at a time: z = softmax(q k^T / sqrt(d) + bias) v."""
    (B, h, L, d), N = q.shape, k.shape[2]
    bias = None if bias is None else bias.expand(B, h, L, N)
    z = []
    for b in range(B):
        for m in range(h):
            for l in range(L):
                logits = [sum(q[b, m, l, c] * k[b, m, n, c] for c in range(d)) * scale for n in range(N)]
                if bias is not None:
                    logits = [logits[n] + bias[b, m, l, n] for n in range(N)]
                weights = softmax_loops(logits)
                z += [sum(weights[n] * v[b, m, n, c] for n in range(N)) for c in range(d)]
    return torch.stack(z).reshape(B, h, L, d)


def dense_attention_torch(q, k, v, bias, scale, dropout=0.0):
    """DAT-2 by torch's scaled_dot_product_attention, which never keeps the weights; with all derivatives.

    bias: added to the logits; one of booleans says which keys may be read. dropout: the share of the weights that is
    dropped.
    """
    return derivatives.attention(q, k, v, bias, scale, dropout)


@operation(loops=dense_attention_loops, torch=dense_attention_torch)
def dense_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h N d"],
    v: Float[Tensor, "B h N d"],
    *,
    bias: Float[Tensor, "h L N"] | Float[Tensor, "#B #h L N"] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Every query reads every key: z = softmax(scale q k^T + bias) v in each head.

    Shapes: q (B, h, L, d); k, v (B, h, N, d); bias added to the logits, (h, L, N), or (B, h, L, N) where B and h may
    be 1, or None. `scale` None is d^-0.5.
    Returns (B, h, L, d). Raises TypeError, ValueError on wrong arguments. Source: DAT section 3.1, equation 2.
    """
    shapes = {"q": (q, "B h L d"), "k": (k, "B h N d"), "v": (v, "B h N d")}
    if isinstance(bias, Tensor) and bias.ndim == 4:
        one_or = ["1" if n == 1 else letter for n, letter in zip(bias.shape[:2], "Bh", strict=True)]
        shapes["bias"] = (bias, " ".join([*one_or, "L", "N"]))
    elif bias is not None:
        shapes["bias"] = (bias, "h L N")
    sizes = bind(**shapes)
    return dense_attention.forms.run(impl, q, k, v, bias, scale_or_default(scale, sizes["d"]))


def attention_weights(
    q: Float[Tensor, "*batch L d"],
    k: Float[Tensor, "*batch N d"],
    bias: Float[Tensor, "*broadcast L N"] | None,
    scale: float,
) -> Float[Tensor, "*batch L N"]:
    """The softmax of DAT-2 itself, for records and pictures."""
    logits = torch.einsum("...ld,...nd->...ln", q, k) * scale
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def stable_order(values: Float[Tensor, "*batch N"], *, descending: bool = False) -> Int[Tensor, "*batch N"]:
    """The numbers of the values in each row, the smallest first, or the largest; of equals the lowest number first."""
    if not exporting():
        return values.argsort(dim=-1, descending=descending, stable=True)
    # ONNX has no stable sort. The place of a value is the number of values before it; no two places are equal.
    number = torch.arange(values.shape[-1], device=values.device)
    one, other = values[..., :, None], values[..., None, :]
    ahead = other > one if descending else other < one
    return (ahead | ((other == one) & (number < number[:, None]))).sum(dim=-1).argsort(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Windows and regions
# ---------------------------------------------------------------------------------------------------------------------


def padding_to(shape: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns to add at the bottom and right so that both sides are whole multiples."""
    return tuple((side + w - 1) // w * w - side for side, w in zip(shape, multiple, strict=True))


def known(size: int, other: int) -> bool:
    """Whether a graph knows if two sizes are equal, which it does unless it is for many sizes."""
    return surely(size == other) or surely(size != other)


def pad_map(x: Num[Tensor, "*batch H W C"], padding: tuple[int, int]) -> Num[Tensor, "*batch Hp Wp C"]:
    """Append zero rows and columns to a channels-last map; no copy when there is nothing to add."""
    if surely(padding[0] == 0) and surely(padding[1] == 0):
        return x
    if exporting() or all(known(more, 0) for more in padding):
        return F.pad(x, (0, 0, 0, padding[1], 0, padding[0]))
    # The gradient of a padding is a slice: see `crop`.
    for dim, more in zip((-3, -2), padding, strict=True):
        shape, index = list(x.shape), torch.arange(x.shape[dim], device=x.device)
        shape[dim] += more
        x = x.new_zeros(shape).index_copy(dim, index, x)
    return x


def partition_windows(x: Num[Tensor, "B H W C"], window: tuple[int, int]) -> Num[Tensor, "n T C"]:
    """Cut maps into windows of T = wi wj tokens, row-major, n = B windows; sides must be whole multiples."""
    if exporting():  # in a graph for any size torch cannot see that the sides are whole multiples
        x = x.unfold(1, window[0], window[0]).unfold(2, window[1], window[1])
        return rearrange(x, "B I J C wi wj -> (B I J) (wi wj) C")
    return rearrange(x, "B (I wi) (J wj) C -> (B I J) (wi wj) C", wi=window[0], wj=window[1])


def merge_windows(x: Num[Tensor, "n T C"], window: tuple[int, int], shape: tuple[int, int]) -> Num[Tensor, "B H W C"]:
    """The inverse of `partition_windows` for maps of `shape`."""
    I, J = shape[0] // window[0], shape[1] // window[1]
    return rearrange(x, "(B I J) (wi wj) C -> B (I wi) (J wj) C", I=I, J=J, wi=window[0], wj=window[1])


def crop(x: Num[Tensor, "B Hp Wp C"], shape: tuple[int, int]) -> Num[Tensor, "B H W C"]:
    """The first rows and columns of a channels-last map; the inverse of `pad_map`."""
    if exporting() or not all(map(known, shape, x.shape[1:3])):  # of a slice a graph asks whether it is contiguous
        rows, cols = (torch.arange(side, device=x.device) for side in shape)
        return x.index_select(1, rows).index_select(2, cols)
    return x[:, : shape[0], : shape[1]]


def region_cells(shape: tuple[int, int], S: int) -> list[list[int]]:
    """The cells of every region of a map, row-major: at most S x S regions of equal sides, the last ones smaller."""
    (H, W), (hi, wi) = shape, (-(-shape[0] // S), -(-shape[1] // S))
    corners = [(top, left) for top in range(0, H, hi) for left in range(0, W, wi)]
    return [
        [i * W + j for i in range(top, min(top + hi, H)) for j in range(left, min(left + wi, W))]
        for top, left in corners
    ]


class Regions:
    """How a map of (H, W) cells is cut into at most S x S regions of equal sides, row-major.

    A side that S does not divide gets padding at the bottom and right, less than one region: every region has cells of
    the map. Nobody reads the padding, and no mean counts it.
    """

    def __init__(self, shape: tuple[int, int], S: int):
        self.shape, self.side = shape, tuple(-(-n // S) for n in shape)
        self.padding = padding_to(shape, self.side)
        self.grid = tuple((n + more) // side for n, more, side in zip(shape, self.padding, self.side, strict=True))

    def padded(self, x: Num[Tensor, "B h L d"]) -> Num[Tensor, "B h Hp Wp d"]:
        """A row-major map with zeros where there is padding."""
        return pad_map(rearrange(x, "B h (H W) d -> B h H W d", H=self.shape[0]), self.padding)

    def windows(self, x: Num[Tensor, "B h Hp Wp d"]) -> Num[Tensor, "B h I J hi wi d"]:
        """A view of the regions of a padded map."""
        windows = x.unfold(2, self.side[0], self.side[0]).unfold(3, self.side[1], self.side[1])
        return rearrange(windows, "B h I J d hi wi -> B h I J hi wi d")

    def cut(self, x: Num[Tensor, "B h L d"]) -> Num[Tensor, "B h R T d"]:
        """The tokens of every region of a row-major map, zeros where there is padding."""
        x = self.padded(x)
        if exporting():  # in a graph for any size torch cannot see that the sides are whole multiples
            return rearrange(self.windows(x), "B h I J hi wi d -> B h (I J) (hi wi) d")
        hi, wi = self.side
        return rearrange(x, "B h (I hi) (J wi) d -> B h (I J) (hi wi) d", hi=hi, wi=wi)

    def means(self, x: Float[Tensor, "B h L d"]) -> Float[Tensor, "B h R d"]:
        """The mean token of every region of a row-major map, in float32 at least; padding does not count."""
        windows = self.windows(self.padded(x))
        rows = windows.sum(dim=-2, dtype=torch.promote_types(x.dtype, torch.float32))  # both sides at once is slow
        inside = self.inside(x)
        count = self.side[0] * self.side[1] if inside is None else inside.sum(dim=1)[:, None]
        return rearrange(rows.sum(dim=-2), "B h I J d -> B h (I J) d") / count

    def cells(self, device: torch.device) -> Int[Tensor, "R T"]:
        """Which cell of the row-major map every token of every region is; 0 where there is padding."""
        numbers = torch.arange(self.shape[0] * self.shape[1], device=device)
        return self.cut(numbers[None, None, :, None])[0, 0, :, :, 0]

    def join(self, x: Num[Tensor, "B h R T d"]) -> Num[Tensor, "B h L d"]:
        """The inverse of `cut`: a row-major map without the padding."""
        x = rearrange(x, "B h (I J) (hi wi) d -> B h (I hi) (J wi) d", I=self.grid[0], J=self.grid[1], hi=self.side[0])
        return x[:, :, : self.shape[0], : self.shape[1]].flatten(2, 3)

    def inside(self, like: Tensor) -> Bool[Tensor, "R T"] | None:
        """Which tokens of the regions are cells of the map; None where all are."""
        if surely(self.padding[0] == 0) and surely(self.padding[1] == 0):
            return None
        cells = torch.ones(1, 1, self.shape[0] * self.shape[1], 1, dtype=torch.int64, device=like.device)
        return self.cut(cells)[0, 0, :, :, 0] > 0

    def numbers(self, device: torch.device) -> Int[Tensor, " L"]:
        """The region of every cell, row-major."""
        rows, cols = (torch.arange(n, device=device) // side for n, side in zip(self.shape, self.side, strict=True))
        return (rows[:, None] * self.grid[1] + cols).flatten()


def relative_index(window: tuple[int, int]) -> tuple[Int[Tensor, "T T"], Int[Tensor, "T T"]]:
    """Row and column of a (2 wi - 1, 2 wj - 1) table for each (query, key) of a window: displacement + side - 1."""
    i, j = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    i, j = i.flatten(), j.flatten()
    return i[:, None] - i[None, :] + window[0] - 1, j[:, None] - j[None, :] + window[1] - 1


def resize_table(table: Float[Tensor, "h I J"], size: tuple[int, int]) -> Float[Tensor, "h I2 J2"]:
    """A bias table for another map or window size: bicubic, as the published fine-tuning at 384 does it."""
    if surely(table.shape[1] == size[0]) and surely(table.shape[2] == size[1]):  # else the same by interpolation
        return table
    return F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]


def resize_fixed(
    table: Float[Tensor, "h L N"], old: Sequence[int], new: Sequence[int], stride: int
) -> Float[Tensor, "h L2 N2"]:
    """A "fixed" table for another map: bicubic over the points, then over the queries."""
    down = [[-(-side // stride) for side in shape] for shape in (old, new)]
    over_points = rearrange(table, "h L (HG WG) -> h L HG WG", HG=down[0][0])
    over_points = F.interpolate(over_points, size=tuple(down[1]), mode="bicubic", align_corners=False)
    over_queries = rearrange(over_points, "h (H W) HG WG -> h (HG WG) H W", H=old[0])
    over_queries = F.interpolate(over_queries, size=tuple(new), mode="bicubic", align_corners=False)
    return rearrange(over_queries, "h N H W -> h (H W) N")


class DisplacementBias(nn.Module):
    """A bias for each head as a function of the displacement, query minus key, in cells (HLG's B_W and B_G).

    A small network, so that it knows displacements of any size: rows (I,) and columns (J,) to a table (heads, I, J).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        wide = max(dim // 16, 1)
        ends = [(wide, wide), (wide, wide), (wide, heads)]
        hidden = [part for a, b in ends for part in (nn.LayerNorm(a), nn.ReLU(), nn.Linear(a, b))]
        self.layers = nn.Sequential(nn.Linear(2, wide), *hidden)

    def forward(self, rows: Num[Tensor, " I"], cols: Num[Tensor, " J"]) -> Float[Tensor, "h I J"]:
        pairs = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).to(self.layers[0].weight.dtype)
        table = rearrange(self.layers(pairs), "I J h -> h I J")
        # Many places read one entry, and its gradients are summed in this dtype.
        return table.to(torch.promote_types(table.dtype, torch.float32))

    def of_map(
        self,
        shape: tuple[int, int],
        keys: tuple[Int[Tensor, " N"], Int[Tensor, " N"]],
        last: tuple[int, int],
        start: tuple[float, float],
    ) -> Float[Tensor, "h L N"]:
        """The bias of every cell of a map and every key, which is at `start` plus these rows and columns of cells.

        last: the largest row and column of the keys.
        """
        cells = [torch.arange(side, device=keys[0].device)[:, None] for side in shape]
        apart = [torch.arange(-end, side, device=keys[0].device) for end, side in zip(last, shape, strict=True)]
        table = self(apart[0] - start[0], apart[1] - start[1])
        i, j = (cell - key + end for cell, key, end in zip(cells, keys, last, strict=True))
        return table[:, i[:, None], j[None]].flatten(1, 2)
