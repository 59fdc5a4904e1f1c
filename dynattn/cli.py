"""The command line: `dynattn`, also `python -m dynattn`.

An option is named as the keyword argument that it sets. Each command imports what it needs when it runs, so that
help and mistakes answer at once.
"""

import argparse
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from . import __version__, plugins

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return its exit code.

    0 done, 1 checked and found wrong, 2 wrong arguments or input (told in a line; with DYNATTN_DEBUG=1 in a
    traceback), 130 interrupted.
    """
    parser = make_parser()
    options = vars(parser.parse_args(argv))
    run = options.pop("run", None)
    if run is None:
        parser.print_help()
        return 0
    try:
        plugins.load()
        return run(**options) or 0
    except KeyboardInterrupt:
        print("\ndynattn: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        if os.environ.get("DYNATTN_DEBUG"):
            raise
        print(f"dynattn: error: {error}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------------------------------------------------- commands


def figures(**options) -> None:
    """Draw the figures: `dynattn.figures.draw`."""
    from .figures import draw

    draw(**options)


def table(paper: str) -> None:
    """Print what models cost: `dynattn.cost.print_table`."""
    from .cost import print_table

    print_table(paper)


def train(**options) -> int | None:
    """Train a small model, `dynattn.training.train`, or all that ship, `train_all`. Returns 1 when a run failed."""
    if options.pop("all", False):
        return train_all(**options)
    if unused := {"list", "processes"} & set(options):
        raise ValueError(f"--{min(unused)}: only with --all")
    from .training import train

    train(**options)


def train_all(list: bool = False, processes: int | None = None, **others) -> int | None:
    """Train all that ship and are out of date, or list them."""
    if others:
        raise ValueError(f"--all: each model is trained by its own recipe; leave out --{min(others).replace('_', '-')}")
    from .training import print_runs, train_all

    if list:
        return print_runs()
    return 0 if train_all(processes) else 1


def segment(
    photo: Path,
    weights: Path | None = None,
    model: str | None = None,
    out: Path | None = None,
    short_side: int | None = None,
    multi_scale: bool = False,
) -> None:
    """Segment a photograph: `dynattn.dense.predict`, and the pictures of `dynattn.dense.drawing`."""
    from . import weights as checkpoints
    from .data import read_image, to_input
    from .dense import SCALES, predict, resize
    from .dense.classes import class_names
    from .dense.drawing import label_picture, overlay, shares
    from .official import model_from

    if weights is None and model is None:
        raise ValueError("--weights: expected a checkpoint, or --model NAME for one that ships")
    photograph = read_image(photo)
    file = checkpoints.path(model) if weights is None else weights
    name, network = model_from(file, model)
    if model not in (None, name):
        raise ValueError(f"--model: {file} is a checkpoint of {name}, not of {model}")
    if not hasattr(network, "segments"):
        raise ValueError(
            f"--weights: {name} classifies images; expected a model for segmentation, such as setr_pup_base"
        )
    names = checkpoints.metadata(file).get("classes") or class_names(network.num_classes)
    side = min(network.img_size) if short_side is None else short_side
    if side < 1:
        raise ValueError(f"--short-side: expected at least 1, got {side}")
    width, height = photograph.size
    shape = tuple(max(1, round(pixels * side / min(width, height))) for pixels in (height, width))
    how = dict(scales=SCALES, mirror=True) if multi_scale else {}
    found = predict(network, to_input(photograph, shape), progress=True, **how)
    labels = resize(found[None], (height, width))[0].argmax(0).cpu().numpy()
    out = Path(f"{photo.stem}_segmented") if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    for file, picture in (
        (out / f"{photo.stem}_segmentation.png", overlay(photograph, labels, names)),
        (out / f"{photo.stem}_labels.png", label_picture(labels, len(names))),
    ):
        picture.save(file, optimize=True)
        print(file)
    for number, share in shares(labels, len(names)):
        print(f"{number:4}  {names[number]:20} {share:6.1%}")


def bench(names: list[str]) -> None:
    """Measure speed: `dynattn.bench.main`."""
    from .bench import main

    main(names)


def check(**options) -> int:
    """Check a student's file: `dynattn.verify.student.examine`. Returns 1 when something is wrong."""
    from .verify.student import examine

    passed = True
    for verdict in examine(**options):
        print(verdict, flush=True)
        passed = passed and verdict.passed
    return 0 if passed else 1


def lab(
    notebook: str, port: int | None = None, no_browser: bool = False, allow_root: bool = False, log: bool = False
) -> None:
    """Open JupyterLab on a notebook, from the folder that holds it, and say where in one line.

    What only teachers need, nbgrader's menu and buttons, is left out here; `jupyter lab` has it.
    """
    file = find_notebook(notebook)
    if find_spec("jupyterlab") is None:
        raise FileNotFoundError("JupyterLab is not installed: in the project's folder, pip install -e '.[notebooks]'")
    from jupyterlab.labapp import LabApp

    port = free_port(port)
    root = NOTEBOOKS.parent if file.is_relative_to(NOTEBOOKS) else file.parent  # the code beside the notebooks
    os.chdir(root)  # JupyterLab shows the folder that it is started in
    address = "/lab/tree/" + quote(file.relative_to(root).as_posix())
    token = os.environ["JUPYTER_TOKEN"] = os.environ.get("JUPYTER_TOKEN") or secrets.token_hex(16)
    flags = ["--no-browser"] * no_browser + ["--allow-root"] * allow_root
    if not log:
        flags += ["--ServerApp.log_level=ERROR", "--LabApp.log_level=ERROR"]
    print(f"JupyterLab: http://localhost:{port}{address}?token={token} (Ctrl+C ends it)", flush=True)
    with TemporaryDirectory() as settings:
        leave_out(Path(settings))
        others = os.environ.get("JUPYTER_CONFIG_PATH")
        os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join([settings, *([others] if others else [])])
        LabApp.launch_instance(
            [f"--LabApp.default_url={address}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", *flags]
        )


def free_port(port: int | None) -> int:
    """`port`, or the first free one from Jupyter's own on. Raises OSError where it is in use, before Jupyter starts."""
    for number in range(8888, 8988) if port is None else [port]:
        with socket.socket() as trial:
            if os.name == "posix":
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                trial.bind(("localhost", number))
                return number
            except OSError:
                continue
    taken = "none from 8888 to 8987 is free" if port is None else f"{port} is not free"
    raise OSError(f"port: {taken}; choose another with --port")


def leave_out(settings: Path) -> None:
    """Write settings for the JupyterLab of this process; the user's own are not touched.

    They keep nbgrader out, and the question about Jupyter's news, which would lie over a lecture.
    """
    parts = ("formgrader", "validate_assignment", "assignment_list", "course_list")
    extensions = {f"nbgrader.server_extensions.{part}": False for part in parts}
    server = {"ServerApp": {"jpserver_extensions": extensions}}
    page = {"disabledExtensions": {"@jupyter/nbgrader": True}}
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    files = {
        "jupyter_server_config.d/dynattn.json": server,
        "labconfig/page_config.json": page,
        "labconfig/default_setting_overrides.json": quiet,
    }
    for name, content in files.items():
        (settings / name).parent.mkdir(exist_ok=True)
        (settings / name).write_text(json.dumps(content))


def find_notebook(name: str) -> Path:
    """The file of a notebook, from a path or from the name of one of the project's own.

    Raises: FileNotFoundError, with the names that there are.
    """
    for file in (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb"):
        if file.is_file():
            return file.resolve()
    if not NOTEBOOKS.is_dir():
        raise FileNotFoundError(
            "the notebooks lie in the project's folder and are not installed with the package: "
            "run `make lab` there, or give the path of a notebook"
        )
    names = ", ".join(sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb")))
    raise FileNotFoundError(f"NOTEBOOK: expected a path or one of {names}; got {name!r}")


# ---------------------------------------------------------------------------------------------------------- options


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each leaves its function in `run` and that function's arguments beside it."""
    parser = argparse.ArgumentParser(
        prog="dynattn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Dynamic attention for vision, to read, to look at and to measure.",
        epilog="start with:\n"
        "  dynattn figures     the figures of the first paper, from the trained model that ships with the package\n"
        "  dynattn lab         the notebooks\n\n"
        "`dynattn COMMAND --help` explains a command. DYNATTN_DEBUG=1 shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"dynattn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add_figures(commands)
    add_lab(commands)
    add_segment(commands)
    add_table(commands)
    add_train(commands)
    add_bench(commands)
    add_check(commands)
    return parser


def add_command(commands, run, summary: str, details: str, examples: str) -> argparse.ArgumentParser:
    """A command that calls `run` with its options; one that was not given and has no default here is left to `run`."""
    sub = commands.add_parser(
        run.__name__,
        help=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{details}",
        epilog=f"examples:\n{examples}",
    )
    sub.set_defaults(run=run)
    return sub


def add_figures(commands) -> None:
    """The options of `figures`."""
    sub = add_command(
        commands,
        figures,
        "draw the figures of a paper",
        "Writes them into a folder and prints what each of them measures, beside what random weights\n"
        "and another image's mask give. Without --weights and --model it uses the trained model that\n"
        "ships with the package, without --image the sample photographs.",
        "  dynattn figures\n"
        "  dynattn figures --paper dgt --only 3 table4b\n"
        "  dynattn figures --only 6 7 --image cat.jpg\n"
        "  dynattn figures --image cat.jpg --weights dat_tiny_in1k_224.pth --out cat_in_dat_tiny",
    )
    add_paper(sub)
    sub.add_argument(
        "--only",
        type=figure_number,
        nargs="+",
        metavar="N",
        help="figures by their numbers, tables by their names, as 6 or table4b (default: all)",
    )
    sub.add_argument("--image", type=existing_file, metavar="FILE", help="a photograph of your own, in any format")
    sub.add_argument(
        "--weights",
        type=existing_file,
        metavar="CHECKPOINT",
        help="a published or trained checkpoint; the model is read off its contents",
    )
    sub.add_argument("--model", metavar="NAME", help="a model by name, to say or to check which one it is")
    sub.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="(default: figures; with an image, a checkpoint or a model of yours NAME_figures)",
    )
    sub.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default: %(default)s)"
    )


def add_lab(commands) -> None:
    """The options of `lab`."""
    sub = add_command(
        commands,
        lab,
        "open JupyterLab on the tour",
        "Opens the project's notebooks, which need the project's folder (not the installed package alone).",
        "  dynattn lab\n  dynattn lab 01_dat\n  dynattn lab --port 8899 --no-browser",
    )
    sub.add_argument(
        "notebook", nargs="?", default="00_tour", metavar="NOTEBOOK", help="a name or a path (default: %(default)s)"
    )
    sub.add_argument("--port", type=port_number, metavar="N", help="(default: the first free one from 8888 on)")
    sub.add_argument("--no-browser", action="store_true", help="only print the address to open")
    sub.add_argument("--allow-root", action="store_true", help="run as root, as in a container; Jupyter else refuses")
    sub.add_argument("--log", action="store_true", help="show Jupyter's log (default: its errors alone)")


def add_segment(commands) -> None:
    """The options of `segment`."""
    sub = add_command(
        commands,
        segment,
        "segment a photograph",
        "Writes two pictures into a folder: PHOTO_segmentation.png, the classes over the photograph with a\n"
        "legend, and PHOTO_labels.png, whose pixels are the numbers of the classes. Prints how much of the\n"
        "photograph each class covers. A window slides over the photograph, of the size that the model was\n"
        "made for.",
        "  dynattn segment street.jpg --weights setr_pup_cityscapes.pth\n"
        "  dynattn segment street.jpg --weights setr_pup_cityscapes.pth --short-side 1024 --multi-scale",
    )
    sub.add_argument("photo", type=existing_file, metavar="PHOTO", help="a photograph, in any format")
    sub.add_argument(
        "--weights",
        type=existing_file,
        metavar="FILE",
        help="a published or trained checkpoint; the model is read off its contents",
    )
    sub.add_argument("--model", metavar="NAME", help="a model by name: which one a checkpoint is of, or one that ships")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="(default: PHOTO_segmented)")
    sub.add_argument(
        "--short-side",
        type=int,
        metavar="N",
        help="pixels that the photograph's shorter side is brought to (default: the window's)",
    )
    sub.add_argument(
        "--multi-scale",
        action="store_true",
        default=argparse.SUPPRESS,
        help="the paper's test: six scales from 0.5 to 1.75, mirrored too; twelve predictions and more windows",
    )


def add_table(commands) -> None:
    """The options of `table`."""
    sub = add_command(
        commands,
        table,
        "print parameters and multiply-adds beside the paper's",
        "Every model and every ablation of the paper, counted here; a footnote explains each difference.",
        "  dynattn table\n  dynattn table --paper dgt",
    )
    add_paper(sub)


def add_train(commands) -> None:
    """The options of `train`: its keyword arguments and the fields of `Recipe`."""
    sub = add_command(
        commands,
        train,
        "train a small model on the procedural shapes",
        "Each model has a recipe (dynattn/training/recipes.py); the options below change it. A run that was\n"
        "stopped, in whatever way, goes on from its last checkpoint, about half a minute old at most, when the\n"
        "same command is given again. --all trains everything that ships and is out of date: since the data\n"
        "set, the recipe or the model has changed. Exit code with --all: 1 when a run failed.",
        "  dynattn train dat_mini\n"
        "  dynattn train dat_mini --steps 200 --size 64 --out runs/try\n"
        "  dynattn train dat_mini --model-options '{\"drop_path_rate\": 0.1}'\n"
        "  torchrun --standalone --nproc-per-node 2 -m dynattn train dat_mini\n"
        "  dynattn train --all --list",
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME", help="dat_mini or another model that has a recipe")
    what.add_argument("--all", action="store_true", default=argparse.SUPPRESS, help="everything that is out of date")
    sub.add_argument(
        "--list",
        action="store_true",
        default=argparse.SUPPRESS,
        help="with --all: train nothing, list what ships and why it is out of date",
    )
    sub.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="with --all: runs at once, of one thread each (default: as many as CPUs, one where there is a GPU)",
    )
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="of the run (default: runs/NAME/seedSEED)")
    sub.add_argument("--seed", type=int, metavar="N", help="of weights, order and augmentation (default: 0)")
    sub.add_argument("--fresh", action="store_true", default=argparse.SUPPRESS, help="start over instead of going on")
    sub.add_argument("--workers", type=int, metavar="N", help="processes that draw the images (default: 2)")
    sub.add_argument(
        "--keep",
        type=int,
        nargs="+",
        metavar="STEP",
        help="write the weights after these steps too, to stepN.safetensors",
    )
    recipe = sub.add_argument_group("the recipe", "(default: the model's own)")
    recipe.add_argument("--task", metavar="NAME", help="classification or segmentation")
    recipe.add_argument("--level", metavar="NAME", help="of the images: easy or cluttered")
    recipe.add_argument("--size", type=int, metavar="N", help="side of the images in pixels")
    recipe.add_argument("--train-count", type=int, metavar="N", help="images to train on")
    recipe.add_argument("--test-count", type=int, metavar="N", help="images to test on")
    recipe.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    recipe.add_argument("--batch", type=int, metavar="N", help="images a step, of all processes together")
    recipe.add_argument("--lr", type=float, metavar="X", help="highest learning rate")
    recipe.add_argument("--warmup", type=float, metavar="SHARE", help="share of the steps in which the rate rises")
    recipe.add_argument("--weight-decay", type=float, metavar="X", help="of matrices and kernels")
    recipe.add_argument("--clip", type=float, metavar="NORM", help="largest norm of a gradient")
    recipe.add_argument("--label-smoothing", type=float, metavar="X", help="probability spread over all classes")
    recipe.add_argument(
        "--pace",
        type=float,
        metavar="X",
        help="rate of what no optimiser moves (DGT's centroids), over the optimiser's",
    )
    recipe.add_argument("--model-options", type=json_object, metavar="JSON", help="arguments of the model")


def add_bench(commands) -> None:
    """The options of `bench`."""
    sub = add_command(
        commands,
        bench,
        "measure speed, mostly as ratios to something known",
        "A ratio of two things that are timed in turn, on the same machine, means the same on every machine.",
        "  dynattn bench\n  dynattn bench ops\n  dynattn bench cuda",
    )
    names = "model, hlg, import, figures (in seconds), ops, routed, ranks (CPU), cuda (on a GPU); default: model import"
    sub.add_argument("names", nargs="*", default=[], metavar="NAME", help=names)


def add_check(commands) -> None:
    """The options of `check`."""
    sub = add_command(
        commands,
        check,
        "check functions of a file against the papers' loops",
        "Checks what the file defines under the names of the operations (dense_attention, sample_points, ...):\n"
        "outputs and gradients, on random cases. Where it is wrong, says in which case and, if it knows the\n"
        "mistake, which. The file runs in a process and an empty folder of its own; what it prints is not shown.\n"
        "Exit code: 0 all passed, 1 something is wrong, 2 there is nothing to check.",
        "  dynattn check answers.py\n  dynattn check answers.py --operation sample_points --timeout 10",
    )
    sub.add_argument("file", type=existing_file, metavar="FILE", help="a Python file")
    sub.add_argument("--operation", metavar="NAME", help="check only this one (default: all that the file defines)")
    sub.add_argument(
        "--cases", type=int, default=20, metavar="N", help="random cases of each operation (default: %(default)s)"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the cases (default: %(default)s)")
    sub.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for loading the file, and for each operation (default: %(default)s)",
    )
    sub.add_argument(
        "--memory",
        type=int,
        default=2048,
        metavar="MIB",
        help="that the file may use, beside what torch takes (default: %(default)s)",
    )


def add_paper(sub: argparse.ArgumentParser) -> None:
    """The option that names a paper."""
    sub.add_argument(
        "--paper", default="dat", metavar="NAME", help="dat, dgt or another that is registered (default: %(default)s)"
    )


def figure_number(text: str) -> int | str:
    """The number of a figure or the name of a table, for argparse."""
    if text.isdecimal():
        return int(text)
    if not re.fullmatch(r"table\d+[a-z]?", text):
        raise argparse.ArgumentTypeError(f"expected the number of a figure, or a table as table4b, got {text!r}")
    return text


def port_number(text: str) -> int:
    """A port, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, got {text!r}")
    return int(text)


def existing_file(text: str) -> Path:
    """The path of a file, for argparse."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text!r}")
    return Path(text)


def json_object(text: str) -> dict:
    """A JSON object, for argparse."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"drop_path_rate\": 0.1}}', got {text!r}")
    return value
