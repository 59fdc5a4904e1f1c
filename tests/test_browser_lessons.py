"""What a lesson lets the reader turn, in JupyterLab in a browser: a control moves, the picture changes."""

import pytest
from test_browser import (  # noqa: F401  (fixtures)
    PATIENCE,
    browser,
    page,
    pytestmark,
    quiet,
    run_cell,
    serve,
    wait_for_kernel,
)


def drawn(tab) -> int:
    """How often Python has drawn the picture."""
    return int(tab.locator("img.dynattn-turned").last.get_attribute("data-drawn"))


def wait_until_drawn(tab, more_than: int) -> None:
    """Wait for a new picture that the browser has decoded."""
    tab.wait_for_function(
        """count => {
            const picture = [...document.querySelectorAll("img.dynattn-turned")].at(-1);
            return Number(picture.dataset.drawn) > count && picture.complete && picture.naturalWidth > 0;
        }""",
        arg=more_than,
        timeout=PATIENCE,
    )


def pixels(tab) -> str:
    """What the picture shows, as the browser has it."""
    return tab.locator("img.dynattn-turned").last.evaluate(
        """picture => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
            canvas.getContext("2d").drawImage(picture, 0, 0);
            return canvas.toDataURL();
        }"""
    )


@pytest.fixture
def lab(serve, page):  # noqa: F811
    """A notebook in JupyterLab whose last cell can be run."""
    address, token = serve("jupyterlab", "LabApp")
    page.goto(f"{address}/lab/tree/lens.ipynb?token={token}")
    wait_for_kernel(page)
    return page


def test_a_slider_moves_and_the_picture_changes(lab):
    with quiet(lab):
        run_cell(lab, "from dynattn.lessons import dat\nshown = dat.offsets()\nshown")
        lab.locator("img.dynattn-turned").wait_for()
        wait_until_drawn(lab, 0)
        before, count = pixels(lab), drawn(lab)
        lab.locator(".noUi-handle").last.press("ArrowRight")
        wait_until_drawn(lab, count)
        assert pixels(lab) != before
        count = drawn(lab)
        lab.get_by_role("button", name="4", exact=True).last.click()  # the stride
        wait_until_drawn(lab, count)
        lab.locator(".jp-OutputArea-output", has_text="4 points in each group").wait_for()


def test_a_place_is_dragged_and_stepped(lab):
    with quiet(lab):
        run_cell(lab, "from dynattn.lessons import dat\nshown = dat.sampling()\nshown")
        lab.locator("img.dynattn-turned").wait_for()
        wait_until_drawn(lab, 0)
        before, count, box = pixels(lab), drawn(lab), lab.locator("img.dynattn-turned").last.bounding_box()
        at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
        lab.mouse.move(*at(0.2, 0.4))
        lab.mouse.down()
        wait_until_drawn(lab, count)
        assert pixels(lab) != before
        count = drawn(lab)
        lab.mouse.move(*at(0.25, 0.5))
        lab.mouse.up()
        wait_until_drawn(lab, count)
        count = drawn(lab)
        lab.keyboard.press("ArrowDown")
        wait_until_drawn(lab, count)
