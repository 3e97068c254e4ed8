"""The story of the digits again with cifar10-resnet20 on real images; set SPARSETWIN_CIFAR10 to their folder."""

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
    pytest.mark.skipif(not DATA, reason="SPARSETWIN_CIFAR10 names no folder with CIFAR-10's Parquet shards"),
]
SHORT = (
    "--epochs", "7", "--schedule.warmup", "1", "--schedule.sparse", "1", "--schedule.dense", "1",
    "--schedule.final-dense", "1", "--schedule.final-sparse", "2", "--no-dense-finetune", "--dataset.samples", "5000",
)  # fmt: skip


def make() -> nn.Module:
    return resnet20(num_classes=10)


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    done = Commands(server, folder).run("train", "cifar10-resnet20", *SHORT, "--data", DATA, "--quiet", "--out", "run")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="module")
def tested(run: Path) -> tuple[list[tuple[torch.Tensor, np.ndarray]], np.ndarray]:
    """Batches of the whole test set, and the logits of the sparse half in PyTorch."""
    splits = Cifar10().load(Path(DATA), batch_size=64, eval_batch_size=500, seed=0, device=torch.device("cpu"))
    batches = [(images, labels.numpy()) for images, labels in splits.test.epoch(0)]
    return batches, all_logits(logits_of(Pair(run / "pair").sparse(make())), batches)


def all_logits(predict: Predict, batches: list[tuple[torch.Tensor, np.ndarray]]) -> np.ndarray:
    return np.concatenate([predict(images) for images, _ in batches])


@pytest.mark.parametrize(("to", "name", "load"), ENGINES)
def test_every_engine_predicts_what_pytorch_does_on_the_whole_test_set(
    cli: Commands, run: Path, tested: tuple[list[tuple[torch.Tensor, np.ndarray]], np.ndarray], to: str, name: str,
    load: Callable[[Path, Callable[[], nn.Module]], Predict],
) -> None:  # fmt: skip
    assert cli.run("export", run, "--to", to, "--out", name).code == 0
    batches, logits = tested
    found = all_logits(load(cli.folder / name, make), batches)
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    sure = np.diff(np.sort(logits, 1)[:, -2:], axis=1)[:, 0] > 2e-5 * np.abs(logits).max()
    np.testing.assert_array_equal(found.argmax(1)[sure], logits.argmax(1)[sure])
    assert sure.mean() > 0.999  # the others are ties


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
    accuracies = [100 * (predicted.argmax(1) == labels).mean() for predicted in (logits, found)]
    assert accuracies[0] > 25
    assert abs(accuracies[0] - accuracies[1]) <= points
