# %% [markdown]
# # Audit of SG-Former
#
# Ren et al., ICCV. This notebook is for looking things up. The [lesson](../03_sgformer.ipynb) teaches both layers and all
# equations. Here each claim is asserted where it is made, and every number is computed by the cell above it, except
# those that the ledger quotes.
#
# | section | what it holds |
# | --- | --- |
# | Equality with the loops | both operations and the significance: outputs and gradients; mistakes that are found |
# | Any map | padding, short groups, scales that must not fade |
# | One matrix | the effective matrices, and what they leave out |
# | Cost | multiply-adds counted, the time beside them |
# | Kernels | aggregation by rank, beside a sorted copy of the map |
# | The models | Tables 1, 2, 3, 6 and 7; the two readings |
# | Equal to the published code | six logits to nine digits (all in the tests), other readings, and ranks that flip |
# | Trained | significance and tokens of every seed, beside two nulls |
# | The ledger | what the paper says, what the code does, what follows |
# | A longer exercise | hybrid-scale attention, judged by `verify.check` |

# %%
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import dynattn
from dynattn import core, cost, ops, verify
from dynattn.bench import aggregation as bench
from dynattn.lessons import agree, begin, normal, say, source, table
from dynattn.lessons import sgformer as lesson
from dynattn.lessons import sgformer_audit as audit
from dynattn.lessons.notebook import costs, fastest, ledger, measured, recorded, show
from dynattn.lessons.published import deterministic, published_state
from dynattn.mechanisms import hybrid_scale, self_guided
from dynattn.mechanisms.hybrid_scale import HybridScaleAttention, Layout
from dynattn.mechanisms.self_guided import SelfGuidedAttention
from dynattn.models.sgformer import VARIANTS

begin()

# %% [markdown]
# ## Equality with the loops
#
# The loops are the specification: one query, one merged token and one channel at a time. Every fast form must give the
# same outputs and gradients in double precision.

# %%
source(self_guided.aggregate_tokens_loops, self_guided.aggregate_tokens_torch)
sizes, rates = (8, 8, 15), (4, 3, 2)
inputs = dict(x=normal(2, 31, 3), order=torch.rand(2, 31).argsort(dim=1), weight=normal(9), bias=normal(3))
agree(ops.aggregate_tokens, inputs | dict(sizes=sizes, rates=rates), forms=("torch", "numba"))

# %%
source(hybrid_scale.attention_loops, hybrid_scale.hybrid_scale_attention_loops, hybrid_scale.hybrid_scale_attention_torch)
maps = {"q": normal(2, 2, 35, 3), "k": normal(2, 2, 12, 3), "v": normal(2, 2, 12, 3), "query_shape": (5, 7)}
agree(ops.hybrid_scale_attention, maps, ratio=2, window=2)

# %% [markdown]
# The significance has no gradient, so its loops are compared by value: for both readings of equation 5, on maps that no
# window and no scale divides.

# %%
source(hybrid_scale.significance_loops)
rows = []
for ratio, window in ((1, 3), (2, 2), (4, None)):
    layout = Layout((5, 7), ratio, window)
    q, k = normal(2, 2, 35, 3), normal(2, 2, layout.key_shape[0] * layout.key_shape[1], 3)
    as_maps = core.merge_heads(q, (5, 7)), core.merge_heads(k, layout.key_shape), core.merge_heads(k, layout.key_shape)
    for reading in hybrid_scale.READINGS:
        want = hybrid_scale.significance_loops(q, k, (5, 7), ratio, window, 3**-0.5, reading)
        S = hybrid_scale.attention_and_significance(*as_maps, 2, layout, reading, "torch")[1]
        apart = float(((S - want).abs() / want).max())
        assert apart < 1e-12
        rows.append((ratio, window or "the whole map", reading, f"{float(S.mean()):.2f}", f"{apart:.0e}"))
table(("scale", "window", "reading", "mean of the map", "largest relative difference from the loops"), rows)

# %% [markdown]
# One case proves little. `verify.check` draws random cases of uneven sizes and with every option, and raises at the
# first number that is wrong. To be worth something it must find mistakes: it knows these by name.

# %%
source(audit.found)
for form in ("torch", "numba"):
    verify.check("aggregate_tokens", partial(ops.aggregate_tokens, impl=form), cases=12)
say(audit.found("aggregate_tokens"))

# %%
verify.check("hybrid_scale_attention", ops.hybrid_scale_attention, cases=12)
say(audit.found("hybrid_scale_attention"))

# %% [markdown]
# ## Any map
#
# The published code runs at multiples of the native size only. Here every size runs, and at the native size nothing
# changes. Windows are completed with keys that nobody reads, short groups with copies of their first cell, and both maps
# of significance have a mean of one, or nearly, where a scale does not divide the map. Without the last rule the map of
# the large scale would fade: a mean over more keys is smaller.

# %%
layer, rows = HybridScaleAttention(16, 2, (8, 1)).double().eval(), []
for side in (56, 96, 128):
    with torch.no_grad():
        probe = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1).double())
        maps = {}
        for group in layer.groups:
            q, k, v = group(probe(normal(1, 3, side, side)).movedim(1, -1))
            layout = layer.layout((side, side), group.ratio)
            S = hybrid_scale.attention_and_significance(q, k, v, 1, layout, "mean", "torch")[1]
            keys = layout.key_shape[0] ** 2 if layout.whole else layout.window**2
            maps[group.ratio] = float(S.mean()), float(S.mean() / keys)
    rows.append((f"{side} × {side}", *(f"{here:.2f}" for here, _ in maps.values()), f"{maps[8][1] / maps[1][1]:.2f}"))
    assert all(abs(here - 1) < 1e-6 for here, _ in maps.values())
table(("map", "mean of scale 8, here", "of scale 1, here", "scale 8 over scale 1 by plain means"), rows)

# %% [markdown]
# ## One matrix
#
# In a hybrid-scale layer a merged token stands for the mean of its cells; with the merged value at all of them the
# matrix is exact, unless LePE stands beside. In a self-guided layer the matrix is attention times the weights of $F$;
# it leaves the biases out, and LePE. The table says how large the rest is, as a share of the head's output.

# %%
picture, rows = lesson.picture(lesson.IMAGES[0]), []
networks = {"sgformer_mini, trained": dynattn.create_model("sgformer_mini", pretrained=True)}
networks["random weights"] = dynattn.create_model("sgformer_mini").eval()
networks["random weights, lepe=True"] = dynattn.create_model("sgformer_mini", lepe=True).eval()
for name, network in networks.items():
    for kind in ("hybrid_scale", "self_guided"):
        records = dynattn.trace(network.double(), picture.x).of_kind(kind)
        rest = [record.rest(head) for record in records for head in range(record.heads)]
        exact = all(record.exact for record in records)
        assert max(rest) < 1e-12 or not exact
        rows.append((name, kind.replace("_", "-"), exact, f"{min(rest):.1e} to {max(rest):.1e}"))
table(("network", "layers", "exact", "left out, by head"), rows)

# %% [markdown]
# ## Cost
#
# What one layer costs, in multiply-adds, without LePE: the lesson's formulas.

# %%
source(lesson.hybrid_multiply_adds, lesson.guided_multiply_adds)
alone = dict(lepe=False)
for side, C, s, rates in ((56, 64, 8, audit.RATES[0]), (28, 128, 4, audit.RATES[1]), (14, 256, 2, audit.RATES[2])):
    x, S = torch.zeros(1, side, side, C, device="meta"), torch.zeros(1, side, side, device="meta")
    pairs = [
        (HybridScaleAttention(C, 2, (s, 1), **alone), (x,), lesson.hybrid_multiply_adds(side**2, C, (s, 1), 7)),
        (SelfGuidedAttention(C, 2, rates, **alone), (x, S), lesson.guided_multiply_adds(side**2, C, rates)[0]),
    ]
    for layer, given, formula in pairs:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer.to("meta").eval()(*given)
        assert counter.get_total_flops() == 2 * formula
say("A counter that looks at every matrix product and convolution agrees exactly, at three sizes.")

# %% [markdown]
# **Measured.** Multiply-adds are not time. Pale: multiply-adds. Full: time, forward, both over those of windows, of the
# layers of SG-Former-S, one thread. Times depend on the machine and on its other load: nothing is asserted of them.

# %%
found = {}
for number in (1, 2, 3):
    side, C, layers = audit.stage(number)
    x, S = torch.randn(2, side, side, C), torch.rand(2, side, side)
    with torch.no_grad():
        for name, layer in layers.items():
            given = (x, S) if name == "self-guided" else (x,)
            with FlopCounterMode(display=False) as counter:
                layer(*given)
            both = counter.get_total_flops() / 2, fastest(partial(layer, *given))
            found.setdefault(f"stage {number}, {side} × {side}", {})[name] = both
show(costs(found, "windows of 7 × 7"))
rows = []
for where, layers in found.items():
    macs, ms = layers["windows of 7 × 7"]
    rows += [
        (where, name, f"{one / 1e9:.2f}", f"{took:.0f}", f"{took / ms / (one / macs):.1f}")
        for name, (one, took) in layers.items()
    ]
table(("", "layer", "G multiply-adds, two images", "ms", "time of one multiply-add over windows'"), rows)

# %% [markdown]
# ## Kernels
#
# The usual way copies the map in the order of its ranks, then multiplies. The kernel reads each cell where it lies, and
# adds it to its token.

# %%
rows = []
for number in (1, 2, 3):
    inputs = bench.inputs_of(number, batch=4)
    for backward in (False, True):
        took = [fastest(partial(bench.call, impl, inputs, backward)) for impl in ("torch", "numba")]
        what = "with the backward" if backward else "forward"
        rows.append((number, what, *(f"{ms:.2f}" for ms in took), f"{took[0] / took[1]:.1f}"))
table(("stage", "", "ms, sorted copy", "ms, kernel", "ratio"), rows)
x, order, weight, *_ = bench.inputs_of(1, batch=4)
say(
    f"At stage 1 the copy takes {x.numel() * x.element_size() / 2**20:.0f} MB for 4 images; the kernel needs the ranks "
    f"alone, {order.numel() * order.element_size() / 2**20:.1f} MB, which both have. `dynattn bench ranks` measures more."
)

# %% [markdown]
# ## The models
#
# Table 1, read from the models themselves, and Table 2. Multiply-adds are fvcore's, which the paper's are: they count
# norms too.

# %%
NAMES, rows, counts = [f"sgformer_{size}" for size in ("small", "medium", "base")], [], {}
for name in NAMES:
    model = audit.on_meta(name)
    blocks = [[block.attn for block in stage.blocks] for stage in model.stages]
    scales = ["/".join(map(str, stage[0].scales)) for stage in blocks[:3]]
    tokens = [[one.rates for one in stage if isinstance(one, SelfGuidedAttention)][0] for stage in blocks[:3]]
    counts[name], said = cost.count(model, 224), cost.published(name)
    params, macs = counts[name].params, counts[name].macs_fvcore
    numbers = f"{params:,} ({said['params_M']} M)", f"{macs / 1e9:.2f} G ({said['macs_G']} G)"
    rows.append((f"`{name}`", ", ".join(str(len(stage)) for stage in blocks), ", ".join(scales), *numbers, said["value"]))
    assert abs(params / 1e6 - float(said["params_M"])) < 0.1 and abs(macs / 1e9 - float(said["macs_G"])) < 0.05
table(("model", "blocks", "scales of stages 1 to 3", "parameters (paper)", "multiply-adds (paper)", "top-1, paper"), rows)
say(f"Rates, equal neighbours shared: {', '.join(map(str, tokens))}. Blocks take turns, hybrid-scale first.")

# %% [markdown]
# Tables 3, 6 and 7 are keyword arguments of the same models. Accuracies are the paper's: nothing here was trained on
# ImageNet.

# %%
rows, notes, large = [], [], {}
for row in cost.tables()["sgformer"].rows:
    said = cost.published(row.published)
    if said["where"] == "Table 2":
        continue
    counted = cost.count(audit.on_meta(row.model, **row.options), row.size)
    if row.size == 384:
        large[row.model] = counted.macs
    if row.note and row.note not in notes:
        notes.append(row.note)
    numbers = f"{counted.params / 1e6:.2f}", said["params_M"], f"{counted.macs_fvcore / 1e9:.2f}", said["macs_G"]
    options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
    note = f"[{notes.index(row.note) + 1}]" if row.note else ""
    rows.append((said["where"], f"`{row.model}`, `{options}`", *numbers, said["value"], note))
table(("", "", "M parameters", "paper", "G multiply-adds", "paper", "top-1, paper", "note"), rows)
say("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)))

# %% [markdown]
# The two readings, the published code's and the text's, and what each difference is worth. One keyword at a time, in
# SG-Former-S:

# %%
small, rows, worth = counts["sgformer_small"], [], {}
for keyword, value in VARIANTS["paper"].items():
    counted = cost.count(audit.on_meta("sgformer_small", **{keyword: value}), 224)
    worth[keyword] = counted.params - small.params, counted.macs - small.macs
    change = f"{worth[keyword][0]:+,}", f"{worth[keyword][1] / 1e9:+.3f}"
    rows.append((f"`{keyword}={value!r}`", *change))
table(("the text's way", "parameters", "G multiply-adds"), rows)
base_text = audit.on_meta("sgformer_base", scales=((8, 4, 2, 1), (4, 2, 1), (2, 1)))
base_table_1 = cost.count(base_text, 224)
table_parameters = audit.on_meta("sgformer_small").embed.table.numel()
assert round(base_table_1.params / 1e6, 1) > float(cost.published("sgformer_base")["params_M"])
assert worth["reading"] == (0, 0) and worth["global_scale"] == (0, 0)  # at this size

# %% [markdown]
# ## Equal to the published code
#
# The weights here are a function of an entry's published name and shape alone. So they can be given to the authors'
# code and to ours. The authors' code was run once in double precision. Below are some of its logits as plain numbers:
# the first ones of one image, the last ones of another.

# %%
source(deterministic, published_state)
PUBLISHED = [-2.1224916446, -0.0047443766, 0.2891008544, 1.5095727693], [1.9535701493, -1.700221937]
images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224)))
model = dynattn.create_model("sgformer_small").eval().double()
cells = model.embed.table[0].numel()
state = published_state(model) | {"pos_embed": deterministic("pos_embed", (1, cells, 64))}  # a row for each cell
dynattn.load_official(model, state)
with torch.no_grad():
    logits = model(images)
ours, rows = (logits[0, :4], logits[1, -2:]), []
for number, (want, found) in enumerate(zip(PUBLISHED, ours, strict=True)):
    apart = float((found - torch.tensor(want, dtype=torch.float64)).abs().max())
    assert apart < 1e-9
    rows += [(number, f"{a:.10f}", f"{b:.10f}") for a, b in zip(want, found.tolist(), strict=True)]
table(("image", "published", "ours"), rows)
say(f"All entries of the {len(state)} of a checkpoint are used. The paper sorts once; the published code sorts twice.")

# %% [markdown]
# How much would a change matter? Each row makes one, under the same weights. Aggregation after the projection differs by
# biases only. Here biases are random numbers; in a network that begins they are 0.

# %%
rows, right = [], logits[:1]
same = {"windows for the largest scale, as the text has them": dict(global_scale=False)}
changes = {
    "equation 5 by sums, as printed": dict(reading="sum"),
    "tokens are aggregated after the projection, as the text has it": dict(aggregate="after"),
    "one number guides": dict(guidance="constant"),
    "the local map alone guides": dict(guidance="local"),
    "the global map alone guides": dict(guidance="global"),
    "windows twice as wide": dict(window=14),
    "most significant first": {},
}
for what, options in (same | changes).items():
    other = dynattn.create_model("sgformer_small", **options).eval().double()
    other.load_state_dict(model.state_dict())
    turned = lesson.guiding(lambda name, S: S if options else -S)
    with torch.no_grad(), lesson.changed(other, turned):
        change = float((other(images[:1]) - right).norm() / right.norm())
    assert change < 1e-12 if what in same else change > 1e-6
    rows.append((what, f"{change:.1%}" if change > 1e-12 else "0, at this size"))
table(("another reading or a change", "change of the logits, of their norm"), rows)

# %% [markdown]
# **Ranks flip.** The same random weights and both images in single precision: the logits of the whole network, and once
# more when it is told the ranks that double precision found.

# %%
single = dynattn.create_model("sgformer_small").eval()
single.load_state_dict(model.state_dict())
flipped, cells, gaps, free, given = 0, 0, [], [], []
for image in images:
    double, plain = dynattn.trace(model, image), dynattn.trace(single, image.float())
    guided = [record.name for record in double.of_kind("self_guided")]
    ranks = {name: lesson.ranks_of(double[name]) for name in guided}
    with torch.no_grad(), lesson.guided_by(single, ranks):
        told = single(image[None].float())[0]
    flipped += sum(int((lesson.ranks_of(plain[name]) != ranks[name]).sum()) for name in guided)
    cells += sum(map(torch.numel, ranks.values()))
    gaps += [float(double[name].significance.flatten().sort().values.diff().min()) for name in guided]
    free.append(float((plain.logits - double.logits).abs().max()))
    given.append(float((told - double.logits).abs().max()))
assert flipped and max(given) < max(free) / 100
say(
    f"{flipped:,} cells of {cells:,} have another rank: the two nearest values of a map are {min(gaps):.1e} apart. "
    f"Logits, whose standard deviation is {float(logits.std()):.2f}, move by up to **{max(free):.2f}**. With the ranks "
    f"given they move by up to **{max(given):.1e}**."
)

# %% [markdown]
# ## Trained
#
# `sgformer_mini` is these modules on small pictures of shapes in front of photographs, trained with several seeds. How
# well significance finds the object (AUC), how many of the tokens it gets, and how far the cells of a token lie apart, in
# sides of the image. Beside it: random weights, and the masks of other images.

# %%
rows, found = [], lesson.verdict()
for row in found.itertuples():
    numbers = f"{row.own:.2f}", f"{row.other:.2f}", f"{row.tokens:.0%}", f"{row.elsewhere:.0%}"
    rows.append((row.network, f"`{row.guided}`", *numbers, f"{row.together:.2f}", f"{row.any:.2f}"))
heads = "AUC", "AUC, other masks", "tokens on the object", "on other masks", "cells of a token apart", "any two cells"
table(("", "guided layer", *heads), rows)
say(f"{lesson.MEASURED} test images. The object covers {found.area.mean():.0%} of an image.")

# %% [markdown]
# `dynattn figures --paper sgformer` draws the paper's figure 2 and others with it, and measures them on more images:

# %%
figures = recorded("sgformer")
measured({number: entry for number, entry in figures.items() if number != "receptive_fields"})

# %% [markdown]
# ![Figure 2](../../figures/sgformer_2_tokens.png)
#
# ![How significance comes about](../../figures/sgformer_evolving_significance.png)
#
# What these numbers do **not** show:
#
# - An object here stands out by its colour. To find it is not recognition.
# - That every training finds it: the first layer of one seed has learnt the opposite.
# - That the network needs this significance: the lesson takes it away, and the whole layer.
#
# ## The ledger
#
# These are the places where text and published code part, or the paper contradicts itself. The rows are in
# `dynattn/papers/sgformer.toml`.

# %%
ledger(
    "sgformer",
    base_table_1=f"{base_table_1.params:,}",
    base_table_1_macs=f"{base_table_1.macs_fvcore / 1e9:.2f} G",
    shared_parameters=f"{worth['shared'][0]:,}",
    after_macs=f"{worth['aggregate'][1] / 1e9:.2f} G",
    lepe_parameters=f"{-worth['lepe'][0]:,}",
    table_parameters=f"{table_parameters:,}",
    large_macs=", ".join(f"{large[name] / 1e9:.2f}" for name in NAMES) + " G",
)

# %% [markdown]
# ## A longer exercise
#
# **Write `hybrid_scale_attention`**: `q` on the map, `k` and `v` on merged tokens. `verify.check` says what is wrong,
# and names the mistake if it knows it. This attempt, for example:


# %%
def hybrid_scale_attention(q, k, v, query_shape, ratio, window=None, scale=None):
    """Somebody's attempt."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.mT * scale).softmax(dim=-1) @ v


try:
    verify.check("hybrid_scale_attention", hybrid_scale_attention)
except verify.Mismatch as mismatch:
    print(mismatch)
    assert "windows ignored" in mismatch.mistakes

# %% [markdown]
# **First.** Mend the attempt. **Second.** Let it return the significance of equation 5 too. **Third.** When does a scale
# have no windows?
#
# <details><summary>Answers</summary>
#
# A query in row $i$ is in row $\lfloor i / (s M) \rfloor$ of windows, a merged token in row $u$ in
# $\lfloor u / M \rfloor$. The significance is the sum over queries, put back at the cells of each merged token. There are
# no windows where $s M$ is at least the side of the map.
#
# </details>


# %%
def mended(q, k, v, query_shape, ratio, window=None, scale=None):
    (H, W), scale = query_shape, q.shape[-1] ** -0.5 if scale is None else scale
    logits = q @ k.mT * scale
    if window is not None:
        rows, cols = torch.arange(H), torch.arange(W)
        number = lambda i, j, M: (i[:, None] // M * W + j // M).flatten()
        merged = torch.arange(-(-H // ratio)), torch.arange(-(-W // ratio))
        ours, theirs = number(rows, cols, ratio * window), number(*merged, window)
        logits = logits.masked_fill(ours[:, None] != theirs, -torch.inf)
    return logits.softmax(dim=-1) @ v


verify.check("hybrid_scale_attention", mended)
say("It passes: outputs and gradients.")
