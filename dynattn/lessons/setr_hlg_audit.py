"""The proofs and the picture of the audit of SETR and HLG, `notebooks/audit/05_setr_hlg.ipynb`."""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynattn
from dynattn import cost, tracing
from dynattn.lessons.notebook import INKS, on_meta, panels
from dynattn.lessons.published import deterministic
from dynattn.mechanisms.local_global import LocalGlobalAttention
from dynattn.models.vit import TokenAttention

GIGA = 1e9


def record_of(layer: nn.Module, *given) -> tracing.Record:
    """What a layer records of one forward pass."""
    found = []
    with torch.no_grad(), tracing.keeping(lambda _, record: found.append(record)):
        layer(*given)
    (record,) = found
    return record


def by_form(form: str, layer: nn.Module, *given) -> Tensor:
    """What a layer puts out where its operations take the form "loops" or "torch"."""
    with torch.no_grad(), dynattn.implementation(form):
        return layer(*given)


# ------------------------------------------------------------------------------------------------------------- memory


def kept(layer: nn.Module, *given) -> int:
    """Bytes that a layer keeps for its backward pass: every storage once, without its own parameters."""
    own, storages = {p.untyped_storage()._cdata for p in layer.parameters()}, {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()  # held in the table, so that no other can have its number
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer(*given)
    return sum(storage.nbytes() for storage in storages.values())


def dense_layer(side: int, C: int, heads: int, device: str) -> tuple:
    """A layer of SETR, a map of side x side tokens and its shape."""
    with torch.device(device):
        return TokenAttention(C, heads), torch.zeros(1, side**2, C, requires_grad=True), (side, side)


def local_global_layer(side: int, C: int, heads: int, device: str, **options) -> tuple:
    """A layer of HLG and a map."""
    with torch.device(device):
        layer = LocalGlobalAttention(C, heads, 7, **options)
        return layer, torch.zeros(1, side, side, C, requires_grad=True)


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a line through both logarithms: 1 for what is proportional to the tokens, 2 for their square."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def parts(tokens: Sequence[int], values: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, c) of values = a L^2 + b L + c, by least squares."""
    return tuple(float(x) for x in np.polyfit(tokens, values, 2))


def growth(found: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]) -> Figure:
    """Of layers, by name: bytes and multiply-adds against the number of tokens."""
    figure, axes = panels(1, 1, height=4.4)
    lines = zip(found.items(), INKS, ("-", "--", "-", ":"), strict=False)
    for (name, (tokens, *both)), colour, style in lines:
        for ax, values, unit in zip(axes, both, (2**20, GIGA), strict=True):
            label = f"{name}: $L^{{{exponent(tokens, values):.2f}}}$"
            ax.plot(tokens, np.array(values) / unit, style, marker="o", color=colour, label=label)
    axes[0].set(title="kept for the backward pass, MiB")
    axes[1].set(title="multiply-adds, G")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="tokens L")
        ax.legend(fontsize=10)
    return figure


# ------------------------------------------------------------------------------------------------- the published code


def setr_state(model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of SETR of deterministic numbers, as the authors' code would write it."""
    state, own, C = {}, model.state_dict(), model.num_features
    for name, entry in model.published_entries().items():
        h, w = model.encoder.embed.table.shape[1:]
        shape = {"cls_token": (1, 1, C), "pos_embed": (1, h * w + 1, C)}.get(entry.name, tuple(own[name].shape))
        key = entry.name if entry.name.startswith(("decode_head", "auxiliary_head")) else f"backbone.{entry.name}"
        state[key] = deterministic(key, shape) if own[name].is_floating_point() else own[name]
    return state


def moved(model: nn.Module, image: Tensor, right: Tensor, name: str, **options) -> float:
    """By how much another reading moves the logits, of their norm; weights that it has no use for are left out."""
    other = dynattn.create_model(name, **options).double().eval()
    own = other.state_dict()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    with torch.no_grad():
        return float((other(image) - right).norm() / right.norm())


# ------------------------------------------------------------------------------------------------- numbers of ledgers


def parameters(name: str, **options) -> int:
    """Numbers that a model learns."""
    return parameters_of(on_meta(name, **options))


def parameters_of(module: nn.Module) -> int:
    """Numbers that a part of a model learns."""
    return sum(p.numel() for p in module.parameters())


def multiply_adds(name: str, size: int = 224, **options) -> float:
    """What one image costs, in G."""
    return cost.count(on_meta(name, **options), size).macs / GIGA


def of_timm(name: str) -> nn.Module:
    """A model of timm's without numbers."""
    with torch.device("meta"):
        return timm.create_model(name)


def upsampling(model: nn.Module, size: int) -> float:
    """Four multiply-adds for every number that bilinear resizing puts out, of one image."""
    resize = torch.ops.aten.upsample_bilinear2d
    four = {resize: lambda *_, out_shape, **__: 2 * 4 * prod(out_shape)}  # the counter holds everything twice
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=four) as counter:
        model.eval()(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_flop_counts()["Global"][resize] / 2
