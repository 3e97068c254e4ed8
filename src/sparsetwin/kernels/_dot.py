"""Which instruction multiplies pairs of bfloat16 numbers here, for dense kernels; Linux is asked for AMX's tiles once.

Tiles are eight kilobytes of registers that Linux saves only for processes that asked. A refusal leaves what comes next.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._llvm import host_features
from sparsetwin.kernels._target import AVX512, Target, host_target, missing_features

DotName = Literal["amx", "avx512bf16"]
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of x86-64; ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
_FEATURES: dict[DotName, tuple[str, ...]] = {"amx": ("amx-tile", "amx-bf16"), "avx512bf16": ("avx512bf16",)}


@dataclass(frozen=True, kw_only=True)
class Dot:
    """An instruction for dot products of bfloat16 pairs with float32 sums, and what code around it is made for."""

    name: DotName
    target: Target
    emulated: bool = False  # in ordinary arithmetic, for any machine: how kernels are tested where it is missing


_forced: list[Dot] = []


def host_dot() -> Dot | None:
    """Return the best instruction that this process may use, or None: tiles where there are any, else vectors.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    if _forced:
        return _forced[-1]
    return next((dot_target(name) for name in get_args(DotName) if why_not(name) is None), None)


def dot_target(name: DotName) -> Dot:
    """Return an instruction with the features that its kernels are compiled for; nothing is asked of the machine."""
    features = (*AVX512.features, *_FEATURES[name])
    if name == "amx" and host_features().get("avx512bf16", False):
        features = (*features, "avx512bf16")  # rounds in one instruction; the numbers are the same
    return Dot(name=name, target=replace(AVX512, name=name, features=features))


def why_not(name: DotName) -> str | None:
    """Return why this process cannot use an instruction, or None if it can.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    missing = missing_features(dot_target(name).target)
    if missing:
        return f"this machine lacks {', '.join(missing)}"
    return _asked() if name == "amx" else None


def tiles_refused() -> str | None:
    """Return why this process cannot use AMX although the machine has it; None if it can, or there is none.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    return None if missing_features(dot_target("amx").target) else _asked()


@cache
def _asked() -> str | None:
    """Ask Linux, once a process, for the registers of AMX; return the reason of a refusal. A fork inherits a grant."""
    if not sys.platform.startswith("linux") or platform.machine().lower() not in ("x86_64", "amd64"):
        return "AMX is asked for on Linux only"
    system = ctypes.CDLL(None, use_errno=True)
    system.syscall.restype = ctypes.c_long
    numbers = (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    if system.syscall(*(ctypes.c_long(number) for number in numbers)) == 0:
        return None
    return f"Linux does not let this process use AMX: {os.strerror(ctypes.get_errno())}"


@contextmanager
def emulated_dot(name: DotName) -> Iterator[Dot]:
    """Let dense kernels be chosen and run as if this machine had an instruction. For tests: it is slow.

    Raises:
        ConfigError: If the instruction is unknown, or llvmlite is not installed.
    """
    if name not in _FEATURES:
        raise ConfigError(f"unknown instruction {name!r}; known: {', '.join(_FEATURES)}")
    _forced.append(Dot(name=name, target=host_target(), emulated=True))
    try:
        yield _forced[-1]
    finally:
        _forced.pop()
