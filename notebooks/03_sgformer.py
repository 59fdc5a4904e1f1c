# %% [markdown]
# # SG-Former: few tokens where little is to be seen
#
# *SG-Former: Self-guided Transformer with Evolving Token Reallocation*, Ren et al., ICCV. A lesson of less than an
# hour. The [audit](audit/03_sgformer.ipynb) has what this page leaves out.

# %%
import torch
from dynattn import core, ops, verify
from dynattn.lessons import sgformer as lesson, begin, judge, normal, rearrange, say; begin()

# %% [markdown]
# ## 1. The question
#
# Every token of an image asks: *where is something that I need?* It compares its **query** with the **keys** of other
# tokens, and takes a weighted mean of their **values**. Keys are expensive. So make fewer of them: merge many tokens
# into one. But which? Three small networks answer, all trained alike, to name shapes that are drawn on photographs.
# `sgformer_mini` has both layers of SG-Former.
#
# | layer | what a query may read |
# | --- | --- |
# | dense (`vit_mini`) | every token |
# | window (`swin_mini`) | the tokens of its own window |
# | hybrid-scale (`sgformer_mini`) | merged squares of a window. Other heads have other squares |
# | self-guided (`sgformer_mini`) | merged groups: large ones where little is to be seen, small ones where it matters |
#
# **Predict first.** The query stands in the background, at the red star. What does it read? Then look. In the two
# layers of `sgformer_mini` a colour is one merged token, over all cells that became it. Point at a cell: its token is
# framed.

# %%
lesson.question()

# %% [markdown]
# In the hybrid-scale layer a token is a square. In the self-guided layer its cells are scattered. Why? And the
# self-guided layer reads all of its tokens nearly alike. What decides is how many cells share one.
#
# ## 2. Notation
#
# - *The paper* means the text. *The published code* means the authors' program. They differ in places: see the audit.
#   Both layers below follow equations SG-1 to SG-5. Their formulas are lost in our copy, and rebuilt from the prose,
#   which may also be read as "project first, then aggregate": they differ by biases only.
# - $X$: a map of $N$ tokens with $C$ channels. A token of the map is a **cell**. $M$ is the side of a window. $d$: the
#   channels of a head.
# - $s_j$: the **scale** of group $j$ of heads: it merges squares of $s_j \times s_j$ cells.
# - $S$: the **significance**, a number for every cell.
# - $r_i$, $F_i$: the **rate** of **sub-region** $i$, how many cells become one token there, and the weights that make
#   it. (In sections 4 and 5 $i$ counts heads.) IAM, importance guided aggregation module: sort, cut, merge.
#
# ## 3. Hybrid-scale attention
#
# This is all of it, with the significance that it finds on its way. The cell asserts that the library computes the
# same.


# %%
def hybrid_layer(x, net, h, M):  # h: the heads of a group
    parts, S = [], 0
    cut = lambda t, side: rearrange(t, "B (Y y) (X x) (h d) -> B Y X h (y x) d", y=side, x=side, h=h)
    for s, group in zip(net.scales, net.groups):
        merged = x if s == 1 else group.merge(x.movedim(-1, 1)).movedim(1, -1)
        k, v = group.kv(merged).chunk(2, dim=-1)  # SG-3
        q, k, v = cut(group.q(x), s * M), cut(k, M), cut(v, M)
        A = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # SG-4
        parts.append(rearrange(A @ v, "B Y X h (y x) d -> B (Y y) (X x) (h d)", y=s * M))
        given = rearrange(A.sum(dim=(3, 4)), "B Y X (y x) -> B (Y y) (X x)", y=M)  # SG-5
        S = S + given.detach().repeat_interleave(s, dim=1).repeat_interleave(s, dim=2)
    return net.proj(torch.cat(parts, dim=-1)), S


rates = (8, 4, 2, 1)
(hybrid, guided), x = lesson.library_layers(16, 4, 2, rates), normal(2, 8, 8, 16)
assert all(map(torch.allclose, hybrid_layer(x, hybrid, h=2, M=2), hybrid(x)))

# %% [markdown]
# ## 4. Step one: heads with scales
#
# $$Q_i = X W_i^Q,\quad K_i = \text{Merge}(X, s_j) W_i^K,\quad V_i = \text{Merge}(X, s_j) W_i^V \tag{SG-3}$$
# $$A_i = \text{softmax}\left(P(Q_i) P(K_i)^\top / \sqrt{d}\right),\quad h_i = A_i P(V_i) \tag{SG-4}$$
#
# Head $i$ is in group $j$. Merge is a convolution of stride $s_j$; for $s_j = 1$ there is none. $P$ cuts the map:
# windows of $s_j M \times s_j M$ queries read windows of $M \times M$ merged tokens. So a query reads the same number
# of keys at every scale, and a larger scale reaches farther, with less detail.
#
# **Turn it.** Change $s$: what stays the same, what grows? When does one window hold the whole map?

# %%
lesson.scales()

# %% [markdown]
# ## 5. Step two: significance
#
# $$S_i[k] = \sum_q A_i[q, k],\quad S = \sum_i S_i \tag{SG-5}$$
#
# How much attention a token gets, from all queries in all heads. A merged token hands its number to all of its cells.
# Nobody tells the network what is significant: it is what its own queries look at.
#
# The sum has a side effect. A merged token is read by $s^2$ times as many queries, so its number is $s^2$ times as
# large. The published code takes means instead.
#
# **Turn it.** Which map does $S$ follow, that of the large scale or that of the small one? Decide for sums, then for
# means. Then look at the later layers.

# %%
lesson.significance()

# %% [markdown]
# Neither the mean nor the spread of a map decides alone: a rank compares two cells. In the first layer the large scale
# gives nearly all of its attention to few cells, and puts them in front. Among the many others, to which it gives
# almost nothing, the small scale decides.
#
# ## 6. Self-guided attention
#
# This is all of it. Two assertions: the library computes the same; and with a rate of one, and $F$ set to leave a cell
# as it is, the layer is dense attention, whatever the order.


# %%
def guided_layer(x, S, net, heads, rates):
    order = S.flatten(1).argsort(dim=1, stable=True)  # least significant first
    X = x.flatten(1, 2)[torch.arange(len(x))[:, None], order]
    tokens = []
    for X_i, F_i, r in zip(X.chunk(len(rates), dim=1), net.f, rates):
        tokens.append(F_i(rearrange(X_i, "B (G r) C -> B G C r", r=r))[..., 0])  # SG-2
    k, v = net.project(torch.cat(tokens, dim=1)).unbind(dim=2)  # SG-1
    q, k, v = (rearrange(t, "B n (h d) -> B h n d", h=heads) for t in (net.q(x).flatten(1, 2), k, v))
    z = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v  # SG-1
    return net.proj(core.merge_heads(z, x.shape[1:3]))


S = hybrid(x)[1]
assert torch.allclose(guided_layer(x, S, guided, 4, rates), guided(x, S))
_, same = lesson.library_layers(16, 4, 2, (1,))
same.load_state_dict(same.state_dict() | {"f.0.weight": torch.ones(1, 1), "f.0.bias": torch.zeros(1)})
q, k, v = (core.split_heads(t, 4) for t in (same.q(x), *same.kv[0](x).chunk(2, dim=-1)))
assert torch.allclose(same(x, S), same.proj(core.merge_heads(ops.dense_attention(q, k, v), (8, 8))))

# %% [markdown]
# $$Q = X W^Q,\quad K = \text{IAM}(X, S, r) W^K,\quad V = \text{IAM}(X, S, r) W^V \tag{SG-1}$$
# $$\hat{X}_i = F_i(X_i, r_i),\quad \hat{X} = \text{Concat}(\hat{X}_1, \dots, \hat{X}_n) \tag{SG-2}$$
#
# IAM sorts the cells by $S$ and cuts them into $n$ sub-regions of equal size, $X_n$ the most significant. In each it
# makes one token of every $r_i$ cells that follow each other, with the same weights $F_i$ in all groups and channels.
#
# ## 7. Tokens are groups of ranks
#
# The paper draws its tokens as squares: large ones on the background, small ones on the dog. Is this what happens?
#
# **Turn it.** Point at cells. Where are the other cells of their token? Change the rates and the number of sub-regions:
# how many tokens are left, and how many of them has the object? Then let one number guide, the same for all cells.

# %%
lesson.tokens()

# %% [markdown]
# The drawing is schematic. A sub-region is in few pieces where significance is smooth. The cells of a token follow each
# other in *rank*: on the map they are scattered. With one number for all cells the order is that of rows, and tokens
# are stripes.
#
# ## 8. Paint the significance
#
# **Turn it.** Drag over the left picture: you write $S$. Raise the background, or lower the object. Which tokens become
# finer, and who pays? The number of tokens cannot change. Predict what the network says then.

# %%
lesson.paint()

# %% [markdown]
# A cell that rises pushes others down, wherever they are. The answer moves little here. One reason: these layers read
# all tokens nearly alike, as the last numbers say, so a change of one layer's tokens changes a mean a little.
#
# ## 9. A block, and what cannot learn
#
# $$X' = X + \text{Attention}(\text{LN}(X)) \tag{SG-6}$$
# $$X'' = X' + \text{FFN}(\text{LN}(X')) \tag{SG-7}$$
#
# Hybrid-scale and self-guided blocks take turns, and each $S$ goes to the next block only. The paper says that the
# significance "evolves itself during training". Does training see what is made of $S$? The library cuts $S$ off from
# the gradient, as the published code does. The cut costs nothing: ranks are whole numbers.
#
# **Turn it.** Below, the significance of one cell grows, from below all others to above. Move it. Where is there a
# slope? Then take a rate of one, for all cells.


# %%
def block(x, net, S=None):
    y, found = net.attn(net.norm1(x)) if S is None else (net.attn(net.norm1(x), S), None)
    x = x + y  # SG-6
    return x + net.ffn(net.norm2(x)), found  # SG-7


pair, image = lesson.network().stages[0].blocks, normal(1, 32, 32, 32).float()
y, S = block(image, pair[0])
assert torch.allclose(block(y, pair[1], S)[0], pair[1](*pair[0](image, None))[0])
(slope,) = torch.autograd.grad(y.square().sum(), pair[0].attn.groups[0].q.weight)
own = f"The weights of the queries that made it have one, through their own layer's output: {slope.norm():.2g}."
say(f"S requires a gradient: {S.requires_grad}. {own}")

# %%
lesson.gradient()

# %% [markdown]
# So what is made of $S$ teaches $S$ nothing. It "evolves" because all that stands before it learns: queries, keys,
# Merge, earlier layers, each for its own output. Whether it helps the next layer is not trained, and has to be
# measured. The [gallery](../figures/README.md) shows how it comes about.
#
# ## 10. Ranks flip
#
# Ranks jump, so a very small change of the image may make a larger one of the logits. Even rounding may: the
# [audit](audit/03_sgformer.ipynb) shows it for SG-Former-S with random weights.
#
# **Turn it.** How small must the noise be for the ranks to stay? And what if we hand the network the ranks that it had
# without noise?

# %%
lesson.flips()

# %% [markdown]
# With the ranks given the change follows the noise. So compare such layers in `float64`, or block by block with the
# ranks given.
#
# ## 11. What it costs
#
# Windows, and so hybrid-scale layers, grow with $N$. (In the published code the largest scale has no windows and grows
# with $N^2$.) A self-guided layer reads a fixed *share* of the cells.
#
# **Turn it.** Which rates make it cheaper than windows, and up to which map?

# %%
lesson.cost()

# %% [markdown]
# With fixed rates the cost still grows with $N^2$, with a small factor. Table 1 has smaller rates for smaller maps.
#
# ## 12. Does it do what the paper says?
#
# The paper says: "SG-Former reallocates more tokens at salient regions like the dog and fewer tokens at minor regions
# like the wall". We can ask this of our own small network only: `sgformer_mini`, taught the class of drawn shapes, with
# three seeds. We measure the AUC of significance: the chance that a cell on the object has a higher one than a cell off
# it. There are two nulls: random weights, and the mask of another image.

# %%
found = lesson.verdict()
lesson.draw_verdict(found)
say(lesson.in_words(found))
say(lesson.need_in_words(lesson.need()))

# %% [markdown]
# Nothing in training asks for this: only the class is taught, and a network may learn it either way. Does a network
# need its self-guided layers? The last lines put one number in the place of $S$, and zeros in the place of their
# output. Such a small network on such images says nothing about SG-Former on ImageNet: see the paper's Table 7,
# and, in small, the [gallery](../figures/README.md).
#
# ## 13. Exercises
#
# **Predict.** We replace $S$ by $3S + 1$, by $S^2$, then by $-S$. Which outputs change? Decide, then run the cell.

# %%
S = hybrid(x)[1]
moved = [float((guided(x, new) - guided(x, S)).abs().max()) for new in (3 * S + 1, S.square(), -S)]
say(f"Largest change of the output: {moved[0]:.1g} for 3S + 1, {moved[1]:.1g} for S², {moved[2]:.1g} for -S.")

# %% [markdown]
# <details><summary>An answer</summary>
#
# Only the order counts. $S$ is positive, so the first two keep it. The last one turns it round: the most significant
# cells get the coarse tokens.
#
# </details>
#
# **Implement.** Write `aggregate_tokens(x, order, weight, bias, sizes, rates)`. `x` is (B, N, C). `order` is (B, N):
# the cells, least significant first. `sizes` and `rates`: of each sub-region. `weight` is (R,): the weights of $F_1$,
# then those of $F_2$, and so on. `bias` has one number for each sub-region. A size may be 0: it gives no token. Where a
# rate does not divide a size, as many copies of the sub-region's first token as are missing stand in front. Return (B,
# G, C). `verify.check` compares it with the loops, outputs and gradients.


# %%
def aggregate_tokens(x, order, weight, bias, sizes, rates):
    pass  # your code


judge("aggregate_tokens", aggregate_tokens)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def aggregate_tokens(x, order, weight, bias, sizes, rates):
#     x = torch.stack([one[ranks] for one, ranks in zip(x, order)])
#     out, parts = [], zip(x.split(list(sizes), dim=1), weight.split(list(rates)), bias, rates)
#     for X_i, w, b, r in parts:
#         if X_i.shape[1]:
#             first = X_i[:, :1].expand(-1, -X_i.shape[1] % r, -1)
#             groups = torch.cat([first, X_i], dim=1).unflatten(1, (-1, r))  # (B, G, r, C)
#             out.append((groups * w[:, None]).sum(dim=2) + b)
#     return torch.cat(out, dim=1)
# ```
#
# </details>
#
# **Explain.** What gradient does the value of a cell in the least significant sub-region get? And could a loss on $S$
# itself, with the object's mask, teach it?
#
# <details><summary>An answer</summary>
#
# It gets its token's gradient times its weight in $F_1$: it is never cut off, only mixed with others. A loss on $S$
# could teach it, if $S$ were not detached: $S$ is a sum of softmaxes, which is smooth. Only sorting is not.
#
# </details>
