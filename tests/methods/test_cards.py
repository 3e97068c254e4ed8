"""Every method has a card, and the card's code runs."""

import dataclasses
import re
from pathlib import Path

import pytest

import sparsetwin as st
from sparsetwin.methods import METHODS

CARDS = Path(__file__).parents[2] / "docs" / "methods"
CARDED = {**METHODS, "ham": st.HAM, "int8": st.Int8}  # the add-ons have cards too
PAPER_ROW = re.compile(r"^\| `(?P<name>[a-z0-9-]+)`.*\| (?P<prunings>\d+) \|$", re.MULTILINE)


@pytest.mark.parametrize("name", CARDED)
def test_the_code_of_a_card_runs(name):
    blocks = re.findall(r"```python\n(.*?)```", (CARDS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec"), {})


@pytest.mark.parametrize("name", CARDED)
def test_a_card_names_every_field_with_its_default(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(CARDED[name]):
        default = "(none)" if field.name == "schedule" else f"`{field.default!r}`".replace("'", '"')
        assert f"| `{field.name}` | {default} |" in text


def test_the_card_of_acdc_lists_every_schedule_of_the_paper_with_its_prunings():
    rows = PAPER_ROW.findall((CARDS / "acdc.md").read_text(encoding="utf-8"))
    expected = []
    for name in st.schedules.PAPER_NAMES:
        schedule = st.schedules.paper(name, sparsity=0.9, steps_per_epoch=1)
        expected.append((name, str(sum(phase.is_sparse for phase in schedule.phases))))
    assert rows == expected
