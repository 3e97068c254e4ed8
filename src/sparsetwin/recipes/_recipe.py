"""What a recipe is: the whole configuration of a run as one frozen dataclass, to plain data and back."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sparsetwin.data import SOURCES, DataSource
from sparsetwin.distributions import Distribution, Global, Uniform
from sparsetwin.errors import ConfigError
from sparsetwin.methods import ACDC, Dense, Method
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.recipes._named_values import NAMED_VALUES
from sparsetwin.recipes._plain import from_plain, to_plain
from sparsetwin.recipes._schedule import ScheduleSettings
from sparsetwin.schedules import constant
from sparsetwin.targets import Targets
from sparsetwin.training import LearningRateSettings, OptimizerSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network."""

    name: str
    """A reference network's name, or module:callable of your own."""
    options: Annotated[dict[str, Any], NAMED_VALUES] = field(default_factory=dict)
    """Arguments of the network's constructor, such as: dropout=0.3 width=64. Those not given stay as they are."""


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

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"threads needs to be 0 (torch's choice) or more, got {self.threads}")

    def plain(self) -> dict[str, Any]:
        """Return the recipe as JSON-able data; `recipe_from_plain` reads it back."""
        data: dict[str, Any] = to_plain(self, known=_CLASSES, where="recipe")
        return data


_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Recipe, ModelSettings, ScheduleSettings, MethodSettings, TargetSettings,
        OptimizerSettings, LearningRateSettings, TrainSettings, *SOURCES.values(),
    )
}  # fmt: skip


def recipe_from_plain(data: Any) -> Recipe:
    """Return the recipe that `Recipe.plain` wrote.

    Args:
        data: Plain data, as ``run.json`` holds it.

    Raises:
        ConfigError: If a class or a field is unknown or missing, or a value is of another type.
    """
    recipe: Recipe = from_plain(data, Recipe, known=_CLASSES, where="config")
    return recipe
