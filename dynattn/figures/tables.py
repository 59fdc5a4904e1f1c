"""What is measured of networks: one tidy table, from which means, errors and choices are group-bys; and a `Measure`.

A row of the table is one value:

    network    which one; a table of a single network may lack this column
    layer      its name; "" where the value is of the whole network
    head       its number; -1 where the value is of all heads together
    image      its number in the set
    mask       "own", the mask of that image; "other", the mean over the masks of the other images: the null;
               "none", where the value needs no mask
    kind       what is measured, as `measures.py` names it
    value
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

import pandas as pd

OWN, OTHER, NONE = "own", "other", "none"
NETWORK, ALL = "", -1  # the layer of what is of the whole network, the head of what is of all heads
PLACE = ["layer", "head", "kind"]
COLUMNS = [*PLACE, "value", "standard_error", "n", "other"]


class Row(NamedTuple):
    """A value of one image; `table_of` adds the image."""

    layer: str
    head: int
    mask: str
    kind: str
    value: float


def table_of(images: Iterable[Iterable[Row]]) -> pd.DataFrame:
    """The table of a network, from the rows of each image."""
    rows = [row._asdict() | {"image": i} for i, found in enumerate(images) for row in found]
    return pd.DataFrame(rows, columns=["layer", "head", "image", "mask", "kind", "value"])


def joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One table of several networks, by their names."""
    return pd.concat([table.assign(network=name) for name, table in tables.items()], ignore_index=True)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A network by (layer, head, kind): `value`, the mean over images, its standard error, n, and `other`, the null.

    What is not a number in some image (there are no queries on the object) is left out of that mean.
    """
    found = table.groupby([*PLACE, "mask"], sort=False).value.agg(value="mean", standard_error="sem", n="count")
    found = found.reset_index("mask")
    null = found.value[found["mask"] == OTHER].rename("other")
    return found[found["mask"] != OTHER].drop(columns="mask").join(null)


def records(found: pd.DataFrame) -> dict[str, list]:
    """A summary as JSON takes it: the names of its columns, and its rows; what is not a number is null."""
    rows = found.reset_index()[COLUMNS].to_numpy(dtype=object)
    return {"columns": COLUMNS, "rows": [[None if value != value else value for value in row] for row in rows]}


def from_records(kept: Mapping[str, list]) -> pd.DataFrame:
    """The summary that `records` wrote."""
    return pd.DataFrame(kept["rows"], columns=kept["columns"]).set_index(PLACE).astype({"other": float})


def as_json(value: Any) -> str:
    """JSON with an indent, in which a list of numbers and words takes one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return re.sub(r"\[[^][{}]*\]", lambda flat: re.sub(r"\n\s*", " ", flat[0]), text)


def best(found: pd.Series, layer: str | None = None) -> tuple[str, int]:
    """The (layer, head) with the largest value, of all or within a layer; the first of several that are equal."""
    if layer is not None:
        found = found[found.index.get_level_values("layer") == layer]
    name, head = found.fillna(float("-inf")).idxmax()
    return name, int(head)


def at(table: pd.DataFrame, layer: str, head: int = ALL) -> pd.DataFrame:
    """The rows of one place."""
    return table[(table.layer == layer) & (table["head"] == head)]


def means(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Of each (network, mask) the mean over images, its standard error, n; in an image all places count alike."""
    images = table[table.kind == kind].groupby(["network", "mask", "image"], sort=False).value.mean()
    return images.groupby(["network", "mask"], sort=False).agg(value="mean", standard_error="sem", n="count")


@dataclass(frozen=True)
class Measure:
    """One line under a figure: what was measured of a network, and what chance would give.

    name: in words. trained: the value of the network that is drawn, or the mean of several. random: of each network
    with random weights. n: how many images. other: the same under the masks of the other images. standard_error: of
    `trained`. seeds: of networks that were trained alike from other seeds; or those that `trained` is the mean of.
    layer: what it was measured in. limit: the most that there could be. window: what a window would give.
    """

    name: str
    trained: float
    random: dict[str, float]
    n: int
    other: float | None = None  # None: the measure needs no mask, or there is none
    standard_error: float | None = None
    seeds: dict[str, float] = field(default_factory=dict)
    layer: str | None = None
    limit: float | None = None
    window: float | None = None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """The measure that `entry` wrote; raises TypeError where it is of another form."""
        return cls(**entry)

    def entry(self) -> dict[str, Any]:
        """What conditions.json has of it; of the last five fields only those that there are."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        always = ("name", "trained", "random", "n", "other")
        return {name: value for name, value in found.items() if name in always or value not in (None, {})}

    @property
    def nulls(self) -> list[float]:
        """What chance would give, but for the masks of a photograph that has none."""
        return [*self.random.values(), *(value for value in (self.other, self.window) if value is not None)]
