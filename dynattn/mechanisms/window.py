"""Window attention, plain and shifted: what DAT puts in front of its deformable layers (DAT section 3.3, from Swin).

A query reads the tokens of its own w x w window. A shifted layer first rolls the map by s cells to the top left, so
that its windows straddle those of the plain layer; the roll is cyclic, hence tokens that came around the edge may not
mix with those that did not. With (i, j) the cell of a query and (u, v) that of a key, on a map padded to whole windows:

    window(i)  = ((i - s) mod H) // w           wrapped(i) = i < s          and the same for columns
    query (i, j) reads (u, v)  iff  window and wrapped agree in rows and in columns
    z^(m) = softmax(q k^T / sqrt(d) + B^(m)[i - u + w - 1, j - v + w - 1]) v                                 DAT-2
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from timm.layers import trunc_normal_
from torch import Tensor, nn

from dynattn import core, tracing

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def shift_of(side: int, w: int, s: int) -> int:
    """The shift of one axis: none where a single window covers it."""
    return s if side > w else 0


def window_attention_loops(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h L d"],
    v: Float[Tensor, "B h L d"],
    table: Float[Tensor, "h I J"] | None,
    shape: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Float[Tensor, "B h L d"]:
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
            for i, j in ((l // W, l % W) for l in range(L)):  # noqa: E741
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


def regions(shape: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Int[Tensor, "H W"]:
    """One number for each cell; two cells may read each other iff their numbers are equal."""
    labels = torch.zeros(shape, dtype=torch.long)
    for dim, (side, w, s) in enumerate(zip(shape, window, shift, strict=True)):
        s, i = shift_of(side, w, s), torch.arange(side)
        label = 2 * (((i - s) % (-(-side // w) * w)) // w) + (i < s)
        labels = labels * (2 * side + 2) + (label[:, None] if dim == 0 else label[None, :])
    return labels


def to_windows(
    x: Float[Tensor, "B h H W d"], window: tuple[int, int], shift: tuple[int, int], padding: tuple[int, int]
) -> Float[Tensor, "B windows h T d"]:
    """Pad, roll to the top left, cut."""
    x = core.pad_map(x, padding)
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(2, 3))
    return core.partition_windows(x, window)


def may_read(
    shape: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], padding: tuple[int, int]
) -> Bool[Tensor, "windows T T"]:
    """Inside each window, which key a query may read. Padded tokens read each other, so that no row is empty."""
    labels = F.pad(regions(shape, window, shift), (0, padding[1], 0, padding[0]), value=-1)
    labels = labels.roll((-shift[0], -shift[1]), dims=(0, 1))
    labels = rearrange(labels, "(I wi) (J wj) -> (I J) (wi wj)", wi=window[0], wj=window[1])
    return labels[:, :, None] == labels[:, None, :]


def window_bias(table: Float[Tensor, "h I J"], window: tuple[int, int]) -> Float[Tensor, "h T T"]:
    """B^(m): the table at the displacement of every query and key of a window."""
    rows, cols = core.relative_index(window)
    return table[:, rows, cols]


def window_attention_torch(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h L d"],
    v: Float[Tensor, "B h L d"],
    table: Float[Tensor, "h I J"] | None,
    shape: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Float[Tensor, "B h L d"]:
    """The same as dense attention inside each window of the padded, rolled map."""
    B, H, W = q.shape[0], *shape
    shift = tuple(shift_of(side, w, s) for side, w, s in zip(shape, window, shift, strict=True))
    padding = core.padding_to(shape, window)
    q, k, v = (
        to_windows(rearrange(t, "B h (H W) d -> B h H W d", H=H), window, shift, padding).flatten(0, 1)
        for t in (q, k, v)
    )  # (B windows, h, T, d)
    bias = None if table is None else window_bias(table, window)[None]
    if any(shift) or any(padding):
        forbidden = ~may_read(shape, window, shift, padding).to(q.device)
        hidden = torch.zeros(forbidden.shape, dtype=q.dtype, device=q.device).masked_fill(forbidden, -torch.inf)
        bias = hidden[:, None] if bias is None else bias + hidden[:, None]  # (windows, h, T, T)
        bias = bias.expand(B, *bias.shape).flatten(0, 1)
    z = core.dense_attention_torch(q, k, v, bias, scale)  # DAT-2
    padded = (H + padding[0], W + padding[1])
    z = core.merge_windows(z.unflatten(0, (B, -1)), window, padded)
    if any(shift):
        z = z.roll(shift, dims=(2, 3))
    return rearrange(z[:, :, :H, :W], "B h H W d -> B h (H W) d")


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------

FORMS = {"loops": window_attention_loops, "torch": window_attention_torch}


def window_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h L d"],
    v: Float[Tensor, "B h L d"],
    table: Float[Tensor, "h I J"] | None,
    query_shape: tuple[int, int],
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Every query reads the tokens of its window, which a shifted layer moves by `shift` cells.

    Shapes: q, k, v (B, h, H W, d), row-major; table (h, 2 wi - 1, 2 wj - 1) or None; query_shape (H, W). Sides that are
    no multiple of the window are padded with keys that nobody reads. 0 <= shift < window. Returns (B, h, H W, d).
    Raises TypeError, ValueError on wrong arguments. Source: DAT section 3.3; equation 2 inside each window.
    """
    form = core.implementation("window_attention", impl, FORMS)
    H, W = core.pair("query_shape", query_shape)
    window = core.pair("window", window)
    shift = (shift, shift) if isinstance(shift, int) else tuple(shift)
    for s, w in zip(shift, window, strict=True):
        if not 0 <= s < w:
            raise ValueError(f"shift: expected 0 to {w - 1} for windows of {w}, got {s}")
    shapes = {name: (t, f"B h {H * W} d") for name, t in (("q", q), ("k", k), ("v", v))}
    if table is not None:
        shapes["table"] = (table, f"h {2 * window[0] - 1} {2 * window[1] - 1}")
    sizes = core.bind(**shapes)
    return form(q, k, v, table, (H, W), window, shift, core.scale_or_default(scale, sizes["d"]))


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


class WindowAttention(nn.Module):
    """Multi-head attention in windows with relative position bias: (B, H, W, C) to the same, for any H and W.

    `window` is the side of a window in cells, `shift` how far a shifted layer moves them. Source: DAT section 3.3.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int = 0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim = {dim}, got {heads}")
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.empty(heads, 2 * window - 1, 2 * window - 1))
        trunc_normal_(self.table, std=0.01)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        shape = tuple(x.shape[1:3])
        q, k, v = rearrange(self.qkv(x), "B H W (three h d) -> three B h (H W) d", three=3, h=self.heads)  # DAT-1
        z = window_attention(q, k, v, self.table, shape, window=self.window, shift=self.shift)
        if tracing.recording():
            sides = ((self.window, self.window), (self.shift, self.shift))
            tracing.keep(self, WindowRecord(q[0], k[0], v[0], z[0], self.table, shape, *sides))
        return self.proj(core.merge_heads(z, shape))  # DAT-3


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class WindowRecord(tracing.Record):
    """One window layer. q, k, v, z (h, H W, d); table (h, 2 wi - 1, 2 wj - 1); `window` and `shift` in cells."""

    kind = "window"
    padding_is_read = False  # timm's Swin lets its queries read the padding, which is no token of the image

    def __init__(self, q, k, v, z, table, query_shape, window, shift):
        self.q, self.k, self.v, self.z, self.table = q, k, v, z, table
        self.query_shape, self.heads, self.window, self.shift = query_shape, q.shape[0], window, shift

    @property
    def exact(self) -> bool:
        return not self.padding_is_read

    def weights(self, head: int = 0) -> Float[Tensor, "L L"]:
        """Attention over the whole map; zero outside the window."""
        self.check_head(head)
        H, W = self.query_shape
        labels = regions(self.query_shape, self.window, self.shift).flatten().to(self.q.device)
        i, j = torch.cartesian_prod(torch.arange(H), torch.arange(W)).reshape(-1, 2).T
        rows, cols = (
            (n[:, None] - n[None, :]).clamp(1 - w, w - 1) + w - 1 for n, w in zip((i, j), self.window, strict=True)
        )
        bias = self.table[head, rows, cols]
        bias = bias.masked_fill(labels[:, None] != labels[None, :], -torch.inf)
        return core.attention_weights(self.q[head], self.k[head], bias, self.q.shape[-1] ** -0.5)

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L L"]:
        """A_eff is the attention itself: the keys are the source tokens."""
        return self.weights(head)

    def value(self, head: int = 0) -> Float[Tensor, "L d"]:
        self.check_head(head)
        return self.v[head]

    def output(self, head: int = 0) -> Float[Tensor, "L d"]:
        self.check_head(head)
        return self.z[head]


@tracing.adapter("timm.models.swin_transformer.SwinTransformerBlock")
def record_timm_swin(block: nn.Module, keep) -> list:
    """Record timm's Swin. Its attention sees windows only: the block tells where they lie, `proj` gets the heads."""
    attention, seen = block.attn, {}

    def as_maps(windows: Float[Tensor, "n h T d"], shape: tuple[int, int]) -> Float[Tensor, "h L d"]:
        """Windows of one image back to row-major tokens."""
        window, shift = tuple(block.window_size), tuple(block.shift_size)
        padded = tuple(-(-side // w) * w for side, w in zip(shape, window, strict=True))
        maps = core.merge_windows(windows[None], window, padded).roll(shift, dims=(2, 3))
        return rearrange(maps[0, :, : shape[0], : shape[1]], "h H W d -> h (H W) d")

    def before_block(block: nn.Module, inputs: tuple) -> None:
        seen["shape"] = tuple(inputs[0].shape[1:3])

    def before_projection(projection: nn.Module, inputs: tuple) -> None:
        seen["z"] = inputs[0]

    def after_attention(attention: nn.Module, inputs: tuple, output: Tensor) -> None:
        shape, window, h = seen["shape"], tuple(block.window_size), attention.num_heads
        qkv = rearrange(attention.qkv(inputs[0]), "n T (three h d) -> three n h T d", three=3, h=h)
        q, k, v = (as_maps(t, shape) for t in qkv)
        z = as_maps(rearrange(seen["z"], "n T (h d) -> n h T d", h=h), shape)
        table = rearrange(attention.relative_position_bias_table, "(I J) h -> h I J", I=2 * window[0] - 1)
        record = WindowRecord(q, k, v, z, table, shape, window, tuple(block.shift_size))
        record.padding_is_read = any(core.padding_to(shape, window))
        keep(attention, record)

    return [
        block.register_forward_pre_hook(before_block),
        attention.proj.register_forward_pre_hook(before_projection),
        attention.register_forward_hook(after_attention),
    ]
