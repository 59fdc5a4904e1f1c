"""What another machine rounds differently is no change: measures and pictures held against those of the last time.

Networks answer a little differently on every kind of CPU, in the sixth digit or so. Drawn again there, a figure would
differ from the one that is kept, though nothing has changed. Numbers are therefore kept with four digits, and what
differs by no more than noise is left as it is, to the byte. To draw a picture anew in any case, delete it first.
"""

import io
import math
import re
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

DIGITS = 4
RELATIVE, ABSOLUTE = 2e-3, 1e-4  # of measures: a point or a query that falls to the other side moves a mean by less
LEVELS, SHARE = 32, 5e-5  # of 255 levels; of the pixels that may differ by more: a dot or a digit, not a word
DECIMAL = re.compile(r"(\d+\.\d+)")


def rounded(value: Any) -> Any:
    """The same with every float at four significant digits, in dicts and lists too."""
    if isinstance(value, float) and math.isfinite(value):
        return float(format(value, f".{DIGITS}g"))
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def alike(old: Any, new: Any) -> bool:
    """Whether two values are the same but for noise: the same keys, words and whole numbers, and floats that are close.

    Decimals in a text may differ by one in their last place.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(alike(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(alike, old, new))
    if isinstance(old, str) and isinstance(new, str):
        return alike_texts(old, new)
    if float in (type(old), type(new)) and {type(old), type(new)} <= {int, float}:
        return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=ABSOLUTE) or (old != old and new != new)
    return type(old) is type(new) and old == new


def alike_texts(old: str, new: str) -> bool:
    """The same words; decimals with as many places, and at most one apart in the last."""
    parts = list(zip(DECIMAL.split(old), DECIMAL.split(new), strict=False))
    if len(DECIMAL.split(old)) != len(DECIMAL.split(new)):
        return False
    words, decimals = parts[::2], parts[1::2]
    places = lambda text: len(text.partition(".")[2])  # noqa: E731
    close = lambda a, b: places(a) == places(b) and abs(float(a) - float(b)) < 1.5 * 10 ** -places(a)  # noqa: E731
    return all(a == b for a, b in words) and all(close(a, b) for a, b in decimals)


def alike_pictures(old: bytes, new: bytes) -> bool:
    """Whether two pictures of one size differ in few pixels only, or hardly; what is no picture is like none."""
    try:
        one, other = (np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"), np.int16) for content in (old, new))
    except (UnidentifiedImageError, OSError, SyntaxError):  # Pillow's own for a damaged file
        return False
    if one.shape != other.shape:
        return False
    return bool((np.abs(one - other).max(axis=-1) > LEVELS).mean() <= SHARE)
