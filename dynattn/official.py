"""Published checkpoints into our models: names and shapes of the authors' state dicts, translated.

For each of our entries a table says what the published code calls it. Everything else is strict: an entry that is
missing, unexpected or of another shape raises, in the published names, and the model stays as it was.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from einops import rearrange
from torch import Tensor, nn

from dynattn import checkpoint_files, core, weights
from dynattn.mechanisms.deformable import DeformableAttention
from dynattn.mechanisms.window import WindowAttention
from dynattn.models import biformer, debiformer
from dynattn.models.biformer import BiLevelModel
from dynattn.models.dat import DAT
from dynattn.models.registry import build_of, create_model, load_trained

WRAPPERS = ("model", "state_dict", "state_dict_ema")
PREFIXES = ("module.", "backbone.")
DERIVED = re.compile(r"(^|\.)(relative_position_index|attn_mask|reference|q_grid)$")  # computed, not learned


@dataclass(frozen=True)
class Entry:
    """What the published code calls one of our entries, and how its tensor becomes ours."""

    name: str
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


# ---------------------------------------------------------------------------------------------------------------------
# DAT
# ---------------------------------------------------------------------------------------------------------------------


def dat_entries(model: DAT) -> dict[str, Entry]:
    """Our name: the published entry, for every entry of a DAT."""
    modules = dict(model.named_modules())
    return {name: _dat_entry(name, modules) for name in model.state_dict()}


def _dat_entry(name: str, modules: dict[str, nn.Module]) -> Entry:
    """`name` itself for what no published DAT has: the convolutions of the small models."""
    head, _, last = name.rpartition(".")
    if found := re.fullmatch(r"(embed|stages\.(\d+)\.down)\.(proj|norm)", head):
        place = "patch_proj" if found[1] == "embed" else f"down_projs.{int(found[2]) - 1}"
        return Entry(f"{place}.{'0' if found[3] == 'proj' else '1.norm'}.{last}")
    if head in ("norm", "head"):
        return Entry(f"{'cls_norm.norm' if head == 'norm' else 'cls_head'}.{last}")
    found = re.fullmatch(r"(stages\.\d+)\.blocks\.(\d+)\.((norm|mlp|attn).+)", name)
    if not found:
        return Entry(name)
    stage, block, rest = found.group(1, 2, 3)
    if found := re.fullmatch(r"norm([12])\.(\w+)", rest):
        return Entry(f"{stage}.layer_norms.{2 * int(block) + int(found[1]) - 1}.norm.{found[2]}")
    if found := re.fullmatch(r"mlp\.fc([12])\.(\w+)", rest):
        return Entry(f"{stage}.mlps.{block}.chunk.linear{found[1]}.{found[2]}")
    attention, path = modules[f"{stage}.blocks.{block}.attn"], f"{stage}.attns.{block}"
    return _dat_attention_entry(attention, path, rest.removeprefix("attn."))


def _dat_attention_entry(attention: nn.Module, path: str, rest: str) -> Entry:
    as_linear = lambda t: t[:, :, 0, 0] if t.shape[2:] == (1, 1) else t  # noqa: E731  (they have 1 x 1 convolutions)
    if rest == "table" and isinstance(attention, WindowAttention):
        side = 2 * attention.window - 1
        return Entry(
            f"{path}.relative_position_bias_table",
            lambda t: core.resize_table(rearrange(t, "(I J) h -> h I J", I=int(len(t) ** 0.5)), (side, side)),
        )
    if rest == "table" and isinstance(attention, DeformableAttention):
        return Entry(f"{path}.rpe_table", lambda t: _fit_deformable_table(t, attention))
    names = {
        "qkv": "proj_qkv",
        "proj": "proj_out",
        "q": "proj_q",
        "k": "proj_k",
        "v": "proj_v",
        "offset.depthwise": "conv_offset.0",
        "offset.norm": "conv_offset.1.norm",
        "offset.pointwise": "conv_offset.3",
        "dwconv": "rpe_table",
    }
    module, _, last = rest.rpartition(".")
    keep_shape = module in ("offset.depthwise", "dwconv")
    return Entry(f"{path}.{names.get(module, module)}.{last}", (lambda t: t) if keep_shape else as_linear)


def _fit_deformable_table(table: Tensor, attention: DeformableAttention) -> Tensor:
    """A published table for the map that our layer was made for."""
    size = tuple(attention.table.shape[1:])
    if tuple(table.shape[1:]) == size or attention.position_bias == "relative":
        return core.resize_table(table, size)
    old = int(table.shape[1] ** 0.5)
    return core.resize_fixed(table, (old, old), attention.map_size, attention.stride)


def identify_dat(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The `create_model` name and arguments that fit a published DAT."""
    stem = state["patch_proj.0.weight"]
    blocks = {int(found[1]) for key in state if (found := re.match(r"stages\.2\.layer_norms\.(\d+)\.", key))}
    depth = (max(blocks) + 1) // 2 if blocks else 0
    window = (int(len(state["stages.0.attns.0.relative_position_bias_table"]) ** 0.5) + 1) // 2
    names = {(96, 6, 4, 7): "dat_tiny", (96, 6, 7, 7): "dat_tiny_conv", (96, 18, 4, 7): "dat_small"}
    names |= {(128, 18, 4, 7): "dat_base", (128, 18, 4, 12): "dat_base_384"}
    found = (stem.shape[0], depth, stem.shape[-1], window)
    if found not in names:
        raise ValueError(
            "state_dict: a DAT that is none of the published ones: "
            f"{found[0]} stem channels, {depth} blocks in stage 3, a {found[2]} x {found[2]} stem, windows of {window}"
        )
    name, options = names[found], {}
    defaults = {"num_classes": 1000, "img_size": 224} | build_of(names[found])[1]
    classes = state["cls_head.weight"].shape[0] if "cls_head.weight" in state else 0
    tables = [t for key, t in sorted(state.items()) if re.match(r"stages\.2\.attns\.\d+\.rpe_table$", key)]
    size = tuple((side + 1) // 2 * 16 for side in tables[0].shape[1:]) if tables else (defaults["img_size"],) * 2
    for key, value in (("num_classes", classes), ("img_size", size[0] if size[0] == size[1] else size)):
        if value != defaults[key]:
            options[key] = value
    return name, options


# ---------------------------------------------------------------------------------------------------------------------
# BiFormer and DeBiFormer
# ---------------------------------------------------------------------------------------------------------------------


def bilevel_entries(model: BiLevelModel) -> dict[str, Entry]:
    """Our name: the published entry, which the model knows. 1 x 1 convolutions become linear, tables are resized."""
    own = model.state_dict()

    def fitted(ours: Tensor) -> Callable[[Tensor], Tensor]:
        if ours.ndim == 3:
            return lambda table: core.resize_table(table, tuple(ours.shape[1:]))
        return lambda tensor: tensor[:, :, 0, 0] if tensor.ndim == 4 and ours.ndim == 2 else tensor

    return {name: Entry(theirs, fitted(own[name])) for name, theirs in model.published_names().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Every paper
# ---------------------------------------------------------------------------------------------------------------------

ENTRIES: list[tuple[type[nn.Module], Callable]] = [(DAT, dat_entries), (BiLevelModel, bilevel_entries)]
IDENTIFIERS: list[tuple[str, Callable]] = [  # an entry that only this paper has
    ("patch_proj.0.weight", identify_dat),
    ("stages.0.0.attn.qkv.qkv.weight", biformer.identify),
    ("stages.0.0.attn2.rpe_table", debiformer.identify),
]


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
    for mark, recognise in IDENTIFIERS:
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
    resized (bicubic); derived buffers (masks, indices, grids) are ignored.
    Raises ValueError, TypeError or FileNotFoundError, with what is missing, unexpected or of the wrong shape and the
    `create_model` call that would fit; the model is unchanged then.
    """
    entries = next((make(model) for kind, make in ENTRIES if isinstance(model, kind)), None)
    if entries is None:
        raise TypeError(f"model: there are no published weights for a {type(model).__name__}")
    state = read_state_dict(path_or_state_dict)
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
    if not any(mark in state for mark, _ in IDENTIFIERS) and name is not None:
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
    head = state.get("head.weight")
    model = create_model(name, **({} if head is None else {"num_classes": len(head)}))
    buffers = {key: value for key, value in model.state_dict().items() if DERIVED.search(key)}  # left out on reading
    load_trained(model, buffers | state)
    return model
