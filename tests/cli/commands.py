"""Commands in processes of their own, started quickly: each is forked from a server that has imported torch once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHORT = (
    "--epochs", "4", "--schedule.warmup", "1", "--schedule.sparse", "1", "--schedule.dense", "1",
    "--schedule.final-dense", "1", "--schedule.final-sparse", "1",
)  # fmt: skip
"""Four epochs of two sparse phases: D0 S1 D2 S3."""
TINY = ("--model.name", "tiny_networks:convolutional")
"""A network whose epoch takes a tenth of a second."""

_SERVER = """
import json, os, resource, signal, sys
import sparsetwin.cli.__main__ as command_line
from sparsetwin.cli.commands import COMMANDS
import torch._dynamo  # which the first optimizer loads, for a second and more
import matplotlib.pyplot  # and the report this
for command in COMMANDS.values():
    command.load()

def run(call):
    os.chdir(call["cwd"])
    os.setpgid(0, 0)
    for number, name in ((0, os.devnull), (1, call["stdout"]), (2, call["stderr"])):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["sparsetwin", *call["arguments"]]
    if call["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call["file_bytes"],) * 2)
    code = 1
    try:
        code = command_line.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

for line in sys.stdin:
    call = json.loads(line)
    if "wait" in call:
        found, status = os.waitpid(call["wait"], 0 if call["blocks"] else os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if found else None
    else:
        answer = os.fork()
        if not answer:
            run(call)
    print(json.dumps(answer), flush=True)
"""


class Server:
    """Forks processes; stop it with ``close``."""

    def __init__(self) -> None:
        places = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **call: object) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate(timeout=60)  # closes its pipes, at which it ends


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        """The object on the last line; no other line is one."""
        *others, last = self.out.strip().splitlines()
        assert not any(line.startswith("{") for line in others)
        value = json.loads(last)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one message on standard error, its lines and boxes put together."""
        assert "Traceback" not in self.err
        return " ".join(self.err.replace("│", " ").split())


class Running:
    """A command in a process of its own."""

    def __init__(self, server: Server, pid: int, out: Path, err: Path) -> None:
        self.pid = pid
        self._server, self._out, self._err = server, out, err
        self._code: int | None = None

    @property
    def is_running(self) -> bool:
        if self._code is None:
            self._code = self._server.ask(wait=self.pid, blocks=False)
        return self._code is None

    def until(self, reached: Callable[[], bool], *, seconds: float = 60) -> bool:
        """Watch until something is so; return whether the process was still running then."""
        limit = time.monotonic() + seconds
        looks = 0
        while time.monotonic() < limit:
            if reached():
                return self.is_running
            looks += 1
            if looks % 50 == 0 and not self.is_running:
                return False
            time.sleep(0.001)
        raise TimeoutError(f"not reached within {seconds} s: {self._out.read_text()[-500:]}")

    @property
    def err(self) -> str:
        """What it has said on standard error so far."""
        return self._err.read_text() if self._err.exists() else ""

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Finished:
        if self._code is None:
            self._code = self._server.ask(wait=self.pid, blocks=True)
        assert self._code is not None
        out = self._out.read_text() if self._out.exists() else ""  # it may have been killed before it wrote anything
        return Finished(self._code, out, self.err)


class Commands:
    """Runs ``sparsetwin`` commands in a folder."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.folder = folder
        self._server = server
        self._logs = folder / ".logs"
        self._logs.mkdir()
        self._count = 0

    def start(self, *arguments: object, file_bytes: int | None = None) -> Running:
        self._count += 1
        out, err = (self._logs / f"{self._count}.{name}" for name in ("out", "err"))
        pid = self._server.ask(
            arguments=[str(a) for a in arguments], cwd=str(self.folder), stdout=str(out), stderr=str(err),
            file_bytes=file_bytes,
        )  # fmt: skip
        assert pid is not None
        return Running(self._server, pid, out, err)

    def run(self, *arguments: object, file_bytes: int | None = None) -> Finished:
        return self.start(*arguments, file_bytes=file_bytes).wait()

    def entries(self) -> list[str]:
        """What stands in the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path != self._logs)


def events(run: Path) -> list[dict[str, object]]:
    """The whole lines of ``metrics.jsonl``."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def outcome(run: Path) -> dict[str, bytes]:
    """The files of a run that have to be equal to the byte; nothing else lies in the pair's folder."""
    return {path.name: path.read_bytes() for path in [run / "metrics.jsonl", *sorted((run / "pair").iterdir())]}
