"""Training in loops that are not ours: centroids that move, and models of which a part is unused.

Run as a program it is one of several processes: `torchrun tests/test_training_users.py FOLDER`.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_training
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn

from dynattn import cli, cost, create_model, training
from dynattn.mechanisms.dynamic_group import DynamicGroupAttention

SMALL = dict(img_size=32, dims=(16, 32), depths=(1, 1), heads=(1, 2), groups=2, keys=4, head_dim=16, num_classes=3)


def small(name: str = "dgt_mini", **options) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, **SMALL | options)


def centroids(model: nn.Module) -> Tensor:
    return torch.cat([layer.centroids.flatten() for layer in model.grouped_layers()]).clone()


def loss(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 3, 32, 32)).square().mean()


def moves(model: nn.Module, steps: int, step) -> list[float]:
    """How far the centroids go in each of some steps."""
    path = [centroids(model)]
    for _ in range(steps):
        step()
        path.append(centroids(model))
    return [float((b - a).abs().max()) for a, b in zip(path, path[1:], strict=False)]


# ---------------------------------------------------------------- the warning


def test_sums_that_pile_up_are_told(recwarn):
    """Once, after 50 training forwards without an update; the message has the line that is missing."""
    layer = DynamicGroupAttention(8, 2, groups=2, keys=2)
    x = torch.randn(1, 2, 2, 8)
    for _ in range(49):
        layer(x)
    assert not recwarn.list
    layer.update_centroids(0.1)
    for _ in range(49):
        layer(x)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"50 forward passes.*model\.update_centroids\(lr\) after each step"):
        layer(x)
    for _ in range(60):
        layer(x)
    assert not recwarn.list


def test_evaluation_is_not_warned_of(recwarn):
    layer = DynamicGroupAttention(8, 2, groups=2, keys=2).eval()
    for _ in range(60):
        layer(torch.randn(1, 2, 2, 8))
    assert not recwarn.list


# ---------------------------------------------------------------- loops of others


def test_an_optimiser_alone_does_not_move_centroids():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        loss(model).backward()
        optimizer.step()

    assert moves(model, 3, step) == [0, 0, 0]


def test_one_line_moves_them_with_every_step():
    """By a tenth of the optimiser's largest rate, as a call after the step does."""
    model, alike = small(), small()
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters())], lr=torch.tensor(0.1)
    )
    largest = 0.1 * (len(list(model.parameters())) - 1)
    handle = model.update_centroids_with(optimizer, pace=0.5)
    for one in (model, alike):
        torch.manual_seed(1)
        loss(one).backward()
    optimizer.step()
    alike.update_centroids(0.5 * largest)
    torch.testing.assert_close(centroids(model), centroids(alike), rtol=0, atol=0)
    assert not torch.equal(centroids(model), centroids(small()))
    handle.remove()
    assert moves(model, 1, lambda: (loss(model), optimizer.step())) == [0]


def test_timm_s_loop():
    """What timm's training script does in a step: its scaler, its exponential mean of the model, layer-wise groups."""
    model = small()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.5)
    model.update_centroids_with(optimizer)
    mean, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")

    def step():
        scaler(loss(model), optimizer, clip_grad=1.0, parameters=model.parameters())
        optimizer.zero_grad()
        mean.update(model)

    assert all(far > 0 for far in moves(model, 3, step))
    assert all(layer.waiting == 0 for layer in model.grouped_layers())
    assert not torch.equal(centroids(mean.module), centroids(small()))


def test_accelerate_s_loop_with_accumulation():
    """Centroids move where the optimiser does: in every second of these passes."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small()
    inner = torch.optim.AdamW(model.parameters(), lr=0.5)
    model.update_centroids_with(inner)
    wrapped, optimizer = accelerator.prepare(model, inner)

    def step():
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss(wrapped))
            optimizer.step()
            optimizer.zero_grad()

    assert [far > 0 for far in moves(model, 4, step)] == [False, True, False, True]


def test_a_closure_as_lightning_has_it():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model.update_centroids_with(optimizer)

    def closure():
        value = loss(model)
        value.backward()
        return value

    assert moves(model, 1, lambda: optimizer.step(closure))[0] > 0


def test_a_step_that_the_scaler_skips_moves_nothing():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model.update_centroids_with(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(factor: float):
        scaler.scale(loss(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert moves(model, 1, lambda: step(torch.inf)) == [0]
    assert moves(model, 1, lambda: step(1.0))[0] > 0


def test_a_copy_is_not_moved_with_the_original():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model.update_centroids_with(optimizer)
    other = copy.deepcopy(model)
    loss(other).backward()
    loss(model).backward()
    assert moves(other, 1, optimizer.step) == [0]


def test_optimisers_whose_hooks_do_not_run_are_refused(unchecked):
    model = small()
    lookahead = create_optimizer_v2(model, opt="lookahead_adamw", lr=0.5)
    prepared = Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters()))
    for wrong, kind in ((lookahead, "Lookahead"), (prepared, "AcceleratedOptimizer"), (model, "DGT")):
        with pytest.raises(TypeError, match=f"optimizer: .* got {kind}; if it wraps one, give that"):
            model.update_centroids_with(wrong)
    with pytest.raises(ValueError, match="pace: expected a positive number, got 0"):
        model.update_centroids_with(torch.optim.AdamW(model.parameters()), pace=0)
    model.update_centroids_with(lookahead._base_optimizer)


# ---------------------------------------------------------------- what a model answers for itself


class Sparse(nn.Module):
    """Reads few keys of many, but computes as if it read all."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it is asked, not run")

    def multiply_adds(self, shape) -> int:
        assert shape == (1, 4, 4, 8)
        return 1000


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.sparse = nn.Conv2d(3, 8, 2, 2), Sparse()

    def forward(self, x: Tensor) -> Tensor:
        return self.sparse(self.stem(x).movedim(1, -1))


def test_modules_answer_for_their_own_cost():
    found = cost.count(Net(), 8)
    assert found.macs == 16 * 12 * 8 + 1000
    assert found.macs_biases == found.macs + 16 * 8 + 16 * 8
    assert "forward" not in vars(Net().sparse)


def test_the_loop_calls_after_step(tmp_path):
    """A model says itself what is to be done after a step: the loop knows no paper."""
    rates = []
    model = test_training.net()
    model.after_step = rates.append
    test_training.run(tmp_path, model=model)
    assert len(rates) == test_training.RECIPE.steps and rates[-1] < rates[1]


# ---------------------------------------------------------------- parts that are unused

DAT = dict(img_size=32, dims=(16, 32), depths=(2, 2), heads=(2, 4), groups=(1, 2), window=4, num_classes=10)
DAT |= dict(deformable_stages=(1, 2), strides=(2, 1), kernels=(5, 3))
ABLATIONS = [
    {},
    dict(offsets=False),
    dict(offsets=False, position_bias=None),
    dict(offsets=False, position_bias="fixed"),
    dict(offset_range=0.0),
    dict(position_bias=None),
    dict(position_bias="dwconv"),
    dict(early="sra", deformable_stages=(2,)),
    dict(blocks=[("window", "shifted"), ("window", "deformable_detr")], detr_points=(4, 4)),
]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_whatever_wants_a_gradient_gets_one(options):
    """Under DistributedDataParallel a parameter that wants a gradient and gets none stops the run."""
    model = create_model("dat_mini", **DAT | options)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_unused_offset_network_is_counted_and_saved():
    """The paper counts it."""
    with_offsets, without = (create_model("dat_mini", **DAT, offsets=offsets) for offsets in (True, False))
    assert cost.count(with_offsets, 32).params == cost.count(without, 32).params
    assert with_offsets.state_dict().keys() == without.state_dict().keys()


def test_train_tells_what_stopped_it_in_a_line(monkeypatch, capsys):
    """torch's own errors too: out of memory, a process that was lost."""

    def lost(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(training, "train", lost)
    monkeypatch.delenv("DYNATTN_DEBUG", raising=False)
    assert cli.main(["train", "dat_mini"]) == 2
    assert capsys.readouterr().err == "dynattn: error: Connection closed by peer\n"


@pytest.mark.slow
def test_two_processes_train_a_model_with_an_unused_part(tmp_path):
    """By our loop, and by DistributedDataParallel as torch makes it."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*torchrun, __file__, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in test_training.log(tmp_path)] == list("123456")
    assert (tmp_path / "plain").read_text() == "3"


def one_of_two(out: Path) -> None:
    """What each of the processes does."""
    model = create_model("dat_mini", **DAT, offsets=False)
    test_training.run(out, model=model)
    wrapped, steps = nn.parallel.DistributedDataParallel(model), 3
    optimizer = torch.optim.AdamW(wrapped.parameters())
    for _ in range(steps):
        wrapped(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if torch.distributed.get_rank() == 0:
        (out / "plain").write_text(str(steps))


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
