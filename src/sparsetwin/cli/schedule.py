"""``sparsetwin schedule [RECIPE]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from sparsetwin.cli._call import Switch, parse, print_json, print_table
from sparsetwin.cli._costs import density_costs, recipe_costs
from sparsetwin.cli._recipe_flags import is_asked, long_flags, overridden, split_name
from sparsetwin.errors import ConfigError
from sparsetwin.recipes import Recipe, ScheduleSettings, find_recipe
from sparsetwin.schedules import Schedule

_FINE = 1000  # steps of an epoch, where lengths are no whole epochs


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Print the phases of a schedule and what they cost, before anything is trained.

    With a recipe's name in first place (sparsetwin schedule RECIPE) it is the recipe's schedule, and the FLOPs of its
    network are counted; every field of the recipe can then be overridden as in sparsetwin train.
    """

    schedule: Annotated[ScheduleSettings, tyro.conf.arg(name="")]
    epochs: int = 100
    """Length of the run."""
    json: Switch = False
    """End with one JSON object on the last line."""


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """Print the phases of a recipe's schedule and what they cost, before anything is trained.

    FLOPs are those of the same sparsity in every target layer; what a global ranking leaves in each layer is known only
    after training, and usually costs more. Passes that choose masks, one now and then, are left out. --epochs,
    --sparsity, --warmup and so on are short for --train.epochs, --schedule.sparsity, --schedule.warmup and so on.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    name, rest = split_name(arguments)
    if name is None:
        usual = Plan(schedule=ScheduleSettings(warmup=10, sparse=5, dense=5, final_dense=10, final_sparse=15))
        plan = parse(Plan, rest, command="schedule", default=usual)
        plan.schedule.check_used("acdc")
        plan.schedule.check_phases(is_asked=is_asked("--sparsity", rest))
        schedule = plan.schedule.build(steps_per_epoch=_steps_per_epoch(plan.schedule, "acdc"), epochs=plan.epochs)
        return _show(schedule, density_costs(schedule), epochs=plan.epochs, as_json=plan.json)
    default = find_recipe(name)
    flags = long_flags(rest, with_schedule=True)
    args = parse(RecipePlan, flags, command=f"schedule {name}", default=RecipePlan(recipe=default))
    recipe = overridden(args.recipe, default=default, flags=flags)
    recipe.schedule.check_used(recipe.method.name)
    steps = _steps_per_epoch(recipe.schedule, recipe.method.name, qat_start=recipe.method.qat_start)
    method = recipe.method.build(recipe.schedule, steps_per_epoch=steps, epochs=recipe.train.epochs)
    return _show(method.schedule, recipe_costs(method, recipe), epochs=recipe.train.epochs, as_json=args.json)


def _steps_per_epoch(settings: ScheduleSettings, method: str, *, qat_start: float | None = None) -> int:
    """Return 1 if all phases are whole epochs long, and a number of small parts of them if not."""
    if method == "dense":
        return 1
    is_paper = settings.paper is not None and settings.kind_of(method) == "alternating"
    if settings.unit == "steps" and not is_paper:
        raise ConfigError("lengths in steps say nothing about epochs before the data are known; give them in epochs")
    lengths = [settings.warmup, settings.sparse, settings.dense, settings.final_dense, settings.final_sparse]
    if settings.phases:
        lengths = [length for length, _ in settings.phases]
    elif settings.kind_of(method) != "alternating":
        return _FINE
    if is_paper:
        lengths = []  # whole ones of its own
    if qat_start is not None:
        lengths.append(qat_start)
    is_whole = settings.unit == "epochs" and all(map(float.is_integer, map(float, lengths)))
    return 1 if is_whole and not settings.ramp else _FINE


def _show(schedule: Schedule, costs: dict[str, float], *, epochs: int, as_json: bool) -> int:
    scale = epochs / schedule.total_steps
    phases = [(phase.start * scale, phase.stop * scale, phase.sparsity) for phase in schedule.phases]
    rows = [
        [str(index), "sparse" if sparsity else "dense", f"{start:g}", f"{stop:g}", f"{sparsity:g}"]
        for index, (start, stop, sparsity) in enumerate(phases)
    ]
    print_table(["phase", "kind", "from epoch", "to epoch", "sparsity"], rows)
    print("\n".join(f"{key.replace('_', ' ')}: {value:.4g}" for key, value in costs.items()))
    if as_json:
        print_json({"epochs": epochs, "phases": phases, **costs})
    return 0
