"""What all tests share: shapes checked at run time, one thread, the same seed, the published models' outputs.

Annotations such as Float[Tensor, "B C H W"] cost a reader nothing; here an import hook makes every call of the modules
below check them. It has to be set before dynattn is imported, hence at the top of this file. Kernels are left out:
numba cannot compile what the hook wraps. DYNATTN_CHECK_SHAPES=0 turns it off, e.g. for torch.compile, which refuses
the checks; the fixture `unchecked` turns it off for one test, so that bad input reaches the library's own checks.
"""

import os

import torch

# Where there is no GPU, Triton's kernels run in Triton's interpreter, which must be told before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from jaxtyping import config, install_import_hook  # noqa: E402

CHECKED = ["core", "tracing", "mechanisms", "ops", "models", "verify"]
if os.environ.get("DYNATTN_CHECK_SHAPES", "1") != "0":
    install_import_hook([f"dynattn.{module}" for module in CHECKED], "checking.check")

from pathlib import Path  # noqa: E402  (whatever could import dynattn comes after the hook)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

OFFICIAL = Path(__file__).parents[2] / "shared" / "official"


def pytest_report_header() -> str:
    """What the tests of Triton's kernels run on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: its interpreter, on the CPU"
    return f"GPU for Triton's kernels: {gpu}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks beside the tests are slow, and so is a browser; alone (`pytest notebooks`) they run."""
    for item in items:
        if item.path.suffix == ".ipynb" or item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def reproducible() -> None:
    """One thread, so that tests side by side do not fight for cores and sums have one order; one seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """No shape checks by annotation: for bad input, which the library itself must refuse."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def photograph(tmp_path) -> Path:
    """A user's photograph, wider than high."""
    pixels = np.random.default_rng(0).integers(0, 255, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the published models' outputs (`golden_*.npz`, `keys_*.tsv`); skips where it is not."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"no {OFFICIAL.parent.name}/{OFFICIAL.name} beside the project")
    return OFFICIAL
