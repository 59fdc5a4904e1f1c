# %% [markdown]
# # Audit of DAT: Vision Transformer with Deformable Attention
#
# Xia, Pan, Song, Li, Huang, CVPR 2022. This notebook is for looking things up. The [lesson](../01_dat.ipynb) teaches
# the layer. Here each claim is asserted where it is made, and every number is computed by the cell above it.
#
# | section | what it holds |
# | --- | --- |
# | Equality with the loops | every operation and the whole module, outputs and gradients |
# | Two readings | where references are, and what a unit of $s$ is |
# | Offset groups | what a head really reads |
# | Cost | the formula counted, and its misprint |
# | Kernels | what they read, how they take the softmax, what they gain |
# | The models | Tables 1, 6, 7 and 8 |
# | Equal to the published code | logits to the last digit; what a misreading would change |
# | The ledger | what the paper says, what the code does, what follows |
# | Trained | the figures and their nulls |
# | Deformable-DETR's attention | the comparison of Appendix A |
# | A longer exercise | deformable attention, judged by `verify.check` and by `dynattn check` |

# %%
import math
from functools import partial
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynattn
from dynattn import core, cost, ops, verify, weights
from dynattn.bench import deformable as bench
from dynattn.figures.measures import propagate
from dynattn.lessons.notebook import ledger, measured, recorded, show
from dynattn.figures.subjects import test_picture
from dynattn.figures.tables import from_records
from dynattn.kernels import deformable as kernel
from dynattn.kernels import deformable_numba as on_cpu
from dynattn.lessons import agree, begin, normal, say, source, table
from dynattn.lessons import dat_audit as audit
from dynattn.mechanisms import deformable, deformable_detr, window
from dynattn.models.layers import Block

begin()

# %% [markdown]
# The trained network, and what its deformable layers do with one test image:

# %%
dat = dynattn.create_model("dat_mini", pretrained=True)
picture = test_picture(22, (128, 128))
record, *_ = dynattn.trace(dat, picture.x).of_kind("deformable")
trained = dat.get_submodule(record.name)
say(f"`{record.name}`: {record.query_shape} queries, {record.points.shape[1]} points in {record.groups} groups.")

# %% [markdown]
# ## Equality with the loops
#
# The loops are the specification: one number at a time. Every fast form must give the same outputs and gradients in
# double precision. Multi-head self-attention, as in any transformer:
#
# $$q = xW_q,\quad k = xW_k,\quad v = xW_v \tag{DAT-1}$$
# $$z^{(m)} = \text{softmax}\left(q^{(m)}k^{(m)\top} / \sqrt{d}\right)v^{(m)},\quad m = 1, \dots, M \tag{DAT-2}$$
# $$z = \text{Concat}\left(z^{(1)}, \dots, z^{(M)}\right)W_o \tag{DAT-3}$$

# %%
source(core.dense_attention_loops, core.dense_attention_torch)
agree(
    ops.dense_attention,
    {"q": normal(2, 2, 5, 3), "k": normal(2, 2, 4, 3), "v": normal(2, 2, 4, 3)},
    bias=normal(2, 5, 4),
)

# %% [markdown]
# One case proves little. `verify.check` draws random cases of uneven sizes and with every option. It compares outputs
# and gradients, and raises at the first number that is wrong.

# %%
verify.check("dense_attention", ops.dense_attention)
verify.check("window_attention", ops.window_attention)
verify.check("sample_points", ops.sample_points)
say(f"`verify.check` knows {', '.join(f'`{name}`' for name in verify.operations())}.")

# %% [markdown]
# The local layers of DAT are windows. Their module has DAT-1 to DAT-3 in three lines. It applies the linear maps first
# and moves the tokens into windows afterwards. The other order gives the same numbers, and moves three times as many.

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
# Sampling (DAT-8) is the identity on the centres of cells. This is the limit case to test an implementation with:

# %%
source(core.sample_points_loops)
x = normal(1, 3, 6, 7)
read = ops.sample_points(x, core.grid_points((6, 7), "corner", x)[None])
apart = float((read - x.flatten(2)).abs().max())
assert apart < 1e-12
say(f"Largest difference: {apart:.1e}.")

# %% [markdown]
# Deformable attention (DAT-9) has five gradients: of queries, keys, values, points, and the table.

# %%
source(deformable.relative_bias, deformable.deformable_attention_torch)
arguments = {
    "q": normal(2, 4, 6, 3),
    "k": normal(2, 4, 5, 3),
    "v": normal(2, 4, 5, 3),
    "points": torch.rand(2, 2, 5, 2, dtype=torch.float64) * 2.4 - 1.2,
    "table": normal(4, 3, 5),
    "query_shape": (2, 3),
}
agree(ops.deformable_attention, arguments, forms=("torch", "numba"))
verify.check("deformable_attention", ops.deformable_attention, cases=6)

# %% [markdown]
# And the whole module, put together by hand from DAT-6, DAT-7, DAT-9 with the loops, and DAT-3:

# %%
source(deformable.DeformableAttention.forward, deformable.DeformableAttention.sample)
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
# Do gradients reach the offset network? They do, on two ways: through the bilinear weights and through the position
# bias. Both change as a point moves.

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
# ## Two readings
#
# The text and the published code differ in two things that are easily missed.
#
# **Where the references are.** In the text the corners of the grid are the corners of the map ("corner"). The code
# takes the centres of cells that divide the map ("centre"). It samples with a convention in which the corners are cell
# centres. So a reference without offset does not read a cell: it reads up to half a cell nearer to the middle.

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
    f"0 and {H - 1}. Sampling without offsets changes white noise by {moved:.0%} (norm of the difference)."
)

# %% [markdown]
# **What a unit of $s$ is.** The text calls fourteen the largest reasonable $s$ on a map of fourteen cells, so a unit is
# a cell. In the code a unit is $1/H_G$ of coordinates that span two: half a cell.

# %%
CODE, TEXT = dict(reference="centre", offset_unit="half_cell"), dict(reference="corner", offset_unit="cell")


def farthest(s: float, reading: str) -> float:
    """How far, in pixels, points get when the offset network shouts."""
    layer = deformable.DeformableAttention(8, 2, 1, (H, H), offset_range=s, **{"code": CODE, "text": TEXT}[reading])
    x = torch.randn(1, H, H, 8)
    with torch.no_grad():
        layer.offset.pointwise.weight.mul_(1e6)
        _, points, references = layer.sample(x, layer.q(x))
    return float((core.to_pixels(points, (H, H)) - core.to_pixels(references, (H, H))).abs().max())


assert math.isclose(farthest(2, "code"), (H - 1) / H, rel_tol=1e-5)
assert math.isclose(farthest(2, "text"), 2, rel_tol=1e-5)
show(audit.readings({"code": "centre", "text": "corner"}, farthest))
say(
    f"On a map of {H} cells. All models have $s = 2$: a point of the code moves at most {farthest(2, 'code'):.2f} "
    f"pixels, one of the text {farthest(2, 'text'):.0f}. With $s = 14$ the code reaches "
    f"{farthest(14, 'code') / H:.0%} of the map."
)

# %% [markdown]
# The same happens in the bias table. A displacement of whole cells does not land on an entry of the table. The table
# counts entries from corner to corner, and the code counts displacements in cells. The two grids agree only at zero.

# %%
steps = torch.arange(4.0)
rows = core.to_pixels(torch.stack([steps, steps], 1) * (2 / H) / 2, (2 * H - 1, 2 * H - 1))[:, 0]
assert torch.allclose(rows, (H - 1) + steps * (H - 1) / H)
landing = ", ".join(f"{int(d)} → {float(r):.2f}" for d, r in zip(steps, rows, strict=True))
say(f"Displacement in cells → row of the table, for a map of {H}: {landing}.")

# %% [markdown]
# ## Offset groups
#
# The channels are split into $G$ groups. Each group has points of its own, and one offset network serves all groups.

# %%
C, G, k = trained.dim, trained.groups, trained.offset.depthwise.kernel_size[0]
count = sum(parameter.numel() for parameter in trained.offset.parameters())
assert count == (k * k + 1) * C // G + 2 * C // G + 2 * C // G  # convolution, LayerNorm, two numbers
between = float((record.points_xy(0) - record.points_xy(1)).norm(dim=-1).mean())
say(f"One offset network of {count:,} parameters. The two groups' points lie {between:.1f} image pixels apart.")

# %% [markdown]
# The text says that each head is "assigned to one group of deformed keys and values". The equations say something else,
# and the code follows the equations. $W_k$ and $W_v$ in DAT-6 take **all** channels of $\tilde{x}$. So key number $n$
# of a head holds what *every* group read at its own point number $n$. Only the position bias uses the head's own group.
#
# One matrix over the tokens therefore explains a head fully only if there is a single group. With more groups the layer
# is a sum of one product for each group:
#
# $$z^{(m)} = \sum_g A^{(m)} \Phi_g\, x_g W_{v,g}^{(m)} + b_v^{(m)}$$
#
# Here $A^{(m)}$ is the attention, $\Phi_g$ the bilinear weights of the points of group $g$, $x_g$ its channels, and
# $W_{v,g}^{(m)}$ the rows of $W_v$ that they meet.

# %%
inputs = []
handle = trained.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
dynattn.trace(dat, picture.x)
handle.remove()
x_of = rearrange(inputs[0], "1 H W (g c) -> g (H W) c", g=record.groups)
W_of = rearrange(trained.v.weight.detach(), "(h d) (g c) -> h g c d", h=record.heads, g=record.groups)
b_of = rearrange(trained.v.bias.detach(), "(h d) -> h d", h=record.heads)

rows = []
for m in range(record.heads):
    A, z = record.attention[m], record.output(m)
    groups = [A @ record.reads(g) @ x_of[g] @ W_of[m, g] for g in range(record.groups)]
    apart = float((sum(groups) + b_of[m] - z).norm() / z.norm())
    assert apart < 1e-5
    rows.append((m, record.group(m), f"{record.rest(m):.2f}", f"{apart:.1e}"))
table(("head", "its group", "left unexplained by its own group's points alone", "by the sum over groups"), rows)

# %% [markdown]
# ## Cost
#
# The formula of DAT-10 counts multiply-adds. A counter that looks at every matrix product and convolution of the module
# agrees with it exactly:

# %%
source(deformable.multiply_adds)
layer = deformable.DeformableAttention(384, heads=12, groups=3, map_size=(14, 14), stride=2, kernel=5)
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    layer(torch.zeros(1, 14, 14, 384))
attention, overhead = deformable.multiply_adds((14, 14), 49, 384, 5)
assert counter.get_total_flops() / 2 == attention + overhead

PRINTED = {"module": 79.63, "overhead": 5.08, "share": 6.0}  # the paper's example: H = W = 14, N_s = 49, C = 384
assert round(attention / 1e6, 2) == PRINTED["module"]
assert round(10 * overhead / 1e6, 2) == PRINTED["overhead"]
say(
    f"The paper's example is the third stage of a Swin-T. The module costs {attention / 1e6:.2f} M, as printed. The "
    f"offset network costs {overhead / 1e6:.3f} M, but {PRINTED['overhead']} M is printed: ten times as much. Its "
    f"share is {overhead / (attention + overhead):.2%}, not {PRINTED['share']} %. The idea is cheaper than printed."
)

# %% [markdown]
# ## Kernels
#
# DAT-10 counts products. It does not count $\phi(\hat{B}; R)$ of DAT-9, one bilinear read for every head, query and
# point. The torch form computes this whole bias first and then adds it:

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


# %%
q, k, v, points, entries = bench.inputs_of(POINTS, SIDE, BATCH, HEADS)
read_bias = partial(deformable.relative_bias, points, entries, (SIDE, SIDE), "centre")
bias = read_bias()
rest = partial(core.dense_attention_torch, q, k, v, bias, q.shape[-1] ** -0.5)
took = milliseconds({"the bias": read_bias, "all the rest of DAT-9": rest})
assert bias.shape == (BATCH, HEADS, SIDE * SIDE, POINTS)
table(
    ("the torch form", "ms, fastest of nine", "slowest"),
    [(name, f"{times.min():.1f}", f"{times.max():.1f}") for name, times in took.items()],
)
say(
    f"{SIDE} × {SIDE} queries, {POINTS} points, {HEADS} heads, {BATCH} images, one thread of the machine that ran this "
    f"notebook. The bias takes {bias.numel() * bias.element_size() / 2**20:.1f} MB. Queries, keys and values together "
    f"take {sum(x.numel() * x.element_size() for x in (q, k, v)) / 2**20:.1f} MB."
)

# %% [markdown]
# The kernels read the bias where it is added and never keep it: `kernels/deformable_numba.py` for the CPU and
# `kernels/deformable_triton.py` for a GPU. They are forms of the same operation and have the same judge. The loops are
# too slow for a size at which a kernel goes through more than one tile and block. There the torch form stands in for
# the loops, which have proved it:

# %%
verify.check("deformable_attention", partial(ops.deformable_attention, impl="numba"), cases=6)
named = zip(("q", "k", "v", "points", "table"), bench.inputs_of(POINTS, SIDE, 1, HEADS), strict=True)
large = {name: tensor.double() for name, tensor in named}
agree(ops.deformable_attention, large | {"query_shape": (SIDE, SIDE)}, forms=("numba",), judge="torch")
assert SIDE**2 > on_cpu.QUERIES and POINTS > on_cpu.KEYS

# %% [markdown]
# `tests/test_kernels.py` asks the same of the Triton kernel: on a GPU where there is one, otherwise in Triton's
# interpreter, which is too slow for a notebook.
#
# ### What the kernel reads
#
# Queries stand on a regular grid. So the places at which a row of queries reads the table for one key are regular too,
# wherever the key has moved: neighbours read neighbours. The kernel cuts the row into runs. Within a run the next query
# reads the next column. So a register full of queries needs no gather: it is two loads from one row of the table and
# two from the next.

# %%
source(on_cpu.read_bias.py_func, audit.KernelReads)

# %% [markdown]
# Below is what that touches in a trained layer, for an image twice as large as those in training. The runs are the
# kernel's own. Reading with them gives the bias of the torch form, which is asserted for all queries and keys.

# %%
(twice, *_) = dynattn.trace(dat, test_picture(22, (256, 256)).x).of_kind("deformable")
tables = dat.get_submodule(twice.name).table_for(twice.query_shape, torch.float32).detach()
head = int(tables.flatten(1).std(dim=1).argmax())  # the head whose table says most
reads, side, N = audit.KernelReads(twice, tables, head), twice.query_shape[1], twice.points.shape[1]

bias = deformable.relative_bias(twice.points[None], tables, twice.query_shape, "centre")[0, head]
by_runs = np.stack([[reads.bias(n, i) for n in range(N)] for i in range(side)])
apart = float(np.abs(rearrange(by_runs, "i n j -> (i j) n") - bias.numpy()).max() / bias.abs().max())
counts = [len(list(reads.runs(n))) for n in range(N)]
assert apart < 1e-5 and max(counts) == 2

number = side * side // on_cpu.QUERIES // 2  # of a tile in the middle of the map
tile = range(number * on_cpu.QUERIES, (number + 1) * on_cpu.QUERIES)
rows = range(tile.start // side, tile.stop // side)
assert len(rows) * side == len(tile)
keys = [int(np.abs(reads.places - place).sum(axis=1).argmin()) for place in ([3, 25], [15, 3], [27, 28])]
show(audit.table_reads(reads, keys, rows))

# %%
block = range(on_cpu.KEYS)
windows = [reads.touched(key, rows) for key in block]
union = {(row, column) for some_rows, columns in windows for row in some_rows for column in columns}
say(
    f"Left, dashed: all {side * side} queries read a window of the table for each key. Where the key is moves this "
    f"window. Filled: the part that one tile of {len(tile)} queries reads, {len(rows)} rows of the map. Right, for one "
    f"key: queries lie {side - 1}/{side} of a column apart, so the share of the right column sinks by 1/{side} from "
    f"query to query. Where it would sink below zero, two queries have the same left column, and a new run begins (the "
    f"change of colour). A row of queries has {min(counts)} or {max(counts)} runs for each of the {N} keys. The tile "
    f"and the first {len(block)} keys make {len(tile) * len(block):,} numbers of the bias from {len(union):,} of the "
    f"table's {reads.entries.size:,} entries."
)

# %% [markdown]
# Only one such block of logits, bias included, exists at a time. So the kernel takes the softmax piece by piece. For
# each query it keeps the row maximum so far, the sum of the exponentials, and the output so far. When a block brings a
# larger maximum, sum and output shrink by the same factor. Maximum and sum are kept for the backward pass, which
# computes the weights again, a block at a time.


# %%
def online_softmax(logits: torch.Tensor) -> list[tuple[float, float]]:
    """Maximum and sum of one query's softmax, after each block of keys."""
    top, bottom, states = -math.inf, 0.0, []
    for piece in logits.split(on_cpu.KEYS):
        old, top = top, max(top, float(piece.max()))
        bottom = bottom * math.exp(old - top) + float((piece - top).exp().sum())
        states.append((top, bottom))
    return states


logits = twice.q[head] @ twice.k[head].T * twice.q.shape[-1] ** -0.5 + bias
query = max(tile, key=lambda query: len(set(online_softmax(logits[query]))))
states = online_softmax(logits[query])
(first, _), (second, _), *_, (top, bottom) = states
assert math.isclose(top + math.log(bottom), float(logits[query].logsumexp(dim=0)), abs_tol=1e-5)
show(audit.softmax_walk(logits[query], states, tile=3))
buffer = on_cpu.KEYS * (on_cpu.QUERIES + on_cpu.LANES) * 4
say(
    f"Left: every tile meets {len(states)} blocks. Grey: finished, only three things are kept. Orange: the block that "
    f"exists now, in a buffer of {buffer / 2**10:.1f} kB. The whole matrix of one head has "
    f"{4 * side * side * N / 2**10:,.0f} kB. Right: at the second block the maximum goes from {first:.2f} to "
    f"{second:.2f}, so the first block's sum is multiplied by {math.exp(first - second):.3f}."
)

# %% [markdown]
# ### What the kernel gains, against the number of points

# %%
numbers, took = (16, 49, 196, 400), {}
for points in numbers:
    inputs = bench.inputs_of(points, SIDE, BATCH, HEADS)
    for backward in (False, True):
        calls = {form: partial(bench.call, form, inputs, backward) for form in audit.FORMS}
        took[points, backward] = milliseconds(calls)
        for out, other in zip(*(call() for call in calls.values()), strict=True):
            assert (out - other).abs().max() < 1e-4 * out.abs().max()  # the same output and gradients, in float32

pairs = BATCH * HEADS * SIDE**2  # of queries and keys, for each point
show(audit.times(took, next(points for points in range(1, max(numbers)) if kernel.pays("numba", pairs * points))))
rows = []
for points in numbers:
    ratios = [took[points, backward]["torch"] / took[points, backward]["numba"] for backward in (False, True)]
    rows.append((points, *(f"{np.median(ratio):.1f} ({ratio.min():.1f} to {ratio.max():.1f})" for ratio in ratios)))
table(("points", "time of the torch form over the kernel's, forward: median (all rounds)", "with the backward"), rows)
say(
    f"{SIDE} × {SIDE} queries, {HEADS} heads, {BATCH} images, float32, one thread of the machine that ran this "
    f"notebook. Both forms take turns. Each dot is a round, and lines go through the fastest rounds. Times depend on "
    f"the machine and on its other load, so nothing is asserted about them here. Outputs and gradients are asserted."
)

# %% [markdown]
# A small call is over before a kernel has gained anything. So `impl="auto"`, which the models use, takes a kernel only
# from a certain number of pairs of query and key on:

# %%
source(kernel.pays)

# %% [markdown]
# ## The models
#
# Table 1, read from the models themselves. In stages 3 and 4 a pair of blocks is (window, deformable).
# In stages 1 and 2 it is (window, shifted window).

# %%
rows = []
for name in ("dat_tiny", "dat_small", "dat_base", "dat_tiny_conv"):
    model = dynattn.create_model(name)
    blocks = [[block.attn for block in stage.blocks] for stage in model.stages]
    groups = [layer.groups for layer in audit.layers(model, deformable.DeformableAttention)]
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
# The ablations of Tables 6, 7 and 8 are keyword arguments of the same models. The table shows our counts beside the
# paper's, with the reason where they differ. Accuracies are the paper's: nothing here was trained on ImageNet.

# %%
rows, notes = [], []
for row in cost.tables()["dat"].rows:
    said = cost.published(row.published)
    if not said["where"].startswith(("Table 6", "Table 7", "Table 8")) and row.published != "dat_tiny":
        continue
    counted = cost.count(dynattn.create_model(row.model, **row.options).to("meta"), row.size)
    if row.note and row.note not in notes:
        notes.append(row.note)
    params, macs = f"{counted.params / 1e6:.2f}", f"{counted.macs_fvcore / 1e9:.2f}"
    options = ", ".join(f"{key}={value!r}" for key, value in row.options.items() if key != "blocks") or "as it is"
    name = f"`{options}`" + (" Deformable-DETR" if "blocks" in row.options else "")
    note = f"[{notes.index(row.note) + 1}]" if row.note else ""
    rows.append((said["where"], name, params, said["params_M"], macs, said["macs_G"], said["value"], note))
    assert abs(counted.macs_fvcore / 1e9 - float(said["macs_G"])) < 0.011 or row.note
table(("row", "`dat_tiny` with", "M parameters", "paper", "G multiply-adds", "paper", "top-1, paper", "note"), rows)
say("\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1)))

# %% [markdown]
# ## Equal to the published code
#
# The weights here are a function of an entry's published name and shape alone. So they can be given to the authors'
# code and to ours. The authors' code was run once, in double precision. Below are the first of its logits as plain
# numbers. `load_official` takes our made-up weights for a checkpoint of theirs.

# %%
source(audit.deterministic, audit.published_state)
PUBLISHED_LOGITS = [0.1032543155594, -0.5109217678453, -1.570284396298, 1.2312178517372]
image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 224, 224)))
tiny = dynattn.create_model("dat_tiny").eval()
state = audit.published_state(tiny)
dynattn.load_official(tiny.double(), state)
with torch.no_grad():
    logits = tiny(image)[0]
apart = float((logits[:4] - torch.tensor(PUBLISHED_LOGITS, dtype=torch.float64)).abs().max())
assert apart < 1e-9
pairs = zip(PUBLISHED_LOGITS, logits, strict=False)
table(("published", "ours"), [(f"{a:.10f}", f"{float(b):.10f}") for a, b in pairs])
say(f"Largest difference: {apart:.1e}. The project's tests compare all of them.")

# %% [markdown]
# How much would a misreading change? Each function below makes one mistake in a model. A model with such a mistake
# still trains, and still looks right. Only equality finds it.
#
# A layer that samples at wrong places keeps its true points for the bias. A displacement that is not halved reads the
# table at twice the distance: this equals a table of twice the side with zeros around it.


# %%
def sampling_at(wrong) -> partial:
    """Every deformable layer reads its map at wrong(points, side); the bias sees the right points."""

    def sample(layer, x, q):
        _, points, references = deformable.DeformableAttention.sample(layer, x, q)
        features = rearrange(x, "B H W (g c) -> (B g) c H W", g=layer.groups)
        read = core.sample_points(features, wrong(points.flatten(0, 1), x.shape[1]))
        return rearrange(read, "(B g) c N -> B N (g c)", g=layer.groups), points, references

    return partial(replace, method="sample", by=sample)


def replace(model: nn.Module, method: str, by) -> None:
    """Another method for the deformable layers of this one model."""
    for layer in audit.layers(model, deformable.DeformableAttention):
        setattr(layer, method, partial(by, layer))


def not_halved(layer, shape, dtype) -> torch.Tensor:
    H, W = shape
    return F.pad(layer.table.to(dtype), (W - 1, W - 1, H - 1, H - 1))


def without_down_norm(model: nn.Module) -> None:
    for stage in model.stages:
        if hasattr(stage.down, "norm"):
            stage.down.norm = nn.Identity()


# %%
def logits_of(change=None, **options) -> torch.Tensor:
    """dat_tiny's logits under the deterministic weights, in float32."""
    model = dynattn.create_model("dat_tiny", **options).eval()
    names = {entry.name for entry in model.published_entries().values()}
    dynattn.load_official(model, {name: tensor for name, tensor in state.items() if name in names})
    if change is not None:
        change(model)
    with torch.no_grad():
        return model(image.float())[0]


right = logits_of()
wrong = {
    "text: references from corner to corner": logits_of(reference="corner"),
    "text: offsets in cells": logits_of(offset_unit="cell"),
    "text: no norm in the offset network": logits_of(offset_norm=False),
    "text: windows shifted as Swin's": logits_of(shift="down"),
    "no offsets, s = 0": logits_of(offset_range=0),
    "twice the range, s = 4": logits_of(offset_range=4),
    "no norm after down-sampling": logits_of(without_down_norm),
    "sampling: align_corners=False": logits_of(sampling_at(lambda p, n: ((p + 1) * n - 1) / (n - 1) - 1)),
    "sampling: border padding instead of zeros": logits_of(sampling_at(lambda p, _: p.clamp(-1, 1))),
    "sampling: rows and columns swapped": logits_of(sampling_at(lambda p, _: p.flip(-1))),
    "position bias: displacement not halved": logits_of(partial(replace, method="table_for", by=not_halved)),
    "position bias: missing": logits_of(partial(replace, method="table_for", by=lambda *_: None)),
}

# %%
change_of = {name: float((one - right).norm() / right.norm()) for name, one in wrong.items()}
assert min(change_of.values()) > 1e-4
show(audit.bars(change_of))
say("Blue: the text, where the code differs. The change is a share of the logits' norm, under the same weights.")

# %% [markdown]
# ## The ledger
#
# The paper's text, its equations and the published code disagree in these places. Some consequences need a computation
# of their own:

# %%
learned = sum(parameter.numel() for parameter in tiny.parameters())
indices, masks = 0, 0
for stage, info in zip(tiny.stages, tiny.feature_info, strict=True):
    for layer in audit.layers(stage, window.WindowAttention):
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

# %%
moves = {name: f"the logits move by {100 * change:.2g} %" for name, change in change_of.items()}
ledger(
    "dat",
    no_norm=moves["text: no norm in the offset network"],
    other_kernels=f"{other_kernels - learned:+,}",
    corner=moves["text: references from corner to corner"],
    reach=f"{farthest(2, 'code'):.2f}",
    cell=moves["text: offsets in cells"],
    strided=f"{strided:.2f}",
    plain=f"{plain:.2f}",
    overhead=f"{overhead / 1e6:.3f}",
    share=f"{overhead / (attention + overhead):.2%}",
    shift=moves["text: windows shifted as Swin's"],
    not_halved=moves["position bias: displacement not halved"],
    no_down_norm=moves["no norm after down-sampling"],
    learned=f"{learned:,}",
    indices=f"{indices:,}",
    masks=f"{masks:,}",
    all_numbers=f"{learned + indices + masks:,}",
    unexplained=f"{max(record.rest(m) for m in range(record.heads)):.0%}",
)

# %% [markdown]
# Percentages are of `dat_tiny`'s logits under the deterministic weights above. They tell that something changes, not
# how much a trained model would mind. `variant="paper"` follows the text in references, offsets, offset network and
# shift at once. Each keyword alone does one of these. The rows are in `dynattn/papers/dat.toml`.
#
# ## Trained
#
# `dat_mini` has DAT's modules on small pictures of shapes in front of photographs. `swin_mini` has shifted windows in
# their place. `dynattn figures` draws the paper's figures 4 to 7 with these networks, and measures them.
#
# A share "on the object" means nothing by itself: objects tend to be in the middle, and so do points. So each share
# stands beside two nulls: the same network with **random weights**, and the same points scored with **another image's
# mask**.

# %%
figures = recorded("dat")
measured(figures)

# %% [markdown]
# Two numbers stand under random weights where there are two such networks. The first has offsets as the published
# models start with. The second starts with offsets of zero, as `dat_mini` does. All of this was measured when the
# figures were drawn. Here are the first images again, live, for networks that differ only in their seed:

# %%
few, whole, rows = 12, from_records(figures[5]["networks"]["dat_mini"]), []
for name in (name for name in weights.available() if name.startswith("dat_mini")):
    live = audit.measure_points(name, few)
    attention, points = (audit.of_all_layers(live, kind) for kind in ("attention", "points"))
    if name == "dat_mini":
        all_images = audit.of_all_layers(whole, "attention")
        bound = 4 * all_images.standard_error * math.sqrt(all_images.n / few)
        assert abs(attention.value - all_images.value) < bound
    shares = [f"{share:.2f}" for share in (attention.value, attention.other, points.value, points.other)]
    rows.append((f"`{name}`", *shares, f"{audit.best_ratio(live, 'points'):.2f}"))
columns = ("attention on the object", "null", "points on the object", "null", "points, best layer: times the null")
table((f"{few} images", *columns), rows)
rows = []
for kind in ("attention", "points"):
    share = audit.of_all_layers(whole, kind)
    error = f"{share.value:.3f} ± {share.standard_error:.3f}"
    rows.append((kind, error, f"{share.other:.3f}", f"{share.value / share.other:.1f}"))
table((f"`dat_mini`, {all_images.n:.0f} images", "share on the object", "null", "times the null"), rows)
say("Nulls: other images' masks. Points gather on the object a little. Attention then picks the points that did.")

# %% [markdown]
# The figures are in the [gallery](../../figures/README.md). Figure 4 has one small network for each range $s$.
#
# ![Figure 4](../../figures/dat_4_offset_range.png)
#
# Figure 5 shows the most important keys: attention is propagated from the output back through the deformable layers.
#
# ![Figure 5](../../figures/dat_5_important_keys.png)
#
# The paper does not give the rule. This is the one here:

# %%
source(propagate)

# %% [markdown]
# Figure 6 shows the deformed points of both maps, and the grid that they left.
#
# ![Figure 6](../../figures/dat_6_deformed_points.png)
#
# Figure 7 shows what two queries read, beside a Swin of the same size that was trained alike.
#
# ![Figure 7](../../figures/dat_7_attention.png)
#
# What these pictures do **not** show:
#
# - The set is procedural and easy: one object that differs in colour, in front of a blurred photograph. The networks
#   find what stands out. That is not recognition of giraffes.
# - `dat_mini` differs from the paper's models beyond its size: it has a convolutional stem, a small convolution in
#   front of every block, offsets that start at zero, points kept on the map, and fewer points than tokens. Without
#   these, a net of this size hardly learns in minutes. The larger models have none of them unless asked.
# - The pictures are of one seed, and figure 4 has one network for each range. Its bars do not hold what another seed
#   would change. The photographs of a cat and a flower are there to look at. Nothing is measured on them.
#
# ## Deformable-DETR's attention
#
# This is the comparison of Appendix A. Every query has points of its own, in every head. Their weights are not a
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
for layer in audit.layers(detr, deformable_detr.DeformableDetrAttention):
    nn.init.normal_(layer.offset.weight, std=0.15)  # as if it had learned: each query moves its points
(own_points, *_) = dynattn.trace(detr, picture.x).of_kind("deformable_detr")
show(audit.shared_and_own(picture, own_points, record, queries=[(36, 36), (36, 92), (92, 64)]))

# %% [markdown]
# Deformable-DETR pays for this in sampling. It reads features for every pair of query and point, and DAT for every
# point. This is the quadratic memory that the text speaks of, and the reason why $K$ was cut to four there. For one
# layer of stage 3 and a batch of sixty-four:

# %%
HW, C, batch = 14 * 14, 384, 64
rows = []
for name, reads_of, where in (
    ("DAT, 196 keys", HW, "dat_tiny"),
    ("DAT, 49 keys", HW // 4, "dat_tiny_49_49"),
    ("Deformable-DETR, 16 keys", HW * 16, "dat_tiny_ddetr_16_16"),
    ("Deformable-DETR, 49 keys", HW * 49, "dat_tiny_ddetr_49_49"),
    ("Deformable-DETR, 196 keys", HW * 196, "dat_tiny_ddetr_196_49"),
):
    said = cost.published(where)
    rows.append((name, f"{batch * reads_of * C * 4 / 2**20:,.0f} MB", said["macs_G"] + " G", said["value"]))
table(("stage 3", "sampled features of one layer, float32", "multiply-adds, paper", "top-1, paper"), rows)

# %% [markdown]
# ## A longer exercise
#
# Write deformable attention from DAT-9, as a function `(q, k, v, points, table, query_shape)`. Take
# `core.sample_points` to read the table, and torch for the rest. `core.grid_points` has the positions of the queries.
# Begin with one group of points and without a table. Then add $\phi(\hat{B}; R)$, then groups. `verify.check` tells how
# far you are. Suppose that somebody starts from the library's own bias, and takes points for (x, y):


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
# Without a table this attempt is right. So the simplest case in which it fails has a table, and little else.
#
# A student hands in a file. `dynattn check` finds the functions in it by their names. It runs them in a process of
# their own, with a limit on time and memory. The verdict is the same:

# %%
run = audit.dynattn_check(deformable_attention, "import torch", "from dynattn.mechanisms import deformable")
print(f"$ dynattn check answers.py\n{run.stdout}exit code {run.returncode}")
assert run.returncode == 1 and "rows and columns swapped" in run.stdout

# %% [markdown]
# A solution. Try yourself before you read it.


# %%
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


verify.check("deformable_attention", deformable_attention)
say("The solution passes: outputs and gradients.")
