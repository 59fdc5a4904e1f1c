"""The lesson on DGT: its pictures at the corners of their controls, and the code that its page shows."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("anywidget")

from dynattn import verify  # noqa: E402
from dynattn.figures.measures import on_map  # noqa: E402
from dynattn.figures.tables import OTHER, OWN, Row, summary, table_of  # noqa: E402
from dynattn.lessons import dgt as lesson  # noqa: E402
from tests.pages import Page, drawn_again, drawn_at_every_end  # noqa: E402

PAGE = Page("04_dgt")
TURNED = ("grouping", "selection", "attention", "moving", "cost")


@pytest.mark.parametrize("name", TURNED)
def test_a_picture_is_drawn_at_every_end(name):
    drawn_at_every_end(getattr(lesson, name)())


@pytest.mark.parametrize("name", TURNED)
def test_a_control_draws_again(name):
    drawn_again(getattr(lesson, name)())


def test_the_layer_of_the_page_is_the_librarys():
    page = PAGE.run("dynamic_group_layer")
    x = torch.randn(3, 5, 7, 16, dtype=torch.float64)
    assert torch.allclose(page.dynamic_group_layer(x, page.net, M=4, k=10), page.net(x))
    assert (
        10 <= len(next(cell for cell in PAGE.code if "def dynamic_group_layer" in cell).strip().splitlines()[:-4]) <= 15
    )


def test_the_centroids_of_the_page_move_as_the_librarys():
    PAGE.run("moved")


def test_the_solution_is_right():
    verify.check("grouped_attention", PAGE.solution("grouped_attention"), cases=20)


def test_a_longer_query_stays_in_its_group():
    here = lesson.draw_grouping((0.3, 0.4), 5, 3)[1]
    assert here == lesson.draw_grouping((0.6, 0.8), 5, 3)[1]  # only the direction of the cross counts


def test_with_one_length_the_angle_decides():
    k = 9
    assert f"{k} of them are among the nearest {k}." in lesson.draw_selection((-0.6, 0.8), k, "one")[1]
    assert f"{k} of them are among the nearest {k}." not in lesson.draw_selection((-0.6, 0.8), k, "own")[1]


def test_centroids_find_the_heaps_unless_they_are_slow():
    def last(tau: float) -> np.ndarray:
        first, second = lesson.history(3, tau, False)[0][-1].T
        return np.sort(np.arctan2(first, second))

    assert np.allclose(last(0.1), lesson.HEAPS, atol=0.2)
    assert not np.allclose(last(0.0001), lesson.HEAPS, atol=0.2)


def test_as_printed_a_centroid_jumps():
    meant, printed = (lesson.history(3, 0.0001, flag)[0] for flag in (False, True))
    assert np.abs(np.diff(printed, axis=0)).mean() > 100 * np.abs(np.diff(meant, axis=0)).mean()


def test_a_centroid_without_a_query_stays():
    places, sizes = lesson.history(8, 0.1, False)
    idle = sizes == 0
    assert idle.any() and np.array_equal(places[1:][idle], places[:-1][idle])
    assert not np.isclose(places[1:], places[:-1]).all(axis=-1)[~idle].any()


def test_what_the_page_says_of_its_first_picture():
    """Nearly all of the background is one group, and the bird is in others."""
    record = lesson.traced(lesson.IMAGES[0])[lesson.layers()[0][1]]
    on = on_map(record, torch.from_numpy(lesson.picture(lesson.IMAGES[0]).mask))
    for groups in record.groups:
        query = groups[record.query(*lesson.QUERY)]
        assert (groups[~on] == query).float().mean() > 0.85
        assert (groups[on] == query).float().mean() < 0.05


def lost(image: int, layer: int) -> float:
    """The attention of the query that the best keys would get, less that of the keys of its group, in percent."""
    words = lesson.draw_attention(lesson.QUERY, 0, 1 / 4, lesson.layers()[layer][1], image)[1]
    held, best = re.search(r"<b>(\d+)%</b>.*would get (\d+)%", words).groups()
    return int(best) - int(held)


def test_groups_miss_keys_where_the_page_says_so():
    """The star, fourth layer; elsewhere the keys of a group are nearly the best ones."""
    assert lost(lesson.IMAGES[3], 3) >= 2 > max(lost(lesson.IMAGES[0], layer) for layer in range(5))


def measured(nmi: float, on: float, off: float) -> pd.DataFrame:
    """The summary of a network whose heads are all alike."""
    values = {"nmi": (nmi, 0.05), "keys": (on, 0.1), "keys_off": (off, 0.1)}
    rows = [
        Row("first", head, mask, kind, value)
        for head in range(4)
        for kind in values
        for mask, value in zip((OWN, OTHER), values[kind], strict=True)
    ]
    return summary(table_of([rows]))


@pytest.mark.parametrize("finds", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_the_verdict_goes_where_the_numbers_go(finds, reads):
    trained = measured(0.4 if finds else 0.1, 0.3 if reads else 0.1, 0.2)
    random = measured(0.1, 0.14, 0.15)
    words = lesson.in_words({"trained": [trained], "random weights": [random]})
    assert ("do not find the object" in words) != finds
    assert ("do not read the object" in words) != reads
