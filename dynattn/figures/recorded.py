"""What was measured of the shipped models when the gallery was drawn: a photograph of one's own needs it only read.

`record("figures/conditions.json")` copies it from the gallery into recorded.json, which is in the wheel.
Each entry holds for one checkpoint file, known by its hash: of another one nothing is recorded.
"""

import hashlib
import json
from pathlib import Path

from dynattn import weights

FILE = Path(__file__).with_name("recorded.json")
NETWORKS = {("dat", 7, "dat_mini"): "dat_mini", ("dat", 7, "Swin"): "swin_mini", ("dgt", 3, "dgt_mini"): "dgt_mini"}


def fingerprint(name: str) -> str:
    """The hash of a shipped checkpoint."""
    return hashlib.sha256(weights.path(name).read_bytes()).hexdigest()


def measured(name: str) -> dict | None:
    """The evaluation of a shipped model on the test images; None where this checkpoint has none."""
    found = json.loads(FILE.read_text(encoding="utf-8")).get(name)
    return found["evaluation"] if found and found["sha256"] == fingerprint(name) else None


def record(conditions: str | Path) -> None:
    """Copy the evaluations of the shipped models from the gallery's conditions.json."""
    entries = {
        (one["paper"], one["figure"]): one["networks"] for one in json.loads(Path(conditions).read_text("utf-8"))
    }
    found = {
        name: {"sha256": fingerprint(name), "evaluation": entries[paper, figure][network]}
        for (paper, figure, network), name in NETWORKS.items()
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
