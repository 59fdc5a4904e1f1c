"""`grouped_attention` for the oracle: how its cases are drawn, and its mistakes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dynattn.core import dense_attention_torch as dense
from dynattn.mechanisms.dynamic_group import as_printed_attention, grouped_attention, membership
from dynattn.mechanisms.dynamic_group import grouped_attention_torch as grouped
from dynattn.verify.cases import Call, Draw
from dynattn.verify.mistakes.common import altered, first_for_all, logits, of_scale, of_tokens
from dynattn.verify.registry import register


def weighing(finish: Callable[..., Tensor]) -> Callable:
    """Grouped attention as dense attention, whose weights `finish` makes of logits and of what a query may read."""

    def wrong(q, k, v, groups, selected, scale):
        return finish(logits(q, k, scale), membership(groups, selected, k.shape[2]), groups) @ v

    return wrong


def over_queries(logits, read, groups):
    """Each key spreads over the queries of a group."""
    powers = logits.exp() * read
    return powers / (same_group(groups).to(powers) @ powers).clamp(min=torch.finfo(powers.dtype).tiny)


def reading_what_any_group_selected(logits, read, groups):
    """The union of the groups that have a query."""
    return logits.masked_fill(~read.any(dim=2, keepdim=True), -torch.inf).softmax(-1)


def same_group(groups: Tensor) -> Tensor:
    """(B, h, L, L): whether two queries are in one group."""
    return groups[..., :, None] == groups[..., None, :]


def last_left_out(q, k, v, groups, selected, scale):
    """A loop over queries of a group ends one too early."""
    has_later = same_group(groups).triu(1).any(dim=-1, keepdim=True)
    return grouped(q, k, v, groups, selected, scale) * has_later


def taken(x: Tensor, order: Tensor) -> Tensor:
    """Rows (B, h, L, d) in another order (B, h, L)."""
    return x.gather(2, order[..., None].expand_as(x))


def left_sorted(q, k, v, groups, selected, scale):
    """What comes out stands as the queries do when they are sorted by group."""
    return taken(grouped(q, k, v, groups, selected, scale), groups.argsort(stable=True))


def sorted_once_more(q, k, v, groups, selected, scale):
    """z[order] where z[order] = is right."""
    order = groups.argsort(stable=True)
    return taken(taken(grouped(q, k, v, groups, selected, scale), order), order)


def groups_not_sorted(q, k, v, groups, selected, scale):
    """Queries are sorted and put back, but meanwhile they go with the groups of others."""
    order = groups.argsort(stable=True)
    z = grouped(taken(q, order), k, v, groups, selected, scale)
    return torch.empty_like(z).scatter(2, order[..., None].expand_as(z), z)


def of_groups(x: Tensor, selected: Tensor) -> Tensor:
    """The rows of x (B, h, S, d) that each group has selected: (B, h, G, n, d)."""
    rows = selected.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, rows).unflatten(2, selected.shape[2:])


def gathering(keys: Callable[..., Tensor], values: Callable[..., Tensor]) -> Callable:
    """Grouped attention on what `keys(k, selected)` and `values(v, selected)` bring: (B, h, G, n, d)."""

    def wrong(q, k, v, groups, selected, scale):
        own = lambda x: x.gather(2, groups[..., None, None].expand(-1, -1, -1, *x.shape[3:]))  # noqa: E731
        P = torch.einsum("bmic,bmiac->bmia", q, own(keys(k, selected))) * scale
        return torch.einsum("bmia,bmiac->bmic", P.softmax(-1), own(values(v, selected)))

    return wrong


def by_last_group(x: Tensor, selected: Tensor) -> Tensor:
    """`of_groups` whose slopes are stored, not added: of the groups that selected a row only the last one's stays."""
    rows, number = of_groups(x, selected), torch.arange(selected.shape[2])[:, None].expand_as(selected)
    to, none = selected.flatten(2), torch.zeros(x.shape[:3], dtype=number.dtype)
    last = none.scatter_reduce(2, to, number.flatten(2), "amax")
    stays = last.gather(2, to).view_as(number) == number
    return torch.where(stays[..., None], rows, rows.detach())


def with_padding(x: Tensor, selected: Tensor) -> Tensor:
    """`of_groups` and a row of zeros behind it."""
    rows = of_groups(x, selected)
    return torch.cat([rows, torch.zeros_like(rows[..., :1, :])], dim=-2)


def first_rows(x: Tensor, selected: Tensor) -> Tensor:
    """The first rows of all, for each group."""
    return of_groups(x, torch.arange(selected.shape[3]).expand_as(selected))


def draw_case(draw: Draw) -> Call:
    """A call of random sizes, with and without what is optional."""
    B, h, d, L, S, G = draw.sizes(B=2, h=2, d=3, L=7, S=5, G=4)
    n, scale = draw.one("n", *range(1, S + 1)), draw.scale()
    if n > S:
        raise ValueError(f"n: expected at most S = {S}, got {n}")
    arguments = {"q": draw.normal(B, h, L, d), "k": draw.normal(B, h, S, d), "v": draw.normal(B, h, S, d)}
    in_turn = (-1 - torch.arange(L)).expand(B, h, L) % G
    at_random = torch.randint(G, (B, h, L), generator=draw.generator)  # uneven: some empty, some of one query
    grouping = draw.one("grouping", "in turn", "at random", "at random", "at random")
    groups = at_random if grouping == "at random" else in_turn.contiguous()
    selected = torch.rand(B, h, G, S, generator=draw.generator).argsort()[..., :n]  # in any order
    return arguments | {"groups": groups, "selected": selected}, scale


GROUPED_ATTENTION = {
    **of_scale(grouped),
    **of_tokens(grouped),
    "scale after the softmax, as printed (12)": partial(as_printed_attention, as_printed={12}),
    "no softmax, as printed (13)": partial(as_printed_attention, as_printed={13}),
    "no softmax": weighing(lambda logits, read, _: logits * read),
    "softmax over the queries": weighing(over_queries),
    "other keys get logit 0, not -inf": weighing(lambda logits, read, _: (logits * read).softmax(-1)),
    "other keys lose their weight after the softmax": weighing(lambda logits, read, _: logits.softmax(-1) * read),
    "all keys are read": lambda q, k, v, groups, selected, scale: dense(q, k, v, None, scale),
    "keys that any group selected are read": weighing(reading_what_any_group_selected),
    "the first n keys are read": altered(
        grouped, selected=lambda a: torch.arange(a.selected.shape[3]).expand_as(a.selected)
    ),
    "only the first key is read": altered(grouped, selected=lambda a: a.selected[..., :1]),
    "last key left out": altered(grouped, selected=lambda a: a.selected[..., : max(1, a.selected.shape[3] - 1)]),
    "last key read twice": altered(grouped, selected=lambda a: torch.cat([a.selected, a.selected[..., -1:]], dim=-1)),
    "a key of zeros from padding is read": gathering(with_padding, with_padding),
    "keys of the next group": altered(grouped, selected=lambda a: a.selected.roll(-1, 2)),
    "keys of the group before": altered(grouped, selected=lambda a: a.selected.roll(1, 2)),
    "first group's keys for all": altered(grouped, selected=lambda a: first_for_all(a.selected, 2)),
    "keys of group j go to query j": altered(
        grouped, groups=lambda a: (torch.arange(a.q.shape[2]) % a.selected.shape[2]).expand_as(a.groups)
    ),
    "first head's groups for all": altered(grouped, groups=lambda a: first_for_all(a.groups, 1)),
    "first head's selection for all": altered(grouped, selected=lambda a: first_for_all(a.selected, 1)),
    "first image's groups for the whole batch": altered(grouped, groups=lambda a: first_for_all(a.groups, 0)),
    "first image's selection for the whole batch": altered(grouped, selected=lambda a: first_for_all(a.selected, 0)),
    "last query of every group left out": last_left_out,
    "order of the queries not restored": left_sorted,
    "order of the queries applied twice": sorted_once_more,
    "groups not sorted with their queries": groups_not_sorted,
    "keys sorted, their values not": gathering(lambda k, selected: of_groups(k, selected.sort().values), of_groups),
    "values of the first n tokens": gathering(of_groups, first_rows),
    "gradients of a key's groups not added up": gathering(by_last_group, by_last_group),
    "gradient of the values without softmax, as printed (17)": partial(as_printed_attention, as_printed={17}),
}

register(grouped_attention, draw_case, GROUPED_ATTENTION)
