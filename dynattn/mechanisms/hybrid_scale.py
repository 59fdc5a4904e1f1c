"""Hybrid-scale attention (SG-Former section 3.3): groups of heads read the map at scales of their own.

The heads fall into equal groups. Group j merges every s_j x s_j tokens into one, of which it makes keys and values.
Windows of s_j M x s_j M queries read windows of M x M merged tokens; where s_j M is the side of the map, there is one
window, and everybody reads everything:

    Q_i = X W_i^Q,   K_i = Merge(X, s_j) W_i^K,   V_i = Merge(X, s_j) W_i^V      head i of group j               SG-3
    A_i = softmax(P(Q_i) P(K_i)^T / sqrt(d)),   h_i = A_i P(V_i)                 P: windows                      SG-4
    S_i[k] = sum_q A_i[q, k],   S = sum_i S_i                                    the significance of a token     SG-5

Merge is a convolution of stride s_j, and nothing for s_j = 1. A merged token hands its significance to all cells that
it was made of. By SG-5 as it is printed ("sum") a scale weighs s^2 as much as no merging. The published code ("mean")
takes means over queries and heads instead, so that all scales weigh the same; here each is brought to a mean of 1,
without which at other sizes of the map one scale would fade. The significance has no gradient: tokens are sorted by it
(`self_guided.py`). Ledger: papers/sgformer.toml. Beside the letters of `core`:

    s   scale: merged tokens stand for s x s cells      M   side of a window in merged tokens      S   significance
    u w row and column of a merged token
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from dynattn import core, tracing

READINGS = ("mean", "sum")
GUIDANCE = ("hybrid", "local", "global", "constant")

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def attention_loops(q, k, query_shape, ratio, window, scale):
    """SG-4, the softmax: for every image, head and query the merged tokens (u, w) of its window, and their weights."""
    (B, h, _, d), (H, W) = q.shape, query_shape
    HK, WK = -(-H // ratio), -(-W // ratio)
    together = lambda i, u: window is None or i // (ratio * window) == u // window  # noqa: E731
    for b in range(B):
        for m in range(h):
            for i in range(H):
                for j in range(W):
                    keys = [(u, w) for u in range(HK) for w in range(WK) if together(i, u) and together(j, w)]
                    logits = [
                        sum(q[b, m, i * W + j, c] * k[b, m, u * WK + w, c] for c in range(d)) * scale for u, w in keys
                    ]
                    yield b, m, keys, core.softmax_loops(logits)  # SG-4


def hybrid_scale_attention_loops(q, k, v, query_shape, ratio, window, scale):
    """SG-4, one query, one merged token and one channel at a time."""
    WK, z = -(-query_shape[1] // ratio), []
    for b, m, keys, weights in attention_loops(q, k, query_shape, ratio, window, scale):
        pairs = list(zip(weights, keys, strict=True))
        z += [sum(weight * v[b, m, u * WK + w, c] for weight, (u, w) in pairs) for c in range(q.shape[3])]  # SG-4
    return torch.stack(z).reshape(q.shape)


def significance_loops(q, k, query_shape, ratio, window, scale, reading):
    """SG-5 of one group of heads, (B, H, W): sums as printed, or means over heads and queries times the keys."""
    (B, h), (H, W) = q.shape[:2], query_shape
    HK, WK = -(-H // ratio), -(-W // ratio)
    total, queries, keys_read = torch.zeros(B, HK, WK).to(q), torch.zeros(B, HK, WK).to(q), torch.zeros(HK, WK).to(q)
    for b, _, keys, weights in attention_loops(q.detach(), k.detach(), query_shape, ratio, window, scale):
        for (u, w), weight in zip(keys, weights, strict=True):
            total[b, u, w] += weight  # SG-5
            queries[b, u, w] += 1  # in every head
            keys_read[u, w] = len(keys)
    if reading == "mean":
        total = total / queries * keys_read
    return torch.stack([total[:, i // ratio, j // ratio] for i in range(H) for j in range(W)], dim=1).reshape(B, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the windows of one scale lie: `shape` of the map, `ratio` s, `window` M, or None for the whole map."""

    shape: tuple[int, int]
    ratio: int
    window: int | None

    @property
    def key_shape(self) -> tuple[int, int]:
        """Rows and columns of merged tokens."""
        return tuple(-(-side // self.ratio) for side in self.shape)

    @property
    def whole(self) -> bool:
        """Whether one window holds the whole map."""
        return self.window is None or all(core.surely(side <= self.ratio * self.window) for side in self.shape)

    def cut(self, x: Num[Tensor, "B H W C"], side: int) -> Num[Tensor, "n T C"]:
        """The tokens of every window of a map, zeros where there is padding."""
        if self.whole:
            return rearrange(x, "B H W C -> B (H W) C")
        padded = core.pad_map(x, core.padding_to(tuple(x.shape[1:3]), (side, side)))
        return core.partition_windows(padded, (side, side))

    def cut_queries(self, x: Num[Tensor, "B H W C"]) -> Num[Tensor, "n T C"]:
        """Windows of s M x s M cells."""
        return self.cut(x, self.ratio * (self.window or 1))

    def cut_keys(self, x: Num[Tensor, "B HK WK C"]) -> Num[Tensor, "n T C"]:
        """Windows of M x M merged tokens."""
        return self.cut(x, self.window or 1)

    def join(self, x: Num[Tensor, "n T C"], shape: tuple[int, int], side: int) -> Num[Tensor, "B H W C"]:
        """The inverse of `cut`, for a map of that shape."""
        if self.whole:
            return rearrange(x, "B (H W) C -> B H W C", H=shape[0])
        more = core.padding_to(shape, (side, side))
        padded = shape[0] + more[0], shape[1] + more[1]
        return core.crop(core.merge_windows(x, (side, side), padded), shape)

    def join_queries(self, x: Num[Tensor, "n T C"]) -> Num[Tensor, "B H W C"]:
        """The map of what every query has."""
        return self.join(x, self.shape, self.ratio * (self.window or 1))

    def spread(self, x: Num[Tensor, "n T"]) -> Num[Tensor, "B H W"]:
        """What every merged token has, at all cells that it was made of."""
        x = self.join(x[..., None], self.key_shape, self.window or 1)
        if self.ratio > 1:
            x = x.repeat_interleave(self.ratio, dim=1).repeat_interleave(self.ratio, dim=2)
        return core.crop(x, self.shape)[..., 0]

    def inside(self, shape: tuple[int, int], side: int, device: torch.device) -> Bool[Tensor, "windows T"] | None:
        """Which tokens of the windows are no padding; None where all are, or may be taken to be."""
        if self.whole or all(core.surely(more == 0) for more in core.padding_to(shape, (side, side))):
            return None
        return self.cut(torch.ones(1, *shape, 1, dtype=torch.int64, device=device), side)[..., 0] > 0

    def hidden(self, like: Tensor, images: int) -> Float[Tensor, "n 1 1 T"] | None:
        """What is added to the logits: -inf at keys that are padding."""
        inside = self.inside(self.key_shape, self.window or 1, like.device)
        if inside is None:
            return None
        bias = torch.zeros(inside.shape, dtype=like.dtype, device=like.device).masked_fill(~inside, -torch.inf)
        return bias.expand(images, -1, -1).flatten(0, 1)[:, None, None]

    def significance(self, attention: Float[Tensor, "n h Tq Tk"], images: int, reading: str) -> Float[Tensor, "B H W"]:
        """SG-5 of these heads: what merged tokens are given, in sum or on average, at the cells that they stand for."""
        A, (h, Tq, Tk) = attention.detach(), attention.shape[1:]
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        queries = self.inside(self.shape, self.ratio * (self.window or 1), A.device)
        keys = self.inside(self.key_shape, self.window or 1, A.device)
        if queries is not None:  # padding asks nothing
            A = A.unflatten(0, (images, -1)) * queries[:, None, :, None]
            A = A.flatten(0, 1)
        S = A.sum(dim=(1, 2))  # SG-5
        if reading == "mean":
            Tq = Tq if queries is None else queries.sum(dim=1).repeat(images)[:, None]
            Tk = Tk if keys is None else keys.sum(dim=1).repeat(images)[:, None]
            S = S * (Tk / (h * Tq))
        return self.spread(S)


def heads_in_windows(x: Num[Tensor, "n T C"], heads: int) -> Num[Tensor, "n h T d"]:
    """Tokens of windows by heads."""
    return rearrange(x, "n T (h d) -> n h T d", h=heads)


def hybrid_scale_attention_torch(q, k, v, query_shape, ratio, window, scale, dropout=0.0):
    """SG-4 by torch's attention inside every window."""
    layout, (B, h) = Layout(query_shape, ratio, window), q.shape[:2]
    q = heads_in_windows(layout.cut_queries(core.merge_heads(q, query_shape)), h)
    k, v = (heads_in_windows(layout.cut_keys(core.merge_heads(x, layout.key_shape)), h) for x in (k, v))
    bias = layout.hidden(q, B)
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], -1)
    z = core.dense_attention_torch(q, k, v, bias, scale, dropout)  # SG-4
    return core.split_heads(layout.join_queries(rearrange(z, "n h T d -> n T (h d)")), h)


def attention_and_significance(
    q: Float[Tensor, "B H W C"],
    k: Float[Tensor, "B HK WK C"],
    v: Float[Tensor, "B HK WK C"],
    heads: int,
    layout: Layout,
    reading: str,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H W"]]:
    """SG-4 and SG-5 of one group of heads, from one softmax.

    Torch's fused attention keeps no weights; to compute them beside it, for their sums, takes twice the time.
    """
    B = q.shape[0]
    q = heads_in_windows(layout.cut_queries(q), heads)
    k, v = (heads_in_windows(layout.cut_keys(x), heads) for x in (k, v))
    logits, bias = q @ k.mT * q.shape[-1] ** -0.5, layout.hidden(q, B)
    A = (logits if bias is None else logits + bias).softmax(dim=-1)  # SG-4
    z = (F.dropout(A, dropout) if dropout else A).to(v.dtype) @ v
    return layout.join_queries(rearrange(z, "n h T d -> n T (h d)")), layout.significance(A, B, reading)  # SG-5


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


@core.operation(loops=hybrid_scale_attention_loops, torch=hybrid_scale_attention_torch)
def hybrid_scale_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h N d"],
    v: Float[Tensor, "B h N d"],
    query_shape: tuple[int, int],
    *,
    ratio: int,
    window: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Every query reads the merged tokens of its window, each of which stands for ratio x ratio cells.

    Shapes: q (B, h, H W, d), row-major, of a map of `query_shape`; k, v (B, h, N, d), N = ceil(H / ratio) times
    ceil(W / ratio) merged tokens. window: M, windows of M x M merged tokens and ratio M x ratio M queries from the top
    left, the last ones smaller; None: everybody reads all. `scale` None is d^-0.5.
    Returns (B, h, H W, d). Raises TypeError, ValueError on wrong arguments. Source: SG-Former equation 4.
    """
    H, W = core.pair("query_shape", query_shape)
    core.positive("ratio", ratio)
    if window is not None:
        core.positive("window", window)
    sizes = {"L": H * W, "N": -(-H // ratio) * -(-W // ratio)}
    sizes = core.bind(sizes, q=(q, "B h L d"), k=(k, "B h N d"), v=(v, "B h N d"))
    scale = core.scale_or_default(scale, sizes["d"])
    return hybrid_scale_attention.forms.run(impl, q, k, v, (H, W), ratio, window, scale)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


class HeadGroup(nn.Module):
    """The queries, merged keys and merged values of one group of heads (SG-3): (B, H, W, C) to three maps.

    ratio: s.  width: channels of the group.  norm: LayerNorm and GELU behind the convolution, as the published code.
    """

    def __init__(self, dim: int, width: int, ratio: int, norm: bool):
        super().__init__()
        self.ratio, self.q, self.kv = ratio, nn.Linear(dim, width), nn.Linear(dim, 2 * width)
        self.merge = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.Sequential(nn.LayerNorm(dim), nn.GELU()) if ratio > 1 and norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B H W c"], ...]:
        merged = x
        if self.merge is not None:  # SG-3: a border of zeros completes the last tokens
            padded = core.pad_map(x, core.padding_to(tuple(x.shape[1:3]), (self.ratio, self.ratio)))
            merged = self.merge(rearrange(padded, "B H W C -> B C H W"))  # SG-3
            merged = self.norm(rearrange(merged, "B C HK WK -> B HK WK C"))
        return self.q(x), *self.kv(merged).chunk(2, dim=-1)  # SG-3


class HybridScaleAttention(nn.Module):
    """Hybrid-scale attention: (B, H, W, C) to the same and the significance of every cell (B, H, W), for any H and W.

    dim, heads: C and H.  scales: s of each group of heads, in their order; the published code has the largest first.
    window: M.  global_scale: the largest scale beyond 1 reads the whole map at every size, as in the published code;
    without it in windows of s M.  reading: of SG-5, "mean" or "sum".  guidance: whose maps are added up, of "hybrid"
    (all), "local" (the smallest scale), "global" (the largest), or "constant", which is 1 everywhere (Table 7).
    merge_norm: LayerNorm and GELU behind the merging convolution.  lepe: a linear map and a depthwise 3 x 3 convolution
    of the input are added.  Both as in the published code.  attn_drop: the share of weights that training drops.
    `reading` and `guidance` may be changed at any time.
    """

    implementation, forms = "auto", tuple(hybrid_scale_attention.forms)  # see `dynattn.use_implementation`

    def __init__(
        self,
        dim: int,
        heads: int,
        scales: tuple[int, ...] = (8, 1),
        *,
        window: int = 7,
        global_scale: bool = True,
        reading: str = "mean",
        guidance: str = "hybrid",
        merge_norm: bool = True,
        lepe: bool = True,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        self.dim, self.heads, self.scales = dim, core.divisor("heads", heads, dim), check_scales(scales, heads)
        core.one_of("reading", reading, READINGS)
        core.one_of("guidance", guidance, GUIDANCE)
        self.window, self.global_scale = core.positive("window", window), global_scale
        self.reading, self.guidance, self.attn_drop = reading, guidance, core.rate("attn_drop", attn_drop)
        self.groups = nn.ModuleList(HeadGroup(dim, dim // len(scales), s, merge_norm) for s in self.scales)
        self.lepe_linear = nn.Linear(dim, dim) if lepe else None
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if lepe else None
        self.proj = nn.Linear(dim, dim)

    def layout(self, shape: tuple[int, int], scale: int) -> Layout:
        """The windows of one scale on a map of that shape."""
        whole = self.global_scale and scale == max(self.scales) > 1
        return Layout(shape, scale, None if whole else self.window)

    def guides(self, scale: int) -> bool:
        """Whether the map of a scale is part of the significance."""
        only = {"local": min, "global": max}.get(self.guidance)
        return self.guidance != "constant" and (only is None or scale == only(self.scales))

    def forward(
        self, x: Float[Tensor, "B H W C"], weigh: bool = True
    ) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H W"] | None]:
        """weigh: whether somebody will read the significance; None takes its place otherwise."""
        core.bind(x=(x, f"B H W {self.dim}"))
        shape, m, parts, maps = tuple(x.shape[1:3]), self.heads // len(self.scales), [], {}
        recording, dropout = tracing.recording(), self.attn_drop if self.training else 0.0
        kept = []
        for group in self.groups:
            q, k, v = group(x)
            layout = self.layout(shape, group.ratio)
            if recording or (weigh and self.guides(group.ratio)):
                z, maps[group.ratio] = attention_and_significance(q, k, v, m, layout, self.reading, dropout)
            else:
                inputs = (*(core.split_heads(t, m) for t in (q, k, v)), shape, layout.ratio, layout.window)
                scale = (self.dim // self.heads) ** -0.5
                if dropout:
                    z = hybrid_scale_attention_torch(*inputs, scale, dropout)
                else:
                    z = hybrid_scale_attention.forms.run(self.implementation, *inputs, scale)
                z = core.merge_heads(z, shape)
            parts.append(z)
            kept.append((q, k, v, layout))
        z = torch.cat(parts, dim=-1)
        if self.lepe_conv is not None:
            context = self.lepe_conv(rearrange(self.lepe_linear(x), "B H W C -> B C H W"))
            z = z + rearrange(context, "B C H W -> B H W C")
        significance = self.summed(maps, x) if weigh or recording else None
        if recording:
            tracing.keep(self, HybridScaleRecord(self, kept, z, maps, significance))
        return self.proj(z), significance

    def summed(self, maps: dict[int, Float[Tensor, "B H W"]], like: Tensor) -> Float[Tensor, "B H W"]:
        """The significance of all heads that guide."""
        if self.guidance == "constant":
            return like.new_ones(like.shape[:3])
        return sum(S for scale, S in maps.items() if self.guides(scale))  # SG-5

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scales={self.scales}, window={self.window}, reading={self.reading!r}"


def check_scales(scales: object, heads: int) -> tuple[int, ...]:
    """`scales` as a tuple; raises TypeError, ValueError unless they are distinct and divide the heads into groups."""
    if not isinstance(scales, tuple | list) or not scales:
        raise TypeError(f"scales: expected a scale for each group of heads, got {scales!r}")
    for scale in scales:
        core.positive("scales", scale)
    if len(set(scales)) < len(scales):
        raise ValueError(f"scales: expected distinct scales, got {tuple(scales)}")
    if heads % len(scales):
        raise ValueError(f"scales: expected a number of scales that divides {heads} heads, got {tuple(scales)}")
    return tuple(scales)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class HybridScaleRecord(tracing.Record):
    """One hybrid-scale layer: z (M, H W, d), attention and LePE together; `scales` of the heads.

    significance (H, W), what the next layer gets; maps, by scale, what each group of heads adds to it, whether it
    guides or not. A_eff lets a merged token stand for the mean of the cells that it was made of; its `value` is the
    merged token's, at all of them: with that it is exact, unless LePE is there, which `rest` tells.
    """

    kind = "hybrid_scale"

    def __init__(self, layer: HybridScaleAttention, groups: list, z: Tensor, maps: dict, significance: Tensor):
        m = layer.heads // len(groups)
        self.query_shape, self.heads, self.exact = tuple(z.shape[1:3]), layer.heads, layer.lepe_conv is None
        self.scales = [s for s in layer.scales for _ in range(m)]
        self.layouts = [layout for *_, layout in groups for _ in range(m)]
        maps_of = lambda place: [t for g in groups for t in core.split_heads(g[place][:1], m)[0]]  # noqa: E731
        self.q, self.k, self.v = (maps_of(place) for place in range(3))  # of each head: scales differ in their keys
        self.z = core.split_heads(z, layer.heads)[0]
        self.maps, self.significance = {s: S[0] for s, S in maps.items()}, significance[0]

    def numbers(self, head: int) -> tuple[Num[Tensor, " L"], Num[Tensor, " N"]]:
        """The windows of the queries, and of the merged tokens."""
        layout = self.layouts[head]
        side, (H, W) = layout.window or max(self.query_shape), layout.key_shape
        number = lambda i, j: (i[:, None] * W + j[None, :]).flatten()  # noqa: E731
        rows, cols = (torch.arange(n, device=self.z.device) for n in self.query_shape)
        queries = number(rows // (layout.ratio * side), cols // (layout.ratio * side))
        return queries, number(torch.arange(H, device=self.z.device) // side, cols[:W] // side)

    def cells_of(self, head: int) -> Float[Tensor, "N S"]:
        """Which cells each merged token was made of, as a 0/1 matrix."""
        layout, (H, W) = self.layouts[head], self.query_shape
        number = torch.arange(len(self.k[head]), device=self.z.device).reshape(1, -1)
        layout = Layout(layout.shape, layout.ratio, None)
        return F.one_hot(layout.spread(number).flatten(), number.shape[1]).mT.to(self.z)

    def weights(self, head: int = 0) -> Float[Tensor, "L N"]:
        self.check_head(head)
        queries, keys = self.numbers(head)
        bias = torch.zeros(len(queries), len(keys)).to(self.z)
        bias = bias.masked_fill(queries[:, None] != keys[None, :], -torch.inf)
        return core.attention_weights(self.q[head], self.k[head], bias, self.q[head].shape[-1] ** -0.5)

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """Attention to a merged token, shared equally by its cells."""
        cells = self.cells_of(head) if self.weights(head) is not None else None
        return self.weights(head) @ (cells / cells.sum(dim=1, keepdim=True))

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        self.check_head(head)
        return self.cells_of(head).mT @ self.v[head]

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The centres of the merged tokens of the query's window, whatever their weight."""
        self.check_head(head)
        queries, keys = self.numbers(head)
        query, cells = self.query(row, col), self.cells_of(head)
        read = keys == queries[query]
        centres = (cells / cells.sum(dim=1, keepdim=True)) @ self.cells().to(cells)
        return tracing.Keys(centres[read], self.weights(head)[query][read])
