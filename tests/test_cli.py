"""The command line: it explains itself, passes its options on, and tells of mistakes in a line."""

import argparse
import inspect
import json
import os
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynattn import __version__, cli

COMMANDS = ("figures", "lab", "segment", "table", "train", "bench", "check")
HEAVY = ("torch", "torchvision", "timm", "matplotlib", "skimage", "sklearn", "accelerate", "numba")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dynattn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=100)


def actions(command: str) -> list[argparse.Action]:
    """The arguments of a command, its help left out."""
    parser = cli.make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert tuple(commands.choices) == COMMANDS
    return [action for action in commands.choices[command]._actions if action.dest != "help"]


@pytest.fixture
def called(monkeypatch):
    """Replaces a function of the library by one that keeps what it is called with."""
    calls = []

    def replace(module: str, function: str, effect: BaseException | None = None):
        def stand_in(*args, **kwargs):
            calls.append((args, kwargs))
            if effect:
                raise effect

        monkeypatch.setitem(sys.modules, f"dynattn.{module}", SimpleNamespace(**{function: stand_in}))
        return calls

    return replace


# ------------------------------------------------------------------------------------------------ it explains itself


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_every_command(arguments):
    answer = run(*arguments)
    assert answer.returncode == 0 and not answer.stderr
    assert all(f"\n    {command} " in answer.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert f"examples:\n  dynattn {command}" in text
    for action in actions(command):
        assert action.help, f"{action.dest} is not explained"
        if action.default not in (None, argparse.SUPPRESS, []):
            assert "%(default)s" in action.help, f"the default of {action.dest} is not shown"


def test_version():
    answer = run("--version")
    assert (answer.returncode, answer.stdout) == (0, f"dynattn {__version__}\n")


# ---------------------------------------------------------------------------------------------- options are passed on


def test_figures_passes_its_options(called, tmp_path):
    image = tmp_path / "cat.jpg"
    image.touch()
    calls = called("figures", "draw")
    assert cli.main(["figures", "--only", "5", "6", "--image", str(image), "--model", "dat_tiny", "--seed", "3"]) == 0
    expected = dict(paper="dat", only=[5, 6], image=image, model="dat_tiny", seed=3)
    assert calls == [((), expected)]
    assert cli.main(["figures", "--paper", "dgt", "--only", "3", "table4b"]) == 0
    assert calls[1][1] == dict(paper="dgt", only=[3, "table4b"], seed=0)


def test_train_passes_only_what_was_given(called):
    calls = called("training", "train")
    assert cli.main(["train", "dat_mini", "--lr", "1e-3", "--fresh", "--model-options", '{"drop_path": 0.1}']) == 0
    expected = dict(name="dat_mini", fresh=True, lr=1e-3, model_options={"drop_path": 0.1})
    assert calls == [((), expected)]


def test_table_and_bench(called):
    assert (
        called("cost", "print_table") == [] and cli.main(["table"]) == 0 and cli.main(["table", "--paper", "dgt"]) == 0
    )
    called("bench", "main")
    assert cli.main(["bench"]) == 0
    assert called("bench", "main") == [(("dat",), {}), (("dgt",), {}), (([],), {})]
    assert cli.main(["bench", "import", "dat_tiny"]) == 0
    assert called("bench", "main")[-1] == ((["import", "dat_tiny"],), {})


def keywords(function) -> dict[str, object]:
    """Keyword arguments of a function with their defaults, `progress` and `**changes` left out."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind != p.VAR_KEYWORD and p.name != "progress"}


def assert_same_options(command: str, arguments: dict[str, object]):
    """The command offers these arguments, no other, with the same defaults."""
    assert {action.dest for action in actions(command)} == set(arguments)
    for action in actions(command):
        if action.default not in (None, argparse.SUPPRESS):
            assert action.default == arguments[action.dest], action.dest


def test_figures_offers_the_arguments_of_draw():
    draw = pytest.importorskip("dynattn.figures").draw
    assert_same_options("figures", keywords(draw))


def test_train_offers_the_arguments_of_train_and_the_fields_of_a_recipe():
    from dynattn import training

    recipe = {field.name: field.default for field in fields(training.Recipe) if field.name != "model"}
    every = {"all": False, "list": False} | keywords(training.train_all)
    assert_same_options("train", keywords(training.train) | recipe | every)


def test_train_all_and_its_list(monkeypatch):
    """The exit code says whether all went well."""
    calls = []
    monkeypatch.setattr("dynattn.training.print_runs", lambda: calls.append("list"))
    monkeypatch.setattr("dynattn.training.train_all", lambda processes: calls.append(processes) or processes == 3)
    assert cli.main(["train", "--all", "--list"]) == 0
    assert cli.main(["train", "--all", "--processes", "3"]) == 0
    assert cli.main(["train", "--all"]) == 1
    assert calls == ["list", 3, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all", "--seed", "1"], "--all: each model is trained by its own recipe; leave out --seed"),
        (["--all", "--train-count", "9"], "leave out --train-count"),
        (["dat_mini", "--list"], "--list: only with --all"),
        (["dat_mini", "--processes", "2"], "--processes: only with --all"),
    ],
)
def test_options_of_one_run_and_of_all_are_not_mixed(capsys, arguments, message):
    assert cli.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the notebooks


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_tour.ipynb").touch()
    return tmp_path


@pytest.fixture
def launched(monkeypatch):
    """What JupyterLab is started with."""
    calls = []
    app = SimpleNamespace(launch_instance=calls.append)
    monkeypatch.setattr(cli, "find_spec", lambda name: name)
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "")
    monkeypatch.setenv("JUPYTER_TOKEN", "")
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", SimpleNamespace(LabApp=app))
    return calls


@pytest.mark.parametrize("name", [None, "00_tour", "00_tour.ipynb", "notebooks/00_tour.ipynb"])
def test_lab_opens_a_notebook_by_name_or_path(checkout, launched, name):
    assert cli.main(["lab", "--no-browser"] + [name] * (name is not None)) == 0
    ((address, port, retries, *flags),) = launched
    assert address == "--LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb"
    assert port.startswith("--ServerApp.port=") and retries == "--ServerApp.port_retries=0"
    assert flags == ["--no-browser", "--ServerApp.log_level=ERROR", "--LabApp.log_level=ERROR"]
    assert Path.cwd() == checkout


def test_lab_opens_a_notebook_elsewhere(checkout, launched, tmp_path):
    (tmp_path / "my own.ipynb").touch()
    assert cli.main(["lab", "my own.ipynb", "--log"]) == 0
    assert [call[0] for call in launched] == ["--LabApp.default_url=/lab/tree/my%20own.ipynb"]
    assert not any("log_level" in option for option in launched[0])


def test_lab_says_in_one_line_where_it_is(checkout, launched, monkeypatch, capsys):
    monkeypatch.setenv("JUPYTER_TOKEN", "abc")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert cli.main(["lab", "--port", str(port)]) == 0
    address = f"http://localhost:{port}/lab/tree/notebooks/00_tour.ipynb?token=abc"
    assert capsys.readouterr().out == f"JupyterLab: {address} (Ctrl+C ends it)\n"
    with socket.socket() as taken:
        taken.bind(("localhost", port))
        taken.listen()
        assert cli.main(["lab", "--port", str(port)]) == 2
    assert f"port: {port} is not free; choose another with --port" in capsys.readouterr().err
    assert len(launched) == 1


def test_lab_leaves_out_what_only_teachers_need(checkout, monkeypatch):
    """In settings of its own, which end with it; those of the user are not touched."""
    seen = {}

    def launch(options):
        folder = Path(os.environ["JUPYTER_CONFIG_PATH"].split(os.pathsep)[0])
        seen["page"] = json.loads((folder / "labconfig" / "page_config.json").read_text())
        seen["settings"] = json.loads((folder / "labconfig" / "default_setting_overrides.json").read_text())
        seen["folder"] = folder

    monkeypatch.setattr(cli, "find_spec", lambda name: name)
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "theirs")
    monkeypatch.setenv("JUPYTER_TOKEN", "abc")
    app = SimpleNamespace(launch_instance=launch)
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", SimpleNamespace(LabApp=app))
    assert cli.main(["lab"]) == 0
    assert seen["page"] == {"disabledExtensions": {"@jupyter/nbgrader": True}}
    assert list(seen["settings"].values()) == [{"fetchNews": "false", "checkForUpdates": False}]
    assert not seen["folder"].exists() and os.environ["JUPYTER_CONFIG_PATH"].endswith("theirs")


def test_lab_tells_what_is_missing(checkout, launched, monkeypatch, capsys):
    assert cli.main(["lab", "07_none"]) == 2
    assert "one of 00_tour; got '07_none'" in capsys.readouterr().err
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["lab"]) == 2
    assert "JupyterLab is not installed" in capsys.readouterr().err
    monkeypatch.setattr(cli, "NOTEBOOKS", checkout / "site-packages" / "notebooks")
    assert cli.main(["lab"]) == 2
    assert "not installed with the package" in capsys.readouterr().err
    assert not launched


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["figure"], "invalid choice: 'figure'"),
        (["figures", "--image", "no.jpg"], "no such file: 'no.jpg'"),
        (["figures", "--weights", "no.pth"], "no such file: 'no.pth'"),
        (["figures", "--only", "six"], "expected the number of a figure, or a table as table4b, got 'six'"),
        (["figures", "--only", "-3"], "--only"),
        (["train"], "NAME"),
        (["train", "dat_mini", "--lr", "fast"], "invalid float value: 'fast'"),
        (["train", "dat_mini", "--model-options", "3"], "expected a JSON object"),
        (["train", "dat_mini", "--model-options", "{"], "not JSON"),
        (["table", "--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_a_wrong_command_is_told(arguments, told, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert told in capsys.readouterr().err


def test_a_paper_that_is_not_registered_is_told(capsys):
    for command, known in (
        ("figures", "'dat', 'debiformer', 'dgt'"),
        ("table", "'biformer', 'dat', 'debiformer', 'dgt', 'setr', 'sgformer'"),
    ):
        assert cli.main([command, "--paper", "cat"]) == 2
        assert f"paper: expected one of {known}, got 'cat'" in capsys.readouterr().err


def test_a_wrong_command_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from dynattn import cli\n"
        "try: cli.main(['train', 'dat_mini', '--lr', 'fast'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "dynattn.cli" in loaded and not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, FloatingPointError])
def test_an_error_is_one_line(called, monkeypatch, capsys, error):
    monkeypatch.delenv("DYNATTN_DEBUG", raising=False)
    called("training", "train", error("name: expected one of dat_mini, got 'dat_minni'"))
    assert cli.main(["train", "dat_minni"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "dynattn: error: name: expected one of dat_mini, got 'dat_minni'\n")
    monkeypatch.setenv("DYNATTN_DEBUG", "1")
    with pytest.raises(error):
        cli.main(["train", "dat_minni"])


def test_other_errors_keep_their_traceback(called):
    called("training", "train", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "dat_mini"])


def test_an_error_in_a_process_of_its_own():
    answer = run("lab", "07_none", DYNATTN_DEBUG="")
    assert answer.returncode == 2 and not answer.stdout
    assert answer.stderr.startswith("dynattn: error: ") and answer.stderr.count("\n") == 1


def test_interruption(called, capsys):
    called("training", "train", KeyboardInterrupt())
    assert cli.main(["train", "dat_mini"]) == 130
    assert capsys.readouterr().err == "\ndynattn: interrupted\n"
