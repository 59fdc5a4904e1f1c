"""How the lens is laid out and what it says: panels alike, all in view, layers and counts that explain themselves."""

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dynattn import create_model, trace
from dynattn.data import photograph
from dynattn.tracing import Record, Trace
from dynattn.widgets.page import write_page
from dynattn.widgets.panel import Panel, View, count_name, first_view, make_panels, meaning, title
from dynattn.widgets.picture import caption

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120_000  # ms
DEFORMABLE = "stages.1.blocks.3.attn"


@pytest.mark.parametrize(
    "name, kind, said",
    [
        ("stages.1.blocks.3.attn", "window", "stage 2, block 4, window"),
        ("layers.0.blocks.1.block.attn", "dynamic group", "stage 1, block 2, dynamic group"),
        ("blocks.3.block.attn", "dense", "block 4, dense"),
        ("encoder.self_attention", "dense", ""),
    ],
)
def test_layers_are_named_as_a_reader_thinks(name, kind, said):
    assert title(name, kind) == said


def test_a_layer_whose_windows_are_moved_says_so():
    """Swin's second blocks; where one window covers the map nothing is moved."""
    t = trace(create_model("swin_mini", img_size=64, num_classes=10, window_size=4), torch.zeros(3, 64, 64))
    moved = [record.kind_in_words == "shifted window" for record in t]
    windows = [record.window != record.query_shape for record in t]
    assert moved == [several and i % 2 == 1 for i, several in enumerate(windows)] and any(moved)
    assert "stage 1, block 2, shifted window" in make_panels(t)[0].titles.values()


class Dense(Record):
    """A layer of four queries that read themselves."""

    kind, heads, query_shape, image_shape, stride = "dense", 1, (2, 2), (4, 4), (2.0, 2.0)

    def effective_matrix(self, head=0):
        return torch.eye(4)


def test_layers_that_would_have_one_title_keep_their_paths():
    names = ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "mixer"]
    records = {}
    for name in names:
        records[name] = Dense()
        records[name].name = name
    panel = make_panels(Trace(torch.zeros(3, 4, 4), torch.zeros(1), records))[0]
    assert list(panel.titles.values()) == [
        "blocks.0.attn1, dense",
        "blocks.0.attn2, dense",
        "block 2, dense",
        "mixer, dense",
    ]


@pytest.mark.parametrize(
    "found, counts, cells, said",
    [
        (64, [64], False, "64 points"),
        (128, [64] * 4, False, "64 points × 2 groups"),
        (64, [64] * 4, False, "64 points"),
        (16, [16] * 4, True, "16 cells"),
        (151, [64] * 4, True, "151 cells (64 × 4 heads, some shared)"),
        (128, [64] * 2, True, "128 cells (64 × 2 heads)"),
        (90, [64, 30], True, "90 cells of 2 heads"),
    ],
)
def test_counts_explain_themselves(found, counts, cells, said):
    assert count_name(found, counts, cells) == said


@pytest.fixture(scope="module")
def panels() -> list[Panel]:
    """Four panels on one network."""
    image = photograph("chelsea").crop((110, 0, 410, 300))
    return make_panels(dict.fromkeys("abcd", trace(create_model("dat_mini", pretrained=True), image)), image)


def test_a_caption_says_what_marks_mean(panels):
    said = caption(View(panels, **first_view(panels) | {"fade": 0.5}))
    assert meaning(0, "points") in said and meaning(1, "points") in said
    assert "64 points × 2 groups" in said and "stage 2, block 4, deformable" in said


# --------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'dynattn[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def boxes(page, selector: str) -> np.ndarray:
    """x, y, width, height of all that fits a selector."""
    found = page.locator(selector).all()
    return np.array([[one.bounding_box()[key] for key in ("x", "y", "width", "height")] for one in found])


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
def test_four_panels_are_alike_and_in_view(browser, panels, tmp_path):
    """One row at 1366 pixels, two rows of two where they do not fit, one column on a telephone."""
    file = write_page(tmp_path / "lens.html", View(panels, **first_view(panels) | {"fade": 0.5}))
    for (width, height), columns in {(1366, 768): 4, (1000, 768): 4, (800, 768): 2, (390, 844): 1}.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(file.as_uri())
        page.wait_for_function("document.querySelectorAll('.lens-panel')[3]?.lens", timeout=PATIENCE)
        found = boxes(page, ".lens-stage")
        assert len(np.unique(found[:, 0].round())) == columns and len(np.unique(found[:, 1].round())) == 4 // columns
        assert np.ptp(found[:, 2:], axis=0).max() < 1
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1366:
            assert boxes(page, ".lens-help")[0, [1, 3]].sum() <= height
            assert page.locator("select.lens-layer").first.get_attribute("title") == DEFORMABLE
            assert page.locator("select.lens-layer option:checked").first.inner_text() == "stage 2, block 4, deformable"
            assert page.locator(".lens-meaning").first.inner_text() == f"16 × 16 queries. {meaning(0.5, 'points')}"
        page.close()
