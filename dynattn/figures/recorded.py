"""What was measured of the shipped models when the gallery was drawn: a photograph of one's own needs it only read.

`record("figures/conditions.json")` copies it from the gallery into recorded.json, which is in the wheel.
Each entry holds for one checkpoint file, known by its hash: of another one nothing is recorded.
"""

import hashlib
import json
from pathlib import Path

import pandas as pd

from dynattn import weights

from .tables import as_json, from_records

FILE = Path(__file__).with_name("recorded.json")


def fingerprint(name: str) -> str:
    """The hash of a shipped checkpoint."""
    return hashlib.sha256(weights.path(name).read_bytes()).hexdigest()


def names() -> list[str]:
    """The models of which something is recorded."""
    return list(json.loads(FILE.read_text(encoding="utf-8")))


def measured(name: str) -> pd.DataFrame | None:
    """The summary of a shipped model on the test images; None where this checkpoint has none."""
    found = json.loads(FILE.read_text(encoding="utf-8")).get(name)
    return from_records(found["summary"]) if found and found["sha256"] == fingerprint(name) else None


def record(conditions: str | Path) -> None:
    """Copy the summaries of the shipped models from the gallery's conditions.json."""
    entries = json.loads(Path(conditions).read_text(encoding="utf-8"))
    found = {name: rows for entry in entries for name, rows in entry["networks"].items() if name in weights.shipped()}
    known = {name: {"sha256": fingerprint(name), "summary": rows} for name, rows in sorted(found.items())}
    FILE.write_text(as_json(known), encoding="utf-8")
