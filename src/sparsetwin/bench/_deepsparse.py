"""DeepSparse, in a process of its own: its last version needs an older Python than this library."""

import contextlib
import importlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sparsetwin.bench._entrants import Case, Entrant, NotHereError, first_line
from sparsetwin.errors import UsageError

Clock: TypeAlias = Literal["wall", "processor"]
_OPSET = 17  # of later ones 1.8.0 runs no operation itself: it gives all of them to the ONNX Runtime inside it
_IR_VERSION = 9  # the last that it reads
_NOT_PASSED = ("PYTHONPATH", "PYTHONHOME")  # which name the packages of this Python
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
    path, outputs, threads, *inputs = sys.argv[1:]
    given = [numpy.ascontiguousarray(numpy.load(name)) for name in inputs]
    engine = deepsparse.Engine(model=path, batch_size=len(given[0]), num_cores=int(threads))
    numpy.save(outputs, engine.run(given)[0])
    own = engine.fraction_of_supported_ops
    answer({"version": getattr(deepsparse, "__version__", "?"), "own": own})
except BaseException as error:
    answer({"error": type(error).__name__ + ": " + str(error)})
    raise SystemExit(1)
for line in sys.stdin:
    calls, clock = line.split()
    now = time.process_time if clock == "processor" else time.perf_counter
    seconds = []
    for _ in range(int(calls)):
        started = now()
        engine.run(given)
        seconds.append(now() - started)
    answer(seconds)
"""


class DeepSparse:
    """DeepSparse on one network and one batch; it is ready when this is made. Close it.

    Args:
        python: Interpreter with the package deepsparse.
        network: ONNX file, of any opset; it is rewritten in the last one that DeepSparse has kernels for.
        inputs: Of the network, float32 or int64, the batch first.
        folder: For its files.
        threads: Its cores.

    Raises:
        UsageError: If the interpreter cannot be started, or DeepSparse fails or crashes on this network.
    """

    version: str
    own: float  # share of the network's operations that its kernels run; the ONNX Runtime inside it runs the others
    output: Tensor  # the first one, for the inputs

    def __init__(
        self, python: Path, network: Path, *, inputs: Sequence[Tensor], folder: Path, threads: int = 1
    ) -> None:
        older = older_onnx(network, folder / "deepsparse.onnx")
        found, self._log = folder / "deepsparse-out.npy", folder / "deepsparse.log"
        given = [folder / f"deepsparse-in-{number}.npy" for number in range(len(inputs))]
        for path, tensor in zip(given, inputs, strict=True):
            np.save(path, tensor.numpy())
        command = [str(python), "-c", _WORKER, *map(str, (older, found, threads, *given))]
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED}
        environment["NM_DISABLE_ANALYTICS"] = "1"  # it would tell its makers of every import
        try:
            with self._log.open("wb") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                )
        except OSError as error:
            raise UsageError(f"cannot start {command[0]}: {error.strerror or first_line(error)}") from error
        try:
            told = self._answer()
            if "error" in told:
                raise UsageError(told["error"])
            self.version, self.own = told["version"], told["own"]
            self.output = torch.from_numpy(np.load(found))
        except BaseException:
            self.close()
            raise

    def seconds(self, calls: int, *, clock: Clock = "wall") -> list[float]:
        """Return how long each of so many calls took, measured in that process.

        Args:
            calls: How many.
            clock: ``"processor"`` counts the time of all its threads.

        Raises:
            UsageError: If it has crashed, or is closed.
        """
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise UsageError("DeepSparse is closed; make another")
        try:
            self._process.stdin.write(f"{calls} {clock}\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended; the answer tells
        found: list[float] = self._answer()
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait(timeout=60)
        words = self._log.read_text(errors="replace").strip().splitlines()
        raise UsageError(f"its process ended with code {code}: {words[-1] if words else 'without a word'}")


def older_onnx(source: Path, target: Path) -> Path:
    """Write a network in an opset that DeepSparse has kernels for, if it can be; weights keep their bits.

    Args:
        source: ONNX file.
        target: File to write.

    Returns:
        The target; it has the opset of the source if the network cannot be converted.
    """
    onnx = importlib.import_module("onnx")
    found = importlib.import_module("onnx.version_converter")
    network = onnx.load(source)
    for node in network.graph.node:
        for attribute in [each for each in node.attribute if each.name == "noop_with_empty_axes" and not each.i]:
            node.attribute.remove(attribute)  # says what is so anyway, and no earlier opset has it
    if max(entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx")) > _OPSET:
        with contextlib.suppress(
            RuntimeError, found.ConvertError, onnx.checker.ValidationError
        ):  # an operation that is younger
            network = found.convert_version(network, _OPSET)
    network.ir_version = min(network.ir_version, _IR_VERSION)
    onnx.save_model(network, target)
    return target


def deepsparse(case: Case) -> Entrant:
    """Return DeepSparse, which times itself.

    Raises:
        NotHereError: If it does not run here, or not this network.
    """
    python = case.settings.deepsparse_python
    if python is None:
        raise NotHereError("no interpreter was given: --deepsparse-python PATH")
    files = case.files
    try:
        engine = DeepSparse(
            python, files.fp32(), inputs=[case.inputs], folder=files.folder, threads=case.settings.threads
        )
    except UsageError as error:
        raise NotHereError(str(error)) from error

    def run() -> Tensor:
        engine.seconds(1)
        return engine.output

    note = f"version {engine.version}, own process, {engine.own:.0%} of operations in its own kernels"
    return Entrant(run=run, turn=engine.seconds, close=engine.close, note=note)
