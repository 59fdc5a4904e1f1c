"""Training: runs that are killed, split over processes, wrong, or diverging; and what they leave behind.

Run as a program it is one of those runs: `python tests/test_training.py plain|killed FOLDER`.
"""

import csv
import json
import os
import pickle
import random
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dynattn import create_model, weights
from dynattn.data import Shapes, cached
from dynattn.training import Recipe, evaluate, fit, get_recipe, loop, train
from dynattn.training.recipes import command

RECIPE = Recipe("net", train_count=32, steps=6, batch=8, warmup=0.2)
KILLED = Recipe("net", train_count=32, steps=40, batch=8)


def net(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm((8, 4, 4)), nn.GELU(), nn.Flatten(), nn.Dropout(dropout)
    return nn.Sequential(*layers, nn.Linear(128, 10))


def photographs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images whose brightness is their label, with noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, count)
    images = labels[:, None, None, None] * 24 + draw.integers(0, 24, (count, 3, 16, 16))
    return images.astype(np.uint8), labels


def run(out: Path, recipe: Recipe = RECIPE, model: nn.Module | None = None, **options) -> nn.Module:
    model = model or net()
    every = {"log_every": 1, "save_every": 2, "evaluate_every": 3, "progress": False}
    fit(model, photographs(recipe.train_count), photographs(16, seed=1), recipe, out, **(every | options))
    return model


def log(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv") as stream:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def interrupt(monkeypatch, step: int) -> None:
    """Make the next run stop where it would draw the batch of that step."""
    draw = loop.draw_batch

    def draw_or_stop(*arguments):
        if arguments[3] == step:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(loop, "draw_batch", draw_or_stop)


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, monkeypatch, step):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, step)
        run(tmp_path / "parts")
    assert len(log(tmp_path / "parts")) == step - 1
    torch.rand(7)  # whatever happens to the caller's random numbers
    assert same(whole, run(tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")


def test_a_finished_run_is_not_trained_further(tmp_path):
    assert same(run(tmp_path), run(tmp_path))
    assert [row["step"] for row in log(tmp_path)] == list("123456")
    assert [row["step"] for row in log(tmp_path) if row["test_accuracy"]] == ["3", "6"]


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    model = net()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(tmp_path, model=model)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_the_same(tmp_path):
    program(sys.executable, __file__, "killed", tmp_path)
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert same(run(tmp_path / "whole", KILLED), run(tmp_path / "parts", KILLED))  # finished: only loads


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program(*torchrun, __file__, "plain", tmp_path / "two")
    run(tmp_path / "one", model=net(dropout=0))
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert float(two[key] or 0) == pytest.approx(float(one[key] or 0), rel=1e-4), key


def program(*words) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [str(word) for word in words]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_slow_run_is_saved_with_every_row_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_AFTER", 0)
    interrupt(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, log_every=2, save_every=1000)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_training_learns(tmp_path):
    recipe = Recipe("net", train_count=128, steps=150, batch=32, lr=1e-2)
    model = run(tmp_path, recipe, log_every=10, save_every=150, evaluate_every=150)
    rows = log(tmp_path)
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    accuracy, loss = evaluate(model, *photographs(16, seed=1))
    assert accuracy > 0.5
    assert (accuracy, loss) == pytest.approx((float(rows[-1]["test_accuracy"]), float(rows[-1]["test_loss"])), rel=1e-6)


def test_a_folder_of_another_run_is_refused_and_kept(tmp_path):
    run(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    other = Recipe("net", train_count=32, steps=6, batch=8, warmup=0.2, lr=1e-3)
    with pytest.raises(ValueError, match=r"lr=0.002 \(now 0.001\), seed=0 \(now 1\); pass another --out, or --fresh"):
        run(tmp_path, other, seed=1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run(tmp_path, other, seed=1, fresh=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() != before


def test_train_leaves_a_checkpoint_that_says_what_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DYNATTN_CACHE", str(tmp_path / "cache"))
    changes = {"steps": 2, "batch": 8, "size": 32, "train_count": 16, "test_count": 20}
    result = train("swin_mini", tmp_path / "run", seed=3, workers=1, **changes)
    assert f"test accuracy {result['accuracy']:.3f}" in capsys.readouterr().out
    assert result["command"] == (
        "dynattn train swin_mini --seed 3 --steps 2 --batch 8 --size 32 --train-count 16 --test-count 20"
    )
    assert result["arguments"] == {"img_size": 32, "num_classes": 10}
    assert (result["name"], result["seed"], result["steps"]) == ("swin_mini", 3, 2)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    state, metadata = weights.read(tmp_path / "run" / "model.safetensors")
    assert metadata == result
    model = create_model(metadata["name"], **metadata["arguments"])
    model.load_state_dict(state)
    images, labels, _ = cached(Shapes("easy", "test", 32, 20))
    assert evaluate(model, images, labels) == (result["accuracy"], pytest.approx(result["loss"], rel=1e-6))


def test_weights_of_chosen_steps_are_kept(tmp_path, monkeypatch):
    """They are those of the run at that step: 0 is the start. A step that never comes is refused."""
    monkeypatch.setenv("DYNATTN_CACHE", str(tmp_path / "cache"))
    options = {"size": 32, "train_count": 16, "test_count": 8, "batch": 8, "steps": 2, "workers": 1, "progress": False}
    with pytest.raises(ValueError, match="keep: expected steps from 0 to 1, got 2"):
        train("dat_mini", tmp_path / "run", keep=[2], **options)
    train("dat_mini", tmp_path / "run", keep=[0, 1], **options)
    states = [weights.read(tmp_path / "run" / f"{name}.safetensors")[0] for name in ("step0", "step1", "model")]
    assert all(states[0].keys() == state.keys() for state in states)
    assert not any(torch.equal(a["head.weight"], b["head.weight"]) for a, b in pairwise(states))
    told = weights.metadata(tmp_path / "run" / "step1.safetensors")
    assert told["steps"] == 1 and told["name"] == "dat_mini"


def test_model_options_reach_the_model_and_the_command():
    recipe = get_recipe("swin_mini", model_options={"window_size": 8})
    assert recipe.model_options["window_size"] == 8
    line = command("swin_mini", 0, model_options={"window_size": 8})
    assert shlex.split(line)[-1] == '{"window_size": 8}'


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", pickle.dumps(Trap(), protocol=2)])
def test_a_damaged_checkpoint_is_refused_and_runs_no_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint.pt is damaged.*--fresh"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content and not (tmp_path / "trap").exists()


def test_divergence_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    draw = loop.draw_batch

    def poisoned(*arguments):
        images, labels = draw(*arguments)
        return (images * float("nan") if arguments[3] == 5 else images), labels

    monkeypatch.setattr(loop, "draw_batch", poisoned)
    with pytest.raises(FloatingPointError, match="step 5: loss nan"):
        run(tmp_path, log_every=6)  # noticed at the next row or checkpoint
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_wrong_numbers_of_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_set: expected train_count = 40 images, got 32"):
        fit(net(), photographs(32), photographs(8), Recipe("net", train_count=40, batch=8), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"lr": -1.0}, ValueError, "lr: expected a positive number, got -1.0"),
        ({"warmup": 1.0}, ValueError, r"warmup: expected a number in \[0, 1\), got 1.0"),
        ({"batch": 7000}, ValueError, "batch: expected at most train_count = 6000, got 7000"),
        ({"momentum": 0.9}, TypeError, "momentum: expected one of model_options, .*steps"),
    ],
)
def test_wrong_recipes_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        get_recipe("dat_mini", **changes)


def test_unknown_recipes_are_refused():
    with pytest.raises(ValueError, match="name: expected one of .*dat_mini, .*, got 'dat_tiny'"):
        train("dat_tiny")


def test_an_epoch_shows_every_image_once_in_another_order():
    labels = np.arange(32)
    images = np.zeros((32, 3, 8, 8), np.uint8)
    epochs = [
        torch.cat([loop.draw_batch((images, labels), RECIPE, seed, step)[1] for step in range(first, first + 4)])
        for seed, first in ((0, 1), (0, 5), (1, 1))
    ]
    assert all(sorted(epoch.tolist()) == list(range(32)) for epoch in epochs)
    assert not any(torch.equal(epochs[a], epochs[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_learning_rate_rises_then_falls_to_nearly_zero():
    rates = [loop.learning_rate(Recipe("net", steps=100, warmup=0.1), step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(2e-4) and np.argmax(rates) == 9 and max(rates) <= 2e-3
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] < 1e-5


def test_checkpoints_round_trip_in_half_precision(tmp_path):
    file = tmp_path / "net.safetensors"
    state = {"weight": torch.randn(3, 4), "count": torch.tensor(2**40)}
    weights.write(file, state, {"classes": ["a", "b"], "accuracy": 0.5})
    read, metadata = weights.read(file)
    assert torch.equal(read["weight"], state["weight"].half().float()) and torch.equal(read["count"], state["count"])
    assert metadata == {"classes": ["a", "b"], "accuracy": 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


def test_unusable_weight_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "net.safetensors"
    weights.write(file, {"weight": torch.randn(30, 4)}, {})
    for content in (file.read_bytes()[:-5], file.read_bytes()[:20], b"", pickle.dumps(Trap(), protocol=2)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="net.safetensors is not a whole safetensors file"):
            weights.read(file)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no readable metadata entry 'dynattn'"):
        weights.read(file)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        weights.read(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="state: expected values that float16 holds, got others in weight"):
        weights.write(file, {"weight": torch.tensor([1e6])}, {})
    with pytest.raises(ValueError, match="name: expected a model with a shipped checkpoint"):
        weights.path("dat_tiny")


def killed(out: Path) -> None:
    """Start a run again and again, killing it shortly after it has saved something, until one ends."""
    checkpoint = out / "parts" / "checkpoint.pt"
    draw = random.Random(0)
    for _ in range(6):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            run(out / "parts", KILLED)
            os._exit(0)
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
        assert torch.load(checkpoint, weights_only=True)["step"] < KILLED.steps
    run(out / "parts", KILLED)
    run(out / "whole", KILLED)


def plain(out: Path) -> None:
    run(out, model=net(dropout=0))


if __name__ == "__main__":
    {"plain": plain, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
