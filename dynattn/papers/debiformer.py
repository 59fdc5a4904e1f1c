"""DeBiFormer: the rows of its tables, the recipe of its small model."""

from pathlib import Path

from dynattn import cost, figures
from dynattn.cost import Row
from dynattn.figures.debiformer import PAPER
from dynattn.models.debiformer import TABLE_5, TABLE_7, table_7
from dynattn.training import Recipe, register_recipe

BASE = (
    "Table 1 and the code agree on the depths, and stage 4 alone has 47.6 M: the paper's 77 M is not this model. "
    "Its multiply-adds fit."
)
STAGES = (
    "Feed-forward networks have a convolution in stages with DBRA: this fits five of six counts; the last is 21.4956 M "
    "cut off. In stage 4 BB is BiFormer's full attention. Rows 3 to 5 of the paper have up to 0.12 G more: unexplained."
)
SWIN = (
    "The text names depths, channels, ratio 4 and patches; blocks take turns as in DeBiFormer. No code was published."
)
TOP_K = "Said to be of Swin's layout, but the last row has the accuracy of DeBiFormer-T, whose k these are."
ROWS = [
    Row("debiformer_tiny", "debiformer_tiny", note="Table 2 cuts 21.4956 M off."),
    Row("debiformer_small", "debiformer_small"),
    Row("debiformer_base", "debiformer_base", note=BASE),
    *(
        Row(
            f"debiformer_tiny_{row.replace(' ', '_').replace('*', 'x')}",
            "debiformer_tiny",
            dict(blocks=table_7(row)),
            note=STAGES,
        )
        for row in TABLE_7
    ),
    *(
        Row(f"debiformer_tiny_k_{'_'.join(map(str, k))}", "debiformer_tiny", dict(agent_topk=k), note=TOP_K)
        for k in ((1, 4, 16, 49), (2, 8, 32, 49), (4, 8, 16, 32), (8, 16, 32, 49), (4, 8, 16, 49))
    ),
    Row("debiformer_swin_layout", "debiformer_tiny", dict(layout="swin"), note=SWIN),
    *(
        Row(f"swin_layout+{kind}", "debiformer_tiny", dict(layout="swin") | TABLE_5[kind], note=SWIN)
        for kind in ("shifted_window", "cross_shaped", "deformable", "bilevel")
    ),
]

cost.register(
    "debiformer",
    cost.Table(
        ROWS,
        measure="macs_fvcore",
        column="fvcore",
        meaning="fvcore, as papers count: LayerNorm, bilinear samples too.",
        published=Path(__file__).with_name("debiformer.csv"),
    ),
)

register_recipe("debiformer_mini", Recipe("debiformer_mini"), seeds=[0, 1, 2])

figures.register("debiformer", PAPER)
