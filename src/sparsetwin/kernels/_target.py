"""What a kernel is generated for: an instruction set, chosen by name and checked against this machine."""

import os
import platform
from dataclasses import dataclass, replace
from functools import cache

from sparsetwin.errors import ConfigError, nearest
from sparsetwin.kernels._llvm import host_features


@dataclass(frozen=True, kw_only=True)
class Target:
    """An instruction set as the generator sees it.

    ``lanes`` float32 numbers fill one vector register; there are ``registers`` of them.
    """

    name: str
    architectures: tuple[str, ...]  # as ``platform.machine()`` says, lower case; empty: any
    features: tuple[str, ...]  # LLVM's names; the machine must have each
    lanes: int
    registers: int
    fused: bool  # multiply-add in one instruction
    half: bool = False  # turns float16 into float32 in one instruction
    expands: bool = False  # loads packed float32 numbers into the lanes of a mask; with VBMI2 also 16-bit ones
    halves: bool = False  # multiplies and adds float16 numbers, twice as many as lanes at a time

    @property
    def feature_string(self) -> str:
        """The features as LLVM's target machine takes them."""
        return ",".join(f"+{feature}" for feature in self.features)


AVX512 = Target(
    name="avx512",
    architectures=("x86_64", "amd64"),
    features=("avx2", "fma", "f16c", "bmi", "bmi2", "popcnt", "avx512f", "avx512vl", "avx512bw", "avx512dq"),
    lanes=16,
    registers=32,
    fused=True,
    half=True,
    expands=True,
)
AVX512_VBMI2 = replace(AVX512, name="avx512vbmi2", features=(*AVX512.features, "avx512vbmi2"))
AVX512_FP16 = replace(AVX512_VBMI2, name="avx512fp16", features=(*AVX512_VBMI2.features, "avx512fp16"), halves=True)
AVX2 = Target(
    name="avx2",
    architectures=("x86_64", "amd64"),
    features=("avx2", "fma", "f16c", "bmi", "bmi2", "popcnt"),
    lanes=8,
    registers=16,
    fused=True,
    half=True,
)
NEON = Target(
    name="neon",
    architectures=("aarch64", "arm64"),
    features=("neon",),
    lanes=4,
    registers=32,
    fused=True,
    half=True,
)
NEON_FP16 = replace(NEON, name="neonfp16", features=(*NEON.features, "fullfp16"), halves=True)
GENERIC = Target(name="generic", architectures=(), features=(), lanes=4, registers=16, fused=False)

_BEST_FIRST = (AVX512_VBMI2, AVX512, AVX2, NEON, GENERIC)
TARGETS: dict[str, Target] = {target.name: target for target in _BEST_FIRST}
HALF_TARGETS: dict[str, Target] = {target.name: target for target in (AVX512_FP16, NEON_FP16)}  # on request only


def missing_features(target: Target) -> tuple[str, ...]:
    """Return what this machine lacks of a target: features, or its architecture; empty if kernels for it run here."""
    architecture = platform.machine().lower()
    if target.architectures and architecture not in target.architectures:
        return (f"a processor of architecture {target.architectures[0]}",)
    found = host_features()
    return tuple(feature for feature in target.features if not found.get(feature, False))


@cache
def host_target() -> Target:
    """Return the best target that this machine runs; `GENERIC` runs everywhere.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    return next(target for target in TARGETS.values() if not missing_features(target))


@cache
def half_target() -> Target | None:
    """Return the target with float16 arithmetic that this machine runs, or None.

    Kernels in float32 are not compiled for it: its additional instructions would change nothing for them.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    if os.name != "posix":  # kernels keep sums on the stack, which Windows lets grow by calls only
        return None
    return next((target for target in HALF_TARGETS.values() if not missing_features(target)), None)


def checked_target(target: Target | str | None) -> Target:
    """Return the target meant, after a check that this machine runs it.

    Args:
        target: A target, its name, or None for `host_target`.

    Raises:
        ConfigError: If the name is unknown, the machine lacks a feature, or llvmlite is not installed.
    """
    if target is None:
        return host_target()
    if isinstance(target, str):
        known = TARGETS | HALF_TARGETS
        if target not in known:
            raise ConfigError(f"unknown target {target!r}{nearest(target, known)}; known: {', '.join(known)}")
        target = known[target]
    missing = missing_features(target)
    if missing:
        raise ConfigError(
            f"kernels for {target.name} cannot run here: this machine lacks {', '.join(missing)}; "
            f"the best it runs is {host_target().name}"
        )
    return target
