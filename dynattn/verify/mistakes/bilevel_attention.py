"""`bilevel_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from dynattn.core import Regions
from dynattn.mechanisms.bilevel import bilevel_attention, route, routed_attention_torch
from dynattn.mechanisms.bilevel import bilevel_attention_torch as bilevel
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all, of_scale, of_tokens, swapped
from dynattn.verify.registry import register


def mean(x: Tensor, inside: Tensor | None) -> Tensor:
    """Of the tokens of the map."""
    return x.mean(3) if inside is None else x.sum(3) / inside.sum(1)[:, None]


def most_liked(q, k, q_inside, k_inside, topk):
    """Routes as they should be."""
    return route(mean(q, q_inside), mean(k, k_inside), topk)


def on_regions(
    choose: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, int], Tensor] = most_liked,
    masked: bool = True,
    cut: Callable[[Regions, Tensor], Tensor] = Regions.cut,
    join: Callable[[Regions, Tensor], Tensor] = Regions.join,
    layout: Callable[[tuple[int, int], int], Regions] = Regions,
) -> Callable:
    """Bi-level attention with a step of its own: how regions are made, chosen, read and joined again.

    `choose` gets queries (B, h, R, Tq, d) and keys (B, h, S, Tk, d), which of their tokens are of the map, and k.
    """

    def wrong(q, k, v, query_shape, key_shape, regions, topk, scale):
        ours, theirs = layout(query_shape, regions), layout(key_shape, regions)
        q, k, v = cut(ours, q), cut(theirs, k), cut(theirs, v)
        inside = theirs.inside(k)
        routes = choose(q, k, ours.inside(q), inside, min(topk, k.shape[2]))
        key_mask = None if inside is None or not masked else inside.expand(len(q), -1, -1)
        return join(ours, routed_attention_torch(q, k, v, routes, key_mask, scale))

    return wrong


def by_affinity(change: Callable[[Tensor], Tensor] = lambda A: A, of: Callable = lambda x, inside: x.mean(3)):
    """Routes by another affinity, of regions of which `of` makes something else than the mean."""

    def choose(q, k, q_inside, k_inside, topk):
        q, k = of(q.detach(), q_inside), of(k.detach(), k_inside)
        A = change(torch.einsum("bhrd,bhsd->brs", q, k))
        return A.argsort(dim=-1, descending=True, stable=True)[..., :topk]

    return choose


def unit(x: Tensor, inside: Tensor | None) -> Tensor:
    """The mean, as long as 1 in every head."""
    return torch.nn.functional.normalize(mean(x, inside), dim=-1)


def largest(x: Tensor, inside: Tensor | None) -> Tensor:
    """Of every channel the largest, padding too."""
    return x.amax(3)


def first_token(x: Tensor, inside: Tensor | None) -> Tensor:
    """One token for the region."""
    return x[:, :, :, 0]


def transposed(A: Tensor) -> Tensor:
    """Affinity of keys to queries, as far as there are as many regions of both."""
    return A.mT if A.shape[1] == A.shape[2] else A


def the_first(q, k, q_inside, k_inside, topk):
    """No choice at all."""
    return torch.arange(topk).expand(len(q), q.shape[2], -1)


def around_itself(q, k, q_inside, k_inside, topk):
    """Regions that follow the own one by number."""
    return ((torch.arange(q.shape[2])[:, None] + torch.arange(topk)) % k.shape[2]).expand(len(q), -1, -1)


def for_the_next_region(q, k, q_inside, k_inside, topk):
    """Routes of the region before."""
    return most_liked(q, k, q_inside, k_inside, topk).roll(1, 1)


def for_all_images(q, k, q_inside, k_inside, topk):
    """Routes of the first image."""
    return first_for_all(most_liked(q, k, q_inside, k_inside, topk), 0)


def every_head_for_itself(q, k, v, query_shape, key_shape, regions, topk, scale):
    """As many choices as heads."""
    z = [
        bilevel(*(x[:, m, None] for x in (q, k, v)), query_shape, key_shape, regions, topk, scale)
        for m in range(q.shape[1])
    ]
    return torch.cat(z, dim=1)


def dilated(layout: Regions, x: Tensor) -> Tensor:
    """Regions of every n-th token, where neighbours are meant."""
    hi, wi = layout.side
    x = rearrange(Regions.cut(layout, x), "B h (I J) (hi wi) d -> B h (I hi) (J wi) d", I=layout.grid[0], hi=hi)
    return rearrange(x, "B h (hi I) (wi J) d -> B h (I J) (hi wi) d", hi=hi, wi=wi)


def by_columns(layout: Regions, x: Tensor) -> Tensor:
    """The regions joined as if they were numbered column by column."""
    return Regions.join(layout, rearrange(x, "B h (I J) T d -> B h (J I) T d", J=layout.grid[0]))


def windows(shape: tuple[int, int], S: int) -> Regions:
    """Regions of S x S tokens, where S x S regions are meant."""
    return Regions(shape, max(1, -(-max(shape) // S)))


def draw_case(draw: Draw) -> Call:
    """A call of random sizes. Queries and keys are never rounded: of equal regions any may be chosen."""
    B, h, d, H, W = draw.sizes(B=2, h=2, d=3, H=5, W=4)
    key_shape = draw.one("key_shape", (H, W), (1, 1), (H, W), (3, 4), (5, 2), (4, 4))
    regions, topk, scale = draw.one("regions", 1, 2, 2, 3), draw.one("topk", 1, 2, 2, 3, 9), draw.scale()
    noise = lambda *shape: 0.1 * torch.randn(*shape, generator=draw.generator, dtype=torch.float64)  # noqa: E731
    sizes = (B, h, H * W, d), (B, h, key_shape[0] * key_shape[1], d)
    q, k = (draw.normal(*size) + noise(*size) for size in sizes)
    arguments = {"q": q, "k": k, "v": draw.normal(*sizes[1]), "query_shape": (H, W), "key_shape": key_shape}
    return arguments, {"regions": regions, "topk": topk} | scale


BILEVEL_ATTENTION = {
    **of_scale(bilevel),
    **of_tokens(bilevel),
    "all regions are read": altered(bilevel, topk=lambda a: 10**6),
    "one region is read": altered(bilevel, topk=lambda a: 1),
    "a region too many": altered(bilevel, topk=lambda a: a.topk + 1),
    "a region too few": altered(bilevel, topk=lambda a: max(1, a.topk - 1)),
    "another number of regions": altered(bilevel, regions=lambda a: a.regions + 1),
    "regions of S x S tokens, not S x S regions": on_regions(layout=windows),
    "H and W of the queries swapped": altered(bilevel, query_shape=lambda a: swapped(a.query_shape)),
    "H and W of the keys swapped": altered(bilevel, key_shape=lambda a: swapped(a.key_shape)),
    "regions of every n-th token": on_regions(cut=dilated),
    "regions joined column by column": on_regions(join=by_columns),
    "padding is read": on_regions(masked=False),
    "padding counts in the means": on_regions(by_affinity()),
    "maximum of a region, not its mean": on_regions(by_affinity(of=largest)),
    "first token of a region, not its mean": on_regions(by_affinity(of=first_token)),
    "cosines of means": on_regions(by_affinity(of=unit)),
    "least liked regions": on_regions(by_affinity(lambda A: -A, mean)),
    "likes of the keys, not of the queries": on_regions(by_affinity(transposed, mean)),
    "size of the likes, without their sign": on_regions(by_affinity(torch.abs, mean)),
    "first head decides": on_regions(by_affinity(of=lambda x, inside: mean(x, inside)[:, :1])),
    "every head decides for itself": every_head_for_itself,
    "the first k regions": on_regions(the_first),
    "the own region and the next ones": on_regions(around_itself),
    "routes of the region before": on_regions(for_the_next_region),
    "first image's routes for the whole batch": on_regions(for_all_images),
}

register(bilevel_attention, draw_case, BILEVEL_ATTENTION)
