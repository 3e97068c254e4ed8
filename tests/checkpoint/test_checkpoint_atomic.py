import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys

import pytest

from sparsetwin.checkpoint._atomic import remove_stale, replace_file, sha256_of, write_temporary
from sparsetwin.errors import CheckpointError


def test_a_file_is_replaced_and_its_sha256_returned(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"first", b"second, longer"):
        digest = replace_file(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
        assert digest == sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert [path.name for path in path.parent.iterdir()] == ["file"]


def test_a_new_file_has_the_permissions_that_the_user_asked_for(tmp_path):
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", lambda file: file.write(b"x"))
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replace_file(path, write)
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_is_named_and_the_old_file_kept(tmp_path, number, exists):
    path = tmp_path / "file"
    if exists:
        path.write_bytes(b"old")

    def write(file):
        raise OSError(number, os.strerror(number))

    kept = "the previous file is kept" if exists else "no file is left"
    with pytest.raises(CheckpointError, match=rf"disk full while writing .*file: .*, {kept}"):
        replace_file(path, write)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"] * exists


def test_every_stop_leaves_the_old_or_the_new_file(tmp_path, stopper):
    path = tmp_path / "file"
    for at in range(100):
        for done_first in (False, True):
            path.write_bytes(b"old")
            stopper.stop(at, done_first=done_first)
            with contextlib.suppress(stopper.stopped):
                replace_file(path, lambda file: file.write(b"new"))
            reached = stopper.release() > at
            assert path.read_bytes() in (b"old", b"new")
            remove_stale(tmp_path)
            assert [path.name for path in tmp_path.iterdir()] == ["file"]
        if not reached:
            assert path.read_bytes() == b"new"
            return
    pytest.fail("the write never completed")


def test_an_input_output_error_at_any_call_is_a_checkpoint_error_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for function in ("replace", "fsync"):
        path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, function, lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
            with pytest.raises(CheckpointError, match=r"cannot write .*file: bad disk, the previous file is kept"):
                replace_file(path, lambda file: file.write(b"new"))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_flushed_is_told_from_a_file_that_was_not_written(tmp_path, stopper):
    stopper.stop(4, OSError(errno.EIO, "bad disk"))  # mkdir, open, fsync, replace, and then the folder's fsync
    with pytest.raises(CheckpointError, match=r"file is written, but a power cut may undo it: bad disk"):
        replace_file(tmp_path / "file", lambda file: file.write(b"new"))
    stopper.release()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_stale_files_are_removed_and_others_are_not(tmp_path):
    stale = write_temporary(tmp_path / "a.pt", lambda file: file.write(b"x")).temporary
    other = write_temporary(tmp_path / "b.pt", lambda file: file.write(b"x")).temporary
    kept = [tmp_path / name for name in ("a.pt", ".hidden.tmp", "x.tmp", ".a.pt.12345678.tmp2", ".a.pt.nothexad.tmp")]
    for path in kept:
        path.write_bytes(b"")
    remove_stale(tmp_path, target="a.pt")
    assert set(tmp_path.iterdir()) == {*kept, other}
    assert not stale.exists()
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == set(kept)
    remove_stale(tmp_path / "missing")


def test_a_missing_file_has_no_sha256(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*missing: No such file"):
        sha256_of(tmp_path / "missing")


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot write .*no file is left"):
        replace_file(tmp_path / "file" / "inside", lambda file: file.write(b"x"))


_FILL = """
import sys, torch
from pathlib import Path
from sparsetwin.checkpoint import CheckpointStore, save_dense, append_line
from sparsetwin.errors import CheckpointError
if sys.argv[2] == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder, small, large = Path(sys.argv[1]), torch.ones(1000), torch.ones(100_000)
store = CheckpointStore(folder / "checkpoints")
def refused(write, size):
    write(small)
    try:
        write(large)
    except CheckpointError as error:
        assert "disk full while writing" in str(error) and "is kept" in str(error), error
    else:
        raise AssertionError("the disk was not full")
refused(lambda tensor: save_dense(folder / "network.safetensors", {"w": tensor}), large)
refused(lambda tensor: store.save({"w": tensor}, step=1), large)
line = {"text": "x" * 10_000}
try:
    while True:
        size = append_line(folder / "log.jsonl", line)
except CheckpointError as error:
    assert "the log is as it was" in str(error), error
assert (folder / "log.jsonl").stat().st_size == size
assert store.latest()[1]["w"].numel() == 1000
assert {p.name for p in folder.rglob("*.*")} == {"log.jsonl", "network.safetensors", "step-000000001.pt"}
print("as promised")
"""


@pytest.mark.parametrize("kind", ["limit", "disk"])
def test_a_disk_that_is_really_full_loses_nothing(tmp_path, kind):
    command = [sys.executable, "-c", _FILL, str(tmp_path), kind]
    if kind == "disk":
        mount = f"mount -t tmpfs -o size=200k none {tmp_path}"
        in_namespace = ["unshare", "-rm", "sh", "-c"]
        if not shutil.which("unshare") or subprocess.run([*in_namespace, mount], capture_output=True).returncode:
            pytest.skip("needs a user namespace in which a small disk can be mounted")
        command = [*in_namespace, f'{mount} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "as promised\n", done.stderr
