"""DeBiFormer's models: equality with the published code, counts, ablations, arguments, sizes."""

import csv
import subprocess
import sys
import textwrap
from decimal import Decimal

import deterministic
import numpy as np
import published_bilevel
import pytest
import torch
from jaxtyping import config
from published_bilevel import LOGITS, MEASURED
from torch import nn

import dynattn
from dynattn import core, cost, official
from dynattn.mechanisms.bilevel import BiLevelRoutingAttention
from dynattn.mechanisms.deformable_bilevel import ConvFFN, DeformableBiLevelAttention
from dynattn.models.debiformer import TABLE_5, TABLE_7, VARIANTS, table_7
from dynattn.models.layers import Block

NAMES = [name for name in MEASURED if name.startswith("debiformer")]
SMALL = dict(
    img_size=64, num_classes=5, dims=(16, 32, 64), depths=(2, 2, 2), heads=(2, 2, 4), regions=3, agent_topk=(2, 3, 4)
)
SMALL |= dict(topk=(1, 2, 9))


def small(**options) -> nn.Module:
    """A DeBiFormer that runs in milliseconds, with deterministic weights in float64."""
    return deterministic.filled(dynattn.create_model("debiformer_mini", **SMALL | options))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64) -> torch.Tensor:
    return model(deterministic.image(2, size))


def on_meta(name: str, **options) -> nn.Module:
    """A model without numbers."""
    with torch.device("meta"):
        return dynattn.create_model(name, **options)


def layers_of(model: nn.Module) -> list[DeformableBiLevelAttention]:
    return [module for module in model.modules() if isinstance(module, DeformableBiLevelAttention)]


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds(name, unchecked):
    """Within a thousandth of what torch counts of the repaired code. DeBiFormer-B is none of 77 M parameters."""
    entries, parameters, macs, _ = MEASURED[name]
    model = on_meta(name)
    count = cost.count(model, 224)
    assert (len(model.state_dict()), count.params) == (entries, parameters)
    assert count.macs / 1e9 == pytest.approx(macs, rel=5e-4)
    if name == "debiformer_base":
        assert round(sum(p.numel() for p in model.stages[3].blocks.parameters()) / 1e6, 1) == 47.6
        groups = on_meta(name, groups=(1, 2, 4, 8))
        assert sum(p.numel() for p in groups.parameters()) == 95_492_326
        assert [layer.groups for layer in layers_of(on_meta(name, variant="paper"))[::7]] == [1, 4, 8]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    config.update("jaxtyping_disable", True)
    try:
        return {row["name"]: row for row in cost.table("debiformer")}
    finally:
        config.update("jaxtyping_disable", False)


def test_every_row_of_the_paper_s_classification_tables_is_there(rows):
    with cost.tables()["debiformer"].published.open(newline="") as file:
        said = {row["model"] for row in csv.DictReader(file) if row["task"] == "imagenet1k"}
    assert set(rows) == said


def test_table_7(rows):
    """B* is BRA and DBRA in turn, BB one of them; feed-forward networks with a convolution go with DBRA."""
    counts = [(rows[f"debiformer_tiny_{row.replace(' ', '_').replace('*', 'x')}"]) for row in TABLE_7]
    assert [round(row["params"] / 1e6, 2) for row in counts] == [13.14, 15.82, 18.47, 21.23, 21.42, 21.50]
    assert [round(row["macs"] / 1e9, 2) for row in counts] == [2.22, 2.35, 2.48, 2.62, 2.63, 2.64]
    for row in counts[:5]:
        printed = Decimal(row["paper_params_M"])
        assert round(Decimal(row["params"]) / 10**6, 1) == printed
    assert counts[0]["params"] == MEASURED["biformer_tiny"][1] and counts[5]["params"] == MEASURED["debiformer_tiny"][1]
    kinds = [[type(block.attn).__name__[0] for block in stage.blocks] for stage in on_meta("debiformer_tiny").stages]
    assert kinds == [["B", "D"], ["B", "D"], ["B", "D"] * 4, ["D", "D"]]
    assert table_7("BB BB B* **") == [
        ("bilevel",),
        ("bilevel",),
        ("bilevel", "deformable_bilevel"),
        ("deformable_bilevel",),
    ]
    with pytest.raises(ValueError, match="row: expected one of 'BB BB BB BB', .*, got 'BB'"):
        table_7("BB")


def test_table_6(rows):
    """More regions cost more, and no parameter depends on their number. The last row is DeBiFormer-T."""
    found = {key: row for key, row in rows.items() if key.startswith("debiformer_tiny_k_")}
    assert len(found) == 5 and len({row["params"] for row in found.values()}) == 1
    assert found["debiformer_tiny_k_4_8_16_49"]["macs"] == rows["debiformer_tiny"]["macs"]
    assert found["debiformer_tiny_k_1_4_16_49"]["macs"] < rows["debiformer_tiny"]["macs"]
    assert found["debiformer_tiny_k_8_16_32_49"]["macs"] > rows["debiformer_tiny"]["macs"]


def test_the_layout_of_swin(rows):
    """Table 5: 2, 2, 6, 2 blocks of 96 channels and more, patches, no convolution but those inside an attention."""
    for kind, options in TABLE_5.items():
        model = on_meta("debiformer_tiny", layout="swin", **options)
        assert [len(stage.blocks) for stage in model.stages] == [2, 2, 6, 2]
        assert [stage.blocks[0].norm1.normalized_shape for stage in model.stages] == [(96,), (192,), (384,), (768,)]
        assert all(type(block) is Block for stage in model.stages for block in stage.blocks)
        outside = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and ".attn." not in name]
        assert outside == ["embed.proj", "stages.1.down.proj", "stages.2.down.proj", "stages.3.down.proj"]
        assert model.embed.proj.stride == model.embed.proj.kernel_size == (4, 4), kind
    swin = on_meta("debiformer_tiny", layout="swin", **TABLE_5["shifted_window"])
    assert sum(p.numel() for p in swin.parameters()) == 28_288_354 - 2 * (192 + 384 + 768)  # timm's norms four maps
    assert rows["debiformer_swin_layout"]["params"] > rows["swin_layout+bilevel"]["params"]


def test_exchanged_ratios_cost_the_same():
    """DeBiFormer-S: 1 inside and 2 behind, or the other way round. Both networks have the convolution."""
    count = lambda **options: sum(p.numel() for p in on_meta("debiformer_small", **options).parameters())  # noqa: E731
    assert count() == count(ratios=(3, 3, 3, 1), agent_ratios=(3, 3, 3, 2)) == MEASURED["debiformer_small"][1]


def test_drop_path_of_the_published_code():
    """0, 0.3, 0.4, rising; the two blocks that are one in the published code share it."""
    for name, last in (("debiformer_tiny", 0.0), ("debiformer_small", 0.3), ("debiformer_base", 0.4)):
        model = on_meta(name)
        rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
        assert rates[0::2] == rates[1::2] == sorted(rates[0::2]) and rates[-1] == pytest.approx(last)


# -------------------------------------------------------------------------------------------------- the published code


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_published_ones(name, shared):
    model = on_meta(name)
    names = {name: entry.name for name, entry in model.published_entries().items()}
    ours = {names[own]: tuple(entry.shape) for own, entry in model.state_dict().items()}
    assert ours == published_bilevel.listed(shared / f"keys_{name}.tsv")


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return published_bilevel.published("debiformer_tiny")


@pytest.fixture(scope="module")
def computed(tiny) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return published_bilevel.seen(tiny, deterministic.image(2, 224))


def test_golden_logits_of_debiformer(computed):
    """Holds anywhere: a handful of logits as plain numbers."""
    first, last = LOGITS["debiformer_tiny"]
    np.testing.assert_allclose(computed[0][0, :4], first, rtol=0, atol=2e-8)
    np.testing.assert_allclose(computed[0][1, -2:], last, rtol=0, atol=2e-8)


def test_the_published_code_s_logits_and_stages(computed, shared):
    recorded, (logits, maps) = np.load(shared / "golden_debiformer_tiny.npz"), computed
    assert np.abs(logits.numpy() - recorded["logits"]).max() < 1e-9 * recorded["logits"].std()
    for i, found in enumerate(maps):
        assert [*found.shape] == recorded[f"stage{i}_shape"].tolist()
        measured = {"mean": found.mean(), "std": found.std(correction=0), "first8": found.flatten()[:8]}
        for measure, value in measured.items():
            scale = float(recorded[f"stage{i}_std"])
            np.testing.assert_allclose(value, recorded[f"stage{i}_{measure}"], rtol=0, atol=1e-9 * scale)


def test_the_published_code_s_routes_and_what_a_query_reads(tiny, shared):
    """DEBI-9 and DEBI-10 of BRA and DBRA in the first stage, as sets."""
    recorded = np.load(shared / "golden_debiformer_tiny.npz")
    trace = dynattn.trace(tiny, deterministic.image(2, 224)[0])
    for half in (0, 1):
        expected = np.sort(recorded[f"routing_stages.0.0.attn{half + 1}.router"][0])
        found = trace[f"stages.0.blocks.{half}.attn"].routing.routes
        assert found.sort(dim=-1).values.tolist() == expected.tolist()


def test_every_query_reads_49_agents():
    """In every stage at 224 pixels; an agent reads 256, 128, 64 and 49 tokens."""
    model = dynattn.create_model("debiformer_tiny").eval()
    trace = dynattn.trace(model, torch.randn(3, 224, 224))
    records = trace.of_kind("deformable_bilevel")
    assert {len(record.keys(100, 100).weight) for record in records} == {49}
    tokens = [int((record.reading[0, 0] > 0).sum()) for record in records]
    assert tokens == [256, 128, 64, 64, 64, 64, 49, 49]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_spread_of_logits(name):
    """Of the larger ones it is known how far the logits of the first image spread."""
    with torch.no_grad():
        logits = published_bilevel.published(name)(deterministic.image(1, 224))
    assert float(logits.std()) == pytest.approx(MEASURED[name][3], rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_says_which_model_it_is_of(name):
    state = {key: value for key, value in published_bilevel.checkpoint(on_meta(name)).items()}
    assert official.identify(state) == (name, {})


def test_a_checkpoint_for_another_size_of_image():
    """Bias tables are resized; the call that would need nothing resized is known."""
    state = published_bilevel.checkpoint(dynattn.create_model("debiformer_tiny", img_size=(96, 128), num_classes=3))
    assert official.identify(state) == ("debiformer_tiny", {"num_classes": 3, "img_size": (96, 128)})
    model = dynattn.load_official(dynattn.create_model("debiformer_tiny", img_size=64, num_classes=3), state)
    expected = core.resize_table(state["stages.0.0.attn2.rpe_table"], (31, 31)).float()
    torch.testing.assert_close(model.stages[0].blocks[1].attn.table.detach(), expected)


# ----------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("keyword", VARIANTS["paper"])
def test_the_keywords_of_the_variants(keyword):
    """Each changes the logits alone, and undone within variant="paper" it changes them back."""
    official_way, text = small(variant="official"), small(variant="paper")
    alone = answer(small(variant="official", **{keyword: VARIANTS["paper"][keyword]}))
    assert (alone - answer(official_way)).abs().max() > 1e-6
    back = answer(small(variant="paper", **{keyword: VARIANTS["official"][keyword]}))
    assert (back - answer(text)).abs().max() > 1e-6
    assert torch.equal(answer(small(variant="official", **VARIANTS["paper"])), answer(text))


def test_the_scale_of_the_text_is_larger_by_the_root_of_the_heads():
    for variant, scale in (("official", 32**-0.5), ("paper", 16**-0.5)):
        stage = small(variant=variant).stages[1]
        assert [block.attn.scale for block in stage.blocks] == [scale, scale]


def test_what_an_agent_of_the_last_stage_reads():
    """49 regions in the published code, whatever S is; all of them in the text."""
    for variant, regions, expected in (("official", 8, 49), ("paper", 8, 64), ("official", 7, 49), ("paper", 7, 49)):
        last = layers_of(on_meta("debiformer_tiny", variant=variant, regions=regions))[-1]
        assert (last.topk, last.regions) == (expected, regions)
        assert not [m for m in on_meta("debiformer_tiny").stages[3].modules() if isinstance(m, BiLevelRoutingAttention)]


@pytest.mark.parametrize("regions", [7, 8, 20])
def test_any_number_of_regions(regions):
    """S is no parameter of the weights, and with all regions read it makes no difference."""
    every = dict(topk=(400,) * 3, agent_topk=(400,) * 3)
    torch.testing.assert_close(answer(small(regions=regions, **every)), answer(small(regions=1, **every)))


@pytest.mark.parametrize(
    "options",
    [
        dict(regions=2),
        dict(topk=(3, 2, 1)),
        dict(agent_topk=(1, 1, 1)),
        dict(groups=(2, 2, 4)),
        dict(strides=(2, 2, 1)),
        dict(kernels=(3, 3, 3)),
        dict(ratios=(1, 2, 3)),
        dict(agent_ratios=(1, 2, 3)),
        dict(blocks=[("bilevel",), ("deformable_bilevel",), ("full",)]),
        dict(blocks=[("window", "shifted"), ("deformable",), ("cross_shaped",)], window=4),
        dict(layout="swin"),
    ],
    ids=str,
)
def test_every_option_changes_the_answer(options):
    logits = answer(small(**options))
    assert logits.isfinite().all() and (logits - answer(small())).abs().max() > 1e-5
    assert answer(small(**options), (45, 70)).isfinite().all()


def test_feed_forward_networks_have_a_convolution_in_stages_with_agents():
    model = small(blocks=[("bilevel",), ("bilevel", "deformable_bilevel"), ("full",)])
    assert [[isinstance(block.ffn, ConvFFN) for block in stage.blocks] for stage in model.stages] == [
        [False] * 2,
        [True] * 2,
        [False] * 2,
    ]


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (2, 97), (113, 1), (64, 50)], ids=str)
def test_odd_sizes(size):
    """Maps are the ceilings of the halves, and both images are computed alone."""
    model, images = small(), deterministic.image(2, size)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // s) for side in size) for s in (4, 8, 16)]
    torch.testing.assert_close(model.forward_head(final), alone)


@pytest.mark.parametrize("size", [(96, 64), (47, 80)])
def test_a_model_made_for_a_size_equals_one_that_is_run_at_it(size):
    native, set_to = small(), small()
    set_to.set_input_size(size)
    made = dynattn.create_model("debiformer_mini", **SMALL | dict(img_size=size)).double().eval()
    made.load_state_dict(native.state_dict())
    for model in (made, set_to):
        assert torch.equal(answer(model, size), answer(native, size))


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("layout", "vit", ValueError, "layout: expected one of 'debiformer', 'swin', got 'vit'"),
        ("variant", "text", ValueError, "variant: expected one of 'official', 'paper', got 'text'"),
        ("blocks", [("dbra",)] * 3, ValueError, "blocks: expected one of 'bilevel', 'deformable_bilevel', 'full'"),
        ("blocks", [("bilevel",)], ValueError, "blocks: expected the attentions of each of 3 stages"),
        ("blocks", [()] * 3, ValueError, "blocks: expected the attentions of each of 3 stages"),
        ("regions", 0, ValueError, "regions: expected at least 1, got 0"),
        ("topk", (1,), ValueError, "topk: expected 3 values, one for each stage of depths, got (1,)"),
        ("agent_topk", 4, ValueError, "agent_topk: expected 3 values, one for each stage of depths, got 4"),
        ("groups", (1, 2, 3), ValueError, "groups: expected a divisor of 8, got 3"),
        ("strides", (4, 2), ValueError, "strides: expected 3 values, one for each stage of depths, got (4, 2)"),
        ("kernels", (4, 4, 4), ValueError, "kernel: expected an odd number, got 4"),
        ("offset_channels", 3, ValueError, "offset_channels: expected one of 1, 2, got 3"),
        ("scale", "C", ValueError, "scale: expected one of 'dim', 'head', got 'C'"),
        ("agent_ratios", (1, 1), ValueError, "agent_ratios: expected 3 values, one for each stage of depths"),
        ("drop_path_rate", 1, ValueError, "drop_path_rate: expected a number from 0 to below 1, got 1"),
        ("top_k", 7, TypeError, "top_k: not an argument of debiformer_mini; did you mean 'topk'?"),
    ],
)
def test_bad_arguments(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught:
        dynattn.create_model("debiformer_mini", **{argument: value})
    assert str(caught.value).startswith(message)


def test_a_step_of_training():
    """Every parameter gets a gradient; dropout and stochastic depth are on."""
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)
    model = dynattn.create_model("debiformer_mini", **SMALL, **rates)
    model(torch.randn(4, 3, 48, 40)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_linear_maps_start_as_in_biformer():
    """Truncated normals of 0.02, biases of 0, bias tables of 0.01; convolutions as torch starts them."""
    torch.manual_seed(0)
    model = dynattn.create_model("debiformer_mini")
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert float(torch.cat([one.weight.flatten() for one in linear]).std()) == pytest.approx(0.02, rel=0.05)
    assert not any(one.bias.any() for one in linear if one.bias is not None)
    tables = [value for name, value in model.named_parameters() if name.endswith("table")]
    assert float(torch.cat([table.flatten() for table in tables]).std()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.slow
def test_a_compiled_and_an_exported_model():
    """torch.compile of both models without a break, one layer of agents for any size, and torch.export.

    In a process without shape checks, which graphs cannot have.
    """
    program = f"""
        import torch, dynattn
        sizes = {SMALL}
        agents = sizes.pop("agent_topk")
        models = [dynattn.create_model("debiformer_mini", **sizes, agent_topk=agents).eval()]
        models += [dynattn.create_model("biformer_mini", **sizes).eval()]
        images = torch.randn(2, 3, 50, 44)
        with torch.no_grad():
            for model in models:
                torch.compiler.reset()
                compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
                torch.testing.assert_close(compiled(images), model(images))
                exported = torch.export.export(model, (images,)).module()
                torch.testing.assert_close(exported(images), model(images))
            torch.compiler.reset()
            layer = models[0].stages[0].blocks[1].attn
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
            for shape in ((16, 16), (7, 9)):
                x = torch.randn(1, *shape, 16)
                torch.testing.assert_close(compiled(x), layer(x))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=600)
