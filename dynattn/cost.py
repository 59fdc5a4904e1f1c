"""Parameters and multiply-adds of a model, and the papers' tables beside ours."""

import csv
import sys
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import nn

from dynattn import core
from dynattn.models.registry import create_model

PUBLISHED = Path(__file__).with_name("published.csv")


@dataclass(frozen=True)
class Cost:
    """What one image costs. `params` counts learned numbers; `macs` are multiply-adds.

    `macs`: matrix products, convolutions and attention, as torch's flop counter has them, halved. `macs_fvcore` adds
    what fvcore counts besides, and most papers print: 5 for an element of a LayerNorm, 4 for a bilinear sample.
    """

    params: int
    macs: float
    macs_fvcore: float

    def __str__(self) -> str:
        macs, fvcore = f"{self.macs / 1e9:.3f} G", f"{self.macs_fvcore / 1e9:.3f} G"
        return f"{self.params:,} parameters, {macs} multiply-adds ({fvcore} fvcore)"


def count(model: nn.Module, size: int | tuple[int, int]) -> Cost:
    """The cost of one image of `size` (a side, or rows and columns), by running the model once in eval mode.

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
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=extra) as counter:
            model(image)
    finally:
        for module, training in modes.items():
            module.training = training
    counts = counter.get_flop_counts()["Global"]
    everything = sum(counts.values()) / 2
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        macs=everything - sum(counts.get(operation, 0) for operation in extra) / 2,
        macs_fvcore=everything,
    )


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
    ]
}


def published(name: str) -> dict[str, str]:
    """The paper's own numbers for a row: params_M, macs_G, value (top-1), where. Raises KeyError for another name."""
    with PUBLISHED.open(newline="") as file:
        return next(row for row in csv.DictReader(file) if row["model"] == name)


def table(paper: str = "dat", progress: bool = False) -> list[dict]:
    """Ours beside the paper's for every row of its tables: name, options, params, macs, macs_fvcore, paper's, note.

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
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    print(f"{'':30} {'parameters':>12} {'paper':>8} {'torch':>8} {'fvcore':>8} {'paper':>7}   where")
    for row in rows:
        mark = f"[{notes.index(row['note']) + 1}]" if row["note"] else ""
        print(
            f"{row['name']:30} {row['params']:>12,} {row['paper_params_M'] + 'M':>8} {row['macs'] / 1e9:>7.3f}G "
            f"{row['macs_fvcore'] / 1e9:>7.3f}G {row['paper_macs_G'] + 'G':>7}   {row['where']} {mark}"
        )
    print()
    print("torch: matrix products, convolutions, attention. fvcore, as papers count: LayerNorm, bilinear samples too.")
    for number, note in enumerate(notes, 1):
        print(f"[{number}] {note}")
