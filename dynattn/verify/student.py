"""The oracle for somebody else's file: `dynattn check FILE`, and whatever grades many of them.

The file runs in a process of its own, within limits, and is never imported here. That process gets cases by name and
sends back numbers, and it is here that these are compared: nothing the file prints, and no way to end, can pass for a
right answer. The two talk through a socket in messages of JSON and safetensors, which run no code when they are read.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from inspect import isclass
from pathlib import Path
from sysconfig import get_paths
from types import ModuleType

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, contiguous_format, float32, float64, set_num_threads

from dynattn import core, plugins
from dynattn.verify.cases import Case, case
from dynattn.verify.checking import check_answers
from dynattn.verify.comparing import TOLERANCE, Answer, Stopped, answer_to, not_taken
from dynattn.verify.registry import OPERATIONS, known, operations
from dynattn.verify.report import Mismatch

START_SECONDS = 120  # for Python and torch to start, before the file is looked at
LARGEST_MESSAGE = 2**26  # bytes
LARGEST_FILE = 2**26
MOST_PROCESSES = 64  # and threads
LONGEST_TEXT = 4000


@dataclass(frozen=True)
class Verdict:
    """What came of one operation of a file, or of the file itself where `operation` is None."""

    operation: str | None
    passed: bool
    message: str

    def __str__(self) -> str:
        return self.message


class StudentError(Exception):
    """What the student's function raised, as text, with the lines of the student's own files."""


# ---------------------------------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------------------------------


def examine(
    file: Path | str,
    operation: str | None = None,
    *,
    cases: int = 20,
    seed: int = 0,
    timeout: float = 60.0,
    memory: int = 2048,
) -> Iterator[Verdict]:
    """Check what a Python file defines under the name of an operation, or of one `operation`; yields the verdicts.

    `cases` and `seed` as for `verify.check`. timeout: seconds that loading the file, and that the function of each
    operation may take; memory: MiB that it may take beyond what torch needs.
    Raises ValueError when the file is not Python or defines none of the operations, or on other wrong arguments;
    OSError where processes cannot be limited (Windows).
    """
    file = Path(file).resolve()
    if operation is not None:
        known(operation)
    core.positive("cases", cases)
    core.positive("memory", memory)
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout: expected a finite number of seconds above 0, got {timeout}")
    if os.name != "posix":
        raise OSError("a file is checked under limits that Linux and macOS have; use verify.check in a notebook")
    _check_syntax(file)
    return _verdicts(file, operation, cases, seed, timeout, memory)


def _check_syntax(file: Path) -> None:
    """Raise ValueError unless a file is Python."""
    if file.suffix != ".py":
        raise ValueError(f"FILE: expected a Python file (.py), got {file.name!r}")
    try:
        with warnings.catch_warnings(action="ignore"), tokenize.open(file) as text:
            compile(text.read(), file.name, "exec")
    except SyntaxError as error:
        code = f": {error.text.strip()}" if error.text else ""
        raise ValueError(f"FILE: {file.name}, line {error.lineno}: {error.msg}{code}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, wrong encoding, brackets without end
        raise ValueError(f"FILE: {file.name} is not Python: {error}") from None


def _verdicts(
    file: Path, operation: str | None, cases: int, seed: int, timeout: float, memory: int
) -> Iterator[Verdict]:
    """One verdict after the other; a process that had to be ended is followed by a new one."""
    with contextlib.ExitStack() as open_now:
        start = lambda: open_now.enter_context(Student(file, timeout, memory))  # noqa: E731
        try:
            student = start()
            wanted = _wanted(file, student.functions, operation)
        except (StudentError, Stopped) as error:
            yield Verdict(None, False, f"{file.name}: {_told(error)}")
            return
        for name in wanted:
            try:
                if student.ended:
                    student = start()
                held = student.held(name)
                check_answers(name, student.answers, held=held, cases=cases, seed=seed, shrink=True)
                yield Verdict(name, True, f"{name}: passed, outputs and gradients of {cases} cases")
            except Mismatch as error:
                yield Verdict(name, False, str(error))
            except (StudentError, Stopped) as error:
                yield Verdict(name, False, f"{name}: {_told(error)}")


def _wanted(file: Path, functions: list[str], operation: str | None) -> list[str]:
    """The operations to check; raises ValueError when there are none."""
    if operation is None and functions:
        return functions
    if operation in functions:
        return [operation]
    wanted = f"no {operation}" if operation else f"none of {', '.join(operations())}"
    raise ValueError(f"FILE: {file.name} defines {wanted} (what it imports from dynattn does not count)")


def _told(error: BaseException) -> str:
    """An error with its notes, indented below its first line."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])]).replace("\n", "\n  ")


class Student:
    """A process that runs a student's file, to be used in a `with`. It is ended on leaving, with all that it started.

    functions: the operations that the file defines; ended: whether it can answer no more. Its methods raise
    `StudentError` for what the file raises and `Stopped` when time is up or the process is gone.
    """

    def __init__(self, file: Path, timeout: float, memory: int):
        self.file, self.timeout, self.memory = file, timeout, memory
        self.functions: list[str] = []
        self.ended = False

    def __enter__(self) -> "Student":
        self.folder = tempfile.TemporaryDirectory(prefix="dynattn-check-", ignore_cleanup_errors=True)
        self.socket, theirs = socket.socketpair()
        paths = json.dumps([os.path.abspath(path) for path in sys.path])
        program = (
            "import sys, json; sys.path[:] = json.loads(sys.argv[1])\n"
            "from dynattn.verify.student import serve; serve(*sys.argv[2:])"
        )
        cpu = 10 + int((len(OPERATIONS) + 1) * self.timeout)  # for processes that escape
        arguments = [theirs.fileno(), self.file, self.memory, cpu]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, paths, *map(str, arguments)],
            cwd=self.folder.name,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HOME": self.folder.name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        try:
            self.left = START_SECONDS
            self.ask(" to start")
            self.left = self.timeout
            found, _ = self.ask(" while it was loaded", load=True)
            self.functions = [name for name in operations() if name in found["functions"]]
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def held(self, operation: str) -> frozenset[str]:
        """The options that the student's function does not take. The time for the operation runs from here."""
        self.left = self.timeout
        found, _ = self.ask("", held=operation)
        return frozenset(map(str, found["held"]))

    def answers(self, call: Case) -> Answer:
        """The answer of the student's function to a case."""
        request = {"operation": call.operation, "seed": call.seed, "choices": call.choices}
        _, answer = self.ask(f"\nin the case of {call}\nagain: {call.line}", answer=request)
        tensors = {name: t for name, t in (call.arguments | call.options).items() if isinstance(t, Tensor)}
        names = {"output", *(f"gradient of {name}" for name, t in tensors.items() if t.is_floating_point())}
        if set(answer) != names or any(tensor.dtype not in TOLERANCE for tensor in answer.values()):
            raise self.stopped("sent something else than an answer")
        if (dtype := answer["output"].dtype) not in (float64, float32):  # their tolerance would hide mistakes
            raise StudentError(f"TypeError: expected an output of float64, as the inputs are, or float32, got {dtype}")
        return answer

    def ask(self, when: str, **request: object) -> tuple[dict, dict[str, Tensor]]:
        """Send a request and wait for the reply, at most for the time that is left."""
        if self.ended:
            raise Stopped("its process has ended")
        started = time.monotonic()
        try:
            self.socket.settimeout(max(self.left, 0.001))
            if request:
                send(self.socket, request)
            reply, tensors = receive(self.socket, started + self.left)
        except TimeoutError:
            raise self.stopped(f"took longer than {self.timeout:g} s{when}") from None
        except (OSError, EOFError):
            raise self.stopped(f"{self.last_words()}{when}") from None
        except (ValueError, RecursionError, KeyError, TypeError, SafetensorError):
            raise self.stopped(f"sent something else than an answer{when}") from None
        self.left -= time.monotonic() - started
        if "error" in reply:
            raise StudentError(str(reply["error"])[:LONGEST_TEXT])
        return reply, tensors

    def stopped(self, what: str) -> Stopped:
        """End the process; what to raise."""
        self.end()
        return Stopped(what)

    def last_words(self) -> str:
        """How the process ended by itself."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}, as by a crash or for want of memory"
        return f"ended its process with exit code {code}"

    def end(self) -> None:
        """Kill the process and what it started, as far as that stayed in its group."""
        if self.ended:
            return
        self.ended = True
        self.socket.close()
        for _ in range(20):  # whatever multiplies while it is being killed
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.05)
        self.process.wait()
        self.folder.cleanup()


# ---------------------------------------------------------------------------------------------------------------------
# Messages: the lengths of both parts, JSON, safetensors
# ---------------------------------------------------------------------------------------------------------------------


def send(connection: socket.socket, message: dict, tensors: dict[str, Tensor] | None = None) -> None:
    """Send a message; ValueError when it is too large."""
    own = {name: t.detach().clone(memory_format=contiguous_format) for name, t in (tensors or {}).items()}
    head, body = json.dumps(message).encode(), bytes_of(own) if own else b""
    if len(head) + len(body) > LARGEST_MESSAGE:
        raise ValueError(f"the answer is too large: {len(body)} bytes")
    connection.sendall(len(head).to_bytes(8) + len(body).to_bytes(8) + head + body)


def receive(connection: socket.socket, until: float | None = None) -> tuple[dict, dict[str, Tensor]]:
    """Receive a message, until a time of time.monotonic(). TimeoutError; EOFError; ValueError and others for none."""
    lengths = _exactly(connection, 16, until)
    head, body = int.from_bytes(lengths[:8]), int.from_bytes(lengths[8:])
    if head + body > LARGEST_MESSAGE:
        raise ValueError(f"a message of {head + body} bytes")
    message = json.loads(_exactly(connection, head, until))
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message, tensors_of(_exactly(connection, body, until)) if body else {}


def _exactly(connection: socket.socket, count: int, until: float | None) -> bytes:
    """So many bytes."""
    parts = bytearray()
    while len(parts) < count:
        if until is not None:
            connection.settimeout(max(until - time.monotonic(), 0.001))
        part = connection.recv(min(count - len(parts), 2**20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The student's process
# ---------------------------------------------------------------------------------------------------------------------


def serve(connection: str, file: str, memory: str, cpu: str) -> None:
    """Load a file and answer requests until nobody asks any more; the arguments are those of the command line."""
    line, path = socket.socket(fileno=int(connection)), Path(file)
    set_num_threads(1)
    plugins.load()
    limit(int(memory), int(cpu))
    send(line, {"ready": True})
    functions: dict[str, Callable] = {}
    while True:
        try:
            request, _ = receive(line)
        except (OSError, EOFError):
            os._exit(0)
        try:
            reply = _reply(request, path, functions)
            send(line, *reply)
        except BaseException as error:  # sys.exit() too
            send(line, {"error": told(error, path, int(memory))})


def _reply(request: dict, path: Path, functions: dict[str, Callable]) -> tuple[dict, dict[str, Tensor]]:
    """The reply to a request: to load the file, which options a function does not take, or to answer a case."""
    if "load" in request:
        module = load(path)
        functions |= {name: getattr(module, name) for name in operations() if _is_own(module, name)}
        return {"functions": list(functions)}, {}
    if "held" in request:
        function = functions[request["held"]]
        if isclass(function) or not callable(function):
            what = f"the class {function.__name__}" if isclass(function) else type(function).__name__
            raise TypeError(f"expected a function, got {what}")
        return {"held": list(not_taken(request["held"], function))}, {}
    asked = request["answer"]
    choices = {name: tuple(v) if isinstance(v, list) else v for name, v in asked["choices"].items()}
    call = case(asked["operation"], asked["seed"], **choices)
    return {}, answer_to(call, functions[call.operation])


def load(path: Path) -> ModuleType:
    """Import a file as a script's neighbour would; its folder comes first on the path."""
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_file"  # a file may be called torch.py
    sys.path.insert(0, str(path.parent))
    module = module_from_spec(spec_from_loader(name, SourceFileLoader(name, str(path))))
    sys.modules[name] = module
    module.__spec__.loader.exec_module(module)
    return module


def _is_own(module: ModuleType, name: str) -> bool:
    """Whether a module has a name that is not dynattn's own function, imported."""
    return name in vars(module) and not str(getattr(vars(module)[name], "__module__", "")).startswith("dynattn.")


def limit(memory: int, cpu: int) -> None:
    """Limit this process and its children: MiB beyond what is in use, seconds of processor time, files, processes."""
    import resource

    limits = {"CORE": 0, "CPU": cpu, "FSIZE": LARGEST_FILE}
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits |= {"AS": used + memory * 2**20, "NPROC": _tasks() + MOST_PROCESSES}
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(kind)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (most, most))


def _tasks() -> int:
    """Threads of all processes of this user, which is what Linux counts."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if process.stat().st_uid == os.getuid():
                count += len(os.listdir(process / "task"))
    return count


def told(error: BaseException, path: Path, memory: int) -> str:
    """An error as text: its lines in the student's folder, not those of libraries, and what it says."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        what = f"needed more than {memory} MiB of memory"
    elif isinstance(error, SystemExit):
        what = f"called exit({'' if error.code is None else repr(error.code)})"
    else:
        what = "".join(traceback.format_exception_only(error)).strip()
    frames = traceback.extract_tb(error.__traceback__)
    libraries = [Path(__file__).parents[1], *map(Path, get_paths().values())]  # they may lie in that folder
    is_in = lambda folders, frame: any(Path(frame.filename).is_relative_to(folder) for folder in folders)  # noqa: E731
    own = [frame for frame in frames if is_in([path.parent], frame) and not is_in(libraries, frame)]
    for frame in own:
        frame.filename = str(Path(frame.filename).relative_to(path.parent))
    return "".join([what, "\n", *traceback.StackSummary.from_list(own).format()]).rstrip()[:LONGEST_TEXT]
