"""Pictures in, tensors out: reading any image a user may have, ImageNet's normalisation, augmentation."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, for channels in [0, 1]
STD = (0.229, 0.224, 0.225)

SHIFT = 5 / 64  # of the side: what augment() moves a picture at most
GAIN, OFFSET = 0.15, 0.08  # what augment() changes a channel at most, of a range of 1


def read_image(source: Any) -> Image.Image:
    """An RGB picture from a path, a PIL image, or a uint8 array (H, W) or (H, W, 1 | 3 | 4).

    Turned upright by its EXIF entry; grey, 16-bit, palette and CMYK are converted, transparency goes over white, of
    an animation the first frame is taken. The PIL image given is left as it is.
    Raises FileNotFoundError for a path without a file, ValueError for a file that is no picture, is damaged or larger
    than Pillow holds for safe, and for arrays of another shape; TypeError for other types and other dtypes.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(source))
    if isinstance(source, Image.Image):
        return _decode(source, "image")
    if isinstance(source, np.ndarray):
        return _to_rgb_mode(Image.fromarray(_checked_array(source)))
    raise TypeError(f"image: expected a path, a PIL image or a uint8 array, got {type(source).__name__}")


def _read_file(path: Path) -> Image.Image:
    if path.is_dir():
        raise ValueError(f"image: expected a picture file, got the folder {str(path)!r}")
    if not path.exists():
        raise FileNotFoundError(f"image: no file {str(path)!r}")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(file)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"image: {str(path)!r} is too large: {error}; make it smaller first") from error
        except Exception as error:  # decoders raise what they like on bytes that are no picture
            reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
            raise ValueError(f"image: expected a picture that Pillow can read, got {str(path)!r}{reason}") from error
        return _decode(picture, repr(str(path)))


def _decode(picture: Image.Image, name: str) -> Image.Image:
    try:
        picture.load()  # of an animation the frame it stands at, the first after opening
        upright = ImageOps.exif_transpose(picture)
    except Exception as error:
        raise ValueError(f"image: {name} is damaged or cut off: {error}") from error
    if 0 in upright.size:
        raise ValueError(f"image: expected at least one pixel, got {name} of size {upright.size}")
    return _to_rgb_mode(upright)


def _to_rgb_mode(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return Image.fromarray(_eight_bit(np.asarray(picture), picture.mode)).convert("RGB")
    try:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except ValueError as error:
        raise ValueError(f"image: expected a grey, RGB or CMYK picture, got mode {picture.mode!r}") from error


def _eight_bit(levels: np.ndarray, mode: str) -> UInt8[np.ndarray, "H W"]:
    """Grey levels of more than 8 bits: integers up to 65535, or floats up to 1, spread over 0 to 255."""
    most = 1.0 if mode == "F" else 65535.0
    if not (np.isfinite(levels).all() and 0 <= levels.min() and levels.max() <= most):
        raise ValueError(
            f"image: expected grey levels from 0 to {most:g} in mode {mode!r}, got {levels.min()} to {levels.max()}"
        )
    return np.round(levels * (255.0 / most)).astype(np.uint8)


def _checked_array(array: np.ndarray) -> UInt8[np.ndarray, "..."]:
    if array.dtype != np.uint8:
        hint = "; for values in [0, 1]: (255 * image).round().astype('uint8')" if array.dtype.kind in "fb" else ""
        raise TypeError(f"image: expected an array of dtype uint8 with values 0 to 255, got {array.dtype}{hint}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = "; channels come last" if array.ndim == 3 and array.shape[0] in (1, 3) else ""
        raise ValueError(f"image: expected an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {array.shape}{hint}")
    if array.size == 0:
        raise ValueError(f"image: expected at least one pixel, got an array of shape {array.shape}")
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def to_input(source: Any, size: int | tuple[int, int] | None = None) -> Float[Tensor, "1 3 H W"]:
    """A normalised batch of one picture, as the models take it.

    `source`: what `read_image` takes, or a tensor: floating (3, H, W) or (1, 3, H, W), taken as normalised already,
    or uint8 (C, H, W), C = 1, 3 or 4, taken as a picture. `size`: None keeps the picture's own; an integer resizes
    to that square, a pair to (H, W), bicubic with antialiasing; nothing is cut off.
    Raises as `read_image` does; ValueError for tensors of another shape, with NaN or infinite values.
    """
    height_width = _checked_size(size)
    if isinstance(source, Tensor) and source.dtype != torch.uint8:
        x = _checked_tensor(source)
        if height_width not in (None, tuple(x.shape[-2:])):
            x = F.interpolate(x, height_width, mode="bicubic", antialias=True)
        return x
    picture = read_image(_tensor_to_array(source) if isinstance(source, Tensor) else source)
    if height_width is not None:
        picture = picture.resize(height_width[::-1], Image.Resampling.BICUBIC)
    return normalise(torch.from_numpy(np.array(picture)).movedim(-1, 0))[None]


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int | np.integer) and not isinstance(side, bool) for side in pair):
        raise TypeError(f"size: expected None, an integer or a pair (H, W) of integers, got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"size: expected sides of at least 1, got {size!r}")
    return int(pair[0]), int(pair[1])


def _checked_tensor(tensor: Tensor) -> Float[Tensor, "1 3 H W"]:
    if not tensor.is_floating_point():
        raise TypeError(f"image: expected a floating (normalised) or uint8 (picture) tensor, got {tensor.dtype}")
    x = tensor[None] if tensor.ndim == 3 else tensor
    if x.ndim != 4 or x.shape[:2] != (1, 3) or x.numel() == 0:
        raise ValueError(f"image: expected a tensor (3, H, W) or (1, 3, H, W), got {tuple(tensor.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"image: expected finite values, got {int((~x.isfinite()).sum())} that are NaN or infinite")
    return x


def _tensor_to_array(tensor: UInt8[Tensor, "..."]) -> UInt8[np.ndarray, "H W C"]:
    picture = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    if picture.ndim != 3 or picture.shape[0] not in (1, 3, 4):
        raise ValueError(f"image: expected a uint8 tensor (C, H, W) with C = 1, 3 or 4, got {tuple(tensor.shape)}")
    return picture.movedim(0, -1).contiguous().cpu().numpy()


def normalise(images: UInt8[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
    """uint8 pictures as float32 with ImageNet's mean and deviation.

    Raises TypeError or ValueError for other tensors.
    """
    scale, shift = _affine(_checked_pictures(images).device)
    return images * scale + shift


def to_rgb(x: Float[Tensor, "3 H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """A normalised picture as uint8 pixels, values outside [0, 1] clipped: the inverse of `normalise`."""
    if x.ndim != 3 or x.shape[0] != 3 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating tensor (3, H, W), got {x.dtype} {tuple(x.shape)}")
    scale, shift = _affine(x.device)
    pixels = (x.detach().float() - shift) / scale
    return pixels.round().clamp(0, 255).byte().movedim(0, -1).cpu().numpy()


def _affine(device: torch.device) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """normalised = scale * level + shift, for levels 0 to 255."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return 1 / (255 * std), -mean / std


def _checked_pictures(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: expected a uint8 tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: expected a tensor (..., 3, H, W), got {tuple(images.shape)}")
    return images


def augment(images: UInt8[Tensor, "B 3 H W"], generator: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """A normalised batch, each picture mirrored or not, moved, and with other channel gains and offsets.

    Moved by at most 5/64 of the side in each direction; what comes into the picture is its mirror image at the edge,
    which leaves no seam. `generator` decides everything. Raises TypeError or ValueError for other tensors.
    """
    batch, channels, height, width = _checked_pictures(images).shape

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator, device=generator.device).to(images.device) - 1

    rows = _reflected(height, uniform(batch))
    columns = _reflected(width, uniform(batch))
    columns = torch.where(uniform(batch, 1) < 0, columns.flip(1), columns)
    gain, offset = 1 + GAIN * uniform(batch, 3, 1, 1), 255 * OFFSET * uniform(batch, 3, 1, 1)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    moved = images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view_as(images)
    scale, shift = _affine(images.device)
    return (moved * (gain * scale)).add_(offset * scale + shift)


def _reflected(side: int, where: Float[Tensor, " B"]) -> Tensor:
    """(B, side) positions moved by where * SHIFT * side pixels, reflected at the edges."""
    moved = torch.arange(side, device=where.device) + (where * SHIFT * side).round().long()[:, None]
    return (side - 1) - ((side - 1) - moved.abs()).abs()
