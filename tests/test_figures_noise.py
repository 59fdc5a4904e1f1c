"""Figures that are drawn again elsewhere: rounding changes no file, a change does."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dynattn.figures import gallery
from dynattn.figures.noise import alike, alike_pictures, rounded

DRAW = np.random.default_rng(0)
POINTS, VALUES = DRAW.uniform(size=(200, 2)), DRAW.uniform(0.05, 60, 300).tolist()


def drawn(noise: float = 0.0, label: str = "points", dots: int = 200) -> Figure:
    figure = Figure((8, 6), dpi=100)
    axes = figure.subplots()
    axes.scatter(*(POINTS[:dots] * (1 + noise)).T, s=30)
    axes.set_xlabel(label)
    return figure


def entry(noise: float = 0.0, **changes) -> dict:
    measure = {
        "name": "share",
        "trained": 0.64825 * (1 + noise),
        "random": {"random weights": 0.1},
        "other": None,
        "n": 9,
    }
    return rounded(
        {
            "paper": "dat",
            "figure": 5,
            "file": "dat_5.png",
            "title": "Figure 5",
            "caption": f"By {0.64825 * (1 + noise):.4f} in 8 of 18 heads.",
            "weights": [{"file": "net.safetensors", "command": "dynattn train net --seed 0", "accuracy": 0.971}],
            "measures": [measure],
            "networks": {"net": {"values": [value * (1 + noise) for value in VALUES]}},
            "versions": {"python": "3.11.7"},
            **changes,
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path) -> Path:
    gallery.write(tmp_path, entry(), drawn())
    gallery.write(tmp_path, entry(figure=6, file="dat_6.png"), drawn(dots=50))
    return tmp_path


@pytest.mark.parametrize("noise", [0.0, 1e-6, -1e-6, 3e-5])
def test_noise_changes_no_file(noise, folder):
    """Nor do other versions, as long as they draw the same."""
    before = contents(folder)
    assert before.keys() == {"dat_5.png", "dat_6.png", "conditions.json", "README.md"}
    gallery.write(folder, entry(noise, versions={"python": "3.14.0"}), drawn(noise))
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changed", "figure"),
    [
        (entry(0.01), drawn()),
        (entry(title="Figure V"), drawn()),
        (entry(caption="By 0.6482 in 7 of 18 heads."), drawn()),
        (entry(caption="By 0.6582 in 8 of 18 heads."), drawn()),
        (entry(more=1), drawn()),
        (entry(), drawn(label="queries")),
        (entry(), drawn(dots=190)),
        (entry(), drawn(noise=0.05)),
    ],
)
def test_a_change_rewrites_picture_and_entry(changed, figure, folder):
    before = contents(folder)
    changed = copy.deepcopy(changed) | {"versions": {"python": "3.14.0"}}
    gallery.write(folder, changed, figure)
    after = contents(folder)
    assert (after["dat_5.png"] != before["dat_5.png"]) == ("more" not in changed)  # nothing in the picture shows it
    assert after["dat_6.png"] == before["dat_6.png"]
    assert json.loads(after["conditions.json"]) == [changed, json.loads(before["conditions.json"])[1]]


def test_a_picture_that_is_missing_or_damaged_is_drawn(folder):
    before = contents(folder)
    for damage in (
        Path.unlink,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(before[file.name][:500]),
    ):
        damage(folder / "dat_5.png")
        gallery.write(folder, entry(), drawn())
        assert contents(folder) == before


def test_numbers_are_kept_with_four_digits():
    assert rounded({"a": [0.123456, 123456.7, 1e-9 / 3], "b": (2, "0.123456", None, True)}) == {
        "a": [0.1235, 123500.0, 3.333e-10],
        "b": [2, "0.123456", None, True],
    }
    assert np.isnan(rounded(float("nan"))) and rounded(float("inf")) == float("inf")


def test_what_is_alike():
    """Noise at the edge of rounding is; other keys, words, whole numbers, and anything that can be read are not."""
    for old, new in [(0.1234, 0.1235), (1.0, 1), (0.0, 1e-5), ("0.17 of 3", "0.18 of 3"), ([1.0, "a"], [1.0001, "a"])]:
        assert alike(old, new), (old, new)
    others = [
        (0.12, 0.13),
        (1, 2),
        (True, 1.0),
        ("0.17 of 3", "0.17 of 4"),
        ("0.17", "0.19"),
        ("0.17", "0.170"),
        ([1], [1, 1]),
    ]
    others += [({"a": 1}, {"b": 1}), (None, 0.0), ("1.5 a", "1.5 a 1.5"), ("a", None)]
    for old, new in others:
        assert not alike(old, new) and not alike(new, old), (old, new)
    assert alike(float("nan"), float("nan")) and not alike(float("nan"), 0.0)
    assert not alike_pictures(b"no picture", b"no picture")


def test_the_gallery_of_the_project_keeps_four_digits():
    """So that drawing it again can leave it alone."""
    out = Path(__file__).parents[1] / "figures"
    entries = gallery.read(out)
    assert entries and entries == rounded(entries)
    assert (out / "README.md").read_text() == gallery.readme(entries)
