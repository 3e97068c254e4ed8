"""Loss and accuracy of a model on a split."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetwin.errors import UsageError
from sparsetwin.training.processes import ALONE, Processes
from sparsetwin.training.settings import Precision


@dataclass(frozen=True)
class Score:
    """Mean loss (nats) and accuracy (fraction in [0, 1]) over all labels of a split."""

    loss: float
    accuracy: float

    def plain(self) -> dict[str, float | None]:
        """Return the score as a dict, as ``metrics.jsonl`` holds it; None is a loss that is not finite."""
        return {"accuracy": self.accuracy, "loss": self.loss if math.isfinite(self.loss) else None}

    def is_better_than(self, other: "Score") -> bool:
        """Whether the accuracy is higher, or the same at a lower loss; a loss that is not finite is the worst."""
        return (self.accuracy, -self._loss_to_compare) > (other.accuracy, -other._loss_to_compare)

    @property
    def _loss_to_compare(self) -> float:
        return self.loss if math.isfinite(self.loss) else math.inf


@dataclass
class Sums:
    """What the training steps of an epoch added up to."""

    loss: float = 0.0  # of means over batches
    correct: int = 0
    labels: int = 0
    steps: int = 0
    samples: int = 0

    def score(self) -> Score:
        """Return mean loss and accuracy."""
        return Score(self.loss / max(self.steps, 1), self.correct / max(self.labels, 1))


def loss_and_correct(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the number of right predictions, both as scalars on the device.

    Args:
        logits: (..., classes), float; for text (batch, time, classes).
        labels: (...), int64.
        label_smoothing: Share of the target probability spread over all classes.
    """
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(flat.float(), wanted, label_smoothing=label_smoothing)
    return loss, (flat.argmax(1) == wanted).sum()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context in which a forward pass runs at a precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: Precision = "fp32",
    channels_last: bool = False,
    processes: Processes = ALONE,
) -> Score:
    """Evaluate a model in evaluation mode, and put it back into the mode it was in.

    Several processes take the batches in turn, and all get the score.

    Args:
        model: Returns logits (batch, ..., classes).
        batches: Inputs and labels on the model's device.
        precision: Of the forward pass.
        channels_last: Turn image batches into channels-last memory format.
        processes: Those that evaluate the same model on the same batches.

    Raises:
        UsageError: If there are no batches.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    labels_seen = 0
    try:
        for inputs, labels in islice(batches, processes.rank, None, processes.count):
            with autocast(inputs.device, precision):
                logits = model(to_format(inputs, channels_last=channels_last))
            loss, right = loss_and_correct(logits, labels)
            losses.append(loss.double() * labels.numel())
            correct.append(right)
            labels_seen += labels.numel()
    finally:
        for module, training in modes.items():
            module.training = training
    loss_sum = float(torch.stack(losses).sum()) if losses else 0.0
    right_sum = int(torch.stack(correct).sum()) if correct else 0
    told = processes.collect((loss_sum, right_sum, labels_seen))  # and added in the order of ranks
    loss_sum, right_sum, seen = sum(t[0] for t in told), sum(t[1] for t in told), sum(t[2] for t in told)
    if not seen:
        raise UsageError("there are no batches to evaluate on")
    return Score(loss_sum / seen, right_sum / seen)


def to_format(inputs: Tensor, *, channels_last: bool) -> Tensor:
    """Return images in channels-last memory format if asked to; other inputs as they are."""
    if channels_last and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs
