import contextlib
import enum
import math
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparsetwin.checkpoint import CheckpointStore, CheckpointWarning
from sparsetwin.errors import CheckpointError


class Colour(enum.IntEnum):
    RED = 1


def state(step):
    """A state as a run has it: model, optimizer, generator and plain values."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "plain": {"step": step, "list": [1, 2.5, None, True, "x", b"y", math.inf, (1, 2)], "size": torch.Size([2])},
        "bfloat16": torch.randn(3).bfloat16(),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(2)),
    }


def assert_equal(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_what_was_saved_is_loaded(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.latest() is None
    assert store.steps == ()
    for step in (3, 10):
        path = store.save(state(step), step=step)
    assert store.steps == (3, 10)
    assert_equal(store.load(3), state(3))
    found, latest = CheckpointStore(tmp_path / "checkpoints").latest()
    assert found == 10
    assert_equal(latest, state(10))
    assert_equal(torch.load(path, weights_only=True)["state"], state(10))  # any PyTorch reads the file
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.load_state_dict(latest["model"])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_named_ones_for_good(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep=keep)
    store.save({"x": 0}, step=0, name="branch")
    for step in range(1, 8):
        store.save({"x": step}, step=step)
    assert store.steps == tuple(range(8 - keep, 8))
    assert store.names == ("branch",)
    assert store.load_named("branch") == (0, {"x": 0})
    store.save({"x": 9}, step=9, name="branch")
    assert store.load_named("branch") == (9, {"x": 9})
    assert store.latest() == (7, {"x": 7})


def test_named_checkpoints_alone_are_no_latest(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save({}, step=5, name="branch")
    assert store.latest() is None


def test_steps_are_ordered_as_numbers_beyond_the_padding(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save({"x": 1}, step=999_999_999)
    store.save({"x": 2}, step=1_000_000_000)
    assert store.latest() == (1_000_000_000, {"x": 2})


def test_saving_an_earlier_step_ends_the_course_of_the_run_that_was_left(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save({"x": "old"}, step=20)
    store.save({"x": "new"}, step=15)
    assert store.latest() == (15, {"x": "new"})
    assert store.steps == (15,)


class Odd(nn.Module):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": [1, {"b": Odd()}]}, r"state\['a'\]\[1\]\['b'\] is of type .*Odd"),
        ({"a": np.float64(1)}, r"state\['a'\] is of type numpy.float64"),
        ({"a": np.zeros(1)}, r"state\['a'\] is of type numpy.ndarray"),
        ({"a": Path("x")}, r"state\['a'\] is of type pathlib"),
        ({"a": Colour.RED}, r"state\['a'\] is of type .*Colour"),
        ({"a": defaultdict(int)}, r"state\['a'\] is of type collections.defaultdict"),
        ({"a": {(1, 2): 3}}, r"state\['a'\] has the key \(1, 2\) of type builtins.tuple"),
        ({"a": len}, r"state\['a'\] is of type builtins.builtin_function_or_method"),
    ],
)
def test_what_could_not_be_loaded_safely_is_refused_by_name_before_anything_is_written(tmp_path, value, named):
    store = CheckpointStore(tmp_path)
    store.save({"x": 1}, step=1)
    with pytest.raises(CheckpointError, match=named):
        store.save(value, step=2)
    assert store.latest() == (1, {"x": 1})


def test_every_accepted_kind_of_value_loads(tmp_path):
    store = CheckpointStore(tmp_path)
    values = [None, True, 1, 2**100, 0.5, "x", b"y", torch.ones(2), torch.Size([1]), torch.float16, (1,), [], {}]
    values += [OrderedDict(a=1), {1: 2, None: 3, 0.5: 4, False: 5}, torch.tensor(3), torch.zeros(2, dtype=torch.bool)]
    store.save({"values": values}, step=1)
    assert_equal(store.load(1)["values"], values)


@pytest.mark.parametrize("name", ["", "step-1", "../x", "a/b", ".x", "X", "a b", "x" * 101, "step-000000001"])
def test_names_that_could_be_paths_or_steps_are_refused(tmp_path, name):
    store = CheckpointStore(tmp_path / "inner")
    with pytest.raises(CheckpointError, match="a checkpoint's name holds"):
        store.save({}, step=1, name=name)
    with pytest.raises(CheckpointError, match="a checkpoint's name holds"):
        store.load_named(name)
    assert list(tmp_path.rglob("*.pt")) == []


def test_misuse_says_what_would_work(tmp_path):
    with pytest.raises(CheckpointError, match="keep needs to be at least 1 checkpoint, got 0"):
        CheckpointStore(tmp_path, keep=0)
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="steps are counted from 0, got -1"):
        store.save({}, step=-1)
    store.save({}, step=4)
    store.save({}, step=4, name="branch")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*; steps: 4"):
        store.load(5)
    with pytest.raises(CheckpointError, match=r"no checkpoint named 'branhc' in .*; did you mean 'branch'"):
        store.load_named("branhc")


def damage(path, kind):
    content = path.read_bytes()
    middle = len(content) // 2
    if kind == "flipped":
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    elif kind == "cut":
        content = content[:middle]
    elif kind == "longer":
        content += b"x"
    elif kind == "empty":
        content = b""
    elif kind == "zeroed":
        content = bytes(len(content))
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flipped", "cut", "longer", "empty", "zeroed"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_it(tmp_path, kind):
    store = CheckpointStore(tmp_path)
    store.save({"x": 1}, step=1)
    damage(store.save({"x": 2}, step=2), kind)
    with pytest.warns(CheckpointWarning, match=r"step-000000002.pt is .*; resuming from step 1 instead"):
        assert store.latest() == (1, {"x": 1})
    with pytest.raises(CheckpointError, match=r"step-000000002.pt is (corrupted|truncated)"):
        store.load(2)
    store.save({"x": 3}, step=3)
    assert store.latest() == (3, {"x": 3})


def test_if_no_checkpoint_is_good_each_is_named(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        damage(store.save({"x": step}, step=step), "cut")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*step-000000002.*step-000000001"):
        store.latest()


def test_every_truncation_and_every_flipped_byte_is_found(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save({"x": torch.arange(5)}, step=1)
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position])
        with pytest.raises(CheckpointError, match=r"step-000000001.pt"):
            store.load(1)
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"step-000000001.pt"):
            store.load(1)


def test_a_renamed_or_foreign_checkpoint_is_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save({"x": 1}, step=1).rename(tmp_path / "step-000000007.pt")
    with pytest.raises(CheckpointError, match="holds step 1; it was renamed"):
        store.load(7)
    torch.save({"x": 1}, tmp_path / "step-000000008.pt")
    with pytest.raises(CheckpointError, match="truncated or no checkpoint of this library"):
        store.load(8)


def test_every_stop_while_saving_leaves_a_good_checkpoint(tmp_path, stopper):
    store = CheckpointStore(tmp_path)
    for at in range(100):
        for done_first in (False, True):
            for step in (1, 2):
                store.save({"x": step}, step=step)
            stopper.stop(at, done_first=done_first)
            with contextlib.suppress(stopper.stopped):
                store.save({"x": 3}, step=3)
            reached = stopper.release() > at
            found = store.latest()
            assert found in ((2, {"x": 2}), (3, {"x": 3}))
            store.save({"x": 4}, step=4)
            assert len(list(tmp_path.iterdir())) == 2  # nothing stale is left
        if not reached:
            assert found == (3, {"x": 3})
            return
    pytest.fail("the save never completed")
