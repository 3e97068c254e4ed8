"""What a sparse-training method is: one rule that says which weights live in a phase."""

import dataclasses
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._state import SparseState
from sparsetwin.methods.ham import HAM
from sparsetwin.methods.int8 import Int8
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.schedules import Phase, Schedule

_ADDED = ("ham", "quantization")  # fields that are left out of `Method.config` while they are None

Touched = Literal["all", "kept", "updated"]
"""Weights that a pass computes with: all, those that the masks keep, or those whose gradients the optimizer sees."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass forward and backward over a batch, by the weights that it has to compute with: what it costs."""

    forward: Touched = "kept"
    input_gradient: Touched | None = "kept"
    weight_gradient: Touched | None = "kept"
    density: float | None = None
    """Fraction of every target that "kept" is expected to be in this pass alone, for what is said before training; None
    is what the phase keeps. A run counts what every pass did compute with."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen description of a method; `Sparsifier` holds all that changes."""

    course: ClassVar[Course] = Course(kind="alternating")
    """The schedule that a recipe gives the method, if nothing else is asked for; by default AC/DC's phases."""
    knobs: ClassVar[tuple[Knob, ...]] = ()
    """What a comparison tunes beside learning rate and weight decay; by default nothing."""
    schedule: Schedule
    ham: HAM | None = None
    """The hyperbolic mirror step after each update, which composes with every method; None is none."""
    quantization: Int8 | None = None
    """Rounding of the weights to int8 at the end of training, which composes with every method; None is none."""
    stores_weights: ClassVar[bool] = False
    """True: in sparse phases parameters hold what `project` makes of stored weights, and updates go to these."""
    needs_closure: ClassVar[bool] = False
    """True: a step passes more than once over its batch, so the loop has to call ``sparsifier.backward(closure)``."""

    @abstractmethod
    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of a phase that begins; an empty dict leaves every weight free.

        Args:
            phase: The phase to come.
            state: Weights, and the masks of the phase that ends.

        Returns:
            Canonical name -> bool mask, one for every target, or nothing; in a dense phase nothing.
        """

    # When a phase begins

    def check(self, state: SparseState) -> None:
        """Refuse, before training, what could only fail in the middle of it. By default nothing is refused.

        Raises:
            SparsetwinError: If some phase cannot be entered with these weights.
        """

    @property
    def first_quantized(self) -> float:
        """The first step, counted from 0, that computes with quantized weights; infinite if none does."""
        return math.inf if self.quantization is None else self.quantization.first_step(self.schedule)

    @property
    def draws(self) -> bool:
        """Whether the method draws from ``state.generator``, whose state is saved then."""
        return False

    def needs_gradients(self, phase: Phase) -> bool:
        """Return whether a phase is entered between backward and update, where gradients exist; by default not."""
        return False

    def gradient_samples(self, phase: Phase) -> int:
        """Return on how many batches `enter` samples gradients with ``state.sample_gradients``; by default on none."""
        return 0

    def skips_update(self, left: Phase | None, entered: Phase) -> bool:
        """Return whether the optimizers leave all weights alone in the step in which a phase begins; by default not.

        It can be so only where the phase needs gradients. The step counts all the same.
        """
        return False

    def reset_scope(self, left: Phase, entered: Phase) -> ResetScope:
        """Return whose optimizer state goes back to its initial values between two phases; by default nobody's."""
        return "none"

    @property
    def learning_rate_steps(self) -> int:
        """Length of the learning-rate schedule in optimizer steps; by default the whole run."""
        return self.schedule.total_steps

    def learning_rate_step(self, step: int) -> int:
        """Return the step of the learning-rate schedule that a step of the run is at; by default the same.

        A training loop sets the learning rate by it; a method that trains in rounds goes back in the schedule.
        """
        return step

    def make_buffers(self, phase: Phase, state: SparseState) -> None:
        """Make the buffers that the method keeps after a step of a phase, for loaders that fill existing tensors only.

        Stored weights and masks are made already; by default there is nothing else.
        """

    # Around an update

    def before_update(self, state: SparseState) -> None:
        """Run once a step, between backward and the first optimizer's update, after gradients were masked.

        A step that a GradScaler skips has neither this nor `after_update`.
        """

    def after_update(self, state: SparseState) -> Masks | None:
        """Run once a step, after the last optimizer's update, before weights are masked or projected.

        Returns:
            Masks to put in force from this step on, or None to keep those of the phase.
        """

    def gradient_masks(self, state: SparseState) -> Masks:
        """Return which gradients the optimizer sees in a sparse phase; by default those of kept weights."""
        return state.masks

    def project(self, name: str, state: SparseState) -> Tensor:
        """Return a target's weights as a sparse phase allows them; by default what the mask keeps.

        Args:
            name: Canonical name of the target.
            state: ``state.weights[name]`` is the weight after its update: the stored one, where weights are stored.
        """
        return torch.where(state.masks[name], state.weights[name], 0)

    def backward(self, closure: Callable[[], Tensor], state: SparseState) -> Tensor:
        """Leave in ``.grad`` of every parameter what the optimizer is to be given, and return the loss.

        Args:
            closure: Runs forward and backward over the batch, adding to ``.grad``, and returns the loss.
            state: Weights, masks and gradients.
        """
        return closure()

    # What it learns beside the weights, costs, and is

    def learned(self, state: SparseState) -> dict[str, Tensor]:
        """Return initial values of parameters that the method learns, by target; the last optimizer updates them."""
        return {}

    def learned_group(self) -> dict[str, Any]:
        """Return settings of the learned parameters' group in the optimizer, such as its weight decay."""
        return {}

    def passes(self, phase: Phase, *, enters: bool) -> tuple[Pass, ...]:
        """Return the passes over the batch of one step, which training FLOPs are counted from.

        Args:
            phase: In force at the step.
            enters: Whether the phase was entered in this step, between backward and update.
        """
        if enters:
            return (Pass(weight_gradient="all"),)
        return (Pass(),)

    def config(self) -> dict[str, Any]:
        """Return the method as plain data: its name, and every field; a schedule as [start, stop, sparsity] per phase.

        Raises:
            ConfigError: If a field holds what is no plain data.
        """
        return {
            "name": type(self).__name__,
            **{
                f.name: _plain(value, f.name)
                for f in dataclasses.fields(self)
                if (value := getattr(self, f.name)) is not None or f.name not in _ADDED
            },
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
