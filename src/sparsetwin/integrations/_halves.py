"""The pair as a trainer's callback keeps it: each half as its phase ends, with what was measured on it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from sparsetwin.checkpoint import JSON, Pair
from sparsetwin.integrations._gathered import gathered
from sparsetwin.schedules import Phase, Schedule
from sparsetwin.sparsifier import Sparsifier

Half = Literal["dense", "sparse"]

_TIMES = ("_runtime", "_per_second", "_time", "epoch", "_preparation_time")


def half_of(phase: Phase | None) -> Half:
    """Return which half of the pair a phase trains; before the first step that is the dense one."""
    return "sparse" if phase is not None and phase.is_sparse else "dense"


def half_of_metric(name: str) -> Half | None:
    """Return the half that a metric's name says it is of: ``sparse_loss``, ``eval_dense_accuracy``; else None."""
    bare = name.removeprefix("eval_")
    halves: tuple[Half, Half] = ("dense", "sparse")
    return next((half for half in halves if bare.startswith(f"{half}_")), None)


def compares(half: Half, phase: Phase | None, schedule: Schedule) -> bool:
    """Return whether a network of this phase competes for the best one of a half.

    Sparse networks compete only at the schedule's final sparsity.
    """
    if half_of(phase) != half:
        return False
    return half == "dense" or (phase is not None and phase.sparsity == schedule.final_sparsity)


class HalfKeeper:
    """Saves the half of a phase when it ends, or training does, and lists its metrics.

    Args:
        folder: The pair's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.pair = Pair(folder)
        self._saved: tuple[Half, int] | None = None  # which half, at which step

    def save(self, model: nn.Module, sparsifier: Sparsifier, *, writes: bool) -> None:
        """Save the half of the phase in force, unless it is saved as it is, or no step was done.

        Args:
            model: As it trains; every process calls this, since sharded weights are gathered.
            sparsifier: Attached to it.
            writes: This process writes the files.
        """
        current = (half_of(sparsifier.phase), sparsifier.steps)
        if sparsifier.phase is None or self._saved == current:
            return
        whole, view = gathered(model, sparsifier, keeps=writes)
        if writes:
            self.pair.save(whole, view, name=current[0])
        self._saved = current

    def annotate(self, sparsifier: Sparsifier, metrics: Mapping[str, Any]) -> bool:
        """List metrics with the half that was just saved, and return whether the model is still that half."""
        current = (half_of(sparsifier.phase), sparsifier.steps)
        if self._saved != current:
            return False
        self.pair.annotate(current[0], _measured(metrics))
        return True

    def forget(self) -> None:
        """Take no more metrics: the model has been replaced by another one."""
        self._saved = None


def _measured(metrics: Mapping[str, Any]) -> dict[str, JSON]:
    """Return the finite numbers among a trainer's metrics, without times: equal runs list equal numbers."""
    numbers: dict[str, JSON] = {}
    for name, value in metrics.items():
        is_scalar = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
        number = value.item() if is_scalar else value
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if is_number and not name.endswith(_TIMES):
            numbers[name] = number
    return numbers
