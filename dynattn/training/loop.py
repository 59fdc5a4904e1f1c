"""The training loop: the same from one CPU core to many processes, resumable to the bit.

Every random draw of a step is a function of (seed, step): the order of images, their augmentation, the dropped paths.
So a run that goes on from a checkpoint needs the weights and the optimiser's state, nothing else, and processes that
share a batch agree on it without talking. (To the bit on a CPU with the same number of threads: sums in another order
round differently, and CUDA adds the gradients of bilinear samples in any order.)
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int, UInt8
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__, create_model, weights
from ..data import Shapes, augment, cached
from ..data.shapes import VERSION
from . import checkpoints
from .recipes import Recipe, check_keep, command, get_recipe, plain, settings
from .tasks import TASKS, Images, Truth

Photographs = tuple[Images, Truth]

INITIALISATION, ORDER, AUGMENTATION, DROPPING = range(4)  # what random numbers are drawn for
SAVE_AFTER = 30  # seconds: what a run that is killed may lose, and the steps to the next row of the log


def train(
    name: str,
    out: str | Path | None = None,
    *,
    seed: int = 0,
    fresh: bool = False,
    workers: int = 2,
    keep: Sequence[int] = (),
    progress: bool = True,
    **changes,
) -> dict[str, Any]:
    """Train a small model by its recipe, from where an earlier run in the same folder stopped; return what it reached.

    out: folder for checkpoint.pt, log.csv, model.safetensors and result.json, runs/NAME/seedSEED if None; all processes
    must see it. fresh: start over. workers: processes that draw the images, once. keep: steps after which the weights
    are written too, to stepN.safetensors. changes: fields of `Recipe`.
    Raises: ValueError, TypeError for a wrong recipe or the folder of another run; FloatingPointError on divergence.
    """
    recipe = get_recipe(name, **changes)
    check_keep(keep, recipe.steps)
    out = Path(out or Path("runs", name, f"seed{seed}"))
    task = TASKS[recipe.task]
    arguments = {"img_size": recipe.size, "num_classes": len(task.classes), **recipe.model_options}
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed, INITIALISATION))
        model = create_model(recipe.model, **arguments)
    accelerator = make_accelerator()
    progress = progress and accelerator.is_main_process
    with accelerator.local_main_process_first():  # it draws the images, the others find them in the cache
        train_set, test_set = (
            (images, task.truth(labels, masks))
            for images, labels, masks in (
                cached(Shapes(recipe.level, split, recipe.size, count), workers, progress)
                for split, count in (("train", recipe.train_count), ("test", recipe.test_count))
            )
        )
    about = {
        "name": recipe.model,
        "arguments": arguments,
        "classes": list(task.classes),
        "command": command(name, seed, **changes),
        "recipe": plain(recipe),
        "data_version": VERSION,
        "seed": seed,
    }

    def keep_weights(step: int) -> None:
        if step in keep and accelerator.is_main_process:
            weights.write(out / f"step{step}.safetensors", halved(model), about | {"steps": step})

    rows = fit(
        model, train_set, test_set, recipe, out, seed=seed, fresh=fresh, progress=progress, after_step=keep_weights
    )
    result = about | {"steps": recipe.steps, "seconds": round(rows[-1]["seconds"])}
    if accelerator.is_main_process:
        result = export(model, out / "model.safetensors", test_set, result, recipe.task)
        weights.write_whole(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    if progress:
        print(f"{name}  seed {seed}  {recipe.steps} steps  {rows[-1]['seconds'] / 60:.1f} min  ", end="")
        iou = f"test mean IoU {result['mean_iou']:.3f}  " if "mean_iou" in result else ""
        print(f"{iou}test accuracy {result['accuracy']:.3f}  test loss {result['loss']:.3f}")
        print(f"{out}: model.safetensors (half precision), result.json, log.csv, checkpoint.pt")
    accelerator.wait_for_everyone()
    return result


def fit(
    model: nn.Module,
    train_set: Photographs,
    test_set: Photographs,
    recipe: Recipe,
    out: str | Path,
    *,
    seed: int = 0,
    fresh: bool = False,
    progress: bool = True,
    log_every: int = 10,
    save_every: int = 100,
    evaluate_every: int = 250,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[dict[str, float]]:
    """Train a model in place on images in memory and return the rows of its log: `train` without data and export.

    A batch is split over the processes, so that any number of them takes the same steps. A row of the log, a checkpoint
    and a test come after so many steps each, and after the last one; a checkpoint also with the first row of the log
    that stands half a minute after the last. after_step: called with the number of each step, with 0 before the first.
    """
    out = Path(out)
    accelerator = make_accelerator()
    if len(train_set[1]) != recipe.train_count:
        raise ValueError(f"train_set: expected train_count = {recipe.train_count} images, got {len(train_set[1])}")
    if recipe.batch % accelerator.num_processes:
        raise ValueError(f"batch: expected a multiple of {accelerator.num_processes} processes, got {recipe.batch}")
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        if fresh:
            (out / "checkpoint.pt").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    saved = checkpoints.load(out, settings(recipe, seed))

    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=undecayed)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups))
    start, rows = 0, []
    if saved:
        start, rows = saved["step"], saved["rows"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    if accelerator.is_main_process:
        checkpoints.write_log(out, rows)

    last_saved = time.perf_counter()
    began = last_saved - (rows[-1]["seconds"] if rows else 0)
    bar = tqdm(total=recipe.steps, initial=start, unit="step", disable=not (progress and accelerator.is_main_process))
    pending = []  # what the steps since the last row measured: no waiting for the device in between
    model.train()
    if start == 0:
        after_step(0)
    with bar, torch.random.fork_rng():
        for step in range(start + 1, recipe.steps + 1):
            pending.append(take_step(accelerator, wrapped, optimizer, train_set, recipe, seed, step))
            after_step(step)
            due = [step % every == 0 or step == recipe.steps for every in (log_every, save_every, evaluate_every)]
            if not any(due):
                continue
            measured = accelerator.reduce(torch.stack(pending), "mean").cpu()
            pending.clear()
            stop_unless_finite(measured, step)
            loss, accuracy, _ = measured.mean(0).tolist()
            row = {"step": step, "seconds": time.perf_counter() - began, "lr": learning_rate(recipe, step)}
            rows.append(row | {"loss": loss, "accuracy": accuracy})
            _, saves, tests = due
            if accelerator.is_main_process:
                if tests:
                    found = TASKS[recipe.task].evaluate(model, *test_set)
                    rows[-1] |= {f"test_{name}": value for name, value in found.items()}
                    model.train()
                checkpoints.write_log(out, rows)
                if saves or time.perf_counter() - last_saved > SAVE_AFTER:
                    last_saved = time.perf_counter()
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    checkpoints.save(out, {"settings": settings(recipe, seed), "step": step, "rows": rows, **state})
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes mixed precision off the caller's model
    return rows


def take_step(
    accelerator: Accelerator, model: nn.Module, optimizer, train_set: Photographs, recipe: Recipe, seed: int, step: int
) -> Float[Tensor, " 3"]:
    """One optimiser step on this process's share of the batch; returns its loss, accuracy and gradient norm."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    images, truth = (part[share] for part in draw_batch(train_set, recipe, seed, step, accelerator.device))
    torch.manual_seed(mix(seed, DROPPING, step, accelerator.process_index))
    unwrapped = accelerator.unwrap_model(model)
    loss, accuracy = TASKS[recipe.task].loss(model, unwrapped, images, truth, recipe.label_smoothing)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    if after_step := getattr(unwrapped, "after_step", None):
        after_step(recipe.pace * learning_rate(recipe, step))
    return torch.stack([loss.detach(), accuracy, norm])


def export(
    model: nn.Module,
    file: str | Path,
    test_set: Photographs,
    metadata: dict[str, Any],
    task: str = "classification",
) -> dict[str, Any]:
    """Round a model to half precision, measure it, write it with its metadata; return these with what was measured."""
    state = halved(model)
    model.load_state_dict(state)
    measured = TASKS[task].evaluate(model, *test_set)
    metadata = {**metadata, **measured, "torch": torch.__version__, "dynattn": __version__}
    weights.write(file, state, metadata)
    return metadata


def halved(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as it ships: rounded to half precision."""
    state = model.state_dict()
    return {key: value.half().float() if value.is_floating_point() else value for key, value in state.items()}


def make_accelerator() -> Accelerator:
    """Where the run takes place: all of accelerate's, mixed precision on CUDA only (slower on a CPU)."""
    cuda = torch.cuda.is_available()
    return Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")


def mix(*numbers: int) -> int:
    """A seed from several integers, unrelated for neighbouring ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up times cosine, for steps 1 to recipe.steps."""
    done = (step - 1) / recipe.steps
    warm = min(1, (done + 1 / recipe.steps) / recipe.warmup) if recipe.warmup else 1
    return recipe.lr * warm * (1 + math.cos(math.pi * done)) / 2


def draw_batch(
    train_set: Photographs, recipe: Recipe, seed: int, step: int, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "b 3 H W"], Int[Tensor, " b"] | UInt8[Tensor, "b H W"]]:
    """The augmented batch of a step (from 1), of all processes together; an epoch drops what fills no batch.

    A class for each pixel moves with its pixel.
    """
    count = len(train_set[1])
    epoch, place = divmod(step - 1, count // recipe.batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, ORDER, epoch)))
    chosen = order[place * recipe.batch :][: recipe.batch].numpy()
    generator = torch.Generator().manual_seed(mix(seed, AUGMENTATION, step))
    images, truth = (torch.from_numpy(part[chosen]).to(device) for part in train_set)
    return augment(images, generator, truth) if truth.ndim == 3 else (augment(images, generator), truth)


def stop_unless_finite(measured: Float[Tensor, "steps 3"], step: int) -> None:
    """Raises: FloatingPointError where loss or gradient of one of the steps up to this one is not a finite number."""
    bad = ~measured.isfinite().all(1)
    if bad.any():
        first = step - len(measured) + 1 + int(bad.nonzero()[0])
        loss, _, norm = measured[first - step - 1].tolist()
        raise FloatingPointError(
            f"training diverged at step {first}: loss {loss:.4g}, gradient norm {norm:.4g}. Nothing was saved since; "
            "try a smaller lr in another --out"
        )
