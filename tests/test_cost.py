"""Parameters and multiply-adds: of the models, of every ablation of the paper, beside the paper's numbers."""

import csv
import re
from decimal import Decimal

import pytest
import torch
from jaxtyping import config
from torch import nn

import dynattn
from dynattn import cost

# As the published code has them where it runs, measured: learned parameters, and multiply-adds in G as fvcore counts.
MEASURED = {
    "dat_tiny": (28_319_138, 4.5889),
    "dat_small": (49_700_402, 9.0084),
    "dat_base": (87_881_632, 15.7876),
    "dat_base_384": (88_178_272, 49.7719),
    "dat_tiny_conv": (30_264_002, 4.8355),
    "dat_tiny_no_offsets_no_bias": (28_288_838, 4.574),
    "dat_tiny_no_offsets": (28_319_138, 4.574),
    "dat_tiny_no_bias": (28_288_838, 4.5832),
    "dat_tiny_fixed_bias": (29_729_438, 4.5832),
    "dat_tiny_dwconv_bias": (28_308_038, 4.5855),
    "dat_tiny_sra": (30_677_120, 4.4825),
    "dat_tiny_stages1234": (28_386_170, 4.6392),
    "dat_tiny_stages234": (28_341_458, 4.5958),
    "dat_tiny_stage4": (28_287_458, 4.5089),
    "dat_tiny_ddetr_16_16": (27_758_470, 4.4411),
    "dat_tiny_ddetr_49_49": (30_957_754, 4.8336),
    "dat_tiny_ddetr_196_49": (37_070_014, 6.1612),
    "dat_tiny_49_49": (28_319_138, 4.3822),
}
TORCH = {"dat_tiny": 4.5635, "dat_small": 8.9587, "dat_base": 15.7214, "dat_base_384": 49.4497}  # G, torch's counter
SHIFT_MASKS = 192_080


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    config.update("jaxtyping_disable", True)  # eighteen models: checking their shapes would take most of the time
    try:
        return {row["name"]: row for row in cost.table("dat")}
    finally:
        config.update("jaxtyping_disable", False)


def rounded(value: float, printed: str) -> str:
    """A number with as many digits behind the point as the paper prints."""
    return str(round(Decimal(value), -Decimal(printed).as_tuple().exponent))


# ---------------------------------------------------------------- DAT's tables


def test_every_row_of_the_paper_s_classification_tables_is_there(rows):
    with cost.tables()["dat"].published.open(newline="") as file:
        said = {row["model"] for row in csv.DictReader(file) if row["paper"] == "dat" and row["task"] == "imagenet1k"}
    assert set(rows) == said == set(MEASURED)


@pytest.mark.parametrize("name", MEASURED)
def test_parameters_and_multiply_adds(name, rows):
    params, macs = MEASURED[name]
    assert rows[name]["params"] == params
    assert rows[name]["macs_fvcore"] / 1e9 == pytest.approx(macs, rel=0.01 if "ddetr" in name else 0.005)
    if name in TORCH:
        assert rows[name]["macs"] / 1e9 == pytest.approx(TORCH[name], rel=0.0001)


def test_where_ours_rounds_to_another_number_than_the_paper_s_a_note_says_why(rows):
    differs = {}
    for name, row in rows.items():
        params = rounded(row["params"] / 1e6, row["paper_params_M"])
        macs = rounded(row["macs_fvcore"] / 1e9, row["paper_macs_G"])
        ours = {"params_M": params, "macs_G": macs}
        differs[name] = {what for what in ours if ours[what] != row[f"paper_{what}"]}
        assert not differs[name] or row["note"], f"{name}: {params} M, {macs} G and no note"
    detr = {name: {"params_M", "macs_G"} for name in rows if "ddetr" in name}
    assert {name: what for name, what in differs.items() if what} == {"dat_tiny_no_offsets": {"macs_G"}} | detr


def test_the_numbers_in_the_notes(rows):
    """Each is computed here from counts."""
    offsets_off = rows["dat_tiny_no_offsets"]
    assert "4.580 G; 4.574 G without" in offsets_off["note"]
    bias = 4 * (3 * 12 * 196 * 196 + 24 * 49 * 49)  # of sampling the bias: 4 for each head, query and key
    assert rounded(offsets_off["macs_fvcore"] / 1e9, "4.580") == "4.580"
    assert rounded((offsets_off["macs_fvcore"] - bias) / 1e9, "4.574") == "4.574"
    assert offsets_off["macs_fvcore"] - bias == rows["dat_tiny_no_offsets_no_bias"]["macs_fvcore"]

    assert f"{SHIFT_MASKS:,}" in rows["dat_tiny_ddetr_16_16"]["note"]
    windows = [(56 // 7) ** 2, (28 // 7) ** 2]
    assert SHIFT_MASKS == sum(windows) * 49 * 49
    for name, (K3, K4) in {"16_16": (16, 16), "49_49": (49, 49), "196_49": (196, 49)}.items():
        row = rows[f"dat_tiny_ddetr_{name}"]
        assert rounded((row["params"] + SHIFT_MASKS) / 1e6, row["paper_params_M"]) == row["paper_params_M"]
        weighted_sum = 3 * 196 * K3 * 384 + 49 * K4 * 768
        assert rounded((row["macs_fvcore"] - weighted_sum) / 1e9, row["paper_macs_G"]) == row["paper_macs_G"]

    assert "28.53 M" in rows["dat_tiny"]["note"]
    indices, masks = (8 + 4 - 4) * 49 * 49, sum(windows) * 49 * 49
    assert rounded((rows["dat_tiny"]["params"] + indices + masks) / 1e6, "28.53") == "28.53"


def test_the_unused_offset_network_is_counted_as_in_the_paper():
    model = dynattn.create_model("dat_tiny", offsets=False)
    unused = sum(p.numel() for name, p in model.named_parameters() if ".offset." in name)
    assert unused == 13_312


def test_the_cost_of_a_deformable_layer_is_the_equation_s():
    """DAT-10: Omega = 2 HW N_s C + 2 HW C^2 + 2 N_s C^2 + (k^2 + 2) N_s C, at the example of section 3.2."""
    from dynattn.mechanisms.deformable import DeformableAttention

    H, C, Ns, k = 14, 384, 49, 5
    layer = DeformableAttention(C, 12, 3, (H, H), stride=2, kernel=k)
    layer.in_chans, layer.forward = C, lambda x, forward=layer.forward: forward(x.movedim(1, -1))
    attention = 2 * H * H * Ns * C + 2 * H * H * C * C + 2 * Ns * C * C
    network = (k * k + 2) * Ns * C
    assert cost.count(layer, H).macs == attention + network
    assert (round(attention / 1e6, 2), round(network / 1e6, 3)) == (79.63, 0.508)  # the paper prints 5.08 M


# ---------------------------------------------------------------- count


def test_a_count_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.LayerNorm(6), nn.Linear(6, 5))
    found = cost.count(model, (8, 12))
    assert found.params == 3 * 16 * 8 + 8 + 12 + 35
    assert found.macs == 6 * 48 * 8 + 8 * 6 * 5
    assert found.macs_fvcore == found.macs + 5 * 8 * 6
    assert found.macs_biases == found.macs + 8 * 6 + 8 * 5


def test_shapes_without_numbers_count_the_same():
    with torch.device("meta"):
        empty = dynattn.create_model("dat_mini")
    assert cost.count(empty, 64) == cost.count(dynattn.create_model("dat_mini"), 64)


def test_counting_leaves_the_model_as_it_was():
    model = dynattn.create_model("dat_mini")
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost.count(model, 32)
    assert model.training and model.stages[0].training and not model.norm.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_attention_to_itself_is_counted_whatever_kernel_runs_it():
    """Scaled dot products with and without a bias: 2 L^2 C, whichever of torch's forms is chosen."""

    class Attention(nn.Module):
        def __init__(self, bias: bool):
            super().__init__()
            self.scale, self.bias = nn.Parameter(torch.ones(1)), bias

        def forward(self, x):
            q = x.flatten(2).mT[:, None] * self.scale
            mask = torch.zeros(q.shape[2], q.shape[2]) if self.bias else None
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert cost.count(Attention(False), 8).macs == cost.count(Attention(True), 8).macs == 2 * 64 * 64 * 3


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        ("224", TypeError, "size: expected a whole number or a pair"),
        (0, ValueError, r"size\[0\]: expected at least 1, got 0"),
        ((1, 2, 3), TypeError, "size: expected a whole number or a pair"),
    ],
)
def test_bad_sizes(size, kind, message, unchecked):
    with pytest.raises(kind, match=message):
        cost.count(nn.Linear(1, 1), size)


def test_unknown_papers():
    known = ", ".join(map(repr, sorted(cost.tables())))
    with pytest.raises(ValueError, match=f"paper: expected one of {known}, got 'vit'"):
        cost.table("vit")


def test_the_printed_table(capsys, rows, monkeypatch):
    monkeypatch.setattr(cost, "table", lambda paper, progress: list(rows.values()))
    cost.print_table("dat")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len([line for line in lines if line.startswith("dat_")]) == len(rows)
    assert re.search(r"dat_tiny +28,319,138 +28\.32M +4\.5[56]\dG +4\.589G +4\.59G +Tables 6 7 \[1\]", printed)
    notes = [row["note"] for row in rows.values() if row["note"]]
    for number, note in enumerate(dict.fromkeys(notes), 1):
        assert f"[{number}] {note}" in lines
    assert max(map(len, lines)) < 240
    assert str(cost.Cost(1234, 5e9, 6e9, 7e9)) == "1,234 parameters, 5.000 G multiply-adds (6.000 G fvcore)"
