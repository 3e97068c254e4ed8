"""``sparsetwin doctor``."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsetwin import __version__
from sparsetwin.cli._call import Switch, parse, print_json, print_table

_OPTIONAL = {
    "pyarrow": ("data", "CIFAR and ImageNet from Parquet"),
    "pillow": ("data", "decoding images"),
    "datasets": ("data", "data sets by hub name"),
    "transformers": ("hf", "Hugging Face trainer"),
    "accelerate": ("hf", "Accelerate loops"),
    "lightning": ("lightning", "Lightning trainer"),
    "llvmlite": ("deploy", "sparse kernels for CPUs"),
    "onnx": ("export", "ONNX files"),
    "onnxruntime": ("export", "checking ONNX files"),
    "tensorboard": ("loggers", "TensorBoard logs"),
    "wandb": ("loggers", "Weights & Biases logs"),
    "mlflow": ("loggers", "MLflow logs"),
}
_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "neon", "asimd", "sve")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show versions, processor, GPUs and optional packages."""

    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Doctor, arguments, command="doctor")
    found = examine()
    rows = [[key.replace("_", " "), _shown(value)] for key, value in found.items() if key != "packages"]
    print_table(["machine", "found"], rows)
    packages = [[name, version or f"missing: pip install 'sparsetwin[{_OPTIONAL[name][0]}]'", _OPTIONAL[name][1]]
                for name, version in found["packages"].items()]  # fmt: skip
    print_table(["package", "version", "for"], packages)
    if args.json:
        print_json(found)
    return 0


def examine() -> dict[str, Any]:
    """Return what this machine has, as plain data."""
    return {
        "sparsetwin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_features": _cpu_features(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in _OPTIONAL},
    }


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


def _shown(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)
