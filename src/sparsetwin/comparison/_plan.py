"""A comparison as it was asked for, and the runs that it consists of."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetwin.comparison._contenders import Contender, changed
from sparsetwin.comparison._small import small_width
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
        for contender in self.contenders:
            if contender.changes.get("schedule.unit", self.recipe.schedule.unit) == "steps":
                raise ConfigError(
                    f"what is tuned are fractions of a run, which the schedule of {contender.label} in steps does not "
                    "tell; use epochs"
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
                    recipe = recipe_from_plain(contender_recipe(self, contender, sparsity).plain())
                    check_recipe(recipe)
                    if not recipe.train.test:
                        raise ConfigError("methods are compared by test accuracy; leave out --train.no-test")
                except SparsetwinError as error:
                    at = "" if sparsity is None else f" at sparsity {sparsity:g}"
                    raise ConfigError(f"{contender.label}{at}: {error}") from error

    def unlike(self, earlier: Mapping[str, Any]) -> list[str]:
        """Return the names of fields by which this plan is not an earlier one, nor one that has grown from it.

        Args:
            earlier: As `plain` gave it. A grown plan has all its contenders, sparsities and seeds, and maybe more.
        """
        here = self.plain()
        earlier = {**earlier, "contenders": [_said(contender) for contender in earlier.get("contenders", [])]}
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
        contenders = [_said(dataclasses.asdict(contender)) for contender in self.contenders]
        plain = {**fields, "recipe": self.recipe.plain(), "contenders": contenders}
        found: dict[str, Any] = json.loads(json.dumps(plain, sort_keys=True))
        return found


def _said(contender: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a contender has, without the fields that it has not, which other releases may not know."""
    return {name: value for name, value in contender.items() if value not in (None, False, {})}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run."""

    folder: Path  # below the comparison's
    recipe: Recipe
    label: str
    sparsity: float | None  # None of a dense run, which serves all sparsities
    table: str  # "epochs", "flops", "trials" or "pretrained"
    pretrained: Path | None = None  # folder of the dense run whose weights it begins from


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to, as far as planning needs it."""

    holdout: float  # accuracy after the last epoch; NaN of a run that failed
    training_flops: int
    forward_flops: int = 0  # of what it leaves
    sparsity: float = math.nan  # achieved; NaN of a run that failed


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
