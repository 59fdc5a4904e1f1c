"""dynattn: dynamic attention for vision, from the equations of five papers to their models, figures and kernels.

Names are loaded when they are first used, so that `import dynattn` costs next to nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

FORKED = False  # whether this process is a fork of one that had imported this package: torch's threads are not here
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(FORKED=True))

_FROM = {
    "create_model": "dynattn.models",
    "implementation": "dynattn.kernels.choice",
    "list_models": "dynattn.models",
    "load_official": "dynattn.official",
    "register_model": "dynattn.models",
    "trace": "dynattn.tracing",
    "use_implementation": "dynattn.kernels.choice",
}
_MODULES = (
    "core",
    "cost",
    "data",
    "dense",
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
    from dynattn.kernels.choice import implementation as implementation
    from dynattn.kernels.choice import use_implementation as use_implementation
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
