"""Runs that are killed at any moment and resumed end with the bytes of one that was not."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SHORT, TINY, Commands, Running, Server, events, outcome

KILLS = 20  # that this file states; see the last assertion of the test
STEPS = 72  # of the main course of SHORT, 18 an epoch
RUN = ("train", *SHORT, *TINY, "--train.checkpoint-epochs", "0.2", "--quiet", "--out", "run")
Moment = Callable[[Path], bool]


def lines(count: int) -> Moment:
    """So many lines are told."""
    return lambda run: len(events(run)) >= count


def checkpoint(least: int) -> Moment:
    """A checkpoint of at least this step lies there, counted on through the fine-tuning."""
    return lambda run: any(int(p.stem[5:]) >= least for p in (run / "checkpoints").glob("step-*.pt"))


def writing(folder: str, what: str) -> Moment:
    """A file is being written, under its temporary name."""
    return lambda run: any((run / folder).glob(f".{what}*.tmp"))


def is_there(run: Path) -> bool:
    """The run has its folder and nothing else yet."""
    return (run / "run.json").exists()


CHAINS: tuple[tuple[tuple[str, Moment], ...], ...] = (
    (
        ("before anything", is_there),
        ("before the first checkpoint", lines(1)),
        ("inside the warm-up", checkpoint(4)),
        ("while the first checkpoints are written", writing("checkpoints", "step-")),
        ("at the first boundary", lines(3)),
        ("inside a sparse phase", checkpoint(24)),
    ),
    (
        ("while a checkpoint is written in a sparse phase", lambda run: checkpoint(20)(run)
         and writing("checkpoints", "step-")(run)),
        ("while the dense half is written", writing("pair", "dense-raw")),
        ("while the pair's list is written", writing("pair", "pair.json")),
        ("while the branch is written", writing("checkpoints", "branch")),
        ("inside the last sparse phase", checkpoint(60)),
        ("at the end of the main course", checkpoint(STEPS)),
    ),
    (
        ("inside a dense phase", checkpoint(44)),
        ("at the branch", lambda run: (run / "checkpoints" / "branch.pt").exists()),
        ("while the sparse half is written", writing("pair", "sparse")),
        ("at the start of the fine-tuning", checkpoint(STEPS + 1)),
        ("inside the fine-tuning", checkpoint(STEPS + 9)),
        ("while the fine-tuned half is written", writing("pair", "dense.")),
        ("during the final test", checkpoint(2 * STEPS)),
    ),
    (
        ("before the first checkpoint", lines(1)),
        ("at a boundary", lines(5)),
        ("at the next boundary", lines(7)),
        ("inside the fine-tuning", checkpoint(STEPS + 5)),
        ("during the final test", lambda run: checkpoint(2 * STEPS)(run) and writing("pair", "pair.json")(run)),
    ),
)  # fmt: skip


def kill_at(running: Running, run: Path, moment: Moment, *, delay: float) -> bool:
    """Kill the process a little after a moment; return False if it had ended before."""
    if not running.until(lambda: moment(run)):
        return False
    time.sleep(delay)
    running.send(signal.SIGKILL)
    return running.wait().code == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert Commands(server, folder).run(*RUN).code == 0
    return outcome(folder / "run")


def test_twenty_killed_processes_resume_to_the_same_bytes(
    server: Server, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    draw = random.Random(7)
    kills: list[str] = []
    torn = 0  # kills that left a half-written file behind
    for number, chain in enumerate(CHAINS):
        (folder := tmp_path / str(number)).mkdir()
        cli, run = Commands(server, folder), folder / "run"
        command: tuple[object, ...] = RUN
        for name, moment in chain:
            delay = 0.0 if "while" in name or "final" in name else draw.choice((0.0, draw.uniform(0, 0.02)))
            if kill_at(cli.start(*command), run, moment, delay=delay):
                kills.append(name)
                torn += any(run.rglob("*.tmp"))
            command = ("resume", "run", "--quiet") if is_there(run) else RUN
        done = cli.run(*command)
        assert done.code == 0, done.err
        assert outcome(run) == uninterrupted, f"after kills {kills}"
        assert not list(run.rglob("*.tmp"))
    assert len(kills) >= KILLS, f"only {len(kills)} processes were killed: {kills}"
    assert torn >= 3, "hardly any kill came while a file was being written"


def test_the_installed_command_killed_and_resumed_gives_the_same_bytes(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    program, run = str(Path(sys.executable).with_name("sparsetwin")), tmp_path / "run"
    process = subprocess.Popen([program, *RUN], cwd=tmp_path)
    while process.poll() is None and not checkpoint(30)(run):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([program, "resume", "run", "--quiet"], cwd=tmp_path, check=True, capture_output=True)
    assert outcome(run) == uninterrupted
