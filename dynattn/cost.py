"""Parameters and multiply-adds of a model, and the papers' tables beside ours."""

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from dynattn import core, plugins, tracing
from dynattn.models.registry import create_model


@dataclass(frozen=True)
class Cost:
    """What one image costs. `params` counts learned numbers; `macs` are multiply-adds.

    `macs`: matrix products, convolutions and attention, as torch's flop counter has them, halved. `macs_fvcore` adds
    what fvcore counts besides, and most papers print: 5 for an element of a LayerNorm or group norm, 4 for a bilinear
    sample.
    `macs_biases` adds to `macs` one for every bias that a convolution or linear map adds.
    """

    params: int
    macs: float
    macs_fvcore: float
    macs_biases: float

    def __str__(self) -> str:
        macs, fvcore = f"{self.macs / 1e9:.3f} G", f"{self.macs_fvcore / 1e9:.3f} G"
        return f"{self.params:,} parameters, {macs} multiply-adds ({fvcore} fvcore)"


def count(model: nn.Module, size: int | tuple[int, int]) -> Cost:
    """The cost of one image of `size` (a side, or rows and columns), by running the model once in eval mode.

    A module that has a method `multiply_adds(shape)` is not run: it answers with its own count for an input of that
    shape, as what reads a few keys of many does, since some of its forms compute more than they use. Its output has the
    shape of its input, and its linear maps and convolutions run once at every position.
    Raises TypeError, ValueError for a size that is none.
    """
    from torch.utils.flop_counter import FlopCounterMode

    H, W = core.pair("size", size)
    aten = torch.ops.aten
    extra = {  # twice the multiply-adds, like everything the counter holds
        aten.native_layer_norm: lambda x, *_, **__: 2 * 5 * prod(x),
        aten.native_group_norm: lambda x, *_, **__: 2 * 5 * prod(x),
        aten.grid_sampler_2d: lambda *_, out_shape, **__: 2 * 4 * prod(out_shape),
    }
    parameter = next(model.parameters())
    image = torch.zeros(1, getattr(model, "in_chans", 3), H, W, device=parameter.device, dtype=parameter.dtype)
    counting = FlopCounterMode(display=False, custom_mapping=extra)
    with tracing.evaluating(model), torch.no_grad(), _noting(model) as noted, counting as counter:
        model(image)
    counts = counter.get_flop_counts().get("Global", {})
    everything = sum(counts.values()) / 2 + noted.answered
    macs = everything - sum(counts.get(operation, 0) for operation in extra) / 2
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        macs=macs,
        macs_fvcore=everything,
        macs_biases=macs + noted.biases,
    )


@dataclass
class Noted:
    """What torch's counter does not see: multiply-adds that modules answer themselves, biases that were added."""

    answered: int = 0
    biases: int = 0


@contextmanager
def _noting(model: nn.Module) -> Iterator[Noted]:
    """Fill in a `Noted` while the model runs; modules that answer themselves hand their input on."""
    noted, linear = Noted(), nn.Linear | nn.Conv2d

    def after(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        noted.biases += output.numel() if layer.bias is not None else 0

    def stand_in(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        biases = [part.bias for part in layer.modules() if isinstance(part, linear) and part.bias is not None]

        def forward(x: Tensor) -> Tensor:
            noted.answered += layer.multiply_adds(tuple(x.shape))
            noted.biases += prod(x.shape[:-1]) * sum(bias.numel() for bias in biases)
            return x

        return forward

    handles = [module.register_forward_hook(after) for module in model.modules() if isinstance(module, linear)]
    layers = [module for module in model.modules() if hasattr(module, "multiply_adds")]
    for layer in layers:
        layer.forward = stand_in(layer)
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            del layer.forward


@dataclass(frozen=True)
class Row:
    """One row of a paper's table: its name in the paper's CSV file, and how we make the model."""

    published: str
    model: str
    options: dict = field(default_factory=dict)
    size: int = 224
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of a paper's tables, and how it counts.

    measure: the field of `Cost` that its multiply-adds are; column: the name of that column; meaning: a line about it.
    published: a CSV file with the paper's own numbers, by the names of the rows: model, params_M, macs_G, value, where.
    """

    rows: Sequence[Row]
    measure: str
    column: str
    meaning: str
    published: Path


TABLES: dict[str, Table] = {}


def register(paper: str, table: Table) -> None:
    """Make a paper's table known to `table`, `published` and the command line; a name again replaces it."""
    TABLES[paper] = table


def tables() -> dict[str, Table]:
    """Every table by the name of its paper."""
    plugins.load_papers()
    return TABLES


def published(name: str) -> dict[str, str]:
    """The paper's own numbers for a row: params_M, macs_G, value (top-1), where. Raises KeyError for another name."""
    for table in tables().values():
        with table.published.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["model"] == name:
                    return row
    raise KeyError(f"no paper prints numbers of {name!r}")


def table(paper: str = "dat", progress: bool = False) -> list[dict]:
    """Ours beside the paper's for every row of its tables: name, options, params, `Cost`'s macs, paper's, note.

    Raises ValueError for a paper that is not there.
    """
    from tqdm import tqdm

    core.one_of("paper", paper, tuple(tables()))
    rows = []
    for row in tqdm(TABLES[paper].rows, desc="counting", unit="model", disable=not progress, file=sys.stderr):
        with torch.device("meta"):  # shapes without numbers: to count costs neither memory nor arithmetic
            model = create_model(row.model, **row.options)
        cost = count(model, row.size)
        said = published(row.published)
        rows.append(
            dict(
                name=row.published,
                model=row.model,
                options=row.options,
                size=row.size,
                params=cost.params,
                macs=cost.macs,
                macs_fvcore=cost.macs_fvcore,
                macs_biases=cost.macs_biases,
                paper_params_M=said["params_M"],
                paper_macs_G=said["macs_G"],
                where=said["where"],
                note=row.note,
            )
        )
    return rows


def print_table(paper: str = "dat") -> None:
    """Print `table` with its footnotes: parameters and multiply-adds, ours and the paper's."""
    rows = table(paper, progress=True)
    measure, column, meaning = TABLES[paper].measure, TABLES[paper].column, TABLES[paper].meaning
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    said = lambda number, unit: number + unit if number else "-"  # noqa: E731
    print(f"{'':30} {'parameters':>12} {'paper':>8} {'torch':>8} {column:>8} {'paper':>7}   where")
    for row in rows:
        mark = f"[{notes.index(row['note']) + 1}]" if row["note"] else ""
        print(
            f"{row['name']:30} {row['params']:>12,} {said(row['paper_params_M'], 'M'):>8} {row['macs'] / 1e9:>7.3f}G "
            f"{row[measure] / 1e9:>7.3f}G {said(row['paper_macs_G'], 'G'):>7}   {row['where']} {mark}"
        )
    print()
    print(f"torch: matrix products, convolutions, attention. {meaning}")
    for number, note in enumerate(notes, 1):
        print(f"[{number}] {note}")
