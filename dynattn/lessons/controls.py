"""What a reader turns in a lesson: controls, and a picture that is drawn again when one of them moves.

    turn(draw, s=slider(0, 8, 2), point=Pointer((1.3, 2.6), last=(4, 4)))

`draw(s=..., point=...)` returns a matplotlib figure, or a figure and a sentence for the line below it. Controls are
ipywidgets with `observe`; the picture is an anywidget that tells where it is pointed at. A saved notebook holds the
picture of the first values, so that it can be read where no kernel runs.
"""

import re
import textwrap
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from traitlets import Bool, Bytes, Int, List, Unicode

DPI = 80
COLOURS = 128  # of the picture: a third of the bytes


@dataclass(frozen=True)
class Pointer:
    """A place (row, col) that the reader moves in the picture: by a click, by dragging, by the arrow keys.

    value: where it starts, in the units of the first axes of the figure. first, last: how far it can go, as (row, col).
    step: what an arrow key adds.
    """

    value: tuple[float, float]
    first: tuple[float, float] = (0.0, 0.0)
    last: tuple[float, float] = (1.0, 1.0)
    step: float = 1.0

    def held(self, row: float, col: float) -> tuple[float, float]:
        """The nearest place that is allowed."""
        pairs = zip((row, col), self.first, self.last, strict=True)
        return tuple(min(max(value, low), high) for value, low, high in pairs)


class Picture(anywidget.AnyWidget):
    """The picture of a `Turn`: png to the browser; `at` and `step` back from it."""

    _esm = Path(__file__).parent / "picture.js"
    png = Bytes().tag(sync=True)
    words = Unicode().tag(sync=True)
    drawn = Int().tag(sync=True)  # how often; changes last
    pointed = Bool().tag(sync=True)
    at = List().tag(sync=True)
    step = List().tag(sync=True)


class Turn(ipywidgets.VBox):
    """Controls in a row, the picture they belong to, and a line of words below it.

    values: what is drawn now, by the names of the controls.
    """

    def __init__(self, draw: Callable[..., Figure | tuple[Figure, str]], controls: dict[str, Any]):
        self.draw = draw
        self.pointers = {name: control for name, control in controls.items() if isinstance(control, Pointer)}
        if len(self.pointers) > 1:
            raise ValueError(f"controls: expected one Pointer at most, got {', '.join(self.pointers)}")
        self.widgets = {name: control for name, control in controls.items() if name not in self.pointers}
        self.values = {name: control.value for name, control in controls.items()}
        self.picture, self.line = Picture(pointed=bool(self.pointers)), ipywidgets.HTML()
        for name, widget in self.widgets.items():
            widget.description = widget.description or name
            widget.observe(lambda change, name=name: self._changed(name, change["new"]), "value")
        self.picture.observe(self._pointed, "at")
        self.picture.observe(self._stepped, "step")
        self.redraw()
        row = ipywidgets.HBox(list(self.widgets.values()), layout={"flex_flow": "row wrap"})
        super().__init__([row, self.picture, self.line] if self.widgets else [self.picture, self.line])

    def set(self, **values: Any) -> None:
        """Draw with other values; the controls follow."""
        for name, value in values.items():
            if name in self.widgets:
                self.widgets[name].value = value
            else:
                self._changed(name, self.pointers[name].held(*value))

    def _changed(self, name: str, value: Any) -> None:
        """A control has another value."""
        self.values[name] = value
        self.redraw()

    def redraw(self) -> None:
        """Draw with the values there are."""
        drawn = self.draw(**self.values)
        figure, self.words = drawn if isinstance(drawn, tuple) else (drawn, "")
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self._to_data, self._size = figure.axes[0].transData.inverted(), canvas.get_width_height()
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        file = BytesIO()
        drawn.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        self.line.value = self.words
        with self.picture.hold_sync():
            self.picture.png, self.picture.words = file.getvalue(), self.words
            self.picture.drawn += 1

    def _pointed(self, change: dict) -> None:
        """The reader points at a place of the picture, as shares of its width and height from the top left."""
        (name, pointer), (x, y) = next(iter(self.pointers.items())), change["new"]
        width, height = self._size
        col, row = self._to_data.transform((x * width, (1 - y) * height))
        self._changed(name, pointer.held(float(row), float(col)))

    def _stepped(self, change: dict) -> None:
        """An arrow key."""
        (name, pointer), (right, down, _) = next(iter(self.pointers.items())), change["new"]
        row, col = self.values[name]
        self._changed(name, pointer.held(row + down * pointer.step, col + right * pointer.step))

    def still(self) -> bytes:
        """What is shown now as a PNG: the picture, and below it the values and the words."""
        image = Image.open(BytesIO(self.picture.png)).convert("RGB")
        font = ImageFont.truetype(findfont("DejaVu Sans"), 13)
        turned = ", ".join(f"{name} = {_short(value)}" for name, value in self.values.items())
        text = textwrap.wrap(f"[{turned}]  {re.sub('<[^>]+>', '', self.words)}", image.width // 7)
        sheet = Image.new("RGB", (image.width, image.height + 18 * len(text) + 8), "white")
        sheet.paste(image)
        ImageDraw.Draw(sheet).multiline_text((6, image.height), "\n".join(text), "#222222", font, spacing=4)
        file = BytesIO()
        sheet.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget, and for places where no widget can be the picture and the words."""
        found = super()._repr_mimebundle_(**options)
        data, metadata = found if isinstance(found, tuple) else (found, {})
        plain = "\n".join([", ".join(f"{name} = {value}" for name, value in self.values.items()), self.words])
        still = {"image/png": b64encode(self.still()).decode(), "text/plain": textwrap.fill(plain, 100)}
        return (data or {}) | still, metadata


def _short(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def turn(draw: Callable[..., Figure | tuple[Figure, str]], **controls: Any) -> Turn:
    """A picture to turn: `draw` is called with the value of each control, again whenever one changes.

    controls: `slider`, `choice`, a `Pointer` (one at most), or any widget with a `value`. The pointer lives in the
    first axes of the figure. Returns a widget; display it as the last line of a cell.
    """
    return Turn(draw, controls)


def slider(low: float, high: float, value: float, step: float = 1, name: str = "") -> ipywidgets.Widget:
    """A slider from `low` to `high`: of whole numbers where all four are, else of floats. Arrow keys move it."""
    whole = all(isinstance(number, int) for number in (low, high, value, step))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=name, continuous_update=False)


def choice(*options: Any, name: str = "", value: Any = None) -> ipywidgets.ToggleButtons:
    """Buttons, one of which is pressed: values, or pairs (label, value)."""
    found = ipywidgets.ToggleButtons(options=options, description=name, style={"button_width": "auto"})
    if value is not None:
        found.value = value
    return found
