"""What a model is trained for: the answers to the images, the loss, and how well it does.

    classification   which shape an image shows                  ten classes, accuracy
    segmentation     which shape every pixel belongs to, if any  eleven classes, mean intersection over union

A model for segmentation that has auxiliary heads answers `model(images, aux=True)` with its logits and a list of
theirs; each of these adds its loss times `model.aux_weight`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ..data import CLASSES, normalise
from ..dense.metrics import intersection_over_union, need_torchmetrics

Images = UInt8[np.ndarray, "n 3 H W"]
Truth = Int[np.ndarray, " n"] | UInt8[np.ndarray, "n H W"]  # a class for each image, or for each pixel


@dataclass(frozen=True)
class Task:
    """A kind of prediction.

    classes: their names.  truth(labels, masks): what is to be predicted, from what the data set says of its images.
    loss(model, unwrapped, images, truth, smoothing): the loss and the accuracy of a batch.
    evaluate(model, images, truth): what was measured on all of them, by name, the measure that counts first.
    """

    classes: tuple[str, ...]
    truth: Callable[[Int[np.ndarray, " n"], Bool[np.ndarray, "n H W"]], Truth]
    loss: Callable[[nn.Module, nn.Module, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    evaluate: Callable[[nn.Module, Images, Truth], dict[str, float]]


def batches(
    model: nn.Module, images: Images, truth: Truth, batch: int
) -> Iterator[tuple[Float[Tensor, "b K ..."], Int[Tensor, "b ..."]]]:
    """The model's logits and the truth, a batch at a time; leaves the model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    for first in range(0, len(truth), batch):
        answers = torch.from_numpy(truth[first : first + batch]).to(device).long()
        yield model(normalise(torch.from_numpy(images[first : first + batch])).to(device)).float(), answers


# ------------------------------------------------------------------------------------------------------ classification


def classify(
    model: nn.Module,
    unwrapped: nn.Module,
    images: Float[Tensor, "b 3 H W"],
    labels: Int[Tensor, " b"],
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of a batch."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss, (logits.argmax(1) == labels).float().mean()


@torch.inference_mode()
def evaluate(model: nn.Module, images: Images, labels: Int[np.ndarray, " n"], batch: int = 250) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over all images; leaves the model in evaluation mode."""
    correct, loss = 0, 0.0
    for logits, answers in batches(model, images, labels, batch):
        correct += (logits.argmax(1) == answers).sum().item()
        loss += F.cross_entropy(logits, answers, reduction="sum").item()
    return correct / len(labels), loss / len(labels)


def evaluate_classification(model: nn.Module, images: Images, labels: Truth) -> dict[str, float]:
    """Accuracy and loss."""
    return dict(zip(("accuracy", "loss"), evaluate(model, images, labels), strict=True))


# -------------------------------------------------------------------------------------------------------- segmentation


def class_maps(labels: Int[np.ndarray, " n"], masks: Bool[np.ndarray, "n H W"]) -> UInt8[np.ndarray, "n H W"]:
    """The class of every pixel: 0 where there is no object, and the shape's number and 1 on it.

    Raises ImportError, before anything is trained, where torchmetrics is missing, which measures it.
    """
    need_torchmetrics()
    return masks * (labels + 1).astype(np.uint8)[:, None, None]


def segment(
    model: nn.Module, unwrapped: nn.Module, images: Float[Tensor, "b 3 H W"], maps: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of pixels, with that of the auxiliary heads, and the share of pixels that are right."""
    maps, weight = maps.long(), getattr(unwrapped, "aux_weight", None)
    logits, others = (model(images), []) if weight is None else model(images, aux=True)
    loss = F.cross_entropy(logits, maps, label_smoothing=smoothing)
    for other in others:
        loss = loss + weight * F.cross_entropy(other, maps, label_smoothing=smoothing)
    return loss, (logits.argmax(1) == maps).float().mean()


@torch.inference_mode()
def evaluate_segmentation(model: nn.Module, images: Images, maps: Truth) -> dict[str, float]:
    """Mean IoU, the share of pixels that are right, and the loss."""
    measured = []

    def answers():
        for logits, truth in batches(model, images, maps, batch=50):
            predicted = logits.argmax(1)
            measured.append(((predicted == truth).sum().item(), F.cross_entropy(logits, truth, reduction="sum").item()))
            yield predicted, truth

    mean, _ = intersection_over_union(answers(), len(TASKS["segmentation"].classes))
    correct, loss = np.sum(measured, axis=0) / maps.size
    return {"mean_iou": mean, "accuracy": float(correct), "loss": float(loss)}


TASKS = {
    "classification": Task(CLASSES, lambda labels, masks: labels, classify, evaluate_classification),
    "segmentation": Task(("background", *CLASSES), class_maps, segment, evaluate_segmentation),
}
