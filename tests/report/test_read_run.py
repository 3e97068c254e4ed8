import dataclasses
import json
import math

import pytest
from run_folders import LAYERS, TARGETS, events, write_lines, write_run

from sparsetwin.errors import CheckpointError
from sparsetwin.report import read_run
from sparsetwin.schedules import Phase


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "a")


def rewrite(folder, index, **changes):
    """Change fields of one line of metrics.jsonl; a field set to ... is removed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[index] = {name: value for name, value in (lines[index] | changes).items() if value is not ...}
    write_lines(folder / "metrics.jsonl", lines)


def test_a_run_is_read_as_it_was_written(folder):
    run = read_run(folder)
    assert (run.recipe, run.seed, run.threads) == ("digits", 0, 2)
    assert run.config["schedule"] == {"sparsity": 0.9, "unit": "epochs", "warmup": 4}
    assert run.start.phases[1] == Phase(1, 160, 280, 0.9)
    assert run.start.targets == LAYERS
    assert run.start.target_count == TARGETS
    assert [len(run.main), len(run.phases), len(run.times)] == [30, 8, 36]
    assert run.main[0].learning_rate == pytest.approx(0.099726)
    assert run.phases[3].mask_change is not None
    assert run.phases[3].layers["classifier.weight"][1] == 640
    assert run.final is not None
    assert run.final.members["sparse"].test.accuracy == 0.9694
    assert run.is_finished
    assert run.unknown_events == ()


def test_a_branch_begins_with_the_main_epoch_that_it_leaves(folder):
    branch = read_run(folder).branches["dense-finetune"]
    assert [epoch.stage for epoch in branch[:2]] == ["main", "dense-finetune"]
    assert [epoch.epoch for epoch in branch] == [24, 25, 26, 27, 28, 29, 30]


def test_a_run_in_progress_has_no_final(tmp_path):
    run = read_run(write_run(tmp_path / "a", epochs=6))
    assert not run.is_finished
    assert [run.final, len(run.main), run.branches] == [None, 6, {}]


def test_flops_of_a_run_that_fine_tunes_count_the_common_part_once(folder):
    run = read_run(folder)
    assert dataclasses.replace(run, final=None).training_flops == run.training_flops
    assert run.training_flops > run.epochs[-1].training_flops


def test_a_line_that_is_still_being_written_is_left_out(folder):
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[:-20])
    assert not read_run(folder).is_finished


def test_timing_may_be_missing(folder):
    (folder / "timing.jsonl").unlink()
    assert read_run(folder).times == ()


def test_values_that_may_be_missing_may_be_null(folder):
    rewrite(folder, 1, holdout=None, train={"loss": None, "accuracy": None})
    rewrite(folder, -1, dense_file_bytes=None)
    run = read_run(folder)
    assert run.main[0].holdout is None
    assert math.isnan(run.main[0].train.loss)
    assert run.final is not None
    assert run.final.dense_file_bytes is None


def test_events_that_this_version_does_not_know_are_named(folder):
    lines = events()
    write_lines(folder / "metrics.jsonl", [lines[0], {"event": "memorisation", "value": 1}, *lines[1:]])
    assert read_run(folder).unknown_events == ("memorisation",)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_missing_file_is_named_with_what_writes_it(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing; a run folder is what `sparsetwin train"):
        read_run(folder)


def test_a_folder_in_a_files_place_cannot_be_read(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"run\.json is not JSON"),
        ("[1]", r"run\.json should hold one JSON object, got list"),
        ("{}", r"run\.json has version None, this library reads 1"),
        ('{"version": 2}', r"run\.json has version 2, this library reads 1"),
        ('{"version": 1, "recipes": "x"}', r"run\.json: the field 'recipe' is missing; did you mean 'recipes'\?"),
    ],
)
def test_a_malformed_description_is_an_error_that_says_how(folder, content, message):
    (folder / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_run(folder)


def test_text_in_another_encoding_is_an_error(folder):
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is not text in UTF-8"):
        read_run(folder)


@pytest.mark.parametrize("line", ["{]", "7", ""])
def test_a_malformed_line_is_named_by_file_and_number(folder, line):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:4], line, *lines[4:], ""]))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 5"):
        read_run(folder)


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        (0, {"event": ...}, r"line 1: the field 'event' is missing"),
        (0, {"phases": [[0, 1]]}, r"line 1: 'phases' should be a list of lists of 3 numbers, got \[\[0, 1\]\]"),
        (0, {"targets": {"a": -1}}, r"line 1, targets: 'a' should be a whole number that is not negative, got -1"),
        (0, {"epochs": True}, r"line 1: 'epochs' should be a whole number"),
        (0, {"uncounted": [1]}, r"line 1: 'uncounted' should be a list of strings, got \[1\]"),
        (1, {"stage": 3}, r"line 2: 'stage' should be a string, got 3"),
        (1, {"lr": "0.1"}, r"line 2: 'lr' should be a number, got '0.1'"),
        (1, {"train": {"loss": 1.0, "accuracy": 98.2}}, r"line 2, train: 'accuracy' should be a fraction from 0 to 1"),
        (1, {"holdout": 0.9}, r"line 2: 'holdout' should be an object, got 0.9"),
        (5, {"layers": {"a": [1]}}, r"line 6, layers: 'a' should be a list of 2 numbers, got \[1\]"),
        (-1, {"members": {"sparse": {}}}, r"line 46, members, sparse: the field 'sparsity' is missing"),
    ],
)
def test_a_wrong_field_is_named_with_its_place_and_what_is_expected(folder, index, changes, message):
    rewrite(folder, index, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_run(folder)


def test_a_log_without_a_start_says_that_training_has_not_begun(folder):
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="no start line yet"):
        read_run(folder)
