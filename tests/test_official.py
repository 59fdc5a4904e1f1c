"""Equality with the published code, and what `load_official` accepts and refuses."""

import os
import pickle
import re
from pathlib import Path

import deterministic
import golden
import numpy as np
import published_dat
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import dynattn
from dynattn import core, official
from dynattn.core import resize_fixed

NAMES = list(published_dat.SIZES)
BIG = [pytest.param(name, marks=pytest.mark.slow) if "base" in name else name for name in NAMES]
RECORDED = [name for name in NAMES if name != "dat_tiny_conv"]


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    """dat_tiny's published state dict, deterministic weights."""
    return published_dat.checkpoint("dat_tiny")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return deterministic.image(2, 224)


@pytest.fixture(scope="module")
def published(tiny) -> torch.nn.Module:
    """dat_tiny under those weights, in float64. Tests leave it as it is."""
    return load(tiny)


@pytest.fixture(scope="module")
def logits(published, images) -> torch.Tensor:
    with torch.no_grad():
        return published(images)


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    """The same for a narrow model, which does where the size does not matter."""
    return published_dat.checkpoint("small")


@pytest.fixture(scope="module")
def loaded(small) -> torch.nn.Module:
    """The narrow model under those weights, in float64. Tests leave it as it is."""
    return load(small, **published_dat.SMALL)


@pytest.fixture(scope="module")
def recorded(shared) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "golden_dat_tiny.npz"))


def load(state: dict[str, torch.Tensor], name: str = "dat_tiny", **options) -> torch.nn.Module:
    return dynattn.load_official(dynattn.create_model(name, **options).double().eval(), state)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


# ---------------------------------------------------------------- names


def listed(file: Path) -> dict[str, tuple[int, ...]]:
    rows = (line.split("\t") for line in file.read_text().splitlines())
    return {name: tuple(map(int, shape.split("x"))) if shape else () for name, shape, _ in rows}


@pytest.mark.parametrize("name", RECORDED)
def test_restated_names_are_the_published_ones(name, shared):
    assert published_dat.shapes(name) == listed(shared / f"keys_{name}.tsv")


@pytest.mark.parametrize(
    ("name", "entries", "derived"),
    [("dat_tiny", 219, 10), ("dat_tiny_conv", 219, 10)] + [(name, 435, 16) for name in RECORDED[1:]],
)
def test_every_published_entry_but_the_derived_ones_is_expected(name, entries, derived):
    everything = published_dat.shapes(name)
    learned = {key for key in everything if not key.endswith(published_dat.DERIVED)}
    assert (len(everything), len(everything) - len(learned)) == (entries, derived)
    with torch.device("meta"):
        model = dynattn.create_model(name)
    expected = [entry.name for entry in model.published_entries().values()]
    assert set(expected) == learned and len(expected) == len(learned) == len(model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_of_every_size_load(name):
    state = {key: torch.zeros(()).expand(shape) for key, shape in published_dat.shapes(name).items()}
    model = dynattn.load_official(dynattn.create_model(name), state)
    assert not any(entry.any() for entry in model.state_dict().values())
    assert official.identify(state) == (name, {})


# ---------------------------------------------------------------- parity


def test_the_published_code_s_logits(logits, recorded):
    error = np.abs(logits.numpy() - recorded["logits"]).max() / recorded["logits"].std()
    assert error < 1e-9


def test_the_published_code_s_stages(published, images, recorded):
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: output.permute(0, 3, 1, 2)})

    watched = {"patch_proj": published.embed, "cls_norm": published.norm}
    watched |= {f"stage{i}": stage for i, stage in enumerate(published.stages, 1)}
    watched |= {f"down{i}": stage.down for i, stage in enumerate(published.stages) if i}
    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    with torch.no_grad():
        published(images)
    for handle in handles:
        handle.remove()
    assert len(seen) == 9
    for name, found in seen.items():
        assert [*found.shape[:3]] == recorded[f"{name}_shape"][:3].tolist()
        measured = {"mean": found.mean(), "std": found.std(correction=0), "first8": found.flatten()[:8]}
        for measure, value in measured.items():
            np.testing.assert_allclose(value, recorded[f"{name}_{measure}"], rtol=0, atol=1e-9)


def test_the_published_code_s_points(published, images, recorded):
    layers = {f"s{stage}_b{block}": (stage, block) for stage, block in ((3, 1), (3, 3), (3, 5), (4, 1))}
    assert {key[4:] for key in recorded if key.startswith("pos_")} == set(layers)
    for b, image in enumerate(images):
        trace = dynattn.trace(published, image)
        assert [record.name for record in trace.of_kind("deformable")] == [
            f"stages.{stage - 1}.blocks.{block}.attn" for stage, block in layers.values()
        ]
        for name, (stage, block) in layers.items():
            record = trace[f"stages.{stage - 1}.blocks.{block}.attn"]
            points, references = (recorded[f"{what}_{name}"][b] for what in ("pos", "ref"))
            found = record.points.reshape(points.shape)
            np.testing.assert_allclose(found, points, rtol=0, atol=1e-9)
            # The published code makes references in float32, whatever the model's dtype.
            references = references.reshape(record.points.shape)
            np.testing.assert_allclose(record.references.expand_as(record.points), references, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", BIG)
def test_golden_logits(name, request, images):
    """Holds anywhere: a handful of logits as plain numbers."""
    side, first, last, distance = golden.LOGITS[name]
    if name == "dat_tiny":
        found = request.getfixturevalue("logits")
    else:
        with torch.no_grad():
            found = load(published_dat.checkpoint(name), name)(deterministic.image(2, side))
    np.testing.assert_allclose(found[0, :4], first, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found[1, -2:], last, rtol=0, atol=1e-9)
    if distance is not None:
        assert float((found[0] - found[1]).square().mean().sqrt()) == pytest.approx(distance, abs=5e-4)


def grid_sample(**changes):
    """torch's grid_sample, except that some of its arguments are always these."""
    original = F.grid_sample
    return lambda x, grid, **options: original(x, grid, **(options | changes))


def swapped(x, grid, **options):
    return torch.grid_sampler(x, grid.flip(-1), 0, 0, True)


@pytest.mark.parametrize(
    ("reading", "effect"),
    [
        (dict(offset_range=4.0), 0.087),
        (dict(offset_range=0.0), 0.026),
        (dict(shift="down"), 0.023),
        (dict(reference="corner"), 0.064),
        (dict(offset_unit="cell"), 0.108),
        (dict(offsets=False), 0.033),
        (grid_sample(align_corners=False), 0.076),
        (grid_sample(padding_mode="border"), 0.021),
        (swapped, 0.020),
    ],
    ids=["s = 4", "s = 0", "roll 3", "corners", "cells", "no sampling", "align_corners=False", "border", "x and y"],
)
def test_a_wrong_reading_would_not_pass(reading, effect, tiny, images, logits, monkeypatch):
    """What each of the likely mistakes does to the logits of one image; the tolerance above is 1e-9."""
    if isinstance(reading, dict):
        model = load(tiny, **reading)
    else:
        model = load(tiny)
        monkeypatch.setattr(F, "grid_sample", reading)
    with torch.no_grad():
        assert apart(model(images[:1]), logits[:1]) == pytest.approx(effect, rel=0.1)


def test_float32_is_as_near_as_rounding_allows(published, images, logits):
    single = dynattn.create_model("dat_tiny").eval()
    single.load_state_dict(published.state_dict())
    with torch.no_grad():
        assert apart(single(images[:1].float()).double(), logits[:1]) < 5e-6


# ---------------------------------------------------------------- what is accepted


@pytest.fixture
def model() -> torch.nn.Module:
    return dynattn.create_model("dat_tiny", **published_dat.SMALL)


def equal(model: torch.nn.Module, expected: torch.nn.Module) -> bool:
    ours, theirs = model.state_dict(), expected.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key].float()) for key in ours)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        (None, ""),
        ("model", ""),
        ("state_dict", ""),
        ("state_dict_ema", ""),
        (None, "module."),
        ("model", "backbone."),
        ("state_dict", "module.backbone."),
    ],
)
def test_wrappers_and_prefixes(wrapper, prefix, model, loaded, small):
    state = {prefix + key: value for key, value in small.items()}
    source = state if wrapper is None else {wrapper: state, "epoch": 299, "optimizer": {"state": {}}}
    assert dynattn.load_official(model, source) is model
    assert equal(model, loaded)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors"])
def test_files(name, tmp_path, model, loaded, small):
    state = {key: value.float() for key, value in small.items()}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"model": state, "epoch": 299}, tmp_path / name)
    path = tmp_path / name if name.endswith("pt") else str(tmp_path / name)
    assert equal(dynattn.load_official(model, path), loaded)


def test_a_file_in_torch_s_old_format(tmp_path, model, loaded, small):
    torch.save(small, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(dynattn.load_official(model, tmp_path / "old.pth"), loaded)


def test_derived_buffers_are_ignored_whatever_they_hold(model, loaded):
    state = published_dat.checkpoint("small", derived=True)
    state |= {"stages.2.attns.1.reference": torch.full((3,), torch.nan), "stages.2.attns.1.q_grid": torch.zeros(1)}
    assert equal(dynattn.load_official(model, state), loaded)


def test_precision_and_parameters(model, loaded, small):
    """Half-precision checkpoints, and dicts of parameters that want gradients."""
    half = dynattn.load_official(model, {key: value.half() for key, value in small.items()})
    assert all(p.dtype == torch.float32 and p.requires_grad and p.grad_fn is None for p in half.parameters())
    assert not equal(half, loaded)
    state = {key: torch.nn.Parameter(value) for key, value in small.items()}
    assert equal(dynattn.load_official(model, state), loaded)


def test_the_model_does_not_share_memory_with_the_state_dict(model, loaded, small):
    state = {key: value.float() for key, value in small.items()}
    dynattn.load_official(model, state)
    for value in state.values():
        value.zero_()
    assert equal(model, loaded)


# ---------------------------------------------------------------- another resolution


def test_tables_are_resized_from_224_to_384():
    """dat_base into dat_base_384, as its authors fine-tuned it: windows of 7 to 12, maps of 14 and 7 to 24 and 12."""
    state = {
        key: deterministic.tensor(key, shape).float() if "table" in key else torch.zeros(()).expand(shape)
        for key, shape in published_dat.shapes("dat_base").items()
    }
    ours = dynattn.load_official(dynattn.create_model("dat_base_384"), state).state_dict()
    published, tables = published_dat.shapes("dat_base_384"), 0
    for key, old in state.items():
        if "table" not in key:
            continue
        stage, block = re.match(r"stages\.(\d+)\.attns\.(\d+)\.", key).groups()
        found = ours[f"stages.{stage}.blocks.{block}.attn.table"]
        if key.endswith("rpe_table"):
            expected = F.interpolate(old[None], size=published[key][1:], mode="bicubic", align_corners=False)[0]
        else:
            square = old.T.reshape(1, -1, 13, 13)
            expected = F.interpolate(square, size=(23, 23), mode="bicubic", align_corners=False)[0]
            assert expected.flatten(1).T.shape == published[key]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        tables += 1
    assert tables == 24


@pytest.mark.parametrize("size", [(96, 160), 320])
def test_a_model_made_for_a_size_equals_one_that_is_run_at_it(size, small, loaded):
    image = deterministic.image(1, size)
    made = load(small, img_size=size, **published_dat.SMALL)
    assert made.stages[2].blocks[1].attn.table.shape != loaded.stages[2].blocks[1].attn.table.shape
    with torch.no_grad():
        torch.testing.assert_close(made(image), loaded(image), rtol=0, atol=0)


def test_fixed_tables_are_resized_too(small):
    """Table 6's "fixed" bias: an entry for each query and point."""
    options = published_dat.SMALL | dict(position_bias="fixed")
    names = dynattn.create_model("dat_tiny", **options).published_entries().values()
    state = {entry.name: small[entry.name] for entry in names}
    for stage, block, cells in ((2, 1, 196), (2, 3, 196), (2, 5, 196), (3, 1, 49)):
        heads, name = 4 if stage == 2 else 8, f"stages.{stage}.attns.{block}.rpe_table"
        state[name] = deterministic.tensor(name, (heads, cells, cells))
    made, native = load(state, img_size=(64, 96), **options), load(state, **options)
    table = native.stages[2].blocks[1].attn.table.detach()
    torch.testing.assert_close(made.stages[2].blocks[1].attn.table, resize_fixed(table, (14, 14), (4, 6), 1))
    image = deterministic.image(1, (64, 96))
    with torch.no_grad():
        torch.testing.assert_close(made(image), native(image), rtol=0, atol=0)


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def untouched() -> torch.nn.Module:
    """One model for all refusals: `refusal` sees to it that each leaves the model as it was."""
    return dynattn.create_model("dat_tiny", **published_dat.SMALL)


def refusal(model: torch.nn.Module, source: object, kind: type = ValueError) -> str:
    """The error's text, after a check that not a bit of the model has changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(kind) as caught:
        dynattn.load_official(model, source)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert str(caught.value).startswith("path_or_state_dict: ")
    return str(caught.value)


def zeros(name: str = "small", **changed: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(()).expand(shape) for key, shape in (published_dat.shapes(name) | changed).items()}


def test_missing_unexpected_and_misshapen_entries_are_listed(untouched):
    state = zeros()
    missing = [key for key in state if "linear1" in key]
    for key in missing:
        del state[key]
    state |= {f"extra.{i:02}": torch.zeros(1) for i in range(11)}
    state["cls_norm.norm.weight"] = torch.zeros(3)
    message = refusal(untouched, state)
    assert f"24 missing: {', '.join(missing[:10])}, and 14 more\n" in message
    assert f"11 unexpected: {', '.join(f'extra.{i:02}' for i in range(10))}, and 1 more\n" in message
    assert "1 of the wrong shape: cls_norm.norm.weight (3,) for (64,)\n" in message
    assert message.endswith("It is no published model that dynattn knows.")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("stages.0.attns.0.relative_position_bias_table", (170, 1)),
        ("stages.0.attns.0.relative_position_bias_table", (169, 2)),
        ("stages.0.attns.0.relative_position_bias_table", ()),
        ("stages.0.attns.0.relative_position_bias_table", (169,)),
        ("stages.2.attns.1.rpe_table", (4, 27)),
        ("stages.2.attns.1.rpe_table", (3, 27, 27)),
        ("stages.2.attns.1.rpe_table", ()),
        ("stages.2.attns.1.proj_q.weight", (32, 32, 3, 3)),
        ("stages.2.attns.1.proj_q.weight", (32,)),
        ("stages.2.attns.1.conv_offset.0.weight", (16, 1, 3, 3)),
        ("patch_proj.0.weight", ()),
        ("cls_head.weight", ()),
    ],
)
def test_shapes_that_nothing_can_be_made_of(key, shape, untouched):
    assert f"1 of the wrong shape: {key} {shape} for (" in refusal(untouched, zeros(**{key: shape}))


def test_whole_numbers_are_no_weights(untouched):
    state = zeros() | {"cls_norm.norm.weight": torch.zeros(64, dtype=torch.int64)}
    assert "1 of the wrong shape: cls_norm.norm.weight (64,) of torch.int64 for (64,)" in refusal(untouched, state)


TABLES = {(2, 1): 12, (2, 3): 12, (2, 5): 12, (3, 1): 24}  # heads of dat_tiny's deformable layers, by stage and block


def at_resolution(*maps: tuple[int, int]) -> dict[str, torch.Tensor]:
    """dat_tiny's entries, with tables for maps of these sides in stages 3 and 4."""
    tables = {
        f"stages.{i}.attns.{d}.rpe_table": (heads, *(2 * side - 1 for side in maps[i - 2]))
        for (i, d), heads in TABLES.items()
    }
    return zeros("dat_tiny", **tables)


CALLS = {
    'dynattn.create_model("dat_tiny", img_size=448)': lambda: at_resolution((28, 28), (14, 14)),
    'dynattn.create_model("dat_tiny", img_size=(192, 320))': lambda: at_resolution((12, 20), (6, 10)),
    'dynattn.create_model("dat_tiny", num_classes=21)': lambda: zeros(
        "dat_tiny", **{"cls_head.weight": (21, 768), "cls_head.bias": (21,)}
    ),
} | {f'dynattn.create_model("{name}")': lambda name=name: zeros(name) for name in NAMES}


@pytest.mark.parametrize("call", CALLS)
def test_the_call_that_would_fit_is_named(call, untouched):
    """Another size, another resolution, another number of classes."""
    assert refusal(untouched, CALLS[call]()).endswith(f"\nIt looks like one for {call}.")


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_the_call_that_is_named_makes_a_model_that_fits(call):
    dynattn.load_official(eval(call, {"dynattn": dynattn}), CALLS[call]())


def test_another_number_of_classes(untouched):
    message = refusal(untouched, zeros(**{"cls_head.weight": (21, 64), "cls_head.bias": (21,)}))
    assert "2 of the wrong shape: cls_head.weight (21, 64) for (1000, 64), cls_head.bias (21,) for (1000,)" in message


def test_a_dat_of_an_unknown_size(untouched):
    state = {key: value for key, value in zeros("dat_tiny").items() if not key.startswith("stages.0.attns")}
    assert refusal(untouched, state).endswith("It is no published model that dynattn knows.")
    state = zeros("dat_tiny", **{"patch_proj.0.weight": (64, 3, 4, 4)})
    assert refusal(untouched, state).endswith("It is no published model that dynattn knows.")
    with pytest.raises(ValueError, match="none of the published ones: 64 stem channels, 6 blocks in stage 3, a 4 x 4"):
        official.identify(state)


def test_a_checkpoint_of_another_paper(untouched, shared):
    state = {key: torch.zeros(shape) for key, shape in listed(shared / "keys_hlg_tiny.tsv").items()}
    message = refusal(untouched, state)
    assert "209 missing: patch_proj.0.weight" in message and f"{len(state)} unexpected: " in message
    assert message.endswith('It looks like one for dynattn.create_model("hlg_tiny").')
    message = refusal(untouched, {f"theirs.{name}": value for name, value in state.items()})
    assert message.endswith("It is no published model that dynattn knows.")


def test_a_published_checkpoint_for_a_model_that_has_none():
    message = refusal(dynattn.create_model("dat_mini"), zeros("dat_tiny"))
    assert "missing: embed.convs.0.0.weight" in message and 'dynattn.create_model("dat_tiny")' in message
    with pytest.raises(TypeError, match="model: there are no published weights for a Linear"):
        dynattn.load_official(torch.nn.Linear(2, 2), zeros())


def test_the_offset_network_of_the_text_has_no_norm(small):
    """variant="paper" differs in shapes; two keywords make the published weights fit the text's other readings."""
    message = refusal(dynattn.create_model("dat_tiny", variant="paper", **published_dat.SMALL), small)
    assert "8 unexpected: stages.2.attns.1.conv_offset.1.norm.bias" in message
    assert "1 of the wrong shape: stages.3.attns.1.conv_offset.0.weight" in message
    load(small, variant="paper", offset_norm=True, kernels=(9, 7, 5, 3), **published_dat.SMALL)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_no_numbers(value, untouched):
    state = zeros() | {"cls_norm.norm.bias": torch.full((64,), value)}
    assert "1 entries hold NaN or infinity, first ['cls_norm.norm.bias']" in refusal(untouched, state)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ({}, ValueError, "expected tensors by name"),
        ({"model": {}}, ValueError, "expected tensors by name"),
        ({"model": 3}, ValueError, r"got {model: int}"),
        ({0: torch.zeros(1)}, ValueError, r"got {0: Tensor}"),
        ({"a": np.zeros(1)}, ValueError, r"got {a: ndarray}"),
        ([], TypeError, "expected a path or a dict, got list"),
        (None, TypeError, "expected a path or a dict, got NoneType"),
        (torch.zeros(3), TypeError, "expected a path or a dict, got Tensor"),
        ("nowhere.pth", FileNotFoundError, "no file nowhere.pth"),
        (os.curdir, FileNotFoundError, "no file"),
    ],
)
def test_sources_that_are_none(source, kind, message, untouched):
    assert re.search(message, refusal(untouched, source, kind))


# ---------------------------------------------------------------- files that are damaged, or worse


def truncated(path: Path) -> None:
    whole(path)
    path.write_bytes(path.read_bytes()[:-2000])


def whole(path: Path) -> None:
    state = {"a": torch.zeros(2000)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def truncated_early(path: Path) -> None:
    whole(path)
    path.write_bytes(path.read_bytes()[:100])


def truncated_old(path: Path) -> None:
    torch.save({"a": torch.zeros(2000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("This is a README, not a checkpoint.\n" * 40)


def zero_bytes(path: Path) -> None:
    path.write_bytes(bytes(4000))


def picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", [truncated, truncated_early, truncated_old, empty, text, zero_bytes, picture])
def test_damaged_files(damage, suffix, tmp_path, untouched):
    path = tmp_path / f"weights{suffix}"
    damage(path)
    message = refusal(untouched, path)
    assert message.startswith(f"path_or_state_dict: {path} is not a checkpoint, or is damaged (")
    assert "weights_only=False" not in message and "\n" not in message  # torch's advice would run what is in the file


def test_files_that_hold_something_else(tmp_path, untouched):
    for content, kind in ((torch.zeros(3), "Tensor"), ([1, 2], "list"), (None, "NoneType")):
        torch.save(content, tmp_path / "other.pth")
        assert f"holds a {kind}, not a state dict" in refusal(untouched, tmp_path / "other.pth")
    whole(tmp_path / "whole.safetensors")
    assert "209 missing: " in refusal(untouched, tmp_path / "whole.safetensors")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "torch, old format", "pickle", "pickle, protocol 2"])
def test_code_in_a_file_is_not_run(how, tmp_path, untouched):
    mark, path = tmp_path / "exploded", tmp_path / "weights.pth"
    content = {"model": {"a": torch.zeros(1)}, "surprise": Bomb(mark)}
    if how.startswith("torch"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    else:
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=2 if "2" in how else 4))
    message = refusal(untouched, path)
    assert not mark.exists()
    assert ("209 missing" if how.startswith("torch") else "is not a checkpoint") in message
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb is a real one


# ---------------------------------------------------------------- model_from


def test_a_model_from_its_checkpoint_alone(tmp_path, tiny, published):
    torch.save({"model": {key: value.float() for key, value in tiny.items()}}, tmp_path / "tiny.pth")
    name, model = official.model_from(tmp_path / "tiny.pth")
    assert name == "dat_tiny" and not model.training and equal(model, published)


def test_model_from_refuses_what_it_does_not_know(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="state_dict: none of the published models has such entries: a"):
        official.model_from(tmp_path / "other.pth")
    torch.save({"patch_proj.0.weight": torch.zeros(96, 3, 4, 4)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="state_dict: none of the published models"):
        official.model_from(tmp_path / "part.pth")
    with pytest.raises(FileNotFoundError, match="no file"):
        official.model_from(tmp_path / "nowhere.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of ours"):
        official.model_from(tmp_path / "other.safetensors")


def test_resizing_is_core_s(loaded):
    """One rule for tables, at run time and on loading."""
    table = loaded.stages[2].blocks[1].attn.table.detach()
    expected = F.interpolate(table[None], size=(9, 31), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(core.resize_table(table, (9, 31)), expected, rtol=0, atol=0)
