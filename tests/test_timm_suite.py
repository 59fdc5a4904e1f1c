"""What timm asks of every transformer of its own, asked of every name of ours: the calls of its suite, written anew.

TorchScript and fx are left out: they are declared unsupported where timm is told of them (`scriptable`, `feature_cls`).
"""

import math

import pytest
import timm
import torch
from timm.layers import Format, get_channel_dim, get_spatial_dim
from timm.models import FeatureInfo, group_modules, group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import dynattn
import dynattn.models

pytestmark = pytest.mark.slow
NAMES = dynattn.list_models()
# Every class once, and every option that the larger ones have: these differ in nothing but how wide and deep they are.
SMALL = [
    "dat_mini",
    "dat_tiny",
    "dgt_mini",
    "dgt_tiny",
    "cswin_tiny",
    "swin_tiny_dgt",
    "swin_mini",
    "vit_mini",
    "convnext_mini",
    "biformer_mini",
    "biformer_tiny",
    "debiformer_mini",
    "debiformer_tiny",
    "sgformer_mini",
    "sgformer_small",
    "hlg_mini",
    "hlg_mobile",
]
PYRAMIDS = [name for name in SMALL if name != "vit_mini"]
SIDE = 96  # of images where a test does not need the model's own size


def image(channels: int = 3, side: int | tuple[int, int] = SIDE, batch: int = 1) -> torch.Tensor:
    height, width = (side, side) if isinstance(side, int) else side
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def layout(model: nn.Module) -> tuple[int, tuple[int, int]]:
    """Which axis of a map has the channels, and which two the places."""
    kind = Format(getattr(model, "output_fmt", "NCHW"))
    return get_channel_dim(kind), get_spatial_dim(kind)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_forward(name):
    model = timm.create_model(name, pretrained=False).eval()
    x = image(*model.pretrained_cfg["input_size"][:2])
    out = model(x)
    assert out.shape == (1, model.num_classes) and out.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_backward(name):
    model = timm.create_model(name, pretrained=False, num_classes=42).train()
    count = sum(p.numel() for p in model.parameters())
    out = model(image(batch=2))
    out.mean().backward()
    assert out.shape == (2, 42) and out.isfinite().all()
    assert all(p.grad is not None for p in model.parameters())
    assert count == sum(p.grad.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_default_cfg(name):
    model = timm.create_model(name, pretrained=False).eval()
    state, cfg = model.state_dict(), model.default_cfg
    channel, places = layout(model)
    assert model.num_classes >= 0 and model.num_features > 0 and model.head_hidden_size > 0
    x = image(side=cfg["input_size"][1:])
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == (1, model.head_hidden_size)
    if name != "vit_mini":  # whose features are tokens in a row
        assert tuple(features.shape[i] for i in places) == cfg["pool_size"]
        assert features.shape[channel] == model.num_features
        model.reset_classifier(0, "")
        out = model(x)
        assert out.ndim == 4 and tuple(out.shape[i] for i in places) == cfg["pool_size"]
        made = timm.create_model(name, pretrained=False, num_classes=0, global_pool="").eval()
        assert made(x).shape == out.shape
    for kind in ("classifier", "first_conv"):
        assert cfg[kind] + ".weight" in state
    first = timm.create_model(name, in_chans=5).get_submodule(cfg["first_conv"]) if name in SMALL else None
    assert first is None or first.in_channels == 5


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_features(name):
    model = timm.create_model(name, pretrained=False, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    channel, places = layout(model)
    maps = model(image())
    assert len(maps) == len(channels) >= 3
    for c, r, one in zip(channels, reductions, maps, strict=True):
        assert one.shape[channel] == c and all(one.shape[i] <= math.ceil(SIDE / r) + 1 for i in places)
        assert one.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_intermediates(name):
    model = timm.create_model(name, pretrained=False).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = image()
    final, maps = model.forward_intermediates(x)
    for c, r, one in zip(info.channels(), info.reduction(), maps, strict=True):
        assert one.shape[1] == c and one.shape[2] <= math.ceil(SIDE / r) + 1 and one.isfinite().all()
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model.forward_head(final), model(x))
    only = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
    assert len(only) == 1 and torch.equal(only[0], maps[-1])


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_pruning(name):
    model = timm.create_model(name, pretrained=False).eval()
    x = image()
    before = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    after = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(map(torch.equal, before, after)) and model(x).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_other_sizes_and_channels(name):
    sizes = [(64, 64), (96, 160)] + ([(75, 93)] if name != "swin_tiny_dgt" else [])  # it takes whole patches
    for channels in (1, 3, 4):
        model = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=7).eval()
        for size in sizes:
            out = model(image(channels, size))
            assert out.shape == (1, 7) and out.isfinite().all()


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_made_for_and_set_to_a_size(name):
    made = timm.create_model(name, pretrained=False, img_size=SIDE).eval()
    changed = timm.create_model(name, pretrained=False).eval()
    changed.set_input_size(img_size=(SIDE, SIDE))
    for model in (made, changed):
        assert model.img_size == (SIDE, SIDE)
        assert timm.models.get_model_input_config(model)["input_size"] == (3, SIDE, SIDE)
        assert model(image()).isfinite().all()
    if name != "swin_mini":  # set_input_size lets its windows follow the map
        changed.load_state_dict(made.state_dict())
        torch.testing.assert_close(changed(image()), made(image()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_classifiers(name):
    model = timm.create_model(name, pretrained=False, num_classes=11).eval()
    assert isinstance(model.get_classifier(), nn.Linear) and model.get_classifier().out_features == 11
    for classes in (3, 0, 5):
        model.reset_classifier(classes)
        assert model.num_classes == classes
        assert model(image()).shape == (1, classes or model.head_hidden_size)
    for pool in ("max", "avg"):
        model.reset_classifier(6, pool)
        assert model(image()).shape == (1, 6)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_checkpoints_are_loaded(name, tmp_path):
    model = timm.create_model(name, pretrained=False, num_classes=5).eval()
    for wrapped, file in ((model.state_dict(), "bare.pth"), ({"state_dict": model.state_dict()}, "wrapped.pth")):
        torch.save(wrapped, tmp_path / file)
        again = timm.create_model(name, num_classes=5, checkpoint_path=str(tmp_path / file)).eval()
        assert torch.equal(again(image()), model(image()))
        overlay = dict(file=str(tmp_path / file), num_classes=5)
        tuned = timm.create_model(name, pretrained=True, num_classes=9, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(tuned.forward_features(image()), model.forward_features(image()))
        features = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
        last = model.forward_intermediates(image(), indices=[-1], intermediates_only=True)[0]
        assert torch.equal(features(image())[-1], last)


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing(name):
    model = timm.create_model(name, pretrained=False, drop_path_rate=0.0).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image(batch=2)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_parameters(name):
    """Every parameter is in a group, in the order in which the model computes; the decay lists name what there is."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    names = [key for key, _ in model.named_parameters()]
    learned = [key for key, p in model.named_parameters() if p.requires_grad]
    for coarse in (False, True):
        matcher = model.group_matcher(coarse=coarse)
        groups = group_parameters(model, matcher)
        assert sorted(key for keys in groups.values() for key in keys) == sorted(names)
        assert list(groups) == list(range(len(groups))) and len(groups) >= 4
        assert group_modules(model, matcher)
    stem = group_parameters(model, model.group_matcher(), reverse=True)[model.pretrained_cfg["first_conv"] + ".weight"]
    assert stem == 0
    undecayed = model.no_weight_decay()
    assert all(key in names for key in undecayed if "token" not in key)  # timm's ViT names tokens that it may have
    for groups in (
        param_groups_layer_decay(model, no_weight_decay_list=undecayed),
        param_groups_weight_decay(model, no_weight_decay_list=undecayed),
    ):
        assert sum(len(group["params"]) for group in groups) == len(learned)


@pytest.mark.parametrize("name", [name for name in SMALL if name.endswith("_mini")])
def test_a_step_of_timm_s_optimisers(name):
    rates = dict(drop_rate=0.1, drop_path_rate=0.1)
    if name != "convnext_mini":  # it has no attention, and timm's ConvNeXt no other dropout
        rates |= dict(attn_drop_rate=0.1, proj_drop_rate=0.1)
    model = timm.create_model(name, **rates).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.cross_entropy(model(image(batch=2)), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad.any())


@pytest.mark.parametrize("name", SMALL)
def test_declared_unsupported(name):
    with pytest.raises(ValueError, match="scriptable: expected False, TorchScript is not supported"):
        timm.create_model(name, scriptable=True)
    with pytest.raises(ValueError, match="feature_cls: expected one of .*, got 'fx'"):
        timm.create_model(name, features_only=True, feature_cls="fx")
