"""What a run depends on besides its settings."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trials import digits, network

from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.training import Score, choose_device, evaluate, make_deterministic, seed_everything
from sparsetwin.training.environment import generator_state, git_commit, machine, restore_generators, versions

CPU = torch.device("cpu")


def draws() -> tuple[float, float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), float(np.random.randn()), random.random()


def test_one_seed_gives_one_course_of_every_generator() -> None:
    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert draws() != first


def test_every_generator_goes_on_from_its_saved_state(tmp_path: Path) -> None:
    seed_everything(3)
    draws()
    torch.save(generator_state(CPU), tmp_path / "state.pt")
    expected = [draws() for _ in range(3)]
    seed_everything(9)
    restore_generators(torch.load(tmp_path / "state.pt", weights_only=True), CPU)
    assert [draws() for _ in range(3)] == expected


def test_deterministic_algorithms_are_switched_on_and_off() -> None:
    for on in (True, False):
        make_deterministic(deterministic=on)
        assert torch.are_deterministic_algorithms_enabled() == on
        assert torch.backends.cudnn.benchmark != on


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "tpu"])
def test_a_device_that_is_not_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' cannot be used here"):
        choose_device(name)


def test_auto_is_a_device_of_this_machine() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_run_is_described_without_names_of_machines_or_users() -> None:
    assert versions().keys() == {"python", "sparsetwin", "torch"}
    assert machine(CPU).keys() <= {"cpus", "instructions", "platform", "cpu"}
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


class TestEvaluate:
    """Scores over a split."""

    def test_they_are_means_over_samples_and_not_over_batches(self) -> None:
        model = network(batch_norm=True)
        batches = list(digits().holdout.epoch(0))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        uneven = [(inputs[:100], labels[:100]), (inputs[100:], labels[100:])]
        whole, cut = evaluate(model, [(inputs, labels)]), evaluate(model, uneven)
        assert whole.accuracy == cut.accuracy
        assert whole.loss == pytest.approx(cut.loss, rel=1e-6)

    def test_the_model_is_in_evaluation_mode_and_back_afterwards(self) -> None:
        model = nn.Sequential(network(batch_norm=True), nn.Dropout(0.5))
        model[0][1].eval()  # type: ignore[index]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first, second = (evaluate(model, digits().holdout.epoch(0)) for _ in range(2))
        assert first == second
        assert model.training
        assert not model[0][1].training  # type: ignore[index]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_nothing_to_evaluate_on_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="no batches"):
            evaluate(network(), [])

    def test_a_loss_that_is_not_finite_is_written_as_none_and_is_the_worst(self) -> None:
        nan = Score(float("nan"), 0.5)
        assert nan.plain() == {"accuracy": 0.5, "loss": None}
        assert Score(9.0, 0.5).is_better_than(nan)
        assert not nan.is_better_than(Score(9.0, 0.5))
        assert Score(1.0, 0.6).is_better_than(Score(0.5, 0.5))
        assert Score(0.4, 0.5).is_better_than(Score(0.5, 0.5))
        assert not Score(0.5, 0.5).is_better_than(Score(0.5, 0.5))
