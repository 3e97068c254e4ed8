"""What is tuned, over which values: the same search space and number of trials for every method.

Trial 0 has the recipe's own settings. Learning rate and weight decay are tuned for all: the trials after it go through
their values in order, the same for every method. A method's own knobs, which are those that its authors tune and stand
in its file, are drawn anew in each of these trials.
"""

from typing import Any

import numpy as np

from sparsetwin.comparison._contenders import HAM, Contender, changed
from sparsetwin.errors import SparsetwinError
from sparsetwin.methods import METHODS, Knob
from sparsetwin.recipes import Recipe, check_recipe

COMMON = (
    Knob("optimizer.lr", (2.0, 0.5, 1.0, 0.25), "own"),
    Knob("optimizer.weight_decay", (1.0, 2.0, 0.25), "own"),
)
"""Knobs of every contender; their numbers of values have no common factor, so that all pairs come."""
_IN_ORDER = {knob.path for knob in COMMON}
_PAIRS, _OWN = 12, 6  # of their values, and the place of the pair that changes nothing, which trial 0 has

HAM_KNOBS = (Knob("method.ham", ((50.0, 1e-3), (200.0, 1e-3), (200.0, 1e-4))),)
"""Knobs of every method with the hyperbolic mirror step."""


def knobs_of(contender: Contender) -> tuple[Knob, ...]:
    """Return what is drawn for a contender; what it fixes itself is not, nor one whose trials look for a sparsity."""
    if contender.aim is not None:
        return ()
    mirror = HAM_KNOBS if contender.changes.get("method.ham") == HAM else ()
    own = [knob for knob in METHODS[contender.method].knobs if knob.path not in contender.changes]
    taken = {knob.path for knob in own} | contender.changes.keys()
    return (*(knob for knob in COMMON if knob.path not in taken), *mirror, *own)


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
    turn = (trial - 1) % (_PAIRS - 1)
    turn += turn >= _OWN
    changes: dict[str, Any] = {}
    for knob in knobs_of(contender):
        values = [value for value in (_in_unit(knob, value, recipe) for value in knob.values)
                  if _fits(changed(recipe, {knob.path: value}))]  # fmt: skip
        if not values:  # of a knob whose values all need another sparsity the recipe's own stays
            continue
        if knob.path in _IN_ORDER:
            changes[knob.path] = values[turn % len(values)]
        else:
            changes[knob.path] = values[int(generator.integers(len(values)))]
    if recipe.optimizer.name == "muon" and "optimizer.lr" in changes and "optimizer.muon_lr" not in contender.changes:
        factor = changes["optimizer.lr"] / recipe.optimizer.lr
        changes["optimizer.muon_lr"] = recipe.optimizer.muon_lr * factor  # one of two rates of the same optimizer
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
