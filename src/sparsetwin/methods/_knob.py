"""What a comparison tunes of a method: data that its trials draw from."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Knob:
    """One setting that is tuned.

    A knob of a method whose path is that of one which all methods have takes its place.
    """

    path: str  # field of the recipe, such as method.options.drop_fraction or schedule.every
    values: tuple[Any, ...]
    unit: str = ""  # "own": factors of the recipe's own value; "run": fractions of the run, in the schedule's unit
