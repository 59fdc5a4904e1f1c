"""The trace: what is recorded, that it explains the outputs, where it lies in the image, and that nothing is left."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DOUBLE, normal
from PIL import Image
from torch import nn

import dynattn
from dynattn import core, tracing
from dynattn.data import to_input
from dynattn.mechanisms.baselines import SpatialReductionAttention
from dynattn.mechanisms.deformable import DeformableAttention
from dynattn.mechanisms.deformable_detr import DeformableDetrAttention
from dynattn.mechanisms.window import WindowAttention
from dynattn.models.dat import DAT
from dynattn.tracing import Keys, Record, Trace, trace


def shaken(model: nn.Module) -> nn.Module:
    """A float64 model whose tables, biases and offsets are far from zero."""
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("table", "bias")):
                parameter.normal_(std=0.5)
            elif "offset.pointwise" in name:
                parameter.normal_()
    return model


def small_dat(**options) -> nn.Module:
    """Two stages of strides 4 and 8, on 32 x 32 images unless told otherwise."""
    size = dict(img_size=32, num_classes=3, dims=(8, 16), depths=(2, 4), heads=(2, 4), groups=(1, 2), window=4)
    return shaken(DAT(**size | dict(deformable_stages=(2,), strides=(1, 2), kernels=(3, 3), clamp=True) | options))


def alone(layer: nn.Module, shape: tuple[int, int] = (6, 5)) -> tracing.Record:
    """The record of a layer that is the whole model, on an image of one channel map."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attn = nn.Conv2d(3, 8, 1), layer

        def forward(self, x):
            return self.attn(self.embed(x).movedim(1, -1)).mean((1, 2))

    return trace(shaken(Model()), normal(3, *shape))["attn"]


class Given(Record):
    """A record whose effective matrices are given (heads, L, S)."""

    kind = "given"

    def __init__(self, matrices, query_shape, stride: float = 1.0):
        self.matrices, self.query_shape, self.heads = matrices, query_shape, len(matrices)
        self.stride, self.image_shape = (stride, stride), tuple(int(n * stride) for n in query_shape)

    def effective_matrix(self, head: int = 0):
        return self.matrices[head]


# ------------------------------------------------------------------------------------------------------- what is kept


def test_every_attention_layer_by_its_name():
    model = small_dat()
    t = trace(model, normal(3, 32, 32))
    paths = [
        name for name, module in model.named_modules() if isinstance(module, WindowAttention | DeformableAttention)
    ]
    assert t.layers == paths and paths[0] == "stages.0.blocks.0.attn" and len(t) == 6
    assert [r.kind for r in t] == ["window", "window", "window", "deformable", "window", "deformable"]
    assert [(r.query_shape, r.heads, r.stride) for r in t] == 2 * [((8, 8), 2, (4, 4))] + 4 * [((4, 4), 4, (8, 8))]
    assert [r.name for r in t.of_kind("deformable")] == ["stages.1.blocks.1.attn", "stages.1.blocks.3.attn"]
    assert "4 x 4 queries, 4 heads" in repr(t[paths[-1]]) and paths[-1] in repr(t[paths[-1]])


def test_image_and_logits_are_the_models():
    model, image = small_dat(), normal(3, 32, 32)
    t = trace(model, image)
    torch.testing.assert_close(t.image, image.float())
    torch.testing.assert_close(t.logits, model(image[None])[0])


def test_records_carry_no_graph():
    t = trace(small_dat(), normal(3, 32, 32))
    tensors = [value for record in t for value in vars(record).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 20 and not any(tensor.requires_grad for tensor in tensors)


def test_deformable_record_is_what_the_layer_computed():
    """DAT-7: points and references of the layer, for groups, in the trace's order."""
    layer = DeformableAttention(8, 4, 2, (6, 5), kernel=3, stride=2)
    seen = []
    sample = layer.sample
    layer.sample = lambda x, q: seen.append(sample(x, q)) or seen[-1]
    record = alone(layer)
    assert torch.equal(record.points, seen[0][1][0]) and torch.equal(record.references, seen[0][2])
    assert (
        record.points.shape == (2, 9, 2) and record.references.shape == (9, 2) and record.attention.shape == (4, 30, 9)
    )
    assert [record.group(head) for head in range(4)] == [0, 0, 1, 1]
    torch.testing.assert_close(record.attention @ record.v, record.z)


# ---------------------------------------------------------------------------------------------- the effective matrix

EXACT = [
    lambda: DeformableAttention(8, 4, 1, (6, 5), kernel=3, clamp=True),
    lambda: DeformableAttention(8, 4, 1, (4, 4), kernel=3, stride=2, clamp=True),
    lambda: DeformableAttention(8, 4, 2, (6, 5), kernel=3, offset_range=0.0, reference="corner"),
    lambda: DeformableAttention(8, 4, 1, (6, 5), kernel=3, position_bias="fixed", clamp=True),
    lambda: DeformableAttention(8, 4, 1, (4, 4), kernel=3, position_bias="fixed", stride=2, clamp=True),
    lambda: DeformableAttention(8, 4, 1, (6, 5), kernel=3, position_bias=None, clamp=True),
    lambda: DeformableAttention(8, 4, 2, (6, 5), kernel=3, offsets=False),
    lambda: DeformableAttention(8, 4, 2, (6, 5), kernel=3, offsets=False, stride=2),
    lambda: WindowAttention(8, 4, 3),
    lambda: WindowAttention(8, 4, 4, 2),
    lambda: WindowAttention(8, 4, 7, 3),
    lambda: DeformableDetrAttention(8, 4, 3),
]


@pytest.mark.parametrize("build", EXACT)
@pytest.mark.parametrize("shape", [(6, 5), (7, 4), (1, 3)])
def test_effective_matrix_explains_the_output(build, shape):
    """`exact` means A_eff @ value == output in every head."""
    record = alone(build(), shape)
    assert record.exact
    for head in range(record.heads):
        matrix = record.effective_matrix(head)
        assert matrix.shape == (shape[0] * shape[1],) * 2 and (matrix >= 0).all()
        torch.testing.assert_close(matrix @ record.value(head), record.output(head), rtol=1e-10, atol=1e-12)
        assert record.rest(head) < 1e-12
        if not isinstance(record, dynattn.mechanisms.deformable_detr.DeformableDetrRecord):
            torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=DOUBLE))
            torch.testing.assert_close(record.weights(head).sum(1), torch.ones(len(matrix), dtype=DOUBLE))


INEXACT = [
    lambda: DeformableAttention(8, 4, 1, (6, 5), kernel=3, offset_range=9.0),  # points leave the map
    lambda: DeformableAttention(8, 4, 2, (6, 5), kernel=3, clamp=True),  # a head has values from two groups' points
    lambda: DeformableAttention(8, 4, 1, (6, 5), kernel=3, position_bias="dwconv", clamp=True),
]


@pytest.mark.parametrize("build", INEXACT)
def test_what_is_not_explained_is_told(build):
    """Where `exact` is False, `rest` says how large the part is that A_eff leaves out."""
    record = alone(build())
    assert not record.exact
    for head in range(record.heads):
        left = record.output(head) - record.effective_matrix(head) @ record.value(head)
        assert record.rest(head) == pytest.approx((left.norm() / record.output(head).norm()).item())
        assert record.rest(head) > 1e-6
        torch.testing.assert_close(record.weights(head).sum(1), torch.ones(30, dtype=DOUBLE))


def test_rest_of_points_outside_is_what_the_border_lost():
    """Zeros outside the map get the bias of v as well: A_eff misses exactly that."""
    layer = DeformableAttention(8, 4, 1, (6, 5), kernel=3, offset_range=9.0)
    record = alone(layer)
    for head in range(4):
        lost = 1 - record.effective_matrix(head).sum(1, keepdim=True)
        bias = layer.v.bias.reshape(4, 2)[head]
        explained = record.effective_matrix(head) @ record.value(head) + lost * bias
        torch.testing.assert_close(explained, record.output(head))


def test_values_of_a_head_come_from_all_groups():
    """DAT-7, DAT-9: A_eff of every group, on the channels of that group read at its points, explains everything."""
    layer = DeformableAttention(8, 4, 2, (6, 5), kernel=3, clamp=True)
    inputs = []
    layer.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
    record = alone(layer)
    x = inputs[0].reshape(30, 8)
    for head in range(4):
        weight, bias = (t.reshape(4, 2, *t.shape[1:])[head] for t in (layer.v.weight, layer.v.bias))
        reads = [record.attention[head] @ record.reads(g) for g in range(2)]
        parts = [reads[g] @ x[:, 4 * g : 4 * g + 4] @ weight[:, 4 * g : 4 * g + 4].T for g in range(2)]
        torch.testing.assert_close(sum(parts) + bias, record.output(head))


def test_spatial_reduction_shares_a_key_among_its_cells():
    """Formally explained, yet not exact: what stands for the values is the reduced token, repeated."""
    record = alone(SpatialReductionAttention(8, 4, 2), (3, 5))
    matrix = record.effective_matrix(1)
    assert not record.exact and record.rest(1) < 1e-12
    torch.testing.assert_close(matrix.sum(1), torch.ones(15, dtype=DOUBLE))
    assert torch.equal(matrix[:, 0], matrix[:, 6]) and not torch.equal(matrix[:, 0], matrix[:, 2])
    torch.testing.assert_close(matrix[:, 14], record.weights(1)[:, 5])  # the last token was made of one cell


# -------------------------------------------------------------------------------------------------- keys in the image


def spread(keys: Keys, record: Record) -> torch.Tensor:
    """The keys' weights on the cells of the map, read bilinearly where the keys are."""
    H, W = record.query_shape
    cells = (keys.xy.flip(-1) + 0.5) / torch.tensor(record.stride) - 0.5
    points = 2 * cells / torch.tensor([max(H - 1, 1), max(W - 1, 1)]) - 1
    return keys.weight @ core.bilinear_weights(points.to(keys.weight), (H, W))


def test_keys_agree_with_the_effective_matrix():
    """The rows of A_eff are the keys' weights, spread over the cells that each key is read from."""
    models = [
        small_dat(),
        small_dat(blocks=(("deformable_detr",), ("deformable", "shifted")), detr_points=(3, 3)),
        small_dat(offsets=False, strides=(1, 1), groups=(1, 1)),
    ]
    for t in (trace(model, normal(3, 30, 25)) for model in models):
        for record in t:
            for row, col, head in ((0, 0, 0), (29, 24, record.heads - 1), (13.4, 7.5, 1)):
                keys = record.keys(row, col, head)
                assert keys.xy.shape == (len(keys.weight), 2) and (keys.weight >= 0).all()
                assert keys.weight.sum().item() == pytest.approx(1)
                expected = record.effective_matrix(head)[record.query(row, col)]
                torch.testing.assert_close(spread(keys, record), expected, rtol=1e-5, atol=1e-6)


def test_image_positions_by_hand():
    """Stride 16 on 224 pixels: cells, reference points of both grids, the corners of the image."""
    record = Given(torch.eye(196)[None], (14, 14), 16.0)
    cells = record.cells().reshape(14, 14, 2)
    assert cells[0, 0].tolist() == [7.5, 7.5] and cells[2, 5].tolist() == [87.5, 39.5] and cells[13, 13, 0] == 215.5
    corner = record.to_image(core.to_pixels(core.grid_points((14, 14), "corner", torch.ones(1)), (14, 14)))
    torch.testing.assert_close(corner, record.cells())
    centre = record.to_image(core.to_pixels(core.grid_points((14, 14), "centre", torch.ones(1)), (14, 14)))
    assert centre[0, 0].item() == pytest.approx((0.5 * 13 / 14 + 0.5) * 16 - 0.5, abs=1e-4)  # 14.93, not 7.5
    assert record.query(0, 0) == 0 and record.query(15, 15) == 0 and record.query(15.5, 0) == 14
    assert record.query(223, 223) == 195 and record.query(0, 223.5) == 13 and record.query(-0.5, 16) == 1
    keys = record.keys(100, 50)
    assert keys.xy.tolist() == [[55.5, 103.5]] and keys.weight.tolist() == [1]


def test_points_and_references_in_the_image():
    """DAT-7: without offsets the points of a corner grid stand on the centres of the cells."""
    t = trace(small_dat(reference="corner", offset_range=0.0, strides=(1, 1)), normal(3, 32, 32))
    record = t["stages.1.blocks.1.attn"]
    for xy in (record.points_xy(0), record.points_xy(1), record.references_xy()):
        torch.testing.assert_close(xy, record.cells().double())
    assert record.cells()[1].tolist() == [11.5, 3.5]  # the second cell of the first row: x = 11.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (33, 31), (37, 18)])
def test_odd_image_sizes(shape):
    """Maps are the ceiling of the halves; every pixel has a query, every key a place that belongs to the map."""
    t = trace(small_dat(), normal(3, *shape))
    assert t.image.shape == (3, *shape)
    for record in t:
        stride = record.stride[0]
        assert record.query_shape == tuple(-(-side // int(stride)) for side in shape)
        for row, col in ((0, 0), (shape[0] - 1, shape[1] - 1)):
            keys = record.keys(row, col)
            assert keys.weight.sum().item() == pytest.approx(1)
            last = (torch.tensor(record.query_shape).flip(0) - 0.5) * stride - 0.5
            assert (keys.xy >= stride / 2 - 0.5 - 1e-6).all() and (keys.xy <= last + 1e-6).all()
    heat = t.rollout(shape[0] // 2, shape[1] // 2)
    assert heat.shape == shape and heat.sum().item() == pytest.approx(1)


# -------------------------------------------------------------------------------------------------------------- rollout


def test_rollout_by_hand_in_one_stage():
    """Two layers, two heads: half stays, half moves along the mean of the heads, from the last layer to the first."""
    first, last = torch.rand(2, 4, 4).softmax(-1), torch.rand(2, 4, 4).softmax(-1)
    t = Trace(torch.zeros(3, 2, 2), torch.zeros(1), {"a": Given(first, (2, 2)), "b": Given(last, (2, 2))})
    steps = [(torch.eye(4) + matrices.mean(0)) / 2 for matrices in (last, first)]
    torch.testing.assert_close(t.rollout(1, 0).flatten(), (steps[0] @ steps[1])[2])


def test_rollout_by_hand_through_stages():
    """A 1 x 1 stage over a 2 x 2 stage over 4 x 4 pixels: every cell hands its mass to the cells it covers."""
    fine, coarse = torch.rand(1, 4, 4).softmax(-1), torch.ones(1, 1, 1)
    records = {"fine": Given(fine, (2, 2), 2.0), "coarse": Given(coarse, (1, 1), 4.0)}
    heat = Trace(torch.zeros(3, 4, 4), torch.zeros(1), records).rollout(3, 3)
    step = (torch.full((4,), 0.25) @ (torch.eye(4) + fine[0]) / 2).reshape(2, 2)
    torch.testing.assert_close(heat, step.repeat_interleave(2, 0).repeat_interleave(2, 1) / 4)


def test_rollout_ignores_tokens_without_a_place_and_lost_mass():
    """A class token comes last among the sources; rows that sum to less than 1 are made up for."""
    matrix = torch.tensor([[[0.5, 0.1, 0.4], [0.2, 0.2, 0.6]]])
    heat = Trace(torch.zeros(3, 1, 2), torch.zeros(1), {"a": Given(matrix, (1, 2))}).rollout(0, 0)
    torch.testing.assert_close(heat, torch.tensor([[0.75, 0.05]]) / 0.8)


def test_rollout_of_models():
    for model in (small_dat(), small_dat(clamp=False, offset_range=9.0), small_dat(early="sra", sra_ratios=(4, 2))):
        t = trace(model, normal(3, 40, 28))
        for row, col in ((0, 0), (39, 27), (17, 5)):
            heat = t.rollout(row, col)
            assert heat.shape == (40, 28) and (heat >= 0).all() and heat.sum().item() == pytest.approx(1, abs=1e-5)
            assert heat[row, col] > heat.mean()  # half of everything stays where it is


# -------------------------------------------------------------------------------------------------------- timm's Swin


def swin(size: int, **options) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    shape = dict(
        img_size=size, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=3
    )
    return shaken(SwinTransformer(**shape | options))


@pytest.mark.parametrize("fused", [True, False])
def test_timm_swin_at_its_own_size(fused):
    model = swin(64)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    t = trace(model, normal(3, 64, 64))
    assert t.layers == [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in range(2)]
    assert [(r.kind, r.query_shape, r.window, r.shift) for r in t] == [
        ("window", (16, 16), (4, 4), (0, 0)),
        ("window", (16, 16), (4, 4), (2, 2)),
        ("window", (8, 8), (4, 4), (0, 0)),
        ("window", (8, 8), (4, 4), (2, 2)),
    ]
    for record in t:
        assert record.exact and max(record.rest(head) for head in range(record.heads)) < 1e-10
        torch.testing.assert_close(record.weights(1).sum(1), torch.ones(len(record.weights(1)), dtype=DOUBLE))
    keys = t["layers.0.blocks.1.attn"].keys(0, 0)  # the corner that the roll has cut off: 2 x 2 cells of 4 pixels
    assert {tuple(xy) for xy in keys.xy.tolist()} == {(1.5, 1.5), (5.5, 1.5), (1.5, 5.5), (5.5, 5.5)}


def test_timm_swin_that_reads_its_padding_says_so():
    """Maps of 10 and 5 in windows of 4: queries spend attention on padding, which is no part of the image."""
    t = trace(swin(40), normal(3, 40, 40))
    assert [r.exact for r in t] == [False, True, False, False]  # in the second, the mask of the shift hides all padding
    assert t["layers.0.blocks.1.attn"].rest(0) < 1e-10
    for record in (record for record in t if not record.exact):
        missing = 1 - record.weights(0).sum(1)
        assert missing.min() > -1e-12 and missing.max() > 0.1
        assert record.rest(0) > 1e-3
        keys = record.keys(20, 20)
        torch.testing.assert_close(spread(keys, record), record.effective_matrix(0)[record.query(20, 20)])


def test_timm_swin_with_padding_and_no_bias_is_explained_after_all():
    """Padding has the value 0 then, so what the image's tokens give is everything: the cells are the right ones."""
    model = swin(40)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.zero_()
    for record in trace(model, normal(3, 40, 40)):
        assert max(record.rest(head) for head in range(record.heads)) < 1e-10


def test_timm_swin_smaller_than_its_window():
    t = trace(swin(24, window_size=8), normal(3, 24, 24))
    assert [(r.window, r.shift, r.exact) for r in t] == 2 * [((6, 6), (0, 0), True)] + 2 * [((3, 3), (0, 0), True)]
    assert max(record.rest(0) for record in t) < 1e-10


def test_a_trace_imports_every_mechanism(monkeypatch):
    """Adapters are there for a model of timm's even when nobody has used a mechanism yet."""
    asked, load = [], tracing.import_module
    monkeypatch.setattr(tracing, "import_module", lambda name: asked.append(name) or load(name))
    trace(swin(16), normal(3, 16, 16))
    files = Path(dynattn.mechanisms.__file__).parent.glob("[a-z]*.py")
    assert {f"dynattn.mechanisms.{file.stem}" for file in files} <= set(asked)


# ------------------------------------------------------------------------------------------------ images of all kinds


def test_pictures_are_brought_to_the_models_size(tmp_path):
    model = small_dat()
    array = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    sources = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(array),
        array,
        torch.from_numpy(array).movedim(-1, 0),
    ]
    expected = to_input(array, 32)[0]
    for source in sources:
        t = trace(model, source)
        assert torch.equal(t.image, expected) and torch.equal(t.logits, model(expected[None].double())[0])
    assert trace(model, array[..., 0]).image.shape == (3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_normalised_tensors_are_taken_as_they_are(dtype):
    image = normal(3, 20, 50).to(dtype)
    for source in (image, image[None]):
        torch.testing.assert_close(trace(small_dat(), source).image, image.float())


def test_pictures_keep_their_size_where_the_model_has_none():
    array = np.zeros((20, 51, 3), dtype=np.uint8)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attn = nn.Conv2d(3, 8, 1), WindowAttention(8, 2, 4)

        def forward(self, x):
            return self.attn(self.embed(x).movedim(1, -1)).mean((1, 2))

    assert trace(Model(), array).image.shape == (3, 20, 51)


# --------------------------------------------------------------------------------------------------- nothing is left


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def states(model: nn.Module) -> tuple[list[bool], dict]:
    return [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("build", [small_dat, lambda: dynattn.create_model("swin_mini", img_size=64).double()])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(build, fails):
    """Its hooks, the mode of every module (one is frozen in eval), parameters, running statistics and gradients."""
    model = build().train()
    list(model.children())[1].eval()
    last = list(model.modules())[-1]
    if fails:
        last.register_forward_hook(lambda *_: 1 / 0)
    before, modes_and_state = hooks(model), states(model)
    if fails:
        with pytest.raises(ZeroDivisionError):
            trace(model, normal(3, 64, 64))
    else:
        trace(model, normal(3, 64, 64))
    assert hooks(model) == before and not tracing.recording()
    modes, state = states(model)
    assert modes == modes_and_state[0] and True in modes and False in modes
    assert all(torch.equal(value, state[key]) for key, value in modes_and_state[1].items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_goes_on_after_a_trace():
    """A trace between two steps changes neither outputs nor gradients."""
    model, image = small_dat().train(), normal(1, 3, 32, 32)
    found = []
    for between in (lambda: None, lambda: trace(model, image)):
        between()
        torch.manual_seed(1)
        loss = model(image).square().sum()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_recorded_without_a_trace():
    seen = []
    keep = tracing.keep
    try:
        tracing.keep = lambda *arguments: seen.append(arguments)
        small_dat()(normal(1, 3, 32, 32))
        assert not seen
    finally:
        tracing.keep = keep


def test_model_without_attention_is_refused():
    for model, size in ((nn.Conv2d(3, 2, 1), 4), (nn.Identity(), 4)):  # the second has not even a parameter
        with pytest.raises(ValueError, match="model: no attention layer of .* could be recorded; none ran"):
            trace(model, normal(3, size, size))
    with pytest.raises(ValueError, match="no recorded attention layer"):
        Trace(torch.zeros(3, 4, 4), torch.zeros(1), {}).rollout(0, 0)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_questions(unchecked):
    t = trace(small_dat(), normal(3, 32, 30))
    record = t["stages.1.blocks.1.attn"]
    with pytest.raises(KeyError, match=r"no layer 'stages.9.attn'; there are: stages.0.blocks.0.attn, "):
        t["stages.9.attn"]
    for ask in (t.rollout, record.keys):
        for row, col, message in [
            (32, 0, r"row: expected an image pixel from 0 to 31, got 32"),
            (-1, 0, r"row: expected an image pixel from 0 to 31, got -1"),
            (0, 30, r"col: expected an image pixel from 0 to 29, got 30"),
            (0, float("nan"), r"col: expected an image pixel from 0 to 29, got nan"),
        ]:
            with pytest.raises(ValueError, match=message):
                ask(row, col)
    for record in t:
        for head in (record.heads, -1, 0.5, "0"):
            for ask in (record.effective_matrix, record.weights, record.value, record.output, record.rest):
                with pytest.raises(ValueError, match=rf"head: expected 0 to {record.heads - 1}, got {head!r}"):
                    ask(head)
            with pytest.raises(ValueError, match="head: expected"):
                record.keys(0, 0, head)


BAD = [
    ("model", torch.zeros(3, 4, 4), TypeError, r"model: expected a torch module, got str"),
    (
        None,
        torch.zeros(2, 3, 4, 4),
        ValueError,
        r"image: expected a tensor \(3, H, W\) or \(1, 3, H, W\), got \(2, 3, 4, 4\)",
    ),
    (None, torch.zeros(4, 4), ValueError, r"image: expected a tensor"),
    (
        None,
        torch.zeros(3, 4, 4).int(),
        TypeError,
        r"image: expected a floating \(normalised\) or uint8 .* tensor, got torch.int32",
    ),
    (None, torch.full((3, 4, 4), torch.nan), ValueError, r"image: expected finite values"),
    (None, np.zeros((4, 4, 3)), TypeError, r"image: expected an array of dtype uint8"),
    (None, 7, TypeError, r"image: expected a path, bytes, a binary file, a PIL image or a uint8 array, got int"),
    (None, "no/such/file.png", FileNotFoundError, r"no/such/file.png"),
]


@pytest.mark.parametrize("model, image, error, message", BAD)
def test_bad_input(unchecked, model, image, error, message):
    with pytest.raises(error, match=message):
        trace(model or small_dat(), image)
