"""A whole run in its folder: the main stage, the fine-tuning of the dense half, the final test; stops and resumes."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsetwin.checkpoint import CheckpointStore, CheckpointWarning, Pair
from sparsetwin.errors import CheckpointError, TrainingError
from sparsetwin.methods import Dense, Method
from sparsetwin.metrics import ForwardFlops, count_forward_flops, training_flops
from sparsetwin.schedules import constant
from sparsetwin.targets import Targets
from sparsetwin.training.billing import Billing
from sparsetwin.training.branching import finetuning_step, has_dense_half
from sparsetwin.training.environment import seed_everything
from sparsetwin.training.journal import Journal, Listener
from sparsetwin.training.members import score_members
from sparsetwin.training.processes import ALONE, Processes, is_of_another
from sparsetwin.training.run_folder import FINAL_EVENT, RunFolder
from sparsetwin.training.run_state import check_state
from sparsetwin.training.session import LoopSettings, Session
from sparsetwin.training.stage import DENSE_START, Batches, Stage

MAIN, FINETUNE, FINAL = "main", "dense-finetune", FINAL_EVENT
_BRANCH = "branch"  # name of the checkpoint from which the dense half is trained on
_VERSION = 1
_SEEDS_APART = 1_000_003  # between the seeds of processes


class Splits(Protocol):
    """A data set; `sparsetwin.data.Splits` is one."""

    @property
    def train(self) -> Batches:
        """What weights are trained on."""

    @property
    def holdout(self) -> Batches:
        """What makes the choices; may have no batches."""

    @property
    def test(self) -> Batches:
        """What is read once, at the end."""

    @property
    def example_input(self) -> Tensor:
        """(1, ...): one sample."""

    @property
    def notice(self) -> str:
        """Origin and licence of the data, in one line."""


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run is made of."""

    make_model: Callable[[], nn.Module]  # called after seeding; on the device
    splits: Splits
    method: Method
    targets: Targets
    settings: LoopSettings
    seed: int
    device: torch.device
    processes: Processes = ALONE
    make_teacher: Callable[[], nn.Module] | None = None  # a trained network to distil from
    begin_with: Callable[[nn.Module], None] | None = None  # gives the model, at step 0, weights to begin with


class Run:
    """Train, from the start or from the last good checkpoint, to a tested pair.

    Args:
        folder: Where ``run.json`` lies already.
        parts: Model, data, method and settings.
        listeners: Told what happens.

    Raises:
        ConfigError: If the dense half is to be fine-tuned and the schedule has no place for it.
    """

    def __init__(self, folder: RunFolder, parts: RunParts, *, listeners: Sequence[Listener] = ()) -> None:
        self.folder = folder
        self.parts = parts
        self.processes = parts.processes
        self.journal = Journal(folder, listeners, writes=self.processes.is_first)
        self.store = CheckpointStore(folder.checkpoints)
        self.pair = Pair(folder.pair, notice=parts.splits.notice)
        self._config = self.processes.of_first(folder.read).get("config")
        self._stage: Stage | None = None
        self._stop_requested = False
        self._spent = 0  # training FLOPs of stages that ended
        self._forward: ForwardFlops | None = None
        self._branch_step = finetuning_step(parts.method) if parts.settings.train.dense_finetune else None

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Tell these listeners, too, what happens from here on."""
        self.journal.listen(listeners)

    def request_stop(self) -> None:
        """Ask for a checkpoint and a stop after the step in progress; safe to call from a signal handler."""
        self._stop_requested = True
        if self._stage is not None:
            self._stage.stop_requested = True

    def execute(self) -> bool:
        """Train and test.

        Returns:
            Whether the run is finished; False if it was stopped on request.

        Raises:
            TrainingError: If the loss or a weight is not finite; the last checkpoint is kept.
            CheckpointError: If no checkpoint can be used, or none can be written.
            StateError: If the checkpoint is of another model or method.
            UsageError: If another process trains in the folder.
        """
        with ExitStack() as stack:
            self.processes.of_first(lambda: stack.enter_context(self.folder.locked()))
            state = self._latest()
            with self._saying_what_is_kept():
                return self._course(state)

    # The course

    def _course(self, state: Mapping[str, Any] | None) -> bool:
        if state is not None and state["stage"] == FINAL:
            return self._finish()
        stage = self._begin(MAIN if state is None else state["stage"], is_new=state is None)
        if state is None:
            self._start_event()
        else:
            stage.load_state_dict(state["state"])
        if not stage.run():
            return False
        if stage.name == MAIN and self._branch_step is not None:
            self._spent += stage.billing.ledger.training_flops
            state = self._branch_state()
            stage = self._begin(FINETUNE)
            stage.load_state_dict(state, branch=True)
            self._spent -= stage.billing.ledger.training_flops  # the common part was paid for once
            if not stage.run():
                return False
        self._spent += stage.billing.ledger.training_flops
        self._stage = None
        self._save({"stage": FINAL, "state": {}}, step=2 * self.parts.settings.total_steps)
        return self._finish()

    def _begin(self, name: str, *, is_new: bool = False) -> Stage:
        parts = self.parts
        if name == MAIN:
            method, dense = parts.method, self._dense_name()
        else:
            schedule = constant(sparsity=0.0, total_steps=parts.settings.total_steps)
            method, dense = Dense(schedule=schedule, ham=parts.method.ham), "dense"
        model = self._make_model()
        if is_new and parts.begin_with is not None:
            parts.begin_with(model)
        forward = self._forward_flops(model)
        teacher = parts.make_teacher() if parts.make_teacher is not None else None
        example = parts.splits.example_input
        teacher_flops = forward.total() if teacher is None else count_forward_flops(teacher, example).total()
        session = Session(
            model,
            method,
            targets=parts.targets,
            settings=parts.settings,
            seed=parts.seed,
            processes=self.processes,
            sample_batch=self._sample_batch,
            teacher=teacher,
        )
        if not self.processes.is_first:
            seed_everything(parts.seed + _SEEDS_APART * self.processes.rank)  # dropout differs from part to part
        self._stage = Stage(
            name=name,
            session=session,
            train=parts.splits.train,
            holdout=parts.splits.holdout,
            billing=Billing(session, forward, teacher_flops=teacher_flops),
            journal=self.journal,
            pair=self.pair,
            member_names={False: dense, True: "sparse"},
            branch_step=self._branch_step if name == MAIN else None,
            on_checkpoint=self._checkpoint,
            on_branch=self._keep_branch,
        )
        self._stage.stop_requested = self._stop_requested
        return self._stage

    def _dense_name(self) -> str:
        """Return the member's name of what the last dense phase leaves."""
        if self._branch_step is not None:
            return "dense-raw"
        return "dense" if has_dense_half(self.parts.method) else DENSE_START

    def _sample_batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the n-th batch for sampling gradients, the same one every time."""
        epoch, start = divmod(index, len(self.parts.splits.train))
        return next(iter(self.parts.splits.train.epoch(epoch, start=start)))

    def _make_model(self) -> nn.Module:
        """Make the model with the same draws every time, as it may keep some that its state does not hold."""
        seed_everything(self.parts.seed)
        return self.parts.make_model()

    def _forward_flops(self, model: nn.Module) -> ForwardFlops:
        if self._forward is None:
            self._forward = count_forward_flops(model, self.parts.splits.example_input)
        return self._forward

    def _dense_training_flops(self, forward: ForwardFlops) -> int:
        """Return the FLOPs of one dense training, whose last batch of an epoch may be partial."""
        parts = self.parts
        return training_flops(forward.total(), parts.settings.train.epochs * parts.splits.train.samples)

    def _start_event(self) -> None:
        stage, settings = self._stage, self.parts.settings
        assert stage is not None
        self.journal.event(
            {
                "event": "start",
                "stage": MAIN,
                "phases": [[phase.start, phase.stop, phase.sparsity] for phase in self.parts.method.schedule.phases],
                "steps_per_epoch": settings.steps_per_epoch,
                "epochs": settings.train.epochs,
                "targets": {name: weight.numel() for name, weight in stage.session.sparsifier.weights.items()},
                "parameters": sum(parameter.numel() for parameter in stage.session.model.parameters()),
                "dense_forward_flops": stage.billing.forward.total(),
                "dense_training_flops": self._dense_training_flops(stage.billing.forward),
                **_quantized_from(self.parts.method),
                **({"uncounted": list(stage.billing.forward.uncounted)} if stage.billing.forward.uncounted else {}),
            }
        )

    def _finish(self) -> bool:
        """Test the members, if they are to be tested, and write the last line."""
        model = self._make_model()
        forward = self._forward_flops(model)
        members = score_members(
            self.pair,
            model,
            (lambda: self.parts.splits.test.epoch(0)) if self.parts.settings.train.test else None,
            forward=forward,
            settings=self.parts.settings.train,
            processes=self.processes,
        )
        self.journal.event(
            {
                "event": FINAL,
                "members": members,
                "training_flops": self._spent,
                "dense_training_flops": self._dense_training_flops(forward),
                "dense_forward_flops": forward.total(),
                "dense_file_bytes": members["dense"]["file_bytes"] if "dense" in members else None,
            }
        )
        return True

    # Checkpoints

    def _latest(self) -> Mapping[str, Any] | None:
        """Return the newest good checkpoint, with the logs as they were then; None begins at step 0."""
        state = self.processes.of_first(self._read_latest)
        if state is not None:
            self._spent = state["spent"]
        return state

    def _read_latest(self) -> Mapping[str, Any] | None:
        try:
            found = self.store.latest()
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self._how_to_begin_again()}") from error
        if found is None:
            self.journal.rewind({})
            return None
        state = found[1]
        check_state(state, version=_VERSION, config=self._config, where=str(self.folder.description))
        self.journal.rewind(state["log_sizes"])
        if state["stage"] == MAIN and self._branch_step is not None and state["step"] >= self._branch_step:
            self._warn_of_lost_branch()
        return state

    def _checkpoint(self) -> None:
        stage = self._stage
        assert stage is not None
        step = stage.session.steps
        if stage.name == FINETUNE:  # counts on from the end of the main stage
            step += self.parts.settings.total_steps - (self._branch_step or 0)
        self._save({"stage": stage.name, "state": stage.state_dict()}, step=step)

    def _save(self, state: Mapping[str, Any], *, step: int) -> None:
        if not self.processes.is_first:
            return
        common = {
            "version": _VERSION,
            "config": self._config,
            "step": step,
            "log_sizes": self.journal.sizes,
            "spent": self._spent,
        }
        self.store.save({**common, **state}, step=step)

    def _keep_branch(self) -> None:
        assert self._stage is not None
        assert self._branch_step is not None
        state = self._stage.state_dict()
        if self.processes.is_first:
            self.store.save(state, step=self._branch_step, name=_BRANCH)

    def _branch_state(self) -> Mapping[str, Any]:
        return self.processes.of_first(self._read_branch)

    def _read_branch(self) -> Mapping[str, Any]:
        try:
            return self.store.load_named(_BRANCH)[1]
        except CheckpointError as error:
            raise CheckpointError(
                f"the dense half cannot be trained on: {error}. The sparse half is finished, in {self.folder.pair}. "
                f"{self._how_to_begin_again()}"
            ) from error

    def _warn_of_lost_branch(self) -> None:
        """Say early what would stop the run at the end of the sparse half, which is worth finishing all the same."""
        try:
            self.store.load_named(_BRANCH)
        except CheckpointError as error:
            warnings.warn(
                f"{error}; the sparse half is trained to its end, the dense half cannot be trained on after it",
                CheckpointWarning,
                stacklevel=2,
            )

    # What to say when it fails

    def _how_to_begin_again(self) -> str:
        return f"To train the whole run again from step 0, remove {self.folder.checkpoints} and resume"

    @contextmanager
    def _saying_what_is_kept(self) -> Iterator[None]:
        try:
            yield
        except TrainingError as error:
            if self.folder.is_untrained:
                raise
            steps = self.store.steps
            kept = f" The checkpoint of step {steps[-1]} is kept" if steps else ""
            raise TrainingError(
                f"{error}. Resuming leads here again; train with other settings into another folder (--out).{kept}"
            ) from error
        except CheckpointError as error:
            is_from_disk = error.__cause__ is not None and not isinstance(error.__cause__, CheckpointError)
            if self.folder.is_untrained or not is_from_disk:
                raise
            raise CheckpointError(
                f"{error}. The run is kept; once there is space, continue with: sparsetwin resume {self.folder.path}"
            ) from error
        except RuntimeError as error:
            if not self.processes.are_many or not is_of_another(error):
                raise
            found = str(error).split(". ")[0]
            raise TrainingError(
                f"another process of this run has stopped or cannot be reached ({found}); continue from the last "
                f"checkpoint, with as many processes for the same bits, with: sparsetwin resume {self.folder.path}"
            ) from error


def _quantized_from(method: Method) -> dict[str, int]:
    """Return what the first line of a run tells of the quantization of its method, if it has one."""
    return {} if method.quantization is None else {"int8_step": method.quantization.first_step(method.schedule)}
