"""What a run comes to: every member of the pair, tested on the test set, which is read here and nowhere else."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from sparsetwin.checkpoint import JSON, Pair, load_sparse, save_sparse
from sparsetwin.metrics import ForwardFlops, nonzero_counts
from sparsetwin.training.evaluate import evaluate
from sparsetwin.training.processes import Processes
from sparsetwin.training.settings import TrainSettings


def score_members(
    pair: Pair,
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None,
    *,
    forward: ForwardFlops,
    settings: TrainSettings,
    processes: Processes,
) -> dict[str, dict[str, Any]]:
    """Test all members, list their scores in the pair, and return what ``metrics.jsonl`` tells of them.

    Args:
        pair: The pair; every member gets the metric ``test``, and the sparse half ``int8``: how large a file of int8
            values is, and the score of the network that comes back from it.
        model: Of the members' architecture, on the device.
        batches: Gives the test set anew at each call; None tests nothing.
        forward: FLOPs of the dense model.
        settings: Precision and memory format.
        processes: Those that share the test set out; the first reads and lists the members.
    """

    def scored(network: nn.Module, tests: Iterable[tuple[Tensor, Tensor]]) -> dict[str, JSON]:
        score = evaluate(
            network,
            tests,
            precision=settings.precision,
            channels_last=settings.channels_last,
            processes=processes,
        )
        return {**score.plain()}

    told: dict[str, dict[str, Any]] = {}
    for name, member in processes.of_first(lambda: pair.members).items():
        loaded = _loaded(pair, name, model, processes)
        metrics: dict[str, JSON] = {} if batches is None else {"test": scored(loaded, batches())}
        if name == "sparse" and batches is not None:
            file_bytes, decoded = _as_int8(pair, name, model, processes)
            metrics["int8"] = {"file_bytes": file_bytes, "test": scored(decoded, batches())}
        if processes.is_first and metrics:
            pair.annotate(name, metrics)
        told[name] = {
            "sparsity": member.sparsity,
            "kept": member.kept,
            "targets": member.targets,
            "step": member.step,
            "file_bytes": processes.of_first((pair.folder / member.file).stat).st_size,
            "forward_flops": forward.total(nonzero_counts(loaded)),
            "holdout": member.metrics.get("holdout"),
            **metrics,
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


def _as_int8(pair: Pair, name: str, model: nn.Module, processes: Processes) -> tuple[int, nn.Module]:
    """Return the bytes of a member's file of int8 values, and a copy of the model as that file gives it back."""

    def read() -> tuple[int, dict[str, Tensor]]:
        network = pair.network(name)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "int8.safetensors"
            save_sparse(path, network.tensors, network.masks, card=network.card, values="int8")
            return path.stat().st_size, load_sparse(path).tensors

    file_bytes, state = processes.of_first(read)
    decoded = copy.deepcopy(model)
    decoded.load_state_dict(state)
    return file_bytes, decoded
