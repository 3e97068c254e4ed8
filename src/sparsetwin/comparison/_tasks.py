"""Which runs of a comparison can be planned, as they depend on what others have come to."""

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsetwin.comparison._aim import Tried, best_trial, next_value
from sparsetwin.comparison._contenders import PRETRAINED, Contender, changed
from sparsetwin.comparison._longer import in_whole_rounds, lengthened
from sparsetwin.comparison._plan import TUNING_SEED, Outcome, Plan, Task, contender_recipe
from sparsetwin.comparison._spaces import trial_changes
from sparsetwin.recipes import Recipe

_DENSE = {"method.name": "dense"}


def tasks(plan: Plan, outcomes: Mapping[Path, Outcome]) -> Iterator[Task]:
    """Yield the runs that can be planned by what is known; the more have finished, the more there are.

    Args:
        plan: What is compared.
        outcomes: Of the runs that have finished, or failed, by folder.
    """
    start = start_of(plan)
    planned = _Tasks(plan=plan, outcomes=outcomes, start=start)
    if start is not None:
        yield from planned.of(start, None)
    for contender in plan.contenders:
        if contender != start:
            for sparsity in (None,) if contender.is_dense else plan.sparsities:
                yield from planned.of(contender, sparsity)


@dataclass(kw_only=True)
class _Choice:
    """The settings that trials have led to."""

    changes: Mapping[str, Any]
    folder: Path | None = None  # of the trial


@dataclass(kw_only=True)
class _Tasks:
    """What is known while tasks are planned."""

    plan: Plan
    outcomes: Mapping[Path, Outcome]
    start: Contender | None  # the dense network that others begin from, if any does
    starts: dict[int, Path] = field(default_factory=dict)  # seed -> folder of its run

    def of(self, contender: Contender, sparsity: float | None) -> Iterator[Task]:
        """Yield the trials of a contender, and its runs once these have ended."""
        forward_flops = self._forward_flops(sparsity)
        if contender.shrinks == "flops" and forward_flops is None:
            return
        base = contender_recipe(self.plan, contender, sparsity, forward_flops=forward_flops)
        found = yield from self._tuned(contender, sparsity, base)
        if found is None:
            return
        if contender == self.start and found.folder is not None:
            self.starts[TUNING_SEED] = found.folder
        recipe = _finished(contender, changed(base, found.changes))
        for seed in self.plan.seeds:
            yield from self._run(contender, sparsity, changed(recipe, {"seed": seed}))
        if contender.label in self.plan.equal_flops:
            yield from self._longer(contender, sparsity, recipe)

    def _tuned(
        self, contender: Contender, sparsity: float | None, base: Recipe
    ) -> Generator[Task, None, _Choice | None]:
        """Yield the trials; return what the best one chose, or None as long as some are not finished."""
        if contender.aim is not None:
            return (yield from self._aimed(contender, sparsity, base))
        if not self.plan.trials:
            return _Choice(changes={})
        if contender.starts and not self._is_there(TUNING_SEED):
            return None
        best, best_holdout, waits = _Choice(changes={}), -math.inf, False
        for trial in range(self.plan.trials):
            changes = trial_changes(contender, base, trial=trial, seed=TUNING_SEED)
            task = self._trial(contender, sparsity, trial, recipe=_finished(contender, changed(base, changes)))
            yield task
            if task.folder not in self.outcomes:
                waits = True
            elif self.outcomes[task.folder].holdout > best_holdout:
                best_holdout = self.outcomes[task.folder].holdout
                best = _Choice(changes=changes, folder=task.folder)
        return None if waits else best

    def _aimed(
        self, contender: Contender, sparsity: float | None, base: Recipe
    ) -> Generator[Task, None, _Choice | None]:
        """Yield the trials that look for a sparsity, each of which needs what the ones before came to."""
        assert contender.aim is not None
        assert sparsity is not None
        tried: list[Tried] = []
        for trial in range(self.plan.trials):
            value = next_value(contender.aim, tried, goal=sparsity)
            recipe = changed(base, {**contender.aim.changes, contender.aim.path: value})
            task = self._trial(contender, sparsity, trial, recipe=recipe)
            yield task
            if task.folder not in self.outcomes:
                return None
            found = self.outcomes[task.folder]
            tried.append(Tried(value=value, sparsity=found.sparsity, holdout=found.holdout))
        value = tried[best_trial(tried, goal=sparsity)].value if tried else contender.aim.first
        return _Choice(changes={contender.aim.path: value})

    def _trial(self, contender: Contender, sparsity: float | None, trial: int, *, recipe: Recipe) -> Task:
        return Task(
            folder=Path("trials") / contender.label / _sparsity_name(sparsity) / f"trial-{trial}",
            recipe=changed(recipe, {"seed": TUNING_SEED, "train.test": False}),
            label=contender.label,
            sparsity=sparsity,
            table="trials",
            pretrained=self.starts[TUNING_SEED] if contender.starts else None,
        )

    def _run(self, contender: Contender, sparsity: float | None, recipe: Recipe) -> Iterator[Task]:
        """Yield a run of one seed; none as long as the dense one that it begins from is not there."""
        if contender.starts and not self._is_there(recipe.seed):
            return
        is_start = contender.label == PRETRAINED
        run = Task(
            folder=_folder("runs", contender.label, sparsity, recipe.seed),
            recipe=changed(recipe, {"train.test": False}) if is_start else recipe,
            label=contender.label,
            sparsity=sparsity,
            table=PRETRAINED if is_start else "epochs",
            pretrained=self.starts[recipe.seed] if contender.starts else None,
        )
        if contender == self.start:
            self.starts[recipe.seed] = run.folder
        yield run

    def _longer(self, contender: Contender, sparsity: float | None, recipe: Recipe) -> Iterator[Task]:
        """Yield the runs for as many epochs as the FLOPs of the reference last, if these are more: of all seeds."""
        epochs = self._equal_epochs(contender, sparsity, recipe.train.epochs)
        if epochs <= recipe.train.epochs:
            return
        longer = lengthened(recipe, epochs)
        for seed in self.plan.seeds:
            if not contender.starts or self._is_there(seed):
                yield Task(
                    folder=_folder("equal-flops", contender.label, sparsity, seed),
                    recipe=changed(longer, {"seed": seed}),
                    label=contender.label,
                    sparsity=sparsity,
                    table="flops",
                    pretrained=self.starts[seed] if contender.starts else None,
                )

    def _equal_epochs(self, contender: Contender, sparsity: float | None, epochs: int) -> int:
        """Return for how many epochs the training FLOPs of the reference last a contender.

        Decided once for all seeds, by the first on which both came to an end, so that which of them are run longer
        never depends on what they came to.

        Returns:
            0 as long as that is not known, or if there is no such seed.
        """
        plan, begins = self.plan, bool(contender.starts or self._reference.starts)
        for seed in plan.seeds:
            start = self._spent(self.starts.get(seed)) if begins else 0
            if begins and start == 0:  # it failed
                continue
            reference = self._spent(_folder("runs", plan.reference, plan.reference_at(sparsity), seed))
            own = self._spent(_folder("runs", contender.label, sparsity, seed))
            if start is None or reference is None or own is None:
                return 0
            if reference and own:
                before = (start if self._reference.starts else 0) - (start if contender.starts else 0)
                return round(epochs * (reference + before) / own)
        return 0

    def _spent(self, folder: Path | None) -> int | None:
        """Return the training FLOPs of a run: 0 of one that failed, None of one that has not ended."""
        found = None if folder is None else self.outcomes.get(folder)
        return None if found is None else found.training_flops

    def _forward_flops(self, sparsity: float | None) -> int | None:
        """Return the inference FLOPs of the reference's network at a sparsity: of its first seed that came to an end.

        Returns:
            None if it is not known yet, 0 if there is no such network.
        """
        plan = self.plan
        if sparsity is None or self._reference.method == "dense":
            return 0
        for seed in plan.seeds:
            found = self.outcomes.get(_folder("runs", plan.reference, sparsity, seed))
            if found is None or found.training_flops:
                return None if found is None else found.forward_flops
        return 0

    @property
    def _reference(self) -> Contender:
        return next(contender for contender in self.plan.contenders if contender.label == self.plan.reference)

    def _is_there(self, seed: int) -> bool:
        """Return whether the dense run of a seed has finished, and not failed."""
        found = self.outcomes.get(self.starts[seed]) if seed in self.starts else None
        return found is not None and found.training_flops > 0


def start_of(plan: Plan) -> Contender | None:
    """Return the dense network that others begin from: the plan's own if there is one; None if none does."""
    if not any(contender.starts for contender in plan.contenders):
        return None
    own = (contender for contender in plan.contenders if contender.is_dense and contender.changes == _DENSE)
    return next(own, Contender(label=PRETRAINED, changes=_DENSE))


def _finished(contender: Contender, recipe: Recipe) -> Recipe:
    return in_whole_rounds(recipe) if contender.whole_rounds else recipe


def _folder(kind: str, label: str, sparsity: float | None, seed: int) -> Path:
    return Path(kind) / label / _sparsity_name(sparsity) / f"seed-{seed}"


def _sparsity_name(sparsity: float | None) -> str:
    return "dense" if sparsity is None else f"{sparsity:g}"
