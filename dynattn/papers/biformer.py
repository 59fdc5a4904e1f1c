"""BiFormer: the rows of DeBiFormer's Table 2 that are its, the recipe of its small model."""

from pathlib import Path

from dynattn import cost
from dynattn.cost import Row
from dynattn.training import Recipe, register_recipe

ROWS = [
    Row("biformer_tiny", "biformer_tiny"),
    Row("biformer_small", "biformer_small"),
    Row("biformer_base", "biformer_base"),
]

cost.register(
    "biformer",
    cost.Table(
        ROWS,
        measure="macs_fvcore",
        column="fvcore",
        meaning="fvcore, as papers count: LayerNorm, bilinear samples too.",
        published=Path(__file__).with_name("biformer.csv"),
    ),
)

register_recipe("biformer_mini", Recipe("biformer_mini"), seeds=[0, 1, 2])
