"""Int8: quantization-aware training of the weights that a sparse network keeps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetwin._compat import is_sharded, local
from sparsetwin._int8 import on_grid
from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Round target weights to int8, forward and backward, from a step to the end of training.

    Each output (slice along the first axis) has one scale, its largest magnitude over 127, as in files with int8
    values; zeros stay zero. Gradients go straight through to stored weights of full precision, which the optimizer
    updates. What training leaves in the parameters is what an int8 file gives back, to the bit.

    Raises:
        ConfigError: If ``start_step`` is no step.

    Source: Jacob et al., 2018, arXiv 1712.05877 (rounding in training); Bengio, Leonard & Courville, 2013,
        arXiv 1308.3432 (straight-through gradients).
    """

    start_step: int | None = None
    """Optimizer steps done when rounding begins; None is where the steps at the final sparsity begin, at the earliest
    halfway through the run."""

    def __post_init__(self) -> None:
        step = self.start_step
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise ConfigError(f"start_step is a number of steps, or None; got {step!r}")

    def first_step(self, schedule: Schedule) -> int:
        """Return the first step, counted from 0, that computes with rounded weights.

        >>> from sparsetwin import schedules
        >>> Int8().first_step(schedules.phases([(40, 0.0), (20, 0.5), (10, 0.9), (10, 0.9)]))
        60

        Args:
            schedule: Of the method.
        """
        if self.start_step is not None:
            return self.start_step
        final = schedule.phases[-1]
        begin = final.start
        for phase in reversed(schedule.phases):
            if phase.sparsity != final.sparsity:
                break
            begin = phase.start
        return max(begin, schedule.total_steps // 2)

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule in which weights would be rounded where they are not sparse.

        Raises:
            ConfigError: If it ends dense, or rounding would begin before its last dense phase ends or after it all.
        """
        if not schedule.phases[-1].is_sparse:
            raise ConfigError(
                "int8 rounds the weights of a sparse network to the end of training, but this schedule ends dense; "
                "let it end with a sparse phase, or leave quantization out (no --qat)"
            )
        first = self.first_step(schedule)
        dense = max((phase.stop for phase in schedule.phases if not phase.is_sparse), default=0)
        if not dense <= first < schedule.total_steps:
            raise ConfigError(
                f"int8 rounding begins at step {first}, which is not in the sparse phases at the end of the schedule; "
                f"let it begin from step {dense} to {schedule.total_steps - 1}"
            )

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse shards that cut outputs, whose scales would need all of them.

        Args:
            weights: Targets by name.

        Raises:
            UsageError: Naming one.
        """
        for name, weight in weights.items():
            placements = weight.placements if is_sharded(weight) else ()  # type: ignore[attr-defined]
            if any(getattr(placement, "dim", 0) != 0 or placement.is_partial() for placement in placements):
                raise UsageError(
                    f"{name} is sharded as {tuple(placements)}, so that parts of an output lie in several processes; "
                    "int8 scales need whole outputs: shard along the first axis, as fully_shard (FSDP2) does"
                )

    @torch.no_grad()
    def round_(self, weights: Mapping[str, Tensor]) -> None:
        """Round weights in place, such as those of an average of a model that trains so.

        Args:
            weights: Name -> weight of any shape, pruned elements at zero; of a DTensor this process's part is rounded.
        """
        for weight in weights.values():
            part = local(weight.detach())
            part.copy_(on_grid(part))
