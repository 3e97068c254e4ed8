"""The story of the digits again with cifar10-resnet20 on real images; set SPARSETWIN_CIFAR10 to their folder.

At half width it takes three minutes of one core, most of them for the training.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Commands, Server
from engines import ENGINES, Predict, from_weights, logits_of
from torch import nn

from sparsetwin.checkpoint import Pair
from sparsetwin.data import Cifar10
from sparsetwin.models import resnet20

DATA = os.environ.get("SPARSETWIN_CIFAR10", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first test trains; a machine that others use is slow at that
    pytest.mark.skipif(not DATA, reason="SPARSETWIN_CIFAR10 names no folder with CIFAR-10's Parquet shards"),
]
SHORT = (
    "--epochs", "7", "--schedule.warmup", "1", "--schedule.sparse", "1", "--schedule.dense", "1",
    "--schedule.final-dense", "1", "--schedule.final-sparse", "2", "--no-dense-finetune", "--dataset.samples", "5000",
    "--model.options", "width=0.5", "--threads", "1",
)  # fmt: skip
EVAL_BATCH = 500
COMPARED = 2000  # test images whose logits are compared; accuracies are those of all 10,000


def make() -> nn.Module:
    return resnet20(num_classes=10, width=0.5)


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    done = Commands(server, folder).run("train", "cifar10-resnet20", *SHORT, "--data", DATA, "--quiet", "--out", "run")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="module")
def tested(run: Path) -> tuple[list[tuple[torch.Tensor, np.ndarray]], np.ndarray]:
    """Batches of the whole test set, and the logits of the sparse half in PyTorch."""
    splits = Cifar10().load(Path(DATA), batch_size=64, eval_batch_size=EVAL_BATCH, seed=0, device=torch.device("cpu"))
    batches = [(images, labels.numpy()) for images, labels in splits.test.epoch(0)]
    return batches, all_logits(logits_of(Pair(run / "pair").sparse(make())), batches)


def all_logits(predict: Predict, batches: list[tuple[torch.Tensor, np.ndarray]]) -> np.ndarray:
    return np.concatenate([predict(images) for images, _ in batches])


@pytest.mark.parametrize(("to", "name", "load"), ENGINES)
def test_every_engine_predicts_what_pytorch_does(
    cli: Commands, run: Path, tested: tuple[list[tuple[torch.Tensor, np.ndarray]], np.ndarray], to: str, name: str,
    load: Callable[[Path, Callable[[], nn.Module]], Predict],
) -> None:  # fmt: skip
    assert cli.run("export", run, "--to", to, "--out", name).code == 0
    batches, logits = tested
    batches, logits = batches[: COMPARED // EVAL_BATCH], logits[:COMPARED]
    found = all_logits(load(cli.folder / name, make), batches)
    assert len(found) == COMPARED
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    margins = np.diff(np.sort(logits, 1)[:, -2:], axis=1)[:, 0]
    differs = found.argmax(1) != logits.argmax(1)
    assert not differs[margins > 2e-5 * np.abs(logits).max()].any()
    assert differs.mean() <= 0.001  # ties


@pytest.mark.parametrize(("values", "points"), [("bfloat16", 0.2), ("float16", 0.2), ("int8", 1.0)])
def test_fewer_bits_cost_little_accuracy(
    cli: Commands,
    run: Path,
    tested: tuple[list[tuple[torch.Tensor, np.ndarray]], np.ndarray],
    values: str,
    points: float,
) -> None:
    assert cli.run("export", run, "--to", "safetensors", "--values", values, "--out", "m").code == 0
    batches, logits = tested
    labels = np.concatenate([found for _, found in batches])
    found = all_logits(from_weights(cli.folder / "m", make), batches)
    assert len(found) == len(labels) == 10_000
    accuracies = [100 * (predicted.argmax(1) == labels).mean() for predicted in (logits, found)]
    assert accuracies[0] > 25
    assert abs(accuracies[0] - accuracies[1]) <= points
