"""The same recipe over more epochs."""

from itertools import accumulate, pairwise
from typing import Any

from sparsetwin.comparison._contenders import changed
from sparsetwin.recipes import Recipe
from sparsetwin.schedules import paper

_LENGTHS = ("warmup", "sparse", "dense", "final_dense", "final_sparse", "ramp")
_PLACES = ("start", "stop", "every")


def lengthened(recipe: Recipe, epochs: int) -> Recipe:
    """Return a recipe that trains longer, everything in it in proportion but the warm-up of the learning rate.

    Args:
        recipe: The shorter one.
        epochs: Length of the longer one.

    Source: Evci et al., 2020, arXiv 1911.11134, section 4, whose longer runs are stretched so.
    """
    factor = epochs / recipe.train.epochs
    milestones = tuple(milestone * factor for milestone in recipe.learning_rate.milestones)
    changes: dict[str, Any] = {"train.epochs": epochs, "learning_rate.milestones": milestones}
    return changed(recipe, {**changes, **_schedule(recipe, factor)})


def in_whole_rounds(recipe: Recipe) -> Recipe:
    """Return a recipe of rounds of training and pruning in which each takes as many epochs as the recipe has.

    Args:
        recipe: Of a method with rounds. The step that they go back to stays where it is.
    """
    settings, epochs = recipe.schedule, recipe.train.epochs
    longer = lengthened(recipe, epochs * (settings.rounds + 1))
    if settings.start is not None and settings.unit != "fractions":
        return changed(longer, {"schedule.start": settings.start})
    start = settings.start_of(recipe.method.name) if settings.start is None else settings.start
    return changed(longer, {"schedule.unit": "epochs", "schedule.start": start * epochs})


def _schedule(recipe: Recipe, factor: float) -> dict[str, Any]:
    settings = recipe.schedule
    if settings.paper is not None and settings.kind_of(recipe.method.name) == "alternating":
        short = paper(settings.paper, sparsity=settings.sparsity, steps_per_epoch=1)
        explicit = tuple((phase.steps * factor, phase.sparsity) for phase in short.phases)
        return {"schedule.paper": None, "schedule.unit": "epochs", "schedule.phases": explicit}
    if settings.unit == "fractions":
        return {}

    def stretched(length: float) -> float:
        return round(length * factor) if settings.unit == "steps" else length * factor

    ends = [0.0, *map(stretched, accumulate(length for length, _ in settings.phases))]
    lengths = [stop - start for start, stop in pairwise(ends)]
    pairs = zip(lengths, settings.phases, strict=True)
    given = {name: getattr(settings, name) for name in (*_LENGTHS, *_PLACES)}
    return {
        "schedule.phases": tuple((length, sparsity) for length, (_, sparsity) in pairs),
        **{f"schedule.{name}": stretched(value) for name, value in given.items() if value is not None},
    }
