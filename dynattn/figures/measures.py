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


def received(record: Record, head: int) -> Float[Tensor, "N"]:
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


def propagated_share(t: Trace, mask: Float[Tensor, "H W"]) -> float:
    """Share of all propagated scores whose points lie on the object; every deformable layer counts alike."""
    scores = propagate(t)
    shares = [
        sum(under(mask, t[name].points_xy(g)) @ score[g] for g in range(len(score))) for name, score in scores.items()
    ]
    return float(torch.stack(shares).mean())


# ------------------------------------------------------------------------------------------------- of a set of images


def others(masks: Bool[Tensor, "n H W"], i: int) -> Float[Tensor, "H W"]:
    """The mean mask of all images but the i-th."""
    return (masks.float().sum(dim=0) - masks[i].float()) / (len(masks) - 1)


def evaluate_points(
    model: nn.Module,
    images: UInt8[np.ndarray, "n 3 H W"],
    masks: Bool[np.ndarray, "n H W"],
    labels: Int[np.ndarray, " n"] | None = None,
    *,
    layers: Sequence[str] | None = None,
    progress: bool = False,
) -> dict:
    """How well the layers of a model find the object, over a set of images with masks.

    layers: names, or None for all deformable ones. Returns

        n, area        how many images; the mean share of an image that the object covers
        accuracy       with `labels`
        propagated     share of figure 5's scores on the object, and _other, _se as below; with deformable layers only
        layers         by name: points, references, attention (shares; the first two for deformable layers), move;
                       each with _other, the same under the masks of the other images; points_ratio and
                       attention_ratio, own / other; points_se and attention_se, standard errors over the images
        best           the name of the layer with the largest points_ratio (or attention_ratio, without points)

    Raises ValueError where images and masks do not fit together or a layer is not there.
    """
    if len(images) != len(masks) or len(images) < 2 or images.shape[-2:] != masks.shape[-2:]:
        raise ValueError(f"masks: expected one for each of at least 2 images {images.shape}, got {masks.shape}")
    images, masks = torch.from_numpy(np.array(images)), torch.from_numpy(np.array(masks))
    rows: dict[tuple[str, str], list[float]] = {}
    correct = 0
    for i in tqdm(range(len(images)), desc="measuring", unit="image", disable=not progress, leave=False):
        t = trace(model, normalise(images[i]))
        correct += labels is not None and int(t.logits.argmax()) == labels[i]
        chosen = [t[name] for name in layers] if layers is not None else t.of_kind("deformable")
        for suffix, mask in (("", masks[i].float()), ("_other", others(masks, i))):
            for record in chosen:
                rows.setdefault((record.name, "attention" + suffix), []).append(attention_share(record, mask))
                if is_deformable(record):
                    rows.setdefault((record.name, "points" + suffix), []).append(points_share(record, mask))
                    rows.setdefault((record.name, "references" + suffix), []).append(references_share(record, mask))
            if t.of_kind("deformable"):
                rows.setdefault(("", "propagated" + suffix), []).append(propagated_share(t, mask))
        for record in filter(is_deformable, chosen):
            rows.setdefault((record.name, "move"), []).append(move(record))

    result = {"n": len(images), "area": float(masks.float().mean())}
    if labels is not None:
        result["accuracy"] = correct / len(images)
    result["layers"] = {}
    for (name, measure), values in rows.items():
        place = result["layers"].setdefault(name, {}) if name else result
        place[measure] = float(np.mean(values))
        if measure in ("points", "attention", "propagated"):
            place[measure + "_se"] = float(np.std(values, ddof=1) / len(values) ** 0.5)
    for layer in result["layers"].values():
        for measure in ("points", "attention"):
            if measure in layer:
                layer[measure + "_ratio"] = layer[measure] / max(layer[measure + "_other"], 1e-9)
    by = "points_ratio" if any("points_ratio" in layer for layer in result["layers"].values()) else "attention_ratio"
    if result["layers"]:
        result["best"] = max(result["layers"], key=lambda name: result["layers"][name].get(by, 0.0))
    return result
