"""`dynattn check FILE`: a student's file runs in a process of its own, within limits, and cannot pass by a trick."""

import inspect
import os
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from dynattn import cli, verify
from dynattn.verify import student

LINUX = sys.platform == "linux"
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="files are checked under limits of Linux and macOS"),
    pytest.mark.filterwarnings("ignore:Do not use the `random` module"),  # beartype does, to look into lists
]

DENSE = """
    def dense_attention(q, k, v, *, bias=None, scale=None):
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        return (logits if bias is None else logits + bias).softmax(-1) @ v
"""


def write(folder: Path, text: str, name: str = "answers.py") -> Path:
    """A student's file."""
    file = folder / name
    file.write_text(dedent(text))
    return file


def examine(file: Path, *operations: str, **options) -> dict[str | None, student.Verdict]:
    """The verdicts by operation."""
    return {verdict.operation: verdict for verdict in student.examine(file, *operations, **{"cases": 5} | options)}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str | None, student.Verdict]:
    """Of a file that does in each operation something else, and has a neighbour; its name is no identifier."""
    folder = tmp_path_factory.mktemp("with blanks")
    write(folder, "def half(n):\n    return 1 / 0\n", "helper.py")
    text = """
        import sys
        from helper import half
        print("passed")

        def sample_points(x, points):
            return half(x)

        def window_attention(q, k, v, table, query_shape, *, window):
            return input("Which window? ")

        def deformable_attention(q, k, v, points, table, query_shape):
            sys.exit(0)

        class detr_attention:
            pass

        def grouped_attention(q, k, v, groups, selected):
            return q

        def routed_attention(q, k, v, routes):
            return q

        def bilevel_attention(q, k, v, query_shape, key_shape, *, regions, topk):
            return 2 * q

        def aggregate_tokens(*given, **options):
            return given[0]

        def hybrid_scale_attention(*given, **options):
            return given[0]

        def local_attention(*given, **options):
            return given[0]

        def window_embedding(*given, **options):
            return given[0]

        def dense_attention(q, k, v, *, bias=None, scale=None):
            print("passed", file=sys.stdout, flush=True)
            open("notes.txt", "a").write("here")
            return right(q, k, v, bias=bias, scale=scale)
        """
    text = dedent(text) + dedent(DENSE).replace("dense_attention", "right")
    found = examine(write(folder, text, "2 my answers.py"))
    assert {path.name for path in folder.iterdir()} == {"helper.py", "2 my answers.py"}  # it runs elsewhere
    return found


# ----------------------------------------------------------------------------------------------------- what is told


def test_a_right_function_passes(verdicts):
    assert verdicts["dense_attention"].passed
    assert str(verdicts["dense_attention"]) == "dense_attention: passed, outputs and gradients of 5 cases"


def test_every_operation_has_a_verdict(verdicts):
    assert list(verdicts) == verify.operations()
    assert [name for name, verdict in verdicts.items() if verdict.passed] == ["dense_attention"]
    assert all(str(verdict).startswith(f"{name}: ") for name, verdict in verdicts.items())


def test_an_error_shows_the_students_own_lines(verdicts):
    lines = [line.strip() for line in str(verdicts["sample_points"]).splitlines()]
    assert lines[0] == "sample_points: ZeroDivisionError: division by zero"
    assert lines[1:3] == ['File "2 my answers.py", line 7, in sample_points', "return half(x)"]
    assert 'File "helper.py", line 2, in half' in lines
    assert not any("dynattn/" in line or "torch/" in line for line in lines)
    assert lines[-2].startswith("in the case of x (1, 1, 1, 1)") and lines[-1].startswith("again: verify.case(")


def test_libraries_in_the_student_s_folder_are_not_the_student_s():
    """As where the file lies in the project's folder, with its environment."""
    try:
        verify.check("no_such", print)
    except ValueError as error:
        lines = student.told(error, Path(__file__).parents[1] / "answers.py", 1).splitlines()
    assert lines[0].startswith("ValueError: ") and 'File "tests/test_check.py"' in lines[1] and len(lines) <= 4


def test_what_is_no_function_is_told(verdicts):
    assert "TypeError: expected a function, got the class detr_attention" in str(verdicts["detr_attention"])


def test_there_is_no_input(verdicts):
    assert "window_attention: EOFError" in str(verdicts["window_attention"])


def test_an_exit_is_no_pass(verdicts):
    assert "deformable_attention: called exit(0)" in str(verdicts["deformable_attention"])


def test_a_wrong_answer_is_explained(tmp_path, capsys):
    """On the command line: a line for what passed, the mismatch with the name of the mistake, exit code 1."""
    text = """
        from torch.nn.functional import grid_sample

        def sample_points(x, points):
            return grid_sample(x, points[:, None], align_corners=True)[:, :, 0]
        """
    file = write(tmp_path, dedent(text) + dedent(DENSE))
    assert cli.main(["check", str(file), "--cases", "5"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "dense_attention: passed, outputs and gradients of 5 cases"
    assert lines[1].startswith("sample_points: the output is wrong: at [0, 0, 0] (image 0, channel 0, point 0)")
    assert lines[2] == "  this is what comes out with the mistake: rows and columns swapped"
    assert lines[4].startswith('  again: verify.case("sample_points", ')
    assert len(lines) == 5 and err == ""


def test_one_operation_alone(tmp_path, capsys):
    """The others are not looked at; exit code 0. The file is not imported here, and may be called as one of ours."""
    loop = "ANSWER = 42\ndef sample_points(x, points):\n    while True: pass\n"
    file, before = write(tmp_path, dedent(DENSE) + loop, "torch.py"), set(sys.modules)
    options = ["--operation", "dense_attention", "--cases", "3"]
    assert cli.main(["check", str(file), *options]) == 0
    assert capsys.readouterr().out == "dense_attention: passed, outputs and gradients of 3 cases\n"
    assert not any("ANSWER" in vars(module) for module in list(sys.modules.values()))
    assert not [name for name in set(sys.modules) - before if not name.startswith(("dynattn", "hypothesis"))]


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.slow
def test_time_memory_and_ends(tmp_path):
    """An endless loop, too much memory, a crash, an exit that nothing catches: each is named, and the next goes on."""
    text = """
        import os, signal, torch

        def sample_points(x, points):
            while True:
                pass

        def dense_attention(q, k, v):
            return torch.zeros(2**32, dtype=q.dtype)

        def window_attention(q, k, v, table, query_shape, *, window):
            os.kill(os.getpid(), signal.SIGSEGV)

        def deformable_attention(q, k, v, points, table, query_shape):
            os._exit(0)

        def detr_attention(v, points, weights):
            return bytearray(2**32)
        """
    started = time.monotonic()
    told = {name: str(verdict) for name, verdict in examine(write(tmp_path, text), timeout=2, memory=512).items()}
    assert time.monotonic() - started < 200
    assert told["sample_points"].startswith("sample_points: took longer than 2 s\n  in the case of x (")
    assert told["window_attention"].startswith("window_attention: was ended by SIGSEGV")
    assert told["deformable_attention"].startswith("deformable_attention: ended its process with exit code 0\n")
    if LINUX:
        for name in ("dense_attention", "detr_attention"):
            assert told[name].startswith(f"{name}: needed more than 512 MiB of memory\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, told",
    [
        ("while True: pass", "took longer than 1 s while it was loaded"),
        ("import os; os._exit(0)", "ended its process with exit code 0 while it was loaded"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'\n    File"),
    ],
)
def test_a_file_that_does_not_load(tmp_path, text, told):
    file = write(tmp_path, text + "\n" + dedent(DENSE))
    ((operation, verdict),) = examine(file, timeout=1).items()
    assert operation is None and not verdict.passed
    assert str(verdict).startswith(f"answers.py: {told}")


@pytest.mark.slow
def test_what_the_file_starts_is_ended(tmp_path):
    """Children that would sleep on, and their children."""
    text = f"""
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                os.fork()
                open({str(tmp_path)!r} + f"/{{os.getpid()}}.pid", "w").close()
                time.sleep(1000)
        """
    assert examine(write(tmp_path, dedent(text) + dedent(DENSE)))["dense_attention"].passed
    processes = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(processes) >= 3
    until = time.monotonic() + 5
    while any(map(is_running, processes)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_running, processes))


def is_running(process: int) -> bool:
    """Whether there is such a process that has not ended; one that has may wait for somebody to ask how."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


# -------------------------------------------------------------------------------------------------------------- tricks


@pytest.mark.slow
def test_the_judge_is_out_of_reach(tmp_path):
    """Replacing the oracle in its own process, or breaking into the conversation, gets nobody through."""
    text = """
        import os, socket
        from dynattn import verify
        import dynattn.verify.student

        for module in (verify, verify.student):
            for name in ("check", "check_answers", "compare", "examine", "_difference", "_failure"):
                setattr(module, name, lambda *arguments, **options: None)

        def sample_points(x, points):
            return 0 * verify.operations.__globals__["OPERATIONS"]["sample_points"].function(x, points)

        def dense_attention(q, k, v):
            frame = b'{"passed": true}'
            for number in range(3, 64):
                try:
                    os.write(number, len(frame).to_bytes(8) + bytes(8) + frame)
                except OSError:
                    pass
            return q

        def detr_attention(v, points, weights):
            for number in range(3, 64):
                try:
                    os.write(number, b"no frame at all, but long enough for the lengths of one")
                except OSError:
                    pass
            return v
        """
    told = examine(write(tmp_path, text))
    assert not any(verdict.passed for verdict in told.values())
    assert "sample_points: the output is wrong" in str(told["sample_points"])
    assert "sent something else than an answer" in str(told["dense_attention"])
    assert "sent something else than an answer" in str(told["detr_attention"])


# ------------------------------------------------------------------------------------------------------------ bad usage


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("answers.py", b"x = 1\ndef f(:\n", "answers.py, line 2: invalid syntax: def f(:"),
        ("answers.py", b"x = '\x00'\n", "answers.py"),
        ("answers.py", b"x = '\xff\xfe'\n", "answers.py"),
        ("answers.py", b"(" * 5000, "answers.py"),
        ("tour.ipynb", b"{}", "expected a Python file (.py), got 'tour.ipynb'"),
    ],
)
def test_a_file_that_is_not_python(tmp_path, capsys, name, content, told):
    (tmp_path / name).write_bytes(content)
    assert cli.main(["check", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dynattn: error: FILE: ") and told in err and err.count("\n") == 1


def test_a_file_without_operations(tmp_path, capsys):
    """What it only imports from dynattn is not its own."""
    file = write(tmp_path, "from dynattn.core import sample_points\ndef dense(q, k, v): pass\n")
    assert cli.main(["check", str(file)]) == 2
    told = capsys.readouterr().err
    assert f"answers.py defines none of {', '.join(verify.operations()[:2])}, " in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "options, told",
    [
        (["--operation", "attention"], "operation: expected one of 'aggregate_tokens', "),
        (["--cases", "0"], "cases: expected at least 1, got 0"),
        (["--memory", "0"], "memory: expected at least 1, got 0"),
        (["--timeout", "0"], "timeout: expected a finite number of seconds above 0, got 0"),
        (["--timeout", "nan"], "timeout: expected a finite number of seconds above 0, got nan"),
    ],
)
def test_bad_options(tmp_path, capsys, options, told):
    assert cli.main(["check", str(write(tmp_path, DENSE)), *options]) == 2
    assert told in capsys.readouterr().err


def test_no_such_file(tmp_path, capsys):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(SystemExit) as exit:
            cli.main(["check", str(path)])
        assert exit.value.code == 2 and "no such file" in capsys.readouterr().err


def test_the_command_offers_the_arguments_of_examine():
    (commands,) = (a for a in cli.make_parser()._actions if isinstance(a.choices, dict))
    offered = {action.dest: action for action in commands.choices["check"]._actions if action.dest != "help"}
    arguments = inspect.signature(student.examine).parameters
    assert set(offered) == set(arguments)
    for name in ("cases", "seed", "timeout", "memory"):
        assert offered[name].default == arguments[name].default
