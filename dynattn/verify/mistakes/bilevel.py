"""`routed_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

from dynattn.mechanisms.bilevel import membership, routed_attention
from dynattn.mechanisms.bilevel import routed_attention_torch as routed
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all, of_scale, of_tokens
from dynattn.verify.registry import register


def shared(powers: Tensor, over: tuple[int, ...] = (-2, -1)) -> Tensor:
    """Powers over their sum; 0 where there is nothing to read, which a mistake may bring about."""
    return powers / powers.sum(over, keepdim=True).clamp(min=torch.finfo(powers.dtype).tiny)


def softmax(logits: Tensor, read: Tensor) -> Tensor:
    """Over the keys (S, Tk) that are read."""
    return shared(logits.exp() * read)


def mask_of(key_mask: Tensor | None, k: Tensor) -> Tensor:
    """The key mask (B, S, Tk), in any case."""
    return torch.ones_like(k[:, 0, ..., 0], dtype=torch.bool) if key_mask is None else key_mask


# ------------------------------------------------------------------------------------------------------ over all keys


def weighing(finish: Callable[..., Tensor]) -> Callable:
    """Routed attention as dense attention, whose weights `finish` makes of logits (B, h, R, Tq, S, Tk).

    It gets two masks besides: the regions that a query is routed to, and the keys that anybody may read.
    """

    def wrong(q, k, v, routes, key_mask, scale):
        logits = torch.einsum("bmrtc,bmsuc->bmrtsu", q, k) * scale
        regions = membership(routes, None, *k.shape[2:4])[:, None, :, None]
        weights = finish(logits, regions, mask_of(key_mask, k)[:, None, None, None])
        return torch.einsum("bmrtsu,bmsuc->bmrtc", weights, v)

    return wrong


def reading(regions_of: Callable[[Tensor], Tensor]) -> Callable:
    """Routed attention to other regions (B, 1, R, 1, S, Tk) than those of the routes."""
    return weighing(lambda logits, regions, mask: softmax(logits, regions_of(regions) & mask))


def right(q, k, v, routes, key_mask, scale):
    """Nothing is wrong but an argument, so that a query may have nothing to read."""
    return reading(lambda regions: regions)(q, k, v, routes, key_mask, scale)


def over_queries(logits, regions, mask):
    """Each key spreads over the queries of a region."""
    return shared(logits.exp() * (regions & mask), over=(3,))


def of_key_side(regions: Tensor) -> Tensor:
    """Row s of the routes tells which regions of queries read region s, if there is such a row."""
    R, S = regions.shape[2], regions.shape[4]
    square = regions.new_zeros(len(regions), 1, max(R, S), 1, max(R, S), regions.shape[5])
    square[:, :, :R, :, :S] = regions
    return square.transpose(2, 4)[:, :, :R, :, :S]


def itself(regions: Tensor) -> Tensor:
    """The region of keys with the number of the region of queries; where there are fewer, in turn."""
    R, S = regions.shape[2], regions.shape[4]
    return (torch.arange(R)[:, None] % S == torch.arange(S))[:, None, :, None]


# ------------------------------------------------------------------------------------------------- over gathered keys


def of_regions(x: Tensor, routes: Tensor) -> Tensor:
    """The regions of x (B, h, S, ...) that each region of queries is routed to: (B, h, R, n, ...)."""
    return torch.stack([own[:, rows] for own, rows in zip(x, routes, strict=True)])


def gathering(
    keys: Callable = of_regions,
    values: Callable = of_regions,
    mask: Callable = of_regions,
    share: Callable[[Tensor], Tensor] = shared,
) -> Callable:
    """Routed attention on what `keys(k, routes)`, `values(v, routes)` and `mask(key_mask, routes)` bring.

    `share` makes weights of powers (B, h, R, Tq, n, Tk).
    """

    def wrong(q, k, v, routes, key_mask, scale):
        powers = torch.exp(torch.einsum("bmrtc,bmrnuc->bmrtnu", q, keys(k, routes)) * scale)
        read = mask(mask_of(key_mask, k)[:, None], routes)
        return torch.einsum("bmrtnu,bmrnuc->bmrtc", share(powers * read[:, :, :, None]), values(v, routes))

    return wrong


def first_regions(x: Tensor, routes: Tensor) -> Tensor:
    """The first regions of all, for each."""
    return of_regions(x, torch.arange(routes.shape[2]).expand_as(routes))


def in_order(x: Tensor, routes: Tensor) -> Tensor:
    """The regions sorted by their numbers."""
    return of_regions(x, routes.sort().values)


def tokens_first(x: Tensor, routes: Tensor) -> Tensor:
    """The tokens of all regions as (Tk n), where (n Tk) is meant."""
    rows = of_regions(x, routes)
    return rearrange(rows, "B h R n Tk ... -> B h R (Tk n) ...").unflatten(3, rows.shape[3:5])


def by_last_region(x: Tensor, routes: Tensor) -> Tensor:
    """`of_regions` whose slopes are stored, not added: of the regions that read a region only the last one's stays."""
    rows, number = of_regions(x, routes), torch.arange(routes.shape[1])[:, None].expand_as(routes)
    last = torch.zeros(x.shape[0], x.shape[2], dtype=number.dtype)
    last = last.scatter_reduce(1, routes.flatten(1), number.flatten(1), "amax")
    stays = last.gather(1, routes.flatten(1)).view_as(number) == number
    return torch.where(stays[:, None, :, :, None, None], rows, rows.detach())


# -------------------------------------------------------------------------------------------------- other arguments


def means(q, k, v, routes, key_mask, scale):
    """The second level is missing: queries read means of regions."""
    mask = mask_of(key_mask, k)
    share = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    k, v = (torch.einsum("bmsuc,bsu->bmsc", x, share.to(x))[..., None, :] for x in (k, v))
    return right(q, k, v, routes, mask.any(-1, keepdim=True), scale)


def zeros_are_read(q, k, v, routes, key_mask, scale):
    """Keys that may not be read are zeros, as padding is, and read."""
    k, v = (x * mask_of(key_mask, k)[:, None, :, :, None] for x in (k, v))
    return routed(q, k, v, routes, None, scale)


def heads_before_images(q, k, v, routes, key_mask, scale):
    """Tensors are folded as (B h), routes as (h B)."""
    h, mask = q.shape[1], mask_of(key_mask, k)
    q, k, v = (rearrange(x, "B h ... -> (B h) 1 ...") for x in (q, k, v))
    routes, mask = repeat(routes, "B R n -> (h B) R n", h=h), repeat(mask, "B S Tk -> (B h) S Tk", h=h)
    return rearrange(right(q, k, v, routes, mask, scale), "(B h) 1 ... -> B h ...", h=h)


def every_nth_token(x: Tensor) -> Tensor:
    """Regions of (B, h, S, Tk, d) made of every S-th token, not of Tk that follow each other."""
    return rearrange(x.flatten(2, 3), "B h (Tk S) d -> B h S Tk d", S=x.shape[2])


def queries_in_turn(q, k, v, routes, key_mask, scale):
    """What comes out stands as (Tq R), where (R Tq) is meant."""
    z = routed(q, k, v, routes, key_mask, scale)
    return rearrange(z, "B h R Tq d -> B h (Tq R) d").unflatten(2, z.shape[2:4])


def only_first_tokens(q, k, v, routes, key_mask, scale):
    """Of each region one token."""
    first = torch.arange(k.shape[3]) == 0
    return right(q, k, v, routes, mask_of(key_mask, k) & first, scale)


def draw_case(draw: Draw) -> Call:
    """A call of random sizes, with and without what is optional."""
    B, h, d, Tq, Tk = draw.sizes(B=2, h=2, d=3, Tq=3, Tk=3)
    R, S = draw.one("R", 1, 2, 3, 3), draw.one("S", 1, 2, 3, 4, 4, 5)
    n = draw.one("n", *range(1, S + 1))
    if n > S:
        raise ValueError(f"n: expected at most S = {S}, got {n}")
    has_mask, scale = draw.one("key_mask", False, True, True), draw.scale()
    arguments = {"q": draw.normal(B, h, R, Tq, d), "k": draw.normal(B, h, S, Tk, d), "v": draw.normal(B, h, S, Tk, d)}
    routes = torch.rand(B, R, S, generator=draw.generator).argsort()[..., :n]  # in any order
    regions = torch.rand(B, S, generator=draw.generator) < 0.7  # some are hidden as a whole, and some of their tokens
    mask = regions[..., None] & (torch.rand(B, S, Tk, generator=draw.generator) < 0.7)
    some = torch.randint(Tk, (B, S, 1), generator=draw.generator) == torch.arange(Tk)
    mask |= some & torch.zeros(B, S, dtype=torch.bool).scatter(1, routes[..., 0], True)[..., None]  # none reads nothing
    return arguments | {"routes": routes}, ({"key_mask": mask} if has_mask else {}) | scale


ROUTED_ATTENTION = {
    **of_scale(routed),
    **of_tokens(routed),
    "no softmax": weighing(lambda logits, regions, mask: logits * (regions & mask)),
    "softmax over the queries": weighing(over_queries),
    "softmax for each region apart": gathering(share=lambda powers: shared(powers, over=(-1,))),
    "softmax for each region apart, then their mean": gathering(
        share=lambda powers: shared(powers, over=(-1,)) / powers.shape[-2]
    ),
    "other regions get logit 0, not -inf": weighing(
        lambda logits, regions, mask: softmax(logits * regions, mask.expand_as(logits))
    ),
    "other regions lose their weight after the softmax": weighing(
        lambda logits, regions, mask: softmax(logits, mask) * regions
    ),
    "all regions are read": reading(torch.ones_like),
    "own region is read, not those of the routes": reading(itself),
    "own region is read too": reading(lambda regions: regions | itself(regions)),
    "regions that any region is routed to are read": reading(lambda regions: regions.any(dim=2, keepdim=True)),
    "routes used as if of the key side": reading(of_key_side),
    "the first n regions are read": altered(
        right, routes=lambda a: torch.arange(a.routes.shape[2]).expand_as(a.routes)
    ),
    "only the first route is read": altered(right, routes=lambda a: a.routes[..., :1]),
    "last route left out": altered(right, routes=lambda a: a.routes[..., : max(1, a.routes.shape[2] - 1)]),
    "last route read twice": altered(routed, routes=lambda a: torch.cat([a.routes, a.routes[..., -1:]], dim=-1)),
    "routes of the next region": altered(right, routes=lambda a: a.routes.roll(-1, 1)),
    "routes of the region before": altered(right, routes=lambda a: a.routes.roll(1, 1)),
    "first region's routes for all": altered(right, routes=lambda a: first_for_all(a.routes, 1)),
    "first image's routes for the whole batch": altered(right, routes=lambda a: first_for_all(a.routes, 0)),
    "routes repeated as (heads, images), not (images, heads)": heads_before_images,
    "routes counted from 1": altered(right, routes=lambda a: (a.routes - 1) % a.k.shape[2]),
    "means of the regions are read": means,
    "only the first token of a region is read": only_first_tokens,
    "regions of every n-th token": altered(routed, k=lambda a: every_nth_token(a.k), v=lambda a: every_nth_token(a.v)),
    "queries interleaved": queries_in_turn,
    "keys as (tokens, regions), values as (regions, tokens)": gathering(keys=tokens_first),
    "keys sorted, their values not": gathering(keys=in_order, mask=in_order),
    "values of the first n regions": gathering(values=first_regions),
    "key mask ignored": altered(routed, key_mask=lambda a: None),
    "key mask inverted": altered(right, key_mask=lambda a: ~a.key_mask),
    "key mask after the softmax": weighing(lambda logits, regions, mask: softmax(logits, regions) * mask),
    "masked keys get logit 0, not -inf": weighing(lambda logits, regions, mask: softmax(logits * mask, regions)),
    "masked keys are read as zeros": zeros_are_read,
    "key mask added to the logits": weighing(lambda logits, regions, mask: softmax(logits + mask, regions)),
    "key mask for whole regions": altered(
        right, key_mask=lambda a: a.key_mask.any(dim=-1, keepdim=True).expand_as(a.key_mask)
    ),
    "key mask of the first n regions": gathering(mask=first_regions),
    "key mask as (tokens, regions), keys as (regions, tokens)": gathering(mask=tokens_first),
    "key mask of the first image for all": altered(right, key_mask=lambda a: first_for_all(a.key_mask, 0)),
    "gradients of a region's readers not added up": gathering(keys=by_last_region, values=by_last_region),
}

register(routed_attention, draw_case, ROUTED_ATTENTION)
