"""What a run leaves in its folder: `checkpoint.pt` to go on from, and `log.csv` to read.

A run can be killed at any moment. `write_whole` puts a whole new file in place of the old one, so that a checkpoint
always loads. It carries the rows of the log too, so that both are of the same step, and a resumed run writes the log
again from it.
"""

import io
from pathlib import Path
from typing import Any

import torch

from ..weights import write_whole
from .recipes import completed

COLUMNS = ("step", "seconds", "lr", "loss", "accuracy", "test_loss", "test_accuracy")  # and what a task adds to them


def save(out: Path, content: dict[str, Any]) -> None:
    """Put a checkpoint into the folder of the run, in place of the last one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(out / "checkpoint.pt", buffer.getvalue())


def load(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of a run with these settings, None where the folder has none.

    Raises: ValueError where the checkpoint is damaged, or of a run with other settings; it says which.
    """
    file = out / "checkpoint.pt"
    if not file.exists():
        return None
    advice = "pass another --out, or --fresh to start over"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        old = completed(content["settings"])
    except Exception as error:  # torch reports damage by many types; weights_only keeps code from running
        raise ValueError(f"out: {file} is damaged, or no checkpoint of ours; {advice}") from error
    if old != settings:
        different = [
            f"{key}={old.get(key)!r} (now {settings.get(key)!r})"
            for key in sorted(old | settings)
            if old.get(key) != settings.get(key)
        ]
        raise ValueError(f"out: {out} holds another run, with {', '.join(different)}; {advice}")
    return content


def write_log(out: Path, rows: list[dict[str, float]]) -> None:
    """Write the rows of the log; a value that was not measured at a row stays empty."""
    columns = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    lines = [columns] + [[format(row[name], ".7g") if name in row else "" for name in columns] for row in rows]
    write_whole(out / "log.csv", "".join(",".join(line) + "\n" for line in lines).encode())
