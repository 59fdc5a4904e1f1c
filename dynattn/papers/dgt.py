"""DGT: the rows of its tables, the recipes of its small models, its figures."""

from pathlib import Path

from dynattn import cost, figures
from dynattn.cost import Row
from dynattn.figures.dgt import PAPER
from dynattn.training import Recipe, register_recipe

GROUPING = (
    "The paper does not say how it counts. Its numbers are met with grouping and selection (2LGC) and an addition for "
    "every bias; without the biases they are 4.33, 9.38 and 16.36 G, without 2LGC too 4.21, 9.20 and 16.12 G. A "
    "counter that sees attention under a dense mask has 5.87 G for DGT-T."
)
BLOCKS = "The paper prints the accuracy only. Stage 4 is DGT's; the blocks are of their own papers' sizes."
ROWS = [
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
]

cost.register(
    "dgt",
    cost.Table(
        ROWS,
        measure="macs_biases",
        column="biases",
        meaning="biases: these, and one for every bias that is added.",
        published=Path(__file__).with_name("dgt.csv"),
    ),
)

SWEEP = {"dims": (24, 48, 96), "heads": (2, 4, 8), "depths": (1, 4, 2)}  # smaller than the minis, at 64 pixels

# The paper's tau, a tenth of the learning rate, lets 19 time constants pass in its 300 epochs. Here too, by the pace.
register_recipe("dgt_mini", Recipe("dgt_mini", pace=400.0), seeds=[0, 1, 2])
for G, k in ((8, 64), (4, 64), (8, 32)):  # Table 4(b) in small: G groups, k keys of the finest map, and each halved
    options = SWEEP | {"groups": G, "keys": (k, k // 4)}
    recipe = Recipe("dgt_mini", options, size=64, steps=400, pace=500.0)
    register_recipe(f"dgt_sweep_g{G}k{k}", recipe, seeds=[0, 1, 2])
# The first of these where objects are textured and pieces of others lie about. It takes longer to learn.
cluttered = SWEEP | {"groups": 8, "keys": (64, 16)}
recipe = Recipe("dgt_mini", cluttered, level="cluttered", size=64, steps=800, pace=250.0)
register_recipe("dgt_cluttered", recipe, seeds=[0])

figures.register("dgt", PAPER)
