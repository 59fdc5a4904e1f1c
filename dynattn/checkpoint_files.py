"""Checkpoint files of anybody, read so that no code in them runs.

A file of `torch.save` holds a pickle: a small program that may import and call anything. Training runs save their
configuration beside the weights (yacs, argparse, omegaconf, numpy), so most published files need more than tensors.
Here every name in the pickle becomes a `Placeholder`, which is never imported and never called, except for the few
that make tensors. Weights need no more.

torch's own safe reader comes first. It reads what holds tensors alone, and it refuses TorchScript and the tar files of
2016, which torch would read with other means than a pickle.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Placeholder:
    """Stands for an object that only code could restore: its name, and the state that the file has of it."""

    def __init__(self, name: str):
        self.name = name
        self.state: Any = None

    def __repr__(self) -> str:
        return f"Placeholder({self.name!r})"

    def append(self, item: Any) -> None:
        """Of a list, or of a set below: dropped."""

    extend = add = append

    def __setitem__(self, key: Any, item: Any) -> None:
        """Of a dict: dropped."""

    def weights(self) -> dict[str, Tensor] | None:
        """The entries of the state dict, if this was an `nn.Module`; None for everything else."""
        if not isinstance(self.state, dict) or not {"_parameters", "_buffers", "_modules"} <= set(self.state):
            return None
        passing = self.state.get("_non_persistent_buffers_set", ())
        buffers = {name: value for name, value in self.state["_buffers"].items() if name not in passing}
        entries = {name: value for name, value in {**self.state["_parameters"], **buffers}.items() if value is not None}
        for name, module in self.state["_modules"].items():
            below = module.weights() if isinstance(module, Placeholder) else None
            entries |= {f"{name}.{key}": value for key, value in (below or {}).items()}
        return entries


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: the functions of torch that a file may call, by the names that it has for them
# ---------------------------------------------------------------------------------------------------------------------


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Tensor:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`; gradients and hooks are left out."""
    _check_storage(storage)
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict(), metadata)


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Tensor:
    """`_rebuild_tensor_v3`, of the dtypes that no kind of storage is named after."""
    _check_storage(storage)
    return torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, OrderedDict(), dtype, metadata)


def _parameter(data, requires_grad=True, hooks=None, attributes=None) -> Tensor:
    """`_rebuild_parameter`, with or without attributes: its tensor."""
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError(f"a parameter is made from {_named(data)}, not from a tensor")
    return data


def _tensor_with_attributes(function, kind, arguments, attributes) -> Any:
    """`_rebuild_from_type_v2`: the tensor, without its attributes and of no class of its own."""
    return _call(function, arguments)


def _check_storage(storage: Any) -> None:
    if not isinstance(storage, torch.storage.TypedStorage | torch.UntypedStorage):
        raise pickle.UnpicklingError(f"a tensor is made from {_named(storage)}, not from numbers")


def _named(thing: Any) -> str:
    return thing.name if isinstance(thing, Placeholder) else f"a {type(thing).__name__}"


class Known:
    """A function that a file may call."""

    def __init__(self, run: Callable):
        self.run = run


KNOWN = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
}
# What a file names without calling it.
VALUES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
VALUES["torch.storage.UntypedStorage"] = torch.UntypedStorage


def _call(function: Any, arguments: Any) -> Any:
    """What a call in a pickle gives: a tensor or a container by a known function, else a placeholder."""
    if isinstance(function, Known):
        return function.run(*arguments)
    if isinstance(function, Placeholder):
        return Placeholder(function.name)
    raise pickle.UnpicklingError(f"calls {_named(function)}, which is no function")


# ---------------------------------------------------------------------------------------------------------------------
# The pickle
# ---------------------------------------------------------------------------------------------------------------------


class Unpickler(pickle._Unpickler):
    """Reads a pickle of any protocol; the opcodes that import, call and set state are replaced."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Whatever has a name: a known function, a dtype, or a placeholder."""
        full = f"{module}.{name}"
        return Known(KNOWN[full]) if full in KNOWN else VALUES.get(full) or Placeholder(full)

    def get_extension(self, code: int) -> None:
        """A name from the registry of `copyreg`, which other code fills: a placeholder."""
        self.append(Placeholder(f"extension {code} of copyreg"))

    def _instantiate(self, kind: Any, arguments: Any) -> None:  # INST and OBJ, of protocols 0 and 1
        self.append(_call(kind, arguments))

    def load_reduce(self) -> None:
        """A call of a function."""
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        """A new object, from positional and keyword arguments: no known function takes keywords."""
        _, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(_call(kind, arguments))

    def load_build(self) -> None:
        """Set state: a placeholder keeps it. Of containers and tensors these are attributes, which no weight needs."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Placeholder):
            self.stack[-1].state = state

    def load_binpersid(self) -> None:
        """A storage, which torch reads. The old format names classes too, whose source torch would compare."""
        kind, *about = self.stack.pop()
        if kind == "module":
            self.append(about[0])
        elif kind == "storage":
            self.append(self.persistent_load((kind, *about)))
        else:
            raise pickle.UnpicklingError(f"refers to {_named(kind)}, which is no storage")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce  # the same stack: a class instead of a function
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINPERSID[0]] = load_binpersid


def load(file, **options) -> Any:
    """The next pickle of an open file."""
    return Unpickler(file, **options).load()


INERT = SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)  # what torch.load asks of a pickle module

# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """What a file of `torch.save` holds, with placeholders for what is no tensor, number, string or container.

    The tensors of a file that can be mapped lie in it: they must be copied before it changes.
    Raises what torch's readers raise for a damaged file.
    """
    options = {"map_location": "cpu", "mmap": _can_be_mapped(path)}
    try:
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError:  # not of tensors alone; TorchScript and tar files raise RuntimeError
        return torch.load(path, weights_only=False, pickle_module=INERT, encoding="latin1", **options)


def _can_be_mapped(path: Path) -> bool:
    """Whether the tensors lie in the file as they are: in a zip file whose entries are not compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except zipfile.BadZipFile:
        return False
