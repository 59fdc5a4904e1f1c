# %% [markdown]
# # BiFormer and DeBiFormer: first choose regions, then read their tokens
#
# *DeBiFormer: Vision Transformer with Deformable Agent Bi-level Routing Attention*, BaoLong et al., ACCV; and
# *BiFormer*, Zhu et al., CVPR, whose attention it builds on. A lesson of less than an hour.
# The [audit](audit/02_bilevel.ipynb) has what this page leaves out: the ledger, the equality with the published code,
# the cost formula derived again, all tables, the kernels.

# %%
import torch
from dynattn import core, ops, verify
from dynattn.lessons import agree, begin, bilevel as lesson, judge, normal, rearrange, say, source; begin()

# %% [markdown]
# ## 1. The question
#
# Every token of an image asks: *where is something that I need?* It compares its **query** with the **keys** of other
# tokens, and takes a weighted mean of their **values**. Four networks answer in four ways. All were trained alike.
#
# | network | what a query may read |
# | --- | --- |
# | `vit_mini` | every token |
# | `swin_mini` | the tokens of its own window |
# | `biformer_mini` | the tokens of some regions. Its own region has chosen them |
# | `debiformer_mini` | some agents. Each of them has read some regions |
#
# **Predict first.** The query below stands in the background, at the red star. Which regions does its region choose:
# those around it, or those of the bird? Then look. In `biformer_mini` the outlines are the regions that the query
# reads. In `debiformer_mini` they are the regions that the agents of the dashed region read; the query itself reads all
# agents, the dots. Click on another place, and predict again.

# %%
lesson.question()

# %% [markdown]
# A window depends on where a query stands. The chosen regions depend on what the queries of a region say. In
# `debiformer_mini` all queries of a head read the same agents; only the weights change.
#
# ## 2. Notation
#
# - *The paper* means the text of DeBiFormer. *The published code* means the authors' program; both layers below follow
#   it. They differ in places: see the audit.
# - $x$: a map of $H \times W$ tokens with $C$ channels. $M$: heads, $d = C / M$ the channels of a head.
# - $S$: the map is cut into $S \times S$ **regions**. A letter with a small $r$ above, such as $q^r$, has one row for each
#   region.
# - $A^r$: the **affinity** of regions. $I^r$: the **routes**, the $k$ regions that each region reads.
# - LCE: local context enhancement, a depthwise convolution of the values.
# - DBRA only: an **agent** stands for every $r \times r$ cells; there are $N_s$. $p$: where it would stand, $\Delta p$: its
#   offset. $\phi$: reading a map between its cells; $\bar{x}$: what an agent finds so. $\hat{q}, \hat{k}, \hat{v}$: the
#   attention in which agents read. $\hat{O}$, $O$: what agents know after it. $\hat{B}$, $R$: a table of position biases,
#   and half the displacement from query to agent.
#
# ## 3. Bi-level routing attention (BRA)
#
# This is all of it. The cell asserts that the library computes the same.


# %%
def bilevel_layer(x, net, M, S, k):
    side, images = x.shape[1] // S, torch.arange(len(x))[:, None, None]
    q, key, v = net.qkv(x).chunk(3, dim=-1)  # DEBI-1
    cut = lambda t: rearrange(t, "B (Y h) (X w) (M d) -> B (Y X) M (h w) d", Y=S, X=S, M=M)
    A = cut(q).mean(dim=3).flatten(2) @ cut(key).mean(dim=3).flatten(2).mT  # (B, S², S²)  DEBI-9
    I = A.topk(k).indices  # (B, S², k)  DEBI-10
    gather = lambda t: rearrange(cut(t)[images, I], "B R k M n d -> B R M (k n) d")  # DEBI-11
    z = (cut(q) @ gather(key).mT / x.shape[-1] ** 0.5).softmax(dim=-1) @ gather(v)  # DEBI-2
    z = rearrange(z, "B (Y X) M (h w) d -> B (Y h) (X w) (M d)", Y=S, h=side)
    return net.proj(z + net.lce(v.movedim(-1, 1)).movedim(1, -1))  # DEBI-3


(bra, dbra), x = lesson.library_layers(16, 4, (8, 8), regions=4, topk=3), normal(2, 8, 8, 16)
assert torch.allclose(bilevel_layer(x, bra, M=4, S=4, k=3), bra(x))

# %% [markdown]
# ## 4. Step one: choose regions
#
# $$q = x W_q,\quad k = x W_k,\quad v = x W_v \tag{DEBI-1}$$
# $$A^r = q^r (k^r)^\top \tag{DEBI-9}$$
# $$I^r = \text{topk}(A^r) \tag{DEBI-10}$$
#
# $q^r$ and $k^r$ are the mean query and the mean key of each region. So one number says how much a region likes
# another. All heads share the choice.

# %%
source(lesson.bilevel.bilevel_attention_loops)
q, key, v = normal(1, 2, 20, 3), normal(1, 2, 24, 3), normal(1, 2, 24, 3)
agree(ops.bilevel_attention, dict(q=q, k=key, v=v, query_shape=(5, 4), key_shape=(4, 6)), regions=2, topk=2)

# %% [markdown]
# **Turn it.** This is the trained network. Point at a query. Left: its region, and the regions that this one reads.
# Middle: the affinity. Right: every region is a dot. The region takes the dots with the largest affinity, those on the
# right. The query alone would take the highest dots. Are they the same? Change $k$, then $S$: with what $S$ does the
# choice become poor? Then take another layer.

# %%
lesson.routing()

# %% [markdown]
# Mostly the dots lie near a line: the mean of a region speaks for its queries. Where a region holds object and
# background, its mean speaks for neither.
#
# ## 5. Step two: read their tokens
#
# $$k^g = \text{gather}(k, I^r),\quad v^g = \text{gather}(v, I^r) \tag{DEBI-11}$$
# $$z^{(m)} = \text{softmax}\left(q^{(m)} k^{g(m)\top} / \sqrt{d}\right) v^{g(m)} \tag{DEBI-2}$$
# $$z = \text{Concat}\left(z^{(1)}, \dots, z^{(M)}\right) W_o \tag{DEBI-3}$$
#
# One softmax runs over the tokens of all regions that are read. The paper divides by $\sqrt{d}$, the published code by
# $\sqrt{C}$. A program that gathers copies keys many times: a region that several regions like is copied for each of
# them. The library's kernel reads keys where they lie. The audit measures both.

# %%
verify.check("routed_attention", ops.routed_attention, cases=6)
verify.check("bilevel_attention", ops.bilevel_attention, cases=6)
say("Both agree with the loops: outputs and gradients, in six random cases each.")

# %% [markdown]
# ## 6. A choice has no gradient
#
# $I^r$ holds whole numbers. A small change of a query leaves them as they are, or changes them at once. So no gradient
# passes through the routes: a network learns them only by what queries and keys do elsewhere, in the softmax.
#
# **Turn it.** Here a map has $4 \times 4$ tokens, and each token is a region. One query goes round a circle. Move it. Is
# the gradient right? It is the blue tangent. What does it not know? Then take all regions.

# %%
lesson.gradient()

# %% [markdown]
# The gradient is right between the jumps. It knows nothing of them. With all regions there is no choice: no jump.
#
# ## 7. Deformable bi-level routing attention (DBRA)
#
# A region chooses for all of its tokens, and most of the tokens that it reads are of no use. DBRA lets a few agents
# read for everybody. The image moves them, as in DAT. This is all of it, with one offset group.


# %%
def agent_layer(x, net, M, r, S, k):
    (H, W, C), grid = x.shape[1:], (x.shape[1] // r, x.shape[2] // r)
    heads, join, chw = (lambda t: core.split_heads(t, M)), core.merge_heads, (lambda t: t.movedim(-1, 1))
    q, key, v = net.qkv(x).chunk(3, dim=-1)  # DEBI-6, DEBI-8
    offset = net.offset(chw(q)).flatten(1, 2)  # (B, agents, 1): one number for rows and columns
    points = (core.grid_points(grid, "centre", x) + offset).clamp(-1, 1)  # DEBI-6
    found = core.sample_points(chw(x), points).mT.unflatten(1, grid)  # DEBI-7
    how = dict(regions=S, topk=k, scale=C**-0.5)
    read = ops.bilevel_attention(heads(net.agent_q(found)), heads(key), heads(v), grid, (H, W), **how)  # DEBI-9 to 11
    o = found + net.unify(join(read, grid) + net.lce(chw(v)).movedim(1, -1))  # DEBI-12
    o = net.norm(o + net.ffn(net.norm_ffn(o)))  # DEBI-13
    kv = heads(net.agent_k(o)), heads(net.agent_v(o))  # DEBI-14
    z = ops.deformable_attention(heads(q), *kv, points[:, None], net.table, (H, W), query_grid="corner", scale=C**-0.5)
    return net.proj(join(z, (H, W)))  # DEBI-15


assert torch.allclose(agent_layer(x, dbra, M=4, r=2, S=4, k=3), dbra(x))

# %% [markdown]
# $$q = x W_q,\quad \Delta p = \theta_\text{offset}(q),\quad \bar{x} = \phi(x;\, p + \Delta p) \tag{DEBI-6}$$
# $$\phi(z;\, (p_x, p_y)) = \sum_{(r_x, r_y)} g(p_x, r_x)\, g(p_y, r_y)\, z[r_y, r_x, :],\quad
# g(a, b) = \max(0, 1 - |a - b|) \tag{DEBI-7}$$
# $$\hat{q} = \bar{x} W_q,\quad \hat{k} = x W_k,\quad \hat{v} = x W_v \tag{DEBI-8}$$
# $$\hat{O} = \bar{x} + W_{o'}\left(\text{Attention}(\hat{q}, \hat{k}^g, \hat{v}^g) + \text{LCE}(\hat{v})\right) \tag{DEBI-12}$$
# $$O = \text{MLP}(\text{LN}(\hat{O})) + \hat{O} \tag{DEBI-13}$$
# $$k = O W_k,\quad v = O W_v \tag{DEBI-14}$$
# $$z^{(m)} = \text{softmax}\left(q^{(m)} k^{(m)\top} / \sqrt{d} + \phi(\hat{B};\, R)\right) v^{(m)} \tag{DEBI-15}$$
#
# $\theta_\text{offset}$ is a depthwise convolution of stride $r$, LayerNorm, GELU and a linear map. The paper writes $W_q$,
# $W_k$, $W_v$ for two maps each: in the code `qkv` is for the map, `agent_q`, `agent_k`, `agent_v` are for agents. It
# prints $\hat{x}$ in DEBI-12 and does not define it: the code adds $\bar{x}$. The code has a LayerNorm before DEBI-14.
#
# So there are two attentions, one in the other. Agents read tokens. Then queries read agents. The product of both
# matrices tells which tokens the attentions pass on to a query. It is not all that a query gets.
#
# ## 8. Agents
#
# **Turn it.** Left: the agents. A line goes from where each would stand to where it stands. Middle: what one
# agent reads. Right: the product of both attentions. Point at two queries: which of the three pictures change? Take more
# agents, then fewer. Let each read all regions.

# %%
lesson.agents()

# %% [markdown]
# The query does not move the agents. It changes their weights: discs grow and shrink, and another agent becomes the
# heaviest. Agents that would leave the map stop at its edge. In the published code an agent has one number for both
# directions, so it moves on a diagonal. `debiformer_mini` has two numbers, as the paper says.
#
# ## 9. What it costs
#
# In multiply-adds, with linear maps and LCE: BRA takes $4HWC^2 + S^4C + 2k(HW)^2C/S^2 + 25HWC$. With few regions each
# region is large, so reading it is expensive. With many regions the affinity is expensive. DBRA pays for $N_s$ agents,
# which read regions, and $HW$ queries, which read agents.

# %%
lesson.cost()

# %% [markdown]
# On one map $S$ and $k$ decide what BRA costs. DBRA's cost hardly depends on $S$. With $S$, $k$ and $r$ fixed both costs
# grow with $(HW)^2$, as dense attention's does, only with a smaller factor. Windows grow with $HW$. The audit shows what
# the paper's formula says of this, and measures the time.
#
# ## 10. Does it do what the paper says?
#
# The paper says that routed regions are "semantically relevant", and that with DBRA the model "performed better in
# target objects locating", by Grad-CAM. We measure both. First: do regions that lie on the object read more of the
# object than regions off it do? Second: how much of a class map lies on the object? A class map multiplies each
# feature of the first stage by its slope (HiResCAM), because the last stage has mixed the whole image. There are two
# nulls: random weights, and the mask of another image.

# %%
found = lesson.verdict()
lesson.draw_verdict(found)
say(lesson.in_words(found))

# %% [markdown]
# Nothing in the equations asks a region to read regions that are like it: queries and keys come from different linear
# maps. And one network of each kind decides nothing: look at how far the seeds are apart.
#
# ## 11. Exercises
#
# **Predict.** We make every query three times as long. Then every key of one region three times as long. Do the routes
# change? Decide, then run the cell.

# %%
regions, (q, key) = core.Regions((8, 8), 4), (normal(1, 2, 64, 4), normal(1, 2, 64, 4))
route = lambda q, key: lesson.bilevel.route(regions.means(q), regions.means(key), 3)
longer = torch.where((regions.numbers(key.device) == 5)[:, None], 3 * key, key)
same = [float((route(*pair) == route(q, key)).all(dim=-1).float().mean()) for pair in ((3 * q, key), (q, longer))]
say(f"Regions with the same routes: {same[0]:.0%} with longer queries, {same[1]:.0%} with longer keys in one region.")

# %% [markdown]
# <details><summary>An answer</summary>
#
# A factor common to all affinities of a row changes no order: the routes stay. Longer keys of one region change one
# column of $A^r$. Regions that like this region like it more, and those that dislike it dislike it more.
#
# </details>
#
# **Implement.** Write `routed_attention(q, k, v, routes)`. `q` is (B, M, R, T, d): R regions of T queries. `k` and `v`
# are (B, M, S, t, d): here S counts regions of keys, of t keys each. `routes` is (B, R, n): the n regions that each
# region reads, from 0. The scale is $d^{-1/2}$. Return (B, M, R, T, d). `verify.check` compares it with the loops,
# outputs and gradients, and names the mistake if it knows it. The cases have a `key_mask` (B, S, t) too: keys that may
# not be read, where it is false.

# %%
def routed_attention(q, k, v, routes, key_mask=None, scale=None):
    pass  # your code


judge("routed_attention", routed_attention)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def routed_attention(q, k, v, routes, key_mask=None, scale=None):
#     out, scale = torch.zeros_like(q), q.shape[-1] ** -0.5 if scale is None else scale
#     for b in range(len(q)):
#         for r, regions in enumerate(routes[b]):
#             keys, values = k[b][:, regions].flatten(1, 2), v[b][:, regions].flatten(1, 2)
#             logits = q[b, :, r] @ keys.mT * scale
#             if key_mask is not None:
#                 logits = logits.masked_fill(~key_mask[b, regions].flatten(), -torch.inf)
#             out[b, :, r] = logits.softmax(dim=-1) @ values
#     return out
# ```
#
# </details>
#
# **Explain.** A region that no region reads: what do its keys learn in this layer? And why can offsets be learnt,
# although routes cannot?
#
# <details><summary>An answer</summary>
#
# Its keys are in no softmax, so their gradient is zero. The choice has no gradient that could bring them back. Its
# values have one gradient left: LCE reads all values. Offsets move points, and $\phi$ changes smoothly with a point: so
# $\bar{x}$ has a gradient, and the position bias of DEBI-15 too.
#
# </details>
