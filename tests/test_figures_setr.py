"""The figures of SETR and HLG: what they measure, with known answers; the drawings, of small networks."""

import numpy as np
import published_setr
import pytest
import torch
from PIL import Image
from torch import nn

from dynattn import create_model, plugins, trace, weights
from dynattn.data import CLASSES
from dynattn.dense import intersection_over_union
from dynattn.figures import draw, features, gallery, positions, readers, run, segmentation, style, subjects
from dynattn.figures.tables import ALL, NETWORK, OTHER, OWN, from_records
from dynattn.tracing import roll_out

SIZE = dict(img_size=32)
SMALL = SIZE | dict(dim=16, depth=2, heads=2, channels=8, conv_stem=False, local_convs=False)
DECODERS = {"pup": dict(layers=(2,), aux_layers=(1,)), "naive": dict(layers=(2,), aux_layers=(1,))}
DECODERS |= {"mla": dict(layers=(1, 2))}
HLG = SIZE | dict(dims=(8, 16), depths=(1, 1), heads=(2, 2), channels=16, decoder_heads=2, aux_stage=2, aux_channels=8)
CLASSES_OF_PIXELS = ["background", *CLASSES]
NUMBERS = [5, 7, 10, 11, 12, 13, 14, "table3"]


def random_images(count: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise, and masks of a square in another place each."""
    rng, masks = np.random.default_rng(0), np.zeros((count, side, side), bool)
    for i in range(count):
        masks[i, 8 * (i % 3) : 8 * (i % 3) + 10, 4:20] = True
    return rng.integers(0, 255, (count, 3, side, side), dtype=np.uint8), masks


# ------------------------------------------------------------------------------------------------------- mean IoU


def test_mean_iou_and_its_error_over_the_images():
    """The same as torchmetrics has; the error is that of leaving out each image, and falls with their number."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 10
    masks = rng.random((40, 8, 8)) < 0.4
    truth = (masks * (labels + 1)[:, None, None]).astype(np.uint8)
    answers = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 11, truth.shape)).astype(np.uint8)

    class Fixed(nn.Module):
        """Answers what it was told, image after image."""

        def __init__(self):
            super().__init__()
            self.at = 0

        def forward(self, x):
            part = answers[self.at : self.at + len(x)]
            self.at += len(x)
            return nn.functional.one_hot(torch.from_numpy(part).long(), 11).movedim(-1, 1).float()

    table = segmentation.evaluate_segmentation(Fixed(), np.zeros((40, 3, 8, 8), np.uint8), masks, labels)
    found = segmentation.Overlap.read(table)
    pairs = [(torch.from_numpy(answers).long(), torch.from_numpy(truth).long())]
    mean, classes = intersection_over_union(pairs, 11)
    assert found.mean == pytest.approx(mean) and found.of_classes == pytest.approx(classes.numpy())
    without = [
        np.nanmean(segmentation.iou(found.both[k].sum(0), found.either[k].sum(0))) for k in ~np.eye(40, dtype=bool)
    ]
    assert found.left_out == pytest.approx(without)
    assert found.error == pytest.approx((39 * np.var(without)) ** 0.5) and found.error > 0
    other = segmentation.Overlap.read(table, OTHER)
    assert other.mean < found.mean
    assert segmentation.apart(found, found) == (0, 0)
    value, error = segmentation.apart(found, other)
    assert value == pytest.approx(found.mean - other.mean) and error > 0


def test_the_error_of_a_mean_by_the_jackknife_is_its_standard_error():
    values = np.random.default_rng(0).random(20)
    left_out = (values.sum() - values) / 19
    assert segmentation.jackknife(left_out) == pytest.approx(values.std(ddof=1) / 20**0.5)


def test_the_null_is_the_next_image_of_the_same_class():
    assert segmentation.next_of_class(np.array([0, 1, 0, 1, 0])).tolist() == [2, 3, 4, 1, 0]


def test_a_class_that_is_nowhere_does_not_count():
    found = segmentation.Overlap(np.array([[1.0, 0.0]]), np.array([[2.0, 0.0]]))
    assert found.mean == 0.5 and np.isnan(found.of_classes[1])


# ------------------------------------------------------------------------------------------------------ colours


def test_colours_are_those_of_all_images_together():
    torch.manual_seed(0)
    maps = torch.randn(2, 5, 3, 4) * torch.tensor([5.0, 3, 2, 0.1, 0.1])[:, None, None]
    fitted = features.Colours.fitted(maps)
    found = fitted.of(maps)
    assert found.shape == (2, 3, 4, 3) and float(found.min()) == 0 and float(found.max()) == 1
    assert torch.equal(found[1], fitted.of(maps[1]))
    pixels = found.flatten(0, 2)
    assert torch.corrcoef(pixels.T).fill_diagonal_(0).abs().max() < 1e-9
    variance = maps.movedim(1, -1).flatten(0, 2).var(dim=0)
    assert fitted.kept == pytest.approx(float(variance[:3].sum() / variance.sum()), abs=0.01)
    flipped = features.Colours.fitted(-maps)
    assert torch.allclose(flipped.axes, fitted.axes)  # the sign is not left to chance


def test_maps_of_fewer_than_three_channels_have_colours():
    found = features.coloured({"U1": torch.randn(1, 2, 4, 4), "U2": torch.zeros(1, 4, 2, 2)})
    assert [found[name].shape for name in found] == [(1, 4, 4, 3), (1, 2, 2, 3)]


def test_variance_between_object_and_rest():
    """1 where the colours are the mask, little where they have nothing to do with it, 0 where all are the same."""
    masks = torch.zeros(3, 100, dtype=torch.bool)
    masks[0, :30], masks[1, ::2] = True, True
    colours = masks[0][:, None].double().expand(100, 3)
    known, other, none = features.between(colours, masks).tolist()
    assert known == pytest.approx(1) and other < 0.05 and np.isnan(none)
    assert features.between(torch.ones(100, 3), masks)[0] == 0
    torch.manual_seed(0)
    colours = torch.rand(100, 3).double()
    mean = colours.mean(0)
    on, off = colours[:30], colours[30:]
    ratio = (
        sum(len(part) * (part.mean(0) - mean).square().sum() for part in (on, off)) / (colours - mean).square().sum()
    )
    assert float(features.between(colours, masks)[0]) == pytest.approx(float(ratio))


def test_maps_of_layers_and_of_the_decoder():
    """Of PUP one map for each upsampling but the last, of MLA one for each level, then logits at the image's size."""
    x = torch.randn(1, 3, 32, 32)
    shapes = {}
    for decoder, options in DECODERS.items():
        model = create_model(f"setr_{decoder}_mini", **SMALL | options).eval()
        maps = features.all_maps(model, x)
        shapes[decoder] = {name: tuple(found.shape[1:]) for name, found in maps.items()}
        assert torch.equal(maps["logits"], model(x)) and torch.equal(maps["Z2"], model.forward_features(x))
    layers, logits = {"Z1": (16, 4, 4), "Z2": (16, 4, 4)}, {"logits": (11, 32, 32)}
    assert shapes["pup"] == layers | {"U1": (8, 8, 8), "U2": (8, 16, 16)} | logits
    assert shapes["naive"] == layers | logits
    assert shapes["mla"] == layers | {"U1": (4, 8, 8), "U2": (4, 8, 8)} | logits
    pup = create_model("setr_pup_mini", **SMALL | DECODERS["pup"]).eval()
    assert torch.allclose(
        pup.decoder.classifier(pup.decoder.layers[2](features.all_maps(pup, x)["U2"])),
        pup.decoder(pup.forward_features(x)),
    )
    assert features.decoder_maps(create_model("vit_mini"), torch.randn(1, 3, 64, 64)) == {}


@pytest.mark.parametrize("count, found", [(24, [1, 9, 17, 24]), (4, [1, 2, 3, 4]), (2, [1, 2])])
def test_of_deep_models_some_layers_are_drawn(count, found):
    """Of 24 layers those of the paper's figure 7."""
    names = [f"Z{i}" for i in range(1, count + 1)]
    assert features.chosen(names, 4) == [f"Z{i}" for i in found]
    assert [place + 1 for place in readers.chosen(count, 4)] == found


# ------------------------------------------------------------------------------------------------- what points read


def test_shares_that_points_on_and_off_the_object_read():
    attention = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]])
    masks = torch.tensor([[True, True, False], [False, False, True], [False, False, False]])
    on, off = readers.shares_read(attention, masks, masks)
    assert on[:2].tolist() == pytest.approx([1.0, 0.6]) and off.tolist() == pytest.approx([0.4, 0.0, 0.0])
    assert on[2].isnan()


def test_a_network_is_measured_layer_by_layer_and_head_by_head():
    images, masks = random_images(3)
    model = create_model("setr_pup_mini", **SMALL | DECODERS["pup"]).eval()
    table = readers.evaluate_readers(model, images, masks)
    last = "encoder.blocks.1.attn"
    places = set(zip(table.layer, table["head"], table.kind, strict=True))
    assert {(last, m, "reads") for m in (ALL, 0, 1)} | {(NETWORK, ALL, "rolled_off")} <= places
    assert ("encoder.blocks.0.attn", ALL, "reads") in places and ("encoder.blocks.0.attn", 0, "reads") not in places
    rows = table[(table.layer == last) & (table.kind == "reads") & (table["mask"] == OWN)]
    heads = rows.pivot(index="image", columns="head", values="value")
    assert heads[ALL].to_numpy() == pytest.approx(heads[[0, 1]].mean(axis=1).to_numpy())
    with pytest.raises(ValueError, match="model: expected one with dense layers, got MiniSwin"):
        readers.evaluate_readers(create_model("swin_mini", img_size=32), images, masks)


def test_what_is_drawn_is_attention_times_the_number_of_cells():
    model = create_model("setr_mla_mini", **SMALL | DECODERS["mla"]).eval()  # no class token: rows sum to 1
    t = trace(model, torch.randn(3, 32, 32))
    record, point = list(t)[-1], (9.0, 20.0)
    both = readers.read_by(record, point)
    assert float(both.mean()) == pytest.approx(1)
    assert torch.allclose(both, (readers.read_by(record, point, 0) + readers.read_by(record, point, 1)) / 2)
    heat = readers.rolled_to(t, point)
    assert torch.allclose(heat.flatten() / 16, roll_out(torch.eye(16), list(t))[record.query(*point)])
    assert torch.allclose(heat.flatten() / 16, readers.rolled(t)[record.query(*point)])


# ---------------------------------------------------------------------------------------------------- positions


def test_positions_that_know_places_are_told_from_random_ones():
    row, col = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    waves = [f(w * axis) for axis in (row, col) for w in (0.3, 0.5) for f in (torch.sin, torch.cos)]
    apart = positions.distances((6, 6))
    known = positions.similarity(torch.stack(waves))
    torch.manual_seed(0)
    random = positions.similarity(torch.randn(64, 6, 6))
    assert positions.nearest_found(known, apart) == 1 and positions.near_found(known, apart) > 0.95
    assert positions.nearest_found(random, apart) < 0.4 and abs(positions.near_found(random, apart) - 0.5) < 0.1


def test_tables_of_positions_are_found():
    """Ours, and timm's without the rows of tokens that have no place."""
    model = create_model("setr_pup_mini", **SMALL | DECODERS["pup"])
    assert torch.equal(positions.position_table(model), model.encoder.embed.table)
    vit = create_model("vit_mini")
    found = positions.position_table(vit)
    assert found.shape == (128, 16, 16) and torch.equal(found[:, 0, 1], vit.pos_embed[0, -255])
    beit = create_model("setr_pup_mini", **SMALL | DECODERS["pup"] | dict(encoder="beit"))
    assert positions.position_table(beit) is None


# ------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of stand-ins for the checkpoints that ship with the package: small networks, random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    models = {f"setr_{decoder}_mini": SMALL | options for decoder, options in DECODERS.items()}
    models |= {f"{name}_no_aux": arguments | dict(aux=False) for name, arguments in list(models.items())[:2]}
    models |= {"setr_pup_hlg_mini": HLG, "swin_mini": SIZE | dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2))}
    for file, arguments in models.items():
        name = file.removesuffix("_no_aux")
        arguments = arguments | dict(num_classes=11)
        story = dict(classes=CLASSES_OF_PIXELS, steps=9, mean_iou=0.1, seed=0, command=f"dynattn train {file}")
        state = create_model(name, **arguments).state_dict()
        weights.write(folder / f"{file}.safetensors", state, dict(name=name, arguments=arguments) | story)
    return folder


@pytest.fixture
def setup(shipped, monkeypatch, tmp_path):
    """Stand-ins for the shipped checkpoints, few images to measure, and a folder to draw into."""
    plugins.load_papers()
    monkeypatch.setattr(weights, "FOLDER", shipped)
    monkeypatch.setattr(weights, "of_figures", lambda: shipped)
    monkeypatch.setattr(run.Setting, "count", property(lambda self: 3))
    monkeypatch.setattr(subjects, "TEST_COUNT", 30)
    monkeypatch.setattr(subjects, "SHARP", 64)
    several = run.Setting.pictures
    monkeypatch.setattr(run.Setting, "pictures", lambda self, indices: several(self, indices[:1]))
    monkeypatch.setattr(style, "DPI", 30)  # sooner written
    monkeypatch.setenv("DYNATTN_CACHE", str(shipped / "cache"))
    return tmp_path / "figures"


def test_all_figures_with_their_conditions(setup, capsys):
    entries = {one["figure"]: one for one in draw("setr", out=setup)}
    assert list(entries) == NUMBERS and "100%" in capsys.readouterr().err
    for one in entries.values():
        with Image.open(setup / one["file"]) as picture:
            assert picture.info["Title"] == one["title"]
        assert one["paper_name"] == "SETR" and one["caption"] in (setup / "README.md").read_text()
        assert one["measures"] and "seed" in one["caption"]

    fifth = entries[5]
    names = ["SETR-Naïve", "SETR-PUP", "SETR-MLA"]
    assert [one["name"] for one in fifth["measures"]] == [f"mean IoU, {name}" for name in names]
    assert all(one["n"] == 3 and one["other"] is not None for one in fifth["measures"])
    table = from_records(fifth["networks"]["setr_pup_mini, segmentation"])
    parts = [
        [table.value[NETWORK, ALL, f"{kind}, {name}"] for name in CLASSES_OF_PIXELS] for kind in ("both", "either")
    ]
    mean = float(np.nanmean(segmentation.iou(*map(np.array, parts))))
    assert fifth["measures"][1]["trained"] == pytest.approx(mean, rel=2e-3)
    assert [one["layer"] for one in entries[7]["measures"]] == ["Z1", "Z2"]
    assert [one["layer"] for one in entries[12]["measures"]] == ["Z1", "Z2", "U1", "U2", "logits"]
    assert entries[10]["images"] == [] and entries[10]["image_size"] == [32, 32]
    assert len(entries[11]["measures"]) == 4 and "points on the object give" in entries[11]["caption"]
    assert [one["name"].rpartition(", ")[2] for one in entries[13]["measures"]] == ["head 1", "head 2", "mean"]
    assert [one["name"].rpartition(", ")[2] for one in entries[14]["measures"][:2]] == ["layer 1", "layer 2"]
    labels = ["Naïve", "Naïve, no aux", "PUP", "PUP, no aux", "MLA"]
    assert [one["name"].removeprefix("mean IoU, ") for one in entries["table3"]["measures"]] == labels
    assert "(the paper, Naïve, Cityscapes, 80,000 steps: +0.67)" in entries["table3"]["caption"]
    assert "One seed each" in entries["table3"]["caption"]


def test_hlg_beside_the_truth(setup):
    (one,) = draw("hlg", out=setup, progress=False)
    assert one["paper_name"] == "HLG" and one["measures"][0]["name"] == "mean IoU, SETR-PUP-HLG"


def test_a_photograph_of_ones_own(setup, photograph, capsys):
    entries = draw("setr", image=photograph, out=setup, progress=False)
    assert [one["figure"] for one in entries] == NUMBERS[:-1]
    assert "table3 is left out" in capsys.readouterr().out
    for one in entries:
        if one["figure"] != 10:
            assert one["images"] == ["mine.png"] and not one["networks"]
            assert "mine.png" in one["caption"] and "squeezed" in one["caption"]
            assert all(measure["other"] is None and measure["n"] == 1 for measure in one["measures"])


def test_a_published_checkpoint_stands_alone(setup, tmp_path, monkeypatch):
    """Names as the authors have them; its classes are not those of the test images: nothing is measured of these."""
    model = create_model("setr_naive_mini", **SMALL | DECODERS["naive"] | dict(num_classes=19))
    state = {entry.name: model.state_dict()[name] for name, entry in model.published_entries().items()}
    tables = [model.encoder.embed.class_position[None], model.encoder.embed.table.flatten(1).T]
    state |= {"pos_embed": torch.cat(tables)[None], "cls_token": model.encoder.embed.class_token[None, None]}
    torch.save({"state_dict": state}, tmp_path / "naive.pth")
    arguments = SMALL | DECODERS["naive"] | dict(num_classes=19)
    monkeypatch.setattr("dynattn.official.identify", lambda state: ("setr_naive_mini", arguments))
    monkeypatch.setattr(subjects, "create_model", lambda name, **given: create_model(name, **arguments | given))
    entries = {
        one["figure"]: one for one in draw("setr", [5, 12], weights=tmp_path / "naive.pth", out=setup, progress=False)
    }
    assert not entries[5]["measures"] and "has no class for them" in entries[5]["caption"]
    assert [one["layer"] for one in entries[12]["measures"]] == ["Z1", "Z2", "logits"]
    assert [story["file"] for story in entries[5]["weights"]] == ["naive.pth"]


@pytest.mark.slow
def test_a_published_checkpoint_of_full_width(setup, photograph, tmp_path, capsys):
    """Twelve layers: six of them are drawn where attention is, all where features are, in rows of eight."""
    state = published_setr.checkpoint(create_model("setr_pup_base", img_size=64, num_classes=19))
    torch.save({"state_dict": state}, tmp_path / "pup.pth")
    found = draw("setr", weights=tmp_path / "pup.pth", image=photograph, out=setup, progress=False)
    entries = {one["figure"]: one for one in found}
    assert list(entries) == NUMBERS[:-1] and entries[5]["weights"] == [{"file": "pup.pth", "model": "setr_pup_base"}]
    layers = [one["name"].rpartition(", ")[2] for one in entries[14]["measures"]]
    assert layers == [f"layer {i}" for i in (1, 4, 6, 8, 10, 12)]
    assert "6 of its 12 heads" in entries[13]["caption"] and "6 of 12 layers" in entries[14]["caption"]
    assert [one["name"].rpartition(", ")[2] for one in entries[7]["measures"]] == ["Z1", "Z5", "Z9", "Z12"]
    assert "logits" in entries[12]["measures"][-1]["name"] and len(entries[12]["measures"]) == 8


def test_another_papers_model_where_it_makes_sense(setup, shipped, tmp_path, capsys):
    """A ViT that classifies: no figure of classes of pixels, and an error for who asks for it."""
    arguments = dict(img_size=32, num_classes=10, embed_dim=16, depth=2, num_heads=2)
    file = tmp_path / "mine.safetensors"
    model = create_model("vit_mini", **arguments)
    weights.write(file, model.state_dict(), dict(name="vit_mini", arguments=arguments, classes=list(CLASSES), seed=3))
    entries = draw("setr", [11], weights=file, out=setup, progress=False)
    assert [one["layer"] for one in entries[0]["measures"][:2]] == ["blocks.1.block.attn"] * 2
    with pytest.raises(ValueError, match="only: figure 5 needs a model that answers for each pixel; vit_mini answers"):
        draw("setr", [5], weights=file, out=setup, progress=False)
    with pytest.raises(ValueError, match="weights: expected a model with dense layers, got swin_mini"):
        draw("setr", weights=shipped / "swin_mini.safetensors", out=setup, progress=False)
    draw("setr", weights=file, image=Image.new("RGB", (40, 40)), out=tmp_path / "own", progress=False)
    assert "figure 5 is left out: it needs a model that answers for each pixel" in capsys.readouterr().out


def test_a_figure_without_measures_has_no_table():
    entry = dict(paper="setr", title="T", file="f.png", caption="C", measures=[], weights=[])
    assert "| measure |" not in gallery.readme([entry])
