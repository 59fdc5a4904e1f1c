"""The figures of DeBiFormer: what their captions conclude, with known answers, and the drawings."""

from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from dynattn import create_model, figures, plugins, weights
from dynattn.data import CLASSES
from dynattn.figures import debiformer, draw, evidence, fields, run, style, subjects
from dynattn.figures.tables import ALL, Measure, from_records

pytest.importorskip("pytorch_grad_cam")
SIZE = dict(img_size=32, num_classes=10)
SHARED = SIZE | dict(dims=(16, 32), heads=(1, 2), regions=4, variant="paper")
DEEP = SHARED | dict(depths=(2, 2), topk=(2, 16), agent_topk=(4, 16), groups=(1, 2), strides=(4, 2), kernels=(5, 3))
MODELS = {
    "debiformer_mini": DEEP,
    "debiformer_mini_seed7": DEEP,
    "biformer_mini": SHARED | dict(depths=(1, 1), topk=(2,), full_heads=2),
    "biformer_mini_seed7": SHARED | dict(depths=(1, 1), topk=(2,), full_heads=2),
    "swin_mini": SIZE | dict(window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2)),
    "convnext_mini": SIZE | dict(dims=(8, 16, 16), depths=(1, 1, 1)),
}
FILES = {
    4: "debiformer_4_class_maps.png",
    5: "debiformer_5_receptive_fields.png",
    6: "debiformer_6_class_maps_by_stage.png",
}


def measured(name: str, *values: float) -> Measure:
    """A measure of several seeds."""
    seeds = {f"seed {i}": value for i, value in enumerate(values[1:], 1)}
    return Measure(name, values[0], {"random weights": 0.2}, 3, other=0.1, seeds=seeds)


# -------------------------------------------------------------------------------------------------- what captions say


@pytest.mark.parametrize(
    "ours, other, said",
    [
        ((0.70, 0.72, 0.71), (0.5, 0.52, 0.51), "stage 1: 0.71 against 0.51, +0.20 ± 0.01, it holds"),
        ((0.50, 0.52, 0.51), (0.7, 0.72, 0.71), "stage 1: 0.51 against 0.71, -0.20 ± 0.01, it is the wrong way round"),
        ((0.5, 0.7, 0.6), (0.5, 0.6, 0.7), "stage 1: 0.60 against 0.60, +0.00 ± 0.08, it is undecided"),
        ((0.5, 0.7, 0.9), (0.5, 0.6, 0.55), "stage 1: 0.70 against 0.55, +0.15 ± 0.12, it is undecided"),
        ((0.9,), (0.5, 0.6, 0.7), "stage 1: 0.90 against 0.60, of one seed, which decides nothing"),
        ((0.08, 0.08), (0.02, 0.02), "stage 1: 0.08 against 0.02, both no more than another image's mask would have"),
    ],
)
def test_the_claim_is_judged_over_the_seeds(ours, other, said):
    pair = measured("HiResCAM, stage 1, DeBiFormer", *ours), measured("HiResCAM, stage 1, BiFormer", *other)
    assert said in debiformer.verdict([pair]) and debiformer.verdict([]) == ""


def test_whether_maps_shrink_is_told_for_each_model():
    halves = [measured("half", value) for value in (0.3, 0.3, 0.2, 0.1, 0.1, 0.2)]  # stages by turns of the models
    said = debiformer.shrinking(halves, ["BiFormer", "DeBiFormer"])
    first, second = said.split("; ")
    assert first.endswith("30, 20, 10 % of the image with BiFormer: it shrinks")
    assert second == "30, 10, 20 % of the image with DeBiFormer: it does not shrink. "


def sides(values: dict[tuple[bool, int], tuple[float, ...]]) -> fields.Sides:
    """Squares with every part as wide, of models by their turn: trained or random, at the first or the second size."""
    count = len(values[True, 0])
    return {
        (s, size, part): Measure("side", values[True, size][s], {"random weights": values[False, size][s]}, 3)
        for s, size, part in product(range(count), range(2), evidence.SHARES)
    }


def test_the_order_of_the_fields_is_told_with_its_changes():
    same = dict.fromkeys(product((True, False), range(2)), (0.5, 0.4, 0.3))
    said = fields.orders(["A", "B", "C"], sides(same))
    assert (
        "By the square with 50 % the order is always the same (trained: A > B > C; at twice the size: A > B > C)"
        in said
    )
    assert "A alone is first in 4 of 4" in said and fields.orders(["A"], sides(same)) == ""
    said = fields.orders(["A", "B", "C"], sides(same | {(True, 1): (0.4, 0.5, 0.3), (False, 1): (0.4, 0.5, 0.3)}))
    assert "changes with the size of the image (" in said and "A alone is first in 2 of 4" in said
    said = fields.orders(["A", "B", "C"], sides(same | {(False, 0): (0.3, 0.4, 0.5), (False, 1): (0.3, 0.4, 0.5)}))
    assert "changes with training (" in said
    said = fields.orders(["A", "B", "C"], sides(same | {(True, 0): (0.5, 0.51, 0.3)}))
    assert "changes with the size of the image and with training (trained: A = B > C;" in said
    assert "A alone is first in 3 of 4" in said


def test_a_field_without_anything_has_squares_of_no_size():
    assert set(fields.squares(np.zeros((4, 4))).values()) == {0.0}


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of stand-ins for the checkpoints that ship with the package: small networks, random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for file, arguments in MODELS.items():
        name = file.removesuffix("_seed7")
        story = dict(classes=list(CLASSES), steps=1, accuracy=0.1, seed=7 * file.endswith("7"))
        metadata = dict(name=name, arguments=arguments, command=f"dynattn train {file}") | story
        weights.write(folder / f"{file}.safetensors", create_model(name, **arguments).state_dict(), metadata)
    return folder


@pytest.fixture
def setup(shipped, monkeypatch, tmp_path):
    """Stand-ins for the shipped checkpoints, few images to measure, and a folder to draw into."""
    plugins.load_papers()
    monkeypatch.setattr(weights, "FOLDER", shipped)
    monkeypatch.setattr(run.Setting, "count", property(lambda self: 3))
    monkeypatch.setattr(subjects, "TEST_COUNT", 30)
    monkeypatch.setattr(style, "DPI", 30)  # sooner written
    monkeypatch.setenv("DYNATTN_CACHE", str(shipped / "cache"))
    return tmp_path / "figures"


def test_all_figures_with_their_conditions(setup, capsys):
    entries = draw("debiformer", out=setup)
    assert [one["figure"] for one in entries] == [4, 5, 6]
    printed, readme = capsys.readouterr(), (setup / "README.md").read_text()
    for one in entries:
        with Image.open(setup / one["file"]) as picture:
            assert picture.info["Title"] == one["title"] and one["file"] == FILES[one["figure"]]
        assert one["caption"] in readme and one["paper_name"] == "DeBiFormer" and one["networks"]
        for measure in one["measures"]:
            assert measure["name"] in printed.out and list(measure["random"]) == ["random weights"]
            assert all(0 <= value <= 1 for value in [measure["trained"], *measure["random"].values()])
            known = ", BiFormer" in measure["name"] or ", DeBiFormer" in measure["name"]
            assert list(measure.get("seeds", {})) == (["seed 7"] if known else [])
            if "HiResCAM" in measure["name"] or "Grad-CAM" in measure["name"]:
                assert 0 <= measure["other"] <= 1 and measure["n"] == 3
    assert "100%" in printed.err

    fourth, fifth, sixth = entries
    table = from_records(fourth["networks"]["biformer_mini, seed 7, class maps"])
    (first,) = (one for one in fourth["measures"] if one["name"] == "HiResCAM on the object, stage 1, BiFormer")
    assert first["seeds"]["seed 7"] == table.value["stages.0", ALL, "hires"] and first["layer"] == "stages.0"
    assert len(fourth["measures"]) == 6 and fourth["networks"] == sixth["networks"] and len(fourth["networks"]) == 6
    assert "for the true class" in fourth["caption"] and fourth["caption"].count("stage 1: ") == 1
    assert len(sixth["measures"]) == 8 and "half of a map covers" in sixth["caption"]
    assert "stage 2: " in sixth["caption"] and "over 2 seeds" in sixth["caption"]
    names = [one["name"] for one in fifth["measures"]]
    assert len(names) == 4 * 2 * 4 and names[0] == "side of the square with 20 %, DeBiFormer, 32 × 32"
    assert names[-1] == "side of the square with 99 %, ConvNeXt, 64 × 64" and fifth["measures"][0]["n"] == 3
    assert (
        "of DeBiFormer and BiFormer the mean of 2 seeds" in fifth["caption"] and "alone is first in" in fifth["caption"]
    )
    assert not set(fifth["networks"]) & {"swin_mini", "biformer_mini"}  # of these other things are recorded
    assert len(fifth["images"]) == 3 and len(fifth["weights"]) == 4


def test_a_photograph_of_ones_own(setup, photograph):
    entries = draw("debiformer", image=photograph, out=setup, progress=False)
    assert [one["figure"] for one in entries] == [4, 5, 6]
    for one in entries:
        assert one["images"] == ["mine.png"] and all(measure["n"] == 1 for measure in one["measures"])
        assert not one["networks"] and all(measure["other"] is None for measure in one["measures"])
    fourth, fifth, sixth = entries
    for one in (fourth, sixth):
        assert "there is no mask" in one["caption"] and "the class that the model answers (BiFormer: " in one["caption"]
        assert "half of the class map, stage 1, DeBiFormer" in one["measures"][1]["name"]
    assert len(sixth["measures"]) == 4 and "of mine.png" in fifth["caption"]


@pytest.mark.parametrize("name", ["biformer_mini", pytest.param("debiformer_mini", marks=pytest.mark.slow)])
def test_a_checkpoint_of_ones_own_stands_alone(setup, tmp_path, name):
    """Of other classes than those of the images: the maps are of the model's answer."""
    arguments = MODELS[name] | dict(num_classes=3)
    file = tmp_path / "mine.safetensors"
    weights.write(file, create_model(name, **arguments).state_dict(), dict(name=name, arguments=arguments, seed=3))
    entries = draw("debiformer", weights=file, out=setup, progress=False)
    for one in entries:
        assert [story["file"] for story in one["weights"]] == ["mine.safetensors"]
        assert "claim" not in one["caption"] and not any("seeds" in measure for measure in one["measures"])
    fourth, fifth, sixth = entries
    assert "HiResCAM for the class that the model answers at" in fourth["caption"] and len(fourth["measures"]) == 3
    assert len(fifth["measures"]) == 8 and "is first in" not in fifth["caption"]
    assert len(sixth["measures"]) == 4 and "shrink" in sixth["caption"].partition("Here half")[2]


def test_class_maps_are_left_out_without_their_package(setup, monkeypatch, capsys):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"only: figure 4 needs a package .* pip install 'dynattn\[vision\]'"):
        draw("debiformer", only=[4, 5], out=setup, progress=False)
    assert not setup.exists()
    assert figures.chosen(debiformer.PLANS, None, has_image=False, has_weights=False) == [5]
    printed = capsys.readouterr().out
    assert "figure 4 is left out: it needs" in printed and "figure 6 is left out: it needs" in printed


def test_another_papers_model_is_refused(setup, shipped):
    with pytest.raises(ValueError, match="weights: expected a model with bilevel layers, got swin_mini"):
        draw("debiformer", weights=shipped / "swin_mini.safetensors", out=setup, progress=False)
    assert not setup.exists() and "debiformer" in figures.FIGURES


# ---------------------------------------------------------------------------------------------------------- the looks


def test_a_table_has_every_word_in_its_place():
    sheet = style.sheet(1, 1, "", "", lines=3)
    style.table(sheet.table, [["", "", "head"], ["a", "b", "c"], ["A", "trained", "0.5"]], [0, 0.1, 0.4], {(2, 2)})
    words = {text.get_text(): text for text in sheet.table.texts}
    assert words["0.5"].get_weight() == "bold" and words["c"].get_weight() == "normal"
    assert words["0.5"].get_position() == (0.4, 2.5) and style.sheet(1, 1, "", "").table is None


def test_a_square_stands_in_the_middle():
    (ax,) = style.sheet(1, 1, "", "").panels[0]
    style.contributions(ax, np.ones((8, 8)))
    style.central_square(ax, 0.5, (8, 8), "-")
    assert ax.patches[0].get_bbox().extents == pytest.approx([1.5, 1.5, 5.5, 5.5])


def test_a_map_is_clear_where_it_says_nothing_and_the_photograph_keeps_its_shape():
    (ax,) = style.sheet(1, 1, "", "", aspect=0.5).panels[0]
    style.photograph(ax, np.zeros((20, 40, 3), np.uint8), (8, 8))
    style.heat(ax, np.eye(8))
    colours = ax.images[-1].get_array()
    assert colours[0, 1, 3] == 0 and colours[0, 0, 3] > 0.8 and ax.get_aspect() == 0.5
