"""The ledgers of the papers: their arguments and tests exist, and the audits show every row."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from dynattn import models, papers
from dynattn.models import registry

ROOT = Path(__file__).parents[1]
MODEL = {
    "dat": "dat_tiny",
    "debiformer": "debiformer_tiny",
    "dgt": "dgt_tiny",
    "sgformer": "sgformer_small",
    "hlg": "hlg_small",
    "setr": "setr_pup_base",
}
WITH_LESSON = [paper for paper in papers.names() if "\nlesson = " in (papers.FOLDER / f"{paper}.toml").read_text()]
ROWS = [(paper, row) for paper in papers.names() for row in papers.ledger(paper)]
CALL = re.compile(r"(?P<function>[\w.]+)\((?P<keyword>\w+)\)")


def test_there_is_a_ledger_a_paper():
    assert papers.names() == sorted(MODEL)
    assert len(ROWS) > 30


def test_a_paper_without_a_ledger():
    with pytest.raises(ValueError, match=f"paper: expected one of {', '.join(sorted(papers.names()))}, got 'vit'"):
        papers.ledger("vit")


def keywords(thing) -> set[str]:
    """The keyword arguments of a function or class."""
    return set(inspect.signature(thing).parameters)


def found(function: str):
    """What a dotted name below the package means, e.g. kernels.cuda_forms.gradients."""
    parts = function.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(("dynattn", *parts[:cut])))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(f"{function}: not in dynattn")


@pytest.mark.parametrize(("paper", "row"), ROWS, ids=lambda one: getattr(one, "paper", one))
def test_every_argument_exists(paper, row):
    """A keyword of the paper's models, a keyword of a function of the package, or "always"."""
    build, _ = registry.build_of(MODEL[paper])
    assert row.argument and row.paper and row.code and row.consequence
    for argument in row.argument:
        if call := CALL.fullmatch(argument):
            assert call["keyword"] in keywords(found(call["function"]))
        elif argument != papers.ALWAYS:
            name, _, value = argument.partition("=")
            assert name in keywords(build)
            if value:
                models.create_model(f"{paper}_mini", **{name: ast.literal_eval(value)})


def test_every_test_exists():
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        defined |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert all(row.test for _, row in ROWS)
    assert {test for _, row in ROWS for test in row.test} - defined == set()


@pytest.mark.parametrize("paper", WITH_LESSON)
def test_the_audit_shows_every_row(paper):
    """With a number in the place of every name. An audit of two papers shows two ledgers."""
    lesson = tomllib.loads((papers.FOLDER / f"{paper}.toml").read_text())["lesson"]
    path = ROOT / "notebooks" / "audit" / f"{lesson}.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    shown = [out.data.get("text/markdown", "") for cell in cells for out in cell.get("outputs", []) if "data" in out]
    tables = [text.splitlines()[2:] for text in shown if text.startswith("|  | the paper says | the code does |")]
    rows = papers.ledger(paper)
    (lines,) = (found for found in tables if all(f"`{name}`" in found[0] for name in rows[0].test))
    assert len(lines) == len(rows)
    for number, (line, row) in enumerate(zip(lines, rows, strict=True), 1):
        names = re.findall(r"(?<!\{)\{(\w+)\}(?!\})", row.paper + row.code + row.consequence)
        whole = (row.paper, row.code, row.consequence)
        pattern = [
            re.escape(text.format(**{name: "NUMBER" for name in names})).replace("NUMBER", ".+") for text in whole
        ]
        assert re.match(rf"\| {number} \| " + r" \| ".join(pattern) + r" \| ", line), line
        assert all(f"`{name}`" in line for name in (*row.argument, *row.test))
