"""The lens in a browser: the saved page without a network, JupyterLab and Notebook with their kernel."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynattn import create_model, trace
from dynattn.data import photograph
from dynattn.tracing import Trace
from dynattn.widgets import Lens
from dynattn.widgets.panel import MEAN, Panel

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'dynattn[test]'")

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120_000  # ms
YELLOW = (253, 231, 37)  # the heaviest key
DEFORMABLE, WINDOW, SWIN = "stages.1.blocks.3.attn", "stages.0.blocks.1.attn", "layers.0.blocks.1.attn"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]

# The models of every test, and of the notebook's first cell.
MODELS = """
import torch, dynattn
from dynattn.data import photograph
from timm.models.swin_transformer import SwinTransformer

torch.manual_seed(0)
swin = SwinTransformer(img_size=128, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=8, num_classes=3).eval()
dat = dynattn.create_model("dat_mini", pretrained=True)
image = photograph("chelsea").crop((110, 0, 410, 300)).resize((128, 128))
"""


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    """What the lenses in the browser should show."""
    given = {}
    exec(MODELS, given)
    return {name: trace(given[name], given["image"]) for name in ("dat", "swin")}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    page = browser.new_page(viewport={"width": 1300, "height": 1800})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


@contextmanager
def quiet(page) -> Iterator[None]:
    """A page that must not complain."""
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield
    assert complaints == []


# ------------------------------------------------------------------------------------------------ looking at a lens


class Shown:
    """One panel on the screen."""

    def __init__(self, page, number: int = 0):
        self.page, self.figure = page, page.locator(".lens-panel").nth(number)
        self.stage = self.figure.locator(".lens-stage")

    def read(self) -> dict:
        """What the panel shows, as numbers."""
        return self.figure.evaluate(
            "figure => ({...figure.lens, keys: [...figure.lens.keys], heat: [...figure.lens.heat]})"
        )

    def wait(self, **wanted) -> None:
        """Wait until the panel shows this: row, col, layer, head, fade, or heat (whether there is any)."""
        handle = self.figure.element_handle(timeout=PATIENCE)
        self.page.wait_for_function(
            """([figure, wanted]) => figure.lens && Object.entries(wanted).every(([name, value]) =>
                name === "heat" ? (figure.lens.heat.length > 0) === value : figure.lens[name] === value)""",
            arg=[handle, wanted],
            timeout=PATIENCE,
        )

    def at(self, row: float, col: float, shape=(128, 128)) -> tuple[float, float]:
        """Where a pixel of the image is on the screen."""
        box = self.stage.bounding_box()
        return box["x"] + (col + 0.5) * box["width"] / shape[1], box["y"] + (row + 0.5) * box["height"] / shape[0]

    def click(self, row: int, col: int) -> None:
        self.stage.scroll_into_view_if_needed()
        self.page.mouse.click(*self.at(row, col))

    def colour(self, row: float, col: float) -> tuple[int, ...]:
        """The colour of the drawing over a pixel of the image."""
        return tuple(
            self.figure.locator("canvas").evaluate(
                """(canvas, [row, col]) => [...canvas.getContext("2d").getImageData(
                    (col + 0.5) * canvas.width / 128, (row + 0.5) * canvas.height / 128, 1, 1).data]""",
                [row, col],
            )
        )

    def status(self) -> str:
        return self.figure.locator(".lens-status").inner_text()


def agrees(shown: dict, traced: Trace, row: float, col: float, layer: str, head: int | str, *, packed: bool) -> None:
    """The panel shows the record's keys: exactly where they are, and their weights up to what a page rounds."""
    reading = Panel("", traced, np.zeros((1, 1, 3), np.uint8)).read(row, col, layer, head)
    record = traced[layer]
    assert (shown["row"], shown["col"], shown["layer"], shown["head"]) == (row, col, layer, head)
    assert shown["cell"] == [int((row + 0.5) // record.stride[0]), int((col + 0.5) // record.stride[1])]
    found = np.array(shown["keys"]).reshape(-1, 3)
    found, right = (keys[np.lexsort(keys[:, :2].T)].astype(float) for keys in (found, reading.keys))
    assert np.array_equal(found[:, :2], right[:, :2])
    if head != MEAN:  # no code of the lens between the record and this
        keys = record.keys(row, col, head)
        assert right[:, 2].sum() == pytest.approx(float(keys.weight.sum())) and len(right) == len(keys.xy)
    most = max(float(record.weights(m).max()) for m in range(record.heads))
    np.testing.assert_allclose(found[:, 2], right[:, 2], rtol=1e-5, atol=most / 509 if packed else 0)


def rollout_agrees(shown: dict, traced: Trace, row: float, col: float) -> None:
    """The panel has the trace's rollout, over cells of 4 x 4 pixels."""
    right = 16 * traced.rollout(row, col)[::4, ::4].flatten().numpy()
    np.testing.assert_allclose(shown["heat"], right, rtol=1e-4, atol=right.max() / 509)


def use(page, traces: list[Trace], layers: list[str], *, packed: bool) -> None:
    """Everything a user does with two panels side by side, the first with layer `DEFORMABLE` at first."""
    first, second = Shown(page, 0), Shown(page, 1)

    def both(row, col, layers, heads):
        for panel, traced, layer, head in zip((first, second), traces, layers, heads, strict=True):
            panel.wait(row=row, col=col, layer=layer, head=head)
            agrees(panel.read(), traced, row, col, layer, head, packed=packed)

    first.wait(layer=layers[0])
    before = first.figure.locator("canvas").screenshot()
    first.click(44, 51)
    both(44, 51, layers, [MEAN, MEAN])
    assert first.figure.locator("canvas").screenshot() != before
    second.click(100, 20)
    both(100, 20, layers, [MEAN, MEAN])

    # Keyboard: cells of 8 pixels in the panel that has the focus, heads, layers.
    first.stage.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    both(92, 36, layers, [MEAN, MEAN])
    page.keyboard.press(".")
    page.keyboard.press(".")
    both(92, 36, layers, [1, MEAN])
    names = traces[0].layers
    page.keyboard.press("PageDown")
    both(92, 36, [names[names.index(layers[0]) + 1], layers[1]], [1, MEAN])
    page.keyboard.press("[")
    page.keyboard.press(",")
    both(92, 36, layers, [0, MEAN])
    assert first.stage.evaluate(
        "stage => stage === document.activeElement || stage === stage.getRootNode().activeElement"
    )

    # The drawing: the heaviest key is yellow where it lies; hovering over it tells its weight.
    keys = np.array(first.read()["keys"]).reshape(-1, 3)
    x, y, weight = keys[keys[:, 2].argmax()]
    assert first.colour(y, x)[:3] == pytest.approx(YELLOW, abs=2)
    page.mouse.move(*first.at(y, x))
    tip = first.figure.locator(".lens-tip")
    tip.wait_for(state="visible")
    assert tip.inner_text().startswith(f"weight {weight:.3g} at (row ")
    assert f"{len(keys)} points, heaviest {weight:.3g} at (row " in first.status()
    assert first.status().startswith("Query (row 92, col 36), cell (row 11, col 4) of stage 2, block 4, deformable, ")
    page.mouse.move(1, 1)
    tip.wait_for(state="hidden")

    # Choices by mouse, in the second panel.
    second.figure.locator("select.lens-layer").select_option(traces[1].layers[0])
    second.figure.locator("select.lens-head").select_option("1")
    both(92, 36, [layers[0], traces[1].layers[0]], [0, 1])

    # The slider: keys, then both, then the rollout alone.
    fade = page.locator("input[type=range]")
    fade.focus()
    page.keyboard.press("ArrowRight")
    first.wait(fade=0.01, heat=True)
    fade.fill("1")
    for panel, traced in ((first, traces[0]), (second, traces[1])):
        panel.wait(fade=1, heat=True)
        rollout_agrees(panel.read(), traced, 92, 36)
    heat = np.array(first.read()["heat"])
    i, j = divmod(int(heat.argmax()), 32)
    colour = first.colour(4 * i + 1.5, 4 * j + 1.5)
    assert colour[:3] == pytest.approx(YELLOW, abs=2)
    assert "Rollout of cell (row 5, col 2) of the last layer: heaviest" in first.status()
    page.mouse.move(*first.at(4 * i + 1.5, 4 * j + 1.5))
    tip.wait_for(state="visible")
    assert tip.inner_text() == f"rollout {heat.max():.3g}"
    fade.fill("0")
    both(92, 36, [layers[0], traces[1].layers[0]], [0, 1])


# ---------------------------------------------------------------------------------------------------- the saved page


def test_saved_page_answers_without_kernel_and_network(browser, page, traces, tmp_path):
    lens = Lens(list(traces.values()))
    lens.save(tmp_path / "lens.html")
    page.context.set_offline(True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    with quiet(page):
        page.goto((tmp_path / "lens.html").as_uri())
        use(page, [traces["dat"], traces["swin"]], list(lens.layer), packed=True)
    assert {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}


def test_page_and_python_say_the_same(page, traces, tmp_path):
    lens = Lens(traces["dat"], row=40, col=61, layer=DEFORMABLE, head=2, fade=0.5)
    lens.save(tmp_path / "lens.html")
    page.goto((tmp_path / "lens.html").as_uri())
    panel = Shown(page)
    panel.wait(row=40, fade=0.5)
    assert "Trace: " + panel.status() == repr(lens)


def test_a_click_shows_where_a_region_is_routed(page, tmp_path):
    """The outlines that the page draws are those of the records, after a click too."""
    torch.manual_seed(0)
    names, layer = ("biformer_mini", "debiformer_mini"), "stages.0.blocks.1.attn"
    traced = {name: trace(create_model(name, regions=5), torch.randn(3, 128, 96)) for name in names}
    lens = Lens(traced, layer=layer)
    lens.save(tmp_path / "lens.html", layers=layer)
    page.goto((tmp_path / "lens.html").as_uri())
    for number, readers in enumerate(("queries", "agents")):
        panel = Shown(page, number)
        row, col = 90 - 60 * number, 20
        page.mouse.click(*panel.at(row, col, shape=(128, 96)))
        panel.wait(row=row, col=col)
        found, routes = panel.read()["regions"], traced[names[number]][layer].region_routes()
        assert found["own"] == pytest.approx(routes.own(row, col))
        assert found["read"] == [pytest.approx(box) for box in routes.read(row, col)]
        assert f"that the {readers} of the dashed region read" in panel.figure.locator(".lens-meaning").inner_text()


def test_a_click_shows_the_tokens_that_cells_became(page, tmp_path):
    """Page and Python name the same tokens, in a head and in the mean of all; a token under the mouse says its size."""
    traced = trace(create_model("sgformer_mini", pretrained=True), photograph("chelsea"))
    layer, hybrid = "stages.0.blocks.1.attn", "stages.0.blocks.0.attn"
    lens = Lens([traced, traced], layer=[layer, hybrid], head=["mean", 0])
    lens.save(tmp_path / "lens.html", layers="stages.0.*")
    page.goto((tmp_path / "lens.html").as_uri())
    first = Shown(page)
    page.mouse.click(*first.at(80, 44))
    first.wait(row=80, col=44)
    lens.row, lens.col = 80, 44
    for number, name in enumerate(lens.layer):
        panel = Shown(page, number)
        assert f"{lens._panels[number].name}: {panel.status()}" == repr(lens).split("\n")[number]
        tokens = lens._panels[number].read(80, 44, name, lens.head[number]).tokens
        assert [one["number"] for one in panel.read()["tokens"]][:5] == tokens.number[:5].tolist()
        assert "Many cells became one token" in panel.figure.locator(".lens-meaning").inner_text()
        at = list(tokens.number).index(tokens.merged[0])  # the token of the first cell
        page.mouse.move(*panel.at(1, 1))
        tip = panel.figure.locator(".lens-tip")
        tip.wait_for(state="visible")
        said, _, size = tip.inner_text().removeprefix("weight ").partition(", ")
        assert size == f"a token of {tokens.size[at]} cells"
        assert float(said) == pytest.approx(tokens.weight[at], rel=5e-3, abs=1e-5 * tokens.weight[0])


def test_a_click_shows_cells_and_windows(page, tmp_path):
    """Page and Python name the same cells and windows; a window under the mouse says its size, a cell its weight."""
    torch.manual_seed(0)
    traced = trace(create_model("hlg_mini"), torch.randn(3, 128, 128))
    lens = Lens([traced, traced], layer=["stages.0.blocks.0.attn", "stages.0.blocks.1.attn"], head=["mean", 0])
    lens.save(tmp_path / "lens.html", layers="stages.0.*")
    page.goto((tmp_path / "lens.html").as_uri())
    first = Shown(page)
    page.mouse.click(*first.at(80, 44))
    first.wait(row=80, col=44)
    lens.row, lens.col = 80, 44
    for number, name in enumerate(lens.layer):
        panel, record = Shown(page, number), traced[name]
        reading = lens._panels[number].read(80, 44, name, lens.head[number])
        found = panel.read()
        assert len(found["keys"]) == 3 * len(reading.keys) == 3 * 64
        by_number = {one["number"]: one["weight"] for one in found["tokens"]}
        assert [by_number[n] for n in range(16)] == pytest.approx(reading.by_number.tolist(), rel=1e-4)
        assert f"{len(reading.keys)} cells" in panel.status() and "; then 16 tokens, 0.0625 each" in panel.status()
        assert "every window is also one token" in panel.figure.locator(".lens-meaning").inner_text()
        x, y, _ = reading.keys[0]
        page.mouse.move(*panel.at(float(y), float(x)))
        tip = panel.figure.locator(".lens-tip")
        tip.wait_for(state="visible")
        assert f"at (row {y:g}, col {x:g})" in tip.inner_text() and "a token of 64 cells" in tip.inner_text()
        assert panel.colour(float(y), float(x))[3] == 255  # a small square covers what is below it
        other = record.cells()[(record.window != record.window[record.query(80, 44)]).nonzero()[0, 0]].tolist()
        page.mouse.move(*panel.at(*other[::-1]))
        assert "row" not in tip.inner_text() and "a token of 64 cells" in tip.inner_text()


def test_images_of_other_sizes_follow_one_click(page, tmp_path):
    """A wide photograph, seen whole by one model and as a square by another."""
    torch.manual_seed(0)
    wide = create_model("dat_mini", pretrained=True)
    picture = photograph("chelsea").crop((0, 0, 448, 300))
    seen = [trace(wide, picture.resize((192, 128), Image.Resampling.BICUBIC)), trace(wide, picture)]
    tensor = torch.nn.functional.interpolate(seen[1].image[None], (96, 160))
    seen[0] = trace(wide, tensor)
    lens = Lens({"wide": seen[0], "square": seen[1]}, picture, layer=DEFORMABLE, head=0)
    lens.save(tmp_path / "lens.html", layers=DEFORMABLE)
    page.goto((tmp_path / "lens.html").as_uri())
    first, second = Shown(page, 0), Shown(page, 1)
    first.wait(head=0)
    page.mouse.click(*first.at(95, 159, (96, 160)))
    first.wait(row=95, col=159)
    agrees(first.read(), seen[0], 95, 159, DEFORMABLE, 0, packed=True)
    shown = second.read()
    assert shown["cell"] == [15, 15]
    right = seen[1][DEFORMABLE].keys(127, 127, 0)
    np.testing.assert_array_equal(np.sort(np.array(shown["keys"])[::3]), np.sort(right.xy[:, 0].numpy()))
    for key in ("ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    first.wait(row=95, col=159)  # there is no cell beyond


# ------------------------------------------------------------------------------------------------------- with a kernel


def notebook() -> dict:
    """A lens on two models, and a cell that moves it."""
    cells = [
        MODELS + "from dynattn.widgets import Lens\nlens = Lens([dat, swin], image)\nlens",
        "seen = []\nlens.observe(lambda change: seen.append(change['new']), 'row')",
    ]
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    return {
        "cells": [code | {"id": f"cell-{i}", "source": source.strip()} for i, source in enumerate(cells)],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture
def serve(tmp_path) -> Iterator:
    """Start an application of Jupyter's in a folder of its own: serve(name) gives (address, token)."""
    started = []

    def start(application: str, trait: str) -> tuple[str, str]:
        pytest.importorskip(application, reason=f"needs {application}: pip install 'dynattn[notebooks]'")
        work = tmp_path / "work"
        work.mkdir()
        (work / "lens.ipynb").write_text(json.dumps(notebook()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        token = secrets.token_hex(16)
        own = {name: str(tmp_path / name.lower()) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
        own |= {name: str(tmp_path / name.lower()) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
        options = [f"--port={port}", "--ServerApp.port_retries=0", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
        options += [f"--IdentityProvider.token={token}", f"--{trait}.expose_app_in_browser=True"]
        environment = os.environ | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        log = open(tmp_path / "server.log", "w")
        command = [sys.executable, "-m", application, *options]
        server = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log)
        started.append((server, log))
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                return address, token
            except OSError:
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(1)
        raise TimeoutError((tmp_path / "server.log").read_text())

    yield start
    for server, log in started:
        server.terminate()  # which ends its kernels
        server.wait(60)
        log.close()


def wait_for_kernel(page) -> None:
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 0")
    page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'")


def run_cell(page, source: str) -> None:
    """Write into the notebook's last cell and run it."""
    page.evaluate(
        """async source => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = notebook.widgets.length - 1;
            notebook.activeCell.model.sharedModel.setSource(source);
            await window.jupyterapp.commands.execute("notebook:run-cell");
        }""",
        source,
    )


@pytest.mark.parametrize(
    "application, trait, folder",
    [("jupyterlab", "LabApp", "lab/tree"), ("notebook", "JupyterNotebookApp", "notebooks")],
)
def test_lens_in_a_notebook(serve, page, traces, application, trait, folder):
    """Run all cells, use the lens, then move it from Python: the screen follows, and Python saw the clicks."""
    address, token = serve(application, trait)
    page.goto(f"{address}/{folder}/lens.ipynb?token={token}")
    wait_for_kernel(page)
    with quiet(page):
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.locator(".dynattn-lens").wait_for()
        use(page, [traces["dat"], traces["swin"]], [DEFORMABLE, traces["swin"].layers[2]], packed=False)
        run_cell(page, f"print('seen', seen[-1]); lens.row, lens.col = 8, 120; lens.layer = lens.layer[0], '{SWIN}'")
        page.locator(".jp-OutputArea-output", has_text="seen 92.0").wait_for()
        for number, (name, layer) in enumerate((("dat", DEFORMABLE), ("swin", SWIN))):
            panel, head = Shown(page, number), (0, 1)[number]
            panel.wait(row=8, col=120, layer=layer, head=head)
            agrees(panel.read(), traces[name], 8, 120, layer, head, packed=False)


# ------------------------------------------------------------------------------------------- the length of a lesson

SCREENS, SCREEN = 18, (1366, 768)
NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(file.stem for file in NOTEBOOKS.glob("[0-9]*.py") if (NOTEBOOKS / "audit" / file.name).exists())


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_has_few_screens(browser, tmp_path, name):
    """As it is saved, with its pictures, and folded answers folded; MathJax is not needed to measure."""
    nbconvert = pytest.importorskip("nbconvert", reason="needs nbconvert: pip install 'dynattn[notebooks]'")
    saved = tmp_path / "lesson.html"
    saved.write_text(nbconvert.HTMLExporter(template_name="lab").from_filename(str(NOTEBOOKS / f"{name}.ipynb"))[0])
    page = browser.new_page(viewport=dict(zip(("width", "height"), SCREEN, strict=True)))
    page.route("http*://**", lambda route: route.abort())  # scripts of others; the page itself is a file
    page.goto(saved.as_uri(), wait_until="load", timeout=PATIENCE)
    height = page.evaluate("document.documentElement.scrollHeight")
    page.close()
    assert 3 < height / SCREEN[1] <= SCREENS
