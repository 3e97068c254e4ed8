"""From finished runs to the rows of a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsetwin.comparison._plan import Plan, Task
from sparsetwin.comparison._runner import outcome
from sparsetwin.comparison._statistics import holm, paired_difference, summary
from sparsetwin.errors import ConfigError
from sparsetwin.metrics import count_forward_flops
from sparsetwin.recipes import example_input, meta_model
from sparsetwin.report import Gap, MethodRow, Run, read_run


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run."""

    seed: int
    accuracy: float  # test accuracy after the last epoch
    twin: float  # of the dense half; NaN if the run left none beside the sparse one
    sparsity: float  # achieved
    training_share: float
    inference_share: float
    seconds: float
    epochs: float  # with those of the dense training that it began from


_Key = tuple[str, float | None]


def rows_of(plan: Plan, known: Sequence[Task], out: Path, *, table: str, ranks: bool = True) -> list[MethodRow]:
    """Return the rows of one table, in the order of sparsities and contenders; their p-values are not corrected yet.

    Args:
        plan: What is compared.
        known: All tasks.
        out: Folder of the comparison.
        table: "epochs", or "flops", which has the reference's own runs and the dense ones beside the longer ones.
        ranks: Whether differences may be called any.
    """
    yardstick = Yardstick.of(plan)
    shown = [task for task in known if task.table == table]
    dense = next((contender.label for contender in plan.contenders if contender.is_dense), None)
    if shown and table == "flops":
        beside = (plan.reference, dense)
        shown = [task for task in known if task.table == "epochs" and task.label in beside] + shown
    results: dict[_Key, list[Result]] = {key: [] for key in (keys_of(plan) if table == "epochs" else ())}
    for task in shown:
        found = _result(out, task, yardstick)
        results.setdefault((task.label, task.sparsity), []).extend([] if found is None else [found])
    order = {contender.label: index for index, contender in enumerate(plan.contenders)}
    keys = sorted(results, key=lambda key: (-1.0 if key[1] is None else key[1], order[key[0]]))
    return [_row(key, results, plan, ranks=ranks) for key in keys]


def keys_of(plan: Plan) -> list[_Key]:
    """Return the rows that a plan asks for, by contender and sparsity."""
    return [
        (contender.label, sparsity)
        for contender in plan.contenders
        for sparsity in ((None,) if contender.is_dense else plan.sparsities)
    ]


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """A dense training of the plan's network, in which the FLOPs of all runs are measured."""

    forward: int | None  # FLOPs of one sample; None if they are known to the runs only
    epochs: int

    @classmethod
    def of(cls, plan: Plan) -> "Yardstick":
        """Return the one of a plan."""
        try:
            forward = count_forward_flops(meta_model(plan.recipe), example_input(plan.recipe.dataset)).total()
        except ConfigError:
            forward = None
        return cls(forward=forward, epochs=plan.recipe.train.epochs)

    def training_flops(self, run: Run) -> float:
        """Return the FLOPs of the dense training, by what a run knows that may be longer or of a narrower network."""
        assert run.final is not None
        own_forward = run.final.dense_forward_flops
        widened = (self.forward or own_forward) / own_forward
        return run.final.dense_training_flops * widened * (self.epochs / run.start.epochs)


def _result(out: Path, task: Task, yardstick: Yardstick) -> Result | None:
    folder = out / task.folder
    found = outcome(folder)
    if found is None or not found.training_flops:
        return None
    run = read_run(folder)
    assert run.final is not None
    dense = run.final.members.get("dense")
    member = run.final.members.get("sparse", dense)
    assert member is not None
    assert member.test is not None
    spent, seconds = run.final.training_flops, sum(epoch.seconds for epoch in run.times)
    epochs = run.start.epochs
    if task.pretrained is not None:
        before = read_run(out / task.pretrained)
        assert before.final is not None
        spent += before.final.training_flops
        seconds += sum(epoch.seconds for epoch in before.times)
        epochs += before.start.epochs
    return Result(
        seed=run.seed,
        accuracy=member.test.accuracy,
        twin=math.nan if dense is None or dense.test is None or dense is member else dense.test.accuracy,
        sparsity=member.sparsity,
        training_share=spent / yardstick.training_flops(run),
        inference_share=member.forward_flops / (yardstick.forward or run.final.dense_forward_flops),
        seconds=seconds,
        epochs=epochs,
    )


def _row(key: _Key, results: Mapping[_Key, Sequence[Result]], plan: Plan, *, ranks: bool) -> MethodRow:
    label, sparsity = key
    found = results[key]

    def mean(name: str) -> float:
        return summary([getattr(result, name) for result in found]).mean if found else math.nan

    accuracy = summary([result.accuracy for result in found]) if found else None
    twins = [result.twin for result in found if not math.isnan(result.twin)]
    twin = summary(twins) if twins else None
    dense = next((contender.label for contender in plan.contenders if contender.is_dense), None)
    beside = results.get((plan.reference, plan.reference_at(sparsity)), []) if label != plan.reference else []
    dense_runs = results.get((dense, None), []) if dense not in (None, label, plan.reference) else []
    return MethodRow(
        label=label,
        sparsity=sparsity,
        achieved_sparsity=mean("sparsity"),
        epochs=mean("epochs"),
        seeds=len(found),
        accuracy=accuracy.mean if accuracy else math.nan,
        deviation=accuracy.deviation if accuracy else math.nan,
        half_width=accuracy.half_width if accuracy else math.nan,
        twin_accuracy=twin.mean if twin else math.nan,
        twin_deviation=twin.deviation if twin else math.nan,
        to_reference=_gap(found, beside),
        to_dense=_gap(found, dense_runs),
        training_share=mean("training_share"),
        inference_share=mean("inference_share"),
        seconds=mean("seconds"),
        failed=len(plan.seeds) - len(found),  # of a contender whose dense run failed there is no task at all
        ranks=ranks,
    )


def _gap(found: Sequence[Result], beside: Sequence[Result]) -> Gap | None:
    """Return how much the accuracies exceed others on the seeds that both have; None if there are none."""
    other = {result.seed: result.accuracy for result in beside}
    pairs = [(result.accuracy, other[result.seed]) for result in found if result.seed in other]
    if not pairs:
        return None
    compared = paired_difference(*zip(*pairs, strict=True))
    return Gap(pairs=compared.count, difference=compared.mean, half_width=compared.half_width, p_value=compared.p_value)


def corrected(tables: Mapping[str, Sequence[MethodRow]]) -> dict[str, list[MethodRow]]:
    """Correct all p-values of a comparison for their number (Holm).

    Args:
        tables: Name -> rows. What stands in several tables alike, to the seed, was compared once.
    """
    gaps = {_gap_key(row, name) for rows in tables.values() for row in rows for name in _GAPS if getattr(row, name)}
    tested = [key for key in sorted(gaps, key=str) if not math.isnan(key[-1].p_value)]
    p_values = dict(zip(tested, holm([key[-1].p_value for key in tested]), strict=True))

    def after(row: MethodRow) -> MethodRow:
        keys = {name: _gap_key(row, name) for name in _GAPS}
        return replace(row, **{name: replace(k[-1], p_value=p_values[k]) for name, k in keys.items() if k in p_values})

    return {name: [after(row) for row in rows] for name, rows in tables.items()}


_GAPS = ("to_reference", "to_dense")


def _gap_key(row: MethodRow, name: str) -> tuple[str, float | None, str, Any]:
    return row.label, row.sparsity, name, getattr(row, name)
