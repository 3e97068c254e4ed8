"""DeepSparse, in a process of its own: its last version needs an older Python than this library."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetwin.bench._entrants import Case, Entrant, NotHereError, first_line

_WORKER = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever the engine prints is not an answer

def answer(value):
    answers.write(json.dumps(value) + "\\n")
    answers.flush()

try:
    import numpy
    import deepsparse
    path, inputs, outputs, threads = sys.argv[1:5]
    given = [numpy.ascontiguousarray(numpy.load(inputs))]
    engine = deepsparse.Engine(model=path, batch_size=len(given[0]), num_cores=int(threads))
    numpy.save(outputs, engine.run(given)[0])
    answer({"version": getattr(deepsparse, "__version__", "?")})
except BaseException as error:
    answer({"error": type(error).__name__ + ": " + str(error)})
    raise SystemExit(1)
for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
        started = time.perf_counter()
        engine.run(given)
        seconds.append(time.perf_counter() - started)
    answer(seconds)
"""


def deepsparse(case: Case) -> Entrant:
    """Return DeepSparse, which times itself."""
    python = case.settings.deepsparse_python
    if python is None:
        raise NotHereError("no interpreter was given: --deepsparse-python PATH")
    files = case.files
    given, found = files.folder / "deepsparse-in.npy", files.folder / "deepsparse-out.npy"
    np.save(given, case.inputs.numpy())
    command = [str(python), "-c", _WORKER, str(files.fp32()), str(given), str(found), str(case.settings.threads)]
    worker = _Worker(command, files.folder / "deepsparse.log")
    try:
        told = worker.answer()
        if "error" in told:
            raise NotHereError(told["error"])
        output = torch.from_numpy(np.load(found))
    except BaseException:
        worker.close()
        raise

    def run() -> Tensor:
        worker.ask(1)
        return output

    return Entrant(run=run, turn=worker.ask, close=worker.close, note=f"version {told['version']}, own process")


class _Worker:
    """A process that answers lines with lines of JSON."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        try:
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
        except OSError as error:
            raise NotHereError(f"cannot start {command[0]}: {error.strerror or first_line(error)}") from error

    def ask(self, calls: int) -> list[float]:
        """Return the seconds of so many calls."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{calls}\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; the answer tells
        seconds: list[float] = self.answer()
        return seconds

    def answer(self) -> Any:
        """Return the next answer.

        Raises:
            NotHereError: If the process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait(timeout=60)
        words = self._log.read_text(errors="replace").strip().splitlines()
        raise NotHereError(f"its process ended with code {code}: {words[-1] if words else 'without a word'}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
