"""What a recipe is: the whole configuration of a run as one frozen dataclass, to plain data and back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsetwin.data import SOURCES, DataSource
from sparsetwin.distributions import Distribution, Global, Uniform
from sparsetwin.errors import ConfigError, nearest
from sparsetwin.methods import ACDC, Dense, Method
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.schedules import Schedule, alternating, constant, in_steps, paper, phases
from sparsetwin.targets import Targets
from sparsetwin.training import LearningRateSettings, OptimizerSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network."""

    name: str
    """A reference network's name, or ``module:callable`` of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network's constructor, as Python literals."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Lengths of the phases, in one unit; the schedule is built when the number of steps is known."""

    sparsity: float = 0.9
    """Fraction of the target weights that is zero in sparse phases."""
    paper: str | None = None
    """A published schedule by name, such as imagenet-100; the lengths below are then unused."""
    unit: Literal["epochs", "steps", "fractions"] = "epochs"
    """Unit of the lengths."""
    warmup: float = 10
    """Dense start."""
    sparse: float = 20
    """Each sparse phase but the last."""
    dense: float = 20
    """Each dense phase between them."""
    final_dense: float = 20
    """The last dense phase."""
    final_sparse: float = 30
    """The last sparse phase, at least."""
    phases: tuple[tuple[float, float], ...] = ()
    """Explicit phases as (length, sparsity) instead; 0 is dense."""

    def build(self, *, steps_per_epoch: int, epochs: int) -> Schedule:
        """Return the AC/DC schedule of a run.

        Args:
            steps_per_epoch: Optimizer steps of one epoch.
            epochs: Length of the run.

        Raises:
            ScheduleError: If the lengths do not fit the run.
        """
        total = steps_per_epoch * epochs

        def steps(length: float) -> int:
            return in_steps(length, self.unit, steps_per_epoch=steps_per_epoch, total_steps=total)

        if self.paper is not None:
            made = paper(self.paper, sparsity=self.sparsity, steps_per_epoch=steps_per_epoch)
        elif self.phases:
            made = phases((steps(length), sparsity) for length, sparsity in self.phases)
        else:
            return alternating(
                sparsity=self.sparsity,
                total_steps=total,
                warmup_steps=steps(self.warmup),
                sparse_steps=steps(self.sparse),
                dense_steps=steps(self.dense),
                final_dense_steps=steps(self.final_dense),
                final_sparse_steps=steps(self.final_sparse),
            )
        if made.total_steps != total:
            raise ConfigError(
                f"the schedule has {made.total_steps} steps ({made.total_steps / steps_per_epoch:g} epochs), the run "
                f"{total} ({epochs} epochs); set --train.epochs to match"
            )
        return made


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """How to train sparsely."""

    name: Literal["acdc", "dense"] = "acdc"
    """acdc, or dense for a baseline of equal length."""
    distribution: Literal["global", "uniform"] = "global"
    """One ranking over all layers, or the same sparsity in each."""
    reset: ResetScope = "all"
    """Whose optimizer state is restored when weights come back: all, targets or none."""
    minimum_kept: int = 1
    """Weights that every layer keeps."""

    def build(self, schedule: ScheduleSettings, *, steps_per_epoch: int, epochs: int) -> Method:
        """Return the method with its schedule in steps."""
        if self.name == "dense":
            return Dense(schedule=constant(sparsity=0.0, total_steps=steps_per_epoch * epochs))
        distribution: Distribution = Global() if self.distribution == "global" else Uniform()
        return ACDC(
            schedule=schedule.build(steps_per_epoch=steps_per_epoch, epochs=epochs),
            distribution=distribution,
            reset=self.reset,
            minimum_kept=self.minimum_kept,
        )


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Which parameters may be pruned; by default the weight of every linear and convolution layer."""

    include: tuple[str, ...] = ()
    """Names, globs or re: expressions; nothing means the default."""
    exclude: tuple[str, ...] = ()
    """Names, globs or re: expressions to leave dense."""
    dense_first: bool = False
    """Leave the first one dense."""
    dense_last: bool = False
    """Leave the last one dense."""
    dense_depthwise: bool = False
    """Leave depthwise convolutions dense."""

    def build(self) -> Targets:
        """Return the choice of parameters."""
        return Targets(**dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run is made of."""

    dataset: DataSource
    model: ModelSettings
    method: MethodSettings = MethodSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    targets: TargetSettings = TargetSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    learning_rate: LearningRateSettings = LearningRateSettings()
    train: TrainSettings = TrainSettings()
    seed: int = 0
    """Of initial weights, data order, augmentation and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads; 0 takes torch's choice. Results are equal to the bit only for equal threads."""

    def plain(self) -> dict[str, Any]:
        """Return the recipe as JSON-able data; `recipe_from_plain` reads it back."""
        data: dict[str, Any] = _to_plain(self)
        return data


_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Recipe, ModelSettings, ScheduleSettings, MethodSettings, TargetSettings,
        OptimizerSettings, LearningRateSettings, TrainSettings, *SOURCES.values(),
    )
}  # fmt: skip


def recipe_from_plain(data: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `Recipe.plain` wrote.

    Raises:
        ConfigError: If a class or a field is unknown or missing.
    """
    recipe = _from_plain(data, Recipe)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"expected a Recipe, got {data.get('type')!r}")
    return recipe


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, (tuple, list)):
        return [_to_plain(item) for item in value]
    return value if isinstance(value, (dict, str, int, float, bool, type(None))) else str(value)


def _from_plain(data: Any, annotation: Any) -> Any:
    if isinstance(data, Mapping) and "type" in data:
        name = data["type"]
        if name not in _CLASSES:
            raise ConfigError(f"unknown configuration class {name!r}{nearest(str(name), _CLASSES)}")
        cls = _CLASSES[name]
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(data) - known - {"type"}
        missing = known - set(data)
        if unknown or missing:
            raise ConfigError(f"{name}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
        return cls(**{key: _from_plain(value, hints[key]) for key, value in data.items() if key != "type"})
    if isinstance(data, list):
        return _tuple_of(data, annotation)
    if isinstance(data, str) and _is_path(annotation):
        return Path(data)
    return data


def _tuple_of(data: list[Any], annotation: Any) -> Any:
    inner = next((arg for arg in typing.get_args(annotation) if arg is not Ellipsis), Any)
    return tuple(_from_plain(item, inner) for item in data)


def _is_path(annotation: Any) -> bool:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return any(getattr(option, "__name__", "") == "Path" for option in options)
