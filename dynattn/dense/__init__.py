"""Dense prediction: decoders that make a prediction for every pixel from a backbone's maps, and how they are used."""

from dynattn.dense.setr import MultiLevelHead, ProgressiveHead, resize

__all__ = ["MultiLevelHead", "ProgressiveHead", "resize"]
