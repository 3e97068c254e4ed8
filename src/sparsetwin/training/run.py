"""A whole run in its folder: the main stage, the fine-tuning of the dense half, the final test; stops and resumes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsetwin.checkpoint import JSON, CheckpointStore, Pair
from sparsetwin.errors import CheckpointError, ConfigError
from sparsetwin.methods import Dense, Method
from sparsetwin.metrics import ForwardFlops, count_forward_flops, nonzero_counts, training_flops
from sparsetwin.schedules import constant
from sparsetwin.targets import Targets
from sparsetwin.training.environment import seed_everything
from sparsetwin.training.evaluate import evaluate
from sparsetwin.training.journal import Journal, Listener
from sparsetwin.training.run_folder import RunFolder
from sparsetwin.training.session import LoopSettings, Session
from sparsetwin.training.stage import Batches, Stage

MAIN, FINETUNE, FINAL = "main", "dense-finetune", "final"
_VERSION = 1


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


class Run:
    """Train, from the start or from the last good checkpoint, to a tested pair.

    Args:
        folder: Where ``run.json`` lies already.
        parts: Model, data, method and settings.
        listeners: Told what happens.
    """

    def __init__(self, folder: RunFolder, parts: RunParts, *, listeners: Sequence[Listener] = ()) -> None:
        self.folder = folder
        self.parts = parts
        self.journal = Journal(folder, listeners)
        self.store = CheckpointStore(folder.checkpoints)
        self.pair = Pair(folder.pair)
        self._stage: Stage | None = None
        self._stop_requested = False
        self._spent = 0  # training FLOPs of stages that ended
        self._forward: ForwardFlops | None = None
        self._branch_step = self._find_branch_step()

    @property
    def is_finished(self) -> bool:
        """Whether the final test is written; nothing is left to do then but to verify."""
        if not self.folder.metrics.exists():
            return False
        lines = self.folder.metrics.read_text().splitlines()
        return bool(lines) and json.loads(lines[-1])["event"] == FINAL

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
            TrainingError: If the loss is not finite.
            CheckpointError: If no checkpoint can be used, or none can be written.
        """
        found = self.store.latest()
        state: Mapping[str, Any] | None = found[1] if found else None
        if state is None:
            self.journal.rewind(0)
            stage = self._begin(MAIN)
            self._start_event()
        else:
            _check_version(state)
            self.journal.rewind(state["log_size"])
            self._spent = state["spent"]
            if state["stage"] == FINAL:
                return self._finish()
            stage = self._begin(state["stage"])
            stage.load_state_dict(state["state"])
        if not self._run_stage(stage):
            return False
        if stage.name == MAIN and self._branch_step is not None:
            self._spent += stage.ledger.training_flops
            stage = self._begin(FINETUNE)
            stage.load_state_dict(self._branch_state(), branch=True)
            self._spent -= stage.ledger.training_flops  # the common part was paid for once
            if not self._run_stage(stage):
                return False
        self._spent += stage.ledger.training_flops
        self._stage = None
        self._save({"stage": FINAL, "state": {}}, step=2 * self.parts.settings.total_steps)
        return self._finish()

    def _run_stage(self, stage: Stage) -> bool:
        stage.stop_requested = self._stop_requested
        return stage.run()

    def _find_branch_step(self) -> int | None:
        """Return the end of the last dense phase that a sparse one follows, if the dense half is to be fine-tuned."""
        if not self.parts.settings.train.dense_finetune:
            return None
        phases = self.parts.method.schedule.phases
        ends = [a.stop for a, b in pairwise(phases) if b.is_sparse and not a.is_sparse]
        if not ends:
            raise ConfigError("dense_finetune needs a schedule in which a sparse phase follows a dense one")
        return ends[-1]

    def _begin(self, name: str) -> Stage:
        parts = self.parts
        finetunes = self._branch_step is not None
        if name == MAIN:
            seed_everything(parts.seed)
            method, names = parts.method, {False: "dense-raw" if finetunes else "dense", True: "sparse"}
        else:
            method = Dense(schedule=constant(sparsity=0.0, total_steps=parts.settings.total_steps))
            names = {False: "dense"}
        model = parts.make_model()
        if self._forward is None:
            self._forward = count_forward_flops(model, parts.splits.example_input)
        session = Session(model, method, targets=parts.targets, settings=parts.settings, seed=parts.seed)
        self._stage = Stage(
            name=name,
            session=session,
            train=parts.splits.train,
            holdout=parts.splits.holdout,
            forward=self._forward,
            journal=self.journal,
            pair=self.pair,
            member_names=names,
            branch_step=self._branch_step if name == MAIN else None,
            on_checkpoint=self._checkpoint,
            on_branch=self._keep_branch,
        )
        return self._stage

    def _start_event(self) -> None:
        stage, settings = self._stage, self.parts.settings
        assert stage is not None
        samples = settings.total_steps * settings.train.batch_size
        self.journal.event(
            {
                "event": "start",
                "stage": MAIN,
                "phases": [[phase.start, phase.stop, phase.sparsity] for phase in self.parts.method.schedule.phases],
                "steps_per_epoch": settings.steps_per_epoch,
                "epochs": settings.train.epochs,
                "targets": {name: weight.numel() for name, weight in stage.session.sparsifier.weights.items()},
                "parameters": sum(parameter.numel() for parameter in stage.session.model.parameters()),
                "dense_forward_flops": stage.forward.total(),
                "dense_training_flops": training_flops(stage.forward.total(), samples),
            }
        )

    # Checkpoints

    def _checkpoint(self) -> None:
        stage = self._stage
        assert stage is not None
        step = stage.session.steps
        if stage.name == FINETUNE:  # counts on from the end of the main stage
            step += self.parts.settings.total_steps - (self._branch_step or 0)
        self._save({"stage": stage.name, "state": stage.state_dict()}, step=step)

    def _keep_branch(self) -> None:
        assert self._stage is not None
        assert self._branch_step is not None
        self.store.save(self._stage.state_dict(), step=self._branch_step, name="branch")

    def _branch_state(self) -> Mapping[str, Any]:
        step, state = self.store.load_named("branch")
        if step != self._branch_step:
            raise CheckpointError(
                f"the branch point was saved at step {step}; this schedule has it at {self._branch_step}"
            )
        return state

    def _save(self, state: Mapping[str, Any], *, step: int) -> None:
        common = {"version": _VERSION, "log_size": self.journal.size, "spent": self._spent}
        self.store.save({**common, **state}, step=step)

    # The end

    def _finish(self) -> bool:
        """Read the test set once for each member and write what came out."""
        parts = self.parts
        model = parts.make_model()
        forward = self._forward or count_forward_flops(model, parts.splits.example_input)
        train = parts.settings.train
        members: dict[str, Any] = {}
        for name, member in self.pair.members.items():
            loaded = self.pair.load(name, model)
            score = evaluate(
                loaded, parts.splits.test.epoch(0), precision=train.precision, channels_last=train.channels_last
            )
            metrics: dict[str, JSON] = {**member.metrics, "test": {**score.plain()}}
            self.pair.annotate(name, metrics)
            members[name] = {
                "sparsity": member.sparsity,
                "kept": member.kept,
                "targets": member.targets,
                "step": member.step,
                "file_bytes": (self.folder.pair / member.file).stat().st_size,
                "forward_flops": forward.total(nonzero_counts(loaded)),
                "holdout": member.metrics.get("holdout"),
                "test": score.plain(),
            }
        samples = parts.settings.total_steps * train.batch_size
        self.journal.event(
            {
                "event": "final",
                "members": members,
                "training_flops": self._spent,
                "dense_training_flops": training_flops(forward.total(), samples),
                "dense_forward_flops": forward.total(),
                "dense_file_bytes": members["dense"]["file_bytes"] if "dense" in members else None,
            }
        )
        return True


def _check_version(state: Mapping[str, Any]) -> None:
    if state.get("version") != _VERSION:
        raise CheckpointError(
            f"the checkpoint is of version {state.get('version')!r}; this release reads version {_VERSION}"
        )
