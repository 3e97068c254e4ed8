"""All engines on one network: prepare, compare their answers, time them in turn."""

import contextlib
import copy
import datetime
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.bench._deepsparse import deepsparse
from sparsetwin.bench._entrants import Case, Engine, Entrant, NotHereError, OnnxFiles, first_line
from sparsetwin.bench._file_engines import onnx_runtime, openvino
from sparsetwin.bench._pinning import TooLongError, pinned, time_limit
from sparsetwin.bench._race import Times, race
from sparsetwin.bench._results import BenchResult, Contest, Row
from sparsetwin.bench._settings import BenchSettings, EngineName
from sparsetwin.bench._torch_engines import compiled, csr, deployed, eager, load_compiler, quietly
from sparsetwin.errors import UsageError

_FP32_TOLERANCE = 1e-4  # max|y - ref| / max|ref|: engines sum in another order
_LAST = "PyTorch eager, channels last"
_ROWS: dict[EngineName, tuple[Engine, ...]] = {
    "eager": (
        Engine(label="PyTorch eager", precision="fp32", make=partial(eager, bfloat16=False, channels_last=False)),
        Engine(label=_LAST, precision="fp32", make=partial(eager, bfloat16=False, channels_last=True)),
        Engine(label="PyTorch eager", precision="bf16", make=partial(eager, bfloat16=True, channels_last=False)),
        Engine(label=_LAST, precision="bf16", make=partial(eager, bfloat16=True, channels_last=True)),
    ),
    "compile": (
        Engine(label="torch.compile", precision="fp32", make=partial(compiled, bfloat16=False)),
        Engine(label="torch.compile", precision="bf16", make=partial(compiled, bfloat16=True)),
    ),
    "csr": (Engine(label="torch CSR", precision="fp32", make=csr),),
    "onnxruntime": (
        Engine(label="ONNX Runtime", precision="fp32", make=partial(onnx_runtime, int8=False)),
        Engine(label="ONNX Runtime", precision="int8", make=partial(onnx_runtime, int8=True)),
    ),
    "openvino": (
        Engine(label="OpenVINO", precision="fp32", make=partial(openvino, precision="fp32")),
        Engine(label="OpenVINO", precision="bf16", make=partial(openvino, precision="bf16")),
        Engine(label="OpenVINO", precision="int8", make=partial(openvino, precision="int8")),
    ),
    "deepsparse": (Engine(label="DeepSparse", precision="fp32", make=deepsparse),),
    "sparsetwin": (
        Engine(label="sparsetwin", precision="fp32", make=partial(deployed, reduced=False)),
        Engine(label="sparsetwin", precision="bf16", make=partial(deployed, reduced=True)),
    ),
}


@torch.no_grad()
def bench_inference(
    model: nn.Module,
    samples: Tensor,
    *,
    name: str,
    settings: BenchSettings,
    machine: Mapping[str, Any],
    tell: Callable[[str], None] = lambda line: None,
) -> BenchResult:
    """Time a network at batch 1 and at a batch, on every engine that is there, and compare their answers.

    Args:
        model: Float32, on the CPU; it takes one tensor and gives one.
        samples: (samples, ...), inputs for both batches and for what is measured when int8 is prepared; repeated if
            they are fewer than the batch.
        name: Of what is measured, for the result.
        settings: Which engines, and for how long.
        machine: What is known of the machine, to keep with the result; ``cpu_features`` is looked at.
        tell: Is told what goes on.

    Raises:
        ConfigError: If there are fewer processors than threads.
        UsageError: If the model gives no tensor, or there is no sample.
    """
    if not len(samples):
        raise UsageError("a benchmark needs at least one sample, got none")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    repeats = -(-settings.batch // len(samples))
    samples = samples.repeat(repeats, *[1] * (samples.dim() - 1))
    before = _load()
    with ExitStack() as stack:
        held = stack.enter_context(pinned(settings.threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = OnnxFiles(model=model, samples=samples[: max(2, settings.batch)], folder=folder)
        if "compile" in settings.engines:
            load_compiler()
        contests = []
        for batch in sorted({1, settings.batch}):
            case = Case(model=model, inputs=samples[:batch].contiguous(), settings=settings, files=files)
            contests.append(_contest(case, tell))
    facts = {"pinned_to": list(held), "load_average": [before, _load()], "instructions": _instructions(), **machine}
    return BenchResult(
        name=name,
        inputs=f"(batch, {', '.join(map(str, samples.shape[1:]))}) {str(samples.dtype).removeprefix('torch.')}",
        date=datetime.date.today().isoformat(),
        settings={**asdict(settings), "deepsparse_python": settings.deepsparse_python is not None},
        machine=facts,
        notes=_notes(settings, facts),
        contests=tuple(contests),
    )


def _contest(case: Case, tell: Callable[[str], None]) -> Contest:
    expected = case.model(case.inputs)
    if not isinstance(expected, Tensor):
        raise UsageError(f"one tensor can be compared; this network gives a {type(expected).__name__}")
    settings, batch = case.settings, len(case.inputs)
    engines = [row for name in settings.engines for row in _ROWS[name] if row.precision in settings.precisions]
    missing: dict[str, str] = {}
    entrants: dict[str, Entrant] = {}
    answers: dict[str, tuple[float, float]] = {}
    with ExitStack() as stack:
        for engine in engines:
            tell(f"batch {batch}: preparing {engine.name}")
            try:
                with time_limit(settings.prepare_seconds):
                    entrant = _prepared(engine, case, stack)
                answers[engine.name] = _checked(engine, entrant.run(), expected)
            except TooLongError as error:
                missing[engine.name] = f"{error}; give it more with --prepare-seconds"
            except NotHereError as error:
                missing[engine.name] = str(error)
            except Exception as error:  # engines have errors of many classes, and none of them may end the others
                missing[engine.name] = f"{type(error).__name__}: {first_line(error)}"
            else:
                entrants[engine.name] = entrant
        tell(f"batch {batch}: timing {len(entrants)} engines")
        times, broken = race(entrants, settings)
    rows = [
        _row(engine, batch, times[engine.name], answers[engine.name], entrants[engine.name].note)
        for engine in engines
        if engine.name in times
    ]
    return Contest(batch=batch, rows=tuple(sorted(rows, key=lambda row: row.median_ms)), missing={**missing, **broken})


def _prepared(engine: Engine, case: Case, stack: ExitStack) -> Entrant:
    entrant = quietly(engine.make)(case)
    stack.callback(entrant.close)
    return entrant


def _checked(engine: Engine, found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference over the largest output, and the share of equal predictions.

    Raises:
        NotHereError: If the answer is none: another shape, not finite, or in fp32 too far off.
    """
    if found.shape != expected.shape:
        raise NotHereError(f"gives outputs {tuple(found.shape)}, PyTorch {tuple(expected.shape)}")
    found, reference = found.double(), expected.double()
    error = float((found - reference).abs().max() / reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not math.isfinite(error) or (engine.precision == "fp32" and error > _FP32_TOLERANCE):
        raise NotHereError(f"gives other answers than PyTorch: they differ by {error:.2g} of the largest")
    axis = 1 if expected.dim() == 4 else -1
    return error, float((found.argmax(axis) == reference.argmax(axis)).double().mean())


def _row(engine: Engine, batch: int, times: Times, answers: tuple[float, float], note: str) -> Row:
    low, high = times.quartiles
    return Row(
        engine=engine.label,
        precision=engine.precision,
        median_ms=1e3 * times.median,
        min_ms=1e3 * times.shortest,
        quartiles_ms=(1e3 * low, 1e3 * high),
        per_second=batch / times.median,
        relative_error=answers[0],
        same_predictions=answers[1],
        note=note,
        turn_medians_ms=tuple(round(1e3 * seconds, 6) for seconds in times.turns),
    )


def _notes(settings: BenchSettings, machine: Mapping[str, Any]) -> tuple[str, ...]:
    """Tell what a reader has to know to read the table rightly."""
    notes = []
    features = machine.get("cpu_features")
    if features is not None and "bf16" in settings.precisions:
        fast = [name for name in ("amx_bf16", "avx512_bf16") if name in features]
        if "amx_bf16" in fast:
            notes.append("This processor multiplies bf16 matrices in hardware (AMX): dense bf16 is at its best here.")
        else:
            what = "bf16 instructions but no AMX" if fast else "no bf16 instructions; bf16 is emulated or widened"
            notes.append(f"This processor has {what}: dense bf16 would do better on one with AMX.")
    load = machine["load_average"][0]
    if load is not None and load > 0.5:
        notes.append(f"Other programs were running (load {load:.1f}): compare within a table only.")
    return tuple(notes)


def _load() -> float | None:
    with contextlib.suppress(OSError, AttributeError):
        return round(os.getloadavg()[0], 2)
    return None


def _instructions() -> str:
    return str(torch.backends.cpu.get_cpu_capability())
