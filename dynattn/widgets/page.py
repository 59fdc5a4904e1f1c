"""The lens as one HTML page that needs no kernel and no network.

All rows are worked out beforehand. What a query reads is a sparse row over the distinct positions that its layer reads
at all: how many, which (as distances, so that they compress), and how much, in 255ths of the row's heaviest. Each layer
is a block of its own, gzipped, which the page unpacks when it is first looked at.
"""

import gzip
import json
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import asdict
from fnmatch import fnmatchcase
from html import escape
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt, UInt8
from PIL import Image

from dynattn.tracing import Record, RegionRoutes

from .panel import MEAN, Panel, View, as_array, first_view, key_for_each_token, make_panels, near_keys, unique_positions

FOLDER = Path(__file__).parent
LARGEST = 5_000_000  # bytes


def save_page(
    models: Any, image: Any, path: str | PathLike, layers: str | int | Iterable[str | int] | None = None
) -> Path:
    """Write the page of `Lens(models, image).save(path, layers)`, without the widget: anywidget is not needed."""
    panels = make_panels(models, image)
    return write_page(path, View(panels, **first_view(panels)), layers)


def write_page(path: str | PathLike, view: View, layers: str | int | Iterable[str | int] | None = None) -> Path:
    """Write the page that opens at `view`. See `Lens.save`."""
    path = Path(path)
    chosen_layers = [_chosen_layers(panel, layers) for panel in view.panels]
    rows = [
        {name: pack(pack_rows(panel.record(name), panel.merged(name, MEAN))) for name in names}
        for panel, names in zip(view.panels, chosen_layers, strict=True)
    ]
    rollouts = [pack(dict(zip(("scale", "weight"), quantise(panel.rollouts), strict=True))) for panel in view.panels]
    seen = zip(view.layer, view.head, chosen_layers, strict=True)
    chosen = [(layer, head) if layer in names else (names[len(names) // 2], "mean") for layer, head, names in seen]
    state = {
        "row": view.row,
        "col": view.col,
        "layer": [layer for layer, _ in chosen],
        "head": [head for _, head in chosen],
        "fade": view.fade,
        "scene": scene(view.panels, chosen_layers),
        "shown": [],
    }
    page = html({"state": state, "rows": rows, "rollouts": rollouts}, [panel.name for panel in view.panels])
    if len(page) > LARGEST:
        blocks = [
            (len(block), f"{name} of {panel.name} ({len(block) / 1e6:.1f} MB)")
            for panel, blocks in zip(view.panels, rows, strict=True)
            for name, block in blocks.items()
        ]
        raise ValueError(
            f"layers: the page would take {len(page) / 1e6:.1f} MB, at most {LARGEST / 1e6:g} MB; keep fewer, "
            f"e.g. layers={view.panels[0].layers[-1]!r} or a pattern; the largest are "
            + ", ".join(text for _, text in sorted(blocks, reverse=True)[:3])
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(page)
    return path


def scene(panels: list[Panel], chosen_layers: list[list[str]] | None = None) -> list[dict[str, Any]]:
    """What does not change, as `lens.js` takes it (see there)."""
    return [
        {
            "name": panel.name,
            "shape": list(panel.shape),
            "picture": _jpeg(panel.picture),
            "aspect": panel.picture.shape[1] / panel.picture.shape[0],
            "first": _grid(panel.trace[panel.layers[0]]),
            "last": _grid(panel.trace[panel.layers[-1]]),
            "layers": [
                {"name": name, "title": panel.titles[name], "heads": panel.trace[name].heads}
                | _grid(panel.trace[name])
                | _routes(panel.routes(name))
                | _tokens(panel, name)
                | _pooled(panel, name)
                for name in (chosen_layers[p] if chosen_layers else panel.layers)
            ],
        }
        for p, panel in enumerate(panels)
    ]


def _grid(record: Record) -> dict[str, Any]:
    """How a layer's map lies over the image."""
    return {"cells": list(record.query_shape), "stride": list(record.stride)}


def _routes(routes: RegionRoutes | None) -> dict[str, Any]:
    """The regions of a layer and the routes between them, for layers that have some."""
    return {} if routes is None else {"routes": asdict(routes)}


def _tokens(panel: Panel, name: str) -> dict[str, Any]:
    """For every head of a layer the token of every cell, or None; nothing for layers that merge no cells."""
    each = [panel.merged(name, head) for head in range(panel.trace[name].heads)]
    return (
        {"tokens": [one if one is None else one.tolist() for one in each]}
        if any(one is not None for one in each)
        else {}
    )


def _pooled(panel: Panel, name: str) -> dict[str, Any]:
    """The token of every cell, for layers whose queries read tokens beside cells."""
    found = panel.pooled(name)
    return {} if found is None else {"pooled": found.tolist()}


def _jpeg(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + b64encode(file.getvalue()).decode()


def _chosen_layers(panel: Panel, layers: str | int | Iterable[str | int] | None) -> list[str]:
    """The layers that fit any of the patterns or numbers, in order."""
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    asked = ["*"] if layers is None else list(layers) if several else [layers]
    patterns = [name if isinstance(name, str) else panel.layer(name) for name in asked]
    chosen_layers = [name for name in panel.layers if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen_layers:
        raise ValueError(f"layers: none of {panel.name} fits {layers!r}; it has {', '.join(panel.layers)}")
    return chosen_layers


# ------------------------------------------------------------------------------------------------------------- packing


def pack_rows(record: Record, merged: Int[np.ndarray, " S"] | None = None) -> dict[str, np.ndarray]:
    """Every query's keys in every head, row after row: head 0's queries, head 1's, ...

    merged: the token of every cell, where all heads read the same tokens. Then each token has one key, on the first of
    its cells: rows are shorter.
    position (P, 2): all positions that are read, x and y. For each row: count, of its keys; scale, the weight of its
    heaviest. For each key: step, from the position before it to its own; weight, in 255ths of the scale. Where cells
    became tokens it is in 65535ths, since the order of the tokens is shown.
    Where queries read tokens beside cells, also for each row: most, the weight of its heaviest token; pooled, the
    weights of all tokens in 65535ths of it.
    """
    (H, W), (height, width) = record.query_shape, record.stride
    # The first pixel of each cell: the centre of the last one may lie outside the image.
    queries = [(i * height, j * width) for i in range(H) for j in range(W)]
    rows = [near_keys(record, row, col, head) for head in range(record.heads) for row, col in queries]
    if merged is not None:
        rows = [as_array(key_for_each_token(row, merged, record)) for row in rows]
    xy, weight = np.split(np.concatenate(rows), [2], axis=1)
    (position, which), weight = unique_positions(xy), weight[:, 0]
    count = np.array([len(row) for row in rows], dtype=np.uint32)
    row_of = np.repeat(np.arange(len(rows)), count)
    order = np.lexsort((which, row_of))
    which, weight = which[order], weight[order]
    step = np.diff(which, prepend=0)
    first = np.diff(row_of, prepend=-1) > 0
    step[first] = which[first]
    scale = np.full(len(rows), np.finfo(np.float32).tiny, dtype=np.float32)
    np.maximum.at(scale, row_of, weight)
    finest = np.uint8 if all(record.merged(head) is None for head in range(record.heads)) else np.uint16
    share = weight / scale[row_of] * np.iinfo(finest).max
    return {
        "position": position,
        "count": count,
        "scale": scale,
        "step": step.astype(np.uint16 if len(position) < 2**16 else np.uint32),
        "weight": share.round().astype(finest),
    } | _pack_pooled(record)


def _pack_pooled(record: Record) -> dict[str, np.ndarray]:
    """What every query gives in every head to the tokens that it reads beside cells."""
    each = [record.pooled(head) for head in range(record.heads)]
    if each[0] is None:
        return {}
    scale, share = quantise(torch.cat([one.weight for one in each]).float().cpu().numpy(), np.uint16)
    return {"most": scale, "pooled": share}


def quantise(
    rows: Float[np.ndarray, "L S"], finest: type = np.uint8
) -> tuple[Float[np.ndarray, " L"], UInt[np.ndarray, "L S"]]:
    """Each row's largest number, and the row in 255ths of it, or in as many parts as another type can count."""
    scale = rows.max(axis=1)
    return scale.astype(np.float32), (np.iinfo(finest).max * rows / scale[:, None]).round().astype(finest)


def pack(arrays: dict[str, np.ndarray]) -> str:
    """Arrays as base64 of gzip of: length of the header, header as JSON {name: [type, start, length]}, their bytes."""
    header, body = {}, b""
    for name, array in arrays.items():
        body += b"\0" * (-len(body) % 4)
        header[name] = [array.dtype.name, len(body), array.size]
        body += array.astype(array.dtype.newbyteorder("<")).tobytes()
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 4)
    return b64encode(gzip.compress(len(head).to_bytes(4, "little") + head + body, 9, mtime=0)).decode()


def html(payload: dict[str, Any], names: list[str]) -> bytes:
    """The page: style, data and the same module that notebooks run."""
    title = escape("dynattn: what " + ", ".join(names) + " read")
    data = json.dumps(payload, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{(FOLDER / "lens.css").read_text()}</style>
</head>
<body class="dynattn-page">
<h1>What one query reads</h1>
<p>Click a pixel of the photograph: the marks are the positions that its query reads there, coloured by weight.</p>
<main id="lens"></main>
<noscript>The lens needs JavaScript.</noscript>
<script type="application/json" id="payload">{data}</script>
<script type="module">
{(FOLDER / "lens.js").read_text()}
openPage(document.getElementById("lens"), JSON.parse(document.getElementById("payload").textContent));
</script>
</body>
</html>
""".encode()
