"""What mistakes are made of: a right form with one thing changed."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import Tensor


def altered(form: Callable, **changes: Callable) -> Callable:
    """`form` with arguments replaced: for each name a function of all arguments. What is None stays None."""

    @wraps(form)
    def wrong(*positional, **named):
        given = signature(form).bind(*positional, **named).arguments
        a = SimpleNamespace(**given)
        return form(**given | {name: change(a) for name, change in changes.items() if given[name] is not None})

    return wrong


def interleaved(form: Callable) -> Callable:
    """`form` whose output lists the heads of a channel side by side, where the channels of a head belong."""

    @wraps(form)
    def wrong(*positional, **named):
        z = form(*positional, **named)
        return rearrange(rearrange(z, "B h ... d -> B ... (d h)"), "B ... (h d) -> B h ... d", h=z.shape[1])

    return wrong


def first_for_all(tensor: Tensor, dim: int) -> Tensor:
    """The first slice of a dimension in place of every slice."""
    return tensor.narrow(dim, 0, 1).expand_as(tensor)


def swapped(pair: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) as (columns, rows)."""
    return pair[1], pair[0]


def moved(points: Tensor, shape: tuple[int, int], change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Points whose pixel p on an axis of n cells has become change(p, n)."""
    n = points.new_tensor(shape)
    return 2 * change((points + 1) * (n - 1) / 2, n) / (n - 1).clamp(min=1) - 1


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled dot products (B, h, L, N)."""
    return torch.einsum("bhld,bhnd->bhln", q, k) * scale


def of_scale(form: Callable) -> dict[str, Callable]:
    """The scale goes wrong in the same ways in every attention."""
    return {
        "scale missing": altered(form, scale=lambda a: 1.0),
        "scale applied twice": altered(form, scale=lambda a: a.scale**2),
        "scale given but ignored": altered(form, scale=lambda a: a.q.shape[-1] ** -0.5),
        "scale of all channels, not of one head's": altered(form, scale=lambda a: a.scale * a.q.shape[1] ** -0.5),
    }
