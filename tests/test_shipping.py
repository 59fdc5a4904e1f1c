"""What ships with the package, and what is in the project's folder alone."""

from pathlib import Path

import pytest

import dynattn
from dynattn import weights

ROOT = Path(__file__).parents[1]
MINIS = ["dat_mini", "dgt_mini", "swin_mini", "vit_mini"]
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
