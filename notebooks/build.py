"""Make the notebooks from their sources: `python notebooks/build.py [NAME ...]`, all of them without a name.

A lesson's name is that of its file, as 01_dat; an audit's stands in its folder, as audit/01_dat.

The percent script is what one reads and edits; the notebook beside it is the same with what its cells put out. Two
runs give the same file, but for what a cell measures by the clock: cells are numbered, and neither the times they ran
at nor the names of widgets in a kernel that is gone are recorded.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NAMES = sorted(str(source.relative_to(FOLDER).with_suffix("")) for source in FOLDER.rglob("[0-9]*.py"))
TIMEOUT = 120  # seconds for a cell
WIDGET = "application/vnd.jupyter.widget-view+json"


def read(source: Path) -> NotebookNode:
    """The notebook of a percent script, without outputs."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def execute(source: Path) -> NotebookNode:
    """The notebook with its outputs. Raises what a cell raises."""
    notebook = read(source)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(source.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(names: Sequence[str]) -> None:
    for name in names or NAMES:
        nbformat.write(execute(FOLDER / f"{name}.py"), FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
