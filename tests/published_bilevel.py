"""BiFormer and DeBiFormer as published: state dicts of deterministic weights, and what the repaired code computes."""

from pathlib import Path

import deterministic
import torch
from torch import Tensor, nn

import dynattn

# name: entries of a state dict, parameters, multiply-adds in G by torch's counter, the standard deviation of the first
# image's logits
MEASURED = {
    "biformer_tiny": (264, 13_142_760, 2.216, 72),
    "biformer_small": (518, 25_536_232, 4.464, 1319),
    "biformer_base": (518, 56_804_968, 9.759, 2382),
    "debiformer_tiny": (478, 21_495_598, 2.636, 21),
    "debiformer_small": (1055, 44_008_028, 5.403, 5276),
    "debiformer_base": (973, 95_501_926, 11.688, 2658),
}
# The first four logits of image 0, the last two of image 1.
LOGITS = {
    "biformer_tiny": (
        [143.2718488881, -47.6224089218, -42.2877596935, -9.4542788889],
        [35.4260584098, -64.2774650613],
    ),
    "debiformer_tiny": (
        [-14.5998655372, -29.2513732587, 20.2434004042, 4.0476178418],
        [22.5212535131, 52.1964332445],
    ),
}


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A state dict by the published names. A 1 x 1 convolution has the same numbers as the linear map."""
    own = model.state_dict()
    names = {name: entry.name for name, entry in model.published_entries().items()}
    made = {name: deterministic.tensor(names[name], tuple(old.shape)) for name, old in own.items()}
    return {names[name]: made[name] if old.is_floating_point() else old for name, old in own.items()}


def published(name: str, **options) -> nn.Module:
    """The model under these weights, in float64 and eval mode."""
    model = dynattn.create_model(name, **options).double().eval()
    return dynattn.load_official(model, checkpoint(model))


def listed(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state dict; 1 x 1 convolutions without their last two dimensions."""
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    shapes = {name: tuple(map(int, shape.split("x"))) if shape else () for name, shape, _ in rows}
    pointwise = ("qkv_conv", "proj_", "unifyheads", "linear", "conv_offset_q.3")
    return {name: shape[:2] if any(part in name for part in pointwise) else shape for name, shape in shapes.items()}


def seen(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the output of every stage, channels first."""
    maps = []
    handles = [s.register_forward_hook(lambda m, i, out: maps.append(out.permute(0, 3, 1, 2))) for s in model.stages]
    with torch.no_grad():
        logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, maps
