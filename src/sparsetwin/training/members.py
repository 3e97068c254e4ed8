"""The final test: every member of the pair on the test set, which is read here and nowhere else."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from sparsetwin.checkpoint import JSON, Pair
from sparsetwin.metrics import ForwardFlops, nonzero_counts
from sparsetwin.training.evaluate import evaluate
from sparsetwin.training.processes import Processes
from sparsetwin.training.settings import TrainSettings


def score_members(
    pair: Pair,
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    forward: ForwardFlops,
    settings: TrainSettings,
    processes: Processes,
) -> dict[str, dict[str, Any]]:
    """Test all members, list their scores in the pair, and return what ``metrics.jsonl`` tells of them.

    Args:
        pair: The pair; every member gets the metric ``test``.
        model: Of the members' architecture, on the device.
        batches: Gives the test set anew at each call.
        forward: FLOPs of the dense model.
        settings: Precision and memory format.
        processes: Those that share the test set out; the first reads and lists the members.
    """
    told = {}
    for name, member in processes.of_first(lambda: pair.members).items():
        loaded = _loaded(pair, name, model, processes)
        score = evaluate(
            loaded,
            batches(),
            precision=settings.precision,
            channels_last=settings.channels_last,
            processes=processes,
        )
        metrics: dict[str, JSON] = {"test": {**score.plain()}}
        if processes.is_first:
            pair.annotate(name, metrics)
        told[name] = {
            "sparsity": member.sparsity,
            "kept": member.kept,
            "targets": member.targets,
            "step": member.step,
            "file_bytes": processes.of_first((pair.folder / member.file).stat).st_size,
            "forward_flops": forward.total(nonzero_counts(loaded)),
            "holdout": member.metrics.get("holdout"),
            "test": score.plain(),
        }
    return told


def _loaded(pair: Pair, name: str, model: nn.Module, processes: Processes) -> nn.Module:
    """Return a copy of the model with a member's state, which the first process reads and sends to the others."""
    if not processes.are_many:
        return pair.load(name, model)
    state = processes.of_first(lambda: {key: value.cpu() for key, value in pair.load(name, model).state_dict().items()})
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state)
    return loaded
