"""What this machine is, as far as plans depend on it."""

import operator
import platform
import warnings
from pathlib import Path

from sparsetwin.errors import ConfigError, SparsetwinError, SparsityWarning, UsageError
from sparsetwin.kernels import host_target, is_available

_warned: set[str] = set()


def kernels_run() -> bool:
    """Tell whether sparse kernels can be made here; warn once if not."""
    try:
        if not is_available():
            raise UsageError("llvmlite is not installed; `pip install 'sparsetwin[deploy]'` brings it")
        host_target()
    except (SparsetwinError, OSError, RuntimeError) as error:
        _warn_once(f"deploy runs everything in PyTorch: {error}")
        return False
    return True


def checked_threads(threads: int | None, *, default: int) -> int:
    """Return a number of threads after a check; ``default`` for None.

    Raises:
        ConfigError: If it is no whole number, or less than one.
    """
    if threads is None:
        return default
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise ConfigError(f"threads={threads!r}; expected a whole number, at least 1")
    if operator.index(threads) < 1:
        raise ConfigError(f"threads={threads}; expected at least 1")
    return operator.index(threads)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, SparsityWarning, stacklevel=2)


def machine() -> str:
    """Return the processor and the target that kernels are made for; equal on machines that may share a plan."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    target = host_target().name if is_available() else "no kernels"
    return f"{name}, {target}"
