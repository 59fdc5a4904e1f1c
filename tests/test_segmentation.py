"""Segmentation with SETR: sliding windows, several scales, mean IoU, pictures, the command, training for it."""

import sys
from dataclasses import replace

import deterministic
import numpy as np
import pytest
import torch
from PIL import Image
from published_setr import checkpoint
from torch import nn

import dynattn
from dynattn import cli, weights
from dynattn.data import CLASSES, Shapes, augment, cached
from dynattn.dense import SCALES, intersection_over_union, measure, predict
from dynattn.dense.classes import DATA_SETS, class_names
from dynattn.dense.drawing import label_picture, overlay, palette, shares
from dynattn.dense.inference import enlarged, starts
from dynattn.official import model_from
from dynattn.training import Recipe, fit, loop, train
from dynattn.training.recipes import get_recipe, plain, recipes
from dynattn.training.tasks import TASKS, class_maps, evaluate_segmentation, segment

TINY = dict(img_size=32, num_classes=3, patch=8, dim=16, depth=2, heads=2, channels=8)
TINY |= dict(steps=3, layers=(2,), aux_layers=(1,))


def tiny(**options) -> nn.Module:
    return deterministic.filled(dynattn.create_model("setr_pup_base", **TINY | options)).float()


class Marks(nn.Module):
    """Says for every pixel what the image has there, and how often it was asked; classes are the three channels."""

    img_size = (8, 8)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape[-2:]))
        return 100 * self.weight * x


# ----------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize(
    ("side", "window", "stride", "expected"),
    [
        (512, 512, 341, [0]),
        (683, 512, 341, [0, 171]),
        (1024, 768, 512, [0, 256]),
        (2048, 768, 512, [0, 512, 1024, 1280]),
        (9, 4, 2, [0, 2, 4, 5]),
        (3, 4, 2, [0]),
    ],
)
def test_where_windows_begin(side, window, stride, expected):
    """Every pixel is in one, and the last ends at the border."""
    found = starts(side, window, stride)
    assert found == expected
    assert {pixel for start in found for pixel in range(start, min(start + window, side))} == set(range(side))


def test_sides_below_the_window_are_enlarged():
    assert enlarged((100, 50), 1.0, (40, 40)) == (100, 50)
    assert enlarged((100, 50), 0.5, (40, 40)) == (80, 40)
    assert enlarged((10, 30), 1.0, (40, 40)) == (40, 120)
    assert enlarged((1, 1), 0.5, (40, 20)) == (40, 40)


@pytest.mark.parametrize("size", [(8, 8), (21, 34), (8, 40), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "how", [{}, dict(scales=(0.5, 1.0, 1.75), mirror=True), dict(window=(8, 4), stride=3)], ids=str
)
def test_every_pixel_gets_its_own_class(size, how):
    """Of a model that says what it sees. Probabilities sum to 1; a window is always of the model's size."""
    model, truth = Marks(), torch.zeros(size, dtype=torch.long)
    truth[size[0] // 2 :], truth[:, size[1] // 2 :] = 1, 2
    image = nn.functional.one_hot(truth, 3).movedim(-1, 0)[None].float()
    found = predict(model, image, **how)
    assert found.shape == (3, *size)
    torch.testing.assert_close(found.sum(0), torch.ones(size))
    assert set(model.seen) == {how.get("window", (8, 8))}
    if how.get("scales") is None:
        assert torch.equal(found.argmax(0), truth)
    else:
        assert (found.argmax(0) == truth).float().mean() > 0.8


def test_one_window_is_the_model_itself():
    model, image = tiny(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(image).softmax(1)[0]
    model.train()
    torch.testing.assert_close(predict(model, image), expected)
    assert model.training
    both = predict(model, image, mirror=True)
    with torch.no_grad():
        mirrored = model.eval()(image.flip(-1)).flip(-1).softmax(1)[0]
    torch.testing.assert_close(both, (expected + mirrored) / 2)


def test_strides_of_the_paper():
    """Two thirds: 512 of 768, 341 of 512, 320 of 480."""
    for window, stride in ((768, 512), (512, 341), (480, 320)):
        model = Marks()
        predict(model, torch.zeros(1, 3, window, window + stride), window=window)
        assert len(model.seen) == 2
    assert SCALES == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def test_a_bar_counts_the_windows(capsys):
    predict(Marks(), torch.zeros(1, 3, 8, 13), scales=(1.0, 2.0), mirror=True, progress=True)
    assert "34/34" in capsys.readouterr().err  # 1 x 2 of scale 1 and 3 x 5 of scale 2, each mirrored too


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(stride=9), r"stride: expected at most the window \(8, 8\), else pixels are left out, got \(9, 9\)"),
        (dict(window=0), "window.*: expected at least 1, got 0"),
        (dict(scales=()), r"scales: expected positive numbers, as in \(0.5, 1.0\), got \(\)"),
        (dict(scales=(0.0,)), "scales: expected positive numbers"),
    ],
)
def test_wrong_arguments_of_predict(how, message):
    with pytest.raises(ValueError, match=message):
        predict(Marks(), torch.zeros(1, 3, 8, 8), **how)


# ------------------------------------------------------------------------------------------------------------ mean IoU


def by_hand(pairs: list, count: int) -> tuple[float, list[float]]:
    """Class by class from sets of pixels."""
    predicted = torch.cat([p.flatten() for p, _ in pairs])
    truth = torch.cat([t.flatten() for _, t in pairs])
    predicted, truth = predicted[truth != 255], truth[truth != 255]
    found = {}
    for k in range(count):
        union = ((predicted == k) | (truth == k)).sum()
        if union:
            found[k] = float(((predicted == k) & (truth == k)).sum() / union)
    return sum(found.values()) / len(found), [found.get(k, 0.0) for k in range(count)]


def test_mean_intersection_over_union():
    """All pixels of all images together; 255 does not count, nor a class that is nowhere."""
    pairs = [(torch.randint(0, 4, (5, 7)), torch.randint(0, 4, (5, 7))) for _ in range(3)]
    pairs[0][1][:2] = 255
    mean, each = intersection_over_union(pairs, 6)
    expected, values = by_hand(pairs, 6)
    assert mean == pytest.approx(expected) and each.tolist() == pytest.approx(values)
    truth = torch.tensor([[0, 1], [2, 2]])
    assert intersection_over_union([(truth, truth)], 3)[0] == 1


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "answers: expected at least one pair, got none"),
        ([(torch.zeros(2, 2).long(), torch.zeros(2, 3).long())], "answers: expected pairs of one shape"),
        ([(torch.zeros(1, 1).long(), torch.tensor([[7]]))], "answers: expected true classes from 0 to 2, got 7 to 7"),
        ([(torch.tensor([[3]]), torch.tensor([[1]]))], "answers: expected predicted classes from 0 to 2, got 3 to 3"),
    ],
)
def test_answers_that_cannot_be(pairs, message):
    with pytest.raises(ValueError, match=message):
        intersection_over_union(pairs, 3)


def test_torchmetrics_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setattr("dynattn.dense.metrics.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'dynattn\[vision\]'"):
        intersection_over_union([(torch.zeros(1, 1).long(),) * 2], 1)
    with pytest.raises(ImportError, match="mean IoU is torchmetrics' work"):
        class_maps(np.zeros(1, dtype=int), np.zeros((1, 2, 2), dtype=bool))  # before anything is trained


def test_a_missing_package_is_told_in_a_line(monkeypatch, capsys):
    def train(**options):
        raise ImportError("mean IoU is torchmetrics' work")

    monkeypatch.setattr("dynattn.training.train", train)
    assert cli.main(["train", "setr_pup_mini"]) == 2
    assert capsys.readouterr().err == "dynattn: error: mean IoU is torchmetrics' work\n"


def test_a_model_is_measured_on_images(capsys):
    truth = torch.randint(0, 3, (9, 12))
    image = nn.functional.one_hot(truth, 3).movedim(-1, 0)[None].float()
    mean, each = measure(Marks(), [(image, truth)], 3, progress=True)
    assert mean == 1 and each.tolist() == [1, 1, 1] and "1/1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ pictures


def test_names_of_published_classes():
    assert {name: len(set(names)) for name, names in DATA_SETS.items()} == {
        "Cityscapes": 19,
        "Pascal Context": 60,
        "ADE20K": 150,
    }
    assert class_names(19)[18] == "bicycle" and class_names(150)[149] == "flag" and class_names(2)[1] == "class 1"


def test_a_label_picture_holds_the_numbers(tmp_path):
    labels = np.arange(150).reshape(10, 15)
    label_picture(labels, 150).save(tmp_path / "labels.png")
    read = Image.open(tmp_path / "labels.png")
    assert read.mode == "P" and np.array_equal(np.asarray(read), labels)
    assert np.array_equal(np.asarray(read.convert("RGB")), palette(150)[labels])
    assert len(np.unique(palette(150), axis=0)) == 150
    with pytest.raises(ValueError, match="count: expected at most 256 classes"):
        label_picture(labels, 300)


def test_an_overlay_has_a_legend():
    labels = np.zeros((60, 200), dtype=np.int64)
    labels[:20] = 2
    assert shares(labels, 4) == [(0, pytest.approx(2 / 3)), (2, pytest.approx(1 / 3))]
    page = overlay(Image.new("RGB", (200, 60), "black"), labels, ("sky", "sea", "sand", "sun")).convert("RGB")
    assert page.width >= 200 and page.height > 60
    left = (page.width - 200) // 2
    for row, k in ((5, 2), (50, 0)):
        assert np.abs(np.asarray(page)[row, left + 100] - 0.55 * palette(4)[k]).max() < 12  # of 256 colours
    assert np.asarray(page)[60:].min() < 100  # something is written there


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "street.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def trained(tmp_path):
    """A checkpoint as `dynattn train` writes it."""
    model = tiny()
    story = {"name": "setr_pup_base", "arguments": TINY, "classes": ["sky", "sea", "sand"]}
    weights.write(tmp_path / "tiny.safetensors", model.state_dict(), story)
    return tmp_path / "tiny.safetensors"


def test_segment_writes_two_pictures(photo, trained, tmp_path, capsys):
    assert cli.main(["segment", str(photo), "--weights", str(trained), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    files = [tmp_path / "out" / f"street_{kind}.png" for kind in ("segmentation", "labels")]
    assert told.out.splitlines()[:2] == list(map(str, files)) and "window" in told.err
    labels = np.asarray(Image.open(files[1]))
    assert labels.shape == (40, 70) and labels.max() < 3
    assert Image.open(files[0]).width >= 70
    lines = [line.split() for line in told.out.splitlines()[2:]]
    assert [line[1] for line in lines] == [("sky", "sea", "sand")[int(line[0])] for line in lines]
    assert sum(float(line[2].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.3)


def test_segment_at_several_scales(photo, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--weights", str(trained), "--short-side", "48", "--multi-scale"]
    assert cli.main(["segment", str(photo), *options]) == 0
    assert np.asarray(Image.open(tmp_path / "street_segmented" / "street_labels.png")).shape == (40, 70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--weights: expected a checkpoint, or --model NAME for one that ships"),
        (["--model", "dat_mini"], "--weights: dat_mini classifies images; expected a model for segmentation"),
        (["--model", "setr_pup_base"], "name: expected a model with a shipped checkpoint"),
        (["--weights", "{trained}", "--model", "dat_mini"], "is a checkpoint of setr_pup_base, not of dat_mini"),
        (["--weights", "{trained}", "--short-side", "0"], "--short-side: expected at least 1, got 0"),
        (["--weights", "{photo}"], "is not a checkpoint, or is damaged"),
    ],
)
def test_segment_tells_what_is_wrong(options, message, photo, trained, capsys):
    options = [option.format(trained=trained, photo=photo) for option in options]
    assert cli.main(["segment", str(photo), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_state_dict_of_torch_save_tells_its_classes(tmp_path):
    torch.save(dynattn.create_model("setr_mla_mini", num_classes=7).state_dict(), tmp_path / "own.pth")
    name, model = model_from(tmp_path / "own.pth", "setr_mla_mini")
    assert (name, model.num_classes) == ("setr_mla_mini", 7)


@pytest.mark.slow
def test_a_published_checkpoint_is_recognised(tmp_path):
    model = dynattn.create_model("setr_naive_base", num_classes=19, img_size=64)
    state = {key: value.half() if value.is_floating_point() else value for key, value in checkpoint(model).items()}
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "published.pth")
    name, found = model_from(tmp_path / "published.pth")
    assert (name, found.num_classes, found.img_size) == ("setr_naive_base", 19, (64, 64))


# ------------------------------------------------------------------------------------------------------------ training

RECIPE = Recipe(
    "setr_pup_base",
    {key: value for key, value in TINY.items() if key not in ("img_size", "num_classes")},
    level="cluttered",
    size=32,
    train_count=16,
    test_count=8,
    steps=4,
    batch=4,
    task="segmentation",
)


def test_class_maps():
    """0 where there is no object, the number of its shape and 1 on it."""
    masks = np.array([[[True, False]], [[False, False]]])
    assert class_maps(np.array([3, 9]), masks).tolist() == [[[4, 0]], [[0, 0]]]
    assert TASKS["segmentation"].classes == ("background", *CLASSES)


def test_maps_move_with_their_pixels():
    """An image whose red channel is its own map keeps being it, whatever augmentation does to colours."""
    maps = torch.randint(0, 2, (6, 32, 32), dtype=torch.uint8)
    images = torch.stack([200 * maps, maps, maps], dim=1)
    pictures, moved = augment(images, torch.Generator().manual_seed(1), maps)
    assert torch.equal(augment(images, torch.Generator().manual_seed(1)), pictures)
    assert not torch.equal(moved, maps)
    for picture, one in zip(pictures, moved, strict=True):
        assert torch.equal(picture[0] > (picture[0].min() + picture[0].max()) / 2, one.bool())


def test_auxiliary_heads_add_to_the_loss():
    """Each with the model's weight; a model without them has the main loss alone."""
    images, maps = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    for model in (tiny(), tiny(aux=False)):
        with torch.no_grad():
            logits, others = model(images, aux=True)
            loss, accuracy = segment(model, model, images, maps, 0.0)
        entropy = [float(nn.functional.cross_entropy(part, maps)) for part in (logits, *others)]
        assert float(loss) == pytest.approx(entropy[0] + 0.4 * sum(entropy[1:]))
        assert float(accuracy) == pytest.approx(float((logits.argmax(1) == maps).float().mean()))


def test_a_plain_model_can_be_trained_too():
    """torchvision's and others' that have no auxiliary heads."""
    conv, maps = nn.Conv2d(3, 3, 1), torch.randint(0, 3, (2, 8, 8), dtype=torch.uint8)
    images = torch.randn(2, 3, 8, 8)
    loss, _ = segment(conv, conv, images, maps, 0.0)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(conv(images), maps.long()))


def test_evaluation_is_of_all_pixels_together():
    items = [Shapes("cluttered", "test", 32, 8)[i] for i in range(8)]
    images, labels, masks = (np.stack([np.asarray(item[part]) for item in items]) for part in range(3))
    maps = class_maps(labels, masks)
    model = tiny(num_classes=11)
    found = evaluate_segmentation(model, images, maps)
    assert list(found) == ["mean_iou", "accuracy", "loss"] and not model.training
    with torch.no_grad():
        logits = model(dynattn.data.normalise(torch.from_numpy(images)))
    truth = torch.from_numpy(maps).long()
    assert found["mean_iou"] == pytest.approx(by_hand([(logits.argmax(1), truth)], 11)[0])
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == truth).float().mean()))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, truth)), rel=1e-5)


def test_a_run_logs_and_reaches_mean_iou(tmp_path, monkeypatch):
    """Log, checkpoint and result; a run that was stopped goes on to the same weights."""
    monkeypatch.setenv("DYNATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(loop.get_recipe.__globals__["RECIPES"], "tiny_segmentation", RECIPE)
    result = train("tiny_segmentation", tmp_path / "whole", progress=False)
    header, *rows = (tmp_path / "whole" / "log.csv").read_text().splitlines()
    assert header.split(",")[-1] == "test_mean_iou" and 0 <= float(rows[-1].split(",")[-1]) <= 1
    assert 0 <= result["mean_iou"] <= 1 and result["classes"] == ["background", *CLASSES]
    assert result["recipe"]["task"] == "segmentation" and result["arguments"]["num_classes"] == 11
    name, model = model_from(tmp_path / "whole" / "model.safetensors")
    images, labels, masks = cached(Shapes("cluttered", "test", 32, 8), progress=False)
    again = evaluate_segmentation(model, images, class_maps(labels, masks))
    assert again == {key: pytest.approx(result[key]) for key in again}

    train_set = [part[:16] for part in cached(Shapes("cluttered", "train", 32, 16), progress=False)]
    train_set = train_set[0], class_maps(*train_set[1:])
    test_set = images, class_maps(labels, masks)
    ends = []
    for stop in (None, 3):
        torch.manual_seed(0)
        model, folder = dynattn.create_model("setr_pup_base", **TINY | dict(num_classes=11)), tmp_path / f"{stop}"
        if stop:
            draw = loop.draw_batch

            def until(data, recipe, seed, step, *rest, draw=draw, stop=stop):
                if step == stop:
                    raise KeyboardInterrupt
                return draw(data, recipe, seed, step, *rest)

            monkeypatch.setattr(loop, "draw_batch", until)
            with pytest.raises(KeyboardInterrupt):
                fit(model, train_set, test_set, RECIPE, folder, progress=False, log_every=1, save_every=2)
            monkeypatch.setattr(loop, "draw_batch", draw)
        fit(model, train_set, test_set, RECIPE, folder, progress=False, log_every=1, save_every=2)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_recipes_of_the_small_models():
    """With and without auxiliary heads, all on the cluttered level."""
    names = {f"setr_{decoder}_mini{end}" for decoder in ("naive", "pup", "mla", "pup_hlg") for end in ("", "_no_aux")}
    assert names <= set(recipes())
    for name in names:
        recipe = get_recipe(name)
        assert (recipe.task, recipe.level, recipe.label_smoothing) == ("segmentation", "cluttered", 0)
        assert recipe.model_options == ({"aux": False} if name.endswith("_no_aux") else {})


def test_a_task_that_there_is_not():
    with pytest.raises(ValueError, match="task: expected one of 'classification', 'segmentation', got 'detection'"):
        replace(RECIPE, task="detection")
    assert plain(Recipe("dat_mini"))["task"] == "classification"
