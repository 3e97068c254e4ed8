"""The same recipe over more epochs."""

from itertools import accumulate, pairwise
from typing import Any

from sparsetwin.comparison._contenders import changed
from sparsetwin.recipes import Recipe
from sparsetwin.schedules import paper

_LENGTHS = ("warmup", "sparse", "dense", "final_dense", "final_sparse", "ramp")
_PLACES = ("start", "stop")


def lengthened(recipe: Recipe, epochs: int) -> Recipe:
    """Return a recipe that trains longer.

    Everything in it is stretched in proportion, but for the warm-up of the learning rate and the time between updates
    of masks, of which there are more then.

    Args:
        recipe: The shorter one. Of a schedule in steps the usual time between updates is stretched too, as how many
            steps it is depends on the data.
        epochs: Length of the longer one.

    Source: Evci et al., 2020, arXiv 1911.11134, section 4, and the code of its longer runs.
    """
    factor = epochs / recipe.train.epochs
    milestones = tuple(milestone * factor for milestone in recipe.learning_rate.milestones)
    changes: dict[str, Any] = {"train.epochs": epochs, "learning_rate.milestones": milestones}
    return changed(recipe, {**changes, **_schedule(recipe, factor), **_every(recipe, factor), **_qat(recipe, factor)})


def in_whole_rounds(recipe: Recipe) -> Recipe:
    """Return a recipe of rounds of training and pruning in which each takes as many epochs as the recipe has.

    Args:
        recipe: Of a method with rounds. The step that they go back to stays where it is, and so does the warm-up of
            the learning rate, which has its whole course in each round.
    """
    settings, epochs, parts = recipe.schedule, recipe.train.epochs, recipe.schedule.rounds + 1
    warmup = recipe.learning_rate.warmup_epochs * parts  # in the course that a round goes through in less time
    longer = changed(lengthened(recipe, epochs * parts), {"learning_rate.warmup_epochs": warmup})
    if settings.start is not None and settings.unit != "fractions":
        return changed(longer, {"schedule.start": settings.start})
    start = settings.start_of(recipe.method.name) if settings.start is None else settings.start
    changes = {"schedule.unit": "epochs", "schedule.start": start * epochs}
    if recipe.method.qat_start is not None and settings.unit == "fractions":
        changes["method.qat_start"] = recipe.method.qat_start * epochs * parts
    return changed(longer, changes)


def _schedule(recipe: Recipe, factor: float) -> dict[str, Any]:
    settings = recipe.schedule
    if settings.paper is not None and settings.kind_of(recipe.method.name) == "alternating":
        short = paper(settings.paper, sparsity=settings.sparsity, steps_per_epoch=1)
        explicit = tuple((phase.steps * factor, phase.sparsity) for phase in short.phases)
        ramp = settings.ramp * factor
        return {"schedule.paper": None, "schedule.unit": "epochs", "schedule.phases": explicit, "schedule.ramp": ramp}
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


def _every(recipe: Recipe, factor: float) -> dict[str, Any]:
    """Return the time between updates of masks that the shorter run has, in the unit of the longer one."""
    settings = recipe.schedule
    fraction = settings.every if settings.unit == "fractions" else None
    usual = settings.every_of(recipe.method.name)
    if usual is None or (settings.every is not None and fraction is None) or settings.unit == "steps":
        return {}
    if settings.unit == "epochs":
        return {"schedule.every": usual * recipe.train.epochs}
    return {"schedule.every": (usual if fraction is None else fraction) / factor}


def _qat(recipe: Recipe, factor: float) -> dict[str, Any]:
    start, unit = recipe.method.qat_start, recipe.schedule.unit
    if start is None or unit == "fractions":
        return {}
    return {"method.qat_start": round(start * factor) if unit == "steps" else start * factor}
