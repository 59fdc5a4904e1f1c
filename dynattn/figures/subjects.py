"""What is drawn: a model with the story of its weights, and pictures with what the model sees of them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from dynattn import create_model, weights
from dynattn.data import CLASSES, Shapes, credits, normalise, photograph, read_image, to_input
from dynattn.models.registry import check_name
from dynattn.official import model_from

SHARP = 512  # side at which test images are drawn: `Shapes` has the same scene at any size
TEST_COUNT = 1000  # items of the test split, as training tests on
RANDOM, SEED = "random weights", "seed "
BACKGROUND = "background"  # the class of pixels without an object
CROPS = {"chelsea": (110, 0, 410, 300), "flower": (120, 0, 547, 427)}  # squares around the subject


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, how to make one like it, and where its weights come from."""

    model: nn.Module
    name: str
    arguments: dict[str, Any]
    story: dict[str, Any]  # file, and what the checkpoint says of itself: command, seed, steps, accuracy
    shipped: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images it is made for."""
        side = getattr(self.model, "img_size", None) or self.arguments.get("img_size", 224)
        return (side, side) if isinstance(side, int) else tuple(side)

    @property
    def knows_shapes(self) -> bool:
        """Whether its classes are those of the test images, of whole images or of pixels."""
        return [name for name in self.story.get("classes", ()) if name != BACKGROUND] == list(CLASSES)


def load_subject(file: str | Path | None = None, name: str | None = None) -> Subject:
    """The model of a checkpoint file, or the one that ships under `name`.

    Raises FileNotFoundError, ValueError where there is no such checkpoint, or where it is of another model than `name`.
    """
    if name is not None:
        check_name(name)
    own = file is None
    file = weights.path(name) if own else Path(file)
    try:
        found, model = model_from(file, name)
    except (ValueError, FileNotFoundError) as error:  # in the words of who gave the file
        raise type(error)(
            re.sub(r"^(path_or_state_dict|state_dict|file|state): ", "weights (--weights): ", str(error))
        ) from error
    if name not in (None, found):
        raise ValueError(f"model: expected {found}, which is what {file} holds, got {name!r}")
    if file.suffix == ".safetensors":
        story = weights.read(file)[1]
        arguments = story["arguments"]
    else:
        story, arguments = {}, {"num_classes": model.num_classes, "img_size": model.img_size}
    told = ("command", "seed", "steps", "accuracy", "mean_iou", "classes")
    story = {"file": file.name, "model": found} | {key: story[key] for key in told if key in story}
    return Subject(model, found, arguments, story, own)


def random_twin(subject: Subject, seed: int, images: UInt8[np.ndarray, "n 3 H W"], **changes) -> nn.Module:
    """The same architecture with random weights, in eval mode; `changes` are arguments of its own.

    Batch norms take their statistics from `images`: with those of no image at all, no signal would get through.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(subject.name, **subject.arguments | changes)
    return with_statistics(model, images)


def with_statistics(model: nn.Module, images: UInt8[np.ndarray, "n 3 H W"]) -> nn.Module:
    """The model itself in eval mode, whose batch norms have taken their statistics from `images`."""
    model.eval()
    with torch.no_grad():
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # the mean over all batches; here there is one
            norm.train()
        if norms:
            model(normalise(torch.from_numpy(np.array(images))))
    return model.eval()


@dataclass(frozen=True)
class Picture:
    """One picture: what the model sees, what is shown, where the object is and its class (None where nobody knows)."""

    name: str
    x: Float[Tensor, "3 H W"]
    shown: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None = None
    label: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of what the model sees."""
        return tuple(self.x.shape[-2:])


def test_split(side: int, large: int, level: str = "easy") -> Shapes:
    """The test images at a size; of images larger than 128 pixels the first `large`."""
    return Shapes(level, "test", side, TEST_COUNT if side <= 128 else large)


def test_picture(index: int, size: tuple[int, int], level: str = "easy") -> Picture:
    """A test image of `Shapes`, shown sharper than the model sees it."""
    seen, label, _ = Shapes(level, "test", max(size), TEST_COUNT)[index]
    shown, _, mask = Shapes(level, "test", SHARP, TEST_COUNT)[index]
    shown = shown.movedim(0, -1).numpy()
    return Picture(f"test image {index} ({CLASSES[label]})", to_input(seen, size)[0], shown, mask.numpy(), label)


def sample_picture(name: str, size: tuple[int, int]) -> Picture:
    """A sample photograph, cut to a square around its subject."""
    credit = next(credit for credit in credits() if credit.name == name)
    cut = photograph(name).crop(CROPS[name])
    return Picture(f"{credit.title} ({credit.author}, {credit.licence})", to_input(cut, size)[0], np.array(cut))


def own_picture(file: str | Path, size: tuple[int, int]) -> Picture:
    """A photograph of the user's, whole; the model sees it as a square, as the paper evaluates.

    Raises what `read_image` raises.
    """
    picture = read_image(file)
    shown = picture.copy()
    shown.thumbnail((1400, 1400))
    name = Path(file).name if isinstance(file, str | Path) else "the given image"
    return Picture(name, to_input(picture, size)[0], np.array(shown))


def squeezed(picture: Picture) -> str:
    """What happens to a picture of another shape than the model sees, in words; empty where nothing does."""
    (h, w), (H, W) = picture.shown.shape[:2], picture.shape
    ratio = (w / h) / (W / H)
    if abs(ratio - 1) < 0.01:
        return ""
    side, by = ("width", ratio) if ratio > 1 else ("height", 1 / ratio)
    return f"The model sees the whole photograph at {H} × {W}, its {side} squeezed by {by:.2f}"
