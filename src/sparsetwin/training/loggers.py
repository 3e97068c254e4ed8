"""The run's events as curves in TensorBoard, Weights & Biases or MLflow.

A logger gets the very objects that become lines of ``metrics.jsonl``, and shows their numbers. Each library is imported
when its logger is made, so none is needed to train. A resumed run goes on in the same TensorBoard folder, and as a
further run in the other two.
"""

import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from sparsetwin.errors import ConfigError, nearest

_WHEN = ("step", "start", "stop")  # where an event stands, and no curves of their own
_MLFLOW_BATCH = 500  # metrics; its server takes at most 1,000 at once


class Logger(Protocol):
    """What the training loop tells of its events."""

    def log(self, event: Mapping[str, object]) -> None:
        """Show one event, as it stands in ``metrics.jsonl``."""

    def close(self) -> None:
        """Write out what is left; nothing is logged afterwards."""


def make_logger(name: str, folder: str | Path) -> Logger:
    """Make a logger by name, with its defaults.

    Args:
        name: ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``.
        folder: The run folder.

    Raises:
        ConfigError: If the name is unknown or its library is not installed.
    """
    made: dict[str, Callable[[str | Path], Logger]] = {
        "tensorboard": TensorBoardLogger,
        "wandb": WandbLogger,
        "mlflow": MlflowLogger,
    }
    if name not in made:
        raise ConfigError(f"unknown logger {name!r}; known: {', '.join(made)}{nearest(name, made)}")
    return made[name](folder)


def scalars(event: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of an event by slash-separated names.

    Numbers of the stage's epochs come under the stage's name, those of phase ends under ``<stage>/phase``, those of the
    final test under ``final``. A layer's pair of counts becomes its sparsity. A start tells no more than the run
    folder, and gives none.

    >>> scalars({"event": "epoch", "stage": "main", "step": 40, "train": {"loss": 0.5}, "holdout": None, "lr": 0.1})
    {'main/train/loss': 0.5, 'main/lr': 0.1}

    Args:
        event: As it stands in ``metrics.jsonl``.
    """
    kind, stage = event.get("event"), str(event.get("stage"))
    prefix = {"epoch": stage, "phase": f"{stage}/phase", "final": "final"}.get(str(kind))
    if prefix is None:
        return {}
    fields = {name: value for name, value in event.items() if name not in _WHEN}
    return {f"{prefix}/{name}": value for name, value in _flat(fields)}


def step_of(event: Mapping[str, Any]) -> int:
    """Return the optimizer step of an event; the final test is at the step of its latest member."""
    if event.get("event") == "final":
        return max((int(member["step"]) for member in event["members"].values()), default=0)
    return int(event.get("step", 0))


class TensorBoardLogger:
    """Scalars for TensorBoard, in a ``tensorboard`` folder within the run folder.

    Args:
        folder: The run folder.

    Raises:
        ConfigError: If tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        library = _library("tensorboard", module="torch.utils.tensorboard")
        self._writer = library.SummaryWriter(str(Path(folder) / "tensorboard"))

    def log(self, event: Mapping[str, object]) -> None:
        """Write the event's numbers at its step."""
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, step_of(event))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbLogger:
    """Scalars for Weights & Biases.

    Its own step only ever rises, while the stages of a run go over the same steps; so every number is drawn over
    ``optimizer_step``, which goes with it.

    Args:
        folder: The run folder; the library keeps its files in a ``wandb`` folder there.
        project: Where the run shows up.
        name: What it is called there, by default as the folder.
        mode: ``"online"``, ``"offline"`` (for ``wandb sync`` later), ``"disabled"``, or None for what the environment
            variable ``WANDB_MODE`` says.

    Raises:
        ConfigError: If wandb is not installed.
    """

    def __init__(
        self, folder: str | Path, *, project: str = "sparsetwin", name: str | None = None, mode: str | None = None
    ) -> None:
        library = _library("wandb")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = library.init(project=project, dir=str(folder), name=name or folder.resolve().name, mode=mode)
        self._run.define_metric("*", step_metric="optimizer_step")

    def log(self, event: Mapping[str, object]) -> None:
        """Log the event's numbers with its step."""
        self._run.log({**scalars(event), "optimizer_step": step_of(event)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowLogger:
    """Metrics for MLflow.

    Args:
        folder: The run folder.
        experiment: Where the run shows up; it is made if needed.
        tracking_uri: The server or store; by default the environment variable ``MLFLOW_TRACKING_URI``, and without it
            a store in an ``mlflow`` folder within the run folder.

    Raises:
        ConfigError: If mlflow is not installed.
    """

    def __init__(self, folder: str | Path, *, experiment: str = "sparsetwin", tracking_uri: str | None = None) -> None:
        library = _library("mlflow")
        folder = Path(folder).resolve()
        given = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client = library.MlflowClient(tracking_uri=given or _local_store(folder / "mlflow"))
        artifacts = None if given else (folder / "mlflow" / "artifacts").as_uri()
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = (
            found.experiment_id if found else self._client.create_experiment(experiment, artifact_location=artifacts)
        )
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._run_id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id

    def log(self, event: Mapping[str, object]) -> None:
        """Log the event's numbers at its step."""
        now, step = int(time.time() * 1000), step_of(event)
        metrics = [self._metric(name, value, now, step) for name, value in scalars(event).items()]
        for first in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _MLFLOW_BATCH])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)


def _flat(fields: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            inner = _layer_sparsities(value) if name == "layers" else _flat(value)
            yield from ((f"{name}/{inner_name}", number) for inner_name, number in inner)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)


def _layer_sparsities(layers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, (kept, weights) in layers.items():
        if weights:
            yield name, 1 - kept / weights


def _library(name: str, *, module: str | None = None) -> Any:
    try:
        found = importlib.import_module(module or name)
    except ImportError as error:
        raise _missing(name) from error
    if found.__file__ is None:  # a folder of that name, such as the library itself leaves behind
        raise _missing(name)
    return found


def _missing(name: str) -> ConfigError:
    return ConfigError(f"the logger {name!r} needs a library that is missing; run: pip install 'sparsetwin[loggers]'")


def _local_store(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"
