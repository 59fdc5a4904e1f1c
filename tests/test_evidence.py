"""Class activation maps and receptive fields: against what is known by hand, for our models and for timm's."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from dynattn import create_model
from dynattn.figures import evidence

pytest.importorskip("pytorch_grad_cam")
SMALL = dict(img_size=64, num_classes=5)


class Striped(nn.Module):
    """One stage of 4 x 4 patches, channels last or first, and a linear classifier over the mean of the map."""

    def __init__(self, channels_last: bool):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.last, self.head = nn.Conv2d(3, 6, 4, 4), channels_last, nn.Linear(6, 2)
        self.stage = nn.Identity()
        self.feature_info = [dict(num_chs=6, reduction=4, module="stage")]

    def forward(self, x):
        x = self.cut(x)
        return self.head(self.stage(x.movedim(1, -1)).mean((1, 2)) if self.last else self.stage(x).mean((2, 3)))

    def forward_intermediates(self, x, indices, intermediates_only):
        return [self.cut(x)]


@pytest.mark.parametrize("method", evidence.METHODS)
def test_the_layout_of_the_features_does_not_matter(method):
    image = torch.randn(3, 16, 16)
    first, last = (evidence.class_map(Striped(last), image, label=1, method=method) for last in (False, True))
    np.testing.assert_allclose(first, last, atol=1e-6)
    assert first.shape == (16, 16) and first.min() >= 0 and first.max() == pytest.approx(1, abs=1e-3)


def test_a_class_map_is_where_the_class_is():
    """A classifier that looks at channel 0 alone, and an image that has it in one corner."""
    model = Striped(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.cut.weight[0] = 1 / 48
        model.head.weight[1, 0] = 1
    image = torch.zeros(3, 16, 16)
    image[:, 8:, 8:] = 1
    found = evidence.class_map(model, image, label=1)
    assert found[13, 13] == pytest.approx(1, abs=1e-2) and found[2, 2] == 0 and found[13, 2] == 0


def test_a_model_is_left_as_it_was():
    """Its mode, its gradients, frozen parameters."""
    model = create_model("biformer_mini", **SMALL).train().requires_grad_(False)
    model.head.weight.requires_grad_()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    evidence.class_map(model, torch.randn(3, 64, 64))
    evidence.receptive_field(model, [torch.randn(3, 64, 64)])
    assert model.training and (model.head.weight.grad == 1).all() and model.embed.convs[0].weight.grad is None


@pytest.mark.parametrize("name", ["dat_mini", "debiformer_mini", "swin_mini", "vit_mini"])
def test_maps_of_small_models(name):
    torch.manual_seed(0)
    model, image = (
        create_model(name, **SMALL | (dict(window_size=4) if name == "swin_mini" else {})),
        torch.randn(3, 64, 64),
    )
    for stage in (0, -1):
        found = evidence.class_map(model, image, stage=stage)
        assert found.shape == (64, 64) and 0 <= found.min() and found.max() <= 1 + 1e-6
    field = evidence.receptive_field(model, [image, -image])
    assert field.shape == (64, 64) and field.min() >= 0 and field.max() > 0


def test_a_model_of_timm():
    model = timm.create_model("convnext_atto", num_classes=5).eval()
    image = torch.randn(3, 64, 64)
    assert evidence.class_map(model, image, stage=1).shape == (64, 64)
    assert evidence.receptive_field(model, [image], stage=0).max() > 0


def test_the_field_of_patches_is_one_patch():
    """The central cell of 4 x 4 patches reads rows and columns 8 to 11, and by how much its weights say."""
    model, image = Striped(False), torch.randn(3, 16, 16)
    field = evidence.receptive_field(model, [image])
    inside = np.zeros((16, 16), bool)
    inside[8:12, 8:12] = True
    assert (field[~inside] == 0).all()
    active = (model.cut(image[None])[0, :, 2, 2] > 0).double()
    slope = torch.einsum("c,cxij->xij", active, model.cut.weight.double()).relu().sum(dim=0)
    np.testing.assert_allclose(field[8:12, 8:12], slope.detach(), rtol=1e-5)


def test_the_square_that_holds_a_share():
    """A field of ones: a square of half the side holds a quarter. A point in the middle needs the smallest square."""
    found = evidence.contribution(np.ones((8, 8)), (0.25, 1.0))
    assert found == {0.25: pytest.approx(0.5), 1.0: pytest.approx(1.0)}
    point = np.zeros((9, 9))
    point[4, 4] = 3.0
    assert evidence.contribution(point, (0.99,)) == {0.99: pytest.approx(1 / 9)}
    assert np.isnan(evidence.contribution(np.zeros((4, 4)))[0.5])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda m, x: evidence.class_map(m, x, stage=3),
            ValueError,
            "stage: expected a whole number from -1 to 0, got 3",
        ),
        (lambda m, x: evidence.class_map(m, x, method="score"), ValueError, "method: expected one of 'hires', 'grad'"),
        (lambda m, x: evidence.class_map(m, x[0]), ValueError, r"image: expected shape \(C, H, W\), got \(16, 16\)"),
        (lambda m, x: evidence.class_map(m, "cat.jpg"), TypeError, "image: expected a normalised floating tensor"),
        (lambda m, x: evidence.class_map(nn.Identity(), x), TypeError, "model: expected one with feature_info"),
        (lambda m, x: evidence.receptive_field(m, []), ValueError, "images: expected at least one image, got none"),
        (lambda m, x: evidence.contribution(-np.ones((2, 2))), ValueError, "field: expected values of at least 0"),
    ],
)
def test_wrong_arguments(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call(Striped(True), torch.randn(3, 16, 16))
