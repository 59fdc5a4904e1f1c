"""SETR as published: state dicts of deterministic weights, and the forward pass restated in the published names."""

import deterministic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name: parameters and multiply-adds in G, of 19 classes at 768 pixels and of 150 classes at 512, as torch's counter has
# them. The published code owns, for each head, a classifier `conv_seg` of 512 channels that nothing reads: `UNUSED`.
MEASURED = {
    "setr_naive_large": ((306_576_536, 959.7), (305_669_296, 362.3)),
    "setr_pup_large": ((319_113_662, 1079.4), (318_307_292, 417.7)),
    "setr_mla_large": ((310_805_618, 973.7), (310_568_836, 378.2)),
    "setr_naive_base": ((88_270_232, 295.5), (87_690_672, 107.3)),
    "setr_pup_base": ((98_119_870, 414.0), (97_641_180, 162.1)),
    "setr_mla_base": ((92_499_314, 309.5), (92_590_212, 123.3)),
}
PASCAL = {"setr_naive_large": 305_265_120, "setr_pup_large": 317_833_816, "setr_mla_large": 309_704_040}  # 480, 60
# setr_naive_base, 512 pixels: logits of the first four classes at (0, 0), of the last two at (320, 448); the deviations
# of all logits, and of the auxiliary heads'.
LOGITS = (
    [0.0216468908, 0.6550286798, 0.2933690599, -1.2166839836],
    [-0.3780919689, -0.8422307187],
    [0.6487695642, 0.5910545722, 0.5829932272, 0.6348184202],
)
FIRST = [-0.16702383, 0.35479122, 1.55658696]  # of the class token behind block 1


def unused(classes: int, heads: int) -> int:
    """Parameters of the published code that nothing reads."""
    return heads * classes * (512 + 1)


def full(name: str) -> str:
    """A published name with the prefix of the encoder."""
    return name if name.startswith(("decode_head", "auxiliary_head")) else f"backbone.{name}"


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The published names and shapes of what a model has."""
    entries, found = model.published_entries(), {}
    for name, own in model.state_dict().items():
        found[full(entries[name].name)] = tuple(own.shape)
    found["backbone.cls_token"] = (1, 1, model.num_features)
    if model.encoder.embed.table is not None:
        _, h, w = model.encoder.embed.table.shape
        found["backbone.pos_embed"] = (1, h * w + 1, model.num_features)
    return found


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    """A state dict by the published names."""
    counts = lambda name: name.endswith("num_batches_tracked")  # noqa: E731
    return {
        name: torch.tensor(0) if counts(name) else deterministic.tensor(name, shape)
        for name, shape in shapes(model).items()
    }


# ---------------------------------------------------------------- the forward pass, restated from the specification


def encode(state: dict[str, Tensor], x: Tensor, patch: int, heads: int, mla: bool) -> list[Tensor]:
    """What comes out of every block, tokens in a row, without the class token."""
    get = lambda name: state[f"backbone.{name}"]  # noqa: E731
    z = F.conv2d(x, get("patch_embed.proj.weight"), get("patch_embed.proj.bias"), stride=patch)
    z = z.flatten(2).transpose(1, 2)
    z = torch.cat([get("cls_token").expand(len(x), -1, -1), z], dim=1) + get("pos_embed")
    z = z[:, 1:] if mla else z
    found, i = [], 0
    while f"backbone.blocks.{i}.norm1.weight" in state:
        part = lambda name, i=i: get(f"blocks.{i}.{name}")  # noqa: E731
        linear = lambda y, name, part=part: F.linear(y, part(f"{name}.weight"), part(f"{name}.bias"))  # noqa: E731
        scaled = lambda y, name, part=part: y * part(f"{name}.weight") + part(f"{name}.bias")  # noqa: E731
        norm = lambda y, name, scaled=scaled: scaled(F.layer_norm(y, y.shape[-1:], eps=1e-6), name)  # noqa: E731
        B, N, C = z.shape
        q, k, v = linear(norm(z, "norm1"), "attn.qkv").reshape(B, N, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (C // heads) ** -0.5).softmax(-1)
        z = z + linear((weights @ v).transpose(1, 2).reshape(B, N, C), "attn.proj")
        z = z + linear(F.gelu(linear(norm(z, "norm2"), "mlp.fc1")), "mlp.fc2")
        found.append(z if mla else z[:, 1:])
        i += 1
    return found


def restated(
    state: dict[str, Tensor], x: Tensor, decoder: str, patch: int, heads: int, layers: tuple, aux_layers: tuple
) -> tuple[Tensor, list[Tensor]]:
    """Logits and auxiliary logits of a square image."""
    tokens = encode(state, x, patch, heads, decoder == "mla")
    side, size = x.shape[-1] // patch, x.shape[-2:]
    as_map = lambda y: y.transpose(1, 2).reshape(len(y), -1, side, side)  # noqa: E731
    up = lambda y, size, corners=False: F.interpolate(y, size, mode="bilinear", align_corners=corners)  # noqa: E731
    double = lambda y, by, corners=False: up(y, [by * s for s in y.shape[-2:]], corners)  # noqa: E731

    def normed(layer: int, name: str) -> Tensor:
        y = tokens[layer - 1]
        return as_map(F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6))

    def conv(y: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(y, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def bn_relu(y: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias, eps=1e-5).relu()

    if decoder == "mla":
        p = [
            conv(normed(layer, f"backbone.norm_{i}"), f"backbone.mla.mla_p{i + 2}_1x1.0")
            for i, layer in enumerate(layers)
        ]
        p = [bn_relu(y, f"backbone.mla.mla_p{i + 2}_1x1.1") for i, y in enumerate(p)]
        p = [sum(p[i:]) for i in range(4)]
        p = [bn_relu(conv(y, f"backbone.mla.mla_p{i + 2}.0"), f"backbone.mla.mla_p{i + 2}.1") for i, y in enumerate(p)]
        wide = []
        for i, y in enumerate(p):
            name = f"decode_head.mlahead.head{i + 2}"
            y = bn_relu(conv(y, f"{name}.0"), f"{name}.1")
            wide.append(double(bn_relu(conv(y, f"{name}.3"), f"{name}.4"), 4, corners=True))
        main = up(conv(torch.cat(wide, 1), "decode_head.cls"), size)
        return main, [up(conv(y, f"auxiliary_head.{i}.aux"), size) for i, y in enumerate(p)]

    def head(layer: int, name: str, factors: list[int]) -> Tensor:
        y = normed(layer, f"{name}.norm")
        for i, factor in enumerate(factors):
            y = double(bn_relu(conv(y, f"{name}.conv_{i}"), f"{name}.syncbn_fc_{i}"), factor)
        return up(conv(y, f"{name}.conv_{len(factors)}"), size)

    pup = decoder == "pup"
    aux = [head(layer, f"auxiliary_head.{i}", [4 if pup else 1]) for i, layer in enumerate(aux_layers)]
    return head(layers[0], "decode_head", [2, 2, 2, 1] if pup else [1]), aux
