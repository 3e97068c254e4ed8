"""``torchrun`` is asked to stop, then one process is killed: the others stop, and the run goes on to the same bytes."""

import json
from pathlib import Path

from launches import SHORT, Server, checkpoints, outcome, torchrun

ASKED, KILLED = 22, 62  # steps inside the two sparse phases, of steps 19 to 36 and 55 to 72


def test_a_run_that_is_stopped_and_one_whose_process_is_killed_resume_to_the_same_bytes(
    server: Server, copies: Path, tmp_path: Path
):
    run = tmp_path / "run"
    stopped = torchrun(tmp_path, "train", "digits", *SHORT, DEED="ask", DEED_AT=f"0 {ASKED}")
    assert stopped.returncode != 0
    assert "stopping after this step" in stopped.stdout
    assert "stopped and saved; continue with: sparsetwin resume run" in stopped.stdout
    assert ASKED <= checkpoints(run)[-1] < KILLED
    assert json.loads((run / "run.json").read_text())["command"].startswith("sparsetwin train digits")

    killed = torchrun(tmp_path, "resume", "run", "--quiet", DEED="kill", DEED_AT=f"1 {KILLED}")  # in 100 s, not 30 min
    assert killed.returncode != 0
    assert "error: another process of this run has stopped or cannot be reached" in killed.stdout
    assert checkpoints(run)[-1] == KILLED - KILLED % 4

    assert server.run(tmp_path, "resume", "run", "--quiet").codes == [0, 0]
    assert outcome(run) == outcome(copies)
