"""Other packages that teach this one new models, operations, recipes and figures.

Such a package names a module in its pyproject.toml, which registers everything when it is imported:

    [project.entry-points."dynattn.plugins"]
    neighbourhood = "neighbourhood.plugin"

The command line and the process of `dynattn check` import it. In a program of your own, import it yourself.
"""

import warnings
from functools import cache
from importlib.metadata import entry_points

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
