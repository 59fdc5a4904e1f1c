"""What the answer of a network rests on, for any model with stages: class activation maps, and the receptive field.

Both take what the model sees: a normalised image, as `trace(model, photograph).image` has it. The model may be one of
ours or of timm; a stage is an entry of its `feature_info`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from dynattn import core
from dynattn.data import normalise
from dynattn.tracing import evaluating

from .measures import others
from .tables import ALL, NONE, OTHER, OWN, Row, table_of

METHODS = ("hires", "grad")
NEEDED = "class maps need the package grad-cam: pip install 'dynattn[vision]'"
SHARES = (0.2, 0.3, 0.5, 0.99)  # of all contribution: for these the side of a central square is told


def stages(model: nn.Module) -> list[dict]:
    """What a model says of its stages: channels, reduction, and the name of the module, each.

    Raises TypeError for a model without `feature_info`.
    """
    info = getattr(model, "feature_info", None)
    if info is None:
        raise TypeError(f"model: expected one with feature_info, of dynattn or of timm, got {type(model).__name__}")
    return [dict(one) for one in (info if isinstance(info, list) else info.info)]


def stage_of(model: nn.Module, stage: int) -> dict:
    """A stage by its number, from the end where that is negative. Raises ValueError where there is no such stage."""
    found = stages(model)
    if isinstance(stage, bool) or not isinstance(stage, int) or not -len(found) <= stage < len(found):
        raise ValueError(f"stage: expected a whole number from {-len(found)} to {len(found) - 1}, got {stage!r}")
    return found[stage]


def as_map(features: Tensor, channels: int, shape: tuple[int, int], *, last: bool = True) -> Float[Tensor, "B c h w"]:
    """Features of a stage as a map of channels, from (B, h, w, c), (B, c, h, w), or tokens (B, n, c) with others first.

    channels: c. shape: (h, w), which tokens need. last: whether the channels come last where both could be, as of
    (B, 32, 32, 32). Raises ValueError for features of another form.
    """
    if features.ndim == 4 and features.shape[-1] == channels and (last or features.shape[1] != channels):
        return rearrange(features, "B h w c -> B c h w")
    if features.ndim == 4 and features.shape[1] == channels:
        return features
    h, w = shape
    if features.ndim == 3 and features.shape[-1] == channels and features.shape[1] >= h * w:
        return rearrange(features[:, -h * w :], "B (h w) c -> B c h w", h=h)
    raise ValueError(f"stage: expected a map of {channels} channels, got {tuple(features.shape)}")


def channels_last(model: nn.Module, image: Float[Tensor, "C H W"], number: int) -> bool:
    """Whether a stage hands on (B, h, w, c), where the shape alone does not tell.

    `forward_intermediates` has channels first by its contract: what equals the stage's own output has them there too.
    """
    kept: list[Tensor] = []
    hook = model.get_submodule(stages(model)[number]["module"]).register_forward_hook(
        lambda *found: kept.append(found[2])
    )
    with torch.no_grad():
        (features,) = model.forward_intermediates(image[None], indices=[number], intermediates_only=True)
    hook.remove()
    return not torch.equal(kept[0], features)


def class_map(
    model: nn.Module, image: Float[Tensor, "C H W"], *, stage: int = 0, label: int | None = None, method: str = "hires"
) -> Float[np.ndarray, "H W"]:
    """Where the features of a stage speak for a class, from 0 to 1, at the size of the image.

    image: what the model sees, normalised. stage: its number in `feature_info`; attention that mixes the whole map
    spreads evidence over all tokens, so early stages say more about where. label: the class (None: the model's answer).
    method: "hires" multiplies each feature by its own slope (HiResCAM), "grad" by the mean slope of its channel
    (Grad-CAM). The model stays in the mode it was in, and its gradients are as they were.
    Raises TypeError, ValueError for wrong arguments, ImportError without the package grad-cam.
    Source: Selvaraju et al., 2017; Draelos and Carin, 2020; DeBiFormer section 4.5.
    """
    core.one_of("method", method, METHODS)
    stage_of(model, stage)
    return class_maps(model, image, numbers=[stage], label=label, methods=[method])[method][0]


def class_maps(
    model: nn.Module,
    image: Float[Tensor, "C H W"],
    *,
    numbers: Sequence[int] | None = None,
    label: int | None = None,
    methods: Sequence[str] = METHODS,
) -> dict[str, list[Float[np.ndarray, "H W"]]]:
    """The maps of several stages by several methods, from one pass: by method, in the order of the stages.

    numbers: of the stages (None: all). Otherwise as `class_map`.
    """
    try:
        from pytorch_grad_cam import GradCAM, HiResCAM
    except ImportError as error:
        raise ImportError(NEEDED) from error
    image, count = checked(image), len(stages(model))
    numbers = range(count) if numbers is None else [range(count)[number] for number in numbers]
    about = [stage_of(model, number) for number in numbers]
    shapes = [tuple(-(-side // stage["reduction"]) for side in image.shape[-2:]) for stage in about]
    kinds = {"hires": HiResCAM, "grad": GradCAM}
    with evaluating(model), torch.enable_grad():
        last = [
            stage["num_chs"] not in shape or channels_last(model, image, number)
            for number, stage, shape in zip(numbers, about, shapes, strict=True)
        ]
        modules = [model.get_submodule(stage["module"]) for stage in about]
        with ExitStack() as stack:
            cams = {method: stack.enter_context(kinds[method](model, modules)) for method in methods}
            x = image[None].clone().requires_grad_()  # so that a model whose parameters are frozen has a graph
            logits = model(x)[0]
            label = int(logits.argmax()) if label is None else label
            if not 0 <= label < len(logits):
                raise ValueError(f"label: expected a class from 0 to {len(logits) - 1}, got {label}")
            torch.autograd.grad(logits[label], x)  # the package keeps what arrives at the stages
            found = {}
            for method, cam in cams.items():
                kept = cam.activations_and_grads
                for part in (kept.activations, kept.gradients):
                    part[:] = [
                        as_map(features, stage["num_chs"], shape, last=at_end).clone()  # the package takes no views
                        for features, stage, shape, at_end in zip(part, about, shapes, last, strict=True)
                    ]
                found[method] = [
                    cam.aggregate_multi_layers([one])[0] for one in cam.compute_cam_per_layer(x, [], False)
                ]
    return found


def evaluate_maps(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"] | None = None,
    *,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """How well class maps find the object: a table (see `tables`) with a row for each stage, image and kind.

    labels: the class of each map (None: the model's answer). The kinds are

        hires, grad    share of the map on the object, by the method (`class_map`)
        half           the smallest part of the image that holds half of the map by "hires"; needs no mask

    All are 0 of a map that is zero everywhere.

    Any model with stages will do. Raises ValueError where images and masks do not fit together.
    """
    if len(images) != len(masks) or len(images) < 2 or images.shape[-2:] != masks.shape[-2:]:
        raise ValueError(f"masks: expected one for each of at least 2 images {images.shape}, got {masks.shape}")
    masks = torch.from_numpy(np.array(masks))

    def rows_of(i: int) -> Iterator[Row]:
        image = normalise(torch.from_numpy(np.array(images[i])))
        nulls = {OWN: masks[i].float().numpy(), OTHER: others(masks, i).numpy()}
        found = class_maps(model, image, label=None if labels is None else int(labels[i]))
        for stage, hires, grad in zip(stages(model), found["hires"], found["grad"], strict=True):
            for kind, values in {"hires": hires, "grad": grad}.items():
                for mask, where in nulls.items():
                    yield Row(stage["module"], ALL, mask, kind, share_under(values, where))
            yield Row(stage["module"], ALL, NONE, "half", half(hires))
        if bar is not None:
            bar.update()

    return table_of(rows_of(i) for i in range(len(images)))


def share_under(values: Float[np.ndarray, "H W"], mask: Float[np.ndarray, "H W"]) -> float:
    """Share of a map that lies under a mask; 0 of a map that is zero everywhere."""
    total = values.sum(dtype=np.float64)
    return float((values * mask).sum(dtype=np.float64) / total) if total else 0.0


def half(values: Float[np.ndarray, "H W"]) -> float:
    """The smallest part of the pixels that holds half of a map; 0 of a map that is zero everywhere."""
    largest = np.sort(values, axis=None)[::-1].cumsum(dtype=np.float64)
    return float((np.searchsorted(largest, largest[-1] / 2) + 1) / values.size) if largest[-1] else 0.0


def receptive_field(
    model: nn.Module, images: Iterable[Float[Tensor, "C H W"]], *, stage: int = -1
) -> Float[np.ndarray, "H W"]:
    """How much each pixel contributes to the centre of a stage's map, the mean over images (RepLKNet's rule).

    The slope of the sum of the centre's positive features, where positive, summed over the channels of the image. The
    centre is the central cell; along a side of even length it is two, so that it is the centre of the image always.
    images: what the model sees, normalised, all of one size. Raises TypeError, ValueError for wrong arguments.
    Source: Luo et al., 2016; Ding et al., 2022; DeBiFormer figure 5.
    """
    total, count = None, 0
    stage_of(model, stage)
    number = range(len(stages(model)))[stage]
    with evaluating(model), torch.enable_grad():
        for image in images:
            x = checked(image)[None].clone().requires_grad_()
            (features,) = model.forward_intermediates(x, indices=[number], intermediates_only=True)
            h, w = features.shape[-2:]
            centre = features[0, :, (h - 1) // 2 : h // 2 + 1, (w - 1) // 2 : w // 2 + 1]
            (slope,) = torch.autograd.grad(centre.relu().sum(), x)
            field = slope[0].relu().sum(dim=0).double()
            total, count = field if total is None else total + field, count + 1
    if total is None:
        raise ValueError("images: expected at least one image, got none")
    return (total / count).cpu().numpy()


def contribution(field: Float[np.ndarray, "H W"], shares: Sequence[float] = SHARES) -> dict[float, float]:
    """The side of the smallest central square that holds a share of a receptive field, over the side of the image.

    Of a field that is zero everywhere every side is NaN. Raises ValueError for a field with a value below 0.
    """
    if field.ndim != 2 or not (field >= 0).all():
        raise ValueError(f"field: expected values of at least 0 in two dimensions, got {field.ndim} dimensions")
    H, W = field.shape
    away = np.maximum(np.abs(np.arange(H) - (H - 1) / 2)[:, None] / H, np.abs(np.arange(W) - (W - 1) / 2) / W)
    order = np.argsort(away, axis=None, kind="stable")
    inside = np.cumsum(field.flat[order]) / field.sum() if field.sum() else np.full(field.size, np.nan)
    sides = 2 * away.flat[order] + 1 / max(H, W)  # a square that ends at the outer rim of the pixel
    return {
        share: float(sides[np.argmax(inside >= share - 1e-12)]) if field.sum() else float("nan") for share in shares
    }


def checked(image: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
    """An image as the model sees it; raises TypeError, ValueError for anything else."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: expected a normalised floating tensor, such as trace(...).image, got {kind}")
    if image.ndim != 3:
        raise ValueError(f"image: expected shape (C, H, W), got {tuple(image.shape)}")
    return image
