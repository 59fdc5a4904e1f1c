"""Segmentation of images of any size: a window that slides over them, at several scales, mirrored too.

As the paper tests (section 4.1): an image whose shorter side is below the window is enlarged until it fits; where
windows overlap, logits are averaged; of all scales and mirror images, probabilities are. Scales and mirror images come
back to the size of the image first.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from dynattn import core, tracing
from dynattn.dense.metrics import intersection_over_union
from dynattn.dense.setr import resize

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the paper's multi-scale test, which mirrors images as well


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels; the last is moved back until it ends at the border."""
    return [min(start, max(side - window, 0)) for start in range(0, max(side - window, 0) + stride, stride)]


def enlarged(shape: tuple[int, int], scale: float, window: tuple[int, int]) -> tuple[int, int]:
    """The size of an image at a scale, at least so large that the window fits; its proportions stay."""
    sides = [max(1, round(side * scale)) for side in shape]
    more = max(1.0, *(w / side for w, side in zip(window, sides, strict=True)))
    return tuple(max(round(side * more), w if more > 1 else 1) for side, w in zip(sides, window, strict=True))


def slide(
    model: nn.Module, image: Float[Tensor, "1 C H W"], window: tuple[int, int], stride: tuple[int, int], bar: tqdm
) -> Float[Tensor, "1 K H W"]:
    """Mean logits of all windows that hold a pixel."""
    total, counts = None, image.new_zeros(image.shape[-2:])
    for top in starts(image.shape[-2], window[0], stride[0]):
        for left in starts(image.shape[-1], window[1], stride[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(image[place])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
            total[place] += logits
            counts[place] += 1
            bar.update()
    return total / counts


def predict(
    model: nn.Module,
    image: Float[Tensor, "1 C H W"],
    *,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    mirror: bool = False,
    progress: bool = False,
) -> Float[Tensor, "K H W"]:
    """The probability of every class at every pixel of a normalised image of any size (`dynattn.data.to_input`).

    window: that the model sees at once, None for the size that it was made for (`img_size`). stride: of the windows,
    None for two thirds of the window, as the paper has it: 512 of 768, 341 of 512, 320 of 480. scales: `SCALES` is the
    paper's multi-scale test. mirror: whether every scale is seen mirrored too. progress: whether a bar counts windows.
    The model runs in eval mode, without gradients, on its own device. Raises TypeError, ValueError on wrong arguments.
    """
    core.bind(image=(image, "1 C H W"))
    window = core.pair("window", getattr(model, "img_size", None) if window is None else window)
    stride = core.pair("stride", tuple(max(1, 2 * side // 3) for side in window) if stride is None else stride)
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise ValueError(f"stride: expected at most the window {window}, else pixels are left out, got {stride}")
    if not isinstance(scales, Sequence) or not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales: expected positive numbers, as in (0.5, 1.0), got {scales!r}")
    parameter = next(model.parameters())
    image = image.to(parameter.device, parameter.dtype)
    size = tuple(image.shape[-2:])
    sizes = [enlarged(size, scale, window) for scale in scales]
    count = sum(len(starts(H, window[0], stride[0])) * len(starts(W, window[1], stride[1])) for H, W in sizes)
    total = 0
    bar = tqdm(total=count * (1 + mirror), unit="window", disable=not progress, file=sys.stderr)
    with bar, torch.no_grad(), tracing.evaluating(model):
        for shape in sizes:
            scaled = resize(image, shape)
            for flipped in (False, True)[: 1 + mirror]:
                logits = slide(model, scaled.flip(-1) if flipped else scaled, window, stride, bar)
                logits = resize(logits.flip(-1) if flipped else logits, size)
                total = total + logits.softmax(1)[0]
    return total / (len(sizes) * (1 + mirror))


def measure(
    model: nn.Module,
    pairs: Iterable[tuple[Float[Tensor, "1 C H W"], Int[Tensor, "H W"]]],
    num_classes: int,
    *,
    progress: bool = False,
    **how,
) -> tuple[float, Float[Tensor, " K"]]:
    """Mean intersection over union of a model on images with their true classes, and the value of every class.

    pairs: normalised images, and the class of each pixel, where 255 does not count.  how: arguments of `predict`.
    progress: whether a bar counts images. Raises as `predict` and `intersection_over_union` do.
    """

    def answers() -> Iterator[tuple[Tensor, Tensor]]:
        for image, truth in tqdm(pairs, unit="image", disable=not progress, file=sys.stderr):
            predicted = predict(model, image, **how).argmax(0)
            yield predicted, truth.to(predicted.device)

    return intersection_over_union(answers(), num_classes)
