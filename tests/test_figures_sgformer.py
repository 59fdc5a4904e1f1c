"""The figures of SG-Former: what they measure and what their captions conclude, with known answers; the drawings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dynattn import create_model, plugins, trace, weights
from dynattn.data import CLASSES, normalise
from dynattn.figures import draw, measures, run, sgformer, style, subjects
from dynattn.figures.tables import ALL, OTHER, OWN, Measure, from_records

SIZE = dict(img_size=32, num_classes=10)
SMALL = SIZE | dict(dims=(16, 16), heads=(2, 2), depths=(4, 1), scales=((2, 1),), rates=((4, 2, 1),), window=4)
OTHERS = SIZE | dict(dims=(16, 32), heads=(1, 2), regions=4, variant="paper")
GUIDANCE = ("constant", "local", "global", "hybrid")
SCALES = {"hybrid": ((2, 1),), "local": ((1,),), "global": ((2,),)}
FILES = {
    2: "sgformer_2_tokens.png",
    "class_maps": "sgformer_class_maps_first_stage.png",
    "evolving": "sgformer_evolving_significance.png",
    "receptive_fields": "sgformer_receptive_fields_of_the_centre.png",
    "table6": "sgformer_table6_scales.png",
    "table7": "sgformer_table7_guidance.png",
}


def random_images(count: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, and masks of a square in another place each."""
    rng, masks = np.random.default_rng(0), np.zeros((count, side, side), bool)
    for i in range(count):
        masks[i, 8 * (i % 3) : 8 * (i % 3) + 10, 4:20] = True
    return rng.integers(0, 255, (count, 3, side, side), dtype=np.uint8), masks


# ---------------------------------------------------------------------------------------------------- what is measured


def test_roc_area_counts_pairs():
    """Of every pair of a cell on the object and one off it: 1 where the first is larger, half where they are equal."""
    score = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    masks = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    found = measures.roc_area(score, masks)
    for mask, area in zip(masks[:2], found, strict=False):
        pairs = [(a > b) + (a == b) / 2 for a in score[mask].tolist() for b in score[~mask].tolist()]
        assert float(area) == pytest.approx(sum(pairs) / len(pairs))
    assert found[2:].isnan().all()


def test_tokens_and_their_distance_are_counted_by_cells():
    """Four cells in a row: two are a token each, the outer ones are one together."""
    cells = torch.tensor([[0.0, 0.0], [8.0, 0.0], [16.0, 0.0], [24.0, 0.0]])
    record = SimpleNamespace(tokens=torch.tensor([2, 0, 1, 2]), aggregation=torch.zeros(3, 4), image_shape=(32, 32))
    record.cells = lambda: cells
    masks = torch.tensor([[True, True, False, False], [True, False, False, True]])
    assert measures.tokens_share(record, masks).tolist() == pytest.approx([1.5 / 3, 1 / 3])
    near, far = measures.within_token(record)
    assert near == pytest.approx(24 / 32) and far == pytest.approx((3 * 8 + 2 * 16 + 24) / 6 / 32)


def test_the_table_of_a_network_has_its_layers():
    images, masks = random_images(3)
    model = create_model("sgformer_mini", **SMALL).eval()
    table = measures.evaluate_significance(model, images, masks, np.zeros(3, int))
    assert table[table.kind == "auc"].layer.unique().tolist() == ["stages.0.blocks.0.attn", "stages.0.blocks.2.attn"]
    assert table[table.kind == "tokens"].layer.unique().tolist() == ["stages.0.blocks.1.attn", "stages.0.blocks.3.attn"]
    t = trace(model, normalise(torch.from_numpy(images[1])))
    on = measures.on_map(t["stages.0.blocks.0.attn"], torch.from_numpy(masks))
    areas = measures.roc_area(t["stages.0.blocks.0.attn"].significance.flatten(), on)
    rows = table[(table.layer == "stages.0.blocks.0.attn") & (table.image == 1)].set_index("mask").value
    assert rows[OWN] == pytest.approx(float(areas[1])) and rows[OTHER] == pytest.approx(float(areas[[0, 2]].mean()))
    with pytest.raises(ValueError, match="model: expected one with hybrid-scale layers, got BiFormer"):
        measures.evaluate_significance(create_model("biformer_mini"), images, masks)


# -------------------------------------------------------------------------------------------------- what captions say


def layer(values: tuple[float, ...], random: float, other: float) -> Measure:
    """A measure of several seeds."""
    seeds = {f"seed {i}": value for i, value in enumerate(values[1:], 1)}
    return Measure("AUC", values[0], {"random weights, seed 0": random}, 3, other=other, seeds=seeds)


@pytest.mark.parametrize(
    ("values", "random", "said"),
    [
        (
            (0.8, 0.9),
            0.6,
            ["by layer, of 2 seeds each: 0.80, 0.90;", "finds the object in 2 of 2", "has at least 0.80"],
        ),
        ((0.8, 0.9), 0.85, ["random weights 0.85 to 0.85", "finds the object in 1 of 2"]),
        ((0.54, 0.9), 0.5, ["finds the object in 1 of 2"]),
        (
            (0.3, 0.7),
            0.5,
            ["in 1 of 2", "wrong way round in 1: there the object is less", "every seed has at least 0.30"],
        ),
        ((0.8,), 0.5, ["by layer: 0.80;", "finds the object in 1 of 1 (more than every random network, and 0.05 more"]),
    ],
)
def test_the_verdict_is_that_of_all_seeds(values, random, said):
    found = sgformer.verdict([layer(values, random, 0.5)])
    assert all(words in found for words in said), found
    assert ("wrong way" in found) == (min(values) <= 0.45) and found.endswith(". ")


def test_of_deep_models_the_first_and_last_layer_of_every_map_are_measured():
    pair = lambda shape, i: (SimpleNamespace(query_shape=shape, name=str(i)), None)  # noqa: E731
    pairs = [pair((8, 8), 0), *(pair((4, 4), i) for i in range(1, 5))]
    assert [int(before.name) for before, _ in sgformer.measured_layers(pairs)] == [0, 1, 4]
    assert len(sgformer.measured_layers(pairs[:4])) == 4


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of stand-ins for the checkpoints that ship with the package: small networks, random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    models = {"sgformer_mini": SMALL, "sgformer_mini_seed7": SMALL}
    models |= {f"sgformer_guidance_{kind}": SMALL | dict(guidance=kind) for kind in GUIDANCE}
    models |= {f"sgformer_scales_{kind}": SMALL | dict(guided=False, scales=s) for kind, s in SCALES.items()}
    models |= {"sgformer_scales_local_seed7": SMALL | dict(guided=False, scales=SCALES["local"])}
    models |= {"sgformer_evolving": SMALL, "sgformer_evolving_step0": SMALL}
    models |= {"debiformer_mini": OTHERS | dict(depths=(1, 1), topk=(2, 16), agent_topk=(4, 16), groups=(1, 2))}
    models["debiformer_mini"] |= dict(strides=(4, 2), kernels=(5, 3))
    models |= {"biformer_mini": OTHERS | dict(depths=(1, 1), topk=(2,), full_heads=2)}
    models |= {"swin_mini": SIZE | dict(window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2))}
    for file, arguments in models.items():
        name = "sgformer_mini" if file.startswith("sgformer") else file
        story = dict(classes=list(CLASSES), steps=0 if file.endswith("step0") else 9, accuracy=0.1)
        story |= dict(seed=7 * file.endswith("7"), command=f"dynattn train {file}")
        model = create_model(name, **arguments)
        weights.write(folder / f"{file}.safetensors", model.state_dict(), dict(name=name, arguments=arguments) | story)
    return folder


@pytest.fixture
def setup(shipped, monkeypatch, tmp_path):
    """Stand-ins for the shipped checkpoints, few images to measure, and a folder to draw into."""
    plugins.load_papers()
    monkeypatch.setattr(weights, "FOLDER", shipped)
    monkeypatch.setattr(weights, "of_figures", lambda: shipped)
    monkeypatch.setattr(run.Setting, "count", property(lambda self: 3))
    monkeypatch.setattr(sgformer, "SWEEP_COUNTS", (30, 3))
    monkeypatch.setattr(sgformer, "EVOLVING_COUNTS", (30, 3))
    monkeypatch.setattr(subjects, "TEST_COUNT", 30)
    monkeypatch.setattr(style, "DPI", 30)  # sooner written
    monkeypatch.setenv("DYNATTN_CACHE", str(shipped / "cache"))
    return tmp_path / "figures"


def test_all_figures_with_their_conditions(setup, capsys):
    pytest.importorskip("pytorch_grad_cam")
    entries = {one["figure"]: one for one in draw("sgformer", out=setup)}
    assert set(entries) == set(FILES) and "100%" in capsys.readouterr().err
    for number, one in entries.items():
        with Image.open(setup / one["file"]) as picture:
            assert picture.info["Title"] == one["title"] and one["file"] == FILES[number]
        assert (
            one["paper_name"] == "SG-Former" and one["networks"] and one["caption"] in (setup / "README.md").read_text()
        )

    second = entries[2]
    table = from_records(second["networks"]["sgformer_mini"])
    assert [one["layer"] for one in second["measures"]][:2] == ["stages.0.blocks.0.attn", "stages.0.blocks.2.attn"]
    assert second["measures"][0]["trained"] == table.value["stages.0.blocks.0.attn", ALL, "auc"]
    assert list(second["measures"][0]["seeds"]) == ["seed 7"] and len(second["measures"][0]["random"]) == 3
    assert (
        "4, 2, 1 and 4, 2, 1 cells become one token" in second["caption"] and "sides of the image" in second["caption"]
    )

    sixth, seventh = entries["table6"], entries["table7"]
    names = [one["name"].rpartition(", ")[2] for one in sixth["measures"][:3]]
    assert names == list(sgformer.SCALES) and list(sixth["measures"][1]["seeds"]) == ["seed 0", "seed 7"]
    assert "local scale: " in sixth["caption"] and "(the paper: -1.0)" in sixth["caption"]
    assert [one["name"].rpartition(", ")[2] for one in seventh["measures"][:4]] == list(sgformer.GUIDANCE)
    assert "constant map: " in seventh["caption"] and "(the paper: -0.9)" in seventh["caption"]
    strip = entries["evolving"]
    assert list(strip["networks"]) == ["step 0", "step 9"] and "goes from" in strip["caption"]
    assert len(entries["class_maps"]["weights"]) == 3 and len(entries["receptive_fields"]["weights"]) == 4
    assert "sgformer_mini, class maps" in entries["class_maps"]["networks"]


def test_a_photograph_of_ones_own(setup, photograph, capsys):
    entries = draw("sgformer", image=photograph, only=[2], out=setup, progress=False)
    (one,) = entries
    assert one["images"] == ["mine.png"] and not one["networks"] and "there is no mask" in one["caption"]
    assert all(measure["other"] is None and measure["n"] == 1 for measure in one["measures"])
    with pytest.raises(ValueError, match="only: table6 compares shipped models .* takes no image"):
        draw("sgformer", image=photograph, only=["table6"], out=setup, progress=False)


def test_a_checkpoint_of_ones_own_stands_alone(setup, tmp_path):
    """Of another depth, and with one F for sub-regions of one rate, as published checkpoints have."""
    arguments = SMALL | dict(num_classes=3, depths=(2, 1), rates=((4, 2, 2, 1),), variant="official")
    file = tmp_path / "mine.safetensors"
    model = create_model("sgformer_mini", **arguments)
    weights.write(file, model.state_dict(), dict(name="sgformer_mini", arguments=arguments, seed=3))
    (one,) = draw("sgformer", weights=file, only=[2], out=setup, progress=False)
    assert [story["file"] for story in one["weights"]] == ["mine.safetensors"]
    assert "in which 4, 2, 1 cells become one token" in one["caption"] and len(one["measures"]) == 2


def test_another_papers_model_is_refused(setup, shipped):
    with pytest.raises(ValueError, match="weights: expected a model with hybrid scale layers, got swin_mini"):
        draw("sgformer", weights=shipped / "swin_mini.safetensors", out=setup, progress=False)
    assert not setup.exists()


def test_cells_are_drawn_one_by_one():
    (ax,) = style.sheet(1, 1, "", "").panels[0]
    style.photograph(ax, np.zeros((20, 40, 3), np.uint8), (8, 8))
    style.cells(ax, np.eye(4), (8, 8))
    colours = ax.images[-1].get_array()
    assert colours.shape == (4, 4, 4) and colours[0, 1, 3] == 0 and colours[0, 0, 3] > 0.8
