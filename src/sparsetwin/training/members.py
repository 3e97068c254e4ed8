"""The final test: every member of the pair on the test set, which is read here and nowhere else."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from sparsetwin.checkpoint import JSON, Pair
from sparsetwin.metrics import ForwardFlops, nonzero_counts
from sparsetwin.training.evaluate import evaluate
from sparsetwin.training.settings import TrainSettings


def score_members(
    pair: Pair,
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    forward: ForwardFlops,
    settings: TrainSettings,
) -> dict[str, dict[str, Any]]:
    """Test all members, list their scores in the pair, and return what ``metrics.jsonl`` tells of them.

    Args:
        pair: The pair; every member gets the metric ``test``.
        model: Of the members' architecture, on the device.
        batches: Gives the test set anew at each call.
        forward: FLOPs of the dense model.
        settings: Precision and memory format.
    """
    told = {}
    for name, member in pair.members.items():
        loaded = pair.load(name, model)
        score = evaluate(loaded, batches(), precision=settings.precision, channels_last=settings.channels_last)
        metrics: dict[str, JSON] = {"test": {**score.plain()}}
        pair.annotate(name, metrics)
        told[name] = {
            "sparsity": member.sparsity,
            "kept": member.kept,
            "targets": member.targets,
            "step": member.step,
            "file_bytes": (pair.folder / member.file).stat().st_size,
            "forward_flops": forward.total(nonzero_counts(loaded)),
            "holdout": member.metrics.get("holdout"),
            "test": score.plain(),
        }
    return told
