"""Deformable bi-level routing attention (DBRA, DeBiFormer section 3.2): a few agents read for everybody.

A grid of agents lies over the map, one for every r x r cells. An offset network moves them (DAT), each of them reads
the regions that it is routed to (BiFormer), and all queries of the map read the agents:

    q = x W_q            Delta p = theta_offset(q)            x- = phi(x; p + Delta p)                       DEBI-6
    phi(z; (p_x, p_y)) = sum_(r_x, r_y) g(p_x, r_x) g(p_y, r_y) z[r_y, r_x, :]            `core.sample_points`    DEBI-7
    q^ = x- W_q          k^ = x W_k           v^ = x W_v                                                     DEBI-8
    A^r = q^r (k^r)^T,   I^r = topk(A^r),   k^^g = gather(k^, I),  v^^g = gather(v^, I)          DEBI-9 to DEBI-11
    O^ = x- + W_o' (Attention(q^, k^^g, v^^g) + LCE(v^))                                                       DEBI-12
    O  = MLP(LN(O^)) + O^                                                                                    DEBI-13
    k = O W_k            v = O W_v                                                                           DEBI-14
    z^(m) = softmax(q^(m) k^(m)T / sqrt(d) + phi(B^; R)) v^(m)            then W_o                           DEBI-15

The letters W_q, W_k, W_v stand for two maps each in the paper: here `qkv` makes q, k^ and v^ of the map, and `agent_q`,
`agent_k`, `agent_v` what belongs to the agents. The channels fall into G groups, each with offsets of its own.
Where text and published code part, see the ledger, papers/debiformer.toml.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.mechanisms.bilevel import (
    Routing,
    attention_scale,
    bilevel_attention,
    bilevel_attention_loops,
    bilevel_attention_torch,
)
from dynattn.mechanisms.deformable import (
    deformable_attention,
    deformable_attention_loops,
    deformable_attention_torch,
    relative_bias,
)


class ConvFFN(nn.Module):
    """A feed-forward network with a depthwise 3 x 3 beside an identity between its two layers: (B, H, W, C) to itself.

    `ratio` e: how much wider it is inside.
    """

    def __init__(self, dim: int, ratio: int = 3):
        super().__init__()
        wide = dim * core.positive("ratio", ratio)
        self.expand, self.reduce = nn.Linear(dim, wide), nn.Linear(wide, dim)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        wide = x.shape[1] * x.shape[2] * self.depthwise.in_channels
        return core.by_images(self, self.of_some, x, wide)

    def of_some(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """The same for as many images as are near at once."""
        conv = self.depthwise  # the identity is one more in the centre of its kernel: no addition of the widest map
        kernel = conv.weight + F.pad(conv.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        x = F.conv2d(rearrange(self.expand(x), "B H W C -> B C H W"), kernel, conv.bias, padding=1, groups=conv.groups)
        return self.reduce(rearrange(core.gelu(x), "B C H W -> B H W C"))


class OffsetNetwork(nn.Module):
    """theta_offset of DEBI-6: a depthwise k x k convolution of stride r, LayerNorm, GELU, 1 x 1; no biases.

    channels_out: 1, one number that moves an agent by row and column alike (published code), or 2 (text).
    Queries of one group (B, c, H, W) to (B, ceil(H / r), ceil(W / r), channels_out).
    """

    def __init__(self, channels: int, kernel: int, stride: int, channels_out: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        self.norm, self.pointwise = nn.LayerNorm(channels), nn.Linear(channels, channels_out, bias=False)

    def forward(self, q: Float[Tensor, "B c H W"]) -> Float[Tensor, "B HG WG o"]:
        return self.pointwise(F.gelu(self.norm(rearrange(self.depthwise(q), "B c HG WG -> B HG WG c"))))


class DeformableBiLevelAttention(nn.Module):
    """Deformable bi-level routing attention: (B, H, W, C) to the same, for any H and W.

    dim, heads: C and M.  groups: G, divides both.  map_size: the (H, W) that sizes the bias table; at another size the
    table is resized (bicubic).  stride: r, cells between agents.  kernel: K of the offset network.  regions: S.
    topk: k, how many regions an agent reads.  ratio: e of the inner feed-forward network.
    scale: "dim" or "head", see `bilevel.attention_scale`.  offset_channels: 1 or 2, see `OffsetNetwork`.
    agent_norm: a LayerNorm of O before DEBI-14, as the published code has it.
    attn_drop: the share of the weights of both attentions that training drops, always in the torch form.
    `regions` and `topk` may be changed at any time.
    """

    implementation, forms = "auto", tuple(bilevel_attention.forms)  # see `dynattn.use_implementation`

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int,
        map_size: tuple[int, int],
        *,
        stride: int = 1,
        kernel: int = 5,
        regions: int = 7,
        topk: int = 4,
        ratio: int = 3,
        scale: str = "dim",
        offset_channels: int = 1,
        agent_norm: bool = True,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        self.heads, self.groups = core.divisor("heads", heads, dim), core.divisor("groups", groups, heads)
        self.stride, self.dim = core.positive("stride", stride), dim
        if core.positive("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {kernel}")  # an even one has no centre to pad around
        core.one_of("offset_channels", offset_channels, (1, 2))
        self.regions, self.topk = core.positive("regions", regions), core.positive("topk", topk)
        self.map_size, self.offset_channels = core.pair("map_size", map_size), offset_channels
        self.scale, self.attn_drop = attention_scale(scale, dim, heads), core.rate("attn_drop", attn_drop)

        self.qkv = nn.Linear(dim, 3 * dim)
        self.offset = OffsetNetwork(dim // groups, kernel, stride, offset_channels)
        self.agent_q, self.agent_k, self.agent_v, self.unify, self.proj = (nn.Linear(dim, dim) for _ in range(5))
        self.lce = nn.Conv2d(dim, dim, 5, stride, 2, groups=dim)
        self.norm_ffn, self.ffn = nn.LayerNorm(dim, eps=1e-6), ConvFFN(dim, ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if agent_norm else nn.Identity()
        H, W = self.map_size
        self.table = nn.Parameter(torch.empty(heads, 2 * H - 1, 2 * W - 1))
        nn.init.normal_(self.table, std=0.01)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        shape, grid = tuple(x.shape[1:3]), tuple(-(-n // self.stride) for n in x.shape[1:3])
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # DEBI-6, DEBI-8
        points = self.points(q, grid, x)
        features = rearrange(x, "B H W (g c) -> (B g) c H W", g=self.groups)
        sampled = core.sample_points(features, points.flatten(0, 1), impl=self.implementation)  # DEBI-6, DEBI-7
        sampled = rearrange(sampled, "(B g) c (HG WG) -> B HG WG (g c)", g=self.groups, HG=grid[0])
        # Under autocast the linear maps answer in less precision than positions have; elsewhere `to` does nothing.
        heads_of = lambda t: core.split_heads(t, self.heads).to(points.dtype)  # noqa: E731
        agents, keys, values = heads_of(self.agent_q(sampled)), heads_of(k), heads_of(v)  # DEBI-8
        table = core.resize_table(self.table.to(points.dtype), tuple(2 * n - 1 for n in shape))
        dropout = self.attn_drop if self.training else 0.0

        routing = grid, shape, self.regions, self.topk, self.scale
        if dropout:
            read = bilevel_attention_torch(agents, keys, values, *routing, dropout=dropout)
        else:
            how = dict(regions=self.regions, topk=self.topk, scale=self.scale, impl=self.implementation)
            read = bilevel_attention(agents, keys, values, grid, shape, **how)  # DEBI-9, DEBI-10, DEBI-11
        context = rearrange(self.lce(rearrange(v, "B H W C -> B C H W")), "B C HG WG -> B HG WG C")
        read_map = core.merge_heads(read, grid) + context
        o = sampled + self.unify(read_map)  # DEBI-12
        o = self.norm(self.ffn(self.norm_ffn(o)) + o)  # DEBI-13
        k_agents, v_agents = heads_of(self.agent_k(o)), heads_of(self.agent_v(o))  # DEBI-14
        inputs = heads_of(q), k_agents, v_agents, points, table, shape
        if dropout:
            z = deformable_attention_torch(*inputs, "corner", self.scale, dropout)
        else:
            z = deformable_attention(
                *inputs, query_grid="corner", scale=self.scale, impl=self.implementation
            )  # DEBI-15
        if tracing.recording():
            tracing.keep(self, DeformableBiLevelRecord(self, inputs, z, (agents, keys, values), routing))
        return self.proj(core.merge_heads(z, shape))  # DEBI-15

    def points(self, q: Float[Tensor, "B H W C"], grid: tuple[int, int], like: Tensor) -> Float[Tensor, "B g N 2"]:
        """Where the agents of each group stand, p + Delta p (DEBI-6), kept on the map; normalised (row, col)."""
        raw = self.offset(rearrange(q, "B H W (g c) -> (B g) c H W", g=self.groups))
        offsets = rearrange(raw, "(B g) HG WG o -> B g (HG WG) o", g=self.groups).expand(-1, -1, -1, 2)
        return (core.grid_points(grid, "centre", like) + offsets).clamp(-1, 1)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, groups={self.groups}, stride={self.stride}, regions={self.regions}, "
            f"topk={self.topk}, offset_channels={self.offset_channels}"
        )


def deformable_bilevel_loops(layer: DeformableBiLevelAttention, x: Float[Tensor, "H W C"]) -> Float[Tensor, "H W C"]:
    """DEBI-6 to DEBI-15 with the weights of a layer, one image, one agent, one channel at a time: the specification."""
    (H, W, C), M, G, r = x.shape, layer.heads, layer.groups, layer.stride
    HG, WG = -(-H // r), -(-W // r)
    width = C // G

    def linear(f: nn.Linear, row: list[Tensor]) -> list[Tensor]:
        sums = [sum(w * one for w, one in zip(weights, row, strict=True)) for weights in f.weight]
        return sums if f.bias is None else [total + bias for total, bias in zip(sums, f.bias, strict=True)]

    def norm(f: nn.LayerNorm | nn.Identity, row: list[Tensor]) -> list[Tensor]:
        if isinstance(f, nn.Identity):
            return row
        mean = sum(row) / len(row)
        deviation = (sum((one - mean) ** 2 for one in row) / len(row) + f.eps).sqrt()
        return [w * (one - mean) / deviation + b for w, one, b in zip(f.weight, row, f.bias, strict=True)]

    def gelu(row: list[Tensor]) -> list[Tensor]:
        return [one * (1 + torch.erf(one / 2**0.5)) / 2 for one in row]

    def convolved(f: nn.Conv2d, rows: dict[tuple[int, int], list[Tensor]], i: int, j: int, c: int, at: int) -> Tensor:
        """Channel `at` of a depthwise convolution's output at (i, j), of channel c of its input."""
        K, step, total = f.kernel_size[0], f.stride[0], 0 if f.bias is None else f.bias[at]
        for a in range(K):
            for b in range(K):
                place = i * step + a - K // 2, j * step + b - K // 2
                if place in rows:
                    total = total + f.weight[at, 0, a, b] * rows[place][c]
        return total

    cells = [(i, j) for i in range(H) for j in range(W)]
    agents = [(i, j) for i in range(HG) for j in range(WG)]
    projected = {at: linear(layer.qkv, list(x[at])) for at in cells}
    q, k, v = ({at: row[part * C : (part + 1) * C] for at, row in projected.items()} for part in range(3))
    as_heads = lambda rows: core.split_heads(torch.stack([torch.stack(row) for row in rows])[None, None], M)  # noqa: E731

    points, sampled = {}, {}
    for i, j in agents:
        for g in range(G):
            start = g * width
            row = [convolved(layer.offset.depthwise, q, i, j, start + c, c) for c in range(width)]
            offset = linear(layer.offset.pointwise, gelu(norm(layer.offset.norm, row)))
            reference = x.new_tensor([(2 * i + 1) / HG - 1, (2 * j + 1) / WG - 1])
            points[g, i, j] = (reference + torch.stack([offset[0], offset[-1]])).clamp(-1, 1)  # DEBI-6
        pixels = [core.to_pixels(points[g, i, j], (H, W)) for g in range(G)]
        sampled[i, j] = [core.read_bilinear(x[:, :, c], *pixels[c // width]) for c in range(C)]  # DEBI-7

    q_agents = as_heads([linear(layer.agent_q, sampled[at]) for at in agents])  # DEBI-8
    routing = (HG, WG), (H, W), layer.regions, layer.topk, layer.scale
    read = bilevel_attention_loops(q_agents, as_heads(k.values()), as_heads(v.values()), *routing)  # DEBI-9 to DEBI-11
    read = core.merge_heads(read, (HG, WG))[0]
    o, wide = {}, {}
    for i, j in agents:
        both = [read[i, j, c] + convolved(layer.lce, v, i, j, c, c) for c in range(C)]
        o[i, j] = [a + b for a, b in zip(sampled[i, j], linear(layer.unify, both), strict=True)]  # DEBI-12
        wide[i, j] = linear(layer.ffn.expand, norm(layer.norm_ffn, o[i, j]))
    for i, j in agents:
        row = [one + convolved(layer.ffn.depthwise, wide, i, j, c, c) for c, one in enumerate(wide[i, j])]
        row = [a + b for a, b in zip(linear(layer.ffn.reduce, gelu(row)), o[i, j], strict=True)]  # DEBI-13
        o[i, j] = norm(layer.norm, row)
    keys, values = (as_heads([linear(f, o[at]) for at in agents]) for f in (layer.agent_k, layer.agent_v))  # DEBI-14
    of_groups = torch.stack([torch.stack([points[g, i, j] for i, j in agents]) for g in range(G)])[None]
    table = core.resize_table(layer.table, (2 * H - 1, 2 * W - 1))
    inputs = as_heads(q.values()), keys, values, of_groups, table, (H, W), "corner", layer.scale
    z = core.merge_heads(deformable_attention_loops(*inputs), (H, W))[0]  # DEBI-15
    return torch.stack([torch.stack(linear(layer.proj, list(z[at]))) for at in cells]).reshape(H, W, C)


def multiply_adds(
    shape: tuple[int, int], agents: int, regions: int, topk: int, channels: int, kernel: int, ratio: int
) -> int:
    """Of DBRA on an H x W map of C channels that S divides, with N_s agents, all that torch's counter sees.

    Linear maps of the map and of the agents, both attentions, routing, LCE, offsets of one channel, feed-forward.
    """
    HW, N, S, C = shape[0] * shape[1], agents, regions, channels
    attentions = 2 * HW * N * C + 2 * topk * HW * N * C // S**2 + S**4 * C
    rest = 25 * N * C + (kernel**2 + 1) * N * C + 2 * ratio * N * C**2 + 9 * ratio * N * C
    return 4 * HW * C**2 + 4 * N * C**2 + attentions + rest


def printed_multiply_adds(
    shape: tuple[int, int], agents: int, regions: int, topk: int, channels: int, kernel: int
) -> tuple[int, int]:
    """The two parts of the formula that section 7.3 prints: deformable, and bi-level before its bound.

    Wrong in places: see the ledger, papers/debiformer.toml.
    """
    HW, N, S, C = shape[0] * shape[1], agents, regions, channels
    linear = 2 * HW * C**2 + 2 * N * C**2
    return 2 * HW * N * C + linear + (kernel**2 + 6) * N * C, linear + 2 * S**4 * C + 2 * topk * HW * N * C // S**2


class DeformableBiLevelRecord(tracing.Record):
    """One DBRA layer.

    points (G, N, 2) and references (N, 2), normalised (row, col); attention (M, L, N), what queries give to agents;
    reading (M, N, S), what agents give to the tokens of the map; routing.routes (R, n), the regions that each region of
    agents reads. A_eff is the product of the two. Its `value` is v^ of the head carried on by the linear maps between
    the two attentions, W_o' and W_v. Left out are the agents' own features, LCE, norm and feed-forward network, and
    what comes from other heads: `rest` says how large all this is, and it may be more than 1.
    """

    kind, exact = "deformable_bilevel", False

    def __init__(self, layer: DeformableBiLevelAttention, inputs: tuple, z: Tensor, first: tuple, routing: tuple):
        q, k, v, points, table, self.query_shape = inputs
        self.heads, self.groups, self.grid, d = layer.heads, layer.groups, routing[0], q.shape[-1]
        self.agent_stride = layer.stride
        self.q, self.k, self.v, self.z, self.points = q[0], k[0], v[0], z[0], points[0]
        self.references = core.grid_points(self.grid, "centre", points)
        bias = relative_bias(points[:1], table, self.query_shape, "corner")[0]
        self.attention = core.attention_weights(self.q, self.k, bias, layer.scale)
        agents, keys, values = (t[:1] for t in first)
        *shapes, regions, topk, scale = routing
        self.routing = Routing(agents, keys, *shapes, regions, topk)
        self.reading = torch.stack([self.routing.weights(a, b, scale) for a, b in zip(agents[0], keys[0], strict=True)])
        carried = (layer.agent_v.weight @ layer.unify.weight).unflatten(0, (-1, d)).unflatten(2, (-1, d))
        parts = [values[0, m] @ carried[m, :, m].mT.to(values) for m in range(self.heads)]
        self.source_values = torch.stack(parts)

    def region_routes(self) -> tracing.RegionRoutes:
        """The regions that the agents of each region read; an agent counts where it stands without its offset."""
        return self.routing.on_image([self.agent_stride * step for step in self.stride], self.stride, "agents")

    def group(self, head: int) -> int:
        """The offset group whose agents a head reads."""
        self.check_head(head)
        return head * self.groups // self.heads

    def weights(self, head: int = 0) -> Float[Tensor, "L N"]:
        self.check_head(head)
        return self.attention[head]

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """What queries give to agents, times what agents give to the map."""
        return self.weights(head) @ self.reading[head]

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        self.check_head(head)
        return self.source_values[head]

    def points_xy(self, group: int = 0) -> Float[Tensor, "N 2"]:
        """The agents of a group in image pixels (x, y)."""
        return self.to_image(core.to_pixels(self.points[group], self.query_shape))

    def references_xy(self) -> Float[Tensor, "N 2"]:
        """Where the agents would be without offsets, in image pixels (x, y)."""
        return self.to_image(core.to_pixels(self.references, self.query_shape))

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """The agents and the attention that the query at image pixel (row, col) gives each."""
        return tracing.Keys(self.points_xy(self.group(head)), self.attention[head, self.query(row, col)])
