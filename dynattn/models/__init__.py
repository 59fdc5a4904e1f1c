"""The papers' models. Importing this package puts them into timm's registry as well."""

from inspect import signature

from timm.models import build_model_with_cfg, register_model

from dynattn.data.images import MEAN, STD
from dynattn.models.registry import MODELS, check_name, create_model, list_models, recipe_of

__all__ = ["check_name", "create_model", "list_models"]

default_cfgs: dict[str, dict] = {}  # where timm's registry looks for what a model of this module expects


def _register(name: str) -> None:
    """`timm.create_model(name)` and `features_only=True` for one of our models."""
    build, arguments = recipe_of(name)
    own = {key: parameter.default for key, parameter in signature(build).parameters.items()} | arguments

    def entry(pretrained: bool = False, variant: str | None = None, **options):
        def build(**given):  # without `pretrained` and `variant`, which mean something else to timm's builder
            return create_model(name, pretrained=pretrained, variant=variant, **given)

        stages = dict(out_indices=tuple(range(len(own["depths"]))), feature_cls="getter")
        return build_model_with_cfg(build, name, False, feature_cfg=stages, **options)

    default_cfgs[name] = dict(
        input_size=(3, own["img_size"], own["img_size"]),
        num_classes=own["num_classes"],
        mean=MEAN,
        std=STD,
        interpolation="bicubic",
        classifier="head",
    )
    entry.__name__, entry.__module__ = name, __name__
    entry.__doc__ = f"dynattn's {name}; see `dynattn.create_model`."
    globals()[name] = register_model(entry)  # timm adds the name to __all__


for _name, (_file, *_) in MODELS.items():
    if _file != "comparisons":  # those are timm's already
        _register(_name)
