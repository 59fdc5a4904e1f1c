"""`Shapes`: silhouettes before photographs, drawn from a seed, with masks. Small models learn it in a minute."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from .photographs import SPLITS, photograph, photographs

LEVELS = ("easy", "cluttered")
VERSION = 2  # goes up whenever an item looks different: caches of other versions are not used

SKETCH = 64  # what depends on pixels is decided on a sketch of this side: `size` changes the resolution, not the scene
SUPERSAMPLE = 3
PHOTO_SIDE = 256  # photographs are kept at this shorter side: a crop of half of it fills 128 pixels
AREA = (0.09, 0.18)  # of the whole object, as a share of the image
VISIBLE = 0.75  # the least share of the object inside the frame
FRAGMENT_AREA, LEAST_FRAGMENT = (0.03, 0.09), 0.01  # of a distractor, whole; and what must be left of it in the frame

Points = Float[np.ndarray, "_ 2"]  # (x, y)
Colour = Float[np.ndarray, " 3"]  # red, green, blue from 0 to 255
Outline = list[tuple[Points, bool]]  # polygons drawn one over the other; False cuts out


# ---------------------------------------------------------------- silhouettes


def _ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, points: int = 40) -> Points:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([rx * np.cos(angle), ry * np.sin(angle)], axis=1) @ _rotation(turn) + (x, y)


def _rotation(turn: float) -> Float[np.ndarray, "2 2"]:
    return np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _polygon(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=float)


def _ring(rng: Generator) -> Outline:
    inner = rng.uniform(0.5, 0.62)
    return [(_ellipse(0.0, 0.0, 1.0, 1.0), True), (_ellipse(0.0, 0.0, inner, inner), False)]


def _star(rng: Generator) -> Outline:
    radius = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.46))
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    return [(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), True)]


def _cross(rng: Generator) -> Outline:
    w = rng.uniform(0.26, 0.36)
    bar = _polygon((-1.0, -w), (1.0, -w), (1.0, w), (-1.0, w))
    return [(bar, True), (bar[:, ::-1], True)]


def _heart(rng: Generator) -> Outline:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(np.stack([16 * np.sin(t) ** 3, -y * rng.uniform(0.95, 1.1)], axis=1) / 16, True)]


def _crescent(rng: Generator) -> Outline:
    return [(_ellipse(0.0, 0.0, 1.0, 1.0), True), (_ellipse(rng.uniform(0.4, 0.52), 0.0, 0.84, 0.84), False)]


def _arrow(rng: Generator) -> Outline:
    w, neck, barb = rng.uniform(0.17, 0.24), rng.uniform(-0.05, 0.15), rng.uniform(0.6, 0.75)
    return [(_polygon((-1.0, -w), (neck, -w), (neck, -barb), (1.0, 0.0), (neck, barb), (neck, w), (-1.0, w)), True)]


def _fish(rng: Generator) -> Outline:
    x = np.linspace(-0.75, 1, 24)
    belly = rng.uniform(0.42, 0.52) * np.sin(np.pi * ((x + 0.75) / 1.75)) ** 0.8
    body = np.concatenate([np.stack([x, -belly], 1), np.stack([x, belly], 1)[::-1]])
    fork = rng.uniform(0.42, 0.55)
    tail = _polygon((-0.5, 0.0), (-1.1, -fork), (-0.92, 0.0), (-1.1, fork))
    fin = _polygon((0.35, -0.35), (-0.25, -0.72), (-0.3, -0.3))
    return [(body, True), (tail, True), (fin, True)]


def _bird(rng: Generator) -> Outline:
    lift = rng.uniform(0.8, 1.1)
    return [
        (_ellipse(0.05, 0.1, 0.6, 0.27, -0.2), True),
        (_ellipse(0.68, -0.1, 0.22, 0.22), True),
        (_polygon((0.82, -0.22), (1.15, -0.05), (0.84, 0.05)), True),
        (_polygon((-0.3, 0.05), (-1.1, 0.1), (-0.98, 0.28), (-1.08, 0.42), (-0.3, 0.35)), True),
        (_polygon((0.35, 0.05), (0.05, -0.6 * lift), (-0.6, -lift), (-0.45, -0.5 * lift), (-0.3, 0.15)), True),
    ]


def _tree(rng: Generator) -> Outline:
    w = rng.uniform(0.6, 0.75)
    crowns = [(-1.0, -0.25, 0.62 * w), (-0.62, 0.2, 0.82 * w), (-0.2, 0.7, w)]
    return [(_polygon((0.0, top), (half, foot), (-half, foot)), True) for top, foot, half in crowns] + [
        (_polygon((-0.13, 0.6), (0.13, 0.6), (0.13, 1.0), (-0.13, 1.0)), True)
    ]


def _cat(rng: Generator) -> Outline:
    ear = rng.uniform(0.9, 1.0)
    angle = np.linspace(0.5 * np.pi, -0.15 * np.pi, 16)
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    tail = np.concatenate([0.56 * arc, 0.38 * arc[::-1]]) + (0.45, 0.42)
    return [
        (_ellipse(0.0, 0.45, 0.46, 0.56), True),
        (_polygon((-0.42, 0.98), (-0.44, 0.5), (0.44, 0.5), (0.42, 0.98)), True),
        (_ellipse(0.0, -0.36, 0.4, 0.36), True),
        (_polygon((-0.4, -0.38), (-0.4, -ear), (-0.06, -0.62)), True),
        (_polygon((0.4, -0.38), (0.4, -ear), (0.06, -0.62)), True),
        (tail, True),
    ]


class _Kind(NamedTuple):
    outline: Callable[[Generator], Outline]
    turn: float  # the largest rotation either way, in degrees, that leaves the class what it is


_KINDS = {
    "ring": _Kind(_ring, 180),
    "star": _Kind(_star, 25),
    "cross": _Kind(_cross, 20),
    "heart": _Kind(_heart, 20),
    "crescent": _Kind(_crescent, 30),
    "arrow": _Kind(_arrow, 30),
    "fish": _Kind(_fish, 20),
    "bird": _Kind(_bird, 15),
    "tree": _Kind(_tree, 12),
    "cat": _Kind(_cat, 12),
}
CLASSES = tuple(_KINDS)


def _draw(outline: Outline, side: int) -> Image.Image:
    """The outline, whose frame is the unit square, as a picture of 0 and 255 without smooth edges."""
    picture = Image.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    for polygon, ink in outline:
        pen.polygon((polygon * side - 0.5).ravel().tolist(), fill=255 * ink)
    return picture


def _share(picture: Image.Image) -> float:
    return np.count_nonzero(picture) / (picture.width * picture.height)


def _moved(outline: Outline, matrix: Float[np.ndarray, "2 2"], shift: Float[np.ndarray, " 2"]) -> Outline:
    return [(polygon @ matrix + shift, ink) for polygon, ink in outline]


def _silhouette(name: str, area: float, rng: Generator) -> Outline:
    """A silhouette of this area, turned and stretched at random, placed uniformly with enough of it in the frame."""
    kind = _KINDS[name]
    aspect = np.exp(rng.uniform(-0.2, 0.2))
    turn = np.radians(rng.uniform(-kind.turn, kind.turn))
    mirror = rng.choice([-1.0, 1.0])
    matrix = np.diag([mirror * aspect, 1 / aspect]) @ _rotation(turn)
    outline = _moved(kind.outline(rng), matrix, np.zeros(2))
    unit = _moved(outline, np.eye(2) / 4, np.full(2, 0.5))
    outline = _moved(outline, np.eye(2) / 4 * np.sqrt(area / _share(_draw(unit, 2 * SKETCH))), np.zeros(2))
    while True:
        placed = _moved(outline, np.eye(2), rng.uniform(0, 1, 2))
        if _share(_draw(placed, SKETCH)) >= VISIBLE * area:
            return placed


def _points(outline: Outline) -> Points:
    return np.concatenate([polygon for polygon, ink in outline if ink])


def _smooth(outline: Outline, size: int) -> Image.Image:
    return _draw(outline, SUPERSAMPLE * size).reduce(SUPERSAMPLE)


# ---------------------------------------------------------------- photographs and colours


class _Patch(NamedTuple):
    """A crop of a photograph: which, where, and what is done to it. `_develop` makes the picture."""

    name: str
    box: tuple[float, float, float, float]
    mirror: bool
    tint: tuple[tuple[int, int, int], ...]  # black, middle and white of a grey photograph
    gain: Float[np.ndarray, " 3"]  # of the channels


@cache
def _reduced(name: str) -> Image.Image:
    picture = photograph(name)
    shrink = PHOTO_SIDE / min(picture.size)
    picture = picture.resize([round(side * shrink) for side in picture.size], Image.Resampling.LANCZOS)
    return picture.convert("L") if _is_grey(picture) else picture


def _is_grey(picture: Image.Image) -> bool:
    pixels = np.asarray(picture)
    return bool((pixels[..., :1] == pixels).all())


def _patch(split: str, rng: Generator) -> _Patch:
    name = str(rng.choice(photographs(split)))
    width, height = _reduced(name).size
    side = min(width, height) * rng.uniform(0.5, 1.0)
    x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
    hue, strength = rng.uniform(), rng.uniform(0.1, 0.5)
    tint = tuple(_rgb(hue, strength * most, value) for most, value in ((0.9, 0.12), (0.8, 0.55), (0.25, 0.97)))
    gain = rng.uniform(0.85, 1.12) * rng.uniform(0.95, 1.05, 3)
    return _Patch(name, (x, y, x + side, y + side), bool(rng.integers(2)), tint, gain)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    chroma = [abs((hue + turn) % 1 * 6 - 3) - 1 for turn in (0, 2 / 3, 1 / 3)]
    return tuple(round(255 * value * (1 - saturation * (1 - min(max(c, 0), 1)))) for c in chroma)


def _develop(patch: _Patch, size: int) -> Image.Image:
    picture = _reduced(patch.name).resize((size, size), Image.Resampling.BILINEAR, box=patch.box)
    if patch.mirror:
        picture = ImageOps.mirror(picture)
    if picture.mode == "L":
        black, middle, white = patch.tint
        picture = ImageOps.colorize(picture, black, white, middle)
    levels = np.minimum(np.arange(256) * patch.gain[:, None], 255).round().astype(int)
    return picture.point(levels.ravel().tolist())


def _contrasting(colour: Colour, saturation: tuple[float, float], least: float, rng: Generator) -> Colour:
    """A random colour at least so far from the given one; the farthest of a dozen where none is."""
    tries = np.array([_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(0.5, 1.0)) for _ in range(12)])
    distance = np.sqrt(((tries - colour) ** 2 * (0.9, 1.6, 0.5)).sum(1))  # green weighs most, as for the eye
    far = np.flatnonzero(distance >= least)
    return tries[far[0] if far.size else distance.argmax()].astype(float)


def _gradient(first: Colour, second: Colour, turn: float, outline: Outline, size: int) -> Image.Image:
    """From one colour to the other across the object, in the direction `turn`."""
    across = np.array([np.cos(turn), np.sin(turn)])
    along = _points(outline) @ across
    low, high = along.min(), along.max()
    centre = (np.arange(size) + 0.5) / size
    ramp = np.clip((centre * across[0] + (centre * across[1])[:, None] - low) / (high - low), 0, 1)
    return Image.fromarray((first + ramp[..., None] * (second - first)).round().astype(np.uint8))


def _textured(patch: _Patch, colour: Colour, size: int) -> Image.Image:
    """A photograph's texture around another mean colour."""
    texture = np.asarray(_develop(patch, size), dtype=np.float32)
    texture = texture - texture.mean((0, 1)) + colour
    return Image.fromarray(np.clip(texture, 0, 255).round().astype(np.uint8))


# ---------------------------------------------------------------- scenes


def _behind(background: _Patch, outline: Outline) -> Colour:
    """Mean colour of the background where the object will stand."""
    under = np.asarray(_draw(outline, SKETCH)) > 0
    return np.asarray(_develop(background, SKETCH))[under].mean(0)


def _easy(outline: Outline, split: str, size: int, rng: Generator) -> tuple[Image.Image, Image.Image]:
    """Blurred background, and the object in bright colours, one or two of them."""
    background = _patch(split, rng)
    colour = _contrasting(_behind(background, outline), (0.55, 0.95), 170.0, rng)
    fill = _gradient(colour, colour * rng.uniform(0.7, 1.0), rng.uniform(0, 2 * np.pi), outline, size)
    blur = ImageFilter.GaussianBlur(rng.uniform(0.02, 0.045) * size)
    return _develop(background, size).filter(blur), fill


def _cluttered(outline: Outline, name: str, split: str, size: int, rng: Generator) -> tuple[Image.Image, Image.Image]:
    """Sharp background with four to seven fragments of other silhouettes, and the object's texture, like theirs."""
    background = _patch(split, rng)

    def fill(place: Outline) -> Image.Image:
        colour = _contrasting(_behind(background, place), (0.1, 0.7), 60.0, rng)
        return _textured(_patch(split, rng), colour, size)

    picture = _develop(background, size)
    others = [other for other in CLASSES if other != name]
    for _ in range(rng.integers(4, 8)):
        fragment = _fragment(_silhouette(str(rng.choice(others)), rng.uniform(*FRAGMENT_AREA), rng), rng)
        picture.paste(fill(fragment), mask=_smooth(fragment, size))
    return picture, fill(outline)


def _fragment(outline: Outline, rng: Generator) -> Outline:
    """About half of a silhouette: the rest is cut off by a straight line."""
    points = _points(outline)
    low, high = points.min(0), points.max(0)
    while True:
        middle = (low + high) / 2 + rng.uniform(-0.1, 0.1, 2) * (high - low)
        half = (
            _polygon((-2.0, 0.0), (2.0, 0.0), (2.0, 4.0), (-2.0, 4.0)) @ _rotation(rng.uniform(0, 2 * np.pi)) + middle
        )
        fragment = [*outline, (half, False)]
        if _share(_draw(fragment, SKETCH)) >= LEAST_FRAGMENT:
            return fragment


def render(level: str, split: str, size: int, seed: int, index: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Item `index` as arrays: image uint8 (3, size, size), label, mask bool (size, size)."""
    rng = np.random.default_rng([VERSION, LEVELS.index(level), SPLITS.index(split), seed, index])
    label = index % len(CLASSES)
    outline = _silhouette(CLASSES[label], rng.uniform(*AREA), rng)
    if level == "easy":
        picture, fill = _easy(outline, split, size, rng)
    else:
        picture, fill = _cluttered(outline, CLASSES[label], split, size, rng)
    coverage = _smooth(outline, size)
    picture.paste(fill, mask=coverage)
    return np.asarray(picture).transpose(2, 0, 1).copy(), label, np.asarray(coverage) >= 128


class Shapes(Dataset):
    """Ten classes of silhouettes before photographs: item i -> (image uint8 (3, S, S), label, mask bool (S, S)).

    `level`: "easy" (a brightly coloured object before a blurred photograph) or "cluttered" (a textured object
    before a sharp photograph, among four to seven fragments of other silhouettes). `split`: "train" or "test", of
    different photographs. `size`: the side in pixels, at least 32. `count`: the number of items. `seed`: >= 0.
    Objects stand anywhere, also partly outside the frame. An item is a function of level, split, size, seed and i.
    Raises ValueError or TypeError for arguments out of range. Source: ours; no paper has it.
    """

    def __init__(self, level="easy", split="train", size=128, count=6000, seed=0) -> None:
        _expect("level", level, LEVELS)
        _expect("split", split, SPLITS)
        for name, value, least in (("size", size, 32), ("count", count, 1), ("seed", seed, 0)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.level, self.split, self.size, self.count, self.seed = level, split, int(size), int(count), int(seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 S S"], int, Bool[Tensor, "S S"]]:
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0 to {self.count - 1}, got {index}")
        image, label, mask = render(self.level, self.split, self.size, self.seed, int(index))
        return torch.from_numpy(image), label, torch.from_numpy(mask)


def _expect(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
