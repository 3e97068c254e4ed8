"""Which method a recipe trains with: by name, with fields common to several and options of its own."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_type_hints

from sparsetwin.distributions import ERK, Distribution, Global, PerLayer, Uniform
from sparsetwin.errors import ConfigError, nearest
from sparsetwin.methods import HAM, METHODS, Int8, Kind, Method
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.patterns import NM, Block, Channel, Pattern, Unstructured
from sparsetwin.recipes._named_values import NAMED_NUMBERS, NAMED_VALUES
from sparsetwin.recipes._plain import from_plain
from sparsetwin.recipes._schedule import ScheduleSettings
from sparsetwin.schedules import Schedule, constant, grouped, in_steps

_DISTRIBUTIONS: dict[str, Distribution] = {"global": Global(), "uniform": Uniform(), "erk": ERK()}


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """How to train sparsely. What is None is as the method has it."""

    name: str = "acdc"
    """acdc, dense for a baseline of equal length, or another of those that `sparsetwin methods` lists."""
    distribution: Literal["global", "uniform", "erk"] | None = None
    """One ranking over all layers, the same sparsity in each, or small layers denser."""
    per_layer: Annotated[dict[str, float], NAMED_NUMBERS] = field(default_factory=dict)
    """A sparsity for each layer instead of a distribution: names, globs or re: expressions, such as: stem=0.5. The
    schedule needs the sparsity that all layers have together, which is told where it has another one."""
    score: str | None = None
    """What a weight is worth: magnitude, movement, sensitivity, fisher or random."""
    pattern: str | None = None
    """Which weights live together: unstructured, 2:4 (or any N:M), transposable-2:4, 4x4 (blocks) or channel. N:M needs
    its own sparsity in the schedule (0.5 for 2:4); gradual schedules and ramps keep 4, 3 and then 2 of every 4."""
    minimum_kept: int | None = None
    """Weights that every layer keeps."""
    reset: ResetScope | None = None
    """Whose optimizer state is restored when weights come back."""
    ham: tuple[float, float] | None = None
    """Strength alpha and shrinkage beta of the hyperbolic mirror step after each update, such as: 200 0.001."""
    qat: bool = False
    """Quantization-aware training: at the end of the run, round the weights of the sparse half to int8."""
    qat_start: float | None = None
    """When that begins, counted from the begin of the run in the schedule's unit; None is where the time at the final
    sparsity begins, at the earliest halfway through the run."""
    options: Annotated[dict[str, Any], NAMED_VALUES] = field(default_factory=dict)
    """Other fields of the method, as `sparsetwin methods` lists them, such as: drop_fraction=0.5."""

    def build(self, schedule: ScheduleSettings, *, steps_per_epoch: int, epochs: int) -> Method:
        """Return the method with its schedule in steps.

        Raises:
            ConfigError: If the method is unknown, or lacks a field that is given.
            ScheduleError: If the schedule does not fit the run or the method.
        """
        cls = self._class()
        given = self._given()
        fields = {each.name for each in dataclasses.fields(cls)} - {"schedule"}
        for name in given:
            if name not in fields:
                known = ", ".join(sorted(fields))
                raise ConfigError(f"{self.name} has no field {name!r}; it has: {known}{nearest(name, fields)}")
        self._check_options(get_type_hints(cls))
        if self.name == "dense":
            made = constant(sparsity=0.0, total_steps=steps_per_epoch * epochs)
        else:
            made = schedule.build(steps_per_epoch=steps_per_epoch, epochs=epochs, method=self.name)
            made = _towards(given.get("pattern"), made, schedule, kind=schedule.kind_of(self.name))
        quantization = self._quantization(schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
        if quantization is None:
            return cls(schedule=made, **given)
        quantization.check(made)
        return cls(schedule=made, quantization=quantization, **given)

    def _check_options(self, kinds: Mapping[str, Any]) -> None:
        """Refuse options of another type than the method's field has."""
        for name, value in self.options.items():
            classes = [kind for kind in get_args(kinds[name]) or (kinds[name],) if dataclasses.is_dataclass(kind)]
            if not classes:
                plain = list(value) if isinstance(value, tuple) else value
                from_plain(plain, kinds[name], known={}, where=f"--method.options {name}")
            elif not isinstance(value, tuple(cls for cls in classes if isinstance(cls, type))):
                is_flag = name in {field.name for field in dataclasses.fields(self)}
                instead = f"give it as --method.{name}" if is_flag else "only Python code can give one"
                names = " or ".join(getattr(cls, "__name__", "?") for cls in classes)
                raise ConfigError(f"--method.options {name}: expected {names}, got {value!r}; {instead}")

    def _quantization(self, schedule: ScheduleSettings, *, steps_per_epoch: int, epochs: int) -> Int8 | None:
        if self.qat_start is None:
            return Int8() if self.qat else None
        if not self.qat:
            raise ConfigError("--method.qat-start says when quantization-aware training begins; add --qat, or leave it")
        unit, total = schedule.unit, steps_per_epoch * epochs
        return Int8(start_step=in_steps(self.qat_start, unit, steps_per_epoch=steps_per_epoch, total_steps=total))

    def _class(self) -> type[Method]:
        if self.name not in METHODS:
            raise ConfigError(f"unknown method {self.name!r}; known: {', '.join(METHODS)}{nearest(self.name, METHODS)}")
        return METHODS[self.name]

    def _given(self) -> dict[str, Any]:
        """Return the fields of the method that are given."""
        if self.distribution is not None and self.per_layer:
            raise ConfigError("give --method.distribution or --method.per-layer, not both")
        named: dict[str, Any] = {
            "distribution": PerLayer(self.per_layer) if self.per_layer else _DISTRIBUTIONS.get(self.distribution or ""),
            "score": self.score,
            "pattern": None if self.pattern is None else pattern_named(self.pattern),
            "minimum_kept": self.minimum_kept,
            "reset": self.reset,
            "ham": None if self.ham is None else HAM(alpha=self.ham[0], beta=self.ham[1]),
        }
        named = {name: value for name, value in named.items() if value is not None}
        if "quantization" in self.options:
            raise ConfigError("quantization is asked for by --qat, and not as an option")
        twice = sorted(named.keys() & self.options.keys())
        if twice:
            raise ConfigError(f"{twice[0]} is given twice: as --method.{twice[0].replace('_', '-')} and as an option")
        return {**named, **self.options}


def _towards(pattern: Pattern | None, made: Schedule, settings: ScheduleSettings, *, kind: Kind) -> Schedule:
    """Return the schedule on which an N:M pattern is reached, with the sparsities that its groups can have."""
    if not isinstance(pattern, NM):
        return made
    if settings.phases:
        has_all = all(math.isclose(at * pattern.m, round(at * pattern.m), abs_tol=1e-9) for _, at in settings.phases)
        return grouped(made, m=pattern.m) if settings.ramp and has_all else made
    if not math.isclose(pattern.sparsity, settings.sparsity, rel_tol=0.0, abs_tol=1e-9):
        raise ConfigError(
            f"{pattern.n}:{pattern.m} has a sparsity of {pattern.sparsity!r}, the schedule {settings.sparsity!r}; add "
            f"--schedule.sparsity {pattern.sparsity!r}, or take a pattern of that sparsity"
        )
    if kind not in ("gradual", "alternating", "rounds"):
        return made
    rounded = grouped(made, m=pattern.m)
    if kind == "rounds" and len(rounded.phases) < len(made.phases):
        raise ConfigError(
            f"groups of {pattern.m} weights cannot lose some in each of {settings.rounds} rounds on the way to "
            f"{pattern.n}:{pattern.m}; take fewer with --schedule.rounds"
        )
    return rounded


def pattern_named(text: str) -> Pattern:
    """Return a pattern from its short form.

    >>> pattern_named("2:4"), pattern_named("4x1"), pattern_named("channel")
    (NM(n=2, m=4, transposable=False), Block(rows=4, columns=1), Channel(axis=0))

    Args:
        text: ``unstructured``, ``N:M``, ``transposable-N:M``, ``RxC`` or ``channel``.

    Raises:
        ConfigError: If it is none of these.
    """
    if text in ("unstructured", "channel"):
        return Unstructured() if text == "unstructured" else Channel()
    kind, dash, numbers = text.rpartition("-")
    for sign in (":", "x"):
        first, found, second = numbers.partition(sign)
        if found and first.isdigit() and second.isdigit():
            if sign == ":" and (kind == "transposable" or not dash):
                return NM(int(first), int(second), transposable=bool(kind))
            if sign == "x" and not dash:
                return Block(int(first), int(second))
    raise ConfigError(f"a pattern is unstructured, N:M, transposable-N:M, RxC or channel, got {text!r}")
