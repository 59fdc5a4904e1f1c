# %% [markdown]
# # DGT: queries that are alike share their keys
#
# *Dynamic Group Transformer: A General Vision Transformer Backbone with Dynamic Group Attention*, Liu et al., IJCAI.
# A lesson of less than an hour. The [audit](audit/04_dgt.ipynb) has what this page leaves out: the gradients, the
# ledger of misprints, the kernels, the models and all tables.

# %%
import torch, torch.nn.functional as F
from dynattn import ops, verify
from dynattn.lessons import begin, dgt as lesson, judge, normal, rearrange, say, source; begin()

# %% [markdown]
# ## 1. The question
#
# Every token of an image asks: *where is something that I need?* It has a **query**. It compares the query with the
# **keys** of other tokens, and takes a weighted mean of their **values**. Three networks answer in three ways.
# All three were trained alike.
#
# | network | what a query may read |
# | --- | --- |
# | `vit_mini` | every token |
# | `swin_mini` | the tokens of its own window |
# | `dgt_mini` | some tokens, anywhere. Its group has selected them |
#
# **Predict first.** The query below stands in the background, at the yellow cross. Nearly all of the background is one
# group. Which keys does this group select: those of the background, or those of the bird? Then look. Click on another
# place and predict again.

# %%
lesson.question()

# %% [markdown]
# Click on two places of the background: in most places the keys stay the same, only the weights change. Click on the
# bird: the keys are others. A window depends on where a query stands. A group depends on what the query says.
#
# ## 2. Notation
#
# - *The paper* means the text. There is no published code. Where the paper has a misprint, this page uses the form
#   that works. The audit shows both.
# - $L$: the tokens of a map of $H \times W$ cells, $C$ its channels, $M$ the heads, $d = C / M$ the channels of a head.
# - $x_Q^i, x_K^i, x_V^i$: query, key and value of token $i$ in one head. Positions are (row, col).
# - $G$: groups, $j$ one of them, $e_j$ its **centroid**, a vector of length one. $N_j$: queries of group $j$. $k$: keys
#   of each group, $id_j$ their numbers.
# - $P$: logits, $\hat{P}$: weights, $Y$: the output. $\tau$: the pace of a centroid, $lr$: the learning rate. The
#   library's code writes `h` for $M$, `n` for $k$, and `S` for the number of keys of the map.
#
# ## 3. The layer
#
# This is all of it. The cell asserts that the library computes the same. Here each query collects its own copy of the
# keys; the library lets a group share them.


# %%
def dynamic_group_layer(x, net, M, k):
    Q, K, V = rearrange(net.qkv(x), "B H W (three M d) -> three B M (H W) d", three=3, M=M)
    e = F.normalize(net.centroids, dim=-1)  # (M, G, d)
    group = (Q @ e.mT).argmax(dim=-1)  # (B, M, L): the centroid that a query is nearest to
    chosen = (e @ K.mT).topk(k).indices  # (B, M, G, k): the keys that a centroid likes best  DGT-1
    b, m = torch.arange(len(x))[:, None, None], torch.arange(M)[:, None]
    mine = chosen[b, m, group]  # (B, M, L, k): the keys of the group of each query
    keys, values = K[b[..., None], m[..., None], mine], V[b[..., None], m[..., None], mine]  # (B, M, L, k, d)
    P = (keys @ Q[..., None])[..., 0]  # DGT-11
    weights = (P / Q.shape[-1] ** 0.5).softmax(dim=-1)  # DGT-12
    Y = (weights[..., None, :] @ values)[..., 0, :]  # DGT-13
    return net.proj(rearrange(Y, "B M (H W) d -> B H W (M d)", H=x.shape[1]))  # DGT-2


net, x = lesson.library_layer(dim=16, heads=4, groups=3, keys=10), normal(2, 6, 8, 16)
assert torch.allclose(dynamic_group_layer(x, net, M=4, k=10), net(x))

# %% [markdown]
# A transformer block puts it where every transformer has its attention (DGT-8 to DGT-10). New are four steps:
# **group** the queries, **select** the keys, **attend** in a group, and **move** the centroids in training.
#
# ## 4. Step one: group the queries
#
# $$\text{group of } i = \arg\max_j\; e_j \cdot x_Q^i$$
#
# A centroid has length one. So the largest product belongs to the centroid with the smallest angle to the query. If two
# centroids are equally near, the first one wins. The rule matters: without it, two correct programs can disagree.

# %%
source(lesson.dynamic_group.assign_loops, lesson.dynamic_group.assign_torch)
assign, (q, e) = lesson.dynamic_group.ASSIGN, (normal(2, 2, 9, 3), F.normalize(normal(2, 4, 3), dim=-1))
assert torch.equal(assign["torch"](q, e), assign["loops"](q, e))

# %% [markdown]
# **Turn it.** Here a head has two channels, so vectors are arrows. Drag the cross, or click it and use the arrow keys:
# the orange centroid follows. Which queries change their group? Can a group be empty? Change $G$. Then put the star on
# another query: does a longer query belong to another group?

# %%
lesson.grouping()

# %% [markdown]
# Length does not matter: it stretches all bars alike. The groups are sectors.
#
# ## 5. Step two: select the keys
#
# $$id_j = \text{Top-}k\left(e_j, \{x_K^i\}_{i=1}^L\right),\quad x_{K_j} = \{x_K^i \mid i \in id_j\},\quad
# x_{V_j} = \{x_V^i \mid i \in id_j\} \tag{DGT-1}$$
#
# The centroid stands for its queries. It looks at all keys of the map and takes the $k$ that it likes best.
#
# **Turn it**, below the code. Drag the centroid. Change $k$. Then give all keys the same length: which keys come in,
# which go?

# %%
source(lesson.dynamic_group.select_loops, lesson.dynamic_group.select_torch)
select, K = lesson.dynamic_group.SELECT, normal(2, 2, 9, 3)
assert torch.equal(select["torch"](K, e, 4), select["loops"](K, e, 4))

# %%
lesson.selection()

# %% [markdown]
# Here length counts. The bound is a straight line, and a long key crosses it more easily. A key can be selected by
# several groups, or by none.
#
# ## 6. Step three: attend in groups
#
# $$Y_j = \text{SA}\left(x_{Q_j}, x_{K_j}, x_{V_j}\right) \in \mathcal{R}^{N_j \times C} \tag{DGT-2}$$
#
# This is attention as usual, between the queries of a group and its keys:
#
# $$P = x_Q x_K^\top \tag{DGT-11}$$
# $$\hat{P} = \text{softmax}\left(P / \sqrt{d}\right) \tag{DGT-12}$$
# $$Y = \hat{P} x_V \tag{DGT-13}$$
#
# Then each row of $Y_j$ goes back to the place that its query came from. The torch form stands in the layer above, in
# the lines DGT-11 to DGT-13. Groups have different sizes, so a fast program cuts them into tiles of equal size. The
# audit shows how.

# %%
source(lesson.dynamic_group.grouped_attention_loops)
verify.check("grouped_attention", ops.grouped_attention, cases=6)

# %% [markdown]
# **Turn it.** This is the trained network. Point at a query. Left: all groups of this head. Middle: the keys of the
# query's group, and the attention that they get. Right: every key is a dot. The group selects from the right. The query
# would select from the top. Do they agree? Change $k$: how much attention is lost? Then take the star and the fourth layer.

# %%
lesson.attention()

# %% [markdown]
# Mostly they agree, and the dots lie on a line. So the keys of the group are nearly the best keys for the query.
#
# ## 7. Step four: move the centroids
#
# No gradient passes through a choice, so training cannot learn the centroids in the usual way. They follow the mean of
# their queries. After each step of training:
#
# $$e'_j = \frac{1}{N_j} \sum_i \text{Norm}\left(x_{Q_j}^i\right) \tag{DGT-3}$$
# $$e_j \leftarrow \text{Norm}\left((1 - \tau)\, e_j + \tau\, e'_j\right),\quad \tau = 0.1\, lr \tag{DGT-4}$$
#
# $\text{Norm}$ divides a vector by its length. The paper prints DGT-4 with $\tau$ at the old centroid. The loop below
# is the other form. A group without a query keeps its centroid.


# %%
def moved(e, Q, group, tau):  # one head: e (G, d), Q (L, d), group (L)
    out = e.clone()
    for j in group.unique():
        mean = F.normalize(Q[group == j], dim=-1).mean(dim=0)  # DGT-3
        out[j] = F.normalize((1 - tau) * e[j] + tau * mean, dim=0)  # DGT-4
    return out


before, Q = net.centroids.clone(), normal(1, 4, 48, 4)
group = assign["torch"](Q, before)
net.collect(Q, group)
net.update_centroids(lr=1.0)
assert torch.allclose(net.centroids, torch.stack([moved(before[m], Q[0, m], group[0, m], 0.1) for m in range(4)]))

# %% [markdown]
# **Turn it.** New queries come at every step, from three heaps. Do the centroids find the heaps? Move the step. Take
# $\tau = 0.0001$, as the paper does at its highest learning rate. Take many groups. Then choose DGT-4 as it is printed.

# %%
lesson.moving()

# %% [markdown]
# The paper's pace is slow: it needs a long training. `dgt_mini` has a short one, so its recipe moves the centroids
# faster.
#
# ## 8. What it costs
#
# $$\Omega_\text{Global} = 2L^2C \tag{DGT-5}$$
# $$\Omega_\text{DG} = \underbrace{2kLC}_{\text{attention}} + \underbrace{2LGC}_{\text{group, select}} +
# \underbrace{kG\log L}_{\text{Top-}k} \tag{DGT-6}$$
# $$\Omega_\text{DG} / \Omega_\text{Global} = k / L + G / L + kG\log L / (2L^2C) \tag{DGT-7}$$
#
# in multiply-adds, without the linear maps, which both have.

# %%
lesson.cost()

# %% [markdown]
# Dense attention grows with $L^2$, groups grow with $L$. So groups win on large maps. They lose on small ones, where
# $k + G$ is not smaller than $L$. With the paper's $G$ and $k$, windows are cheaper still. And a multiply-add in a group takes
# longer: its keys must be collected from all over the map. The audit measures the time.
#
# ## 9. Does it do what the paper says?
#
# The paper says of its figure 3: groups "mainly contain the queries of the bird, branches, and background, and they
# also attend to the keys of the bird, branches, and background, respectively". These are two claims. We measure both.
# First, do groups of queries know where the object is? NMI, the normalised mutual information, tells. Zero means that
# they know nothing. One means that they are the object and the rest. Second, do queries on the object have more keys on
# it than other queries have? There are two nulls: networks with random weights, and the mask of another image.

# %%
found = lesson.verdict()
say(lesson.in_words(found))

# %% [markdown]
# Nothing in the equations asks for the second claim. The centroid is near the *queries* of its group. Keys come from
# another linear map, and training may turn it as it likes.
#
# ## 10. Exercises
#
# **Predict.** We make every query three times as long, and every key too. Do the groups change? The selected keys? The
# output? Decide, then run the cell.

# %%
Q, K, V, e = normal(1, 1, 40, 4), normal(1, 1, 40, 4), normal(1, 1, 40, 4), F.normalize(normal(1, 5, 4), dim=-1)
once, thrice = ((assign["torch"](s * Q, e), select["torch"](s * K, e, 8)) for s in (1, 3))
outputs = [ops.grouped_attention(s * Q, s * K, V, *once) for s in (1, 3)]
say(f"Same groups: {torch.equal(once[0], thrice[0])}. Same keys: {torch.equal(once[1], thrice[1])}.")
say(f"Largest change of the output: {float((outputs[0] - outputs[1]).abs().max()):.2f}.")

# %% [markdown]
# <details><summary>An answer</summary>
#
# Groups and keys stay. A common factor changes no order. The output changes: all logits are nine times as large, so the
# softmax is sharper. If every key had a factor of its own, the selected keys would change too.
#
# </details>
#
# **Implement.** Write `grouped_attention(q, k, v, groups, selected)`. `q` is (B, M, L, d). `k` and `v` are
# (B, M, S, d). `groups` is (B, M, L): the group of each query, from zero. `selected` is (B, M, G, n): the numbers of
# the keys of each group, from zero. The scale is $d^{-1/2}$. Return (B, M, L, d), in the order of the queries.
# `verify.check` compares it with the loops: outputs and gradients. Where it is wrong, it shows the simplest case, and
# names the mistake if it knows it.


# %%
def grouped_attention(q, k, v, groups, selected):
    pass  # your code


judge("grouped_attention", grouped_attention)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def grouped_attention(q, k, v, groups, selected):
#     out = torch.zeros_like(q)
#     for b in range(q.shape[0]):
#         for m in range(q.shape[1]):
#             for j, keys in enumerate(selected[b, m]):
#                 mine = groups[b, m] == j
#                 weights = (q[b, m, mine] @ k[b, m, keys].T / q.shape[-1] ** 0.5).softmax(dim=-1)
#                 out[b, m, mine] = weights @ v[b, m, keys]
#     return out
# ```
#
# </details>
#
# **Explain.** A key that no group selects: what does it learn in this layer? And what does a query read if $G = 1$ and
# $k = L$?
#
# <details><summary>An answer</summary>
#
# It learns nothing: its value and its key are in no output, so their gradients are zero. And the choice itself has no
# gradient that could bring it back. With one group and all keys, the layer is dense attention.
#
# </details>
