"""What ``train`` and ``schedule`` share: a recipe by name, overridden field by field."""

import dataclasses
from collections.abc import Sequence

from sparsetwin.methods import BATCHES_AFTER_CUT
from sparsetwin.recipes import RECIPES, ModelSettings, Recipe, ScheduleSettings, leaves_dense_half

_SHORT = {
    "--epochs": "--train.epochs",
    "--dense-finetune": "--train.dense-finetune",
    "--no-dense-finetune": "--train.no-dense-finetune",
    "--sparsity": "--schedule.sparsity",
    "--fsdp": "--distributed.fsdp",
    "--qat": "--method.qat",
    "--qat-start": "--method.qat-start",
}
_SHORT_SCHEDULE = {
    f"--{field.name.replace('_', '-')}": f"--schedule.{field.name.replace('_', '-')}"
    for field in dataclasses.fields(ScheduleSettings)
}
_SWITCHES = ("--quiet", "--json", "--qat")


def split_name(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the recipe's name, if one is given, and the other arguments.

    It stands first; a known recipe's name is also found behind options, unless it is the value of one.

    >>> split_name(["--epochs", "3", "digits", "--quiet"])
    ('digits', ['--epochs', '3', '--quiet'])
    """
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        return rest.pop(0), rest
    for index in range(1, len(rest)):
        if rest[index] in RECIPES and not _takes_value(rest[index - 1]):
            return rest.pop(index), rest
    return None, rest


def _takes_value(argument: str) -> bool:
    is_switch = argument in _SWITCHES or argument.startswith("--no-") or ".no-" in argument
    return argument.startswith("-") and "=" not in argument and not is_switch


def long_flags(arguments: Sequence[str], *, with_schedule: bool = False) -> list[str]:
    """Return the arguments with short flags replaced by those of the fields.

    Args:
        arguments: What follows the recipe's name.
        with_schedule: Whether every field of the schedule has a short flag, as in ``sparsetwin schedule``.
    """
    short = {**_SHORT_SCHEDULE, **_SHORT} if with_schedule else _SHORT
    return [short.get(flag, flag) + equals + value for flag, equals, value in (a.partition("=") for a in arguments)]


def overridden(recipe: Recipe, *, default: Recipe, flags: Sequence[str]) -> Recipe:
    """Return the recipe as its flags mean it, where what one flag says depends on another.

    Args:
        recipe: With the flags put in, field by field.
        default: Without them.
        flags: As `long_flags` returned them.

    Raises:
        SparsetwinError: If the method or the schedule cannot be had as asked.
    """
    made = dataclasses.replace(
        recipe, model=_model(recipe.model, default.model), schedule=_schedule(recipe.schedule, default.schedule)
    )
    if (made.method.name, made.schedule.kind) == (default.method.name, default.schedule.kind):
        return made
    train = made.train
    if train.dense_finetune and not _is_asked("--train.dense-finetune", flags) and not leaves_dense_half(made):
        train = dataclasses.replace(train, dense_finetune=False)
    is_cut = made.schedule.kind_of(made.method.name) == "cut" and not made.schedule.phases
    if is_cut and not train.recalibrate_batches and not _is_asked("--train.recalibrate-batches", flags):
        train = dataclasses.replace(train, recalibrate_batches=BATCHES_AFTER_CUT)
    return dataclasses.replace(made, train=train)


def _is_asked(name: str, flags: Sequence[str]) -> bool:
    return any(flag.replace("_", "-").startswith(name) for flag in flags)


def _model(given: ModelSettings, default: ModelSettings) -> ModelSettings:
    """Let options change those of the recipe one by one; another model does not get what was meant for the recipe's."""
    if given.name != default.name:
        return dataclasses.replace(given, options={} if given.options == default.options else given.options)
    return dataclasses.replace(given, options={**default.options, **given.options})


def _schedule(given: ScheduleSettings, default: ScheduleSettings) -> ScheduleSettings:
    """Let a published schedule take the place of the recipe's own lengths."""
    if given.paper is None or default.paper is not None:
        return given
    fields = (field.name for field in dataclasses.fields(given) if field.name not in ("paper", "sparsity"))
    own = {name: getattr(ScheduleSettings, name) for name in fields if getattr(given, name) == getattr(default, name)}
    return dataclasses.replace(given, **own)
