"""The rules of the house, held: imports go down only, one mechanism a file, equation tags without orphans."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dynattn"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: each may import its own layer and those below.
LAYERS = [
    ("kernels",),
    ("core", "data", "weights", "checkpoint_files", "plugins"),
    ("tracing",),
    ("mechanisms",),
    ("ops", "models", "adapters", "dense"),
    ("verify", "official", "training", "cost", "figures", "widgets", "bench"),
    ("papers",),
    ("lessons",),
    ("cli", "__main__"),
]
# Every paper says in its file how its equations are called, from which number to which, and its lesson, if any.
PAPERS = [tomllib.loads(path.read_text()) for path in sorted((PACKAGE / "papers").glob("*.toml"))]
TAG = re.compile(rf"\b(?:{'|'.join(paper['tag'] for paper in PAPERS)})-\d+\b")


def parts(path: Path) -> tuple[str, ...]:
    """The names of a file below the package, e.g. ("mechanisms", "window")."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports of the package, wherever in the file, as names below the package."""
    here = ("dynattn", *parts(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(here[: len(here) - node.level]) if node.level else []
            source = above + (node.module or "").split(".") * bool(node.module)
            names = [source + [alias.name] for alias in node.names]
        else:
            continue
        yield from (tuple(name[1:]) for name in names if name[0] == "dynattn" and len(name) > 1)


def level(name: str) -> int:
    """The layer that a module of the package is in."""
    return next(i for i, names in enumerate(LAYERS) if name in names)


def modules() -> set[str]:
    """Every module and package directly below the package."""
    return {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir() if _is_module(path)}


def _is_module(path: Path) -> bool:
    return path.suffix == ".py" and path.stem != "__init__" or (path / "__init__.py").is_file()


# -------------------------------------------------------------------------------------------------------------- layers


def test_every_module_has_a_layer():
    assert modules() <= {name for names in LAYERS for name in names}


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent != PACKAGE or p.stem != "__init__"], ids=lambda p: "/".join(parts(p))
)
def test_imports_go_down_only(path):
    own = parts(path)[0]
    for name in imported(path):
        if name[0] in modules() - {own}:
            assert level(name[0]) <= level(own), f"{own} may not import {name[0]}"


def test_a_mechanism_imports_core_kernels_and_tracing():
    """Never another mechanism, deformable_bilevel excepted: it is the composition of two."""
    for path in (PACKAGE / "mechanisms").glob("*.py"):
        if path.stem != "deformable_bilevel":
            assert {name[0] for name in imported(path)} <= {"core", "kernels", "tracing"}, path.name


def test_tracing_figures_and_widgets_know_no_mechanism():
    for path in FILES:
        if parts(path)[0] in ("tracing", "figures", "widgets"):
            assert "mechanisms" not in {name[0] for name in imported(path)}, path.name


def test_ground_knows_nothing():
    """The kernels import themselves only, core and the data what is on the ground."""
    allowed = {"kernels": {"kernels"}, "core": {"kernels"}, "data": {"data", "core"}}
    for path in FILES:
        if parts(path)[0] in allowed:
            assert {name[0] for name in imported(path)} <= allowed[parts(path)[0]], path.name


def files_of(path: Path) -> set[Path]:
    """The files that a file needs, wherever it imports them, but for those of the packages that it is in itself."""
    found = set()
    for name in imported(path):
        for end in (len(name), len(name) - 1):  # the last may be something in the file
            file = PACKAGE.joinpath(*name[:end]).with_suffix(".py") if end else PACKAGE / "__init__.py"
            file = file if file.is_file() else PACKAGE.joinpath(*name[:end], "__init__.py")
            if file.is_file():
                found.add(file)
                break
    return {file for file in found if file.stem != "__init__" or file.parent not in path.parents}


def circle(needs: dict[Path, set[Path]]) -> list[str]:
    """A circle among files, empty where there is none: what is left when files without needs are taken away."""
    left = dict(needs)
    while free := [file for file, needed in left.items() if not needed & left.keys()]:
        for file in free:
            del left[file]
    return sorted("/".join(file.parts[-2:]) for file in left)


def test_no_file_imports_in_a_circle():
    """Not even within a function, or for types alone."""
    assert not circle({path: files_of(path) for path in FILES})


def test_a_circle_is_found(tmp_path):
    a, b, c = (tmp_path / name for name in ("a.py", "b.py", "c.py"))
    assert circle({a: {b}, b: {c}, c: set()}) == [] and len(circle({a: {b}, b: {c}, c: {b}})) == 3


def test_the_rules_can_fail(tmp_path, monkeypatch):
    """The parser sees every form of import."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "mechanisms").mkdir()
    path = tmp_path / "mechanisms" / "bad.py"
    path.write_text(
        "import dynattn.ops\nfrom dynattn import core, models\nfrom . import window\nfrom ..cost import count\n"
        "from .. import cli\ndef f():\n    from dynattn.verify import check\nimport os\nfrom torch import nn\n"
    )
    found = {name[0] if name[0] != "mechanisms" else name for name in imported(path)}
    assert found == {"ops", "core", "models", ("mechanisms", "window"), "cost", "cli", "verify"}


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", sorted((PACKAGE / "mechanisms").glob("*.py")), ids=lambda p: p.stem)
def test_a_mechanism_is_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_sections_of_a_mechanism_are_in_order():
    """1. Loops, 2. Torch, 3. The operation, 4. The module, 5. The record, where there are banners."""
    titles = ["1. Loops", "2. Torch", "3. The operation", "4. The module", "5. The record"]
    for path in (PACKAGE / "mechanisms").glob("*.py"):
        found = re.findall(r"^# (\d\. .+)$", path.read_text(), flags=re.MULTILINE)
        assert found in ([], titles), path.name


def undocumented(path: Path) -> list[str]:
    """The module, and its public classes, functions and methods, as far as they have no docstring."""
    tree = ast.parse(path.read_text())
    nodes = [tree]
    for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]:
        nodes += [n for n in scope.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name[0] != "_"]
    return [getattr(node, "name", "the module") for node in nodes if tree.body and not ast.get_docstring(node)]


# What a class inherits, with the docstring of its base: a module's forward, a record's answers, a layout's ways.
INHERITED = {"forward", "extra_repr", "weights", "effective_matrix", "value", "output", "exact", "roll", "cut", "join"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(parts(p)))
def test_everything_public_has_a_docstring(path):
    assert [name for name in undocumented(path) if name not in INHERITED] == []


def test_the_list_of_mutations_is_not_old():
    """Every text that `tests/mutations.py` replaces stands once in its file."""
    assert len(MUTATIONS) == 30
    for number, mutation in enumerate(MUTATIONS):
        assert (PACKAGE / mutation.file).read_text().count(mutation.old) == 1, number


@pytest.mark.parametrize("path", FILES, ids=lambda p: "/".join(parts(p)))
def test_nothing_is_left_to_do(path):
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", path.read_text()) == []


def test_ruff():
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "dynattn", "tests"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


# ---------------------------------------------------------------------------------------------------------------- tags


def docstring_tags(path: Path) -> set[str]:
    """Equations that a module's docstring writes out, by the tag at the end of their lines."""
    return set(TAG.findall(ast.get_docstring(ast.parse(path.read_text())) or ""))


def code_tags(path: Path) -> set[str]:
    """Tags in comments that stand behind code on the same line."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#"):
            found |= set(TAG.findall(token.string))
    return found


def all_tags(paths) -> set[str]:
    """Every tag in the text of some files."""
    return {tag for path in paths for tag in TAG.findall(path.read_text())}


TESTS = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path != Path(__file__)]
CODE = set().union(*(code_tags(path) for path in FILES))
EQUATIONS = {
    f"{paper['tag']}-{number}" for paper in PAPERS for number in range(paper.get("first", 1), paper["equations"] + 1)
}
UNWRITTEN = {"DAT-1", "DAT-4", "DAT-5", "DGT-5", "DGT-6", "DGT-7"}  # named in a docstring, written in the notebook
LESSONS = {paper["tag"]: paper["lesson"] for paper in PAPERS if "lesson" in paper}


def test_every_equation_is_on_a_line_of_code():
    assert CODE == EQUATIONS


def test_every_equation_is_in_a_docstring():
    assert all_tags(FILES) == EQUATIONS
    assert set().union(*map(docstring_tags, FILES)) >= EQUATIONS - UNWRITTEN


def test_every_equation_is_in_a_test_and_no_other():
    """A test carries the tags of what it covers in its docstring."""
    covered = set()
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                covered |= set(TAG.findall(ast.get_docstring(node) or ""))
    assert covered == EQUATIONS and all_tags(TESTS) <= CODE


@pytest.mark.parametrize("paper", LESSONS)
@pytest.mark.parametrize("suffix", [".py", ".ipynb"])
def test_every_equation_is_in_its_lesson_or_its_audit_and_no_other(paper, suffix):
    places = [(ROOT / folder / LESSONS[paper]).with_suffix(suffix) for folder in ("notebooks", "notebooks/audit")]
    papers = {tag for tag, lesson in LESSONS.items() if lesson == LESSONS[paper]}
    own = {tag for tag in EQUATIONS if tag.rpartition("-")[0] in papers}
    assert all_tags(place for place in places if place.exists()) == own
