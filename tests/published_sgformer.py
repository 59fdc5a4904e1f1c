"""SG-Former as published: state dicts of deterministic weights, and what the code computes with them."""

import deterministic
from torch import Tensor, nn

import dynattn

# name: entries of a state dict, parameters, multiply-adds in G by torch's counter
MEASURED = {
    "sgformer_small": (669, 22_545_981, 4.784),
    "sgformer_medium": (1069, 38_689_316, 7.427),
    "sgformer_base": (1017, 77_950_293, 15.543),
}
# The first four logits of image 0, the last two of image 1.
LOGITS = ([-2.1224916446, -0.0047443766, 0.2891008544, 1.5095727693], [1.9535701493, -1.700221937])


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A state dict by the published names. The table of positions is a row for every cell."""
    entries, state = model.published_entries(), {}
    for name, own in model.state_dict().items():
        table = name == "embed.table"
        shape = (1, own.shape[1] * own.shape[2], own.shape[0]) if table else tuple(own.shape)
        state[entries[name].name] = deterministic.tensor(entries[name].name, shape)
    return state


def published(name: str, **options) -> nn.Module:
    """The model under these weights, in float64 and eval mode."""
    model = dynattn.create_model(name, **options).double().eval()
    return dynattn.load_official(model, checkpoint(model))
