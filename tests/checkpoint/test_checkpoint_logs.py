import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetwin.checkpoint import append_line, truncate_log
from sparsetwin.checkpoint._plain import dump_json, parse_json
from sparsetwin.errors import CheckpointError

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_JSON = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(_JSON)
def test_plain_data_survives_json_exactly(value):
    text = dump_json(value, what="value")
    assert parse_json(text, what="text") == value
    assert dump_json(parse_json(text, what="text"), what="value") == text
    assert "\n" not in text


def test_lines_are_appended_with_sorted_keys_and_the_length_returned(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    assert append_line(path, {"b": 1, "a": [0.1, None, "é\n"]}) == path.stat().st_size
    assert append_line(path, {"z": True}) == path.stat().st_size
    lines = path.read_text().splitlines()
    assert lines[0] == '{"a":[0.1,null,"\\u00e9\\n"],"b":1}'
    assert [json.loads(line) for line in lines] == [{"b": 1, "a": [0.1, None, "é\n"]}, {"z": True}]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"loss": math.nan}, r"\['loss'\] is nan"),
        ({"a": {"b": [0, math.inf]}}, r"\['a'\]\['b'\]\[1\] is inf"),
        ({"a": {1: 2}}, r"\['a'\] has the key 1 of type builtins.int"),
        ({"a": {1, 2}}, r"\['a'\] is of type builtins.set"),
        ({"a": b"x"}, r"\['a'\] is of type builtins.bytes"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name_and_nothing_written(tmp_path, values, named):
    path = tmp_path / "log.jsonl"
    with pytest.raises(CheckpointError, match=named):
        append_line(path, values)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", '{"a":NaN}', "[Infinity]", "[" * 100_000, b"\xff"])
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(CheckpointError, match="the text is not valid JSON"):
        parse_json(text, what="the text")


def test_a_log_is_cut_to_every_length_it_had(tmp_path):
    path = tmp_path / "log.jsonl"
    sizes = [append_line(path, {"epoch": epoch}) for epoch in range(12)]
    whole = path.read_bytes()
    for size in [*reversed(sizes), 0]:
        truncate_log(path, size)
        assert path.read_bytes() == whole[:size]
    assert append_line(path, {"epoch": 0}) == sizes[0]


def test_a_half_written_last_line_is_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    size = append_line(path, {"epoch": 0})
    with path.open("ab") as file:
        file.write(b'{"epoch": 1, "lo')
    truncate_log(path, size)
    assert path.read_text() == '{"epoch":0}\n'


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (-1, "at least 0 bytes"),
        (5, "no line that ends at byte 5"),
        (13, "has 12 bytes, but its run had already written 13"),
    ],
)
def test_a_length_the_log_never_had_is_refused_and_the_log_kept(tmp_path, size, message):
    path = tmp_path / "log.jsonl"
    append_line(path, {"epoch": 0})
    with pytest.raises(CheckpointError, match=message):
        truncate_log(path, size)
    assert path.read_text() == '{"epoch":0}\n'


def test_a_missing_log_may_be_cut_to_nothing_only(tmp_path):
    truncate_log(tmp_path / "log.jsonl", 0)
    with pytest.raises(CheckpointError, match=r"cannot cut .*log.jsonl to 3 bytes: No such file"):
        truncate_log(tmp_path / "log.jsonl", 3)


def test_a_failed_append_leaves_the_log_as_it_was(tmp_path, stopper):
    path = tmp_path / "log.jsonl"
    append_line(path, {"epoch": 0})
    stopper.stop(1, OSError)  # mkdir passes, the flush of the written line does not
    with pytest.raises(CheckpointError, match=r"cannot append to .*, the log is as it was"):
        append_line(path, {"epoch": 1})
    stopper.release()
    assert path.read_text() == '{"epoch":0}\n'
