"""The method that CONTRIBUTING shows keeps every promise, as it stands there."""

import inspect
import re
from pathlib import Path

import pytest
import test_promises as promises
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ScheduleError

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
CASES = {
    "optimizer": list(promises.OPTIMIZERS),
    "wrap": [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    "wrapped_at": ["saving", "loading"],
}


@pytest.fixture(scope="module")
def shown() -> dict:
    """What the code of the page defines."""
    namespace = {"__name__": "dsd", "st": st, "Row": promises.Row}
    for block in BLOCKS:
        exec(compile(block, "CONTRIBUTING.md", "exec"), namespace)
    return namespace


def test_the_worked_example_is_about_thirty_lines():
    assert len(BLOCKS) == 2
    assert 20 <= len(BLOCKS[0].splitlines()) <= 35


@pytest.mark.parametrize("name", [name for name in vars(promises.TestEveryMethod) if name.startswith("test_")])
def test_the_worked_example_keeps_every_promise(shown, name):
    promise = getattr(promises.TestEveryMethod(), name)
    cases: list[dict] = [{}]
    for parameter in inspect.signature(promise).parameters:
        if parameter != "row":
            cases = [{**case, parameter: value} for case in cases for value in CASES[parameter]]
    for case in cases:
        promise(shown["ROW"], **case)


def test_the_worked_example_refuses_other_schedules(shown):
    with pytest.raises(ScheduleError, match="DSD is dense, sparse, dense"):
        shown["DSD"](schedule=st.schedules.phases([(3, 0.8)]))
