"""The run folder: made whole, told apart, locked, and taken away again if nothing came of it."""

import json
import multiprocessing
from pathlib import Path

import pytest

from sparsetwin.errors import CheckpointError, UsageError
from sparsetwin.training import Journal, RunFolder


def test_a_description_is_read_back_with_its_version_and_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    assert folder.create({"seed": 3}) == [folder.path, tmp_path / "deep"]
    described = folder.read()
    assert (described["seed"], described["version"]) == (3, 1)
    assert described["created"].endswith("+00:00")


def test_a_run_that_came_to_nothing_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for path in ("mine", "new/run"):
        folder = RunFolder(tmp_path / path)
        made = folder.create({})
        folder.checkpoints.mkdir()
        folder.metrics.write_text('{"event":"start"}\n')
        folder.discard(made)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_folder_that_others_filled_meanwhile_is_not_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    made = folder.create({})
    RunFolder(tmp_path / "runs" / "b").create({})
    folder.discard(made)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("lines", "finished", "untrained"),
    [
        ("", False, True),
        ('{"event":"start"}\n', False, True),
        ('{"event":"start"}\n{"event":"epoch"}\n', False, False),
        ('{"event":"epoch"}\n{"event":"final"}\n', True, False),
        ('{"event":"epoch"}\n{"event":"fin', False, False),
        ('{"event":"start"}\n{"ev', False, True),
        ("[1]\n", False, True),
    ],
)
def test_how_far_a_run_came_is_seen_from_its_last_whole_line(
    tmp_path: Path, lines: str, finished: bool, untrained: bool
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    folder.metrics.write_text(lines)
    assert (folder.is_finished, folder.is_untrained) == (finished, untrained)


def test_a_run_with_a_checkpoint_is_not_untrained(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    assert folder.is_untrained
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step-000000001.pt").write_bytes(b"")
    assert not folder.is_untrained


def _lock(path: Path, said: "multiprocessing.Queue[str]") -> None:
    try:
        with RunFolder(path).locked():
            said.put("locked")
    except UsageError as error:
        said.put(str(error))


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create({})
    context = multiprocessing.get_context("fork")
    said: multiprocessing.Queue[str] = context.Queue()  # type: ignore[assignment]
    with folder.locked():
        process = context.Process(target=_lock, args=(folder.path, said))
        process.start()
        assert "another process is training in" in said.get(timeout=30)
        process.join()
    with folder.locked():
        pass
    said.close()
    said.join_thread()


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no run folder: it has no run.json"):
        RunFolder(tmp_path).read()
    (tmp_path / "run.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(CheckpointError, match="is of version 2; this release reads version 1"):
        RunFolder(tmp_path).read()
    with pytest.raises(UsageError, match="holds a run already; continue it with: sparsetwin resume"):
        RunFolder(tmp_path).create({})


def test_what_a_killed_process_left_of_its_description_is_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "run.tmp").write_text('{"ver')
    RunFolder(tmp_path).create({"seed": 3})
    assert RunFolder(tmp_path).read()["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


class TestJournal:
    """Logs that go back to where a checkpoint stands."""

    def test_lines_after_a_checkpoint_are_cut(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        journal = Journal(folder)
        journal.event({"event": "start"})
        journal.time({"seconds": 1})
        sizes = journal.sizes
        journal.event({"event": "epoch"})
        journal.time({"seconds": 2})
        Journal(folder).rewind(sizes)
        assert folder.metrics.read_text() == '{"event":"start"}\n'
        assert folder.timing.read_text() == '{"seconds":1}\n'

    def test_lost_wall_times_are_no_error_and_lost_events_are(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        journal = Journal(folder)
        journal.event({"event": "start"})
        journal.time({"seconds": 1})
        sizes = journal.sizes
        folder.timing.write_text('{"sec')
        journal.rewind(sizes)
        folder.timing.unlink()
        journal.rewind(sizes)
        folder.metrics.unlink()
        with pytest.raises(CheckpointError, match=r"metrics.jsonl"):
            journal.rewind(sizes)

    def test_a_run_that_begins_at_step_0_has_empty_logs(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        Journal(folder).event({"event": "start"})
        Journal(folder).rewind({})
        assert folder.metrics.read_text() == ""
