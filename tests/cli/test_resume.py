"""What ``resume`` does with damaged checkpoints, finished runs and descriptions that do not fit."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, TINY, Commands, Running, events, outcome

RUN = ("train", *SHORT, *TINY, "--train.checkpoint-epochs", "0.5", "--out", "run")
BRANCH = 54


@pytest.fixture(scope="module")
def whole(server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert Commands(server, folder).run(*RUN).code == 0
    return outcome(folder / "run")


@pytest.fixture
def stopped(cli: Commands) -> Callable[[int], Path]:
    """Return a function that trains until a checkpoint of a step lies there, kills the run and gives its folder."""

    def stop(step: int) -> Path:
        run = cli.folder / "run"
        running = cli.start(*RUN)
        assert running.until(lambda: any(s >= step for s in steps(run)))
        kill(running)
        return run

    return stop


def kill(running: Running) -> None:
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run / "checkpoints").glob("step-*.pt"))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*.pt"))


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    described = json.loads((run / "run.json").read_text())
    change(described)
    (run / "run.json").write_text(json.dumps(described))


@pytest.mark.parametrize("damage", ["truncated", "corrupted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_bytes(
    cli: Commands, stopped: Callable[[int], Path], whole: dict[str, bytes], damage: str
) -> None:
    run = stopped(27)
    assert len(steps(run)) >= 2
    content = bytearray(newest(run).read_bytes())
    content[len(content) // 2] ^= 1
    newest(run).write_bytes(content if damage == "corrupted" else content[: len(content) // 2])
    done = cli.run("resume", "run")
    assert done.code == 0
    assert f"warning: {newest(run).parent.relative_to(cli.folder)}/step-" in done.err
    assert damage in done.err
    assert "resuming from step" in done.err
    assert outcome(run) == whole


def test_checkpoints_that_are_all_damaged_are_all_named_and_nothing_is_changed(
    cli: Commands, stopped: Callable[[int], Path], whole: dict[str, bytes]
) -> None:
    run = stopped(27)
    for path in (run / "checkpoints").glob("step-*.pt"):
        path.write_bytes(path.read_bytes()[:-10])
    before = outcome(run)
    done = cli.run("resume", "run")
    assert done.code == 1
    assert all(f"step-{step:09d}.pt is truncated" in done.error for step in steps(run))
    assert "To train the whole run again from step 0, remove run/checkpoints and resume" in done.error
    assert outcome(run) == before
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert cli.run("resume", "run").code == 0  # as the message says
    assert outcome(run) == whole


@pytest.mark.parametrize("damage", ["missing", "corrupted"])
def test_a_lost_branch_is_named_the_sparse_half_is_finished_and_a_new_start_gives_the_same_bytes(
    cli: Commands, stopped: Callable[[int], Path], whole: dict[str, bytes], damage: str
) -> None:
    run = stopped(BRANCH)
    branch = run / "checkpoints" / "branch.pt"
    branch.write_bytes(branch.read_bytes()[:1000]) if damage == "corrupted" else branch.unlink()
    done = cli.run("resume", "run")
    assert done.code == 1
    assert "warning: " in done.err
    assert "the sparse half is trained to its end" in done.err
    assert "the dense half cannot be trained on" in done.error
    assert "branch" in done.error
    assert f"The sparse half is finished, in {run.relative_to(cli.folder)}/pair" in done.error
    assert cli.run("eval", "run", "--half", "sparse", "--json").json["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert (run / "pair" / "sparse.safetensors").read_bytes() == whole["sparse.safetensors"]
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert cli.run("resume", "run").code == 0
    assert outcome(run) == whole


def test_a_branch_that_is_lost_before_it_is_reached_is_no_matter(
    cli: Commands, stopped: Callable[[int], Path], whole: dict[str, bytes]
) -> None:
    run = stopped(18)
    (run / "checkpoints" / "branch.pt").write_bytes(b"left by something else")
    done = cli.run("resume", "run")
    assert (done.code, done.err) == (0, "")
    assert outcome(run) == whole


def test_a_log_line_that_its_process_did_not_finish_is_written_anew(
    cli: Commands, stopped: Callable[[int], Path], whole: dict[str, bytes]
) -> None:
    run = stopped(27)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "ep')
    assert cli.run("resume", "run").code == 0
    assert outcome(run) == whole


def test_every_epoch_stands_once_in_the_wall_times_of_a_resumed_run(
    cli: Commands, stopped: Callable[[int], Path]
) -> None:
    run = stopped(27)
    assert cli.run("resume", "run").code == 0
    told = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in told] == [
        *(("main", epoch) for epoch in (1, 2, 3, 4)), ("dense-finetune", 4)
    ]  # fmt: skip


def test_a_shortened_log_is_refused_by_name(cli: Commands, stopped: Callable[[int], Path]) -> None:
    run = stopped(27)
    (run / "metrics.jsonl").write_text("")
    done = cli.run("resume", "run")
    assert done.code == 1
    assert "run/metrics.jsonl has 0 bytes, but its run had already written" in done.error


def test_a_finished_run_is_verified_and_left_as_it_is(cli: Commands, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    done = cli.run("resume", trained, "--json")
    assert done.code == 0
    assert "is finished; its pair is intact" in done.out
    assert done.json["finished"] is True
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["changed", "removed", "unlisted"])
def test_a_tampered_pair_of_a_finished_run_is_an_error_that_names_the_member(
    cli: Commands, trained: Path, damage: str
) -> None:
    run = shutil.copytree(trained, cli.folder / "copy")
    half = run / "pair" / "dense-raw.safetensors"
    if damage == "changed":
        content = bytearray(half.read_bytes())
        content[-1] ^= 1
        half.write_bytes(content)
    elif damage == "removed":
        half.unlink()
    else:
        listed = json.loads((run / "pair" / "pair.json").read_text())
        listed["members"] = [member for member in listed["members"] if member["name"] != "dense-raw"]
        (run / "pair" / "pair.json").write_text(json.dumps(listed))
    done = cli.run("resume", run)
    assert done.code == 1
    assert "dense-raw" in done.error
    assert "sparse-best" not in done.error


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda d: d.update(version=7), "run.json is of version 7; this release reads version 1"),
    "no config": (lambda d: d.pop("config"), "'config' should be of type dict, got None"),
    "threads": (lambda d: d.update(threads="many"), "'threads' should be of type int, got 'many'"),
    "no threads": (lambda d: d.update(threads=0), "'threads' at least 1"),
    "class": (lambda d: d["config"]["dataset"].update(type="Digitz"),
              "config.dataset: unknown configuration class 'Digitz'; did you mean 'Digits'?"),
    "wrong class": (lambda d: d["config"]["dataset"].update(type="Recipe"), "expected a DataSource"),
    "field": (lambda d: d["config"]["train"].update(epoch=3),
              "TrainSettings has no field 'epoch'; did you mean 'epochs'?"),
    "missing": (lambda d: d["config"]["train"].pop("epochs"), "the field 'epochs' of TrainSettings is missing"),
    "type": (lambda d: d["config"]["train"].update(epochs="four"), "config.train.epochs: expected int, got 'four'"),
    "value": (lambda d: d["config"]["train"].update(epochs=0), "config.train: epochs needs to be at least 1, got 0"),
    "choice": (lambda d: d["config"]["train"].update(precision="fp8"), "expected one of fp32, bf16, fp16, got 'fp8'"),
    "other configuration": (lambda d: d["config"]["optimizer"].update(lr=0.2),
                            "says config.optimizer.lr = 0.2, but its checkpoints were trained with 0.1"),
    "other seed": (lambda d: d["config"].update(seed=1), "says config.seed = 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def half_trained(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its second epoch; tests only read it."""
    folder = tmp_path_factory.mktemp("half")
    running = Commands(server, folder).start(*RUN)
    assert running.until(lambda: any(step >= 27 for step in steps(folder / "run")))
    kill(running)
    return folder / "run"


@pytest.mark.parametrize("name", CHANGES)
def test_a_description_of_another_version_or_configuration_is_refused_with_one_message(
    cli: Commands, half_trained: Path, name: str
) -> None:
    run = shutil.copytree(half_trained, cli.folder / "run")
    before = outcome(run)
    change, message = CHANGES[name]
    edit(run, change)
    done = cli.run("resume", "run")
    assert done.code in (1, 2)
    assert message in done.error
    assert done.err.count("error:") == 1
    assert outcome(run) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_a_description_that_is_no_json_object_is_refused_by_name(cli: Commands, text: str) -> None:
    (cli.folder / "run").mkdir()
    (cli.folder / "run" / "run.json").write_text(text)
    for command in ("resume", "eval"):
        done = cli.run(command, "run")
        assert done.code == 1
        assert "run/run.json" in done.error


def test_resume_uses_the_thread_count_of_the_run(cli: Commands) -> None:
    told = ("--model.name", "tiny_networks:tells_threads", "--threads", "3", "--quiet")
    running = cli.start("train", *SHORT, *told, "--out", "run")
    assert running.until(lambda: len(events(cli.folder / "run")) >= 2)
    kill(running)
    assert json.loads((cli.folder / "run" / "run.json").read_text())["threads"] == 3
    done = cli.run("resume", "run", "--quiet")
    assert done.code == 0
    assert set(done.out.split("threads ")[1:][0].split()[:1]) == {"3"}


def test_two_processes_do_not_train_in_one_folder(cli: Commands) -> None:
    running = cli.start(*RUN)
    assert running.until(lambda: bool(steps(cli.folder / "run")))
    second = cli.run("resume", "run")
    assert second.code == 1
    assert "another process is training in run" in second.error
    assert running.wait().code == 0


def test_a_change_of_versions_is_told_before_the_run_goes_on(cli: Commands, half_trained: Path) -> None:
    run = shutil.copytree(half_trained, cli.folder / "run")
    edit(run, lambda described: described["versions"].update(torch="1.0"))
    done = cli.run("resume", "run", "--quiet")
    assert done.code == 0
    assert "not to the same bits" in done.err
    assert "torch was '1.0'" in done.err
