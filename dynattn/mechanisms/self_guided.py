"""Self-guided attention (SG-Former section 3.2): few tokens where little is to be seen, many where it matters.

The tokens of the map are sorted by the significance S that the layer before found for them (`hybrid_scale.py`), least
significant first, and cut into sub-regions of equal size. In sub-region i every r_i tokens that follow each other in
this order become one, with weights of a fully connected layer F_i, the same for all channels and all such groups; the
less significant, the larger r_i. All tokens of the map ask, and read what is left:

    Q = X W^Q,   K = IAM(X, S, r) W^K,   V = IAM(X, S, r) W^V,   z = softmax(Q K^T / sqrt(d)) V                  SG-1
    X^_i = F_i(X_i, r_i),   X^ = Concat(X^_1, ..., X^_n)        IAM, with X_1, ..., X_n by rank                  SG-2

Tokens that become one are neighbours in rank, not on the map. A sub-region that its rate does not divide begins with
copies of its least significant token. Sorting has no gradient: the layer before learns nothing from what is made of its
significance. SG-1 aggregates X, then projects, as the published code does; the prose may also mean the other order.
The two differ by biases only, since F_i and the projections act on different axes. Ledger: papers/sgformer.toml.
Beside the letters of `core`:

    S        significance        r   aggregation rate, tokens that become one        n   sub-regions
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.kernels import aggregation as kernel
from dynattn.kernels import operators

# ---------------------------------------------------------------------------------------------------------------------
# 1. Loops
# ---------------------------------------------------------------------------------------------------------------------


def aggregate_tokens_loops(x, order, weight, bias, sizes, rates):
    """SG-2, one sub-region, one group and one channel at a time."""
    B, _, C = x.shape
    out = []
    for b in range(B):
        start, at = 0, 0
        for i, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
            ranks = [start] * (-size % rate) + list(range(start, start + size))
            for first in range(0, len(ranks), rate):
                cells = [int(order[b, ranks[first + t]]) for t in range(rate)]
                out += [
                    bias[i] + sum(weight[at + t] * x[b, cells[t], c] for t in range(rate)) for c in range(C)
                ]  # SG-2
            start, at = start + size, at + rate
    return torch.stack(out).reshape(B, -1, C)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rank(significance: Float[Tensor, "B H W"]) -> Int[Tensor, "B N"]:
    """The cells in the order of their significance, least first; of equals the first cell first."""
    return core.stable_order(significance.flatten(1))  # SG-2


def sub_regions(tokens: int, shares: Sequence[int]) -> list[int]:
    """How many tokens each sub-region has, which takes so many parts of sum(shares); the last also has the rest."""
    part = tokens // sum(shares)
    sizes = [part * share for share in shares[:-1]]
    return [*sizes, tokens - sum(sizes)]


def aggregate_tokens_torch(x, order, weight, bias, sizes, rates):
    """SG-2 by a sorted copy of the tokens, then a product in each sub-region."""
    return kernel.aggregate(x, order, weight[None], bias[None], sizes, rates)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The operation
# ---------------------------------------------------------------------------------------------------------------------


def _kernel(backend: str) -> Callable:
    """The operator of a backend as a form."""

    def form(x, order, weight, bias, sizes, rates):
        inputs = x, order, weight[None], bias[None], list(sizes), list(rates)
        return operators.apply(kernel.OPERATORS[backend], *inputs)[0]

    return form


KERNELS = {backend: _kernel(backend) for backend in kernel.OPERATORS}


def check_rates(rates: object) -> tuple[int, ...]:
    """`rates` as a tuple; raises TypeError, ValueError unless there are some, all whole numbers of at least 1."""
    if not isinstance(rates, tuple | list) or not rates:
        raise TypeError(f"rates: expected an aggregation rate for each sub-region, got {rates!r}")
    return tuple(core.positive("rates", rate) for rate in rates)


def check_sizes(sizes: object, tokens: int, count: int) -> tuple[int, ...]:
    """`sizes` as a tuple; raises TypeError, ValueError unless there are `count` that make up all tokens."""
    if not isinstance(sizes, tuple | list) or len(sizes) != count:
        raise TypeError(f"sizes: expected {count} sizes, one for each rate, got {sizes!r}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int | torch.SymInt) or size < 0:
            raise ValueError(f"sizes: expected whole numbers of at least 0, got {size!r}")
    if sum(sizes) != tokens:
        raise ValueError(f"sizes: expected a sum of {tokens}, the tokens of x, got {sum(sizes)}")
    return tuple(sizes)


@core.operation(loops=aggregate_tokens_loops, torch=aggregate_tokens_torch, **KERNELS, pays=kernel.pays)
def aggregate_tokens(
    x: Float[Tensor, "B N C"],
    order: Int[Tensor, "B N"],
    weight: Float[Tensor, " R"],
    bias: Float[Tensor, " n"],
    sizes: Sequence[int],
    rates: Sequence[int],
    *,
    impl: str = "auto",
) -> Float[Tensor, "B G C"]:
    """Tokens that follow each other in an order become one: a weighted sum, with other weights in each sub-region.

    Shapes: x (B, N, C); order (B, N), int64, the cells in their order, every cell once; sizes, rates: of each of n
    sub-regions, how many tokens it has, N together, and how many of them become one; weight (R,), R = sum(rates), the
    weights of one sub-region behind those of another; bias (n,), added to all channels. A sub-region that its rate does
    not divide begins with copies of its first token.
    Returns (B, G, C), G the sum of ceil(size / rate). Raises TypeError, ValueError on wrong arguments.
    Source: SG-Former section 3.2, equation 2.
    """
    rates = check_rates(rates)
    known = {"R": sum(rates), "n": len(rates)}
    found = core.bind(known, x=(x, "B N C"), weight=(weight, "R"), bias=(bias, "n"))
    sizes = check_sizes(sizes, found["N"], len(rates))
    core.check_indices("order", order, x, (found["B"], found["N"]), found["N"])
    core.check_distinct("order", order, found["N"], "cells for every image")
    return aggregate_tokens.forms.run(impl, x, order, weight, bias, sizes, rates)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The module
# ---------------------------------------------------------------------------------------------------------------------


def merged_rates(rates: Sequence[int]) -> tuple[list[int], list[int]]:
    """Sub-regions of equal rates that follow each other as one: the rates, and how many each was."""
    found, shares = [], []
    for rate in rates:
        if found and found[-1] == rate:
            shares[-1] += 1
        else:
            found.append(rate)
            shares.append(1)
    return found, shares


class SelfGuidedAttention(nn.Module):
    """Self-guided attention: (B, H, W, C) and the significance of every cell (B, H, W) to (B, H, W, C), for any H, W.

    dim, heads: C and H.  rates: r of each sub-region, the least significant first (Table 1).  shared: sub-regions of
    one rate that follow each other have one F together, as in the published code.  aggregate: "before" the tokens are
    projected to keys and values (published code), or "after" (text).  parts: linear maps that keys and values come
    from, each for as many heads; one is the same as several.  lepe: a linear map and a depthwise 3 x 3 convolution of
    the input are added, as in the published code.  attn_drop: the share of the weights that training drops.
    """

    implementation, forms = "auto", tuple(aggregate_tokens.forms)  # see `dynattn.use_implementation`

    def __init__(
        self,
        dim: int,
        heads: int,
        rates: Sequence[int],
        *,
        shared: bool = True,
        aggregate: str = "before",
        lepe: bool = True,
        parts: int = 1,
        attn_drop: float = 0.0,
    ):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("heads", heads, dim)
        core.one_of("aggregate", aggregate, ("before", "after"))
        self.aggregate, self.attn_drop = aggregate, core.rate("attn_drop", attn_drop)
        rates = check_rates(rates)
        self.rates, self.shares = merged_rates(rates) if shared else (list(rates), [1] * len(rates))
        self.q, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        width = 2 * dim // core.divisor("parts", parts, heads)
        self.kv = nn.ModuleList(nn.Linear(dim, width) for _ in range(parts))
        self.f = nn.ModuleList(nn.Linear(rate, 1) for rate in self.rates)
        self.lepe_linear = nn.Linear(dim, dim) if lepe else None
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if lepe else None

    def project(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B N two C"]:
        """The keys and values of some tokens (SG-1)."""
        return torch.cat([part(tokens).unflatten(-1, (2, -1)) for part in self.kv], dim=-1)  # SG-1

    def reallocate(
        self, tokens: Float[Tensor, "B N C"], order: Int[Tensor, "B N"], sizes: Sequence[int]
    ) -> Float[Tensor, "B G C"]:
        """IAM: the tokens that are left."""
        weight, bias = torch.cat([f.weight[0] for f in self.f]), torch.cat([f.bias for f in self.f])
        weight, bias = weight.to(tokens.dtype), bias.to(tokens.dtype)  # under autocast, tokens have less precision
        inputs = tokens, order, weight, bias, sizes, self.rates
        return aggregate_tokens.forms.run(self.implementation, *inputs)  # SG-2

    def forward(self, x: Float[Tensor, "B H W C"], significance: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W C"]:
        core.bind(x=(x, f"B H W {self.dim}"))
        core.bind(significance=(significance, "B H W"))
        shape, tokens = tuple(x.shape[1:3]), x.flatten(1, 2)
        if significance.shape != x.shape[:3]:
            raise ValueError(
                f"significance: expected shape {tuple(x.shape[:3])}, a number for every cell of x, "
                f"got {tuple(significance.shape)}"
            )
        order, sizes = rank(significance), sub_regions(tokens.shape[1], self.shares)
        if self.aggregate == "before":
            kv = self.project(self.reallocate(tokens, order, sizes))
        else:
            kv = self.reallocate(self.project(tokens).flatten(2), order, sizes).unflatten(-1, (2, -1))
        q = core.split_heads(self.q(x), self.heads)  # SG-1
        k, v = rearrange(kv, "B G two (h d) -> two B h G d", h=self.heads)
        if self.training and self.attn_drop:
            z = core.dense_attention_torch(q, k, v, None, q.shape[-1] ** -0.5, self.attn_drop)
        else:
            impl = self.implementation if self.implementation in ("auto", *core.dense_attention.forms) else "torch"
            z = core.dense_attention.forms.run(impl, q, k, v, None, q.shape[-1] ** -0.5)  # SG-1
        if self.lepe_conv is not None:
            context = self.lepe_conv(rearrange(self.lepe_linear(x), "B H W C -> B C H W"))
            z = z + rearrange(context, "B (h d) H W -> B h (H W) d", h=self.heads)
        if tracing.recording():
            values = rearrange(self.project(tokens[:1])[0, :, 1], "N (h d) -> h N d", h=self.heads)
            tracing.keep(self, SelfGuidedRecord(self, (q, k, v, z, order), significance, values, sizes))
        return self.proj(core.merge_heads(z, shape))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, rates={self.rates}, shares={self.shares}, aggregate={self.aggregate!r}"


# ---------------------------------------------------------------------------------------------------------------------
# 5. The record
# ---------------------------------------------------------------------------------------------------------------------


class SelfGuidedRecord(tracing.Record):
    """One self-guided layer.

    significance (H, W), what guides it; order (N,), the cells by it, least first; regions, tokens (N,), the sub-region
    and the token of every cell; aggregation (G, N), the weights of F that make the tokens of the cells; attention
    (M, L, G). A_eff is attention times aggregation. Its numbers may be negative, and its rows need not sum to 1: for
    rollout and keys a token's attention falls in equal shares on its cells. Not exact: biases are added to the tokens,
    and LePE beside them; `rest` says how large this is.
    """

    kind, exact = "self_guided", False

    def __init__(self, layer: SelfGuidedAttention, inputs: tuple, significance: Tensor, values: Tensor, sizes: list):
        q, k, v, z, order = (tensor[0] for tensor in inputs)
        self.query_shape, self.heads = tuple(significance.shape[1:]), layer.heads
        self.q, self.k, self.v, self.z = q, k, v, z
        self.significance, self.order, self.source_values = significance[0], order, values
        self.attention = core.attention_weights(q, k, None, q.shape[-1] ** -0.5)
        self.aggregation = z.new_zeros(k.shape[1], len(order))
        self.regions, self.tokens = torch.empty_like(order), torch.empty_like(order)
        rows = kernel.tokens_of(tuple(sizes), tuple(layer.rates)).tolist()
        for token, (first, least, rate, _, region, _) in enumerate(rows):
            cells = order[(first + torch.arange(rate, device=order.device)).clamp(min=least)]
            self.aggregation[token].index_add_(0, cells, layer.f[region].weight[0].to(z))
            self.regions[cells], self.tokens[cells] = region, token

    def weights(self, head: int = 0) -> Float[Tensor, "L G"]:
        self.check_head(head)
        return self.attention[head]

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """Attention to a token, times the weights that it is made with."""
        return self.weights(head) @ self.aggregation

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        """The values that the cells would have by themselves."""
        self.check_head(head)
        return self.source_values[head]

    def merged(self, head: int = 0) -> Int[Tensor, " S"]:
        """The token of every cell, the same in all heads."""
        self.check_head(head)
        return self.tokens

    def shares(self, head: int = 0) -> Float[Tensor, "L S"]:
        """Attention to a token, shared equally by the cells that it is made of."""
        return self.shared(self.weights(head))

    def shared(self, weights: Float[Tensor, "*L G"]) -> Float[Tensor, "*L S"]:
        """What tokens are given, in equal shares on their cells."""
        return (weights / self.tokens.bincount(minlength=len(self.aggregation)))[..., self.tokens]

    def keys(self, row: float, col: float, head: int = 0) -> tracing.Keys:
        """All cells of the map, each with its share of the weight of its token."""
        weight = self.shared(self.weights(head)[self.query(row, col)])
        return tracing.Keys(self.cells().to(weight), weight)
