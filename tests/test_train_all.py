"""`dynattn train --all`: what ships, which checkpoints are out of date and why, and the runs that train them again."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynattn import create_model, weights
from dynattn.training import Recipe, checkpoints, print_runs, shipping, train_all
from dynattn.training.recipes import RECIPES, SHIPPED, Shipping, plain, register_recipe, settings
from dynattn.training.shipping import Run

TINY = Recipe("swin_mini", size=32, train_count=16, test_count=8, steps=3, batch=8)


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Run:
    """The run of a recipe of its own, which alone ships; runs and its checkpoint go to a temporary folder."""
    shipping.recipes()  # the papers register theirs before
    monkeypatch.setattr(shipping, "RUNS", tmp_path / "runs")
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    monkeypatch.setattr(shipping, "SHIPPED", {"tiny": Shipping((0,), tmp_path)})
    return Run("tiny", 0)


def write(run: Run, **story) -> None:
    """A checkpoint as training writes it."""
    model = create_model(TINY.model, img_size=TINY.size, num_classes=10)
    told = {"name": TINY.model, "arguments": {"img_size": 32, "num_classes": 10}, "steps": 3}
    weights.write(
        run.file, model.state_dict(), told | {"recipe": plain(TINY), "data_version": shipping.VERSION} | story
    )


def test_every_checkpoint_has_its_run():
    """And every run its checkpoint, with the log beside it."""
    folders = weights.FOLDER, weights.of_figures()
    files = {run.file for run in shipping.shipped_runs()}
    kept = {file for run in shipping.shipped_runs() for file in run.kept.values()}
    assert files | kept == {file for folder in folders for file in folder.glob("*.safetensors")}
    assert {file.with_suffix(".csv") for file in files} == {file for folder in folders for file in folder.glob("*.csv")}


def test_of_every_model_one_checkpoint_ships_in_the_package():
    runs = {run.file.stem: run for run in shipping.shipped_runs()}
    assert runs["dat_mini"].file == weights.FOLDER / "dat_mini.safetensors"
    assert runs["dat_mini_seed1"].file == weights.of_figures() / "dat_mini_seed1.safetensors"
    assert runs["dgt_sweep_g8k32"].file.parent == weights.of_figures()  # its model is dgt_mini


def test_what_is_as_it_should_be_is_up_to_date(tiny):
    write(tiny)
    assert tiny.reasons() == []


@pytest.mark.parametrize(
    ("story", "reasons"),
    [
        ({"data_version": 1}, [f"data set version 1, now {shipping.VERSION}"]),
        ({"recipe": plain(replace(TINY, lr=0.5, steps=4))}, ["steps 4, now 3", "lr 0.5, now 0.002"]),
        ({"recipe": {k: v for k, v in plain(TINY).items() if k != "task"}}, []),  # a new field: its default was meant
        ({"recipe": {k: v for k, v in plain(TINY).items() if k != "steps"}}, ["steps 500, now 3"]),
    ],
)
def test_what_has_changed_is_told(tiny, story, reasons):
    write(tiny, **story)
    assert tiny.reasons() == reasons


def test_old_checkpoints_tell_less(tiny, monkeypatch):
    """Without a recipe: model, options, size and steps are compared. Without a version of the data set it is 2."""
    monkeypatch.setattr(shipping, "VERSION", 3)
    write(tiny, recipe=None, data_version=2, steps=9, arguments={"img_size": 64, "num_classes": 10, "depths": [1]})
    expected = ["data set version 2, now 3", "model_options {'depths': [1]}, now {}", "size 64, now 32"]
    assert sorted(tiny.reasons()) == sorted([*expected, "steps 9, now 3"])
    told = weights.metadata(weights.path("dat_mini"))
    assert shipping.recipe_told_by(told) == {"model": "dat_mini", "model_options": {}, "size": 128, "steps": 500}


def test_a_model_with_other_parameters_is_told(tiny):
    write(tiny)
    state, story = weights.read(tiny.file)
    key, value = next((key, value) for key, value in state.items() if value.ndim)
    weights.write(tiny.file, state | {key: torch.cat([value, value])}, story)
    shape = tuple(value.shape)
    assert tiny.reasons() == [f"parameters: {key} {(2 * shape[0], *shape[1:])}, now {shape}"]


def test_missing_and_damaged_files_are_told(tiny):
    assert tiny.reasons() == ["missing"]
    tiny.file.write_bytes(b"nothing")
    assert tiny.reasons() == ["damaged"]


def test_weights_of_earlier_steps_ship_too(tiny, monkeypatch):
    """The run is told to keep them, they go beside the last, and one that lacks must be trained."""
    monkeypatch.setattr(shipping, "SHIPPED", {"tiny": Shipping((0,), tiny.file.parent, keep=(0, 2))})
    words = tiny.command
    assert words[words.index("--keep") + 1 :][:2] == ["0", "2"]
    write(tiny)
    tiny.folder.mkdir(parents=True)
    (tiny.folder / "log.csv").write_text("step\n")
    state, story = weights.read(tiny.file)
    for name in ("model", *tiny.kept):
        weights.write(tiny.folder / f"{name}.safetensors", state, story | {"accuracy": 0.5, "seconds": 60})
    assert tiny.reasons() == ["tiny_step0.safetensors is missing"]
    shipping.placed(tiny)
    assert tiny.reasons() == [] and tiny.file.with_stem("tiny_step2").is_file()
    with pytest.raises(ValueError, match="keep: expected steps from 0 to 2, got 3"):
        register_recipe("tiny", TINY, keep=[3])


def test_the_list_says_how_far_a_run_is(tiny, capsys):
    print_runs()
    checkpoint = {"settings": settings(TINY, 0), "step": 2}
    tiny.folder.mkdir(parents=True)
    checkpoints.save(tiny.folder, checkpoint)
    print_runs()
    write(tiny)
    print_runs()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[::2]] == [["file", "state", "why"]] * 3
    assert [" ".join(line.split()) for line in lines[1::2]] == [
        "tiny to train missing",
        "tiny at step 2 of 3 missing",
        "tiny up to date",
    ]


def test_a_run_goes_on_and_never_with_the_state_of_another(tiny):
    """Nor with that of the same recipe on images of another version."""
    tiny.folder.mkdir(parents=True)
    for seed, changes, goes_on in ((0, {}, True), (1, {}, False), (0, {"data_version": 1}, False)):
        checkpoints.save(tiny.folder, {"settings": settings(TINY, seed) | changes, "step": 2})
        assert ("--fresh" not in tiny.command) == goes_on
    words = tiny.command[2:]
    assert words[:6] == ["dynattn", "train", "tiny", "--seed", "0", "--out"]


def test_wrong_arguments_are_refused(tiny, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="processes: expected at least 1, got 0"):
        train_all(0)
    monkeypatch.setattr(shipping, "SHIPPED", {"tiny": Shipping((0, 1), tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere for tiny.safetensors"):
        train_all(1)
    with pytest.raises(ValueError, match="name: expected letters"):
        register_recipe("no name", TINY)


def test_a_recipe_ships_nothing_unless_it_says_so(monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    monkeypatch.setitem(SHIPPED, "tiny", Shipping())  # both are as before after the test
    register_recipe("tiny", TINY)
    assert "tiny" not in {run.name for run in shipping.shipped_runs()}


# ----------------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def three(tiny, monkeypatch, tmp_path) -> list[Run]:
    """Three runs whose processes write what training writes; that of seed 1 fails."""
    monkeypatch.setattr(shipping, "SHIPPED", {"tiny": Shipping((0, 1, 2), tmp_path)})
    monkeypatch.setattr(shipping, "cached", lambda shapes, processes: None)
    write(tiny)
    made = tiny.file.rename(tmp_path / "made")

    def command(run: Run) -> list[str]:
        lines = [
            "import shutil, sys",
            f"if {run.seed} == 1: sys.exit('no luck')",
            f"shutil.copy({str(made)!r}, {str(run.folder / 'model.safetensors')!r})",
            f"open({str(run.folder / 'log.csv')!r}, 'w').write('step\\n')",
        ]
        return [sys.executable, "-c", "\n".join(lines)]

    monkeypatch.setattr(Run, "command", property(command))
    state, story = weights.read(made)
    weights.write(made, state, story | {"accuracy": 0.5, "seconds": 60})
    return [Run("tiny", seed) for seed in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_all_runs_are_trained_and_a_failure_stops_no_other(three, processes, capsys):
    assert not train_all(processes)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and sum("no luck" in line for line in lines) == 1
    assert sum("accuracy 0.500 after 3 steps in 1.0 min" in line for line in lines) == 2
    assert [run.reasons() for run in three] == [[], ["missing"], []]
    assert three[0].file.with_suffix(".csv").read_text() == "step\n"
    assert not train_all(processes) and capsys.readouterr().out.startswith("  1 of 1  tiny_seed1: failed: no luck")


@pytest.mark.slow
def test_an_interruption_ends_the_runs(tiny, monkeypatch):
    """Whatever stops the program: no process stays behind."""
    started = []
    popen = lambda *words, **options: started.append(subprocess.Popen(*words, **options)) or started[-1]  # noqa: E731
    monkeypatch.setattr(shipping, "subprocess", type("", (), {"Popen": popen, "STDOUT": subprocess.STDOUT}))
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(Run, "command", property(lambda run: sleep))

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shipping, "time", type("", (), {"sleep": interrupt}))
    with pytest.raises(KeyboardInterrupt):
        list(shipping.finished([Run("tiny", seed) for seed in range(3)], 2))
    assert len(started) == 2 and all(process.poll() is not None for process in started)


@pytest.mark.slow
def test_the_table_of_the_command_line():
    words = [sys.executable, "-m", "dynattn", "train", "--all", "--list"]
    lines = subprocess.run(words, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    assert len(lines.splitlines()) == 1 + len(shipping.shipped_runs()) and "dat_mini_seed1" in lines
