"""HLG's models: equality with the published code, counts, ablations, variants, arguments, sizes."""

import csv
import subprocess
import sys
import textwrap

import deterministic
import numpy as np
import published_hlg
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config
from published_hlg import LOGITS, MEASURED
from torch import nn

import dynattn
from dynattn import core, cost, official
from dynattn.mechanisms.local_global import LocalGlobalAttention
from dynattn.models.hlg import VARIANTS, ConvNorm, FullAttention

NAMES = list(MEASURED)
SMALL = dict(img_size=64, num_classes=5, dims=(48, 48, 96), depths=(2, 3, 1), heads=(2, 2, 4), window=4)


def small(**options) -> nn.Module:
    """An HLG that runs in milliseconds, with deterministic weights in float64."""
    return deterministic.filled(dynattn.create_model("hlg_mini", **SMALL | options))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64) -> torch.Tensor:
    return model(deterministic.image(2, size))


def on_meta(name: str, **options) -> nn.Module:
    """A model without numbers."""
    with torch.device("meta"):
        return dynattn.create_model(name, **options)


def parameters(name: str, **options) -> int:
    return sum(p.numel() for p in on_meta(name, **options).parameters())


def layers_of(model: nn.Module, kind: type) -> list:
    """The attention layers of a kind, in order."""
    return [module for module in model.modules() if isinstance(module, kind)]


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds_of_hlg(name, unchecked):
    """To the unit. The published code asks its bias networks of all displacements, which is up to two thousandths."""
    entries, params, macs = MEASURED[name]
    model = on_meta(name)
    count = cost.count(model, 224)
    assert (len(model.state_dict()), count.params) == (entries, params)
    assert 0.998 * macs < count.macs / 1e9 <= macs


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    config.update("jaxtyping_disable", True)
    try:
        return {row["name"]: row for row in cost.table("hlg")}
    finally:
        config.update("jaxtyping_disable", False)


def test_every_row_of_the_paper_s_classification_tables_is_there_but_for_its_baseline(rows):
    with cost.tables()["hlg"].published.open(newline="") as file:
        said = {row["model"] for row in csv.DictReader(file) if row["task"] == "imagenet1k"}
    assert said - set(rows) == {"hlg_small_baseline_pvt"} and set(rows) <= said


def test_tables_7_and_12_to_14(rows):
    """All numbers but HLG-Medium's 43.7 M are the paper's, one more or less in the last digit of the ablations."""
    for name, row in rows.items():
        if name != "hlg_medium":
            assert abs(row["params"] / 1e6 - float(row["paper_params_M"])) < (0.05 if name in NAMES else 0.1)
        if row["paper_macs_G"]:
            assert abs(row["macs"] / 1e9 - float(row["paper_macs_G"])) < 0.1
    assert rows["hlg_medium"]["params"] == 47_747_980 and rows["hlg_medium"]["paper_params_M"] == "43.7"
    tiny = rows["hlg_tiny"]
    for name in ("plain_plain", "plain_dilated_7", "plain_dilated_5", "plain_dilated_8", "window_mean"):
        assert rows[f"hlg_tiny_{name}"]["params"] == tiny["params"]
    assert rows["hlg_tiny_plain_dilated_7"]["macs"] == rows["hlg_tiny_plain_plain"]["macs"] == tiny["macs"]
    assert rows["hlg_tiny_window_dwconv"]["params"] - tiny["params"] == 96_000
    assert parameters("hlg_tiny", embedding="max") == tiny["params"]
    assert rows["hlg_small_shared_local"]["macs"] == rows["hlg_small"]["macs"]
    assert rows["hlg_small_dwmlp"]["params"] == 24_143_698
    assert round(rows["hlg_small_dwmlp"]["macs"] / 1e9, 2) == 4.27


def test_gains_that_tables_print():
    """In points: of dilated windows and of local attention. The text has 0.64 and 1.0."""
    value = lambda name: float(cost.published(name)["value"])  # noqa: E731
    dilated = value("hlg_tiny_plain_dilated_7") - value("hlg_tiny_plain_plain")
    local = value("hlg_small_shared_local") - value("hlg_small_dwmlp")
    assert (round(dilated, 2), round(local, 1)) == (0.53, 1.6)


def test_two_stem_convolutions(unchecked):
    """As the code lies in its repository: parameters as measured there, and 9 C^2 + 2 C more than with one."""
    expected = {"hlg_mobile": 4_350_188, "hlg_tiny": 11_035_824, "hlg_small": 24_273_004}
    for name, params in expected.items():
        assert parameters(name, stems=2) == params
    assert parameters("hlg_small", stems=2) - parameters("hlg_small") == 9 * 96**2 + 2 * 96 == 83_136
    more = cost.count(on_meta("hlg_small", stems=2), 224).macs - cost.count(on_meta("hlg_small"), 224).macs
    assert round(more / 1e9, 2) == 1.04


def test_depths_of_table_1():
    """14 layers in stage 3 are fewer than the paper's numbers say; with two stem convolutions they are the code's."""
    depths = (2, 2, 14, 2)
    assert parameters("hlg_medium", depths=depths) == 39_895_276
    assert parameters("hlg_large", depths=depths) == 70_308_280
    assert parameters("hlg_medium", depths=depths, stems=2) == 39_978_412
    assert parameters("hlg_large", depths=depths, stems=2) == 70_455_992
    assert [len(stage.blocks) for stage in on_meta("hlg_large").stages] == [2, 2, 18, 2]


def test_the_code_s_own_mobile_model():
    options = dict(dims=(32, 64, 192, 384), heads=(2, 4, 6, 12), stems=2)
    assert parameters("hlg_mobile", **options) == 4_140_904


def test_squeeze_and_excitation_would_add_an_eighth():
    assert round(parameters("hlg_small", se=True) / parameters("hlg_small"), 2) == 1.13


def test_convolutions_that_the_paper_does_not_speak_of(unchecked):
    without = on_meta("hlg_small", smooth=False)
    assert parameters("hlg_small") - sum(p.numel() for p in without.parameters()) == 1_050_912
    more = cost.count(on_meta("hlg_small"), 224).macs - cost.count(without, 224).macs
    assert round(more / 1e9, 2) == 0.31


def test_drop_path_of_the_paper():
    """0.1, and 0.3 for the large model, at the last layer; none at the first."""
    for name in NAMES:
        model = on_meta(name)
        first, last = model.stages[0].blocks[0], model.stages[-1].blocks[-1]
        assert first.drop_path.drop_prob == first.attn.drop_path.drop_prob == 0
        rate = 0.3 if name == "hlg_large" else 0.1
        assert last.drop_path.drop_prob == last.attn.drop_path.drop_prob == pytest.approx(rate)


# -------------------------------------------------------------------------------------------------- the published code


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return published_hlg.published("hlg_tiny")


@pytest.fixture(scope="module")
def computed(tiny) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the output of every stage."""
    with torch.no_grad():
        maps = tiny.stage_maps(deterministic.image(2, 224))
        return tiny.forward_head(tiny.norm(maps[-1]).permute(0, 3, 1, 2)), maps


def test_golden_logits_of_hlg(computed):
    """Holds anywhere: a handful of logits as plain numbers."""
    first, last = LOGITS
    np.testing.assert_allclose(computed[0][0, :4], first, rtol=0, atol=1e-9)
    np.testing.assert_allclose(computed[0][1, -2:], last, rtol=0, atol=1e-9)


def test_the_published_code_s_logits_and_stages(computed, shared):
    recorded, (logits, maps) = np.load(shared / "golden_hlg_tiny.npz"), computed
    assert np.abs(logits.numpy() - recorded["logits"]).max() < 1e-9 * recorded["logits"].std()
    for i, found in enumerate(maps, 1):
        tokens = found.flatten(1, 2).numpy()
        assert [*tokens.shape] == recorded[f"stage{i}_shape"].tolist()
        measured = {"mean": tokens.mean(), "std": tokens.std(), "first8": tokens.flatten()[:8]}
        for measure, value in measured.items():
            scale = float(recorded[f"stage{i}_std"])
            np.testing.assert_allclose(value, recorded[f"stage{i}_{measure}"], rtol=0, atol=1e-9 * scale)


VERSIONS = [(name, name, {}) for name in NAMES]
VERSIONS += [(f"hlg_{size}_two_stem", f"hlg_{size}", dict(stems=2)) for size in ("mobile", "tiny", "small")]
VERSIONS += [
    (f"hlg_{size}_two_stem_depth14", f"hlg_{size}", dict(stems=2, depths=(2, 2, 14, 2))) for size in ("medium", "large")
]


@pytest.mark.parametrize(("file", "name", "options"), VERSIONS, ids=lambda one: one if isinstance(one, str) else "")
def test_names_and_shapes_are_the_published_ones(file, name, options, shared):
    with (shared / f"keys_{file}.tsv").open() as lines:
        known = {key: shape for key, shape, _ in csv.reader(lines, delimiter="\t")}
    model = on_meta(name, **options)
    own, entries = model.state_dict(), model.published_entries()
    assert {entries[key].name: "x".join(map(str, value.shape)) for key, value in own.items()} == known


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NAMES),
        ("hlg_tiny", dict(stems=2)),
        ("hlg_medium", dict(stems=2, depths=(2, 2, 14, 2))),
        ("hlg_large", dict(depths=(2, 2, 14, 2))),
        ("hlg_small", dict(embedding="conv", num_classes=7)),
        ("hlg_small", dict(num_classes=0)),
        ("hlg_mobile", dict(dims=(32, 64, 192, 384), heads=(2, 4, 6, 12), stems=2)),
    ],
)
def test_a_checkpoint_says_which_model_it_is_of(name, options):
    state = published_hlg.checkpoint(on_meta(name, **options))
    assert official.identify(state) == (name, options)


def test_a_checkpoint_of_another_stem_and_depth():
    """What it is of, and the call that makes it; the model is as before."""
    model = dynattn.create_model("hlg_mobile").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = dict(stems=2, depths=(2, 2, 3, 2))
    state = published_hlg.checkpoint(on_meta("hlg_mobile", **other))
    with pytest.raises(ValueError) as caught:
        dynattn.load_official(model, {"model": state})
    text = str(caught.value)
    assert "unexpected: block3.2.aux_q.bias" in text
    assert "It is an HLG of 2 stem convolutions, with 2, 2, 3, 2 layers by stage." in text
    assert 'It looks like one for dynattn.create_model("hlg_mobile", depths=(2, 2, 3, 2), stems=2).' in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    dynattn.load_official(dynattn.create_model("hlg_mobile", **other), {"state_dict_ema": state})


def test_a_checkpoint_that_is_none_of_the_published_ones():
    state = published_hlg.checkpoint(on_meta("hlg_small", dims=(36, 72, 144, 288)))
    with pytest.raises(ValueError, match="an HLG that is none of the published ones: 36 channels in stage 1"):
        official.identify(state)


# ----------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("keyword", [key for key in VARIANTS["paper"] if key != "mask"])
def test_the_keywords_of_the_variants_of_hlg(keyword):
    """Each changes the logits alone, and undone within variant="paper" it changes them back."""
    size = (48, 80)
    official_way, text = small(variant="official", positions="released"), small(variant="paper")
    given = dict(variant="official", positions="released") | {keyword: VARIANTS["paper"][keyword]}
    assert (answer(small(**given), size) - answer(official_way, size)).abs().max() > 1e-7
    back = answer(small(variant="paper", **{keyword: VARIANTS["official"][keyword]}), size)
    assert (back - answer(text, size)).abs().max() > 1e-7
    assert torch.equal(answer(small(variant="official", **VARIANTS["paper"]), size), answer(text, size))


@pytest.mark.parametrize(
    "options",
    [
        dict(stems=2),
        dict(dilated=False),
        dict(dilated_window=3),
        dict(embedding="max"),
        dict(embedding="conv"),
        dict(local=False),
        dict(window=3),
    ],
    ids=str,
)
def test_every_option_of_hlg_changes_the_answer(options):
    logits = answer(small(**options))
    assert logits.isfinite().all() and (logits - answer(small())).abs().max() > 1e-7
    assert answer(small(**options), (45, 70)).isfinite().all()


def test_plain_and_dilated_layers_take_turns():
    """The last stage has full attention, or goes on so."""
    model = small(depths=(2, 3, 2))
    kinds = [[getattr(block.attn, "dilated", None) for block in stage.blocks] for stage in model.stages]
    assert kinds == [[False, True], [False, True, False], [None, None]]
    assert len(layers_of(model, FullAttention)) == 2
    assert len(layers_of(small(full_last=False), LocalGlobalAttention)) == 6
    assert not any(layer.dilated for layer in layers_of(small(dilated=False), LocalGlobalAttention))
    sides = [layer.window for layer in layers_of(small(dilated_window=3), LocalGlobalAttention)]
    assert sides == [4, 3, 4, 3, 4]


def test_padding_is_masked_or_read():
    """Where windows divide the maps nothing is padded; else zeros are tokens, or nobody reads them."""
    masked, read = small(), small(mask=False)
    assert torch.equal(answer(read, 64), answer(masked, 64))
    assert (answer(read, 72) - answer(masked, 72)).abs().max() > 1e-7
    block, x = read.stages[0].blocks[1], torch.randn(1, 18, 17, 48).double()
    with torch.no_grad():
        whole = block.mlp(x)
        y = F.pad(x + block.norm(whole), (0, 0, 0, 3, 0, 2))
        assert y.shape[1:3] == (20, 20)
        pad, block.pad = block.pad, None
        masked = block(x)
        reduce, conv, expand = block.smooth
        y = F.gelu(y + expand(F.gelu(conv(F.gelu(reduce(y))))))
        expected, block.pad = block.attn(y)[:, :18, :17], pad
        torch.testing.assert_close(block(x), expected)
        assert not torch.allclose(masked, expected)


def test_full_attention_is_dense_attention_with_a_bias():
    """Of tokens as they are; what comes out is normed, and stands beside an identity."""
    module = deterministic.filled(FullAttention(48, 2))
    x = torch.randn(2, 3, 5, 48).double()
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(5)).double()
    bias = module.bias.layers(cells[:, None] - cells).permute(2, 0, 1)
    q, k, v = (core.split_heads(f(x), 2) for f in (module.q, module.k, module.v))
    with torch.no_grad():
        z = core.merge_heads(F.scaled_dot_product_attention(q, k, v, bias[None]), (3, 5))
        torch.testing.assert_close(module(x), x + module.norm(module.proj(z)))


def test_a_norm_of_fixed_statistics_is_part_of_its_convolution():
    """In eval mode the same numbers; in training the batch's statistics, which the norm learns."""
    for kernel, stride, groups, bias in ((1, 1, 1, True), (3, 2, 4, True), (3, 1, 1, False)):
        module = deterministic.filled(ConvNorm(4, 8, kernel, stride, groups=groups, bias=bias))
        x = torch.randn(2, 5, 6, 4).double()
        plain = lambda: module.norm(module.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)  # noqa: B023, E731
        torch.testing.assert_close(module(x), plain())
        before = module.norm.running_mean.clone()
        module.train()
        torch.testing.assert_close(module(x), plain())
        assert not torch.equal(module.norm.running_mean, before) and int(module.norm.num_batches_tracked) == 2


def test_what_is_computed_in_place_changes_nothing():
    """Without gradients GELU takes the place of its input, which is never the model's."""
    model, images = small(stems=2), deterministic.image(2, 64)
    given, slow = images.clone(), model(images).detach()
    torch.testing.assert_close(answer(model), slow)
    assert torch.equal(answer(model), answer(model))
    with torch.no_grad():
        model(images)
    assert torch.equal(images, given)


def test_checkpointing_of_hlg_changes_no_gradient():
    images, slopes = deterministic.image(2, 64), []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        slopes.append([p.grad for p in model.parameters()])
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)


def test_a_trace_of_hlg_has_every_layer():
    """Local-global layers, then a dense one, which is exact; rollout is a distribution."""
    trace = dynattn.trace(small(), deterministic.image(1, 64)[0])
    assert [record.kind for record in trace] == ["local_global"] * 5 + ["dense"]
    assert trace.layers[0] == "stages.0.blocks.0.attn"
    dense = trace[trace.layers[-1]]
    torch.testing.assert_close(dense.effective_matrix(1) @ dense.value(1), dense.output(1))
    heat = trace.rollout(20, 30)
    assert (heat >= 0).all() and float(heat.sum()) == pytest.approx(1, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (2, 97), (113, 1), (64, 50)], ids=str)
@pytest.mark.parametrize("options", [dict(variant="official", positions="released"), dict(variant="paper")], ids=str)
def test_odd_sizes_of_hlg(size, options):
    """Maps are the ceilings of the halves, and both images are computed alone."""
    model, images = small(**options), deterministic.image(2, size)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // s) for side in size) for s in (4, 8, 16)]
    torch.testing.assert_close(model.forward_head(final), alone)


@pytest.mark.parametrize("size", [(96, 64), (47, 80)])
def test_an_hlg_made_for_a_size_equals_one_that_is_run_at_it(size):
    native, set_to = small(), small()
    set_to.set_input_size(size)
    made = dynattn.create_model("hlg_mini", **SMALL | dict(img_size=size)).double().eval()
    made.load_state_dict(native.state_dict())
    for model in (made, set_to):
        assert model.img_size == size and torch.equal(answer(model, size), answer(native, size))


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("variant", "text", ValueError, "variant: expected one of 'official', 'paper', got 'text'"),
        ("stems", 0, ValueError, "stems: expected at least 1, got 0"),
        ("window", 0, ValueError, "window: expected at least 1, got 0"),
        ("dilated_window", 2.5, TypeError, "dilated_window: expected a whole number, got 2.5"),
        ("embedding", "sum", ValueError, "embedding: expected one of 'mean', 'max', 'conv', got 'sum'"),
        ("conv_of", "keys", ValueError, "conv_of: expected one of 'attention', 'values', got 'keys'"),
        ("positions", "grid", ValueError, "positions: expected one of 'released', 'centre', got 'grid'"),
        ("heads", (2, 4), ValueError, "heads: expected 3 values, one for each stage of depths, got (2, 4)"),
        ("heads", (2, 4, 5), ValueError, "heads: expected a divisor of 128, got 5"),
        ("dims", (32, 48, 96), ValueError, "dims: expected each a multiple of the one before, got (32, 48, 96)"),
        ("drop_path_rate", 1, ValueError, "drop_path_rate: expected a number from 0 to below 1, got 1"),
        ("proj_drop_rate", 2, ValueError, "proj_drop: expected a number from 0 to below 1, got 2"),
        ("stem", 2, TypeError, "stem: not an argument of hlg_mini; did you mean 'stems'?"),
    ],
)
def test_bad_arguments_of_hlg(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught:
        dynattn.create_model("hlg_mini", **{argument: value})
    assert str(caught.value).startswith(message)


def test_a_side_of_dilated_windows_where_there_are_none(unchecked):
    with pytest.raises(ValueError, match="dilated_window: expected None where no window is dilated, got 5"):
        dynattn.create_model("hlg_mini", dilated=False, dilated_window=5)


def test_bad_images_of_hlg(unchecked):
    model = small()
    with pytest.raises(ValueError, match="x: expected 4 dimensions"):
        model(torch.zeros(3, 64, 64).double())
    with pytest.raises(TypeError, match="x: expected torch.float64, as the model's parameters are, got torch.float32"):
        model(torch.zeros(1, 3, 64, 64))


def test_a_step_of_training_of_hlg():
    """Every parameter gets a gradient; dropout and stochastic depth are on."""
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)
    for variant in VARIANTS:
        model = dynattn.create_model("hlg_mini", **SMALL, **rates, variant=variant)
        model(torch.randn(4, 3, 48, 40)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_the_small_hlg_is_small():
    assert parameters("hlg_mini") <= 600_000
    assert dynattn.training.get_recipe("hlg_mini").model == "hlg_mini"


@pytest.mark.slow
def test_a_compiled_and_an_exported_hlg():
    """torch.compile without a break, and torch.export; in a process without shape checks, which graphs cannot have."""
    program = f"""
        import torch, dynattn
        model = dynattn.create_model("hlg_mini", **{SMALL}).eval()
        images = torch.randn(2, 3, 50, 44)
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
            torch.testing.assert_close(compiled(images), model(images))
            exported = torch.export.export(model, (images,)).module()
            torch.testing.assert_close(exported(images), model(images))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=600)
