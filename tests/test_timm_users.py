"""What timm's users call: their weights, their sizes and channels, their rates; and models that others register."""

import pickle

import pytest
import timm
import torch
from timm.models import adapt_input_conv
from timm.models._hub import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn

import dynattn
import dynattn.models
from dynattn import core, weights
from dynattn.mechanisms.baselines import CrossShapedWindowAttention, SpatialReductionAttention
from dynattn.mechanisms.deformable import DeformableAttention
from dynattn.mechanisms.deformable_detr import DeformableDetrAttention
from dynattn.mechanisms.dense import DenseAttention
from dynattn.mechanisms.dynamic_group import DynamicGroupAttention
from dynattn.mechanisms.window import WindowAttention
from dynattn.models.layers import Backbone, PatchEmbedding, Stage

MINIS = ["dat_mini", "dgt_mini", "biformer_mini", "debiformer_mini", "sgformer_mini", "swin_mini", "vit_mini"]
FIRST = {"dat_mini": "embed.convs.0.0", "swin_mini": "patch_embed.stem.convs.0.0"}
IMAGE = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=MINIS)
def tuned(request, tmp_path_factory) -> tuple[str, nn.Module, str]:
    """A shipped model after a fine-tuning for five classes that changed every parameter, and its file."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, pretrained=True, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    file = tmp_path_factory.mktemp(request.param) / "mine.pth"
    torch.save({"state_dict": model.state_dict()}, file)
    return request.param, model, str(file)


def answers(model: nn.Module, image: torch.Tensor = IMAGE) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(image)


# ---------------------------------------------------------------- whose weights


def test_the_user_s_folder_is_loaded(tuned, tmp_path):
    name, model, _ = tuned
    save_for_hf(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert theirs.num_classes == 5 and torch.equal(answers(theirs), answers(model))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert answers(other).shape == (1, 7)
    assert torch.equal(other.eval().forward_features(IMAGE), model.forward_features(IMAGE))


def test_the_user_s_state_dict_and_file_are_loaded(tuned):
    name, model, file = tuned
    for source in (dict(state_dict=model.state_dict()), dict(file=file)):
        overlay = source | dict(num_classes=5)
        found = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(answers(found), answers(model))
        other = timm.create_model(name, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
        assert answers(other).shape == (1, 7)
    whole = timm.create_model(name, pretrained=True, pretrained_cfg=dict(file=file, num_classes=5))
    assert torch.equal(answers(whole), answers(model))


def test_a_file_of_other_classes_or_of_another_model_is_refused(tuned):
    name, model, file = tuned
    with pytest.raises(ValueError, match="a checkpoint of 5 classes, but pretrained_cfg says that it has 10; give pre"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file))
    other = "dgt_mini" if name == "dat_mini" else "dat_mini"
    for classes in (5, 9):  # timm loads a model of other classes without being strict
        with pytest.raises(ValueError, match="state: [0-9]+ entries do not fit the model, first"):
            overlay = dict(file=file, num_classes=5)
            timm.create_model(other, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    with pytest.raises(FileNotFoundError, match="no checkpoint at /no/such/file.pth"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file="/no/such/file.pth"))


def test_a_model_without_a_checkpoint_takes_the_user_s(tmp_path):
    size = dict(dims=(8, 16, 32, 64), heads=(1, 2, 4, 8), groups=(1, 1, 2, 4), img_size=64)
    model = timm.create_model("dat_tiny", **size).eval()
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    overlay = dict(file=str(tmp_path / "mine.pth"))
    found = timm.create_model("dat_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **size)
    image = IMAGE[:, :, :64, :64]
    assert torch.equal(answers(found, image), answers(model, image))
    assert timm.is_model_pretrained("dat_mini") and not timm.is_model_pretrained("dat_tiny")


def test_our_own_files_say_what_they_were_trained_with(tmp_path):
    size = dict(dims=(8, 16), depths=(1, 1), heads=(1, 2), groups=(1, 1), num_classes=4, img_size=64)
    model = dynattn.create_model("dat_mini", **size).eval()
    model.load_state_dict(
        {key: t.half().float() if t.is_floating_point() else t for key, t in model.state_dict().items()}
    )
    weights.write(tmp_path / "mine.safetensors", model.state_dict(), {"name": "dat_mini", "arguments": size})
    overlay = dict(file=str(tmp_path / "mine.safetensors"))
    found = timm.create_model("dat_mini", pretrained=True, pretrained_cfg_overlay=overlay)
    assert found.num_classes == 4 and torch.equal(answers(found), answers(model))
    assert found.pretrained_cfg["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("name", MINIS)
def test_both_doors_give_the_same_model(name):
    ours, theirs = dynattn.create_model(name, pretrained=True), timm.create_model(name, pretrained=True)
    assert torch.equal(answers(ours), answers(theirs))
    assert ours.pretrained_cfg == ours.default_cfg == theirs.pretrained_cfg
    transform = timm.data.resolve_model_data_config(ours)
    assert transform["input_size"] == (3, 128, 128) and transform["mean"] == dynattn.data.MEAN


# ---------------------------------------------------------------- sizes and channels


@pytest.mark.parametrize("name", MINIS)
def test_one_and_four_channels_as_timm_adapts_them(name):
    model = dynattn.create_model(name, pretrained=True)
    first = model.pretrained_cfg["first_conv"] + ".weight"
    for channels in (1, 4):
        found = timm.create_model(name, pretrained=True, in_chans=channels)
        assert torch.equal(found.state_dict()[first], adapt_input_conv(channels, model.state_dict()[first]))
    grey = timm.create_model(name, pretrained=True, in_chans=1)
    torch.testing.assert_close(
        answers(grey, IMAGE[:, :1]), answers(model, IMAGE[:, :1].expand(1, 3, -1, -1)), rtol=1e-3, atol=1e-3
    )


def test_a_checkpoint_for_another_size(tuned):
    name, model, file = tuned
    found = timm.create_model(name, num_classes=5, img_size=(96, 160), checkpoint_path=file).eval()
    image = torch.randn(1, 3, 96, 160)
    assert found.img_size == (96, 160) and answers(found, image).isfinite().all()
    if name in ("dat_mini", "dgt_mini", "vit_mini"):  # their tables are resized at run time too
        torch.testing.assert_close(answers(found, image), answers(model, image), rtol=1e-3, atol=1e-3)


def test_set_input_size(tuned, tmp_path):
    name, model, _ = tuned
    model = pickle.loads(pickle.dumps(model))
    image = torch.randn(1, 3, 96, 160)
    before = answers(model, image)
    model.set_input_size(img_size=(96, 160))
    assert model.img_size == (96, 160)
    assert timm.models.get_model_input_config(model)["input_size"] == (3, 96, 160)
    if name != "swin_mini":  # its windows grow with the map
        torch.testing.assert_close(answers(model, image), before, rtol=1e-3, atol=1e-3)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.img_size == (96, 160) and torch.equal(answers(again, image), answers(model, image))


def test_fixed_tables_follow_the_size():
    model = dynattn.create_model("dat_mini", position_bias="fixed").eval()
    image = torch.randn(1, 3, 64, 96)
    before = answers(model, image)
    model.set_input_size((64, 96))
    torch.testing.assert_close(answers(model, image), before)


@pytest.mark.parametrize("size", [(100, 140), (256, 256), (60, 200)])
@pytest.mark.parametrize("name", ["swin_mini", "vit_mini"])
def test_comparisons_at_other_sizes(name, size):
    """Masks are made for the size of the image, tables resized to it: a model made for it answers as one run at it."""
    model, image = dynattn.create_model(name, pretrained=True), torch.randn(1, 3, *size)
    assert answers(model, image).isfinite().all()
    made = dynattn.create_model(name, pretrained=True, img_size=size)
    assert answers(made, image).isfinite().all()
    if size == (256, 256):
        plain = timm.models.SwinTransformer(
            img_size=256, embed_dim=32, depths=(2, 4, 4), num_heads=(2, 4, 8), window_size=8
        )
        if name == "swin_mini":
            shifted = model.layers[0].blocks[1].block
            expected = plain.layers[0].blocks[1].attn_mask
            assert torch.equal(shifted.get_attn_mask(torch.zeros(1, 64, 64, 32)), expected)
            assert shifted.attn_mask is None


def test_a_table_of_no_square_is_refused_by_name():
    wide = timm.create_model("swin_mini", img_size=(100, 140))
    with pytest.raises(ValueError, match="relative_position_bias_table has 195 positions, .* set_input_size"):
        timm.create_model("swin_mini").load_state_dict(wide.state_dict())
    wide = timm.create_model("vit_mini", img_size=(64, 160))
    with pytest.raises(ValueError, match="pos_embed has 160 positions, which are no square"):
        timm.create_model("vit_mini").load_state_dict(wide.state_dict())


def test_a_state_dict_of_as_many_tokens_is_left_as_it_is():
    """8 x 32 tokens are as many as 16 x 16."""
    wide = timm.create_model("vit_mini", img_size=(64, 256))
    again = timm.create_model("vit_mini", img_size=(64, 256))
    again.load_state_dict(wide.state_dict())
    assert torch.equal(again.pos_embed, wide.pos_embed)


# ---------------------------------------------------------------- heads, devices, features


@pytest.mark.parametrize("name", MINIS)
def test_global_pool(name):
    model = timm.create_model(name, num_classes=0, global_pool="")
    assert answers(model).numel() == model.head_hidden_size * (256 if name == "vit_mini" else 64)
    made, reset = timm.create_model(name, global_pool="max"), timm.create_model(name)
    reset.reset_classifier(10, "max")
    if name != "vit_mini":  # where its norm stands depends on the pool that it was made with
        reset.load_state_dict(made.state_dict())
        assert torch.equal(answers(made), answers(reset))
    assert not torch.equal(answers(timm.create_model(name, global_pool="avg", pretrained=True)), answers(made))


def test_pools_are_what_they_say():
    model = dynattn.create_model("dat_mini", pretrained=True)
    features = model.forward_features(IMAGE)
    model.reset_classifier(0, "max")
    assert torch.equal(model.forward_head(features), features.amax((2, 3)))
    model.reset_classifier(0, "")
    assert torch.equal(model(IMAGE), features)
    with pytest.raises(
        ValueError, match="global_pool: expected 'avg' or 'max' in front of a classifier, got ''; give num"
    ):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="global_pool: expected 'avg' or 'max' in front of a classifier"):
        timm.create_model("dat_mini", global_pool="")


@pytest.mark.parametrize("name", MINIS)
def test_device_and_dtype(name):
    model = timm.create_model(name, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    model = timm.create_model(name, dtype=torch.bfloat16, pretrained=True)
    assert answers(model, IMAGE.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MINIS)
def test_features_of_every_class(name):
    plain = timm.create_model(name, pretrained=True, features_only=True)
    maps = answers(plain)
    for kind in ("getter", "list", "dict", "hook"):
        model = timm.create_model(name, pretrained=True, features_only=True, feature_cls=kind)
        found = answers(model)
        if kind == "dict":
            assert list(found) == [str(i) for i in range(len(maps))]
            found = list(found.values())
        if kind == "hook":
            assert model.output_fmt == "NHWC"
            found = [one.permute(0, 3, 1, 2) for one in found]
        assert len(found) == len(maps) and all(map(torch.equal, found, maps))
        assert [one.shape[1] for one in found] == model.feature_info.channels()
    plain.set_grad_checkpointing()
    plain.train()(IMAGE)[-1].sum().backward()


def test_what_is_not_supported_is_refused_by_name():
    with pytest.raises(ValueError, match="feature_cls: expected one of 'getter', 'list', 'dict', 'hook', got 'fx'"):
        timm.create_model("dat_mini", features_only=True, feature_cls="fx")
    with pytest.raises(ValueError, match="scriptable: expected False, TorchScript is not supported"):
        timm.create_model("dat_mini", scriptable=True)
    with pytest.raises(
        ValueError, match="output_stride: expected 16, the stride of the last stage asked of dat_mini, got 8"
    ):
        timm.create_model("dat_mini", features_only=True, output_stride=8)
    with pytest.raises(
        ValueError, match="out_indices: dat_mini has stages 0 to 2, got .*takes encoder_depth=4 or less"
    ):
        timm.create_model("dat_mini", features_only=True, out_indices=(0, 1, 2, 3))
    with pytest.raises(TypeError, match="features_only: not an argument of dat_mini"):
        dynattn.create_model("dat_mini", features_only=True)


def test_encoders_of_segmentation_models():
    smp = pytest.importorskip("segmentation_models_pytorch")
    for kind, options in (
        ("upernet", dict(encoder_depth=4)),
        ("unet", dict(encoder_depth=4, decoder_channels=(64, 32, 16, 8))),
    ):
        model = smp.create_model(kind, encoder_name="tu-dat_mini", encoder_weights=None, classes=3, **options)
        assert answers(model, torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    plus = dict(encoder_name="tu-dat_mini", encoder_weights=None, encoder_depth=4, encoder_output_stride=16, classes=3)
    assert answers(smp.create_model("deeplabv3plus", **plus), torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="encoder_depth=4 or less"):
        smp.create_model("unet", encoder_name="tu-dat_mini", encoder_weights=None)
    with pytest.raises(ValueError, match="output_stride: expected 32, .* got 16: its stages cannot be dilated"):
        smp.create_model("deeplabv3plus", encoder_name="tu-dat_tiny", encoder_weights=None)


@pytest.mark.parametrize("name", MINIS)
def test_a_pruned_model_runs(name):
    model = timm.create_model(name)
    assert model.prune_intermediate_layers([1]) == [1]
    assert answers(model).isfinite().all()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini", "cswin_tiny"])
def test_checkpointing_gives_the_same_gradients(name):
    size = dict(dims=(16, 32), depths=(1, 2), heads=(2, 2), num_classes=3, drop_path_rate=0.0)
    size |= dict(groups=(1, 2)) if name == "dat_mini" else dict(stripes=(1, 2)) if name == "cswin_tiny" else {}
    torch.manual_seed(0)
    model = timm.create_model(name, **size).double().train()
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing is enable for stage in model.stages)
        model(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_blocks_are_computed_twice_with_checkpointing():
    model, calls = timm.create_model("dat_mini").train(), []
    model.stages[1].blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    for enable, count in ((False, 1), (True, 2)):
        calls.clear()
        model.set_grad_checkpointing(enable)
        model(IMAGE.expand(2, -1, -1, -1)).sum().backward()
        assert len(calls) == count


def rates(name: str) -> dict[str, float]:
    """The learning rate of every parameter, over that of the head, with a layer decay of .75."""
    with torch.device("meta"):
        model = timm.create_model(name)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.75, no_weight_decay_list=model.no_weight_decay())
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def test_layer_decay_is_as_swin_s():
    swin, dat, dgt = rates("swin_tiny_patch4_window7_224"), rates("dat_tiny"), rates("dgt_tiny")
    stem = {key: value for key, value in dat.items() if key.startswith("embed.")}
    assert set(stem.values()) == {swin["patch_embed.proj.weight"]} == {0.75**13}
    assert {dgt[key] for key in dgt if key.startswith("embed.")} == {0.75**23}  # it has 22 blocks
    attention = [key for key in dat if key.startswith("stages.2.blocks.1.")]
    assert len(attention) > 10 and len({dat[key] for key in attention}) == 1
    assert (
        dat["stages.1.down.proj.weight"]
        == dat["stages.1.blocks.0.attn.qkv.weight"]
        < dat["stages.1.blocks.1.norm1.weight"]
    )
    assert dat["norm.weight"] == dat["stages.3.blocks.1.norm1.weight"] == 0.75
    assert dat["head.weight"] == dgt["head.weight"] == dgt["widen.0.weight"] == 1


LAYERS = {
    "window": lambda rate: WindowAttention(8, 2, 4, 2, attn_drop=rate),
    "deformable": lambda rate: DeformableAttention(8, 2, 1, (8, 8), attn_drop=rate),
    "fixed": lambda rate: DeformableAttention(8, 2, 1, (8, 8), position_bias="fixed", attn_drop=rate),
    "detr": lambda rate: DeformableDetrAttention(8, 2, 4, attn_drop=rate),
    "dense": lambda rate: DenseAttention(8, 2, attn_drop=rate),
    "cosine": lambda rate: DenseAttention(8, 2, cosine=True, attn_drop=rate),
    "groups": lambda rate: DynamicGroupAttention(8, 2, 4, 16, attn_drop=rate),
    "reduction": lambda rate: SpatialReductionAttention(8, 2, 2, attn_drop=rate),
    "cross": lambda rate: CrossShapedWindowAttention(8, 2, 2, attn_drop=rate),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attention_drops_weights(name):
    """In training alone; their mean over many draws is what nothing dropped gives."""
    layer = LAYERS[name](0.5).double()
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = layer.eval()(x)
        assert torch.equal(layer(x), expected)
        torch.manual_seed(0)
        layer.train()
        draws = torch.stack([layer(x) for _ in range(400)])
    spread = draws.std(dim=0)
    assert (spread > 0).all()
    assert ((draws.mean(dim=0) - expected).abs() < 6 * spread / 20).all()  # the error of a mean of 400
    rough = LAYERS[name](0.0).double()
    rough.load_state_dict(layer.state_dict())
    torch.testing.assert_close(rough.train()(x), expected)
    with pytest.raises(ValueError, match="attn_drop: expected a number from 0 to below 1, got 1"):
        LAYERS[name](1)


@pytest.mark.parametrize("name", ["dat_mini", "dgt_mini", "cswin_tiny", "swin_tiny_dgt", "swin_mini", "vit_mini"])
def test_rates_reach_every_block(name):
    with torch.device("meta"):
        model = timm.create_model(name, attn_drop_rate=0.25, proj_drop_rate=0.125)
    layers = [m for m in model.modules() if hasattr(m, "attn_drop")]
    found = {getattr(m.attn_drop, "p", m.attn_drop) for m in layers}
    dropped = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert found == {0.25} and dropped.count(0.125) >= len(layers)
    if name in ("dat_mini", "dgt_mini", "cswin_tiny"):
        for rate in ("attn_drop_rate", "proj_drop_rate"):
            with pytest.raises(ValueError, match=f"{rate}: expected a number from 0 to below 1, got 1.5"):
                timm.create_model(name, **{rate: 1.5})


def test_misprints_and_dropout_do_not_go_together():
    with pytest.raises(ValueError, match="attn_drop_rate: expected 0 where equations are taken as printed, got 0.1"):
        dynattn.create_model("dgt_mini", as_printed=12, attn_drop_rate=0.1)


# ---------------------------------------------------------------- input


class Converting(PatchEmbedding):
    """A stem whose parameters are kept in float32 and converted on the way, as FSDP does with a bfloat16 policy."""

    def __call__(self, x):
        kept = {name: p.data for name, p in self.named_parameters()}
        for p in self.parameters():
            p.data = p.data.bfloat16()
        try:
            return super().__call__(x.bfloat16())
        finally:
            for name, p in self.named_parameters():
                p.data = kept[name]


def test_inputs_are_compared_with_what_the_model_computes_in():
    model = dynattn.create_model("dat_tiny", dims=(8, 16), depths=(1, 1), heads=(1, 2), groups=(1, 1), img_size=32)
    model = model.bfloat16()
    model.embed.__class__ = Converting
    model.embed.float()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="x: expected torch.float32, as the model's parameters are, got torch.float64"):
        dynattn.create_model("dat_mini")(IMAGE.double())


# ---------------------------------------------------------------- models of others


class Averages(Backbone):
    """Two stages that do nothing but average, as somebody else's model might."""

    def __init__(self, img_size=32, in_chans=3, num_classes=4, width: int = 8, global_pool: str = "avg"):
        super().__init__(
            img_size, in_chans, num_classes, dims=(width, 2 * width), depths=(1, 1), global_pool=global_pool
        )
        self.embed = PatchEmbedding(in_chans, width, 4, 4)
        down = PatchEmbedding(width, 2 * width, 2, 2)
        self.stages = nn.ModuleList([Stage(nn.Identity(), [nn.Identity()]), Stage(down, [nn.Identity()])])
        self.norm = nn.LayerNorm(2 * width)
        self.add_head(0.0)

    @classmethod
    def configuration(cls, **options) -> dict:
        """timm's description; `depths` is fixed here."""
        return super().configuration(depths=(1, 1), **options)


def test_a_model_from_outside(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(weights, "_ADDED", [])
    model = Averages(width=4).eval()
    weights.write(tmp_path / "averages.safetensors", model.state_dict(), {"name": "averages", "arguments": {}})
    model.load_state_dict(weights.read(tmp_path / "averages.safetensors")[0])
    weights.add_folder(tmp_path)
    with pytest.warns() if timm.is_model("averages") else torch.no_grad():  # timm warns of a name that is replaced
        dynattn.register_model("averages", Averages, width=4)
    assert "averages" in dynattn.list_models() and "averages" in weights.available()
    assert timm.is_model_pretrained("averages") and weights.path("averages") == tmp_path / "averages.safetensors"
    image = torch.randn(1, 3, 32, 32)
    for found in (dynattn.create_model("averages", pretrained=True), timm.create_model("averages", pretrained=True)):
        assert torch.equal(answers(found, image), answers(model, image))
        assert found.pretrained_cfg["input_size"] == (3, 32, 32) and found.pretrained_cfg["pool_size"] == (4, 4)
    features = timm.create_model("averages", pretrained=True, features_only=True)
    assert [tuple(one.shape) for one in features(image)] == [(1, 4, 8, 8), (1, 8, 4, 4)]
    assert dynattn.create_model("averages", width=2).embed.proj.out_channels == 2
    with pytest.raises(TypeError, match="widht: not an argument of averages; did you mean 'width'"):
        dynattn.create_model("averages", widht=2)


def test_names_that_cannot_be_registered(tmp_path, unchecked):
    for name, message in (
        ("resnet50", "name: 'resnet50' is taken, by a model of timm's"),
        ("dat", "name: 'dat' is taken, by a model of timm's or by a part of dynattn.models"),
        ("dat-mini", "name: expected letters, digits and underscores, as in 'dat_tiny', got 'dat-mini'"),
        (3, "name: expected letters"),
    ):
        with pytest.raises(ValueError, match=message):
            dynattn.register_model(name, Averages)
    with pytest.raises(TypeError, match="build: expected a class or a function that makes the model, got 3"):
        dynattn.register_model("mine", 3)
    with pytest.raises(NotADirectoryError, match="path: no folder .*/none"):
        weights.add_folder(tmp_path / "none")


def test_the_package_s_own_weights_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_ADDED", [])
    weights.write(tmp_path / "dat_mini.safetensors", {}, {"name": "dat_mini", "arguments": {}})
    weights.add_folder(tmp_path)
    weights.add_folder(str(tmp_path))
    assert weights._ADDED == [tmp_path] and weights.path("dat_mini").parent == weights.FOLDER
    assert core.rate("x", 0.5) == 0.5
