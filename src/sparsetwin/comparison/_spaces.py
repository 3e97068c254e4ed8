"""What is tuned, over which values: the same search space and number of trials for every method.

Trial 0 has the recipe's own settings. Learning rate and weight decay are tuned for all: the trials after it go through
their values in order, the same for every method. A method's own knobs, which are those that its authors tune, are drawn
anew in each of these trials.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetwin.comparison._contenders import Contender, changed
from sparsetwin.errors import SparsetwinError
from sparsetwin.recipes import Recipe, check_recipe


@dataclass(frozen=True)
class Knob:
    """One setting that is tuned."""

    path: str  # field of the recipe
    values: tuple[Any, ...]
    unit: str = ""  # "own": factors of the recipe's own value; "run": fractions of the run, in the schedule's unit


COMMON = (
    Knob("optimizer.lr", (2.0, 0.5, 1.0, 0.25), "own"),
    Knob("optimizer.weight_decay", (1.0, 2.0, 0.25), "own"),
)
"""Knobs of every contender; their numbers of values have no common factor, so that all pairs come."""

KNOBS: Mapping[str, tuple[Knob, ...]] = {
    "acdc": (Knob("method.reset", ("all", "none")),),
    "cram": (Knob("method.options.rho", (0.01, 0.05, 0.1)), Knob("method.options.sparse_gradients", (True, False))),
    "dense": (),
    "gmp": (Knob("schedule.start", (0.0, 0.1, 0.3), "run"), Knob("schedule.stop", (0.5, 0.7, 0.8), "run")),
    "granet": (Knob("schedule.stop", (0.5, 0.7), "run"), Knob("schedule.initial_sparsity", (0.0, 0.5))),
    "imp": (Knob("schedule.start", (0.01, 0.03, 0.05), "run"), Knob("schedule.rounds", (2, 3, 5))),
    "oneshot": (Knob("schedule.start", (0.25, 0.5, 0.7), "run"),),
    "rigl": (Knob("method.options.drop_fraction", (0.1, 0.3, 0.5)), Knob("schedule.every", (0.005, 0.01, 0.03), "run")),
    "set": (Knob("method.options.drop_fraction", (0.1, 0.3, 0.5)), Knob("schedule.every", (0.005, 0.01, 0.03), "run")),
    "snip": (Knob("method.options.samples", (0, 10)),),
    "st3": (Knob("schedule.stop", (0.5, 0.75, 0.9), "run"),),
    "static": (Knob("method.distribution", ("erk", "uniform")),),
    "str": (Knob("method.options.initial", (-8.0, -5.0, -3.0)),),
    "topkast": (Knob("method.options.backward_sparsity", (0.0, 0.5, 0.8)),),
    "woodfisher": (Knob("method.options.samples", (64, 160)), Knob("schedule.stop", (0.4, 0.6), "run")),
}
"""Knobs of single methods, by name."""

HAM_KNOBS = (Knob("method.ham", ((50.0, 1e-3), (200.0, 1e-3), (200.0, 1e-4))),)
"""Knobs of every method with the hyperbolic mirror step."""


def knobs_of(contender: Contender) -> tuple[Knob, ...]:
    """Return what is drawn for a contender; what it fixes itself is not, nor one whose trials look for a sparsity."""
    if contender.aim is not None:
        return ()
    mirror = HAM_KNOBS if "method.ham" in contender.changes else ()
    own = [knob for knob in KNOBS.get(contender.method, ()) if knob.path not in contender.changes]
    return (*COMMON, *mirror, *own)


def trial_changes(contender: Contender, recipe: Recipe, *, trial: int, seed: int) -> dict[str, Any]:
    """Return the changes of one trial; trial 0 has none. Values that do not fit the sparsity are not drawn.

    Args:
        contender: Whose trial it is.
        recipe: With the contender's own changes made.
        trial: Number of the trial, from 0.
        seed: Of the draws, which depend on seed, label and trial alone.
    """
    if not trial:
        return {}
    generator = np.random.default_rng([seed, trial, *contender.label.encode()])
    changes: dict[str, Any] = {}
    for knob in knobs_of(contender):
        values = [value for value in (_in_unit(knob, value, recipe) for value in knob.values)
                  if _fits(changed(recipe, {knob.path: value}))]  # fmt: skip
        if not values:  # of a knob whose values all need another sparsity the recipe's own stays
            continue
        if knob in COMMON:
            changes[knob.path] = values[(trial - 1) % len(values)]
        else:
            changes[knob.path] = values[int(generator.integers(len(values)))]
    return changes


def _fits(recipe: Recipe) -> bool:
    """Return whether the method can have such settings, which may depend on the sparsity."""
    try:
        check_recipe(recipe)
    except SparsetwinError:
        return False
    return True


def _in_unit(knob: Knob, value: Any, recipe: Recipe) -> Any:
    if knob.unit == "own":
        section, name = knob.path.split(".")
        return getattr(getattr(recipe, section), name) * value
    if knob.unit == "run" and recipe.schedule.unit == "epochs":
        return value * recipe.train.epochs
    return value
