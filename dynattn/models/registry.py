"""Model names and how each is made."""

from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import import_module
from inspect import signature

from torch import Tensor, nn

from dynattn import weights

# name: (file of this folder, class or function, its keyword arguments)
MODELS: dict[str, tuple[str, str, str | None]] = {
    "dat_tiny": ("dat", "DAT", "TINY"),
    "dat_small": ("dat", "DAT", "SMALL"),
    "dat_base": ("dat", "DAT", "BASE"),
    "dat_base_384": ("dat", "DAT", "BASE_384"),
    "dat_tiny_conv": ("dat", "DAT", "TINY_CONV"),
    "dat_mini": ("dat", "DAT", "MINI"),
    "dgt_tiny": ("dgt", "DGT", "TINY"),
    "dgt_small": ("dgt", "DGT", "SMALL"),
    "dgt_base": ("dgt", "DGT", "BASE"),
    "dgt_mini": ("dgt", "DGT", "MINI"),
    "cswin_tiny": ("comparisons", "CSWin", None),
    "swin_tiny_dgt": ("comparisons", "swin_tiny_dgt", None),
    "swin_mini": ("comparisons", "swin_mini", None),
    "vit_mini": ("comparisons", "vit_mini", None),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows and that fit a shell pattern, sorted."""
    return sorted(name for name in MODELS if fnmatchcase(name, pattern))


def check_name(name: object) -> str:
    """`name`, if it is a model's; else raises ValueError or TypeError with the nearest names."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a model, got {name!r}")
    if name not in MODELS:
        near = get_close_matches(name.lower(), MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(list_models())}"
        raise ValueError(f"name: no model {name!r}; {hint}")
    return name


def recipe_of(name: str) -> tuple[Callable[..., nn.Module], dict]:
    """What builds a model, and the keyword arguments that make it this one."""
    file, builder, arguments = MODELS[check_name(name)]
    module = import_module(f"dynattn.models.{file}")
    return getattr(module, builder), dict(getattr(module, arguments)) if arguments else {}


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    variant: str | None = None,
    **options,
) -> nn.Module:
    """A model by its name, in eval mode when `pretrained` and in train mode otherwise, as timm does it.

    pretrained: load the checkpoint that ships with the package (no network); only the mini models have one.
    num_classes, img_size: None for the model's own; another img_size resizes the position tables of a checkpoint,
    another class count gives it a new classifier. variant: "official" (the published code, default) or "paper" (the
    text, where the two differ). options: the model's own keyword arguments, e.g. the papers' ablations.
    Raises ValueError (unknown name: the nearest are suggested), TypeError (an argument that the model does not have).
    """
    build, arguments = recipe_of(name)
    given = dict(num_classes=num_classes, img_size=img_size, variant=variant)
    wanted = {key: value for key, value in given.items() if value is not None} | options
    known = signature(build).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [key for key in wanted if key not in known and not takes_any]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
        raise TypeError(f"{unknown[0]}: not an argument of {name}; {hint}")
    if not pretrained:
        return build(**arguments | wanted)

    shipped = [model for model in weights.available() if model in MODELS]
    if name not in shipped:
        raise ValueError(f"pretrained: no checkpoint of {name!r} ships, only of {', '.join(shipped)}")
    state, metadata = weights.read(weights.path(name))
    trained = arguments | metadata["arguments"]
    model = build(**trained | wanted | {"num_classes": trained["num_classes"]})
    load_trained(model, state)
    if num_classes not in (None, trained["num_classes"]):
        model.reset_classifier(num_classes)
    return model.eval()


def load_trained(model: nn.Module, state: dict) -> None:
    """Load a state dict of our own names, bicubic tables for another size; the model is unchanged when this raises."""
    from timm.layers import resample_abs_pos_embed

    from dynattn.core import resize_table

    own = model.state_dict()

    def fitted_to_size(key: str, value: Tensor) -> Tensor:
        if key.endswith("table") and key in own and value.ndim == 3 == own[key].ndim:
            return resize_table(value, tuple(own[key].shape[1:]))
        if key == "pos_embed" and key in own:  # timm's, (1, tokens, C) of a square map
            return resample_abs_pos_embed(value, model.patch_embed.grid_size, num_prefix_tokens=0)
        return value

    fitted = {key: fitted_to_size(key, value) for key, value in state.items()}
    wrong = [key for key in own.keys() | fitted.keys() if key not in own or key not in fitted]
    wrong += [key for key in own.keys() & fitted.keys() if own[key].shape != fitted[key].shape]
    if wrong:
        raise ValueError(f"state: {len(wrong)} entries do not fit the model, first {sorted(wrong)[:10]}")
    model.load_state_dict(fitted)
