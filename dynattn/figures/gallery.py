"""What goes into the folder of figures: pictures, conditions.json, a README to look through; and the table."""

import io
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dynattn import __version__
from dynattn.weights import write_whole

from .noise import alike, alike_pictures, rounded
from .run import Drawing, Paper, Plan, Setting
from .tables import Measure, as_json, records, summary

CONDITIONS, README = "conditions.json", "README.md"


def entry(paper: str, number: int | str, plan: Plan, drawing: Drawing, setting: Setting) -> dict[str, Any]:
    """All that there is to know about a figure, or about a table that is drawn."""
    return {
        "paper": paper,
        "paper_name": setting.paper.name,
        "figure": number,
        "file": f"{paper}_{number}_{plan.stem}.png",
        "title": plan.title,
        "caption": drawing.caption,
        "weights": drawing.weights,
        "images": [picture.name for picture in drawing.pictures],
        "image_size": list(drawing.pictures[0].shape if drawing.pictures else setting.subject.size),
        "seed_of_random_weights": setting.seed,
        "measures": [measure.entry() for measure in drawing.measures],
        "networks": {name: records(summary(table)) for name, table in drawing.networks.items()},
        "versions": {"python": platform.python_version(), "dynattn": __version__}
        | {name: version(name) for name in ("torch", "timm", "numpy", "matplotlib")},
    }


def write(out: Path, new: dict[str, Any], figure: Figure) -> None:
    """Put a figure into the folder, and its entry among those of the other figures there. Files are replaced whole.

    Numbers get four digits. Where the folder has the same figure but for noise, picture and entry stay as they are.
    """
    new = rounded(new)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Title": new["title"], "Description": new["caption"]})
    key = lambda item: (item["paper"], isinstance(item["figure"], str), item["figure"])  # noqa: E731  (tables come last)
    there = {key(item): item for item in read(out) if (out / item["file"]).is_file()}
    picture = with_palette(stream.getvalue())
    if not unchanged(out, there.get(key(new)), new, picture):
        write_whole(out / new["file"], picture)
        there[key(new)] = new
    entries = [there[item] for item in sorted(there)]
    write_whole(out / CONDITIONS, as_json(entries).encode())
    write_whole(out / README, readme(entries).encode())


def with_palette(picture: bytes) -> bytes:
    """A PNG file with 256 colours, a fifth as large; its texts and its resolution are kept.

    An octree has fixed boxes of colours: noise in some pixels does not change the colours of all others, as with median
    cut. Without dithering, which would make the file large again.
    """
    image = Image.open(io.BytesIO(picture))
    texts = PngInfo()
    for key, value in image.text.items():
        texts.add_itxt(key, value) if not value.isascii() else texts.add_text(key, value)
    reduced = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    reduced.putpalette([255 if level == 254 else level for level in reduced.getpalette()])  # paper stays white
    about = {"dpi": image.info["dpi"]} if "dpi" in image.info else {}
    stream = io.BytesIO()
    reduced.save(stream, "PNG", optimize=True, pnginfo=texts, **about)
    return stream.getvalue()


def unchanged(out: Path, old: dict[str, Any] | None, new: dict[str, Any], picture: bytes) -> bool:
    """Whether the folder has this figure already, whichever versions drew it there."""
    if old is None:
        return False
    of_versions = {"versions": new["versions"]}
    return alike(old | of_versions, new) and alike_pictures((out / new["file"]).read_bytes(), picture)


def read(out: Path) -> list[dict[str, Any]]:
    """The entries of a folder; none where there is no such file, or another one of that name.

    An entry of another form, which an older version wrote, is left out.
    """
    try:
        entries = json.loads((out / CONDITIONS).read_text(encoding="utf-8"))
        entries = [entry for entry in entries if {"paper", "figure", "file", "measures"} <= set(entry)]
        return [entry for entry in entries if all(readable(measure) for measure in entry["measures"])]
    except (OSError, ValueError, TypeError):
        return []


def readable(measure: dict[str, Any]) -> bool:
    """Whether a measure has the form of today."""
    try:
        return bool(Measure.read(measure))
    except TypeError:
        return False


def readme(entries: list[dict[str, Any]]) -> str:
    """The gallery as Markdown."""
    parts = ["# Figures\n\nDrawn by `dynattn figures`. Every number is in [conditions.json](conditions.json).\n"]
    papers = [item.get("paper_name", item["paper"].upper()) for item in entries]
    for i, item in enumerate(entries):
        if papers[i] not in papers[:i]:
            parts.append(f"## {papers[i]}\n")
        parts.append(f"### {item['title']}\n\n![{item['title']}]({item['file']})\n\n{item['caption']}\n")
        rows = ["| measure | trained | random weights | another image's mask |", "| --- | --- | --- | --- |"]
        rows += ["| " + " | ".join(cells(Measure.read(measure))) + " |" for measure in item["measures"]]
        if item["measures"]:
            parts.append("\n".join(rows) + "\n")
        commands = {w["file"]: w.get("command") for w in item["weights"]}
        parts += [f"`{file}` was made by `{command}`.\n" for file, command in commands.items() if command]
    return "\n".join(parts)


def cells(measure: Measure) -> list[str]:
    """A measure as the cells of a table."""
    random = " / ".join(format(value, ".3g") for value in measure.random.values())
    other = "" if measure.other is None else format(measure.other, ".3g")
    if measure.n == 1:
        other = "no mask"
    elif measure.window is not None:
        other = f"a window: {measure.window:.3g}"
    trained = format(measure.trained, ".3g")
    if measure.seeds:
        values = (format(value, ".3g") for value in measure.seeds.values())
        trained += f" ({', '.join(measure.seeds)}: {', '.join(values)})"
    return [measure.name, trained, random, other]


def table(entries: list[dict[str, Any]], out: Path, paper: Paper) -> str:
    """What all figures measured, in columns, and where the pictures lie."""
    rows = [["figure", "measure", "trained", "random weights", "another image's mask"]]
    measures = [(str(entry["figure"]), Measure.read(measure)) for entry in entries for measure in entry["measures"]]
    rows += [[figure, *cells(measure)] for figure, measure in measures]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if any(len(measure.random) > 1 for _, measure in measures):
        lines.append("random weights: " + " / ".join(paper.random))
    return "\n".join(["", *lines, "", *(str(out / entry["file"]) for entry in entries), str(out / README)])
