# %% [markdown]
# # SETR and HLG: a class for every pixel
#
# *Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers*, Zheng et al., CVPR, and
# *Vision Transformers: From Semantic Segmentation to Dense Prediction*, Zhang et al., IJCV. A lesson of less than an
# hour. The [audit](audit/05_setr_hlg.ipynb) has what this page leaves out.

# %%
import torch
from dynattn import core, ops
from dynattn.lessons import setr_hlg as lesson, agree, begin, judge, normal, rearrange, say, source; begin()

# %% [markdown]
# ## 1. The question
#
# **Semantic segmentation** gives a class to every pixel. To name a small piece, one must often see far around it. In
# SETR every token reads all tokens, in every layer. This is dear. HLG reads less, in three kinds:
#
# | kind of keys | what a query reads |
# | --- | --- |
# | plain window | its neighbours, cell by cell |
# | dilated window | every $D$-th cell of the map, cell by cell |
# | all windows | one token for each window, which stands for all of its cells |
#
# A layer has one kind of window, plain or dilated, and then all windows of this kind. Layers take turns. Both networks
# below are small. They were trained alike, to find an object among pieces of others.
#
# **Predict first.** The query stands at the red star. Which cells does it read in each panel? Then look. Small squares:
# cells of its window. Colours below: windows that it reads most, over their cells. Point at a cell.

# %%
lesson.question()

# %% [markdown]
# In the third panel a colour is scattered over the whole image. Yet it is one window, and one token.
#
# ## 2. Notation
#
# - *The paper* means the text. *The published code* means the authors' program. They differ in places. Our layers below
#   follow the text, with what it leaves out: norms, and a projection behind global attention. Equation 2 of SETR adds
#   $Z$ inside every head, where the shapes do not fit. We add it once, in SETR-3.
# - $Z$: a map of $N$ tokens with $C$ channels. A token of the map is a **cell**. $d$: the channels of a head. $P$: the
#   side of a **patch**, the pixels that become one token.
# - $R$: the side of a **window**, in cells. $D$: how many windows there are on a side of the map.
# - **Mean IoU**: for each class, the pixels that are rightly given it, over all pixels that have it or are given it.
#   Then the mean over classes.
#
# ## 3. SETR's encoder
#
# SETR cuts the image into patches and hands the sequence to a ViT. This is a layer of it, and the cell asserts that
# the library computes the same.


# %%
def encoder_layer(z, net, heads):
    q, k, v = rearrange(net.attn.qkv(net.norm1(z)), "B N (three h d) -> three B h N d", three=3, h=heads)  # SETR-1
    A = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # SETR-2
    y = z + net.attn.proj(rearrange(A @ v, "B h N d -> B N (h d)"))  # SETR-3
    return y + net.mlp(net.norm2(y))


z, net = normal(2, 12, 16), lesson.encoder_layer(16, heads=4)
assert torch.allclose(encoder_layer(z, net, heads=4), net(z, (3, 4)))

# %% [markdown]
# $$\text{query} = Z W_Q,\quad \text{key} = Z W_K,\quad \text{value} = Z W_V \tag{SETR-1}$$
# $$\text{SA}(Z) = \text{softmax}\left(\text{query}\ \text{key}^\top / \sqrt{d}\right) \text{value} \tag{SETR-2}$$
# $$Y = Z + [\text{SA}_1(Z); \dots; \text{SA}_m(Z)] W_O,\quad Z^l = Y + \text{MLP}(Y) \tag{SETR-3}$$
#
# The map never changes its size. So the patch decides both: what a token can resolve, and what attention costs.
#
# **Turn it.** Halve the patch: how many times more attention weights? The green line gives every patch its most common
# class, from the truth itself. It is no upper bound: a small object loses its patches. Where does the trained network
# lie?

# %%
lesson.patches()

# %% [markdown]
# A token has many channels, so it may say *where* in its patch an edge lies. A decoder has to read this out.
#
# ## 4. Three decoders
#
# **Naive**: two convolutions of one cell, then one large resize. **PUP**, progressive upsampling: convolution and
# twice the size, in turn. **MLA**, multi-level aggregation: maps of several layers. Each deeper map is added to the
# one before it. All are enlarged and put side by side. This is PUP, and below it all three.
#
# **Turn it.** Show the classes as each decoder leaves them, before the last resize. Which outline is finest? And which
# network is best on all test images? The two need not agree.


# %%
def pup(x, head):
    x = head.norm(x)
    for layer, factor in zip(head.layers, head.factors):
        x = torch.nn.functional.interpolate(layer(x), scale_factor=factor, mode="bilinear")
    return head.classifier(x)


decoder, x = lesson.network("setr_pup_mini").decoder, normal(1, 96, 8, 8).float()
assert torch.allclose(pup(x, decoder), decoder(x), atol=1e-5)
lesson.decoders()

# %% [markdown]
# One network for each decoder: another seed would move these numbers too. The paper itself finds PUP best on
# Cityscapes and MLA on `ADE20K`.
#
# ## 5. Positions
#
# A sequence has no rows and columns. SETR learns a vector for every position, and adds it to the patch.
#
# **Turn it.** Move the star. Which positions have become alike? No loss says which ones are neighbours. But this
# small network has convolutions, which mix neighbours; SETR has none.

# %%
lesson.positions()

# %% [markdown]
# ## 6. Layers
#
# Training puts **auxiliary heads** on earlier layers: small decoders with a loss of their own, which are thrown away
# afterwards. We kept them: they tell what a small
# decoder can read from a layer.
#
# **Turn it.** Go through the layers. Which one reads widely, which one its own place? How much of the object does the
# first of the heads find already?

# %%
lesson.layers()

# %% [markdown]
# ## 7. Local and global attention
#
# HLG has windows in place of the whole map, and then one token for every window.
#
# $$Z_L = Z_W + \text{softmax}\left(Q_W K_W^\top / \sqrt{d} + B_W\right) V_W \tag{HLG-5}$$
# $$Q_L = Z_L W_Q,\quad K_G = Z_G W_K,\quad V_G = Z_G W_V \tag{HLG-6}$$
# $$Z = Z_L + \text{softmax}\left(Q_L K_G^\top / \sqrt{d} + B_G\right) V_G \tag{HLG-7}$$
# $$W_Q^{(L)} = W_Q^{(G)},\quad W_K^{(L)} = W_K^{(G)},\quad W_V^{(L)} = W_V^{(G)} \tag{HLG-8}$$
# $$Q_L = Q_W + \text{DWConv}(V_W) \tag{HLG-9}$$
#
# $Z_G$ has one token for every window of $Z_L$: the mean of its cells. Both attentions share the matrices $W_Q, W_K, W_V$.
# HLG-9 replaces the first part of HLG-6: a small convolution stands for what local attention
# added to the query. $B$: biases by displacement. This is all of the attention. In front of it a
# layer has an MLP with a depthwise convolution, which also makes the map smaller. Below: local attention in loops, as the
# library has it, and how far the other form is from the loops.


# %%
def local_global_layer(x, net, R, dilated, h):
    axes = "B (wi I) (wj J) C" if dilated else "B (I wi) (J wj) C"
    cut = lambda t: rearrange(t, f"{axes} -> B (I J) (wi wj) C", wi=R, wj=R)
    split = lambda t: rearrange(t, "... n (h d) -> ... h n d", h=h)
    read = lambda q, k, v, B: (q @ k.mT / q.shape[-1] ** 0.5 + B).softmax(dim=-1) @ v
    n, (B_W, B_G) = net.norm(x), lesson.biases(net, x.shape[1:3])
    q, k, v = net.q(n), net.k(n), net.v(n)
    z = read(*(split(cut(t)) for t in (q, k, v)), B_W)
    z = rearrange(z, f"B (I J) h (wi wj) d -> {axes.replace('C', '(h d)')}", wi=R, I=x.shape[1] // R)
    x = x + z  # HLG-5
    g = net.embed_norm(cut(x).mean(dim=2))  # the tokens of the windows
    q = q + net.conv(v.movedim(-1, 1)).movedim(1, -1)  # HLG-9
    y = read(split(q.flatten(1, 2)), split(net.k(g)), split(net.v(g)), B_G)  # HLG-6, HLG-8
    return x + net.proj(core.merge_heads(y, x.shape[1:3]))  # HLG-7


for dilated in (False, True):
    net, x = lesson.local_global_layer(64, heads=4, R=3, dilated=dilated), normal(2, 6, 9, 64)
    assert torch.allclose(local_global_layer(x, net, 3, dilated, h=4), net(x))
source(*lesson.LOOPS)
q, k, v = normal(3, 1, 2, 24, 4)
agree(ops.local_attention, dict(q=q, k=k, v=v, table=normal(2, 5, 5)), query_shape=(4, 6), window=3, dilated=True)

# %% [markdown]
# The page, the library and the loops agree. In the published code the keys of local attention are its queries, and the
# convolution reads what attention put out: the trained networks here have that.
#
# ## 8. Windows
#
# **Turn it.** Change plain to dilated: how many cells does the query read, and from how far? Then find the side $R$
# that gives the fewest keys. What happens when the map grows?

# %%
lesson.windows()

# %% [markdown]
# Dilated windows cost nothing more: only the order of cells is another. The fewest keys are near $R = \sqrt{n}$ on a map
# of $n \times n$ cells: about $2n$ keys in place of $n^2$.
#
# ## 9. Three kinds of keys
#
# **Turn it.** Move the star onto the object and off it. In which of the three does the query choose, and in which does
# it take nearly a plain mean? Compare the stages, then the decoder.

# %%
lesson.keys()

# %% [markdown]
# A token of a plain window is the mean of one place. That of a dilated window is a mean over the whole image. If such
# tokens are all alike, there is nothing to choose: the cosines say how alike they are, and the counts whether queries
# choose.
#
# ## 10. What it costs
#
# Do attention weights have to lie in memory? The first line looks for the largest tensor that torch makes.
#
# **Turn it.** Which line grows with the number of cells, and which with its square?

# %%
net, z = lesson.encoder_layer(64, heads=4), normal(1, 32 * 32, 64)
small, x = lesson.local_global_layer(64, heads=4, R=4, dilated=False), z.reshape(1, 32, 32, 64)
found = [lesson.largest(f) for f in (lambda: encoder_layer(z, net, 4), lambda: net(z, (32, 32)))]
found += [lesson.largest(f) for f in (lambda: local_global_layer(x, small, 4, False, 4), lambda: small(x))]
say(
    f"Numbers in the largest tensor, $32 \\times 32$ cells, all heads. Dense, this page: **{found[0]:,}**; the library: "
    f"{found[1]:,}. Local-global, this page: **{found[2]:,}**; the library: {found[3]:,}."
)
lesson.costs()

# %% [markdown]
# The weights in windows grow in proportion to the cells. Those of attention to all windows grow faster: there are
# $N^2 / R^2$. This is a small part of $N^2$, but it grows like $N^2$. Torch's fused attention, which the library calls, never keeps the weights. A bias does lie in memory.
#
# ## 11. Does a network need all three?
#
# The paper finds plain windows "limited to short range interaction within each individual window". Dilated windows and
# global attention are to reach farther. We ask two of our own networks: `hlg_mini`, taught the class of an image, and `setr_pup_hlg_mini`, taught
# the class of every pixel. We take one kind away, in all layers: zeros in place of what is read. And a control: the
# keys stay, but all get the same weight, so that a query reads their plain mean. In `setr_pup_mini` we take layers and
# positions; positions are also put at other places.

# %%
found = lesson.verdict()
lesson.draw_verdict(found)
say(lesson.in_words(found))

# %%
say(lesson.need_in_words(lesson.need()))

# %% [markdown]
# A network that was trained without a part would have learned to do without: this asks what these networks *use*, and
# not what HLG needs. Table 14 of the paper trains anew, on ImageNet: local attention and dilated windows both gain.
# And our small SETRs have convolutions at their patches and in every layer, whose borders may tell positions too. SETR
# itself has none: this says little about its positions.
#
# ## 12. Exercises
#
# **Predict.** We move the map by one window to the right. What leaves at the border comes in at the left. Which outputs
# move along, and are else the same: plain local attention, dilated local attention, the whole plain layer? Decide,
# then run the cell.

# %%
x, moved = normal(1, 8, 8, 64), lambda t: t.roll(4, dims=2)
layers = [lesson.local_global_layer(64, heads=4, R=4, dilated=dilated) for dilated in (False, True)]
local = lambda net: lambda x: net.read_window(net.q(x), net.k(x), net.v(x), lesson.Layout((8, 8), 4, net.dilated))
apart = [float((f(moved(x)) - moved(f(x))).abs().max()) for f in (*map(local, layers), layers[0])]
say(f"Largest difference: {apart[0]:.1g} plain, {apart[1]:.1g} dilated, {apart[2]:.1g} for the whole plain layer.")

# %% [markdown]
# <details><summary>An answer</summary>
#
# Plain windows move as wholes, and biases count displacements inside a window. In a dilated window some cells come in
# from the other side: their displacements change. In the whole layer $B_G$ counts how far a cell is from each window,
# and the convolution sees another border.
#
# </details>
#
# **Implement.** Write `window_embedding(x, weight, bias, window, dilated, by)`: one token for every window. `x` is (B, H,
# W, C). `by` is "mean", "max", or "conv": then the window is weighted with `weight`, (C, R, R), and `bias`, (C,), is
# added; else both are `None`. Where windows do not divide the map there are still $D$ on a side, the next whole number,
# and the last have fewer cells. Return (B, N, C), row by row. `verify.check` compares it with the loops, outputs and
# gradients.


# %%
def window_embedding(x, weight, bias, window, dilated, by):
    pass  # your code


judge("window_embedding", window_embedding)

# %% [markdown]
# <details><summary>A solution</summary>
#
# ```python
# def window_embedding(x, weight, bias, window, dilated, by):
#     sides, tokens = [], []
#     for side in x.shape[1:3]:
#         i, D = torch.arange(side), -(-side // window)
#         sides.append([i[n::D] for n in range(D)] if dilated else list(i.split(window)))
#     for rows in sides[0]:
#         for cols in sides[1]:
#             cells = x[:, rows][:, :, cols]
#             if by == "conv":
#                 kernel = weight[:, : len(rows), : len(cols)]
#                 tokens.append(torch.einsum("bijc,cij->bc", cells, kernel) + bias)
#             else:
#                 tokens.append(cells.mean(dim=(1, 2)) if by == "mean" else cells.amax(dim=(1, 2)))
#     return torch.stack(tokens, dim=1)
# ```
#
# </details>
#
# **Explain.** Two objects lie in one plain window. What can a far query learn of them through the window's token? And
# what does a maximum keep that the mean loses?
#
# <details><summary>An answer</summary>
#
# The mean of both, as far as their channels keep them apart; not where each one lies. A maximum keeps, in each channel,
# the strongest cell, however small its object, but not how many cells are like it.
#
# </details>
