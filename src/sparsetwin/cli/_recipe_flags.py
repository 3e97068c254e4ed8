"""What ``train`` and ``schedule`` share: a recipe by name, overridden field by field."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache
from typing import get_type_hints

from sparsetwin.data import SOURCES
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
_OWN_SWITCHES = ("--quiet", "--json")  # of the commands themselves


def split_name(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the recipe's name, if one is given, and the other arguments.

    It stands first; a known recipe's name is also found behind options, unless it is the value of one.

    >>> split_name(["--epochs", "3", "--train.compile", "digits", "--quiet"])
    ('digits', ['--epochs', '3', '--train.compile', '--quiet'])
    """
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        return rest.pop(0), rest
    for index in range(1, len(rest)):
        if rest[index] in RECIPES and not _takes_value(rest[index - 1]):
            return rest.pop(index), rest
    return None, rest


def _takes_value(argument: str) -> bool:
    return argument.startswith("-") and "=" not in argument and argument.replace("_", "-") not in _switches()


@cache
def _switches() -> frozenset[str]:
    """Return all flags that take no value."""
    fields = {*_fields_of_kind_bool(Recipe, "")}
    for cls in SOURCES.values():
        fields |= {*_fields_of_kind_bool(cls, "dataset.")}
    both = {f"--{path}{no}{name}" for path, name in fields for no in ("", "no-")}
    return frozenset({*_OWN_SWITCHES, *both, *(short for short, long in _SHORT.items() if long in both)})


def _fields_of_kind_bool(cls: type, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path to each such field and the field's name, both as flags have them."""
    for name, kind in get_type_hints(cls).items():
        dashed = name.replace("_", "-")
        if kind is bool:
            yield path, dashed
        elif dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _fields_of_kind_bool(kind, f"{path}{dashed}.")


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
    made.schedule.check_phases(is_asked=is_asked("--schedule.sparsity", flags))
    if (made.method.name, made.schedule.kind) == (default.method.name, default.schedule.kind):
        return made
    train = made.train
    if train.dense_finetune and not is_asked("--train.dense-finetune", flags) and not leaves_dense_half(made):
        train = dataclasses.replace(train, dense_finetune=False)
    is_cut = made.schedule.kind_of(made.method.name) == "cut" and not made.schedule.phases
    if is_cut and not train.recalibrate_batches and not is_asked("--train.recalibrate-batches", flags):
        train = dataclasses.replace(train, recalibrate_batches=BATCHES_AFTER_CUT)
    return dataclasses.replace(made, train=train)


def is_asked(name: str, flags: Sequence[str]) -> bool:
    """Return whether a flag is among arguments."""
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
