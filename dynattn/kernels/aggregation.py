"""How the operator of aggregation by rank looks, whatever the backend, and which ranks make a token (SG-2)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dynattn.kernels import operators


def groups_of(sizes: Sequence[int], rates: Sequence[int]) -> list[int]:
    """How many tokens every sub-region becomes."""
    return [(size + rate - 1) // rate for size, rate in zip(sizes, rates, strict=True)]


def look(
    x: Tensor, order: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], rates: Sequence[int]
) -> list[Tensor]:
    """out (B, G, C) of tokens (B, N, C) in an order (B, N).

    weight (W, sum of rates), bias (W, n): one row for every B / W images.
    """
    return [x.new_empty(x.shape[0], sum(groups_of(sizes, rates)), x.shape[2])]


def flops(x: tuple, order: tuple, weight: tuple, bias: tuple, sizes: Sequence[int], rates: Sequence[int]) -> int:
    """One product of every token with a weight; of a sub-region's first one as often as it is repeated."""
    return 2 * x[0] * x[2] * sum(groups * rate for groups, rate in zip(groups_of(sizes, rates), rates, strict=True))


def aggregate(
    x: Tensor, order: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], rates: Sequence[int]
) -> Tensor:
    """SG-2 by plain operations: a sorted copy of the tokens, then a product in each sub-region.

    A sub-region that its rate does not divide begins with copies of its least significant token.
    """
    images, groups, ranks, start = x.shape[0] // weight.shape[0], groups_of(sizes, rates), [], 0
    for size, rate, count in zip(sizes, rates, groups, strict=True):
        ranks.append(start + (torch.arange(count * rate, device=x.device) - (count * rate - size)).clamp(min=0))
        start = start + size
    images_before = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    rows = (order.index_select(1, torch.cat(ranks)) + images_before).flatten()  # among those of all images
    parts = x.flatten(0, 1).index_select(0, rows).unflatten(0, (x.shape[0], -1)).split(list(map(len, ranks)), dim=1)
    found = []
    for n, (part, w) in enumerate(zip(parts, weight.split(list(rates), dim=1), strict=True)):
        part = part.unflatten(1, (groups[n], rates[n])).unflatten(0, (-1, images))
        found.append((w[:, None, None, None] @ part).squeeze(3).flatten(0, 1))  # SG-2
    biases = torch.cat([bias[:, n, None].expand(-1, count) for n, count in enumerate(groups)], dim=1)
    return torch.cat(found, dim=1) + biases.repeat_interleave(images, dim=0)[..., None]


@lru_cache(maxsize=64)
def tokens_of(sizes: tuple[int, ...], rates: tuple[int, ...]) -> Tensor:
    """Of every token (G, 6): the rank of its first slot, the lowest rank of its sub-region, its rate, the place of its
    first weight, the number of its sub-region, and how many slots stand before its own.

    A token has as many slots as its rate. The first slots may have ranks below the lowest, which is read for them.
    """
    rows, start, weights, slots = [], 0, 0, 0
    for number, (size, rate, count) in enumerate(zip(sizes, rates, groups_of(sizes, rates), strict=True)):
        first = start - (count * rate - size)
        rows += [(first + g * rate, start, rate, weights, number, slots + g * rate) for g in range(count)]
        start, weights, slots = start + size, weights + rate, slots + count * rate
    return torch.tensor(rows, dtype=torch.int64)


def slopes_of_weights(
    grad: Tensor, dots: Tensor, weight: Tensor, sizes: Sequence[int], rates: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, of the products (B, slots) of every slot's token with the gradient of its group."""
    groups, W = groups_of(sizes, rates), weight.shape[0]
    dots = dots.split([count * rate for count, rate in zip(groups, rates, strict=True)], dim=1)
    of_weights = [part.reshape(W, -1, rate).sum(dim=1) for part, rate in zip(dots, rates, strict=True)]
    of_biases = [part.reshape(W, -1).sum(dim=1, dtype=torch.float64) for part in grad.split(groups, dim=1)]
    return torch.cat(of_weights, dim=1), torch.stack(of_biases, dim=1)


def pays(backend: str, *_) -> bool:
    """The cost gate: always."""
    return True


OPERATORS = operators.operators(
    "aggregate_tokens", look, flops, file="aggregation", fold=(0, 0, 0, 0, None, None), outputs=["out"]
)
operators.has_plain_form("aggregate_tokens", aggregate)
