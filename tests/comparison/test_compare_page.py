"""docs/compare.md says what the code does: the search space, the labels, the columns."""

import re
from pathlib import Path

from sparsetwin.comparison import find_contender, known_labels
from sparsetwin.comparison._plan import TUNING_SEED
from sparsetwin.comparison._spaces import COMMON, HAM_KNOBS
from sparsetwin.methods import METHODS, Knob
from sparsetwin.report import METHOD_HEADINGS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "compare.md").read_text()


def rows(heading: str, *, page: str = PAGE) -> list[list[str]]:
    """Return the cells of the table whose heading row begins so."""
    lines = page[page.index(heading) :].splitlines()[2:]
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def shown(knob: Knob) -> str:
    values = ", ".join(
        f"({', '.join(f'{v:g}' for v in value)})" if isinstance(value, tuple)
        else f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
        for value in knob.values
    )  # fmt: skip
    return {"own": "x ", "run": "fraction ", "": ""}[knob.unit] + values


def test_the_search_space_is_the_published_one():
    published = {
        (method.strip(" `"), path.strip("`"), values)
        for page in (PAGE, *(card.read_text() for card in DOCS.glob("methods/*.md")))
        if "| methods | setting" in page
        for methods, path, values in rows("| methods | setting", page=page)
        for method in methods.split(",")
    }
    spaces = {"all": COMMON, "with HAM": HAM_KNOBS, **{name: method.knobs for name, method in METHODS.items()}}
    assert published == {(name, knob.path, shown(knob)) for name, knobs in spaces.items() for knob in knobs}
    assert f"same seed ({TUNING_SEED})" in PAGE


def test_every_special_contender_and_no_other_is_listed():
    listed = {label for cells in rows("| label | what") for label in re.findall("`([^`]+)`", cells[0])}
    special = {label for label in known_labels() if label not in METHODS or len(find_contender(label).changes) > 1}
    special |= {label for label in known_labels() if find_contender(label).starts}
    assert listed == special | {"dense"}


def test_every_column_is_explained():
    explained = {name.strip() for cells in rows("| column | meaning") for name in cells[0].split(",")}
    assert explained == set(METHOD_HEADINGS) - {"method"}
