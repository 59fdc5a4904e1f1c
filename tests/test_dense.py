"""The record of dense attention, and timm's Vision Transformers in the trace: tokens of the map, and beside it."""

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

import dynattn
from dynattn import core
from dynattn.adapters.timm import token_grid
from dynattn.mechanisms.dense import DenseRecord
from dynattn.tracing import Record, trace

# ---------------------------------------------------------------------------------------------------------- the record


def record(shape: tuple[int, int] = (3, 4), prefix: int = 2, scale: float | None = None) -> tuple[DenseRecord, list]:
    """A record of 2 heads, and the q, k, v, z (2, S, 5) that it was made of."""
    q, k, v = (normal(2, prefix + shape[0] * shape[1], 5) for _ in range(3))
    z = core.dense_attention(q[None], k[None], v[None], scale=scale, impl="loops")[0]
    return DenseRecord(q, k, v, z, shape, prefix=prefix, scale=scale), [q, k, v, z]


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (1, 5), (7, 2)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_effective_matrix_explains_the_loops(shape, prefix, scale):
    """DAT-2: the attention itself, of the map's tokens, to the map's and then to those without a place."""
    found, (_, _, v, z) = record(shape, prefix, scale)
    L = shape[0] * shape[1]
    assert (found.kind, found.query_shape, found.heads, found.exact) == ("dense", shape, 2, True)
    for head in range(2):
        matrix = found.effective_matrix(head)
        assert matrix.shape == (L, L + prefix) and torch.equal(matrix, found.weights(head))
        torch.testing.assert_close(matrix.sum(1), torch.ones_like(matrix[:, 0]))
        torch.testing.assert_close(found.value(head), torch.cat([v[head, prefix:], v[head, :prefix]]))
        torch.testing.assert_close(matrix @ found.value(head), z[head, prefix:], rtol=1e-10, atol=1e-12)
        assert found.rest(head) < 1e-12


def test_keys_are_all_cells_even_where_the_weight_is_nothing():
    """A key of logit -1e4 underflows to 0 and is read all the same; the class token is no position."""
    q, k, v = torch.ones(1, 5, 1), torch.zeros(1, 5, 1), normal(1, 5, 1).float()
    k[0, 2] = -1e4
    found = DenseRecord(q, k, v, core.dense_attention(q[None], k[None], v[None])[0], (2, 2), prefix=1)
    keys = found.keys(1, 0)
    assert keys.xy.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    torch.testing.assert_close(keys.weight, torch.tensor([0.25, 0, 0.25, 0.25]))
    assert keys.weight[1] == 0 and torch.equal(keys.weight, found.effective_matrix()[2, :4])


BAD = [
    (dict(query_shape=(3, 5)), ValueError, r"q: expected shape \(M 17 d\), got shape \(2, 14, 5\)"),
    (dict(query_shape=12), ValueError, r"q: expected shape \(M 146 d\)"),
    (dict(query_shape=(3, 4.0)), TypeError, r"query_shape\[1\]: expected a whole number, got 4.0"),
    (dict(prefix=1), ValueError, r"q: expected shape \(M 13 d\), got shape \(2, 14, 5\)"),
    (dict(prefix=-1), ValueError, r"prefix: expected a number of tokens, got -1"),
    (dict(prefix=2.0), ValueError, r"prefix: expected a number of tokens, got 2.0"),
    (dict(k=normal(2, 14, 4)), ValueError, r"k: expected shape \(M 14 d\) with d = 5"),
    (dict(z=normal(2, 14, 4)), ValueError, r"z: expected shape \(M 14 c\) with c = 5"),
    (dict(v=normal(2, 13, 5)), ValueError, r"v: expected shape \(M 14 c\), got shape \(2, 13, 5\)"),
    (dict(q=normal(1, 2, 14, 5)), ValueError, r"q: expected 3 dimensions"),
    (dict(scale=float("nan")), ValueError, r"scale: expected a finite float or None, got nan"),
]


@pytest.mark.parametrize("changes, error, message", BAD)
def test_bad_input(unchecked, changes, error, message):
    _, tensors = record()
    good = dict(zip("qkvz", tensors, strict=True)) | dict(query_shape=(3, 4), prefix=2)
    with pytest.raises(error, match=message):
        DenseRecord(**good | changes)


def test_bad_questions(unchecked):
    found, _ = record()
    for ask in (found.weights, found.effective_matrix, found.value, found.output, lambda m: found.keys(0, 0, m)):
        with pytest.raises(ValueError, match="head: expected 0 to 1, got 2"):
            ask(2)
    with pytest.raises(ValueError, match="row: expected an image pixel from 0 to 2, got 3"):
        found.keys(3, 0)


# ------------------------------------------------------------------------------------- timm's Vision Transformers

SMALL = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=3)


def vit(**options) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return shaken(VisionTransformer(**SMALL | options))


def distilled(**options) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return shaken(VisionTransformerDistilled(**SMALL | options))


def shaken(model: nn.Module) -> nn.Module:
    """A float64 model of which no two tokens are alike, and whose attention is far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("token", "embed", "bias", "q_norm.weight", "qkv.weight")):
                parameter.normal_()
    return model.double().eval()


@pytest.mark.parametrize(
    ("build", "shape", "grid", "prefix"),
    [
        (vit, (32, 32), (4, 4), 1),
        (lambda: vit(img_size=(16, 40)), (16, 40), (2, 5), 1),
        (lambda: vit(qk_norm=True), (32, 32), (4, 4), 1),
        (lambda: vit(scale_attn_norm=True), (32, 32), (4, 4), 1),
        (lambda: vit(reg_tokens=4), (32, 32), (4, 4), 5),
        (lambda: vit(reg_tokens=4, no_embed_class=True, class_token=False, global_pool="avg"), (32, 32), (4, 4), 4),
        (lambda: vit(class_token=False, global_pool="avg"), (32, 32), (4, 4), 0),
        (lambda: vit(dynamic_img_size=True), (48, 16), (6, 2), 1),
        (lambda: vit(dynamic_img_size=True, dynamic_img_pad=True), (45, 19), (6, 3), 1),
        (lambda: vit(global_pool="map"), (32, 32), (4, 4), 1),
        (distilled, (32, 32), (4, 4), 2),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_vision_transformer_is_explained(build, shape, grid, prefix, fused):
    """DAT-2, with what the layer really put out, whichever way timm computes it."""
    model = build()
    attentions = {f"blocks.{i}.attn": block.attn for i, block in enumerate(model.blocks)}
    projected = {}
    for name, attention in attentions.items():
        attention.fused_attn = fused
        attention.proj.register_forward_hook(lambda _, inputs, output, name=name: projected.update({name: inputs[0]}))
    t = trace(model, normal(3, *shape))
    assert t.layers == list(attentions)
    for found in t:
        assert (found.kind, found.query_shape, found.heads, found.prefix) == ("dense", grid, 3, prefix)
        assert found.stride == (8, 8) and found.exact
        for head in range(3):
            matrix = found.effective_matrix(head)
            assert matrix.shape == (grid[0] * grid[1], grid[0] * grid[1] + prefix)
            assert found.rest(head) < 1e-12
        whole = torch.cat([found.output(m) for m in range(3)], dim=-1)
        whole = attentions[found.name].norm(whole)  # nothing, unless the model has scale_attn_norm
        torch.testing.assert_close(whole, projected[found.name][0, prefix:])
    heat = t.rollout(shape[0] - 1, 0)
    assert heat.shape == shape and heat.sum().item() == pytest.approx(1)


def test_gated_attention_is_recorded_before_its_gate():
    from timm.layers import Attention

    model = vit()
    model.blocks[0].attn = Attention(12, 3, gated=True).double().eval()
    assert max(trace(model, normal(3, 32, 32))["blocks.0.attn"].rest(m) for m in range(3)) < 1e-12


def test_cells_are_where_the_patches_are():
    """Change one patch: exactly its key and value change in the first layer, at its row-major place."""
    model, image = vit(img_size=(16, 40), reg_tokens=2), normal(3, 16, 40)
    before = trace(model, image)["blocks.0.attn"]
    changed = image.clone()
    changed[:, 9, 26] += 1  # row 1, column 3 of patches of 8
    after = trace(model, changed)["blocks.0.attn"]
    for a, b in ((before.k, after.k), (before.v, after.v), (before.q, after.q)):
        assert (a != b).any(2).any(0).nonzero().flatten().tolist() == [8]
    assert before.query(9, 26) == 8 and before.cells()[8].tolist() == [27.5, 11.5]


@pytest.mark.parametrize(
    ("name", "options", "grid", "prefix"),
    [
        ("vit_tiny_patch16_224", dict(depth=1), (14, 14), 1),
        ("deit_tiny_patch16_224", dict(depth=1, img_size=(64, 96)), (4, 6), 1),
        ("deit_tiny_distilled_patch16_224", dict(depth=1), (14, 14), 2),
        ("vit_small_patch14_reg4_dinov2", dict(depth=1, img_size=70, dynamic_img_size=True), (5, 5), 5),
    ],
)
def test_models_of_timms_registry(name, options, grid, prefix):
    import timm

    model = timm.create_model(name, pretrained=False, **options)
    (found,) = trace(model, torch.randn(3, *model.patch_embed.img_size))
    assert (found.query_shape, found.prefix) == (grid, prefix) and found.rest(0) < 1e-5
    assert len(found.keys(0, 0).weight) == grid[0] * grid[1]


def test_features_only():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, features_only=True, out_indices=(0, 1))
    assert [r.query_shape for r in trace(model, torch.randn(3, 64, 64))] == [(4, 4), (4, 4)]


def test_other_attention_is_left_out_and_not_recorded_wrongly():
    """Differential attention is a difference of two softmaxes; a parallel block has no module that is its attention."""
    from timm.models.vision_transformer import ParallelScalingBlock

    for model in (vit(num_heads=2, attn_layer="diff"), vit(block_fn=ParallelScalingBlock)):
        with pytest.raises(ValueError, match="no attention layer of VisionTransformer could be recorded"):
            trace(model, normal(3, 32, 32))


def test_masked_attention_is_refused():
    class Masked(nn.Module):
        def __init__(self, **given):
            super().__init__()
            self.net, self.given = vit(), given

        def forward(self, x):
            return self.net(x, **self.given)

    for given in (dict(attn_mask=torch.ones(17, 17, dtype=torch.bool)), dict(is_causal=True)):
        model = Masked(**given)
        with pytest.raises(ValueError, match="attn_mask: expected none while a trace is taken"):
            trace(model, normal(3, 32, 32))
        assert hooks(model) == 0
        trace(model.net, normal(3, 32, 32))


class Sown(nn.Module):
    """A patch embedding that does not say how its tokens lie."""

    def __init__(self):
        super().__init__()
        self.proj, self.num_patches = nn.Conv2d(3, 12, 8, 8), 16

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


def test_a_grid_that_nobody_tells():
    model = vit(pos_embed="none")
    model.patch_embed = Sown().double()
    assert trace(model, normal(3, 32, 32))["blocks.0.attn"].query_shape == (4, 4)  # a square image has a square map
    with pytest.raises(ValueError, match=r"cannot tell how 8 tokens lie on an image of 16 x 32 .* Sown.dynamic_feat"):
        trace(model, normal(3, 16, 32))
    with pytest.raises(ValueError, match=r"cannot tell how 17 tokens lie on an image of 32 x 32"):
        token_grid(vit().patch_embed, (32, 32), 17)


# ------------------------------------------------------------------------------------------------------------ vit_mini


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def small_vit_mini(**options) -> nn.Module:
    return shaken(dynattn.create_model("vit_mini", **dict(depth=2, embed_dim=16, img_size=64) | options))


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (45, 70), (8, 8), (1, 9)])
def test_vit_mini_at_any_size(shape):
    t = trace(small_vit_mini(), normal(3, *shape))
    assert t.layers == ["blocks.0.block.attn", "blocks.1.block.attn"]
    for found in t:
        assert found.query_shape == (-(-shape[0] // 8), -(-shape[1] // 8)) and found.stride == (8, 8)
        assert max(found.rest(head) for head in range(found.heads)) < 1e-12
    heat = t.rollout(0, shape[1] - 1)
    assert heat.shape == shape and heat.sum().item() == pytest.approx(1)


def test_convolutions_of_vit_mini_see_the_map_as_it_lies():
    """Its blocks are what timm's are after a `LocalConv` on the map of the true rows and columns."""
    model, image = small_vit_mini(), normal(1, 3, 24, 40)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(image))
        assert x.shape == (1, 3, 5, 16)
        for block in model.blocks:
            x = block.block(block.local(x).flatten(1, 2)).reshape(x.shape)
        torch.testing.assert_close(model(image), model.head(model.fc_norm(x.mean((1, 2)))))
        final, (last,) = model.forward_intermediates(image, [-1])
    torch.testing.assert_close(last, x.movedim(3, 1))
    torch.testing.assert_close(model.forward_head(final), model(image))
    assert model.forward_features(image).shape == (1, 15, 16)


def test_vit_mini_is_left_as_it_was():
    """Modes, hooks and batch statistics of a model in training."""
    model = small_vit_mini().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, normal(3, 64, 64))
    assert hooks(model) == 0 and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_records_carry_no_graph():
    records: list[Record] = list(trace(small_vit_mini(), normal(3, 64, 64)))
    assert not any(t.requires_grad for r in records for t in vars(r).values() if isinstance(t, Tensor))
