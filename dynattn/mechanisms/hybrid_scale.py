"""Hybrid-scale attention (SG-Former section 3.3): groups of heads read the map at scales of their own.

The heads fall into equal groups. Group j merges every s_j x s_j tokens into one, of which it makes keys and values.
Windows of s_j M x s_j M queries read windows of M x M merged tokens; where s_j M is the side of the map, there is one
window, and everybody reads everything:

    Q_i = X W_i^Q,   K_i = Merge(X, s_j) W_i^K,   V_i = Merge(X, s_j) W_i^V      head i of group j               SG-3
    A_i = softmax(P(Q_i) P(K_i)^T / sqrt(d)),   h_i = A_i P(V_i)                 P: windows                      SG-4
    S_i[k] = sum_q A_i[q, k],   S = sum_i S_i                                    the significance of a token     SG-5

Merge is a convolution of stride s_j, and nothing for s_j = 1. A merged token hands its significance to all its cells.
By SG-5 as printed ("sum") the map of scale s has s^2 times the mean of one that is not merged. The published code takes
means over queries and heads ("mean"). Here both maps then have a mean of 1, or nearly where s does not divide the map;
otherwise one would fade. The significance has no gradient: tokens are sorted by it. Ledger: papers/sgformer.toml.
Beside the letters of `core`: u, w row and column of a merged token; S significance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num
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
            for i, j in ((l // W, l % W) for l in range(H * W)):
                keys = [(u, w) for u in range(HK) for w in range(WK) if together(i, u) and together(j, w)]
                dot = lambda n: sum(q[b, m, i * W + j, c] * k[b, m, n, c] for c in range(d))  # noqa: B023, E731
                yield b, m, keys, core.softmax_loops([dot(u * WK + w) * scale for u, w in keys])  # SG-4


def hybrid_scale_attention_loops(q, k, v, query_shape, ratio, window, scale):
    """SG-4, one query, one merged token and one channel at a time."""
    WK, z = -(-query_shape[1] // ratio), []
    for b, m, keys, weights in attention_loops(q, k, query_shape, ratio, window, scale):
        pairs = list(zip(weights, keys, strict=True))
        z += [sum(weight * v[b, m, u * WK + w, c] for weight, (u, w) in pairs) for c in range(q.shape[3])]  # SG-4
    return torch.stack(z).reshape(q.shape)


def significance_loops(q, k, query_shape, ratio, window, scale, reading):
    """SG-5 of one group of heads, (B, H, W): sums as printed, or means over heads and queries times the keys."""
    B, (H, W) = q.shape[0], query_shape
    asked, given, count = {}, {}, {}
    for b, _, keys, weights in attention_loops(q.detach(), k.detach(), query_shape, ratio, window, scale):
        for key, weight in zip(keys, weights, strict=True):
            given[b, *key] = given.get((b, *key), 0) + weight  # SG-5
            asked[b, *key] = asked.get((b, *key), 0) + 1  # by every query, in every head
            count[key] = len(keys)
    if reading == "mean":
        given = {(b, u, w): total / asked[b, u, w] * count[u, w] for (b, u, w), total in given.items()}
    maps = [given[b, i // ratio, j // ratio] for b in range(B) for i in range(H) for j in range(W)]
    return torch.stack(maps).reshape(B, H, W)


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

    @property
    def queries(self) -> tuple[tuple[int, int], int]:
        """The map of the queries, and the side of their windows."""
        return self.shape, self.ratio * (self.window or 1)

    @property
    def keys(self) -> tuple[tuple[int, int], int]:
        """The map of the merged tokens, and the side of their windows."""
        return self.key_shape, self.window or 1

    def cut(self, x: Num[Tensor, "B H W C"], side: int) -> Num[Tensor, "n T C"]:
        """The tokens of every window of a map, zeros where there is padding."""
        if self.whole:
            return rearrange(x, "B H W C -> B (H W) C")
        padded = core.pad_map(x, core.padding_to(tuple(x.shape[1:3]), (side, side)))
        return core.partition_windows(padded, (side, side))

    def join(self, x: Num[Tensor, "n T C"], shape: tuple[int, int], side: int) -> Num[Tensor, "B H W C"]:
        """The inverse of `cut`, for a map of that shape."""
        if self.whole:
            return rearrange(x, "B (H W) C -> B H W C", H=shape[0])
        more = core.padding_to(shape, (side, side))
        padded = shape[0] + more[0], shape[1] + more[1]
        return core.crop(core.merge_windows(x, (side, side), padded), shape)

    def spread(self, x: Num[Tensor, "B HK WK"]) -> Num[Tensor, "B H W"]:
        """What every merged token has, at all cells that it was made of."""
        x = x.repeat_interleave(self.ratio, dim=1).repeat_interleave(self.ratio, dim=2)
        return core.crop(x[..., None], self.shape)[..., 0]

    def inside(self, shape: tuple[int, int], side: int, like: Tensor) -> Bool[Tensor, "windows T"] | None:
        """Which tokens of the windows are no padding; None where all are."""
        if self.whole or all(core.surely(more == 0) for more in core.padding_to(shape, (side, side))):
            return None
        return self.cut(torch.ones(1, *shape, 1, dtype=torch.int64, device=like.device), side)[..., 0] > 0

    def hidden(self, like: Float[Tensor, "n h Tq d"], images: int) -> Float[Tensor, "n 1 Tq Tk"] | None:
        """What is added to the logits: -inf at keys that are padding."""
        inside = self.inside(*self.keys, like)
        if inside is None:
            return None
        bias = torch.zeros(inside.shape, dtype=like.dtype, device=like.device).masked_fill(~inside, -torch.inf)
        return bias.expand(images, -1, -1).flatten(0, 1)[:, None, None].expand(-1, -1, like.shape[2], -1)

    def significance(self, A: Float[Tensor, "n h Tq Tk"], images: int, reading: str) -> Float[Tensor, "B H W"]:
        """SG-5 of these heads: what merged tokens are given, in sum or on average, at the cells that they stand for."""
        A, (h, Tq, Tk) = A.detach().to(torch.promote_types(A.dtype, torch.float32)), A.shape[1:]
        queries, keys = self.inside(*self.queries, A), self.inside(*self.keys, A)
        if queries is not None:  # padding asks nothing
            A = (A.unflatten(0, (images, -1)) * queries[:, None, :, None]).flatten(0, 1)
        S = A.sum(dim=(1, 2))  # SG-5
        if reading == "mean":
            count = lambda T, real: T if real is None else real.sum(dim=1).repeat(images)[:, None]  # noqa: E731
            S = S * count(Tk, keys) / (h * count(Tq, queries))  # the quotient of counts alone would be in float32
        return self.spread(self.join(S[..., None], *self.keys)[..., 0])


def in_windows(q, k, v, heads: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Maps (B, H, W, C) as tokens of windows (n, h, T, d), and what is added to the logits."""
    by_head = lambda x, side: rearrange(layout.cut(x, side), "n T (h d) -> n h T d", h=heads)  # noqa: E731
    images, q = q.shape[0], by_head(q, layout.queries[1])
    return q, by_head(k, layout.keys[1]), by_head(v, layout.keys[1]), layout.hidden(q, images)


def joined(z: Float[Tensor, "n h T d"], layout: Layout) -> Float[Tensor, "B H W C"]:
    """What came out of the windows, as a map."""
    return layout.join(rearrange(z, "n h T d -> n T (h d)"), *layout.queries)


def hybrid_scale_attention_torch(q, k, v, query_shape, ratio, window, scale):
    """SG-4 by torch's attention inside every window."""
    layout, h = Layout(query_shape, ratio, window), q.shape[1]
    q, k, v = core.merge_heads(q, query_shape), *(core.merge_heads(t, layout.key_shape) for t in (k, v))
    z = core.dense_attention_torch(*in_windows(q, k, v, h, layout), scale)  # SG-4
    return core.split_heads(joined(z, layout), h)


def attention_and_significance(q, k, v, heads: int, layout: Layout, reading: str, impl: str, dropout: float = 0.0):
    """SG-4 and SG-5 of one group of heads, from one softmax: maps (B, H, W, C) to z and the significance (B, H, W).

    Torch's fused attention keeps no weights; to compute them beside it, for their sums, takes twice the time.
    """
    images, (q, k, v, bias) = q.shape[0], in_windows(q, k, v, heads, layout)
    form, scale = core.dense_attention.forms.chosen(impl, q), q.shape[-1] ** -0.5
    logits = q @ k.mT * scale
    A = (logits if bias is None else logits + bias).softmax(dim=-1)  # SG-4
    if dropout or form is core.dense_attention_torch:
        z = (F.dropout(A, dropout) if dropout else A).to(v.dtype) @ v  # SG-4
    else:
        z = form(q, k, v, bias, scale)
    return joined(z, layout), layout.significance(A, images, reading)  # SG-5


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

    ratio: s.  width: channels of the group.  norm: LayerNorm and GELU behind the convolution.
    """

    def __init__(self, dim: int, width: int, ratio: int, norm: bool):
        super().__init__()
        self.ratio, self.q, self.kv = ratio, nn.Linear(dim, width), nn.Linear(dim, 2 * width)
        self.merge = nn.Conv2d(dim, dim, ratio, ratio) if ratio > 1 else None
        self.norm = nn.Sequential(nn.LayerNorm(dim), nn.GELU()) if ratio > 1 and norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B H W C"]) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x)
        if self.merge is not None:  # zeros complete the last tokens
            x = core.pad_map(x, core.padding_to(tuple(x.shape[1:3]), (self.ratio, self.ratio)))
            x = rearrange(self.merge(rearrange(x, "B H W C -> B C H W")), "B C HK WK -> B HK WK C")  # SG-3
        return q, *self.kv(self.norm(x)).chunk(2, dim=-1)  # SG-3


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

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(
        self,
        dim: int,
        heads: int,
        scales: Sequence[int] = (8, 1),
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
        only = {"hybrid": self.scales, "local": (min(self.scales),), "global": (max(self.scales),), "constant": ()}
        return scale in only[self.guidance]

    def forward(
        self, x: Float[Tensor, "B H W C"], weigh: bool = True
    ) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H W"] | None]:
        """weigh: whether somebody will read the significance, else None takes its place."""
        core.bind(x=(x, f"B H W {self.dim}"))
        shape, heads, kept, parts, maps = tuple(x.shape[1:3]), self.heads // len(self.scales), [], [], {}
        recording, dropout = tracing.recording(), self.attn_drop if self.training else 0.0
        for group in self.groups:
            s, layout, (q, k, v) = group.ratio, self.layout(shape, group.ratio), group(x)
            if recording or dropout or (weigh and self.guides(s)):
                how = layout, self.reading, self.implementation, dropout
                z, maps[s] = attention_and_significance(q, k, v, heads, *how)
            else:
                inputs = *in_windows(q, k, v, heads, layout), (self.dim // self.heads) ** -0.5
                z = joined(core.dense_attention.forms.run(self.implementation, *inputs), layout)
            parts.append(z)
            kept.append((q, k, v, layout))
        z, significance = torch.cat(parts, dim=-1), None
        if self.lepe_conv is not None:
            context = self.lepe_conv(rearrange(self.lepe_linear(x), "B H W C -> B C H W"))
            z = z + rearrange(context, "B C H W -> B H W C")
        if weigh or recording:
            guiding = [S for s, S in maps.items() if self.guides(s)]
            significance = sum(guiding) if guiding else x.new_ones(x.shape[:3])  # SG-5
        if recording:
            tracing.keep(self, HybridScaleRecord(self, kept, z, maps, significance))
        return self.proj(z), significance


def check_scales(scales: object, heads: int) -> tuple[int, ...]:
    """`scales` as a tuple; raises TypeError, ValueError unless they are distinct and divide the heads into groups."""
    if not isinstance(scales, tuple | list) or not scales:
        raise TypeError(f"scales: expected a scale for each group of heads, got {scales!r}")
    if len({core.positive("scales", scale) for scale in scales}) < len(scales) or heads % len(scales):
        raise ValueError(f"scales: expected distinct scales, as many as divide {heads} heads, got {tuple(scales)}")
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
        self.layouts = [layout for *_, layout in groups for _ in range(m)]
        self.scales = [layout.ratio for layout in self.layouts]
        # Lists, since scales differ in how many keys they have.
        self.q, self.k, self.v = ([t for g in groups for t in core.split_heads(g[n][:1], m)[0]] for n in range(3))
        self.z = core.split_heads(z, layer.heads)[0]
        self.maps, self.significance = {s: S[0] for s, S in maps.items()}, significance[0]

    def merged(self, head: int = 0) -> Int[Tensor, " S"]:
        """The merged token that every cell belongs to."""
        self.check_head(head)
        numbers = torch.arange(len(self.k[head]), device=self.z.device).reshape(1, *self.layouts[head].key_shape)
        return self.layouts[head].spread(numbers).flatten()

    def windows(self, head: int) -> tuple[Int[Tensor, " L"], Int[Tensor, " N"]]:
        """The window of every query, and of every merged token: a query reads those of its own."""
        side = max(self.query_shape) if self.layouts[head].whole else self.layouts[head].queries[1]
        rows, cols = (torch.arange(n, device=self.z.device) // side for n in self.query_shape)
        of_query = (rows[:, None] * len(cols) + cols).flatten()
        return of_query, of_query.new_empty(len(self.k[head])).index_copy_(0, self.merged(head), of_query)

    def mean(self, head: int) -> Float[Tensor, "N S"]:
        """The matrix that takes the mean over the cells of every merged token."""
        cells = F.one_hot(self.merged(head), len(self.k[head])).mT.to(self.z)
        return cells / cells.sum(dim=1, keepdim=True)

    def weights(self, head: int = 0) -> Float[Tensor, "L N"]:
        self.check_head(head)
        of_query, of_key = self.windows(head)
        bias = torch.where(of_query[:, None] == of_key, 0.0, -torch.inf).to(self.z)
        return core.attention_weights(self.q[head], self.k[head], bias, self.z.shape[-1] ** -0.5)

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """Attention to a merged token, shared equally by its cells."""
        return self.weights(head) @ self.mean(head)

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        """At every cell the value of its merged token."""
        self.check_head(head)
        return self.v[head][self.merged(head)]

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The centres of the merged tokens of the query's window, whatever their weight."""
        merged, query, cells = self.merged(head), self.query(row, col), self.cells().to(self.z)
        of_query, of_key = self.windows(head)
        centres = cells.new_zeros(len(of_key), 2).index_add_(0, merged, cells) / merged.bincount()[:, None]
        read = of_query[query] == of_key
        return tracing.Keys(centres[read], self.weights(head)[query, read])
