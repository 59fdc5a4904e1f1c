"""SETR's models: equality with the published code, counts, arguments, sizes, weights of timm's encoders."""

import csv
import re
import subprocess
import sys
import textwrap

import deterministic
import numpy as np
import published_setr
import pytest
import timm
import torch
from published_setr import FIRST, LOGITS, MEASURED, PASCAL, unused
from torch import nn

import dynattn
from dynattn import cost, official
from dynattn.dense import MultiLevelHead, ProgressiveHead
from dynattn.models.setr import VARIANTS, load_encoder
from dynattn.models.vit import resize_positions, split_positions

NAMES = list(MEASURED)
DECODERS = ("naive", "pup", "mla")
SMALL = dict(img_size=64, num_classes=5, dim=24, depth=4, heads=3, channels=16)
READ = {"naive": dict(layers=(4,), aux_layers=(1, 3)), "pup": dict(layers=(4,), aux_layers=(2, 3, 4))}
READ |= {"mla": dict(layers=(1, 2, 3, 4))}


def small(decoder: str = "pup", **options) -> nn.Module:
    """A SETR that runs in milliseconds, with deterministic weights in float64."""
    name = f"setr_{decoder}_base"
    return deterministic.filled(dynattn.create_model(name, **SMALL | READ[decoder] | options))


@torch.no_grad()
def answer(model: nn.Module, size: int | tuple[int, int] = 64, **options) -> torch.Tensor:
    return model(deterministic.image(2, size), **options)


def on_meta(name: str, **options) -> nn.Module:
    """A model without numbers."""
    with torch.device("meta"):
        return dynattn.create_model(name, **options)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds(name, unchecked):
    """To the unit what the published code counts, without the classifiers that it owns and never uses."""
    for (classes, size), (parameters, macs) in zip(((19, 768), (150, 512)), MEASURED[name], strict=True):
        model = on_meta(name, num_classes=classes, img_size=size)
        counted = cost.count(model, size)
        assert counted.params + unused(classes, 1 + len(model.aux)) == parameters
        assert counted.macs / 1e9 == pytest.approx(macs, abs=0.11)


@pytest.mark.parametrize("name", PASCAL)
def test_parameters_for_pascal_context(name):
    model = on_meta(name, num_classes=60, img_size=480)
    assert count(model) + unused(60, 1 + len(model.aux)) == PASCAL[name]


def test_multiply_adds_of_the_paper_s_variant(unchecked):
    """What the paper prints fits a classifier behind PUP's last upsampling, and one of 1 x 1 in MLA."""
    macs = lambda name, **how: round(cost.count(on_meta(name, **how), how.get("img_size", 512)).macs / 1e9, 1)  # noqa: E731
    assert macs("setr_pup_large", variant="paper") == 425.2
    assert macs("setr_mla_large", variant="paper") == 368.1
    assert macs("setr_mla_large", variant="paper", num_classes=19, img_size=768) == 970.8
    assert (macs("setr_pup_base", variant="paper"), macs("setr_mla_base", variant="paper")) == (169.6, 113.2)
    street = dict(variant="paper", num_classes=19, img_size=768)
    assert (macs("setr_pup_base", **street), macs("setr_mla_base", **street)) == (416.2, 306.6)
    two = on_meta("setr_pup_large", steps=2, variant="paper", num_classes=19, img_size=768)
    assert cost.count(two, 768).macs / 1e9 == pytest.approx(990, abs=1.5)  # Table 3, "2step"
    assert 308e6 < count(on_meta("setr_pup_large", steps=2, aux=False, num_classes=19, img_size=768)) < 308.6e6


def test_a_beit_encoder_has_as_many_parameters_and_multiply_adds(unchecked):
    """Tables 3 and 5 print the same for both: tables of relative positions take the place of the positions."""
    vit, beit = (on_meta("setr_naive_base", encoder=kind) for kind in ("vit", "beit"))
    assert cost.count(beit, 512).macs == cost.count(vit, 512).macs
    tables = 12 * 12 * (63**2 + 3) + 12 * (2 * 768 - 768)  # with two factors, and without the bias of the keys
    assert count(beit) == count(vit) - (32**2 + 1) * 768 + tables


def test_channels_of_mla():
    """The text halves them at the first and the third layer; the published code goes to 256 at once, then to 128."""
    published, text = on_meta("setr_mla_large"), on_meta("setr_mla_large", channels=512)
    assert published.decoder.reduce[0][0].out_channels == 256 and text.decoder.reduce[0][0].out_channels == 512
    assert published.decoder.refine[0][1][0].out_channels == 128 and text.decoder.refine[0][1][0].out_channels == 256
    assert count(text) > count(published)


def test_numbers_that_the_paper_prints():
    """Every row of Tables 3, 5 and 6 that is SETR's has a model beside it. MLA-BEiT: 368 G, not Table 5's 318."""
    table = cost.tables()["setr"]
    with table.published.open(newline="") as file:
        said = {row["model"]: row for row in csv.DictReader(file)}
    assert set(said) == {row.published for row in table.rows} and len(said) == 26
    hlg = {f"setr_pup_hlg_{size}" for size in ("small", "medium", "large")}
    assert {row.model for row in table.rows} == set(NAMES) | hlg
    for row in table.rows:
        assert said[row.published]["resolution"] == str(row.size) == str(row.options["img_size"])
        assert said[row.published]["task"] == {19: "cityscapes", 150: "ade20k"}[row.options["num_classes"]]
    assert [said[f"setr_mla_large{end}"]["macs_G"] for end in ("_ade20k", "_beit_ade20k")] == ["368", "368"]
    assert [said[f"setr_{d}_large"]["value"] for d in ("mla", "pup")] == ["77.24", "79.34"]  # of 80,000 steps


def test_layers_that_heads_read():
    """The paper's of T-Large; the published code's of T-Base."""
    read = {name: (model := on_meta(name)) and (model.layers, model.aux_layers) for name in NAMES}
    assert read == {
        "setr_naive_large": ((24,), (10, 15, 20)),
        "setr_pup_large": ((24,), (10, 15, 20, 24)),
        "setr_mla_large": ((6, 12, 18, 24), ()),
        "setr_naive_base": ((12,), (3, 6, 9)),
        "setr_pup_base": ((12,), (5, 8, 10, 12)),
        "setr_mla_base": ((3, 6, 9, 12), ()),
    }


def test_table_7_has_another_vit(unchecked):
    """307 M and 44.3 G are of patches of 32 pixels, with norms and without the two products of attention."""
    counted = {}
    for patch in (32, 16):
        with torch.device("meta"):
            model = timm.create_model(f"vit_large_patch{patch}_384")
        products = len(model.blocks) * 2 * ((384 // patch) ** 2 + 1) ** 2 * model.embed_dim
        found = cost.count(model, 384)
        counted[patch] = round(found.params / 1e6, 1), round((found.macs_fvcore - products) / 1e9, 1)
    assert counted == {32: (306.6, 44.3), 16: (304.7, 174.8)}


@pytest.mark.slow
def test_the_table_beside_the_paper(unchecked):
    """Parameters as printed, but for what notes explain; multiply-adds of the encoder's rows as printed."""
    rows = {row["name"]: row for row in cost.table("setr")}
    for name, row in rows.items():
        printed, ours = float(row["paper_params_M"]), row["params"] / 1e6
        assert abs(ours - printed) < (2.2 if "beit" in name else 1.1) or name == "setr_pup_2step_large"
        assert row["macs"] / 1e9 == pytest.approx(float(row["paper_macs_G"]), rel=0.005) or row["note"]
    assert [round(rows[f"setr_naive_{size}"]["macs_fvcore"] / 1e9) for size in ("large", "base")] == [960, 296]
    assert round(rows["setr_naive_large_ade20k"]["macs_fvcore"] / 1e9) == 363


# -------------------------------------------------------------------------------------------------- the published code


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_published_ones(name, shared):
    listed = [line.split("\t") for line in (shared / f"keys_{name}.tsv").read_text().splitlines()]
    model = on_meta(name)
    published = {key: tuple(map(int, shape.split("x"))) if shape else () for key, shape, _ in listed}
    left_out = {key for key in published if model.unused_entries.fullmatch(key)}
    assert published_setr.shapes(model) == {key: published[key] for key in published.keys() - left_out}
    assert len(left_out) == 2 * (1 + len(model.aux))


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_forward_pass_restated_by_the_published_names(decoder):
    """Main and auxiliary logits, from a checkpoint through `load_official`."""
    model = small(decoder)
    state = published_setr.checkpoint(model)
    dynattn.load_official(model, state)
    images = deterministic.image(2, 64)
    reads = READ[decoder]["layers"], READ[decoder].get("aux_layers", ())
    main, aux = published_setr.restated(state, images, decoder, 16, 3, *reads)
    with torch.no_grad():
        ours, others = model(images, aux=True)
    torch.testing.assert_close(ours, main, rtol=0, atol=1e-10)
    assert len(others) == len(aux) == len(model.aux)
    for found, expected in zip(others, aux, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert ours.shape == (2, 5, 64, 64) and torch.equal(answer(model), ours)


def published_base() -> nn.Module:
    """setr_naive_base under the weights of the golden outputs, as a checkpoint of mmcv's holds them."""
    model = dynattn.create_model("setr_naive_base").double().eval()
    return dynattn.load_official(model, {"meta": {"epoch": 1}, "state_dict": published_setr.checkpoint(model)})


def test_golden_numbers_of_the_first_block():
    """Holds anywhere: the class token behind block 1, as the published code computed it. SETR-1, SETR-2, SETR-3."""
    model = dynattn.create_model("setr_naive_base", depth=1, layers=(1,), aux_layers=(1,)).double().eval()
    dynattn.load_official(model, published_setr.checkpoint(model))
    with torch.no_grad():
        z, shape = model.encoder.embed(deterministic.image(1, 512))
        z = model.encoder.blocks[0](z, shape)
    np.testing.assert_allclose(z[0, 0, :3], FIRST, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_golden_logits_of_setr(request):
    """Holds anywhere: a handful of logits as plain numbers; all of them where the recorded ones are."""
    model, before = published_base(), []
    model.decoder.register_forward_hook(lambda module, inputs, output: before.append(output))
    with torch.no_grad():
        logits, aux = model(deterministic.image(1, 512), aux=True)
    first, last, deviations = LOGITS
    np.testing.assert_allclose(logits[0, :4, 0, 0], first, rtol=0, atol=1e-9)
    np.testing.assert_allclose(logits[0, -2:, 320, 448], last, rtol=0, atol=1e-9)
    np.testing.assert_allclose([part.std() for part in (logits, *aux)], deviations, rtol=0, atol=1e-9)
    recorded = np.load(request.getfixturevalue("shared") / "golden_setr_naive_base.npz")
    for found, name in (
        (before[0][..., ::8, ::8], "main_before_up_sub8"),
        (logits[..., ::64, ::64], "main_full_sub64"),
    ):
        assert np.abs(found.numpy() - recorded[name]).max() < 1e-9 * recorded[name].std()
    for i, part in enumerate(aux):
        np.testing.assert_allclose(part.mean(), recorded[f"aux{i}_full_mean"], rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_says_which_model_it_is_of(name):
    state = {key.removeprefix("backbone."): torch.empty(s) for key, s in published_setr.shapes(on_meta(name)).items()}
    assert official.identify(state) == (name, {})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("setr_naive_base", dict(num_classes=19, img_size=768)),
        ("setr_pup_base", dict(num_classes=60, img_size=480, aux=False)),
        ("setr_pup_base", dict(steps=2)),
        ("setr_mla_base", dict(classifier_kernel=1)),
    ],
    ids=str,
)
def test_a_checkpoint_says_which_arguments_it_needs(name, options):
    model = on_meta(name, **options)
    state = {key.removeprefix("backbone."): torch.empty(s) for key, s in published_setr.shapes(model).items()}
    assert official.identify(state) == (name, options)


def test_another_class_count_or_size_of_encoder_raises_and_names_the_right_call():
    cut = dict(img_size=64, depth=1, layers=(1,), aux_layers=(1,))
    model = dynattn.create_model("setr_naive_base", num_classes=19, **cut)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shapes = published_setr.shapes(on_meta("setr_naive_base", num_classes=21, img_size=96))
    with pytest.raises(ValueError) as caught:
        dynattn.load_official(model, {"state_dict": {key: torch.zeros(()).expand(s) for key, s in shapes.items()}})
    message = str(caught.value)
    assert "decode_head.conv_1.weight (21, 256, 1, 1) for (19, 256, 1, 1)" in message
    assert 'dynattn.create_model("setr_naive_base", num_classes=21, img_size=96)' in message
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    shapes = published_setr.shapes(on_meta("setr_pup_large"))
    with pytest.raises(ValueError, match=re.escape('create_model("setr_pup_large")')):
        dynattn.load_official(model, {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()})
    with pytest.raises(ValueError, match="a SETR that is none of the published ones: 24 channels, 4 layers"):
        official.identify({key.removeprefix("backbone."): v for key, v in published_setr.checkpoint(small()).items()})


def test_positions_are_resized_as_published():
    """The class token's row is kept, DeiT's distillation row left out, the map resized (bilinear)."""
    model = small("naive", img_size=96)
    state = published_setr.checkpoint(small("naive"))
    dynattn.load_official(model, state)
    square = state["backbone.pos_embed"][0, 1:].T.reshape(1, 24, 4, 4)
    expected = nn.functional.interpolate(square, size=(6, 6), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(model.encoder.embed.table.detach(), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.encoder.embed.class_position.detach(), state["backbone.pos_embed"][0, 0])
    rows = torch.arange(18.0)[None, :, None]
    first, table = split_positions(rows, (4, 4))
    assert first.tolist() == [0] and table.flatten().tolist() == list(range(2, 18))
    with pytest.raises(ValueError, match="pos_embed: expected a square number of rows and one or two in front, got 16"):
        split_positions(rows[:, :16], (4, 4))


def test_unused_classifiers_are_left_out():
    model, state = small(), published_setr.checkpoint(small())
    more = {f"{head}.conv_seg.weight": torch.ones(5, 512, 1, 1) for head in ("decode_head", "auxiliary_head.1")}
    dynattn.load_official(model, state | more)
    with pytest.raises(ValueError, match="1 unexpected: decode_head.conv_segment.weight"):
        dynattn.load_official(model, state | {"decode_head.conv_segment.weight": torch.ones(1)})


# ------------------------------------------------------------------------------------------------------ timm's weights


def timm_vit(**options) -> nn.Module:
    name = options.pop("name", "vit_tiny_patch16_224")
    model = timm.create_model(name, img_size=64, embed_dim=24, depth=4, num_heads=3, **options)
    return deterministic.filled(model)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224"])
def test_encoders_of_timm(name):
    """The maps behind every layer are timm's own, once its weights are loaded."""
    theirs = timm_vit(name=name)
    ours = small("naive", encoder="beit" if "beit" in name else "vit")
    assert load_encoder(ours, theirs) is ours
    images = deterministic.image(2, 64)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        found = ours.forward_intermediates(images, intermediates_only=True)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("encoder", ["vit", "beit"])
def test_tables_of_timm_at_another_resolution(encoder):
    theirs = timm_vit(name="beit_base_patch16_224" if encoder == "beit" else "vit_tiny_patch16_224")
    ours, native = small("pup", encoder=encoder, img_size=96), small("pup", encoder=encoder)
    load_encoder(native, {"model": theirs.state_dict()})
    load_encoder(ours, theirs.state_dict())
    images = deterministic.image(1, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(images), native.forward_features(images))


def test_the_distillation_token_is_left_out():
    theirs = timm_vit(name="deit_tiny_distilled_patch16_224")
    ours = load_encoder(small("naive"), theirs)
    assert torch.equal(ours.encoder.embed.class_position, theirs.pos_embed[0, 0])
    table = theirs.pos_embed[0, 2:].T.reshape(24, 4, 4)
    assert torch.equal(ours.encoder.embed.table, table)


def test_weights_that_do_not_fit(unchecked):
    model = small("naive")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"encoder\.blocks|norm1.weight is missing|for \(24,"):
        load_encoder(model, timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3))
    with pytest.raises(ValueError, match='It fits encoder="beit"'):
        load_encoder(model, timm_vit(name="beit_base_patch16_224"))
    with pytest.raises(TypeError, match="model: expected a SETR, whose encoder is a ViT, got Linear"):
        load_encoder(nn.Linear(1, 1), {})
    with pytest.raises(TypeError, match="source: expected a model of timm's or its state dict, got str"):
        load_encoder(model, "vit.pth")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (31, 70), (16, 97), (100, 48), (176, 208)], ids=str)
@pytest.mark.parametrize("decoder", DECODERS)
def test_odd_sizes(decoder, size):
    """Logits of every pixel, and both images are computed alone. The last has 3 x 48 tokens with its class token."""
    model, images = small(decoder), deterministic.image(2, size)
    with torch.no_grad():
        logits, aux = model(images, aux=True)
        alone = torch.cat([model(image[None]) for image in images])
    assert all(part.shape == (2, 5, *size) and part.isfinite().all() for part in (logits, *aux))
    torch.testing.assert_close(logits, alone)


def test_an_image_whose_side_is_no_multiple_is_padded_at_its_end():
    """The cells lie where they lie in the padded image: every pixel has the logits that it has there."""
    model, images = small("naive"), deterministic.image(1, (60, 41))
    padded = nn.functional.pad(images, (0, 7, 0, 4))
    with torch.no_grad():
        assert torch.equal(model(images), model(padded)[..., :60, :41])


@pytest.mark.parametrize("encoder", ["vit", "beit"])
def test_a_model_made_for_a_size_equals_one_that_is_run_at_it(encoder):
    size = (48, 96)
    native, set_to = small(encoder=encoder), small(encoder=encoder)
    set_to.set_input_size(size)
    made = dynattn.create_model("setr_pup_base", **SMALL | READ["pup"] | dict(img_size=size, encoder=encoder))
    made = made.double().eval()
    made.load_state_dict(native.state_dict())  # resized on the way
    for model in (made, set_to):
        torch.testing.assert_close(answer(model, size), answer(native, size), rtol=0, atol=1e-12)


def test_resized_positions_are_bilinear():
    table = torch.tensor([[[0.0, 1.0]]])
    torch.testing.assert_close(resize_positions(table, (1, 4)), torch.tensor([[[0, 0.25, 0.75, 1]]]))


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("pup", dict(steps=2)),
        ("mla", dict(classifier_kernel=1)),
        ("naive", dict(encoder="beit")),
        ("mla", dict(encoder="beit")),
        ("naive", dict(layers=(3,))),
        ("mla", dict(layers=(2, 4))),
        ("naive", dict(channels=8)),
        ("pup", dict(patch=8, steps=3)),
    ],
    ids=str,
)
def test_every_option_changes_the_answer(decoder, options):
    logits = answer(small(decoder, **options))
    assert logits.isfinite().all() and (logits - answer(small(decoder))).abs().max() > 1e-7
    assert answer(small(decoder, **options), (45, 70)).isfinite().all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_without_auxiliary_heads(decoder):
    """Table 3, "w.o.aux": the main logits are the same, the list is empty."""
    with_them, without = small(decoder), small(decoder, aux=False)
    logits, aux = answer(without, aux=True)
    assert aux == [] and torch.equal(logits, answer(with_them)) and count(without) < count(with_them)
    assert with_them.aux_weight == 0.4


def test_the_keywords_of_the_variants():
    for decoder, keyword in (("pup", "classify_last"), ("mla", "classifier_kernel")):
        text = answer(small(decoder, variant="paper"))
        assert torch.equal(text, answer(small(decoder, **{keyword: VARIANTS["paper"][keyword]})))
        back = answer(small(decoder, variant="paper", **{keyword: VARIANTS["official"][keyword]}))
        assert torch.equal(back, answer(small(decoder)))
    assert (text - back).abs().max() > 1e-9  # of MLA


def test_a_classifier_in_front_of_an_upsampling_gives_the_same_logits():
    """Both are linear, and the weights of an upsampling sum to 1: only the cost differs."""
    before, behind = (answer(small("pup", classify_last=last), (45, 70)) for last in (False, True))
    torch.testing.assert_close(before, behind, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        ("decoder", "upernet", ValueError, "decoder: expected one of 'naive', 'pup', 'mla', got 'upernet'"),
        ("encoder", "deit", ValueError, "encoder: expected one of 'vit', 'beit', got 'deit'"),
        ("variant", "text", ValueError, "variant: expected one of 'official', 'paper', got 'text'"),
        ("layers", (13,), ValueError, "layers: expected layers from 1 to 12, got (13,)"),
        ("layers", (3, 6), ValueError, "layers: this decoder reads one layer, got (3, 6)"),
        ("aux_layers", 3, TypeError, "aux_layers: expected numbers of layers, as in (3, 6, 9), got 3"),
        ("steps", 3, ValueError, "steps: expected a number of equal steps from 1 to 16, the patch's side, got 3"),
        ("heads", 7, ValueError, "heads: expected a divisor of 768, got 7"),
        ("num_classes", 0, ValueError, "num_classes: expected at least 1, got 0"),
        ("drop_path_rate", 1, ValueError, "drop_path_rate: expected a number from 0 to below 1, got 1"),
        ("layer", (3,), TypeError, "layer: not an argument of setr_pup_base; did you mean 'layers'?"),
    ],
)
def test_bad_arguments(argument, value, kind, message, unchecked):
    with pytest.raises(kind) as caught, torch.device("meta"):
        dynattn.create_model("setr_pup_base", **{argument: value})
    assert str(caught.value).startswith(message)


def test_bad_images(unchecked):
    with pytest.raises(TypeError, match="x: expected torch.float64, as the model's parameters are, got torch.float32"):
        small()(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="x: expected shape"):
        small()(torch.zeros(1, 4, 64, 64).double())


# ------------------------------------------------------------------------------------------- what surrounds the model


@pytest.mark.parametrize(("decoder", "encoder"), [("naive", "vit"), ("mla", "vit"), ("pup", "beit")])
def test_a_trace_has_every_layer(decoder, encoder):
    """Dense attention; the class token comes last among the sources, and "mla" has none."""
    trace = dynattn.trace(small(decoder, encoder=encoder), deterministic.image(1, (48, 64))[0])
    assert [record.kind for record in trace] == ["dense"] * 4
    assert trace.layers == [f"encoder.blocks.{i}.attn" for i in range(4)]
    for record in trace:
        matrix = record.effective_matrix(1)
        assert record.query_shape == (3, 4) and record.stride == (16, 16)
        assert matrix.shape == (12, 12 if decoder == "mla" else 13)
        torch.testing.assert_close(matrix @ record.value(1), record.output(1))
    heat = trace.rollout(20, 30)
    assert (heat >= 0).all() and float(heat.sum()) == pytest.approx(1, rel=1e-5)


def test_the_interface_of_timm_s_models():
    model = small("naive")
    maps = model.forward_intermediates(deterministic.image(1, 64), [0, -1], intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(1, 24, 4, 4)] * 2
    assert torch.equal(maps[1], model.forward_features(deterministic.image(1, 64)))
    assert torch.equal(model.forward_head(maps[1]), model(deterministic.image(1, 64)))
    assert torch.equal(model.forward_head(maps[1], pre_logits=True), maps[1])
    with pytest.raises(ValueError, match='decoder: "mla" reads several layers, and forward_head has the last one only'):
        small("mla").forward_head(maps[1])
    features = timm.create_model("setr_naive_base", **SMALL | READ["naive"], features_only=True, out_indices=(1, 2))
    assert features.feature_info.reduction() == [16, 16] and features.feature_info.channels() == [24, 24]
    assert [tuple(m.shape) for m in features(torch.randn(1, 3, 64, 64))] == [(1, 24, 4, 4)] * 2
    model.reset_classifier(7)
    assert answer(model).shape == (2, 7, 64, 64) and answer(model, aux=True)[1][0].shape == (2, 7, 64, 64)
    assert model.get_classifier().out_channels == 7
    with pytest.raises(ValueError, match="indices: expected layers 0 to 3, got"):
        model.chosen_layers([4])
    spared = small("pup").no_weight_decay()
    assert spared == {"encoder.embed.class_token", "encoder.embed.class_position", "encoder.embed.table"}


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_step_of_training(decoder):
    """Every parameter that learns gets a gradient, also with checkpointing, and the same one."""
    slopes = []
    for enable in (False, True):
        model = small(decoder, encoder="vit").train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        model.set_grad_checkpointing(enable)
        logits, aux = model(deterministic.image(2, 48), aux=True)
        (logits.square().mean() + sum(part.square().mean() for part in aux)).backward()
        slopes.append([p.grad for p in model.parameters() if p.requires_grad])
        fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert fixed == ({"encoder.embed.class_token", "encoder.embed.class_position"} if decoder == "mla" else set())
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)


MINIS = {"setr_naive_mini": 548_217, "setr_pup_mini": 700_569, "setr_mla_mini": 708_899}


@pytest.mark.parametrize("name", MINIS)
def test_small_models(name):
    """Patches of 8 pixels by convolutions, eleven classes; logits of every pixel, for any size."""
    model = dynattn.create_model(name).eval()
    assert count(model) == MINIS[name]
    with torch.no_grad():
        logits, aux = model(torch.randn(1, 3, 50, 77), aux=True)
    assert all(part.shape == (1, 11, 50, 77) for part in (logits, *aux)) and len(aux) == len(model.aux) >= 2
    trace = dynattn.trace(model, torch.randn(3, 64, 64))
    assert [record.query_shape for record in trace] == [(8, 8)] * 4
    first = timm.models.get_pretrained_cfg(name).first_conv
    assert model.get_submodule(first).in_channels == 3
    assert count(dynattn.create_model(name, aux=False)) < MINIS[name]


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_patches_by_convolutions(patch):
    """As many tokens as patches have; a side that is no power of 2 is refused."""
    model = small("naive", patch=patch, conv_stem=True, local_convs=True)
    maps = model.forward_intermediates(deterministic.image(1, (30, 64)), intermediates_only=True)
    assert {tuple(m.shape) for m in maps} == {(1, 24, -(-30 // patch), 64 // patch)}
    with pytest.raises(ValueError, match="patch: expected 4, 8, 16 and so on for a stem of convolutions, got 6"):
        small("naive", patch=6, conv_stem=True)


def test_weights_of_a_small_model_at_another_size_and_of_other_classes(tmp_path):
    """Through timm's door: positions are resized, classifiers of all heads are new, all else is kept."""
    model = dynattn.create_model("setr_pup_mini").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, img_size=96)
    same, other = (timm.create_model("setr_pup_mini", **options, num_classes=n).eval() for n in (11, 4))
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(same(images), model(images))
        torch.testing.assert_close(other.forward_features(images), model.forward_features(images))
        logits, aux = other(images, aux=True)
    assert all(part.shape == (1, 4, 96, 96) for part in (logits, *aux))


@pytest.mark.slow
def test_a_compiled_and_an_exported_model():
    """torch.compile without a break, and torch.export; in a process without shape checks, which graphs cannot have."""
    program = """
        import torch, dynattn
        for name, how in (("setr_pup_mini", {}), ("setr_mla_mini", {}), ("setr_naive_mini", dict(encoder="beit"))):
            model = dynattn.create_model(name, **how).eval()
            images = torch.randn(2, 3, 50, 44)
            with torch.no_grad():
                compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
                torch.testing.assert_close(compiled(images), model(images))
                exported = torch.export.export(model, (images,)).module()
                torch.testing.assert_close(exported(images), model(images))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=600)


def test_decoders_take_the_maps_of_any_backbone():
    """Of any width, and for several levels of any size: they are brought to the first."""
    maps = [torch.randn(2, width, side, side + 1) for width, side in ((8, 12), (16, 6), (32, 3))]
    assert MultiLevelHead([8, 16, 32], 4, channels=16)(maps).shape == (2, 4, 48, 52)
    assert ProgressiveHead(32, 4, factors=(2, 2), channels=16)(maps[2]).shape == (2, 4, 12, 16)
