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
import inspect
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from IPython.display import Image, Markdown, display
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import dynattn
from dynattn import cost, ops, verify, weights
from dynattn.data import CLASSES, Shapes
from dynattn.figures import style
from dynattn.figures.dat import draw_query

torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other
plt.rcParams.update({"figure.dpi": 100, "font.size": 12, "axes.titlesize": 13, "text.color": style.INK})


HEAT = LinearSegmentedColormap.from_list("heat", ["white", style.ORANGE, "#8A2B06", "#1A0800"])


def say(text: str) -> None:
    """Text with computed numbers in it."""
    display(Markdown(text))


def show(figure: Figure) -> None:
    """A figure of photographs, as JPEG: a fifth of the size."""
    plt.close(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="jpeg", dpi=90, bbox_inches="tight", pil_kwargs={"quality": 88})
    display(Image(picture.getvalue()))


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
#
# Here is the same small network six times, with one attention layer each and random weights. `trace` runs it on an
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

figure, axes = plt.subplots(2, 6, figsize=(15, 5.3), layout="constrained")
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


def share_on_object(record) -> float:
    """The attention of the query that falls on the object, the mean over heads."""
    keys = [record.keys(row, col, head) for head in range(record.heads)]
    pixels = [one.xy.round().long().clamp(0, 127) for one in keys]
    return float(np.mean([one.weight @ mask[xy[:, 1], xy[:, 0]].float() for one, xy in zip(keys, pixels, strict=True)]))


figure, axes = plt.subplots(1, 3, figsize=(15, 5.3), layout="constrained")
for ax, (title, record) in zip(axes, asked.items(), strict=True):
    style.photograph(ax, sharp, (128, 128))
    style.outline(ax, sharp_mask, (128, 128))
    if record.kind == "deformable":
        for group in range(record.groups):
            style.lines(ax, record.references_xy().numpy(), record.points_xy(group).numpy(), style.GROUPS[group])
    draw_query(ax, record, row, col)
    ax.set_title(f"{title}, {share_on_object(record):.0%} on the object")
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
# `dynattn figures` draws the paper's figures four to seven and measures each beside what random weights give, and the
# mask of another image. `dynattn figures --image cat.jpg --weights dat_tiny_in1k_224.pth` draws them for a photograph
# and a checkpoint of yours. These are the shipped ones, in small:

# %%
gallery = Path("../figures")
entries = json.loads((gallery / "conditions.json").read_text())
pictures = [PIL.Image.open(gallery / entry["file"]).convert("RGB") for entry in entries]
for picture in pictures:
    picture.thumbnail((640, 900))
heights = [max(pair.height for pair in pictures[i : i + 2]) for i in (0, 2)]
wall = PIL.Image.new("RGB", (2 * 640 + 40, sum(heights) + 40), "white")
for i, picture in enumerate(pictures):
    wall.paste(picture, (i % 2 * 680, (i // 2) * (heights[0] + 40)))
small = io.BytesIO()
wall.save(small, format="jpeg", quality=85)
display(Image(small.getvalue()))

rows = ["| figure | measure | trained | random weights | another image's mask |", "| --- " * 5 + "|"]
for entry in entries:
    for one in entry["measures"]:
        random = " / ".join(f"{value:.2f}" for value in one["random"].values())
        other = "" if one["other"] is None else f"{one['other']:.2f}"
        rows.append(f"| {entry['figure']} | {one['name']} | {one['trained']:.2f} | {random} | {other} |")
say("\n".join(rows))

# %% [markdown]
# ## How it is kept true
#
# The loops are the specification: one number at a time, with the letters of the equations. Everything faster is
# compared with them, outputs and every gradient, in double precision:

# %%
say(f"```python\n{inspect.getsource(dynattn.core.sample_points_loops)}```")
for name in verify.operations():
    verify.check(name, getattr(ops, name))  # random cases; raises at the first number that is off
say(f"Equal to their loops: {', '.join(f'`{name}`' for name in verify.operations())}.")

# %% [markdown]
# ## Where to go next
#
# - [01_dat](01_dat.ipynb): the paper from its first equation to its last figure, with the places where text and code
#   part.
# - `dynattn/mechanisms/deformable.py`: the mechanism in one file, to be read top to bottom beside the paper.
# - `dynattn figures --image photo.jpg`, `dynattn table`, `dynattn train dat_mini`: each explains itself with `--help`.
# - `verify.check("deformable_attention", your_function)`: write it yourself and have it checked.
