"""Ctrl-C and SIGTERM: the first saves and says how to go on, the second stops at once."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SHORT, TINY, Commands, events, outcome

RUN = ("train", *SHORT, *TINY, "--train.checkpoint-epochs", "100", "--out", "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("line", [1, 4, 9])  # in the first epoch, in a sparse phase, in the fine-tuning
def test_a_stopped_run_is_saved_says_how_to_go_on_and_resumes_to_the_same_bytes(
    cli: Commands, trained: Path, number: signal.Signals, line: int
) -> None:
    run = cli.folder / "run"
    running = cli.start(*RUN, "--json")
    assert running.until(lambda: len(events(run)) >= line)
    time.sleep(0.02)
    running.send(number)
    stopped = running.wait()
    assert stopped.code == 130
    assert "stopping after this step; once more to stop at once" in stopped.err
    assert "stopped and saved; continue with: sparsetwin resume run" in stopped.err
    assert stopped.json == {"run": "run", "finished": False}
    assert list((run / "checkpoints").glob("step-*.pt"))
    assert cli.run("resume", "run", "--quiet").code == 0
    assert outcome(run) == outcome(trained)


def test_the_second_interrupt_stops_at_once_and_the_run_resumes_from_its_last_checkpoint(
    cli: Commands,
) -> None:
    run = cli.folder / "run"
    slow = ("--model.name", "tiny_networks:slow")
    running = cli.start("train", *SHORT, *slow, "--out", "run")
    assert running.until(lambda: len(events(run)) >= 3)
    time.sleep(0.5)
    running.send(signal.SIGINT)
    assert running.until(lambda: "once more" in running.err)
    began = time.monotonic()
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    assert time.monotonic() - began < 4  # the step that it is in takes five seconds
    assert "interrupted; continue from the last checkpoint with: sparsetwin resume run" in stopped.err
    assert "Traceback" not in stopped.err
    assert cli.run("resume", "run", "--quiet").code == 0


def test_an_interrupt_before_anything_is_trained_leaves_nothing(cli: Commands) -> None:
    (cli.folder / "slow_import.py").write_text("import time\ntime.sleep(30)\n")
    running = cli.start("train", "slow_import:recipe", "--out", "run")
    time.sleep(0.3)
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert (stopped.code, stopped.error) == (130, "interrupted")
    assert cli.entries() == ["slow_import.py"]


def test_a_reader_that_goes_away_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("sparsetwin")
    command = f"{program} methods | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_terminal_gets_a_bar_with_phase_sparsity_loss_and_time_left(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("sparsetwin"))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(
        [program, "train", *SHORT, *TINY, "--out", "run"], stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment
    )
    os.close(theirs)
    text = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                text += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
    os.close(ours)
    assert process.wait() == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    for expected in (
        r"main: phase [13] \(sparse 0\.9\) loss \d\.\d+ accuracy \d+\.\d%",
        r"dense-finetune",
        r"left",
        "100%",
    ):
        assert re.search(expected, shown), shown[-2000:]
