"""The procedural data set `Shapes`, sample photographs, and the reading of pictures."""

from .cache import cached
from .images import MEAN, STD, augment, normalise, read_image, to_input, to_rgb
from .photographs import credits, photograph, photographs
from .shapes import CLASSES, Shapes

__all__ = [
    "CLASSES",
    "MEAN",
    "STD",
    "Shapes",
    "augment",
    "cached",
    "credits",
    "normalise",
    "photograph",
    "photographs",
    "read_image",
    "to_input",
    "to_rgb",
]
