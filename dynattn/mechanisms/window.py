"""Window attention, plain and shifted: what DAT puts in front of its deformable layers (DAT section 3.3, from Swin).

A query reads the tokens of its own w x w window. A shifted layer first rolls the map by s cells to the top left, so
that its windows straddle those of the plain layer; the roll is cyclic, hence tokens that came around the edge may not
mix with those that did not. With (i, j) the cell of a query and (u, v) that of a key, on a map padded to whole windows:

    window(i)  = ((i - s) mod H) // w           wrapped(i) = i < s          and the same for columns
    query (i, j) reads (u, v)  iff  window and wrapped agree in rows and in columns
    z^(m) = softmax(q k^T / sqrt(d) + B^(m)[i - u + w - 1, j - v + w - 1]) v                                 DAT-2
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from dynattn import core, tracing

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def shift_of(side: int, w: int, s: int) -> int:
    """The shift of one axis: none where a single window covers it. (Not by `if`: a graph may be for any side.)"""
    return s * core.smaller(1, (side - 1) // w)


def window_attention_loops(q, k, v, table, shape, window, shift, scale):
    """The three lines of the header, one query and one key at a time."""
    (B, h, L, d), (H, W) = q.shape, shape

    def region(i: int, side: int, w: int, s: int) -> tuple[int, bool]:
        padded, s = -(-side // w) * w, shift_of(side, w, s)
        return ((i - s) % padded) // w, i < s

    def cell_region(i: int, j: int) -> tuple:
        return region(i, H, window[0], shift[0]), region(j, W, window[1], shift[1])

    z = []
    for b in range(B):
        for m in range(h):
            for i, j in ((l // W, l % W) for l in range(L)):
                keys = [(u, w) for u in range(H) for w in range(W) if cell_region(u, w) == cell_region(i, j)]
                logits = []
                for u, w in keys:
                    logit = sum(q[b, m, i * W + j, c] * k[b, m, u * W + w, c] for c in range(d)) * scale
                    if table is not None:
                        logit = logit + table[m, i - u + window[0] - 1, j - w + window[1] - 1]
                    logits.append(logit)
                weights = core.softmax_loops(logits)  # DAT-2
                pairs = list(zip(weights, keys, strict=True))
                z += [sum(weight * v[b, m, u * W + w, c] for weight, (u, w) in pairs) for c in range(d)]
    return torch.stack(z).reshape(B, h, L, d)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How windows lie on an H x W map: sides and shift in cells, as (rows, columns)."""

    shape: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns added at the bottom and right."""
        return core.padding_to(self.shape, self.window)

    @property
    def padded(self) -> tuple[int, int]:
        """The shape of whole windows."""
        return self.shape[0] + self.padding[0], self.shape[1] + self.padding[1]

    @property
    def roll(self) -> tuple[int, int]:
        """The shift of each axis that has more than one window."""
        return tuple(shift_of(side, w, s) for side, w, s in zip(self.shape, self.window, self.shift, strict=True))

    @property
    def rolled(self) -> bool:
        """Whether the map is rolled, or may be."""
        return not all(core.surely(s == 0) for s in self.roll)

    @property
    def masked(self) -> bool:
        """Whether a window has, or may have, keys that are not to be read."""
        return self.rolled or not all(core.surely(more == 0) for more in self.padding)

    def cut(self, x: Num[Tensor, "B H W C"]) -> Num[Tensor, "n T C"]:
        """Pad, roll to the top left, cut into windows."""
        x = core.pad_map(x, self.padding)
        if self.rolled:
            x = x.roll((-self.roll[0], -self.roll[1]), dims=(1, 2))
        return core.partition_windows(x, self.window)

    def join(self, x: Num[Tensor, "n T C"]) -> Num[Tensor, "B H W C"]:
        """The inverse of `cut`."""
        x = core.merge_windows(x, self.window, self.padded)
        if self.rolled:
            x = x.roll(self.roll, dims=(1, 2))
        return core.crop(x, self.shape)

    def regions(self) -> Int[Tensor, "H W"]:
        """One number for each cell; two cells may read each other iff their numbers are equal."""
        labels = []
        for side, padded, w, s in zip(self.shape, self.padded, self.window, self.roll, strict=True):
            i = torch.arange(side)
            labels.append(2 * (((i - s) % padded) // w) + (i < s))
        return labels[0][:, None] * (labels[1].max() + 1) + labels[1][None, :]

    def may_read(self) -> Bool[Tensor, "windows T T"]:
        """Inside each window, which key a query may read. Padded tokens read each other, so that no row is empty."""
        labels = F.pad(self.regions() + 1, (0, self.padding[1], 0, self.padding[0]))
        labels = core.partition_windows(
            labels.roll((-self.roll[0], -self.roll[1]), dims=(0, 1))[None, :, :, None], self.window
        )
        return labels == labels.mT

    def bias(self, table: Float[Tensor, "h I J"] | None, like: Tensor) -> Float[Tensor, "n heads T T"] | None:
        """What a window adds to its logits: B^(m) at the displacement, and -inf at keys that are not to be read.

        In the dtype of `like`, to which autocast lowers linear maps, but no table.
        """
        bias = None
        if table is not None:
            rows, cols = core.relative_index(self.window)
            # In float32 or better: many cells read one entry, and its gradients are summed in this dtype.
            bias = table.to(torch.promote_types(table.dtype, torch.float32))[None, :, rows, cols]  # (1, h, T, T)
            bias = bias.to(like.dtype)
        if self.masked:
            forbidden = ~self.may_read().to(like.device)
            hidden = torch.zeros(forbidden.shape, dtype=like.dtype, device=like.device)
            hidden = hidden.masked_fill(forbidden, -torch.inf)[:, None]  # (windows, 1, T, T)
            bias = hidden if bias is None else bias + hidden
        return bias

    def attend(
        self,
        q: Float[Tensor, "n h T d"],
        k: Float[Tensor, "n h T d"],
        v: Float[Tensor, "n h T d"],
        table: Float[Tensor, "h I J"] | None,
        images: int,
        *,
        scale: float | None = None,
        impl: str = "auto",
        dropout: float = 0.0,
    ) -> Float[Tensor, "n h T d"]:
        """DAT-2 inside every window of so many images."""
        bias = self.bias(table, q)
        if bias is not None and not core.surely(bias.shape[0] == 1):
            bias = bias.expand(images, *bias.shape).flatten(0, 1)  # not by n: a traced graph would keep the quotient
        if dropout:
            return core.dense_attention_torch(q, k, v, bias, core.scale_or_default(scale, q.shape[-1]), dropout)
        return core.dense_attention(q, k, v, bias=bias, scale=scale, impl=impl)  # DAT-2


def window_attention_torch(q, k, v, table, shape, window, shift, scale):
    """Cut the maps into windows, attend in each, join them again."""
    layout, (B, h) = Layout(shape, window, shift), q.shape[:2]
    q, k, v = (rearrange(layout.cut(core.merge_heads(t, shape)), "n T (h d) -> n h T d", h=h) for t in (q, k, v))
    z = layout.attend(q, k, v, table, B, scale=scale, impl="torch")
    return core.split_heads(layout.join(rearrange(z, "n h T d -> n T (h d)")), h)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


def check_shift(shift: int | tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """`shift` as (rows, columns); raises unless they are whole numbers from 0 to below the window's sides."""
    both = tuple(shift) if isinstance(shift, tuple | list) else (shift, shift)
    if len(both) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) for s in both):
        raise TypeError(f"shift: expected a whole number or a pair (rows, columns), got {shift!r}")
    for s, w in zip(both, window, strict=True):
        if not 0 <= s < w:
            raise ValueError(f"shift: expected 0 to {w - 1} for windows of {w}, got {s}")
    return both


@core.operation(loops=window_attention_loops, torch=window_attention_torch)
def window_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h L d"],
    v: Float[Tensor, "B h L d"],
    table: Float[Tensor, "h I J"] | None,
    query_shape: tuple[int, int],
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = (0, 0),
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Every query reads the tokens of its window, which a shifted layer moves by `shift` cells.

    Shapes: q, k, v (B, h, H W, d), row-major; table (h, 2 wi - 1, 2 wj - 1) or None; query_shape (H, W). Sides that are
    no multiple of the window are padded with keys that nobody reads. 0 <= shift < window. Returns (B, h, H W, d).
    Raises TypeError, ValueError on wrong arguments. Source: DAT section 3.3; equation 2 inside each window.
    """
    H, W = core.pair("query_shape", query_shape)
    window = core.pair("window", window)
    shift = check_shift(shift, window)
    shapes = {name: (t, "B h L d") for name, t in (("q", q), ("k", k), ("v", v))}
    if table is not None:
        shapes["table"] = (table, f"h {2 * window[0] - 1} {2 * window[1] - 1}")
    sizes = core.bind({"L": H * W}, **shapes)
    scale = core.scale_or_default(scale, sizes["d"])
    return window_attention.forms.run(impl, q, k, v, table, (H, W), window, shift, scale)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """Multi-head attention in windows with relative position bias: (B, H, W, C) to the same, for any H and W.

    `window` is the side of a window in cells, `shift` how far a shifted layer moves them. attn_drop: the share of the
    attention weights that training drops. Source: DAT section 3.3.
    """

    implementation, forms = "auto", tuple(window_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, window: int, shift: int = 0, *, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads, self.window = dim, core.divisor("heads", heads, dim), core.positive("window", window)
        self.shift, self.attn_drop = check_shift(shift, (window, window))[0], core.rate("attn_drop", attn_drop)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.empty(heads, 2 * window - 1, 2 * window - 1))
        nn.init.trunc_normal_(self.table, std=0.01)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        # A linear map may be applied before or after the tokens are moved; cutting first moves a third of the numbers.
        layout = Layout(tuple(x.shape[1:3]), (self.window, self.window), (self.shift, self.shift))
        qkv = rearrange(self.qkv(layout.cut(x)), "n T (three h d) -> three n h T d", three=3, h=self.heads)  # DAT-1
        dropout = self.attn_drop if self.training else 0.0
        z = layout.attend(*qkv, self.table, x.shape[0], impl=self.implementation, dropout=dropout)
        if tracing.recording():
            tracing.keep(self, WindowRecord(*qkv, z, layout.bias(self.table, qkv), layout))
        return layout.join(self.proj(rearrange(z, "n h T d -> n T (h d)")))  # DAT-3


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class WindowRecord(tracing.Record):
    """One window layer: q, k, v, z (h, H W, d); attention and may_read (windows, h, T, T); `window`, `shift` in cells.

    Exact, unless padding is read, which is no token of the image: timm's Swin lets its queries do that.
    """

    kind = "window"

    def __init__(self, q, k, v, z, bias, layout: Layout, *, scale: float | None = None):
        """q, k, v, z as they lie in windows (n, h, T, d), bias (n or 1, h or 1, T, T) or None, `scale` None is d^-0.5.

        Of a batch the first image is kept.
        """
        self.query_shape, self.window, self.shift, self.heads = layout.shape, layout.window, layout.roll, q.shape[1]
        windows = layout.padded[0] // layout.window[0] * (layout.padded[1] // layout.window[1])
        q, k, v, z = (t[:windows] for t in (q, k, v, z))
        self.attention = core.attention_weights(q, k, bias, core.scale_or_default(scale, q.shape[-1]))
        allowed = torch.ones_like(self.attention[:1, :1], dtype=torch.bool) if bias is None else bias > -torch.inf
        self.may_read = allowed.expand_as(self.attention)
        joined = (layout.join(rearrange(t, "n h T d -> n T (h d)")) for t in (q, k, v, z))
        self.q, self.k, self.v, self.z = (core.split_heads(t, self.heads)[0] for t in joined)

        H, W = layout.shape
        numbers = torch.arange(1, H * W + 1, device=q.device).reshape(1, H, W, 1)
        self.places = layout.cut(numbers)[..., 0]  # (windows, T): which cell a token is, from 1; padding has 0
        image, padding = self.places[:, None, :, None] > 0, self.places[:, None, None, :] == 0
        self.exact = not bool((self.attention * (image & padding)).any())
        self.words = "shifted window" if any(self.shift) else "window"  # one window for the whole map is not moved

    def weights(self, head: int = 0) -> Float[Tensor, "L L"]:
        """Attention over the whole map; zero outside the window. Rows lack what is given to padding."""
        self.check_head(head)
        size = self.query_shape[0] * self.query_shape[1] + 1
        weights = self.attention.new_zeros(size, size)
        weights[self.places[:, :, None], self.places[:, None, :]] = self.attention[:, head]
        return weights[1:, 1:]

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The cells of the query's window that its mask lets it read, whatever their weight; padding is no cell."""
        self.check_head(head)
        window, token = (self.places == self.query(row, col) + 1).nonzero()[0]
        places, weight = self.places[window], self.attention[window, head, token]
        read = self.may_read[window, head, token] & (places > 0)
        return tracing.Keys(self.cells().to(weight)[places[read] - 1], weight[read])
