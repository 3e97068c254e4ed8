"""What a run folder says, read and checked: ``run.json``, ``metrics.jsonl`` and, where there is one, ``timing.jsonl``.

Nothing here needs the model, its weights or the data.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from sparsetwin.errors import CheckpointError
from sparsetwin.report._records import Record, read_lines, read_object
from sparsetwin.schedules import Phase

RUN_VERSION = 1  # of run.json
MAIN_STAGE = "main"  # the run itself; other stages, such as the fine-tuning of the dense half, branch off it


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a network does on one split."""

    loss: float  # NaN where the run gives none
    accuracy: float  # fraction of samples; NaN where the run gives none


@dataclass(frozen=True, kw_only=True)
class Start:
    """A stage as it was planned."""

    phases: tuple[Phase, ...]
    steps_per_epoch: int
    epochs: int
    targets: dict[str, int]  # weights by name
    parameters: int
    dense_forward_flops: int  # a sample
    dense_training_flops: int  # of as many epochs without any sparsity
    int8_step: int | None = None  # from which on weights are rounded to int8; None if they are not
    uncounted: tuple[str, ...] = ()  # weights whose FLOPs are in none of these numbers

    @property
    def target_count(self) -> int:
        """Weights that may be pruned."""
        return sum(self.targets.values())


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One finished epoch."""

    stage: str
    epoch: int  # finished ones, from 1; a stage that branches off counts on from its branch
    step: int
    phase: int
    phase_sparsity: float
    learning_rate: float
    train: Quality
    holdout: Quality | None
    kept: int
    zeros: int  # exact zeros among the targets
    forward_flops: int  # a sample
    training_flops: int  # since the run began, along the stage's own branch


@dataclass(frozen=True, kw_only=True)
class MaskChange:
    """How a sparse phase's mask differs from the one before it."""

    reactivated: int  # weights that were pruned and are kept
    iou: float  # intersection over union of the two supports
    new_share: float  # of the kept weights, those that were pruned before
    percent: float  # of all target weights, those whose mask changed beyond the change in sparsity


@dataclass(frozen=True, kw_only=True)
class PhaseEnd:
    """The state at the end of one phase."""

    stage: str
    index: int
    start: int
    stop: int
    sparsity: float
    step: int
    holdout: Quality | None
    layers: dict[str, tuple[int, int]]  # name -> kept weights, weights
    zeros: int
    mask_change: MaskChange | None
    member: str | None  # of the pair, that this phase ended with

    @property
    def is_sparse(self) -> bool:
        """Whether masks were in force."""
        return self.sparsity > 0


@dataclass(frozen=True, kw_only=True)
class AsInt8:
    """A network as a file of int8 values gives it back."""

    file_bytes: int
    test: Quality


@dataclass(frozen=True, kw_only=True)
class Member:
    """One network that the run leaves behind."""

    name: str
    sparsity: float
    kept: int
    targets: int
    step: int
    file_bytes: int
    forward_flops: int
    holdout: Quality | None
    test: Quality | None  # None of a run that was not to look at the test set
    int8: AsInt8 | None = None  # None of dense members, and where the run did not look


@dataclass(frozen=True, kw_only=True)
class Final:
    """What a finished run comes to."""

    members: dict[str, Member]
    training_flops: int  # of all stages, what they have in common counted once
    dense_training_flops: int
    dense_forward_flops: int
    dense_file_bytes: int | None  # None where the run leaves no dense member


@dataclass(frozen=True, kw_only=True)
class EpochTime:
    """Wall time of one epoch."""

    stage: str
    epoch: int
    seconds: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run folder says."""

    folder: Path
    recipe: str
    config: dict[str, object]
    seed: int
    threads: int
    versions: dict[str, object]
    git_commit: str | None
    machine: dict[str, object]
    created: str
    command: str | None
    start: Start  # of the main stage
    epochs: tuple[Epoch, ...]  # of all stages
    phases: tuple[PhaseEnd, ...]  # of all stages
    final: Final | None  # None while the run goes on
    times: tuple[EpochTime, ...]
    unknown_events: tuple[str, ...]  # names of events that this version does not know

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its last line."""
        return self.final is not None

    @property
    def main(self) -> tuple[Epoch, ...]:
        """Epochs of the main stage."""
        return tuple(epoch for epoch in self.epochs if epoch.stage == MAIN_STAGE)

    @property
    def main_phases(self) -> tuple[PhaseEnd, ...]:
        """Phases of the main stage that have ended."""
        return tuple(phase for phase in self.phases if phase.stage == MAIN_STAGE)

    @property
    def branches(self) -> dict[str, tuple[Epoch, ...]]:
        """Epochs of every other stage, each after the main epoch that it branches off, by stage."""
        stages = dict.fromkeys(epoch.stage for epoch in self.epochs if epoch.stage != MAIN_STAGE)
        return {stage: self._branch(stage) for stage in stages}

    @property
    def training_flops(self) -> int:
        """Training FLOPs spent so far in all stages, what they have in common counted once."""
        if self.final is not None:
            return self.final.training_flops
        main = self.main[-1].training_flops if self.main else 0
        return main + sum(epochs[-1].training_flops - epochs[0].training_flops for epochs in self.branches.values())

    def _branch(self, stage: str) -> tuple[Epoch, ...]:
        epochs = [epoch for epoch in self.epochs if epoch.stage == stage]
        roots = [epoch for epoch in self.main if epoch.epoch == epochs[0].epoch - 1]
        return (*roots, *epochs)


def read_run(folder: str | Path) -> Run:
    """Read a run folder; a run that still goes on has no ``final``.

    Args:
        folder: As ``sparsetwin train`` wrote it.

    Raises:
        CheckpointError: If a file is missing, malformed or of a version that this library does not know; the message
            names the file and the line.
    """
    folder = Path(folder)
    run = read_object(folder / "run.json")
    if run.fields.get("version") != RUN_VERSION:
        raise CheckpointError(
            f"{run.place} has version {run.fields.get('version')!r}, this library reads {RUN_VERSION}"
        )
    starts: dict[str, Start] = {}
    epochs: list[Epoch] = []
    phases: list[PhaseEnd] = []
    final: Final | None = None
    unknown: dict[str, None] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        match line.text("event"):
            case "start":
                starts[line.text("stage")] = _start(line)
            case "epoch":
                epochs.append(_epoch(line))
            case "phase":
                phases.append(_phase(line))
            case "final":
                final = _final(line)
            case event:
                unknown[event] = None
    if MAIN_STAGE not in starts:
        raise CheckpointError(f"{folder / 'metrics.jsonl'} has no start line yet; report again once training has begun")
    return Run(
        folder=folder,
        recipe=run.text("recipe"),
        config=run.record("config").fields,
        seed=run.integer("seed"),
        threads=run.integer("threads"),
        versions=run.record("versions").fields,
        git_commit=run.optional_text("git_commit"),
        machine=run.record("machine").fields,
        created=run.text("created"),
        command=run.optional_text("command"),
        start=starts[MAIN_STAGE],
        epochs=tuple(epochs),
        phases=tuple(phases),
        final=final,
        times=_times(folder / "timing.jsonl"),
        unknown_events=tuple(unknown),
    )


def _start(line: Record) -> Start:
    targets = line.record("targets")
    return Start(
        phases=tuple(
            Phase(index, int(start), int(stop), float(sparsity))
            for index, (start, stop, sparsity) in enumerate(line.rows("phases", length=3))
        ),
        steps_per_epoch=line.integer("steps_per_epoch"),
        epochs=line.integer("epochs"),
        targets={name: targets.integer(name) for name in targets.fields},
        parameters=line.integer("parameters"),
        dense_forward_flops=line.integer("dense_forward_flops"),
        dense_training_flops=line.integer("dense_training_flops"),
        int8_step=line.integer("int8_step") if line.has("int8_step") else None,
        uncounted=tuple(line.texts("uncounted")) if line.has("uncounted") else (),
    )


def _epoch(line: Record) -> Epoch:
    return Epoch(
        stage=line.text("stage"),
        epoch=line.integer("epoch"),
        step=line.integer("step"),
        phase=line.integer("phase"),
        phase_sparsity=line.fraction("phase_sparsity"),
        learning_rate=line.number("lr"),
        train=_quality(line.record("train")),
        holdout=_optional_quality(line, "holdout"),
        kept=line.integer("kept"),
        zeros=line.integer("zeros"),
        forward_flops=line.integer("forward_flops"),
        training_flops=line.integer("training_flops"),
    )


def _phase(line: Record) -> PhaseEnd:
    layers = line.record("layers")
    kept_of = {name: layers.row(name, length=2) for name in layers.fields}
    change = line.optional_record("mask_change")
    return PhaseEnd(
        stage=line.text("stage"),
        index=line.integer("phase"),
        start=line.integer("start"),
        stop=line.integer("stop"),
        sparsity=line.fraction("sparsity"),
        step=line.integer("step"),
        holdout=_optional_quality(line, "holdout"),
        layers={name: (int(kept), int(numel)) for name, (kept, numel) in kept_of.items()},
        zeros=line.integer("zeros"),
        mask_change=_mask_change(change) if change else None,
        member=line.optional_text("member"),
    )


def _mask_change(change: Record) -> MaskChange:
    return MaskChange(
        reactivated=change.integer("reactivated"),
        iou=change.fraction("iou"),
        new_share=change.fraction("new_share"),
        percent=change.number("percent"),
    )


def _final(line: Record) -> Final:
    members = line.record("members")
    return Final(
        members={name: _member(members.record(name), name) for name in members.fields},
        training_flops=line.integer("training_flops"),
        dense_training_flops=line.integer("dense_training_flops"),
        dense_forward_flops=line.integer("dense_forward_flops"),
        dense_file_bytes=line.integer("dense_file_bytes") if line.has("dense_file_bytes") else None,
    )


def _member(member: Record, name: str) -> Member:
    int8 = member.optional_record("int8")
    return Member(
        name=name,
        sparsity=member.fraction("sparsity"),
        kept=member.integer("kept"),
        targets=member.integer("targets"),
        step=member.integer("step"),
        file_bytes=member.integer("file_bytes"),
        forward_flops=member.integer("forward_flops"),
        holdout=_optional_quality(member, "holdout"),
        test=_optional_quality(member, "test"),
        int8=AsInt8(file_bytes=int8.integer("file_bytes"), test=_quality(int8.record("test"))) if int8 else None,
    )


def _quality(record: Record) -> Quality:
    return Quality(
        loss=record.number("loss") if record.has("loss") else math.nan,
        accuracy=record.fraction("accuracy") if record.has("accuracy") else math.nan,
    )


def _optional_quality(record: Record, name: str) -> Quality | None:
    found = record.optional_record(name)
    return _quality(found) if found else None


def _times(path: Path) -> tuple[EpochTime, ...]:
    if not path.exists():
        return ()
    return tuple(
        EpochTime(
            stage=line.text("stage"),
            epoch=line.integer("epoch"),
            seconds=line.number("seconds"),
            samples=line.integer("samples"),
        )
        for line in read_lines(path)
    )
