from pathlib import Path

import pytest
import torch
from data_sets import loader

from sparsetwin.data import CharText, read_text, vocabulary
from sparsetwin.errors import DataError

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare"
TEXT = "".join(f"{number}," for number in range(1000)) + "äöü\r\n𝄞"
KNOWN = vocabulary(TEXT)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "input.txt"
    path.write_bytes(TEXT.encode())
    return path


def load(path, *, batch_size=4, eval_batch_size=5, **fields):
    return loader(CharText(**{"context": 16, "holdout": 0.1, **fields}), path)(
        batch_size=batch_size, eval_batch_size=eval_batch_size
    )


def text_of(numbers):
    return "".join(KNOWN[number] for number in numbers.flatten().tolist())


def test_the_vocabulary_is_every_character_of_the_whole_file_once(file):
    known = vocabulary(read_text(file))
    assert known == "".join(sorted(set(TEXT))) == "\n\r,0123456789äöü𝄞"
    assert load(file).classes == len(known) == 17


def test_a_folder_means_the_file_input_txt_in_it(file):
    assert read_text(file.parent) == read_text(file) == TEXT


def test_labels_are_the_inputs_moved_on_by_one_character(file):
    splits = load(file)
    for batches in (splits.train, splits.holdout, splits.test):
        for inputs, labels in batches.epoch(0):
            assert inputs.shape == labels.shape == (len(inputs), 16)
            assert torch.equal(inputs[:, 1:], labels[:, :-1])
            assert all(text_of(torch.cat([row, label[-1:]])) in TEXT for row, label in zip(inputs, labels, strict=True))


def test_the_parts_are_nine_tenths_and_one_tenth_the_holdout_ends_the_first(file):
    splits = load(file, context=1)
    held, test = (
        text_of(torch.cat([inputs for inputs, _ in batches.epoch(0)])) for batches in (splits.holdout, splits.test)
    )
    before_test = len(TEXT) - round(len(TEXT) / 10)
    before_holdout = before_test - round(before_test / 10)
    assert test == TEXT[before_test:-1]
    assert held == TEXT[before_holdout : before_test - 1]
    trained = {text_of(row) for inputs, _ in load(file).train.epoch(0) for row in inputs}
    assert all(row in TEXT[:before_holdout] for row in trained)


def test_evaluation_windows_lie_side_by_side(file):
    test = load(file).test
    read = text_of(torch.cat([inputs for inputs, _ in test.epoch(0)]))
    start = len(TEXT) - round(len(TEXT) / 10)
    assert read == TEXT[start : start + 16 * test.samples]
    assert len(TEXT) - start - 1 - len(read) < 16


def test_an_epoch_has_as_many_windows_as_fit_side_by_side_or_as_asked(file):
    train_characters = round(0.9 * (len(TEXT) - round(len(TEXT) / 10)))
    assert load(file, drop_last=False).train.samples == train_characters // 16
    assert load(file, samples=10, drop_last=False).train.samples == 10
    assert [len(labels) for _, labels in load(file, samples=10, drop_last=False).train.epoch(0)] == [4, 4, 2]


def test_windows_start_anywhere_in_the_training_text(file):
    train = load(file, samples=20_000, batch_size=1000).train
    starts = {text_of(row) for inputs, _ in train.epoch(0) for row in inputs}
    before_holdout = round(0.9 * (len(TEXT) - round(len(TEXT) / 10)))
    assert len(starts) > 0.95 * (before_holdout - 16)
    assert TEXT[:16] in starts
    assert TEXT[before_holdout - 17 : before_holdout - 1] in starts


def test_bytes_that_are_not_utf_8_are_refused(file):
    file.write_bytes(b"good \xff bad")
    with pytest.raises(DataError, match=r"input.txt is not UTF-8 at byte 5"):
        load(file)


@pytest.mark.parametrize(("length", "part"), [(0, "training"), (18, "training"), (100, "holdout"), (169, "holdout")])
def test_a_text_too_short_for_the_context_is_refused(file, length, part):
    file.write_text("x" * length)
    with pytest.raises(DataError, match=rf"{length} characters, \d+ of them in the {part} part"):
        load(file)


def test_a_text_too_short_to_test_on_is_refused(file):
    file.write_text("x" * 160)
    with pytest.raises(DataError, match="16 of them in the test part"):
        load(file, holdout=0.0)
    file.write_text("x" * 170)
    assert load(file, holdout=0.0).test.samples == 1


@pytest.mark.parametrize("fields", [{"context": 0}, {"samples": 0}])
def test_numbers_that_make_no_sense_are_refused(file, fields):
    with pytest.raises(DataError, match=next(iter(fields))):
        load(file, **fields)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="give a UTF-8 text file"):
        load(None)
    with pytest.raises(DataError, match=r"cannot read .*input.txt"):
        load(tmp_path)


@pytest.mark.skipif(not SHAKESPEARE.is_dir(), reason=f"Tiny Shakespeare is not in {SHAKESPEARE}")
def test_tiny_shakespeare_has_65_characters_and_the_usual_split():
    splits = load(SHAKESPEARE, context=128, holdout=0.0, batch_size=1, eval_batch_size=100)
    assert splits.classes == 65
    assert splits.train.samples == 1_003_855 // 128
    assert splits.test.samples == (111_539 - 1) // 128
