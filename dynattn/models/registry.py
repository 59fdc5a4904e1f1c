"""Model names and how each is made."""

from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from timm.models import is_model
from torch import nn

from dynattn.models import entries
from dynattn.models.loading import load_trained

__all__ = ["check_name", "create_model", "list_models", "load_trained", "build_of", "register_model"]

_REGISTERED: dict[str, tuple[Callable[..., nn.Module], dict]] = {}


def register_model(name: str, build: Callable[..., nn.Module], **arguments) -> None:
    """Make a model known to `create_model`, `list_models` and timm's registry under a name.

    build: a class or function; `build(**arguments)` is the model, other keyword arguments of it become options of
    `create_model`. As far as it has them, `img_size`, `in_chans` and `num_classes` mean what they mean in timm;
    `forward_intermediates` and `feature_info` give `features_only`. `build.configuration(**arguments)`, if there is
    one, adds to timm's description of the model (`pretrained_cfg`), e.g. `first_conv`.
    The checkpoint that `pretrained=True` loads is NAME.safetensors in one of the folders of `dynattn.weights`; name the
    folder first (`weights.add_folder`), so that timm lists the model among the pretrained ones. A name of ours may be
    registered again, the last counts.
    Raises TypeError, ValueError for a name that is no identifier or that is taken, or a build that cannot be called.
    """
    import dynattn.models

    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: expected letters, digits and underscores, as in 'dat_tiny', got {name!r}")
    if name not in _REGISTERED and (is_model(name) or hasattr(dynattn.models, name)):
        raise ValueError(f"name: {name!r} is taken, by a model of timm's or by a part of dynattn.models")
    if not callable(build):
        raise TypeError(f"build: expected a class or a function that makes the model, got {build!r}")
    _REGISTERED[name] = (build, arguments)
    entries.add_to_timm(name, build, arguments)


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows and that fit a shell pattern, sorted."""
    return sorted(name for name in _REGISTERED if fnmatchcase(name, pattern))


def check_name(name: object) -> str:
    """`name`, if it is a model's; else raises ValueError or TypeError with the nearest names."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a model, got {name!r}")
    if name not in _REGISTERED:
        near = get_close_matches(name.lower(), _REGISTERED, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(list_models())}"
        raise ValueError(f"name: no model {name!r}; {hint}")
    return name


def build_of(name: str) -> tuple[Callable[..., nn.Module], dict]:
    """What builds a model, and the keyword arguments that make it this one."""
    build, arguments = _REGISTERED[check_name(name)]
    return build, dict(arguments)


def configuration_of(name: str) -> dict:
    """What timm knows of a model: its images, names of its first and last layer."""
    return entries.configuration(*build_of(name))


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    variant: str | None = None,
    **options,
) -> nn.Module:
    """A model by its name, in eval mode when `pretrained` and in train mode otherwise.

    pretrained: load the checkpoint that ships with the package (no network); only the mini models have one.
    num_classes, img_size: None for the model's own; another img_size resizes the position tables of a checkpoint,
    another class count gives it a new classifier. variant: "official" (the published code, default) or "paper" (the
    text, where the two differ). options: the model's own keyword arguments, e.g. the papers' ablations.
    `timm.create_model` makes the same model, with timm's own arguments besides.
    Raises ValueError (unknown name: the nearest are suggested), TypeError (an argument that the model does not have).
    """
    build, arguments = build_of(name)
    given = dict(num_classes=num_classes, img_size=img_size, variant=variant)
    wanted = {key: value for key, value in given.items() if value is not None} | options
    entries.check_options(name, build, wanted)
    return entries.build(name, build, arguments, pretrained=pretrained, **wanted)
