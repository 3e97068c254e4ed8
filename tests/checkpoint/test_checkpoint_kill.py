"""Really killed processes: forked ones, so that each is saving within a moment."""

import subprocess
import sys

_KILL_MANY = """
import os, random, signal, sys, time, warnings
import torch
from sparsetwin.checkpoint import CheckpointStore

warnings.simplefilter("error")
torch.set_num_threads(1)  # threads do not survive a fork
store, moments = CheckpointStore(sys.argv[1]), random.Random(0)

def save_forever(step, report):
    while True:
        step += 1
        store.save({"x": torch.full((200_000,), float(step))}, step=step)
        os.write(report, b"%d " % step)

step = 0
for attempt in range(20):
    read, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(60)  # ends it even if nobody kills it
        save_forever(step, report)
    os.close(report)
    reported = os.read(read, 100)  # the first save is complete
    time.sleep(moments.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 100):
        reported += more
    os.close(read)
    last = int(reported.split()[-1])
    step, state = store.latest()  # a warning would be an error
    assert step in (last, last + 1), (step, last)
    assert torch.equal(state["x"], torch.full((200_000,), float(step)))
    assert len(store.steps) <= 3
store.save({}, step=step + 1)
assert len(os.listdir(sys.argv[1])) == 2, os.listdir(sys.argv[1])
print("as promised")
"""


def test_a_killed_run_always_leaves_a_good_latest_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILL_MANY, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "as promised\n", done.stderr
