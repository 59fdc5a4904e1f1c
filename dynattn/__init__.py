"""dynattn: dynamic attention for vision, from the equations of five papers to their models, figures and kernels.

Names are loaded when they are first used, so that `import dynattn` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_FROM = {
    "create_model": "dynattn.models",
    "list_models": "dynattn.models",
    "load_official": "dynattn.official",
    "register_model": "dynattn.models",
    "trace": "dynattn.tracing",
}
_MODULES = (
    "core",
    "cost",
    "data",
    "figures",
    "mechanisms",
    "models",
    "official",
    "ops",
    "tracing",
    "training",
    "verify",
    "weights",
)
__all__ = ["__version__", *_FROM, *_MODULES]

if TYPE_CHECKING:
    from dynattn.models import create_model as create_model
    from dynattn.models import list_models as list_models
    from dynattn.models import register_model as register_model
    from dynattn.official import load_official as load_official
    from dynattn.tracing import trace as trace


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"dynattn.{name}")
    if name in _FROM:
        value = getattr(import_module(_FROM[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dynattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
