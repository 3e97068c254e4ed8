"""A whole comparison in a folder: begun, gone on with, and written down."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetwin.comparison._contenders import Contender
from sparsetwin.comparison._plan import TUNING_SEED, Plan, Task
from sparsetwin.comparison._results import corrected, rows_of
from sparsetwin.comparison._runner import Runner
from sparsetwin.comparison._spaces import knobs_of
from sparsetwin.comparison._tuning import tuning_of
from sparsetwin.errors import UsageError
from sparsetwin.report import (
    MethodRow,
    method_csv,
    method_markdown,
    tuning_csv,
    tuning_markdown,
    write_method_page,
)
from sparsetwin.training import RunFolder
from sparsetwin.training.environment import git_commit, machine, versions

TABLES = {"epochs": "Equal epochs", "flops": "Equal training FLOPs"}
"""Headings of the tables, by the names of `Task.table`."""

_PLAN = "comparison.json"
_GREW = (
    "This comparison has grown, by the commands below. The p-values do not account for that: whoever adds seeds "
    "because of what the first ones showed finds differences more often than they are there."
)


def compare(plan: Plan, runner: Runner, *, command: str, smoke: str | None = None) -> dict[str, list[MethodRow]]:
    """Run what of a comparison is not finished, and write its tables.

    A comparison that was stopped goes on where it was, run by run and step by step; one that is finished writes its
    tables anew, and one that has grown by contenders, sparsities or seeds trains those. In the runner's folder are runs
    in ``runs/``, ``trials/`` and ``equal-flops/``, and tables as CSV, Markdown and HTML.

    Args:
        plan: What is compared.
        runner: How and where.
        command: For the page.
        smoke: Why this is a smoke test, which calls no difference any; None of a comparison that may.

    Returns:
        Rows by table name.

    Raises:
        ConfigError: If a contender cannot be trained with the recipe.
        UsageError: If the folder holds another comparison, a run of other settings, or something else.
        TrainingError: If a run ends for another reason than that training came to nothing.
    """
    plan.check()
    out = runner.out
    described = _describe(plan, recipe_name=runner.recipe_name, command=command)
    _begin(out / _PLAN, described, plan)
    known = runner.run(plan)
    about = {**_about(json.loads((out / _PLAN).read_text())), **_made_by(known, out)}
    return write_tables(plan, known, out, about=about, smoke=smoke)


def write_tables(
    plan: Plan, known: list[Task], out: Path, *, about: dict[str, str], smoke: str | None = None
) -> dict[str, list[MethodRow]]:
    """Write ``comparison.csv``, ``.md`` and ``.html``; equal FLOPs and tuning have a CSV and a Markdown file more."""
    tables = corrected({name: rows_of(plan, known, out, table=name, ranks=smoke is None) for name in TABLES})
    for name, rows in tables.items():
        if rows:
            stem = "comparison" if name == "epochs" else "comparison-equal-flops"
            (out / f"{stem}.csv").write_text(method_csv(rows), encoding="utf-8")
            (out / f"{stem}.md").write_text(method_markdown(rows), encoding="utf-8")
    if tuning := tuning_of(plan, known, out):
        (out / "comparison-tuning.csv").write_text(tuning_csv(tuning), encoding="utf-8")
        (out / "comparison-tuning.md").write_text(tuning_markdown(tuning), encoding="utf-8")
    titled = {TABLES[name]: rows for name, rows in tables.items()}
    title = f"{about['recipe']}: {len(plan.contenders)} methods compared"
    notes = [*_said(plan), *([_GREW] if "part 1" in about else []), *([smoke] if smoke else [])]
    write_method_page(titled, out / "comparison.html", title=title, notes=notes, about=about, tuning=tuning)
    return tables


def _said(plan: Plan) -> list[str]:
    """Return how the numbers came about."""
    said = [
        "Test accuracy after the last epoch: the mean over seeds, the deviation of the sample and the 95% interval of "
        f"the mean (Student's t). Differences are to {plan.reference} and to the dense baseline, paired by seed. A "
        "method is called better or worse only with at least five seeds, none of which failed, and a p-value below "
        f"0.05 after Holm's correction over all differences here; seeds: {len(plan.seeds)}.",
        "Training FLOPs count every pass of a method, forward and backward, at the weights that it needs, over those "
        f"of a dense training of {plan.recipe.train.epochs} epochs.",
    ]
    if any(contender.starts for contender in plan.contenders):
        starts = ", ".join(contender.label for contender in plan.contenders if contender.starts)
        said.append(
            f"Begun from a network that was trained densely for as many epochs before, with settings tuned as those of "
            f"the dense baseline: {starts}. Its FLOPs and its time are counted with theirs, so at equal epochs these "
            "methods train twice as long as the others."
        )
    longer = [c.label for c in plan.contenders if c.whole_rounds or "train.epochs" in c.changes]
    if longer:
        said.append(f"Not of {plan.recipe.train.epochs} epochs, as the column says: {', '.join(longer)}.")
    if plan.equal_flops:
        said.append(
            f"Equal training FLOPs: of {', '.join(plan.equal_flops)}, those that cost less than {plan.reference} are "
            "trained once more, for as many epochs as its FLOPs last on the first seed, all seeds for as many. In "
            f"that table are these, {plan.reference} itself, and the dense baseline, which costs what it costs."
        )
    if plan.trials:
        spaces = "; ".join(_space(contender) for contender in plan.contenders)
        said.append(
            f"Settings: the best of {plan.trials} trials for each method and sparsity, by hold-out accuracy after the "
            f"last epoch at the seed {TUNING_SEED}, which no compared run has. The first trial has the recipe's "
            "settings; the others go through learning rates and weight decays in this order and draw the rest: "
            f"{spaces}."
        )
    else:
        said.append("Settings were not tuned: every method has the recipe's.")
    return said


def _space(contender: Contender) -> str:
    if contender.aim is not None:
        return f"{contender.label}: {contender.aim.path}, as it takes to reach the sparsity"
    knobs = ", ".join(
        f"{knob.path} {'×' if knob.unit == 'own' else ''}{list(knob.values)}" for knob in knobs_of(contender)
    )
    return f"{contender.label}: {knobs}"


def _describe(plan: Plan, *, recipe_name: str, command: str) -> dict[str, object]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "version": 1,
        "plan": plan.plain(),
        "recipe": recipe_name,
        "command": command,
        "versions": versions(),
        "machine": machine(device),
        "git_commit": git_commit(),
    }


def _begin(path: Path, described: dict[str, object], plan: Plan) -> None:
    """Write the plan down, or refuse to go on with one that the folder's has not grown into."""
    out, temporary = path.parent, path.with_suffix(".tmp")
    if path.exists():
        there = _read(path)
        if unlike := plan.unlike(there["plan"]):
            raise UsageError(
                f"{out} holds another comparison: its {unlike[0]} {_are(unlike[0])}; choose another folder (--out), or "
                "give the command of that one to go on with it. It may only grow: contenders, sparsities and seeds"
            )
        if there["plan"] == described["plan"]:
            return
        described = {**described, "before": [*there.get("before", []), _without(there, "plan", "before")]}
    elif out.exists() and (not out.is_dir() or any(entry != temporary for entry in out.iterdir())):
        raise UsageError(f"{out} holds other files; give a new or an empty folder (--out)")
    out.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        there: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if there["version"] == 1 and isinstance(there["plan"], dict):
            return there
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{path} is not what a comparison wrote; choose another folder (--out)")


def _without(described: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name not in names}


def _are(name: str) -> str:
    return "differ" if name.endswith("s") else "differs"


def _about(described: dict[str, Any]) -> dict[str, str]:
    """Return what was compared, and by which commands the comparison grew to it."""
    about = {name: described[name] for name in ("recipe", "command")}
    return about | {f"part {n}": before["command"] for n, before in enumerate(described.get("before", []), 1)}


def _made_by(known: Sequence[Task], out: Path) -> dict[str, str]:
    """Return by what and on what the runs were made; a comparison may have gone on elsewhere."""
    runs = [RunFolder(out / task.folder).read() for task in known]
    made = Counter(_flat({**run["versions"], "commit": run["git_commit"], **run["machine"]}) for run in runs)
    return {f"runs {n}": f"{made[how]} of {len(runs)}: {how}" for n, how in enumerate(made, 1)}


def _flat(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
