"""How the operator of aggregation by rank looks, whatever the backend (SG-2)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def groups_of(sizes: Sequence[int], rates: Sequence[int]) -> list[int]:
    """How many tokens every sub-region becomes; the first of them may be of fewer tokens than the rate."""
    return [(size + rate - 1) // rate for size, rate in zip(sizes, rates, strict=True)]


def places(sizes: Sequence[int], rates: Sequence[int], device: torch.device) -> list[Tensor]:
    """Of every sub-region the ranks (groups, rate) that its tokens are made of.

    A sub-region that its rate does not divide begins with copies of its least significant token.
    """
    found, start = [], 0
    for size, rate, groups in zip(sizes, rates, groups_of(sizes, rates), strict=True):
        rank = torch.arange(groups * rate, device=device) - (groups * rate - size)
        found.append((start + rank.clamp(min=0)).reshape(groups, rate))
        start = start + size
    return found


def aggregate(
    x: Tensor, order: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], rates: Sequence[int]
) -> Tensor:
    """SG-2 by plain operations: a sorted copy of the tokens (B, N, C), then a product in each sub-region.

    weight (W, sum of rates) and bias (W, n): of W there may be one, or one for every B / W images.
    """
    ranks = torch.cat([place.flatten() for place in places(sizes, rates, x.device)])
    rows = order.index_select(1, ranks)
    x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
    images = x.shape[0] // weight.shape[0]
    found, start = [], 0
    counts = [groups * rate for groups, rate in zip(groups_of(sizes, rates), rates, strict=True)]
    for number, (part, w) in enumerate(zip(x.split(counts, dim=1), weight.split(list(rates), dim=1), strict=True)):
        part = part.unflatten(1, (-1, rates[number])).unflatten(0, (-1, images))
        found.append(torch.einsum("wbgrc,wr->wbgc", part, w).flatten(0, 1))
    biases = torch.cat([bias[:, n, None].expand(-1, groups) for n, groups in enumerate(groups_of(sizes, rates))], dim=1)
    return torch.cat(found, dim=1) + biases.repeat_interleave(images, dim=0)[..., None]
