"""What registers itself: the papers of this package, and other packages that teach it new things.

Every file of `dynattn/papers` registers what a paper has: rows of its tables, recipes, figures. Another package names
a module in its pyproject.toml, which registers models, operations, recipes or figures when it is imported:

    [project.entry-points."dynattn.plugins"]
    neighbourhood = "neighbourhood.plugin"

The command line and the process of `dynattn check` import it. In a program of your own, import it yourself.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

GROUP = "dynattn.plugins"


@cache
def load() -> tuple[str, ...]:
    """Import every plugin that is installed, once; their names. One that fails is named in a warning and left out."""
    found = []
    for plugin in sorted(entry_points(group=GROUP), key=lambda plugin: plugin.name):
        try:
            plugin.load()
        except Exception as error:  # whatever somebody else's module raises
            warnings.warn(f"plugin {plugin.name} ({plugin.value}) is left out: {error!r}", stacklevel=2)
        else:
            found.append(plugin.name)
    return tuple(found)


@cache
def load_papers() -> None:
    """Import every file of `dynattn/papers`, once."""
    for file in iter_modules(import_module("dynattn.papers").__path__, "dynattn.papers."):
        import_module(file.name)
