"""Pictures in, tensors out: reading any image a user may have, ImageNet's normalisation, augmentation."""

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
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
    """An RGB picture from a path, bytes, a binary file, a PIL image, or a uint8 array (H, W) or (H, W, 1 | 3 | 4).

    Turned upright by its EXIF entry; grey, 16-bit, palette and CMYK are converted, transparency goes over white, of
    an animation the first frame is taken. The PIL image given is left as it is. A file (BytesIO, an open file) is read
    from its start, stays open and stands where it stood; one that cannot seek is read to its end.
    Raises FileNotFoundError for a path without a file, ValueError for a file that is no picture, is damaged or larger
    than Pillow holds for safe, and for arrays of another shape; TypeError for other types and other dtypes.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(BytesIO(source), f"{memoryview(source).nbytes} bytes")
    if callable(getattr(source, "read", None)):
        return _read_stream(source)
    if isinstance(source, Image.Image):
        return _decode(source, "image")
    if isinstance(source, np.ndarray):
        return _to_rgb_mode(Image.fromarray(_checked_array(source)))
    raise TypeError(
        f"image: expected a path, bytes, a binary file, a PIL image or a uint8 array, got {type(source).__name__}"
    )


def _read_file(path: Path) -> Image.Image:
    if path.is_dir():
        raise ValueError(f"image: expected a picture file, got the folder {str(path)!r}")
    if not path.exists():
        raise FileNotFoundError(f"image: no file {str(path)!r}")
    with open(path, "rb") as file:
        return _open(file, repr(str(path)))


def _read_stream(file: Any) -> Image.Image:
    """The picture in a file that somebody else opened."""
    name = f"a {type(file).__name__}"
    try:
        if not (hasattr(file, "seekable") and file.seekable()):
            content = file.read()
        else:
            position = file.tell()
            file.seek(0)
            content = file.read()
            file.seek(position)
    except ValueError as error:  # a closed file
        raise ValueError(f"image: cannot read {name}: {error}") from error
    if not isinstance(content, bytes | bytearray):
        raise TypeError(f"image: expected a file opened in binary mode ('rb'), got {name}, which reads text")
    return _open(BytesIO(content), f"{name} of {len(content)} bytes")


def _open(file: Any, name: str) -> Image.Image:
    """The picture in a binary file, decoded. `name` tells the user which one it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(file)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"image: {name} is too large: {error}; make it smaller first") from error
        except Exception as error:  # decoders raise what they like on bytes that are no picture
            reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
            raise ValueError(f"image: expected a picture that Pillow can read, got {name}{reason}") from error
        return _decode(picture, name)


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


def to_input(
    source: Any,
    size: int | tuple[int, int] | None = None,
    *,
    channels: int = 3,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Float[Tensor, "1 C H W"]:
    """A normalised batch of one picture, as the models take it.

    `source`: what `read_image` takes, or a tensor: floating (C, H, W) or (1, C, H, W), taken as normalised already,
    or uint8, taken as a picture: (c, H, W) or (H, W, c) with c = 1, 3 or 4. Where the first side is 1, 3 or 4 it is
    taken for the channels, as torch has them. `size`: None keeps the picture's own; an integer resizes to that square,
    a pair to (H, W), bicubic with antialiasing; nothing is cut off. `channels`: what the model sees, C; pictures can be
    made into 3 or 1 (grey, normalised by the averages of `mean` and `std`), tensors must have them.
    Warns where a floating tensor lies in [0, 1]: such a one is not normalised. (A constant one says nothing.)
    Raises as `read_image` does; ValueError for tensors of another shape, with NaN or infinite values, and for pictures
    where a model sees neither 1 nor 3 channels.
    """
    height_width = _checked_size(size)
    if isinstance(source, Tensor) and source.dtype != torch.uint8:
        x = _checked_tensor(source, channels)
        if 0 <= x.min() < x.max() <= 1:
            warnings.warn(
                f"image: all values lie in [0, 1] (from {x.min():.3g} to {x.max():.3g}), but a floating tensor is "
                "taken as normalised, with mean 0; a picture as ToTensor makes it must be normalised first: "
                "torchvision.transforms.Normalize(dynattn.data.MEAN, dynattn.data.STD)(image), "
                "or give it as (255 * image).round().byte()",
                stacklevel=2,
            )
        if height_width not in (None, tuple(x.shape[-2:])):
            x = F.interpolate(x, height_width, mode="bicubic", antialias=True)
        return x
    if channels not in (1, 3):
        raise ValueError(
            f"image: the model sees {channels} channels, and a picture gives 3 or 1; "
            f"give a normalised floating tensor ({channels}, H, W)"
        )
    picture = read_image(_tensor_to_array(source) if isinstance(source, Tensor) else source)
    if height_width is not None:
        picture = picture.resize(height_width[::-1], Image.Resampling.BICUBIC)
    if channels == 1:
        picture, mean, std = picture.convert("L"), (sum(mean) / len(mean),), (sum(std) / len(std),)
    levels = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, channels).movedim(-1, 0)
    scale, shift = _affine(levels.device, mean, std)
    return (levels * scale + shift)[None]


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int | np.integer) and not isinstance(side, bool) for side in pair):
        raise TypeError(f"size: expected None, an integer or a pair (H, W) of integers, got {size!r}")
    if min(pair) < 1:
        raise ValueError(f"size: expected sides of at least 1, got {size!r}")
    return int(pair[0]), int(pair[1])


def _checked_tensor(tensor: Tensor, channels: int) -> Float[Tensor, "1 C H W"]:
    if not tensor.is_floating_point():
        raise TypeError(f"image: expected a floating (normalised) or uint8 (picture) tensor, got {tensor.dtype}")
    x = tensor[None] if tensor.ndim == 3 else tensor
    if x.ndim != 4 or x.shape[:2] != (1, channels) or x.numel() == 0:
        raise ValueError(
            f"image: expected a tensor ({channels}, H, W) or (1, {channels}, H, W), got {tuple(tensor.shape)}"
        )
    if not x.isfinite().all():
        raise ValueError(f"image: expected finite values, got {int((~x.isfinite()).sum())} that are NaN or infinite")
    return x


def _tensor_to_array(tensor: UInt8[Tensor, "..."]) -> UInt8[np.ndarray, "H W C"]:
    picture = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    if picture.ndim == 3 and picture.shape[0] in (1, 3, 4):
        picture = picture.movedim(0, -1)
    elif picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"image: expected a uint8 tensor (C, H, W) or (H, W, C) with C = 1, 3 or 4, got {tuple(tensor.shape)}"
        )
    return picture.contiguous().cpu().numpy()


def normalise(images: UInt8[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
    """uint8 pictures as float32 with ImageNet's mean and deviation.

    Raises TypeError or ValueError for other tensors.
    """
    scale, shift = _affine(_checked_pictures(images).device)
    return images * scale + shift


def to_rgb(x: Float[Tensor, "C H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """A normalised picture as uint8 pixels, values outside [0, 1] clipped: the inverse of `normalise`.

    One channel (or two) is shown as grey; of more than three channels the first three are shown.
    Raises ValueError for other tensors.
    """
    if x.ndim != 3 or x.shape[0] == 0 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating tensor (3, H, W), got {x.dtype} {tuple(x.shape)}")
    mean, std = MEAN, STD
    if x.shape[0] < 3:
        x, mean, std = x[:1].expand(3, -1, -1), (sum(MEAN) / 3,) * 3, (sum(STD) / 3,) * 3
    scale, shift = _affine(x.device, mean, std)
    pixels = (x[:3].detach().float() - shift) / scale
    return pixels.round().clamp(0, 255).byte().movedim(0, -1).cpu().numpy()


def _affine(
    device: torch.device, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> tuple[Float[Tensor, "C 1 1"], Float[Tensor, "C 1 1"]]:
    """normalised = scale * level + shift, for levels 0 to 255."""
    mean, std = (torch.tensor(tuple(values), device=device)[:, None, None] for values in (mean, std))
    return 1 / (255 * std), -mean / std


def _checked_pictures(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: expected a uint8 tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: expected a tensor (..., 3, H, W), got {tuple(images.shape)}")
    return images


def augment(
    images: UInt8[Tensor, "B 3 H W"], generator: torch.Generator, maps: UInt8[Tensor, "B H W"] | None = None
) -> Float[Tensor, "B 3 H W"] | tuple[Float[Tensor, "B 3 H W"], UInt8[Tensor, "B H W"]]:
    """A normalised batch, each picture mirrored or not, moved, and with other channel gains and offsets.

    maps: a class for each pixel, which goes where its pixel goes; with them a pair of batch and maps comes back.

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
    pictures = (moved * (gain * scale)).add_(offset * scale + shift)
    return pictures if maps is None else (pictures, maps.flatten(1).gather(1, pixels).view_as(maps))


def _reflected(side: int, where: Float[Tensor, " B"]) -> Tensor:
    """(B, side) positions moved by where * SHIFT * side pixels, reflected at the edges."""
    moved = torch.arange(side, device=where.device) + (where * SHIFT * side).round().long()[:, None]
    return (side - 1) - ((side - 1) - moved.abs()).abs()
