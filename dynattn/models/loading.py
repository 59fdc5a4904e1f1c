"""State dicts of our own names into a model: tables resized, what does not fit refused before anything is changed."""

from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from dynattn.core import resize_table


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state dict of our own names, bicubic tables for another size; the model is unchanged on an error."""
    model.load_state_dict(fitted(state, model))


def fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries of a state dict in float32, with tables of the model's sizes: `checkpoint_filter_fn` of timm.

    Raises ValueError where entries are missing, unknown or of another shape. What timm itself adapts is let through: a
    first convolution for another number of channels, a classifier of the classes that `pretrained_cfg` says.
    """
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    resize_tables(model, state)
    own, cfg = model.state_dict(), getattr(model, "pretrained_cfg", {})
    classifier = cfg.get("classifier") or "head"
    heads = {f"{classifier}.weight", f"{classifier}.bias"}
    adapted = {f"{cfg.get('first_conv')}.weight"}
    if cfg.get("num_classes") != model.num_classes:
        adapted |= heads
    wrong = [key for key in own.keys() ^ state.keys() if key not in adapted]
    wrong += [key for key in own.keys() & state.keys() - adapted if own[key].shape != state[key].shape]
    if wrong and set(wrong) <= heads and heads <= state.keys():
        classes = len(state[f"{classifier}.weight"])
        raise ValueError(
            f"state: a checkpoint of {classes} classes for {model.num_classes}, but pretrained_cfg says that it has "
            f"{cfg.get('num_classes')}; give pretrained_cfg_overlay=dict(num_classes={classes}), and num_classes for a "
            "new classifier"
        )
    if wrong:
        raise ValueError(
            f"state: {len(wrong)} entries do not fit the model, first {sorted(wrong)[:10]}; published checkpoints are "
            "loaded by dynattn.load_official"
        )
    return state


def resize_tables(model: nn.Module, state: dict[str, Tensor], prefix: str = "", *_) -> None:
    """Give the position tables of a state dict the model's sizes, in place: a hook in front of `load_state_dict`.

    Ours (h, I, J) and timm's, of windows (I J, h) and of all tokens (1, tokens, C), both of a square map.
    """
    own = dict(model.named_parameters())
    for key in [key for key in state if key.startswith(prefix)]:
        name, value = key.removeprefix(prefix), state[key]
        if name not in own or own[name].shape == value.shape or own[name].ndim != value.ndim:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if name == "pos_embed":
            state[key] = resample_abs_pos_embed(value, model.patch_embed.grid_size, num_prefix_tokens=0)
        elif name.endswith("relative_position_bias_table"):
            state[key] = resize_rel_pos_bias_table(value, owner.window_size, tuple(own[name].shape))
        elif (
            name.endswith("table") and getattr(owner, "position_bias", None) != "fixed" and len(value) == len(own[name])
        ):
            state[key] = resize_table(value, tuple(own[name].shape[1:]))
