"""One course through a schedule: epochs, phase boundaries, the pair, checkpoints."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsetwin.batch_norm import recalibrate_batch_norm
from sparsetwin.checkpoint import JSON, Pair
from sparsetwin.errors import SelectionError, TrainingError
from sparsetwin.masking import Masks, count_kept
from sparsetwin.metrics import mask_change, nonzero_counts, sparsity_table
from sparsetwin.schedules import Phase
from sparsetwin.training.billing import Billing
from sparsetwin.training.evaluate import Score, Sums, evaluate
from sparsetwin.training.journal import Journal, Progress
from sparsetwin.training.session import Session
from sparsetwin.training.sharding import cut

DENSE_START = "dense-start"
"""Member that a dense phase is saved as which is only the begin of a sparse network."""

_FLUSH_STEPS = 50  # steps between looks at the losses, which on a GPU wait for it
_REMEDIES = "a lower learning rate, clipping (--train.clip-norm) or a longer warm-up may help"
_OVERFLOWS = 100  # updates skipped in a row; a loss scale that began at 2**16 is then below 2**-80


class Batches(Protocol):
    """A split of a data set; `sparsetwin.data.Batches` is one."""

    @property
    def samples(self) -> int:
        """Samples of one epoch."""

    def __len__(self) -> int:
        """Batches of one epoch."""

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from ``start`` on, the same ones every time."""


@dataclass(kw_only=True)
class Stage:
    """A session on its way through its schedule.

    ``run`` goes from wherever the session is to the end, and may be stopped and continued after any step.
    """

    name: str  # "main" or "dense-finetune"
    session: Session
    train: Batches
    holdout: Batches
    billing: Billing  # of the session
    journal: Journal
    pair: Pair
    member_names: Mapping[bool, str]  # whether a phase is sparse -> member that its end is saved as
    branch_step: int | None = None  # after this step the whole state is kept for the fine-tuning of the dense half
    on_checkpoint: Callable[[], None]
    on_branch: Callable[[], None]
    sums: Sums = field(default_factory=Sums)
    best: dict[str, list[float]] = field(default_factory=dict)  # member -> [accuracy, loss] on the hold-out
    previous_masks: Masks = field(default_factory=dict)  # of the last sparse phase that ended
    stop_requested: bool = False

    def __post_init__(self) -> None:
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # step, loss and right predictions, not yet looked at
        self._epoch_began = time.perf_counter()

    @property
    def iteration(self) -> int:
        """Batches consumed: counted steps and overflowed ones."""
        return self.session.steps + self.session.skipped

    def run(self) -> bool:
        """Train to the end of the schedule.

        Returns:
            Whether the end was reached; False if a stop was requested, after a checkpoint.

        Raises:
            TrainingError: If the loss is not finite; the last checkpoint is kept.
        """
        settings = self.session.settings
        checkpoint_steps = max(1, round(settings.train.checkpoint_epochs * settings.steps_per_epoch))
        self._epoch_began = time.perf_counter()
        for inputs, labels in self._batches():
            if not self._step(inputs, labels):
                continue
            step = self.session.steps
            self._boundary(
                epoch_ends=step % settings.steps_per_epoch == 0, phase_ends=self.session.sparsifier.phase_ends
            )
            if step == self.branch_step:
                self.on_branch()
            is_done = step >= settings.total_steps
            # looked at once, as a signal may come at any moment, and to one process before the others
            stops = self.session.processes.any(self.stop_requested)
            if is_done or stops or step % checkpoint_steps == 0:
                self._flush()
                self._check_weights()
                if stops and step % settings.steps_per_epoch:
                    self._time_event(step // settings.steps_per_epoch + 1, samples=0)  # the epoch's line has them all
                self.on_checkpoint()
            if is_done or stops:
                return is_done
        return True

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches from the session's position on; overflowed steps draw on a further epoch at the end."""
        while self.session.steps < self.session.settings.total_steps:
            epoch, start = divmod(self.iteration, len(self.train))
            yield from self.train.epoch(epoch, start=start)

    def _step(self, inputs: Tensor, labels: Tensor) -> bool:
        """Do one step and take its scores in; return False if the loss scaler skipped the update."""
        before = self.session.steps
        self.billing.begin_step()
        loss, correct = self._updated(inputs, labels)
        is_done = self.session.steps > before
        self.billing.end_step(len(labels), counts=is_done)
        if not is_done:
            self._check_overflows(loss)
            return False
        self._pending.append((self.session.steps, loss, correct))
        self.sums.labels += labels.numel()
        self.sums.samples += len(labels)
        if len(self._pending) >= _FLUSH_STEPS:
            self._flush()
        return True

    def _updated(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step; a mask that cannot be chosen because the training has diverged is said to be that."""
        try:
            return self.session.step(inputs, labels)
        except SelectionError as error:
            if not self.session.processes.are_many:  # which all would have to take part in
                self._flush()
                self._check_weights()
            if "NaN" in str(error):  # of a gradient, or of a weight that nothing was spoilt by yet
                raise TrainingError(f"{error} at step {self.session.steps + 1} ({self.name}); {_REMEDIES}") from error
            raise

    def _flush(self) -> None:
        """Read the losses of the latest steps and refuse to go on from one that is not finite."""
        pending = self._pending
        if not pending:
            return
        processes = self.session.processes
        losses = processes.sum(torch.stack([loss for _, loss, _ in pending])).tolist()
        correct = processes.sum(torch.stack([right for _, _, right in pending])).tolist()
        for (step, _, _), loss, right in zip(pending, losses, correct, strict=True):
            if not -float("inf") < loss < float("inf"):
                raise TrainingError(f"the loss is {loss} at step {step} ({self.name}); {_REMEDIES}")
            self.sums.loss += loss
            self.sums.correct += right
            self.sums.steps += 1
        pending.clear()
        self._tell_progress(losses[-1])

    def _check_weights(self) -> None:
        """Refuse to evaluate, save or list what the latest update has spoilt."""
        spoilt = self.session.first_not_finite()
        if spoilt is not None:
            raise TrainingError(f"{spoilt} is not finite after step {self.session.steps} ({self.name}); {_REMEDIES}")

    def _check_overflows(self, loss: Tensor) -> None:
        """Refuse to skip updates for ever: a lower loss scale does not mend a loss that is itself not finite."""
        if self.session.skipped_in_a_row >= _OVERFLOWS:
            raise TrainingError(
                f"{_OVERFLOWS} updates in a row overflowed after step {self.session.steps} ({self.name}), the loss is "
                f"{self.session.processes.sum(loss).item():g}; {_REMEDIES}; or use --train.precision bf16"
            )

    def _tell_progress(self, loss: float) -> None:
        phase = self._phase
        self.journal.progress(
            Progress(
                stage=self.name,
                step=self.session.steps,
                total_steps=self.session.settings.total_steps,
                steps_per_epoch=self.session.settings.steps_per_epoch,
                phase=phase.index,
                phase_sparsity=phase.sparsity,
                loss=loss,
                accuracy=self.sums.score().accuracy,
            )
        )

    @property
    def _phase(self) -> Phase:
        phase = self.session.sparsifier.phase
        assert phase is not None
        return phase

    def _boundary(self, *, epoch_ends: bool, phase_ends: bool) -> None:
        """Evaluate, tell and save what the end of an epoch or a phase asks for."""
        if not (epoch_ends or phase_ends):
            return
        self._flush()
        self._check_weights()
        member = self._member_name() if phase_ends else None
        model = self._member_model() if member else self.session.evaluated_model()
        is_judged = epoch_ends or member is not None  # not at each of the many phases in which a mask moves
        score = self._score(model) if is_judged and len(self.holdout) else None
        nonzero = nonzero_counts(model)
        forward_flops = self.billing.end_segment(nonzero)
        counts = self._counts(nonzero) | {"holdout": score.plain() if score else None}
        if epoch_ends:
            self._epoch_event(counts, forward_flops)
        if score is not None:
            self._keep_best(model, score)
        if phase_ends:
            self._phase_event(model, counts, score, member)

    def _score(self, model: nn.Module) -> Score:
        train = self.session.settings.train
        return evaluate(
            model,
            self.holdout.epoch(0),
            precision=train.precision,
            channels_last=train.channels_last,
            processes=self.session.processes,
        )

    def _counts(self, nonzero: Mapping[str, int]) -> dict[str, Any]:
        sparsifier = self.session.sparsifier
        size = sum(weight.numel() for weight in sparsifier.weights.values())
        alive = sum(nonzero[name] for name in sparsifier.target_names)
        return {"kept": count_kept(sparsifier.masks) if sparsifier.masks else size, "zeros": size - alive}

    def _epoch_event(self, counts: Mapping[str, Any], forward_flops: int) -> None:
        settings, phase = self.session.settings, self._phase
        epoch = self.session.steps // settings.steps_per_epoch
        self.journal.event(
            {
                "event": "epoch",
                "stage": self.name,
                "epoch": epoch,
                "step": self.session.steps,
                "phase": phase.index,
                "phase_sparsity": phase.sparsity,
                "lr": self.session.last_lr,
                "train": self.sums.score().plain(),
                "forward_flops": forward_flops,
                "training_flops": self.billing.ledger.training_flops,
                **counts,
            }
        )
        self._time_event(epoch, samples=self.sums.samples)
        self.sums = Sums()

    def _time_event(self, epoch: int, *, samples: int) -> None:
        """Write down the wall time of an epoch, or of the part of it that a stop cuts off."""
        now = time.perf_counter()
        seconds, self._epoch_began = now - self._epoch_began, now
        self.journal.time({"stage": self.name, "epoch": epoch, "seconds": seconds, "samples": samples})

    def _member_name(self) -> str | None:
        """Return the member that the end of this phase is saved as; of sparse phases in a row only the last is one."""
        phase, schedule = self._phase, self.session.sparsifier.method.schedule
        goes_on = phase.is_sparse and phase.stop < schedule.total_steps and schedule.at(phase.stop).is_sparse
        return None if goes_on else self.member_names.get(phase.is_sparse)

    def _phase_event(
        self, model: nn.Module, counts: Mapping[str, Any], score: Score | None, member: str | None
    ) -> None:
        phase, sparsifier = self._phase, self.session.sparsifier
        change = (
            mask_change(self.previous_masks, sparsifier.masks) if self.previous_masks and sparsifier.masks else None
        )
        rows = sparsity_table(model, sparsifier.masks, sparsifier.target_names)
        self.journal.event(
            {
                "event": "phase",
                "stage": self.name,
                "phase": phase.index,
                "start": phase.start,
                "stop": phase.stop,
                "sparsity": phase.sparsity,
                "step": self.session.steps,
                "layers": {row.name: [row.kept, row.size] for row in rows},
                "member": member,
                "mask_change": change
                and {
                    "reactivated": change.new_kept,
                    "iou": change.intersection_over_union,
                    "new_share": change.new_kept_share,
                    "percent": change.paper_percentage,
                },
                **counts,
            }
        )
        if member is not None:
            self._save_member(model, member, score)
        if sparsifier.masks:
            self.previous_masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}

    def _keep_best(self, model: nn.Module, score: Score) -> None:
        """Save the best model so far of its kind, as the hold-out sees it; ties go to the lower loss.

        Where the sparse half is to be quantized, only quantized weights are of its kind.
        """
        phase, sparsifier = self._phase, self.session.sparsifier
        if phase.is_sparse and sparsifier.quantization != sparsifier.method.quantization:
            return
        if phase.is_sparse and phase.sparsity != self.session.sparsifier.method.schedule.final_sparsity:
            return
        if self.member_names.get(phase.is_sparse) == DENSE_START:
            return
        name = "sparse-best" if phase.is_sparse else "dense-best"
        if name in self.best:
            accuracy, loss = self.best[name]
            if not score.is_better_than(Score(loss=loss, accuracy=accuracy)):
                return
        self.best[name] = [score.accuracy, score.loss]
        self._save_member(model, name, score)

    def _save_member(self, model: nn.Module, name: str, score: Score | None) -> None:
        view = self.session.view()
        if self.session.processes.is_first:
            self.pair.save(model, view, name=name, metrics=_holdout(score))

    def _member_model(self) -> nn.Module:
        """Return the model that a phase's end is judged and saved by: its batch norms recalibrated if asked for."""
        model = self.session.evaluated_model()
        limit = self.session.settings.train.recalibrate_batches
        if not limit:
            return model
        recalibrated = copy.deepcopy(model)
        recalibrate_batch_norm(recalibrated, (inputs for inputs, _ in islice(self.train.epoch(0), limit)))
        return recalibrated

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the stage depends on."""
        return {
            "session": self.session.state_dict(),
            **self.billing.state_dict(),
            "sums": vars(self.sums).copy(),
            "best": dict(self.best),
            "previous_masks": self.session.whole(dict(self.previous_masks), keep=self.session.processes.is_first),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, branch: bool = False) -> None:
        """Load what `state_dict` returned, on a branch that of the end of a dense phase of another method."""
        self.session.load_state_dict(state["session"], branch=branch)
        self.billing.load_state_dict(state)
        self.sums = Sums(**state["sums"])
        self.best = dict(state["best"])
        masks = {name: mask.to(self.session.device) for name, mask in state["previous_masks"].items()}
        self.previous_masks = cut(masks, self.session.sparsifier.weights)


def _holdout(score: Score | None) -> dict[str, JSON]:
    return {"holdout": {**score.plain()}} if score else {}
