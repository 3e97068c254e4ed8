"""What a run depends on besides its settings: threads, generators, determinism, versions, machine."""

import os
import platform
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsetwin.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is a CUDA device where there is one.

    Raises:
        ConfigError: If torch does not know the device or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def make_deterministic(*, deterministic: bool) -> None:
    """Switch torch's deterministic algorithms on or off for the whole process."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators of torch, numpy and Python, as plain data and tensors."""
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "numpy": {**numpy_state, "state": {**inner, "key": torch.from_numpy(inner["key"].astype(np.int64))}},
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generators(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `generator_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    from sparsetwin import __version__

    return {"python": platform.python_version(), "sparsetwin": __version__, "torch": torch.__version__}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what speed and last bits of results depend on, without names or addresses."""
    described: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        described["cpu"] = models[0] if models else "unknown"
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def git_commit() -> str | None:
    """Return the commit of the source that runs, or None if no repository tracks it, as when it is installed."""
    source = Path(__file__)
    if _git("ls-files", "--error-unmatch", source.name, folder=source.parent) is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*", folder=source.parent)


def _git(*arguments: str, folder: Path) -> str | None:
    """Return what git prints, or None if it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def command_line() -> str:
    """Return how this process was called, with the program's bare name."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name  # python -m runs the former
    return shlex.join([name, *sys.argv[1:]])
