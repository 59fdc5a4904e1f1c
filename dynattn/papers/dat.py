"""DAT: the rows of its tables, the recipes of its small models, its figures."""

from pathlib import Path

from dynattn import cost, figures
from dynattn.cost import Row
from dynattn.figures.dat import PAPER
from dynattn.training import Recipe, register_recipe

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
ROWS = [
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

cost.register(
    "dat",
    cost.Table(
        ROWS,
        measure="macs_fvcore",
        column="fvcore",
        meaning="fvcore, as papers count: LayerNorm, bilinear samples too.",
        published=Path(__file__).with_name("dat.csv"),
    ),
)

SWEEP = {"dims": (24, 48, 96), "heads": (2, 4, 8), "depths": (1, 4, 2)}  # smaller than the minis, at 64 pixels

register_recipe("dat_mini", Recipe("dat_mini"), seeds=[0, 1, 2])
for s in (0, 1, 2, 4, 8):  # the sweep of the offset range s (figure 4) in small: the same recipe, one model for each s
    options = SWEEP | {"offset_range": float(s)}
    register_recipe(f"dat_sweep_s{s}", Recipe("dat_mini", options, size=64, steps=400), seeds=[0])

figures.register("dat", PAPER)
