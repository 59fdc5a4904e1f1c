"""Published checkpoints into our models: names and shapes of the authors' state dicts, translated.

Each model says what the published code calls its entries (`published_entries`), and its file how to tell a checkpoint
of it (`models/published.py`). Everything else is strict: an entry that is missing, unexpected or of another shape
raises, in the published names, and the model stays as it was.
"""

import os
import re
from pathlib import Path

from torch import Tensor, nn

from dynattn import checkpoint_files, weights
from dynattn.models.published import DESCRIPTIONS, IDENTIFIERS
from dynattn.models.registry import configuration_of, create_model, load_trained

WRAPPERS = ("model", "state_dict", "state_dict_ema")
PREFIXES = ("module.", "backbone.")
DERIVED = re.compile(r"(^|\.)(relative_position_index|attn_mask|reference|q_grid)$")  # computed, not learned


def read_state_dict(source: str | os.PathLike | dict) -> dict[str, Tensor]:
    """The published entries of a checkpoint: a path (.pth, .safetensors) or a dict, unwrapped, derived buffers removed.

    No code in a file is run: what is no tensor, number, string or container is left out (`checkpoint_files`). Of a
    model that was saved whole the state dict is taken.
    Raises FileNotFoundError; ValueError for a damaged file, or one without a state dict; TypeError for something else.
    """
    if isinstance(source, str | os.PathLike):
        content = _read_file(Path(source))
    elif isinstance(source, dict):
        content = source
    else:
        raise TypeError(f"path_or_state_dict: expected a path or a dict, got {type(source).__name__}")
    for wrapper in WRAPPERS:
        if isinstance(inner := _state_of(content.get(wrapper)), dict):
            content = inner
            break
    if not content or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        found = ", ".join(f"{key}: {_kind(value)}" for key, value in list(content.items())[:5])
        raise ValueError(f"path_or_state_dict: expected tensors by name, bare or under {WRAPPERS}; got {{{found}}}")
    state = {}
    for key, value in content.items():
        for prefix in PREFIXES:
            key = key.removeprefix(prefix)
        if not DERIVED.search(key):  # a copy of what lies in a file, which may change
            state[key] = value if isinstance(source, dict) else value.clone()
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ValueError(f"path_or_state_dict: {len(bad)} entries hold NaN or infinity, first {bad[:10]}")
    return state


def _read_file(path: Path) -> dict:
    """The content of a checkpoint file; nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"path_or_state_dict: no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = _state_of(checkpoint_files.read(path))
    except Exception as error:  # every reader has errors of its own for a damaged file
        reason = f"{type(error).__name__} {str(error).split('. ')[0]}".strip()
        raise ValueError(f"path_or_state_dict: {path} is not a checkpoint, or is damaged ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"path_or_state_dict: {path} holds a {_kind(content)}, not a state dict")
    return content


def _state_of(content: object) -> object:
    """The state dict of a model that was saved whole; everything else as it is."""
    if isinstance(content, checkpoint_files.Placeholder):
        return content.weights() or content
    return content


def _kind(value: object) -> str:
    """What a value is, for an error message."""
    return value.name if isinstance(value, checkpoint_files.Placeholder) else type(value).__name__


def identify(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The name and arguments for `create_model` that fit published entries. Raises ValueError when none does."""
    for mark, recognise in reversed(IDENTIFIERS.items()):  # a model around another one is registered after it
        if mark in state:
            try:
                return recognise(state)
            except (KeyError, IndexError, TypeError):  # one of its other marks is missing, or of no such shape
                break
    raise ValueError(f"state_dict: none of the published models has such entries: {', '.join(list(state)[:5])}, ...")


def load_official(model: nn.Module, path_or_state_dict: str | os.PathLike | dict) -> nn.Module:
    """Load the published weights of one of the papers into our model of the same shape; returns the model.

    path_or_state_dict: a file, of which no code is run, or a dict; the entries bare or under "model", "state_dict",
    "state_dict_ema", with or without the prefixes "module." and "backbone.". Position tables of another resolution are
    resized (as the model says, or bicubic); derived buffers (masks, indices, grids) and entries that the published code
    never reads are ignored.
    Raises ValueError, TypeError or FileNotFoundError, with what is missing, unexpected or of the wrong shape and the
    `create_model` call that would fit; the model is unchanged then.
    """
    if not hasattr(model, "published_entries"):
        raise TypeError(f"model: there are no published weights for a {type(model).__name__}")
    entries = model.published_entries()
    state = read_state_dict(path_or_state_dict)
    if (unused := getattr(model, "unused_entries", None)) is not None:  # that the published code owns and never reads
        state = {key: value for key, value in state.items() if not unused.fullmatch(key)}
    own = model.state_dict()
    missing = [entry.name for entry in entries.values() if entry.name not in state]
    unexpected = sorted(set(state) - {entry.name for entry in entries.values()})
    wrong, converted = [], {}
    for name, entry in entries.items():
        if entry.name in state:
            try:
                converted[name] = entry.convert(state[entry.name])
            except (RuntimeError, IndexError, ValueError, TypeError):  # a shape that no table of this kind has
                converted[name] = state[entry.name]
            floating = converted[name].is_floating_point() == own[name].is_floating_point()
            if converted[name].shape != own[name].shape or not floating:
                wrong.append(f"{_described(entry.name, state[entry.name])} for {tuple(own[name].shape)}")
    if missing or unexpected or wrong:
        raise ValueError(_complaint(state, missing, unexpected, wrong))
    model.load_state_dict(converted)
    return model


def _described(name: str, tensor: Tensor) -> str:
    """An entry for an error message: its dtype only where that is none of a weight."""
    return f"{name} {tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")


def _complaint(state: dict[str, Tensor], missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    """What does not fit, the first ten of each kind, and the call that would."""
    lines = ["path_or_state_dict: the checkpoint does not fit the model, which is unchanged."]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong)):
        if names:
            more = f", and {len(names) - 10} more" if len(names) > 10 else ""
            lines.append(f"{len(names)} {what}: {', '.join(names[:10])}{more}")
    try:
        name, options = identify(state)
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        lines += [describe(state) for mark, describe in DESCRIPTIONS.items() if mark in state]
        lines.append(f'It looks like one for dynattn.create_model("{name}"{arguments}).')
    except ValueError:
        lines.append("It is no published model that dynattn knows.")
    return "\n".join(lines)


def model_from(path: str | os.PathLike, name: str | None = None) -> tuple[str, nn.Module]:
    """The name and the model, in eval mode, of any checkpoint file: a published one, or one that `train` wrote.

    name: of the model whose `state_dict()` the file holds, as `torch.save` wrote it; nothing in such a file says it.
    Raises FileNotFoundError, ValueError when it cannot be read or fits no model.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, metadata = weights.read(path)
        model = create_model(metadata["name"], **metadata["arguments"])
        load_trained(model, state)
        return metadata["name"], model.eval()
    state = read_state_dict(path)
    if IDENTIFIERS.keys().isdisjoint(state) and name is not None:
        return name, own_model(name, state).eval()
    try:
        found, options = identify(state)
    except ValueError as error:
        advice = "say which of our models it is of, with name=... (--model NAME)"
        raise ValueError(f"{error}\nIf it is what torch.save(model.state_dict()) wrote, {advice}.") from error
    return found, load_official(create_model(found, **options), state).eval()


def own_model(name: str, state: dict[str, Tensor]) -> nn.Module:
    """A model of ours, by its name, with entries that its `state_dict()` had; the classes are those of the entries.

    Raises ValueError where they do not fit.
    """
    classifier = configuration_of(name).get("classifier", "head")
    head = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    model = create_model(name, **({} if head is None else {"num_classes": len(head)}))
    buffers = {key: value for key, value in model.state_dict().items() if DERIVED.search(key)}  # left out on reading
    load_trained(model, buffers | state)
    return model
