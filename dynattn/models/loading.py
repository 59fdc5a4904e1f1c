"""State dicts of our own names into a model: tables resized, what does not fit refused before anything is changed."""

from math import isqrt

from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from dynattn.core import pair, resize_table


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state dict of our own names, bicubic tables for another size; the model is unchanged on an error."""
    model.load_state_dict(checked(state, model))


def fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of images of the size that timm knows of it, for those of the model: timm's filter of weights.

    Raises ValueError where entries do not fit, except for what timm itself adapts.
    """
    if "pos_embed" in state and hasattr(model, "patch_embed"):
        made_for = model.pretrained_model_args.get("img_size") or model.pretrained_cfg["input_size"][-2:]
        made_for = pair("img_size", tuple(made_for) if isinstance(made_for, list) else made_for)
        patches = model.patch_embed.patch_size
        grid = tuple(-(-side // patch) for side, patch in zip(made_for, patches, strict=True))
        old = grid if grid[0] * grid[1] == state["pos_embed"].shape[1] else None
        new = model.patch_embed.grid_size
        if old != new:
            state = state | {"pos_embed": resample_abs_pos_embed(state["pos_embed"].float(), new, old, 0)}
    return checked(state, model)


def checked(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries in float32, with tables of the model's sizes.

    Raises ValueError where entries are missing, unknown or of another shape. What timm itself adapts is let through: a
    first convolution for another number of channels, a classifier of the classes that `pretrained_cfg` says.
    """
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    resize_tables(model, state)
    own, cfg = model.state_dict(), getattr(model, "pretrained_cfg", {})
    classifiers = cfg.get("classifier") or "head"
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = {f"{name}.{part}" for name in classifiers for part in ("weight", "bias")}
    adapted = {f"{cfg.get('first_conv')}.weight"}
    if cfg.get("num_classes") != model.num_classes:
        adapted |= heads
    wrong = [key for key in own.keys() ^ state.keys() if key not in adapted]
    wrong += [key for key in own.keys() & state.keys() - adapted if own[key].shape != state[key].shape]
    if wrong and set(wrong) <= heads and f"{classifiers[0]}.weight" in state:
        classes = len(state[f"{classifiers[0]}.weight"])
        raise ValueError(
            f"state: a checkpoint of {classes} classes, but pretrained_cfg says that it has {cfg.get('num_classes')}; "
            f"give pretrained_cfg_overlay=dict(num_classes={classes}, ...), and num_classes=... besides for a new "
            "classifier"
        )
    if wrong:
        raise ValueError(
            f"state: {len(wrong)} entries do not fit the model, first {sorted(wrong)[:10]}; published checkpoints are "
            "loaded by dynattn.load_official"
        )
    return state


def resize_tables(model: nn.Module, state: dict[str, Tensor], prefix: str = "", *_) -> None:
    """Give the position tables of a state dict the model's sizes, in place: a hook in front of `load_state_dict`.

    Ours (h, I, J), and timm's, of windows (I J, h) and of all tokens (1, tokens, C), both of a square map.
    Raises ValueError for one of timm's that is not square.
    """
    own = dict(model.named_parameters())
    for key in [key for key in state if key.startswith(prefix)]:
        name, value = key.removeprefix(prefix), state[key]
        if name not in own or own[name].shape == value.shape or own[name].ndim != value.ndim:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if name == "pos_embed":
            check_square(key, value.shape[1], model)
            state[key] = resample_abs_pos_embed(value, model.patch_embed.grid_size, num_prefix_tokens=0)
        elif name.endswith("relative_position_bias_table"):
            check_square(key, value.shape[0], model)
            state[key] = resize_rel_pos_bias_table(value, owner.window_size, tuple(own[name].shape))
        elif name.endswith("table") and getattr(owner, "position_bias", None) != "fixed":
            if len(value) == len(own[name]):
                resize = getattr(owner, "resize_table", resize_table)  # bicubic, unless the owner does it otherwise
                state[key] = resize(value, tuple(own[name].shape[1:]))


def check_square(key: str, count: int, model: nn.Module) -> None:
    """Raise ValueError unless a table that does not say its rows and columns can only be of a square."""
    if isqrt(count) ** 2 != count:
        raise ValueError(
            f"state: {key} has {count} positions, which are no square, so it fits only a model that is made for the "
            f"img_size that it was trained at, not for {tuple(model.img_size)}; load it there, then call "
            "set_input_size(img_size)"
        )
