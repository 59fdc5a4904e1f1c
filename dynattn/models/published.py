"""What the published code calls the entries of our models: how a model says it, and how a checkpoint is recognised.

A model with published weights answers `published_entries()`, an `Entry` for each name in its `state_dict()`. Its file
registers how to tell which of its models a checkpoint is of. `dynattn.official` does the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

IDENTIFIERS: dict[str, Callable[[dict[str, Tensor]], tuple[str, dict]]] = {}
DESCRIPTIONS: dict[str, Callable[[dict[str, Tensor]], str]] = {}


@dataclass(frozen=True)
class Entry:
    """What the published code calls one of our entries, and how its tensor becomes ours."""

    name: str
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


def register_published(
    mark: str,
    identify: Callable[[dict[str, Tensor]], tuple[str, dict]],
    describe: Callable[[dict[str, Tensor]], str] | None = None,
) -> None:
    """Make published checkpoints known.

    mark: an entry that only the checkpoints of this paper have. identify: takes the entries, returns the name and the
    arguments for `create_model` that fit; it raises ValueError where none of its models does. describe: a sentence that
    says what the entries are of, for the message where they do not fit a model.
    """
    IDENTIFIERS[mark] = identify
    if describe is not None:
        DESCRIPTIONS[mark] = describe
