"""What mistakes are made of: a right form with one thing changed."""

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import Tensor


def altered(form: Callable, **changes: Callable) -> Callable:
    """`form` with arguments replaced: for each name a function of all arguments. What is None stays None.

    The result has an attribute `around`, which makes the same mistake with another form.
    """

    @wraps(form)
    def wrong(*positional, **named):
        given = signature(form).bind(*positional, **named).arguments
        a = SimpleNamespace(**given)
        return form(**given | {name: change(a) for name, change in changes.items() if given[name] is not None})

    wrong.around = partial(altered, **changes)
    return wrong


def interleaved(form: Callable) -> Callable:
    """`form` whose output lists the heads of a channel side by side, where the channels of a head belong."""

    @wraps(form)
    def wrong(*positional, **named):
        z = form(*positional, **named)
        return rearrange(rearrange(z, "B h ... d -> B ... (d h)"), "B ... (h d) -> B h ... d", h=z.shape[1])

    wrong.around = interleaved
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


def of_tokens(form: Callable) -> dict[str, Callable]:
    """So do queries, keys and values, where there are as many values as keys."""
    return {
        "keys and values exchanged": altered(form, k=lambda a: a.v, v=lambda a: a.k),
        "keys read as values": altered(form, v=lambda a: a.k),
        "first image's keys for the whole batch": altered(form, k=lambda a: first_for_all(a.k, 0)),
        "first head's keys for all": altered(form, k=lambda a: first_for_all(a.k, 1)),
        "heads and channels interleaved": interleaved(form),
        "gradient cut at the queries": altered(form, q=lambda a: a.q.detach()),
        "gradient cut at the keys": altered(form, k=lambda a: a.k.detach()),
        "gradient cut at the values": altered(form, v=lambda a: a.v.detach()),
        "gradient cut at the weights": altered(form, q=lambda a: a.q.detach(), k=lambda a: a.k.detach()),
    }


def of_bias(form: Callable, name: str) -> dict[str, Callable]:
    """So does what is added to the logits: the argument of that name, whose first dimension is the heads."""
    change = lambda how: altered(form, **{name: lambda a: how(getattr(a, name), a)})  # noqa: E731
    return {
        "bias missing": change(lambda bias, _: None),
        "bias scaled too": change(lambda bias, a: bias * a.scale),
        "bias of the first head for all": change(lambda bias, _: first_for_all(bias, 0)),
        f"gradient cut at the {name}": change(lambda bias, _: bias.detach()),
    }
