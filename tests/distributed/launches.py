"""``sparsetwin`` commands in several processes: by ``torchrun``, or forked from a server that has torch already."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHORT = (
    "--epochs", "4", "--schedule.warmup", "1", "--schedule.sparse", "1", "--schedule.dense", "1",
    "--schedule.final-dense", "1", "--schedule.final-sparse", "1", "--model.name", "shared_networks:Convolutional",
    "--train.checkpoint-epochs", "0.2", "--quiet", "--out", "run",
)  # fmt: skip
"""Four epochs of 18 steps, two of them sparse: D0 S1 D2 S3; a checkpoint every four steps."""

_SERVER = """
import json, os, runpy, signal, sys
import sparsetwin.cli.__main__ as command_line
from sparsetwin.cli.commands import COMMANDS
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, matplotlib.pyplot  # that commands load
for command in COMMANDS.values():
    command.load()

def run(call):
    os.chdir(call["cwd"])
    os.environ.update(call["environment"])
    for number, name in ((0, os.devnull), (1, call["stdout"]), (2, call["stderr"])):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program, *arguments = call["arguments"]
    sys.argv = [program, *arguments] if program.endswith(".py") else ["sparsetwin", program, *arguments]
    code = 1
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        code = 0 if program.endswith(".py") else command_line.main()
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
        answer = os.waitstatus_to_exitcode(os.waitpid(call["wait"], 0)[1])
    else:
        answer = os.fork()
        if not answer:
            run(call)
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Finished:
    """Processes that have ended."""

    codes: list[int]
    out: str  # of the first process
    err: str  # of all


@dataclass
class Launched:
    """Processes that train together."""

    server: "Server"
    pids: list[int]
    logs: list[Path]  # standard output of each; standard error lies beside it

    def until(self, reached: Callable[[], bool], *, seconds: float = 60) -> None:
        """Wait until something is so."""
        limit = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < limit, f"not reached: {self.err}"
            time.sleep(0.002)

    @property
    def err(self) -> str:
        return "".join(path.with_suffix(".err").read_text() for path in self.logs if path.with_suffix(".err").exists())

    def send(self, number: signal.Signals, *, rank: int) -> None:
        os.kill(self.pids[rank], number)

    def wait(self) -> Finished:
        codes = [self.server.ask(wait=pid) for pid in self.pids]
        return Finished(codes, self.logs[0].read_text(), self.err)


class Server:
    """Forks processes as ``torchrun`` would start them; stop it with ``close``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        self._count = 0

    def ask(self, **call: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer: int = json.loads(self._process.stdout.readline())
        return answer

    def start(self, folder: Path, *arguments: object, count: int = 2) -> Launched:
        """Start a command or a script in a folder, in so many processes; one process is started as by hand."""
        self._count += 1
        port, logs, pids = free_port(), list[Path](), list[int]()
        for rank in range(count):
            logs.append(folder / f".{self._count}-{rank}.out")
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            launched = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
            pids.append(
                self.ask(
                    arguments=[str(a) for a in arguments],
                    cwd=str(folder),
                    environment=launched if count > 1 else {},
                    stdout=str(logs[-1]),
                    stderr=str(logs[-1].with_suffix(".err")),
                )
            )
        return Launched(self, pids, logs)

    def run(self, folder: Path, *arguments: object, count: int = 2) -> Finished:
        return self.start(folder, *arguments, count=count).wait()

    def close(self) -> None:
        self._process.communicate(timeout=60)  # closes its pipes, at which it ends


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {**os.environ, **threads, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}


def torchrun(folder: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command by ``torchrun`` in two processes; each prints to the launcher's output."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    return subprocess.run(
        [*launcher, "-m", "sparsetwin", *map(str, arguments)],
        cwd=folder, env={**environment(), **changes}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=100,
    )  # fmt: skip


def outcome(run: Path) -> dict[str, bytes]:
    """The files of a run that have to be equal to the byte; nothing else lies in the pair's folder."""
    return {path.name: path.read_bytes() for path in [run / "metrics.jsonl", *sorted((run / "pair").iterdir())]}


def events(run: Path) -> list[dict[str, object]]:
    """The whole lines of ``metrics.jsonl``."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def checkpoints(run: Path) -> Sequence[int]:
    """The steps of which there is a checkpoint."""
    return sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.pt"))
