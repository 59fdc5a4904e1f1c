"""Trained checkpoints, and the file format they share: half-precision safetensors.

One checkpoint of every small model ships with the package, in this folder. The seeds and sweeps that only figures and
audits read are in `figures/weights` of the project's folder: a checkout has them, an installed package has not.

A file holds the tensors and one metadata entry, `dynattn`, a JSON object: the model's name and arguments, its classes,
the command, recipe, seed and version of the data set that made it (`dynattn train --all --list` compares them with what
they are now), and the accuracy it reached. Nothing in it is executed on reading.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).parent
ENTRY = "dynattn"
_ADDED: list[Path] = []


def add_folder(path: str | Path) -> None:
    """Look for NAME.safetensors of registered models in this folder too, after the package's own and those before it.

    Raises: NotADirectoryError where there is no such folder.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise NotADirectoryError(f"path: no folder {folder}")
    if folder not in _ADDED:
        _ADDED.append(folder)


def of_figures() -> Path:
    """Where the seeds and sweeps of the figures are in a checkout. An installed package has no such folder."""
    return FOLDER.parents[1] / "figures" / "weights"


def _files(*folders: Path) -> dict[str, Path]:
    """Every checkpoint of some folders by its name; of two of one name, that of the folder which came first."""
    return {file.stem: file for folder in reversed(folders) for file in folder.glob("*.safetensors")}


def shipped() -> list[str]:
    """Names of the models whose checkpoint ships with the package, or lies in a folder that was added, sorted."""
    return sorted(_files(FOLDER, *_ADDED))


def available() -> list[str]:
    """Names of every checkpoint that can be read here, sorted: what ships, and in a checkout what figures compare."""
    return sorted(_files(FOLDER, of_figures(), *_ADDED))


def path(name: str) -> Path:
    """The checkpoint of that name.

    Raises: ValueError where there is none; it says so where the folder of the figures' checkpoints is missing.
    """
    files = _files(FOLDER, of_figures(), *_ADDED)
    if name not in files:
        known = ", ".join(sorted(files)) or "none"
        raise ValueError(f"name: expected a model with a shipped checkpoint ({known}), got {name!r}{missing()}")
    return files[name]


def missing() -> str:
    """What to add to a message about a checkpoint that is not found; empty in a checkout, which has them all."""
    if of_figures().is_dir():
        return ""
    return "; seeds and sweeps are in figures/weights of the project's folder, not in an installed package"


def metadata(file: str | Path) -> dict[str, Any]:
    """What a checkpoint that `write` made says of itself; empty for any other file.

    Raises: FileNotFoundError.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"file: no checkpoint at {file}")
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as content:
            return json.loads((content.metadata() or {}).get(ENTRY, "{}"))
    except SafetensorError:  # damaged: who reads the tensors says so
        return {}


def read(file: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a checkpoint, floating ones in float32, and its metadata.

    Raises: FileNotFoundError; ValueError where the file is damaged or was not made by `write`.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"file: no checkpoint at {file}")
    try:
        with safe_open(file, framework="pt") as content:
            state = {key: content.get_tensor(key) for key in content.offset_keys()}
            metadata = json.loads((content.metadata() or {})[ENTRY])
    except SafetensorError as error:
        raise ValueError(f"file: {file} is not a whole safetensors file ({error}); copy or train it again") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"file: {file} has no readable metadata entry {ENTRY!r}: not a checkpoint of ours") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, metadata


def write(file: str | Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a checkpoint, floating tensors in float16; the file is whole or absent at any moment.

    Raises: ValueError where a tensor holds what float16 cannot (too large, NaN).
    """
    from safetensors.torch import save

    half = {
        key: (value.half() if value.is_floating_point() else value).cpu().contiguous() for key, value in state.items()
    }
    if lost := [key for key, value in half.items() if not value.isfinite().all()]:
        raise ValueError(f"state: expected values that float16 holds, got others in {', '.join(lost)}")
    write_whole(file, save(half, {ENTRY: json.dumps(metadata), "format": "pt"}))


def write_whole(file: str | Path, content: bytes) -> None:
    """Give a file new content so that, killed or unplugged at any moment, it holds the old or the new, never a part."""
    file = Path(file)
    temporary = file.with_name(file.name + ".tmp")  # same folder: a rename is atomic only within one file system
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())  # the bytes must be on disk before the name points to them
    os.replace(temporary, file)
    if os.name == "posix":  # the new name itself lives in the folder; Windows cannot open one
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
