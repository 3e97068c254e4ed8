"""Which settings the trials of a comparison led to, and what the trials cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsetwin.comparison._contenders import PRETRAINED, Contender, changed
from sparsetwin.comparison._plan import Plan, Task
from sparsetwin.comparison._results import Yardstick, keys_of
from sparsetwin.comparison._runner import outcome
from sparsetwin.comparison._spaces import knobs_of
from sparsetwin.comparison._tasks import start_of
from sparsetwin.recipes import Recipe
from sparsetwin.report import TuningRow, read_run


def tuning_of(plan: Plan, known: Sequence[Task], out: Path) -> list[TuningRow]:
    """Return a row for each method and sparsity whose trials have led to runs, and for what others begin from.

    Args:
        plan: What is compared.
        known: All tasks.
        out: Folder of the comparison.
    """
    yardstick = Yardstick.of(plan)
    start = start_of(plan)
    contenders = {contender.label: contender for contender in (*plan.contenders, *([start] if start else []))}
    hidden = [(start.label, None)] if start and start not in plan.contenders else []
    rows = []
    for label, sparsity in [*keys_of(plan), *hidden]:
        of_row = [task for task in known if (task.label, task.sparsity) == (label, sparsity)]
        trials = [task for task in of_row if task.table == "trials"]
        run = next((task.recipe for task in of_row if task.table in ("epochs", PRETRAINED)), None)
        chosen = next((i for i, t in enumerate(trials) if run and _led_to(t.recipe, run, contenders[label])), None)
        if run is None or chosen is None:
            continue
        outcomes = [found for trial in trials if (found := outcome(out / trial.folder)) is not None]
        rows.append(
            TuningRow(
                label=label,
                sparsity=sparsity,
                trials=tuple(found.holdout for found in outcomes),
                achieved=tuple(found.sparsity for found in outcomes),
                chosen=chosen,
                settings=_settings(contenders[label], run),
                training_share=_share(trials, out, yardstick),
            )
        )
    return rows


def _led_to(trial: Recipe, run: Recipe, contender: Contender) -> bool:
    """Return whether a run has the settings of a trial, but for its seed, its test, and what trials alone change."""
    alone = contender.aim.changes if contender.aim is not None else {}
    own = {path: contender.changes[path] for path in alone}
    return changed(trial, {**own, "seed": run.seed, "train.test": run.train.test}) == run


def _share(trials: Sequence[Task], out: Path, yardstick: Yardstick) -> float:
    """Return the FLOPs of trials, failed ones too, and of the dense run that they begin from; NaN if all failed."""
    folders = {trial.folder for trial in trials} | {trial.pretrained for trial in trials if trial.pretrained}
    runs = [read_run(out / folder) for folder in folders]
    ended = next((run for run in runs if run.final is not None), None)
    if ended is None:
        return math.nan
    return sum(run.training_flops for run in runs) / yardstick.training_flops(ended)


def _settings(contender: Contender, recipe: Recipe) -> str:
    paths = [contender.aim.path] if contender.aim is not None else [knob.path for knob in knobs_of(contender)]
    plain = recipe.plain()
    return ", ".join(f"{path} {_text(value)}" for path in paths if (value := _at(plain, path)) is not None)


def _at(plain: Mapping[str, Any], path: str) -> Any:
    """Return the value of a field; None where it is left to the method."""
    found: Any = plain
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_text, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
