"""Segmentation models of libraries that ours are compared with."""

import pytest
import timm
import torch
from torch import nn

import dynattn
from dynattn import cost

NAMES = ("fcn_mini", "pvt_seg_mini")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_of_every_pixel(name):
    """For images of any size, channels and classes; a model of timm's registry too."""
    model = dynattn.create_model(name).eval()
    assert model.segments and model(torch.randn(2, 3, 50, 77)).shape == (2, 11, 50, 77)
    other = timm.create_model(name, in_chans=1, num_classes=3).eval()
    assert other(torch.randn(1, 1, 64, 64)).shape == (1, 3, 64, 64)
    config, state = timm.models.get_pretrained_cfg(name), model.state_dict()
    last = (config.classifier,) if isinstance(config.classifier, str) else config.classifier
    assert all(f"{layer}.weight" in state for layer in (config.first_conv, *last))


@pytest.mark.parametrize(("name", "ours"), [("fcn_mini", "setr_pup_mini"), ("pvt_seg_mini", "setr_pup_hlg_mini")])
def test_they_cost_about_as_much_as_ours(name, ours):
    macs = [cost.count(dynattn.create_model(one), 64).macs for one in (name, ours)]
    assert 1 <= macs[0] / macs[1] < 1.3


def test_the_fully_convolutional_network_keeps_an_eighth():
    """Its third stage is dilated; the auxiliary head reads the second."""
    model = dynattn.create_model("fcn_mini").eval()
    strides = [m.stride for m in model.net.backbone.layer3.modules() if isinstance(m, nn.Conv2d)]
    assert set(strides) == {(1, 1)}
    with torch.no_grad():
        maps = model.net.backbone(torch.randn(1, 3, 64, 64))
        logits, aux = model(torch.randn(1, 3, 64, 64), aux=True)
    assert maps["out"].shape == (1, 256, 8, 8) and maps["aux"].shape == (1, 128, 8, 8)
    assert len(aux) == 1 and aux[0].shape == logits.shape and model.aux_weight == 0.4


@pytest.mark.parametrize("name", NAMES)
def test_weights_for_other_classes(name, tmp_path):
    """Through timm's door: the classifiers are new, all else is kept."""
    model = dynattn.create_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4)
    assert other(torch.randn(2, 3, 64, 64)).shape[1] == 4
    kept = [
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True) if a.shape == b.shape
    ]
    assert len(kept) > 20 and all(kept)
