# %% [markdown]
# # DAT: the image moves the points that attention reads
#
# *Vision Transformer with Deformable Attention*, Xia et al., CVPR 2022. A lesson of 50 minutes.
# The [audit](audit/01_dat.ipynb) has what this page leaves out: the ledger of misprints, the equality with the published
# code, all tables, the kernels.

# %%
import torch, torch.nn.functional as F
from dynattn import core, ops, verify
from dynattn.lessons import agree, begin, dat as lesson, judge, normal, rearrange, say, source; begin()

# %% [markdown]
# ## 1. The question
#
# Every token of an image asks: *where is something that I need?* It reads other tokens, its **keys**, and takes a
# weighted mean of their values. Three networks answer the question in three ways. All three were trained alike.
#
# | network | what a query may read |
# | --- | --- |
# | `vit_mini` | every token |
# | `swin_mini` | the tokens of its own window |
# | `dat_mini` | a few points. The image has moved them |
#
# **Predict first.** The query below stands in the background, at the red star. Which of the three can read the bird?
# How many keys does each of them need? Then look. Click on another place and predict again.

# %%
lens = lesson.question()
lens

# %% [markdown]
# The window does not reach the bird. Dense attention reaches it and pays for every token of the image. DAT reaches it
# with a few points. Those points are the same for every query: click twice and compare. Only the weights change.
# The layer is one whose points depend on the image. In the first of DAT's four layers they hardly do: section 8
# measures it.
#
# ## 2. Notation
#
# - *The paper* means the text. *The published code* means the authors' program. They differ in places; the layer below
#   follows the code.
# - Positions are (row, col). A **pixel** position counts cells: 0 is the first cell, $H - 1$ the last. A **normalised**
#   position goes from $-1$, the first cell, to $+1$, the last.
# - $x$: a map of $H \times W$ tokens with $C$ channels. $M$: heads, $m$ one of them, $d = C / M$ its channels.
# - $p$: reference points, one for every $r \times r$ cells, $N_s$ in all. $\Delta p$: their offsets, at most $s$ units.
# - $\phi$: reading a map between its cells. $g$: the hat that $\phi$ is made of. $\hat{B}$: a table of position biases.
#   $R$: half the displacement from query to point. $z$: the output.
#
# ## 3. The layer
#
# This is all of it, with one offset group. The cell asserts that the library computes the same.


# %%
def deformable_layer(x, net, M, s):
    (B, H, W, C), grid = x.shape, lambda h, w: core.grid_points((h, w), "centre", x)  # positions, in [-1, 1]
    q = net.q(x)  # DAT-6
    offset = net.offset(rearrange(q, "B H W C -> B C H W")).tanh()  # a small network looks at the queries
    h, w = offset.shape[1:3]
    points = grid(h, w) + (s * offset / torch.tensor([h, w])).flatten(1, 2)  # p + Δp                      DAT-7
    read = F.grid_sample(rearrange(x, "B H W C -> B C H W"), points.flip(-1)[:, None], align_corners=True)  # DAT-8
    k, v = net.k(read[:, :, 0].mT), net.v(read[:, :, 0].mT)  # keys and values are read at the points    DAT-6
    q, k, v = (rearrange(t, "B ... (M d) -> B M (...) d", M=M) for t in (q, k, v))
    R = (grid(H, W)[:, None] - points[:, None]) / 2  # from query to point
    bias = F.grid_sample(net.table.expand(B, -1, -1, -1), R.flip(-1), align_corners=True)  # φ(B^; R)
    logits = q @ k.mT / (C // M) ** 0.5 + bias
    return net.proj(rearrange(logits.softmax(-1) @ v, "B M (H W) d -> B H W (M d)", H=H))  # DAT-9, DAT-3


net, x = lesson.library_layer(dim=16, heads=4, stride=2, offset_range=2.0), normal(2, 6, 8, 16)
assert torch.allclose(deformable_layer(x, net, M=4, s=2.0), net(x))

# %% [markdown]
# A transformer block puts it where every transformer has its attention (DAT-4, DAT-5), and its heads work as usual
# (DAT-1, DAT-2). New are three steps: **read** between the cells, **move** the points, **attend** to what was read.
#
# ## 4. Step one: read between the cells
#
# $$\phi(z; (p_x, p_y)) = \sum_{(r_x, r_y)} g(p_x, r_x)\, g(p_y, r_y)\, z[r_y, r_x],\qquad
# g(a, b) = \max(0, 1 - |a - b|) \tag{DAT-8}$$
#
# The sum runs over all cells of the map. The loops do the same. All but four terms are zero: the fast form knows that.

# %%
source(core.read_bilinear, core.sample_points_torch)
agree(ops.sample_points, {"x": normal(2, 3, 4, 5), "points": 2.4 * torch.rand(2, 6, 2).double() - 1.2})

# %% [markdown]
# **Turn it.** Drag the cross, or click it and use the arrow keys. Put it on a cell: one term is left. Put it in the
# middle of four cells: they count alike. Push it over the edge: outside the map there are zeros.

# %%
lesson.sampling()

# %% [markdown]
# The value changes smoothly as the cross moves. So it has a slope, and training can learn where to put a point.
#
# ## 5. Step two: move the points
#
# $$\Delta p = \theta_{\text{offset}}(q),\qquad \Delta p \leftarrow s \tanh(\Delta p),\qquad
# \tilde{x} = \phi(x;\, p + \Delta p) \tag{DAT-7}$$
#
# The network $\theta_{\text{offset}}$ is small: a depthwise convolution of stride $r$, GELU, and two numbers for each
# point. The $\tanh$ holds every point near its reference.

# %%
source(lesson.deformable.OffsetNetwork.forward)

# %% [markdown]
# **Turn it.** These are trained layers. A ring is a reference, a dot is where the point went.
# Change the image: do the points follow it? Set $s = 0$: nothing moves. Change $r$: how many points remain?

# %%
lesson.offsets()

# %% [markdown]
# ## 6. Step three: attend
#
# $$q = xW_q,\quad \tilde{k} = \tilde{x}W_k,\quad \tilde{v} = \tilde{x}W_v \tag{DAT-6}$$
# $$z^{(m)} = \text{softmax}\left(q^{(m)} \tilde{k}^{(m)\top} / \sqrt{d} + \phi(\hat{B}; R)\right) \tilde{v}^{(m)}
# \tag{DAT-9}$$
#
# A point can lie anywhere, so the bias is read between the entries of its table, by the same $\phi$.

# %%
source(lesson.deformable.deformable_attention_loops)
verify.check("deformable_attention", ops.deformable_attention, cases=6)

# %% [markdown]
# **Turn it.** Point at a query. The star is the query, a dot is a point, its area the attention. Which part of the logit
# decides, content or position?

# %%
lesson.attention()

# %% [markdown]
# ## 7. What it costs
#
# $$\Omega = \underbrace{2HWN_sC + 2HWC^2 + 2N_sC^2}_{\text{attention}} +
# \underbrace{(k^2 + 2)N_sC}_{\text{offset network}} \tag{DAT-10}$$
#
# in multiply-adds, with $N_s = HW / r^2$ points and the kernel $k$ of the offset network.

# %%
lesson.cost()

# %% [markdown]
# With $r = 1$ there are as many points as tokens, and the cost is that of dense attention. This is where DAT loses: on a
# large map $r$ must grow. The published models use the layer on the two smallest maps only. The offset network is
# cheap everywhere.
#
# ## 8. Does it do what the paper says?
#
# The paper says: the image moves the points to where it is worth reading. We measure two things on test images. First,
# how much of the offsets depends on the image: take each point's mean offset over all images away and see what is left.
# Its null is the same network with random weights. Second, how many points lie on the object. Its null is the mask of
# another image: objects tend to be in the middle, and so do points.

# %%
found = lesson.verdict()
say(lesson.in_words(found))

# %% [markdown]
# ## 9. Exercises
#
# **Predict.** With `offset_range=0` the points stay on their references. Is the layer then the same as attention to a
# pooled map, which `offsets=False` computes? Decide, then run the cell.

# %%
still, pooled = (lesson.library_layer(16, 4, stride=2, offset_range=0.0, offsets=o) for o in (True, False))
pooled.load_state_dict(still.state_dict())
say(f"Largest difference: {float((still(x) - pooled(x)).abs().max()):.2g}")

# %% [markdown]
# <details><summary>An answer</summary>
#
# No. A point reads four cells at the place where it lies. A pooled cell is the mean of all its $r \times r$ cells. The
# two agree where a reference lies in the middle of four cells. In the published code references are the centres of
# cells of the whole map, sampled as if $-1$ and $+1$ were the outermost cells. So a reference lies a little nearer to the
# middle of the map than the cell it stands for.
#
# </details>
#
# **Implement.** Write `sample_points(x, points)` without `grid_sample`. `x` is (B, C, H, W). `points` is (B, N, 2),
# normalised (row, col): $-1$ is the centre of the first cell, $+1$ of the last. Outside the map there are zeros. Return
# (B, C, N). `verify.check` compares it with the loops: outputs and gradients. Where it is wrong, it shows the simplest
# case, and names the mistake if it knows it.


# %%
def sample_points(x, points):
    ...  # your code


judge("sample_points", sample_points)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def sample_points(x, points):
#     weights = core.bilinear_weights(points, x.shape[2:])  # products of two hats: (B, N, H W)
#     return torch.einsum("bns,bcs->bcn", weights, x.flatten(2))
# ```
#
# </details>
#
# **Explain.** All queries share the points. Which term of DAT-10 would grow if every query had points of its own, as in
# Deformable-DETR? And why can two offset groups have different points, though they share one offset network?
#
# <details><summary>An answer</summary>
#
# Keys and values would have to be read and projected for every pair of query and point: $2N_sC^2$ becomes
# $2 HW N_s C^2$. The groups share the network, but each shows it its own channels of the queries.
#
# </details>
