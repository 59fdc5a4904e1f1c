"""What the figures measure: how much of what a layer reads lies on the object, beside what chance would give.

A share is the mean of a mask under some points, each counted by its weight; a point outside the image counts as off.
Its null is the same points under the masks of the other images, which have the same bias to the centre but another
object. A share is linear in the mask, so the mean over all other images is the share under their mean mask.

Groups of queries are held against the object by their normalised mutual information, which knows no names of groups:
0 where they tell nothing about where it is, 1 where they are the object and the rest. Its null is the mean over the
masks of the other images, one by one.

A number for every cell is held against the object by the area under the ROC curve (AUC): how often a cell on the object
has the larger one of a pair with a cell off it; .5 where the number tells nothing. Its null is again that mean.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from dynattn.data import normalise
from dynattn.tracing import Record, Trace, overlap, spread, trace

from .tables import ALL, NETWORK, NONE, OTHER, OWN, Row, table_of

# ------------------------------------------------------------------------------------------------------- of one record


def under(mask: Float[Tensor, "H W"], xy: Float[Tensor, "*points 2"]) -> Float[Tensor, "*points"]:
    """The mask at the pixel under each point (x, y); 0 outside the image."""
    col, row = xy.round().long().unbind(-1)
    H, W = mask.shape
    on_image = (row >= 0) & (row < H) & (col >= 0) & (col < W)
    return mask[row.clamp(0, H - 1), col.clamp(0, W - 1)] * on_image


def is_deformable(record: Record) -> bool:
    """Whether a record has points of its own, moved away from references."""
    return record.kind == "deformable"


def positions(record: Record, head: int) -> Float[Tensor, "N 2"]:
    """Image pixels (x, y) of what a head may read: its deformed points, else the cells of the map."""
    return record.points_xy(record.group(head)) if is_deformable(record) else record.cells()


def received(record: Record, head: int) -> Float[Tensor, " N"]:
    """Attention that each of a head's positions gets, the mean over all queries."""
    weights = record.weights(head) if is_deformable(record) else record.effective_matrix(head)
    return weights.mean(dim=0)[: len(positions(record, head))]


def points_share(record: Record, mask: Float[Tensor, "H W"]) -> float:
    """Share of a deformable layer's points, of all its groups, that lie on the object."""
    points = torch.stack([record.points_xy(g) for g in range(record.groups)])
    return float(under(mask, points).mean())


def references_share(record: Record, mask: Float[Tensor, "H W"]) -> float:
    """The same of the regular grid that the points were moved from."""
    return float(under(mask, record.references_xy()).mean())


def attention_share(record: Record, mask: Float[Tensor, "H W"]) -> float:
    """Share of attention that falls on the object: the mean over all queries and heads."""
    heads = [under(mask, positions(record, m)) @ received(record, m) for m in range(record.heads)]
    return float(torch.stack(heads).mean())


def move(record: Record) -> float:
    """Mean distance in image pixels of a deformable layer's points from their references."""
    points = torch.stack([record.points_xy(g) for g in range(record.groups)])
    return float((points - record.references_xy()).norm(dim=-1).mean())


def reach(record: Record) -> float:
    """Mean distance in image pixels from a query to what it reads, weighted by its attention."""
    distances = [torch.cdist(record.cells(), positions(record, m)) for m in range(record.heads)]
    weights = [record.weights(m)[:, : distance.shape[1]] for m, distance in enumerate(distances)]
    return float(torch.stack([(w * d).sum(dim=1).mean() for w, d in zip(weights, distances, strict=True)]).mean())


# ---------------------------------------------------------------------------------------------- of a record with groups


def on_map(record: Record, mask: Bool[Tensor, "*n H W"]) -> Bool[Tensor, "*n L"]:
    """Which cells of a layer's map the object covers by more than half; the mask may be finer than the image."""
    sides = zip(mask.shape[-2:], record.image_shape, record.query_shape, record.stride, strict=True)
    rows, cols = (overlap(fine, cells, fine / side * stride) for fine, side, cells, stride in sides)
    return ((rows @ mask.float() @ cols.mT) > 0.5).flatten(-2)


def entropy(counts: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """Of the distribution that counts describe, in nats."""
    return torch.special.entr(counts / counts.sum(dim=-1, keepdim=True)).sum(dim=-1)


def mutual_information(groups: Int[Tensor, " L"], masks: Bool[Tensor, "n L"]) -> Float[Tensor, " n"]:
    """Normalised mutual information of groups and each mask: 2 I / (H(groups) + H(mask)).

    1 where neither has more than one value, as scikit-learn has it.
    """
    member = torch.nn.functional.one_hot(groups).double()
    on = masks.double() @ member  # (n, G)
    sizes, covered = member.sum(dim=0).expand_as(on), masks.sum(dim=1)
    both = torch.stack([covered, len(groups) - covered], dim=-1).double()
    apart = entropy(sizes) + entropy(both)
    shared = apart - entropy(torch.cat([on, sizes - on], dim=-1))
    return (2 * shared / apart).where(apart > 0, 1.0).clamp(min=0)  # rounding may leave less than nothing


def keys_of(selected: Int[Tensor, "G n"], L: int) -> Float[Tensor, "G L"]:
    """Every group's selection as a distribution over the cells of the map."""
    return torch.zeros(len(selected), L).double().scatter(1, selected, 1 / selected.shape[1])


def keys_shares(
    groups: Int[Tensor, " L"], selected: Int[Tensor, "G n"], masks: Bool[Tensor, "m L"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Share of the keys of a query's group that lie on the object: mean over the queries on it, and over the others.

    NaN where there are no such queries.
    """
    masks = masks.double()
    share = masks @ keys_of(selected, len(groups)).T  # (m, G)
    on = masks @ torch.nn.functional.one_hot(groups, len(selected)).double()  # (m, G) queries
    off = torch.bincount(groups, minlength=len(selected)) - on
    return tuple((share * queries).sum(dim=1) / queries.sum(dim=1) for queries in (on, off))


def distances(record: Record) -> list[float]:
    """Of every head the mean distance from a query to the keys of its group, in sides of the image (the longer one)."""
    cells = record.cells().double()
    apart = torch.cdist(cells, cells)  # (L, L)
    heads = zip(record.groups, record.selected, strict=True)
    means = [(apart @ keys_of(selected, len(cells)).T).gather(1, groups[:, None]).mean() for groups, selected in heads]
    return [float(mean) / max(record.image_shape) for mean in means]


def window_distance(record: Record) -> float:
    """The same in a square window, as near as can be, of as many keys."""
    side = round(record.selected.shape[-1] ** 0.5)
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float() * torch.tensor(record.stride)
    return float(torch.cdist(cells, cells).mean()) / max(record.image_shape)


def by_overlap(record: Record, head: int, mask: Bool[Tensor, "H W"] | None) -> list[int]:
    """Groups with queries: the nearest to the object, the nearest to what is not, the others by size.

    Nearest: by intersection over union. Without a mask all by size.
    """
    member = torch.nn.functional.one_hot(record.groups[head], record.selected.shape[1]).bool().T  # (G, L)
    size = member.sum(dim=1)
    order = [g for g in size.argsort(descending=True, stable=True).tolist() if size[g]]
    if mask is None:
        return order
    on, first = on_map(record, mask), []
    for there in (on, ~on):
        closeness = (member & there).sum(dim=1) / (member | there).sum(dim=1)
        first.append(max((g for g in order if g not in first), key=lambda g: float(closeness[g]), default=None))
    first = [g for g in first if g is not None]
    return first + [g for g in order if g not in first]


# ---------------------------------------------------------------------------------------- of a record with significance


def roc_area(score: Float[Tensor, " L"], masks: Bool[Tensor, "n L"]) -> Float[Tensor, " n"]:
    """How often a cell on each mask has a larger score than one off it; equal scores count half.

    NaN where all cells or none are on it.
    """
    _, place, count = score.unique(return_inverse=True, return_counts=True)  # sorted
    rank = (count.cumsum(dim=0) - (count - 1) / 2).double()[place]  # from 1; equals have their mean rank
    on = masks.double().sum(dim=1)
    pairs = on * (masks.shape[1] - on)
    return (masks.double() @ rank - on * (on + 1) / 2) / pairs


def tokens_share(record: Record, masks: Bool[Tensor, "n L"]) -> Float[Tensor, " n"]:
    """Share of a guided layer's tokens that stand for cells on each mask; a token counts by its cells."""
    cells = record.tokens.bincount(minlength=len(record.aggregation)).double()
    return masks.double() @ (1 / cells)[record.tokens] / len(cells)


def within_token(record: Record) -> tuple[float, float]:
    """Mean distance between two cells of one token, and between any two cells, in sides of the image (longer one)."""
    cells = record.cells().double()
    apart = torch.cdist(cells, cells) / max(record.image_shape)
    same = (record.tokens[:, None] == record.tokens) & ~torch.eye(len(cells), dtype=torch.bool)
    return float(apart[same].mean()), float(apart.sum() / (len(cells) * (len(cells) - 1)))


# -------------------------------------------------------------------------------------------------- of a whole network


def propagate(t: Trace) -> dict[str, Float[Tensor, "G N"]]:
    """Scores of all deformed points of a network: the attention that arrives at them from its output (figure 5).

    The paper propagates attention without saying how; this is the rule here. A classifier that averages the last map
    asks every cell alike, so each query of the last deformable layer starts with the same mass, 1 in all. In a layer
    the heads' mean of attention carries mass from queries to points: what arrives at a point is its score, so the
    scores of a layer sum to 1. Half of the mass then goes on from the points to the cells that they read (A_eff), half
    stays where it was (the residual connection), and the layer before takes over; a coarser map hands the mass of a
    cell to the finer cells that it covers. Layers of other kinds are passed over.
    """
    scores, mass, below = {}, None, None
    for record in reversed(t.of_kind("deformable")):
        L = record.query_shape[0] * record.query_shape[1]
        if mass is None:
            mass = torch.full((L,), 1 / L)
        elif record.query_shape != below.query_shape:
            factor = (below.stride[0] / record.stride[0], below.stride[1] / record.stride[1])
            mass = spread(mass.reshape(below.query_shape), record.query_shape, factor).flatten()
        score = torch.zeros(record.groups, record.points.shape[1])
        for m in range(record.heads):
            score[record.group(m)] += mass @ record.weights(m).float() / record.heads
        moved = sum(score[g] @ record.reads(g).float() for g in range(record.groups))
        mass = (mass + moved) / 2
        mass = mass / mass.sum()  # a point off the map reads zeros: its mass is lost
        scores[record.name], below = score, record
    return dict(reversed(scores.items()))


def propagated_share(t: Trace, scores: dict[str, Float[Tensor, "G N"]], mask: Float[Tensor, "H W"]) -> float:
    """Share of the scores of `propagate` whose points lie on the object; every deformable layer counts alike."""
    shares = [
        sum(under(mask, t[name].points_xy(g)) @ score[g] for g in range(len(score))) for name, score in scores.items()
    ]
    return float(torch.stack(shares).mean())


# ------------------------------------------------------------------------------------------------- of a set of images


def others(masks: Bool[Tensor, "n H W"], i: int) -> Float[Tensor, "H W"]:
    """The mean mask of all images but the i-th."""
    return (masks.float().sum(dim=0) - masks[i].float()) / (len(masks) - 1)


def evaluate(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"] | None,
    measure: Callable[[Trace, Bool[Tensor, "n H W"], int], Iterator[Row]],
    least: int = 2,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """What `measure` yields for each image, as a table (see `tables`), with "area" and, with labels, "accuracy".

    measure: takes a trace of the i-th image, the masks of all images, and i. "area": the share of an image that the
    object covers. least: how many images there must be. bar: gets an update for each image.
    Raises ValueError where images and masks do not fit together.
    """
    if len(images) != len(masks) or len(images) < least or images.shape[-2:] != masks.shape[-2:]:
        raise ValueError(f"masks: expected one for each of at least {least} images {images.shape}, got {masks.shape}")
    images, masks = (torch.from_numpy(np.array(part)) for part in (images, masks))

    def rows_of(i: int) -> Iterator[Row]:
        t = trace(model, normalise(images[i]))
        yield from measure(t, masks, i)
        yield Row(NETWORK, ALL, OWN, "area", float(masks[i].float().mean()))
        if labels is not None:
            yield Row(NETWORK, ALL, NONE, "accuracy", float(int(t.logits.argmax()) == int(labels[i])))
        if bar is not None:
            bar.update()

    return table_of(rows_of(i) for i in range(len(images)))


def evaluate_points(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"] | None = None,
    *,
    layers: Sequence[str] | None = None,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """How well the layers of a model find the object: a row for each layer and image, all heads together.

    layers: names, or None for all deformable ones. The kinds are

        attention      share of attention on the object
        points         share of the deformed points on it     (these and the next two of deformable layers only)
        references     share of the grid that the points start from
        move           mean distance of a point from its reference, in pixels; needs no mask
        propagated     share of figure 5's scores on the object, of the whole network (where layers are deformable)
        area, accuracy as `evaluate` has them

    Raises ValueError where images and masks do not fit together, KeyError for a layer that is not there.
    """

    def measure(t: Trace, masks: Bool[Tensor, "n H W"], i: int) -> Iterator[Row]:
        nulls = {OWN: masks[i].float(), OTHER: others(masks, i)}
        for record in [t[name] for name in layers] if layers is not None else t.of_kind("deformable"):
            shares = {"attention": attention_share}
            if is_deformable(record):
                shares |= {"points": points_share, "references": references_share}
                yield Row(record.name, ALL, NONE, "move", move(record))
            for kind, share in shares.items():
                for mask, where in nulls.items():
                    yield Row(record.name, ALL, mask, kind, share(record, where))
        if t.of_kind("deformable"):
            scores = propagate(t)
            for mask, where in nulls.items():
                yield Row(NETWORK, ALL, mask, "propagated", propagated_share(t, scores, where))

    return evaluate(model, images, masks, labels, measure, bar=bar)


def evaluate_groups(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"] | None = None,
    *,
    choice: int | None = None,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """How well the groups of dynamic group layers tell where the object is: a row for each layer, head and image.

    choice: the first so many images (None: a fifth) choose heads; only the others are measured. The kinds are

        nmi            normalised mutual information of groups and object (cells covered by more than half)
        keys           share of the selected keys that lie on the object, mean over the queries on the object
        keys_off       the same over the queries that are not; these two are not a number where there are no such
        keys_limit     the most that `keys` could be: where there are more keys than cells of the object
        distance       mean distance from a query to its keys, in sides of the image
        groups         number of groups of the same size that would be as uneven: e to the entropy
        choose_nmi, choose_keys    of the images that choose, instead of these: `nmi`, and `keys` minus `keys_off`
        area, accuracy as `evaluate` has them

    Raises ValueError where images and masks do not fit together, for a wrong choice, or a model without such layers.
    """
    choice = max(1, len(images) // 5) if choice is None else choice
    if len(images) >= 3 and not 0 < choice < len(images) - 1:
        raise ValueError(f"choice: expected 1 to {len(images) - 2} of {len(images)} images, got {choice}")
    on_maps: dict[tuple[int, int], Bool[Tensor, "n L"]] = {}

    def measure(t: Trace, masks: Bool[Tensor, "n H W"], i: int) -> Iterator[Row]:
        if not t.of_kind("dynamic_group"):
            raise ValueError(f"model: expected one with dynamic group layers, got {type(model).__name__}")
        for record in t.of_kind("dynamic_group"):
            if record.query_shape not in on_maps:
                on_maps[record.query_shape] = on_map(record, masks)
            found = measure_groups(record, on_maps[record.query_shape], i)
            yield from choosing(found) if i < choice else found

    return evaluate(model, images, masks, labels, measure, least=3, bar=bar)


def measure_groups(record: Record, masks: Bool[Tensor, "n L"], i: int) -> list[Row]:
    """All measures of a layer's groups in the i-th image, head by head; masks: of all images, on the layer's map."""
    other = torch.arange(len(masks)) != i
    limit = min(1.0, int(masks[i].sum()) / record.selected.shape[-1])
    rows = []
    for head, (groups, selected, far) in enumerate(zip(record.groups, record.selected, distances(record), strict=True)):
        keys, keys_off = keys_shares(groups, selected, masks)
        for kind, values in {"nmi": mutual_information(groups, masks), "keys": keys, "keys_off": keys_off}.items():
            rows.append(Row(record.name, head, OWN, kind, float(values[i])))
            rows.append(Row(record.name, head, OTHER, kind, float(values[other].nanmean())))
        rows.append(Row(record.name, head, OWN, "keys_limit", limit))
        rows.append(Row(record.name, head, NONE, "groups", float(entropy(torch.bincount(groups).double()).exp())))
        rows.append(Row(record.name, head, NONE, "distance", far))
    return rows


def evaluate_significance(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"] | None = None,
    *,
    bar: tqdm | None = None,
) -> pd.DataFrame:
    """How well significance finds the object, and where tokens go: a row for each layer and image. The kinds are

        auc            significance that a hybrid-scale layer hands on against the object (`roc_area`)
        tokens         share of the tokens of a self-guided layer that stand for cells on the object
        together       mean distance between two cells of one token, in sides of the image; needs no mask
        any            the same between any two cells
        area, accuracy as `evaluate` has them

    A cell is on the object where it is covered by more than half. Raises ValueError where images and masks do not fit
    together, or for a model without such layers.
    """
    on_maps: dict[tuple[int, int], Bool[Tensor, "n L"]] = {}

    def measure(t: Trace, masks: Bool[Tensor, "n H W"], i: int) -> Iterator[Row]:
        records = t.of_kind("hybrid_scale") + t.of_kind("self_guided")
        if not records:
            raise ValueError(f"model: expected one with hybrid-scale layers, got {type(model).__name__}")
        other = torch.arange(len(masks)) != i
        for record in records:
            if record.query_shape not in on_maps:
                on_maps[record.query_shape] = on_map(record, masks)
            there = on_maps[record.query_shape]
            if record.kind == "hybrid_scale":
                kind, values = "auc", roc_area(record.significance.flatten(), there)
            else:
                kind, values = "tokens", tokens_share(record, there)
                near, far = within_token(record)
                yield Row(record.name, ALL, NONE, "together", near)
                yield Row(record.name, ALL, NONE, "any", far)
            yield Row(record.name, ALL, OWN, kind, float(values[i]))
            yield Row(record.name, ALL, OTHER, kind, float(values[other].nanmean()))

    return evaluate(model, images, masks, labels, measure, bar=bar)


def choosing(rows: Sequence[Row]) -> Iterator[Row]:
    """What an image that chooses tells of the heads, from what would be measured of it."""
    own = {(row.layer, row.head, row.kind): row.value for row in rows if row.mask == OWN}
    for layer, head, kind in own:
        if kind == "nmi":
            yield Row(layer, head, OWN, "choose_nmi", own[layer, head, "nmi"])
            yield Row(layer, head, OWN, "choose_keys", own[layer, head, "keys"] - own[layer, head, "keys_off"])


def image_share(offsets: Float[Tensor, "images *points 2"]) -> tuple[float, float]:
    """How much of the offsets depends on the image, and how much of the rest is one shift for all points.

    offsets: of the same layer for several images, (images, groups, N, 2), in any unit. Of the mean squared length:
    first the share that is left when every point's mean over the images is taken away, from 0 (the same points for
    every image) to 1; then the share of a single mean move of each group, the same for all of its points and images.
    Both are 0 where nothing moves.
    """
    total = offsets.square().sum(dim=-1).mean()
    same = offsets.mean(dim=0).square().sum(dim=-1).mean()
    shift = offsets.mean(dim=(0, -2)).square().sum(dim=-1).mean()
    return (float(1 - same / total), float(shift / total)) if total else (0.0, 0.0)
