"""SETR-PUP-HLG as published: state dicts of deterministic weights, and its decoder restated in the published names."""

from itertools import product
from typing import NamedTuple

import deterministic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name: the file of its keys, the arguments that fit them; parameters with one stem convolution, of 150 classes;
# multiply-adds in G of 150 classes at 512 pixels and of 19 at 768, then those of the published code
MEASURED = {
    "setr_pup_hlg_small": ("small_two_stem", {}, 37_933_328, (278.98, 660.47), (281.9, 664)),
    "setr_pup_hlg_medium": (
        "medium_two_stem_depth14",
        dict(depths=(2, 2, 14, 2)),
        61_491_440,
        (301.96, 712.50),
        (306.0, 716),
    ),
    "setr_pup_hlg_large": ("large_two_stem_depth14", {}, 100_202_588, (374.81, 878.94), (380.3, 884)),
}


def full(name: str) -> str:
    """A published name with the prefix of the backbone."""
    return name if name.startswith(("decode_head", "auxiliary_head")) else f"backbone.{name}"


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A state dict by the published names."""
    entries, state = model.published_entries(), {}
    for ours, own in model.state_dict().items():
        name = full(entries[ours].name)
        floating = own.is_floating_point()
        state[name] = deterministic.tensor(name, tuple(own.shape)) if floating else torch.zeros((), dtype=own.dtype)
    return state


# ------------------------------------------------------------------------ the decoder, restated from the specification


class Windows(NamedTuple):
    """The cells (i, j) of every window that has any, each with its place in it; what the map is completed to; where
    the centres are."""

    members: dict[tuple[int, int], list[tuple]]
    whole: tuple[int, int]
    centres: list[tuple[float, float]]


def windows_of(shape: tuple[int, int], *, window: int = 0, groups: int = 0) -> Windows:
    """Plain windows of a side, or so many dilated ones."""
    members = {}
    counts = [min(groups, side) if groups else -(-side // window) for side in shape]
    sides = [-(-side // count) for side, count in zip(shape, counts, strict=True)] if groups else [window, window]
    for cell in product(*map(range, shape)):
        if groups:
            key, place = zip(*((n % count, n // count) for n, count in zip(cell, counts, strict=True)), strict=True)
        else:
            key, place = zip(*(divmod(n, window) for n in cell), strict=True)
        members.setdefault(key, []).append((cell, place))
    steps = counts if groups else [1, 1]
    first = lambda key: key if groups else [n * window for n in key]  # noqa: E731
    middle = lambda key: tuple(n + s * (R - 1) / 2 for n, s, R in zip(first(key), steps, sides, strict=True))  # noqa: E731
    members = dict(sorted(members.items()))
    whole = tuple(count * side for count, side in zip(counts, sides, strict=True))
    return Windows(members, whole, [middle(key) for key in members])


def decoder_layer(state: dict[str, Tensor], x: Tensor, heads: int, windows: Windows, centre: bool) -> Tensor:
    """One layer: (1, C, H, W) to the same. centre: whether windows are at their centres, or where the code has them."""
    get, (_, C, H, W), (members, whole, centres) = state.__getitem__, x.shape, windows

    def bn(y: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (get(f"{name}.{k}") for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias, eps=1e-5)

    def conv(y: Tensor, name: str) -> Tensor:
        weight = get(f"{name}.weight")
        return F.conv2d(y, weight, get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, get(f"{name}.weight"), state.get(f"{name}.bias"))

    def bias(apart: Tensor) -> Tensor:
        y = linear(apart.double(), "attn.pos.pos_proj")
        for n in "123":
            y = linear(norm(y, f"attn.pos.pos{n}.0").relu(), f"attn.pos.pos{n}.2")
        return y.movedim(-1, 0)  # heads first

    def attention(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
        split = lambda t: t.reshape(len(t), heads, -1).transpose(0, 1)  # noqa: E731
        q, k, v = map(split, (q, k, v))
        weights = (q @ k.transpose(-2, -1) / (C // heads) ** 0.5 + added).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    y = F.gelu(bn(conv(x, "spatial_smooth.0.0"), "spatial_smooth.0.1"))
    y = F.gelu(bn(conv(y, "spatial_smooth.0.3"), "spatial_smooth.0.4"))
    x = F.gelu(x + bn(conv(y, "spatial_smooth.0.6"), "spatial_smooth.0.7"))
    x = x[0].flatten(1).T  # (H W, C)
    n, z = norm(x, "norm0"), torch.zeros_like(x)
    q, kv = linear(n, "attn.q"), linear(n, "attn.kv")
    rows = {key: [i * W + j for (i, j), _ in inside] for key, inside in members.items()}
    for key, at in rows.items():
        place = torch.tensor([place for _, place in members[key]])
        z[at] = attention(q[at], kv[at, :C], kv[at, C:], bias(place[:, None] - place))
    x = x + linear(z, "attn.proj")
    n = norm(x, "norm1")
    kv = linear(norm(torch.stack([n[at].mean(0) for at in rows.values()]), "attn.norm"), "attn.kv")
    cells = list(product(range(H), range(W)))
    if centre:
        apart = torch.tensor([[(i - a, j - b) for a, b in centres] for i, j in cells])
    else:
        h, w = (max(key[axis] for key in members) + 1 for axis in (0, 1))
        wide = 2 * whole[1] - 1
        entries = [[(i - a + h - 1) * (2 * w - 1) + j - b + w - 1 for a, b in members] for i, j in cells]
        apart = torch.tensor([[(e // wide - whole[0] + 1, e % wide - whole[1] + 1) for e in row] for row in entries])
    x = x + linear(attention(linear(n, "attn.q"), kv[:, :C], kv[:, C:], bias(apart)), "attn.proj")
    x = x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
    return x.T.reshape(1, C, H, W)


def restated(
    state: dict[str, Tensor], maps: list[Tensor], heads: int, window: int, groups: int, centre: bool
) -> tuple[Tensor, Tensor]:
    """Logits of one image, main and auxiliary, from the stages (1, C, h, w) of its backbone; sides divide."""
    size = [4 * side for side in maps[0].shape[-2:]]
    up = lambda y, size: F.interpolate(y, size=size, mode="bilinear", align_corners=False)  # noqa: E731

    def conv(y: Tensor, name: str, padding: int = 0) -> Tensor:
        return F.conv2d(y, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)

    def bn_relu(y: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias, eps=1e-5).relu()

    normed = []
    for i, y in enumerate(maps):
        name = "backbone.norm" if i == len(maps) - 1 else f"backbone.norm_out_{i}"
        y = F.layer_norm(y.movedim(1, -1), y.shape[1:2], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
        normed.append(y.movedim(-1, 1))
    x = torch.cat([up(y, maps[0].shape[-2:]) for y in normed], 1)
    x = bn_relu(conv(x, "decode_head.conv_0", 1), "decode_head.syncbn_fc_0")
    for i, kind in enumerate((dict(window=window), dict(groups=groups))):
        prefix = f"decode_head.decode_transformer.{i}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        x = decoder_layer(own, x, heads, windows_of(tuple(x.shape[-2:]), **kind), centre)
    aux = bn_relu(conv(normed[2], "auxiliary_head.convs.0.conv", 1), "auxiliary_head.convs.0.bn")
    return up(conv(x, "decode_head.conv_seg"), size), up(conv(aux, "auxiliary_head.conv_seg"), size)
