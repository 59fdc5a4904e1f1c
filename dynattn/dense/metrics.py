"""Mean intersection over union, by torchmetrics."""

from collections.abc import Iterable
from importlib.util import find_spec

from jaxtyping import Float, Int
from torch import Tensor

from dynattn import core

IGNORED = 255  # the class of pixels that do not count, as data sets have it


def need_torchmetrics() -> None:
    """Raise ImportError, with what to install, unless torchmetrics is there."""
    if find_spec("torchmetrics") is None:
        raise ImportError("mean IoU is torchmetrics' work, which is not installed: pip install 'dynattn[vision]'")


def intersection_over_union(
    answers: Iterable[tuple[Int[Tensor, "*B H W"], Int[Tensor, "*B H W"]]], num_classes: int
) -> tuple[float, Float[Tensor, " K"]]:
    """The mean over classes, and the value of every class, of all predictions together.

    answers: pairs of predicted and true class indices, images or batches, in [0, num_classes); where the truth is 255
    a pixel does not count. A class that is neither predicted nor true anywhere has 0 and is left out of the mean.
    Raises ImportError where torchmetrics is not installed, ValueError for pairs of different shapes or an index out of
    range.
    """
    core.positive("num_classes", num_classes)
    need_torchmetrics()
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = None
    for predicted, truth in answers:
        if predicted.shape != truth.shape:
            raise ValueError(
                f"answers: expected pairs of one shape, got {tuple(predicted.shape)}, {tuple(truth.shape)}"
            )
        counted = truth[truth != IGNORED]
        for name, values in (("predicted", predicted), ("true", counted)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
                span = f"{int(values.min())} to {int(values.max())}"
                raise ValueError(f"answers: expected {name} classes from 0 to {num_classes - 1}, got {span}")
        if metric is None:  # on the device of the answers; both read one table of counts
            made = {
                average: MulticlassJaccardIndex(num_classes, average=average, ignore_index=IGNORED, validate_args=False)
                for average in ("macro", "none")
            }
            metric = MetricCollection(made).to(predicted.device)
        metric.update(predicted.reshape(1, -1), truth.reshape(1, -1).long())
    if metric is None:
        raise ValueError("answers: expected at least one pair, got none")
    found = metric.compute()
    return float(found["macro"]), found["none"].cpu()
