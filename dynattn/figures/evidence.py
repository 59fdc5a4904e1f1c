"""What the answer of a network rests on, for any model with stages: class activation maps, and the receptive field.

Both take what the model sees: a normalised image, as `trace(model, photograph).image` has it. The model may be one of
ours or of timm; a stage is an entry of its `feature_info`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dynattn import core
from dynattn.tracing import evaluating

METHODS = ("hires", "grad")
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


def as_map(features: Tensor, channels: int, shape: tuple[int, int]) -> Float[Tensor, "B c h w"]:
    """Features of a stage as a map of channels, from (B, h, w, c), (B, c, h, w), or tokens (B, n, c) with others first.

    channels: c. shape: (h, w), which tokens need. Raises ValueError for features of another form.
    """
    if features.ndim == 4 and features.shape[-1] == channels:
        return rearrange(features, "B h w c -> B c h w")
    if features.ndim == 4 and features.shape[1] == channels:
        return features
    h, w = shape
    if features.ndim == 3 and features.shape[-1] == channels and features.shape[1] >= h * w:
        return rearrange(features[:, -h * w :], "B (h w) c -> B c h w", h=h)
    raise ValueError(f"stage: expected a map of {channels} channels, got {tuple(features.shape)}")


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
    try:
        from pytorch_grad_cam import GradCAM, HiResCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError("class maps need the package grad-cam: pip install 'dynattn[vision]'") from error
    core.one_of("method", method, METHODS)
    about, image = stage_of(model, stage), checked(image)
    shape = tuple(-(-side // about["reduction"]) for side in image.shape[-2:])
    kinds = {"hires": HiResCAM, "grad": GradCAM}
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    with evaluating(model), torch.enable_grad():
        with kinds[method](
            model=model,
            target_layers=[model.get_submodule(about["module"])],
            reshape_transform=lambda features: as_map(features, about["num_chs"], shape),
        ) as cam:
            x = image[None].clone().requires_grad_()  # so that a model whose parameters are frozen has a graph
            found = cam(x, None if label is None else [ClassifierOutputTarget(label)])[0]
    for name, parameter in model.named_parameters():
        parameter.grad = kept[name]
    return found


def receptive_field(
    model: nn.Module, images: Iterable[Float[Tensor, "C H W"]], *, stage: int = -1
) -> Float[np.ndarray, "H W"]:
    """How much each pixel contributes to the central cell of a stage's map, the mean over images (RepLKNet's rule).

    The slope of the sum of the cell's positive features, where positive, summed over the channels of the image.
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
            (slope,) = torch.autograd.grad(features[0, :, h // 2, w // 2].relu().sum(), x)
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
