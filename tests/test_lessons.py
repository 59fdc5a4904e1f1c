"""What readers turn: controls and pictures of the lessons, without a browser (test_browser.py has one)."""

import base64
import io
from itertools import product

import pytest
from matplotlib.figure import Figure
from PIL import Image

pytest.importorskip("anywidget", reason="needs the extra notebooks")

from dynattn import lessons  # noqa: E402
from dynattn.lessons import Pointer, choice, slider, turn  # noqa: E402
from dynattn.lessons import dat as lesson  # noqa: E402


def draw(s: float = 1, kind: str = "a", place: tuple[float, float] = (0, 0)):
    """A picture of a point."""
    figure = Figure(figsize=(4, 3))
    ax = figure.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, 40), ylim=(30, 0))
    ax.plot(place[1], place[0], "o", markersize=10 * s)
    return figure, f"{kind}: <b>{s}</b> at {place}"


def test_a_control_that_moves_draws_again():
    shown = turn(draw, s=slider(0, 4, 1), kind=choice("a", "b"))
    before = shown.picture.png
    shown.widgets["s"].value = 3
    assert shown.values["s"] == 3 and shown.picture.png != before and shown.words.startswith("a: <b>3")
    shown.set(kind="b")
    assert shown.widgets["kind"].value == "b" and shown.line.value.startswith("b: ")
    assert shown.picture.drawn == 3


def test_a_place_is_pointed_at():
    """A click maps into the first axes; arrow keys step; nothing leaves the allowed places."""
    shown = turn(draw, place=Pointer((10, 20), last=(30, 40), step=2))
    shown.picture.at = [0.25, 0.5]
    assert shown.values["place"] == pytest.approx((15, 10))
    shown.picture.step = [1, 0, 1]
    shown.picture.step = [0, -1, 2]
    assert shown.values["place"] == pytest.approx((13, 12))
    shown.picture.at = [2, -1]
    assert shown.values["place"] == pytest.approx((0, 40))
    shown.set(place=(99, 5))
    assert shown.values["place"] == pytest.approx((30, 5))


def test_a_saved_notebook_has_a_picture_and_the_words():
    shown = turn(draw, s=slider(0, 4, 1))
    found = shown._repr_mimebundle_()
    data = found[0] if isinstance(found, tuple) else found
    still = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert still.height > Image.open(io.BytesIO(shown.picture.png)).height  # the words stand below
    assert "s = 1" in data["text/plain"] and "application/vnd.jupyter.widget-view+json" in data


def test_two_pointers_are_refused():
    with pytest.raises(ValueError, match="controls: expected one Pointer at most, got a, b"):
        turn(draw, a=Pointer((0, 0)), b=Pointer((0, 0)))


def test_sliders_are_whole_where_their_numbers_are():
    assert type(slider(0, 4, 1)).__name__ == "IntSlider" and type(slider(0, 4, 1, 0.5)).__name__ == "FloatSlider"


# -------------------------------------------------------------------------------------------------------------- DAT


@pytest.mark.parametrize("point", list(product((-1.2, 0.0, 1.5, 5.2), repeat=2)))
def test_sampling_reads_what_the_loops_read(point):
    """DAT-8: the sentence says the value of the loops; outside the map there are zeros."""
    import torch

    from dynattn import core

    _, words = lesson.draw_sampling(point)
    row, col = torch.tensor(point).double()
    assert words.endswith(f"<b>{float(core.read_bilinear(lesson.MAP, row, col)):.2f}</b>")


def test_every_corner_of_the_offsets_draws():
    """DAT-7: all layers, both ends of the range, all strides."""
    for (_, layer), s, r in product(lesson.layers(), (0.0, 8.0), (1, 4)):
        figure, words = lesson.draw_offsets(layer, lesson.IMAGES[0], s, r)
        assert figure.axes and (s or "Mean move on this image: 0.0 pixels" in words)


def test_every_corner_of_attention_and_cost_draws():
    """DAT-9, DAT-10."""
    for (_, layer), head in product(lesson.layers(), (0, 7)):
        figure, words = lesson.draw_attention((127.0, 0.0), head, layer)
        assert len(figure.axes) == 3 and "the heaviest gets" in words
    for channels, kernel in product((96, 768), (3, 9)):
        assert "times what windows cost" in lesson.draw_cost(channels, kernel)[1]


def test_the_judge_prints_instead_of_raising(capsys):
    from dynattn import ops

    lessons.judge("sample_points", ops.sample_points)
    lessons.judge("sample_points", lambda x, points: None)
    lessons.judge("sample_points", lambda x, points: ops.sample_points(x, points.flip(-1)))
    right, unfinished, wrong = capsys.readouterr().out.split("sample_points: ")[1:]
    assert right.startswith("right") and unfinished.startswith("not finished yet")
    assert "rows and columns swapped" in wrong
