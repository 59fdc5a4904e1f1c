"""The figures of DGT: measures of groups with known answers, and the drawings with their conditions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from dynattn import cost, create_model, figures, plugins, tracing, weights
from dynattn.data import CLASSES, Shapes
from dynattn.figures import dgt, draw, gallery, measures, noise, run, style, subjects
from dynattn.figures.tables import ALL, NETWORK, Measure, from_records, records, summary
from dynattn.lessons import notebook

SMALL = dict(img_size=64, num_classes=10, dims=(16, 32, 64), depths=(1, 1, 1), heads=(2, 2, 4), keys=(24, 8), groups=4)
SWEEP = {"a": dict(groups=4, keys=(24, 8)), "b": dict(groups=2, keys=(24, 8)), "c": dict(groups=4, keys=(12, 4))}
FULL = style.DPI
FILES = {3: "dgt_3_groups.png", 6: "dgt_6_pairs.png", "table4b": "dgt_table4b_groups_and_keys.png"}


class Grouped(tracing.Record):
    """A layer with groups and selections as given, on a map of the image's own shape."""

    kind = "dynamic_group"

    def __init__(self, groups, selected, query_shape=(2, 2), stride=4.0):
        self.groups, self.selected = torch.tensor(groups), torch.tensor(selected)
        self.query_shape, self.stride, self.heads = query_shape, (stride, stride), len(groups)
        self.image_shape = tuple(round(side * stride) for side in query_shape)
        self.name = "layer"


# ---------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_mutual_information_is_that_of_scikit_learn(groups):
    rng = np.random.default_rng(groups)
    masks = rng.random((20, 60)) < rng.random((20, 1))
    masks[0], masks[1] = False, True  # no object; nothing but the object
    for _ in range(20):
        group = rng.integers(0, groups, 60)
        found = measures.mutual_information(torch.from_numpy(group), torch.from_numpy(masks))
        expected = [normalized_mutual_info_score(mask, group) for mask in masks]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_mutual_information_knows_no_names():
    mask = torch.tensor([[True, True, False, False]])
    assert float(measures.mutual_information(torch.tensor([5, 5, 2, 2]), mask)) == pytest.approx(1)
    assert float(measures.mutual_information(torch.tensor([0, 1, 0, 1]), mask)) == pytest.approx(0, abs=1e-12)
    assert float(measures.mutual_information(torch.tensor([0, 1, 2, 2]), mask)) == pytest.approx(
        2 / 2.5
    )  # 2 I / (H + H')


def test_a_cell_is_object_where_more_than_half_of_it_is():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :2] = True  # exactly half of cell (0, 0)
    mask[4:, 4:7] = True  # three quarters of cell (1, 1)
    mask[4, 0] = True
    record = Grouped([[0, 0, 0, 0]], [[[0]]])
    assert measures.on_map(record, mask).tolist() == [False, False, False, True]
    finer = mask.repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert measures.on_map(record, torch.stack([finer, ~finer])).tolist() == [
        [False, False, False, True],
        [False, True, True, False],
    ]


def test_cells_at_the_edge_may_hang_over():
    """A 10 x 6 image on a map of stride 4: the last row of cells has two rows of pixels, the last column two."""
    record = Grouped([[0] * 6], [[[0]]], (3, 2))
    record.image_shape = (10, 6)
    mask = torch.zeros(10, 6, dtype=torch.bool)
    mask[8:, 4:] = True
    assert measures.on_map(record, mask).tolist() == [False] * 5 + [True]


def test_shares_of_keys_are_those_of_loops():
    rng = np.random.default_rng(0)
    groups, masks = torch.from_numpy(rng.integers(0, 3, 30)), torch.from_numpy(rng.random((5, 30)) < 0.4)
    selected = torch.stack([torch.from_numpy(rng.permutation(30)[:7]).sort().values for _ in range(3)])
    on, off = measures.keys_shares(groups, selected, masks)
    for m, mask in enumerate(masks):
        share = [float(mask[selected[groups[i]]].float().mean()) for i in range(30)]
        assert float(on[m]) == pytest.approx(np.mean([share[i] for i in range(30) if mask[i]]))
        assert float(off[m]) == pytest.approx(np.mean([share[i] for i in range(30) if not mask[i]]))
    assert measures.keys_shares(groups, selected, torch.zeros(1, 30, dtype=torch.bool))[0].isnan().all()


def test_distance_to_the_keys_of_a_group():
    """Cells 4 pixels apart on an 8 x 8 image: (0, 0), (0, 1), (1, 0), (1, 1)."""
    record = Grouped([[0, 0, 1, 1], [0, 0, 0, 0]], [[[0, 1], [0, 1]], [[0, 3], [1, 2]]])
    first, second = measures.distances(record)
    assert first == pytest.approx((2 * (0 + 4) / 2 + 2 * (4 + 32**0.5) / 2) / 4 / 8)
    assert second == pytest.approx((2 * 32**0.5 / 2 + 2 * 4) / 4 / 8)
    assert measures.window_distance(Grouped([[0] * 4], [[[0, 1, 2, 3]]])) == pytest.approx((4 + 4 + 32**0.5) / 4 / 8)


def test_groups_by_their_overlap_with_the_object():
    mask = torch.tensor([[True, True, False], [False, False, False], [False, False, False]])
    record = Grouped([[0, 3, 2, 2, 2, 1, 1, 4, 4]], [[[0]] * 6], (3, 3), 1.0)  # group 0 in half of it, and 3; 5 empty
    assert measures.by_overlap(record, 0, mask) == [0, 2, 1, 4, 3]
    assert measures.by_overlap(record, 0, None) == [2, 1, 4, 0, 3]
    alone = Grouped([[1, 1, 1, 1]], [[[0]] * 2])
    assert measures.by_overlap(alone, 0, torch.ones(8, 8, dtype=torch.bool)) == [1]


def scenes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise; the object is one quarter of each, another in turn."""
    masks = np.zeros((n, 8, 8), dtype=bool)
    for i in range(n):
        row, col = divmod(i % 4, 2)
        masks[i, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = True
    return np.random.default_rng(0).integers(0, 255, (n, 3, 8, 8), dtype=np.uint8), masks


def test_heads_are_chosen_on_images_that_are_not_measured(monkeypatch):
    """Head 0 knows the object of the choosing images alone, head 1 that of the measured ones."""
    images, masks = scenes(12)
    cells = iter(masks[:, ::4, ::4].reshape(12, 4))
    seen = iter(range(12))

    def trace(model, x):
        on, blind = next(cells).astype(int).tolist(), [0, 0, 0, 0]
        heads = [on, blind] if next(seen) < 4 else [blind, on]
        keys = [[[0], [on.index(1)]]] * 2  # group 1 reads the object, group 0 the first cell
        return tracing.Trace(x, torch.tensor([0.0, 1.0]), {"layer": Grouped(heads, keys)})

    monkeypatch.setattr(measures, "trace", trace)
    found = summary(measures.evaluate_groups(nn.Identity(), images, masks, np.array([1] * 6 + [0] * 6), choice=4))
    by_head = {kind: rows.droplevel("kind") for kind, rows in found.loc[["layer"]].groupby("kind")}
    own, null = ({kind: rows[column].to_list() for kind, rows in by_head.items()} for column in ("value", "other"))
    assert found.value[NETWORK, ALL, "accuracy"] == 0.5 and found.value[NETWORK, ALL, "area"] == 0.25
    assert set(by_head["nmi"].n) == {8} and set(by_head["choose_nmi"].n) == {4}
    for rule in ("nmi", "keys"):
        assert dgt.chosen(found, rule) == dgt.chosen(found, rule, "layer") == ("layer", 0)
    assert own["nmi"] == pytest.approx([0, 1], abs=1e-12)
    assert by_head["nmi"].standard_error.to_list() == pytest.approx([0, 0], abs=1e-12)
    own_again = 2 / 11  # of eleven other masks two are the same
    less = measures.mutual_information(torch.tensor([1, 0, 0, 0]), torch.tensor([[False, True, False, False]]))
    assert null["nmi"] == pytest.approx([0, own_again + (1 - own_again) * float(less)])
    assert own["keys"] == pytest.approx([0.25, 1])  # head 0: the first cell, the object in every fourth image
    assert own["keys_off"] == pytest.approx([0.25, 0.25]) and own["keys_limit"] == [1, 1]
    assert own["groups"] == pytest.approx([1, np.exp(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))])


def test_evaluation_of_a_network():
    """A value for every head of every layer with groups; the dense last stage has none; as JSON."""
    model = create_model("dgt_mini", **SMALL).eval()
    images, labels, masks = zip(*(Shapes("cluttered", "test", 64)[i] for i in range(6)), strict=True)
    bar = SimpleNamespace(n=0)
    bar.update = lambda: setattr(bar, "n", bar.n + 1)
    arrays = torch.stack(images).numpy(), torch.stack(masks).numpy(), np.array(labels)
    table = measures.evaluate_groups(model, *arrays, bar=bar)
    assert bar.n == 6 and set(table.image[table.kind == "choose_nmi"]) == {0}
    assert set(table.image[table.kind == "nmi"]) == {1, 2, 3, 4, 5}
    found = summary(table)
    kinds = {kind: rows for kind, rows in found[found.index.get_level_values("layer") != NETWORK].groupby("kind")}
    assert all(len(rows) == 4 for rows in kinds.values())  # two layers of two heads
    assert all(kinds[kind].value.between(0, 1).all() for kind in ("nmi", "keys", "keys_limit", "distance"))
    assert kinds["nmi"].other.between(0, 1).all() and kinds["groups"].value.between(1, 4).all()
    again = from_records(json.loads(json.dumps(records(found))))
    assert np.array_equal(again.value, found.value) and np.array_equal(again.other, found.other, equal_nan=True)


def test_evaluation_of_groups_checks_its_arguments():
    images, masks = scenes(4)
    with pytest.raises(ValueError, match="masks: expected one for each of at least 3 images"):
        measures.evaluate_groups(nn.Identity(), images[:2], masks[:2])
    for choice in (0, 3, -1):
        with pytest.raises(ValueError, match="choice: expected 1 to 2 of 4 images"):
            measures.evaluate_groups(nn.Identity(), images, masks, choice=choice)
    with pytest.raises(ValueError, match="model: no attention layer of Ungrouped could be recorded"):
        measures.evaluate_groups(Ungrouped(), images, masks)


class Ungrouped(nn.Module):
    """A model without attention."""

    def forward(self, x):
        return x.mean(dim=(2, 3))


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A folder of stand-ins for the checkpoints that ship with the package: small networks, random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    models = {"dgt_mini": SMALL, "dgt_mini_seed7": SMALL}
    models |= {f"dgt_sweep_{name}{seed}": SMALL | sizes for name, sizes in SWEEP.items() for seed in ("", "_seed7")}
    for name, arguments in models.items():
        story = dict(classes=list(CLASSES), steps=1, accuracy=0.1, seed=7 * name.endswith("7"))
        metadata = dict(name="dgt_mini", arguments=arguments, command=f"dynattn train {name}") | story
        weights.write(folder / f"{name}.safetensors", create_model("dgt_mini", **arguments).state_dict(), metadata)
    dat = dict(img_size=64, num_classes=10, dims=(16, 32, 64), depths=(1, 2, 2), heads=(2, 2, 4))
    story = dict(name="dat_mini", arguments=dat, classes=list(CLASSES), seed=0)
    weights.write(folder / "dat_mini.safetensors", create_model("dat_mini", **dat).state_dict(), story)
    return folder


@pytest.fixture
def setup(shipped, monkeypatch, tmp_path):
    """Stand-ins for the shipped checkpoints, few images to measure, and a folder to draw into."""
    monkeypatch.setattr(weights, "FOLDER", shipped)
    monkeypatch.setattr(run.Setting, "count", property(lambda self: 4))
    monkeypatch.setattr(subjects, "TEST_COUNT", 30)
    monkeypatch.setattr(dgt, "SWEEP_COUNTS", (30, 5))
    monkeypatch.setattr(style, "DPI", 30)  # sooner written
    monkeypatch.setenv("DYNATTN_CACHE", str(shipped / "cache"))
    return tmp_path / "figures"


def strictly(text: str) -> list[dict]:
    """JSON without the NaN and Infinity that Python would write and no other reader takes."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_all_figures_with_their_conditions(setup, capsys, monkeypatch):
    monkeypatch.setattr(style, "DPI", FULL)
    entries = draw("dgt", out=setup)
    assert [one["figure"] for one in entries] == [3, 6, "table4b"]
    assert {file.name for file in setup.iterdir()} == {*FILES.values(), "conditions.json", "README.md"}
    assert strictly((setup / "conditions.json").read_text()) == noise.rounded(entries)
    printed, readme = capsys.readouterr(), (setup / "README.md").read_text()
    for one in entries:
        picture = Image.open(setup / one["file"])
        assert picture.width >= 1800 and picture.info["Title"] == one["title"] and one["file"] == FILES[one["figure"]]
        assert one["caption"] in readme and str(setup / one["file"]) in printed.out and one["paper_name"] == "DGT"
        assert all(story["command"] in readme for story in one["weights"])
        for measure in one["measures"]:
            assert measure["name"] in printed.out and len(measure["random"]) == dgt.TWINS
            assert all(0 <= value <= 1 for value in [measure["trained"], *measure["random"].values()])
    assert "100%" in printed.err and "random weights: of three seeds" in printed.out
    assert readme.count("## DGT\n") == 1 and "### Figure 3" in readme and "### Table 4b" in readme

    # In one run everything is measured once for each name: names must differ where networks do.
    (alone,) = draw("dgt", only=["table4b"], out=setup, progress=False)
    assert not set(alone["networks"]) & {name for one in entries[:2] for name in one["networks"]}
    assert alone["networks"] == entries[2]["networks"]


def test_measures_of_the_groups(setup):
    """Each network's own head, by the same rule, and of figure 6 in the first stage."""
    third, sixth = draw("dgt", only=[6, 3], out=setup, progress=False)
    same, mean = third["measures"].pop(5), third["measures"].pop(2)
    found = from_records(third["networks"]["dgt_mini"])
    nmi, keys, off = (found.xs(kind, level="kind") for kind in ("nmi", "keys", "keys_off"))
    assert mean["name"] == "groups and object (NMI), mean of all heads" and "layer" not in mean
    assert (mean["trained"], mean["other"]) == pytest.approx((nmi.value.mean(), nmi.other.mean()))
    assert same["trained"] == (keys.value > off.value).mean()
    assert f"in {round(4 * same['trained'])} of 4 heads" in third["caption"] and len(same["random"]) == dgt.TWINS
    for entry, kinds in ((third, ("nmi", "nmi", "keys", "keys_off")), (sixth, ("nmi", "keys", "keys_off"))):
        *shares, far = entry["measures"]
        rules = ["nmi" if entry is sixth or i == 1 else "keys" for i in range(len(shares))]
        for kind, rule, measure in zip(kinds, rules, shares, strict=True):
            layer = "stages.0.blocks.0.attn" if entry is sixth else None
            for name, value in [("dgt_mini", measure["trained"]), *measure["random"].items()]:
                network = from_records(entry["networks"][name])
                assert network.value[*dgt.chosen(network, rule, layer), kind] == value
            assert list(measure["seeds"]) == ["seed 7"] and measure["n"] == 3 and measure["standard_error"] >= 0
            assert ("limit" in measure) == (kind == "keys") and 0 <= measure["other"] <= 1
        assert far["other"] is None and 0 < far["window"] < far["trained"] < 1
        name, head = shares[0]["layer"].split(", head ")
        assert f"{name}, head {head}" in entry["caption"] and "test images set apart" in entry["caption"]
    assert sixth["measures"][0]["layer"].startswith("stages.0.blocks.0.attn")
    assert len(third["images"]) == 2 and len(sixth["images"]) == 4 and "Chelsea" in sixth["images"][2]


def test_table_4b_is_of_all_seeds_and_says_what_the_paper_has(setup):
    (entry,) = draw("dgt", only=["table4b"], out=setup, progress=False)
    accuracies, nmis = entry["measures"][:3], entry["measures"][3:]
    labels = ["G = 4, k = 24 / 8", "G = 2, k = 24 / 8", "G = 4, k = 12 / 4"]
    assert [one["name"] for one in accuracies] == [f"accuracy, {label}" for label in labels]
    for one in entry["measures"]:
        assert list(one["seeds"]) == ["seed 0", "seed 7"]
        values = np.array(list(one["seeds"].values()))
        assert one["trained"] == pytest.approx(values.mean())
        assert one["standard_error"] == pytest.approx(abs(values[1] - values[0]) / 2)
    assert [one["n"] for one in accuracies + nmis] == [30, 30, 30, 4, 4, 4]
    for label, one in list(zip(labels, accuracies, strict=True))[1:]:
        difference = 100 * (one["trained"] - accuracies[0]["trained"])
        error = 100 * np.hypot(one["standard_error"], accuracies[0]["standard_error"])
        said = {"G = 2, k = 24 / 8": -0.2, "G = 4, k = 12 / 4": -0.1}[label]
        assert f"{label}: {difference:+.1f} ± {error:.1f} (the paper: {said:+.1f})" in entry["caption"]
    assert len(entry["weights"]) == 6 and len(entry["networks"]) == 6 + dgt.TWINS


def test_without_its_checkpoints_the_table_is_left_out(setup, shipped, monkeypatch, tmp_path, capsys):
    lonely = tmp_path / "weights"
    lonely.mkdir()
    (lonely / "dgt_mini.safetensors").write_bytes((shipped / "dgt_mini.safetensors").read_bytes())
    monkeypatch.setattr(weights, "FOLDER", lonely)
    with pytest.raises(FileNotFoundError, match=r"only: table4b needs checkpoints dgt_sweep_\*\.safetensors, and "):
        draw("dgt", only=["table4b"], out=setup, progress=False)
    assert not setup.exists()
    entries = draw("dgt", out=setup, progress=False)
    assert [one["figure"] for one in entries] == [3, 6]
    assert "table4b is left out: it needs checkpoints dgt_sweep_*" in capsys.readouterr().out
    assert "seeds" not in entries[0]["measures"][0]


def test_errors_of_a_table_of_one_seed_are_those_over_images(setup, shipped, monkeypatch, tmp_path):
    few = tmp_path / "weights"
    few.mkdir()
    for name in ("dgt_mini", "dgt_sweep_a", "dgt_sweep_c"):
        (few / f"{name}.safetensors").write_bytes((shipped / f"{name}.safetensors").read_bytes())
    monkeypatch.setattr(weights, "FOLDER", few)
    (entry,) = draw("dgt", only=["table4b"], out=setup, progress=False)
    assert not any("seeds" in one for one in entry["measures"])
    for one in entry["measures"][:2]:
        assert one["standard_error"] == pytest.approx((one["trained"] * (1 - one["trained"]) / 30) ** 0.5)
    assert "what another seed would change is not in them" in entry["caption"]
    assert "(the paper: -0.1)" in entry["caption"]
    assert strictly((setup / "conditions.json").read_text()) == noise.rounded([entry])


@pytest.mark.slow
def test_both_papers_in_one_folder(setup):
    draw("dgt", only=["table4b"], out=setup, progress=False)
    draw("dat", only=[6], out=setup, progress=False)
    draw("dgt", only=[6], out=setup, progress=False)
    found = [(one["paper"], one["figure"]) for one in gallery.read(setup)]
    assert found == [("dat", 6), ("dgt", 6), ("dgt", "table4b")]
    readme = (setup / "README.md").read_text()
    assert readme.index("## DAT\n") < readme.index("dat_6_") < readme.index("## DGT\n") < readme.index("dgt_6_")


def test_a_photograph_of_ones_own(setup, photograph, capsys):
    entries = draw("dgt", image=photograph, out=setup, progress=False)
    assert [one["figure"] for one in entries] == [3, 6]
    for one in entries:
        assert one["images"] == ["mine.png"] and "there is no mask" in one["caption"] and "3 largest" in one["caption"]
        far, groups = one["measures"]
        assert far["window"] and all(measure["other"] is None and measure["n"] == 1 for measure in one["measures"])
        assert all(1 <= value <= 4 for value in [groups["trained"], *groups["random"].values()])
    assert capsys.readouterr().out.count("no mask") == sum(len(one["measures"]) for one in entries)


def test_other_weights(setup, photograph, tmp_path):
    """Of another size and number of groups, fewer than are drawn, and of classes that are not those of the images."""
    arguments = SMALL | dict(img_size=96, groups=2, keys=30, num_classes=3)
    file = tmp_path / "mine.safetensors"
    story = dict(name="dgt_mini", arguments=arguments, seed=3)
    weights.write(file, create_model("dgt_mini", **arguments).state_dict(), story)
    third, sixth = draw("dgt", weights=file, image=photograph, model="dgt_mini", out=setup, progress=False)
    assert third["image_size"] == [96, 96] and third["weights"] == [
        {"file": "mine.safetensors", "model": "dgt_mini", "seed": 3}
    ]
    assert all("of the most even groups" in one["caption"] for one in (third, sixth))
    assert third["caption"].startswith("stages.1.") and "stages.0." in sixth["caption"]
    (measured,) = draw("dgt", weights=file, only=[6], out=setup, progress=False)
    assert measured["measures"][0]["n"] == 3 and "seeds" not in measured["measures"][0]
    with pytest.raises(ValueError, match="only: table4b compares shipped models .* takes no weights or model"):
        draw("dgt", weights=file, only=["table4b"], out=setup, progress=False)
    with pytest.raises(ValueError, match="only: table4b compares shipped models .* takes no image"):
        draw("dgt", image=photograph, only=[3, "table4b"], out=setup, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(only=[4]), "only: expected figures of 3, 6, table4b, got 4"),
        (dict(only=["table4c", 3]), "only: expected figures of 3, 6, table4b, got table4c"),
        (dict(model="dat_mini"), "weights: expected a model with dynamic group layers, got dat_mini"),
        (dict(model="dgt_tiny"), "shipped checkpoint"),
    ],
)
def test_wrong_arguments_fail_before_anything_is_drawn(setup, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw("dgt", out=setup, progress=False, **arguments)
    assert not setup.exists()


@pytest.mark.slow
def test_one_group_alone_is_drawn(setup, tmp_path):
    """A network whose queries are all alike: panels without a group show the photograph."""
    model = create_model("dgt_mini", **SMALL)
    for layer in model.grouped_layers():
        nn.init.zeros_(layer.qkv.weight)
    file = tmp_path / "alike.safetensors"
    weights.write(file, model.state_dict(), dict(name="dgt_mini", arguments=SMALL, seed=0, classes=list(CLASSES)))
    third, sixth = draw("dgt", weights=file, only=[3, 6], out=setup, progress=False)
    assert third["measures"][0]["trained"] == sixth["measures"][0]["trained"] == 0
    groups = from_records(third["networks"]["dgt_mini"]).value.xs("groups", level="kind")
    assert groups["stages.0.blocks.0.attn"].to_list() == pytest.approx([1, 1])


# ---------------------------------------------------------------------------------------------------------- the looks


def test_a_region_of_cells_has_its_edges():
    """Two cells side by side and one apart: an edge wherever inside meets outside, none between neighbours."""
    sheet = style.sheet(1, 1, "", "")
    (ax,) = sheet.panels[0]
    style.photograph(ax, np.zeros((8, 8, 3), np.uint8), (8, 8))
    limits = ax.get_xlim(), ax.get_ylim()
    style.squares(ax, np.array([[True, True], [False, False]]), (4.0, 4.0), style.ORANGE)
    (edges,) = (one for one in ax.collections if hasattr(one, "get_segments"))
    found = {tuple(sorted(map(tuple, segment))) for segment in edges.get_segments()}
    assert found == {
        ((-0.5, -0.5), (3.5, -0.5)),
        ((3.5, -0.5), (7.5, -0.5)),
        ((-0.5, 3.5), (3.5, 3.5)),
        ((3.5, 3.5), (7.5, 3.5)),
        ((-0.5, -0.5), (-0.5, 3.5)),
        ((7.5, -0.5), (7.5, 3.5)),
    }
    assert (ax.get_xlim(), ax.get_ylim()) == limits


def test_the_area_of_a_key_is_its_share():
    sheet = style.sheet(1, 1, "", "")
    (ax,) = sheet.panels[0]
    style.keys(ax, np.array([[1.5, 1.5], [5.5, 1.5], [5.5, 5.5]]), np.array([0.8, 0.2, 0.0]), (4.0, 4.0), style.BLUE)
    sizes = [path.get_extents() for path in ax.collections[0].get_paths()]
    areas = [box.width * box.height for box in sizes]
    assert areas[1] == pytest.approx(areas[0] / 4) and 0 < areas[2] < areas[1] and areas[0] <= 16
    assert sizes[1].x0 + sizes[1].width / 2 == pytest.approx(5.5)


def test_columns_stand_in_pairs_from_the_right():
    places = [ax.get_position() for ax in style.sheet(1, 5, "", "", together=2).panels[0]]
    gaps = [right.x0 - left.x1 for left, right in zip(places, places[1:], strict=False)]
    assert gaps[0] == pytest.approx(gaps[2]) and gaps[1] == pytest.approx(gaps[3]) and gaps[0] > 2 * gaps[1]


def test_a_measure_without_a_mask_is_compared_with_a_window():
    one = Measure("far", 0.5, {"random weights": 0.4}, 3, window=0.2)
    other = Measure("keys", 0.3, {"random weights": 0.1}, 3, other=0.1, limit=0.6)
    sheet = style.sheet(1, 1, "", "", [one, other])
    words = [text.get_text() for ax in sheet.figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()]
    assert words == ["trained", "random weights", "another image's mask", "window of as many keys", "most possible"]


# ------------------------------------------------------------------------------------------------------------- papers


def test_the_command_line_knows_the_papers():
    plugins.load_papers()
    assert {"dat", "dgt"} <= set(figures.FIGURES) <= set(cost.tables())


def test_the_paper_is_compared_where_it_has_the_row():
    """83.8, 83.6 with half the groups, 83.7 with half the keys: Table 4(b)."""
    model = lambda groups, keys: SimpleNamespace(  # noqa: E731
        model=SimpleNamespace(grouped_layers=lambda: [SimpleNamespace(groups=groups, keys=k) for k in keys])
    )
    ours = [model(8, (64, 16)), model(4, (64, 16)), model(8, (32, 8)), model(2, (64, 16))]
    *found, none = dgt.published_accuracies(ours)
    assert found == [83.8, 83.6, 83.7] and np.isnan(none)


# ------------------------------------------------------------------------------------------------------- in a notebook


@pytest.mark.slow
def test_a_notebook_shows_what_was_drawn_with_the_shipped_weights(setup, shipped, photograph, monkeypatch, tmp_path):
    (entry,) = draw("dgt", only=[6], out=setup, progress=False)
    draw("dat", only=[6], out=setup, progress=False)
    (kept,) = notebook.recorded("dgt", setup).values()  # with four digits
    assert (kept["figure"], kept["file"], kept["weights"]) == (6, entry["file"], entry["weights"])
    shown = []
    monkeypatch.setattr(notebook, "display", lambda markdown: shown.append(markdown.data))
    notebook.measured({"DGT 6": entry})
    head, _, *rows = shown[0].splitlines()
    assert len(rows) == len(entry["measures"]) == 4 and all(row.startswith("| DGT 6 | ") for row in rows)
    assert [row.count("|") for row in (head, *rows)] == [7] * 5

    draw("dgt", only=[6], image=photograph, out=setup, progress=False)
    with pytest.raises(AssertionError, match="figure 6 is of others: run `dynattn figures --paper dgt`"):
        notebook.recorded("dgt", setup)
    draw("dgt", only=[6], weights=shipped / "dgt_sweep_a.safetensors", out=setup, progress=False)
    notebook.recorded("dgt", setup)
    other = tmp_path / "dgt_sweep_a.safetensors"
    metadata = weights.read(shipped / other.name)[1] | {"accuracy": 0.9}
    weights.write(other, weights.read(shipped / other.name)[0], metadata)
    draw("dgt", only=[6], weights=other, out=setup, progress=False)
    with pytest.raises(AssertionError, match="figure 6 is of others"):
        notebook.recorded("dgt", setup)
