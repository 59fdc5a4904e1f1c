"""Dense prediction: decoders that make a prediction for every pixel from a backbone's maps, and how they are used."""

from dynattn.dense.inference import SCALES, measure, predict
from dynattn.dense.metrics import intersection_over_union
from dynattn.dense.setr import ConvHead, MapHead, MultiLevelHead, ProgressiveHead, resize

__all__ = [
    "ConvHead",
    "MapHead",
    "MultiLevelHead",
    "ProgressiveHead",
    "SCALES",
    "intersection_over_union",
    "measure",
    "predict",
    "resize",
]
