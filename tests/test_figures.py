"""The figures: measures with known answers, and the command that draws, checks, merges and reports."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn

from dynattn import create_model, figures, tracing, weights
from dynattn.data import CLASSES, Shapes
from dynattn.figures import dat, draw, gallery, measures, noise, run, subjects, sweep
from dynattn.figures.tables import ALL, NETWORK, OTHER, OWN, Measure, Row, at, from_records, records, summary, table_of
from dynattn.mechanisms.window import WindowAttention

SMALL = dict(img_size=64, num_classes=10, dims=(16, 32, 64), depths=(1, 2, 2), heads=(2, 2, 4))
FILES = {
    4: "dat_4_offset_range.png",
    5: "dat_5_important_keys.png",
    6: "dat_6_deformed_points.png",
    7: "dat_7_attention.png",
}


class Deformable(tracing.Record):
    """A layer of one head and one group, with points and attention as given."""

    kind, heads, groups = "deformable", 1, 1

    def __init__(self, xy, attention, query_shape=(2, 2), reads=None, stride=4.0, references=None):
        self.xy, self.attention = torch.tensor(xy, dtype=torch.float), torch.tensor([attention], dtype=torch.float)
        self.points = self.xy[None]
        self.query_shape, self.stride, self.name = query_shape, (stride, stride), f"layer {query_shape}"
        self.read = None if reads is None else torch.tensor(reads, dtype=torch.float)
        self.start = self.xy if references is None else torch.tensor(references, dtype=torch.float)

    def group(self, head):
        return 0

    def weights(self, head=0):
        return self.attention[head]

    def points_xy(self, group=0):
        return self.xy

    def references_xy(self):
        return self.start

    def reads(self, group=0):
        return self.read


def left_half(side: int = 8) -> torch.Tensor:
    mask = torch.zeros(side, side)
    mask[:, : side // 2] = 1
    return mask


# ---------------------------------------------------------------------------------------------------------- measures


def test_a_point_counts_the_pixel_it_lies_on_and_none_outside():
    mask = torch.zeros(4, 6)
    mask[1, 5] = 1  # row 1, column 5
    xy = torch.tensor([[5.0, 1.0], [5.4, 0.6], [1.0, 5.0], [5.6, 1.0], [4.4, 1.0], [-0.6, 1.0], [5.0, 4.0]])
    assert measures.under(mask, xy).tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert measures.under(torch.ones(4, 6), torch.tensor([[-0.4, -0.4], [-0.6, 0.0], [0.0, 3.6]])).tolist() == [1, 0, 0]


def test_shares_of_a_layer_with_known_answers():
    points = [[1, 1], [2, 6], [6, 1], [60, 1]]  # two on the left, one on the right, one outside the image
    attention = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    record = Deformable(points, attention, references=[[1, 4], [2, 2], [6, 5], [60, 1]])
    mask = left_half()
    assert measures.points_share(record, mask) == pytest.approx(2 / 4)
    assert measures.attention_share(record, mask) == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert measures.attention_share(record, 1 - mask) == pytest.approx(1 / 4)  # what left the image is on neither side
    assert measures.references_share(record, mask) == pytest.approx(2 / 4)
    assert measures.move(record) == pytest.approx((3 + 4 + 4 + 0) / 4)


def test_share_of_a_window_layer_counts_its_cells():
    layer = WindowAttention(8, 2, 2)
    t = tracing.trace(Mapped(layer), torch.randn(3, 4, 4))
    (record,) = t
    mask = left_half(4)
    assert measures.attention_share(record, mask) == pytest.approx(0.5)  # windows lie on one side or the other
    assert 0 < measures.reach(record) < 2**0.5


class Mapped(nn.Module):
    """A layer on a map that is as large as the image."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.embed = layer, nn.Linear(3, 8)

    def forward(self, x):
        return self.layer(self.embed(rearrange(x, "B C H W -> B H W C"))).mean(dim=(1, 2))


def test_reach_is_the_mean_distance_to_what_is_read():
    record = Deformable([[1.5, 1.5], [5.5, 1.5]], [[1, 0], [0, 1], [1, 0], [0.5, 0.5]])  # cells at 1.5 and 5.5
    assert measures.reach(record) == pytest.approx((0 + 0 + 4 + 0.5 * 32**0.5 + 0.5 * 4) / 4)


def test_other_masks_are_the_mean_of_all_but_one():
    masks = torch.eye(3, dtype=torch.bool)[:, None, :]  # one pixel each
    assert measures.others(masks, 1).tolist() == [[0.5, 0, 0.5]]


def test_propagated_scores_with_known_answers():
    late = Deformable([[3, 3], [7, 7]], [[0.25, 0.75]], (1, 1), [[1], [1]], 8.0)
    early = Deformable(
        [[1.5, 1.5], [5.5, 1.5]],
        [[1, 0], [1, 0], [0, 1], [0, 1]],
        (2, 2),
        [[1, 0, 0, 0], [0, 1, 0, 0]],
    )
    first = Deformable(early.xy.tolist(), [[1, 0], [0, 1], [0, 1], [0, 1]], (2, 2), early.read.tolist())
    first.name = "first"
    t = tracing.Trace(torch.zeros(3, 8, 8), torch.zeros(1), {one.name: one for one in (first, early, late)})
    scores = measures.propagate(t)
    assert list(scores) == ["first", early.name, late.name]
    assert scores[late.name].tolist() == [[0.25, 0.75]]
    assert scores[early.name].tolist() == [[0.5, 0.5]]  # the one cell hands a quarter to each of four
    # Mass at `first`: half of (.25, .25, .25, .25) stays, half goes to cells 0 and 1: (.375, .375, .125, .125).
    assert scores["first"].tolist() == [[0.375, 0.625]]
    share = measures.propagated_share(t, scores, left_half())
    assert share == pytest.approx((0.375 + 0.5 + 0.25) / 3)


def test_the_part_of_the_offsets_that_depends_on_the_image():
    """Two images, one group, two points. Squares of the lengths by hand."""
    same = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])  # one shift for both points
    assert measures.image_share(torch.stack([same, same])) == (0.0, 1.0)
    turned = torch.tensor([[[3.0, 4.0], [-3.0, -4.0]]])  # the same for every image, and no shift
    assert measures.image_share(torch.stack([turned, turned])) == (0.0, 0.0)
    assert measures.image_share(torch.stack([turned, -turned])) == (1.0, 0.0)
    share, shift = measures.image_share(torch.stack([same + turned, same - turned]))  # means: (3, 4) everywhere
    assert share == pytest.approx(0.5) and shift == pytest.approx(0.5)
    assert measures.image_share(torch.zeros(3, 1, 2, 2)) == (0.0, 0.0)


def test_evaluation_of_points_that_lie_where_the_mask_is(monkeypatch):
    """A network whose points sit on the object of every image: own share 1, ratio as many times as objects differ."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (4, 3, 8, 8), dtype=np.uint8)
    masks = np.zeros((4, 8, 8), dtype=bool)
    for i, (row, col) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
        masks[i, row : row + 4, col : col + 4] = True
    centres = iter([[1.5, 1.5], [5.5, 1.5], [1.5, 5.5], [5.5, 5.5]])

    def trace(model, x):
        record = Deformable([next(centres)], [[1]] * 4, reads=[[1, 0, 0, 0]], references=[[3.5, 1.5]])
        return tracing.Trace(x, torch.tensor([0.0, 1.0]), {record.name: record})

    monkeypatch.setattr(measures, "trace", trace)
    table = measures.evaluate_points(nn.Identity(), images, masks, np.array([1, 1, 1, 0]))
    assert list(table.columns) == ["layer", "head", "image", "mask", "kind", "value"]
    found = summary(table)
    network, layer = (found.xs((name, ALL), level=("layer", "head")) for name in (NETWORK, "layer (2, 2)"))
    assert (found.n == 4).all() and network.value["area"] == 0.25 and network.value["accuracy"] == 0.75
    assert layer.value["points"] == layer.value["attention"] == 1
    assert layer.other["points"] == layer.other["attention"] == 0 and np.isnan(layer.other["move"])
    assert layer.value["references"] == pytest.approx(0.25) == pytest.approx(layer.other["references"])
    assert layer.standard_error["points"] == 0 and layer.standard_error["references"] == pytest.approx(0.25)
    assert network.value["propagated"] == 1


def test_a_table_is_summed_up_and_read_again():
    """Means by place, what is not a number left out, the null beside it; as JSON and back."""
    rows = [[Row("a", 0, OWN, "keys", value), Row("a", 0, OTHER, "keys", null)] for value, null in ((1, 2), (3, 4))]
    rows.append([Row("a", 0, OWN, "keys", float("nan")), Row("b", 1, "none", "move", 5)])
    found = summary(table_of(rows))
    keys, move = found.loc[("a", 0, "keys")], found.loc[("b", 1, "move")]
    assert (keys.value, keys.other, keys.n, keys.standard_error) == (2, 3, 2, 1)
    assert move.value == 5 and np.isnan(move.other) and np.isnan(move.standard_error)
    again = from_records(json.loads(json.dumps(records(found))))
    assert again.equals(found[again.columns].astype(again.dtypes))
    assert len(at(table_of(rows), "b", 1)) == 1


def test_a_measure_is_written_and_read():
    measure = Measure("share", 0.5, {"random weights": 0.1}, 9, other=0.2, window=0.0)
    entry = {"name": "share", "trained": 0.5, "random": {"random weights": 0.1}, "n": 9, "other": 0.2, "window": 0.0}
    assert measure.entry() == entry and Measure.read(entry) == measure and measure.nulls == [0.1, 0.2, 0.0]
    with pytest.raises(TypeError):
        Measure.read(entry | {"other_seeds": {}})


def test_entries_of_an_older_version_are_left_out(tmp_path):
    """Their measures had other names; the others of the folder stay."""
    measure = Measure("share", 0.5, {}, 9).entry()
    entry = {"paper": "dat", "figure": 5, "file": "a.png", "measures": [measure]}
    old = entry | {"figure": 6, "measures": [measure | {"other_seeds": {"seed 1": 0.4}}]}
    (tmp_path / "conditions.json").write_text(json.dumps([entry, old]))
    assert gallery.read(tmp_path) == [entry]


def test_evaluation_without_offsets_is_the_grid():
    model = create_model("dat_mini", **SMALL).eval()
    images, _, masks = zip(*(Shapes("easy", "test", 64)[i] for i in range(3)), strict=True)
    found = summary(measures.evaluate_points(model, torch.stack(images).numpy(), torch.stack(masks).numpy()))
    assert "accuracy" not in found.index.get_level_values("kind")
    points, references, moves = (found.xs(kind, level="kind") for kind in ("points", "references", "move"))
    assert len(points) == 2 and points.equals(references) and (moves.value == 0).all()
    # A grid that never moves cannot tell images apart.
    assert points.value.to_numpy() == pytest.approx(points.other.to_numpy())


def test_evaluation_checks_its_arguments():
    images, masks = np.zeros((3, 3, 8, 8), dtype=np.uint8), np.zeros((2, 8, 8), dtype=bool)
    with pytest.raises(ValueError, match="masks: expected one for each"):
        measures.evaluate_points(nn.Identity(), images, masks)
    with pytest.raises(KeyError, match="no layer"):
        measures.evaluate_points(create_model("dat_mini", **SMALL), *thin(2), layers=["stages.9"])


def thin(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, 3, 64, 64), dtype=np.uint8), np.zeros((n, 64, 64), dtype=bool)


# --------------------------------------------------------------------------------------------- what the figures rest on


def test_random_networks_depend_on_the_seed_alone():
    model = create_model("dat_mini", **SMALL)
    subject = subjects.Subject(model, "dat_mini", SMALL, {})
    images, _ = thin(2)
    images[1] = 255
    one, same, other = (subjects.random_twin(subject, seed, images) for seed in (0, 0, 1))
    assert not one.training and not any(module.training for module in one.modules())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    norms = [module for module in one.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms)


def test_pictures_show_the_scene_that_the_model_sees():
    picture = subjects.test_picture(9, (64, 64))
    assert picture.shape == (64, 64) and picture.shown.shape == (512, 512, 3) and picture.mask.shape == (512, 512)
    _, label, mask = Shapes("easy", "test", 64)[9]
    assert CLASSES[label] in picture.name
    coarse = Image.fromarray(picture.mask).resize((64, 64), Image.Resampling.BOX)
    assert (np.asarray(coarse, dtype=bool) ^ mask.numpy()).mean() < 0.05


def test_queries_on_and_off_the_object():
    mask = np.zeros((128, 128), dtype=bool)
    mask[80:120, 16:48] = True
    picture = subjects.Picture("", torch.zeros(3, 64, 64), np.zeros((128, 128, 3), np.uint8), mask)
    (row, col), off = dat.queries(picture)
    assert (row, col) == pytest.approx((49.5, 15.5), abs=2)
    assert off == (11.5, 51.5)


def test_windows_are_compared_on_the_last_map_that_has_several():
    window = lambda name, size, shape, stride: SimpleNamespace(  # noqa: E731
        name=name, window=size, query_shape=shape, stride=stride
    )
    windows = [window("a", (4, 4), (16, 16), 4), window("b", (4, 4), (8, 8), 8), window("c", (4, 4), (4, 4), 16)]
    places = {"d": 8, "e": 8, "f": 16}
    deformable = [SimpleNamespace(name=name, stride=n, query_shape=(64 // n, 64 // n)) for name, n in places.items()]
    of_kind = lambda records: SimpleNamespace(of_kind=lambda kind: records)  # noqa: E731
    layers, other = dat.beside(of_kind(deformable), of_kind(windows))
    assert [layer.name for layer in layers] == ["d", "e"] and [layer.name for layer in other] == ["b"]
    layers, other = dat.beside(of_kind(deformable[2:]), of_kind(windows))  # no map has both
    assert [layer.name for layer in layers] == ["f"] and [layer.name for layer in other] == ["b"]
    assert [layer.name for layer in dat.beside(of_kind(deformable), of_kind(windows[2:]))[1]] == ["c"]


def test_layers_are_chosen_by_measure_where_there_is_one():
    layers = [SimpleNamespace(name="best"), SimpleNamespace(name="last")]
    shares = {"best": (0.4, 0.2), "last": (0.5, 0.5)}
    found = [
        [Row(layer, ALL, mask, "points", value) for mask, value in zip((OWN, OTHER), shares[layer], strict=True)]
        for layer in shares
    ]
    assert dat.choose(layers, summary(table_of(found)), "points") == "best"
    assert dat.choose(layers, None, "points") == "last"


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of stand-ins for the checkpoints that ship with the package: small networks, random weights."""
    folder = tmp_path_factory.mktemp("weights")
    story = dict(classes=list(CLASSES), steps=1, accuracy=0.1)
    files = {"dat_mini": ("dat_mini", SMALL | {"offset_zero_init": False})}
    files |= {f"dat_sweep_s{s}": ("dat_mini", SMALL | {"offset_range": float(s)}) for s in (0, 4)}
    files["dat_mini_seed7"] = files["dat_mini"]
    files["swin_mini"] = ("swin_mini", dict(img_size=64, num_classes=10, window_size=4))
    for file, (name, arguments) in files.items():
        metadata = dict(name=name, arguments=arguments, command=f"dynattn train {file}", **story)
        metadata["seed"] = 7 * file.endswith("7")
        weights.write(folder / f"{file}.safetensors", create_model(name, **arguments).state_dict(), metadata)
    return folder


@pytest.fixture
def setup(shipped, monkeypatch, tmp_path):
    """Stand-ins for the shipped checkpoints, few images to measure, and a folder to draw into."""
    monkeypatch.setattr(weights, "FOLDER", shipped)
    monkeypatch.setattr(run.Setting, "count", property(lambda self: 4))
    monkeypatch.setattr(subjects, "TEST_COUNT", 30)
    monkeypatch.setattr(dat, "SWEEP_COUNTS", (8, 3))
    monkeypatch.setenv("DYNATTN_CACHE", str(shipped / "cache"))
    return tmp_path / "figures"


def test_all_figures_with_their_conditions(setup, capsys):
    entries = draw(out=setup)
    assert [one["figure"] for one in entries] == [4, 5, 6, 7]
    assert {file.name for file in setup.iterdir()} == {*FILES.values(), "conditions.json", "README.md"}
    assert json.loads((setup / "conditions.json").read_text()) == noise.rounded(entries)
    printed = capsys.readouterr()
    readme = (setup / "README.md").read_text()
    for one in entries:
        picture = Image.open(setup / one["file"])
        assert picture.width >= 1800 and picture.info["Title"] == one["title"]
        assert one["file"] in readme and one["caption"] in readme and str(setup / one["file"]) in printed.out
        assert one["weights"] and all(story["command"] in readme for story in one["weights"])
        assert one["image_size"] == [64, 64] and one["seed_of_random_weights"] == 0 and one["versions"]["torch"]
        for measure in one["measures"]:
            assert measure["name"] in printed.out and measure["random"]
            assert all(0 <= value <= 1 for value in [measure["trained"], *measure["random"].values()])
            alone = any(word in measure["name"] for word in ("accuracy", "depend on the image"))  # no mask is asked
            assert measure["other"] is None if alone else 0 <= measure["other"] <= 1
            assert list(measure.get("seeds", {})) == (["seed 7"] if measures_of_the_subject(one, measure) else [])
    assert "100%" in printed.err
    assert f"](/{setup}" not in readme and str(setup) not in readme  # links are relative


def test_figure_4_says_whether_a_range_is_better_than_none():
    """By more than two standard errors of the difference, in accuracy or in attention."""
    values = lambda *numbers: [Measure("", number, {}, 9, standard_error=0.01) for number in numbers]  # noqa: E731
    labels = ["s = 0", "s = 1", "s = 2"]
    found = sweep.Found(values(0.5, 0.52, 0.4), values(0.3, 0.2, 0.32), {})
    assert dat.verdict(labels, found) == "At this size no range is better than s = 0 by more than two standard errors."
    found = sweep.Found(values(0.5, 0.54, 0.4), values(0.3, 0.2, 0.34), {})
    assert dat.verdict(labels, found).endswith("errors: s = 1 in accuracy, s = 2 in attention on the object.")


def test_figure_6_measures_what_the_image_moves(setup):
    """Offsets of zero depend on nothing; those of random weights depend on the image by some part."""
    (entry,) = draw(only=[6], out=setup, progress=False)
    found = [measure for measure in entry["measures"] if "depend on the image" in measure["name"]]
    assert len(found) == 2 and "The part of the squared length of the offsets that depends on the" in entry["caption"]
    for measure in found:
        assert measure["layer"] in entry["caption"] and 0 < measure["trained"] < 1
        assert f"{100 * measure['trained']:.0f} % on the {measure['name'].partition(', ')[2]}" in entry["caption"]


def measures_of_the_subject(entry: dict, measure: dict) -> bool:
    return entry["figure"] > 4 and "Swin" not in measure["name"]


def test_a_trained_network_that_starts_at_zero_offsets_is_held_against_both_starts(setup, shipped, tmp_path, capsys):
    model = create_model("dat_mini", **SMALL | {"offset_zero_init": True})
    file = tmp_path / "zero.safetensors"
    weights.write(file, model.state_dict(), dict(name="dat_mini", arguments=SMALL, seed=0))
    (entry,) = draw(only=[6], weights=file, out=setup, progress=False)
    for measure in entry["measures"]:
        assert list(measure["random"]) == [subjects.RANDOM, dat.ZERO]
    assert "random offsets / with offsets of zero" in capsys.readouterr().out


@pytest.mark.slow
def test_one_figure_leaves_the_others_where_they_are(setup):
    first = draw(only=[5], out=setup, progress=False)
    before = (setup / FILES[5]).read_bytes()
    second = draw(only=[6], out=setup, seed=1, progress=False)
    assert (setup / FILES[5]).read_bytes() == before
    assert json.loads((setup / "conditions.json").read_text()) == noise.rounded(first + second)
    (setup / FILES[5]).unlink()
    third = draw(only=[6], out=setup, progress=False)
    assert json.loads((setup / "conditions.json").read_text()) == noise.rounded(third)  # an entry goes with its picture
    (setup / "conditions.json").write_text("{not json")
    assert draw(only=[6], out=setup, progress=False) and len(gallery.read(setup)) == 1


@pytest.mark.slow
def test_a_photograph_of_ones_own(setup, photograph, capsys):
    entries = draw(image=photograph, out=setup)
    assert [one["figure"] for one in entries] == [5, 6, 7]  # figure 4 is about many images
    for one in entries:
        assert one["images"] == ["mine.png"] and "there is no mask" in one["caption"]
        assert all(measure["other"] is None and measure["n"] == 1 for measure in one["measures"])
    assert capsys.readouterr().out.count("no mask") == sum(len(one["measures"]) for one in entries)


@pytest.mark.slow
def test_a_published_checkpoint(setup, photograph, tmp_path):
    """Of another size, three and six groups, and without Swin: its own windows stand beside it."""
    model = create_model("dat_tiny")
    torch.save({"model": published(model)}, tmp_path / "dat_tiny_in1k_224.pth")
    entries = draw(image=photograph, weights=tmp_path / "dat_tiny_in1k_224.pth", model="dat_tiny", out=setup)
    assert [one["figure"] for one in entries] == [5, 6, 7]
    for one in entries:
        assert one["weights"][0] == {"file": "dat_tiny_in1k_224.pth", "model": "dat_tiny"}
        assert one["image_size"] == [224, 224]
    assert "stages.2.blocks.4.attn" in entries[2]["caption"]


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under the published names and in the published shapes."""
    entries = model.published_entries()
    state = {entries[name].name: tensor for name, tensor in model.state_dict().items()}
    flat = lambda t: rearrange(t, "h I J -> (I J) h")  # noqa: E731
    return {key: flat(t) if key.endswith("relative_position_bias_table") else t for key, t in state.items()}


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ((None, None, None), "figures"),
        (("photos/cat.jpg", None, None), "cat_figures"),
        ((Path("cat.jpg"), Path("w/dat_tiny_in1k_224.pth"), "dat_tiny"), "cat_dat_tiny_in1k_224_figures"),
        ((None, None, "dat_mini"), "dat_mini_figures"),
        ((np.zeros((8, 8), np.uint8), None, None), "own_figures"),
    ],
)
def test_what_is_one_s_own_does_not_replace_the_gallery(given, folder):
    assert figures.default_folder(*given) == Path(folder)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(paper="vit"), ValueError, "paper: expected one of 'dat', .*'dgt', .*got 'vit'"),
        (dict(only=[3]), ValueError, "only: expected figures of 4, 5, 6, 7, got 3"),
        (dict(seed=-1), ValueError, "seed: expected a whole number"),
        (dict(image="nothing.jpg"), FileNotFoundError, "nothing.jpg"),
        (dict(image="conftest_of_nothing"), FileNotFoundError, "conftest_of_nothing"),
        (dict(weights="nothing.pth"), FileNotFoundError, "nothing.pth"),
        (dict(model="dat_tini"), ValueError, "did you mean"),
        (dict(model="dat_tiny"), ValueError, "shipped checkpoint"),
        (dict(model="swin_mini"), ValueError, "deformable"),
    ],
)
def test_wrong_arguments_fail_before_anything_is_drawn(setup, arguments, error, message):
    with pytest.raises(error, match=message):
        draw(out=setup, progress=False, **arguments)
    assert not setup.exists()


def test_arguments_that_do_not_go_together(setup, shipped, photograph):
    with pytest.raises(ValueError, match="only: figure 4 .* takes no image"):
        draw(only=[4], image=photograph, out=setup, progress=False)
    with pytest.raises(ValueError, match="only: figure 4"):
        draw(only=[4, 5], weights=shipped / "dat_mini.safetensors", out=setup, progress=False)
    with pytest.raises(ValueError, match="model: expected dat_mini"):
        draw(weights=shipped / "dat_mini.safetensors", model="dat_tiny", out=setup, progress=False)
    assert not setup.exists()


def test_figure_4_needs_its_checkpoints(setup, monkeypatch, tmp_path, shipped, capsys):
    lonely = tmp_path / "weights"
    lonely.mkdir()
    (lonely / "dat_mini.safetensors").write_bytes((shipped / "dat_mini.safetensors").read_bytes())
    monkeypatch.setattr(weights, "FOLDER", lonely)
    with pytest.raises(FileNotFoundError, match="figure 4 needs checkpoints"):
        draw(only=[4], out=setup, progress=False)
    assert not setup.exists()
    assert 4 not in figures.chosen(figures.FIGURES["dat"].plans, None, False, False)
    assert "figure 4 is left out: it needs checkpoints dat_sweep_s*.safetensors" in capsys.readouterr().out
