import dataclasses

import pytest
from run_folders import write_run

from sparsetwin.report import HEADINGS, AsInt8, cells, lines, markdown, member_rows, read_run, verdict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "a"))


def with_final(run, **changes):
    return dataclasses.replace(run, final=dataclasses.replace(run.final, **changes))


def test_the_pair_comes_first(run):
    assert [row.name for row in member_rows(run)] == ["dense", "sparse", "dense-raw"]


def test_shares_are_of_the_dense_network_and_of_a_dense_training(run):
    dense, sparse, _ = member_rows(run)
    assert (dense.file_share, dense.forward_share) == (1.0, 1.0)
    assert sparse.file_share == sparse.file_bytes / dense.file_bytes
    assert sparse.forward_share == 520_000 / 4_000_000
    assert sparse.training_share == run.final.training_flops / run.final.dense_training_flops
    assert 0.5 < sparse.training_share < 1


def test_a_row_as_text_has_a_cell_for_each_heading(run):
    assert all(len(cells(row)) == len(HEADINGS) for row in member_rows(run))
    assert cells(member_rows(run)[1]) == (
        "sparse", "96.94%", "90%", "6,545 of 65,440", "35.8 kB (13.5%)", "520 kFLOPs (13%)", "76.5%",
    )  # fmt: skip


def with_int8(run):
    sparse = run.final.members["sparse"]
    int8 = AsInt8(file_bytes=15_000, test=dataclasses.replace(sparse.test, accuracy=0.9688))
    return with_final(run, members={**run.final.members, "sparse": dataclasses.replace(sparse, int8=int8)})


def test_a_member_that_was_tried_with_int8_values_has_a_second_line(run):
    rows = member_rows(with_int8(run))
    assert [(row.int8_accuracy, row.int8_file_bytes) for row in rows] == [(None, None), (0.9688, 15_000), (None, None)]
    assert rows[1].int8_file_share == 15_000 / rows[0].file_bytes
    assert [line[0] for line in lines(rows)] == ["dense", "sparse", "sparse, int8 values", "dense-raw"]
    assert lines(rows)[2] == (
        "sparse, int8 values", "96.88%", "90%", "6,545 of 65,440", "15 kB (5.66%)", "520 kFLOPs (13%)", "76.5%",
    )  # fmt: skip
    assert len(markdown(rows).splitlines()) == 2 + 4
    assert "needs 13% of the dense inference FLOPs. With int8 values the file is 15 kB at 96.88%. The" in verdict(
        with_int8(run)
    )


def test_markdown_is_a_table_that_no_name_can_break(run):
    rows = [dataclasses.replace(row, name="a|b") for row in member_rows(run)]
    drawn = markdown(rows).splitlines()
    assert len(drawn) == 2 + len(rows)
    assert {line.count("|") for line in drawn} == {len(HEADINGS) + 1}


def test_the_verdict_tells_accuracies_file_inference_and_training(run):
    assert verdict(run) == (
        "Dense 97.78% and sparse 96.94% at 90% sparsity. The sparse half is a file of 35.8 kB, 13.5% of the dense one, "
        "and needs 13% of the dense inference FLOPs. The whole run took 76.5% of the FLOPs of one dense training."
    )


def test_a_run_without_a_dense_member_is_compared_with_no_dense_file(run):
    alone = with_final(run, members={"sparse": run.final.members["sparse"]}, dense_file_bytes=None)
    (row,) = member_rows(alone)
    assert row.file_share is None
    assert cells(row)[4] == "35.8 kB"
    assert verdict(alone).startswith(
        "Sparse 96.94% at 90% sparsity. The sparse half is a file of 35.8 kB and needs 13%"
    )


def test_members_of_other_names_are_told_of_where_there_is_no_pair(run):
    only = with_final(
        run, members={"sparse-0.95": dataclasses.replace(run.final.members["sparse"], name="sparse-0.95")}
    )
    assert verdict(only).startswith("Sparse-0.95 96.94% at 90% sparsity. The whole run")


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (0, "Still running: no epoch of 30 has finished."),
        (3, "Still running: epoch 3 of 30, in a dense phase, hold-out accuracy "),
        (6, "Still running: epoch 6 of 30, in a sparse phase (90%), hold-out accuracy "),
    ],
)
def test_a_run_in_progress_has_no_rows_and_a_verdict_of_how_far_it_is(tmp_path, epochs, expected):
    run = read_run(write_run(tmp_path / "a", epochs=epochs))
    assert member_rows(run) == ()
    assert verdict(run).startswith(expected)


def test_a_run_that_fine_tunes_says_so(run):
    assert "epoch 30 of 30, in a dense phase of the stage dense-finetune" in verdict(
        dataclasses.replace(run, final=None)
    )
