"""The lens: click a pixel of a photograph and see which positions the query there reads, and how much.

`Lens` is the widget for notebooks; it needs anywidget. `save_page` writes the same as a page of its own and needs
nothing but the models. `panel.py` reads the records, `lens.js` draws what it finds, `lens.py` carries it to a notebook,
`page.py` into a file, `picture.py` onto paper. How Python and JavaScript talk stands at the top of `lens.js`.
"""

from importlib import import_module

_FROM = {"Lens": "lens", "save_page": "page"}
__all__ = list(_FROM)


def __getattr__(name: str) -> object:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
