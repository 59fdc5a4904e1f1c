"""The test images that lessons show, and those that they measure on."""

from dataclasses import replace
from functools import cache

from dynattn.figures.subjects import Picture, test_picture
from dynattn.lessons.controls import choice

IMAGES = (27, 22, 9, 1)  # test images, chosen for their places and backgrounds, not by what a model makes of them
QUERY = (108.0, 60.0)  # a pixel (row, col) in the background of the first
SIDE = 128  # of the images, in pixels
MEASURED = 24  # test images that the verdict takes


@cache
def picture(index: int) -> Picture:
    """A test image as the models see it, and sharper, to be shown."""
    found = test_picture(index, (SIDE, SIDE))
    return replace(found, shown=found.shown[::2, ::2], mask=found.mask[::2, ::2])  # small, to be drawn fast


def image_choice() -> object:
    """Buttons for the test images."""
    return choice(*[(picture(i).name.split("(")[1].rstrip(")"), i) for i in IMAGES])
