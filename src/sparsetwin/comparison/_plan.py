"""Which runs a comparison consists of, and in which order they depend on each other."""

import dataclasses
import json
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetwin.comparison._aim import Tried, best_trial, next_value
from sparsetwin.comparison._contenders import PRETRAINED, Contender, changed
from sparsetwin.comparison._longer import lengthened
from sparsetwin.comparison._small import small_width
from sparsetwin.comparison._spaces import trial_changes
from sparsetwin.errors import ConfigError, SparsetwinError
from sparsetwin.recipes import MethodSettings, Recipe, check_recipe, recipe_from_plain

_GROWING = ("contenders", "equal_flops", "seeds", "sparsities")

TUNING_SEED = 1000
"""Seed of all trials; the compared runs have seeds of their own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison as it was asked for."""

    recipe: Recipe
    contenders: tuple[Contender, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    trials: int = 0  # runs in which each contender's settings are chosen on the hold-out; 0 takes them as they are
    equal_flops: tuple[str, ...] = ()  # labels of contenders that are run longer as well if they cost less
    reference: str  # label of the contender that the others are compared with

    def __post_init__(self) -> None:
        labels = [contender.label for contender in self.contenders]
        if len(set(labels)) < len(labels) or not labels:
            raise ConfigError(f"a comparison needs contenders of different labels, got {', '.join(labels) or 'none'}")
        if not self.sparsities or not self.seeds or self.trials < 0:
            raise ConfigError("a comparison needs at least one sparsity and one seed, and not less than 0 trials")
        if any(not 0 < sparsity < 1 for sparsity in self.sparsities):
            raise ConfigError(f"sparsities are fractions between 0 and 1, got {self.sparsities}")
        for name, values in (("sparsities", self.sparsities), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ConfigError(f"the {name} of a comparison differ from each other, got {values}")
        if self.reference not in labels:
            raise ConfigError(f"the others are compared with {self.reference}, which is not among: {', '.join(labels)}")
        beside = [c.label for c in self.contenders if not c.is_dense and c.label != self.reference]
        for label in self.equal_flops:
            if label not in beside:
                raise ConfigError(
                    f"equal FLOPs are for contenders with a sparsity beside {self.reference}, not for {label}; "
                    f"these are: {', '.join(beside) or 'none'}"
                )
        self._check_tuning()

    def reference_at(self, sparsity: float | None) -> float | None:
        """Return the sparsity at which the reference stands beside a contender: None where it is dense."""
        return None if any(c.is_dense and c.label == self.reference for c in self.contenders) else sparsity

    def _check_tuning(self) -> None:
        if not self.trials:
            return
        if not getattr(self.recipe.dataset, "holdout", True):
            raise ConfigError("settings are chosen on a hold-out, but the recipe has none: --dataset.holdout 0.1")
        if self.recipe.schedule.unit == "steps":
            raise ConfigError(
                "what is tuned are fractions of a run, which a schedule in steps does not tell; use epochs"
            )
        if TUNING_SEED in self.seeds:
            raise ConfigError(f"the seed {TUNING_SEED} is that of the trials; compare with others")

    def check(self) -> None:
        """Refuse, before anything is trained, a contender that the recipe cannot train.

        Raises:
            ConfigError: Naming the contender.
        """
        for contender in self.contenders:
            for sparsity in (None,) if contender.is_dense else self.sparsities:
                try:
                    check_recipe(recipe_from_plain(contender_recipe(self, contender, sparsity).plain()))
                except SparsetwinError as error:
                    at = "" if sparsity is None else f" at sparsity {sparsity:g}"
                    raise ConfigError(f"{contender.label}{at}: {error}") from error

    def unlike(self, earlier: Mapping[str, Any]) -> list[str]:
        """Return the names of fields by which this plan is not an earlier one, nor one that has grown from it.

        Args:
            earlier: As `plain` gave it. A grown plan has all its contenders, sparsities and seeds, and maybe more.
        """
        here = self.plain()
        grown = {
            name for name in _GROWING
            if name in earlier and all(value in here[name] for value in earlier[name])
        }  # fmt: skip
        return sorted(
            name for name in {*here, *earlier} - grown if name not in earlier or earlier[name] != here.get(name)
        )

    def plain(self) -> dict[str, Any]:
        """Return the plan as JSON-able data, by which a resumed comparison is known to be the same."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        contenders = [dataclasses.asdict(contender) for contender in self.contenders]
        plain = {**fields, "recipe": self.recipe.plain(), "contenders": contenders}
        found: dict[str, Any] = json.loads(json.dumps(plain, sort_keys=True))
        return found


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run."""

    folder: Path  # below the comparison's
    recipe: Recipe
    label: str
    sparsity: float | None  # None of a dense run, which serves all sparsities
    table: str  # "epochs", "flops", "trials" or PRETRAINED
    pretrained: Path | None = None  # folder of the dense run whose weights it begins from


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to, as far as planning needs it."""

    holdout: float  # accuracy after the last epoch; NaN of a run that failed
    training_flops: int
    forward_flops: int = 0  # of what it leaves
    sparsity: float = math.nan  # achieved; NaN of a run that failed


def tasks(plan: Plan, outcomes: Mapping[Path, Outcome]) -> Iterator[Task]:
    """Yield the runs that can be planned by what is known; the more have finished, the more there are.

    Args:
        plan: What is compared.
        outcomes: Of the runs that have finished, or failed, by folder.
    """
    if any(contender.starts for contender in plan.contenders):
        for seed in (*([TUNING_SEED] if plan.trials else []), *plan.seeds):
            yield _pretraining(plan, seed)
    for contender in plan.contenders:
        for sparsity in (None,) if contender.is_dense else plan.sparsities:
            forward_flops = _forward_flops(plan, sparsity, outcomes)
            if contender.shrinks == "flops" and forward_flops is None:
                continue
            base = contender_recipe(plan, contender, sparsity, forward_flops=forward_flops)
            found = yield from _tuned(plan, contender, sparsity, base, outcomes)
            if found is None:
                continue
            for seed in plan.seeds:
                yield from _runs(plan, contender, sparsity, changed(base, {**found, "seed": seed}), outcomes)


def contender_recipe(
    plan: Plan, contender: Contender, sparsity: float | None, *, forward_flops: int | None = None
) -> Recipe:
    """Return the recipe of a contender at a sparsity, with untuned settings.

    Args:
        plan: What is compared.
        contender: Whose recipe it is.
        sparsity: None of a dense network.
        forward_flops: What a small dense network of equal inference FLOPs may cost; by default, and where 0, as much as
            one with the same sparsity in every layer.
    """
    recipe = changed(plan.recipe, {"train.dense_finetune": False})
    if contender.method == "dense":
        recipe = changed(recipe, {"method": MethodSettings(name="dense")})  # without what is said of other methods
    recipe = changed(recipe, contender.changes)
    if sparsity is None:
        return recipe
    if contender.shrinks is not None:
        goal = forward_flops if contender.shrinks == "flops" else None
        width = small_width(recipe, sparsity=sparsity, measure=contender.shrinks, goal=goal or None)
        return changed(recipe, {"model.options.width": width})
    return changed(recipe, {"schedule.sparsity": sparsity})


def _forward_flops(plan: Plan, sparsity: float | None, outcomes: Mapping[Path, Outcome]) -> int | None:
    """Return the inference FLOPs of the reference's network at a sparsity: of its first seed that came to an end.

    Returns:
        None if it is not known yet, 0 if there is no such network.
    """
    reference = next(contender for contender in plan.contenders if contender.label == plan.reference)
    if sparsity is None or reference.method == "dense":
        return 0
    for seed in plan.seeds:
        found = outcomes.get(_folder("runs", plan.reference, sparsity, seed))
        if found is None or found.training_flops:
            return None if found is None else found.forward_flops
    return 0


def _pretraining(plan: Plan, seed: int) -> Task:
    dense = contender_recipe(plan, Contender(label=PRETRAINED, changes={"method.name": "dense"}), None)
    return Task(
        folder=_pretrained_folder(seed),
        recipe=changed(dense, {"seed": seed, "train.test": False}),
        label=PRETRAINED,
        sparsity=None,
        table=PRETRAINED,
    )


def _tuned(
    plan: Plan, contender: Contender, sparsity: float | None, base: Recipe, outcomes: Mapping[Path, Outcome]
) -> Generator[Task, None, dict[str, Any] | None]:
    """Yield the trials; return the best one's changes, or None as long as some are not finished."""
    if contender.aim is not None:
        return (yield from _aimed(plan, contender, sparsity, base, outcomes))
    best: tuple[float, dict[str, Any]] = (-math.inf, {})
    waits = False
    pretrained = _pretrained_folder(TUNING_SEED) if contender.starts else None
    if plan.trials and pretrained is not None and not _is_there(pretrained, outcomes):
        return None
    for trial in range(plan.trials):
        changes = trial_changes(contender, base, trial=trial, seed=TUNING_SEED)
        task = _trial(contender, sparsity, trial, recipe=changed(base, changes), pretrained=pretrained)
        yield task
        if task.folder not in outcomes:
            waits = True
        elif outcomes[task.folder].holdout > best[0]:
            best = (outcomes[task.folder].holdout, changes)
    return None if waits else best[1]


def _aimed(
    plan: Plan, contender: Contender, sparsity: float | None, base: Recipe, outcomes: Mapping[Path, Outcome]
) -> Generator[Task, None, dict[str, Any] | None]:
    """Yield the trials that look for a sparsity, each of which needs what the ones before came to."""
    assert contender.aim is not None
    assert sparsity is not None
    tried: list[Tried] = []
    for trial in range(plan.trials):
        value = next_value(contender.aim, tried, goal=sparsity)
        task = _trial(contender, sparsity, trial, recipe=changed(base, {contender.aim.path: value}))
        yield task
        if task.folder not in outcomes:
            return None
        found = outcomes[task.folder]
        tried.append(Tried(value=value, sparsity=found.sparsity, holdout=found.holdout))
    if not tried:
        return {contender.aim.path: contender.aim.first}
    return {contender.aim.path: tried[best_trial(tried, goal=sparsity)].value}


def _trial(
    contender: Contender, sparsity: float | None, trial: int, *, recipe: Recipe, pretrained: Path | None = None
) -> Task:
    return Task(
        folder=Path("trials") / contender.label / _sparsity_name(sparsity) / f"trial-{trial}",
        recipe=changed(recipe, {"seed": TUNING_SEED, "train.test": False}),
        label=contender.label,
        sparsity=sparsity,
        table="trials",
        pretrained=pretrained,
    )


def _runs(
    plan: Plan, contender: Contender, sparsity: float | None, recipe: Recipe, outcomes: Mapping[Path, Outcome]
) -> Iterator[Task]:
    """Yield a run, and once it and the reference have finished, its longer twin of equal FLOPs."""
    pretrained = _pretrained_folder(recipe.seed) if contender.starts else None
    if pretrained is not None and not _is_there(pretrained, outcomes):
        return
    folder = _folder("runs", contender.label, sparsity, recipe.seed)
    yield Task(
        folder=folder, recipe=recipe, label=contender.label, sparsity=sparsity, table="epochs", pretrained=pretrained
    )
    reference = outcomes.get(_folder("runs", plan.reference, plan.reference_at(sparsity), recipe.seed))
    own = outcomes.get(folder)
    if sparsity is None or reference is None or own is None or not own.training_flops:
        return
    before = outcomes[pretrained].training_flops if pretrained is not None else 0
    epochs = round(recipe.train.epochs * (reference.training_flops - before) / own.training_flops)
    if contender.label in plan.equal_flops and epochs > recipe.train.epochs:
        longer = lengthened(recipe, epochs)
        folder = _folder("equal-flops", contender.label, sparsity, recipe.seed)
        yield Task(
            folder=folder, recipe=longer, label=contender.label, sparsity=sparsity, table="flops", pretrained=pretrained
        )


def _is_there(pretrained: Path, outcomes: Mapping[Path, Outcome]) -> bool:
    """Return whether a dense run has finished, and not failed."""
    return pretrained in outcomes and outcomes[pretrained].training_flops > 0


def _pretrained_folder(seed: int) -> Path:
    return Path("runs") / PRETRAINED / f"seed-{seed}"


def _folder(kind: str, label: str, sparsity: float | None, seed: int) -> Path:
    return Path(kind) / label / _sparsity_name(sparsity) / f"seed-{seed}"


def _sparsity_name(sparsity: float | None) -> str:
    return "dense" if sparsity is None else f"{sparsity:g}"
