"""A pair that is stopped at any moment of a change is the pair before it or the pair after it."""

import contextlib
import copy
import errno
import itertools
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from sparsetwin.checkpoint import Pair
from sparsetwin.checkpoint import pair as pair_module
from sparsetwin.errors import CheckpointError


def contents(pair, model):
    """All that can be seen of a pair: per member its listed values and its state."""
    return {
        name: (member, {key: value.tolist() for key, value in pair.load(name, model).state_dict().items()})
        for name, member in pair.members.items()
    }


def files(pair):
    return {path.name: path.read_bytes() for path in pair.folder.iterdir()}


CHANGES = {
    "replace a half": lambda pair, model, view: pair.save(model, view, metrics={"new": 1}),
    "add a member": lambda pair, model, view: pair.save(model, view, name="sparse-0.9"),
    "annotate": lambda pair, model, view: pair.annotate("sparse", {"new": 1}),
    "rename": lambda pair, model, view: pair.rename("sparse", "sparse-old"),
    "rename over another": lambda pair, model, view: pair.rename("dense", "sparse"),
    "copy": lambda pair, model, view: pair.copy("sparse", "sparse-best"),
    "copy over another": lambda pair, model, view: pair.copy("dense", "sparse"),
}


@pytest.fixture
def later(pruned, sparse_view):
    """The sparse half of a later phase."""
    later = copy.deepcopy(pruned)
    with torch.no_grad():
        later.linear.bias.add_(1)
    return later, type(sparse_view)(40, sparse_view.masks)


@pytest.mark.parametrize(
    ("change", "error"),
    [*((change, "stop") for change in CHANGES), ("replace a half", "disk full"), ("copy", "disk full")],
)
def test_a_stop_at_any_moment_leaves_the_pair_before_or_after(
    tmp_path, stopper, network, pruned, dense_view, sparse_view, later, change, error
):
    def build(folder):
        pair = Pair(tmp_path / folder)
        pair.save(network, dense_view)
        pair.save(pruned, sparse_view)
        return pair

    start = build("start")
    before = contents(start, network)
    finished = build("end")
    CHANGES[change](finished, *later)
    after = contents(finished, network)
    assert before != after
    seen = []
    for at in range(200):
        for done_first in (False, True) if error == "stop" else (False,):
            pair = Pair(shutil.copytree(start.folder, tmp_path / f"{at}{done_first}"))
            stopper.stop(at, *([OSError(errno.ENOSPC, "full")] * (error == "disk full")), done_first=done_first)
            with contextlib.suppress(stopper.stopped, CheckpointError):
                CHANGES[change](pair, *later)
            reached = stopper.release() > at
            reopened = Pair(pair.folder)
            seen.append(contents(reopened, network))
            assert seen[-1] in (before, after)
            reopened.verify()
            if seen[-1] == before:
                CHANGES[change](reopened, *later)
            else:
                reopened.annotate("sparse" if "sparse" in after else "dense", {})  # any change settles the rest
            assert files(reopened) == files(finished)  # nothing stale is left either
        if not reached:
            assert seen[-1] == after
            assert before in seen
            return
    pytest.fail("the change never completed")


def test_reading_a_pair_that_was_stopped_changes_nothing_on_the_disk(
    tmp_path, stopper, network, pruned, dense_view, sparse_view, later
):
    pair = Pair(tmp_path)
    pair.save(pruned, sparse_view)
    for at in range(20):
        stopper.stop(at)
        with pytest.raises(stopper.stopped):
            pair.save(*later)
        stopper.release()
        left = files(pair)
        pair.verify()
        pair.masks("sparse")
        pair.sparse(network)
        assert files(pair) == left


def test_a_file_that_is_neither_the_old_nor_the_new_one_is_named(
    tmp_path, stopper, pruned, sparse_view, later, network
):
    pair = Pair(tmp_path)
    pair.save(pruned, sparse_view)
    for at in range(100):
        stopper.stop(at)
        with pytest.raises(stopper.stopped):
            pair.save(*later)
        stopper.release()
        if "switching_to" in (tmp_path / "pair.json").read_text():
            break
    (tmp_path / "sparse.safetensors").write_bytes(b"neither")
    with pytest.raises(CheckpointError, match="of member 'sparse' is corrupted"):
        pair.sparse(network)
    pair.save(*later)
    pair.verify()


def test_a_pair_can_be_read_while_it_is_being_replaced(tmp_path, network, pruned, sparse_view, later, same_bits):
    pair = Pair(tmp_path)
    pair.save(pruned, sparse_view)
    done = threading.Event()

    def write():
        for _ in range(20):
            for model, view in (later, (pruned, sparse_view)):
                pair.save(model, view)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    expected = [copy.deepcopy(model.state_dict()) for model in (later[0], pruned)]
    reads = 0
    while not done.is_set():
        found = Pair(tmp_path).sparse(network).state_dict()
        which = 0 if torch.equal(found["linear.bias"], expected[0]["linear.bias"]) else 1
        same_bits(found, expected[which])
        reads += 1
    writer.join()
    assert reads


def test_a_pair_that_never_stays_the_same_is_given_up(tmp_path, network, pruned, sparse_view, later, monkeypatch):
    pair = Pair(tmp_path)
    pair.save(pruned, sparse_view)
    others, read = itertools.cycle((later, (pruned, sparse_view))), pair_module.load_sparse

    def overtaken(path):
        found = read(path)
        Pair(tmp_path).save(*next(others))
        return found

    monkeypatch.setattr(pair_module, "load_sparse", overtaken)
    monkeypatch.setattr(pair_module, "_PATIENCE", 0.2)
    with pytest.raises(CheckpointError, match="changes faster than member 'sparse' can be read"):
        pair.sparse(network)


_KILL_MANY = """
import os, random, signal, sys, time
import torch
from dataclasses import dataclass, field
from torch import nn
from sparsetwin.checkpoint import Pair
torch.set_num_threads(1)  # threads do not survive a fork

@dataclass
class View:
    steps: int
    masks: dict = field(default_factory=dict)
    phase: None = None
    target_names: tuple = ("weight",)

def model(step):
    model = nn.Linear(300, 300)
    with torch.no_grad():
        model.weight.fill_(step)
        model.bias.fill_(step)
    return model

pair, moments = Pair(sys.argv[1]), random.Random(0)
step = 0
for attempt in range(20):
    read, report = os.pipe()
    child = os.fork()
    while child == 0:
        signal.alarm(60)  # ends it even if nobody kills it
        step += 1
        pair.save(model(step), View(step))
        os.write(report, b"%d " % step)
    os.close(report)
    reported = os.read(read, 100)
    time.sleep(moments.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 100):
        reported += more
    os.close(read)
    last, step = int(reported.split()[-1]), pair.members["dense"].step
    assert step in (last, last + 1), (step, last)
    assert all(bool(tensor.eq(step).all()) for tensor in pair.dense(model(0)).state_dict().values())
    pair.verify()
pair.save(model(step), View(step))
assert len(os.listdir(sys.argv[1])) == 3, os.listdir(sys.argv[1])
print("as promised")
"""


def test_a_killed_process_always_leaves_a_whole_pair(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILL_MANY, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "as promised\n", done.stderr
