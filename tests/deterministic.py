"""Weights and images that are a function of names and shapes alone, so that two implementations can be given the same.

The published models' outputs in `../shared/official` were made with these weights, by the authors' names.
"""

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float64 value of a state dict's entry: normal numbers of a size that trained weights have."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape or (1,)).reshape(shape)
    if name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif len(shape) >= 2 and name.endswith("weight"):
        x = x / math.sqrt(math.prod(shape[1:]))
    else:
        gain = len(shape) <= 1 and (name.endswith("weight") or "scale" in name or "gamma" in name)
        x = gain + 0.1 * x
    return torch.from_numpy(np.ascontiguousarray(x))


def image(n: int = 2, size: int | tuple[int, int] = 224, seed: int = 0) -> Tensor:
    """Normal numbers (n, 3, H, W) in float64."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 3, height, width)))


def filled(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with the weights that its own names give."""
    entries = model.double().state_dict().items()
    state = {name: tensor(name, tuple(old.shape)) if old.is_floating_point() else old for name, old in entries}
    model.load_state_dict(state)
    return model.eval()
