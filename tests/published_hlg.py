"""HLG as published: state dicts of deterministic weights, and what the repaired code computes with them."""

import deterministic
import torch
from torch import Tensor, nn

import dynattn

# name: entries of a state dict, parameters, multiply-adds in G by torch's counter
MEASURED = {
    "hlg_mobile": (620, 4_329_356, 0.885),
    "hlg_tiny": (952, 10_998_832, 2.165),
    "hlg_small": (952, 24_189_868, 4.708),
    "hlg_medium": (1948, 47_747_980, 9.058),
    "hlg_large": (1948, 84_207_928, 15.896),
}
# Of HLG-Tiny, the first four logits of image 0, the last two of image 1.
LOGITS = ([-1.2945453720, -0.3587863301, -0.1860603961, 1.0714319107], [-1.3290977936, 1.7204631255])


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A state dict by the published names."""
    entries, state = model.published_entries(), {}
    for name, own in model.state_dict().items():
        made = deterministic.tensor(entries[name].name, tuple(own.shape))
        state[entries[name].name] = made if own.is_floating_point() else torch.zeros(own.shape, dtype=own.dtype)
    return state


def published(name: str, **options) -> nn.Module:
    """The model under these weights, in float64 and eval mode."""
    model = dynattn.create_model(name, **options).double().eval()
    return dynattn.load_official(model, checkpoint(model))
