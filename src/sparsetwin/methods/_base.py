"""What a sparse-training method is: one rule that says which weights live in a phase."""

import dataclasses
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.masking import Masks
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.schedules import Phase, Schedule


@dataclass(kw_only=True)
class SparseState:
    """What a method may read and remember. Its tensors are the live ones: change a weight only where a rule says so."""

    weights: Mapping[str, Tensor]  # targets by canonical name, in the model's order
    masks: Masks = field(default_factory=dict)  # of the phase in force; on entering, of the phase that ends
    buffers: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what -> canonical name -> tensor; is saved
    generator: torch.Generator = field(default_factory=torch.Generator)  # for methods that draw; is saved

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the targets that have one; there are some between backward and update only."""
        return {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each target."""
        return {name: weight.numel() for name, weight in self.weights.items()}


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen description of a method; `Sparsifier` holds all that changes."""

    schedule: Schedule
    needs_gradients: ClassVar[bool] = False  # True: a phase is entered between backward and update
    draws: ClassVar[bool] = False  # True: the state of the generator is saved

    @abstractmethod
    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of a phase that begins; an empty dict leaves every weight free.

        Args:
            phase: The phase to come.
            state: Weights, and the masks of the phase that ends.

        Returns:
            Canonical name -> bool mask, one for every target, or nothing; in a dense phase nothing.
        """

    def check(self, state: SparseState) -> None:
        """Refuse, before training, what could only fail in the middle of it. By default nothing is refused.

        Raises:
            SparsetwinError: If some phase cannot be entered with these weights.
        """

    def before_update(self, state: SparseState) -> None:
        """Run once a step, between backward and the first optimizer's update, after gradients were masked.

        A step that a GradScaler skips has neither this nor `after_update`.
        """

    def after_update(self, state: SparseState) -> None:
        """Run once a step, after the last optimizer's update, before weights are masked."""

    def project(self, name: str, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the weight as the phase allows it; by default what the mask keeps.

        Args:
            name: Canonical name.
            weight: Any shape.
            mask: Of the same shape, bool.
        """
        return torch.where(mask, weight, 0)

    def reset_scope(self, left: Phase, entered: Phase) -> ResetScope:
        """Return whose optimizer state goes back to its initial values between two phases; by default nobody's."""
        return "none"

    def config(self) -> dict[str, Any]:
        """Return the method as plain data: its name, and every field; a schedule as [start, stop, sparsity] per phase.

        Raises:
            ConfigError: If a field holds what is no plain data.
        """
        return {
            "name": type(self).__name__,
            **{f.name: _plain(getattr(self, f.name), f.name) for f in dataclasses.fields(self)},
        }


def _plain(value: object, field: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):  # numpy's too, which torch.load(weights_only=True) refuses
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Schedule):
        return [[int(phase.start), int(phase.stop), float(phase.sparsity)] for phase in value.phases]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name), field) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, field) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, field) for item in value]
    raise ConfigError(
        f"{field} holds a {type(value).__name__}, which cannot be saved; expected numbers, strings, None, dataclasses, "
        "mappings or sequences of them"
    )
