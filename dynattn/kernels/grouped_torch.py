"""Grouped attention by plain operations of torch (DGT-2): also that of kernels whose gradients are differentiated."""

import torch
from torch import Tensor

from dynattn.kernels.choice import smaller
from dynattn.kernels.derivatives import attention

TILE = 32  # queries of one group that are multiplied together


def in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    selected: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """The operation by plain operations of torch: queries sorted by group, each group cut into tiles of 32.

    A tile meets its group's keys in one small dense attention. `lengths` None: a group reads all that it selected.
    No size depends on the numbers in `groups`, so that the graph can be compiled, exported and mapped: there are as
    many tiles as there could be, and those behind the last query are not read again.

    An example of one head, with tiles of 2: five queries of the groups 1 0 1 1 0 are sorted to the order 1 4 0 2 3.
    Group 0 has one tile and group 1 has two, so last_tile is 1 3; the sorted queries get the places 0 1 2 3 4 of the
    tiles' six, and of_tile, the groups of the tiles, is 0 1 1.
    """
    (B, h, L, d), S, (G, n) = q.shape, k.shape[2], selected.shape[2:]
    groups, selected = groups.flatten(0, 1), selected.flatten(0, 1)  # a row for each head of each image
    head = torch.arange(B * h, device=q.device)[:, None]

    # (heads, L): which query is the i-th of the sorted ones; those of one group in their order
    order = (groups * L + torch.arange(L, device=q.device)).argsort(dim=1)
    group = groups.gather(1, order)  # its group
    size = torch.zeros_like(selected[..., 0]).scatter_add(1, groups, torch.ones_like(groups))  # (heads, G)
    tiles = -(-size // TILE)  # of every group; the last may be a part of one
    last_tile = tiles.cumsum(dim=1)
    first_query, first_tile = size.cumsum(dim=1) - size, last_tile - tiles
    rank = torch.arange(L, device=q.device) - first_query.gather(1, group)  # of a query in its group
    place = first_tile.gather(1, group) * TILE + rank  # of a query among the tiles of its head

    most = smaller(L, (L + G * (TILE - 1)) // TILE)  # tiles: each has a query, and all but one a group are full
    number = torch.arange(most, device=q.device).minimum(last_tile[:, -1:] - 1)  # none of a group without queries
    of_tile = (number[..., None] >= last_tile[:, None]).sum(dim=-1)  # (heads, most): the group of a tile

    # From here on rows of all heads are counted through: row i of a head is row head * length + i.
    order, place, of_tile = (order + head * L).flatten(), (place + head * most * TILE).flatten(), of_tile + head * G
    keys = (selected + head[..., None] * S).flatten(0, 1)[of_tile.flatten()]  # (tiles, n)
    tiled = (
        q.new_zeros(B * h * most * TILE, d).index_copy(0, place, q.reshape(-1, d)[order]).unflatten(0, (-1, 1, TILE))
    )
    k, v, read = k.reshape(-1, d)[keys], v.reshape(-1, d)[keys], None  # (tiles, n, d)
    if lengths is not None:
        read = torch.arange(n, device=q.device) < lengths.flatten()[of_tile.flatten()][:, None]  # (tiles, n)
        # What is not read may be NaN, whose product with a weight of 0 would be NaN.
        k, v, read = k.where(read[..., None], 0), v.where(read[..., None], 0), read[:, None, None]
    z = attention(tiled, k[:, None], v[:, None], read, scale, dropout).reshape(-1, d)
    return torch.zeros_like(z[: B * h * L]).index_copy(0, order, z[place]).reshape(B, h, L, d)
