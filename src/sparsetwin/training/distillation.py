"""Knowledge distillation: a loss that also asks for the outputs of another network."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetwin.errors import ConfigError
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.training.evaluate import autocast
from sparsetwin.training.settings import TrainSettings

OWN = "own"
"""Teacher's name for the run's own dense half: the network as the last dense phase left it."""


def distillation_loss(logits: Tensor, taught: Tensor, *, temperature: float) -> Tensor:
    """Return ``T^2 * KL(teacher || student)`` of outputs softened by the temperature, the mean over samples.

    >>> distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), temperature=2.0)
    tensor(0.)

    Args:
        logits: (..., classes), of the student.
        taught: Of the same shape, of the teacher.
        temperature: At least 1 softens both.

    Source: Hinton, Vinyals & Dean, 2015, arXiv 1503.02531, section 2.
    """
    student = F.log_softmax(logits.flatten(0, -2).float() / temperature, dim=1)
    teacher = F.log_softmax(taught.flatten(0, -2).float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


class Teacher:
    """A network in evaluation mode whose outputs are learned from.

    Args:
        model: The teacher.
        settings: Weight, temperature and precision.
        is_own: Whether it is made of the student, at the end of each dense phase; until the first it teaches nothing.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings, *, is_own: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self._settings = settings
        self._is_own = is_own
        self.teaches = not is_own

    def loss(self, loss: Tensor, logits: Tensor, inputs: Tensor) -> Tensor:
        """Return the loss of a batch with the teacher's share in it.

        Args:
            loss: Of the labels.
            logits: (batch, ..., classes), of the student.
            inputs: (batch, ...).
        """
        if not self.teaches:
            return loss
        with torch.no_grad(), autocast(inputs.device, self._settings.precision):
            taught = self.model(inputs)
        if taught.shape != logits.shape:
            raise ConfigError(
                f"the teacher's outputs have shape {tuple(taught.shape)}, the network's {tuple(logits.shape)}"
            )
        share = self._settings.teacher_weight
        return (1 - share) * loss + share * distillation_loss(
            logits, taught, temperature=self._settings.teacher_temperature
        )

    def become(self, model: nn.Module) -> None:
        """Take over the weights and statistics of the student, which goes on as a sparse network."""
        self.model.load_state_dict(model.state_dict())
        self.teaches = True

    def rest(self) -> None:
        """Teach nothing in a dense phase, in which the student is what the teacher is made of."""
        self.teaches = not self._is_own

    def state_dict(self) -> dict[str, Any] | None:
        """Return what a run has to save: of a teacher of its own, its state."""
        return {"model": self.model.state_dict(), "teaches": self.teaches} if self._is_own else None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Load what `state_dict` returned."""
        if state is not None and self._is_own:
            self.model.load_state_dict(state["model"])
            self.teaches = bool(state["teaches"])


def make_teacher(
    teacher: nn.Module | None, student: Callable[[], nn.Module], sparsifier: Sparsifier, settings: TrainSettings
) -> Teacher | None:
    """Return the teacher that the settings ask for, if they do.

    Args:
        teacher: A trained network; None where the run's own dense half is to teach, or nobody.
        student: Returns the student as it is evaluated and saved.
        sparsifier: Of the student, whose phases make a teacher of its own.
        settings: Of the training loop.

    Raises:
        ConfigError: If the run's own dense half is to teach, and all phases are sparse.
    """
    if settings.teacher is None:
        return None
    if settings.teacher != OWN:
        assert teacher is not None
        return Teacher(teacher, settings, is_own=False)
    if all(phase.is_sparse for phase in sparsifier.method.schedule.phases):
        raise ConfigError(
            f"--train.teacher {OWN} needs a dense phase before a sparse one, and this schedule of "
            f"{type(sparsifier.method).__name__} has none; give a run folder"
        )
    own = Teacher(copy.deepcopy(student()), settings, is_own=True)

    def follow(event: str, phase: Any) -> None:
        if event == "leave" and not phase.is_sparse:
            own.become(student())
        elif event == "enter" and not phase.is_sparse:
            own.rest()

    sparsifier.on_phase(follow)
    return own
