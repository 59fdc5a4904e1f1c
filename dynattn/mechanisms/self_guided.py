"""Self-guided attention (SG-Former section 3.2): few tokens where little is to be seen, many where it matters.

The tokens of the map are sorted by the significance S that the layer before found for them (`hybrid_scale.py`), least
significant first, and cut into sub-regions of equal size. In sub-region i every r_i tokens that follow each other in
this order become one, with weights of a fully connected layer F_i, the same for all channels and all such groups; the
less significant, the larger r_i. All tokens of the map ask, and read what is left:

    Q = X W^Q,   K = IAM(X, S, r) W^K,   V = IAM(X, S, r) W^V,   z = softmax(Q K^T / sqrt(d)) V                  SG-1
    X^_i = F_i(X_i, r_i),   X^ = Concat(X^_1, ..., X^_n)        IAM, with X_1, ..., X_n by rank                  SG-2

Tokens that become one are neighbours in rank, not on the map. Sorting has no gradient: the layer before learns nothing
from what is made of its significance. The text projects X before it aggregates; the published code aggregates first.
The two differ by biases only, since F_i and the projections act on different axes. Ledger: papers/sgformer.toml.
Beside the letters of `core`:

    S        significance        r   aggregation rate, tokens that become one        n   sub-regions
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dynattn import core
from dynattn.kernels import aggregation as kernel

# ---------------------------------------------------------------------------------------------------------------------
# 2. Torch
# ---------------------------------------------------------------------------------------------------------------------


def aggregate_tokens_torch(x, order, weight, bias, sizes, rates):
    """SG-2 by a sorted copy of the tokens, then a product in each sub-region."""
    return kernel.aggregate(x, order, weight[None], bias[None], sizes, rates)


@torch.no_grad()
def rank(significance: Float[Tensor, "B H W"]) -> Int[Tensor, "B N"]:
    """The cells in the order of their significance, least first; of equals the first cell first."""
    return significance.flatten(1).argsort(dim=1, stable=True)  # SG-2


def sub_regions(tokens: int, shares: Sequence[int]) -> list[int]:
    """How many tokens each sub-region has, that takes so many parts of sum(shares); the last also has the remainder."""
    part = tokens // sum(shares)
    sizes = [part * share for share in shares[:-1]]
    return [*sizes, tokens - sum(sizes)]


class SelfGuidedAttention(nn.Module):
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
        self.dim, self.heads, self.parts = dim, core.divisor("heads", heads, dim), core.divisor("parts", parts, heads)
        core.one_of("aggregate", aggregate, ("before", "after"))
        self.aggregate, self.attn_drop = aggregate, core.rate("attn_drop", attn_drop)
        self.rates, self.shares = [], []
        for r in rates:
            if shared and self.rates and self.rates[-1] == r:
                self.shares[-1] += 1
            else:
                self.rates.append(r)
                self.shares.append(1)
        self.q, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv = nn.ModuleList(nn.Linear(dim, 2 * dim // parts) for _ in range(parts))
        self.f = nn.ModuleList(nn.Linear(r, 1) for r in self.rates)
        self.lepe_linear = nn.Linear(dim, dim) if lepe else None
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if lepe else None

    def forward(self, x: Float[Tensor, "B H W C"], significance: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W C"]:
        shape = tuple(x.shape[1:3])
        order, sizes = rank(significance), sub_regions(shape[0] * shape[1], self.shares)
        weight, bias = torch.cat([f.weight[0] for f in self.f]), torch.cat([f.bias for f in self.f])
        gather = lambda t: aggregate_tokens_torch(t, order, weight, bias, sizes, self.rates)  # noqa: E731
        tokens = x.flatten(1, 2)
        if self.aggregate == "before":
            tokens = gather(tokens)  # SG-2
        kv = torch.cat([part(tokens).unflatten(-1, (2, -1)) for part in self.kv], dim=-1)  # (B, N, 2, C)
        if self.aggregate == "after":
            kv = gather(kv.flatten(2)).unflatten(-1, (2, -1))
        k, v = rearrange(kv, "B N two (h d) -> two B h N d", h=self.heads)  # SG-1
        q = core.split_heads(self.q(x), self.heads)
        z = core.merge_heads(core.dense_attention(q, k, v), shape)
        if self.lepe_conv is not None:
            context = self.lepe_conv(rearrange(self.lepe_linear(x), "B H W C -> B C H W"))
            z = z + rearrange(context, "B C H W -> B H W C")
        return self.proj(z)
