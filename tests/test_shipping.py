"""What ships with the package, and what is in the project's folder alone."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import dynattn
from dynattn import weights
from dynattn.figures import gallery

ROOT = Path(__file__).parents[1]
MINIS = ["biformer_mini", "dat_mini", "debiformer_mini", "dgt_mini", "swin_mini", "vit_mini"]
DATA = ("csv", "safetensors")


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The weights as an installed package has them: without the project's folder above it."""
    folder = tmp_path / "site-packages" / "dynattn" / "weights"
    folder.mkdir(parents=True)
    for name in MINIS:
        (folder / f"{name}.safetensors").symlink_to(weights.path(name))
    monkeypatch.setattr(weights, "FOLDER", folder)
    return folder


def test_one_checkpoint_of_every_mini_ships():
    """The package holds a checkpoint and a log of each, under the name of its model; all others are not in it."""
    files = sorted(file.name for file in (ROOT / "dynattn" / "weights").iterdir() if file.suffix[1:] in DATA)
    assert files == sorted(f"{name}.{suffix}" for name in MINIS for suffix in DATA)
    assert set(MINIS) <= set(weights.shipped()) <= set(dynattn.list_models())


def test_a_checkout_has_the_checkpoints_of_the_figures():
    assert weights.of_figures() == ROOT / "figures" / "weights"
    assert weights.path("dat_mini_seed1").parent == weights.of_figures() and "dat_mini_seed1" in weights.available()
    assert "dat_mini_seed1" not in weights.shipped()
    assert weights.path("dat_mini").parent == weights.FOLDER


def test_an_installed_package_says_where_they_are(installed):
    assert weights.available() == weights.shipped() == MINIS
    with pytest.raises(ValueError, match="got 'dgt_cluttered'; seeds and sweeps are in figures/weights of the project"):
        weights.path("dgt_cluttered")


def test_an_installed_package_leaves_out_the_figures_that_need_them(installed, capsys):
    from dynattn import figures, plugins

    plugins.load_papers()
    for paper, figure in (("dat", 4), ("dgt", "table4b")):
        plans = figures.FIGURES[paper].plans
        assert figures.chosen(plans, None, False, False) == [number for number in plans if number != figure]
        assert "and none is found; seeds and sweeps are in figures/weights of the project's" in capsys.readouterr().out
        with pytest.raises(FileNotFoundError, match="seeds and sweeps are in figures/weights"):
            figures.chosen(plans, [figure], False, False)


def test_a_checkpoint_of_the_figures_is_not_pretrained(monkeypatch, tmp_path):
    """Both doors load what ships, and nothing else: a file in the figures' folder does not make a model pretrained."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path / "dynattn" / "weights")
    weights.of_figures().mkdir(parents=True)
    weights.write(weights.of_figures() / "dat_mini.safetensors", {}, {})
    assert weights.available() == ["dat_mini"] and weights.shipped() == []
    with pytest.raises(ValueError, match="pretrained: no checkpoint of 'dat_mini' ships"):
        dynattn.create_model("dat_mini", pretrained=True)


# ----------------------------------------------------------------------------------------------------------- pictures

PICTURES = [*sorted((ROOT / "figures").glob("*.png")), ROOT / "notebooks" / "lens.png"]


@pytest.mark.parametrize("file", PICTURES, ids=lambda file: file.stem)
def test_a_picture_has_a_palette_and_is_small(file):
    assert file.stat().st_size <= 400_000
    assert Image.open(file).mode == "P"


def test_a_picture_that_is_drawn_gets_a_palette(tmp_path):
    """It keeps its size, its texts, its resolution and white paper; colours move little, also a second time."""
    figure = Figure(figsize=(3, 2), dpi=100)
    figure.add_subplot().imshow(np.random.default_rng(0).random((20, 30, 3)), interpolation="bilinear")
    about = dict(paper="dat", figure=6, file="dat_6.png", title="Figure 6", caption="Größe 1 × 1", measures=[])
    gallery.write(tmp_path, about | dict(versions={}, weights=[]), figure)
    figure.savefig(tmp_path / "whole.png")
    drawn, whole = Image.open(tmp_path / "dat_6.png"), Image.open(tmp_path / "whole.png")
    assert drawn.mode == "P" and drawn.size == whole.size == (300, 200)
    assert drawn.text["Title"] == "Figure 6" and drawn.text["Description"] == "Größe 1 × 1"
    assert drawn.info["dpi"] == pytest.approx((100, 100), abs=0.1)
    pixels, true = (np.asarray(one.convert("RGB"), np.int16) for one in (drawn, whole))
    assert pixels[0, 0].tolist() == [255, 255, 255] and np.abs(pixels - true).mean() < 16
    again = Image.open(io.BytesIO(gallery.with_palette((tmp_path / "dat_6.png").read_bytes())))
    assert np.abs(np.asarray(again.convert("RGB"), np.int16) - pixels).max() <= 32
