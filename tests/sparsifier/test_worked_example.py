"""The method that CONTRIBUTING shows needs what the page says and nothing else, in a copy of the project."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_promises as promises
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(ENTRY,) = re.findall(r'^\| `("dpf": \w+,)` and its import \|', TEXT, re.MULTILINE)
(ROW,) = re.findall(r'^\| `("dpf": Row\(.*\),)` \|', TEXT, re.MULTILINE)
COPIED = ("src", "tests", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md")
CASES = {
    "optimizer": list(promises.OPTIMIZERS),
    "wrap": [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    "wrapped_at": ["saving", "loading"],
}


class Copy:
    """The project with the method added."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def python(self, *arguments: object) -> str:
        """Run python in the copy; return what it printed."""
        env = {**os.environ, "PYTHONPATH": f"{self.root / 'src'}:{self.root / 'tests' / 'cli'}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=self.root, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def insert(path: Path, line: str, *, after: str) -> None:
    """Put a line behind the only one that begins so."""
    lines = path.read_text(encoding="utf-8").splitlines()
    (place,) = [number for number, each in enumerate(lines) if each.startswith(after)]
    path.write_text("\n".join([*lines[: place + 1], line, *lines[place + 1 :], ""]), encoding="utf-8")


def card(method: type) -> str:
    """Return a card with what tests ask for, and the method's knobs."""
    code = (
        "import sparsetwin as st\nfrom sparsetwin.methods import METHODS\n\n"
        'method = METHODS["dpf"](schedule=st.schedules.constant(sparsity=0.9, total_steps=10))\n'
    )
    fields = [
        f"| `{f.name}` | " + ("(none)" if f.name == "schedule" else f"`{f.default!r}`".replace("'", '"')) + " | what |"
        for f in dataclasses.fields(method)
    ]
    knobs = [
        f"| `dpf` | `{knob.path}` | fraction {', '.join(f'{value:g}' for value in knob.values)} |"
        for knob in method.knobs  # type: ignore[attr-defined]
    ]
    parts = [f"# DPF\n\n```python\n{code}```\n", "| field | default | what |\n|---|---|---|", *fields]
    return "\n".join([*parts, "", "| methods | setting | values |\n|---|---|---|", *knobs, ""])


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Copy:
    """The project with a file, a card, an entry and a row more."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    methods = root / "src" / "sparsetwin" / "methods"
    (methods / "dpf.py").write_text(CODE, encoding="utf-8")
    insert(methods / "__init__.py", "from sparsetwin.methods.dpf import DPF", after="from sparsetwin.methods.dense")
    insert(methods / "__init__.py", f"    {ENTRY}", after='    "dense": ')
    insert(root / "tests" / "sparsifier" / "test_promises.py", f"    {ROW}", after="ROWS = {")
    (root / "docs" / "methods" / "dpf.md").write_text(card(loaded()), encoding="utf-8")
    return Copy(root)


def loaded() -> type:
    """Return the class that the page shows."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("dpf", loader=None))  # type: ignore[arg-type]
    exec(compile(CODE, "CONTRIBUTING.md", "exec"), vars(module))
    found: type = module.DPF
    return found


def test_the_worked_example_is_about_thirty_lines():
    assert 20 <= len(CODE.splitlines()) <= 35
    assert isinstance(ast.parse(CODE).body[-1], ast.ClassDef)


@pytest.mark.parametrize("name", [name for name in vars(promises.TestEveryMethod) if name.startswith("test_")])
def test_it_keeps_every_promise(name):
    row = eval(ROW.partition(": ")[2].rstrip(","), {**vars(promises), "METHODS": {"dpf": loaded()}})
    promise = getattr(promises.TestEveryMethod(), name)
    cases: list[dict] = [{}]
    for parameter in inspect.signature(promise).parameters:
        if parameter != "row":
            cases = [{**case, parameter: value} for case in cases for value in CASES[parameter]]
    for case in cases:
        promise(row, **case)


def test_a_method_without_a_row_is_asked_for_one(monkeypatch):
    monkeypatch.setitem(promises.METHODS, "dpf", loaded())
    with pytest.raises(AssertionError, match="dpf"):
        promises.test_every_method_is_held_to_the_promises()


def test_the_tests_over_all_methods_hold_for_it(copied):
    """Those that go through METHODS, and not only a few of it."""
    chosen = (
        "dpf or held_to_the_promises or compare_page or every_method_has_a_card or what_is_not_given or is_a_contender "
        "or methods_are_listed"
    )
    files = (
        "sparsifier/test_promises.py", "methods/test_cards.py", "methods/test_dense.py", "methods/test_int8.py",
        "recipes/test_methods_of_recipes.py", "training/test_costs.py", "training/test_every_method.py",
        "comparison/test_comparison_plan.py", "comparison/test_compare_page.py", "docs/test_docs.py",
    )  # fmt: skip
    said = copied.python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{file}" for file in files), "-k", chosen
    )
    assert re.search(r"\b[2-9][0-9] passed", said)
    assert not re.search("failed|error", said)


def test_the_command_line_lists_schedules_trains_and_compares_it(copied):
    network = ("--epochs", 1, "--model.name", "tiny_networks:convolutional")
    commands = [
        ["methods"],
        ["schedule", "digits", "--method.name", "dpf"],
        ["train", "digits", *network, "--method.name", "dpf", "--out", "run", "--quiet"],
        ["compare", "digits", *network, "--method.name", "static", "--methods", "dpf", "static", "--seeds", 1,
         "--reference", "static", "--out", "table", "--quiet"],
    ]  # fmt: skip
    code = (
        "import json, sys; from sparsetwin.cli.__main__ import main; "
        "sys.exit(max(main([*map(str, each), '--json']) for each in json.loads(sys.argv[1])))"
    )
    lines = copied.python("-c", code, json.dumps(commands)).splitlines()
    methods, schedule, run, table = (json.loads(line) for line in lines if line.startswith("{"))
    assert methods["methods"]["dpf"]["summary"].startswith("Compute with the largest weights")
    assert [phase[2] for phase in schedule["phases"]] == [0.9] * 50
    assert "sparse" in run["members"]
    assert {row["label"]: row["seeds"] for row in table["epochs"]} == {"dpf": 1, "static": 1}
