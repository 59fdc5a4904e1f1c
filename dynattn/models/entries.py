"""One way to make a model for both doors, `dynattn.create_model` and `timm.create_model`: timm's own builder.

So weights are looked for, adapted and loaded as timm does it for its models, and every model has the same
`pretrained_cfg`, whichever door it came through. The checkpoint that ships is the `file` of that configuration: a file,
a state dict or a folder that the user names takes its place.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from inspect import Parameter, signature

import torch
from timm.layers import is_scriptable
from timm.models import PretrainedCfg, build_model_with_cfg, is_model, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from dynattn import core, weights
from dynattn.data.images import MEAN, STD
from dynattn.models.loading import fitted, resize_tables

SOURCES = ("file", "state_dict", "url", "hf_hub_id")  # where a configuration of timm's may say that weights are


def configuration(make: Callable[..., nn.Module], arguments: dict) -> dict:
    """timm's description of a model: what images it takes, and names of its first and last layer.

    `make` may have a method `configuration(**arguments)` that adds to it.
    """
    defaults = {key: p.default for key, p in signature(make).parameters.items() if p.default is not Parameter.empty}
    values = {"img_size": 224, "num_classes": 1000, "in_chans": 3} | defaults | arguments
    found = dict(
        input_size=(values["in_chans"], *core.pair("img_size", values["img_size"])),
        num_classes=values["num_classes"],
        mean=MEAN,
        std=STD,
        interpolation="bicubic",
        classifier="head",
    )
    return found | (make.configuration(**values) if hasattr(make, "configuration") else {})


def add_to_timm(name: str, make: Callable[..., nn.Module], arguments: dict) -> None:
    """Put a model into timm's registry: `timm.create_model(name)`, with weights where a checkpoint ships."""
    module = sys.modules["dynattn.models"]

    def entry(pretrained: bool = False, **options) -> nn.Module:
        return build(name, make, arguments, pretrained=pretrained, **options)

    entry.__name__, entry.__module__ = name, module.__name__
    entry.__doc__ = f"dynattn's {name}; see `dynattn.create_model`."
    file = {"file": str(weights.path(name))} if name in weights.shipped() else {}
    module.default_cfgs[name] = configuration(make, arguments) | file
    setattr(module, name, register_model(entry))  # timm adds the name to __all__


def build(
    name: str,
    make: Callable[..., nn.Module],
    arguments: dict,
    *,
    pretrained: bool = False,
    pretrained_cfg: dict | str | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict | None = None,
    pretrained_model_args: dict | None = None,
    cache_dir: str | None = None,
    features_only: bool = False,
    feature_cls: str | type[nn.Module] = "getter",
    out_indices: int | tuple[int, ...] | None = None,
    output_stride: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options,
) -> nn.Module:
    """A model, or with `features_only` its feature extractor, as timm's entry points make them.

    options: the model's own arguments. feature_cls: "getter" and "list" give a list of maps, "dict" an ordered dict;
    "hook" the same by hooks, channels-last, as the stages hand them on. In eval mode when `pretrained`.
    Raises TypeError for an argument that the model does not have; ValueError for one that cannot be, before any work.
    """
    check_options(name, make, options)
    if is_scriptable():
        raise ValueError("scriptable: expected False, TorchScript is not supported; torch.export and torch.compile are")
    if isinstance(feature_cls, str):
        core.one_of("feature_cls", feature_cls, tuple(FEATURES))
    overlay = dict(pretrained_cfg_overlay or {})
    if not pretrained_cfg and not any(overlay.get(key) for key in SOURCES) and name in weights.shipped():
        overlay["file"] = str(weights.path(name))
    said = weights.metadata(overlay["file"]) if pretrained and overlay.get("file") else {}
    if said.get("name") == name:  # a checkpoint of ours says what it was trained with
        arguments = arguments | said["arguments"]
    if not pretrained_cfg or isinstance(pretrained_cfg, dict):
        pretrained_cfg = configuration(make, arguments) | (pretrained_cfg or {})
    source = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    if pretrained and not (source.has_weights or source.state_dict):
        shipped = ", ".join(filter(is_model, weights.shipped()))
        raise ValueError(f"pretrained: no checkpoint of {name!r} ships, only of {shipped}")

    features = dict(out_indices=out_indices, feature_cls=FEATURES.get(feature_cls, feature_cls))
    if features["feature_cls"] == "hook":
        features["output_fmt"] = "NHWC"
    held = {key: options.pop(key) for key in ("variant",) if key in options}  # a word of timm's builder, too

    def made(**given) -> nn.Module:
        """The model from the user's options and from what timm adds to them out of the configuration."""
        known = signature(make).parameters
        given = {key: value for key, value in given.items() if key in options or key in known or takes_any(make)}
        given = arguments | given | held
        if isinstance(given.get("img_size"), list):  # out of a file: JSON has no tuples
            given["img_size"] = tuple(given["img_size"])
        with nullcontext() if device is None else torch.device(device):
            model = make(**given)
        if features_only:
            check_stages_wanted(name, model.feature_info, out_indices, output_stride)
            if out_indices is None:
                features["out_indices"] = tuple(range(len(model.feature_info)))
        model._traits = dict(first_conv=configuration(make, given).get("first_conv"))
        model.register_load_state_dict_pre_hook(resize_tables)
        return model if dtype is None else model.to(dtype)

    model = build_model_with_cfg(
        made,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=fitted,
        pretrained_model_args=pretrained_model_args,
        cache_dir=cache_dir,
        feature_cfg=features,
        features_only=features_only,
        **options,
    )
    model._model_args = said.get("arguments", {}) | options | held  # what timm saves, to make the model again
    return model.eval() if pretrained else model


def takes_any(make: Callable[..., nn.Module]) -> bool:
    """Whether it hands on arguments that it does not name."""
    return any(p.kind is Parameter.VAR_KEYWORD for p in signature(make).parameters.values())


def check_options(name: str, make: Callable[..., nn.Module], options: dict) -> None:
    """Raise TypeError for an argument that the model does not have."""
    known = signature(make).parameters
    unknown = [key for key in options if key not in known and not takes_any(make)]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
        raise TypeError(f"{unknown[0]}: not an argument of {name}; {hint}")


def check_stages_wanted(name: str, stages: list[dict], out_indices: object, output_stride: int | None) -> None:
    """Raise ValueError where a feature extractor would need stages, or strides, that the model does not have."""
    count = len(stages)
    wanted = (
        range(-out_indices, 0) if isinstance(out_indices, int) else range(count) if out_indices is None else out_indices
    )
    if not len(wanted) or not all(-count <= i < count for i in wanted):
        raise ValueError(
            f"out_indices: {name} has stages 0 to {count - 1}, got {out_indices!r}; an encoder of "
            f"segmentation_models_pytorch takes encoder_depth={min(count + 1, 5)} or less"
        )
    stride = max(stages[i]["reduction"] for i in wanted)
    if output_stride not in (None, stride):
        raise ValueError(
            f"output_stride: expected {stride}, the stride of the last stage asked of {name}, got {output_stride}: its "
            f"stages cannot be dilated; ask for fewer stages (out_indices, or encoder_depth) for a smaller stride"
        )


class Features(FeatureGetterNet):
    """The maps of the stages that `out_indices` asks for: a list, highest resolution first."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the model."""
        self.model.set_grad_checkpointing(enable)


class FeaturesByName(Features):
    """The same as an ordered dict, by `out_map` or by the number of the stage as a string."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        names = self.out_map or map(str, self.out_indices)
        return OrderedDict(zip(names, super().forward(x), strict=True))


FEATURES = {"getter": Features, "list": Features, "dict": FeaturesByName, "hook": "hook"}
