"""What is measured, and for how long."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

import tyro

from sparsetwin.errors import ConfigError

EngineName: TypeAlias = Literal["eager", "compile", "csr", "onnxruntime", "openvino", "deepsparse", "sparsetwin"]
Precision: TypeAlias = Literal["fp32", "bf16", "int8"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Which engines, and how they are timed.

    Raises:
        ConfigError: If a number is out of range or nothing is chosen.
    """

    engines: tuple[EngineName, ...] = ENGINES
    """Contestants; those that are not installed are listed with the reason."""
    precisions: tuple[Precision, ...] = PRECISIONS
    """bf16 and int8 round: choose fp32 alone if your network may not be rounded."""
    batch: int = 16
    """Samples of a call for the throughput; the latency is that of one sample."""
    threads: int = 1
    """Of every engine, each on a processor of its own."""
    rounds: int = 15
    """In each every engine has one turn."""
    turn_seconds: float = 0.02
    """About the length of a turn; longer calls have a turn each."""
    engine_seconds: float = 30.0
    """After so many seconds of calls an engine has no more turns, but three at least."""
    prepare_seconds: float = 180.0
    """What compiling, converting or planning for one batch size may take."""
    deepsparse_python: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Python interpreter that has deepsparse, which needs Python 3.10 or older."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("threads", 1), ("rounds", 3)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} should be at least {least}, got {getattr(self, name)}")
        for name in ("turn_seconds", "engine_seconds", "prepare_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} should be more than 0 seconds, got {getattr(self, name)}")
        for name, known in (("engines", ENGINES), ("precisions", PRECISIONS)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong or not getattr(self, name):
                raise ConfigError(f"{name} should be some of {', '.join(known)}; got {', '.join(wrong) or 'none'}")
