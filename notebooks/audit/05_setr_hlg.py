# %% [markdown]
# # Audit of SETR and HLG
#
# Zhang et al., IJCV; SETR alone: CVPR. This notebook is for looking things up. The lesson, `05_setr_hlg`, teaches the
# layers and all equations. Here each claim is asserted where it is made, and every number is computed by the cell above
# it, except those of the paper and of the authors' code, which the ledgers quote.
#
# | section | what it holds |
# | --- | --- |
# | Equality with the loops | the operations: outputs and gradients; mistakes that are found |
# | One matrix | layers by loops, by torch, and by their effective matrices |
# | Memory | bytes kept by a layer of SETR and of HLG, and by whole networks; the order of each |
# | The tables of SETR | Tables 3, 5 and 6: every row that is of SETR or HLG, counted |
# | The tables of HLG | Tables 1, 7, 12, 13 and 14: every row whose layers are known, counted; what each reading is worth |
# | Equal to the published code | logits to nine digits; what another reading would change |
# | Trained | the small models, by seed |
# | The ledgers | what the paper says, what the code does, what follows |
# | A longer exercise | local attention, judged by `verify.check` |

# %%
from functools import partial

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dynattn
from dynattn import core, cost, ops, verify, weights
from dynattn.data import Shapes, normalise
from dynattn.dense.setr import enlarge
from dynattn.lessons import agree, begin, normal, say, source, table
from dynattn.lessons import setr_hlg_audit as audit
from dynattn.lessons.notebook import found, ledger, on_meta, show
from dynattn.lessons.published import deterministic, published_state
from dynattn.mechanisms import local_global
from dynattn.models import hlg, setr

begin()

# %% [markdown]
# ## Equality with the loops
#
# The loops are the specification: one query, one key and one channel at a time. The torch form must give the same
# outputs and gradients in double precision. SETR's layers are dense attention; HLG's are local attention, an embedding
# of windows, and dense attention to it.

# %%
agree(core.dense_attention, {name: normal(2, 2, 6, 3) for name in "qkv"})

# %%
source(local_global.place_loops, local_global.local_attention_loops, local_global.local_attention_torch)
maps = {name: normal(1, 2, 35, 3) for name in "qkv"} | {"table": normal(2, 5, 5), "query_shape": (5, 7)}
for dilated in (False, True):
    agree(ops.local_attention, maps, window=3, dilated=dilated)

# %%
source(local_global.window_embedding_loops, local_global.window_embedding_torch)
for by in local_global.EMBEDDINGS:
    kernel = (normal(4, 3, 3), normal(4)) if by == "conv" else (None, None)
    inputs = dict(zip(("x", "weight", "bias"), (normal(2, 5, 7, 4), *kernel), strict=True))
    agree(ops.window_embedding, inputs, window=3, dilated=True, by=by)

# %% [markdown]
# One case proves little. `verify.check` draws random cases of uneven sizes and with every option, and raises at the
# first number that is wrong. To be worth something it must find mistakes: it knows these by name.

# %%
for operation in ("dense_attention", "local_attention", "window_embedding"):
    verify.check(operation, partial(getattr(ops, operation), impl="torch"), cases=12)
    say(found(operation))

# %% [markdown]
# ## One matrix
#
# Whole layers, in double precision, on a map that no window divides. A layer of SETR is exactly its matrix times its
# values. In a layer of HLG each of the two attentions is; their sum over cells is not, since the value of a window is
# made of what local attention put out, behind a LayerNorm.

# %%
rows, x = [], normal(1, 5, 7, 16)
layers = {"SETR, dense": (audit.TokenAttention(16, 2), x.flatten(1, 2), (5, 7))}
for dilated in (False, True):
    for local in (True, False):
        name = f"HLG, {'dilated' if dilated else 'plain'} windows" + ("" if local else ", without local attention")
        layers[name] = audit.LocalGlobalAttention(16, 2, 3, dilated=dilated, local=local), x
for name, (layer, *given) in layers.items():
    layer.double().eval()
    loops, fast = (audit.by_form(form, layer, *given) for form in ("loops", "torch"))
    record, apart = audit.record_of(layer, *given), float((loops - fast).abs().max() / loops.abs().max())
    if record.kind == "local_global" and layer.local:
        made = [record.local(m) @ record.value(m) + record.everywhere[m] @ record.v_g[m] for m in range(2)]
    else:
        made = [record.effective_matrix(m) @ record.value(m) for m in range(2)]
    by_matrix = max(float((z - record.output(m)).abs().max()) for m, z in enumerate(made))
    assert max(apart, by_matrix) < 1e-12 and record.exact == ("dense" in name or not layer.local)
    rest = ", ".join(f"{record.rest(m):.0e}" if record.exact else f"{record.rest(m):.0%}" for m in range(2))
    rows.append((name, f"{apart:.0e}", f"{by_matrix:.0e}", rest))
head = "loops and torch apart", "weights times values and the recorded output apart", "left out of one matrix, by head"
table(("layer", *head), rows)

# %% [markdown]
# How much one matrix leaves out in networks, as a share of a head's output, on a test image:

# %%
rows, picture = [], normalise(Shapes("cluttered", "test", 64)[0][0])
for name in ("setr_pup_mini", "setr_pup_hlg_mini", "hlg_mini"):
    for trained in (False, True)[: 1 + (name in weights.shipped())]:
        model = dynattn.create_model(name, pretrained=trained).double().eval()
        trace = dynattn.trace(model, picture)
        for kind in dict.fromkeys(record.kind for record in trace):
            records = trace.of_kind(kind)
            rest = [record.rest(head) for record in records for head in range(record.heads)]
            assert max(rest) < 1e-12 or not any(record.exact for record in records)
            how = "trained" if trained else "random weights"
            rows.append((f"`{name}`", how, kind.replace("_", "-"), len(records), f"{min(rest):.0e} to {max(rest):.1e}"))
table(("network", "", "layers", "their number", "left out, by head"), rows)

# %% [markdown]
# ## Memory
#
# How many bytes a layer keeps for its backward pass, of one map in single precision. Bytes are the same on every
# machine; times are not. Every storage counts once, and the layer's parameters do not count. SETR's layer is measured
# twice: in the way of its equations, which keeps the weights of attention, and with torch's fused attention, which
# computes them again. Layers of $C = 64$ channels and two heads.

# %%
source(audit.kept)
sides, C, heads, found_of = (28, 56, 112), 64, 2, {}
for side in sides:
    one = {
        "SETR, weights kept": (SDPBackend.MATH, audit.dense_layer(side, C, heads, "meta")),
        "SETR, fused": (SDPBackend.FLASH_ATTENTION, audit.dense_layer(side, C, heads, "cpu")),
        "HLG": (SDPBackend.MATH, audit.local_global_layer(side, C, heads, "meta")),
    }
    for name, (backend, (layer, *given)) in one.items():
        with sdpa_kernel(backend):
            measured = audit.kept(layer, *given)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer.to("meta")(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in given))
        for column, value in enumerate((side**2, measured, counter.get_total_flops() / 2)):
            found_of.setdefault(name, ([], [], []))[column].append(value)
real = audit.local_global_layer(28, C, heads, "cpu")
assert audit.kept(*real) == found_of["HLG"][1][0]  # tensors without numbers (meta) are as large as real ones
show(audit.growth(found_of))

# %% [markdown]
# The exponents above are of lines through three sizes. With $a L^2 + b L + c$ through the same sizes one sees what the
# bytes are of. SETR's layer keeps one number for every head and pair of tokens, and nothing more that is quadratic;
# fused it keeps nothing quadratic, and computes as much. HLG's layer is not linear either: every token reads all
# windows, and there are $L / R^2$ of them. It keeps two numbers for every head, token and window: the weight and the bias.

# %%
pair, window, rows = 4 * heads, 4 * heads / 7**2, []
expected = {"SETR, weights kept": pair, "SETR, fused": 0, "HLG": 2 * window}
for name, (tokens, size, macs) in found_of.items():
    a, b, _ = audit.parts(tokens, size)
    assert abs(a - expected[name]) < 0.05 * window
    A, B, _ = audit.parts(tokens, macs)
    assert abs(A / (2 * C) - (1 if "SETR" in name else 1 / 7**2)) < 0.05 / 7**2
    orders = f"{audit.exponent(tokens, size):.2f}", f"{audit.exponent(tokens, macs):.2f}"
    rows.append((name, f"{a:.3f}", f"{b:,.0f}", f"{A:.2f}", f"{B:,.0f}", *orders))
heads_of = "bytes for a pair of tokens", "bytes for a token", "multiply-adds for a pair", "for a token"
table(("layer", *heads_of, "exponent of the bytes", "of the multiply-adds"), rows)
a, b, _ = audit.parts(*found_of["HLG"][:2])
equal = b / a
say(
    f"So the quadratic part of HLG's bytes is {pair / a:.1f} times smaller than SETR's, that of its multiply-adds "
    f"{7**2} times. At {equal:,.0f} tokens, a map of {equal**0.5:.0f} × {equal**0.5:.0f}, it is as large as HLG's "
    "linear part: there the bytes grow with an exponent of 1.5. Only below a ninth of it, {equal / 9:,.0f} tokens, "
    "is the exponent under 1.1. **Quadratic against linear** is true of SETR's weights against HLG's local attention, "
    "and not of the whole layers: global attention is quadratic. Fused attention makes SETR's layer linear in bytes. "
    "In HLG the bias of global attention is still kept, and that is quadratic."
)

# %% [markdown]
# **Whole networks.** HLG begins with maps of a quarter of the image's side, SETR has a sixteenth throughout: at the
# same image HLG has sixteen times as many tokens in stage 1. What one image keeps in training, of all layers, weights
# of attention included:

# %%
rows, images = [], (256, 512, 1024)
networks = {
    "setr_naive_base": on_meta("setr_naive_base", aux=False, num_classes=19),
    "hlg_small": on_meta("hlg_small", num_classes=19),
    "setr_pup_hlg_small": on_meta("setr_pup_hlg_small", aux=False, num_classes=19),
}
for name, model in networks.items():
    size = [audit.kept(model.train(), torch.zeros(1, 3, side, side, device="meta")) for side in images]
    steps = [np.log2(b / a) / 2 for a, b in zip(size, size[1:], strict=False)]
    macs = cost.count(model, 512).macs / 1e9
    rows.append((f"`{name}`", *(f"{n / 2**30:.2f}" for n in size), *(f"{n:.2f}" for n in steps), f"{macs:.0f}"))
between = [f"exponent, {a} to {b}" for a, b in zip(images, images[1:], strict=False)]
table(("GiB for one image of side", *images, *between, "G multiply-adds at 512"), rows)

# %% [markdown]
# ## The tables of SETR
#
# Every row of Tables 3, 5 and 6 that is of SETR or HLG, counted on models without numbers. The rows of several scales
# (MS) and of random weights (R) have the models of the others. Multiply-adds are fvcore's, as the paper's may be. The
# last column names the note below that says why a number differs.

# %%
of_setr = {row["name"]: row for row in cost.table("setr")}
rows, notes, apart = [], list(dict.fromkeys(row["note"] for row in of_setr.values() if row["note"])), {}
for row in of_setr.values():
    parameters, macs = row["params"] / 1e6, row["macs_fvcore"] / 1e9
    apart[row["name"]] = macs / float(row["paper_macs_G"]) - 1
    note = f"[{notes.index(row['note']) + 1}]" if row["note"] else ""
    assert note or abs(apart[row["name"]]) < 0.005 and abs(parameters - float(row["paper_params_M"])) < 1.1
    own = {key: value for key, value in row["options"].items() if key not in ("num_classes", "img_size")}
    options = ", ".join(f"{key}={value!r}" for key, value in own.items())
    numbers = f"{parameters:.1f}", row["paper_params_M"], f"{macs:.1f}", row["paper_macs_G"]
    numbers += (f"{apart[row['name']]:+.1%}",)
    call = f"`{row['model']}`" + (f", `{options}`" if options else "")
    rows.append((row["where"], call, row["size"], *numbers, note))
table(("", "model", "pixels", "M parameters", "paper", "G multiply-adds", "paper", "difference", "note"), rows)
say("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)))

# %% [markdown]
# **Which classifier?** With PUP's classifier behind the last upsampling, and MLA's of $1 \times 1$, the printed numbers
# are met within one unit, if every number that an upsampling puts out counts four. This is `variant="paper"`.
# Published checkpoints need the other. PUP's logits are the same either way, as the section on equality shows.

# %%
source(audit.upsampling)
rows, by_variant = [], {}
for name in ("setr_pup_large", "setr_pup_base", "setr_mla_large", "setr_mla_base"):
    for size, classes, end in ((768, 19, ""), (512, 150, "_ade20k" if "large" in name else "_deit_ade20k")):
        models = {way: on_meta(name, variant=way, img_size=size, num_classes=classes) for way in setr.VARIANTS}
        both = {way: cost.count(model, size) for way, model in models.items()}
        whole = both["paper"].macs_fvcore + audit.upsampling(models["paper"], size)
        said, by_variant[name, size] = of_setr[name + end]["paper_macs_G"], both
        assert abs(whole / 1e9 - float(said)) < 0.7 < abs(both["official"].macs_fvcore / 1e9 - float(said))
        numbers = [f"{one.macs_fvcore / 1e9:.1f}" for one in both.values()]
        rows.append((f"`{name}`", size, *numbers, f"{whole / 1e9:.1f}", said))
table(("G multiply-adds", "pixels", *(f'`variant="{v}"`' for v in setr.VARIANTS), "with upsamplings", "paper"), rows)

# %% [markdown]
# **Not explained** are the rows of SETR-PUP-HLG, whose parameters are as printed. One of their numbers is likely a
# misprint: from one size to the other the large model grows by another factor than the two smaller ones.

# %%
rows, grown, SIZES = [], {}, ("small", "medium", "large")
for size in SIZES:
    pair_of = [of_setr[f"setr_pup_hlg_{size}{end}"] for end in ("_ade20k", "")]
    said, ours = ([float(row[key]) for row in pair_of] for key in ("paper_macs_G", "macs_fvcore"))
    grown[size] = said[1] / said[0]
    apart_of = [f"{apart[row['name']]:+.0%}" for row in pair_of]
    factors = f"{grown[size]:.2f}", f"{ours[1] / ours[0]:.2f}"
    rows.append((f"`setr_pup_hlg_{size}`", *(f"{n:.0f}" for n in said), *apart_of, *factors))
head = "paper, 512 pixels", "768 pixels", "ours, 512 pixels", "768 pixels", "paper, factor", "ours, factor"
table(("G multiply-adds", *head), rows)
assert grown["large"] > 1.1 * max(grown["small"], grown["medium"])
likely = float(of_setr["setr_pup_hlg_large"]["paper_macs_G"]) / grown["medium"]
say(f"By the factor of the medium model, the large one would have {likely:.0f} G at 512 pixels.")

# %% [markdown]
# ## The tables of HLG
#
# Table 1, read from the models themselves: channels, heads, layers, and D, the number of cells from one key of a
# dilated window to the next. Only the layers of stage 3 of the two large models are not the paper's.

# %%
rows, NAMES = [], [f"hlg_{size}" for size in ("mobile", "tiny", "small", "medium", "large")]
for name in NAMES:
    stages = on_meta(name).stages
    heads_of = [stage.blocks[0].attn.heads for stage in stages]
    dims, depths = [stage.blocks[0].attn.dim for stage in stages], [len(stage.blocks) for stage in stages]
    side = [local_global.Layout((56 // 2**i,) * 2, 7, True).grid[0] for i in range(len(stages))]
    rows.append((f"`{name}`", *(", ".join(map(str, one)) for one in (dims, heads_of, depths, side))))
    assert side == [8, 4, 2, 1]
table(("model", "channels", "heads", "layers", "D at 224 pixels"), rows)

# %%
of_hlg = {row["name"]: row for row in cost.table("hlg")}
rows, notes = [], list(dict.fromkeys(row["note"] for row in of_hlg.values() if row["note"]))
for row in of_hlg.values():
    parameters, macs, said = row["params"] / 1e6, row["macs"] / 1e9, row["paper_macs_G"]
    note = f"[{notes.index(row['note']) + 1}]" if row["note"] else ""
    assert note or abs(parameters - float(row["paper_params_M"])) < 0.15
    assert not said or abs(macs - float(said)) < 0.1
    options = ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
    both = f"{macs:.2f}", f"{row['macs_fvcore'] / 1e9:.2f}", said or "not printed"
    numbers = f"{row['params']:,}", row["paper_params_M"], *both, cost.published(row["name"])["value"]
    rows.append((row["where"], f"`{row['model']}`" + (f", `{options}`" if options else ""), *numbers, note))
head = "parameters", "paper, M", "G multiply-adds", "with norms", "paper", "top-1, paper", "note"
table(("", "model", *head), sorted(rows, key=lambda row: int(row[0].split()[1])))
say("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)))

# %% [markdown]
# Left out is the first row of Table 14, a baseline like PVT whose layers are not published. Accuracies are the paper's:
# nothing here was trained on ImageNet. The last digit of the ablations' parameters is not always the paper's.
#
# Text and code have seven differences that are keywords. What each is worth in HLG-Small, one at a time, from the
# code's way to the text's:

# %%
small, worth, rows = cost.count(on_meta("hlg_small"), 224), {}, []
for keyword, value in hlg.VARIANTS["paper"].items():
    other = cost.count(on_meta("hlg_small", **{keyword: value}), 224)
    worth[keyword] = other.params - small.params, (other.macs - small.macs) / 1e9
    rows.append((f"`{keyword}={value!r}`", f"{worth[keyword][0]:+,}", f"{worth[keyword][1]:+.3f}"))
table(("the text's way", "parameters", "G multiply-adds"), rows)
assert worth["positions"][0] == worth["query_as_key"][0] == 0 and worth["mask"] == (0, 0)
text = cost.count(on_meta("hlg_small", variant="paper"), 224)
say(f"All together: {text.params:,} parameters, {text.macs / 1e9:.2f} G. The printed numbers are of the code's way.")

# %% [markdown]
# ## Equal to the published code
#
# The weights here are a function of an entry's published name and shape alone. So they can be given to the authors'
# code and to ours. The authors' code was run once in double precision; HLG's after the repairs that its ledger names.
# Below are some of the logits as plain numbers: of HLG-Tiny the first ones of one image, the last ones of another, and
# of SETR-Naive-Base those of two pixels.

# %%
source(deterministic, published_state)
PUBLISHED = [-1.2945453720, -0.3587863301, -0.1860603961, 1.0714319107], [-1.3290977936, 1.7204631255]
images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224)))
model = dynattn.create_model("hlg_tiny").eval().double()
state = published_state(model)
dynattn.load_official(model, state)
with torch.no_grad():
    logits = model(images)
ours, rows = (logits[0, :4], logits[1, -2:]), []
for number, (want, here) in enumerate(zip(PUBLISHED, ours, strict=True)):
    assert float((here - torch.tensor(want, dtype=torch.float64)).abs().max()) < 1e-9
    rows += [("image " + str(number), f"{a:.10f}", f"{b:.10f}") for a, b in zip(want, here.tolist(), strict=True)]
table(("HLG-Tiny", "published", "ours"), rows)
say(f"All {len(state)} entries of a checkpoint are used.")

# %%
PIXELS = [0.0216468908, 0.6550286798, 0.2933690599, -1.2166839836], [-0.3780919689, -0.8422307187]
big = dynattn.create_model("setr_naive_base").eval().double()
state = audit.setr_state(big)
dynattn.load_official(big, {"state_dict": state})
with torch.no_grad():
    answer = big(torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 512, 512))))
ours, rows = (answer[0, :4, 0, 0], answer[0, -2:, 320, 448]), []
for where, want, here in zip(("0, 0", "320, 448"), PIXELS, ours, strict=True):
    assert float((here - torch.tensor(want, dtype=torch.float64)).abs().max()) < 1e-9
    rows += [(where, f"{a:.10f}", f"{b:.10f}") for a, b in zip(want, here.tolist(), strict=True)]
table(("SETR-Naive-Base, pixel", "published", "ours"), rows)
say(f"All {len(state)} entries are used. Classifiers that nothing reads (`conv_seg`) are ignored on loading.")
del big, state

# %% [markdown]
# How much would another reading change? Each row makes one change in HLG-Tiny, under the same weights.

# %%
rows, right = [], logits[:1]
CHANGES = {
    "local attention has keys of its own, as the text has it": dict(query_as_key=False),
    "equation 9 reads values, as the text has it": dict(conv_of="values"),
    "windows are where they are, as the text has it": dict(positions="centre"),
    "no convolutions in front of attention, as the text has it": dict(smooth=False),
    "plain windows in every layer": dict(dilated=False),
    "a window is its maximum": dict(embedding="max"),
    "no local attention": dict(local=False),
    "zeros that complete windows are read, as the code has it": dict(mask=False),
}
for what, options in CHANGES.items():
    change = audit.moved(model, images[:1], right, "hlg_tiny", **options)
    assert change > 1e-6 or options == dict(mask=False)
    rows.append((what, f"{change:.1%}" if change > 1e-12 else "0, at this size"))
table(("another reading", "change of the logits, of their norm"), rows)
images_apart = float((logits[1] - logits[0]).norm() / logits[0].norm())
say(
    f"Under these weights another image changes the logits by {images_apart:.1%}. Some readings change them less, as "
    "the place of a window does: a comparison of few digits overlooks them."
)

# %% [markdown]
# In SETR two readings are one function: PUP's classifier and the last upsampling are both linear.

# %%
first = dynattn.create_model("setr_pup_mini").double().eval()
image = normal(1, 3, 64, 64)
with torch.no_grad():
    right = first(image)
change = audit.moved(first, image, right, "setr_pup_mini", classify_last=True)
assert change < 1e-12
say(f"`classify_last=True` changes the logits by {change:.0e} of their norm.")

# %% [markdown]
# ## Trained
#
# The small models of SETR are trained for segmentation of shapes in front of pieces of photographs, `hlg_mini` is
# trained to classify the objects of the easy level. Each row is one checkpoint that ships, with what its training measured on test images.

# %%
rows = []
for name in weights.available():
    if name.startswith(("setr_", "hlg_", "fcn_", "pvt_seg")):
        story = weights.metadata(weights.path(name))
        measured = f"{story['mean_iou']:.3f}" if "mean_iou" in story else ""
        rows.append((f"`{name}`", story["seed"], measured, f"{story['accuracy']:.3f}", f"`{story['command']}`"))
table(("checkpoint", "seed", "mean IoU", "accuracy, of pixels or images", "made by"), rows)

# %% [markdown]
# What these numbers do **not** show:
#
# - Objects here stand out by their outline and texture. To find them is not to know streets.
# - The small models of SETR have convolutions at their stem and in front of their layers. The paper's have none: they
#   are trained before on ImageNet.
#
# ## The ledgers
#
# These are the places where text and published code part, or the paper contradicts itself. First SETR's, whose rows are
# in `dynattn/papers/setr.toml`.

# %%
street, mla = dict(num_classes=19, img_size=768), on_meta("setr_mla_large")
naive, beit = on_meta("setr_naive_large"), audit.of_timm("beit_base_patch16_384")
by_patch = {patch: audit.of_timm(f"vit_large_patch{patch}_384") for patch in (32, 16)}
products = len(by_patch[32].blocks) * 2 * ((384 // 32) ** 2 + 1) ** 2 * by_patch[32].embed_dim
large_vit = {patch: cost.count(model, 384) for patch, model in by_patch.items()}
ramp = torch.arange(32.0).expand(1, 1, 32, 32)
shift = (enlarge(ramp, 4, corners=True) - enlarge(ramp, 4)).abs().max()
ours = by_variant["setr_pup_large", 512]
two = dict(steps=2, **street)
SETR = dict(
    class_parameters=mla.encoder.embed.class_token.numel() + mla.encoder.embed.class_position.numel(),
    wide_parameters=audit.parameters("setr_mla_large", channels=512) - audit.parameters("setr_mla_large"),
    deepest_parameters=audit.parameters_of(mla.decoder.smooth[-1]),
    aux_parameters=audit.parameters_of(mla.aux[0]),
    two_layer_parameters=audit.parameters_of(naive.aux[0]),
    unused_parameters=(1 + len(on_meta("setr_pup_large").aux)) * 150 * (512 + 1),
    pascal_parameters=audit.parameters("setr_pup_large", num_classes=60, img_size=480),
)
MILLIONS = dict(
    two_without=audit.parameters("setr_pup_large", aux=False, **two),
    two_with=of_setr["setr_pup_2step_large"]["params"],
    patch_32_parameters=large_vit[32].params,
    patch_16_parameters=large_vit[16].params,
    beit_parameters=audit.parameters_of(beit),
)

# %%
ledger(
    "setr",
    **{name: f"{value:,}" for name, value in SETR.items()},
    **{name: f"{value / 1e6:.1f}" for name, value in MILLIONS.items()},
    late_macs=f"{ours['paper'].macs / 1e9:.1f} G",
    early_macs=f"{ours['official'].macs / 1e9:.1f} G",
    two_macs=f"{audit.multiply_adds('setr_pup_large', 768, variant='paper', **two):.1f}",
    corner_shift=f"{float(shift):.2f}",
    patch_32_macs=f"{(large_vit[32].macs_fvcore - products) / 1e9:.1f}",
    patch_16_macs=f"{large_vit[16].macs / 1e9:.1f}",
)

# %% [markdown]
# And HLG's, in `dynattn/papers/hlg.toml`.

# %%
fourteen, code = dict(depths=(2, 2, 14, 2)), dict(dims=(32, 64, 192, 384), heads=(2, 4, 6, 12), stems=2)
said = lambda name: float(cost.published(name)["value"])
stems = cost.count(on_meta("hlg_small", stems=2), 224)
PARTS = dict(
    stem_parameters=stems.params - small.params,
    medium_14=audit.parameters("hlg_medium", **fourteen),
    large_14=audit.parameters("hlg_large", **fourteen),
    medium_code=audit.parameters("hlg_medium", stems=2, **fourteen),
    medium_parameters=of_hlg["hlg_medium"]["params"],
    mobile_code=audit.parameters("hlg_mobile", **code),
    smooth_parameters=-worth["smooth"][0],
    embedding_parameters=of_hlg["hlg_tiny_window_dwconv"]["params"] - of_hlg["hlg_tiny"]["params"],
    no_local_parameters=of_hlg["hlg_small_dwmlp"]["params"],
    hlg_aux_parameters=audit.parameters_of(on_meta("setr_pup_hlg_small").aux),
)
here = {
    f"macs_{side}": ", ".join(f"{of_setr[f'setr_pup_hlg_{size}{end}']['macs'] / 1e9:.1f}" for size in SIZES)
    for side, end in ((512, "_ade20k"), (768, ""))
}

# %%
ledger(
    "hlg",
    **{name: f"{value:,}" for name, value in PARTS.items()},
    stem_macs=f"{(stems.macs - small.macs) / 1e9:.2f}",
    medium_macs=f"{of_hlg['hlg_medium']['macs'] / 1e9:.1f}",
    se_share=f"{worth['se'][0] / small.params:.0%}",
    key_macs=f"{worth['query_as_key'][1]:.2f}",
    smooth_macs=f"{-worth['smooth'][1]:.2f}",
    no_local_macs=f"{of_hlg['hlg_small_dwmlp']['macs'] / 1e9:.2f}",
    gain_dilated=f"{said('hlg_tiny_plain_dilated_7') - said('hlg_tiny_plain_plain'):.2f}",
    gain_local=f"{said('hlg_small_shared_local') - said('hlg_small_dwmlp'):.1f}",
    low_macs=f"{audit.multiply_adds('setr_pup_hlg_small', 512, fuse_stage=3):.0f}",
    **here,
    likely_macs=f"{likely:.0f}",
    paper_factors=" and ".join(f"{grown[size]:.2f}" for size in ("small", "medium")),
    paper_factor=f"{grown['large']:.2f}",
)

# %% [markdown]
# ## A longer exercise
#
# **Write `local_attention`**: every query reads the tokens of its window, plain or dilated. `verify.check` says what is
# wrong, and names the mistake if it knows it. This attempt, for example:


# %%
def local_attention(q, k, v, table, query_shape, window, dilated=False, scale=None):
    """Somebody's attempt."""
    (H, W), scale = query_shape, q.shape[-1] ** -0.5 if scale is None else scale
    i, j = torch.arange(H * W) // W, torch.arange(H * W) % W
    places = [(n % window, n // window) if dilated else (n // window, n % window) for n in (i, j)]
    return attend(q, k, v, table, places, window, scale)


def attend(q, k, v, table, places, window, scale):
    """Attention to the keys in the query's window; places: of every cell, by axis, its window and its place therein."""
    logits = q @ k.mT * scale
    if table is not None:
        rows, cols = ((at[:, None] - at + window - 1).clamp(0, 2 * window - 2) for _, at in places)
        logits = logits + table[:, rows, cols]
    (I, _), (J, _) = places
    return logits.masked_fill((I[:, None] != I) | (J[:, None] != J), -torch.inf).softmax(dim=-1) @ v


try:
    verify.check("local_attention", local_attention)
except verify.Mismatch as mismatch:
    print(mismatch)
    assert "every R-th token in a dilated window" in mismatch.mistakes

# %% [markdown]
# **First.** Mend the attempt. **Second.** When are plain and dilated windows the same? **Third.** Write the embedding
# of windows and give it to `verify.check` as `"window_embedding"`.
#
# <details><summary>Answers</summary>
#
# There are $D = \lceil H / R \rceil$ windows on an axis. Cell $i$ is in window $i \bmod D$, in place
# $\lfloor i / D \rfloor$. Where $D$ is $1$ there is one window; where $R$ is $1$ every token is alone.
#
# </details>


# %%
def mended(q, k, v, table, query_shape, window, dilated=False, scale=None):
    (H, W), scale = query_shape, q.shape[-1] ** -0.5 if scale is None else scale
    places = []
    for n, side in ((torch.arange(H * W) // W, H), (torch.arange(H * W) % W, W)):
        D = -(-side // window)
        places.append((n % D, n // D) if dilated else (n // window, n % window))
    return attend(q, k, v, table, places, window, scale)


verify.check("local_attention", mended)
say("It passes: outputs and gradients.")
