"""Class activation maps and receptive fields: against what is known by hand, for our models and for timm's."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from dynattn import create_model
from dynattn.figures import evidence
from dynattn.figures.tables import ALL, summary

pytest.importorskip("pytorch_grad_cam")
SMALL = dict(img_size=64, num_classes=5)


class Striped(nn.Module):
    """One stage of 4 x 4 patches, channels last or first, and a linear classifier over the mean of the map."""

    def __init__(self, channels_last: bool, channels: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.last, self.head = nn.Conv2d(3, channels, 4, 4), channels_last, nn.Linear(channels, 2)
        self.stage = nn.Identity()
        self.feature_info = [dict(num_chs=channels, reduction=4, module="stage")]

    def forward(self, x):
        x = self.cut(x)
        return self.head(self.stage(x.movedim(1, -1)).mean((1, 2)) if self.last else self.stage(x).mean((2, 3)))

    def forward_intermediates(self, x, indices, intermediates_only):
        x = self.cut(x)
        return [self.stage(x.movedim(1, -1)).movedim(-1, 1) if self.last else self.stage(x)]


@pytest.mark.parametrize("channels", [6, 4])  # 4: the map is (4, 4, 4), its shape does not tell
@pytest.mark.parametrize("method", evidence.METHODS)
def test_the_layout_of_the_features_does_not_matter(method, channels):
    image = torch.randn(3, 16, 16)
    first, last = (evidence.class_map(Striped(last, channels), image, label=1, method=method) for last in (False, True))
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


@pytest.mark.parametrize("name", ["debiformer_mini", "swin_mini", "convnext_mini"])
def test_the_maps_are_those_of_the_package(name):
    """All stages and methods from one pass, against a call of grad-cam for each; channels first or last."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    options = dict(img_size=128, num_classes=5) | (dict(depths=(1, 1, 1)) if name != "debiformer_mini" else {})
    model, image = create_model(name, **options).eval(), torch.randn(3, 128, 128)
    first = name == "convnext_mini"  # whose first map is (32, 32, 32)
    found = evidence.class_maps(model, image, label=2)
    for stage, about in enumerate(evidence.stages(model)):
        for method, kind in (("hires", pytorch_grad_cam.HiResCAM), ("grad", pytorch_grad_cam.GradCAM)):
            layers = [model.get_submodule(about["module"])]
            with kind(model, layers, reshape_transform=lambda x: x if first else x.movedim(-1, 1)) as cam:
                expected = cam(image[None], [ClassifierOutputTarget(2)])[0]
            np.testing.assert_allclose(found[method][stage], expected, atol=1e-5)
            alone = evidence.class_map(model, image, stage=stage - 3, label=2, method=method)
            np.testing.assert_allclose(alone, expected, atol=1e-5)


def test_a_model_of_timm():
    model = timm.create_model("convnext_atto", num_classes=5).eval()
    image = torch.randn(3, 64, 64)
    assert evidence.class_map(model, image, stage=1).shape == (64, 64)
    assert evidence.receptive_field(model, [image], stage=0).max() > 0


@pytest.mark.parametrize("side, first, last", [(12, 4, 8), (16, 4, 12)])
def test_the_field_of_patches_is_that_of_the_central_ones(side, first, last):
    """Of 3 x 3 patches the central one, of 4 x 4 the central four, and by how much their weights say."""
    model, image = Striped(False), torch.randn(3, side, side)
    field = evidence.receptive_field(model, [image])
    inside = np.zeros((side, side), bool)
    inside[first:last, first:last] = True
    assert (field[~inside] == 0).all()
    active = (model.cut(image[None])[0] > 0).double()[:, first // 4 : last // 4, first // 4 : last // 4]
    slope = torch.einsum("chw,cxij->xhiwj", active, model.cut.weight.double()).relu().sum(dim=0)
    np.testing.assert_allclose(field[first:last, first:last], slope.detach().reshape(last - first, -1), rtol=1e-5)


def test_the_square_that_holds_a_share():
    """A field of ones: a square of half the side holds a quarter. A point in the middle needs the smallest square."""
    found = evidence.contribution(np.ones((8, 8)), (0.25, 1.0))
    assert found == {0.25: pytest.approx(0.5), 1.0: pytest.approx(1.0)}
    point = np.zeros((9, 9))
    point[4, 4] = 3.0
    assert evidence.contribution(point, (0.99,)) == {0.99: pytest.approx(1 / 9)}
    assert np.isnan(evidence.contribution(np.zeros((4, 4)))[0.5])


# ------------------------------------------------------------------------------------------------------- many images


def test_the_share_under_a_mask_and_the_half_of_a_map():
    values = np.array([[4.0, 2.0], [1.0, 1.0]])
    assert evidence.share_under(values, np.array([[True, False], [False, True]])) == pytest.approx(5 / 8)
    assert evidence.half(values) == 1 / 4 and evidence.half(np.ones((4, 4))) == 1 / 2
    assert evidence.half(np.zeros((2, 2))) == evidence.share_under(np.zeros((2, 2)), np.ones((2, 2))) == 0


class Looks(nn.Module):
    """One stage, the image itself; class 0 is how bright it is."""

    feature_info = [dict(num_chs=3, reduction=1, module="stage")]

    def __init__(self):
        super().__init__()
        self.stage = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        brightness = self.stage(x).relu().sum(dim=(1, 2, 3))
        return torch.stack([brightness, -brightness], dim=1) + self.bias


def test_maps_are_held_against_their_own_mask_and_those_of_the_others():
    """A square that shines: all of the map lies on it; under the masks of the others, which are elsewhere, nothing."""
    images, masks = np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 8, 8), bool)
    for i in range(4):
        row, col = divmod(i, 2)
        masks[i, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = True
        images[i, :, masks[i]] = 255
    found = summary(evidence.evaluate_maps(Looks(), images, masks, np.zeros(4, int)))
    assert found.value["stage", ALL, "hires"] == pytest.approx(1) and found.n["stage", ALL, "hires"] == 4
    assert found.other["stage", ALL, "hires"] == 0 and np.isnan(found.other["stage", ALL, "half"])
    assert found.value["stage", ALL, "half"] == 1 / 8  # of a quarter of the image
    wrong = summary(evidence.evaluate_maps(Looks(), images, masks, np.ones(4, int)))  # what speaks for the other class
    assert wrong.value["stage", ALL, "hires"] == 0
    with pytest.raises(ValueError, match="masks: expected one for each of at least 2 images"):
        evidence.evaluate_maps(Looks(), images[:1], masks[:1])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda m, x: evidence.class_map(m, x, stage=3),
            ValueError,
            "stage: expected a whole number from -1 to 0, got 3",
        ),
        (lambda m, x: evidence.class_map(m, x, method="score"), ValueError, "method: expected one of 'hires', 'grad'"),
        (lambda m, x: evidence.class_map(m, x, label=2), ValueError, "label: expected a class from 0 to 1, got 2"),
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


def test_both_are_functions_of_the_figures():
    from dynattn import figures

    assert (figures.class_map, figures.receptive_field) == (evidence.class_map, evidence.receptive_field)
