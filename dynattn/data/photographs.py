"""Sample photographs that come with scikit-image and scikit-learn: which, whose, under what licence."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .images import read_image


class Credit(NamedTuple):
    """Where a photograph comes from, as the wheel that holds it states."""

    name: str
    title: str
    author: str
    licence: str
    source: str
    package: str
    file: str
    split: str


# Only what is stated to be in the public domain, CC0 or CC BY. Which photographs are held out is decided here, once:
# a test item shows none of the photographs that a training item shows, neither behind the object nor on it.
_CREDITS = (
    Credit("astronaut", "Astronaut Eileen Collins", "NASA", "public domain",
           "NASA Great Images database, https://flic.kr/p/r9qvLn", "skimage", "data/astronaut.png", "train"),
    Credit("brick", "Brick wall", "CC0Textures", "CC0",
           "https://cc0textures.com/view.php?tex=Bricks25", "skimage", "data/brick.png", "train"),
    Credit("china", "Pagoda, China", "danielbuechele", "CC BY 2.0",
           "https://www.flickr.com/photos/danielbuechele/6061409035", "sklearn", "datasets/images/china.jpg", "train"),
    Credit("coffee", "Coffee cup, courtesy of Pikolo Espresso Bar", "Rachel Michetti", "CC0",
           "scikit-image", "skimage", "data/coffee.png", "train"),
    Credit("gravel", "Gravel", "CC0Textures", "CC0",
           "https://cc0textures.com/view.php?tex=Gravel04", "skimage", "data/gravel.png", "train"),
    Credit("hubble", "Hubble eXtreme Deep Field", "NASA", "public domain",
           "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
           "skimage", "data/hubble_deep_field.jpg", "train"),
    Credit("rocket", "Launch photograph of DSCOVR on Falcon 9", "SpaceX", "public domain",
           "https://www.flickr.com/photos/spacexphotos/16511594820", "skimage", "data/rocket.jpg", "train"),
    Credit("camera", "Cameraman", "Lav Varshney", "CC0", "scikit-image", "skimage", "data/camera.png", "test"),
    Credit("chelsea", "Chelsea the cat", "Stefan van der Walt", "CC0",
           "scikit-image", "skimage", "data/chelsea.png", "test"),
    Credit("flower", "Dahlia", "vultilion", "CC BY 2.0",
           "https://www.flickr.com/photos/vultilion/6056698931", "sklearn", "datasets/images/flower.jpg", "test"),
    Credit("grass", "Grass", "linolafett", "CC0",
           "https://www.deviantart.com/linolafett/art/Grass-01-434853879", "skimage", "data/grass.png", "test"),
)  # fmt: skip
_BY_NAME = {credit.name: credit for credit in _CREDITS}
SPLITS = ("train", "test")


def photographs(split: str | None = None) -> list[str]:
    """Names of the sample photographs: all of them, or those of one split of `Shapes`.

    Raises ValueError for an unknown split.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected None or one of {SPLITS}, got {split!r}")
    return [credit.name for credit in _CREDITS if split in (None, credit.split)]


def photograph(name: str) -> Image.Image:
    """One sample photograph, RGB, at its own size; read from the installed package, never from the network.

    Raises ValueError for an unknown name, FileNotFoundError where the package or its file is not installed.
    """
    return _load(_credit(name)).copy()


def credits() -> list[Credit]:
    """Author, licence and source of every sample photograph, as the packages that hold them state it."""
    return list(_CREDITS)


def _credit(name: str) -> Credit:
    if name not in _BY_NAME:
        raise ValueError(f"name: expected one of {list(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]


@cache
def _load(credit: Credit) -> Image.Image:
    # The file is opened directly: importing the packages takes a second, and their fetchers may ask the network.
    spec = find_spec(credit.package)
    if spec is None:
        raise FileNotFoundError(f"the photograph {credit.name!r} comes with the package {credit.package!r}: install it")
    return read_image(Path(spec.submodule_search_locations[0], credit.file))
