# %% [markdown]
# # Audit of BiFormer and DeBiFormer
#
# BaoLong et al., ACCV, and Zhu et al., CVPR. This notebook is for looking things up. The
# [lesson](../02_bilevel.ipynb) teaches both layers. Here each claim is asserted where it is made, and every number is
# computed by the cell above it.
#
# | section | what it holds |
# | --- | --- |
# | Equality with the loops | both operations and the whole DBRA, outputs and gradients; the blocks |
# | Any map | regions of maps that $S$ does not divide: padding has no influence |
# | No gradient | what a gradient knows of routes |
# | One matrix for two attentions | the effective matrix of DBRA, and what it leaves out |
# | Cost | the formulas counted, the paper's bound derived again, the time beside the formula |
# | Kernels | copies of keys, in time and in memory |
# | The models | Tables 1, 2, 5, 6 and 7 |
# | Equal to the published code | logits to the last digit |
# | Trained | the figures and their nulls, three seeds |
# | The ledger | what the paper says, what the code does, what follows |
# | A longer exercise | bi-level attention, judged by `verify.check` |

# %%
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import dynattn
from dynattn import core, cost, ops, verify
from dynattn.bench import routed as bench
from dynattn.figures.evidence import class_map, contribution, receptive_field, share_under
from dynattn.figures.subjects import test_picture
from dynattn.kernels.routed import readable_first
from dynattn.lessons import agree, begin, normal, say, source, table
from dynattn.lessons import bilevel_audit as audit
from dynattn.lessons.notebook import costs, fastest, ledger, measured, recorded, show
from dynattn.lessons.published import deterministic, published_state
from dynattn.mechanisms import bilevel, deformable_bilevel
from dynattn.mechanisms.bilevel import BiLevelRoutingAttention
from dynattn.mechanisms.deformable_bilevel import DeformableBiLevelAttention
from dynattn.models.biformer import BiLevelBlock
from dynattn.models.debiformer import TABLE_7

begin()

# %% [markdown]
# ## Equality with the loops
#
# The loops are the specification: one region, one query, one key and one channel at a time. Every fast form must give
# the same outputs and gradients in double precision. Two operations carry the mechanisms. One reads regions that are
# given; the other chooses them too.

# %%
source(bilevel.routed_attention_loops, bilevel.routed_attention_torch)
routes = torch.rand(2, 6, 5).argsort(dim=-1)[..., :3].contiguous()
regions = {"q": normal(2, 2, 6, 4, 3), "k": normal(2, 2, 5, 3, 3), "v": normal(2, 2, 5, 3, 3), "routes": routes}
agree(ops.routed_attention, regions, forms=("torch", "numba"))

# %%
source(bilevel.route)
shapes = dict(query_shape=(5, 6), key_shape=(4, 7))
maps = {"q": normal(2, 2, 30, 3), "k": normal(2, 2, 28, 3), "v": normal(2, 2, 28, 3)} | shapes
agree(ops.bilevel_attention, maps, forms=("torch", "numba"), regions=3, topk=4)

# %% [markdown]
# One case proves little. `verify.check` draws random cases of uneven sizes and with every option, and raises at the
# first number that is wrong. To be worth something it must find mistakes: it knows these by name.

# %%
for name in ("routed_attention", "bilevel_attention"):
    verify.check(name, getattr(ops, name), cases=12)
    verify.check(name, partial(getattr(ops, name), impl="numba"), cases=12)
    mistakes = verify.registry.known(name).mistakes
    say(f"`{name}`, {len(mistakes)} mistakes: {'; '.join(mistakes)}.")

# %% [markdown]
# DBRA is a module with weights of its own between its two attentions. So the whole module has its loops:

# %%
source(DeformableBiLevelAttention.forward)
sizes = dict(dim=8, heads=4, groups=2, map_size=(4, 6), stride=2, kernel=3, regions=2, topk=2)
rows = []
for options in ({}, dict(scale="head", offset_channels=2, agent_norm=False)):
    layer, x = DeformableBiLevelAttention(**sizes, **options).double(), normal(1, 4, 6, 8)
    with torch.no_grad():
        layer.table.copy_(normal(*layer.table.shape))
        want = deformable_bilevel.deformable_bilevel_loops(layer, x[0])
        apart = float((layer(x)[0] - want).abs().max() / want.abs().max())
    assert apart < 1e-12
    rows.append((f"`{options}`" if options else "as published", f"{apart:.1e}"))
table(("DBRA", "largest relative difference from its loops"), rows)

# %% [markdown]
# A block puts a depthwise convolution in front: it tells tokens where they are, since neither attention has a table of
# absolute positions.
#
# $$z'_l = \text{MHSA}(\text{LN}(z_{l-1})) + z_{l-1} \tag{DEBI-4}$$
# $$z_l = \text{MLP}(\text{LN}(z'_l)) + z'_l \tag{DEBI-5}$$

# %%
source(BiLevelBlock.forward)

# %% [markdown]
# ## Any map
#
# $S$ need not divide the map. Then regions at the bottom and at the right have padding. The published code pads with
# zeros, and their keys are read. Here nobody reads them, and no mean counts them. The test of it: with all regions
# read, the layer is dense attention of the cells that are there.

# %%
shape, S = (5, 7), 3
q, k, v = (normal(1, 2, shape[0] * shape[1], 4) for _ in range(3))
ours = ops.bilevel_attention(q, k, v, shape, shape, regions=S, topk=S * S)
layout = core.Regions(shape, S)
padded = layout.cut(torch.ones(1, 1, q.shape[2], 1))
zeros = ops.routed_attention(*(layout.cut(t) for t in (q, k, v)), torch.arange(S * S).expand(1, S * S, -1).contiguous())
apart, published = ((out - ops.dense_attention(q, k, v)).norm() / ours.norm() for out in (ours, layout.join(zeros)))
assert apart < 1e-12 < published
say(
    f"A map of {shape} with S = {S}: regions of {layout.side}, and {int((padded == 0).sum())} cells of padding. From "
    f"dense attention: ours {float(apart):.0e}, with zeros that are read {float(published):.0%} of the norm."
)

# %% [markdown]
# ## No gradient
#
# The routes are found without a gradient. In the attention, keys and values of regions that nobody reads have a gradient
# of zero. But a small change of these keys may change what is read. So there are two kinds of points: where the routes
# stay, the gradient
# is right; where they change, the output jumps. Here a query becomes its opposite, in small steps.

# %%
q, k, v = (normal(1, 1, 16, 2) for _ in range(3))
attend = partial(ops.bilevel_attention, k=k, v=v, query_shape=(4, 4), key_shape=(4, 4), regions=4, topk=3)
whole, layout, at = lambda q: float(attend(q)[0, 0, 0, 0]), core.Regions((4, 4), 4), 0
walk = list(audit.one_query(2000, q, -2 * q[0, 0, at], at))  # to its opposite, which likes all that it disliked
outputs = np.array([whole(moved) for _, moved in walk])
routes = [bilevel.route(layout.means(moved), layout.means(k), 3)[0, at].sort()[0].tolist() for _, moved in walk]
same = np.array([a == b for a, b in zip(routes, routes[1:], strict=False)])
steps = np.abs(np.diff(outputs))
assert (~same).any() and steps[~same].mean() > 20 * steps[same].mean()
unread = torch.ones(16, dtype=torch.bool).index_fill(0, torch.tensor(routes[0]), False)
kk = k.clone().requires_grad_()
(slope,) = torch.autograd.grad(ops.bilevel_attention(q, kk, v, (4, 4), (4, 4), regions=4, topk=3)[0, 0, at].sum(), kk)
assert not slope[0, 0, unread].any() and slope[0, 0, ~unread].abs().sum(dim=1).all()
say(
    f"Of {len(steps):,} steps of the query {int((~same).sum())} changes its routes. The output moves by "
    f"{steps[same].mean():.1e} in a step that does not, and by {steps[~same].mean():.2f} in this one. Of "
    f"{len(unread)} keys the {int(unread.sum())} that the query does not read have no slope at all."
)

# %% [markdown]
# ## One matrix for two attentions
#
# In DBRA a query reads agents, and agents read the map. The product of the two attentions says what a query gets from
# each token. It leaves out all that agents know besides: what they sampled themselves ($\bar{x}$), LCE, norms, the
# inner feed-forward network, and what other heads brought. The table says how large that is, as a share of the head's
# output, in the trained network and with random weights.

# %%
networks = {"trained": dynattn.create_model("debiformer_mini", pretrained=True)}
networks["random weights"] = dynattn.create_model("debiformer_mini").eval()
picture, rows, left_out = test_picture(22, (128, 128)), [], {name: [] for name in networks}
for name, network in networks.items():
    for record in dynattn.trace(network, picture.x).of_kind("deformable_bilevel"):
        A = record.effective_matrix(0)
        assert torch.allclose(A, record.attention[0] @ record.reading[0]) and torch.allclose(A.sum(1), torch.ones(len(A)))
        rest = [record.rest(head) for head in range(record.heads)]
        left_out[name] += rest
        rows.append((name, f"`{record.name}`", record.points.shape[1], f"{min(rest):.2f} to {max(rest):.2f}"))
table(("", "layer", "agents", "left out, by head"), rows)
say(
    f"Trained, {min(left_out['trained']):.2f} to {max(left_out['trained']):.2f} of a head's output is left out: the "
    "product of the attentions alone is a poor account of it."
)

# %% [markdown]
# ## Cost
#
# What one layer costs, in multiply-adds. BRA: linear maps, affinity, attention, LCE. DBRA: the same, and the agents'.

# %%
source(bilevel.multiply_adds, deformable_bilevel.multiply_adds)
for side, C, S, k, r, K in ((56, 64, 7, 4, 8, 9), (28, 128, 7, 8, 4, 7), (14, 384, 7, 16, 2, 5)):
    layers = {
        BiLevelRoutingAttention(C, 4, regions=S, topk=k): bilevel.multiply_adds((side, side), S, k, C),
        DeformableBiLevelAttention(
            C, 4, 2, (side, side), stride=r, kernel=K, regions=S, topk=k
        ): deformable_bilevel.multiply_adds((side, side), (side // r) ** 2, S, k, C, K, 3),
    }
    for layer, formula in layers.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer.to("meta")(torch.zeros(1, side, side, C, device="meta"))
        assert counter.get_total_flops() == 2 * formula
say("A counter that looks at every matrix product and convolution agrees exactly, at three sizes.")

# %% [markdown]
# **The paper's bound derived again.** In its supplement, section 7, the paper bounds the bi-level part by the inequality of arithmetic and geometric means.
# Let $a = k \cdot HW \cdot N_s$. Routing and attention cost, as the paper counts them,
#
# $$C\left(2S^4 + \frac{2a}{S^2}\right) = C\left(2S^4 + \frac{a}{S^2} + \frac{a}{S^2}\right)
# \ge 3C\left(2a^2\right)^{1/3} = 3C \cdot 2^{1/3} \left(k\, HW N_s\right)^{2/3}$$
#
# with equality where $2S^4 = a / S^2$, so $S = (a/2)^{1/6}$. The paper prints $2^{2/3}$ for $2^{1/3}$. Its own example is
# stage 3 of the base model.

# %%
(H, W), N, S, k, C, K = (14, 14), 49, 7, 16, 384, 5  # the paper's example
a = k * H * W * N
bounded, printed, right_bound = C * (2 * S**4 + 2 * a / S**2), 3 * C * (2 * a) ** (2 / 3), 3 * C * (2 * a * a) ** (1 / 3)
assert right_bound < bounded < printed  # the printed bound is larger than what it bounds
best = (a / 2) ** (1 / 6)
assert np.isclose(C * (2 * best**4 + 2 * a / best**2), right_bound)
formula = sum(deformable_bilevel.printed_multiply_adds((H, W), N, S, k, C, K))
with_one = sum(deformable_bilevel.printed_multiply_adds((H, W), 1, S, k, C, K))
complete = deformable_bilevel.multiply_adds((H, W), N, S, k, C, K, 3)
dense, bra = 4 * H * W * C**2 + 2 * (H * W) ** 2 * C, bilevel.multiply_adds((H, W), S, k, C)
table(
    ("of the paper's example", "M multiply-adds"),
    [
        ("routing and attention, as the paper counts them", f"{bounded / 1e6:.2f}"),
        ("their lower bound as printed", f"{printed / 1e6:.2f}"),
        ("their lower bound", f"{right_bound / 1e6:.2f}"),
        ("the paper's whole formula", f"{formula / 1e6:.1f}"),
        ("the same with one agent, as the paper's text has it", f"{with_one / 1e6:.1f}"),
        ("the complete DBRA", f"{complete / 1e6:.1f}"),
        ("BRA with the same regions", f"{bra / 1e6:.1f}"),
        ("dense attention", f"{dense / 1e6:.1f}"),
    ],
)
say(f"The cheapest S of the inequality is {best:.2f}. The formula leaves out {1 - formula / complete:.0%} of the layer.")

# %% [markdown]
# And the total is said to be $O((HW N_s)^{2/3})$. But queries that read agents cost $2 HW N_s C$, which is linear in
# $HW N_s$. Against the side of the map, with an agent for every $r \times r$ cells:

# %%
sides, lines = (14, 28, 56, 112, 224), {}
for side in sides:
    N = (side // 2) ** 2
    lines.setdefault("queries read agents, $2 HW N_s C$", []).append(2 * side**2 * N * C / 1e9)
    lines.setdefault("the printed order, $(k\\, HW N_s)^{2/3} C$", []).append((k * side**2 * N) ** (2 / 3) * C / 1e9)
    lines.setdefault("the complete layer", []).append(
        deformable_bilevel.multiply_adds((side, side), N, S, k, C, K, 3) / 1e9
    )
first, order, whole = (np.array(values) for values in lines.values())
assert (np.diff(first / order) > 0).all() and first[-1] > order[-1]
show(audit.sizes(sides, lines, "r = 2, G multiply-adds", "side of the map"))

# %% [markdown]
# **Measured.** Multiply-adds are not time. Pale: the formula. Full: time, forward, both over dense attention's, of the
# layers of DeBiFormer-T, one thread. Times depend on the machine and on its other load: nothing is asserted of them.

# %%
found = {}
for number in (1, 2, 3):
    side, C, layers = audit.stage(number)
    x = torch.randn(2, side, side, C)
    with torch.no_grad():
        for name, layer in layers.items():
            with FlopCounterMode(display=False) as counter:
                layer(x)
            both = counter.get_total_flops() / 2, fastest(partial(layer, x))
            found.setdefault(f"stage {number}, {side} × {side}", {})[name] = both
show(costs(found, "dense attention"))
rows = []
for where, layers in found.items():
    macs, ms = layers["dense attention"]
    rows += [
        (where, name, f"{one / 1e9:.2f}", f"{took:.0f}", f"{took / ms / (one / macs):.1f}")
        for name, (one, took) in layers.items()
    ]
table(("", "layer", "G multiply-adds, two images", "ms", "time of one multiply-add over dense attention's"), rows)

# %% [markdown]
# ## Kernels
#
# The usual way gathers: each region of queries gets a copy of the keys and values that it reads. A map of
# $HW$ tokens is copied $k$ times. Users of the published code ran out of memory by this. The library's kernel is the one
# of dynamic groups: a group has a list of key numbers, and tiles of its queries read the keys where they lie.

# %%
source(bench.gathered, readable_first)
inputs, rows = bench.inputs_of(batch=2), []
for backward in (False, True):
    took = {way: fastest(partial(bench.call, way, inputs, backward)) for way in ("gather", "torch", "numba")}
    rows.append(("with the backward" if backward else "forward", *(f"{ms:.1f}" for ms in took.values())))
table(("ms, stage 1 of BiFormer-T, k = 4", "torch.gather", "copies of whole regions", "kernel"), rows)
q, k, v, routes = inputs
copies = 2 * routes.shape[2] * k.numel() * k.element_size()
extra = routes.numel() * 8 * k.shape[3]
out, other = (ops.routed_attention(q, k, v, routes, impl=impl) for impl in ("numba", "torch"))
assert (out - other).abs().max() < 1e-5 * other.abs().max()
say(
    f"Keys and values have {2 * k.numel() * k.element_size() / 2**20:.1f} MB, their copies {copies / 2**20:.1f} MB. "
    f"The kernel's list of key numbers has {extra / 2**20:.1f} MB. `dynattn bench routed` measures a large map."
)

# %% [markdown]
# ## The models
#
# Table 1, read from the models themselves, and Table 2. DBRA stands in every second block; in stage 4 in all.

# %%
letters, rows, counts = {"BiLevelRoutingAttention": "B", "DeformableBiLevelAttention": "D", "FullAttention": "F"}, [], {}
for name in (f"{family}_{size}" for family in ("biformer", "debiformer") for size in ("tiny", "small", "base")):
    model = dynattn.create_model(name).to("meta")
    stages = ["".join(letters[type(block.attn).__name__] for block in stage.blocks) for stage in model.stages]
    counted, said = cost.count(model, 224), cost.published(name)
    counts[name] = counted.params, sum(p.numel() for p in model.stages[3].parameters())
    numbers = f"{counted.params:,} ({said['params_M']} M)", f"{counted.macs_fvcore / 1e9:.2f} G ({said['macs_G']} G)"
    rows.append((f"`{name}`", ", ".join(stages), *numbers, said["value"]))
    assert name == "debiformer_base" or abs(counted.params / 1e6 - float(said["params_M"])) < 0.5
table(("model", "blocks: B(RA), D(BRA), F(ull)", "parameters (paper)", "multiply-adds (paper)", "top-1, paper"), rows)

# %% [markdown]
# Tables 5, 6 and 7 are keyword arguments of the same models. Accuracies are the paper's: nothing here was trained on
# ImageNet.

# %%
rows, notes = [], []
for row in cost.tables()["debiformer"].rows:
    said = cost.published(row.published)
    if said["where"] == "Table 2":
        continue
    counted = cost.count(dynattn.create_model(row.model, **row.options).to("meta"), row.size)
    if row.note and row.note not in notes:
        notes.append(row.note)
    options = row.published.removeprefix("debiformer_tiny_").replace("x", "*").replace("_", " ")
    numbers = f"{counted.params / 1e6:.2f}", said["params_M"], f"{counted.macs_fvcore / 1e9:.2f}", said["macs_G"]
    note = f"[{notes.index(row.note) + 1}]" if row.note else ""
    rows.append((said["where"], options, *numbers, said["value"], note))
table(("", "", "M parameters", "paper", "G multiply-adds", "paper", "top-1, paper", "note"), sorted(rows))
say("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)))
assert len([row for row in rows if row[0] == "Table 7"]) == len(TABLE_7)

# %% [markdown]
# The two readings: the published code's and the text's. They differ in a few numbers of each layer.

# %%
rows = []
for name in ("debiformer_tiny", "debiformer_base"):
    official, paper = (dynattn.create_model(name, variant=variant) for variant in ("official", "paper"))
    both = [sum(p.numel() for p in model.parameters()) for model in (official, paper)]
    rows.append((f"`{name}`", *(f"{number:,}" for number in both), f"{(both[1] - both[0]) / both[0]:+.3%}"))
table(("parameters", "`variant=\"official\"`", "`variant=\"paper\"`", "difference"), rows)
one, two = (dynattn.create_model("debiformer_tiny", offset_channels=channels) for channels in (1, 2))
offset_parameters = sum(p.numel() for p in two.parameters()) - sum(p.numel() for p in one.parameters())
groups = dynattn.create_model("debiformer_base", groups=(1, 2, 4, 8))
base_paper_groups = sum(p.numel() for p in groups.parameters())

# %% [markdown]
# ## Equal to the published code
#
# The weights here are a function of an entry's published name and shape alone. So they can be given to the authors'
# code and to ours. The authors' code was run once in double precision; DeBiFormer's after two repairs without which it
# does not run (see the ledger). Below are the first of its logits as plain numbers.

# %%
source(deterministic, published_state)
PUBLISHED = {
    "biformer_tiny": [143.2718488881, -47.62240892183, -42.28775969353, -9.454278888862],
    "debiformer_tiny": [-14.59986553721, -29.25137325869, 20.24340040425, 4.047617841778],
}
image, rows = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 224, 224))), []
for name, want in PUBLISHED.items():
    model = dynattn.create_model(name).eval()
    state = published_state(model)
    dynattn.load_official(model.double(), state)
    with torch.no_grad():
        logits = model(image)[0]
    apart = float((logits[:4] - torch.tensor(want, dtype=torch.float64)).abs().max() / logits.std())
    assert apart < 1e-9
    rows += [(f"`{name}`", f"{a:.8f}", f"{float(b):.8f}", f"{apart:.0e}") for a, b in zip(want, logits, strict=False)]
table(("", "published", "ours", "largest difference of the four, in standard deviations of the logits"), rows)

# %% [markdown]
# How much would a misreading change? Each makes one change in DeBiFormer-T, under the same weights.

# %%
rows, right = [], logits
CHANGES = {
    "logits divided by the root of the head's width (the text)": dict(scale="head"),
    "no LayerNorm before the agents' keys and values (the text)": dict(agent_norm=False),
    "one region fewer for each agent": dict(agent_topk=(3, 7, 15, 48)),
    "the same k in all stages": dict(topk=(4, 4, 4, 49)),
    "four times four regions": dict(regions=4),
}
for what, options in CHANGES.items():
    model = dynattn.create_model("debiformer_tiny", **options).eval().double()
    own = model.state_dict()
    names = {name: entry.name for name, entry in model.published_entries().items()}
    ours = {name: state[names[name]].reshape(own[name].shape) for name in own}
    model.load_state_dict(ours)
    with torch.no_grad():
        change = float((model(image)[0] - right).norm() / right.norm())
    assert change > 1e-6
    rows.append((what, f"{change:.1%}"))
table(("misreading", "change of the logits, of their norm"), rows)

# %% [markdown]
# ## Trained
#
# `biformer_mini` and `debiformer_mini` are these modules on small pictures of shapes in front of photographs, trained
# alike. `dynattn figures --paper debiformer` draws the paper's figures 4, 5 and 6 with them, and measures them beside
# two nulls: random weights, and another image's mask.

# %%
figures = recorded("debiformer")
measured(figures)

# %% [markdown]
# ![Figure 4](../../figures/debiformer_4_class_maps.png)
#
# ![Figure 6](../../figures/debiformer_6_class_maps_by_stage.png)
#
# ![Figure 5](../../figures/debiformer_5_receptive_fields.png)
#
# Class maps and receptive fields are functions of any model with stages, of ours and of timm's. Here they are, live, of
# both networks on one image:

# %%
rows = []
for name in ("biformer_mini", "debiformer_mini"):
    network = dynattn.create_model(name, pretrained=True)
    mask = test_picture(22, (128, 128)).mask[::4, ::4]
    for method in ("hires", "grad"):
        maps = [class_map(network, picture.x, stage=stage, method=method) for stage in range(3)]
        rows.append((f"`{name}`", method, *(f"{share_under(one, mask):.0%}" for one in maps)))
table(("", "method", "class map of stage 1 on the object", "stage 2", "stage 3"), rows)
say(f"The object covers {mask.mean():.0%} of the image.")

# %%
rows = []
for name in ("biformer_mini", "debiformer_mini", "swin_mini"):
    network = dynattn.create_model(name, pretrained=True)
    field = contribution(receptive_field(network, [test_picture(i, (128, 128)).x for i in range(4)]))
    rows.append((f"`{name}`", *(f"{side:.0%}" for side in field.values())))
table(("central square that holds", *(f"{share:.0%} of the contribution" for share in field)), rows)

# %% [markdown]
# What these numbers do **not** show:
#
# - An object here stands out by its colour. To find it is not recognition.
# - A class map of the last stage says little: attention has mixed the whole image before. The figures say which stage
#   they take.
# - Both networks differ from the paper's models in size.
#
# ## The ledger
#
# These are the places where text and published code part, or the paper contradicts itself. The rows are in
# `dynattn/papers/debiformer.toml`.

# %%
first_agent = core.to_pixels(core.grid_points((7, 7), "centre", torch.zeros(1)), (7, 7))[0, 0]
ledger(
    "debiformer",
    offset_parameters=f"{offset_parameters:,}",
    base_paper_groups=f"{base_paper_groups:,}",
    base=f"{counts['debiformer_base'][0]:,}",
    first_agent=f"{float(first_agent):.2f}",
    base_stage_4=f"{counts['debiformer_base'][1] / 1e6:.1f} M",
    printed_bound=f"{printed / 1e6:.2f} M",
    bounded=f"{bounded / 1e6:.2f} M",
    right_bound=f"{right_bound / 1e6:.2f} M",
    complete=f"{complete / 1e6:.1f} M",
    formula=f"{formula / 1e6:.1f} M",
    dense=f"{dense / 1e6:.1f} M",
)

# %% [markdown]
# ## A longer exercise
#
# **Write `bilevel_attention`**: maps in, maps out. `verify.check` says what is wrong, and names the mistake if it knows
# it. This attempt, for example, forgets something:


# %%
def bilevel_attention(q, k, v, query_shape, key_shape, regions, topk, scale=None):
    """Somebody's attempt."""
    ours, theirs = core.Regions(query_shape, regions), core.Regions(key_shape, regions)
    routes = bilevel.route(ours.means(q), theirs.means(k), topk)
    return ours.join(ops.routed_attention(ours.cut(q), theirs.cut(k), theirs.cut(v), routes, scale=scale))


try:
    verify.check("bilevel_attention", bilevel_attention)
except verify.Mismatch as mismatch:
    print(mismatch)
    assert "padding is read" in mismatch.mistakes

# %% [markdown]
# **First.** Mend the attempt. **Second.** Write it without `core.Regions`: which axes does `rearrange` move? **Third.**
# What happens to the output if two regions have the same mean key?
#
# <details><summary>Answers</summary>
#
# A mask of the keys that are cells of the map mends it: `theirs.inside(k)`, for all images. And `rearrange` splits rows
# and columns into region and place, and brings both region axes to the front. Two regions with the same mean have the
# same affinity; the one with the lowest number comes first. Without a rule two correct programs can disagree.
#
# </details>


# %%
def mended(q, k, v, query_shape, key_shape, regions, topk, scale=None):
    ours, theirs = core.Regions(query_shape, regions), core.Regions(key_shape, regions)
    routes, inside = bilevel.route(ours.means(q), theirs.means(k), topk), theirs.inside(k)
    q, k, v = ours.cut(q), theirs.cut(k), theirs.cut(v)
    key_mask = None if inside is None else inside.expand(len(q), -1, -1)
    return ours.join(ops.routed_attention(q, k, v, routes, key_mask=key_mask, scale=scale))


verify.check("bilevel_attention", mended)
say("It passes: outputs and gradients.")
