"""SG-Former's models: equality with the published code, counts, ablations, variants, arguments, sizes."""

import csv
import subprocess
import sys
import textwrap
from decimal import Decimal

import deterministic
import numpy as np
import published_sgformer
import pytest
import torch
from jaxtyping import config
from published_sgformer import LOGITS, MEASURED
from torch import nn

import dynattn
from dynattn import core, cost, official
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention
from dynattn.mechanisms.self_guided import SelfGuidedAttention, rank
from dynattn.models.sgformer import VARIANTS, FullAttention, sines

NAMES = list(MEASURED)
SMALL = dict(img_size=64, num_classes=5, dims=(16, 32, 64), depths=(2, 4, 1), heads=(2, 2, 4), window=4)
SMALL |= dict(rates=((16, 4, 4, 2), (4, 2, 2, 1)), norm="group", positions=True)


def small(**options) -> nn.Module:
    """An SG-Former that runs in milliseconds, with deterministic weights in float64."""
    return deterministic.filled(dynattn.create_model("sgformer_mini", **SMALL | options))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64) -> torch.Tensor:
    return model(deterministic.image(2, size))


def on_meta(name: str, **options) -> nn.Module:
    """A model without numbers."""
    with torch.device("meta"):
        return dynattn.create_model(name, **options)


def layers_of(model: nn.Module, kind: type) -> list:
    """The attention layers of a kind, in order."""
    return [module for module in model.modules() if isinstance(module, kind)]


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds(name, unchecked):
    """To the unit, and within a thousandth of what torch counts of the published code, which sorts twice."""
    entries, parameters, macs = MEASURED[name]
    model = on_meta(name)
    count = cost.count(model, 224)
    assert (len(model.state_dict()), count.params) == (entries, parameters)
    assert count.macs / 1e9 == pytest.approx(macs, rel=1e-3)


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    config.update("jaxtyping_disable", True)
    try:
        return {row["name"]: row for row in cost.table("sgformer")}
    finally:
        config.update("jaxtyping_disable", False)


def test_every_row_of_the_paper_s_classification_tables_is_there(rows):
    with cost.tables()["sgformer"].published.open(newline="") as file:
        said = {row["model"] for row in csv.DictReader(file) if row["task"] == "imagenet1k"}
    assert set(rows) == said


def test_table_2_counts_as_fvcore(rows):
    """One multiply-add more or less in the last digit; the parameters of B are cut off."""
    for name in NAMES:
        printed = rows[name]["paper_macs_G"], rows[name]["paper_params_M"]
        assert round(Decimal(rows[name]["macs_fvcore"]) / 10**9, 1) == Decimal(printed[0])
        assert Decimal(rows[name]["params"]) // 10**5 / 10 in (
            Decimal(printed[1]),
            Decimal(printed[1]) - Decimal("0.1"),
        )


def test_table_3(rows):
    """At 384 the published code does not run; ours is one to two percent above the paper."""
    for name in NAMES:
        row = rows[f"{name}_384"]
        assert 1.01 < row["macs"] / 1e9 / float(row["paper_macs_G"]) < 1.02
        more = row["params"] - rows[name]["params"]
        assert more == (96**2 - 56**2) * (96 if name.endswith("base") else 64)


def test_table_6(rows):
    """All blocks hybrid-scale: one scale local, one global, both."""
    found = [rows[f"sgformer_small_{kind}"] for kind in ("single_scale_local", "single_scale_global", "hybrid_scale")]
    assert [row["params"] for row in found] == [19_654_824, 25_436_200, 25_436_200]
    assert [round(row["macs"] / 1e9, 2) for row in found] == [4.79, 4.62, 4.85]
    model = on_meta("sgformer_small", guided=False)
    assert len(layers_of(model, HybridScaleAttention)) == 22 and not layers_of(model, SelfGuidedAttention)


def test_table_7(rows):
    """What guides changes neither parameters nor multiply-adds; the paper's parameters run from 20.9 to 24.6 M."""
    found = [rows[f"sgformer_small_guidance_{kind}"] for kind in ("manual", "local", "global")]
    assert {(row["params"], row["macs"]) for row in found} == {
        (rows["sgformer_small"]["params"], rows["sgformer_small"]["macs"])
    }
    assert {row["paper_params_M"] for row in found} == {"21.6", "20.9", "24.6"}


def test_scales_of_table_1():
    """B has four and three scales in the text, two in the published code. Depths of stages 1 to 3 are even."""
    scales = lambda **how: [layer.scales for layer in layers_of(on_meta("sgformer_base", **how), HybridScaleAttention)]  # noqa: E731
    assert sorted(set(scales(variant="paper")), reverse=True) == [(8, 4, 2, 1), (4, 2, 1), (2, 1)]
    assert sorted(set(scales()), reverse=True) == [(8, 1), (4, 1), (2, 1)]
    text = sum(p.numel() for p in on_meta("sgformer_base", scales=((8, 4, 2, 1), (4, 2, 1), (2, 1))).parameters())
    assert round(text / 1e6, 1) == 78.8
    assert on_meta("sgformer_small", variant="paper").stages[0].blocks[0].attn.scales == (8, 1)
    for name in NAMES:
        depths = [len(stage.blocks) for stage in on_meta(name).stages]
        assert [depth % 2 for depth in depths[:3]] == [0, 0, 0]


# -------------------------------------------------------------------------------------------------- the published code


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_published_ones(name, shared):
    listed = [line.split("\t") for line in (shared / f"keys_{name}.tsv").read_text().splitlines()]
    ours = {key: tuple(tensor.shape) for key, tensor in published_sgformer.checkpoint(on_meta(name)).items()}
    assert ours == {key: tuple(map(int, shape.split("x"))) for key, shape, _ in listed}


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return published_sgformer.published("sgformer_small")


@pytest.fixture(scope="module")
def computed(tiny) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Logits, the output of every stage, and the significance of the first block."""
    maps, found = [], []
    handles = [stage.register_forward_hook(lambda m, i, out: maps.append(out)) for stage in tiny.stages]
    handles.append(tiny.stages[0].blocks[0].register_forward_hook(lambda m, i, out: found.append(out[1])))
    with torch.no_grad():
        logits = tiny(deterministic.image(2, 224))
        maps[-1] = tiny.norm(maps[-1])
    for handle in handles:
        handle.remove()
    return logits, maps, found[0]


def test_golden_logits_of_sgformer(computed):
    """Holds anywhere: a handful of logits as plain numbers. SG-6, SG-7."""
    first, last = LOGITS
    np.testing.assert_allclose(computed[0][0, :4], first, rtol=0, atol=1e-8)
    np.testing.assert_allclose(computed[0][1, -2:], last, rtol=0, atol=1e-8)


def test_the_published_code_s_logits_stages_and_significance(computed, shared):
    recorded, (logits, maps, significance) = np.load(shared / "golden_sgformer_small.npz"), computed
    assert np.abs(logits.numpy() - recorded["logits"]).max() < 1e-9 * recorded["logits"].std()
    for i, found in enumerate(maps, 1):
        tokens = found.flatten(1, 2)
        assert [*tokens.shape] == recorded[f"stage{i}_shape"].tolist()
        measured = {"mean": tokens.mean(), "std": tokens.std(), "first8": tokens.flatten()[:8]}
        for measure, value in measured.items():
            scale = float(recorded[f"stage{i}_std"])
            np.testing.assert_allclose(value, recorded[f"stage{i}_{measure}"], rtol=0, atol=1e-9 * scale)
    # The published code divides by the 49 keys, here each map has a mean of 1.
    np.testing.assert_allclose(significance / 49, recorded["sig_stage1_block0"], rtol=1e-9)


def test_in_float32_ranks_flip_and_blocks_still_agree(tiny, computed):
    """Why goldens are compared in float64: a rank that flips moves a token to another group.

    Block by block, with the ranks of the one given to the other, float32 is as near as it must be.
    """
    single = dynattn.create_model("sgformer_small").eval()
    single.load_state_dict(tiny.state_dict())
    image, flipped = deterministic.image(1, 224), 0
    with torch.no_grad():
        x = tiny.embed(image.permute(0, 2, 3, 1))
        for stage, other in zip(tiny.stages[:2], single.stages, strict=False):
            x, guide = stage.down(x), None
            for block, twin in zip(stage.blocks, other.blocks, strict=True):
                ranks = None if guide is None else rank(guide).argsort(1).reshape(guide.shape)
                y, found = block(x, guide)
                z, near = twin(x.float(), None if ranks is None else ranks.float())
                assert (z - y).abs().max() < 2e-4 * y.std()
                if found is not None:
                    torch.testing.assert_close(near.double(), found, rtol=1e-4, atol=0)
                    flipped += int((rank(near) != rank(found)).sum())
                x, guide = y, found
            x = stage.norm(x)
    assert flipped > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_says_which_model_it_is_of(name):
    assert official.identify(published_sgformer.checkpoint(on_meta(name))) == (name, {})


def test_a_checkpoint_for_another_size_of_image():
    """The table of positions is resized; the call that would need nothing resized is known."""
    state = published_sgformer.checkpoint(dynattn.create_model("sgformer_small", img_size=96, num_classes=3))
    assert official.identify(state) == ("sgformer_small", {"num_classes": 3, "img_size": 96})
    model = dynattn.load_official(dynattn.create_model("sgformer_small", img_size=64, num_classes=3), state)
    square = state["pos_embed"].reshape(24, 24, 64).permute(2, 0, 1)
    torch.testing.assert_close(model.embed.table.detach(), core.resize_table(square, (16, 16)).float())


def test_a_checkpoint_that_is_none_of_the_published_ones():
    state = published_sgformer.checkpoint(on_meta("sgformer_small", dims=(32, 64, 128, 256)))
    with pytest.raises(ValueError, match="an SG-Former that is none of the published ones: 32 channels in stage 1, 16"):
        official.identify(state)


def test_positions_begin_as_sines():
    """Quarters of the channels: sines and cosines of the column, then of the row, of falling frequency."""
    table = sines((5, 7), 16)
    frequency = 10000.0 ** (-torch.arange(4) / 4)
    for part, wave in enumerate((torch.sin, torch.cos)):
        torch.testing.assert_close(table[4 * part : 4 * part + 4, 3, 6], wave(6 * frequency))
        torch.testing.assert_close(table[8 + 4 * part : 12 + 4 * part, 3, 6], wave(3 * frequency))
    model = dynattn.create_model("sgformer_mini", **SMALL)
    torch.testing.assert_close(model.embed.table.detach(), sines((16, 16), 16))
    assert "embed.table" in model.no_weight_decay()  # the published code decays it


def test_initial_weights_of_the_published_code():
    """Convolutions by what a channel puts out, F as every linear map: aggregation does not begin as a mean."""
    model = dynattn.create_model("sgformer_small")
    attn = model.stages[0].blocks[0].attn
    assert float(attn.lepe_conv.weight.detach().std()) == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert float(attn.groups[0].merge.weight.std()) == pytest.approx((2 / (64 * 64)) ** 0.5, rel=0.05)
    f = model.stages[0].blocks[1].attn.f
    assert [len(part.weight[0]) for part in f] == [196, 56, 28]
    assert float(f[0].weight.std()) == pytest.approx(0.02, rel=0.2) and float(f[0].bias) == 0


# ----------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("keyword", VARIANTS["paper"])
def test_the_keywords_of_the_variants(keyword):
    """Each changes the logits alone, and undone within variant="paper" it changes them back."""
    size = (48, 80)  # where windows of s M are smaller than the map
    official_way, text = small(variant="official"), small(variant="paper")
    alone = answer(small(variant="official", **{keyword: VARIANTS["paper"][keyword]}), size)
    assert (alone - answer(official_way, size)).abs().max() > 1e-9
    back = answer(small(variant="paper", **{keyword: VARIANTS["official"][keyword]}), size)
    assert (back - answer(text, size)).abs().max() > 1e-9
    assert torch.equal(answer(small(variant="official", **VARIANTS["paper"]), size), answer(text, size))


@pytest.mark.parametrize(
    "options",
    [
        dict(scales=((2, 1), (4, 1))),
        dict(scales=((1,), (1,))),
        dict(rates=((8, 2), (2, 1))),
        dict(window=3),
        dict(mlp_ratio=2),
        dict(norm="batch"),
        dict(positions=False),
        dict(guidance="constant"),
        dict(guidance="local"),
        dict(guidance="global"),
        dict(guided=False),
    ],
    ids=str,
)
def test_every_option_changes_the_answer(options):
    logits = answer(small(**options))
    assert logits.isfinite().all() and (logits - answer(small())).abs().max() > 1e-7
    assert answer(small(**options), (45, 70)).isfinite().all()


def test_a_map_goes_to_the_next_block_only():
    """Blocks take turns; the last stage has full attention, and of an odd stage the last map is read by nobody."""
    model = small(depths=(3, 4, 2))
    kinds = [[type(block.attn) for block in stage.blocks] for stage in model.stages]
    assert kinds[0] == [HybridScaleAttention, SelfGuidedAttention, HybridScaleAttention]
    assert kinds[2] == [FullAttention] * 2
    assert [block.weigh for block in model.stages[0].blocks] == [True, False, False]
    assert answer(model).isfinite().all()
    assert not any(block.weigh for stage in small(guided=False).stages for block in stage.blocks)


def test_checkpointing_changes_nothing():
    """The significance is handed on there too, and every gradient is the same."""
    images, slopes = deterministic.image(2, 64), []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        slopes.append([p.grad for p in model.parameters()])
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)


def test_a_trace_has_every_layer():
    """Kinds in turn; the guided layer keeps the map that the layer before it found; rollout is a distribution."""
    trace = dynattn.trace(small(), deterministic.image(1, 64)[0])
    kinds = [trace[name].kind for name in trace.layers]
    assert kinds == ["hybrid_scale", "self_guided"] * 3 + ["dense"]
    for first, second in zip(list(trace)[:-1:2], list(trace)[1::2], strict=True):
        assert torch.equal(first.significance, second.significance)
    heat = trace.rollout(20, 30)
    assert (heat >= 0).all() and float(heat.sum()) == pytest.approx(1, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (2, 97), (113, 1), (64, 50)], ids=str)
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_odd_sizes(size, variant):
    """Maps are the ceilings of the halves, and both images are computed alone."""
    model, images = small(variant=variant), deterministic.image(2, size)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // s) for side in size) for s in (4, 8, 16)]
    torch.testing.assert_close(model.forward_head(final), alone)


@pytest.mark.parametrize("size", [(96, 64), (47, 80)])
def test_a_model_made_for_a_size_equals_one_that_is_run_at_it(size):
    native, set_to = small(), small()
    set_to.set_input_size(size)
    made = dynattn.create_model("sgformer_mini", **SMALL | dict(img_size=size)).double().eval()
    state = native.state_dict()
    made.load_state_dict(state | {"embed.table": core.resize_table(state["embed.table"], made.embed.table.shape[1:])})
    assert set_to.embed.table.shape == made.embed.table.shape
    for model in (made, set_to):
        assert torch.equal(answer(model, size), answer(native, size))


def test_at_other_sizes_no_scale_fades():
    """Means of 1 at every size of the map: without them the global map would be smaller the larger the map is."""
    model = small(variant="official", scales=((4, 1), (2, 1)), rates=((4, 2), (2, 1)))
    for size in (64, 128, (96, 160)):
        record = next(iter(dynattn.trace(model, deterministic.image(1, size)[0])))
        assert float(record.maps[4].mean()) == pytest.approx(1) and float(record.maps[1].mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("variant", "text", ValueError, "variant: expected one of 'official', 'paper', got 'text'"),
        ("norm", "layer", ValueError, "norm: expected one of 'group', 'batch', got 'layer'"),
        ("reading", "max", ValueError, "reading: expected one of 'mean', 'sum', got 'max'"),
        ("aggregate", "both", ValueError, "aggregate: expected one of 'before', 'after', got 'both'"),
        ("guidance", "manual", ValueError, "guidance: expected one of 'hybrid', 'local', 'global', 'constant'"),
        ("scales", ((4, 1),), ValueError, "scales: expected 2 values, one for each stage of depths, got ((4, 1),)"),
        ("scales", ((4, 4), (2, 1)), ValueError, "scales: expected distinct scales"),
        ("scales", (4, 2), TypeError, "scales: expected a scale for each group of heads, got 4"),
        ("rates", ((2, 1),), ValueError, "rates: expected 2 values, one for each stage of depths, got ((2, 1),)"),
        ("rates", ((2, 0), (2, 1)), ValueError, "rates: expected at least 1, got 0"),
        ("window", 0, ValueError, "window: expected at least 1, got 0"),
        ("heads", (2, 4), ValueError, "heads: expected 3 values, one for each stage of depths, got (2, 4)"),
        ("mlp_ratio", 0, ValueError, "ratio: expected at least 1, got 0"),
        ("drop_path_rate", 1, ValueError, "drop_path_rate: expected a number from 0 to below 1, got 1"),
        ("rate", 7, TypeError, "rate: not an argument of sgformer_mini; did you mean 'rates'?"),
    ],
)
def test_bad_arguments(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught:
        dynattn.create_model("sgformer_mini", **{argument: value})
    assert str(caught.value).startswith(message)


def test_a_step_of_training():
    """Every parameter gets a gradient; dropout and stochastic depth are on."""
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)
    model = dynattn.create_model("sgformer_mini", **SMALL, **rates)
    model(torch.randn(4, 3, 48, 40)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_a_compiled_and_an_exported_model():
    """torch.compile without a break, and torch.export; in a process without shape checks, which graphs cannot have."""
    program = f"""
        import torch, dynattn
        model = dynattn.create_model("sgformer_mini", **{SMALL}).eval()
        images = torch.randn(2, 3, 50, 44)
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
            torch.testing.assert_close(compiled(images), model(images))
            exported = torch.export.export(model, (images,)).module()
            torch.testing.assert_close(exported(images), model(images))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=600)
