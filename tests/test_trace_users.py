"""Traces of what people bring: timm's other families, models of other sizes and channels, wrappers, threads, images."""

import pickle
import warnings
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from threading import Barrier, Event, Thread

import numpy as np
import pytest
import timm
import torch
from helpers import normal
from PIL import Image
from torch import Tensor, nn

import dynattn
from dynattn import tracing
from dynattn.adapters.timm import with_mask
from dynattn.data import MEAN, STD, to_input, to_rgb
from dynattn.mechanisms.window import WindowAttention
from dynattn.tracing import Record, Trace, trace
from dynattn.widgets.panel import Panel

DRAWN = ("token", "embed", "bias", "q_norm.weight", "qkv.weight", "table", "rel_pos_h", "rel_pos_w", "logit_scale")


def shaken(model: nn.Module) -> nn.Module:
    """A float64 model whose attention is far from uniform and whose biases and tables are far from zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(DRAWN):
                parameter.normal_()
    return model.double().eval()


def small(name: str, **options) -> nn.Module:
    """A model of timm's registry with the sizes given; Beit, whose registered models fix some options."""
    if name == "Beit":
        return shaken(timm.models.beit.Beit(num_classes=3, **options))
    return shaken(timm.create_model(name, pretrained=False, num_classes=3, **options))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ------------------------------------------------------------------------------------------------ timm's other families

ROW = dict(depth=2, embed_dim=24, num_heads=3)
WIDE = dict(ROW, img_size=(48, 80))
PIT = dict(base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(2, 2, 2))
SAM = dict(ROW, window_size=3, global_attn_indexes=(1,))
SWIN = dict(embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4)
PITS, SWINS = [(5, 9), (3, 5), (2, 3)], 2 * [(16, 8)] + 2 * [(8, 4)]
EXACT = [  # timm's name, arguments, the size of the image, the maps of the layers, tokens in front
    ("vit_small_patch16_rope_224", WIDE, (48, 80), 2 * [(3, 5)], 1),
    ("vit_small_patch16_rope_mixed_224", WIDE, (48, 80), 2 * [(3, 5)], 1),
    ("vit_small_patch16_dinov3", WIDE, (48, 80), 2 * [(3, 5)], 5),
    ("vit_small_patch16_dinov3", dict(ROW, img_size=32, dynamic_img_size=True), (80, 48), 2 * [(5, 3)], 5),
    ("vit_small_patch16_dinov3", dict(WIDE, attn_type="rope", qkv_fused=False), (48, 80), 2 * [(3, 5)], 5),
    ("vit_small_patch16_dinov3", dict(WIDE, attn_type="rope", qkv_fused=False, num_kv_heads=1), (48, 80), None, 5),
    ("vit_small_patch16_dinov3", dict(WIDE, qk_norm=True), (48, 80), 2 * [(3, 5)], 5),
    ("eva02_tiny_patch14_224", dict(ROW, img_size=(42, 70)), (42, 70), 2 * [(3, 5)], 1),
    ("eva_giant_patch14_224", dict(ROW, img_size=(42, 70)), (42, 70), 2 * [(3, 5)], 1),
    ("eva_giant_patch14_224", dict(ROW, img_size=(42, 70), scale_attn_inner=True), (42, 70), 2 * [(3, 5)], 1),
    ("beit_base_patch16_224", WIDE, (48, 80), 2 * [(3, 5)], 1),
    ("beit_base_patch16_224", dict(WIDE, use_shared_rel_pos_bias=True), (48, 80), 2 * [(3, 5)], 1),
    ("Beit", dict(WIDE, use_shared_rel_pos_bias=True, use_rel_pos_bias=False), (48, 80), 2 * [(3, 5)], 1),
    ("Beit", dict(WIDE, use_rel_pos_bias=False, qkv_bias=False), (48, 80), 2 * [(3, 5)], 1),
    ("vit_relpos_small_patch16_224", WIDE, (48, 80), 2 * [(3, 5)], 0),
    ("vit_relpos_small_patch16_224", dict(WIDE, rel_pos_type="bias"), (48, 80), 2 * [(3, 5)], 0),
    ("vit_relpos_base_patch16_clsgap_224", WIDE, (48, 80), 2 * [(3, 5)], 1),
    ("vit_srelpos_small_patch16_224", dict(WIDE), (48, 80), 2 * [(3, 5)], 0),
    ("pit_ti_224", dict(PIT, img_size=(48, 80)), (48, 80), PITS, 1),
    ("pit_ti_distilled_224", dict(PIT, img_size=(48, 80)), (48, 80), PITS, 2),
    ("samvit_base_patch16", dict(SAM, img_size=96), (96, 96), 2 * [(6, 6)], 0),
    ("samvit_base_patch16", dict(SAM, img_size=96), (96, 48), 2 * [(6, 3)], 0),
    ("samvit_base_patch16", dict(SAM, img_size=96, use_rel_pos=False, use_rope=True), (96, 96), 2 * [(6, 6)], 0),
    ("samvit_base_patch16", dict(SAM, img_size=96, use_rel_pos=False), (96, 96), 2 * [(6, 6)], 0),
    ("swinv2_tiny_window8_256", dict(SWIN, img_size=(64, 32)), (64, 32), SWINS, None),
]


@pytest.mark.parametrize(("name", "options", "shape", "grids", "prefix"), EXACT)
@pytest.mark.parametrize("fused", [True, False])
def test_families_are_explained(name, options, shape, grids, prefix, fused):
    """DAT-2: from A_eff and the values follows what the attention module really put out, bias and rotation too."""
    model = small(name, **options)
    outputs = {}
    attentions = {path: module for path, module in model.named_modules() if path.endswith(".attn")}
    for path, module in attentions.items():
        module.fused_attn = fused
        module.register_forward_hook(lambda _, inputs, output, path=path: outputs.update({path: output}))
    before = hooks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = trace(model, normal(3, *shape))
    assert hooks(model) == before and t.layers == list(attentions)
    for record in t:
        assert record.exact and max(record.rest(head) for head in range(record.heads)) < 1e-12
        computed = torch.cat([record.effective_matrix(m) @ record.value(m) for m in range(record.heads)], dim=-1)
        attention, output = attentions[record.name], outputs[record.name]
        computed = attention.proj(attention.norm(computed) if hasattr(attention, "norm") else computed)
        torch.testing.assert_close(computed, of_cells(record, output), rtol=1e-9, atol=1e-11)
    assert grids is None or [record.query_shape for record in t] == grids
    assert prefix is None or [getattr(record, "prefix", 0) for record in t] == [prefix] * len(t)
    heat = t.rollout(shape[0] - 1, 0)
    assert heat.shape == shape and heat.sum().item() == pytest.approx(1)


def of_cells(record: Record, output: Tensor) -> Tensor:
    """What an attention module put out for the cells of the map, row-major."""
    L = record.query_shape[0] * record.query_shape[1]
    if record.kind == "dense":
        return output.reshape(-1, output.shape[-1])[-L:]
    cells = output.new_zeros(L + 1, output.shape[-1])
    cells[record.places.flatten()] = output.reshape(-1, output.shape[-1])
    return cells[1:]


def test_kinds_of_families():
    sam = trace(small("samvit_base_patch16", **SAM, img_size=96), normal(3, 96, 96))
    assert [(r.kind, r.stride) for r in sam] == [("window", (16, 16)), ("dense", (16, 16))]
    assert sam["blocks.0.attn"].window == (3, 3) and len(sam["blocks.0.attn"].keys(0, 0).weight) == 9
    swin = trace(small("swinv2_tiny_window8_256", **SWIN, img_size=64), normal(3, 64, 64))
    assert [(r.kind, r.window, r.shift) for r in swin] == 2 * [("window", (4, 4), (0, 0)), ("window", (4, 4), (2, 2))]
    keys = swin["layers.0.blocks.1.attn"].keys(0, 0)  # the corner that the roll has cut off: 2 x 2 cells of 4 pixels
    assert {tuple(xy) for xy in keys.xy.tolist()} == {(1.5, 1.5), (5.5, 1.5), (1.5, 5.5), (5.5, 5.5)}


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("samvit_base_patch16", dict(SAM, img_size=128), (128, 112)),
        ("swinv2_tiny_window8_256", dict(SWIN, img_size=(40, 56)), (40, 56)),
    ],
)
def test_windows_that_read_padding_say_so(name, options, shape):
    """Padding has the value of the bias: the rest is what it got."""
    records = [r for r in trace(small(name, **options), normal(3, *shape)) if not r.exact]
    assert records and all(r.kind == "window" for r in records)
    for record in records:
        missing = 1 - record.weights(0).sum(1)
        assert missing.min() > -1e-12 and missing.max() > 1e-3 and record.rest(0) > 1e-4


def test_a_mask_of_swin_v2_that_is_not_enough():
    """Cosines times 100 can outweigh timm's -100: then a key that is masked is read, and stays in the record."""
    k = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(1, 1, 2, 1)
    bias, mask = torch.zeros(1, 2, 2), torch.tensor([[[0.0, -100.0], [-100.0, 0.0]]])
    assert torch.equal(with_mask(100 * torch.ones_like(k), k, bias, mask, 1.0), mask[:, None])
    assert torch.equal(with_mask(10 * torch.ones_like(k), k, bias, mask, 1.0)[0, 0] == -torch.inf, mask[0] < 0)
    assert torch.equal(with_mask(k, k, bias, None, 1.0), bias[None])


def test_cells_are_where_the_patches_are():
    """Change one patch: exactly its key and value change in the first layer."""
    for name, options in (("vit_small_patch16_dinov3", WIDE), ("beit_base_patch16_224", WIDE)):
        model, image = small(name, **options), normal(3, 48, 80)
        before = trace(model, image)["blocks.0.attn"]
        changed = image.clone()
        changed[:, 20, 70] += 1  # row 1, column 4 of patches of 16
        after = trace(model, changed)["blocks.0.attn"]
        for a, b in ((before.k, after.k), (before.v, after.v), (before.q, after.q)):
            assert (a != b).any(2).any(0).nonzero().flatten().tolist() == [9]


# ------------------------------------------------------------------------------------------------- what is not recorded

OTHERS = [
    (
        "cait_xxs24_224",
        dict(depth=1),
        "1 x TalkingHeadAttn (blocks.0.attn), 2 x ClassAttn (blocks_token_only.0.attn, ...",
    ),
    ("xcit_nano_12_p16_224", dict(depth=1), "1 x XCA (blocks.0.attn), 2 x ClassAttn (cls_attn_blocks.0.attn, ..."),
    ("levit_128s", {}, "9 x Attention (stages.0.blocks.0.attn, ...), 2 x AttentionDownsample ("),
    ("gcvit_xxtiny", {}, "12 x WindowAttentionGlobal (stages.0.blocks.0.attn, ..."),
    ("hiera_tiny_224", dict(stages=(1, 1, 1, 1)), "4 x MaskUnitAttention (blocks.0.attn, ...)"),
    ("mobilevit_xxs", {}, "9 x Attention (stages.2.1.transformer.0.attn, ..."),
    ("resnet18", {}, "none ran"),
]


@pytest.mark.parametrize(("name", "options", "named"), OTHERS)
def test_an_empty_trace_is_an_error_that_names_the_attention(name, options, named):
    model = timm.create_model(name, pretrained=False, num_classes=3, **options)
    size = model.default_cfg["input_size"]
    with pytest.raises(ValueError) as error:
        trace(model, torch.randn(size))
    assert str(error.value).startswith(f"model: no attention layer of {type(model).__name__} could be recorded; ")
    assert named in str(error.value) and hooks(model) == 0 and model.training


def test_a_trace_that_lacks_some_attention_warns():
    model = small("vit_base_patch16_siglip_224", depth=1, embed_dim=24, num_heads=3, img_size=32)
    with pytest.warns(UserWarning, match=r"ran and is not recorded: 1 x AttentionPoolLatent \(attn_pool\)$") as caught:
        assert trace(model, normal(3, 32, 32)).layers == ["blocks.0.attn"]
    assert len(caught) == 1


class Alone(nn.Module):
    """A model of one attention layer, `attn`, on a map of 8 channels."""

    def __init__(self, attention: nn.Module, channels: int = 3):
        super().__init__()
        self.embed, self.attn = nn.Conv2d(channels, 8, 1), attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.embed(x).movedim(1, -1)).mean((1, 2))


class Mine(nn.Module):
    """Attention by nobody's name, told by its child."""

    def __init__(self, child: str):
        super().__init__()
        self.add_module(child, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


def test_what_looks_like_attention():
    """A class's name or a child says it. Nothing is missed in or around a recorded layer, nor what never ran."""

    class WindowAttentionWithAttnInside(WindowAttention):
        def __init__(self):
            super().__init__(8, 2, 4)
            self.attn_of_mine = Mine("qkv")

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.attn_of_mine(x))

    class AttentionBlock(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = Alone(AttentionBlock(WindowAttentionWithAttnInside()))
    model.never = Mine("qkv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trace(model, normal(3, 8, 8).float()).layers == ["attn.inner"]
    for child in ("qkv", "qk"):
        with pytest.raises(ValueError, match=r"not recorded: 1 x Mine \(attn.inner\)"):
            trace(Alone(AttentionBlock(Mine(child))), normal(3, 8, 8).float())
    with pytest.raises(ValueError, match="none ran"):
        trace(Alone(Mine("project")), normal(3, 8, 8).float())


QUIET = [
    lambda: dynattn.create_model("dat_mini"),
    lambda: dynattn.create_model("dgt_mini", img_size=32),
    lambda: dynattn.create_model("swin_mini"),
    lambda: dynattn.create_model("vit_mini"),
    lambda: dynattn.create_model("cswin_tiny", img_size=64),
    lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1),
    lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1),
    lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), num_heads=(3, 6)),
]


@pytest.mark.parametrize("build", QUIET)
def test_no_false_alarm(build):
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = trace(model, photo(40, 30))
    modules = dict(model.named_modules())
    assert len(t) and set(t.layers) <= set(modules)
    assert (
        sorted(t.layers) == sorted(p for p in modules if p.endswith(".attn") or p.endswith("attention")) or len(t) > 1
    )


# -------------------------------------------------------------------------------------------- sizes, channels, wrappers


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(model: nn.Module, size: int) -> nn.Module:
    model.set_input_size(img_size=size)
    return model


TINY = dict(depth=1, embed_dim=12, num_heads=3)
SIZES = [
    (lambda: timm.create_model("vit_tiny_patch16_224", img_size=96, **TINY), (96, 96)),
    (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), **TINY), (32, 48)),
    (lambda: resized(timm.create_model("vit_tiny_patch16_224", **TINY), 192), (192, 192)),
    (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=256, **{**SWIN, "window_size": 8}), (256, 256)),
    (lambda: resized(timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **SWIN), 64), (64, 64)),
    (lambda: timm.create_model("swinv2_tiny_window8_256", img_size=64, **SWIN), (64, 64)),
    (lambda: timm.create_model("beit_base_patch16_224", img_size=48, **TINY), (48, 48)),
    (lambda: timm.create_model("pit_ti_224", img_size=64, **PIT), (64, 64)),
    (lambda: timm.create_model("vit_tiny_patch16_224", **TINY), (224, 224)),
    (lambda: dynattn.create_model("vit_mini", img_size=64, depth=1), (64, 64)),
]


@pytest.mark.parametrize(("build", "size"), SIZES)
def test_pictures_are_brought_to_the_size_the_model_was_made_for_or_set_to(build, size):
    assert trace(build(), photo(40, 30)).image.shape == (3, *size)


class Wrapper(nn.Module):
    """Somebody's own, around a model; runs it several times."""

    def __init__(self, net: nn.Module, times: int = 1):
        super().__init__()
        self.net, self.times = net, times

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.net(x + i) for i in range(self.times))


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, "module."),
        (Wrapper, "net."),
        (lambda model: Wrapper(nn.DataParallel(model)), "net.module."),
        (torch.optim.swa_utils.AveragedModel, "module."),
        (lambda model: timm.utils.ModelEmaV3(model), "module."),
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
    ],
)
def test_wrappers_read_the_size_and_strides_of_what_they_wrap(wrap, prefix):
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, **SWIN).eval()
    t, plain = trace(wrap(model), photo(40, 30)), trace(model, photo(40, 30))
    assert t.layers == [prefix + name for name in plain.layers]
    assert [r.stride for r in t] == [r.stride for r in plain] and torch.equal(t.image, plain.image)
    torch.testing.assert_close(t.logits, plain.logits)


def test_a_model_that_runs_twice_says_which_run_is_kept():
    model = Alone(WindowAttention(8, 2, 4)).double().eval()
    image = normal(3, 8, 8)
    with pytest.warns(UserWarning, match=r"1 layers ran several times in one forward, net.attn first .* the last run"):
        twice = trace(Wrapper(model, times=2), image)
    assert twice.layers == ["net.attn"]
    torch.testing.assert_close(twice["net.attn"].z, trace(model, image + 1)["attn"].z)


def test_models_of_one_channel():
    """Pictures become grey, normalised by the mean of the three channels' statistics."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, in_chans=1, **TINY)
    array = photo(32, 32)
    t = trace(model, array)
    grey = np.asarray(Image.fromarray(array).convert("L"), dtype=np.float32) / 255
    expected = (torch.from_numpy(grey) - sum(MEAN) / 3) / (sum(STD) / 3)
    torch.testing.assert_close(t.image, expected[None])
    assert trace(model, torch.randn(1, 32, 32)).image.shape == (1, 32, 32)
    assert np.array_equal(to_rgb(t.image), np.asarray(Image.fromarray(array).convert("L").convert("RGB")))
    with pytest.raises(ValueError, match=r"image: expected a tensor \(1, H, W\) or \(1, 1, H, W\), got \(3, 32, 32\)"):
        trace(model, torch.randn(3, 32, 32))


def test_models_of_four_channels():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, in_chans=4, **SWIN)
    assert trace(model, torch.randn(4, 64, 64)).image.shape == (4, 64, 64)
    with pytest.raises(
        ValueError, match=r"image: the model sees 4 channels, and a picture gives 3 or 1; .* \(4, H, W\)"
    ):
        trace(model, photo(64, 64))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_models_that_do_not_say_their_channels(channels):
    model = Alone(WindowAttention(8, 2, 4), channels)
    assert trace(model, torch.randn(channels, 8, 8)).image.shape == (channels, 8, 8)


def test_pictures_are_normalised_as_the_model_wants_it():
    model = timm.create_model("beit_base_patch16_224", img_size=32, **TINY)
    assert model.default_cfg["mean"] == (0.5, 0.5, 0.5)
    array = photo(32, 32)
    expected = torch.from_numpy(array).movedim(-1, 0) / 255 * 2 - 1
    torch.testing.assert_close(trace(Wrapper(model), array).image, expected)


# -------------------------------------------------------------------------------------------------------------- threads


def at_once(*jobs: Callable) -> list:
    """What each job returns, each in a thread of its own; raises what one raised."""
    found: list = [None] * len(jobs)

    def run(i: int) -> None:
        try:
            found[i] = jobs[i]()
        except Exception as error:
            found[i] = error

    threads = [Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


class Together(nn.Module):
    """A model in which several threads meet before and after the forward of each layer that is named."""

    def __init__(self, net: nn.Module, threads: int, at: str):
        super().__init__()
        self.net = net
        self.meet = Barrier(threads, timeout=30)
        for name, module in net.named_modules():
            if name.endswith(at):
                module.register_forward_pre_hook(lambda *_: self.wait())
                module.register_forward_hook(lambda *_: self.wait())

    def wait(self) -> None:
        self.meet.wait()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


BOTH = [
    (lambda: Alone(WindowAttention(8, 2, 4)), "attn", (12, 12)),
    (lambda: dynattn.create_model("dat_mini", img_size=32), ".attn", (32, 32)),
    (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY), ".proj", (32, 32)),
    (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **SWIN), ".proj", (32, 32)),
    (lambda: timm.create_model("samvit_base_patch16", img_size=64, **SAM), ".proj", (64, 64)),
    (lambda: timm.create_model("pit_ti_224", img_size=48, **PIT), ".proj", (48, 48)),
]


@pytest.mark.parametrize(("build", "at", "shape"), BOTH)
def test_traces_side_by_side_record_their_own_forward(build, at, shape):
    """Both are inside each attention layer at the same time; a third thread only computes."""
    model = build().double().eval()
    images = [normal(3, *shape) for _ in range(3)]
    alone = [trace(model, image) for image in images]
    together = Together(model, 3, at)
    with torch.no_grad():
        *found, logits = at_once(
            lambda: trace(together, images[0]), lambda: trace(together, images[1]), lambda: together(images[2][None])
        )
    torch.testing.assert_close(logits[0], alone[2].logits)
    for t, expected in zip(found, alone, strict=False):
        assert t.layers == ["net." + name for name in expected.layers]
        torch.testing.assert_close(t.logits, expected.logits)
        for one, other in zip(t, expected, strict=True):
            for m in range(one.heads):
                torch.testing.assert_close(one.output(m), other.output(m))
                torch.testing.assert_close(one.effective_matrix(m), other.effective_matrix(m))
    assert not tracing.recording()


def test_a_training_model_is_brought_back_to_training_by_the_last_trace():
    """The second trace begins inside the first and ends after it: eval mode lasts until then, and not longer."""
    first_inside, second_inside, first_over = Event(), Event(), Event()
    seen = {}

    class Slow(Alone):
        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0, 0, 0] > 0:
                first_inside.set()
                assert second_inside.wait(30)
            else:
                second_inside.set()
                assert first_over.wait(30)
                seen["mode"] = self.training
            return super().forward(x)

    model = Slow(WindowAttention(8, 2, 4))
    frozen = model.embed.eval()

    def first() -> None:
        trace(model, torch.full((3, 8, 8), 2.0))
        seen["between"] = model.training
        first_over.set()

    def second() -> None:
        assert first_inside.wait(30)
        trace(model, torch.full((3, 8, 8), -2.0))

    at_once(first, second)
    assert seen == {"between": False, "mode": False}
    assert model.training and model.attn.training and not frozen.training and not tracing._modes


def test_modes_come_back_after_an_error():
    class Stubborn(Alone):
        def train(self, mode: bool = True) -> nn.Module:
            if not mode:
                raise RuntimeError("no")
            return super().train(mode)

    model = Stubborn(WindowAttention(8, 2, 4))
    with pytest.raises(RuntimeError, match="no"):
        trace(model, normal(3, 8, 8))
    assert model.training and not tracing._modes and hooks(model) == 0


def test_a_trace_inside_a_trace_records_its_own():
    model = Alone(WindowAttention(8, 2, 4)).eval()
    inner = Alone(WindowAttention(8, 2, 4)).eval()
    found = []
    model.embed.register_forward_hook(lambda *_: found.append(trace(inner, torch.ones(3, 4, 4) * 2)))
    outer = trace(model, torch.ones(3, 8, 8) * 2)
    assert outer["attn"].query_shape == (8, 8) and found[0]["attn"].query_shape == (4, 4)


# --------------------------------------------------------------------------------------------------------------- images


def test_a_tensor_in_zero_to_one_is_warned_about():
    tensor = torch.from_numpy(photo(8, 8)).movedim(-1, 0)
    tensor[0, 0, :2] = torch.tensor([0, 255])
    model = Alone(WindowAttention(8, 2, 4))
    for ask in (to_input, lambda image: trace(model, image).image[None]):
        with pytest.warns(UserWarning, match=r"all values lie in \[0, 1\] .*Normalize\(dynattn.data.MEAN.*byte\(\)"):
            assert torch.equal(ask(tensor / 255), tensor[None] / 255)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ask(to_input(tensor))
            ask(tensor / 255 - 0.01)
            ask(torch.zeros(3, 8, 8))
            ask(tensor / 255 * 1.01 + 0.01)
            ask(tensor)


def test_uint8_tensors_with_channels_last():
    array = photo(20, 30)
    tensor = torch.from_numpy(array)
    for given in (tensor, tensor[None], tensor.movedim(-1, 0)):
        assert torch.equal(to_input(given), to_input(array))
    rgba = torch.cat([tensor, torch.full((20, 30, 1), 255, dtype=torch.uint8)], dim=-1)
    assert torch.equal(to_input(rgba), to_input(array)) and to_input(tensor[..., :1]).shape == (1, 3, 20, 30)
    # A first side of 1, 3 or 4 is taken for the channels: such a picture is better given as an array.
    assert to_input(torch.zeros(3, 9, 4, dtype=torch.uint8)).shape == (1, 3, 9, 4)
    assert to_input(np.zeros((3, 9, 4), dtype=np.uint8)).shape == (1, 3, 3, 9)


def test_bytes_and_files(tmp_path):
    array = photo(20, 30)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    content, expected = path.read_bytes(), to_input(array)
    for given in (content, bytearray(content), memoryview(content), BytesIO(content)):
        assert torch.equal(to_input(given), expected)
    written = BytesIO()
    Image.fromarray(array).save(written, "PNG")
    end = written.tell()
    assert torch.equal(to_input(written), expected) and written.tell() == end and not written.closed
    with open(path, "rb") as file:
        file.seek(7)
        assert torch.equal(to_input(file), expected) and file.tell() == 7 and not file.closed
    model = Alone(WindowAttention(8, 2, 4))
    assert torch.equal(trace(model, BytesIO(content)).image[None], expected)


def test_a_stream_that_cannot_seek_is_read_once_for_all_models():
    class Stream:
        def __init__(self, content: bytes):
            self.content = content

        def read(self) -> bytes:
            content, self.content = self.content, b""
            return content

    from dynattn.widgets.panel import make_panels

    file = BytesIO()
    Image.fromarray(photo(8, 8)).save(file, "PNG")
    models = [Alone(WindowAttention(8, 2, 4)) for _ in range(2)]
    for panel in make_panels(models, Stream(file.getvalue())):
        assert torch.equal(panel.trace.image[None], to_input(photo(8, 8))) and panel.picture.shape == (8, 8, 3)


def test_bytes_and_files_that_are_no_pictures(tmp_path):
    closed = BytesIO(b"x")
    closed.close()
    for given, error, message in (
        (b"", ValueError, "a picture that Pillow can read, got 0 bytes"),
        (b"a.png", ValueError, "a picture that Pillow can read, got 5 bytes"),
        (BytesIO(b"no"), ValueError, "a picture that Pillow can read, got a BytesIO of 2 bytes"),
        (StringIO("text"), TypeError, r"a file opened in binary mode \('rb'\), got a StringIO, which reads text"),
        (closed, ValueError, "cannot read a BytesIO: I/O operation on closed file"),
    ):
        with pytest.raises(error, match="image: .*" + message):
            to_input(given)


# --------------------------------------------------------------------------------------------------- the lens, rollout


def test_the_lens_takes_a_layer_by_number():
    lens_module = pytest.importorskip("dynattn.widgets.lens")
    model = dynattn.create_model("dat_mini", img_size=32)
    lens = lens_module.Lens(model, photo(32, 32), layer=2)
    names = lens.traces[0].layers
    assert lens.layer == (names[2],) and "stage 2, block 1, window" in repr(lens)
    lens.layer = -1
    assert lens.layer == (names[-1],)
    lens.layer = [np.int64(1)]
    assert lens.layer == (names[1],)
    for wrong in (len(names), -len(names) - 1, True, 1.5, None):
        with pytest.raises(
            ValueError, match=rf"layer: DAT has no {wrong!r}; it has .*, or the numbers 0 to {len(names) - 1}"
        ):
            lens.layer = wrong
        assert lens.layer == (names[1],)


def test_the_page_makes_its_folder_and_takes_numbers(tmp_path):
    from dynattn.widgets import save_page

    model = dynattn.create_model("dat_mini", img_size=32)
    path = tmp_path / "new" / "folder" / "lens.html"
    assert save_page(model, photo(32, 32), path, layers=[-1, 0]) == path and path.stat().st_size > 10_000
    one = save_page(model, photo(32, 32), str(tmp_path / "b" / "lens.html"), layers=-1)
    assert isinstance(one, Path) and one.stat().st_size < path.stat().st_size
    with pytest.raises(ValueError, match="layer: DAT has no 99"):
        save_page(model, photo(32, 32), tmp_path / "never" / "lens.html", layers=99)
    assert not (tmp_path / "never").exists()


def test_a_lens_says_why_it_cannot_be_pickled():
    lens_module = pytest.importorskip("dynattn.widgets.lens")
    lens = lens_module.Lens(Alone(WindowAttention(8, 2, 4)), photo(8, 8))
    with pytest.raises(TypeError, match=r"a Lens cannot be pickled or copied: .* pickle lens.traces"):
        pickle.dumps(lens)
    (again,) = pickle.loads(pickle.dumps(lens.traces))
    assert lens_module.Lens([again]).layer == lens.layer


def test_rollouts_of_a_panel_are_those_of_the_trace():
    """One place works them out: every row of a panel is the trace's map before it is spread over the pixels."""
    t = trace(small("pit_ti_224", **PIT, img_size=48), normal(3, 48, 48))
    panel = Panel("pit", t, np.zeros((48, 48, 3), np.uint8))
    first, last = (t[t.layers[i]] for i in (0, -1))
    for row, col in ((0, 0), (47, 20)):
        heat = torch.from_numpy(panel.rollouts[last.query(row, col)]).reshape(first.query_shape)
        torch.testing.assert_close(tracing.spread(heat, (48, 48), first.stride), t.rollout(row, col))
    assert isinstance(t, Trace) and panel.rollouts.shape == (4, 25)
