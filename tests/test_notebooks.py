"""The committed notebooks are their sources, executed without a complaint, and light. nbmake runs them besides."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(source.stem for source in FOLDER.glob("[0-9]*.py"))
LARGEST = 3_000_000  # bytes
ABSOLUTE = re.compile(r"(?<![\w.~/-])/(?:home|root|tmp|work|Users|opt|mnt|private|workspace)/|\b[A-Z]:\\\\?\w")

# What may hold digits in prose: code, formulas, links, equation tags, and the numbers of things in the paper.
NUMBERED = r"(?:[Tt]ables?|[Ff]orms?|[Ff]igures?|[Ee]quations?|[Ss]tages?|[Ss]ections?|CVPR)\s\d+[a-z]?"
NO_PROSE = [
    r"```.*?```",
    r"`[^`]*`",
    r"\$\$.*?\$\$",
    r"\$[^$]*\$",
    r"\]\([^)]*\)",
    r"\[\d\d_\w+",
    r"\b[A-Z]{2,}-\d+\b",
    NUMBERED + r"(?:(?:, | and | to )\d+)*",
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
    assert {"00_tour", "01_dat"} <= set(NAMES)
    assert NAMES == sorted(file.stem for file in FOLDER.glob("*.ipynb"))


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
        assert output.output_type in ("display_data", "stream"), output
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
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


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
    for cell in notebook(name).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert (FOLDER / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_the_text_exist(name):
    """`mechanisms/window.py`, with or without the package's name in front."""
    root = FOLDER.parent
    for cell in notebook(name).cells:
        if cell.cell_type == "markdown":
            for path in re.findall(r"`([\w./]+/?\w+\.py)`", cell.source):
                assert (root / path).exists() or (root / "dynattn" / path).exists(), path


def test_dat_has_every_equation_once():
    prose = "\n".join(cell.source for cell in notebook("01_dat").cells if cell.cell_type == "markdown")
    tags = [int(number) for number in re.findall(r"\\tag\{DAT-(\d+)\}", prose)]
    assert sorted(tags) == list(range(1, 12))
