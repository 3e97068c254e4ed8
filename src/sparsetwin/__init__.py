"""Train once, ship twins: AC/DC training that ends with a dense network and its sparse twin."""

import importlib
from typing import TYPE_CHECKING, Any

from sparsetwin import distributions, errors, metrics, patterns, schedules, scores
from sparsetwin.batch_norm import recalibrate_batch_norm
from sparsetwin.checkpoint import Pair, load_sparse, save_sparse
from sparsetwin.distributions import ERK, Global, PerLayer, Uniform
from sparsetwin.methods import (
    ACDC,
    GMP,
    HAM,
    IMP,
    SET,
    SNIP,
    ST3,
    STR,
    CrAM,
    Dense,
    GraNet,
    Int8,
    Method,
    OneShot,
    RigL,
    Static,
    TopKAST,
    WoodFisher,
)
from sparsetwin.patterns import NM, Block, Channel, Unstructured
from sparsetwin.schedules import Phase, Schedule
from sparsetwin.selection import select_masks
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import Targets

if TYPE_CHECKING:
    from sparsetwin import runtime
    from sparsetwin.runtime import deploy

__version__ = "0.1.0"
__all__ = [
    "ACDC",
    "ERK",
    "GMP",
    "HAM",
    "IMP",
    "NM",
    "SET",
    "SNIP",
    "ST3",
    "STR",
    "Block",
    "Channel",
    "CrAM",
    "Dense",
    "Global",
    "GraNet",
    "Int8",
    "Method",
    "OneShot",
    "Pair",
    "PerLayer",
    "Phase",
    "RigL",
    "Schedule",
    "Sparsifier",
    "Static",
    "Targets",
    "TopKAST",
    "Uniform",
    "Unstructured",
    "WoodFisher",
    "__version__",
    "deploy",
    "distributions",
    "errors",
    "load_sparse",
    "metrics",
    "patterns",
    "recalibrate_batch_norm",
    "runtime",
    "save_sparse",
    "schedules",
    "scores",
    "select_masks",
]


def __getattr__(name: str) -> Any:
    """Import what deploys networks when it is first asked for: it takes longer to import than all else together."""
    if name not in ("deploy", "runtime"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    runtime = importlib.import_module("sparsetwin.runtime")
    return runtime if name == "runtime" else runtime.deploy
