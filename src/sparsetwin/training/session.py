"""A model in training: everything that one optimizer step changes, and that one step itself."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin._compat import local, named_weights
from sparsetwin.masking import SparseView
from sparsetwin.methods import Method
from sparsetwin.sparsifier import Sparsifier, gathered, whole_view
from sparsetwin.targets import Targets
from sparsetwin.training.distillation import make_teacher
from sparsetwin.training.ema import PhaseAverage
from sparsetwin.training.environment import generator_state, restore_generators
from sparsetwin.training.evaluate import autocast, loss_and_correct, to_format
from sparsetwin.training.optimizers import make_optimizers
from sparsetwin.training.processes import ALONE, Processes
from sparsetwin.training.settings import DistributedSettings, LearningRateSettings, OptimizerSettings, TrainSettings
from sparsetwin.training.sharding import (
    cut,
    cut_optimizer_state,
    whole_twin,
    without_averaging,
    wrapped,
)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """All that decides how a session trains, apart from the model and the method."""

    optimizer: OptimizerSettings
    learning_rate: LearningRateSettings
    train: TrainSettings
    steps_per_epoch: int
    distributed: DistributedSettings = DistributedSettings()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.train.epochs


class Session:
    """Model, optimizers, `Sparsifier`, loss scaler and average, and the step that moves them.

    Args:
        model: On its device; parameters in fp32, the same in all processes.
        method: The sparse-training method.
        targets: Which parameters may be pruned.
        settings: How to train.
        seed: For methods that draw.
        processes: Those that train the model together.
        sample_batch: Returns the n-th batch for methods that sample gradients.
        teacher: Network whose outputs are learned from, if the settings ask for one.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        targets: Targets,
        settings: LoopSettings,
        seed: int,
        processes: Processes = ALONE,
        sample_batch: Callable[[int], tuple[Tensor, Tensor]] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.settings = settings
        self._sample_batch = sample_batch
        train = settings.train
        self.model = model
        self.processes = processes
        if train.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(model.parameters()).device
        is_sharded = processes.are_many and settings.distributed.fsdp
        self._template = copy.deepcopy(model).cpu() if is_sharded else None  # what a sharded model was
        self._wrapped = wrapped(model, processes, settings.distributed, deterministic=train.deterministic)
        self.optimizers = make_optimizers(model, settings.optimizer)
        self.sparsifier = Sparsifier(
            method,
            model,
            self.optimizers,
            targets=targets,
            seed=seed,
            group=processes.group if not is_sharded else None,
            gradient_pass=self._sample_gradients if sample_batch is not None else None,
        )
        self._base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.average = PhaseAverage(model, decay=train.ema_decay) if train.ema_decay else None
        if self.average is not None:
            average = self.average
            self.sparsifier.on_phase(lambda event, phase: average.restart() if event == "enter" else None)
        self.teacher = make_teacher(teacher, self.evaluated_model, self.sparsifier, train)
        self._forward = torch.compile(self._wrapped) if train.compile else self._wrapped
        self.before_pass: Callable[[], None] | None = None  # called before each pass over a batch that is trained on
        self.sampled = 0  # samples of batches whose gradients a method took to choose masks
        self.skipped = 0  # batches whose update overflowed
        self.skipped_in_a_row = 0
        self._constant = self._not_finite_buffers()

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
            inputs: (batch, ...), on the device; the whole batch, of which each process takes its part.
            labels: (batch, ...), int64, on the device.

        Returns:
            Mean loss and number of right predictions, scalars on the device; of several processes this one's terms of
            the two sums.
        """
        before = self.steps
        self.sparsifier.begin_step()
        self._set_learning_rate()
        self.model.train()
        found: list[tuple[Tensor, Tensor]] = []

        def closure() -> Tensor:
            if self.before_pass is not None:
                self.before_pass()
            found.append(self._pass(inputs, labels, scaler=self.scaler))
            return found[-1][0]

        scales = (
            self.sparsifier.method.needs_closure and self.scaler.is_enabled()
        )  # reading the scale waits for the device
        self.sparsifier.backward(closure, scaler=self.scaler if scales else None)
        self.processes.share_buffers(self.model)
        self._update()
        overflowed = self.steps == before
        self.skipped += overflowed
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if overflowed else 0
        return found[0]

    def _pass(self, inputs: Tensor, labels: Tensor, *, scaler: torch.amp.GradScaler | None) -> tuple[Tensor, Tensor]:
        """Run forward and backward over a batch, in parts; return mean loss and right predictions."""
        train = self.settings.train
        losses: list[Tensor] = []
        correct: list[Tensor] = []
        parts = (self.processes.parts(whole, cuts=train.accumulation) for whole in (inputs, labels))
        for x, y in zip(*parts, strict=True):
            with self._averaging(is_last=len(losses) == train.accumulation - 1):
                x = to_format(x, channels_last=train.channels_last)
                with autocast(self.device, train.precision):
                    logits = self._forward(x)
                loss, right = loss_and_correct(logits, y, label_smoothing=train.label_smoothing)
                if self.teacher is not None:
                    loss = self.teacher.loss(loss, logits, x)
                share = len(y) / len(labels)
                # gradients are averaged over processes, but the whole batch's is their sum
                scaled = loss * (share * self.processes.count)
                torch.autograd.backward(scaled if scaler is None else scaler.scale(scaled))
            losses.append(loss.detach() * share)
            correct.append(right)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _sample_gradients(self, index: int) -> None:
        assert self._sample_batch is not None
        self.model.train()
        inputs, labels = self._sample_batch(index)
        self._pass(inputs, labels, scaler=None)
        self.sampled += len(labels)

    def _averaging(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Return the context of a backward pass; gradients are averaged over processes in a step's last one."""
        return nullcontext() if is_last else without_averaging(self._wrapped)

    def _update(self) -> None:
        clips = bool(self.settings.train.clip_norm)
        for optimizer in self.optimizers if clips or len(self.optimizers) > 1 else ():
            self.scaler.unscale_(optimizer)  # before the first of several steps: methods read the gradients of all then
        if clips:
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
        method, per_epoch = self.sparsifier.method, self.settings.steps_per_epoch
        whole = method.schedule.total_steps
        step = method.learning_rate_step(self.steps)
        if method.learning_rate_steps != whole:  # the same schedule in less time, warm-up and milestones included
            step = step * whole // method.learning_rate_steps
        return self.settings.learning_rate.factor(step, steps_per_epoch=per_epoch, epochs=whole / per_epoch)

    def _set_learning_rate(self) -> None:
        factor = self._factor()
        for optimizer, bases in zip(self.optimizers, self._base_lrs, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor

    def first_not_finite(self) -> str | None:
        """Return the name of a parameter or buffer with NaN or infinite values, or None; waits for the device.

        What a buffer held from the start, as an attention's mask holds -inf, is left out.
        """
        found = self._not_finite()
        if not found:
            return None
        spoilt = torch.stack([count > self._constant.get(name, 0) for name, count in found.items()]).int()
        counts = self.processes.sum(spoilt).tolist()
        return next((name for name, count in zip(found, counts, strict=True) if count), None)

    def _not_finite(self) -> dict[str, Tensor]:
        """Return how many values of each parameter and buffer are not finite, in this process's part of it."""
        state = {name: local(value) for name, value in self.model.state_dict().items() if value.is_floating_point()}
        return {name: (~value.isfinite()).sum() for name, value in state.items()}

    def _not_finite_buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: count for name, count in self._not_finite().items() if name not in parameters}

    def evaluated_model(self) -> nn.Module:
        """Return the model to evaluate and to save: the average, masked and rounded as the model is, or the model.

        It is whole and the same in all processes, which all have to call this.
        """
        if self._template is not None:
            return whole_twin(self._template, self.model)
        if self.average is None:
            return self.model
        masked, quantization = self.average.masked(self.sparsifier.masks), self.sparsifier.quantization
        if quantization is None:
            return masked
        rounded = copy.deepcopy(masked)  # the average itself goes on in full precision
        targets = named_weights(rounded)
        quantization.round_({name: targets[name] for name in self.sparsifier.target_names})
        return rounded

    def whole(self, state: Any, *, keep: bool = True) -> Any:
        """Return state with shards put together; see `gathered`. Without shards it is returned as it is."""
        return state if self._template is None else gathered(state, keep=keep)

    def view(self) -> SparseView:
        """Return what a member of the pair is saved by; its masks are whole. All processes have to call it."""
        return whole_view(self.sparsifier)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, apart from the data.

        All processes have to call it; the first one's result is whole, the others' need not be.
        """
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sparsifier": self.sparsifier.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "generators": generator_state(self.device),
            "skipped": self.skipped,
        }
        if self.processes.are_many:
            state["other_generators"] = self.processes.collect(state["generators"])[1:]
        whole: dict[str, Any] = self.whole(state, keep=self.processes.is_first)
        return whole

    def load_state_dict(self, state: Mapping[str, Any], *, branch: bool = False) -> None:
        """Load what `state_dict` returned.

        Args:
            state: Saved state.
            branch: The state is that of another method at the end of a dense phase, from which this one goes on.
        """
        if self._template is not None:
            state = self._cut(state)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_first_groups(saved, len(optimizer.param_groups)) if branch else saved)
        if branch:
            self.sparsifier.prepare_load(state["sparsifier"]["steps"])
        else:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state.get("teacher"))
        generators = [state["generators"], *state.get("other_generators", [])]
        if self.processes.rank < len(generators):  # of a process that is new the state stays that of its own seed
            restore_generators(generators[self.processes.rank], self.device)
        self.skipped = state["skipped"]
        self._constant = self._not_finite_buffers()  # only what was found to be sound is saved

    def _cut(self, state: Mapping[str, Any]) -> dict[str, Any]:
        pairs = zip(state["optimizers"], self.optimizers, strict=True)
        return {
            **state,
            "model": cut(state["model"], self.model.state_dict()),
            "optimizers": [cut_optimizer_state(saved, optimizer) for saved, optimizer in pairs],
        }


def _first_groups(state: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return an optimizer's state without the groups behind the first ones: what another method learned."""
    groups = state["param_groups"][:count]
    places = {place for group in groups for place in group["params"]}
    return {**state, "param_groups": groups, "state": {k: v for k, v in state["state"].items() if k in places}}
