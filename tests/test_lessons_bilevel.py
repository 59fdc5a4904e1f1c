"""The lesson on BiFormer and DeBiFormer: its pictures at the corners of their controls, and the code of its page."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("anywidget")

from dynattn import verify  # noqa: E402
from dynattn.lessons import bilevel as lesson  # noqa: E402
from dynattn.mechanisms.deformable_bilevel import DeformableBiLevelAttention  # noqa: E402
from dynattn.tracing import RegionRoutes  # noqa: E402
from tests.pages import Page, drawn_again, drawn_at_every_end  # noqa: E402

PAGE = Page("02_bilevel")
TURNED = ("routing", "gradient", "agents", "cost")


@pytest.mark.parametrize("name", TURNED)
def test_a_picture_is_drawn_at_every_end(name):
    drawn_at_every_end(getattr(lesson, name)())


@pytest.mark.parametrize("name", TURNED)
def test_a_control_draws_again(name):
    drawn_again(getattr(lesson, name)())


def test_the_layers_of_the_page_are_the_librarys():
    page = PAGE.run("agent_layer")
    x = torch.randn(3, 8, 8, 16, dtype=torch.float64)
    assert torch.allclose(page.bilevel_layer(x, page.bra, M=4, S=4, k=3), page.bra(x))
    assert torch.allclose(page.agent_layer(x, page.dbra, M=4, r=2, S=4, k=3), page.dbra(x))
    lesson.set_agents(page.dbra, 4, 2, 1)
    assert torch.allclose(page.agent_layer(x, page.dbra, M=4, r=4, S=2, k=1), page.dbra(x))


def test_the_solution_is_right():
    verify.check("routed_attention", PAGE.solution("routed_attention"), cases=20)


def test_the_trained_routing_is_drawn_where_nothing_is_turned():
    """The picture's own routes, with the layer's S and k, are those of the record."""
    record = lesson.traced("biformer_mini", lesson.IMAGES[0])[lesson.layers("biformer_mini")[0][1]]
    layer = lesson.network("biformer_mini").get_submodule(record.name)
    routing, affinity = lesson.turned_routes(record, layer.regions, layer.topk)
    assert torch.equal(routing.routes, record.routing.routes)
    best = affinity.topk(layer.topk).values.sum(dim=1)
    assert torch.allclose(affinity.gather(1, routing.routes).sum(dim=1), best)


def test_what_the_page_says_of_its_first_picture():
    """A region of the background chooses regions of the bird."""
    image = lesson.IMAGES[0]
    mask = lesson.picture(image).mask[::2, ::2].astype(float)
    record = lesson.traced("biformer_mini", image)[lesson.layers("biformer_mini")[0][1]]
    boxes = torch.tensor(record.region_routes().read(*lesson.QUERY)).add(0.5).round().int().tolist()
    found = np.mean([mask[top:bottom, left:right].mean() for top, left, bottom, right in boxes])
    assert found > 4 * mask.mean()


def test_the_gradient_is_right_between_the_jumps_and_all_regions_have_none():
    values, routes, slopes = lesson.walk(2)
    stays = np.array([a == b == c for a, b, c in zip(routes, routes[1:], routes[2:], strict=False)])
    numeric = (values[2:] - values[:-2]) / (lesson.WALK[2:] - lesson.WALK[:-2])
    assert stays.any() and not stays.all()
    assert np.allclose(numeric[stays], slopes[1:-1][stays], atol=1e-3 * np.abs(slopes).max())
    assert "they change 0 times" in lesson.draw_gradient(0.5, 16)[1]


def test_more_agents_and_regions_are_read():
    name = lesson.layers("debiformer_mini")[0][1]
    few, many = (lesson.turned(lesson.IMAGES[0], name, r, S, k) for r, S, k in ((8, 4, 1), (2, 8, 8)))
    assert (few.points.shape[1], many.points.shape[1]) == (16, 256)
    assert [len(one.region_routes().routes[0]) for one in (few, many)] == [1, 8]
    assert lesson.network("debiformer_mini").get_submodule(name).stride == 4  # the trained network is as it was


def test_on_object_with_a_known_answer():
    """Four regions, the first of which is the object: the first reads the last, the others the first."""
    mask = np.zeros((8, 8))
    mask[:4, :4] = 1
    routes = RegionRoutes((4, 4), (2, 2), (4, 4), (2, 2), ((3,), (0,), (0,), (1,)))
    assert lesson.on_object(routes, mask) == pytest.approx((0, 2 / 3))
    assert np.isnan(lesson.on_object(routes, 1 - mask * 0)[1])


WAYS = [(0.3, "read more of"), (-0.3, "read **less** of"), (0.0, "do not clearly read")]


@pytest.mark.parametrize(("apart", "way"), WAYS)
@pytest.mark.parametrize(("ours", "order"), [((0.7, 0.8), "better"), ((0.1, 0.2), "worse"), ((0.3, 0.8), "undecided")])
def test_the_verdict_goes_where_the_numbers_go(apart, way, ours, order):
    rows = []
    for name, own in zip(lesson.NAMES, ((0.4, 0.5), ours), strict=True):
        for seed in (0, 1):
            numbers = dict(on=0.4 + apart, off=0.4, own=own[seed], other=0.1)
            rows.append(dict(model=name, network=f"seed {seed}", **numbers))
        rows.append(dict(model=name, network="random weights", on=0.21, off=0.2, own=0.2, other=0.1))
    words = lesson.in_words(pd.DataFrame(rows))
    assert words.count(f"regions on the object {way}") == 2
    assert f"**{order}" in words


@pytest.mark.parametrize("S", [1, 4, 8, 16])
def test_the_cost_that_is_drawn_is_what_torch_counts(S):
    """Also where there are fewer agents than S x S, which leaves fewer regions of agents."""
    words = lesson.draw_cost(S, 4, 8, 64)[1]
    layers = {cut: DeformableBiLevelAttention(64, 2, 1, (64, 64), stride=8, regions=cut, topk=4) for cut in (8, 16)}
    counts = {}
    for cut, layer in layers.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.to("meta")(torch.zeros(1, 64, 64, 64, device="meta"))
        counts[cut] = counter.get_total_flops()
    assert counts[16] < counts[8] and "DBRA with <b>S = 16</b>" in words
