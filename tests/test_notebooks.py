"""The committed notebooks are their sources, executed without a complaint, and light. nbmake runs them besides.

Lessons are taught from, and short. Audits, in their own folder, are for looking things up.
"""

import ast
import importlib.util
import re
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode

from dynattn import papers

FOLDER = Path(__file__).parents[1] / "notebooks"
AUDITS = sorted(f"audit/{source.stem}" for source in (FOLDER / "audit").glob("[0-9]*.py"))
LESSONS = sorted(name for source in FOLDER.glob("[0-9]*.py") if f"audit/{(name := source.stem)}" in AUDITS)
NAMES = sorted(source.stem for source in FOLDER.glob("[0-9]*.py")) + AUDITS
LARGEST = {name: 1_500_000 for name in NAMES} | {"00_tour": 3_000_000}  # bytes
ABSOLUTE = re.compile(r"(?<![\w.~/-])/(?:home|root|tmp|work|Users|opt|mnt|private|workspace)/|\b[A-Z]:\\\\?\w")

CELLS = 30  # of a lesson
HEADS = [tomllib.loads(file.read_text()) for file in papers.FOLDER.glob("*.toml")]
NUMBERS = {head["tag"]: range(head.get("first", 1), head["equations"] + 1) for head in HEADS}
TAGS = {  # of a lesson, which several papers may have
    lesson: [head["tag"] for head in HEADS if head.get("lesson") == lesson]
    for lesson in {head["lesson"] for head in HEADS if "lesson" in head}
}

# What may hold digits in prose: code, formulas, links, equation tags, and the numbers of things in the paper.
NUMBERED = r"(?:[Tt]ables?|[Ff]orms?|[Ff]igures?|[Ee]quations?|[Ss]tages?|[Ss]ections?|CVPR)\s\d+[a-z]?"
NO_PROSE = [
    r"```.*?```",
    r"`[^`]*`",
    r"\$\$.*?\$\$",
    r"\$[^$]*\$",
    r"\]\([^)]*\)",
    r"\[(?:audit/)?\d\d_\w+",
    r"\b[A-Z]{2,}-\d+\b",
    NUMBERED + r"(?:(?:, | and | to )\d+)*",
    r"(?m:^#+ \d+\.)",  # the number of a section
    r"\d+ minutes",  # that a lesson takes
    r"\b0\b",  # where counting starts
    r"\((?:[A-Z]+, )+\d\)",  # a shape
]


@cache
def build() -> ModuleType:
    """The script that makes the notebooks."""
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def notebook(name: str) -> NotebookNode:
    """A notebook as it is committed."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(name: str) -> list[NotebookNode]:
    return [output for cell in notebook(name).cells if cell.cell_type == "code" for output in cell.outputs]


def texts(name: str) -> list[str]:
    """Everything in a notebook that is text: sources and outputs, without the pictures."""
    found = [cell.source for cell in notebook(name).cells]
    for output in outputs(name):
        found.append(output.get("text", ""))
        found += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def numbers_in(prose: str) -> list[str]:
    """The numbers of a Markdown cell that no cell computed."""
    for pattern in NO_PROSE:
        prose = re.sub(pattern, "", prose, flags=re.DOTALL)
    return re.findall(r"\S*\d\S*", prose)


def test_there_are_notebooks():
    assert {"00_tour", "01_dat", "audit/01_dat", "audit/04_dgt"} <= set(NAMES)
    assert sorted(NAMES) == build().NAMES
    assert sorted(NAMES) == sorted(
        str(file.relative_to(FOLDER).with_suffix(""))
        for file in FOLDER.rglob("[0-9]*.ipynb")
        if file.parent.name != ".ipynb_checkpoints"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source(name):
    """To put it right: python notebooks/build.py."""
    source = build().read(FOLDER / f"{name}.py")
    kept = [(cell.id, cell.cell_type, cell.source) for cell in notebook(name).cells]
    assert kept == [(cell.id, cell.cell_type, cell.source) for cell in source.cells]


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_ran_in_order(name):
    cells = [cell for cell in notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_pictures_and_text_and_nothing_else(name):
    kinds = {kind for output in outputs(name) for kind in output.get("data", {})}
    assert {"image/png", "image/jpeg"} & kinds
    assert "text/markdown" in kinds
    for output in outputs(name):
        assert output.output_type in ("display_data", "execute_result", "stream"), output
        assert output.get("name", "stdout") == "stdout", output.text


@pytest.mark.parametrize("name", NAMES)
def test_metadata_tells_no_time_and_no_machine(name):
    metadata = notebook(name).metadata
    assert set(metadata) == {"kernelspec", "language_info"}
    assert metadata.kernelspec.name == "python3"
    assert metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook(name).cells)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_light(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST[name]


@pytest.mark.parametrize("name", NAMES)
def test_no_absolute_paths(name):
    for text in texts(name):
        assert not ABSOLUTE.search(text), text


@pytest.mark.parametrize("name", NAMES)
def test_no_number_in_prose_is_typed(name):
    prose = [cell.source for cell in notebook(name).cells if cell.cell_type == "markdown"]
    assert [numbers_in(text) for text in prose] == [[] for _ in prose]


def test_typed_numbers_are_found():
    assert numbers_in("it takes 3 s and 4.59 G, in Table 6 and stages 3 and 4") == ["3", "4.59"]
    assert numbers_in("DAT-1 to DAT-11, `s = 2`, $s = 2$, [01_dat](01_dat.ipynb), figures 4 to 7 of CVPR 2022") == []


def test_absolute_paths_are_found():
    assert ABSOLUTE.search("in /home/me/dynattn") and ABSOLUTE.search("'/tmp/x'") and ABSOLUTE.search("C:\\Users")
    assert not ABSOLUTE.search("notebooks/home/x, mechanisms/window.py, 1/2, ../figures/work/")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    """Of the prose, and of what cells put out, as pictures of the gallery."""
    here = (FOLDER / name).parent
    prose = [cell.source for cell in notebook(name).cells if cell.cell_type == "markdown"]
    prose += [output.data["text/markdown"] for output in outputs(name) if "text/markdown" in output.get("data", {})]
    for text in prose:
        for target in re.findall(r"\]\(([^)#\s]+\.\w+)\)", text):
            assert (here / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_the_text_exist(name):
    """`mechanisms/window.py`, with or without the package's name in front."""
    root = FOLDER.parent
    for cell in notebook(name).cells:
        if cell.cell_type == "markdown":
            for path in re.findall(r"`([\w./]+/?\w+\.py)`", cell.source):
                assert (root / path).exists() or (root / "dynattn" / path).exists(), path


# ------------------------------------------------------------------------------------------------ lessons and audits


def code_cells(name: str) -> list[NotebookNode]:
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


def lines_of(text: str) -> int:
    """Lines that are not empty."""
    return sum(bool(line.strip()) for line in text.splitlines())


def visible_lines(name: str) -> int:
    """Code that a reader of a notebook sees: in its cells, and of the library where a cell shows it."""
    shown = [output.data.get("text/markdown", "") for output in outputs(name) if "data" in output]
    of_library = re.findall(r"```python\n(.*?)```", "\n".join(shown), flags=re.DOTALL)
    return sum(map(lines_of, [cell.source for cell in code_cells(name)] + of_library))


def words(name: str) -> int:
    """Words of the prose; an equation is one word, an empty line of a table none."""
    prose = "\n".join(cell.source for cell in notebook(name).cells if cell.cell_type == "markdown")
    prose = re.sub(r"```.*?```", "", prose, flags=re.DOTALL)
    prose = re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "x", prose, flags=re.DOTALL)
    return len(re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", re.sub(r"<[^>]*>|\]\([^)]*\)", " ", prose)))


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_taught_in_fifty_minutes(name):
    """tests/test_browser.py counts its screens."""
    sizes = {"cells": len(notebook(name).cells), "lines of code": visible_lines(name), "words": words(name)}
    limits = {"cells": CELLS, "lines of code": 180, "words": 1600}
    assert {what: (size, limits[what]) for what, size in sizes.items() if size > limits[what]} == {}


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_begins_with_three_lines_and_draws_elsewhere(name):
    first, *others = code_cells(name)
    assert lines_of(first.source) == 3
    assert not any(re.search(r"matplotlib|pyplot|\bplt\b", cell.source) for cell in (first, *others))


@pytest.mark.parametrize("name", AUDITS)
def test_no_cell_of_an_audit_is_long(name):
    assert [cell.source for cell in notebook(name).cells if len(cell.source.splitlines()) > 30] == []


GLOBALS = r"mock\.patch|rcParams|os\.environ|set_num_threads|^(?:import )?\w+(?:\.\w+)* = \w+\.\w+ = "


@pytest.mark.parametrize("name", LESSONS + AUDITS)
def test_a_notebook_sets_no_global_of_others(name):
    """Neither a switch of a library, nor a name of a module that it imports."""
    for cell in code_cells(name):
        assert not re.search(GLOBALS, cell.source, flags=re.MULTILINE), cell.source
        assert [target for target in assigned(cell.source) if target in imported_names(name)] == []


def assigned(code: str) -> list[str]:
    """The names in front of the dot where code assigns an attribute: `core` in `core.x = 1`."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    return [node.value.id for node in nodes if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)]


def imported_names(name: str) -> set[str]:
    """What a notebook calls the things that it imports."""
    code = "\n".join(cell.source for cell in code_cells(name))
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}


def test_globals_are_found():
    assert assigned("core.x = 1\ny = 2\nz.w += 3") == ["core", "z"]
    assert re.search(GLOBALS, "plt.rcParams['x'] = 1") and re.search(GLOBALS, "with mock.patch.object(core, 'x', y):")


@pytest.mark.parametrize("name", AUDITS)
def test_every_equation_stands_in_lesson_or_audit_and_in_none_twice(name):
    own_tags = TAGS.get(name.removeprefix("audit/"), [])
    own = [stem for stem in (name, name.removeprefix("audit/")) if stem in NAMES]
    prose = {stem: "\n".join(cell.source for cell in notebook(stem).cells) for stem in own}
    tags = {stem: re.findall(r"\\tag\{([A-Z]+-\d+)\}", text) for stem, text in prose.items()}
    assert all(len(found) == len(set(found)) for found in tags.values())
    assert set().union(*tags.values()) == {f"{tag}-{i}" for tag in own_tags for i in NUMBERS[tag]}
