"""The layers and proofs of the audit of SG-Former, `notebooks/audit/03_sgformer.ipynb`."""

from torch import nn

from dynattn.lessons.notebook import found, on_meta  # noqa: F401  (the notebook has both from here)
from dynattn.mechanisms.dense import DenseAttention
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention
from dynattn.mechanisms.self_guided import SelfGuidedAttention
from dynattn.mechanisms.window import WindowAttention

RATES = ((196, 56, 56, 28), (49, 14, 14, 7), (2, 1))  # of Table 1


def stage(number: int) -> tuple[int, int, dict[str, nn.Module]]:
    """Side of the map, channels, and the attention layers of a stage (from 1) of SG-Former-S, beside two others."""
    side, C, heads, s = 112 // 2**number, 32 * 2**number, 2**number, 2 ** (4 - number)
    layers = {
        "dense attention": DenseAttention(C, heads),
        "windows of 7 × 7": WindowAttention(C, heads, 7),
        "hybrid-scale": HybridScaleAttention(C, heads, (s, 1)),
        "self-guided": SelfGuidedAttention(C, heads, RATES[number - 1], parts=2),
    }
    return side, C, {name: layer.eval().requires_grad_(False) for name, layer in layers.items()}
