"""``sparsetwin train`` and ``resume`` in several processes."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launches import SHORT, Server, checkpoints, events, outcome
from safetensors.torch import load_file

from sparsetwin.cli.__main__ import main

PLAIN = (*SHORT, "--model.name", "shared_networks:plain")


def weights(run: Path, member: str) -> dict[str, torch.Tensor]:
    return load_file(run / "pair" / f"{member}.safetensors")


def test_the_first_process_alone_writes_and_prints(server: Server, copies: Path):
    told = json.loads((copies / "run.json").read_text())
    assert told["processes"] == 2
    assert "distributed" not in told["config"]
    assert not list(copies.rglob("*.tmp"))
    assert [event["event"] for event in events(copies)].count("start") == 1
    (first, second) = sorted(copies.parent.glob(".*.out"))
    assert "Dense" in first.read_text()
    assert second.read_text() == ""


def test_shards_train_to_the_bytes_of_copies(server: Server, copies: Path, tmp_path: Path):
    done = server.run(tmp_path, "train", *SHORT, "--fsdp")
    assert done.codes == [0, 0], done.err
    assert outcome(tmp_path / "run") == outcome(copies)


KINDS = pytest.mark.parametrize(
    "flags", [(), pytest.param(("--fsdp",), marks=pytest.mark.slow)], ids=["copies", "shards"]
)


@KINDS
def test_the_batch_is_the_whole_one_whatever_the_number_of_processes(server: Server, tmp_path: Path, flags):
    """Parts of unequal size weigh as many samples as they have; the order of the data is that of one process."""
    given = ("--train.batch-size", "51", "--train.accumulation", "3", "--train.clip-norm", "0.5")
    runs = []
    for count in (1, 2):
        (folder := tmp_path / str(count)).mkdir()
        chosen = flags if count > 1 else ()
        done = server.run(folder, "train", *PLAIN, *given, *chosen, count=count)
        assert set(done.codes) == {0}, done.err
        runs.append(folder / "run")
    alone, together = runs
    for member in ("dense-raw", "sparse"):
        for name, weight in weights(alone, member).items():
            torch.testing.assert_close(weights(together, member)[name], weight, atol=2e-5, rtol=1e-4)
    scores = [events(run)[-1]["members"]["sparse"]["test"]["accuracy"] for run in runs]
    assert scores[0] == scores[1]


@KINDS
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_go_on_to_the_same_bytes(
    server: Server, copies: Path, tmp_path: Path, flags
):
    run = tmp_path / "run"
    launched = server.start(tmp_path, "train", *SHORT, *flags, "--train.checkpoint-epochs", "100")
    launched.until(lambda: len(events(run)) >= 4)  # in the sparse phase
    launched.send(signal.SIGTERM, rank=1)
    stopped = launched.wait()
    assert stopped.codes == [130, 130]
    assert "stopped and saved; continue with: sparsetwin resume run" in stopped.err
    assert len(checkpoints(run)) == 1
    shutil.copytree(run, tmp_path / "alone" / "run")
    assert server.run(tmp_path, "resume", "run", "--quiet").codes == [0, 0]
    assert outcome(run) == outcome(copies)

    alone = server.run(tmp_path / "alone", "resume", "run", "--quiet", count=1)
    assert alone.codes == [0], alone.err
    assert "not to the same bits as if it had not stopped: processes was 2 and is 1" in alone.err
    finished = server.run(tmp_path / "alone", "resume", "run")
    assert finished.codes == [0, 0]
    assert "is finished; its pair is intact" in finished.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--fsdp",), "--fsdp shards a model over several processes, but there is one"),
        (("--fsdp", "--train.ema-decay", "0.9"), "--train.ema-decay does not go with --fsdp"),
        (("--fsdp", "--train.precision", "fp16"), "--train.precision fp16 does not go with --fsdp"),
        (("--fsdp", "--train.channels-last"), "--train.channels-last does not go with --fsdp"),
        (("--distributed.sync-batch-norm",), "leave out --distributed.sync-batch-norm"),
    ],
)
def test_what_processes_cannot_do_together_is_refused_before_a_folder_is_made(
    flags, told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", *flags, "--device", "cpu"]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_last_batch_too_small_to_share_is_refused_once_and_leaves_nothing(server: Server, tmp_path: Path):
    flags = ("--train.batch-size", "6", "--train.accumulation", "6")
    done = server.run(tmp_path, "train", *SHORT, *flags)
    assert done.codes == [2, 2]
    assert "the last batch of an epoch has 6 samples, too few for 2 processes of 6 parts" in done.err
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_in_all_processes(server: Server, copies: Path):
    done = server.run(copies.parent, "train", *SHORT)
    assert done.codes == [1, 1]
    assert "holds a run already" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (("--train.ema-decay", "0.8", "--train.precision", "bf16", "--train.recalibrate-batches", "2"), 2),
        (("--train.precision", "fp16", "--train.accumulation", "2", "--train.channels-last"), 2),
        (("--fsdp", "--train.precision", "bf16", "--train.recalibrate-batches", "2", "--optimizer.name", "adamw",
          "--optimizer.lr", "0.003"), 2),
        (("--train.compile", "--model.name", "shared_networks:plain"), 2),
        (("--train.compile", "--model.name", "shared_networks:plain", "--fsdp"), 2),
        ((), 3),
        (("--fsdp", "--train.clip-norm", "0.5"), 3),
        (("--fsdp", "--optimizer.name", "muon", "--optimizer.lr", "0.003", "--model.name", "shared_networks:plain"), 2),
    ],
    ids=["average", "fp16", "shards", "compiled copies", "compiled shards", "three copies", "three shards", "muon"],
)  # fmt: skip
def test_settings_of_the_loop_work_and_stop_and_go_on(server: Server, tmp_path: Path, flags, count):
    (whole := tmp_path / "whole").mkdir()
    (parts := tmp_path / "parts").mkdir()
    done = server.run(whole, "train", *SHORT, *flags, count=count)
    assert set(done.codes) == {0}, done.err
    final = events(whole / "run")[-1]["members"]
    assert final["sparse"]["kept"] == round(0.1 * final["sparse"]["targets"])
    assert final["dense"]["test"]["accuracy"] > 0.5
    launched = server.start(parts, "train", *SHORT, *flags, count=count)
    launched.until(lambda: len(events(parts / "run")) >= 4)
    for rank in range(count):
        launched.send(signal.SIGTERM, rank=rank)
    assert set(launched.wait().codes) == {130}
    assert server.run(parts, "resume", "run", "--quiet", count=count).codes == [0] * count
    assert outcome(parts / "run") == outcome(whole / "run")
