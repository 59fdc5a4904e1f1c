"""The procedural data set, its photographs, its cache, and augmentation."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from dynattn.data import CLASSES, STD, Shapes, augment, cached, credits, normalise, photograph, photographs, shapes
from dynattn.data import cache as cache_module

LEVELS = ("easy", "cluttered")
SPLITS = ("train", "test")
GOLDEN = [
    [62.4, 94.1, 72.2, 526],
    [164.9, 113.6, 109.2, 440],
]  # item 7 of the test split, 64 pixels: mean colour and area


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DYNATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rendered(data: Shapes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images, labels, masks = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images).numpy(), np.array(labels), torch.stack(masks).numpy()


# ---------------------------------------------------------------- photographs


def test_photographs_of_the_splits_are_disjoint_and_complete():
    train, test = photographs("train"), photographs("test")
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(photographs()) and len(set(photographs())) == 11
    pixels = {name: np.asarray(photograph(name)).tobytes() for name in photographs()}
    assert len(set(pixels.values())) == len(pixels)  # no picture under two names


def test_photographs_are_colour_pictures_that_may_be_changed():
    for name in photographs():
        picture = photograph(name)
        assert picture.mode == "RGB" and min(picture.size) >= 300
        picture.paste("white", (0, 0, *picture.size))
        assert np.asarray(photograph(name)).min() < 200


def test_every_photograph_is_free_and_credited():
    assert [credit.name for credit in credits()] == photographs()
    for credit in credits():
        assert credit.licence in ("public domain", "CC0", "CC BY 2.0") and credit.author and credit.source


def test_credits_agree_with_what_the_packages_state():
    skimage, sklearn = (Path(find_spec(name).submodule_search_locations[0]) for name in ("skimage", "sklearn"))
    readme = (sklearn / "datasets/images/README.txt").read_text()
    tree = ast.parse((skimage / "data/_fetchers.py").read_text())
    statements = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    for credit in credits():
        if credit.package == "sklearn":
            assert credit.source in readme and "creativecommons.org/licenses/by/2.0" in readme
            continue
        stated = " ".join(statements["hubble_deep_field" if credit.name == "hubble" else credit.name].split())
        licence = "public domain" if credit.licence == "public domain" else "(CC0|Creative Commons CC0)"
        assert re.search(licence, stated)
        assert credit.author.lower() in stated.lower()


def test_unknown_photographs():
    with pytest.raises(ValueError, match="name: expected one of .*'chelsea'.*, got 'cat'"):
        photograph("cat")
    with pytest.raises(ValueError, match="split: expected None or one of .*, got 'val'"):
        photographs("val")


# ---------------------------------------------------------------- items


@pytest.mark.parametrize("name", CLASSES)
def test_three_quarters_of_an_object_are_visible(name):
    """Drawn twice as fine as where it is decided, where every outline is half a pixel too wide.

    It stands before all that draws whole items: what is outside of the frame has no fragments, and is tried for ever.
    """
    shares = [shapes._share(shapes._draw(placed(name, seed), 128)) / 0.12 for seed in range(25)]
    assert 0.69 < min(shares) < 0.9 and max(shares) < 1.12


def placed(name: str, seed: int) -> shapes.Outline:
    return shapes._silhouette(name, 0.12, np.random.default_rng(seed))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_items(level, split):
    data = Shapes(level, split, size=64, count=40)
    images, labels, masks = rendered(data)
    assert images.shape == (40, 3, 64, 64) and images.dtype == np.uint8
    assert masks.shape == (40, 64, 64) and masks.dtype == bool
    assert np.array_equal(np.bincount(labels), [4] * len(CLASSES)) and len(CLASSES) == 10
    again = rendered(Shapes(level, split, size=64, count=50))
    assert np.array_equal(images, again[0][:40]) and np.array_equal(masks, again[2][:40])


def test_every_argument_matters():
    base = Shapes("easy", "train", 64, 10, 0)[3][0]
    for other in (Shapes("cluttered", "train", 64), Shapes("easy", "test", 64), Shapes("easy", "train", 64, seed=1)):
        assert not torch.equal(base, other[3][0])
    assert not torch.equal(base, Shapes("easy", "train", 64)[13][0])


@pytest.mark.parametrize("level", LEVELS)
def test_the_size_changes_the_resolution_not_the_scene(level):
    for i in range(10):
        (small, label, mask), (large, same_label, large_mask) = (Shapes(level, size=size)[i] for size in (48, 96))
        reduced = torch.nn.functional.avg_pool2d(large.float(), 2)
        assert label == same_label
        assert (reduced - small.float()).abs().mean() < 12
        assert (torch.nn.functional.avg_pool2d(large_mask[None].float(), 2)[0] - mask.float()).abs().mean() < 0.02


@pytest.mark.parametrize("size", [32, 37, 128])
def test_sizes(size):
    for level in LEVELS:
        image, _, mask = Shapes(level, size=size)[0]
        assert image.shape == (3, size, size) and mask.shape == (size, size)


def test_items_look_as_they_did_when_checkpoints_were_trained():
    """Whoever changes what items look like raises VERSION, makes these numbers anew and trains again."""
    found = []
    for level in LEVELS:
        image, _, mask = Shapes(level, "test", 64)[7]
        found.append([*image.float().mean((1, 2)).tolist(), mask.sum().item()])
    np.testing.assert_allclose(found, GOLDEN, atol=2)


@pytest.mark.parametrize("level", LEVELS)
def test_mask_areas(level):
    count = 300 if level == "easy" else 100
    masks = rendered(Shapes(level, size=48, count=count))[2]
    areas = masks.mean((1, 2))
    assert 0.06 < areas.min() and areas.max() < 0.19
    assert 0.115 < areas.mean() < 0.135


@pytest.mark.parametrize("name", ["heart", "bird", "tree", "cat"])
def test_rotations_leave_what_is_up_and_down(name):
    """Classes that look different upside down: every placed silhouette overlaps the upright one most upright."""

    def centred(outline):
        middle = shapes._points(outline).mean(0)
        return np.asarray(shapes._draw([((points - middle) * 1.2 + 0.5, ink) for points, ink in outline], 48)) > 0

    def overlap(first, second):
        return max((first & other).sum() / (first | other).sum() for other in (second, second[:, ::-1]))

    kind = shapes._KINDS[name].outline(np.random.default_rng(0))
    upright = centred([(points / 4, ink) for points, ink in kind])
    for seed in range(12):
        picture = centred(placed(name, seed))
        assert overlap(picture, upright) > overlap(picture[::-1], upright)


def test_easy_objects_are_smooth_and_cluttered_ones_textured():
    roughness = {}
    for level in LEVELS:
        images, _, masks = rendered(Shapes(level, size=64, count=40))
        outside = torch.nn.functional.max_pool2d(1 - torch.from_numpy(masks).float()[:, None], 7, 1, 3)
        bends = np.abs(np.diff(images.astype(int), n=2, axis=-1)).max(1)  # a gradient's second differences are rounding
        inside = [bend[no == 0] for bend, no in zip(bends, outside[:, 0, :, 1:-1].numpy(), strict=True)]
        roughness[level] = [inner.mean() for inner in inside if inner.size > 20]
        assert len(roughness[level]) > 25
    assert max(roughness["easy"]) < 1.5 and np.median(roughness["cluttered"]) > 8


def test_objects_stand_anywhere():
    masks = rendered(Shapes(size=48, count=400, seed=5))[2]
    centres = np.array([[axis.mean() / 47 for axis in np.nonzero(mask)] for mask in masks])
    # Uniform over the square is .383 from its centre on average, less where three quarters must be in the frame;
    # a normal bump around the centre would be below .2.
    assert np.hypot(*(centres - 0.5).T).mean() > 0.27
    assert np.abs(centres.mean(0) - 0.5).max() < 0.04
    quarters = np.histogram2d(*centres.T, bins=2, range=[[0, 1], [0, 1]])[0]
    assert quarters.min() > 0.7 * 400 / 4
    on_the_edge = [mask[[0, -1]].any() or mask[:, [0, -1]].any() for mask in masks]
    assert 0.5 < np.mean(on_the_edge) < 0.9


@pytest.mark.parametrize("level", LEVELS)
def test_masks_are_where_the_picture_differs_from_what_is_behind(level, monkeypatch):
    name, backdrops = f"_{level}", []
    draw = getattr(shapes, name)

    def recorded(*args):
        picture, fill = draw(*args)
        backdrops.append(np.array(picture).transpose(2, 0, 1).astype(int))
        return picture, fill

    monkeypatch.setattr(shapes, name, recorded)
    images, _, masks = rendered(Shapes(level, size=64, count=20))
    for image, mask, backdrop in zip(images, masks, backdrops, strict=True):
        difference = np.abs(image - backdrop).sum(0)
        assert (difference[mask] > 0).mean() > 0.98
        assert np.mean(difference[mask]) > (100 if level == "easy" else 40)
        with_edge = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), 5, 1, 2)[0].bool().numpy()
        assert (difference[~with_edge] > 0).mean() < 0.005  # thin tips are covered by less than half


@pytest.mark.parametrize("name", CLASSES)
def test_silhouettes_of_a_class_resemble_each_other_most(name):
    """Before rotation: mean overlap within the class above that with any other class."""

    def upright(kind, seed):
        outline = shapes._KINDS[kind].outline(np.random.default_rng(seed))
        return np.asarray(shapes._draw([(points / 3 + 0.5, ink) for points, ink in outline], 48)) > 0

    def overlap(first, second):
        return (first & second).sum() / (first | second).sum()

    own = [upright(name, seed) for seed in range(4)]
    within = np.mean([overlap(own[0], other) for other in own[1:]])
    assert within > 0.8
    assert within > 0.1 + max(overlap(own[0], upright(other, 0)) for other in CLASSES if other != name)


def test_fragments_are_never_whole():
    rng = np.random.default_rng(0)
    for name in CLASSES:
        outline = shapes._silhouette(name, 0.06, rng)
        whole, part = (shapes._share(shapes._draw(o, 64)) for o in (outline, shapes._fragment(outline, rng)))
        assert 0.01 <= part < 0.9 * whole


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("level", "hard", ValueError, "level: expected one of 'easy', 'cluttered', got 'hard'"),
        ("split", "val", ValueError, "split: expected one of 'train', 'test', got 'val'"),
        ("size", 31, ValueError, "size: expected at least 32, got 31"),
        ("size", 64.0, TypeError, "size: expected an integer, got 64.0"),
        ("count", 0, ValueError, "count: expected at least 1, got 0"),
        ("seed", -1, ValueError, "seed: expected at least 0, got -1"),
        ("seed", True, TypeError, "seed: expected an integer, got True"),
    ],
)
def test_bad_arguments(argument, value, kind, message):
    with pytest.raises(kind, match=message):
        Shapes(**{argument: value})


@pytest.mark.parametrize("index", [-1, 5])
def test_indices_out_of_range(index):
    with pytest.raises(IndexError, match="index: expected 0 to 4, got"):
        Shapes(count=5)[index]


def test_it_is_a_data_set_for_a_loader():
    images, labels, masks = next(iter(torch.utils.data.DataLoader(Shapes(size=32, count=6), batch_size=6)))
    assert images.shape == (6, 3, 32, 32) and labels.tolist() == list(range(6)) and masks.shape == (6, 32, 32)


# ---------------------------------------------------------------- cache


@pytest.mark.slow
def test_workers_make_what_one_process_makes(folder, monkeypatch, capsys):
    for level in LEVELS:
        data = Shapes(level, "test", size=32, count=150)
        parallel = [np.array(array) for array in cached(data, workers=2)]
        monkeypatch.setenv("DYNATTN_CACHE", str(folder / "serial"))
        serial = cached(data, workers=1, progress=False)
        for one, two, direct in zip(parallel, serial, rendered(data), strict=True):
            assert one.dtype == two.dtype == direct.dtype
            assert np.array_equal(one, two) and np.array_equal(one, direct)
    assert capsys.readouterr().err.count("150/150") >= 2


@pytest.mark.slow
def test_workers_that_are_spawned(monkeypatch):
    monkeypatch.setattr(cache_module.sys, "platform", "darwin")
    data = Shapes(size=32, count=70)
    assert np.array_equal(cached(data, progress=False)[0], rendered(data)[0])


def test_the_second_call_draws_nothing(folder, monkeypatch, capsys):
    data = Shapes(size=32, count=20)
    first = [np.array(array) for array in cached(data, workers=1, progress=False)]
    monkeypatch.setattr(cache_module, "render", None)
    for one, two in zip(first, cached(data, workers=1), strict=True):
        assert np.array_equal(one, two)
    assert capsys.readouterr().err == ""
    assert len(list(folder.iterdir())) == 4  # nothing temporary is left


def test_other_arguments_other_files(folder):
    for data in (Shapes(size=32, count=5), Shapes(size=32, count=6), Shapes(size=32, count=5, seed=1)):
        cached(data, workers=1, progress=False)
    assert len(list(folder.glob("*.json"))) == 3


def test_writing_to_the_arrays_changes_no_file():
    data = Shapes(size=32, count=5)
    images = torch.from_numpy(cached(data, workers=1, progress=False)[0])  # warns of arrays that cannot be written
    images.zero_()
    assert np.array_equal(cached(data, workers=1, progress=False)[0], rendered(data)[0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


def reshape(path: Path) -> None:
    np.save(path, np.load(path)[:3])


@pytest.mark.parametrize("part", ["images", "labels", "masks"])
@pytest.mark.parametrize("damage", [cut, flip, empty, pickled, reshape, Path.unlink])
def test_damaged_files_are_made_again(folder, part, damage):
    data = Shapes(size=32, count=12)
    cached(data, workers=1, progress=False)
    damage(next(folder.glob(f"*.{part}.npy")))
    for array, expected in zip(cached(data, workers=1, progress=False), rendered(data), strict=True):
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "{}", "null", "\0"])
def test_damaged_checksums(folder, content):
    data = Shapes(size=32, count=12)
    cached(data, workers=1, progress=False)
    sums = next(folder.glob("*.json"))
    right = sums.read_text()
    sums.write_text(content)
    cached(data, workers=1, progress=False)
    assert json.loads(sums.read_text()) == json.loads(right)


def test_an_interrupted_run_leaves_nothing(folder, monkeypatch):
    data = Shapes(size=32, count=80)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 70:
            raise KeyboardInterrupt
        return shapes.render(*args)

    monkeypatch.setattr(cache_module, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(data, workers=1, progress=False)
    assert list(folder.iterdir()) == []


def test_two_runs_at_once(monkeypatch):
    data = Shapes(size=32, count=70)
    chunks, inner = cache_module._chunks, []

    def meanwhile(*args):
        if not inner:
            inner.append(None)
            inner[0] = cached(data, workers=1, progress=False)
        yield from chunks(*args)

    monkeypatch.setattr(cache_module, "_chunks", meanwhile)
    outer = cached(data, workers=1, progress=False)
    for first, second in zip(inner[0], outer, strict=True):
        assert np.array_equal(first, second)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DYNATTN_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(cache_module.tempfile, "tempdir", str(tmp_path))
    assert len(cached(Shapes(size=32, count=3), workers=1, progress=False)[1]) == 3
    assert cache_module.cache_folder().parent == tmp_path
    monkeypatch.setattr(cache_module.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set DYNATTN_CACHE to a folder"):
        cache_module.cache_folder()


def test_bad_arguments_of_the_cache():
    with pytest.raises(TypeError, match="shapes: expected a Shapes data set, got list"):
        cached([])
    for workers in (0, -1, 2.0):
        with pytest.raises(ValueError, match="workers: expected an integer of at least 1"):
            cached(Shapes(), workers=workers)


@pytest.mark.slow
def test_no_network_and_an_empty_home(tmp_path):
    program = """
        import os, socket, sys

        class Blocked(socket.socket):
            def connect(self, *args):
                os._exit(3)
            connect_ex = connect

        def blocked(*args, **options):
            os._exit(3)

        socket.socket, socket.create_connection, socket.getaddrinfo = Blocked, blocked, blocked
        from dynattn.data import Shapes, cached, photograph, photographs
        for name in photographs():
            photograph(name)
        for level in ("easy", "cluttered"):
            for split in ("train", "test"):
                cached(Shapes(level, split, size=32, count=70), progress=False)
        loaded = [name for name in ("skimage", "sklearn", "pooch", "matplotlib", "timm", "cv2") if name in sys.modules]
        assert not loaded, loaded
    """
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("DYNATTN_CACHE")
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=True, timeout=120)
    assert len(list((home / ".cache" / "dynattn").iterdir())) == 16


# ---------------------------------------------------------------- augmentation


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.stack([Shapes(size=64)[i][0] for i in range(20)])


def test_augment_is_decided_by_the_generator(batch):
    first, again, other = (augment(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and first.shape == batch.shape


def test_augment_moves_and_mirrors_without_seams(batch, monkeypatch):
    """Every picture is, exactly, its mirrored or plain self with a reflected border, moved by at most 5 pixels."""
    monkeypatch.setattr("dynattn.data.images.GAIN", 0.0)
    monkeypatch.setattr("dynattn.data.images.OFFSET", 0.0)
    moves = set()
    for image, result in zip(batch, augment(batch, torch.Generator().manual_seed(3)), strict=True):
        bordered = torch.nn.functional.pad(normalise(image)[None], (5, 5, 5, 5), mode="reflect")[0]
        found = [
            (mirrored, row, column)
            for mirrored, picture in ((False, bordered), (True, bordered.flip(-1)))
            for row in range(11)
            for column in range(11)
            if torch.allclose(picture[:, row : row + 64, column : column + 64], result, atol=1e-4)
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert {mirrored for mirrored, *_ in moves} == {False, True}
    assert len({row for _, row, _ in moves}) > 5 and len({column for *_, column in moves}) > 5


def test_augment_changes_gain_and_offset_of_a_channel_alone():
    levels = torch.arange(0, 256, 5, dtype=torch.uint8).repeat(8, 3, 52, 1)  # columns differ: symmetric under moves
    moved = augment(levels, torch.Generator().manual_seed(0))
    spread = (moved.amax((2, 3)) - moved.amin((2, 3))) * torch.tensor(STD)
    assert spread.min() > 0.85 * 0.9 and spread.max() < 1.15
    assert spread.std(0).min() > 0.02 and spread.std(1).min() > 0.005
