"""SETR: the rows of its tables, the recipes of its small models."""

from pathlib import Path

from dynattn import cost, figures, weights
from dynattn.cost import Row
from dynattn.figures.setr import PAPER
from dynattn.training import Recipe, register_recipe

PUP = (
    "The paper's number fits a classifier behind the last upsampling (variant='paper': T-Large 1081.5 and 425.2 G, "
    "T-Base 416.2 and 169.6 G), and the arithmetic of the upsamplings. The published code has it in front: the same "
    "logits, and less to compute."
)
MLA = (
    "The paper's number fits a classifier of 1 x 1 (variant='paper': T-Large 970.8 and 368.1 G, T-Base 306.6 and "
    "113.2 G). The published code's is 3 x 3."
)
TWO = (
    "Two upsamplings of 4. The paper's parameters fit without the auxiliary heads (308.4 M); its multiply-adds fit a "
    "classifier behind the last upsampling (989.1 G)."
)
BEIT = (
    "BEiT's own encoder: tables of relative positions in every layer in the place of one of positions, which "
    "are 1.1 M parameters more at 768 pixels. The paper prints the numbers of ViT."
)
HLG = (
    "The paper's multiply-adds are a tenth to a quarter below, and not explained. Joined at H/16, as its text says, "
    "HLG-Small would have far fewer. The published code has 281.9, 306.0 and 380.3 G at 512 pixels, and 664, 716 and "
    "884 G at 768: it computes what completes the windows too."
)
CITYSCAPES, ADE20K = dict(num_classes=19, img_size=768), dict(num_classes=150, img_size=512)


def street(published: str, model: str, note: str = "", **options) -> Row:
    """A row of Table 3 or 6: Cityscapes."""
    return Row(published, model, CITYSCAPES | options, size=768, note=note)


def scene(published: str, model: str, note: str = "", **options) -> Row:
    """A row of Table 5: ADE20K."""
    return Row(f"{published}_ade20k", model, ADE20K | options, size=512, note=note)


ROWS = [
    street("setr_naive_large", "setr_naive_large"),
    street("setr_mla_large", "setr_mla_large", MLA),
    street("setr_pup_large", "setr_pup_large", PUP),
    street("setr_naive_base", "setr_naive_base"),
    street("setr_mla_base", "setr_mla_base", MLA),
    street("setr_pup_base", "setr_pup_base", PUP),
    street("setr_naive_base_deit", "setr_naive_base"),
    street("setr_mla_base_deit", "setr_mla_base", MLA),
    street("setr_pup_base_deit", "setr_pup_base", PUP),
    street("setr_mla_large_beit", "setr_mla_large", BEIT, encoder="beit"),
    street("setr_pup_large_beit", "setr_pup_large", BEIT, encoder="beit"),
    street("setr_naive_large_no_aux", "setr_naive_large", aux=False),
    street("setr_pup_2step_large", "setr_pup_large", TWO, steps=2),
    street("setr_pup_hlg_small", "setr_pup_hlg_small", HLG),
    street("setr_pup_hlg_medium", "setr_pup_hlg_medium", HLG),
    street("setr_pup_hlg_large", "setr_pup_hlg_large", HLG),
    scene("setr_naive_large", "setr_naive_large"),
    scene("setr_pup_large", "setr_pup_large", PUP),
    scene("setr_mla_large", "setr_mla_large", MLA),
    scene("setr_pup_base_deit", "setr_pup_base", PUP),
    scene("setr_mla_base_deit", "setr_mla_base", MLA),
    scene("setr_pup_large_beit", "setr_pup_large", BEIT, encoder="beit"),
    scene("setr_mla_large_beit", "setr_mla_large", BEIT, encoder="beit"),
    scene("setr_pup_hlg_small", "setr_pup_hlg_small", HLG),
    scene("setr_pup_hlg_medium", "setr_pup_hlg_medium", HLG),
    scene("setr_pup_hlg_large", "setr_pup_hlg_large", HLG),
]

cost.register(
    "setr",
    cost.Table(
        ROWS,
        measure="macs_fvcore",
        column="fvcore",
        meaning="fvcore: LayerNorm too. The paper does not say how it counts.",
        published=Path(__file__).with_name("setr.csv"),
    ),
)

# Objects with a photograph's texture among pieces of others; a class for each pixel.
SCENES = dict(level="cluttered", size=64, steps=3000, batch=32, label_smoothing=0.0, task="segmentation")
for decoder in ("naive", "pup", "mla", "pup_hlg"):
    name = f"setr_{decoder}_mini"
    register_recipe(name, Recipe(name, **SCENES), seeds=[0])
    ships = [] if decoder == "pup_hlg" else [0]
    register_recipe(f"{name}_no_aux", Recipe(name, {"aux": False}, **SCENES), seeds=ships)
# What figures 5, 6 and 9 compare with; the second is too large for the package.
register_recipe("fcn_mini", Recipe("fcn_mini", **SCENES), seeds=[0])
register_recipe("pvt_seg_mini", Recipe("pvt_seg_mini", **SCENES), seeds=[0], folder=weights.of_figures())

figures.register("setr", PAPER)
