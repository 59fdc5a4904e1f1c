"""What the tests of all lessons ask: the code of a page, and pictures at every end of their controls."""

import re
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure

from dynattn.lessons import Pointer
from dynattn.lessons.controls import Turn

FOLDER = Path(__file__).parents[1] / "notebooks"


class Page:
    """The source of a lesson."""

    def __init__(self, name: str):
        self.text = (FOLDER / f"{name}.py").read_text()

    @cached_property
    def code(self) -> list[str]:
        """The code cells."""
        cells = re.split(r"^# %%", self.text, flags=re.MULTILINE)[1:]
        return [cell.partition("\n")[2] for cell in cells if not cell.startswith(" [markdown]")]

    def run(self, defines: str) -> SimpleNamespace:
        """What stands after the cells up to the one that defines a function. Lens and pictures are left out."""
        names: dict = {}
        for cell in self.code:
            if not re.match(r"\s*lesson\.\w+\(\)", cell):
                exec(cell, names)
            if f"def {defines}(" in cell:
                return SimpleNamespace(**names)
        raise AssertionError(f"no cell defines {defines}")

    def solution(self, name: str):
        """The function of the folded solution."""
        text = re.search(r"# ```python\n(.*?)# ```", self.text, re.DOTALL).group(1)
        names = {"torch": torch}
        exec(re.sub(r"^# ?", "", text, flags=re.MULTILINE), names)
        return names[name]


def ends(control) -> tuple:
    """The first and the last value of a control."""
    if isinstance(control, Pointer):
        return control.first, control.last
    if hasattr(control, "options"):
        values = [option[1] if isinstance(option, tuple) else option for option in control.options]
        return values[0], values[-1]
    return control.min, control.max


def drawn_at_every_end(turned: Turn) -> None:
    """Each control at its ends, the others as they begin; then all together."""
    start, controls = dict(turned.values), turned.pointers | turned.widgets
    turns = [start | {control: end} for control, one in controls.items() for end in ends(one)]
    turns += [{control: ends(one)[i] for control, one in controls.items()} for i in (0, 1)]
    for values in turns:
        figure, words = turned.draw(**values)
        assert isinstance(figure, Figure) and words.endswith(".") and "nan" not in words


def drawn_again(turned: Turn) -> None:
    """A control that moves draws again, and says something else."""
    before, drawn = turned.words, turned.picture.drawn
    control, widget = next(iter(turned.widgets.items()))
    turned.set(**{control: next(end for end in ends(widget) if end != widget.value)})
    assert turned.picture.drawn == drawn + 1 and turned.words != before
