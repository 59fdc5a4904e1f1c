"""The lesson on SETR and HLG: its pictures at the ends of their controls, and the code of its page.

Pictures are drawn of networks with random weights: what is asked is that they are drawn.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("anywidget")
pytest.importorskip("torchmetrics")

from dynattn import create_model, ops, verify  # noqa: E402
from dynattn.dense.metrics import intersection_over_union  # noqa: E402
from dynattn.lessons import setr_hlg as lesson  # noqa: E402
from dynattn.mechanisms.local_global import Layout, LocalGlobalAttention  # noqa: E402
from dynattn.models.hlg import FullAttention  # noqa: E402
from dynattn.models.vit import TokenAttention  # noqa: E402
from tests.pages import Page, drawn_again, drawn_at_every_end  # noqa: E402

PAGE = Page("05_setr_hlg")
TURNED = ("patches", "decoders", "positions", "layers", "windows", "keys", "costs")
CACHED = ("scene", "traced", "test_scenes", "test_objects", "of_decoder", "resolved", "of_layer", "verdict", "need")


@pytest.fixture(autouse=True, scope="module")
def untrained() -> Iterator[None]:
    """Networks with random weights, and few images."""

    @cache
    def network(name: str) -> torch.nn.Module:
        torch.manual_seed(sum(map(ord, name)))
        return create_model(name).eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson, "network", network)
        patch.setattr(lesson, "COUNTED", 40)
        for name in CACHED:
            getattr(lesson, name).cache_clear()
        yield
    for name in CACHED:
        getattr(lesson, name).cache_clear()


@pytest.mark.parametrize("name", TURNED)
def test_a_picture_is_drawn_at_every_end(name):
    drawn_at_every_end(getattr(lesson, name)())


@pytest.mark.parametrize("name", TURNED)
def test_a_control_draws_again(name):
    drawn_again(getattr(lesson, name)())


def test_the_lens_shows_the_three_kinds():
    lens = lesson.question()
    shown = [
        next(one for one in panel["layers"] if one["name"] == name)
        for panel, name in zip(lens.scene, lens.layer, strict=True)
    ]
    assert ["pooled" in layer for layer in shown] == [False, True, True]
    assert "plain local-global" in repr(lens) and "dilated local-global" in repr(lens) and "64 cells" in repr(lens)


def test_the_layers_of_the_page_are_the_librarys():
    page = PAGE.run("local_global_layer")
    z, net = torch.randn(2, 15, 24, dtype=torch.float64), lesson.encoder_layer(24, heads=3)
    assert torch.allclose(page.encoder_layer(z, net, heads=3), net(z, (3, 5)))
    for shape, R, dilated in (((8, 12), 4, True), ((6, 4), 2, False)):
        x, net = torch.randn(2, *shape, 64, dtype=torch.float64), lesson.local_global_layer(64, 4, R, dilated)
        B_W, B_G = lesson.biases(net, shape)
        assert B_W.std() > 1e-2 and B_G.std() > 1e-2  # the biases of fewer channels would all be the same number
        assert torch.allclose(page.local_global_layer(x, net, R, dilated, h=4), net(x))


def test_the_solution_is_right():
    verify.check("window_embedding", PAGE.solution("window_embedding"), cases=30)


# ------------------------------------------------------------------------------------------------------------- scores


def test_mean_iou_is_that_of_torchmetrics():
    torch.manual_seed(0)
    predicted, truth = torch.randint(0, 3, (2, 5, 8, 8))  # classes 3 to 10 are nowhere
    found = lesson.mean_iou(lesson.confusion(predicted, truth, 11).sum(0).double())
    assert float(found) == pytest.approx(intersection_over_union([(predicted, truth)], 11)[0])


def test_accuracy_counts_images():
    found = lesson.confusion(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), 3)
    assert found.shape == (4, 3, 3) and float(lesson.accuracy(found.sum(0).double())) == 0.75


def test_a_difference_has_an_error_over_images():
    """Of 100 images 10 are answered otherwise: the error is that of a mean of 100 numbers."""
    truth = torch.zeros(100, dtype=torch.long)
    old, new = (lesson.confusion((torch.arange(100) < wrong).long(), truth, 2) for wrong in (20, 10))
    more, error = lesson.difference(new, old, lesson.accuracy)
    assert more == pytest.approx(0.1) and error == pytest.approx((0.1 * 0.9 / 100) ** 0.5, rel=0.2)
    assert lesson.difference(old, old, lesson.accuracy) == (0, 0)


def test_the_most_common_class_of_a_patch():
    truth = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 2], [0, 0, 2, 2], [0, 3, 2, 0]]]).numpy()
    right = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2]]
    assert lesson.by_patch(truth, 2)[0].tolist() == right


def test_the_head_on_the_last_layer_is_the_network():
    model, x = lesson.network("setr_pup_mini"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(lesson.reading_layer(4)(model, x), model(x))
        assert torch.equal(lesson.reading_layer(2)(model, x), model(x, aux=True)[1][0])


# ----------------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize(("side", "R"), [(16, 4), (10, 4), (7, 7)])
@pytest.mark.parametrize("dilated", [False, True])
def test_windows_of_cells_are_the_librarys(side, R, dilated):
    numbers = lesson.window_of_cells(side, R, dilated)
    layout = Layout((side, side), R, dilated)
    for window, places in enumerate(layout.cut(torch.arange(1, side * side + 1).reshape(1, side, side, 1))[..., 0]):
        assert (numbers.flatten()[places[places > 0] - 1] == window).all()


class Weights(TorchDispatchMode):
    """Inside, how many numbers softmaxes put out."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **options or {})
        self.count += made.numel() if "softmax" in str(function) else 0
        return made


def test_attention_weights_are_what_a_softmax_puts_out():
    h = 2
    net = lesson.local_global_layer(16, h, 4, dilated=False)
    q, k, v = (torch.randn(1, h, 64, 8, dtype=torch.float64) for _ in range(3))
    with Weights() as dense:
        (q @ k.mT).softmax(-1) @ v
    assert dense.count == h * lesson.attention_weights(64, 4, "dense")
    cut = lambda t: Layout((8, 8), 4, False).cut(ops_map(t))  # noqa: E731
    with Weights() as windows:
        (cut(q) @ cut(k).mT).softmax(-1)
    assert windows.count == lesson.attention_weights(64, 4, "windows")
    B_W, B_G = lesson.biases(net, (8, 8))
    assert 4 * B_W.numel() + B_G.numel() == h * lesson.attention_weights(64, 4, "local-global")  # of four windows


def ops_map(t: torch.Tensor) -> torch.Tensor:
    """The first head of row-major tokens as a map."""
    return t[:, 0].reshape(1, 8, 8, -1)


def test_the_largest_tensor_is_found():
    assert lesson.largest(lambda: (torch.ones(3, 4) @ torch.ones(4, 50)).sum()) == 200


# -------------------------------------------------------------------------------------------------------- taking away


def test_windows_read_nothing_or_a_plain_mean():
    """And only those of the kind that is asked for; afterwards the layer is as it was."""
    net = LocalGlobalAttention(16, 2, 4, dilated=True).double().eval()
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, n = net(x), net.norm(x)
        with lesson.without(net, "plain", "zeros"):
            assert torch.equal(net(x), whole)
        layout = Layout((8, 8), 4, True)
        with lesson.without(net, "dilated", "alike"):
            found = net.read_window(net.q(n), net.q(n), net.v(n), layout)
        means = ops.window_embedding(net.v(n), None, None, window=4, dilated=True)
        right = layout.join(means.flatten(0, 1)[:, None].expand(-1, 16, -1))
        assert torch.allclose(found, right)
        silent = deepcopy(net)
        silent.read_window = lambda q, k, v, layout: torch.zeros_like(v)
        with lesson.without(net, "local", "zeros"):
            assert torch.allclose(net(x), silent(x))
        flat = deepcopy(net)
        torch.nn.init.zeros_(flat.proj.weight)
        with lesson.without(net, "global", "zeros"):
            assert torch.allclose(net(x), flat(x))
        assert torch.equal(net(x), whole)


def test_padding_is_not_in_the_plain_mean():
    net = LocalGlobalAttention(16, 2, 4).double().eval()
    v = torch.randn(1, 5, 5, 16, dtype=torch.float64)
    with lesson.without(net, "plain", "alike"), torch.no_grad():
        found = net.read_window(v, v, v, Layout((5, 5), 4, False))
    assert torch.allclose(found[0, 4, 4], v[0, 4, 4])  # the last window has one cell


@pytest.mark.parametrize("how", ["zeros", "alike"])
def test_full_attention_reads_nothing_or_a_plain_mean(how):
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    tokens, full = TokenAttention(16, 2).double(), FullAttention(16, 2).double()
    mean = lambda v: (v.mean(1, keepdim=True) if how == "alike" else 0 * v).expand(-1, 12, -1)  # noqa: E731
    with torch.no_grad():
        with lesson.without(tokens, "full", how):
            assert torch.allclose(tokens(x, (3, 4)), tokens.proj(mean(tokens.qkv(x).chunk(3, dim=-1)[2] * 1)))
        with lesson.without(full, "full", how):
            found = full(x.reshape(2, 3, 4, 16)).reshape(2, 12, 16)
        assert torch.allclose(found, x + full.norm(full.proj(mean(full.v(x)))))


def test_one_layer_of_several_is_taken():
    model, x = lesson.network("setr_pup_mini"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole = model.encoder(x, (1, 2))
        with lesson.without(model, "full", "zeros", only=[2]):
            found = model.encoder(x, (1, 2))
        assert torch.equal(found[0], whole[0]) and not torch.equal(found[1], whole[1])
        with lesson.positions_as(model, torch.zeros_like(model.encoder.embed.table)):
            assert not torch.equal(model.encoder(x, (1,))[0], whole[0])
        assert torch.equal(model.encoder(x, (1, 2))[1], whole[1])


@pytest.mark.parametrize("name", ["hlg_mini", "setr_pup_hlg_mini"])
def test_every_part_is_somewhere(name):
    """In both networks every part changes the answer."""
    model = lesson.network(name)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole = model(x)
        for part in lesson.PARTS:
            for how in lesson.WAYS:
                with lesson.without(model, part, how):
                    assert not torch.equal(model(x), whole), (part, how)
        assert torch.equal(model(x), whole)


# ------------------------------------------------------------------------------------------------------------ verdicts


def found_of(name: str, numbers: dict[tuple[str, str], float], error: float = 0.01) -> pd.DataFrame:
    """A table of differences by part and way, from 0.8."""
    rows = [dict(part="nothing", how="", value=0.8, more=0.0, error=0.0)]
    rows += [dict(part=part, how=how, value=0.8 + m, more=m, error=error) for (part, how), m in numbers.items()]
    return pd.DataFrame(rows).assign(network=name, what="mean IoU")


def test_the_verdict_goes_where_the_numbers_go():
    numbers = {
        ("windows", "zeros"): -0.1,
        ("windows", "alike"): -0.01,
        ("tokens", "zeros"): 0.1,
        ("tokens", "alike"): -0.5,
    }
    words = lesson.in_words(found_of("a", numbers))
    assert "| windows | 0.700 (-0.100 ± 0.010) | 0.790 (-0.010 ± 0.010) |" in words
    assert "without: windows; no clear loss without: tokens." in words
    assert "it is worse for: tokens; no clear loss for: windows." in words
    assert "`a` 0.800 (mean IoU)" in words
    words = lesson.in_words(found_of("a", numbers, error=1.0))
    assert "without: none; no clear loss without: windows, tokens." in words
    assert "it is worse for: none; no clear loss for: windows, tokens." in words


def test_the_need_goes_where_the_numbers_go():
    numbers = {("positions", "zeros"): 0.0, ("positions", "at other places"): -0.1, ("layer 1", "alike"): -0.2}
    words = lesson.need_in_words(found_of("a", numbers))
    assert "with zeros: none; at other places: positions; with weights alike: layer 1." in words
    assert "| layer 1 |  |  | 0.600 (-0.200 ± 0.010) |" in words
