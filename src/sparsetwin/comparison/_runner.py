"""Runs of a comparison as processes of their own, several at a time; what has finished is never run again."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from sparsetwin.comparison._contenders import changed
from sparsetwin.comparison._plan import Outcome, Plan, Task, tasks
from sparsetwin.errors import TrainingError
from sparsetwin.recipes import describe
from sparsetwin.report import read_run
from sparsetwin.training import RunFolder, choose_device

_FAILED = "failed.txt"
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT: Any = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
if _FORKS:
    _CONTEXT.set_forkserver_preload(["sparsetwin.cli.resume", "torch._dynamo"])


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
        jobs: Runs at a time.
        on_progress: Told whenever a run begins or ends.
    """

    out: Path
    recipe_name: str
    data: Path | None
    jobs: int
    on_progress: Callable[[Progress], None] = lambda progress: None
    _running: dict[Path, tuple[BaseProcess, Path]] = field(default_factory=dict)
    _logs: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def run(self, plan: Plan) -> list[Task]:
        """Run everything that is not finished; return all tasks.

        Raises:
            KeyboardInterrupt: After every running process has saved where it is.
        """
        outcomes: dict[Path, Outcome] = {}
        try:
            while True:
                known = self._known(plan, outcomes)
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
            outcomes |= found

    def _start(self, task: Task) -> None:
        folder = RunFolder(self.out / task.folder)
        if not folder.description.exists():
            recipe = task.recipe
            if task.pretrained is not None:
                recipe = changed(recipe, {"pretrained": str((self.out / task.pretrained).resolve())})
            device = choose_device(recipe.device)
            described = describe(
                recipe, name=self.recipe_name, data=self.data, command="sparsetwin compare", device=device
            )
            folder.create({**described, "threads": recipe.threads or torch.get_num_threads()})
        log = Path(self._logs.name) / f"{len(list(Path(self._logs.name).iterdir()))}.txt"
        log.touch()
        process = _CONTEXT.Process(target=resume_quietly, args=(folder.path, log), daemon=False)
        process.start()
        self._running[task.folder] = (process, log)

    def _wait_for_one(self) -> None:
        """Wait until a process ends, and write down a failure, so that it is not tried again."""
        connection.wait([process.sentinel for process, _ in self._running.values()])
        for folder, (process, log) in list(self._running.items()):
            if process.is_alive():
                continue
            process.join()
            del self._running[folder]
            said = log.read_text(encoding="utf-8", errors="replace").strip()
            if process.exitcode == 1 and _is_training_failure(said):
                (self.out / folder / _FAILED).write_text(said[-2000:] + "\n", encoding="utf-8")
            elif process.exitcode:
                raise TrainingError(f"the run {self.out / folder} stopped with code {process.exitcode}: {said[-2000:]}")

    def _stop(self) -> None:
        for process, _ in self._running.values():
            process.terminate()  # saves and stops
        for process, _ in self._running.values():
            process.join()
        self._running.clear()

    def _tell(self, known: list[Task], outcomes: Mapping[Path, Outcome]) -> None:
        failed = sum((self.out / folder / _FAILED).exists() for folder in outcomes)
        self.on_progress(Progress(len(outcomes), failed, len(known), tuple(map(str, self._running))))


def resume_quietly(folder: Path, log: Path) -> None:
    """Go on with a run in this process, which is there for it alone, and end with the exit code of the command."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # an interrupt from the terminal is for the comparison, which then asks every run to stop
    with log.open("w", encoding="utf-8", buffering=1) as said, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = nowhere, said
        sys.argv = ["sparsetwin", "resume", str(folder), "--quiet"]
        runpy.run_module("sparsetwin", run_name="__main__")  # the command, as in a shell


def outcome(folder: Path) -> Outcome | None:
    """Return what a run has come to; None if it has not ended."""
    if (folder / _FAILED).exists():
        return Outcome(holdout=float("nan"), training_flops=0)
    if not (folder / "run.json").exists() or not RunFolder(folder).is_finished:
        return None
    final = read_run(folder).final
    assert final is not None
    member = final.members.get("sparse") or final.members["dense"]
    held = member.holdout.accuracy if member.holdout else float("nan")
    return Outcome(holdout=held, training_flops=final.training_flops)


def _is_training_failure(said: str) -> bool:
    """Whether a run ended because training came to nothing, which it would do again."""
    return "not finite" in said or "the loss is" in said or "overflowed" in said
