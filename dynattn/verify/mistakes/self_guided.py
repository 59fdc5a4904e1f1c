"""`aggregate_tokens` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable

import torch
from torch import Tensor

from dynattn.mechanisms.self_guided import aggregate_tokens
from dynattn.mechanisms.self_guided import aggregate_tokens_torch as aggregate
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all
from dynattn.verify.registry import register


def by_region(change: Callable[[Tensor], Tensor]) -> Callable:
    """The weights of each sub-region as `change` makes them."""
    return altered(aggregate, weight=lambda a: torch.cat([change(w) for w in a.weight.split(list(a.rates))]))


def in_groups(
    combine: Callable[[Tensor, Tensor], Tensor],
    fill: Callable[[Tensor, int], Tensor] | None = None,
    group: Callable[[Tensor, int], Tensor] = lambda part, rate: part.unflatten(1, (-1, rate)),
) -> Callable:
    """Aggregation with a step of its own.

    combine(tokens (B, groups, rate, C), weights (rate,)) makes a token of each group; fill(part, more) what is put to a
    sub-region (B, size, C) that its rate does not divide, in front of it; group(part, rate) makes groups of it.
    """

    def wrong(x, order, weight, bias, sizes, rates):
        x = torch.stack([one[ranks] for one, ranks in zip(x, order, strict=True)])
        found = []
        parts = zip(x.split(list(sizes), dim=1), weight.split(list(rates)), bias, rates, strict=True)
        for part, w, b, rate in parts:
            if part.shape[1]:
                more = -part.shape[1] % rate
                part = (fill or repeat_first)(part, more)
                found.append(combine(group(part, rate), w) + b)
        return torch.cat(found, dim=1)

    return wrong


def repeat_first(part: Tensor, more: int) -> Tensor:
    """Copies of the first token in front: what is right."""
    return torch.cat([part[:, :1].expand(-1, more, -1), part], dim=1)


def weighted(tokens: Tensor, w: Tensor) -> Tensor:
    """The weighted sum: what is right."""
    return torch.einsum("bgrc,r->bgc", tokens, w)


def zeros_first(part: Tensor, more: int) -> Tensor:
    """Zeros in front."""
    return torch.cat([torch.zeros_like(part[:, :1]).expand(-1, more, -1), part], dim=1)


def repeat_last(part: Tensor, more: int) -> Tensor:
    """Copies of the last token behind."""
    return torch.cat([part, part[:, -1:].expand(-1, more, -1)], dim=1)


def repeat_last_in_front(part: Tensor, more: int) -> Tensor:
    """Copies of the last token in front."""
    return torch.cat([part[:, -1:].expand(-1, more, -1), part], dim=1)


def backwards(x, order, weight, bias, sizes, rates):
    """The tokens of the last sub-region come first."""
    z = aggregate(x, order, weight, bias, sizes, rates)
    counts = [-(-size // rate) for size, rate in zip(sizes, rates, strict=True)]
    return torch.cat(z.split(counts, dim=1)[::-1], dim=1)


def by_image(x, order, weight, bias, sizes, rates):
    """Ranks are counted through the whole batch: those of the first image are read."""
    return aggregate(first_for_all(x, 0), order, weight, bias, sizes, rates)


def draw_case(draw: Draw) -> Call:
    """A call of random sizes: sub-regions of equal sizes, or of any, some of which have no token."""
    B, C = draw.sizes(B=2, C=3)
    N = draw.one("N", *range(1, 11))
    rates = draw.one("rates", (1,), (2,), (3, 1), (2, 2, 1), (4, 3, 2), (2, 1), (1, 5), (11, 1, 3))
    n = len(rates)
    if draw.one("cut", "even", "any") == "even":
        sizes = [N // n] * (n - 1)
    else:
        cuts = torch.randint(N + 1, (n - 1,), generator=draw.generator).sort().values.tolist()
        sizes = [after - before for before, after in zip([0, *cuts], cuts, strict=False)]
    sizes.append(N - sum(sizes))
    order = torch.rand(B, N, generator=draw.generator).argsort(dim=1)
    tensors = dict(x=draw.normal(B, N, C), order=order, weight=draw.normal(sum(rates)), bias=draw.normal(n))
    return tensors | {"sizes": tuple(sizes), "rates": rates}, {}


AGGREGATE_TOKENS = {
    "order ignored": altered(aggregate, order=lambda a: torch.arange(a.order.shape[1]).expand_as(a.order)),
    "most significant first": altered(aggregate, order=lambda a: a.order.flip(1)),
    "rank of a cell, not the cell of a rank": altered(aggregate, order=lambda a: a.order.argsort(1)),
    "first image's order for the whole batch": altered(aggregate, order=lambda a: first_for_all(a.order, 0)),
    "first image's tokens for the whole batch": by_image,
    "weights missing": by_region(torch.ones_like),
    "mean of a group, not its weighted sum": by_region(lambda w: torch.full_like(w, 1 / len(w))),
    "weights divided by the rate": by_region(lambda w: w / len(w)),
    "softmax of the weights": by_region(lambda w: w.softmax(0)),
    "weights backwards": by_region(lambda w: w.flip(0)),
    "the first weight for all of a group": by_region(lambda w: w[:1].expand_as(w)),
    "bias missing": altered(aggregate, bias=lambda a: torch.zeros_like(a.bias)),
    "bias of the first sub-region for all": altered(aggregate, bias=lambda a: first_for_all(a.bias, 0)),
    "bias added for every token of a group": altered(aggregate, bias=lambda a: a.bias * torch.tensor(a.rates)),
    "largest of a group, not its weighted sum": in_groups(lambda tokens, w: (tokens * w[:, None]).amax(2)),
    "only the first token of a group": in_groups(lambda tokens, w: tokens[:, :, 0] * w[0]),
    "only the last token of a group": in_groups(lambda tokens, w: tokens[:, :, -1] * w[-1]),
    "groups of every n-th token": in_groups(
        weighted, group=lambda part, rate: part.unflatten(1, (rate, -1)).transpose(1, 2)
    ),
    "short group filled with zeros": in_groups(weighted, zeros_first),
    "short group filled with its most significant token": in_groups(weighted, repeat_last_in_front),
    "short group at the end": in_groups(weighted, repeat_last),
    "last sub-region first": backwards,
    "gradient cut at the tokens": altered(aggregate, x=lambda a: a.x.detach()),
    "gradient cut at the weights": altered(aggregate, weight=lambda a: a.weight.detach()),
    "gradient cut at the bias": altered(aggregate, bias=lambda a: a.bias.detach()),
}

register(aggregate_tokens, draw_case, AGGREGATE_TOKENS)
