"""Our models where timm's are used: its registry, feature extraction, torchvision's detectors, decoders."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

import dynattn
from dynattn import weights
from dynattn.models.dat import DAT
from dynattn.models.dgt import DGT

OURS = ["dat_base", "dat_base_384", "dat_mini", "dat_small", "dat_tiny", "dat_tiny_conv"]


@pytest.fixture(autouse=True)
def registered():
    import dynattn.models  # noqa: F401  (this is what puts them there)


def test_the_registry_has_them():
    assert timm.list_models("dat_*") == OURS
    assert all(map(timm.is_model, dynattn.list_models()))
    assert timm.list_models("dgt_*") == ["dgt_base", "dgt_mini", "dgt_small", "dgt_tiny"]
    shipped = weights.shipped()
    assert {
        "dat_mini",
        "dgt_mini",
        "swin_mini",
        "vit_mini",
        "biformer_mini",
        "debiformer_mini",
        "sgformer_mini",
        "hlg_mini",
        "setr_pup_mini",
        "setr_pup_hlg_mini",
    } <= set(shipped)
    assert [name for name in dynattn.list_models() if timm.is_model_pretrained(name)] == shipped


@pytest.mark.parametrize(
    ("name", "kind", "side", "classes"),
    [
        ("dat_tiny", DAT, 224, 1000),
        ("dat_base_384", DAT, 384, 1000),
        ("dat_mini", DAT, 128, 10),
        ("dgt_base", DGT, 224, 1000),
        ("dgt_mini", DGT, 128, 10),
    ],
)
def test_create_model(name, kind, side, classes):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert type(model) is kind and model.num_classes == classes and model.img_size == (side, side)
    assert model.default_cfg["input_size"] == (3, side, side) and model.default_cfg["num_classes"] == classes
    transform = timm.data.resolve_model_data_config(model)
    assert transform["mean"] == dynattn.data.MEAN and transform["interpolation"] == "bicubic"
    assert transform["crop_pct"] == 0.875  # resized to 256 for a crop of 224


def test_arguments_arrive():
    model = timm.create_model("dat_mini", num_classes=7, in_chans=1, img_size=64, drop_path_rate=0.0, variant="paper")
    assert (model.num_classes, model.in_chans, model.img_size, model.variant) == (7, 1, (64, 64), "paper")
    assert timm.create_model("dat_mini", num_classes=0).get_classifier() is not None
    with pytest.raises(TypeError, match="no_such: not an argument of dat_mini"):
        timm.create_model("dat_mini", no_such=1)
    with pytest.raises(ValueError, match="pretrained: no checkpoint of 'dat_tiny' ships"):
        timm.create_model("dat_tiny", pretrained=True)


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_what_timm_s_training_script_passes(name):
    """Rates that it was not given are None, which timm leaves out, or 0."""
    nothing = dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))
    given = dict(pretrained=False, in_chans=3, num_classes=10, drop_rate=0.5, scriptable=False, checkpoint_path="")
    model = timm.create_model(name, **given, **nothing).train()
    features = torch.randn(1, model.num_features, 4, 4).expand(64, -1, -1, -1)
    dropped = model.forward_head(features, pre_logits=True) == 0
    assert 0.4 < dropped.double().mean() < 0.6 and model.forward_head(features).std(dim=0).min() > 0
    assert torch.equal(*model.eval().forward_head(features[:2]))
    with pytest.raises(ValueError, match="drop_rate: expected a number from 0 to below 1, got 1"):
        timm.create_model(name, drop_rate=1)


def test_the_same_model_as_ours():
    torch.manual_seed(0)
    theirs = timm.create_model("dat_mini").eval()
    torch.manual_seed(0)
    ours = dynattn.create_model("dat_mini").eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(theirs(image), ours(image))


@pytest.mark.parametrize(
    ("out_indices", "channels", "reductions"),
    [
        (None, [96, 192, 384, 768], [4, 8, 16, 32]),
        ((1, 3), [192, 768], [8, 32]),
        ((0,), [96], [4]),
        ((-2, -1), [384, 768], [16, 32]),
    ],
)
def test_features_only(out_indices, channels, reductions):
    options = {} if out_indices is None else {"out_indices": out_indices}
    model = timm.create_model("dat_tiny", features_only=True, **options).eval()
    assert model.feature_info.channels() == channels and model.feature_info.reduction() == reductions
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 64, 96))
    expected = [(1, c, 64 // r, 96 // r) for c, r in zip(channels, reductions, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_features_of_a_model_with_three_stages(name):
    model = timm.create_model(name, features_only=True)
    assert model.feature_info.channels() == [32, 64, 128] and len(model(torch.randn(1, 3, 32, 32))) == 3


class Pyramid(nn.Module):
    """A feature pyramid on our stages, as torchvision's detectors want their backbone."""

    def __init__(self, channels: int = 16):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.net, self.out_channels = dynattn.create_model("dat_mini", img_size=64), channels
        self.pyramid = FeaturePyramidNetwork([info["num_chs"] for info in self.net.feature_info], channels)

    def forward(self, images):
        return self.pyramid(OrderedDict(enumerate(self.net.forward_intermediates(images, intermediates_only=True))))


def test_a_detector_of_torchvision_trains_on_it():
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    detector = RetinaNet(Pyramid(), 3, anchor_generator=anchors, min_size=64, max_size=96)
    truth = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 60, 64), torch.rand(3, 50, 90)], [truth, truth])
    sum(losses.values()).backward()
    net = detector.backbone.net
    idle = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert idle <= {"norm.weight", "norm.bias", "head.weight", "head.bias"}  # of the classifier, which is not run
    detector.eval()
    assert set(detector([torch.rand(3, 61, 83)])[0]) == {"boxes", "scores", "labels"}


def test_a_decoder_of_segmentation_models_trains_on_it():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.create_model("upernet", encoder_name="tu-dat_tiny", encoder_weights=None, classes=3)
    masks = model(torch.randn(2, 3, 64, 64))
    assert masks.shape == (2, 3, 64, 64)
    masks.square().mean().backward()
    assert all(p.grad is not None for name, p in model.encoder.named_parameters() if "stages." in name)


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini"])
def test_features_carry_no_unused_parameters(name):
    """`features_only` removes what its maps do not need: every parameter left gets a gradient."""
    model = timm.create_model(name, features_only=True, out_indices=(0, 1))
    maps = model(torch.randn(2, 3, 64, 64))
    sum(one.square().mean() for one in maps).backward()
    assert [one.shape[1] for one in maps] == [32, 64]
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_pruning_keeps_what_comes_before():
    model = dynattn.create_model("dat_mini").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
        after = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert len(model.stages) == 2 and torch.equal(before[0], after[0])
