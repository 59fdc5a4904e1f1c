"""What the audit of SETR and HLG measures: bytes that layers keep, orders of growth, upsamplings."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dynattn

pytest.importorskip("IPython")
from dynattn.lessons import setr_hlg_audit as audit  # noqa: E402

SIDES = (7, 14, 28)
TOKENS = [side**2 for side in SIDES]


def test_kept_bytes_count_every_storage_once_and_no_parameter():
    """A linear map keeps its input, the product of a tensor and itself keeps it once, an addition keeps nothing."""
    x = torch.zeros(3, 5, requires_grad=True)
    assert audit.kept(nn.Linear(5, 2), x) == 3 * 5 * 4

    class Square(nn.Module):
        def forward(self, x):
            return x.view(15) * x.view(15)

    assert audit.kept(Square(), x) == 3 * 5 * 4
    assert audit.kept(nn.Identity(), x) == 0


def test_orders_of_growth():
    assert audit.exponent((1, 10, 100), (3, 300, 30_000)) == pytest.approx(2)
    assert audit.parts((1, 2, 3), [5 * n**2 + 7 * n + 2 for n in (1, 2, 3)]) == pytest.approx((5, 7, 2))


def test_a_dense_layer_keeps_the_weight_of_every_pair_of_tokens(unchecked):
    """SETR-2: four bytes for each head. Fused attention keeps none, and HLG's layers keep those of windows."""
    heads = 2
    with sdpa_kernel(SDPBackend.MATH):
        dense = [audit.kept(*audit.dense_layer(side, 16, heads, "meta")) for side in SIDES]
        global_ = [audit.kept(*audit.local_global_layer(side, 16, heads, "meta", local=False)) for side in SIDES]
    assert audit.parts(TOKENS, dense)[0] == pytest.approx(4 * heads)
    assert 4 * heads / 49 < audit.parts(TOKENS, global_)[0] < 3 * 4 * heads / 49
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = [audit.kept(*audit.dense_layer(side, 16, heads, "cpu")) for side in SIDES]
    assert audit.exponent(TOKENS, fused) == pytest.approx(1)


def test_upsamplings_are_counted(unchecked):
    """Naive resizes its logits once, to the image."""
    with torch.device("meta"):
        model = dynattn.create_model("setr_naive_mini")
    assert audit.upsampling(model, 64) == 4 * 11 * 64**2


def test_a_checkpoint_of_deterministic_numbers_has_all_entries(unchecked):
    model = dynattn.create_model(
        "setr_mla_base", img_size=64, dim=24, depth=4, heads=3, channels=16, layers=(1, 2, 3, 4)
    )
    state = audit.setr_state(model)
    dynattn.load_official(model.double(), {"state_dict": state})
    assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, state["backbone.blocks.1.attn.qkv.weight"])
    assert torch.equal(model.encoder.embed.table[:, 0, 1], state["backbone.pos_embed"][0, 2])
