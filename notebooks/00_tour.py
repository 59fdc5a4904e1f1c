# %% [markdown]
# # A tour of dynattn
#
# In most vision transformers, what a token may read is settled before the network sees an image: everything, or the
# tokens of its window. In **dynamic attention** the image decides.
#
# dynattn writes such mechanisms out as scalar loops beside the equations of their papers, as PyTorch, and as whole
# models that load the published checkpoints, and holds each form equal to the others: outputs, gradients, logits.
#
# The tour takes five minutes. It runs on a laptop without a network, and every number in it comes from the cell above.

# %%
import io
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython.display import Image, display

import dynattn
from dynattn import cost, ops, verify, weights
from dynattn.data import CLASSES, Shapes
from dynattn.figures import style
from dynattn.figures.dat import draw_query, queries
from dynattn.figures.measures import attention_share, others, points_share, references_share, under
from dynattn.figures.notebook import GALLERY, HEAT, measured, recorded, say, set_up, show, source
from dynattn.figures.subjects import test_picture
from dynattn.training import get_recipe
from dynattn.widgets import Lens

set_up()
plt.rcParams["figure.dpi"] = 100

# %% [markdown]
# ## One idea
#
# An attention mechanism is a rule that gives every query **positions** to read and **weights** for them. Whatever the
# rule, a head then sums values with these weights, so all of it is one matrix times the values of the tokens:
#
# $$\text{out} = A_\text{eff}\, V$$
#
# with a row of $A_\text{eff}$ for each query and a column for each token of the map.
#
# | mechanism | which positions a query reads | decided by | code |
# | --- | --- | --- | --- |
# | dense (ViT) | all tokens | nothing | `core.py` |
# | window, shifted window (Swin) | the tokens of its window | where the query is | `mechanisms/window.py` |
# | spatial reduction (PVT) | all tokens of a coarser map | nothing | `mechanisms/baselines.py` |
# | **deformable (DAT)** | a few points between tokens, the same for all | the image | `mechanisms/deformable.py` |
# | Deformable-DETR's | a few points of its own | the query | `mechanisms/deformable_detr.py` |
# | **dynamic groups (DGT)** | keys that its group selected | queries alike | `mechanisms/dynamic_group.py` |
#
# Here is the same small network with one attention layer of each kind and random weights. `trace` runs it on an
# image and keeps a record of the layer: what a query reads, and the matrix.

# %%
SCENE, SIDE = 22, 64
LAYER = dict(img_size=SIDE, depths=(1,), dims=(32,), heads=(2,), groups=(1,), kernels=(5,), offset_zero_init=False)
MECHANISMS = {
    "dense": dict(blocks=[["window"]], window=16),  # one window as large as the map
    "window": dict(blocks=[["window"]], window=8),
    "shifted window": dict(blocks=[["shifted"]], window=8),
    "spatial reduction": dict(blocks=[["sra"]], sra_ratios=(4,)),
    "deformable": dict(blocks=[["deformable"]], strides=(4,)),
    "Deformable-DETR": dict(blocks=[["deformable_detr"]], detr_points=(8,)),
}

scene = Shapes("easy", "test", SIDE)[SCENE][0]
sharp, _, sharp_mask = (part.numpy() for part in map(torch.as_tensor, Shapes("easy", "test", 512)[SCENE]))
sharp = np.moveaxis(sharp, 0, -1)  # the same scene for the pictures, which the network sees at a lower resolution
query = (40, 34)  # a pixel of the image: row, column

records = {}
for name, options in MECHANISMS.items():
    torch.manual_seed(1)
    network = dynattn.create_model("dat_mini", **LAYER | options)
    with torch.no_grad():  # random weights hardly prefer one key to another: exaggerate
        for part in network.stages[0].blocks[0].attn.children():
            part.weight.mul_(4) if isinstance(part, torch.nn.Linear) else None
    (records[name],) = dynattn.trace(network, scene)

torch.manual_seed(1)
network = dynattn.create_model("dgt_mini", img_size=SIDE, depths=(1, 1), dims=(32, 64), heads=(2, 4), groups=6, keys=32)
records["dynamic groups"] = dynattn.trace(network, scene).of_kind("dynamic_group")[0]

figure, axes = plt.subplots(2, 7, figsize=(16, 4.9), layout="constrained")
for column, (name, record) in zip(axes.T, records.items(), strict=True):
    column[0].set_title(name)
    style.photograph(column[0], sharp, (SIDE, SIDE))
    keys = record.keys(*query)
    column[0].scatter(*keys.xy.T, s=400 * keys.weight / keys.weight.sum() + 3, color=style.ORANGE, linewidths=0)
    style.star(column[0], *query[::-1])
    matrix = record.effective_matrix().sqrt()
    column[1].imshow(matrix, cmap=HEAT, vmin=0, vmax=matrix.max(), interpolation="nearest")
    column[1].axhline(record.query(*query), color=style.RED, linewidth=1.2)
    column[1].set(xticks=[], yticks=[], xlabel=r"tokens")
axes[1, 0].set_ylabel("queries")
show(figure)

# %% [markdown]
# Above: what the query at the star reads. Below: $A_\text{eff}$, dark where the weight is large (square root, so that
# small ones show), the star's row in red. A window is a block on the diagonal. DAT's points are the same for all
# queries, so its matrix has **columns**; in Deformable-DETR every query has points of its own, which gives diagonals.
# DGT's matrix has columns as well, others for each group of queries.
#
# That the matrix explains the layer is not a figure of speech:

# %%
rows = [
    "| mechanism | queries × tokens | what $A_\\text{eff} V$ leaves unexplained | the record says |",
    "| --- " * 4 + "|",
]
for name, record in records.items():
    A, V, out = record.effective_matrix(head=1), record.value(head=1), record.output(head=1)
    rest = float((out - A @ V).norm() / out.norm())
    assert rest < 1e-5 or not record.exact
    rows.append(f"| {name} | {len(A)} × {len(V)} | {rest:.1e} | {'exact' if record.exact else 'not exact'} |")
say("\n".join(rows))

# %% [markdown]
# Spatial reduction is the exception that says so. The product fits, but its $V$ is not made of the tokens' own values:
# these pass a strided convolution, so what stands there are the coarser map's tokens, repeated over their cells.
#
# ## A trained model
#
# `dat_mini` ships trained with the package: DAT's modules in small, for pictures of simple shapes before photographs.

# %%
model = dynattn.create_model("dat_mini", pretrained=True)
story = weights.read(weights.path("dat_mini"))[1]
image, label, mask = Shapes("easy", "test", 128)[SCENE]
trace = dynattn.trace(model, image)  # or a path, a PIL image, an array

parameters = sum(p.numel() for p in model.parameters())
say(
    f"{parameters:,} parameters, made by `{story['command']}`; right on {story['accuracy']:.1%} of test images, "
    f"whose photographs it has never seen. This one it takes for a **{CLASSES[int(trace.logits.argmax())]}** "
    f"(it is a {CLASSES[label]})."
)

rows = ["| layer | kind | queries | heads | keys of a query |", "| --- " * 5 + "|"]
for name in trace.layers:
    record = trace[name]
    H, W = record.query_shape
    rows.append(f"| `{name}` | {record.kind} | {H} × {W} | {record.heads} | {len(record.keys(60, 60).weight)} |")
say("\n".join(rows))

# %% [markdown]
# ## Ask a pixel
#
# Which keys does the query at a pixel read, and how much of each? Change `row` and `col` and run the cell again.

# %%
row, col = (int(x) for x in mask.nonzero().float().mean(dim=0))  # the middle of the object

asked = {
    "a window": trace["stages.1.blocks.0.attn"],
    "the next layer: deformed points": trace["stages.1.blocks.1.attn"],
    "the same on the coarser map": trace["stages.2.blocks.1.attn"],
}


def share_on(mask, record, row: float, col: float) -> float:
    """The attention of a query that falls on the object, the mean over heads."""
    keys = [record.keys(row, col, head) for head in range(record.heads)]
    return float(np.mean([one.weight @ under(mask.float(), one.xy) for one in keys]))


def draw_points(ax, record) -> None:
    """Lines from the regular grid to where the points went, a colour for each group."""
    for group in range(record.groups):
        style.lines(ax, record.references_xy().numpy(), record.points_xy(group).numpy(), style.GROUPS[group])


figure, axes = plt.subplots(1, 3, figsize=(15, 5.3), layout="constrained")
for ax, (title, record) in zip(axes, asked.items(), strict=True):
    style.photograph(ax, sharp, (128, 128))
    style.outline(ax, sharp_mask, (128, 128))
    if record.kind == "deformable":
        draw_points(ax, record)
    draw_query(ax, record, row, col)
    ax.set_title(f"{title}, {share_on(mask, record, row, col):.0%} on the object")
show(figure)

_, deformable, _ = asked.values()
keys = deformable.keys(row, col, head=0)
best = keys.weight.argsort(descending=True)[:3]
found = ", ".join(f"({x:.1f}, {y:.1f}): {w:.2f}" for (x, y), w in zip(keys.xy[best], keys.weight[best], strict=True))
say(
    f"The object covers {float(mask.float().mean()):.0%} of the image. Area of a dot: attention, mean over heads. "
    f"Lines: from the regular grid to where the offset network has moved the points, a colour for each group. As "
    f"numbers, `deformable.keys(row, col, head=0)`: the heaviest at (x, y): {found}."
)

# %% [markdown]
# Two of these layers as matrices, the mean of their heads:

# %%
figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
for pair, record in zip(axes.reshape(2, 2), list(asked.values())[:2], strict=True):
    A = torch.stack([record.effective_matrix(head) for head in range(record.heads)]).mean(dim=0)
    pair[0].imshow(A.sqrt(), cmap=HEAT, interpolation="nearest")
    pair[0].axhline(record.query(row, col), color=style.RED, linewidth=1.2)
    pair[0].set(title=f"{record.kind}, $A_\\mathrm{{eff}}$", xlabel="tokens", ylabel="queries", xticks=[], yticks=[])
    pair[1].imshow(A[record.query(row, col)].reshape(record.query_shape).sqrt(), cmap=HEAT, interpolation="nearest")
    pair[1].set(title="the red row, as a map", xticks=[], yticks=[])
show(figure)

for title, record in asked.items():
    rest = max(record.rest(head) for head in range(record.heads))
    assert rest < 1e-5 or not record.exact
    claim = "exact" if record.exact else "not exact"
    say(
        f"{title} (`{record.name}`), {claim}: $A_\\text{{eff}} V$ leaves {rest:.1e} of the output unexplained at worst."
    )

# %% [markdown]
# These deformable layers have two groups of points, and the value projection mixes their channels: a head's value at
# one of its points holds what the other group read at its own. The matrix has the points of the head's own group, which
# the position bias goes by; [01_dat](01_dat.ipynb) writes the layer as a sum over groups, which is exact.
#
# %% [markdown]
# ## Through all layers
#
# A rollout multiplies the matrices of all layers, half of each being the residual connection. What comes out is where
# the network's last layer got what it knows about a pixel. It sums to one, whatever the mechanisms on the way.

# %%
far = (16, 112) if float(mask[:32, 96:].float().mean()) == 0 else (112, 16)
figure, axes = plt.subplots(1, 2, figsize=(10, 5.3), layout="constrained")
for ax, (r, c), title in zip(axes, [(row, col), far], ["a query on the object", "a query off it"], strict=True):
    heat = trace.rollout(r, c)
    assert abs(float(heat.sum()) - 1) < 1e-5
    style.photograph(ax, sharp, (128, 128))
    shade = (heat / heat.max()).sqrt().numpy()  # so that small shares show
    ax.imshow(shade, cmap="inferno", alpha=0.9 * shade**0.5, vmin=0, vmax=1)
    style.outline(ax, sharp_mask, (128, 128))
    style.star(ax, c, r)
    ax.set_title(f"{title}: {float(heat[mask].sum()):.0%} from the object")
show(figure)

# %% [markdown]
# ## Dense, window, deformable, groups
#
# `vit_mini`, `swin_mini` and `dgt_mini` ship beside `dat_mini`: about as many parameters, one recipe, the same images.
# What differs is what a query may read. Each is shown by one of its layers on the map of `16 × 16` tokens: the one with
# most attention on the object, relative to another image's mask: chosen on some images, measured on others. That is its
# best layer, not a typical one.

# %%
KINDS = {"vit_mini": "dense", "swin_mini": "window", "dat_mini": "deformable", "dgt_mini": "dynamic_group"}
COUNT, CHOOSE, WIDE = 24, 8, 512  # test images that are measured, and that choose layers; the side of a large image

models = {name: dynattn.create_model(name, pretrained=True) for name in KINDS}
accuracy = {name: weights.read(weights.path(name))[1]["accuracy"] for name in KINDS}
macs = {name: cost.count(network, 128).macs for name, network in models.items()}
wide = {name: cost.count(dynattn.create_model(name, img_size=WIDE).to("meta"), WIDE).macs for name in KINDS}

images = range(CHOOSE + COUNT)
pictures = [test_picture(i, (128, 128)) for i in images]  # what a model sees, what is shown, where the object is
traces = {name: [dynattn.trace(network, one.x) for one in pictures] for name, network in models.items()}
masks = torch.stack([Shapes("easy", "test", 128)[i][2] for i in images])
own, other = list(masks.float()), [others(masks, i) for i in images]  # other: the mean of all other masks
choosing, measured_on = slice(CHOOSE), slice(CHOOSE, None)


def on_average(share, name: str, layer: str, masks, some: slice = measured_on) -> float:
    """A share of what a layer does that lies on the object: the mean over some test images."""
    return float(np.mean([share(t[layer], mask) for t, mask in zip(traces[name][some], masks[some], strict=True)]))


def ratio(name: str, layer: str) -> float:
    """What chooses a layer: attention on the object over that on another image's."""
    on_it, chance = (on_average(attention_share, name, layer, under_it, choosing) for under_it in (own, other))
    return on_it / chance


found, shown = {}, {}
for name, kind in KINDS.items():
    t = traces[name][0]
    found[name] = {
        layer: [on_average(attention_share, name, layer, under_it) for under_it in (own, other)] for layer in t.layers
    }
    layers = [record.name for record in t.of_kind(kind) if record.query_shape == (16, 16)]
    shown[name] = max(layers, key=partial(ratio, name))

on, off = queries(pictures[SCENE])
rows = [
    f"| model | accuracy | multiply-adds | at {WIDE} × {WIDE} | layer shown | keys, in a head | on the object |",
    "| --- " * 7 + "|",
]
for name, layer in shown.items():
    attention, chance = found[name][layer]
    rows.append(
        f"| `{name}` | {accuracy[name]:.1%} | {macs[name] / 1e9:.2f} G | {wide[name] / 1e9:.1f} G | `{layer}` "
        f"| {len(traces[name][SCENE][layer].keys(*on).weight)} | {attention:.0%}, another image's mask: {chance:.0%} |"
    )
say("\n".join(rows))
say(
    f"Accuracy: {get_recipe('vit_mini').test_count:,} test images, one seed of each network. On the object: attention "
    f"of all queries and heads, mean over {COUNT} test images; {CHOOSE} others chose the layer."
)

# %% [markdown]
# Two queries, placed by the mask alone: the object's pixel nearest to its middle, and one as far from it as can be.

# %%
figure, axes = plt.subplots(2, 4, figsize=(15, 8.1), layout="constrained")
for column, name in zip(axes.T, KINDS, strict=True):
    record = traces[name][SCENE][shown[name]]
    column[0].set_title(f"{KINDS[name].replace('_', ' ')}: {name}", fontsize=15)
    for ax, place in zip(column, (on, off), strict=True):
        style.photograph(ax, pictures[SCENE].shown, (128, 128))
        style.outline(ax, pictures[SCENE].mask, (128, 128))
        if record.kind == "deformable":
            draw_points(ax, record)
        draw_query(ax, record, *place)
        ax.set_xlabel(f"{share_on(mask, record, *place):.0%} on the object", fontsize=15)
axes[0, 0].set_ylabel("query on the object", fontsize=15)
axes[1, 0].set_ylabel("query in the background", fontsize=15)
show(figure)

asked = {  # both queries in every test image that did not choose
    name: np.mean(
        [
            [share_on(mask, t[shown[name]], *place) for place in queries(one)]
            for one, mask, t in list(zip(pictures, masks, traces[name], strict=True))[measured_on]
        ],
        axis=0,
    )
    for name in KINDS
}
both = ", ".join(f"`{name}` {first:.0%} and {second:.0%}" for name, (first, second) in asked.items())
for name in ("vit_mini", "dat_mini"):
    assert asked[name][0] < 0.5 < asked[name][1]
say(
    f"Area of a dot: attention, at one scale. Mean over {COUNT} test images of what these two queries put on the "
    f"object: {both}. In the dense and the deformable layer the background looks at the object, and a query on it "
    f"mostly looks away."
)

# %% [markdown]
# And all layers, not the best alone:

# %%
figure, ax = plt.subplots(figsize=(11, 3.8), layout="constrained")
for name, colour, marker in zip(KINDS, (style.INK, style.BLUE, style.ORANGE, "#009E73"), "osD^", strict=True):
    attention, chance = np.array(list(found[name].values())).T
    depth = (np.arange(len(attention)) + 0.5) / len(attention)
    ax.plot(depth, chance, color=colour, linestyle=":")
    ax.plot(depth, attention, color=colour)
    for x, y, record in zip(depth, attention, traces[name][SCENE], strict=True):
        tokens = record.query_shape[0] * record.query_shape[1]
        anywhere = record.kind in ("deformable", "dynamic_group") or len(record.keys(*on).weight) == tokens
        ax.plot(x, y, marker, markersize=10, color=colour if anywhere else style.PAPER, markeredgecolor=colour)
    place = dict(textcoords="offset points", va="center", color=colour, fontsize=13)
    ax.annotate(name, (depth[-1], attention[-1]), (12, 0), **place)
ax.annotate("another image's mask", (0.96, chance[-1]), (8, 0), **place | {"color": style.GREY})
ax.set(xlim=(0, 1.16), ylim=(0, 0.85), xticks=[0.05, 0.95], xticklabels=["first layer", "last layer"])
ax.set_ylabel("attention on the object")
ax.spines[["top", "right"]].set_visible(False)
plt.close(figure)
display(figure)

assert macs["vit_mini"] == max(macs.values()) and wide["vit_mini"] > 5 * sorted(wide.values())[-2]
assert accuracy["dgt_mini"] > accuracy["vit_mini"] > accuracy["dat_mini"] > accuracy["swin_mini"]
assert max(own for layer, (own, _) in found["swin_mini"].items() if "layers.2" not in layer) < 0.25
moved = [
    f"`{record.name}` {on_average(points_share, 'dat_mini', record.name, own):.0%} "
    f"({on_average(references_share, 'dat_mini', record.name, own):.0%})"
    for record in traces["dat_mini"][SCENE].of_kind("deformable")
]
say(f"Points of `dat_mini` that lie on the object (of the grid that they start from): {', '.join(moved)}.")

# %% [markdown]
# Filled: a query may read from the whole map, also in the last layers of Swin and DAT, where one window is the map.
#
# - **Dense** attention reads everything. But every query pays for every token: the most multiply-adds of all, and many
#   times as many as the others' in a larger image.
# - **Windows** (of a shifted layer, smaller at the rim) cost least as images grow, and the query in the background
#   cannot read an object outside its own. Swin finds it only where one window has become the whole map.
# - **Deformable** attention reads as few keys as a window holds, but from anywhere, and finds the object a stage before
#   Swin does. Its points have hardly gathered there, on the coarser map a little more: mostly it is the weights that
#   choose among them. As its grid has a fixed stride, points grow in number with the image, and so does the cost.
# - **Dynamic groups** read a fixed number of keys from anywhere, other ones for each group of queries, and are the most
#   accurate here, with one seed of each network and convolutions of their own in every block (the paper's). Their cost
#   grows with the number of queries alone; what grows faster in `dgt_mini` is its last stage, which is dense.
#
# ## The lens
#
# The same four, live: click a pixel or take the arrow keys, choose layers and heads, fade from attention to rollout.
# Without a kernel you see its picture. `lens.save("lens.html")` writes a page that answers clicks with no kernel and no
# network.

# %%
record = traces["dat_mini"][SCENE][shown["dat_mini"]]
x, y = record.cells()[record.query(*off)].tolist()  # the middle of the query's cell
lens = Lens(models, pictures[SCENE].shown, row=y, col=x, layer=list(shown.values()))
display(lens)

# %% [markdown]
# ## The published models
#
# The large models are the published ones: the same parameters, the same multiply-adds, and the same logits under the
# same weights (notebook [01_dat](01_dat.ipynb) shows it).

# %%
rows = ["| model | learned parameters | the paper | multiply-adds | the paper |", "| --- " * 5 + "|"]
for name in ("dat_tiny", "dat_small", "dat_base"):
    counted = cost.count(dynattn.create_model(name).to("meta"), 224)  # shapes only: nothing is computed
    said = cost.published(name)
    rows.append(
        f"| `{name}` | {counted.params:,} | {said['params_M']} M "
        f"| {counted.macs_fvcore / 1e9:.2f} G | {said['macs_G']} G |"
    )
say("\n".join(rows))
say(f"`dynattn.list_models()`: {', '.join(f'`{name}`' for name in dynattn.list_models())}")

# %% [markdown]
# With a checkpoint from the authors, one line fills them:
#
# ```python
# model = dynattn.load_official(dynattn.create_model("dat_tiny"), "dat_tiny_in1k_224.pth")
# ```
#
# The file is read without running any code in it, every entry must fit, and a model is either filled whole or left as
# it was. For images of another size the position tables are resized. Where the paper's text and its code disagree, the
# models follow the code, and `variant="paper"` follows the text.
#
# ## The figures
#
# `dynattn figures` draws the papers' figures and measures each beside what random weights give, and the mask of another
# image. `dynattn figures --image cat.jpg --weights dat_tiny_in1k_224.pth` draws them for a photograph
# and a checkpoint of yours. These are the shipped ones, in small:

# %%
figures = {f"{paper.upper()} {n}": entry for paper in ("dat", "dgt") for n, entry in recorded(paper).items()}
pictures = [PIL.Image.open(GALLERY / entry["file"]).convert("RGB") for entry in figures.values()]
for picture in pictures:
    picture.thumbnail((640, 900))
heights = [40 + max(pair.height for pair in pictures[i : i + 2]) for i in range(0, len(pictures), 2)]
wall = PIL.Image.new("RGB", (2 * 640 + 40, sum(heights)), "white")
for i, picture in enumerate(pictures):
    wall.paste(picture, (i % 2 * 680, sum(heights[: i // 2])))
small = io.BytesIO()
wall.save(small, format="jpeg", quality=85)
display(Image(small.getvalue()))
measured(figures)

# %% [markdown]
# ## How it is kept true
#
# The loops are the specification: one number at a time, with the letters of the equations. Everything faster is
# compared with them on random cases, outputs and every gradient, in double precision: PyTorch and the Numba kernels
# here, the Triton kernels in the tests.

# %%
source(dynattn.core.sample_points_loops)
for name in verify.operations():
    verify.check(name, getattr(ops, name))  # random cases; raises at the first number that is off
say(f"Equal to their loops: {', '.join(f'`{name}`' for name in verify.operations())}.")

verify.check("deformable_attention", partial(ops.deformable_attention, impl="numba"))
call = verify.case("deformable_attention", seed=0)
by_loops, by_kernel = (
    ops.deformable_attention(*call.arguments.values(), **call.options, impl=impl) for impl in ("loops", "numba")
)
say(f"The kernel, too: in one such case the largest difference is {float((by_loops - by_kernel).abs().max()):.0e}.")

# %% [markdown]
# The same oracle reads what you write. Where it is wrong, it looks for the simplest case that shows it, and for a
# mistake it knows that gives the same wrong numbers:


# %%
def mine(x, points):
    """Feature maps at points (row, col)."""
    return torch.nn.functional.grid_sample(x, points[:, None], align_corners=True)[:, :, 0]


try:
    verify.check("sample_points", mine)
except verify.Mismatch as mismatch:
    say(f"```text\n{mismatch}\n```")

# %% [markdown]
# ## Where to go next
#
# - [01_dat](01_dat.ipynb), [04_dgt](04_dgt.ipynb): a paper each, from its first equation to its last figure, with the
#   places where it contradicts itself or its code.
# - `dynattn/mechanisms/deformable.py`, `dynattn/mechanisms/dynamic_group.py`: a mechanism in one file, to be read top
#   to bottom beside the paper.
# - `Lens(your_model, "photo.jpg")`: models of timm's, too.
# - `dynattn check answers.py`: write the operations yourself, in a file, and have them checked; the command says where
#   and why one is wrong.
# - `dynattn bench ops`: what the kernels save, in time and memory, on your machine.
# - `dynattn figures --image photo.jpg`, `dynattn table`, `dynattn train dat_mini`: each explains itself with `--help`.
