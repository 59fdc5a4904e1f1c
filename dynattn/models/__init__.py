"""The papers' models. Importing this package puts them into timm's registry as well."""

from timm.models import build_model_with_cfg, register_model

from dynattn.models.registry import MODELS, check_name, create_model, list_models

__all__ = ["check_name", "create_model", "list_models"]


def _register(name: str) -> None:
    """`timm.create_model(name)` and `features_only=True` for one of our models."""
    from dynattn.data.images import MEAN, STD

    def entry(pretrained: bool = False, **options):
        def build(num_classes=None, img_size=None, **rest):
            return create_model(name, pretrained=pretrained, num_classes=num_classes, img_size=img_size, **rest)

        config = dict(input_size=(3, 224, 224), mean=MEAN, std=STD, classifier="head", interpolation="bicubic")
        stages = dict(out_indices=options.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter")
        return build_model_with_cfg(build, name, False, pretrained_cfg=config, feature_cfg=stages, **options)

    entry.__name__, entry.__module__ = name, __name__
    entry.__doc__ = f"dynattn's {name}; see `dynattn.create_model`."
    register_model(entry)


for _name in MODELS:
    if not _name.startswith("swin"):
        _register(_name)
