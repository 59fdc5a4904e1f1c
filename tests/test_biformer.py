"""BiFormer's models: equality with the published code, counts, arguments, sizes."""

import deterministic
import numpy as np
import published_bilevel
import pytest
import torch
from published_bilevel import LOGITS, MEASURED
from torch import nn

import dynattn
from dynattn import cost, official
from dynattn.mechanisms.bilevel import BiLevelRoutingAttention
from dynattn.models.biformer import BiLevelBlock, FullAttention

NAMES = [name for name in MEASURED if name.startswith("biformer")]
SMALL = dict(img_size=64, num_classes=5, dims=(16, 32, 64), depths=(1, 2, 1), heads=(2, 2, 4), regions=3, topk=(2, 3))


def small(**options) -> nn.Module:
    """A BiFormer that runs in milliseconds, with deterministic weights in float64."""
    return deterministic.filled(dynattn.create_model("biformer_mini", **SMALL | options))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64) -> torch.Tensor:
    return model(deterministic.image(2, size))


# -------------------------------------------------------------------------------------------------- the published code


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds(name, unchecked):
    """Within a thousandth of what torch counts of the published code; every parameter learns."""
    entries, parameters, macs, _ = MEASURED[name]
    with torch.device("meta"):
        model = dynattn.create_model(name)
    count = cost.count(model, 224)
    assert (len(model.state_dict()), count.params) == (entries, parameters)
    assert count.macs / 1e9 == pytest.approx(macs, rel=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_published_ones(name, shared):
    with torch.device("meta"):
        model = dynattn.create_model(name)
    names = {name: entry.name for name, entry in model.published_entries().items()}
    ours = {names[own]: tuple(entry.shape) for own, entry in model.state_dict().items()}
    assert ours == published_bilevel.listed(shared / f"keys_{name}.tsv")


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return published_bilevel.published("biformer_tiny")


@pytest.fixture(scope="module")
def computed(tiny) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return published_bilevel.seen(tiny, deterministic.image(2, 224))


def test_golden_logits(computed):
    """Holds anywhere: a handful of logits as plain numbers."""
    first, last = LOGITS["biformer_tiny"]
    np.testing.assert_allclose(computed[0][0, :4], first, rtol=0, atol=7e-8)
    np.testing.assert_allclose(computed[0][1, -2:], last, rtol=0, atol=7e-8)


def test_the_published_code_s_logits_and_stages(computed, shared):
    recorded, (logits, maps) = np.load(shared / "golden_biformer_tiny.npz"), computed
    assert np.abs(logits.numpy() - recorded["logits"]).max() < 1e-9 * recorded["logits"].std()
    for i, found in enumerate(maps):
        assert [*found.shape] == recorded[f"stage{i}_shape"].tolist()
        measured = {"mean": found.mean(), "std": found.std(correction=0), "first8": found.flatten()[:8]}
        for measure, value in measured.items():
            scale = float(recorded[f"stage{i}_std"])
            np.testing.assert_allclose(value, recorded[f"stage{i}_{measure}"], rtol=0, atol=1e-9 * scale)


def test_the_published_code_s_routes(tiny, shared):
    """DEBI-9 and DEBI-10 of the first block."""
    routes = np.load(shared / "golden_biformer_tiny.npz")["routing_stages.0.0.attn.router"]
    for image, expected in zip(deterministic.image(2, 224), routes, strict=True):
        record = dynattn.trace(tiny, image)["stages.0.blocks.0.attn"]
        assert record.routing.routes.tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_spread_of_logits(name):
    """Of the larger ones it is known how far the logits of the first image spread."""
    with torch.no_grad():
        logits = published_bilevel.published(name)(deterministic.image(1, 224))
    assert float(logits.std()) == pytest.approx(MEASURED[name][3], abs=0.6)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_says_which_model_it_is_of(name):
    with torch.device("meta"):
        state = published_bilevel.checkpoint(dynattn.create_model(name, num_classes=7))
    assert official.identify(state) == (name, {"num_classes": 7})


def test_another_checkpoint_is_refused_with_the_call_that_fits():
    state = published_bilevel.checkpoint(dynattn.create_model("biformer_tiny"))
    with pytest.raises(ValueError, match=r'It looks like one for dynattn.create_model\("biformer_tiny"\)'):
        dynattn.load_official(dynattn.create_model("biformer_small"), state)
    state["downsample_layers.0.1.num_batches_tracked"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="of the wrong shape: downsample_layers.0.1.num_batches_tracked"):
        dynattn.load_official(dynattn.create_model("biformer_tiny"), state)


# ----------------------------------------------------------------------------------------------------------- the model


def test_a_block_is_its_equations():
    """DEBI-4 and DEBI-5, behind a depthwise convolution."""
    block = BiLevelBlock(8, nn.Linear(8, 8), nn.Linear(8, 8)).double()
    z = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    z0 = z + block.position(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    z1 = block.attn(block.norm1(z0)) + z0
    torch.testing.assert_close(block(z), block.ffn(block.norm2(z1)) + z1)
    assert block.norm1.eps == block.norm2.eps == 1e-6


def test_the_last_stage_reads_everything():
    """DEBI-1 to DEBI-3 in the last stage, with a convolution of the input beside it, which A_eff leaves out."""
    trace = dynattn.trace(small(), deterministic.image(1, 64)[0])
    assert [record.kind for record in trace] == ["bilevel"] * 3 + ["dense"]
    assert [record.exact for record in trace] == [False] * 4 and all(record.rest(0) > 0.01 for record in trace)
    layer, x = FullAttention(8, 2).double(), torch.randn(1, 3, 2, 8, dtype=torch.float64)
    q, k, v = (layer.qkv(x).chunk(3, dim=-1)[i].unflatten(-1, (2, 4)).flatten(1, 2).transpose(1, 2) for i in range(3))
    z = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view_as(x)
    z = z + layer.lce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.proj(z))


def test_the_scale_is_what_the_variants_part_in():
    scales = {}
    for variant in ("official", "paper"):
        layers = [m for m in small(variant=variant).modules() if isinstance(m, BiLevelRoutingAttention)]
        scales[variant] = [layer.scale for layer in layers]
    assert scales == {"official": [16**-0.5, 32**-0.5, 32**-0.5], "paper": [8**-0.5, 16**-0.5, 16**-0.5]}
    assert not torch.equal(answer(small()), answer(small(variant="official")))


@pytest.mark.parametrize(
    "options", [dict(regions=2), dict(regions=(3, 1)), dict(topk=(1, 3)), dict(full_heads=4)], ids=str
)
def test_every_option_changes_the_answer(options):
    logits = answer(small(**options))
    assert logits.isfinite().all() and (logits - answer(small())).abs().max() > 1e-4


@pytest.mark.parametrize("regions", [7, 8, 20])
def test_any_number_of_regions(regions):
    """S is no parameter of the weights."""
    model = small(regions=regions, topk=(400, 400))
    torch.testing.assert_close(answer(model), answer(small(regions=1, topk=(1, 1))))


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (2, 97), (113, 1), (64, 50)], ids=str)
def test_odd_sizes(size):
    """Maps are the ceilings of the halves, and both images are computed alone."""
    model, images = small(), deterministic.image(2, size)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // s) for side in size) for s in (4, 8, 16)]
    torch.testing.assert_close(model.forward_head(final), alone)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("variant", "text", ValueError, "variant: expected one of 'official', 'paper', got 'text'"),
        ("regions", 0, ValueError, "regions: expected at least 1, got 0"),
        ("regions", (7,), ValueError, "regions: expected a number, or 2, one for each stage that routes, got (7,)"),
        ("topk", (1,), ValueError, "topk: expected a number, or 2, one for each stage that routes, got (1,)"),
        ("topk", (1, 2.5), TypeError, "topk: expected a whole number, got 2.5"),
        ("heads", (2, 4), ValueError, "heads: expected 3 values, one for each stage of depths, got (2, 4)"),
        ("full_heads", 7, ValueError, "full_heads: expected a divisor of 128, got 7"),
        ("drop_path_rate", 1, ValueError, "drop_path_rate: expected a number from 0 to below 1, got 1"),
        ("S", 7, TypeError, "S: not an argument of biformer_mini"),
    ],
)
def test_bad_arguments(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught:
        dynattn.create_model("biformer_mini", **{argument: value})
    assert str(caught.value).startswith(message)


def test_a_step_of_training():
    """Every parameter gets a gradient; dropout and stochastic depth are on."""
    rates = dict(drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.1)
    model = dynattn.create_model("biformer_mini", **SMALL, **rates)
    model(torch.randn(4, 3, 48, 40)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_recipe_is_that_of_the_other_small_models():
    from dynattn.training import Recipe, get_recipe

    for name in ("biformer_mini", "debiformer_mini"):
        assert get_recipe(name) == Recipe(name)
        assert sum(p.numel() for p in dynattn.create_model(name).parameters()) < 1_200_000
