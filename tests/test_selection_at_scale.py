"""Selection on ResNet-50: the exact number, the right weights, and hardly any memory besides the masks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selection_cases import by_magnitude, kept, shapes_of, sizes_of
from sparsetwin.distributions import Global
from sparsetwin.models import resnet50
from sparsetwin.selection import select_masks
from sparsetwin.targets import Targets

MEMORY = """
import json, re
from pathlib import Path

import torch

from sparsetwin.distributions import Budget
from sparsetwin.scores import magnitude
from sparsetwin.selection import select_masks

torch.set_num_threads(1)
torch.manual_seed(0)

def mebibytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def select(weights):
    budget = Budget(tuple(weights), round(0.05 * sum(weight.numel() for weight in weights.values())))
    return select_masks(weights, lambda name: magnitude(weights[name]), [budget])

def measure(weights):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = mebibytes("VmRSS")
    masks = select(weights)
    kept, size = (sum(int(count) for count in counts) for counts in (
        [mask.sum() for mask in masks.values()], [mask.numel() for mask in masks.values()]))
    return {"kept": kept, "size": size, "extra": mebibytes("VmHWM") - before - size / 2**20}

select({"small": torch.randn(512, 512)})  # loads what is loaded on the first call
weights = {f"layer{index}": torch.randn(512, 512, 3, 3) for index in range(11)}
plain = measure(weights)
weights = {name: weight.to(memory_format=torch.channels_last) for name, weight in weights.items()}
channels_last = measure(weights)
weights = {name: torch.full((512, 512, 3, 3), 0.5) for name in weights}
print(json.dumps({"contiguous": plain, "channels last": channels_last, "all equal": measure(weights)}))
"""


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return Targets().resolve(resnet50())


def test_resnet50_at_95_percent_keeps_exactly_1275146_of_25502912(weights):
    budgets = Global().budgets(shapes_of(weights), 0.95)
    masks = select_masks(weights, by_magnitude(weights), budgets)
    assert (len(weights), sum(sizes_of(weights).values())) == (54, 25_502_912)
    assert sum(kept(masks).values()) == 1_275_146
    assert kept(masks)["fc.weight"] == 1  # its initial weights are so small that a plain ranking would keep none
    plainly = select_masks(weights, by_magnitude(weights), budgets, minimum_kept=0)
    assert sum(kept(plainly).values()) == 1_275_146
    assert kept(plainly)["fc.weight"] == 0
    smallest = min(weights[name].abs()[mask].min() for name, mask in plainly.items() if mask.any())
    largest = max(weights[name].abs()[~mask].max() for name, mask in plainly.items())
    assert largest <= smallest


@pytest.fixture(scope="module")
def memory():
    """Measure, in a process that gives large blocks back when they are freed: the peak is what selection holds."""
    if sys.platform != "linux" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to measure peak memory")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(subprocess.check_output([sys.executable, "-c", MEMORY], env=environment))


@pytest.mark.parametrize(("case", "mebibytes"), [("contiguous", 24), ("channels last", 40), ("all equal", 96)])
def test_selection_from_26_million_weights_holds_few_mebibytes_besides_the_masks(case, mebibytes, memory):
    assert memory[case]["size"] == 25_952_256
    assert memory[case]["kept"] == 1_297_613
    assert memory[case]["extra"] <= mebibytes
