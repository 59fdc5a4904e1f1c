# %% [markdown]
# # DAT: Vision Transformer with Deformable Attention
#
# Xia, Pan, Song, Li, Huang, CVPR 2022. From the first equation to the last figure: each equation beside the code that
# is it, each claim asserted where it is made, and a ledger of the places where text and published code part.
#
# Contents: why · preliminaries · sampling · reference points and offsets · deformable attention · offset groups · cost
# · kernels · the models · the ledger · trained · the lens · Deformable-DETR's attention · exercises · solutions.
#
# Every number in the text is computed by the cell above it.

# %%
import inspect
import io
import math
import subprocess
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path
from time import perf_counter
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from IPython.display import Image, display
from matplotlib.ticker import LogLocator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynattn
from dynattn import core, cost, official, ops, verify, weights
from dynattn.bench import deformable as bench
from dynattn.data import Shapes
from dynattn.figures import dat as paper_figures
from dynattn.figures import style
from dynattn.figures.measures import evaluate_points, propagate
from dynattn.figures.notebook import (
    GALLERY,
    INKS,
    agree,
    measured,
    normal,
    recorded,
    say,
    set_up,
    shipped,
    show,
    source,
    table,
)
from dynattn.figures.subjects import sample_picture, test_picture
from dynattn.kernels import deformable as kernel
from dynattn.kernels import deformable_numba as on_cpu
from dynattn.mechanisms import deformable, deformable_detr, window
from dynattn.models.layers import Block
from dynattn.verify.registry import OPERATIONS
from dynattn.widgets import Lens

set_up()

# %% [markdown]
# ## Why: what a query reads
#
# The idea of the paper's figure 1, with trained networks: two queries, one on the object and one off it, in four kinds
# of layers. Dots: keys, their area the attention they get.

# %%
dat, swin = (dynattn.create_model(name, pretrained=True) for name in ("dat_mini", "swin_mini"))
picture = test_picture(22, (128, 128))
mask = torch.from_numpy(picture.mask[::4, ::4].copy())  # at the size that the networks see
traces = {network: dynattn.trace(network, picture.x) for network in (dat, swin)}
deformable_layers = traces[dat].of_kind("deformable")
on, off = paper_figures.queries(picture)

layers = {
    "dense": [r for r in traces[dat].of_kind("window") if r.window == r.query_shape][0],
    "window": [r for r in traces[dat].of_kind("window") if r.query_shape == (16, 16)][0],
    "shifted window": [r for r in traces[swin].of_kind("window") if r.query_shape == (16, 16) and any(r.shift)][0],
    "deformable": [r for r in deformable_layers if r.query_shape == (16, 16)][0],
}
figure, axes = plt.subplots(2, 4, figsize=(15, 7.7), layout="constrained")
for column, (name, record) in zip(axes.T, layers.items(), strict=True):
    column[0].set_title(name)
    for ax, query in zip(column, (on, off), strict=True):
        paper_figures.ground(ax, picture)
        paper_figures.draw_query(ax, record, *query)
show(figure)


# %%
def share_on_object(record, query) -> float:
    """Attention of a query that falls on the object, the mean over heads."""
    keys = [record.keys(*query, head) for head in range(record.heads)]
    pixels = [one.xy.round().long().clamp(0, 127) for one in keys]
    shares = [one.weight @ mask[xy[:, 1], xy[:, 0]].float() for one, xy in zip(keys, pixels, strict=True)]
    return float(sum(shares) / len(shares))


def positions(record, query) -> torch.Tensor:
    return record.keys(*query).xy


rows = []
for name, record in layers.items():
    here, there = positions(record, on), positions(record, off)
    same = here.shape == there.shape and bool(torch.equal(here, there))
    shares = [f"{share_on_object(record, query):.0%}" for query in (on, off)]
    rows.append((name, f"{len(here)} of {math.prod(record.query_shape)} cells", "yes" if same else "no", *shares))
table(("layer", "keys of a query", "same keys for both", "attention on the object, query on it", "query off it"), rows)
assert torch.equal(positions(layers["deformable"], on), positions(layers["deformable"], off))
say(f"The object covers {float(mask.float().mean()):.0%} of the image.")

# %% [markdown]
# Dense attention reads everything and pays for it. A window is cheap and blind to the rest. DAT asks for both: few
# keys, from the whole map, where the image is worth reading. Its points are **shared**: every query reads the same ones
# (the assertion above), which keeps the cost linear in their number. What still differs between queries are the
# weights.
#
# ## Preliminaries
#
# Multi-head self-attention, as in any transformer:
#
# $$q = xW_q,\quad k = xW_k,\quad v = xW_v \tag{DAT-1}$$
# $$z^{(m)} = \sigma\left(q^{(m)}k^{(m)\top} / \sqrt{d}\right)v^{(m)},\quad m = 1, \dots, M \tag{DAT-2}$$
# $$z = \text{Concat}\left(z^{(1)}, \dots, z^{(M)}\right)W_o \tag{DAT-3}$$
#
# The loops are the specification, one number at a time; the fast form is torch's own.

# %%
source(core.dense_attention_loops, core.dense_attention_torch)
agree(
    ops.dense_attention,
    {"q": normal(2, 2, 5, 3), "k": normal(2, 2, 4, 3), "v": normal(2, 2, 4, 3)},
    bias=normal(2, 5, 4),
)

# %% [markdown]
# One case proves little. `verify.check` draws random ones, of uneven sizes and with every option, and compares outputs
# and gradients; it raises at the first number that is off.

# %%
verify.check("dense_attention", ops.dense_attention)
verify.check("window_attention", ops.window_attention)
say(f"`verify.check` knows {', '.join(f'`{name}`' for name in verify.operations())}.")

# %% [markdown]
# The local layers of DAT are windows; their module has DAT-1 to DAT-3 in three lines. A linear map may be applied
# before or after tokens are moved into windows, and this order moves a third as much:

# %%
source(window.WindowAttention.forward)

# %% [markdown]
# A block wraps attention and a feed-forward network in normalisation and identity shortcuts:
#
# $$z'_l = \text{MHSA}(\text{LN}(z_{l-1})) + z_{l-1} \tag{DAT-4}$$
# $$z_l = \text{MLP}(\text{LN}(z'_l)) + z'_l \tag{DAT-5}$$

# %%
source(Block.forward)

# %% [markdown]
# ## Sampling
#
# Keys and values are read where points lie, between the cells:
#
# $$\Delta p = \theta_{\text{offset}}(q),\qquad \tilde{x} = \phi(x;\, p + \Delta p) \tag{DAT-7}$$
# $$\phi(z; (p_x, p_y)) = \sum_{(r_x, r_y)} g(p_x, r_x)\, g(p_y, r_y)\, z[r_y, r_x, :],\qquad
# g(a, b) = \max(0, 1 - |a - b|) \tag{DAT-8}$$
#
# The sum runs over every location of the map, and so do the loops. All but four of its terms are zero, which is what
# the fast form knows.

# %%
source(core.hat, core.read_bilinear, core.sample_points_loops, core.sample_points_torch)
agree(ops.sample_points, {"x": normal(2, 3, 4, 5), "points": torch.rand(2, 6, 2, dtype=torch.float64) * 2.4 - 1.2})
verify.check("sample_points", ops.sample_points)

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.3), layout="constrained")

p = 2.3
a = torch.linspace(-1, 5, 601)
for r, colour in zip(range(5), INKS, strict=True):
    left.plot(a, [float(core.hat(one, r)) for one in a], color=colour, linewidth=2)
    value = float(core.hat(torch.tensor(p), r))
    left.plot([p], [value], "o", color=colour, markersize=9, zorder=5) if value else None
left.axvline(p, color=style.INK, linewidth=1, linestyle="--")
left.set(title="g(a, r), one hat for each cell r", xlabel=f"a; dashed: a = {p}", ylim=(0, 1.08), yticks=[0, 0.5, 1])

row, col = 1.3, 2.6
point = torch.tensor([row, col]) * 2 / 4 - 1  # normalised
weight = core.bilinear_weights(point[None], (5, 5))[0].reshape(5, 5)
middle.scatter(*np.meshgrid(range(5), range(5)), s=14, color="#999999")
for i, j in weight.nonzero().tolist():
    middle.scatter(j, i, s=2600 * float(weight[i, j]), color=style.ORANGE, alpha=0.85, linewidths=0)
    middle.annotate(f"{float(weight[i, j]):.2f}", (j, i), ha="center", va="center", fontsize=11)
middle.plot(col, row, marker="X", markersize=13, color=style.BLUE, markeredgecolor="white", zorder=5)
middle.set(title="four cells, four products of two hats", xlim=(-0.6, 4.6), ylim=(4.6, -0.6), aspect="equal")
middle.set(xlabel="column", ylabel="row")

ones, line = torch.ones(1, 1, 5, 5), torch.linspace(-2, 6, 400)
walk = torch.stack([torch.zeros_like(line), line * 2 / 4 - 1], dim=-1)[None]
right.plot(line, ops.sample_points(ones, walk)[0, 0], color=style.ORANGE, linewidth=2.5)
right.axvspan(0, 4, color="#EEEEEE", zorder=0)
right.set(title="a map of ones, read along a row", xlabel="column; grey: between the outermost cell centres")
right.set(ylim=(0, 1.08), yticks=[0, 0.5, 1])
plt.show()

# %% [markdown]
# Left: at any place two hats are not zero, and they sum to one. Middle: in two dimensions four products. Right: there
# is no map beyond the border, so a point that leaves it reads less and less, and nothing from one cell outside.
#
# On cell centres sampling is the identity. That is the limit case to test an implementation with:

# %%
x = normal(1, 3, 6, 7)
on_centres = core.grid_points((6, 7), "corner", x)[None]
read = ops.sample_points(x, on_centres)
apart = float((read - x.flatten(2)).abs().max())
assert apart < 1e-12
say(f"Largest difference: {apart:.1e}.")

# %% [markdown]
# ## Reference points and offsets
#
# A uniform grid of references lies over the map, one for every $r \times r$ cells. The offset network looks at the
# queries around each and says where to move it: a depthwise convolution, GELU, and two numbers for each reference
# (figure 2b). Its output is bounded: $\Delta p \leftarrow s \tanh(\Delta p)$.

# %%
source(deformable.OffsetNetwork, deformable.DeformableAttention.sample)

# %% [markdown]
# Two things in here are easily read past, and the text reads differently from the code in both.
#
# **Where the references are.** The text normalises the grid so that its corners are the corners of the map, ("corner").
# The code takes the centres of cells that divide the map ("centre"), but samples with a convention where the corners
# are cell centres. So a reference without offset does not read a cell: it reads up to half a cell nearer to the middle.

# %%
H = 14
centre, corner = (
    core.to_pixels(core.grid_points((H, H), grid, torch.zeros(1)), (H, H)) for grid in ("centre", "corner")
)
index = torch.arange(H)
assert torch.allclose(centre[:H, 1], (index + 0.5) * (H - 1) / H)  # reference i reads the pixel (i + 1/2)(H - 1)/H
assert torch.allclose(corner[:H, 1], index.float())

features = normal(1, 8, H, H)
read = ops.sample_points(features, core.grid_points((H, H), "centre", features)[None])
moved = float((read - features.flatten(2)).norm() / features.norm())
say(
    f"On a map of {H} cells the first reference reads pixel {centre[0, 1]:.2f} and the last {centre[-1, 1]:.2f}, not "
    f"0 and {H - 1}. Of white noise, sampling without any offset then changes {moved:.0%} (norm of the difference)."
)

# %% [markdown]
# **What a unit of $s$ is.** The text calls fourteen the largest reasonable $s$ on a map of fourteen cells: a unit is a
# cell. In the code a unit is $1/H_G$ of coordinates that span two: half a cell.


# %%
def farthest(s: float, **reading) -> float:
    """How far, in pixels, points get when the offset network shouts."""
    layer = deformable.DeformableAttention(8, 2, 1, (H, H), offset_range=s, **reading)
    x = torch.randn(1, H, H, 8)
    with torch.no_grad():
        layer.offset.pointwise.weight.mul_(1e6)
        _, points, references = layer.sample(x, layer.q(x))
    return float((core.to_pixels(points, (H, H)) - core.to_pixels(references, (H, H))).abs().max())


CODE, TEXT = dict(reference="centre", offset_unit="half_cell"), dict(reference="corner", offset_unit="cell")
assert math.isclose(farthest(2, **CODE), (H - 1) / H, rel_tol=1e-5)
assert math.isclose(farthest(2, **TEXT), 2, rel_tol=1e-5)

READINGS = {"text": (TEXT, style.BLUE), "code": (CODE, style.ORANGE)}
figure, (places, reach, bound, ranges) = plt.subplots(1, 4, figsize=(17, 4.4), layout="constrained")
side = 6
for name, (reading, colour) in READINGS.items():
    cells = core.to_pixels(core.grid_points((side, side), reading["reference"], torch.zeros(1)), (side, side))
    size, face = (80, "none") if name == "text" else (36, colour)
    places.scatter(*cells.T.flip(0), marker="s", s=size, facecolors=face, edgecolors=colour, linewidths=1.8)
    row, col = cells[2 * side + 2].tolist()
    far = 2 if name == "text" else (side - 1) / side  # asserted above
    reach.add_patch(plt.Rectangle((col - far, row - far), 2 * far, 2 * far, facecolor=colour, alpha=0.3))
    reach.annotate(name, (col - far, row - far), (4, -14), textcoords="offset points", color=style.INK)
    reach.scatter(col, row, s=50, color=colour, edgecolors="white")
    values = [0.5, 1, 2, 4, 8, 14, 16]
    ranges.plot(values, [farthest(s, **reading) for s in values], "o-", color=colour, linewidth=2)
    ranges.annotate(name, (16, farthest(16, **reading)), (7, -4), textcoords="offset points", color=colour)
for ax, title in ((places, "where references read"), (reach, "where one point can go, s = 2")):
    ax.hlines(np.arange(side + 1) - 0.5, -0.5, side - 0.5, color="#DDDDDD", linewidth=1, zorder=0)
    ax.vlines(np.arange(side + 1) - 0.5, -0.5, side - 0.5, color="#DDDDDD", linewidth=1, zorder=0)
    ax.set(title=title, xlim=(-0.6, side - 0.4), ylim=(side - 0.4, -0.6), aspect="equal", xlabel="column", ylabel="row")
output = torch.linspace(-4, 4, 200)
for s, colour in zip((1, 2, 4), INKS[2:], strict=True):
    moves = s * output.tanh() / H * (H - 1) / 2  # normalised, then in pixels of the map
    bound.plot(output, moves, color=colour, linewidth=2)
    bound.annotate(f"s = {s}", (4, float(moves[-1])), (5, -4), textcoords="offset points", color=colour)
bound.set(title=f"s tanh(o), pixels of a map of {H}", xlabel="output o of the network", xlim=(-4, 5.6))
ranges.axvline(2, color=style.INK, linewidth=1, linestyle="--")
ranges.set(title=f"farthest move on a map of {H}", xlabel="s; dashed: the models", ylabel="pixels", xlim=(0, 19.5))
ranges.set_xticks([2, 4, 8, 14])
plt.show()

say(
    f"With $s = 2$, as in all models, a point of the code moves at most {farthest(2, **CODE):.2f} pixels of the map, "
    f"one of the text {farthest(2, **TEXT):.0f}. With $s = 14$ the code reaches {farthest(14, **CODE) / H:.0%} of it."
)

# %% [markdown]
# Do gradients reach the offset network? It has been asked; they do, through the bilinear weights and through the
# position bias, both of which change as a point moves:

# %%
layer = deformable.DeformableAttention(16, 4, 2, (8, 8)).double()
x = normal(1, 8, 8, 16)
(layer(x) * normal(1, 8, 8, 16)).sum().backward()
norms = {name: float(parameter.grad.norm()) for name, parameter in layer.offset.named_parameters()}
assert min(norms.values()) > 0
table(
    ("parameter of the offset network", "norm of its gradient"),
    [(f"`{name}`", f"{n:.2g}") for name, n in norms.items()],
)

# %% [markdown]
# ## Deformable attention
#
# $$q = xW_q,\quad \tilde{k} = \tilde{x}W_k,\quad \tilde{v} = \tilde{x}W_v \tag{DAT-6}$$
# $$z^{(m)} = \sigma\left(q^{(m)} \tilde{k}^{(m)\top} / \sqrt{d} + \phi(\hat{B}; R)\right) \tilde{v}^{(m)} \tag{DAT-9}$$
#
# $R$ is half the displacement from query to point, which stays in $[-1, 1]$ while both are on the map, and $\hat{B}$ a
# table of $(2H - 1) \times (2W - 1)$ numbers a head, read by the same $\phi$ as the features.

# %%
source(deformable.deformable_attention_loops, deformable.relative_bias, deformable.deformable_attention_torch)

# %% [markdown]
# Output and all five gradients: of queries, keys, values, points, and the table.

# %%
agree(
    ops.deformable_attention,
    {
        "q": normal(1, 4, 6, 3),
        "k": normal(1, 4, 5, 3),
        "v": normal(1, 4, 5, 3),
        "points": torch.rand(1, 2, 5, 2, dtype=torch.float64) * 2.4 - 1.2,
        "table": normal(4, 3, 5),
        "query_shape": (2, 3),
    },
)
verify.check("deformable_attention", ops.deformable_attention, cases=6)

# %% [markdown]
# And the whole module, put together by hand from DAT-6, DAT-7, DAT-9 with the loops, and DAT-3:

# %%
source(deformable.DeformableAttention.forward)
layer = deformable.DeformableAttention(8, 4, 2, (3, 4), stride=2, kernel=3).double()
x = normal(2, 3, 4, 8)
with torch.no_grad():
    sampled, points, _ = layer.sample(x, layer.q(x))  # DAT-7
    heads = partial(rearrange, pattern="B N (h d) -> B h N d", h=4)
    q, k, v = heads(layer.q(x).flatten(1, 2)), heads(layer.k(sampled)), heads(layer.v(sampled))  # DAT-6
    z = ops.deformable_attention(q, k, v, points, layer.table, (3, 4), impl="loops")  # DAT-9
    by_hand = layer.proj(core.merge_heads(z, (3, 4)))  # DAT-3
    apart = float((layer(x) - by_hand).abs().max() / by_hand.abs().max())
assert apart < 1e-12
say(f"Module against loops: {apart:.1e}.")

# %% [markdown]
# The position bias in a picture: one head's trained table, and for one query what is read from it, at the places that
# its displacements to the points say.

# %%
record = layers["deformable"]
module = dict(dat.named_modules())[record.name]
biases = module.table.detach()
head = int(biases.flatten(1).std(dim=1).argmax())  # the head whose table says most
queries = core.grid_points(record.query_shape, "centre", biases)
points = record.points[record.group(head)]
entries = core.to_pixels((queries[record.query(*on)] - points) / 2, biases.shape[1:])
read = deformable.relative_bias(record.points[None], biases, record.query_shape, "centre")[0, head, record.query(*on)]

figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.4), layout="constrained")
limit = float(biases[head].abs().max())
colours = dict(cmap="PuOr_r", vmin=-limit, vmax=limit)
left.imshow(biases[head], **colours, interpolation="nearest")
left.scatter(*entries.T.flip(0), s=26, facecolors="none", edgecolors=style.INK, linewidths=1.3)
left.set(title=f"the table of head {head}; circles: where it is read")
middle, last = (biases.shape[1] - 1) / 2, biases.shape[1] - 1
left.set_xticks([2, middle, last - 2], ["query left\nof the point", "same column", "query right\nof the point"])
left.set_yticks([0, middle, last], ["query\nabove", "same\nrow", "query\nbelow"])
style.photograph(right, picture.shown, picture.shape)
marks = right.scatter(
    *record.points_xy(record.group(head)).T, c=read, s=130, edgecolors="white", linewidths=1, **colours
)
style.star(right, on[1], on[0])
right.set_title("the bias of the query at the star, by point")
figure.colorbar(marks, ax=right, shrink=0.8, label="added to the logit")
show(figure)

# %% [markdown]
# A displacement of whole cells does not land on an entry of the table. The table counts entries from corner to corner,
# the code counts displacements in cells, and the two grids fit only at zero:

# %%
steps = torch.arange(4.0)
rows = core.to_pixels(torch.stack([steps, steps], 1) * (2 / H) / 2, (2 * H - 1, 2 * H - 1))[:, 0]
assert torch.allclose(rows, (H - 1) + steps * (H - 1) / H)
landing = ", ".join(f"{int(d)} → {float(r):.2f}" for d, r in zip(steps, rows, strict=True))
say(f"Displacement in cells → row of the table, for a map of {H}: {landing}.")

# %% [markdown]
# ## Offset groups
#
# The channels are split into $G$ groups, each with points of its own; one offset network serves all of them. Here are
# both groups of a trained layer: the same references, moved by different channels of the queries.

# %%
coarse = [r for r in deformable_layers if r.query_shape == (8, 8)][0]
figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
for ax, record in zip(axes, (layers["deformable"], coarse), strict=True):
    paper_figures.ground(ax, picture)
    paper_figures.draw_points(ax, record)
    ax.set_title(f"{record.query_shape[0]} × {record.query_shape[1]} map, {record.points.shape[1]} points a group")
show(figure)

module = dict(dat.named_modules())[layers["deformable"].name]
network = module.offset
C, G, k = module.dim, module.groups, network.depthwise.kernel_size[0]
count = sum(parameter.numel() for parameter in network.parameters())
assert count == (k * k + 1) * C // G + 2 * C // G + 2 * C // G  # convolution, LayerNorm, two numbers
between = float((layers["deformable"].points_xy(0) - layers["deformable"].points_xy(1)).norm(dim=-1).mean())
say(f"One offset network of {count:,} parameters. The two groups' points lie {between:.1f} image pixels apart.")

# %% [markdown]
# The text says that heads are "assigned to one group of deformed keys and values". The equations say something else,
# and the code follows the equations: $W_k$ and $W_v$ in DAT-6 take **all** channels of $\tilde{x}$, so a head's key
# number $n$ holds what *every* group read at its point number $n$. Only the position bias goes by the head's own group.
#
# So one matrix over the tokens explains a head fully only with a single group. With more, the layer is a sum of one
# product for each group:
#
# $$z^{(m)} = \sum_g A^{(m)} \Phi_g\, x_g W_{v,g}^{(m)} + b_v^{(m)}$$
#
# with the attention $A^{(m)}$, the bilinear weights $\Phi_g$ of the points of group $g$, its channels $x_g$ and the
# rows of $W_v$ that they meet.

# %%
record = layers["deformable"]
module, inputs = dict(dat.named_modules())[record.name], []
handle = module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
dynattn.trace(dat, picture.x)
handle.remove()
x_of = rearrange(inputs[0], "1 H W (g c) -> g (H W) c", g=record.groups)
W_of = rearrange(module.v.weight.detach(), "(h d) (g c) -> h g c d", h=record.heads, g=record.groups)
b_of = rearrange(module.v.bias.detach(), "(h d) -> h d", h=record.heads)

rows = []
for m in range(record.heads):
    A, z = record.attention[m], record.output(m)
    groups = [A @ record.reads(g) @ x_of[g] @ W_of[m, g] for g in range(record.groups)]
    apart = float((sum(groups) + b_of[m] - z).norm() / z.norm())
    assert apart < 1e-5
    rows.append((m, record.group(m), f"{record.rest(m):.2f}", f"{apart:.1e}"))
table(("head", "its group", "left unexplained by its own group's points alone", "by the sum over groups"), rows)

# %% [markdown]
# ## What it costs
#
# $$\Omega(\text{DMHA}) = \underbrace{2HWN_sC + 2HWC^2 + 2N_sC^2}_{\text{vanilla self-attention module}} +
# \underbrace{(k^2 + 2)N_sC}_{\text{offset network}} \tag{DAT-10}$$
#
# in multiply-adds, with $N_s = HW / r^2$ points and the kernel $k$ of the offset network. A counter that looks at every
# matrix product and convolution of the module agrees to the unit:


# %%
def omega(H: int, W: int, N_s: int, C: int, k: int = 5) -> tuple[int, int]:
    """DAT-10: the attention module, and the offset network."""
    return 2 * H * W * N_s * C + 2 * H * W * C**2 + 2 * N_s * C**2, (k**2 + 2) * N_s * C


layer = deformable.DeformableAttention(384, heads=12, groups=3, map_size=(14, 14), stride=2, kernel=5)
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    layer(torch.zeros(1, 14, 14, 384))
attention, overhead = omega(14, 14, N_s=49, C=384)
assert counter.get_total_flops() / 2 == attention + overhead

PRINTED = {"module": 79.63, "overhead": 5.08, "share": 6.0}  # the paper's example: H = W = 14, N_s = 49, C = 384
assert round(attention / 1e6, 2) == PRINTED["module"]
assert round(10 * overhead / 1e6, 2) == PRINTED["overhead"]
say(
    f"The paper's example, the third stage of a Swin-T: the module is {attention / 1e6:.2f} M as printed. The offset "
    f"network is {overhead / 1e6:.3f} M, and {PRINTED['overhead']} M is printed: ten times as much. Its share is "
    f"{overhead / (attention + overhead):.2%}, not {PRINTED['share']} %. The slip is against the paper: its idea is "
    f"cheaper than it says."
)

# %%
sides = np.array([7, 14, 28, 56, 112])
figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained")
window_cost = 4 * sides**2 * 384**2 + 2 * 49 * sides**2 * 384
left.loglog(sides, window_cost / 1e9, "--", color=INKS[4], linewidth=2)
left.text(125, 0.85 * window_cost[-1] / 1e9, "windows of 7 × 7", color=INKS[4])
for r, colour in zip((1, 2, 4), INKS, strict=False):
    N_s = (sides / r) ** 2
    attention, overhead = omega(sides, sides, N_s, 384)
    name = "r = 1: as many points as tokens" if r == 1 else f"r = {r}"
    left.loglog(sides, (attention + overhead) / 1e9, "o-", color=colour, linewidth=2)
    left.text(125, 0.9 * attention[-1] / 1e9, name, color=colour)
    right.semilogx(sides, 100 * overhead / (attention + overhead), "o-", color=colour, linewidth=2)
    right.text(6.7, 100 * (overhead / (attention + overhead))[0], f"r = {r}", ha="right", va="center", color=colour)
left.set(title="G multiply-adds of one layer, C = 384", xlabel="side of the map, cells", xlim=(6, 700))
right.axhline(PRINTED["share"], color=INKS[4], linestyle="--", linewidth=2)
right.text(7, PRINTED["share"] - 0.4, "as printed, for r = 2 on 14 × 14", color=INKS[4])
right.set(title="of it the offset network, %", xlabel="side of the map, cells", xlim=(5, 130), ylim=(0, 6.8))
for ax in (left, right):
    ax.minorticks_off()
    ax.set_xticks(sides, sides)
plt.show()

# %% [markdown]
# The offset network never matters. What matters is $N_s$: with $r = 1$ deformable attention is dense attention in cost,
# quadratic in the number of tokens, which the published models can afford because they use it only on the two smallest
# maps. For detection at high resolution $r$ must grow with the map.
#
# ## Kernels
#
# DAT-10 counts products. It does not count $\phi(\hat{B}; R)$ of DAT-9, one bilinear read for every head, query and
# point. The torch form makes this bias first, whole, and then adds it:

# %%
HEADS, SIDE, POINTS, BATCH = 3, 28, 196, 2


def milliseconds(calls: dict, rounds: int = 9) -> dict[str, np.ndarray]:
    """Of each call and round. They take turns, so that whatever else the machine does slows down all of them."""
    took = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first time allocates, or compiles
    for _ in range(rounds):
        for name, call in calls.items():
            start = perf_counter()
            call()
            took[name].append(1e3 * (perf_counter() - start))
    return {name: np.array(times) for name, times in took.items()}


q, k, v, points, entries = bench.inputs_of(POINTS, SIDE, BATCH, HEADS)
read_bias = partial(deformable.relative_bias, points, entries, (SIDE, SIDE), "centre")
bias = read_bias()
took = milliseconds(
    {
        "the bias": read_bias,
        "all the rest of DAT-9": partial(core.dense_attention_torch, q, k, v, bias, q.shape[-1] ** -0.5),
    }
)
assert bias.shape == (BATCH, HEADS, SIDE * SIDE, POINTS)
megabytes = bias.numel() * bias.element_size() / 2**20
table(
    ("the torch form", "ms, fastest of nine", "slowest"),
    [(name, f"{times.min():.1f}", f"{times.max():.1f}") for name, times in took.items()],
)
say(
    f"{SIDE} × {SIDE} queries, {POINTS} points, {HEADS} heads, {BATCH} images, one thread of the machine that ran this "
    f"notebook. The bias takes {megabytes:.1f} MB; queries, keys and values together take "
    f"{sum(x.numel() * x.element_size() for x in (q, k, v)) / 2**20:.1f} MB."
)

# %% [markdown]
# The kernels read the bias where it is added and never keep it: `kernels/deformable_numba.py` for the CPU,
# `kernels/deformable_triton.py` for a GPU. To the outside they are forms of the same operation, with the same judge:

# %%
agree(
    ops.deformable_attention,
    {
        "q": normal(2, 4, 6, 3),
        "k": normal(2, 4, 5, 3),
        "v": normal(2, 4, 5, 3),
        "points": torch.rand(2, 2, 5, 2, dtype=torch.float64) * 2.4 - 1.2,
        "table": normal(4, 3, 5),
        "query_shape": (2, 3),
    },
    forms=("torch", "numba"),
)
verify.check("deformable_attention", partial(ops.deformable_attention, impl="numba"), cases=6)

# %% [markdown]
# The loops are too slow for a size at which a kernel has more than one tile and block to go through. There the torch
# form, which they have proved, stands in for them:

# %%
named = zip(("q", "k", "v", "points", "table"), bench.inputs_of(POINTS, SIDE, 1, HEADS), strict=True)
large = {name: tensor.double() for name, tensor in named}
agree(ops.deformable_attention, large | {"query_shape": (SIDE, SIDE)}, forms=("numba",), judge="torch")
assert SIDE**2 > on_cpu.QUERIES and POINTS > on_cpu.KEYS

# %% [markdown]
# The same is asked of the Triton kernel in `tests/test_kernels.py`: on a GPU where there is one, else in Triton's
# interpreter, which is too slow for a notebook.
#
# ### What the kernel reads
#
# Queries stand on a regular grid. So for one key, wherever it was moved to, the places at which a row of queries reads
# the table are regular too: neighbours read neighbours. The kernel cuts the row into runs, in each of which the next
# query reads the next column, and then needs no gather: a register full of queries is two loads from one row of the
# table and two from the next.

# %%
source(on_cpu.read_bias.py_func)

# %% [markdown]
# Here is what that touches, in a trained layer, for an image twice as large as it was trained on. The runs are the
# kernel's own; reading with them gives the bias of the torch form, which is asserted for all queries and keys.

# %%
(record, *_) = dynattn.trace(dat, test_picture(22, (256, 256)).x).of_kind("deformable")
tables = dict(dat.named_modules())[record.name].table_for(record.query_shape, torch.float32).detach()
head = int(tables.flatten(1).std(dim=1).argmax())  # the head whose table says most
entries, size, side, N = tables[head].numpy(), tables.shape[1], record.query_shape[1], record.points.shape[1]
assert record.query_shape == (side, side) and entries.shape == (size, size)

places, steps, _ = kernel.table_places(record.points[None], tables, (side, side), True)
places, step = places[0, record.group(head)].numpy(), float(steps[0])  # of query (0, 0), by key; and to the next query
runs = on_cpu.room_for_runs(N, side)
on_cpu.find_runs(places, step, side, size, *runs)


def runs_of(n: int):
    """The runs of key n: queries by column, the left one of the two table columns each reads, the right one's share."""
    first, cell, part = (array[n] for array in runs)
    r = 0
    while first[r] < side:
        ahead = np.arange(first[r + 1] - first[r])
        yield first[r] + ahead, cell[r] + ahead, part[r] + (step - 1) * ahead
        r += 1


def bias_by_runs(n: int, i: int) -> np.ndarray:
    """The bias of the queries in row i for key n."""
    above, low = on_cpu.row_place(places[n, 0], step, i, size)
    line = entries[above] + (entries[above + 1] - entries[above]) * low
    return np.concatenate([line[left] + (line[left + 1] - line[left]) * share for _, left, share in runs_of(n)])


def touched(n: int, rows) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of the table that rows of queries read for key n."""
    above = [on_cpu.row_place(places[n, 0], step, i, size)[0] for i in rows]
    left = [column for _, columns, _ in runs_of(n) for column in columns]
    return tuple(np.unique([first, np.add(first, 1)]) for first in (above, left))


bias = deformable.relative_bias(record.points[None], tables, record.query_shape, "centre")[0, head]
by_runs = np.stack([[bias_by_runs(n, i) for n in range(N)] for i in range(side)])
apart = float(np.abs(rearrange(by_runs, "i n j -> (i j) n") - bias.numpy()).max() / bias.abs().max())
counts = [len(list(runs_of(n))) for n in range(N)]
assert apart < 1e-5 and max(counts) == 2

# %%
number = side * side // on_cpu.QUERIES // 2  # of a tile in the middle of the map
tile = range(number * on_cpu.QUERIES, (number + 1) * on_cpu.QUERIES)
rows = range(tile.start // side, tile.stop // side)
assert len(rows) * side == len(tile)
keys = [int(np.abs(places - place).sum(axis=1).argmin()) for place in ([3, 25], [15, 3], [27, 28])]

figure = plt.figure(figsize=(15, 6.8), layout="constrained")
panels = figure.subplot_mosaic([["table", "places"], ["table", "shares"]], width_ratios=[6.2, 8.2])
grey = dict(cmap="Greys", vmin=entries.min(), vmax=entries.max() + np.ptp(entries), interpolation="nearest")
ax = panels["table"]
ax.imshow(entries, **grey)
for n, colour in zip(keys, (INKS[0], *INKS[2:]), strict=False):
    for some, face, dashes in ((range(side), "none", (0, (4, 3))), (rows, (colour, 0.7), "solid")):
        i, j = touched(n, some)
        assert len(i) == np.ptp(i) + 1 and len(j) == np.ptp(j) + 1  # no holes
        box = (j[0] - 0.5, i[0] - 0.5), len(j), len(i)
        ax.add_patch(plt.Rectangle(*box, facecolor=face, edgecolor=colour, linewidth=2, linestyle=dashes))
    ax.text(j[0] + 0.3, i[0] - 1.1, f"key {n}", color=colour, weight="bold", fontsize=14)
ax.set(title=f"the table of head {head}, {size} × {size}", xlabel="column of the table", ylabel="row of the table")

n = keys[0]
i, j = touched(n, rows)
extent = j[0] - 0.5, j[-1] + 0.5, i[-1] + 0.5, i[0] - 0.5
level, mark = i[0] - 4, dict(edgecolors=style.INK, linewidths=0.7, zorder=4)
ax = panels["places"]
ax.imshow(entries[np.ix_(i, j)], extent=extent, **grey)
ax.hlines(i - 0.5, *extent[:2], color="white", linewidth=1.5)
ax.vlines(j - 0.5, *extent[2:], color="white", linewidth=1.5)
for (queries, left, share), colour in zip(runs_of(n), INKS, strict=False):
    for row in rows:
        ax.scatter(left + share, 0 * left + places[n, 0] + step * row, s=40, color=colour, **mark)
    ax.plot([j[0] + queries, left], [level, i[0] - 0.5], color=colour, linewidth=1.6)
    ax.scatter(j[0] + queries, 0 * queries + level, marker="s", s=90, color=colour, **mark)
    panels["shares"].plot(queries, share, "o-", color=colour, markeredgecolor=style.INK, markeredgewidth=0.7)
ax.text(extent[0], level - 1.1, f"a row of {side} queries; a line leads to the left of the two columns that each reads")
ax.set(xlim=extent[:2], ylim=(extent[2] + 0.3, level - 1), yticks=i)
ax.set_title(f"key {n}: the places that the {len(tile)} queries of the tile read", pad=30)
ax.spines[:].set_visible(False)
panels["shares"].set(ylim=(0, 1.05), yticks=[0, 0.5, 1], xlabel="column of the query")
panels["shares"].set_title("the share of the right one of the two columns")
plt.show()

block = range(0, on_cpu.KEYS)
union = {(row, column) for key in block for row in touched(key, rows)[0] for column in touched(key, rows)[1]}
say(
    f"Left: dashed, what all {side * side} queries read for a key: a window of the table, moved by where the key is. "
    f"Filled, the part of it that one tile of {len(tile)} queries reads, {len(rows)} rows of the map. Right, for one "
    f"key: queries lie {side - 1}/{side} of a column apart, so the share of the right column sinks by 1/{side} from "
    f"query to query. Where it would sink below zero, two queries have the same left column, and a new run begins (the "
    f"change of colour). A row of queries has {min(counts)} or {max(counts)} runs, for all {N} keys. The tile and the "
    f"first {len(block)} keys make {len(tile) * len(block):,} numbers of the bias out of {len(union):,} of the table's "
    f"{entries.size:,} entries."
)

# %% [markdown]
# That block of logits, bias included, is all that exists at a time. The softmax has to be taken piece by piece: for
# each query the kernel keeps the largest logit so far, the sum of the exponentials beneath it, and the output so far;
# when a block brings a larger one, sum and output shrink accordingly. Maximum and sum are kept for the backward, which
# makes the weights again from them, a block at a time.

# %%
tiles, blocks = (range(0, total, part) for total, part in ((side * side, on_cpu.QUERIES), (N, on_cpu.KEYS)))
logits = record.q[head] @ record.k[head].T * record.q.shape[-1] ** -0.5 + bias


def walk(logits: torch.Tensor) -> list[tuple[float, float]]:
    """Maximum and sum of one query's softmax, after each block of keys."""
    top, bottom, states = -math.inf, 0.0, []
    for start in blocks:
        piece = logits[start : start + blocks.step]
        old, top = top, max(top, float(piece.max()))
        bottom = bottom * math.exp(old - top) + float((piece - top).exp().sum())
        states.append((top, bottom))
    return states


query = max(tile, key=lambda query: len(set(walk(logits[query]))))
states = walk(logits[query])
top, bottom = states[-1]
assert math.isclose(top + math.log(bottom), float(logits[query].logsumexp(dim=0)), abs_tol=1e-5)

figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.4), width_ratios=[1, 1.7], layout="constrained")
LATER, DONE, edge = "white", "#DDDDDD", dict(edgecolor="#777777", linewidth=1, clip_on=False)
there = blocks[1]
for start in tiles:
    height = min(tiles.step, side * side - start)
    here = start == tile.start
    for n in blocks:
        colour = (style.ORANGE if n == there else "#FFDCA8" if n < there else LATER) if here else None
        colour = colour or (DONE if start < tile.start else LATER)
        left.add_patch(plt.Rectangle((n, start), min(blocks.step, N - n), height, facecolor=colour, **edge))
    for x, width in ((N + 14, 16), (N + 36, 16), (N + 58, 44)):
        colour = style.BLUE if here else DONE if start < tile.start else LATER
        left.add_patch(plt.Rectangle((x, start), width, height, facecolor=colour, **edge))
for x, name in ((N + 22, "max"), (N + 44, "sum"), (N + 80, "output")):
    left.text(x, -14, name, rotation=90, ha="center", va="bottom")
arrow = dict(arrowstyle="-|>", color=style.INK, linewidth=2, shrinkA=0, shrinkB=0)
middle = (tile.start + tile.stop) / 2
left.annotate("", (N + 8, middle), (there + blocks.step / 2, middle), arrowprops=arrow)
left.annotate("", (blocks.step / 2, middle + 1.5 * tiles.step), (blocks.step / 2, middle), arrowprops=arrow)
left.set(xlim=(0, N + 103), ylim=(side * side, 0), xlabel="keys", ylabel="queries", xticks=[*blocks, N])
left.set_yticks([0, tile.start, tile.stop, side * side])
left.spines[:].set_visible(False)
left.set_title(f"tiles of {tiles.step} queries, blocks of {blocks.step} keys", loc="left", pad=12)

right.plot(range(N), logits[query], "o", color="#999999", markersize=5)
for start, (top, bottom) in zip(blocks, states, strict=True):
    end = min(start + blocks.step, N)
    right.hlines(top, start - 0.5, end - 0.5, color=style.BLUE, linewidth=3)
    right.axvline(end - 0.5, color="#BBBBBB", linewidth=1)
    words, place = f"max {top:.2f}\nsum {bottom:.1f}".replace("-", "−"), dict(xycoords=("data", "axes fraction"))
    right.annotate(words, ((start + end) / 2, 1.015), ha="center", va="bottom", **place)
right.set(xlim=(-0.5, N - 0.5), xticks=[*blocks, N], xlabel="keys", ylabel="logit")
right.set_title("one query: its logits, and after each block the maximum so far, in blue", pad=46)
plt.show()

first, second = (top for top, _ in states[:2])
buffer = on_cpu.KEYS * (on_cpu.QUERIES + on_cpu.LANES) * 4
say(
    f"Left: {len(tiles)} tiles meet {len(blocks)} blocks each. Grey: done and forgotten but for three things (right of "
    f"the matrix). Orange: the block that exists now, in a buffer of {buffer / 2**10:.1f} kB in float32; the whole "
    f"matrix of one head has {4 * side * side * N / 2**10:,.0f} kB. Right: a query of the tile. When the second block "
    f"is read the maximum rises from {first:.2f} to {second:.2f}, so the first block's sum is multiplied by "
    f"exp({first:.2f} − {second:.2f}) = {math.exp(first - second):.3f}. After the last block max + log(sum) is the "
    f"logarithm of the softmax's denominator, asserted above."
)

# %% [markdown]
# ### What it costs, against the number of points

# %%
NAMES = {"torch": ("torch form", style.ORANGE), "numba": ("kernel", style.BLUE)}
numbers, took = (16, 49, 196, 400), {}
for points in numbers:
    inputs = bench.inputs_of(points, SIDE, BATCH, HEADS)
    for backward in (False, True):
        calls = {form: partial(bench.call, form, inputs, backward) for form in NAMES}
        took[points, backward] = milliseconds(calls)
        for out, other in zip(*(call() for call in calls.values()), strict=True):
            assert (out - other).abs().max() < 1e-4 * out.abs().max()  # the same output and gradients, in float32

pairs = BATCH * HEADS * SIDE**2  # of queries and keys, for each point
pays_from = next(points for points in range(1, max(numbers)) if kernel.pays("numba", pairs * points))
figure, (forward, both, memory) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
for ax, backward, title in ((forward, False, "forward, ms"), (both, True, "forward and backward, ms")):
    for form, (name, colour) in NAMES.items():
        times = [took[points, backward][form] for points in numbers]
        for points, each in zip(numbers, times, strict=True):
            ax.plot([points] * len(each), each, "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
        fastest = [each.min() for each in times]
        ax.plot(numbers, fastest, color=colour, linewidth=2)
        ax.annotate(name, (numbers[-1], fastest[-1]), (8, -4), textcoords="offset points", color=colour)
    ax.axvline(pays_from, color=style.INK, linestyle="--", linewidth=1)
    ax.set(title=title)
kept = {"torch": [4 * pairs * points for points in numbers], "numba": [buffer] * len(numbers)}
for form, (name, colour) in NAMES.items():
    memory.plot(numbers, np.array(kept[form]) / 2**20, "o-", color=colour, linewidth=2)
    end = numbers[-1], kept[form][-1] / 2**20
    memory.annotate(name, end, (8, -4), textcoords="offset points", color=colour)
memory.set(title="the bias, or the block in its place, MB")
for ax in (forward, both, memory):
    ax.set(xscale="log", yscale="log", xlabel="points; dashed: from here on “auto” takes the kernel", xlim=(13, 1000))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set_xticks(numbers, numbers)
memory.set_xlabel("points")
plt.show()

rows = []
for points in numbers:
    ratios = [took[points, backward]["torch"] / took[points, backward]["numba"] for backward in (False, True)]
    rows.append((points, *(f"{np.median(ratio):.1f} ({ratio.min():.1f} to {ratio.max():.1f})" for ratio in ratios)))
table(("points", "time of the torch form over the kernel's, forward: median (all rounds)", "with the backward"), rows)
say(
    f"{SIDE} × {SIDE} queries, {HEADS} heads, {BATCH} images, float32, one thread of the machine that ran this "
    f"notebook. Both forms take turns; each dot is a round, lines go through the fastest. Times depend on the machine "
    f"and on what else it does: nothing is asserted about them here. Outputs and gradients are asserted to agree. "
    f"Memory is computed."
)

# %% [markdown]
# A small call is over before a kernel has gained anything. `impl="auto"`, which the models use, therefore takes a
# kernel only from so many pairs of query and key on:

# %%
source(kernel.pays)

# %% [markdown]
# ## The models
#
# Table 1, read off the models themselves. In stages 3 and 4 a block pair is (window, deformable); in stages 1 and 2
# (window, shifted window).

# %%
rows = []
for name in ("dat_tiny", "dat_small", "dat_base", "dat_tiny_conv"):
    model = dynattn.create_model(name)
    blocks = [[block.attn for block in stage.blocks] for stage in model.stages]
    groups = [part.groups for stage in blocks[2:] for part in stage if isinstance(part, deformable.DeformableAttention)]
    counted = cost.count(model.to("meta"), model.img_size)  # shapes only: nothing is computed
    said = cost.published(name)
    rows.append(
        (
            f"`{name}`",
            ", ".join(str(len(stage)) for stage in blocks),
            ", ".join(str(info["num_chs"]) for info in model.feature_info),
            ", ".join(str(stage[0].heads) for stage in blocks),
            f"{groups[0]}, {groups[-1]}",
            blocks[0][0].window,
            f"{counted.params:,} ({said['params_M']} M)",
            f"{counted.macs_fvcore / 1e9:.2f} G ({said['macs_G']} G)",
        )
    )
table(("model", "blocks", "channels", "heads", "groups", "window", "parameters (paper)", "multiply-adds (paper)"), rows)

# %% [markdown]
# The ablations of Tables 6, 7 and 8 are keyword arguments of the same models. Ours beside the paper's, with the reason
# where they differ; accuracies are the paper's, nothing here was trained on ImageNet.

# %%
rows, notes = [], []
for row in cost.tables()["dat"].rows:
    said = cost.published(row.published)
    if not said["where"].startswith(("Table 6", "Table 7", "Table 8")) and row.published != "dat_tiny":
        continue
    counted = cost.count(dynattn.create_model(row.model, **row.options).to("meta"), row.size)
    if row.note and row.note not in notes:
        notes.append(row.note)
    options = ", ".join(f"{key}={value!r}" for key, value in row.options.items() if key != "blocks")
    rows.append(
        (
            said["where"],
            f"`{options or 'as it is'}`" + ("" if "blocks" not in row.options else " Deformable-DETR"),
            f"{counted.params / 1e6:.2f}",
            said["params_M"],
            f"{counted.macs_fvcore / 1e9:.2f}",
            said["macs_G"],
            said["value"],
            f"[{notes.index(row.note) + 1}]" if row.note else "",
        )
    )
    assert abs(counted.macs_fvcore / 1e9 - float(said["macs_G"])) < 0.011 or row.note
table(("row", "`dat_tiny` with", "M parameters", "paper", "G multiply-adds", "paper", "top-1, paper", "note"), rows)
say("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)))

# %% [markdown]
# ### Equal to the published code
#
# Weights that are a function of an entry's published name and shape alone can be given to the authors' code and to
# ours. Theirs was run once, in double precision; here are the first of its logits as plain numbers. `load_official`
# takes our made-up weights for a checkpoint of theirs.


# %%
def deterministic(name: str, shape: tuple) -> torch.Tensor:
    """Numbers that only the name and the shape decide."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1 and name.endswith("weight"):
        return torch.from_numpy(x / math.sqrt(math.prod(shape[1:])))
    return torch.from_numpy((len(shape) == 1 and name.endswith("weight")) + 0.1 * x)


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint as the authors' code would write it."""
    state, own = {}, model.state_dict()
    for name, entry in official.dat_entries(model).items():
        shape = tuple(own[name].shape)
        if entry.name.endswith(
            "relative_position_bias_table"
        ):  # ours: (heads, rows, columns), theirs: (entries, heads)
            shape = (shape[1] * shape[2], shape[0])
        state[entry.name] = deterministic(entry.name, shape)
    return state


PUBLISHED_LOGITS = [0.1032543155594, -0.5109217678453, -1.570284396298, 1.2312178517372]
image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 224, 224)))
tiny = dynattn.create_model("dat_tiny").eval()
state = published(tiny)
dynattn.load_official(tiny.double(), state)
with torch.no_grad():
    logits = tiny(image)[0]
apart = float((logits[:4] - torch.tensor(PUBLISHED_LOGITS, dtype=torch.float64)).abs().max())
assert apart < 1e-9
table(
    ("published", "ours"), [(f"{a:.10f}", f"{float(b):.10f}") for a, b in zip(PUBLISHED_LOGITS, logits, strict=False)]
)
say(f"Largest difference: {apart:.1e}. The project's tests compare all of them.")

# %% [markdown]
# How much would a misreading have changed? Each bar is one: by how much the logits move, as a share of their norm,
# under the same weights. Blue ones follow the text where the code differs. A model with such an error still trains, and
# still looks right; only equality finds it.


# %%
def logits_of(change=None, **options) -> torch.Tensor:
    """dat_tiny's logits under the deterministic weights, in float32."""
    model = dynattn.create_model("dat_tiny", **options).eval()
    names = {entry.name for entry in official.dat_entries(model).values()}
    dynattn.load_official(model, {name: tensor for name, tensor in state.items() if name in names})
    if change is not None:
        change(model)
    with torch.no_grad():
        return model(image.float())[0]


def without_norm(model: nn.Module) -> None:
    """No LayerNorm after down-sampling."""
    for stage in model.stages:
        if hasattr(stage.down, "norm"):
            stage.down.norm = nn.Identity()


right_one = logits_of()
sampling, biasing = (OPERATIONS[name].mistakes for name in ("sample_points", "deformable_attention"))
wrong_ones = {
    "text: references from corner to corner": logits_of(reference="corner"),
    "text: offsets in cells": logits_of(offset_unit="cell"),
    "text: no norm in the offset network": logits_of(offset_norm=False),
    "text: windows shifted as Swin's": logits_of(shift="down"),
    "no offsets, s = 0": logits_of(offset_range=0),
    "twice the range, s = 4": logits_of(offset_range=4),
    "no norm after down-sampling": logits_of(without_norm),
}
for name in ("align_corners=False", "border padding instead of zeros", "rows and columns swapped"):
    with mock.patch.object(core, "sample_points", sampling[name]):
        wrong_ones[f"sampling: {name}"] = logits_of()
for name in ("displacement not halved", "bias missing"):
    with mock.patch.dict(deformable.FORMS, torch=biasing[name], numba=biasing[name]):
        wrong_ones[f"position bias: {name}"] = logits_of()
change_of = {name: float((wrong - right_one).norm() / right_one.norm()) for name, wrong in wrong_ones.items()}
assert min(change_of.values()) > 1e-4

figure, ax = plt.subplots(figsize=(11, 4.8), layout="constrained")
ordered = sorted(change_of.items(), key=lambda one: one[1])
for i, (name, change) in enumerate(ordered):
    ax.barh(name, 100 * change, color=style.BLUE if name.startswith("text") else style.ORANGE)
    ax.annotate(f"{100 * change:.2g} %", (100 * change, i), (5, -4), textcoords="offset points", fontsize=11)
ax.set(xlabel="change of the logits, % of their norm", xscale="log", xlim=(0.02, 200))
plt.show()

# %% [markdown]
# ## The ledger
#
# Where the paper's text, its equations and the published code disagree, what the code does, and what follows. First the
# consequences that take a computation of their own.

# %%
learned = sum(parameter.numel() for parameter in tiny.parameters())
indices, masks = 0, 0
for stage, info in zip(tiny.stages, tiny.feature_info, strict=True):
    for layer in (block.attn for block in stage.blocks if isinstance(block.attn, window.WindowAttention)):
        indices += layer.window**4
        masks += (224 // info["reduction"] // layer.window) ** 2 * layer.window**4 if layer.shift else 0

other_kernels = sum(p.numel() for p in dynattn.create_model("dat_tiny", kernels=(5, 5, 5, 5)).parameters())
strided = cost.count(dynattn.create_model("dat_tiny", strides=(4, 2, 2, 1)).to("meta"), 224).macs_fvcore / 1e9
plain = cost.count(dynattn.create_model("dat_tiny").to("meta"), 224).macs_fvcore / 1e9

still = deformable.DeformableAttention(8, 2, 1, (5, 5), offset_range=0)
_, points, references = still.sample(torch.randn(1, 5, 5, 8), torch.randn(1, 5, 5, 8))
assert torch.equal(points[0, 0], references)  # s = 0 is "no move" here

with torch.no_grad():
    odd = dynattn.create_model("dat_mini")(torch.zeros(1, 3, 200, 312))
assert odd.shape == (1, 10)  # any height and width
attention, overhead = omega(14, 14, 49, 384)
unexplained = max(layers["deformable"].rest(m) for m in range(layers["deformable"].heads))

# %%
moved = {name: f"logits move by {100 * change:.2g} %" for name, change in change_of.items()}
example = f"{overhead / 1e6:.3f} M, {overhead / (attention + overhead):.2%}: a factor of ten"
LEDGER = [
    (
        "Offset network: depthwise 5 × 5, GELU, 1 × 1",
        "a LayerNorm after the first; kernels 9, 7, 5, 3 by stage",
        f"without the norm {moved['text: no norm in the offset network']}; with 5 × 5 everywhere "
        f"{other_kernels - learned:+,} parameters",
        "`offset_norm`, `kernels`",
    ),
    (
        "References from −1 to +1",
        "centres of cells, sampled as if −1 and +1 were the outermost",
        f"no offset is no identity; {moved['text: references from corner to corner']}",
        "`reference`",
    ),
    (
        "Δp ← s tanh(Δp), in cells, as “14 is the largest” implies",
        "times 1/H, in a range of width 2: half a cell",
        f"s = 2 moves {farthest(2, **CODE):.2f} pixels at most; {moved['text: offsets in cells']}",
        "`offset_unit`",
    ),
    (
        "Grid down-sampled by r; the example has 49 points",
        "r = 1 in every release",
        f"196 points in stage 3; with r = 2 there, {strided:.2f} G and not {plain:.2f} G",
        "`strides`",
    ),
    ("Offset overhead 5.08 M, 6.0 %", "(no number)", example, "DAT-10"),
    ("Shifted windows as in Swin: 3 of 7", "shifted by 4", moved["text: windows shifted as Swin's"], "`shift`"),
    (
        "Bias read at the normalised displacement",
        "at half of it, and between the entries of the table",
        f"were it not halved, {moved['position bias: displacement not halved']}",
        "`relative_bias`",
    ),
    ("Norm after down-sampling: not said", "LayerNorm", f"without {moved['no norm after down-sampling']}", "always"),
    (
        "#Param counts indices and reference grids",
        "(Tables 6 and 7 fit learned parameters alone)",
        f"{learned:,} learned; {learned + indices + masks:,} with {indices:,} indices and {masks:,} mask entries",
        "`dynattn table`",
    ),
    (
        "No random erasing; lowest learning rate 1e-7",
        "random erasing 0.25; lowest 5e-6 for a batch of 512",
        "a training on ImageNet would tell",
        "",
    ),
    (
        "Ablations without offsets, with a fixed bias",
        "both switches crash; s = 0 leaves offsets unbounded",
        "here they run, and s = 0 keeps points where they are (asserted)",
        "`offsets`, `position_bias`",
    ),
    (
        "Dense prediction at any size",
        "only the size that the model was built for",
        "here any (asserted): windows pad themselves, tables are resized",
        "`img_size`",
    ),
    (
        "Heads are assigned to one group of keys and values",
        "keys and values mix all groups, as in DAT-6; the bias does not",
        f"a trained head's own group leaves up to {unexplained:.0%} of its output unexplained",
        "`groups`",
    ),
]
table(("", "the text says", "the code does", "consequence", "ours"), [(i, *row) for i, row in enumerate(LEDGER, 1)])

# %% [markdown]
# Percentages are of `dat_tiny`'s logits under the deterministic weights above, so they tell that something changes, not
# how much a trained model would mind. `variant="paper"` follows the text in references, offsets, offset network and
# shift at once; each keyword does so alone.
#
# ## Trained
#
# `dat_mini` has DAT's modules on small pictures of shapes before photographs, and `swin_mini` the same with shifted
# windows in their place. These are the paper's figures 4 to 7, drawn by `dynattn figures`, with what they measure.
#
# A share "on the object" means nothing by itself: objects tend to be in the middle, and so do points. So each stands
# beside two nulls: the same network with **random weights**, and the same points scored with **another image's mask**.

# %%
figures = recorded("dat")
measured(figures)

# %% [markdown]
# Where two numbers stand under random weights, the first network has offsets like the published models' start, the
# second none, as `dat_mini` starts. These were measured when the figures were drawn. Here are the first images again,
# live, for networks that differ in their seed alone:

# %%
few = 12
items = [Shapes("easy", "test", 128)[i] for i in range(few)]
images, masks = (np.stack([item[part].numpy() for item in items]) for part in (0, 2))
whole, rows = figures[5]["networks"]["dat_mini"], []
for name in (name for name in weights.available() if name.startswith("dat_mini")):
    live = evaluate_points(official.model_from(weights.path(name))[1], images, masks)
    best = live["layers"][live["best"]]
    if name == "dat_mini":
        assert abs(live["attention"] - whole["attention"]) < 4 * whole["attention_se"] * math.sqrt(whole["n"] / few)
    shares = [f"{live[key]:.2f}" for key in ("attention", "attention_other", "points", "points_other")]
    rows.append((f"`{name}`", *shares, f"{best['points_ratio']:.2f}"))
table((f"{few} images", "attention on the object", "null", "points on the object", "null", "best layer"), rows)
say(
    f"Nulls: other images' masks. Last column: points on the object over their null. Recorded on {whole['n']} images "
    f"for `dat_mini`: attention {whole['attention']:.3f} ± {whole['attention_se']:.3f} against "
    f"{whole['attention_other']:.3f}, points {whole['points']:.3f} ± {whole['points_se']:.3f} against "
    f"{whole['points_other']:.3f}. So points gather on the object somewhat ({whole['points_ratio']:.1f} times), and "
    f"attention picks those that did ({whole['attention_ratio']:.1f} times): the figures show attention above all."
)

# %% [markdown]
# **Figure 4.** How far may points go? One small network for each range $s$.

# %%
shipped(GALLERY / figures[4]["file"])

# %% [markdown]
# **Figure 5.** The most important keys: attention propagated from the output back through the deformable layers. The
# paper does not say by which rule; this is the one here.

# %%
source(propagate)
shipped(GALLERY / figures[5]["file"])

# %% [markdown]
# **Figure 6.** The deformed points of both maps, and the grid that they left.

# %%
shipped(GALLERY / figures[6]["file"])

# %% [markdown]
# **Figure 7.** What two queries read, beside a Swin of the same size, trained alike.

# %%
shipped(GALLERY / figures[7]["file"])

# %% [markdown]
# The network has seen shapes only. Here it looks at a photograph, live; `dynattn figures --image` does this for yours.

# %%
cat = sample_picture("chelsea", (128, 128))
figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
for ax, record in zip(axes, [r for r in dynattn.trace(dat, cat.x).of_kind("deformable")][1::2], strict=True):
    paper_figures.ground(ax, cat)
    paper_figures.draw_points(ax, record)
    ax.set_title(record.name)
show(figure)

# %% [markdown]
# What these pictures do **not** show:
#
# - The set is procedural and easy: one object that differs in colour, before a blurred photograph. The networks find
#   what stands out. That is not recognition of giraffes.
# - `dat_mini` differs from the paper's models beyond its size: a convolutional stem, a small convolution before every
#   block, offsets that start at zero and points kept on the map, fewer points than tokens. Without these, so small a
#   net hardly learns in minutes. The models above have none of it unless asked.
# - The pictures are of one seed, and figure 4 has one network for each range: what another seed would change is not in
#   its bars. The photographs of a cat and a flower are there to look at; nothing is measured on them.
#
# ## The lens
#
# All that was drawn above for chosen queries, for any query: click the picture. Layer and head can be chosen for each
# model; the slider fades from attention to rollout, arrow keys move the query. A lens takes models, or traces as here.
# (Where no kernel runs, you see the still picture that it leaves behind.)

# %%
lens = Lens({"dat_mini": traces[dat], "swin_mini": traces[swin]}, picture.shown)
display(lens)

# %% [markdown]
# What a click does, a line of Python does. First the query goes on the object, then off it:

# %%
seen = []
for query in (on, off):
    lens.row, lens.col = query
    seen.append([np.frombuffer(shown["keys"], "<f4").reshape(-1, 3) for shown in lens.shown])  # x, y, weight
    still = io.BytesIO()
    lens.picture(dpi=78).save(still, format="jpeg", quality=85)
    display(Image(still.getvalue()))

(dat_on, swin_on), (dat_off, swin_off) = seen
assert np.array_equal(dat_on[:, :2], dat_off[:, :2]) and not np.array_equal(dat_on[:, 2], dat_off[:, 2])
assert not np.array_equal(swin_on[:, :2], swin_off[:, :2])
overlap = np.minimum(dat_on[:, 2], dat_off[:, 2]).sum()
common = len(set(map(tuple, swin_on[:, :2])) & set(map(tuple, swin_off[:, :2])))
say(
    f"DAT: the same {len(dat_on)} points (of both groups) for both queries, with other weights; {overlap:.0%} of the "
    f"attention is common to both. Swin: {len(swin_on)} keys and {len(swin_off)}, and {common} in common."
)

# %% [markdown]
# `lens.save("lens.html")` writes a page that answers clicks by itself, with no kernel and no network: for a course's
# web site, or a mail.

# %%
with tempfile.TemporaryDirectory() as folder:
    page = lens.save(Path(folder) / "lens.html")
    say(f"One file of {page.stat().st_size / 1e6:.1f} MB, with every query of all {sum(map(len, lens.traces))} layers.")

# %% [markdown]
# ## Deformable-DETR's attention
#
# The comparison of Appendix A. There every query has points of its own, in every head, and their weights are not a
# similarity of query and key but a linear map of the query:
#
# $$z_q^{(m)} = \sum_{k=1}^{K} A_{qk}^{(m)} W_v\, \phi\left(x;\, p_q + \Delta p_{qk}^{(m)}\right) \tag{DAT-11}$$

# %%
source(deformable_detr.detr_attention_loops, deformable_detr.detr_attention_torch)
agree(
    ops.detr_attention,
    {
        "v": normal(1, 2, 3, 4, 5),
        "points": torch.rand(1, 2, 6, 3, 2, dtype=torch.float64) * 2.4 - 1.2,
        "weights": normal(1, 2, 6, 3).softmax(dim=-1),
    },
)
verify.check("detr_attention", ops.detr_attention)

# %%
torch.manual_seed(3)
pairs = [("window", "shifted"), ("window", "deformable_detr"), ("window", "deformable_detr")]
detr = dynattn.create_model("dat_mini", blocks=pairs, detr_points=(8, 8, 8))
for layer in (m for m in detr.modules() if isinstance(m, deformable_detr.DeformableDetrAttention)):
    nn.init.normal_(layer.offset.weight, std=0.15)  # as if it had learned: each query moves its points
(own_points, *_) = dynattn.trace(detr, picture.x).of_kind("deformable_detr")

figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
asked = [(36, 36), (36, 92), (92, 64)]
for ax, record in zip(axes, (own_points, layers["deformable"]), strict=True):
    style.photograph(ax, picture.shown, picture.shape)
    for query, colour in zip(asked, INKS, strict=False):
        keys = record.keys(*query)
        if record is own_points:
            style.lines(ax, np.repeat([query[::-1]], len(keys.xy), axis=0), keys.xy.numpy(), colour)
            style.dots(ax, keys.xy.numpy(), 0.002 + 0 * keys.weight.numpy(), colour)
        ax.plot(*query[::-1], marker="*", markersize=20, color=colour, markeredgecolor="white", zorder=7)
    if record is not own_points:
        style.dots(ax, keys.xy.numpy(), 0.002 + 0 * keys.weight.numpy(), "#DDDDDD")
axes[0].set_title("Deformable-DETR, untrained: points of each query")
axes[1].set_title("DAT, trained: the same points for all")
show(figure)

# %% [markdown]
# Sampling is what that costs: Deformable-DETR reads features for every pair of query and point, DAT for every point.
# This is the quadratic memory that the text speaks of, and why $K$ was cut to four there. For one layer of stage 3 and
# a batch of sixty-four:

# %%
HW, C, batch = 14 * 14, 384, 64
rows = []
for name, reads, where in (
    ("DAT, 196 keys", HW, "dat_tiny"),
    ("DAT, 49 keys", HW // 4, "dat_tiny_49_49"),
    ("Deformable-DETR, 16 keys", HW * 16, "dat_tiny_ddetr_16_16"),
    ("Deformable-DETR, 49 keys", HW * 49, "dat_tiny_ddetr_49_49"),
    ("Deformable-DETR, 196 keys", HW * 196, "dat_tiny_ddetr_196_49"),
):
    said = cost.published(where)
    rows.append((name, f"{batch * reads * C * 4 / 2**20:,.0f} MB", said["macs_G"] + " G", said["value"]))
table(("stage 3", "sampled features of one layer, float32", "multiply-adds, paper", "top-1, paper"), rows)

# %% [markdown]
# ## Exercises
#
# `verify.check` is the judge: it compares your function with the loops, outputs and gradients, on random cases. Where
# they part it looks for the simplest case in which they do, and when it recognises the mistake, it says which. For
# example:


# %%
def attempt(x, points):
    """A first try: bilinear sampling, with x and y the wrong way round."""
    return nn.functional.grid_sample(x, points[:, None], align_corners=True)[:, :, 0]


try:
    verify.check("sample_points", attempt)
except verify.Mismatch as mismatch:
    print(mismatch)

# %% [markdown]
# That is: the first number that is off, and where; the mistake, if it is a known one; the case, small enough to be
# worked out by hand; and a line that makes this case again.
#
# **First.** Write `sample_points(x, points)` without `grid_sample`: with the matrix of hats. Have it checked.
#
# **Second.** Write deformable attention from DAT-9, as a function `(q, k, v, points, table, query_shape)`. Take
# `core.sample_points` to read the table, and torch for the rest; `core.grid_points` has the queries' positions. Begin
# with one group of points and without a table; then add $\phi(\hat{B}; R)$, then groups. The judge tells you how far
# you are. Suppose that somebody starts from the library's own bias, and takes points for (x, y):


# %%
def deformable_attention(q, k, v, points, table, query_shape):
    """Somebody's attempt."""
    logits = torch.einsum("bhld,bhnd->bhln", q, k) * q.shape[-1] ** -0.5
    if table is not None:
        logits = logits + deformable.relative_bias(points.flip(-1), table, query_shape, "centre")
    return logits.softmax(dim=-1) @ v


try:
    verify.check("deformable_attention", deformable_attention)
except verify.Mismatch as mismatch:
    print(mismatch)
    assert mismatch.mistakes == ["points: rows and columns swapped"] and mismatch.case.arguments["table"] is not None

# %% [markdown]
# Without a table this attempt is right. So the case that is left when everything has been made simpler has one, and
# little else.
#
# What is handed in is a file. `dynattn check` finds the functions in it by their names and runs them in a process of
# their own, with a limit on time and memory; the verdict is the same:

# %%
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "answers.py"
    imports = "import torch\n\nfrom dynattn.mechanisms import deformable\n\n\n"
    file.write_text(imports + inspect.getsource(deformable_attention))
    run = subprocess.run([sys.executable, "-m", "dynattn", "check", file], capture_output=True, text=True)
print(f"$ dynattn check {file.name}\n{run.stdout}exit code {run.returncode}")
assert run.returncode == 1 and "rows and columns swapped" in run.stdout

# %% [markdown]
# **Third.** The offset network shares its weights between groups. Yet the groups' points differ. Why? And what would
# you have to set in `dat_mini` to make them equal on every image?
#
# <details><summary>An answer</summary>
#
# Each group gets its own channels of the queries, so the same network sees different numbers. The points are equal on
# every image where the offsets do not depend on them: with `offset_range=0`, or as training starts, with
# `offset_zero_init=True`. Then a single matrix explains every head, which is easily mistaken for a proof that it always
# does.
#
# </details>
#
# ## Solutions
#
# To the first and the second exercise. Try yourself before you read on.


# %%
def sample_points(x, points):
    weights = core.bilinear_weights(points, x.shape[2:])  # the products of two hats (B, N, S)
    return torch.einsum("bns,bcs->bcn", weights, x.flatten(2))


def deformable_attention(q, k, v, points, table, query_shape, *, query_grid="centre", scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhld,bhnd->bhln", q, k) * scale
    if table is not None:
        queries = core.grid_points(query_shape, query_grid, points)
        R = (queries[:, None] - points[:, :, None]) / 2  # (B, g, L, N, 2)
        heads = q.shape[1] // points.shape[1]
        own = R.flatten(2, 3).repeat_interleave(heads, dim=1).flatten(0, 1)  # of each image and head: (B h, L N, 2)
        tables = table[None, :, None].expand(len(q), -1, -1, -1, -1).flatten(0, 1)
        logits = logits + core.sample_points(tables, own).reshape(logits.shape)
    return logits.softmax(dim=-1) @ v


for function in (sample_points, deformable_attention):
    verify.check(function.__name__, function)
    say(f"`{function.__name__}` passes: outputs and gradients.")
