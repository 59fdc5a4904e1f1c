"""Bi-level routing attention (BRA, from BiFormer; DeBiFormer section 3.2): regions are chosen first, tokens read then.

The map is cut into regions. Every region of queries is routed to n regions of keys, the same for all heads, and its
queries read the tokens of these, wherever they lie:

    k^g = gather(k, I),  v^g = gather(v, I)      tokens of the regions I_(r,1), ..., I_(r,n), side by side     DEBI-11
    z^(m) = softmax(q^(m) k^g(m)^T / sqrt(d)) v^g(m)      one softmax over all of them                          DEBI-2

That is DGT's grouped attention with regions for groups, and runs on its kernel. Beside the letters of `core`:

    R r   regions of queries, one region       Tq t   tokens of such a region, one query
    S s   regions of keys, one region          Tk u   tokens of such a region, one key
    n     regions that a region of queries reads
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynattn import core
from dynattn.kernels import grouped as kernel
from dynattn.kernels import operators


def routed_attention_loops(q, k, v, routes, key_mask, scale):
    """DEBI-11 and DEBI-2, one query, one key and one channel at a time."""
    (B, h, R, Tq, d), Tk = q.shape, k.shape[3]
    z = []
    for b in range(B):
        for m in range(h):
            for r in range(R):
                keys = [(s, u) for s in routes[b, r].tolist() for u in range(Tk)]  # DEBI-11
                keys = [(s, u) for s, u in keys if key_mask is None or key_mask[b, s, u]]
                for t in range(Tq):
                    logits = [sum(q[b, m, r, t, c] * k[b, m, s, u, c] for c in range(d)) * scale for s, u in keys]
                    pairs = list(zip(core.softmax_loops(logits), keys, strict=True))
                    z += [sum(weight * v[b, m, s, u, c] for weight, (s, u) in pairs) for c in range(d)]  # DEBI-2
    return torch.stack(z).reshape(B, h, R, Tq, d)


def routed_attention_torch(q, k, v, routes, key_mask, scale):
    """DEBI-11 by copies of whole regions, then one dense attention for each region of queries (DEBI-2)."""
    (B, h, R), S, n = q.shape[:3], k.shape[2], routes.shape[2]
    head = torch.arange(B * h, device=q.device).reshape(B, h, 1, 1)
    rows = (routes[:, None] + head * S).flatten()  # among the regions of all heads

    def gather(x: Tensor) -> Tensor:
        """Of (B, h, S, Tk, ...) the regions that each region of queries reads, their tokens side by side."""
        return rearrange(x.flatten(0, 2).index_select(0, rows), "(Bh R n) Tk ... -> Bh R (n Tk) ...", R=R, n=n)

    read = None
    if key_mask is not None:
        # What may not be read may be NaN, whose product with a weight of 0 would be NaN.
        k, v = (x.masked_fill(~key_mask[:, None, :, :, None], 0) for x in (k, v))
        read = gather(key_mask[:, None].expand(-1, h, -1, -1))[:, :, None]  # (B h, R, 1, n Tk)
    k, v = gather(k), gather(v)  # DEBI-11
    return core.dense_attention_torch(q.flatten(0, 1), k, v, read, scale).unflatten(0, (B, h))  # DEBI-2


def membership(
    routes: Int[Tensor, "B R n"], key_mask: Bool[Tensor, "B S Tk"] | None, S: int, Tk: int
) -> Bool[Tensor, "B R S Tk"]:
    """Which keys the queries of every region may read: the mask of the dense attention that computes the same."""
    regions = torch.zeros(*routes.shape[:2], S, dtype=torch.bool, device=routes.device).scatter(2, routes, True)
    read = regions[..., None].expand(-1, -1, -1, Tk)
    return read if key_mask is None else read & key_mask[:, None]


def readable_first(
    routes: Int[Tensor, "B R n"], key_mask: Bool[Tensor, "B S Tk"] | None, Tk: int
) -> tuple[Int[Tensor, "B R N"], Int[Tensor, "B R"]]:
    """The N = n Tk keys of every region's routes, s Tk + u, those first that may be read; and how many these are."""
    keys = (routes[..., None] * Tk + torch.arange(Tk, device=routes.device)).flatten(2)
    if key_mask is None:
        return keys, torch.full_like(keys[..., 0], keys.shape[2])
    read = key_mask.flatten(1).gather(1, keys.flatten(1)).reshape(keys.shape)
    order = read.byte().argsort(dim=-1, descending=True, stable=True)
    return keys.gather(2, order), read.sum(dim=-1)


def _kernel(backend: str) -> Callable:
    """The operator of grouped attention as a form: regions are groups, which select the tokens of their routes."""

    def form(q, k, v, routes, key_mask, scale):
        (B, h, R, Tq), Tk = q.shape[:4], k.shape[3]
        groups = torch.arange(R, device=q.device).repeat_interleave(Tq).expand(B, h, -1)
        keys, lengths = (rearrange(x, "B R ... -> B 1 R ...") for x in readable_first(routes, key_mask, Tk))
        keys, lengths = keys.expand(-1, h, -1, -1), lengths.expand(-1, h, -1)
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        out = operators.apply(kernel.OPERATORS[backend], q, k, v, groups, keys, lengths, scale)[0]
        return out.unflatten(2, (R, Tq))

    return form


KERNELS = {backend: _kernel(backend) for backend in kernel.OPERATORS}


def check_values(routes: Int[Tensor, "B R n"], key_mask: Bool[Tensor, "B S Tk"] | None, S: int) -> None:
    """Raise ValueError unless routes, in [0, S), are distinct and each row of them has a key to read."""
    core.check_distinct("routes", routes, S, "regions for every region of queries")
    if key_mask is None:
        return
    has_key = key_mask.any(dim=-1).gather(1, routes.flatten(1)).reshape(routes.shape).any(dim=-1)  # (B, R)
    if torch.compiler.is_compiling() or core.transforming():
        core.require(has_key.all(), "key_mask: expected a key to read for every region of queries")
    elif not has_key.all():
        b, r = (~has_key).nonzero()[0].tolist()
        where = f"region {r} of image {b}, which is routed to {routes[b, r].tolist()}"
        raise ValueError(f"key_mask: expected a key that may be read for every region of queries, got none for {where}")


@core.operation(loops=routed_attention_loops, torch=routed_attention_torch, **KERNELS, pays=kernel.pays)
def routed_attention(
    q: Float[Tensor, "B h R Tq d"],
    k: Float[Tensor, "B h S Tk d"],
    v: Float[Tensor, "B h S Tk d"],
    routes: Int[Tensor, "B R n"],
    *,
    key_mask: Bool[Tensor, "B S Tk"] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Tensor, "B h R Tq d"]:
    """Every query reads all tokens of the regions that its own region is routed to, in one softmax.

    Shapes: q (B, h, R, Tq, d), R regions of Tq queries; k, v (B, h, S, Tk, d), S regions of Tk keys; routes (B, R, n),
    int64 in [0, S), distinct within a row, the same for all heads; key_mask (B, S, Tk), True where a key may be read,
    at least one for every row of routes, or None. `scale` None is d^-0.5.
    Returns (B, h, R, Tq, d), differentiable in q, k and v. Keys that may not be read have no influence, whatever their
    numbers, and slopes of 0. Raises TypeError, ValueError on wrong arguments.
    Source: BiFormer; DeBiFormer section 3.2, equations 11 and 2.
    """
    sizes = core.bind(q=(q, "B h R Tq d"), k=(k, "B h S Tk d"), v=(v, "B h S Tk d"))
    B, R, S, Tk = (sizes[name] for name in ("B", "R", "S", "Tk"))
    core.check_kind("routes", routes, torch.int64, q)
    if routes.ndim != 3 or tuple(routes.shape[:2]) != (B, R) or routes.shape[2] == 0:
        raise ValueError(f"routes: expected shape ({B}, {R}, n), n at least 1, got {tuple(routes.shape)}")
    core.check_indices("routes", routes, q, tuple(routes.shape), S)
    if key_mask is not None:
        core.check_kind("key_mask", key_mask, torch.bool, q)
        if tuple(key_mask.shape) != (B, S, Tk):
            raise ValueError(f"key_mask: expected shape {(B, S, Tk)}, got {tuple(key_mask.shape)}")
    check_values(routes, key_mask, S)
    scale = core.scale_or_default(scale, sizes["d"])
    return routed_attention.forms.run(impl, q, k, v, routes, key_mask, scale)
