"""Every test run draws the same examples; workers beside each other have one thread each."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that share a core wait for each other, busily, for most of the time
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def determinism_by_default() -> None:
    """Put back what the command line switches for its whole process, so that no test depends on those before it."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
