"""DAT's models: names and arguments, sizes of input, the backbone's interface, training, bad input."""

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import deterministic
import numpy as np
import pytest
import torch
from torch import nn

import dynattn
from dynattn import core, weights
from dynattn.data import Shapes, cached, normalise, to_input
from dynattn.mechanisms.deformable import DeformableAttention, OffsetNetwork
from dynattn.mechanisms.window import WindowAttention
from dynattn.models.dat import VARIANTS

ROOT = Path(__file__).parents[1]
SMALL = dict(
    img_size=64, num_classes=5, dims=(16, 32, 64), depths=(2, 2, 2), heads=(2, 2, 4), groups=(1, 2, 2), window=3
)

PLAIN = dict(conv_stem=False, local_convs=False, conv_embedding=False, offset_zero_init=False, clamp=False)
PLAIN |= dict(kernels=None)


def small(**options) -> nn.Module:
    """A DAT of the published kind that runs in milliseconds, with deterministic weights in float64."""
    return deterministic.filled(dynattn.create_model("dat_mini", **(PLAIN | SMALL | options)))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64, **options) -> torch.Tensor:
    return model(deterministic.image(2, size), **options)


# ---------------------------------------------------------------- names and parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dat_tiny", 28_319_138),
        ("dat_small", 49_700_402),
        ("dat_base", 87_881_632),
        ("dat_base_384", 88_178_272),
        ("dat_tiny_conv", 30_264_002),
    ],
)
def test_parameters_to_the_unit(name, parameters):
    with torch.device("meta"):
        model = dynattn.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.requires_grad for p in model.parameters()) and not list(model.buffers())


def test_the_small_model_is_small():
    assert sum(p.numel() for p in dynattn.create_model("dat_mini").parameters()) <= 1_900_000


def test_list_models():
    names = dynattn.list_models()
    assert names == sorted(names)
    assert {"dat_tiny", "dat_small", "dat_base", "dat_base_384", "dat_tiny_conv", "dat_mini"} <= set(names)
    assert {"dgt_tiny", "dgt_small", "dgt_base", "dgt_mini"} <= set(names)
    assert {"swin_mini", "vit_mini", "cswin_tiny", "swin_tiny_dgt"} <= set(names)
    assert dynattn.list_models("dat_base*") == ["dat_base", "dat_base_384"]
    assert dynattn.list_models("dat_????") == ["dat_base", "dat_mini", "dat_tiny"]
    assert dynattn.list_models("DAT_*") == dynattn.list_models("") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dat_tiney", "no model 'dat_tiney'; did you mean 'dat_tiny' or 'dgt_tiny' or 'dat_tiny_conv'"),
        ("DAT-T", "no model 'DAT-T'; did you mean 'dat_tiny'"),
        ("swin", "no model 'swin'; did you mean 'swin_mini'"),
        ("resnet50", "no model 'resnet50'; there are biformer_base, biformer_mini, "),
        ("", "no model ''; there are "),
    ],
)
def test_unknown_names_suggest_the_nearest(name, message):
    with pytest.raises(ValueError, match=f"name: {message}"):
        dynattn.create_model(name)


@pytest.mark.parametrize("name", [3, None, ["dat_tiny"]])
def test_names_are_strings(name, unchecked):
    with pytest.raises(TypeError, match="name: expected the name of a model, got "):
        dynattn.create_model(name)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("num_clases", 3, TypeError, "num_clases: not an argument of dat_mini; did you mean 'num_classes'?"),
        ("xyz", 3, TypeError, "xyz: not an argument of dat_mini; it takes img_size, in_chans, num_classes, dims"),
        ("num_classes", "3", TypeError, "num_classes: expected a whole number, got '3'"),
        ("num_classes", 2.5, TypeError, "num_classes: expected a whole number, got 2.5"),
        ("num_classes", True, TypeError, "num_classes: expected a whole number, got True"),
        ("num_classes", -1, ValueError, "num_classes: expected at least 1, got -1"),
        ("in_chans", 0, ValueError, "in_chans: expected at least 1, got 0"),
        ("img_size", "224", TypeError, "img_size: expected a whole number or a pair (rows, columns), got '224'"),
        ("img_size", (1, 2, 3), TypeError, "img_size: expected a whole number or a pair (rows, columns), got (1, 2"),
        ("img_size", 64.0, TypeError, "img_size: expected a whole number or a pair (rows, columns), got 64.0"),
        ("img_size", 0, ValueError, "img_size[0]: expected at least 1, got 0"),
        ("img_size", (8, -1), ValueError, "img_size[1]: expected at least 1, got -1"),
        ("variant", "papers", ValueError, "variant: expected one of 'official', 'paper', got 'papers'"),
        ("depths", 4, TypeError, "depths: expected the number of blocks of every stage, got 4"),
        ("depths", (), TypeError, "depths: expected the number of blocks of every stage, got ()"),
        ("depths", (2, 0, 2), ValueError, "depths: expected at least 1, got 0"),
        ("dims", (32, 64), ValueError, "dims: expected 3 values, one for each stage of depths, got (32, 64)"),
        ("heads", (3, 4, 8), ValueError, "heads: expected a divisor of 32, got 3"),
        ("heads", 4, ValueError, "heads: expected 3 values, one for each stage of depths, got 4"),
        ("groups", (1, 3, 2), ValueError, "groups: expected a divisor of 4, got 3"),
        ("window", 0, ValueError, "window: expected at least 1, got 0"),
        ("strides", (1, 1, 0), ValueError, "stride: expected at least 1, got 0"),
        ("kernels", (4, 4, 4), ValueError, "kernel: expected an odd number, got 4"),
        ("offset_range", -1, ValueError, "offset_range: expected a finite number of at least 0, got -1"),
        ("offset_range", (1, 2), ValueError, "offset_range: expected 3 values, one for each stage of depths, got (1,"),
        ("offset_range", None, ValueError, "offset_range: expected 3 values"),
        ("reference", "center", ValueError, "reference: expected one of 'centre', 'corner', got 'center'"),
        ("offset_unit", "pixel", ValueError, "offset_unit: expected one of 'half_cell', 'cell', got 'pixel'"),
        ("shift", "left", ValueError, "shift: expected one of 'up', 'down', got 'left'"),
        ("position_bias", "absolute", ValueError, "position_bias: expected one of 'relative', 'fixed', 'dwconv', None"),
        ("early", "pvt", ValueError, "early: expected one of 'shifted', 'sra', got 'pvt'"),
        ("blocks", [("windw",)] * 3, ValueError, "blocks: expected one of 'window', 'shifted', 'deformable'"),
        ("blocks", [("window",)], ValueError, "blocks: expected the attentions of each of 3 stages"),
        ("blocks", [()] * 3, ValueError, "blocks: expected the attentions of each of 3 stages"),
        ("deformable_stages", 3, TypeError, "deformable_stages: expected numbers of stages, got 3"),
        ("drop_path_rate", 1, ValueError, "drop_path_rate: expected a number from 0 to below 1, got 1"),
        ("drop_path_rate", "0.1", ValueError, "drop_path_rate: expected a number from 0 to below 1, got '0.1'"),
    ],
)
def test_bad_arguments_say_what_would_be_right(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught:
        dynattn.create_model("dat_mini", **{argument: value})
    assert str(caught.value).startswith(message)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("classes", [0, 1, 7])
def test_number_of_classes(classes):
    model = small(num_classes=classes)
    assert answer(model).shape == (2, classes or 64) and model.num_classes == classes
    assert isinstance(model.get_classifier(), nn.Linear if classes else nn.Identity)


def test_without_classes_a_model_gives_the_features_before_its_classifier():
    model, bare = small(), small(num_classes=0)
    torch.testing.assert_close(model.head(answer(bare)), answer(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "maps"), [(64, (8, 8)), ((64, 96), (8, 12)), ((50, 33), (7, 5))])
def test_img_size_makes_the_tables(size, maps):
    model = small(img_size=size)
    assert model.stages[1].blocks[1].attn.table.shape[1:] == (2 * maps[0] - 1, 2 * maps[1] - 1)
    assert model.stages[0].blocks[0].attn.table.shape[1:] == (5, 5)
    assert answer(model, size).shape == (2, 5)


def test_other_channels(unchecked):
    model = small(in_chans=1)
    assert model(deterministic.image(1, 64)[:, :1]).shape == (1, 5)


@pytest.mark.parametrize("keyword", VARIANTS["paper"])
def test_every_disagreement_of_text_and_code_can_be_chosen_alone(keyword):
    """The ledger's five keywords: each changes the logits, and undone within variant="paper" changes them back."""
    paper = VARIANTS["paper"][keyword]
    assert paper != VARIANTS["official"][keyword]
    official, text = answer(small()), answer(small(variant="paper"))
    alone = answer(small(**{keyword: paper}))
    assert (alone - official).abs().max() > 1e-4 * official.std()
    others = {name: value for name, value in VARIANTS["paper"].items() if name != keyword}
    all_but_one = answer(small(variant="paper", **{keyword: VARIANTS["official"][keyword]}))
    assert torch.equal(all_but_one, answer(small(**others)))
    assert (all_but_one - text).abs().max() > 1e-4 * text.std()


def test_the_variants_are_their_keywords():
    assert torch.equal(answer(small(variant="paper")), answer(small(**VARIANTS["paper"])))
    assert torch.equal(answer(small(variant="official")), answer(small()))
    assert torch.equal(answer(small(**VARIANTS["official"])), answer(small(variant=None)))


def test_what_the_variants_say():
    code, text = small(), small(variant="paper")
    attention = [model.stages[1].blocks[1].attn for model in (code, text)]
    assert [a.offset.depthwise.kernel_size for a in attention] == [(7, 7), (5, 5)]
    assert [type(a.offset.norm) for a in attention] == [nn.LayerNorm, nn.Identity]
    assert [model.stages[0].blocks[1].attn.shift for model in (code, text)] == [2, 1]  # ceil and floor of 3 / 2
    tiny = [dynattn.create_model("dat_tiny", variant=variant) for variant in VARIANTS]
    kernels = [[m.depthwise.kernel_size[0] for m in t.modules() if isinstance(m, OffsetNetwork)] for t in tiny]
    assert kernels == [[5, 5, 5, 3], [5, 5, 5, 5]]
    shifts = [{m.shift for m in t.modules() if isinstance(m, WindowAttention)} for t in tiny]
    assert shifts == [{0, 4}, {0, 3}]


@pytest.mark.parametrize(
    "options",
    [
        dict(offsets=False),
        dict(position_bias=None),
        dict(position_bias="fixed"),
        dict(position_bias="dwconv"),
        dict(early="sra"),
        dict(deformable_stages=(3,)),
        dict(deformable_stages=(1, 2, 3)),
        dict(strides=(1, 1, 1)),
        dict(offset_range=1.0),
        dict(offset_range=(1.0, 2.0, 3.0)),
        dict(blocks=[("window",), ("deformable",), ("window", "deformable_detr")]),
        dict(blocks=[("window", "shifted")] * 2 + [("deformable_detr",)], detr_points=(4, 4, 4)),
        dict(conv_embedding=True),
        dict(conv_stem=True),
        dict(local_convs=True),
        dict(clamp=True),
        dict(window=4),
    ],
    ids=str,
)
def test_every_option_changes_the_answer(options):
    logits = answer(small(**options))
    assert logits.isfinite().all() and (logits - answer(small())).abs().max() > 1e-4
    assert answer(small(**options), (45, 70)).isfinite().all()


def test_offsets_can_start_at_zero():
    torch.manual_seed(0)
    model = dynattn.create_model("dat_mini", **SMALL, offset_zero_init=True)
    for record in dynattn.trace(model, torch.randn(3, 64, 64)).of_kind("deformable"):
        assert torch.equal(record.points, record.references.expand_as(record.points))


# ---------------------------------------------------------------- any height and width


@pytest.mark.parametrize(
    "size",
    [(1, 1), (31, 33), (224, 448), (450, 300), (2, 97), (113, 1), (64, 64), (230, 230), (7, 5), (255, 129)],
    ids=str,
)
def test_ten_odd_sizes(size):
    torch.manual_seed(0)
    model = dynattn.create_model("dat_tiny").eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(torch.randn(1, 3, *size))
        logits = model.forward_head(final)
    expected = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [tuple(m.shape[2:]) for m in maps] == expected
    assert logits.shape == (1, 1000) and logits.isfinite().all()


def test_sizes_just_below_whole_patches_are_the_same_as_with_a_border_of_zeros():
    """A side that is no multiple of 4 gets the zeros that an image padded by hand has."""
    model, image = small(), deterministic.image(1, (62, 61))
    padded = nn.functional.pad(image, (0, 3, 0, 2))
    with torch.no_grad():
        torch.testing.assert_close(model(image), model(padded), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(96, 64), (47, 80)])
def test_a_model_made_for_a_size_equals_one_that_is_run_at_it(size):
    native, made = small(), small(img_size=size)
    state = native.state_dict()
    for name, own in made.state_dict().items():
        if own.shape != state[name].shape:
            assert name.endswith("table")
            state[name] = core.resize_table(state[name], tuple(own.shape[1:]))
    made.load_state_dict(state)
    torch.testing.assert_close(answer(made, size), answer(native, size), rtol=0, atol=0)


def test_images_of_a_batch_do_not_mix():
    model, images = small(), deterministic.image(3, (45, 64))
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the interface of a backbone


def test_intermediates_are_the_stages():
    model, image = small(), deterministic.image(2, (50, 70))
    stages = []
    handles = [s.register_forward_hook(lambda m, i, output: stages.append(output)) for s in model.stages]
    with torch.no_grad():
        final, maps = model.forward_intermediates(image)
        for handle in handles:
            handle.remove()
        assert [m.shape for m in maps] == [(2, 16, 13, 18), (2, 32, 7, 9), (2, 64, 4, 5)]
        for found, stage in zip(maps, stages, strict=True):
            assert torch.equal(found, stage.permute(0, 3, 1, 2))
        assert torch.equal(final, model.forward_features(image))
        only = model.forward_intermediates(image, intermediates_only=True)
        assert isinstance(only, list) and all(map(torch.equal, only, maps))


@pytest.mark.parametrize(
    ("indices", "chosen"),
    [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ([0], [0]), ((2, 0), [2, 0]), ([-1, -3], [2, 0])],
)
def test_indices_of_intermediates(indices, chosen):
    model, image = small(), deterministic.image(1, 64)
    with torch.no_grad():
        everything = model.forward_intermediates(image, intermediates_only=True)
        found = model.forward_intermediates(image, indices=indices, intermediates_only=True)
    assert len(found) == len(chosen)
    assert all(torch.equal(one, everything[i]) for one, i in zip(found, chosen, strict=True))


@pytest.mark.parametrize("indices", [0, 4, -1, [], [3], [-4], (0, 5)])
def test_indices_out_of_range(indices):
    with pytest.raises(ValueError, match=r"indices: expected stages 0 to 2, got "):
        small().forward_intermediates(deterministic.image(1, 64), indices=indices)


def test_intermediates_as_they_are_wanted():
    model, image = small(), deterministic.image(1, 64)
    with torch.no_grad():
        final, plain = model.forward_intermediates(image)
        _, last = model.forward_intermediates(image, norm=True)
        _, channels_last = model.forward_intermediates(image, output_fmt="NHWC", stop_early=True)
    assert torch.equal(last[-1], final) and not torch.equal(plain[-1], final)
    assert all(map(torch.equal, last[:-1], plain[:-1]))
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(channels_last, plain, strict=True))
    with pytest.raises(ValueError, match="output_fmt: expected one of 'NCHW', 'NHWC', got 'NLC'"):
        model.forward_intermediates(image, output_fmt="NLC")


def test_features_and_head_make_the_forward():
    model, image = small(), deterministic.image(2, 64)
    with torch.no_grad():
        features = model.forward_features(image)
        assert features.shape == (2, 64, 4, 4)
        assert torch.equal(model.forward_head(features), model(image))
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)), rtol=0, atol=0)
        assert torch.equal(model.get_classifier()(pooled), model(image))


def test_feature_info():
    assert small().feature_info == [
        {"num_chs": 16, "reduction": 4, "module": "stages.0"},
        {"num_chs": 32, "reduction": 8, "module": "stages.1"},
        {"num_chs": 64, "reduction": 16, "module": "stages.2"},
    ]
    model = small()
    modules = dict(model.named_modules())
    maps = model.forward_intermediates(deterministic.image(1, 64), intermediates_only=True)
    for info, found in zip(model.feature_info, maps, strict=True):
        assert info["module"] in modules
        assert (found.shape[1], 64 // found.shape[2]) == (info["num_chs"], info["reduction"])
    assert model.num_features == model.head_hidden_size == 64


def test_reset_classifier(unchecked):
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("head.")}
    model.reset_classifier(9)
    assert model.num_classes == 9 and model.head.weight.dtype == torch.float64 and answer(model).shape == (2, 9)
    assert model.head.bias.eq(0).all() and 0.01 < model.head.weight.std() < 0.03
    model.reset_classifier(0, "avg")
    assert isinstance(model.head, nn.Identity) and answer(model).shape == (2, 64)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.reset_classifier(2)
    assert answer(model).shape == (2, 2)
    with pytest.raises(ValueError, match="global_pool: expected one of 'avg', 'max', '', got 'mean'"):
        model.reset_classifier(2, "mean")
    with pytest.raises(TypeError, match="num_classes: expected a whole number, got 'ten'"):
        model.reset_classifier("ten")
    assert model.head.out_features == model.num_classes == 2


# ---------------------------------------------------------------- training


def test_every_parameter_learns():
    model = small().train()
    model(deterministic.image(2, 64)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_without_offsets_only_the_offset_network_does_not_learn():
    """It is there because the paper counts it (Table 6)."""
    model = small(offsets=False).train()
    model(deterministic.image(2, 64)).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {name for name, _ in model.named_parameters() if ".offset." in name} and len(idle) == 10


def test_gradients_reach_the_offset_network():
    """Through the bilinear weights and through the bias, each by itself."""
    for bias in (None, "relative"):
        model = small(position_bias=bias)
        attention = model.stages[1].blocks[1].attn
        model(deterministic.image(1, 64)).square().sum().backward()
        assert attention.offset.pointwise.weight.grad.norm() > 0


def test_stochastic_depth():
    model = small(drop_path_rate=0.5).train()
    images = deterministic.image(8, 64)
    torch.manual_seed(0)
    first = model(images)
    torch.manual_seed(0)
    again, other = model(images), model(images)
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.eval()
    assert torch.equal(model(images), model(images))
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 6), atol=1e-6)
    assert isinstance(model.stages[0].blocks[0].drop_path, nn.Identity)


def test_an_answer_does_not_depend_on_the_mode_of_a_model_without_drop_path():
    model = small(drop_path_rate=0.0)
    assert torch.equal(answer(model), answer(model.train()))


@pytest.mark.parametrize(
    "options", [{}, dict(variant="paper"), dict(position_bias="dwconv"), dict(offsets=False)], ids=str
)
def test_bfloat16_autocast(options):
    model = small(**options).float()
    images = deterministic.image(2, 64).float()
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
        loss = found.square().mean()
    loss.backward()
    assert (found.float() - expected).abs().max() < 0.1 * expected.std()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("blocks", [[("deformable_detr",)] * 3, [("sra",)] * 3])
def test_bfloat16_autocast_of_the_other_attentions(blocks):
    model = small(blocks=blocks, detr_points=(4, 4, 4)).float()
    with torch.autocast("cpu", torch.bfloat16):
        model(deterministic.image(1, 64).float()).mean().backward()


def test_a_model_in_half_precision():
    model = small().bfloat16()
    expected = answer(small())
    found = model(deterministic.image(2, 64).bfloat16())
    assert found.dtype == torch.bfloat16 and (found.double() - expected).abs().max() < 0.2 * expected.std()


def test_weight_decay_leaves_the_tables_alone():
    model = small()
    tables = model.no_weight_decay()
    assert tables == {name for name, p in model.named_parameters() if p.ndim == 3}
    assert len(tables) == sum(isinstance(m, WindowAttention | DeformableAttention) for m in model.modules()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compile(training):
    """In a process of its own: there the annotations are not checked, as for every user."""
    program = f"""
        import torch, dynattn
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = dynattn.create_model("dat_mini", drop_path_rate=0.0, img_size=64)
        model.train({training})
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        image = torch.randn(2, 3, 64, 64)
        with torch.set_grad_enabled({training}):
            answer, expected = compiled(image), model(image)
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
        if {training}:
            parameters = list(model.parameters())
            found = torch.autograd.grad(answer.square().sum(), parameters)
            for one, other in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True, timeout=600)


# ---------------------------------------------------------------- copies


def test_state_dict_round_trip(tmp_path):
    model, other = small(), dynattn.create_model("dat_mini", **SMALL, **PLAIN)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    other.double().eval().load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert torch.equal(answer(model), answer(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_answer_alike_and_are_apart(copied):
    model = small()
    other = copied(model)
    expected = answer(model)
    assert torch.equal(answer(other), expected)
    nn.init.zeros_(other.head.weight)
    assert torch.equal(answer(model), expected)


def test_initial_weights_are_a_function_of_the_seed():
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(dynattn.create_model("dat_mini", **SMALL).state_dict())
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert not torch.equal(made[0]["head.weight"], made[2]["head.weight"])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, "x: expected 4 dimensions (B 3 H W), got shape (3, 8, 8)"),
        (torch.zeros(1, 1, 3, 8, 8), ValueError, "x: expected 4 dimensions (B 3 H W), got shape (1, 1, 3, 8, 8)"),
        (torch.zeros(1, 1, 8, 8), ValueError, "x: expected shape (B 3 H W), got shape (1, 1, 8, 8)"),
        (torch.zeros(1, 8, 8, 3), ValueError, "x: expected shape (B 3 H W), got shape (1, 8, 8, 3)"),
        (torch.zeros(0, 3, 8, 8), ValueError, "x: no dimension may be empty, got shape (0, 3, 8, 8)"),
        (torch.zeros(1, 3, 0, 8), ValueError, "x: no dimension may be empty, got shape (1, 3, 0, 8)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "x: expected a floating tensor, got torch.uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, "x: expected a floating tensor, got torch.int64"),
        (torch.zeros(1, 3, 8, 8).double(), TypeError, "x: expected torch.float32, as the model's parameters are, got"),
        (torch.zeros(1, 3, 8, 8).half(), TypeError, "x: expected torch.float32, as the model's parameters are, got"),
        (np.zeros((1, 3, 8, 8)), TypeError, "x: expected a tensor of shape (B 3 H W), got ndarray"),
        (None, TypeError, "x: expected a tensor of shape (B 3 H W), got NoneType"),
    ],
)
def test_bad_input(x, kind, message, unchecked):
    model = small().float()
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(kind) as caught:
            call(x)
        assert str(caught.value).startswith(message)


def test_what_is_not_a_number_stays_so_in_a_model_and_stops_at_the_door_of_a_trace():
    """To look for it costs a pass over the image; the functions that take images from people do."""
    model, image = small().float(), torch.zeros(1, 3, 64, 64)
    image[0, 1, 5, 5] = torch.nan
    assert model(image).isnan().all()
    for function in (lambda: dynattn.trace(model, image), lambda: to_input(image)):
        with pytest.raises(ValueError, match="NaN|finite|not a number"):
            function()


# ---------------------------------------------------------------- trained models


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> nn.Module:
    """A small DAT whose checkpoint ships, as far as this test is concerned, under the name dat_mini."""
    torch.manual_seed(0)
    model = dynattn.create_model("dat_mini", **SMALL)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    weights.write(tmp_path / "sweep.safetensors", {}, {})  # a checkpoint that is not a model's
    weights.write(tmp_path / "dat_mini.safetensors", model.state_dict(), {"name": "dat_mini", "arguments": SMALL})
    model.load_state_dict(weights.read(tmp_path / "dat_mini.safetensors")[0])
    return model.eval()


def test_pretrained(shipped):
    model = dynattn.create_model("dat_mini", pretrained=True)
    assert not model.training and model.num_classes == 5
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(image), shipped(image))


def test_pretrained_with_other_classes(shipped):
    model, image = dynattn.create_model("dat_mini", pretrained=True, num_classes=3), torch.randn(1, 3, 64, 64)
    assert model(image).shape == (1, 3) and not model.training
    assert torch.equal(model.forward_features(image), shipped.forward_features(image))
    assert dynattn.create_model("dat_mini", pretrained=True, num_classes=0)(image).shape == (1, 64)


def test_pretrained_at_another_size(shipped):
    model, image = dynattn.create_model("dat_mini", pretrained=True, img_size=(96, 64)), torch.randn(1, 3, 96, 64)
    assert model.stages[1].blocks[1].attn.table.shape == (2, 23, 15)
    torch.testing.assert_close(model(image), shipped(image), rtol=0, atol=1e-5)


def test_pretrained_with_options_that_change_no_weight(shipped):
    model, image = dynattn.create_model("dat_mini", pretrained=True, offset_range=8.0), torch.randn(1, 3, 64, 64)
    assert model.stages[1].blocks[1].attn.offset_range == 8 and model(image).shape == (1, 5)


def test_pretrained_with_options_that_need_other_weights(shipped):
    with pytest.raises(ValueError, match="state: [0-9]+ entries do not fit the model, first "):
        dynattn.create_model("dat_mini", pretrained=True, dims=(16, 32, 128))


def test_models_without_a_checkpoint_name_those_that_have_one(shipped):
    with pytest.raises(ValueError, match="pretrained: no checkpoint of 'dat_tiny' ships, only of dat_mini$"):
        dynattn.create_model("dat_tiny", pretrained=True)


@pytest.mark.parametrize("name", ["dat_mini", "swin_mini", "vit_mini"])
def test_the_shipped_checkpoints(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNATTN_CACHE", str(tmp_path))
    assert weights.path(name).stat().st_size <= 4 * 2**20
    state, metadata = weights.read(weights.path(name))
    model = dynattn.create_model(name, pretrained=True)
    assert sum(p.numel() for p in model.parameters()) <= 1_900_000
    images, labels, _ = cached(Shapes("easy", "test", count=200), workers=1, progress=False)
    with torch.no_grad():
        logits = torch.cat([model(normalise(torch.from_numpy(images[i : i + 50]))) for i in range(0, 200, 50)])
    accuracy = (logits.argmax(1).numpy() == labels).mean()
    assert accuracy > 0.8 and abs(accuracy - metadata["accuracy"]) < 0.06
    with torch.no_grad():
        other = dynattn.create_model(name, pretrained=True, num_classes=3)
        assert other(torch.randn(1, 3, 128, 128)).shape == (1, 3)
