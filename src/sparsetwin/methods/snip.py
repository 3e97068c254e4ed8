"""SNIP: prune once before training, by how much the loss depends on each weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsetwin._compat import local
from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Pass
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod, check_gradients
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase
from sparsetwin.scores import sensitivity
from sparsetwin.selection import select_masks


@dataclass(frozen=True, kw_only=True)
class SNIP(RankingMethod):
    """Keep the weights with the largest ``|w * g|`` at initialisation; the masks never change.

    Gradients are those of the first training batch, on which nothing is updated then, or with ``samples`` the mean
    over sample batches before the first step.

    Raises:
        ScheduleError: If the schedule has a dense phase, or more than one sparsity.
        ConfigError: If ``samples`` is negative, or another score is given.

    Source: Lee, Ajanthan & Torr, 2019, arXiv 1810.02340, algorithm 1.
    """

    course: ClassVar[Course] = Course(kind="constant")
    knobs: ClassVar[tuple[Knob, ...]] = (Knob("method.options.samples", (0, 10)),)

    score: str = "sensitivity"
    """Is "sensitivity"."""
    samples: int = 0
    """Batches of the Sparsifier's ``gradient_pass`` whose mean gradient is used; 0 takes the first training batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sparsities = sorted({phase.sparsity for phase in self.schedule.phases})
        if len(sparsities) > 1 or not sparsities[0]:
            raise ScheduleError(
                f"SNIP prunes once, before training, so there is one sparsity, got {sparsities}; "
                "use schedules.constant(sparsity=..., total_steps=...)"
            )
        if self.samples < 0 or self.score != "sensitivity":
            raise ConfigError(
                f"expected samples of at least 0 and the score 'sensitivity', got {self.samples} and {self.score!r}"
            )

    def needs_gradients(self, phase: Phase) -> bool:
        """Whether the gradients are those of the first training batch."""
        return not self.samples and phase.index == 0

    def skips_update(self, left: Phase | None, entered: Phase) -> bool:
        """Whether the first batch is there to choose the masks alone, since its forward pass was dense."""
        return not self.samples and entered.index == 0

    def gradient_samples(self, phase: Phase) -> int:
        """Return ``samples`` before the first step."""
        return self.samples if phase.index == 0 else 0

    def passes(self, phase: Phase, *, enters: bool) -> tuple[Pass, ...]:
        """Return one pass: dense where the first training batch chooses the masks, sparse everywhere else."""
        return (Pass(forward="all", input_gradient="all", weight_gradient="all"),) if enters else (Pass(),)

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks chosen at the first step."""
        if state.masks:
            return state.masks
        gradients = self._mean_gradients(state) if self.samples else state.gradients
        check_gradients(gradients, state)
        return select_masks(
            state.weights,
            lambda name: sensitivity(state.weights[name], gradients[name]),
            self.distribution.budgets(state.shapes, phase.sparsity),
            minimum_kept=self.minimum_kept,
            pattern=self.pattern,
        )

    def _mean_gradients(self, state: SparseState) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for gradients in state.sample_gradients(self.samples):
            for name, gradient in gradients.items():
                if name in sums:
                    local(sums[name]).add_(local(gradient))
                else:
                    sums[name] = gradient.clone()
        return {name: total / self.samples for name, total in sums.items()}
