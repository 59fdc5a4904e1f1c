"""The catalogue: for every operation how its cases are drawn, and ways in which implementations of it go wrong.

One file an operation; each registers itself when it is imported, and all are. A mistake has the arguments of the
operation's torch form and computes what the mistake computes. `check` looks a wrong function up in here; the tests hold
`check` to tell every one of them from the loops, and to name it.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__, f"{__name__}."):
    import_module(_file.name)
