"""From finished runs to the rows of a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsetwin.comparison._plan import Plan, Task
from sparsetwin.comparison._runner import outcome
from sparsetwin.comparison._statistics import holm, paired_difference, summary
from sparsetwin.errors import ConfigError
from sparsetwin.metrics import count_forward_flops
from sparsetwin.recipes import example_input, meta_model
from sparsetwin.report import MethodRow, Run, read_run


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run."""

    seed: int
    accuracy: float  # test accuracy after the last epoch
    sparsity: float  # achieved
    training_share: float
    inference_share: float
    seconds: float


_Key = tuple[str, float | None]


def rows_of(plan: Plan, known: Sequence[Task], out: Path, *, table: str) -> list[MethodRow]:
    """Return the rows of one table, in the order of sparsities and contenders.

    Args:
        plan: What is compared.
        known: All tasks.
        out: Folder of the comparison.
        table: "epochs", or "flops", which has the reference's own runs beside the longer ones.
    """
    yardstick = Yardstick.of(plan)
    shown = [task for task in known if task.table == table]
    if shown and table == "flops":
        shown = [task for task in known if task.table == "epochs" and task.label == plan.reference] + shown
    results: dict[_Key, list[Result]] = {}
    failed: dict[_Key, int] = {}
    for task in shown:
        key = (task.label, task.sparsity)
        found = _result(out, task, yardstick)
        results.setdefault(key, []).extend([] if found is None else [found])
        failed[key] = failed.get(key, 0) + (found is None)
    if table == "epochs":  # of a contender whose dense run failed there is no task at all
        failed = {key: len(plan.seeds) - len(results.get(key, [])) for key in keys_of(plan)}
    order = {contender.label: index for index, contender in enumerate(plan.contenders)}
    keys = sorted(failed, key=lambda key: (-1.0 if key[1] is None else key[1], order[key[0]]))
    return _corrected([_row(key, results.get(key, []), failed[key], results, plan) for key in keys])


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
    member = run.final.members.get("sparse") or run.final.members["dense"]
    assert member.test is not None
    spent, seconds = run.final.training_flops, sum(epoch.seconds for epoch in run.times)
    if task.pretrained is not None:
        before = read_run(out / task.pretrained)
        assert before.final is not None
        spent += before.final.training_flops
        seconds += sum(epoch.seconds for epoch in before.times)
    return Result(
        seed=run.seed,
        accuracy=member.test.accuracy,
        sparsity=member.sparsity,
        training_share=spent / yardstick.training_flops(run),
        inference_share=member.forward_flops / (yardstick.forward or run.final.dense_forward_flops),
        seconds=seconds,
    )


def _row(key: _Key, found: Sequence[Result], failed: int, results: dict[_Key, list[Result]], plan: Plan) -> MethodRow:
    label, sparsity = key
    nan = math.nan
    if not found:
        return MethodRow(
            label=label, sparsity=sparsity, achieved_sparsity=nan, seeds=0, pairs=0, accuracy=nan, deviation=nan,
            half_width=nan, difference=nan, difference_half_width=nan, p_value=nan, training_share=nan,
            inference_share=nan, seconds=nan, failed=failed,
        )  # fmt: skip
    accuracy = summary([result.accuracy for result in found])
    beside = results.get((plan.reference, plan.reference_at(sparsity)), [])
    reference = {result.seed: result.accuracy for result in beside}
    pairs = [(result.accuracy, reference[result.seed]) for result in found if result.seed in reference]
    compared = paired_difference(*zip(*pairs, strict=True)) if pairs and label != plan.reference else None
    return MethodRow(
        label=label,
        sparsity=sparsity,
        achieved_sparsity=summary([result.sparsity for result in found]).mean,
        seeds=len(found),
        pairs=compared.count if compared else 0,
        accuracy=accuracy.mean,
        deviation=accuracy.deviation,
        half_width=accuracy.half_width,
        difference=compared.mean if compared else nan,
        difference_half_width=compared.half_width if compared else nan,
        p_value=compared.p_value if compared else nan,
        training_share=summary([result.training_share for result in found]).mean,
        inference_share=summary([result.inference_share for result in found]).mean,
        seconds=summary([result.seconds for result in found]).mean,
        failed=failed,
    )


def _corrected(rows: list[MethodRow]) -> list[MethodRow]:
    """Correct the p-values for the number of comparisons in the table (Holm)."""
    tested = [index for index, row in enumerate(rows) if not math.isnan(row.p_value)]
    for index, p_value in zip(tested, holm([rows[index].p_value for index in tested]), strict=True):
        rows[index] = _with_p(rows[index], p_value)
    return rows


def _with_p(row: MethodRow, p_value: float) -> MethodRow:
    return MethodRow(**{**vars(row), "p_value": p_value})
