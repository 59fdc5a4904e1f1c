"""DGT's models and its comparisons: composition, parameters, sizes of input, keys at run time, other blocks, costs."""

import csv
import math
from decimal import Decimal

import deterministic
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import normal
from jaxtyping import config
from torch import nn
from torch.utils.checkpoint import checkpoint

import dynattn
from dynattn import core, cost, ops
from dynattn.mechanisms.baselines import CrossShapedWindowAttention, SpatialReductionAttention
from dynattn.mechanisms.dense import DenseAttention
from dynattn.mechanisms.dynamic_group import DynamicGroupAttention
from dynattn.models.dgt import IRFFN, ConditionalPosition, DGTBlock, Stem

SMALL = dict(
    img_size=64, num_classes=5, dims=(16, 32, 64), depths=(1, 2, 1), heads=(2, 2, 4), groups=4, keys=(40, 9)
) | dict(head_dim=24, drop_path_rate=0.0)
CSWIN = dict(dims=(16, 32), depths=(1, 2), heads=(2, 4), stripes=(1, 3), num_classes=3, groups=4, keys=9)
SWIN = dict(img_size=64, embed_dim=16, depths=(1, 2), num_heads=(2, 4), num_classes=3, groups=4, keys=9)


def small(name: str = "dgt_mini", **options) -> nn.Module:
    """A DGT that runs in milliseconds, with deterministic weights in float64."""
    return deterministic.filled(dynattn.create_model(name, **(SMALL | options)))


def small_cswin(**options) -> nn.Module:
    return deterministic.filled(dynattn.create_model("cswin_tiny", **(CSWIN | options)))


def small_swin(**options) -> nn.Module:
    return deterministic.filled(dynattn.create_model("swin_tiny_dgt", **(SWIN | options)))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64) -> torch.Tensor:
    return model(deterministic.image(2, size))


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return dynattn.create_model(name, **options)


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- parameters

PUBLISHED = {  # learned parameters: of all, of the backbone without its head
    "dgt_tiny": (24_093_928, 22_153_728),
    "dgt_small": (51_764_979, 49_497_099),
    "dgt_base": (90_280_012, 87_684_452),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_to_the_unit(name):
    model = on_meta(name)
    assert (size_of(model), size_of(model) - size_of(model.widen) - size_of(model.head)) == PUBLISHED[name]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("name", "centroids"), [("dgt_tiny", 224), ("dgt_small", 336), ("dgt_base", 449)])
def test_centroids_are_buffers(name, centroids):
    """48 of 32 channels in every head: as parameters they would miss the printed numbers."""
    layers = on_meta(name).grouped_layers()
    assert round(sum(layer.centroids.numel() for layer in layers) / 1e3) == centroids
    assert all(tuple(layer.centroids.shape) == (layer.heads, 48, 32) for layer in layers) and len(layers) == 20


def test_one_temperature_a_head_in_the_larger_two():
    for name, heads in (("dgt_tiny", 0), ("dgt_small", 3 + 2 * 6 + 17 * 12 + 2 * 24), ("dgt_base", 356)):
        found = {key: p for key, p in on_meta(name).named_parameters() if key.endswith("temperature")}
        assert sum(p.numel() for p in found.values()) == heads


def test_what_each_choice_has_in_parameters():
    """In DGT-T, thousands: position encodings, biases of qkv, LayerNorms of the blocks, the last batch norms."""
    model = on_meta("dgt_tiny")
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [len(stage.blocks) for stage in model.stages] == [1, 2, 17, 2]
    count = lambda parts: round(sum(map(size_of, parts)) / 1e3)  # noqa: E731
    assert count(block.cpe for block in blocks) == 57
    assert round(sum(block.attn.qkv.bias.numel() for block in blocks) / 1e3) == 17
    assert count(norm for block in blocks for norm in (block.norm1, block.norm2)) == 23
    assert count(block.ffn.activate[1] for block in blocks) == count(block.ffn.expand[2] for block in blocks) == 46
    assert count(block.ffn.reduce[1] for block in blocks) == 11


def test_the_small_model_is_small():
    model = dynattn.create_model("dgt_mini")
    assert 900_000 <= size_of(model) <= 1_100_000
    found = [(r.kind, r.query_shape) for r in dynattn.trace(model, torch.randn(3, 128, 128))]
    assert found == [("dynamic_group", (32, 32))] + 4 * [("dynamic_group", (16, 16))] + 3 * [("dense", (8, 8))]
    assert all(4 * layer.keys == cells for layer, cells in zip(model.grouped_layers(), [1024, *[256] * 4], strict=True))


@pytest.mark.parametrize("keys", [1, 512])
def test_no_parameter_depends_on_the_keys(keys):
    model, other = small(), small(keys=keys)
    other.load_state_dict(model.state_dict())
    other.set_keys(40)
    model.set_keys(40)
    assert torch.equal(answer(model), answer(other))


# ---------------------------------------------------------------- composition


class Twice(nn.Module):
    """In the place of an attention layer: what it gives is known."""

    def forward(self, x):
        return 2 * x + x.flip(1)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_is_its_equations(post_norm):
    """DGT-8, DGT-9, DGT-10, and their order in DGT-S and DGT-B, whose LayerNorms stand behind the branches."""
    block = deterministic.filled(DGTBlock(8, Twice(), post_norm=post_norm))
    x = normal(2, 5, 7, 8)
    after = lambda branch, norm: (lambda y: norm(branch(y))) if post_norm else (lambda y: branch(norm(y)))  # noqa: E731
    placed = x + F.conv2d(x.movedim(3, 1), block.cpe.conv.weight, block.cpe.conv.bias, 1, 1, groups=8).movedim(1, 3)
    attended = placed + after(Twice(), block.norm1)(placed)
    torch.testing.assert_close(block(x), attended + after(block.ffn, block.norm2)(attended))


def test_the_feed_forward_network_is_its_parts():
    """Four times wider; GELU before batch norm; the depthwise convolution beside an identity; nothing at the end."""
    ffn, x = deterministic.filled(IRFFN(4)), normal(2, 4, 5, 6)
    conv1, _, norm1 = ffn.expand
    conv3, norm3 = ffn.reduce
    assert conv1.weight.shape == (16, 4, 1, 1) and ffn.depthwise.weight.shape == (16, 1, 3, 3)
    y = norm1(F.gelu(F.conv2d(x, conv1.weight, conv1.bias)))
    y = ffn.activate[1](F.gelu(y + F.conv2d(y, ffn.depthwise.weight, ffn.depthwise.bias, padding=1, groups=16)))
    y = norm3(F.conv2d(y, conv3.weight, conv3.bias))
    torch.testing.assert_close(ffn(x.movedim(1, 3)), y.movedim(1, 3))


def test_the_stem_and_the_head():
    """Strides 2, 1, 1; at the end 1 x 1, batch norm, SiLU, average, and no LayerNorm."""
    model = small().eval()
    assert [conv[0].stride[0] for conv in model.embed.convs] == [2, 1, 1]
    assert [type(part) for part in model.embed.convs[0]] == [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    assert Stem(3, 4)(torch.randn(1, 7, 10, 3)).shape == (1, 4, 5, 4)
    x = normal(2, 64, 4, 4)
    conv, norm, _ = model.widen
    wide = F.silu(norm(torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]))
    torch.testing.assert_close(model.forward_head(x), model.head(wide.mean((2, 3))))
    maps = model.forward_intermediates(deterministic.image(1, 64), intermediates_only=True)
    assert torch.equal(model.forward_features(deterministic.image(1, 64)), maps[-1])


def test_dropout_stands_before_the_classifier():
    model = small(drop_rate=0.5).train()
    x = normal(1, 64, 4, 4).expand(4, -1, -1, -1)  # batch norm of equal images
    kept = model.forward_head(x, pre_logits=True)
    assert 0.2 < kept.eq(0).double().mean() < 0.8
    assert not model.eval().forward_head(x, pre_logits=True).eq(0).any()


def test_stochastic_depth_never_drops_the_position():
    block = deterministic.filled(DGTBlock(8, Twice(), drop_path=1.0)).train()
    x = normal(2, 5, 7, 8)
    torch.testing.assert_close(block(x), x + block.cpe(x))


def test_rates_of_stochastic_depth():
    model = dynattn.create_model("dgt_mini", drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.4 * i / 7 for i in range(8)])
    assert [on_meta(name).stages[-1].blocks[-1].drop_path.drop_prob for name in PUBLISHED] == pytest.approx(
        [0.2, 0.4, 0.5]
    )


@pytest.mark.parametrize("cosine", [False, True])
def test_dense_attention_equals_its_parts(cosine):
    """DAT-1, DAT-2, DAT-3; with cosines, the logits are those times e^t, t learned and at most log 100."""
    layer, x = deterministic.filled(DenseAttention(8, 4, cosine=cosine)), normal(2, 3, 5, 8)
    q, k, v = (core.split_heads(part, 4) for part in layer.qkv(x).chunk(3, dim=-1))
    scale = 2**-0.5
    if cosine:
        with torch.no_grad():
            layer.temperature.copy_(torch.tensor([0.0, 1.0, math.log(10), 50.0]).reshape(4, 1, 1))
        factor = torch.tensor([1.0, math.e, 10.0, 100.0], dtype=x.dtype).reshape(4, 1, 1)
        q, k, scale = q / q.norm(dim=-1, keepdim=True) * factor, k / k.norm(dim=-1, keepdim=True), 1.0
    z = ops.dense_attention(q, k, v, scale=scale, impl="loops")
    torch.testing.assert_close(layer(x), layer.proj(core.merge_heads(z, (3, 5))), rtol=1e-6, atol=1e-7)
    assert DenseAttention(8, 4, cosine=cosine)(x.float()).shape == x.shape


@pytest.mark.parametrize("name", ["dgt_mini", "dgt_small"])
def test_with_all_keys_it_is_global_attention(name):
    """Whatever the groups: a DGT whose layers read every key equals one with dense attention of the same weights."""
    build = lambda: small(name, keys=256, post_norm=name != "dgt_mini", cosine=name != "dgt_mini")  # noqa: E731
    grouped, dense = build(), build()
    for stage in dense.stages[:-1]:
        for block in stage.blocks:
            layer = block.attn
            block.attn = DenseAttention(layer.dim, layer.heads, cosine=name != "dgt_mini").double()
            block.attn.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "centroids"})
    torch.testing.assert_close(answer(grouped), answer(dense), rtol=0, atol=1e-10)
    grouped.set_keys(9)
    assert (answer(grouped) - answer(dense)).abs().max() > 1e-4


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "options",
    [
        dict(groups=7),
        dict(groups=(4, 9)),
        dict(keys=5),
        dict(keys=(40, 8)),
        dict(post_norm=True),
        dict(cosine=True),
        dict(block="swin", window=3),
        dict(block="cswin"),
        dict(block="cmt"),
    ],
    ids=str,
)
def test_every_option_changes_the_answer(options):
    logits = answer(small(**options))
    assert logits.isfinite().all() and (logits - answer(small())).abs().max() > 1e-5
    assert answer(small(**options), (45, 70)).isfinite().all()


@pytest.mark.parametrize("equation", [12, 13, 17])
def test_a_misprint_of_the_whole_model(equation):
    """DGT-12 and DGT-13 as printed change the logits, DGT-17 the gradients alone; right ones are the default."""
    x, found = deterministic.image(1, 64), []
    for options in ({}, {"variant": "paper"}, {"as_printed": equation}):
        model = small(**options)
        logits = model(x)
        logits.sum().backward()
        found.append((logits.detach(), model.grouped_layers()[0].qkv.weight.grad))
    (right, slopes), (same, _), (printed, other) = found
    assert torch.equal(right, same)
    assert (right - printed).abs().max() < 1e-6 if equation == 17 else (right - printed).abs().max() > 1e-4
    assert (slopes - other).abs().max() > 1e-5


def test_misprints_of_what_does_not_group():
    with pytest.raises(ValueError, match="as_printed: expected none where block='swin'"):
        dynattn.create_model("dgt_mini", block="swin", as_printed=(12,))


def test_groups_and_keys_by_stage():
    layers = small(groups=(3, 5), keys=(7, 11, 13)).grouped_layers()
    assert [(layer.groups, layer.keys) for layer in layers] == [(3, 7), (5, 11), (5, 11)]
    assert {(layer.groups, layer.keys) for layer in small(groups=3, keys=7).grouped_layers()} == {(3, 7)}


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("key", 3, TypeError, "key: not an argument of dgt_mini; did you mean 'keys'?"),
        ("variant", "official", ValueError, "variant: expected one of 'paper', got 'official'"),
        ("as_printed", (12, 14), ValueError, "as_printed: expected some of 4, 12, 13, 17, got (12, 14)"),
        ("groups", 0, ValueError, "groups: expected at least 1, got 0"),
        ("groups", (4,), ValueError, "groups: expected a number, or 2, one for each stage that groups, got (4,)"),
        ("groups", 4.0, ValueError, "groups: expected a number, or 2, one for each stage that groups, got 4.0"),
        ("keys", True, TypeError, "keys: expected a whole number, got True"),
        ("keys", (5, -1), ValueError, "keys: expected at least 1, got -1"),
        ("keys", None, ValueError, "keys: expected a number, or 2, one for each stage that groups, got None"),
        ("depths", 4, TypeError, "depths: expected the number of blocks of every stage, got 4"),
        ("depths", (1, 0, 1), ValueError, "depths: expected at least 1, got 0"),
        ("dims", (16, 32), ValueError, "dims: expected 3 values, one for each stage of depths, got (16, 32)"),
        ("heads", (3, 2, 2), ValueError, "heads: expected a divisor of 32, got 3"),
        ("block", "vit", ValueError, "block: expected one of 'dgt', 'swin', 'cswin', 'cmt', got 'vit'"),
        ("head_dim", 0, ValueError, "head_dim: expected at least 1, got 0"),
        ("in_chans", 0, ValueError, "in_chans: expected at least 1, got 0"),
        ("num_classes", -1, ValueError, "num_classes: expected at least 1, got -1"),
        ("drop_rate", 1.0, ValueError, "drop_rate: expected a number from 0 to below 1, got 1.0"),
        ("drop_path_rate", "0", ValueError, "drop_path_rate: expected a number from 0 to below 1, got '0'"),
        ("img_size", 0, ValueError, "img_size[0]: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_say_what_would_be_right(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught:
        dynattn.create_model("dgt_mini", **{argument: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small_cswin(attention="window"), "attention: expected one of 'cross_shaped', 'dynamic_group', got 'w"),
        (lambda: small_cswin(stripes=(1,)), "stripes: expected 2 values, one for each stage of depths, got (1,)"),
        (lambda: small_cswin(heads=(1, 2)), "heads: expected an even number, got 1"),
        (lambda: CrossShapedWindowAttention(8, 2, 0), "stripe: expected at least 1, got 0"),
        (lambda: CrossShapedWindowAttention(8, 2, 1)(torch.zeros(1, 4, 4, 6)), "x: expected shape (B H W 8), got"),
        (lambda: DenseAttention(8, 3), "heads: expected a divisor of 8, got 3"),
        (lambda: DenseAttention(8, 2)(torch.zeros(1, 4, 4, 6)), "x: expected shape (B H W 8), got"),
        (lambda: small().set_keys(0), "keys: expected at least 1, got 0"),
        (lambda: small().float()(torch.zeros(1, 1, 8, 8)), "x: expected shape (B 3 H W), got shape (1, 1, 8, 8)"),
    ],
)
def test_other_bad_arguments(build, message, unchecked):
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value).startswith(message)


# ---------------------------------------------------------------- any height and width


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (224, 96), (2, 97), (113, 1), (7, 5), (64, 64)], ids=str)
def test_odd_sizes(size):
    model = dynattn.create_model("dgt_tiny", depths=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(torch.randn(1, 3, *size))
        logits = model.forward_head(final)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // s) for side in size) for s in (4, 8, 16, 32)]
    assert logits.shape == (1, 1000) and logits.isfinite().all()


def test_keys_at_run_time():
    """98 at 224 pixels, 512 where maps are larger; never more than there are."""
    model = small(keys=98)
    model.set_keys(512)
    assert all(layer.keys == 512 for layer in model.grouped_layers())
    records = dynattn.trace(model, torch.randn(3, 128, 96).double()).of_kind("dynamic_group")
    assert [r.selected.shape[-1] for r in records] == [512, 192, 192]
    model.grouped_layers()[0].keys = 3
    records = dynattn.trace(model, torch.randn(3, 128, 96).double()).of_kind("dynamic_group")
    assert [r.selected.shape[-1] for r in records] == [3, 192, 192]


def test_images_of_a_batch_do_not_mix():
    model, images = small(), deterministic.image(3, (45, 64))
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the interface of a backbone


def test_feature_info_and_intermediates():
    model, image = small(), deterministic.image(2, (50, 70))
    final, maps = model.forward_intermediates(image)
    assert [m.shape for m in maps] == [(2, 16, 13, 18), (2, 32, 7, 9), (2, 64, 4, 5)]
    assert [(i["num_chs"], i["reduction"], i["module"]) for i in model.feature_info] == [
        (16, 4, "stages.0"),
        (32, 8, "stages.1"),
        (64, 16, "stages.2"),
    ]
    assert torch.equal(model.forward_head(final), model(image))
    pooled = model.forward_head(final, pre_logits=True)
    assert pooled.shape == (2, 24) and torch.equal(model.get_classifier()(pooled), model(image))


def test_reset_classifier():
    model = small()
    assert (model.num_features, model.head_hidden_size) == (64, 24)
    model.reset_classifier(9)
    assert answer(model).shape == (2, 9) and model.head.in_features == 24
    model.reset_classifier(0)
    assert answer(model).shape == (2, 24) and answer(small(num_classes=0)).shape == (2, 24)


def test_pruning_removes_the_whole_head():
    model, x = small(), deterministic.image(1, 64)
    with torch.no_grad():
        before = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert model.prune_intermediate_layers([1]) == [1]
        after = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(before[0], after[0]) and len(model.stages) == 2
    assert size_of(model) == size_of(model.embed) + size_of(model.stages)
    model.reset_classifier(3)  # on the map that is the last now
    assert model.double()(x).shape == (1, 3)


def test_weight_decay_leaves_tables_and_temperatures_alone():
    tables, temperatures = small(block="swin").no_weight_decay(), small(cosine=True).no_weight_decay()
    assert len(tables) == 3 and all(name.endswith("attn.table") for name in tables)
    assert len(temperatures) == 4 and all(name.endswith("attn.temperature") for name in temperatures)
    assert small().no_weight_decay() == set()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "options", [{}, dict(post_norm=True, cosine=True), *(dict(block=b) for b in ("swin", "cswin", "cmt"))], ids=str
)
def test_every_parameter_learns(options):
    """In evaluation: batch norm in training takes away the slopes by the biases in front of it."""
    model = small(**options)
    (model(deterministic.image(2, 64)) * normal(2, 5)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("build", [small, lambda: small_cswin(attention="dynamic_group"), small_swin])
def test_update_centroids_moves_those_of_every_layer(build):
    model = build().train()
    before = [layer.centroids.clone() for layer in model.grouped_layers()]
    model(deterministic.image(2, 64))
    assert all(torch.equal(layer.centroids, old) for layer, old in zip(model.grouped_layers(), before, strict=True))
    model.update_centroids(0.5)
    assert len(before) == 3 and before[0].shape[1] == 4
    assert not any(torch.equal(layer.centroids, old) for layer, old in zip(model.grouped_layers(), before, strict=True))


def test_update_centroids_hands_on_the_learning_rate(monkeypatch):
    seen = []
    monkeypatch.setattr(DynamicGroupAttention, "update_centroids", lambda self, lr: seen.append(lr))
    small().update_centroids(0.25)
    assert seen == [0.25] * 3
    assert small(block="swin").update_centroids(0.25) is None and len(seen) == 3


def test_activation_checkpointing_gives_the_same_gradients():
    """The forward that the backward repeats finds the same groups."""
    images, target = deterministic.image(2, 64), normal(2, 5)
    found = []
    for recompute in (False, True):
        model = small().train()
        if recompute:
            for stage in model.stages:
                stage.blocks.forward = lambda x, run=stage.blocks.forward: checkpoint(run, x, use_reentrant=False)
        (model(images) * target).sum().backward()
        model.update_centroids(0.1)
        found.append([p.grad for p in model.parameters()] + [layer.centroids for layer in model.grouped_layers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, dict(post_norm=True, cosine=True), dict(block="cswin"), dict(block="cmt")], ids=str
)
def test_bfloat16_autocast(options):
    model, images = small(**options).float(), deterministic.image(2, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


def test_initial_weights_are_a_function_of_the_seed():
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(dynattn.create_model("dgt_mini").state_dict())
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert not torch.equal(made[0]["stages.0.blocks.0.attn.centroids"], made[2]["stages.0.blocks.0.attn.centroids"])


# ---------------------------------------------------------------- other blocks (Table 4c)


@pytest.mark.parametrize(
    ("block", "kinds"),
    [
        ("dgt", ["dynamic_group"] * 3 + ["dense"]),
        ("swin", ["window"] * 3 + ["dense"]),
        ("cswin", ["baselines"] * 3 + ["dense"]),
        ("cmt", ["baselines"] * 3 + ["dense"]),
    ],
)
def test_blocks_in_dgt(block, kinds):
    model = small(block=block, window=3)
    t = dynattn.trace(model, deterministic.image(1, (50, 70))[0])
    assert [r.kind for r in t] == kinds
    assert t.rollout(5, 5).sum().item() == pytest.approx(1)
    if block == "swin":
        assert [r.shift for r in t.of_kind("window")] == [(0, 0), (0, 0), (1, 1)]
    if block == "cmt":
        assert [type(part) for part in model.stages[0].blocks[0].children()][:3] == [
            ConditionalPosition,
            nn.LayerNorm,
            SpatialReductionAttention,
        ]


def test_reduction_of_cmt_is_depthwise():
    """DAT-1, DAT-2, DAT-3 with keys of r x r cells that a convolution has joined, every channel by itself."""
    layer, x = deterministic.filled(SpatialReductionAttention(8, 4, 2, depthwise=True)), normal(2, 4, 6, 8)
    patches = rearrange(x, "B (I r) (J s) C -> B (I J) C r s", r=2, s=2)
    reduced = torch.einsum("bncrs,crs->bnc", patches, layer.reduce.weight[:, 0]) + layer.reduce.bias
    k, v = (rearrange(t, "B N (h d) -> B h N d", h=4) for t in layer.kv(reduced).chunk(2, dim=-1))
    z = ops.dense_attention(core.split_heads(layer.q(x), 4), k, v, impl="loops")
    torch.testing.assert_close(layer(x), layer.proj(core.merge_heads(z, (4, 6))), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- cross-shaped windows


def crossed(layer: CrossShapedWindowAttention, x: torch.Tensor) -> torch.Tensor:
    """CSWin's attention by its definition: every stripe of every head by itself, what is outside of it unread."""
    H, W = x.shape[1:3]
    heads = []
    for m, (q, k, v) in enumerate(
        zip(*(t.split(layer.dim // layer.heads, -1) for t in layer.qkv(x).chunk(3, -1)), strict=True)
    ):
        axis, z = (1, torch.zeros_like(v)) if m < layer.heads // 2 else (2, torch.zeros_like(v))
        for start in range(0, (H, W)[axis - 1], layer.stripe):
            part = lambda t, axis=axis, start=start: t.narrow(axis, start, min(layer.stripe, t.shape[axis] - start))  # noqa: E731
            one = lambda t, part=part: part(t).flatten(1, 2)[:, None]  # noqa: E731
            part(z).copy_(ops.dense_attention(one(q), one(k), one(v), impl="loops").reshape(part(z).shape))
        heads.append(z)
    return torch.cat(heads, dim=-1)


@pytest.mark.parametrize("shape", [(4, 6), (5, 3), (1, 7), (3, 3)])
@pytest.mark.parametrize("stripe", [1, 2, 4])
def test_cross_shaped_windows_equal_their_parts(shape, stripe):
    """DAT-1, DAT-2, DAT-3 in stripes, and the depthwise convolution of the values."""
    layer, x = deterministic.filled(CrossShapedWindowAttention(8, 4, stripe)), normal(2, *shape, 8)
    with torch.no_grad():
        v = layer.qkv(x)[..., 16:].movedim(3, 1)
        lepe = F.conv2d(v, layer.lepe.weight, layer.lepe.bias, padding=1, groups=8).movedim(1, 3)
        torch.testing.assert_close(layer(x), layer.proj(crossed(layer, x) + lepe), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 24), (20, 12)])
def test_a_record_of_cross_shaped_windows(shape):
    """It explains the attention; what is left is the convolution's. Keys are the stripe, whatever their weight."""
    model = small_cswin()
    t = dynattn.trace(model, deterministic.image(1, shape)[0])
    assert [r.kind for r in t] == ["baselines"] * 3 and not any(r.exact for r in t)
    record, layer = t["stages.1.blocks.1.attn"], model.stages[1].blocks[1].attn
    H, W = record.query_shape
    v = rearrange(record.v, "m (H W) d -> 1 (m d) H W", H=H)
    lepe = rearrange(layer.lepe(v), "1 (m d) H W -> m (H W) d", m=4)
    for head in range(4):
        explained = record.effective_matrix(head) @ record.value(head)
        torch.testing.assert_close(explained + lepe[head], record.output(head), rtol=1e-10, atol=1e-12)
        assert record.rest(head) > 0.01
        cells = record.cells()[record.may_read(head)[0]]
        along, across = (0, 1) if head < 2 else (1, 0)  # of (x, y): along and across the stripe
        assert len(cells[:, along].unique()) == (W if head < 2 else H)
        assert len(cells[:, across].unique()) == min(3, H if head < 2 else W)
        keys = record.keys(0, 0, head)
        assert torch.equal(keys.xy, cells.to(keys.xy)) and keys.weight.sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="head: expected 0 to 3, got 4"):
        record.keys(0, 0, 4)


# ---------------------------------------------------------------- in the places of other attentions (Table 5)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (small_cswin, "baselines"),
        (lambda: small_cswin(attention="dynamic_group"), "dynamic_group"),
        (small_swin, "dynamic_group"),
    ],
    ids=["cswin", "cswin_dgt", "swin_dgt"],
)
def test_drop_ins_run_and_learn(build, kind):
    model = build()
    assert answer(model).shape == (2, 3) and answer(model, (64, 96)).shape == (2, 3)
    t = dynattn.trace(model, deterministic.image(1, 64)[0])
    assert [(r.kind, r.query_shape) for r in t] == [(kind, (16, 16))] + 2 * [(kind, (8, 8))]
    (model(deterministic.image(2, 64)) * normal(2, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_a_drop_in_replaces():
    """Attention and position encoding, nothing else; keys as many as a window of Swin's has."""
    import timm

    swin, ours = timm.create_model("swin_tiny_patch4_window7_224"), on_meta("swin_tiny_dgt")
    heads, dims = (
        [n for n, depth in zip(numbers, (2, 2, 6, 2), strict=True) for _ in range(depth)]
        for numbers in ((3, 6, 12, 24), (96, 192, 384, 768))
    )
    assert size_of(ours) == size_of(swin) - 13 * 13 * sum(heads) + 10 * sum(dims)  # tables out, CPE in
    assert {layer.keys for layer in ours.grouped_layers()} == {49} and len(ours.grouped_layers()) == 12
    plain, grouped = on_meta("cswin_tiny"), on_meta("cswin_tiny", attention="dynamic_group")
    assert size_of(plain) == size_of(grouped) == 22_320_552  # the encoding of values is as large as that in front
    assert len(grouped.grouped_layers()) == 25


def test_swin_with_groups_trains_with_timms_checkpointing():
    model = small_swin(drop_path_rate=0.1).train()
    assert [getattr(b.drop_path, "drop_prob", 0.0) for s in model.layers for b in s.blocks] == pytest.approx(
        [0, 0.05, 0.1]
    )
    model.set_grad_checkpointing()
    model(deterministic.image(2, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [(1, 1), (31, 50), (97, 2)], ids=str)
def test_cswin_at_odd_sizes(size):
    for attention in ("cross_shaped", "dynamic_group"):
        maps = small_cswin(attention=attention).forward_intermediates(
            deterministic.image(1, size), intermediates_only=True
        )
        assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-side // s) for side in size) for s in (4, 8)]


# ---------------------------------------------------------------- costs


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    config.update("jaxtyping_disable", True)
    try:
        return {row["name"]: row for row in cost.table("dgt")}
    finally:
        config.update("jaxtyping_disable", False)


MEASURED = {  # multiply-adds in G: torch's, with biases
    "dgt_tiny": (4.328, 4.348),
    "dgt_small": (9.381, 9.411),
    "dgt_base": (16.361, 16.401),
    "dgt_tiny_g24": (4.267, 4.287),
    "dgt_tiny_k49": (4.205, 4.225),
    "dgt_tiny_swin_block": (4.028, 4.041),
    "dgt_tiny_cswin_block": (4.128, 4.143),
    "dgt_tiny_cmt_block": (3.685, 3.703),
    "swin_tiny+dg_attention": (4.641, 4.655),
    "cswin_tiny": (4.324, 4.339),
    "cswin_tiny+dg_attention": (4.500, 4.515),
}


def rounded(value: float, printed: str) -> str:
    """A number with as many digits behind the point as the paper prints."""
    return str(round(Decimal(value), -Decimal(printed).as_tuple().exponent))


def test_every_row_of_the_paper_s_classification_tables_is_there(rows):
    with cost.tables()["dgt"].published.open(newline="") as file:
        said = {row["model"] for row in csv.DictReader(file) if row["paper"] == "dgt" and row["task"] == "imagenet1k"}
    assert set(rows) == said == set(MEASURED)


@pytest.mark.parametrize("name", MEASURED)
def test_multiply_adds(name, rows):
    row = rows[name]
    assert (round(row["macs"] / 1e9, 3), round(row["macs_biases"] / 1e9, 3)) == MEASURED[name]
    if row["paper_macs_G"]:
        assert rounded(row["macs_biases"] / 1e9, row["paper_macs_G"]) == row["paper_macs_G"]
    if row["paper_params_M"] and name != "cswin_tiny":
        assert rounded(row["params"] / 1e6, row["paper_params_M"]) == row["paper_params_M"]


LAYERS = {"dgt_tiny": (64, 2), "dgt_small": (96, 3), "dgt_base": (128, 4)}  # channels and heads of stage 1


def test_the_numbers_in_the_notes(rows):
    """DGT-6: 2kLC + 2LGC of the twenty layers that group, at 56, 28 and 14 cells a side."""
    note = rows["dgt_tiny"]["note"]
    without = {"biases": [], "groups": []}
    for name, (C, _) in LAYERS.items():
        maps = [(56**2, C, 1), (28**2, 2 * C, 2), (14**2, 4 * C, 17)]
        grouping = sum(depth * 2 * L * 48 * channels for L, channels, depth in maps)
        answer = lambda L, c: DynamicGroupAttention(c, 1).multiply_adds((1, 1, L, c)) - 4 * L * c**2  # noqa: E731
        assert sum(depth * answer(L, c) for L, c, depth in maps) == grouping * (48 + 98) / 48
        without["biases"].append(rounded(rows[name]["macs"] / 1e9, "0.00"))
        without["groups"].append(rounded((rows[name]["macs"] - grouping) / 1e9, "0.00"))
        if name == "dgt_tiny":
            masked = sum(depth * 2 * L * (L - 98) * channels for L, channels, depth in maps)
            assert f"{rounded((rows[name]['macs'] - grouping + masked) / 1e9, '0.00')} G for DGT-T" in note
    for numbers in without.values():
        assert "{}, {} and {} G".format(*numbers) in note


def test_a_layer_s_cost_is_the_equation_s():
    """DGT-6, with the linear maps and the position encoding, whose additions are counted apart."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_chans, self.attn = 8, DynamicGroupAttention(8, 2, 3, 5, position_encoding=True)

        def forward(self, x):
            return self.attn(x.movedim(1, -1))

    model = Alone()
    found = cost.count(model, (4, 6))
    assert found.macs == 24 * (4 * 8 * 8 + 9 * 8) + 2 * 5 * 24 * 8 + 2 * 24 * 3 * 8
    assert found.macs_biases == found.macs + 24 * (3 * 8 + 8 + 8)
    assert cost.count(model, (1, 2)).macs == 2 * (4 * 8 * 8 + 9 * 8) + 2 * 2 * 2 * 8 + 2 * 2 * 3 * 8  # two keys only


def test_counting_does_not_need_numbers_and_leaves_the_layers_as_they_were():
    model = small()
    before = answer(model)
    assert cost.count(on_meta("dgt_mini", **SMALL), 64) == cost.count(model, 64)
    assert torch.equal(answer(model), before) and "forward" not in vars(model.grouped_layers()[0])


def test_the_printed_table(capsys, rows, monkeypatch):
    monkeypatch.setattr(cost, "table", lambda paper, progress: list(rows.values()))
    cost.print_table("dgt")
    lines = capsys.readouterr().out.splitlines()
    assert "biases" in lines[0] and "fvcore" not in lines[0]
    assert lines[1].split()[:6] == ["dgt_tiny", "24,093,928", "24.09M", "4.328G", "4.348G", "4.35G"]
    assert lines[4].split()[:6] == ["dgt_tiny_g24", "24,093,928", "-", "4.267G", "4.287G", "-"]
