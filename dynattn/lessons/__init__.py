"""What the lesson notebooks draw, and let the reader turn: `controls.py`, and a file a paper.

    from dynattn.lessons import Pointer, agree, choice, say, slider, source, table, turn

Needs the extra `notebooks`.
"""

from collections.abc import Callable

from einops import rearrange

from dynattn import verify
from dynattn.lessons.controls import Pointer, choice, slider, turn
from dynattn.lessons.notebook import agree, normal, say, set_up, source, table

__all__ = [
    "Pointer",
    "agree",
    "begin",
    "choice",
    "judge",
    "normal",
    "rearrange",
    "say",
    "slider",
    "source",
    "table",
    "turn",
]


def begin() -> None:
    """The first line of every lesson: the same numbers and looks everywhere."""
    set_up()


def judge(operation: str, function: Callable) -> None:
    """`verify.check` of an exercise, which prints what it finds instead of raising."""
    try:
        verify.check(operation, function)
    except verify.Mismatch as mismatch:
        print(mismatch)
    except Exception as error:
        print(f"{operation}: not finished yet. It raises {type(error).__name__}: {error}")
    else:
        print(f"{operation}: right, outputs and gradients.")
