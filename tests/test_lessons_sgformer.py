"""The lesson on SG-Former: its pictures at the ends of their controls, and the code of its page."""

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("anywidget")

from dynattn import verify  # noqa: E402
from dynattn.figures.measures import on_map  # noqa: E402
from dynattn.lessons import sgformer as lesson  # noqa: E402
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention  # noqa: E402
from dynattn.mechanisms.self_guided import SelfGuidedAttention  # noqa: E402
from dynattn.tracing import trace  # noqa: E402
from tests.pages import Page, drawn_again, drawn_at_every_end  # noqa: E402

PAGE = Page("03_sgformer")
TURNED = ("scales", "significance", "tokens", "paint", "gradient", "flips", "cost")
HYBRID, GUIDED = "stages.0.blocks.0.attn", "stages.0.blocks.1.attn"
BIRD = lesson.IMAGES[0]


@pytest.mark.parametrize("name", TURNED)
def test_a_picture_is_drawn_at_every_end(name):
    drawn_at_every_end(getattr(lesson, name)())


@pytest.mark.parametrize("name", [name for name in TURNED if name != "paint"])
def test_a_control_draws_again(name):
    drawn_again(getattr(lesson, name)())


def test_the_layers_of_the_page_are_the_librarys():
    page = PAGE.run("guided_layer")
    for rates, side in (((8, 4, 2, 1), 8), ((2, 2), 12)):
        hybrid, guided = lesson.library_layers(16, 4, 2, rates)
        x = torch.randn(3, side, side, 16, dtype=torch.float64)
        z, S = hybrid(x)
        for found, right in zip(page.hybrid_layer(x, hybrid, h=2, M=2), (z, S), strict=True):
            assert torch.allclose(found, right)
        assert torch.allclose(page.guided_layer(x, S, guided, 4, rates), guided(x, S))


def test_the_solution_is_right():
    verify.check("aggregate_tokens", PAGE.solution("aggregate_tokens"), cases=20)


def test_reallocation_is_the_librarys():
    """Sub-regions and tokens of the trained layers, and short groups."""
    for record in lesson.traced(BIRD).of_kind("self_guided"):
        found = lesson.reallocate(record.significance, lesson.network().get_submodule(record.name).rates)
        assert torch.equal(found.regions, record.regions) and torch.equal(found.tokens, record.tokens)
        assert found.count == record.aggregation.shape[0]
    found = lesson.reallocate(torch.arange(7.0)[None], (3, 2))  # sub-regions of 3 and 4
    assert found.tokens.tolist() == [0, 0, 0, 1, 1, 2, 2]
    found = lesson.reallocate(torch.arange(8.0)[None], (3, 4))  # the first cell stands for the two that are missing
    assert found.tokens.tolist() == [0, 1, 1, 1, 2, 2, 2, 2]


def test_the_share_of_tokens_on_the_object():
    """Two cells on it, one a token of its own, one of a token of three cells."""
    found = lesson.Reallocation(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1]), (3, 1))
    assert found.on(torch.tensor([True, False, False, True])) == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize(
    ("first", "last", "n", "rates"), [(64, 8, 4, (64, 32, 16, 8)), (4, 4, 2, (4, 4)), (8, 1, 1, (8,))]
)
def test_rates_lie_between(first, last, n, rates):
    assert lesson.rates_between(first, last, n) == rates


def test_one_scale_reads_what_the_trained_heads_read():
    record = lesson.traced(BIRD)[HYBRID]
    window = lesson.network().get_submodule(HYBRID).window
    query = record.query(*lesson.QUERY)
    _, weight = lesson.reading(record, query, 1, window)
    assert torch.allclose(weight.flatten(), record.weights(record.scales.index(1))[query], atol=1e-6)


def test_sums_and_means_add_up():
    """By sums the map is the network's own, by means every scale has a mean of 1."""
    record = lesson.traced(BIRD)[HYBRID]
    assert torch.allclose(lesson.summed(record, "sum")[1], record.significance)
    assert [float(one.mean()) for one in lesson.summed(record, "mean")[0].values()] == pytest.approx([1, 1], rel=1e-5)
    assert [float(one.mean()) for one in record.maps.values()] == pytest.approx([16, 1], rel=1e-4)


def test_a_map_can_be_given_to_a_layer():
    """The network's own changes nothing; a reversed one changes the tokens; and the network is as it was."""
    model, x, record = lesson.network(), lesson.picture(BIRD).x, lesson.traced(BIRD)[GUIDED]
    with lesson.guided_by(model, {GUIDED: record.significance}):
        assert torch.allclose(trace(model, x).logits, lesson.traced(BIRD).logits)
    with lesson.guided_by(model, {GUIDED: -record.significance}):
        assert not torch.equal(trace(model, x)[GUIDED].tokens, record.tokens)
    assert torch.equal(trace(model, x)[GUIDED].tokens, record.tokens)


def test_all_guided_layers_are_changed_at_once():
    """Zeros are what a network without these layers' attention gives; and the network is as it was."""
    model, x = lesson.network(), lesson.picture(BIRD).x
    without = deepcopy(model)
    for module in without.modules():
        if isinstance(module, SelfGuidedAttention):
            torch.nn.init.zeros_(module.proj.weight), torch.nn.init.zeros_(module.proj.bias)
    with torch.no_grad(), lesson.changed(model, lesson.silent):
        assert torch.allclose(model(x[None]), without(x[None]), atol=1e-6)
    with lesson.changed(model, lesson.guiding(lambda name, S: torch.ones_like(S))):
        tokens = [record.tokens for record in trace(model, x).of_kind("self_guided")]
    for order, record in zip(tokens, trace(model, x).of_kind("self_guided"), strict=True):
        assert torch.equal(order.unique_consecutive(), torch.arange(order.max() + 1))  # the order of rows
        assert not torch.equal(record.tokens, order)


def test_the_need_goes_where_the_numbers_go():
    numbers = {"as it is": (0.9, 0), "one number": (0.8, -0.1), "zeros": (0.95, 0.05)}
    rows = [
        dict(network=network, layers=what, accuracy=accuracy, more=more, error=error)
        for network, error in (("seed 0", 0.02), ("seed 4", 0.04))
        for what, (accuracy, more) in numbers.items()
    ]
    words = lesson.need_in_words(pd.DataFrame(rows))
    assert "| one number | 80.0% (-10.0 ± 2.0) | 80.0% (-10.0 ± 4.0) |" in words
    assert "with one number, 2 of 2 networks are worse and 0 better; with zeros, 0 of 2 networks are worse" in words
    assert words.endswith("and 1 better.")


def test_perplexity_is_the_count_of_a_plain_mean():
    plain, one = torch.full((2, 3, 4), 0.25), torch.eye(4)[None]
    assert lesson.perplexity(plain) == pytest.approx(4) and lesson.perplexity(one) == pytest.approx(1)


def test_rates_of_the_tokens_are_the_trained_ones_or_the_readers():
    draw = lambda n: lesson.draw_tokens((64.0, 60.0), n, 4, 2, "own", GUIDED, BIRD)[1]  # noqa: E731
    trained = ", ".join(map(str, lesson.network().get_submodule(GUIDED).rates))
    assert f"Rates {trained}:" in draw(0) and "Rates 4, 2:" in draw(2)
    assert "Rates 4:" in draw(1) and "only the first rate counts" in draw(1)


def test_painting_moves_ranks_and_is_kept():
    """A stroke puts cells above all others, another below; what is brought back is what was found."""
    painting, found = lesson.Painting(), lesson.traced(BIRD)[GUIDED].significance
    there, corner, far = (2.0, 2.0), (1.0, 1.0), (101.0, 101.0)
    stroke = lambda brush, ink, layer=GUIDED: painting.stroke(brush, ink, 1, layer, BIRD).clone()  # noqa: E731
    assert torch.equal(stroke(there, "high"), found)  # nothing is painted before the brush moves
    high = stroke(corner, "high")
    assert high.argmax() == 0 and (high != found).sum() == 1
    assert torch.equal(stroke(corner, "low"), high)  # another ink alone paints nothing
    other = stroke(far, "low")
    assert other.argmax() == 0 and other.argmin() == 25 * 32 + 25
    assert torch.equal(
        stroke(far, "low", "stages.1.blocks.1.attn"), lesson.traced(BIRD)["stages.1.blocks.1.attn"].significance
    )
    assert torch.equal(stroke(far, "found"), other)  # back in this layer: first look
    assert torch.equal(stroke(there, "found"), found.where(other != other.min(), other))
    assert torch.equal(lesson.traced(BIRD)[GUIDED].significance, found)


def test_the_brush_paints_by_drag():
    """The picture tells where it is pointed at, and says what moved."""
    shown = lesson.paint()
    before = shown.words
    shown.picture.at = [0.05, 0.3]
    assert shown.words != before and "in another sub-region" in shown.words


def test_no_slope_but_jumps():
    values, others = lesson.walk((4, 4, 2, 1))
    steps = np.abs(np.diff(values)) > 1e-9
    assert 1 < steps.sum() <= len(others)
    assert "jumps 0 times" in lesson.draw_gradient(0.5, (1,))[1]


def test_ranks_given_follow_the_noise():
    """Without flips both ways are the same; with the ranks given the change is about as large as the noise."""
    small, large = lesson.disturbed(BIRD, 1e-10), lesson.disturbed(BIRD, 1e-3)
    assert sum(small.ranks.values()) == 0 and small.free == small.given < 1e-8
    assert sum(large.ranks.values()) > 0 and 1e-5 < large.given < 1e-1
    assert "another rank to <b>0</b> cells" in lesson.draw_flips(-10, BIRD)[1]


@pytest.mark.parametrize("scales", [(4, 1), (2,), (8, 4, 2, 1)])
def test_the_cost_of_hybrid_layers_is_what_torch_counts(scales):
    layer = HybridScaleAttention(32, 4, scales, window=4, global_scale=False, lepe=False, merge_norm=False)
    assert counted(layer, 32, 32) == lesson.hybrid_multiply_adds(32 * 32, 32, scales, 4)


@pytest.mark.parametrize("rates", [(16, 4, 4, 2), (1,), (7, 3)])
def test_the_cost_of_guided_layers_is_what_torch_counts(rates):
    layer = SelfGuidedAttention(32, 4, rates, shared=False, lepe=False)
    with_torch = counted(layer, 32, 32, torch.zeros(1, 32, 32, device="meta"))
    assert with_torch == lesson.guided_multiply_adds(32 * 32, 32, rates)[0]


def counted(layer, side: int, C: int, *more) -> int:
    """Multiply-adds of a layer by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.to("meta").eval()(torch.zeros(1, side, side, C, device="meta"), *more)
    return counter.get_total_flops() // 2


def test_what_the_page_says_of_its_first_picture():
    """The object has a larger share of the tokens than of the cells; by a constant it has the same, nearly."""
    record = lesson.traced(BIRD)[GUIDED]
    mask = on_map(record, torch.from_numpy(lesson.picture(BIRD).mask))
    rates = lesson.network().get_submodule(GUIDED).rates
    area, found = float(mask.float().mean()), lesson.reallocate(record.significance, rates)
    assert found.on(mask) > 1.5 * area
    spread = torch.bincount(found.tokens, minlength=found.count)
    assert spread.min() == 8 and spread.max() == 64


def verdict_of(own: dict[int, list[float]], chance: float) -> str:
    """What is said of two seeds with these AUCs, by layer."""
    both = dict(other=0.5, tokens=0.3, area=0.2)
    rows = [
        dict(layer=layer, own=one, network=f"seed {seed}", accuracy=0.9, **both)
        for layer, values in own.items()
        for seed, one in enumerate(values)
    ]
    rows += [dict(layer=layer, own=chance, network="random 0", accuracy=np.nan, **both) for layer in own]
    return lesson.in_words(pd.DataFrame(rows))


def test_the_verdict_goes_where_the_numbers_go():
    words = verdict_of({1: [0.7, 0.8], 2: [0.8, 0.75]}, 0.6)
    assert "In 2 of 2 layers significance **finds** the object" in words and "other way round" not in words
    assert "rises with depth in 1 of 2 networks" in words and "90.0% / 90.0%" in words
    words = verdict_of({1: [0.7, 0.3], 2: [0.8, 0.75]}, 0.6)
    assert "In 1 of 2 layers" in words and "But in layer 1 of seed 1 it is 0.30: **the other way round**" in words
    assert "other way round" not in verdict_of({1: [0.7, 0.3]}, 0.25)  # random weights are as low
    assert "other way round" not in verdict_of({1: [0.7, 0.48]}, 0.6)  # chance is as low
    assert "**clearly find**" in verdict_of({1: [0.7, 0.55]}, 0.6)
