"""A run with a quantization-aware end: its halves, its resume, its averages, and what it says of int8 values."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trials import STEPS, acdc, digits, make_run, network, settings, without

from sparsetwin import Int8, load_sparse, save_sparse
from sparsetwin.checkpoint import Pair
from sparsetwin.methods import Method
from sparsetwin.training import LearningRateSettings, Run, evaluate

FOUR = ((STEPS, 0.0), (STEPS, 0.9), (STEPS, 0.0), (2 * STEPS, 0.9))
GIVEN: dict[str, Any] = {"epochs": 5, "dense_finetune": True, "checkpoint_epochs": 0.5,
                         "learning_rate": LearningRateSettings()}  # fmt: skip
FIRST = 3 * STEPS


def method(*, quantized: bool = True) -> Method:
    return replace(acdc(*FOUR), quantization=Int8() if quantized else None)


def told(run: Run, event: str) -> list[Any]:
    return [line for line in map(json.loads, run.folder.metrics.read_text().splitlines()) if line["event"] == event]


def through_an_int8_file(pair: Pair, name: str, folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    saved = pair.network(name)
    save_sparse(folder / "int8", saved.tensors, saved.masks, card=saved.card, values="int8")
    return load_sparse(folder / "int8").tensors, (folder / "int8").stat().st_size


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("quantized") / "run", method(), settings(**GIVEN))
    assert run.execute()
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("plain") / "run", method(quantized=False), settings(**GIVEN))
    assert run.execute()
    return run


@pytest.mark.parametrize("name", ["sparse", "sparse-best"])
def test_sparse_members_come_back_from_an_int8_file_with_the_same_bits(trained: Run, tmp_path: Path, name: str) -> None:
    found, _ = through_an_int8_file(trained.pair, name, tmp_path)
    expected = trained.pair.network(name).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_the_best_sparse_member_is_one_of_quantized_weights(trained: Run) -> None:
    assert trained.pair.members["sparse-best"].step > FIRST


@pytest.mark.parametrize("name", ["dense", "dense-raw", "dense-best"])
def test_the_dense_half_is_that_of_a_run_without_it(trained: Run, plain: Run, name: str) -> None:
    file = f"{name}.safetensors"
    assert (trained.folder.pair / file).read_bytes() == (plain.folder.pair / file).read_bytes()


def test_all_is_equal_until_it_begins(trained: Run, plain: Run) -> None:
    found, expected = (run.folder.metrics.read_text().splitlines() for run in (trained, plain))
    differing = [index for index, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert json.loads(found[0]).pop("int8_step") == FIRST
    steps = [json.loads(found[index]).get("step", FIRST + 1) for index in differing if index]
    assert steps
    assert min(steps) > FIRST


def test_flops_are_counted_as_without_it(trained: Run, plain: Run) -> None:
    """Only weights that round to zero are zeros more than before; here there are few, at the last boundary."""
    pairs = zip(told(trained, "epoch"), told(plain, "epoch"), strict=True)
    for ours, theirs in pairs:
        assert ours["training_flops"] == pytest.approx(theirs["training_flops"], rel=0.005)
        if ours["step"] <= FIRST:
            assert ours["training_flops"] == theirs["training_flops"]


def test_the_last_line_tells_what_an_int8_file_is_worth(trained: Run, plain: Run, tmp_path: Path) -> None:
    for run in (trained, plain):
        members = told(run, "final")[0]["members"]
        assert [name for name, member in members.items() if "int8" in member] == ["sparse"]
        tensors, size = through_an_int8_file(run.pair, "sparse", tmp_path)
        model = network(batch_norm=True)
        model.load_state_dict(tensors)
        expected = {"file_bytes": size, "test": evaluate(model, digits().test.epoch(0)).plain()}
        assert members["sparse"]["int8"] == run.pair.members["sparse"].metrics["int8"] == expected
        assert size < members["sparse"]["file_bytes"]
    sparse = told(trained, "final")[0]["members"]["sparse"]
    assert sparse["int8"]["test"] == sparse["test"]
    unprepared = told(plain, "final")[0]["members"]["sparse"]
    assert unprepared["int8"]["test"]["loss"] != unprepared["test"]["loss"]


@dataclass
class Watched:
    """Batches that do something when a certain one is trained on."""

    batches: Any
    last: int
    then: Callable[[], None] = lambda: None

    @property
    def samples(self) -> int:
        samples: int = self.batches.samples
        return samples

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(self.batches.epoch(epoch, start=start), start=epoch * len(self) + start):
            if number == self.last:
                self.then()
            yield batch


@pytest.mark.parametrize("stop_at", [FIRST - 1, FIRST, FIRST + 1, FIRST + 27])
def test_a_run_that_was_stopped_around_its_begin_goes_on_with_the_same_bits(
    trained: Run, tmp_path: Path, stop_at: int
) -> None:
    data = digits()
    watched = Watched(data.train, last=stop_at - 1)
    parts = without(data, train=watched)
    run = make_run(tmp_path / "run", method(), settings(**GIVEN), splits=parts)
    watched.then = run.request_stop
    assert not run.execute()
    assert run.store.steps[-1] == stop_at
    assert Run(run.folder, replace(run.parts, splits=data)).execute()
    for path in trained.folder.pair.iterdir():
        assert (run.folder.pair / path.name).read_bytes() == path.read_bytes()
    assert run.folder.metrics.read_bytes() == trained.folder.metrics.read_bytes()


def test_an_average_is_saved_rounded_and_goes_on_in_full_precision(tmp_path: Path) -> None:
    given = settings(epochs=5, ema_decay=0.9)
    run = make_run(tmp_path / "run", method(), given)
    assert run.execute()
    found, _ = through_an_int8_file(run.pair, "sparse", tmp_path)
    saved = run.pair.network("sparse").tensors
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
    checkpoint = torch.load(run.store.folder / f"step-{5 * STEPS:09d}.pt", weights_only=True)
    averages = checkpoint["state"]["state"]["session"]["average"]
    for name in run.pair.masks("sparse"):
        largest = averages[name].reshape(len(averages[name]), -1).abs().amax(1)
        error = (averages[name] - saved[name]).reshape(len(largest), -1).abs().amax(1)
        assert not torch.equal(averages[name], saved[name])
        assert bool((error <= largest / 127 * 0.501).all())
