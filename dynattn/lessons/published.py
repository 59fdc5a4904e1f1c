"""Weights that a program of the authors and ours can both be given: what the audits compare logits with."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def deterministic(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that only the name and the shape decide."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return torch.from_numpy(1 + 0.1 * np.abs(x))
    if len(shape) > 1 and name.endswith("weight"):
        return torch.from_numpy(x / math.sqrt(math.prod(shape[1:])))
    return torch.from_numpy((len(shape) == 1 and name.endswith("weight")) + 0.1 * x)


def published_state(model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of deterministic numbers, as the authors' code would write it."""
    state, own = {}, model.state_dict()
    for name, entry in model.published_entries().items():
        shape = tuple(own[name].shape)
        if entry.name.endswith("relative_position_bias_table"):
            shape = (shape[1] * shape[2], shape[0])  # ours: (heads, rows, columns), theirs: (entries, heads)
        made = deterministic(entry.name, shape) if own[name].is_floating_point() else own[name]
        state[entry.name] = made
    return state
