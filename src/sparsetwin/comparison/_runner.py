"""Runs of a comparison as processes of their own, several at a time; what has finished is never run again."""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from sparsetwin.comparison._contenders import changed
from sparsetwin.comparison._plan import Outcome, Plan, Task
from sparsetwin.comparison._tasks import tasks
from sparsetwin.errors import ConfigError, SparsetwinError, TrainingError, UsageError
from sparsetwin.recipes import Recipe, build_run, describe, recipe_from_plain
from sparsetwin.report import read_run, write_report
from sparsetwin.training import OWN, RunFolder, choose_device

FAILED = "failed.txt"
"""File in the folder of a run whose training came to nothing: why."""

Keep = Literal["all", "pairs", "records"]
"""What stays of a run that has ended: everything, all but its checkpoints, or its record alone."""

_STOPPED, _ERROR = 130, 1
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
if _FORKS:
    _CONTEXT.set_forkserver_preload(["sparsetwin.comparison", "torch._dynamo"])


@dataclass(frozen=True)
class Progress:
    """How far a comparison is."""

    finished: int
    failed: int
    known: int  # runs that can be planned so far; more may follow from their results
    running: tuple[str, ...]  # folders


@dataclass(kw_only=True)
class Runner:
    """Runs that are due, ``jobs`` at a time.

    Args:
        out: Folder of the comparison.
        recipe_name: For ``run.json``.
        data: Folder of the data set, if the recipe needs one.
        jobs: Runs at a time, at least 1.
        keep: What stays of a run that has ended: "all"; "pairs", all but checkpoints; "records", neither checkpoints
            nor pairs, but for those of dense runs, from which others may begin.
        on_progress: Told whenever a run begins or ends.

    Raises:
        ConfigError: If ``jobs`` is less than 1.
    """

    out: Path
    recipe_name: str
    data: Path | None
    jobs: int
    keep: Keep = "all"
    on_progress: Callable[[Progress], None] = lambda progress: None
    _running: dict[Path, tuple[BaseProcess, Path]] = field(default_factory=dict)
    _logs: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)
    _begun: int = 0

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ConfigError(f"a comparison needs at least one run at a time, got jobs = {self.jobs}")

    def run(self, plan: Plan) -> list[Task]:
        """Run everything that is not finished; return all tasks.

        Raises:
            TrainingError: If a run ends for another reason than that training came to nothing.
            UsageError: If a run was begun with other settings, as another version may have chosen them.
            KeyboardInterrupt: After every running process has saved where it is.
        """
        outcomes: dict[Path, Outcome] = {}
        try:
            while True:
                known = self._known(plan, outcomes)
                for task in known:
                    if task.folder in outcomes and task.folder not in self._running:
                        self._trim(task)
                due = [task for task in known if task.folder not in outcomes and task.folder not in self._running]
                if not due and not self._running:
                    return known
                for task in due[: max(0, self.jobs - len(self._running))]:
                    self._start(task)
                self._tell(known, outcomes)
                self._wait_for_one()
        except BaseException:
            self._stop()
            raise

    def _known(self, plan: Plan, outcomes: dict[Path, Outcome]) -> list[Task]:
        """Return all tasks that can be planned, having read the outcomes of those that have ended."""
        while True:
            known = list(tasks(plan, outcomes))
            found = {t.folder: o for t in known if t.folder not in outcomes and (o := outcome(self.out / t.folder))}
            if not found:
                return known
            for task in known:
                if task.folder in found:
                    self._check(task)
            outcomes |= found

    def _check(self, task: Task) -> None:
        """Refuse a folder whose run has other settings than the task: its numbers would stand for what they are not."""
        there = _settings(recipe_from_plain(RunFolder(self.out / task.folder).read()["config"]))
        here = _settings(task.recipe)
        if unlike := sorted(name for name in {*there, *here} if there.get(name) != here.get(name)):
            raise UsageError(
                f"the run in {self.out / task.folder} has other settings than this comparison would give it "
                f"({', '.join(unlike)}); another version of sparsetwin may have begun it. Go on with that version, or "
                "choose another folder (--out)"
            )

    def _trim(self, task: Task) -> None:
        if self.keep != "all":
            is_start = task.recipe.method.name == "dense"
            RunFolder(self.out / task.folder).keep_only(pair=self.keep == "pairs" or is_start)

    def _start(self, task: Task) -> None:
        folder = RunFolder(self.out / task.folder)
        if folder.description.exists():
            self._check(task)
        else:
            recipe = task.recipe
            if task.pretrained is not None:
                recipe = changed(recipe, {"pretrained": str(self.out / task.pretrained)})
            device = choose_device(recipe.device)
            described = describe(
                recipe, name=self.recipe_name, data=self.data, command="sparsetwin compare", device=device
            )
            folder.create({**described, "threads": recipe.threads or torch.get_num_threads()})
        log = Path(self._logs.name) / f"{self._begun}.txt"
        log.touch()
        self._begun += 1
        process = _CONTEXT.Process(target=train_quietly, args=(folder.path, log, self.data), daemon=False)
        process.start()
        self._running[task.folder] = (process, log)

    def _wait_for_one(self) -> None:
        """Wait until a process ends; one that was not brought to an end by its training stops the comparison."""
        connection.wait([process.sentinel for process, _ in self._running.values()])
        for folder, (process, log) in list(self._running.items()):
            if process.is_alive():
                continue
            process.join()
            del self._running[folder]
            if process.exitcode:
                said = log.read_text(encoding="utf-8", errors="replace").strip()
                raise TrainingError(
                    f"the run in {self.out / folder} stopped with code {process.exitcode}: "
                    f"{said[-2000:] or 'no message'}. All others are saved; the same command goes on with them"
                )

    def _stop(self) -> None:
        for process, _ in self._running.values():
            process.terminate()  # saves and stops
        for process, _ in self._running.values():
            process.join()
        self._running.clear()

    def _tell(self, known: list[Task], outcomes: Mapping[Path, Outcome]) -> None:
        failed = sum((self.out / folder / FAILED).exists() for folder in outcomes)
        self.on_progress(Progress(len(outcomes), failed, len(known), tuple(map(str, self._running))))


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's sections as JSON has them, without what changes nothing in training.

    That are the places of trained networks, which may be moved, and whether the result is tested.
    """
    recipe = changed(recipe, {"train.test": True})
    if recipe.train.teacher not in (None, OWN):
        recipe = changed(recipe, {"train.teacher": "elsewhere"})
    return changed(recipe, {"pretrained": None}).plain()


def train_quietly(path: Path, log: Path, data: Path | None) -> None:
    """Go on with a run, from wherever it is, in a process that is there for it alone.

    The process ends with code 0 once the run has ended or has come to nothing, which is written down beside it then.

    Args:
        path: The run folder.
        log: What is said goes there.
        data: Folder of the data set, wherever it was when the run began.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # an interrupt from the terminal is for the comparison, which then asks every run to stop
    with log.open("w", encoding="utf-8", buffering=1) as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.stdout = sys.stderr = said
        try:
            finished = _train(RunFolder(path), data)
        except TrainingError as error:
            (path / FAILED).write_text(f"{error}\n", encoding="utf-8")
            return
        except SparsetwinError as error:
            print(error)
            sys.exit(_ERROR)
    if not finished:
        sys.exit(_STOPPED)


def _train(folder: RunFolder, data: Path | None) -> bool:
    described = folder.read()
    torch.set_num_threads(described["threads"])
    run = build_run(recipe_from_plain(described["config"]), folder, data=data)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: run.request_stop())
    threading.Thread(target=_after_parent, args=(run.request_stop,), daemon=True).start()
    finished = run.execute()
    if finished:
        write_report([folder.path], folder.report)
    return finished


def _after_parent(stop: Callable[[], None]) -> None:
    """Call ``stop`` when the comparison is gone, even killed: nobody waits for this run's result any more."""
    if parent := multiprocessing.parent_process():
        connection.wait([parent.sentinel])
        stop()


def outcome(folder: Path) -> Outcome | None:
    """Return what a run has come to; None if it has not ended."""
    if (folder / FAILED).exists():
        return Outcome(holdout=float("nan"), training_flops=0)
    if not (folder / "run.json").exists() or not RunFolder(folder).is_finished:
        return None
    final = read_run(folder).final
    assert final is not None
    member = final.members.get("sparse") or final.members["dense"]
    held = member.holdout.accuracy if member.holdout else float("nan")
    return Outcome(
        holdout=held,
        training_flops=final.training_flops,
        forward_flops=member.forward_flops,
        sparsity=member.sparsity,
    )
