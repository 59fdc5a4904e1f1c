"""Parameters and multiply-adds of a model, and the papers' tables beside ours."""

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from dynattn import core, tracing
from dynattn.models.registry import create_model

PUBLISHED = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Cost:
    """What one image costs. `params` counts learned numbers; `macs` are multiply-adds.

    `macs`: matrix products, convolutions and attention, as torch's flop counter has them, halved. `macs_fvcore` adds
    what fvcore counts besides, and most papers print: 5 for an element of a LayerNorm, 4 for a bilinear sample.
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
    """One row of a paper's table: its name in published.csv, and how we make the model."""

    published: str
    model: str
    options: dict = field(default_factory=dict)
    size: int = 224
    note: str = ""


DETR_ROWS = (
    "Parameters: the paper's three rows count 192,080 entries of shift masks too (0.19 M), which DAT's rows do not: "
    "subtract them to compare. Multiply-adds: ours hold the weighted sum over the K points, the paper's do not."
)
NO_OFFSETS = (
    "The unused offset network is among the parameters, as in the paper. Of the multiply-adds the paper's 4.57 leaves "
    "out that network and the bilinear sampling, as this row does; the published code runs both (4.58)."
)
NO_OFFSETS_WITH_BIAS = (
    "As the row without bias; the paper's 4.57 leaves out the bilinear sampling of the bias as well, which our fvcore "
    "count includes (4.580 G; 4.574 G without)."
)
GROUPING = (
    "The paper does not say how it counts. Its numbers are met with grouping and selection (2LGC) and an addition for "
    "every bias; without the biases they are 4.33, 9.38 and 16.36 G, without 2LGC too 4.21, 9.20 and 16.12 G. A "
    "counter that sees attention under a dense mask has 5.87 G for DGT-T."
)
BLOCKS = "The paper prints the accuracy only. Stage 4 is DGT's; the blocks are of their own papers' sizes."
DETR = [("window", "shifted")] * 2 + [("window", "deformable_detr")] * 2
ROWS: dict[str, list[Row]] = {
    "dat": [
        Row("dat_tiny", "dat_tiny", note="Table 2 prints 29 M: that is the count with buffers (28.53 M)."),
        Row("dat_small", "dat_small"),
        Row("dat_base", "dat_base"),
        Row("dat_base_384", "dat_base_384", size=384),
        Row("dat_tiny_conv", "dat_tiny_conv"),
        Row("dat_tiny_no_offsets_no_bias", "dat_tiny", dict(offsets=False, position_bias=None), note=NO_OFFSETS),
        Row("dat_tiny_no_offsets", "dat_tiny", dict(offsets=False), note=NO_OFFSETS_WITH_BIAS),
        Row("dat_tiny_no_bias", "dat_tiny", dict(position_bias=None)),
        Row("dat_tiny_fixed_bias", "dat_tiny", dict(position_bias="fixed")),
        Row("dat_tiny_dwconv_bias", "dat_tiny", dict(position_bias="dwconv")),
        Row("dat_tiny_sra", "dat_tiny", dict(early="sra")),
        Row("dat_tiny_stages1234", "dat_tiny", dict(deformable_stages=(1, 2, 3, 4))),
        Row("dat_tiny_stages234", "dat_tiny", dict(deformable_stages=(2, 3, 4))),
        Row("dat_tiny_stage4", "dat_tiny", dict(deformable_stages=(4,))),
        Row("dat_tiny_ddetr_16_16", "dat_tiny", dict(blocks=DETR, detr_points=(16, 16, 16, 16)), note=DETR_ROWS),
        Row("dat_tiny_ddetr_49_49", "dat_tiny", dict(blocks=DETR), note=DETR_ROWS),
        Row("dat_tiny_ddetr_196_49", "dat_tiny", dict(blocks=DETR, detr_points=(49, 49, 196, 49)), note=DETR_ROWS),
        Row("dat_tiny_49_49", "dat_tiny", dict(strides=(4, 2, 2, 1)), note="Stride 2 in stage 3: 49 keys."),
    ],
    "dgt": [
        Row("dgt_tiny", "dgt_tiny", note=GROUPING),
        Row("dgt_small", "dgt_small", note=GROUPING),
        Row("dgt_base", "dgt_base", note=GROUPING),
        Row("dgt_tiny_g24", "dgt_tiny", dict(groups=24)),
        Row("dgt_tiny_k49", "dgt_tiny", dict(keys=49)),
        Row("dgt_tiny_swin_block", "dgt_tiny", dict(block="swin"), note=BLOCKS),
        Row("dgt_tiny_cswin_block", "dgt_tiny", dict(block="cswin"), note=BLOCKS),
        Row("dgt_tiny_cmt_block", "dgt_tiny", dict(block="cmt"), note=BLOCKS),
        Row("swin_tiny+dg_attention", "swin_tiny_dgt", note="k = 49, as the paper has it."),
        Row("cswin_tiny", "cswin_tiny", note="The paper prints 23 M; the parts that CSWin's paper names have 22.32 M."),
        Row("cswin_tiny+dg_attention", "cswin_tiny", dict(attention="dynamic_group"), note="k = 98: not in the paper."),
    ],
}
# Of each paper, which count its numbers are, its name in the table, and a line about it.
CONVENTIONS = {
    "dat": ("macs_fvcore", "fvcore", "fvcore, as papers count: LayerNorm, bilinear samples too."),
    "dgt": ("macs_biases", "biases", "biases: these, and one for every bias that is added."),
}


def published(name: str) -> dict[str, str]:
    """The paper's own numbers for a row: params_M, macs_G, value (top-1), where. Raises KeyError for another name."""
    with PUBLISHED.open(newline="") as file:
        return next(row for row in csv.DictReader(file) if row["model"] == name)


def table(paper: str = "dat", progress: bool = False) -> list[dict]:
    """Ours beside the paper's for every row of its tables: name, options, params, `Cost`'s macs, paper's, note.

    Raises ValueError for a paper that is not there.
    """
    from tqdm import tqdm

    core.one_of("paper", paper, tuple(ROWS))
    rows = []
    for row in tqdm(ROWS[paper], desc="counting", unit="model", disable=not progress, file=sys.stderr):
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
    measure, column, meaning = CONVENTIONS[paper]
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
