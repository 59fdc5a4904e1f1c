"""What the figures measure: how much of what a layer reads lies on the object, beside what chance would give.

A share is the mean of a mask under some points, each counted by its weight; a point outside the image counts as off.
Its null is the same points under the masks of the other images, which have the same bias to the centre but another
object. A share is linear in the mask, so the mean over all other images is the share under their mean mask.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from dynattn.data import normalise
from dynattn.tracing import Record, Trace, spread, trace

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
    return record.weights(head).mean(dim=0)[: len(positions(record, head))]


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


def measure_image(
    t: Trace, records: Sequence[Record], mask: Float[Tensor, "H W"], other: Float[Tensor, "H W"]
) -> dict[tuple[str, str], float]:
    """All measures of one image by (layer, measure); layer "" stands for the network: the mean over its layers."""
    values = {}
    for record in records:
        shares = {"attention": attention_share}
        if is_deformable(record):
            shares |= {"points": points_share, "references": references_share}
            values[record.name, "move"] = move(record)
        for measure, share in shares.items():
            values[record.name, measure] = share(record, mask)
            values[record.name, measure + "_other"] = share(record, other)
    if t.of_kind("deformable"):
        scores = propagate(t)
        values["", "propagated"] = propagated_share(t, scores, mask)
        values["", "propagated_other"] = propagated_share(t, scores, other)
    for measure in {measure for _, measure in values} - {"propagated", "propagated_other"}:
        values["", measure] = float(np.mean([value for (_, kind), value in values.items() if kind == measure]))
    return values


def evaluate_points(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"] | None = None,
    *,
    layers: Sequence[str] | None = None,
    bar: tqdm | None = None,
) -> dict:
    """How well the layers of a model find the object, over a set of images with masks.

    layers: names, or None for all deformable ones. bar: gets an update for each image. Returns

        n, area        how many images; the mean share of an image that the object covers
        accuracy       with `labels`
        propagated     share of figure 5's scores on the object (where there are deformable layers)
        attention, points, references, move    means over the layers; the last three of deformable layers only
        layers         the same of each layer, by name
        best           the name of the layer with the largest points_ratio (attention_ratio, where there are no points)

    and with every share X: X_other, the same under the masks of the other images; X_ratio, own / other; X_se, the
    standard error of its mean over the images.
    Raises ValueError where images and masks do not fit together, KeyError for a layer that is not there.
    """
    if len(images) != len(masks) or len(images) < 2 or images.shape[-2:] != masks.shape[-2:]:
        raise ValueError(f"masks: expected one for each of at least 2 images {images.shape}, got {masks.shape}")
    images, masks = torch.from_numpy(np.array(images)), torch.from_numpy(np.array(masks))
    rows, correct = [], 0
    for i in range(len(images)):
        t = trace(model, normalise(images[i]))
        records = [t[name] for name in layers] if layers is not None else t.of_kind("deformable")
        rows.append(measure_image(t, records, masks[i].float(), others(masks, i)))
        correct += labels is not None and int(t.logits.argmax()) == int(labels[i])
        if bar is not None:
            bar.update()

    result: dict = {"n": len(images), "area": float(masks.float().mean()), "layers": {}}
    if labels is not None:
        result["accuracy"] = correct / len(images)
    for name, measure in rows[0]:
        place = result["layers"].setdefault(name, {}) if name else result
        values = np.array([row[name, measure] for row in rows])
        place[measure] = float(values.mean())
        if (name, measure + "_other") in rows[0]:
            place[measure + "_se"] = float(values.std(ddof=1) / len(values) ** 0.5)
            other = float(np.mean([row[name, measure + "_other"] for row in rows]))
            place[measure + "_ratio"] = place[measure] / max(other, 1e-9)
    ratios = {name: layer.get("points_ratio", layer["attention_ratio"]) for name, layer in result["layers"].items()}
    if ratios:
        result["best"] = max(ratios, key=ratios.get)
    return result
