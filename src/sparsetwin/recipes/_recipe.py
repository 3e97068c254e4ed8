"""What a recipe is: the whole configuration of a run as one frozen dataclass, to plain data and back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from sparsetwin.data import SOURCES, DataSource
from sparsetwin.errors import ConfigError
from sparsetwin.recipes._methods import MethodSettings
from sparsetwin.recipes._named_values import NAMED_VALUES
from sparsetwin.recipes._plain import from_plain, to_plain
from sparsetwin.recipes._schedule import ScheduleSettings
from sparsetwin.targets import Targets
from sparsetwin.training import DistributedSettings, LearningRateSettings, OptimizerSettings, TrainSettings

_LAST_SEED = 2**63 - 1  # that all generators take
_MOST_THREADS = 2**16


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network."""

    name: str
    """A reference network's name, or module:callable of your own."""
    options: Annotated[dict[str, Any], NAMED_VALUES] = field(default_factory=dict)
    """Arguments of the network's constructor, such as: dropout=0.3 width=64. Those not given stay as they are."""


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
    distributed: DistributedSettings = DistributedSettings()
    pretrained: str | None = None
    """Trained weights to begin with: a run folder, whose dense half it is, or a file of safetensors. A relative path
    is taken from the folder in which the run begins; run.json holds it in full. Resuming from a checkpoint does not
    read it again."""
    seed: int = 0
    """Of initial weights, data order, augmentation and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads; 0 takes torch's choice. Results are equal to the bit only for equal threads."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"threads needs to be 0 (torch's choice) or more, got {self.threads}")
        if self.threads > _MOST_THREADS:
            raise ConfigError(f"threads is at most {_MOST_THREADS}, got {self.threads}; 0 takes torch's choice")
        if not 0 <= self.seed <= _LAST_SEED:
            raise ConfigError(f"seed is a whole number from 0 to 2**63 - 1, got {self.seed}")

    def plain(self) -> dict[str, Any]:
        """Return the recipe as JSON-able data; `recipe_from_plain` reads it back."""
        data: dict[str, Any] = to_plain(self, known=_CLASSES, where="recipe")
        if self.distributed == DistributedSettings():  # as runs of one process, and of older releases, have it
            del data["distributed"]
        for section, fields in _LATER.items():
            if all(data[section][name] == default for name, default in fields.items()):
                for name in fields:
                    del data[section][name]
        return data


_LATER: dict[str, dict[str, Any]] = {"method": {"qat": False, "qat_start": None}, "train": {"test": True}}
"""Fields that older releases lack, and what they say where they are left out."""

_CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Recipe, ModelSettings, ScheduleSettings, MethodSettings, TargetSettings,
        OptimizerSettings, LearningRateSettings, TrainSettings, DistributedSettings, *SOURCES.values(),
    )
}  # fmt: skip


def recipe_from_plain(data: Any) -> Recipe:
    """Return the recipe that `Recipe.plain` wrote.

    Args:
        data: Plain data, as ``run.json`` holds it.

    Raises:
        ConfigError: If a class or a field is unknown or missing, or a value is of another type.
    """
    if isinstance(data, Mapping) and data.get("type") == "Recipe" and "distributed" not in data:
        data = {**data, "distributed": to_plain(DistributedSettings(), known=_CLASSES, where="config")}
    for section, fields in _LATER.items():
        if isinstance(data, Mapping) and isinstance(data.get(section), Mapping) and not data[section].keys() & fields:
            data = {**data, section: {**data[section], **fields}}
    recipe: Recipe = from_plain(data, Recipe, known=_CLASSES, where="config")
    return recipe
