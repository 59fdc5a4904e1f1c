# %% [markdown]
# # A tour of dynattn
#
# A vision transformer cuts an image into tokens. Each token asks a question, its **query**, and reads other tokens, its
# **keys**. In most networks the position of a token decides what it may read. In **dynamic attention** the image
# decides. This package writes such mechanisms out: as loops beside the equations of the papers, as PyTorch, as kernels,
# as whole models. Tests hold all of them equal.
#
# The tour takes five minutes. It needs no GPU and no network.

# %%
import dynattn
from dynattn.data import photograph
from dynattn.lessons import begin, say, table, tour; begin()

# %% [markdown]
# ## One idea
#
# Every mechanism is a rule. It gives each query **positions** to read and a **weight** for each of them. The layer then
# sums the values at these positions. So one matrix describes it:
#
# $$\text{out} = A_\text{eff}\, V$$
#
# $A_\text{eff}$ has a row for each query and a column for each token.
#
# | mechanism | which positions a query reads | what decides |
# | --- | --- | --- |
# | dense (ViT) | all tokens | nothing |
# | window, shifted window (Swin) | the tokens of its window | where the query is |
# | spatial reduction (PVT) | all tokens of a coarser map | nothing |
# | **deformable (DAT)** | a few points between the tokens, the same for all queries | the image |
# | Deformable-DETR | a few points of its own | the query |
# | **dynamic groups (DGT)** | the keys that its group selected | which queries are alike |
#
# **Turn it.** Choose a mechanism, then point at another query. Which pattern does the matrix have? The weights are
# random here: look at *where* a query reads, not at how well.

# %%
tour.mechanisms()

# %% [markdown]
# A window is a block of the matrix. DAT has **columns**: all queries read the same points. Deformable-DETR has
# diagonals: each query has points of its own. DGT has columns that differ from group to group.
#
# ## Ask a trained network
#
# `dat_mini` ships with the package. `trace` runs it once on an image and keeps a record of every attention layer.

# %%
model = dynattn.create_model("dat_mini", pretrained=True)
trace = dynattn.trace(model, photograph("chelsea"))  # or a path, a PIL image, an array
layer = trace.of_kind("deformable")[0]
keys = layer.keys(row=60, col=64, head=0)
x, y = keys.xy[keys.weight.argmax()].tolist()
say(f"`{layer.name}`: the query at row 60, column 64 reads {len(keys.weight)} points, most the one at ({x:.1f}, {y:.1f}).")

# %% [markdown]
# ## Four networks
#
# They have about as many parameters, one recipe and the same images. What differs is what a query may read. Two queries,
# above on the object and below in the background. Each network shows the layer that looks at the object most.

# %%
rows = tour.compare()
head = ("network", "accuracy", "multiply-adds", "at 512 × 512", "keys in a head", "on the object", "another image's mask")
table(head, rows)

# %% [markdown]
# The layers were chosen on some test images and measured on others. "On the object" is the attention of all queries and
# heads. Dense attention pays for every pair of tokens: look at its cost for the larger image. A window cannot reach an
# object outside. Deformable points and dynamic groups reach it with few keys.
#
# ## The lens
#
# Click a pixel of any picture, or use the arrow keys. Choose a layer and a head. Fade from attention to rollout: where
# the last layer got what it knows. `lens.save("lens.html")` writes a page that works without Python and without a network.

# %%
lens = tour.lens()
lens

# %% [markdown]
# ## Where to go on
#
# | | |
# | --- | --- |
# | [01_dat](01_dat.ipynb), [04_dgt](04_dgt.ipynb) | a lesson a paper: the layer in fifteen lines, its steps, things to turn, exercises |
# | [audit/01_dat](audit/01_dat.ipynb), [audit/04_dgt](audit/04_dgt.ipynb) | an audit a paper: misprints, equality with the published code, tables, kernels |
# | `dynattn figures --image photo.jpg` | the papers' figures for your own photograph |
# | `dynattn check answers.py` | your own implementation against the loops |
# | `dynattn.load_official(model, file)` | a published checkpoint into our model |

# %%
say(f"Models: {', '.join(f'`{name}`' for name in dynattn.list_models())}.")
