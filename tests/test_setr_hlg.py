"""SETR-PUP-HLG: names and counts of the published code, its decoder restated, checkpoints, sizes, arguments."""

import csv
import math
import subprocess
import sys
import textwrap

import deterministic
import published_hlg
import published_setr_hlg
import pytest
import timm
import torch
from helpers import normal
from published_setr_hlg import MEASURED
from torch import nn

import dynattn
from dynattn import cost, official
from dynattn.dense import resize
from dynattn.models.setr_hlg import VARIANTS, DecoderLayer, FusionHead, Groups, SharedAttention
from dynattn.training import get_recipe

NAMES = list(MEASURED)
SMALL = dict(
    img_size=64,
    num_classes=5,
    dims=(48, 48, 96),
    depths=(1, 2, 1),
    heads=(2, 2, 4),
    window=4,
    channels=48,
    decoder_heads=3,
    aux_stage=3,
    aux_channels=8,
    decoder_window=7,
    groups=8,
)


def small(**options) -> nn.Module:
    """A model that runs in milliseconds, with deterministic weights in float64."""
    return deterministic.filled(dynattn.create_model("setr_pup_hlg_mini", **SMALL | options))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64, **options) -> torch.Tensor:
    return model(deterministic.image(2, size), **options)


def on_meta(name: str, **options) -> nn.Module:
    """A model without numbers."""
    with torch.device("meta"):
        return dynattn.create_model(name, **options)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# -------------------------------------------------------------------------------------------------- the published code


def test_parameters_of_setr_pup_hlg():
    """As printed, with one stem convolution."""
    for name, (_, _, parameters, *_) in MEASURED.items():
        assert count(on_meta(name)) == parameters
        assert count(on_meta(name, num_classes=19)) == parameters - (150 - 19) * (512 + 1 + 256 + 1)
    assert [parameters // 10**6 for _, _, parameters, *_ in MEASURED.values()] == [37, 61, 100]


@pytest.mark.slow
def test_multiply_adds_of_setr_pup_hlg(unchecked):
    """The code's, which are of padding too, are hardly more."""
    for name, (_, _, _, macs, published) in MEASURED.items():
        for (classes, size), ours, theirs in zip(((150, 512), (19, 768)), macs, published, strict=True):
            counted = cost.count(on_meta(name, num_classes=classes, img_size=size), size)
            assert counted.macs / 1e9 == pytest.approx(ours, abs=0.01)
            assert 0.98 * theirs < counted.macs / 1e9 < theirs


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_of_setr_pup_hlg(name, shared):
    """Every entry of the code as it lies in its repository, and as many parameters."""
    file, options, *_ = MEASURED[name]
    with (shared / f"keys_setr_pup_hlg_{file}.tsv").open() as lines:
        known = {key: shape for key, shape, _ in csv.reader(lines, delimiter="\t")}
    model = on_meta(name, stems=2, **options)
    own, entries = model.state_dict(), model.published_entries()
    found = {published_setr_hlg.full(entries[key].name): "x".join(map(str, value.shape)) for key, value in own.items()}
    assert found == known and len(found) == len(own)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learned = [shape for key, shape in known.items() if not key.endswith(statistics)]
    assert count(model) == sum(math.prod(map(int, shape.split("x"))) for shape in learned)


@pytest.mark.parametrize("positions", ["released", "centre"])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
def test_the_decoder_restated_by_the_published_names(positions, size):
    """From a checkpoint through `load_official`, window by window. HLG-5, HLG-6, HLG-7, HLG-8."""
    model = small(positions=positions)
    state = published_setr_hlg.checkpoint(model)
    dynattn.load_official(model, {"state_dict": state})
    images = deterministic.image(1, size)
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
        main, aux = published_setr_hlg.restated(state, maps, 3, 7, 8, positions == "centre")
        ours, (other,) = model(images, aux=True)
    torch.testing.assert_close(ours, main, rtol=0, atol=1e-10)
    torch.testing.assert_close(other, aux, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (7, 3), (11, 17)], ids=str)
@pytest.mark.parametrize("positions", ["released", "centre"])
def test_windows_of_the_decoder(shape, positions):
    """Plain windows and a fixed number of dilated ones, on maps that they do not divide."""
    for kind in (dict(window=4), dict(groups=4)):
        dilated = "groups" in kind
        attn = SharedAttention(48, 3, 4, dilated=dilated, groups=dilated, positions=positions)
        layer = deterministic.filled(DecoderLayer(attn, 0.0))
        named = small().published_name
        state = {
            named(f"decoder.layers.0.{key}").removeprefix("decode_head.decode_transformer.0."): value
            for key, value in layer.state_dict().items()
        }
        x = normal(1, 48, *shape)
        windows = published_setr_hlg.windows_of(shape, **kind)
        with torch.no_grad():
            expected = published_setr_hlg.decoder_layer(state, x, 3, windows, positions == "centre")
            found = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_every_dilated_window_of_a_fixed_number_has_a_cell():
    for shape in ((1, 1), (2, 9), (17, 8), (31, 33)):
        layout = Groups(shape, 8, True)
        cells = layout.cut(torch.ones(1, *shape, 1))
        assert layout.grid == tuple(min(8, side) for side in shape)
        assert cells.shape[0] == math.prod(layout.grid) and (cells.sum((1, 2)) > 0).all()
        x = normal(2, *shape, 3)
        assert torch.equal(layout.join(layout.cut(x)), x)


def test_loops_and_torch_agree_in_the_decoder():
    """Outputs and every gradient."""
    x, slopes = normal(1, 3, 5, 48).requires_grad_(), []
    for dilated in (False, True):
        module = SharedAttention(48, 3, 2, dilated=dilated, groups=dilated)
        module = deterministic.filled(module)
        for impl in ("loops", "torch"):
            with dynattn.implementation(impl):
                out = module(x)
            slopes.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
        for a, b in zip(*slopes[-2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NAMES),
        ("setr_pup_hlg_small", dict(stems=2, num_classes=19)),
        ("setr_pup_hlg_medium", dict(depths=(2, 2, 14, 2), stems=2)),
        ("setr_pup_hlg_large", dict(depths=(2, 2, 14, 2), aux=False)),
    ],
)
def test_a_checkpoint_says_which_setr_pup_hlg_it_is_of(name, options):
    """Though it has all entries of an HLG as well."""
    model = on_meta(name, **options)
    entries = model.published_entries()
    state = {entries[key].name: value for key, value in model.state_dict().items()}
    assert official.identify(state) == (name, options)
    backbone = {key: value for key, value in state.items() if not key.startswith(("decode_head", "auxiliary", "norm_"))}
    assert official.identify(backbone)[0] == name.replace("setr_pup_", "")


def test_a_checkpoint_of_another_stem_depth_and_class_count():
    """What it is of, and the call that makes it; the model is as before."""
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = on_meta("setr_pup_hlg_small", stems=2, depths=(2, 2, 5, 2), num_classes=19)
    shapes = {other.published_name(key): value.shape for key, value in other.state_dict().items()}
    state = {published_setr_hlg.full(key): torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    with pytest.raises(ValueError) as caught:
        dynattn.load_official(model, {"state_dict": state})
    text = str(caught.value)
    assert "It is an HLG of 2 stem convolutions, with 2, 2, 5, 2 layers by stage." in text
    call = 'dynattn.create_model("setr_pup_hlg_small", num_classes=19, depths=(2, 2, 5, 2), stems=2)'
    assert f"It looks like one for {call}." in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = published_hlg.checkpoint(model.backbone)
    with pytest.raises(ValueError, match="missing: .*decode_head"):
        dynattn.load_official(model, plain)
    with pytest.raises(ValueError, match="a SETR-PUP-HLG that is none of the published ones: 48 channels in stage 1"):
        official.identify(
            {key.removeprefix("backbone."): v for key, v in published_setr_hlg.checkpoint(small(**FOUR)).items()}
        )


FOUR = dict(dims=(48, 48, 48, 48), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2))


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (2, 97), (64, 50)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_sizes_of_setr_pup_hlg(size, variant):
    """Logits of every pixel, and both images are computed alone."""
    model, images = small(variant=variant, positions=VARIANTS[variant]["positions"]), deterministic.image(2, size)
    with torch.no_grad():
        logits, aux = model(images, aux=True)
        alone = torch.cat([model(image[None]) for image in images])
    assert all(part.shape == (2, 5, *size) and part.isfinite().all() for part in (logits, *aux)) and len(aux) == 1
    torch.testing.assert_close(logits, alone)


def test_maps_are_joined_at_a_quarter_of_the_image(unchecked):
    """Or at the size of another stage: HLG-Small would have 42 G there. A cell stays where it is at any size."""
    assert cost.count(on_meta("setr_pup_hlg_small", fuse_stage=3), 512).macs / 1e9 == pytest.approx(42.24, abs=0.01)
    head = FusionHead([1, 1], 2, stage=1, channels=1, layers=[], drop=0.0)
    seen = []
    head.fuse.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    fine, coarse = torch.randn(1, 1, 5, 7), torch.randn(1, 1, 3, 4)
    head([fine, coarse])
    assert torch.equal(seen[0][:, :1], fine)
    torch.testing.assert_close(seen[0][:, 1:], resize(coarse, (6, 8))[..., :5, :7])
    head.stage = 2
    head([fine, coarse])
    torch.testing.assert_close(seen[1], torch.cat([resize(fine, (3, 4)), coarse], 1))


def test_a_setr_pup_hlg_made_for_a_size_equals_one_that_is_run_at_it():
    size, native, set_to = (48, 80), small(), small()
    set_to.set_input_size(size)
    made = small(img_size=size)
    for model in (made, set_to):
        assert model.img_size == size and torch.equal(answer(model, size), answer(native, size))


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "options",
    [
        dict(stems=2),
        dict(window=3),
        dict(fuse_stage=2),
        dict(decoder_window=5),
        dict(groups=4),
        dict(groups=0),
        dict(positions="released"),
        dict(decoder_heads=4),
        dict(variant="paper"),
    ],
    ids=str,
)
def test_every_option_of_setr_pup_hlg_changes_the_answer(options):
    logits = answer(small(**options))
    assert logits.isfinite().all() and (logits - answer(small())).abs().max() > 1e-9


def test_the_variants_of_setr_pup_hlg():
    """The text has dilated windows of 8 x 8 cells, the code 8 x 8 dilated windows; the backbone follows."""
    text, code = (on_meta("setr_pup_hlg_small", variant=variant) for variant in ("paper", "official"))
    for model, stage, kinds in ((text, 3, (8, 8)), (code, 1, (7, 8))):
        attns = [layer.attn for layer in model.decoder.layers]
        assert model.decoder.stage == stage and tuple(attn.window for attn in attns) == kinds
        assert [attn.dilated for attn in attns] == [False, True] and attns[1].groups == (model is code)
    assert text.backbone.variant == "paper" and text.backbone.stages[0].blocks[0].smooth is None


def test_the_auxiliary_head_of_hlg_is_for_training():
    """The main logits are the same without it, and the list is empty."""
    with_it, without = small(), small(aux=False)
    logits, aux = answer(without, aux=True)
    assert aux == [] and torch.equal(logits, answer(with_it)) and count(without) < count(with_it)
    assert with_it.aux_weight == 0.4 and with_it.segments
    main, (other,) = answer(with_it, aux=True)
    assert torch.equal(main, logits) and other.shape == main.shape and not torch.allclose(other, main)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("variant", "text", ValueError, "variant: expected one of 'official', 'paper', got 'text'"),
        ("num_classes", 0, ValueError, "num_classes: expected at least 1, got 0"),
        ("fuse_stage", 4, ValueError, "fuse_stage: expected one of 1, 2, 3, got 4"),
        ("aux_stage", 0, ValueError, "aux_stage: expected one of 1, 2, 3, got 0"),
        ("decoder_window", 0, ValueError, "decoder_window: expected at least 1, got 0"),
        ("groups", 2.5, TypeError, "groups: expected a whole number, got 2.5"),
        ("groups", -1, ValueError, "groups: expected at least 1, got -1"),
        ("decoder_heads", 5, ValueError, "decoder_heads: expected a divisor of 64, got 5"),
        ("positions", "grid", ValueError, "positions: expected one of 'released', 'centre', got 'grid'"),
        ("heads", (2, 4), ValueError, "heads: expected 3 values, one for each stage of depths, got (2, 4)"),
        ("drop_rate", 1, ValueError, "drop_rate: expected a number from 0 to below 1, got 1"),
        ("aux_layers", 3, TypeError, "aux_layers: not an argument of setr_pup_hlg_mini; did you mean"),
    ],
)
def test_bad_arguments_of_setr_pup_hlg(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught:
        dynattn.create_model("setr_pup_hlg_mini", **{argument: value})
    assert str(caught.value).startswith(message)


def test_bad_images_of_setr_pup_hlg(unchecked):
    with pytest.raises(TypeError, match="x: expected torch.float64, as the model's parameters are, got torch.float32"):
        small()(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="x: expected shape"):
        small()(torch.zeros(1, 4, 64, 64).double())


# -------------------------------------------------------------------------------------------- what surrounds the model


def test_a_trace_of_setr_pup_hlg_has_every_layer():
    """Local-global layers, the dense one of the last stage, the two of the decoder; rollout is a distribution."""
    model = small()
    trace = dynattn.trace(model, deterministic.image(1, (40, 64))[0])
    assert [record.kind for record in trace] == ["local_global"] * 3 + ["dense"] + ["local_global"] * 2
    assert trace.layers[-2:] == [f"decoder.layers.{i}.attn" for i in range(2)]
    for name, groups in zip(trace.layers[-2:], (6, 64), strict=True):
        record = trace[name]
        assert record.query_shape == (10, 16) and record.stride == (4, 4) and not record.exact
        matrix = record.effective_matrix(1)
        assert matrix.shape == (160, 160) and record.everywhere.shape == (3, 160, groups)
        torch.testing.assert_close(matrix.sum(1), torch.full((160,), 2.0, dtype=matrix.dtype))
        keys = record.keys(21, 30)
        assert float(keys.weight.sum()) == pytest.approx(2)
    heat = trace.rollout(20, 30)
    assert (heat >= 0).all() and float(heat.sum()) == pytest.approx(1, rel=1e-5)


def test_the_record_of_the_decoder_is_what_it_adds():
    """What both attentions put out, projected, is what the layer adds to its input."""
    model = small()
    attn, seen = model.decoder.layers[1].attn, []
    attn.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    record = dynattn.trace(model, deterministic.image(1, 64)[0])["decoder.layers.1.attn"]
    z = torch.cat([record.output(head) for head in range(3)], dim=-1)
    with torch.no_grad():
        expected = attn.proj(z) + attn.proj.bias  # added twice
    (before, after), *_ = seen
    torch.testing.assert_close((after - before)[0].flatten(0, 1), expected)


def test_the_interface_of_timm_s_models_of_setr_pup_hlg():
    model, images = small(), deterministic.image(1, 64)
    final, maps = model.forward_intermediates(images)
    assert [tuple(m.shape) for m in maps] == [(1, 48, 16, 16), (1, 48, 8, 8), (1, 96, 4, 4)]
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(model.forward_head(final, pre_logits=True), final)
    with pytest.raises(ValueError, match="model: its decoder reads all stages, and forward_head has the last one only"):
        model.forward_head(final)
    features = timm.create_model("setr_pup_hlg_mini", features_only=True, out_indices=(0, 1))
    assert features.feature_info.reduction() == [4, 8] and features.feature_info.channels() == [32, 64]
    assert [tuple(m.shape) for m in features(torch.randn(1, 3, 64, 64))] == [(1, 32, 16, 16), (1, 64, 8, 8)]
    model.reset_classifier(7)
    assert answer(model).shape == (2, 7, 64, 64) and answer(model, aux=True)[1][0].shape == (2, 7, 64, 64)
    assert model.get_classifier().out_channels == 7 and model.no_weight_decay() == set()
    cut = small()
    assert cut.prune_intermediate_layers([0]) == [0]
    assert torch.equal(cut.forward_intermediates(images, intermediates_only=True)[0], maps[0])
    with pytest.raises(ValueError, match="model: its decoder was cut off with the stages that it read"):
        cut(images)
    config = timm.models.get_pretrained_cfg("setr_pup_hlg_mini")
    state = dynattn.create_model("setr_pup_hlg_mini").state_dict()
    assert all(f"{name}.weight" in state for name in (config.first_conv, *config.classifier))


def test_a_step_of_training_of_setr_pup_hlg():
    """Every parameter gets a gradient, also with checkpointing, and the same one; dropout is on where it is asked."""
    slopes = []
    for enable in (False, True):
        model = small(drop_rate=0.0, drop_path_rate=0.0)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        model.set_grad_checkpointing(enable)
        logits, aux = model(deterministic.image(2, 48), aux=True)
        (logits.square().mean() + sum(part.square().mean() for part in aux)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        slopes.append([p.grad for p in model.parameters()])
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)
    model = small(**rates).train()
    first, second = (model(deterministic.image(2, 48)) for _ in range(2))
    assert not torch.allclose(first, second)


def test_the_small_setr_pup_hlg():
    """On the widths of hlg_mini; eleven classes, any size."""
    model = dynattn.create_model("setr_pup_hlg_mini").eval()
    assert count(model) == 726_230
    with torch.no_grad():
        logits, aux = model(torch.randn(1, 3, 50, 77), aux=True)
    assert all(part.shape == (1, 11, 50, 77) for part in (logits, *aux)) and len(aux) == 1
    assert get_recipe("setr_pup_hlg_mini").task == "segmentation"
    widths = [info["num_chs"] for info in dynattn.create_model("hlg_mini").feature_info]
    assert [info["num_chs"] for info in model.feature_info] == widths


@pytest.mark.slow
def test_a_compiled_and_an_exported_setr_pup_hlg():
    """torch.compile without a break, and torch.export; in a process without shape checks, which graphs cannot have."""
    program = """
        import torch, dynattn
        for positions in ("centre", "released"):
            model = dynattn.create_model("setr_pup_hlg_mini", depths=(1, 1, 1), positions=positions).eval()
            images = torch.randn(2, 3, 50, 44)
            with torch.no_grad():
                compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
                torch.testing.assert_close(compiled(images), model(images))
                exported = torch.export.export(model, (images,)).module()
                torch.testing.assert_close(exported(images), model(images))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=600)
