"""Names and shapes in the state dicts of DAT's published code, restated so that tests need no checkpoint."""

from math import ceil

import deterministic
from torch import Tensor

BASE = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "groups": (1, 2, 4, 8)}
SIZES = {
    "dat_tiny": {},
    "dat_small": {"depths": (2, 2, 18, 2)},
    "dat_base": BASE,
    "dat_base_384": BASE | {"window": 12, "size": 384},
    "dat_tiny_conv": {"stem": 7, "down": 3},
}
SMALL = {"dims": (8, 16, 32, 64), "heads": (1, 2, 4, 8), "groups": (1, 1, 2, 4)}  # dat_tiny, but narrow: nobody's
DERIVED = ("relative_position_index", "attn_mask")  # kept in published checkpoints, computed by us

Shape = tuple[int, ...]


def affine(name: str, out: int, *others: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, *others), f"{name}.bias": (out,)}


def shapes(name: str) -> dict[str, Shape]:
    """Every entry of a published checkpoint, derived buffers too; "small" is as one would be for `SMALL`."""
    return _shapes(**(SMALL if name == "small" else SIZES[name]))


def _shapes(
    dims=(96, 192, 384, 768),
    depths=(2, 2, 6, 2),
    heads=(3, 6, 12, 24),
    groups=(1, 2, 3, 6),
    window=7,
    size=224,
    stem=4,
    down=2,
) -> dict[str, Shape]:
    found = affine("patch_proj.0", dims[0], 3, stem, stem) | affine("patch_proj.1.norm", dims[0])
    for i, (C, depth) in enumerate(zip(dims, depths, strict=True)):
        side = ceil(size / (4 * 2**i))
        if i:
            found[f"down_projs.{i - 1}.0.weight"] = (C, dims[i - 1], down, down)
            found |= affine(f"down_projs.{i - 1}.1.norm", C)
        for d in range(depth):
            found |= affine(f"stages.{i}.layer_norms.{2 * d}.norm", C)
            found |= affine(f"stages.{i}.layer_norms.{2 * d + 1}.norm", C)
            found |= affine(f"stages.{i}.mlps.{d}.chunk.linear1", 4 * C, C)
            found |= affine(f"stages.{i}.mlps.{d}.chunk.linear2", C, 4 * C)
            name = f"stages.{i}.attns.{d}"
            if d % 2 and i >= 2:
                found |= _deformable(name, C, heads[i], C // groups[i], kernel=(9, 7, 5, 3)[i], side=side)
            else:
                found |= _window(name, C, heads[i], window, windows=(side // window) ** 2 if d % 2 else 0)
    return found | affine("cls_norm.norm", dims[-1]) | affine("cls_head", 1000, dims[-1])


def _window(name: str, C: int, heads: int, window: int, windows: int) -> dict[str, Shape]:
    """`windows`: how many masks a shifted layer keeps, 0 for a plain one."""
    found = affine(f"{name}.proj_qkv", 3 * C, C) | affine(f"{name}.proj_out", C, C)
    found[f"{name}.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
    found[f"{name}.relative_position_index"] = (window**2, window**2)
    return found | ({f"{name}.attn_mask": (windows, window**2, window**2)} if windows else {})


def _deformable(name: str, C: int, heads: int, width: int, kernel: int, side: int) -> dict[str, Shape]:
    """`width`: channels of an offset group."""
    found = {f"{name}.rpe_table": (heads, 2 * side - 1, 2 * side - 1)}
    for projection in ("q", "k", "v", "out"):
        found |= affine(f"{name}.proj_{projection}", C, C, 1, 1)
    found |= affine(f"{name}.conv_offset.0", width, 1, kernel, kernel) | affine(f"{name}.conv_offset.1.norm", width)
    return found | {f"{name}.conv_offset.3.weight": (2, width, 1, 1)}


def checkpoint(name: str, derived: bool = False) -> dict[str, Tensor]:
    """A published state dict with deterministic weights; with `derived`, buffers that hold nonsense are there too."""
    return {
        key: deterministic.tensor(key, shape)
        for key, shape in shapes(name).items()
        if derived or not key.endswith(DERIVED)
    }
