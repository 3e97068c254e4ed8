"""``sparsetwin doctor``."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from sparsetwin import __version__
from sparsetwin.cli._call import Switch, parse, print_json, print_table
from sparsetwin.errors import ConfigError
from sparsetwin.kernels import half_target, host_dot, is_available, tiles_refused

_OPTIONAL = {  # package -> extra or "", and what it is for
    "pyarrow": ("data", "CIFAR and ImageNet from Parquet"),
    "pillow": ("data", "decoding images"),
    "datasets": ("data", "data sets by hub name"),
    "transformers": ("hf", "Hugging Face trainer"),
    "accelerate": ("hf", "Accelerate loops"),
    "lightning": ("lightning", "Lightning trainer"),
    "llvmlite": ("deploy", "sparse kernels for CPUs"),
    "onnx": ("export", "ONNX files"),
    "onnxscript": ("export", "ONNX files"),
    "onnxruntime": ("export", "checking ONNX files; bench inference"),
    "openvino": ("", "export to OpenVINO; a rival of deploy; bench inference"),
    "tensorboard": ("loggers", "TensorBoard logs"),
    "wandb": ("loggers", "Weights & Biases logs"),
    "mlflow": ("loggers", "MLflow logs"),
}
_OLDER_PYTHONS = ("python3.10", "python3.9", "python3.8")
_ASK = "import importlib.metadata as found; print(found.version('deepsparse'))"
_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "neon", "asimd", "sve")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show versions, processor, GPUs and optional packages."""

    deepsparse_python: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Interpreter that may have DeepSparse; by default python3.10, python3.9 and python3.8 are asked."""
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Doctor, arguments, command="doctor")
    found = examine()
    deepsparse = _deepsparse(args.deepsparse_python)
    rows = [[key.replace("_", " "), _shown(value)] for key, value in found.items() if key != "packages"]
    print_table(["machine", "found"], rows)
    packages = [
        [name, version or f"missing: {_command(name)}", _OPTIONAL[name][1]]
        for name, version in found["packages"].items()
    ]
    print_table(["package", "version", "for"], [*packages, ["deepsparse", _told(deepsparse), "bench inference"]])
    if args.json:
        print_json({**found, "deepsparse": deepsparse})
    return 0


def examine() -> dict[str, Any]:
    """Return what this machine has, as plain data."""
    return {
        "sparsetwin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_features": _cpu_features(),
        "dense_bfloat16_kernels": _dense_kernels(),
        "float16_kernels": _half_kernels(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in _OPTIONAL},
    }


def _command(package: str) -> str:
    extra = _OPTIONAL[package][0]
    return f"pip install 'sparsetwin[{extra}]'" if extra else f"pip install {package}"


def _deepsparse(given: Path | None) -> dict[str, str] | None:
    """Return the version of DeepSparse and the interpreter that has it; it is for older versions of Python.

    Raises:
        ConfigError: If the given interpreter cannot be started or has no DeepSparse.
    """
    names = [str(given)] if given is not None else [shutil.which(name) for name in _OLDER_PYTHONS]
    for name in names:
        if name is None:
            continue
        try:
            done = subprocess.run([name, "-c", _ASK], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            found, reason = "", f"cannot be asked: {getattr(error, 'strerror', None) or error}"
        else:
            found, reason = done.stdout.strip(), "has no package deepsparse"
        if found:
            return {"python": name, "version": found}
        if given is not None:
            raise ConfigError(f"--deepsparse-python {name} {reason}; give an interpreter with deepsparse installed")
    return None


def _told(deepsparse: dict[str, str] | None) -> str:
    if deepsparse is None:
        return "none found; it is for Python 3.10 and older: bench inference --deepsparse-python PATH"
    return f"{deepsparse['version']} in --deepsparse-python {deepsparse['python']}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_features() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    words = set(cpuinfo.read_text().split())
    return [feature for feature in _FEATURES if feature in words]


def _dense_kernels() -> str:
    """Return the instruction for dense layers in bfloat16, and why it is not AMX where the processor has that."""
    if not is_available():
        return "none: llvmlite is missing"
    dot, refused = host_dot(), tiles_refused()
    name = "none" if dot is None else dot.name
    return name if refused is None else f"{name}; {refused}"


def _half_kernels() -> str:
    """Return the instruction set with float16 arithmetic that kernels are made for."""
    if not is_available():
        return "none: llvmlite is missing"
    target = half_target()
    return "none" if target is None else target.name


def _shown(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)
