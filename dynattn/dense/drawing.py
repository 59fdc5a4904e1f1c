"""Segmentations as pictures: the classes over the photograph with a legend, and the map of class numbers."""

import colorsys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.55  # of the classes over the photograph
LEGEND = 12  # classes in the legend, the largest ones


def palette(count: int) -> UInt8[np.ndarray, "count 3"]:
    """A colour for each class: hues a golden section apart, so that neighbouring numbers differ most."""
    colours = [
        colorsys.hsv_to_rgb(number * 0.618034 % 1, (0.85, 0.55, 0.7)[number % 3], (0.95, 0.8, 0.6)[number // 3 % 3])
        for number in range(count)
    ]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def label_picture(labels: Int[np.ndarray, "H W"], count: int) -> Image.Image:
    """A picture whose pixels are the class numbers, with a palette. Raises ValueError for more than 256 classes."""
    if count > 256:
        raise ValueError(f"count: expected at most 256 classes, which a picture with a palette holds, got {count}")
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(palette(count).ravel().tolist())
    return picture


def shares(labels: Int[np.ndarray, "H W"], count: int) -> list[tuple[int, float]]:
    """The classes that are there, with their share of the pixels, the largest first."""
    found = np.bincount(labels.ravel(), minlength=count) / labels.size
    return [(int(number), float(found[number])) for number in np.argsort(-found, kind="stable") if found[number] > 0]


def overlay(photograph: Image.Image, labels: Int[np.ndarray, "H W"], names: Sequence[str]) -> Image.Image:
    """The classes in colours over the photograph, and below it the names of the largest. Both have the same size."""
    colours = palette(len(names))
    mixed = (1 - OPACITY) * np.asarray(photograph.convert("RGB")) + OPACITY * colours[labels]
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    size = max(12, picture.height // 30)
    font, step = ImageFont.load_default(size), round(1.6 * size)
    lines = [(number, f"{names[number]}  {share:.0%}") for number, share in shares(labels, len(names))[:LEGEND]]
    wide = max(font.getlength(text) for _, text in lines) + 2.2 * step
    columns = max(1, int(picture.width // wide))
    rows = -(-len(lines) // columns)
    width = max(picture.width, round(wide))
    page = Image.new("RGB", (width, picture.height + rows * step + step // 2), "white")
    page.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(page)
    for place, (number, text) in enumerate(lines):
        x = place % columns * width / columns + step / 2
        y = picture.height + step / 4 + place // columns * step
        pen.rectangle((x, y + 0.2 * size, x + size, y + 1.2 * size), fill=tuple(colours[number].tolist()))
        pen.text((x + 1.4 * size, y), text, fill="black", font=font)
    return page.quantize(256, dither=Image.Dither.NONE)
