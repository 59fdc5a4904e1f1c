"""The catalogue of mistakes: for every operation, ways in which implementations of it go wrong.

Each entry has the arguments of the operation's torch form and computes what the mistake computes. `check` looks a wrong
function up in here; the tests hold `check` to tell every one of them from the loops, and to name it.
"""

from collections.abc import Callable

from dynattn.verify.mistakes.bilevel import ROUTED_ATTENTION
from dynattn.verify.mistakes.deformable import DEFORMABLE_ATTENTION
from dynattn.verify.mistakes.deformable_detr import DETR_ATTENTION
from dynattn.verify.mistakes.dense import DENSE_ATTENTION
from dynattn.verify.mistakes.dynamic_group import GROUPED_ATTENTION
from dynattn.verify.mistakes.sampling import SAMPLE_POINTS
from dynattn.verify.mistakes.window import WINDOW_ATTENTION

MISTAKES: dict[str, dict[str, Callable]] = {
    "sample_points": SAMPLE_POINTS,
    "dense_attention": DENSE_ATTENTION,
    "window_attention": WINDOW_ATTENTION,
    "deformable_attention": DEFORMABLE_ATTENTION,
    "detr_attention": DETR_ATTENTION,
    "grouped_attention": GROUPED_ATTENTION,
    "routed_attention": ROUTED_ATTENTION,
}
