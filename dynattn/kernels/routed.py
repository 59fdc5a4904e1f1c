"""Routed attention for the kernels of grouped attention: regions as lists of keys."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


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
