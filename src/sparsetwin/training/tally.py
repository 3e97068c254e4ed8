"""How many weights the passes of every step computed with, where these change from step to step or pass to pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetwin._compat import is_sharded, local
from sparsetwin.errors import UsageError
from sparsetwin.methods import Method
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.training.costs import has_gradient_masks
from sparsetwin.training.processes import Processes


@dataclass(frozen=True, kw_only=True)
class PassCounts:
    """Weights of each target in one of the passes of a step, added up over the samples of many steps."""

    nonzero: Mapping[str, int]
    updated: Mapping[str, int]  # those whose gradients the optimizer sees


def changes_weights(method: Method) -> bool:
    """Return whether masks may change after every update, or weights from pass to pass: within a phase, in any case."""
    return method.needs_closure or type(method).after_update is not Method.after_update


class Tally:
    """Adds up how many weights of each target the passes of every step compute with.

    `count` comes before each pass, `add` after each step that counts. Neither waits for the device; `take` does.

    Args:
        sparsifier: Holds the weights.
        processes: Those that train together.
    """

    def __init__(self, sparsifier: Sparsifier, processes: Processes) -> None:
        self._sparsifier = sparsifier
        self._processes = processes
        self._step: list[Tensor] = []  # of the step in progress: (2, targets), int64, for each pass
        self._sums: Tensor | None = None  # (passes, 2, targets), int64, each step's times its samples; not yet read
        self._read: list[PassCounts] = []
        self.samples = 0  # of the steps that were added

    def begin_step(self) -> None:
        """Forget the passes of a step that did not count."""
        self._step.clear()

    @torch.no_grad()
    def count(self) -> None:
        """Count the weights as they are now, for the pass that begins."""
        nonzero = torch.stack([local(weight).count_nonzero() for weight in self._sparsifier.weights.values()])
        self._step.append(torch.stack([nonzero, self._updated(nonzero)]))

    def _updated(self, nonzero: Tensor) -> Tensor:
        sparsifier = self._sparsifier
        if not has_gradient_masks(sparsifier.method) or not sparsifier.masks:
            return nonzero
        masks, counts = sparsifier.gradient_masks, []
        for name, weight in sparsifier.weights.items():
            whole = torch.full_like(nonzero[0], local(weight).numel())
            counts.append(local(masks[name]).count_nonzero() if name in masks else whole)
        return torch.stack(counts)

    def add(self, samples: int, *, passes: int) -> None:
        """Add the passes of a step.

        Args:
            samples: Of the step.
            passes: How many the method says that it has.

        Raises:
            UsageError: If it has others.
        """
        if len(self._step) != passes:
            raise UsageError(
                f"{type(self._sparsifier.method).__name__} passed {len(self._step)} times over a batch, and its "
                f"passes() names {passes}; FLOPs are counted from these, so let both agree"
            )
        step = torch.stack(self._step) * samples
        self._sums = step if self._sums is None else self._sums.add_(step)
        self.samples += samples
        self._step.clear()

    def take(self) -> tuple[PassCounts, ...]:
        """Return the counts of each pass since the last call, and begin anew. All processes have to call it."""
        self._read_sums()
        taken = tuple(self._read)
        self._read, self.samples = [], 0
        return taken

    def _read_sums(self) -> None:
        if self._sums is None:
            return
        weights = self._sparsifier.weights
        is_cut = any(is_sharded(weight) for weight in weights.values())
        sums = self._processes.sum(self._sums) if is_cut else self._sums
        found = [PassCounts(nonzero=_named(weights, nonzero), updated=_named(weights, updated))
                 for nonzero, updated in sums.tolist()]  # fmt: skip
        self._read = [_sum(*pair) for pair in zip(self._read, found, strict=True)] if self._read else found
        self._sums = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain integers. All processes have to call it."""
        self._read_sums()
        passes = [{"nonzero": dict(each.nonzero), "updated": dict(each.updated)} for each in self._read]
        return {"samples": self.samples, "passes": passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._step.clear()
        self._sums, self.samples = None, state["samples"]
        self._read = [PassCounts(nonzero=each["nonzero"], updated=each["updated"]) for each in state["passes"]]


def _named(weights: Mapping[str, Tensor], counts: list[int]) -> dict[str, int]:
    return dict(zip(weights, counts, strict=True))


def _sum(first: PassCounts, second: PassCounts) -> PassCounts:
    return PassCounts(
        nonzero={name: count + second.nonzero[name] for name, count in first.nonzero.items()},
        updated={name: count + second.updated[name] for name, count in first.updated.items()},
    )
