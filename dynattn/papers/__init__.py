"""The ledgers of the papers: where a paper's text and its code part, one file a paper that a person edits.

    from dynattn import papers
    for row in papers.ledger("dat"): print(row.paper, "|", row.code, "|", row.argument)

At the head of a file stand `tag`, how its equations are called in code, `equations`, the number of the last one,
`first`, that of the first where it is not 1, and `lesson`, its notebook, once there is one. Below, a file holds one
`[[ledger]]` table for each disagreement. The audit notebooks fill the numbers in and show every row; a test holds that
the arguments and the tests that a row names exist.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ALWAYS = "always"


@dataclass(frozen=True)
class Row:
    """One disagreement.

    paper: what the paper says.  code: what the code does.  consequence: what follows; it may hold {names} of numbers
    that the audit computes.  argument: keywords of the paper's models that choose, "function(keyword)" of the package,
    or "always" where there is one way.  test: the tests that hold it.
    """

    paper: str
    code: str
    consequence: str
    argument: tuple[str, ...]
    test: tuple[str, ...]


def names() -> list[str]:
    """The papers that have a ledger."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def ledger(paper: str) -> tuple[Row, ...]:
    """The rows of a paper's ledger, in the order of its file. Raises ValueError where there is none."""
    if paper not in names():
        raise ValueError(f"paper: expected one of {', '.join(names())}, got {paper!r}")
    rows = tomllib.loads((FOLDER / f"{paper}.toml").read_text())["ledger"]
    return tuple(Row(**row | {key: tuple(row[key]) for key in ("argument", "test")}) for row in rows)
