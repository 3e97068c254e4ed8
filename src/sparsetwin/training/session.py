"""A model in training: everything that one optimizer step changes, and that one step itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.methods import Method
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import Targets
from sparsetwin.training.ema import PhaseAverage
from sparsetwin.training.environment import generator_state, restore_generators
from sparsetwin.training.evaluate import autocast, loss_and_correct, to_format
from sparsetwin.training.optimizers import make_optimizers
from sparsetwin.training.settings import LearningRateSettings, OptimizerSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """All that decides how a session trains, apart from the model and the method."""

    optimizer: OptimizerSettings
    learning_rate: LearningRateSettings
    train: TrainSettings
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.train.epochs


class Session:
    """Model, optimizers, `Sparsifier`, loss scaler and average, and the step that moves them.

    Args:
        model: On its device; parameters in fp32.
        method: The sparse-training method.
        targets: Which parameters may be pruned.
        settings: How to train.
        seed: For methods that draw.
    """

    def __init__(
        self, model: nn.Module, method: Method, *, targets: Targets, settings: LoopSettings, seed: int
    ) -> None:
        self.settings = settings
        train = settings.train
        self.model = model
        if train.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(model.parameters()).device
        self.optimizers = make_optimizers(model, settings.optimizer)
        self._base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.sparsifier = Sparsifier(method, model, self.optimizers, targets=targets, seed=seed)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.average = PhaseAverage(model, decay=train.ema_decay) if train.ema_decay else None
        if self.average is not None:
            average = self.average
            self.sparsifier.on_phase(lambda event, phase: average.restart() if event == "enter" else None)
        self._forward = torch.compile(self.model) if train.compile else self.model
        self.skipped = 0  # batches whose update overflowed
        self.skipped_in_a_row = 0

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.sparsifier.steps

    @property
    def last_lr(self) -> float:
        """Learning rate of the latest step, of the first parameter group."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do one optimizer step.

        Args:
            inputs: (batch, ...), on the device.
            labels: (batch, ...), int64, on the device.

        Returns:
            Mean loss and number of right predictions, scalars on the device.
        """
        train = self.settings.train
        before = self.steps
        self.sparsifier.begin_step()
        self._set_learning_rate()
        self.model.train()
        losses: list[Tensor] = []
        correct: list[Tensor] = []
        for x, y in zip(inputs.chunk(train.accumulation), labels.chunk(train.accumulation), strict=True):
            with autocast(self.device, train.precision):
                logits = self._forward(to_format(x, channels_last=train.channels_last))
            loss, right = loss_and_correct(logits, y, label_smoothing=train.label_smoothing)
            share = len(y) / len(labels)
            torch.autograd.backward(self.scaler.scale(loss * share))
            losses.append(loss.detach() * share)
            correct.append(right)
        self._update()
        overflowed = self.steps == before
        self.skipped += overflowed
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if overflowed else 0
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _update(self) -> None:
        if self.settings.train.clip_norm:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            self.sparsifier.mask_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.train.clip_norm)
        before = self.steps
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.average is not None and self.steps > before:
            self.average.update()

    def _factor(self) -> float:
        return self.settings.learning_rate.factor(
            self.steps, steps_per_epoch=self.settings.steps_per_epoch, epochs=self.settings.train.epochs
        )

    def _set_learning_rate(self) -> None:
        factor = self._factor()
        for optimizer, bases in zip(self.optimizers, self._base_lrs, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor

    def first_not_finite(self) -> str | None:
        """Return the name of a parameter or buffer with NaN or infinite values, or None; waits for the device."""
        tensors = {name: value for name, value in self.model.state_dict().items() if value.is_floating_point()}
        if not tensors or bool(torch.stack([value.isfinite().all() for value in tensors.values()]).all()):
            return None
        return next(name for name, value in tensors.items() if not bool(value.isfinite().all()))

    def evaluated_model(self) -> nn.Module:
        """Return the model to evaluate and to save: the average with its pruned weights at zero, or the model."""
        return self.model if self.average is None else self.average.masked(self.sparsifier.masks)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, apart from the data."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sparsifier": self.sparsifier.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "generators": generator_state(self.device),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, branch: bool = False) -> None:
        """Load what `state_dict` returned.

        Args:
            state: Saved state.
            branch: The state is that of another method at the end of a dense phase, from which this one goes on.
        """
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if branch:
            self.sparsifier.prepare_load(state["sparsifier"]["steps"])
        else:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        restore_generators(state["generators"], self.device)
        self.skipped = state["skipped"]
