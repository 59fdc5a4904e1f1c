"""The lens: what it shows is what the records say, whatever is chosen, live, in the saved page and on paper."""

import base64
import gzip
import json
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dynattn import create_model, trace
from dynattn.data import photograph, to_rgb
from dynattn.tracing import Keys, Record, Trace
from dynattn.widgets import Lens, page, picture, save_page
from dynattn.widgets.panel import Panel, make_panels, merge, on_cells, unique_positions

DEFORMABLE, WINDOW, SWIN = "stages.2.blocks.1.attn", "stages.0.blocks.1.attn", "layers.0.blocks.1.attn"


@pytest.fixture(scope="module")
def dat() -> nn.Module:
    return create_model("dat_mini", pretrained=True)


@pytest.fixture(scope="module")
def cat() -> Image.Image:
    return photograph("chelsea").crop((110, 0, 410, 300)).resize((128, 128))


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    """A small Swin of timm's, for images of 96 x 128."""
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    sizes = dict(embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=3)
    return SwinTransformer(img_size=(96, 128), **sizes).eval()


@pytest.fixture
def lens(dat, cat) -> Lens:
    return Lens(dat, cat)


def shown(lens: Lens, p: int = 0) -> np.ndarray:
    """The keys that panel p shows: x, y, weight."""
    return np.frombuffer(lens.shown[p]["keys"], dtype="<f4").reshape(-1, 3)


def expected(record: Record, row: float, col: float, head: int) -> np.ndarray:
    keys = record.keys(row, col, head)
    return torch.cat([keys.xy, keys.weight[:, None]], dim=1).numpy()


def by_position(keys: np.ndarray) -> dict[tuple[float, float], float]:
    return {(float(x), float(y)): float(weight) for x, y, weight in keys}


# ---------------------------------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("layer", [DEFORMABLE, WINDOW])
@pytest.mark.parametrize("row, col", [(0, 0), (40, 60), (127, 127), (127, 3)])
def test_a_click_shows_the_keys_of_the_record(dat, cat, lens, layer, row, col):
    record = trace(dat, cat)[layer]
    lens.layer, lens.head = layer, 1
    lens.row, lens.col = row, col
    assert np.array_equal(shown(lens), expected(record, row, col, 1))
    i, j = divmod(record.query(row, col), record.query_shape[1])
    assert lens.shown[0] | {"row": row, "col": col, "layer": layer, "head": 1, "cell": [i, j]} == lens.shown[0]


@pytest.mark.parametrize("layer", [DEFORMABLE, WINDOW])
def test_the_mean_adds_what_heads_read_at_the_same_place(lens, layer):
    lens.layer, lens.head, lens.row, lens.col = layer, "mean", 40, 60
    record = lens.traces[0][layer]
    sums = {}
    for head in range(record.heads):
        for place, weight in by_position(expected(record, 40, 60, head)).items():
            sums[place] = sums.get(place, 0) + weight / record.heads
    found = by_position(shown(lens))
    assert found == pytest.approx(sums, rel=1e-5)
    assert sum(found.values()) == pytest.approx(1, rel=1e-5)


def test_merge_with_a_known_answer():
    one = np.array([[1.5, 0, 0.5], [0, 2, 0.5]], dtype=np.float32)
    other = np.array([[0, 2, 0.25], [-0.5, -1, 0.75]], dtype=np.float32)
    assert by_position(merge([one, other])) == {(1.5, 0): 0.25, (0, 2): 0.375, (-0.5, -1): 0.375}
    assert merge([one]) is one


def test_positions_are_row_major_and_zero_has_no_sign():
    found, which = unique_positions(np.array([[3, 1], [0.0, 2], [1, 1], [-0.0, 2]], dtype=np.float32))
    assert found.tolist() == [[1, 1], [3, 1], [0, 2]] and which.tolist() == [1, 2, 0, 2]


def test_points_and_cells_are_told_apart(lens):
    for layer, cells in ((DEFORMABLE, False), (WINDOW, True)):
        lens.layer = layer
        assert on_cells(shown(lens), lens.traces[0][layer]) is cells


def test_rollout_is_that_of_the_trace(dat, cat):
    """All rows at once give what the trace gives for one; the lens has it over the cells of the first layer."""
    panel = make_panels(dat, cat)[0]
    for row, col in ((0, 0), (40, 60), (127, 100)):
        cell, heat = panel.rollout(row, col)
        whole = panel.trace.rollout(row, col)
        assert cell == (row // 16, col // 16)
        np.testing.assert_allclose(heat.reshape(32, 32), 16 * whole[::4, ::4], rtol=1e-4, atol=1e-8)


def test_rollout_is_worked_out_when_it_can_be_seen(lens):
    assert lens.shown[0]["heat"] == b"" and lens.shown[0]["last"] is None
    lens.fade = 0.5
    panel = lens._panels[0]
    heat = np.frombuffer(lens.shown[0]["heat"], dtype="<f4")
    assert np.array_equal(heat, panel.rollout(lens.row, lens.col)[1]) and heat.sum() == pytest.approx(1, rel=1e-5)
    before = lens.shown
    lens.fade = 0.75
    assert lens.shown is before  # nothing to work out again


def test_models_side_by_side_follow_one_click(dat, swin, cat):
    """The second image has another size: its query is at the same place of the photograph."""
    picture = torch.from_numpy(np.array(cat.resize((128, 96)))).movedim(-1, 0)
    traces = [trace(dat, cat), trace(swin, picture)]
    lens = Lens({"deformable": traces[0], "windows": traces[1]}, row=0, col=0, layer=[DEFORMABLE, SWIN], head=[3, 1])
    lens.row, lens.col = 100, 40
    assert np.array_equal(shown(lens, 0), expected(traces[0][DEFORMABLE], 100, 40, 3))
    row = (100 + 0.5) * 96 / 128 - 0.5
    assert np.array_equal(shown(lens, 1), expected(traces[1][SWIN], row, 40, 1))
    assert [one["name"] for one in lens.scene] == ["deformable", "windows"]
    assert [one["shape"] for one in lens.scene] == [[128, 128], [96, 128]]
    assert lens.shown[1]["cell"] == [int(75 // 4), 10]


ROUTED = ("stages.0.blocks.1.attn", "stages.1.blocks.1.attn")


@pytest.fixture(scope="module")
def routed() -> dict[str, Trace]:
    """Bi-level routing and its deformable form, on an image whose maps have padding in their regions."""
    torch.manual_seed(0)
    names = ("biformer_mini", "debiformer_mini")
    return {name: trace(create_model(name, regions=5), torch.randn(3, 128, 96)) for name in names}


@pytest.mark.parametrize("layer", ROUTED)
@pytest.mark.parametrize(("row", "col"), [(0, 0), (61, 40), (127, 95)])
def test_routes_on_the_image_are_those_that_are_read(routed, layer, row, col):
    """A query, or the agents where it stands, read exactly the cells inside the outlines."""
    for traced in routed.values():
        record = traced[layer]
        routes = record.region_routes()
        top, left, bottom, right = routes.own(row, col)
        assert top <= row <= bottom and left <= col <= right
        x, y = record.cells().T
        inside = torch.zeros(len(x), dtype=torch.bool)
        for a, b, c, d in routes.read(row, col):
            box = (a < y) & (y < c) & (b < x) & (x < d)
            assert not (inside & box).any()  # regions do not overlap
            inside |= box
        if record.kind == "bilevel":
            read = record.weights(0)[record.query(row, col)] > 0
        else:
            spots = record.references_xy().T.flip(0)  # rows, columns
            mine = (spots[0] > top) & (spots[0] < bottom) & (spots[1] > left) & (spots[1] < right)
            assert mine.any()
            read = (record.reading[0, mine] > 0).all(dim=0)
        assert torch.equal(inside, read)


def test_the_lens_says_and_draws_the_routes(routed, monkeypatch):
    lens = Lens(routed, layer=ROUTED[0])
    said = repr(lens).split("\n")
    assert "; its region is routed to 4 of 25 regions" in said[0]
    assert "; the agents of its region are routed to 8 of 25 regions" in said[1]
    first, second = (panel["layers"] for panel in lens.scene)
    assert first[0]["routes"]["key_grid"] == (5, 5) and len(first[0]["routes"]["routes"]) == 25
    assert "routes" not in first[-1]  # full attention
    assert "routes" in second[-1]
    plain = Lens(routed, layer=[first[-1]["name"], second[-1]["name"]])
    assert "Outlines" in picture.caption(lens._view) and "Outlines" not in picture.caption(plain._view)
    here = np.asarray(lens.picture(40))
    monkeypatch.setattr(picture, "regions", lambda *given: None)
    assert (np.asarray(lens.picture(40)) != here).any()


GUIDED, HYBRID = "stages.0.blocks.1.attn", "stages.0.blocks.0.attn"


@pytest.fixture(scope="module")
def merging() -> Trace:
    """Self-guided and hybrid-scale layers, on an image whose maps no window, scale or rate divides."""
    torch.manual_seed(0)
    return trace(create_model("sgformer_mini"), torch.randn(3, 72, 60))


@pytest.mark.parametrize(("layer", "head"), [(GUIDED, 0), (GUIDED, 1), (HYBRID, 0)])
@pytest.mark.parametrize(("row", "col"), [(0, 0), (40, 30), (71, 59)])
def test_tokens_that_are_read_are_those_of_the_record(merging, layer, head, row, col):
    """Every token with the attention that the layer gives to it, and with as many cells as became it."""
    record, panel = merging[layer], make_panels(merging)[0]
    tokens = panel.read(row, col, layer, head).tokens
    weight, merged = record.weights(head)[record.query(row, col)], record.merged(head)
    assert sorted(tokens.number) == weight.nonzero()[:, 0].tolist()
    assert tokens.weight == pytest.approx(weight[tokens.number].numpy(), rel=1e-4)
    assert (np.diff(tokens.weight) <= 0).all()
    assert tokens.size.tolist() == [int((merged == one).sum()) for one in tokens.number]
    assert tokens.merged.tolist() == merged.tolist()


def test_heads_that_merge_otherwise_have_no_common_tokens(merging):
    """Of two scales each has its own; a scale of one merges nothing."""
    (panel,) = make_panels(merging)
    assert merging[HYBRID].scales == [4, 1]
    assert panel.merged(HYBRID, "mean") is None and panel.merged(HYBRID, 1) is None
    assert panel.marks(panel.read(0, 0, HYBRID, 0)) == "tokens" and panel.marks(panel.read(0, 0, HYBRID, 1)) == "cells"
    assert panel.merged(GUIDED, "mean").tolist() == merging[GUIDED].tokens.tolist()
    assert panel.merged(panel.layers[-1], 0) is None  # full attention


def test_reduced_tokens_are_squares():
    """PVT's spatial reduction, the last squares of which are smaller."""
    from dynattn.mechanisms.baselines import SpatialReductionRecord

    record = SpatialReductionRecord(*(torch.randn(1, n, 2) for n in (15, 4, 4, 15)), (3, 5), 3)
    assert record.merged().reshape(3, 5).tolist() == [[0, 0, 0, 1, 1]] * 3


def test_the_lens_says_and_draws_the_tokens(merging, monkeypatch):
    lens = Lens(merging, layer=GUIDED, head=0, row=40, col=30)
    tokens = lens._panels[0].read(40, 30, GUIDED, 0).tokens
    first, fifth = tokens.weight[0], tokens.weight[4]
    n, alike = len(tokens.number), 1 / len(tokens.number)
    said = f"{n} tokens, {alike:.3g} each if all were alike; read most: orange {first:.3g} ({tokens.size[0]} cell"
    assert said in repr(lens) and f"purple {fifth:.3g} ({tokens.size[4]} cell" in repr(lens)
    layers = lens.scene[0]["layers"]
    assert layers[1]["tokens"] == [merging[GUIDED].tokens.tolist()] * 2
    assert layers[0]["tokens"][0] == merging[HYBRID].merged(0).tolist() and layers[0]["tokens"][1] is None
    assert "tokens" not in layers[-1]
    assert "Many cells became one token" in picture.caption(lens._view)
    here = np.asarray(lens.picture(40))
    monkeypatch.setattr(picture, "tokens", lambda *given: None)
    assert (np.asarray(lens.picture(40)) != here).any()


def test_a_page_has_one_key_for_each_token(merging):
    """With weights fine enough for the order in which tokens are liked."""
    record, merged = merging[GUIDED], make_panels(merging)[0].merged(GUIDED, "mean")
    rows = page.pack_rows(record, merged)
    assert rows["weight"].dtype == np.uint16 and (rows["count"] == merged.max() + 1).all()
    cells = np.rint((rows["position"].reshape(-1, 2)[rows["step"][: merged.max() + 1].cumsum()] + 0.5) / 4 - 0.5)
    of_key = merged[(cells[:, 1] * record.query_shape[1] + cells[:, 0]).astype(int)]
    assert sorted(of_key) == list(range(merged.max() + 1))
    weight = rows["weight"][: merged.max() + 1] * (rows["scale"][0] / 65535)
    assert weight == pytest.approx(record.weights(0)[0][of_key].numpy(), abs=1e-5 * float(rows["scale"][0]))
    assert page.pack_rows(merging[HYBRID])["weight"].dtype == np.uint16  # whose heads merge otherwise


PLAIN, DILATED = "stages.0.blocks.0.attn", "stages.0.blocks.1.attn"


@pytest.fixture(scope="module")
def local_global() -> Trace:
    """Plain and dilated windows, and the means of windows, on an image whose maps no window divides."""
    torch.manual_seed(0)
    return trace(create_model("hlg_mini"), torch.randn(3, 72, 60))


@pytest.mark.parametrize("layer", [PLAIN, DILATED])
@pytest.mark.parametrize("head", [0, 1, "mean"])
@pytest.mark.parametrize(("row", "col"), [(0, 0), (40, 30), (71, 59)])
def test_cells_and_windows_that_are_read_are_those_of_the_record(local_global, layer, head, row, col):
    """The cells of the query's window as keys, and every window as a token that lies over its cells."""
    record, (panel,) = local_global[layer], make_panels(local_global)
    reading, query = panel.read(row, col, layer, head), record.query(row, col)
    heads = range(record.heads) if head == "mean" else [head]
    near = sum(record.local(m)[query] for m in heads) / len(heads)
    far = sum(record.everywhere[m, query] for m in heads) / len(heads)
    read = near.nonzero()[:, 0]
    assert set(read.tolist()) == set((record.window == record.window[query]).nonzero()[:, 0].tolist())
    right = torch.cat([record.cells()[read], near[read, None]], dim=1).numpy()
    assert by_position(reading.keys) == pytest.approx(by_position(right), rel=1e-4)
    assert panel.marks(reading) == "beside" and reading.counts == (len(read),) * len(heads)
    assert reading.by_number == pytest.approx(far.numpy(), rel=1e-4)
    assert (np.diff(reading.tokens.weight) <= 0).all() and reading.tokens.merged.tolist() == record.window.tolist()
    assert reading.tokens.size.tolist() == [int((record.window == one).sum()) for one in reading.tokens.number]


def test_the_lens_says_and_draws_cells_and_windows(local_global, monkeypatch):
    lens = Lens(local_global, layer=DILATED, head=0, row=40, col=30)
    reading = lens._panels[0].read(40, 30, DILATED, 0)
    keys, tokens = reading.keys, reading.tokens
    assert (
        f"stage 1, block 2, dilated local-global, head 0: {len(keys)} cells, heaviest {keys[:, 2].max():.3g}"
        in repr(lens)
    )
    n = len(tokens.number)
    assert f"; then {n} tokens, {1 / n:.3g} each if all were alike; read most: orange {tokens.weight[0]:.3g}" in repr(
        lens
    )
    layers = lens.scene[0]["layers"]
    assert layers[1]["pooled"] == local_global[DILATED].window.tolist()
    assert "tokens" not in layers[1] and "pooled" not in layers[-1]  # full attention
    assert np.frombuffer(lens.shown[0]["pooled"], "<f4") == pytest.approx(reading.by_number)
    assert "every window is also one token" in picture.caption(lens._view)
    here = np.asarray(lens.picture(40))
    for part in ("tokens", "cells"):
        with monkeypatch.context() as patched:
            patched.setattr(picture, part, lambda *given, **options: None)
            assert (np.asarray(lens.picture(40)) != here).any()
    lens.layer = local_global.layers[-1]
    assert lens.shown[0]["pooled"] == b"" and "tokens" not in repr(lens)


def test_without_local_attention_there_are_windows_only(tmp_path):
    torch.manual_seed(0)
    lens = Lens(create_model("hlg_mini", local=False), torch.randn(3, 64, 64), layer=0, head=0)
    reading = lens._panels[0].read(40, 30, PLAIN, 0)
    assert len(reading.keys) == 0 and lens._panels[0].marks(reading) == "tokens"
    assert "head 0: 4 tokens, 0.25 each if all were alike" in repr(lens) and "no keys" not in repr(lens)
    lens.picture(30)
    lens.save(tmp_path / "lens.html", layers=0)


@pytest.mark.parametrize("layer", [PLAIN, DILATED])
def test_a_page_has_the_cells_and_every_window(local_global, layer):
    """Cells to half a 255th of the row's heaviest, windows fine enough for their order."""
    record = local_global[layer]
    rows = unpack(page.pack(page.pack_rows(record)))
    ends, places, n = rows["count"].cumsum(), rows["position"].reshape(-1, 2), record.everywhere.shape[2]
    (H, W), stride = record.query_shape, record.stride[0]
    for head in range(record.heads):
        for query in (0, W + 3, H * W - 1):
            row = head * H * W + query
            part = slice(ends[row] - rows["count"][row], ends[row])
            weight = rows["weight"][part] * (rows["scale"][row] / 255)
            found = by_position(np.column_stack([places[rows["step"][part].cumsum()], weight]))
            right = by_position(expected(record, query // W * stride, query % W * stride, head)[:-n])
            assert found == pytest.approx(right, abs=max(right.values()) / 509)
            pooled = rows["pooled"].reshape(-1, n)[row] * (rows["most"][row] / 65535)
            assert pooled == pytest.approx(record.everywhere[head, query].numpy(), abs=1e-5 * float(rows["most"][row]))


def test_a_query_of_setr_reads_the_whole_image():
    torch.manual_seed(0)
    (panel,) = make_panels(trace(create_model("setr_pup_mini"), torch.randn(3, 48, 64)))
    reading = panel.read(20, 30, "encoder.blocks.1.attn", "mean")
    assert len(reading.keys) == 6 * 8 and panel.marks(reading) == "cells" and reading.cell == (2, 3)
    assert reading.keys[:, :2].tolist() == panel.trace["encoder.blocks.1.attn"].cells().tolist()
    assert 0.9 < reading.keys[:, 2].sum() < 1  # the class token has the rest


def test_words_say_what_is_seen(lens):
    lens.row, lens.col, lens.layer, lens.head, lens.fade = 40, 60, DEFORMABLE, 2, 0.5
    x, y, weight = max(expected(lens.traces[0][DEFORMABLE], 40, 60, 2), key=lambda key: key[2])
    text = repr(lens)
    assert text.startswith(
        "DAT: Query (row 40, col 60), cell (row 2, col 3) of stage 3, block 2, deformable, head 2: 16 points, "
    )
    assert f"heaviest {weight:.3g} at (row {round(float(y), 1):g}, col {round(float(x), 1):g})" in text
    assert "Rollout of cell (row 2, col 3) of the last layer: heaviest 0.0" in text


class Spread(Record):
    """A layer whose query reads itself, in an image of 6 x 10 pixels with cells of 4 x 4: the last ones stick out."""

    kind, heads, query_shape, name, image_shape, stride = "dense", 1, (2, 3), "layer", (6, 10), (4.0, 4.0)

    def effective_matrix(self, head=0):
        return torch.eye(6) if head == 0 else None


def test_cells_that_stick_out_of_the_image_can_be_asked():
    record = Spread()
    lens = Lens(Trace(torch.zeros(3, 6, 10), torch.zeros(1), {"layer": record}))
    lens.row, lens.col = 5, 9
    assert lens.shown[0]["cell"] == [1, 2] and shown(lens).tolist() == [[9.5, 5.5, 1]]
    packed = page.pack_rows(record)
    assert packed["count"].tolist() == [1] * 6 and packed["step"].tolist() == list(range(6))


def test_matrices_are_made_once_for_a_layer(monkeypatch):
    made = []
    monkeypatch.setattr(Spread, "effective_matrix", lambda record, head=0: made.append(head) or torch.eye(6))
    record = Spread()
    panel = make_panels(Trace(torch.zeros(3, 6, 10), torch.zeros(1), {"layer": record}))[0]
    for row in range(6):
        panel.read(row, 2, "layer", 0)
    assert made == [0]
    assert not vars(record)  # the user's own record is left as it was


# --------------------------------------------------------------------------------------------------------- its traits


def test_traits_can_be_observed(lens):
    """Two groups of 16 points each."""
    seen = []
    lens.observe(lambda change: seen.append(len(change["new"][0]["keys"]) // 12), "shown")
    lens.layer = DEFORMABLE
    assert seen == [32] and lens.head == ("mean",)
    lens.head = 0
    assert seen == [32, 16]


def test_what_the_browser_sends_is_answered(lens):
    lens.set_state({"row": 8, "col": 100, "layer": [DEFORMABLE], "head": [7]})
    assert (lens.row, lens.col, lens.layer, lens.head) == (8, 100, (DEFORMABLE,), (7,))
    assert np.array_equal(shown(lens), expected(lens.traces[0][DEFORMABLE], 8, 100, 7))


def test_one_choice_stands_for_all_models(dat, cat):
    lens = Lens([dat, dat], cat, layer=DEFORMABLE, head=np.int64(5))
    assert lens.layer == (DEFORMABLE, DEFORMABLE) and lens.head == (5, 5)
    assert [one["name"] for one in lens.scene] == ["DAT 1", "DAT 2"]
    lens.head = [5, "mean"]
    assert (len(shown(lens, 0)), len(shown(lens, 1))) == (16, 32)


def test_a_layer_with_fewer_heads_shows_its_last(lens):
    lens.layer = DEFORMABLE
    lens.head = 7
    lens.layer = WINDOW
    assert lens.head == (1,) and lens.shown[0]["head"] == 1


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("row", 128, "row: expected an image pixel from 0 to 127, got 128"),
        ("col", -1, "col: expected an image pixel from 0 to 127, got -1"),
        ("row", float("nan"), "row: expected an image pixel"),
        ("fade", 1.5, "fade: expected 0 .attention. to 1 .rollout., got 1.5"),
        ("layer", "stages.9", "layer: DAT has no 'stages.9'; it has stages.0.blocks.0.attn, "),
        ("layer", [DEFORMABLE, DEFORMABLE], "layer: expected one, or one for each of 1 models"),
        ("head", 4, "head: expected 0 to 3 or 'mean' in stages.1.blocks.3.attn of DAT, got 4"),
        ("head", -1, "head: expected 0 to 3"),
        ("head", 0.5, "head: expected a whole number or 'mean', got 0.5"),
        ("head", True, "head: expected a whole number or 'mean', got True"),
    ],
)
def test_a_choice_that_is_not_there_is_refused(dat, cat, lens, name, value, message):
    before, keys = getattr(lens, name), shown(lens)
    with pytest.raises(ValueError, match=message):
        setattr(lens, name, value)
    assert getattr(lens, name) == before and np.array_equal(shown(lens), keys)
    with pytest.raises(ValueError, match=message):
        Lens(dat, cat, **{name: value})


def test_a_query_that_is_no_number_is_refused(lens):
    from traitlets import TraitError

    with pytest.raises(TraitError, match="row"):
        lens.row = "middle"


@pytest.mark.parametrize(
    "models, image, error, message",
    [
        ([], np.zeros((8, 8, 3), np.uint8), ValueError, "models: expected at least one model, got none"),
        (
            "dat_mini",
            np.zeros((8, 8, 3), np.uint8),
            TypeError,
            "models: expected a model, a trace or a list of them, got",
        ),
        ([1], np.zeros((8, 8, 3), np.uint8), TypeError, "models: expected torch modules or traces, got int"),
        (
            nn.Conv2d(3, 8, 3),
            np.zeros((8, 8, 3), np.uint8),
            ValueError,
            "model: no attention layer of Conv2d could be recorded",
        ),
        (nn.Identity(), None, TypeError, "image: expected a path, PIL image, uint8 array or tensor, got none"),
        (nn.Identity(), np.zeros((8, 8, 3)), TypeError, "uint8"),
        (nn.Identity(), "missing.jpg", FileNotFoundError, "missing.jpg"),
        (nn.Identity(), torch.zeros(3, 8, 8) / 0, ValueError, "image: expected finite values"),
    ],
)
def test_bad_models_and_images_are_refused(models, image, error, message):
    for make in (lambda: Lens(models, image), lambda: save_page(models, image, "never.html")):
        with pytest.raises(error, match=message):
            make()


def test_a_broken_picture_is_refused(dat, tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match="broken.png"):
        Lens(dat, file)


def test_arguments_that_are_not_there_are_refused(dat, cat):
    with pytest.raises(TypeError, match="zoom: not an argument of Lens; there are row, col, layer, head, fade"):
        Lens(dat, cat, zoom=2)


@pytest.mark.parametrize("kind", ["path", "PIL", "array", "grey", "bytes tensor", "tensor"])
def test_any_image_that_trace_takes(dat, cat, tmp_path, kind):
    array = np.array(cat)
    cat.save(tmp_path / "cat.png")
    given = {
        "path": tmp_path / "cat.png",
        "PIL": cat,
        "array": array,
        "grey": array[..., 0],
        "bytes tensor": torch.from_numpy(array).movedim(-1, 0),
        "tensor": trace(dat, cat).image,
    }[kind]
    lens = Lens(dat, given)
    picture = lens._panels[0].picture
    assert np.array_equal(picture, np.repeat(array[..., :1], 3, axis=2) if kind == "grey" else array)
    assert np.array_equal(shown(lens), shown(Lens(trace(dat, given))))


def test_the_photograph_is_shown_sharper_than_it_is_seen(dat):
    lens = Lens(dat, photograph("chelsea"))  # 300 x 451
    assert lens._panels[0].picture.shape == (300, 451, 3) and lens.scene[0]["shape"] == [128, 128]
    assert lens.scene[0]["aspect"] == pytest.approx(451 / 300)
    data = base64.b64decode(lens.scene[0]["picture"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(BytesIO(data)).size == (451, 300)


# ------------------------------------------------------------------------------------------------- without a kernel


def payload(file) -> dict:
    """What a saved page carries."""
    text = file.read_text()
    start = text.index('id="payload">') + len('id="payload">')
    return json.loads(text[start : text.index("</script>", start)])


def unpack(text: str) -> dict[str, np.ndarray]:
    data = gzip.decompress(base64.b64decode(text))
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    return {k: np.frombuffer(data, t, n, 4 + length + start) for k, (t, start, n) in header.items()}


@pytest.mark.parametrize("layer", [DEFORMABLE, WINDOW])
def test_packed_rows_are_the_keys_of_the_record(dat, cat, layer):
    """Positions exactly, weights to half a 255th of the row's heaviest."""
    record = trace(dat, cat)[layer]
    rows = unpack(page.pack(page.pack_rows(record)))
    ends = rows["count"].cumsum()
    places = rows["position"].reshape(-1, 2)
    (H, W), stride = record.query_shape, record.stride[0]
    assert len(ends) == record.heads * H * W
    for head in (0, record.heads - 1):
        for query in (0, W + 3, H * W - 1):
            row = head * H * W + query
            part = slice(ends[row] - rows["count"][row], ends[row])
            weight = rows["weight"][part] * (rows["scale"][row] / 255)
            found = by_position(np.column_stack([places[rows["step"][part].cumsum()], weight]))
            right = by_position(expected(record, query // W * stride, query % W * stride, head))
            assert found == pytest.approx(right, abs=max(right.values()) / 509)


def test_a_saved_page_stands_alone_and_opens_where_the_lens_is(lens, tmp_path):
    lens.row, lens.col, lens.fade = 40, 60, 0.25
    file = lens.save(tmp_path / "lens.html")
    state = payload(file)["state"]
    assert (state["row"], state["col"], state["fade"]) == (40, 60, 0.25)
    assert [layer["name"] for layer in state["scene"][0]["layers"]] == lens.traces[0].layers
    text = file.read_text()
    for outside in ("http:", "https:", "import ", "src=", "href=", "url("):
        assert outside not in text, outside
    assert file.stat().st_size < 1_500_000


def test_three_small_models_fit_a_page(dat, cat, tmp_path):
    file = save_page([dat, dat, dat], cat, tmp_path / "three.html")
    assert file.stat().st_size <= page.LARGEST
    assert payload(file)["state"]["layer"] == ["stages.1.blocks.3.attn"] * 3


def test_layers_to_keep_are_names_or_patterns(lens, tmp_path):
    file = lens.save(tmp_path / "a.html", layers=["stages.0.*", DEFORMABLE])
    found = payload(file)
    assert list(found["rows"][0]) == ["stages.0.blocks.0.attn", WINDOW, DEFORMABLE]
    assert found["state"]["layer"] == [WINDOW] and found["state"]["head"] == ["mean"]  # the one shown is not kept
    with pytest.raises(ValueError, match="layers: none of DAT fits 'stage9.*'; it has stages.0"):
        lens.save(tmp_path / "b.html", layers="stage9.*")


def test_a_page_that_would_be_too_large_is_not_written(lens, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 500_000)
    with pytest.raises(
        ValueError, match=r"layers: the page would take 0\.\d MB, at most 0.5 MB; keep fewer.*attn of DAT"
    ):
        lens.save(tmp_path / "large.html")
    assert not (tmp_path / "large.html").exists()
    lens.save(tmp_path / "small.html", layers="stages.2.*")


def test_text_in_a_page_cannot_end_its_script(dat, cat, tmp_path):
    file = save_page({"</script><b>": dat}, cat, tmp_path / "a.html", layers=DEFORMABLE)
    assert payload(file)["state"]["scene"][0]["name"] == "</script><b>"
    assert "<b>" not in file.read_text()


def test_a_saved_notebook_has_a_picture_and_words(dat, cat):
    lens = Lens([dat, dat], cat)
    data, _ = lens._repr_mimebundle_()
    picture = Image.open(BytesIO(base64.b64decode(data["image/png"])))
    assert picture.size[0] == 1200 and len(data["image/png"]) < 400_000
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ([0xE8, 0x11, 0x2D], [253, 231, 37]):  # the star and the heaviest key, in a palette of few colours
        assert (np.abs(pixels - colour).max(axis=1) < 12).sum() > 50
    assert data["text/plain"] == repr(lens)
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == lens.model_id


def test_the_picture_is_of_the_present_query(dat, cat):
    """The heaviest key is yellow where it lies, and the star where the query is."""
    lens = Lens(dat, cat, layer=DEFORMABLE, head=0)
    pictures = []
    for row, col in ((16, 16), (100, 100)):
        lens.row, lens.col = row, col
        pictures.append(np.asarray(lens.picture()).astype(int))
    red = [np.argwhere(np.abs(picture - [0xE8, 0x11, 0x2D]).sum(axis=2) < 9) for picture in pictures]
    red = [places[places[:, 0] < 0.8 * len(pictures[0])].mean(axis=0) for places in red]  # not that of the key below
    panel = 5.5 * 160  # pixels
    assert red[1] - red[0] == pytest.approx([84 / 128 * panel, 84 / 128 * panel], abs=4)
    assert not np.array_equal(*pictures)


@pytest.mark.slow
def test_an_executed_notebook_embeds_the_picture(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    source = (
        "import dynattn\nfrom dynattn.data import photograph\nfrom dynattn.widgets import Lens\n"
        "Lens(dynattn.create_model('dat_mini', pretrained=True), photograph('chelsea'))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= set(output.data)
    assert Image.open(BytesIO(base64.b64decode(output.data["image/png"]))).size[0] == 1200
    nbformat.validate(notebook)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_without_anywidget_the_lens_says_what_is_missing_and_pages_are_written(tmp_path):
    code = f"""
import sys
sys.modules["anywidget"] = None
import dynattn
from dynattn.widgets import save_page
file = save_page(dynattn.create_model("dat_mini"), dynattn.data.photograph("chelsea"), {str(tmp_path / "a.html")!r})
print(file.stat().st_size > 100000)
try:
    from dynattn.widgets import Lens
except ImportError as error:
    print(error)
"""
    lines = run(code).splitlines()
    assert lines[0] == "True" and "pip install -e '.[notebooks]'" in lines[1]


@pytest.mark.slow
def test_importing_the_widgets_is_light():
    out = run(
        "import sys, dynattn.widgets; print([m for m in ('torch', 'anywidget', 'matplotlib') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_a_panel_has_the_picture_that_was_seen_if_there_is_no_other(dat, cat):
    traced = trace(dat, cat)
    (panel,) = make_panels(traced)
    assert isinstance(panel, Panel) and np.array_equal(panel.picture, to_rgb(traced.image))
    assert isinstance(traced[DEFORMABLE].keys(0, 0), Keys)
