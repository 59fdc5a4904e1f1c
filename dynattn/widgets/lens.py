"""The lens as a widget for notebooks."""

from base64 import b64encode
from collections.abc import Iterable
from io import BytesIO
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .page import scene, write_page
from .panel import MEAN, View, first_view, make_panels
from .picture import draw

try:
    import anywidget
    from traitlets import Any as Anything
    from traitlets import CFloat, List, TraitError, observe, validate
except ImportError as error:
    raise ImportError(
        "the lens in a notebook needs anywidget: in the project's folder, pip install -e '.[notebooks]'; "
        "dynattn.widgets.save_page(models, image, path) writes it as a page without"
    ) from error

FOLDER = Path(__file__).parent
COLOURS = 255  # of the picture in a saved notebook, a third as large as with all


class Choice(Anything):
    """A choice that is checked, whatever it is: `Any` lets None pass."""

    allow_none = False


class ChoiceError(TraitError, ValueError):
    """A pixel, layer or head that is not there: a ValueError for users, a TraitError for traitlets to roll back."""


class Lens(anywidget.AnyWidget):
    """Click a pixel of the photograph: the positions that the query there reads, and how much, in any layer and head.

    models: a model or a `Trace`, a list of them side by side, or a mapping from names to them. image: what
    `dynattn.trace` takes (traces do without). Each model runs once; a click asks its trace.

    Traits, in step with what is on the screen, to set or to `observe`:
    row, col: the query, a pixel of the image that the first model saw. layer: a name for each model, or a number from
    0 (-1 is the last layer), which becomes the name. head: a number or "mean" for each model. One name or number stands
    for all models. fade: 0 shows the attention, 1 the rollout.

    Raises ValueError or TypeError before any work for bad models or images; ValueError for a query, layer or head
    that is not there, where it is set.
    """

    _esm = FOLDER / "lens.js"
    _css = FOLDER / "lens.css"
    row = CFloat().tag(sync=True)
    col = CFloat().tag(sync=True)
    layer = Choice().tag(sync=True)
    head = Choice().tag(sync=True)
    fade = CFloat().tag(sync=True)
    scene = List().tag(sync=True)
    shown = List().tag(sync=True)

    def __init__(self, models: Any, image: Any = None, **choices: Any):
        unknown = choices.keys() - {"row", "col", "layer", "head", "fade"}
        if unknown:
            raise TypeError(f"{unknown.pop()}: not an argument of Lens; there are row, col, layer, head, fade")
        self._panels = make_panels(models, image)
        self._answered: tuple | None = None
        super().__init__(scene=scene(self._panels), **first_view(self._panels) | choices)

    # What may be chosen -----------------------------------------------------------------------------------------------

    @validate("row", "col")
    def _inside(self, proposal: dict) -> float:
        name, value = proposal["trait"].name, proposal["value"]
        side = self._panels[0].shape[name == "col"]
        if not -0.5 <= value <= side - 0.5:
            raise ChoiceError(f"{name}: expected an image pixel from 0 to {side - 1}, got {value:g}")
        return value

    @validate("fade")
    def _share(self, proposal: dict) -> float:
        if not 0 <= proposal["value"] <= 1:
            raise ChoiceError(f"fade: expected 0 (attention) to 1 (rollout), got {proposal['value']:g}")
        return proposal["value"]

    @validate("layer")
    def _known_layers(self, proposal: dict) -> tuple[str, ...]:
        return self._layers(proposal["value"])

    @validate("head")
    def _known_heads(self, proposal: dict) -> tuple[int | str, ...]:
        heads = tuple(_head(head) for head in self._for_each("head", proposal["value"]))
        layers = self._layers(self.layer)  # set together with the heads, it may not have been checked yet
        for panel, layer, head in zip(self._panels, layers, heads, strict=True):
            most = panel.trace[layer].heads - 1
            if head != MEAN and not 0 <= head <= most:
                raise ChoiceError(f"head: expected 0 to {most} or 'mean' in {layer} of {panel.name}, got {head!r}")
        return heads

    def _layers(self, value: Any) -> tuple[str, ...]:
        """A layer for each panel, all of them there."""
        choices = zip(self._panels, self._for_each("layer", value), strict=True)
        try:
            return tuple(panel.layer(choice) for panel, choice in choices)
        except ValueError as error:
            raise ChoiceError(str(error)) from None

    def _for_each(self, name: str, value: Any) -> tuple:
        """A choice for each panel; one is repeated."""
        several = isinstance(value, Iterable) and not isinstance(value, str)
        values = tuple(value) if several else (value,) * len(self._panels)
        if len(values) != len(self._panels):
            raise ChoiceError(f"{name}: expected one, or one for each of {len(self._panels)} models, got {value!r}")
        return values

    # What is seen -----------------------------------------------------------------------------------------------------

    @observe("row", "col", "layer", "head", "fade")
    def _answer(self, change: dict) -> None:
        """Show what the query reads now. A layer with fewer heads than the number chosen shows its last one."""
        pairs = zip(self._panels, self.layer, self.head, strict=True)
        self.head = [head if head == MEAN else min(head, p.trace[name].heads - 1) for p, name, head in pairs]
        asked = (self.row, self.col, self.layer, self.head, self.fade > 0)
        if asked != self._answered:
            self._answered = asked
            self.shown = answer(self._view, rollout=self.fade > 0)

    @property
    def _view(self) -> View:
        return View(self._panels, self.row, self.col, self.layer, self.head, self.fade)

    @property
    def traces(self) -> list:
        """The trace of every model, where all that a lens shows comes from."""
        return [panel.trace for panel in self._panels]

    def __repr__(self) -> str:
        """What is seen, in words."""
        seen = zip(self._panels, self._view.sentences(), strict=True)
        return "\n".join(f"{panel.name}: {sentence}" for panel, sentence in seen)

    # Where it can be seen without a kernel ----------------------------------------------------------------------------

    def picture(self, dpi: int = 160) -> Image.Image:
        """What the lens shows now, as a picture 12 inches wide."""
        return draw(self._view, dpi)

    def save(self, path: str | PathLike, layers: str | int | Iterable[str | int] | None = None) -> Path:
        """Write a page that answers clicks with no kernel and no network, opened as the lens is now.

        layers: names or shell patterns such as "stages.2.*" of the layers to keep, or their numbers; None for all.
        Folders that are not there are made. Returns the path.
        Raises ValueError when nothing fits `layers`, or when the page would be larger than 5 MB.
        """
        return write_page(path, self._view, layers)

    def __reduce_ex__(self, protocol: int) -> str:
        """Raise TypeError: a widget is half in the notebook's page, which no pickle holds."""
        raise TypeError(
            "a Lens cannot be pickled or copied: it is tied to the page that shows it; "
            "pickle lens.traces and make Lens(traces) of them, or write a page with lens.save(path)"
        )

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict, dict]:
        """The widget, and for places where no widget can be a picture and words."""
        data, metadata = super()._repr_mimebundle_(**options)
        file = BytesIO()
        self.picture(dpi=100).quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
        return data | {"image/png": b64encode(file.getvalue()).decode(), "text/plain": repr(self)}, metadata


def answer(view: View, *, rollout: bool) -> list[dict[str, Any]]:
    """What every panel shows, as `lens.js` takes it (see there); the rollout only where it can be seen."""
    shown = []
    for p, reading in enumerate(view.readings()):
        last, heat = view.panels[p].rollout(*view.place(p)) if rollout else (None, np.zeros(0))
        shown.append(
            {
                "row": view.row,
                "col": view.col,
                "layer": reading.layer,
                "head": reading.head,
                "cell": list(reading.cell),
                "keys": reading.keys.astype("<f4").tobytes(),
                "counts": list(reading.counts),
                "pooled": (reading.by_number if reading.beside else np.zeros(0)).astype("<f4").tobytes(),
                "last": last and list(last),
                "heat": heat.astype("<f4").tobytes(),
            }
        )
    return shown


def _head(value: Any) -> int | str:
    """A head as a whole number or "mean"."""
    if value == MEAN:
        return MEAN
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ChoiceError(f"head: expected a whole number or 'mean', got {value!r}") from None
