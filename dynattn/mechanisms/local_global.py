"""Local-global attention (HLG section 3.3): a query reads its window, then one token for every window of the map.

With R x R windows W of a map Z, plain ones of neighbours, or dilated ones of every D-th token:

    Z_L = Z_W + softmax(Q_W K_W^T / sqrt(d) + B_W) V_W      Q_W, K_W, V_W = Z_W times W_Q, W_K, W_V           HLG-5
    Q_L = Z_L W_Q,   K_G = Z_G W_K,   V_G = Z_G W_V         Z_G: an embedding of every window of Z_L          HLG-6
    Z   = Z_L + softmax(Q_L K_G^T / sqrt(d) + B_G) V_G      every query reads all windows                     HLG-7
    W_Q, W_K, W_V are the same in HLG-5 and HLG-6                                                             HLG-8
    Q_L = Q_W + DWConv(V_W)                                 in place of Z_L W_Q: nothing is computed twice    HLG-9

The embedding is the mean of a window, its maximum, or a depthwise convolution as large as the window. Where the
published code parts from this, the layer has an argument (ledger: papers/hlg.toml).
Beside the letters of `core`: R side of a window, u w row and column of a key, I J row and column of a window.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Num
from timm.layers import DropPath
from torch import Tensor, nn

from dynattn import core, tracing

EMBEDDINGS, CONV_OF, POSITIONS = ("mean", "max", "conv"), ("attention", "values"), ("released", "centre")

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def place_loops(i, side, R, dilated):
    """Of cell i on an axis: the number of its window, and its place therein."""
    D = -(-side // R)
    return (i % D, i // D) if dilated else (i // R, i % R)


def local_attention_loops(q, k, v, table, shape, window, dilated, scale):
    """The second term of HLG-5, one query, one key and one channel at a time."""
    (B, h, L, d), (H, W), R, z = q.shape, shape, window, []
    rows, cols = ([place_loops(i, side, R, dilated) for i in range(side)] for side in shape)
    window_of = lambda i, j: (rows[i][0], cols[j][0])  # noqa: E731
    for b in range(B):
        for m in range(h):
            for i, j in ((l // W, l % W) for l in range(L)):
                keys = [(u, w) for u in range(H) for w in range(W) if window_of(u, w) == window_of(i, j)]
                logits = []
                for u, w in keys:
                    logit = sum(q[b, m, i * W + j, c] * k[b, m, u * W + w, c] for c in range(d)) * scale
                    if table is not None:  # B_W at the displacement, in places of the window
                        logit = logit + table[m, rows[i][1] - rows[u][1] + R - 1, cols[j][1] - cols[w][1] + R - 1]
                    logits.append(logit)
                pairs = list(zip(core.softmax_loops(logits), keys, strict=True))
                z += [sum(weight * v[b, m, u * W + w, c] for weight, (u, w) in pairs) for c in range(d)]  # HLG-5
    return torch.stack(z).reshape(B, h, L, d)


def window_embedding_loops(x, weight, bias, window, dilated, by):
    """Z_G of HLG-6: for every window and channel the mean, the maximum or a weighted sum of its cells."""
    (B, H, W, C), R, found = x.shape, window, []
    rows, cols = ([place_loops(i, side, R, dilated) for i in range(side)] for side in (H, W))
    windows = [(I, J) for I in range(-(-H // R)) for J in range(-(-W // R))]
    for b in range(B):
        for I, J in windows:
            cells = [(u, w) for u in range(H) for w in range(W) if (rows[u][0], cols[w][0]) == (I, J)]
            for c in range(C):
                if by == "mean":
                    found.append(sum(x[b, u, w, c] for u, w in cells) / len(cells))
                elif by == "max":
                    found.append(max(x[b, u, w, c] for u, w in cells))
                else:
                    found.append(sum(weight[c, rows[u][1], cols[w][1]] * x[b, u, w, c] for u, w in cells) + bias[c])
    return torch.stack(found).reshape(B, len(windows), C)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the windows lie on a map of `shape`: R x R tokens each, plain or dilated."""

    shape: tuple[int, int]
    window: int
    dilated: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a window: R."""
        return self.window, self.window

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns that are added at the bottom and right."""
        return core.padding_to(self.shape, self.sides)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows: D."""
        return tuple(-(-side // self.window) for side in self.shape)

    @property
    def whole(self) -> bool:
        """Whether no window has padding."""
        return all(core.surely(more == 0) for more in self.padding)

    @property
    def axes(self) -> tuple[str, dict[str, int]]:
        """The axes of a map in windows, for einops, and their lengths."""
        lengths = dict(zip(("I", "J", "wi", "wj"), (*self.grid, *self.sides), strict=True))
        return "B (wi I) (wj J) C" if self.dilated else "B (I wi) (J wj) C", lengths

    def windows(self, x: Num[Tensor, "B H W C"]) -> Num[Tensor, "B I J wi wj C"]:
        """A view of the windows of a map, with zeros where there is padding."""
        axes, lengths = self.axes
        return rearrange(core.pad_map(x, self.padding), f"{axes} -> B I J wi wj C", **lengths)

    def cut(self, x: Num[Tensor, "B H W C"]) -> Num[Tensor, "n T C"]:
        """The tokens of every window."""
        return rearrange(self.windows(x), "B I J wi wj C -> (B I J) (wi wj) C")

    def join(self, x: Num[Tensor, "n T C"]) -> Num[Tensor, "B H W C"]:
        """The inverse of `cut`."""
        axes, lengths = self.axes
        x = rearrange(x, f"(B I J) (wi wj) C -> {axes}", **lengths)
        return x if self.whole else core.crop(x, self.shape)

    def inside(self, device: torch.device) -> Bool[Tensor, "windows T"] | None:
        """Which tokens of the windows are no padding; None where all are."""
        cells = torch.ones(1, *self.shape, 1, dtype=torch.int64, device=device)
        return None if self.whole else self.cut(cells)[..., 0] > 0

    def bias(self, table: Float[Tensor, "h I J"] | None, like: Tensor, images: int) -> Tensor | None:
        """What is added to the logits in the windows of so many images: B_W, and -inf at keys that are padding."""
        bias, inside = None, self.inside(like.device)
        if table is not None:
            rows, cols = core.relative_index(self.sides)
            # In float32 or better: many places read one entry, and its gradients are summed in this dtype.
            bias = table.to(torch.promote_types(table.dtype, torch.float32))[None, :, rows, cols].to(like.dtype)
        if inside is not None:
            hidden = torch.zeros(inside.shape, dtype=like.dtype, device=like.device).masked_fill(~inside, -torch.inf)
            hidden = hidden.expand(images, -1, -1).flatten(0, 1)[:, None, None]  # (n, 1, 1, T)
            bias = hidden.expand(-1, -1, inside.shape[1], -1) if bias is None else bias + hidden
        return bias


def local_attention_torch(q, k, v, table, shape, window, dilated, scale):
    """Cut the maps into windows, attend in each, join them again."""
    layout, h = Layout(shape, window, dilated), q.shape[1]
    parts = (rearrange(layout.cut(core.merge_heads(t, shape)), "n T (h d) -> n h T d", h=h) for t in (q, k, v))
    z = core.dense_attention_torch(*parts, layout.bias(table, q, q.shape[0]), scale)  # HLG-5
    return core.split_heads(layout.join(rearrange(z, "n h T d -> n T (h d)")), h)


def window_embedding_torch(x, weight, bias, window, dilated, by, layout=None):
    """Z_G of HLG-6, from a view of the windows, or of those of another layout; padding counts for nothing."""
    layout = layout or Layout(tuple(x.shape[1:3]), window, dilated)
    windows, inside = layout.windows(x), layout.inside(x.device)
    if by == "conv":
        return torch.einsum("bijuwc,cuw->bijc", windows, weight).flatten(1, 2) + bias
    if by == "max":
        tokens = rearrange(windows, "B I J wi wj C -> B (I J) (wi wj) C")
        return (tokens if inside is None else tokens.masked_fill(~inside[..., None], -torch.inf)).amax(2)
    total = windows.sum(dim=(3, 4), dtype=torch.promote_types(x.dtype, torch.float32)).flatten(1, 2)
    return (total / (windows[0, 0, 0, ..., 0].numel() if inside is None else inside.sum(1)[:, None])).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


@core.operation(loops=local_attention_loops, torch=local_attention_torch)
def local_attention(
    q: Float[Tensor, "B h L d"],
    k: Float[Tensor, "B h L d"],
    v: Float[Tensor, "B h L d"],
    table: Float[Tensor, "h I J"] | None,
    query_shape: tuple[int, int],
    *,
    window: int,
    dilated: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h L d"]:
    """Every query reads the tokens of its window: neighbours, or with `dilated` every D-th token of the map.

    Shapes: q, k, v (B, h, H W, d), row-major, of a map of `query_shape`; table (h, 2R - 1, 2R - 1) or None: the bias
    by displacement, counted in places of the window. window: R. D is ceil(H / R), in columns ceil(W / R). `scale` None
    is d^-0.5. Returns (B, h, H W, d). Raises TypeError, ValueError on wrong arguments. Source: HLG-5, figure 4.
    """
    H, W = core.pair("query_shape", query_shape)
    R = core.positive("window", window)
    core.one_of("dilated", dilated, (False, True))
    shapes = {name: (t, "B h L d") for name, t in (("q", q), ("k", k), ("v", v))}
    if table is not None:
        shapes["table"] = (table, f"h {2 * R - 1} {2 * R - 1}")
    sizes = core.bind({"L": H * W}, **shapes)
    scale = core.scale_or_default(scale, sizes["d"])
    return local_attention.forms.run(impl, q, k, v, table, (H, W), R, bool(dilated), scale)


@core.operation(loops=window_embedding_loops, torch=window_embedding_torch)
def window_embedding(
    x: Float[Tensor, "B H W C"],
    weight: Float[Tensor, "C R R"] | None,
    bias: Float[Tensor, " C"] | None,
    *,
    window: int,
    dilated: bool = False,
    by: str = "mean",
    impl: str = "auto",
) -> Float[Tensor, "B N C"]:
    """One token for every window of a map: by "mean", "max", or "conv", a depthwise convolution as large as a window.

    Shapes: x (B, H, W, C); with "conv" weight (C, R, R) and bias (C,), else None. window, dilated: as of
    `local_attention`. What completes the last windows has no part in it. Returns (B, N, C), N = ceil(H / R) times
    ceil(W / R), row-major. Raises TypeError, ValueError on wrong arguments. Source: HLG section 3.3.
    """
    R = core.positive("window", window)
    core.one_of("dilated", dilated, (False, True))
    core.one_of("by", by, EMBEDDINGS)
    if (by == "conv") != (weight is not None) or (by == "conv") != (bias is not None):
        raise ValueError(f"weight, bias: expected both with by='conv' and neither without, got by={by!r}")
    more = dict(weight=(weight, f"C {R} {R}"), bias=(bias, "C")) if by == "conv" else {}
    core.bind(x=(x, "B H W C"), **more)
    return window_embedding.forms.run(impl, x, weight, bias, R, bool(dilated), by)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


def bias_of_windows(network: core.DisplacementBias, layout: Layout, positions: str, like: Tensor) -> Tensor:
    """B_G (1, h, L, N): the bias of every cell and every window, at the displacement from where the window is."""
    (I, J), (Ri, Rj), W = layout.grid, layout.sides, layout.shape[1]
    n = torch.arange(I * J, device=like.device)
    if positions == "released":
        row, col, last, start = n // W, n % W, ((I * J - 1) // W, core.smaller(I * J, W) - 1), (0, 0)
    elif layout.dilated:  # the mean place of its cells
        row, col, last, start = n // J, n % J, (I - 1, J - 1), (I * (Ri - 1) / 2, J * (Rj - 1) / 2)
    else:
        row, col, last, start = n // J * Ri, n % J * Rj, ((I - 1) * Ri, (J - 1) * Rj), ((Ri - 1) / 2, (Rj - 1) / 2)
    return network.of_map(layout.shape, (row, col), last, start)[None].to(like.dtype)


class LocalGlobalAttention(nn.Module):
    """Local, then global attention, each beside an identity: (B, H, W, C) to the same, for any H and W.

    dim, heads: C and the heads.  window: R.  dilated: dilated windows, not plain ones.  local: without it global
    attention alone (Table 14).  query_as_key: K_W is Q_W, as published, or has W_K.  conv_of: the convolution of HLG-9
    reads the local "attention", behind a LayerNorm, as published, or its "values".  positions: where B_G takes a window
    to be: at its "centre", or, as "released", at cell n of the map.  embedding: of windows, "mean", "max", "conv"
    (Table 12).  attn_drop, proj_drop, drop_path: what training drops of weights, the projection, the global branch.
    """

    implementation, forms = "auto", tuple(local_attention.forms)  # see `dynattn.use_implementation`

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 7,
        *,
        dilated: bool = False,
        local: bool = True,
        query_as_key: bool = True,
        conv_of: str = "attention",
        positions: str = "centre",
        embedding: str = "mean",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.dim, self.heads, self.window = dim, core.divisor("heads", heads, dim), core.positive("window", window)
        core.one_of("conv_of", conv_of, CONV_OF)
        core.one_of("positions", positions, POSITIONS)
        core.one_of("embedding", embedding, EMBEDDINGS)
        self.dilated, self.local, self.query_as_key = dilated, local, query_as_key
        self.conv_of, self.positions, self.embedding = conv_of, positions, embedding
        self.attn_drop, self.scale = core.rate("attn_drop", attn_drop), (dim // heads) ** -0.5
        self.norm, self.embed_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.embed = nn.Conv2d(dim, dim, window, window, groups=dim) if embedding == "conv" else None
        self.global_bias = core.DisplacementBias(dim, heads)
        if local:
            self.local_bias = core.DisplacementBias(dim, heads)
            self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.conv_norm = nn.LayerNorm(dim, eps=1e-6) if conv_of == "attention" else nn.Identity()
        self.proj_drop = nn.Dropout(core.rate("proj_drop", proj_drop))
        self.drop_path = DropPath(core.rate("drop_path", drop_path))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Float[Tensor, "n h L d"]:
        """Attention of every query to every key that the bias does not hide."""
        if self.training and self.attn_drop:
            return core.dense_attention_torch(q, k, v, bias, self.scale, self.attn_drop)
        return core.dense_attention.forms.run(self.implementation, q, k, v, bias, self.scale)

    def local_table(self, layout: Layout, device: torch.device) -> Float[Tensor, "h I J"]:
        """B_W by displacement, in places of the window."""
        return self.local_bias(*(torch.arange(1 - side, side, device=device) for side in layout.sides))

    def read_window(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Float[Tensor, "B H W C"]:
        """The second term of HLG-5, of maps (B, H, W, C); where keys are queries both are moved once."""
        by_head = lambda x: rearrange(layout.cut(x), "n T (h d) -> n h T d", h=self.heads)  # noqa: E731
        queries, bias = by_head(q), layout.bias(self.local_table(layout, q.device), q, q.shape[0])
        z = self.attend(queries, queries if k is q else by_head(k), by_head(v), bias)  # HLG-5
        return layout.join(rearrange(z, "n h T d -> n T (h d)"))

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        layout = Layout(tuple(x.shape[1:3]), self.window, self.dilated)
        n = self.norm(x)
        q, k, v, z = self.q(n), None, None, 0.0
        if self.local:
            k, v = q if self.query_as_key else self.k(n), self.v(n)
            z = self.read_window(q, k, v, layout)
            x = x + z  # HLG-5
        kernel = (None, None) if self.embed is None else (self.embed.weight[:, 0], self.embed.bias)
        how = self.window, self.dilated, self.embedding
        g = self.embed_norm(window_embedding.forms.run(self.implementation, x, *kernel, *how))
        k_g, v_g = (rearrange(f(g), "B N (h d) -> B h N d", h=self.heads) for f in (self.k, self.v))  # HLG-6, HLG-8
        query, bias = q, bias_of_windows(self.global_bias, layout, self.positions, q)
        if self.local:
            context = self.conv_norm(z if self.conv_of == "attention" else v)
            query = q + rearrange(self.conv(rearrange(context, "B H W C -> B C H W")), "B C H W -> B H W C")  # HLG-9
        query = core.split_heads(query, self.heads)
        y = self.attend(query, k_g, v_g, bias)
        if tracing.recording():
            tracing.keep(self, LocalGlobalRecord(self, layout, (q, k, v, z), (query, k_g, v_g, y), bias))
        return x + self.drop_path(self.proj_drop(self.proj(core.merge_heads(y, layout.shape))))  # HLG-7


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class LocalGlobalRecord(tracing.Record):
    """One layer: z (M, H W, d), what the query read in its window and of all windows, before the projection.

    near (N, M, T, T), everywhere (M, H W, N): the softmaxes; v_g of the windows, `mean` (N, H W) of their cells,
    `window` (H W) of a cell. A_eff lets a window be the mean of its cells; its rows sum to 2. Not exact: a window's
    value is made of Z_L behind a LayerNorm. Without local attention it is, and rows sum to 1.
    """

    kind = "local_global"

    def __init__(self, layer: nn.Module, layout: Layout, maps: tuple, read: tuple, bias: Tensor):
        (q, k, v, z), (query, k_g, v_g, y) = maps, (t[0] for t in read)
        self.query_shape, self.heads, self.exact = layout.shape, layer.heads, not layer.local
        self.words = f"{'dilated' if layout.dilated else 'plain'} local-global"
        self.everywhere, self.near = core.attention_weights(query, k_g, bias[0], layer.scale), None
        cells = torch.arange(1, y.shape[1] + 1, device=y.device).reshape(1, *layout.shape, 1)
        self.places = layout.cut(cells)[..., 0]  # (N, T), from 1; padding has 0
        members = y.new_zeros(len(self.places), y.shape[1] + 1).scatter(1, self.places, 1.0)[:, 1:]
        self.mean, self.window = members / members.sum(dim=1, keepdim=True), members.argmax(dim=0)
        self.v_g, self.z, self.v = v_g, y, v_g[:, self.window]
        if layer.local:
            local, self.v = (core.split_heads(t[:1], layer.heads)[0] for t in (z, v))
            self.z = local + y
            inside = [rearrange(layout.cut(t[:1]), "n T (h d) -> n h T d", h=self.heads) for t in (q, k)]
            table = layer.local_table(layout, y.device)
            self.near = core.attention_weights(*inside, layout.bias(table, q, 1), layer.scale)

    def local(self, head: int = 0) -> Float[Tensor, "L L"]:
        """Attention to the cells of the own window, where there is local attention."""
        full = self.near.new_zeros(len(self.window) + 1, len(self.window) + 1)  # with a row and column of padding
        return full.index_put((self.places[:, :, None], self.places[:, None, :]), self.near[:, head])[1:, 1:]

    def weights(self, head: int = 0) -> Float[Tensor, "L N"]:
        """Attention to the cells, as far as there is local attention, and behind them to the windows."""
        self.check_head(head)
        return torch.cat([*([] if self.near is None else [self.local(head)]), self.everywhere[head]], dim=1)

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """Local attention, and attention to a window, shared equally by its cells."""
        near, far = self.weights(head).tensor_split([-len(self.mean)], dim=1)
        return far @ self.mean if self.near is None else near + far @ self.mean

    def shares(self, head: int = 0) -> Float[Tensor, "L S"]:
        """A_eff, each of whose rows is divided by its sum."""
        return nn.functional.normalize(self.effective_matrix(head), p=1, dim=1)

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The cells of the query's window, then the centre of every window; the weights of each sum to 1."""
        query, cells = self.query(row, col), self.cells().to(self.z)
        near, far = self.weights(head)[query].tensor_split([-len(self.mean)])
        read = self.window == self.window[query] if self.near is not None else []
        return tracing.Keys(torch.cat([cells[read], self.mean @ cells]), torch.cat([near[read], far]))

    def pooled(self, head: int = 0) -> tracing.Pooled:
        """The windows, each of which stands for its cells."""
        self.check_head(head)
        return tracing.Pooled(self.window, self.everywhere[head])
