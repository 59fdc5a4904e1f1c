"""The differentiable operations under one roof: all that a mechanism's file defines, and those of plugins.

Each stands, with its equations and loops, in its mechanism's file, under `@core.operation`. `dir(ops)` lists them.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from dynattn.core import OPERATIONS

for _file in iter_modules(import_module("dynattn.mechanisms").__path__, "dynattn.mechanisms."):
    import_module(_file.name)


def __getattr__(name: str) -> Callable:
    if name in OPERATIONS:
        return OPERATIONS[name]
    raise AttributeError(f"module {__name__!r} has no operation {name!r}, only {', '.join(OPERATIONS)}")


def __dir__() -> list[str]:
    return sorted(OPERATIONS)
