"""The papers' models. Importing this package puts them into timm's registry as well."""

from importlib import import_module
from pkgutil import iter_modules

from dynattn.models.registry import check_name, create_model, list_models, register_model

__all__ = ["check_name", "create_model", "list_models", "register_model"]

default_cfgs: dict[str, dict] = {}  # where timm's registry looks for what a model of this module expects

for _file in iter_modules(__path__):  # a file a paper, which registers its models itself
    import_module(f"{__name__}.{_file.name}")
