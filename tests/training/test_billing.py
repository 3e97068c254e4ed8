"""The ledger where weights change from step to step, against counts taken at every pass of the network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import BATCH, STEPS, Numbers, make_method, make_run
from torch import Tensor, nn

from sparsetwin.distributions import Global
from sparsetwin.errors import UsageError
from sparsetwin.methods import Method
from sparsetwin.schedules import phases
from sparsetwin.training import LearningRateSettings, Run

FLAT = LearningRateSettings(shape="constant")
DENSE = 2 * (2 * 4 * 16 + 32 * 4)  # of a forward pass: two tokens through the first layer, one through the second
TRAINED = phases([(STEPS * 2, 0.75)])

METHODS: dict[str, Callable[[], Method]] = {
    "str": lambda: make_method("str", TRAINED, initial=-3.0, threshold_decay=0.5, distribution=Global()),
    "topkast": lambda: make_method("topkast", TRAINED, backward_sparsity=0.5, distribution=Global()),
    "st3": lambda: make_method("st3", TRAINED, distribution=Global()),
    "cram": lambda: make_method(
        "cram", phases([(6, 0.0), (2, 0.75)]), sparsities=(0.3, 0.6, 0.9), rho=0.5, distribution=Global()
    ),
    "cram with all gradients": lambda: make_method(
        "cram", phases([(7, 0.0), (1, 0.75)]), sparsities=(0.3, 0.9), sparse_gradients=False, distribution=Global()
    ),
}


class Tokens(nn.Module):
    """Two tokens of four numbers, so that a weight of the first layer costs twice what one of the second does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16, bias=False)
        self.second = nn.Linear(32, 4, bias=False)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.second(self.first(numbers.view(-1, 2, 4)).tanh().flatten(1))

    def flops(self) -> int:
        return 4 * int(self.first.weight.count_nonzero()) + 2 * int(self.second.weight.count_nonzero())


class Watched:
    """A run, and what a forward pass of each of its training passes costs by the weights that it found."""

    def __init__(self, folder: Path, name: str, *, stop: int | None = None, **train: object) -> None:
        self.kept: list[int] = []
        self.updated: list[int] = []
        data = Numbers()
        self.run: Run = make_run(
            folder, METHODS[name](), data=data, model=self._model, learning_rate=FLAT,
            **{"checkpoint_epochs": 100.0, **train},
        )  # fmt: skip
        if stop is not None:
            data.watch = lambda number: self.run.request_stop() if number == stop - 1 else None

    def _model(self) -> nn.Module:
        torch.manual_seed(0)
        model = Tokens()
        nn.init.normal_(model.second.weight, std=0.3)  # as large as the first layer's, so that a cut keeps some of each
        model.register_forward_pre_hook(self._look)
        return model

    def _look(self, model: nn.Module, _: object) -> None:
        if model.training and self.run._stage is not None:
            assert isinstance(model, Tokens)
            self.kept.append(model.flops())
            masks = self.run._stage.session.sparsifier.gradient_masks
            costs = {"first.weight": 4, "second.weight": 2}
            self.updated.append(sum(costs[name] * int(mask.sum()) for name, mask in masks.items()))

    def spent(self) -> float:
        assert self.run.execute()
        return self.run.folder.last_event()["training_flops"] / BATCH  # type: ignore[no-any-return]


def by_hand(name: str, watched: Watched) -> int:
    kept, updated = watched.kept, watched.updated
    if name == "str":
        return 3 * sum(kept)
    if name == "topkast":
        return 2 * sum(kept) + sum(updated)
    if name == "st3":
        return 2 * sum(kept) + len(kept) * DENSE
    if name == "cram":
        return 3 * sum(kept)
    seconds = kept[1:14:2]
    return 7 * 3 * DENSE + 2 * sum(seconds) + 7 * DENSE + 3 * kept[14]


@pytest.mark.parametrize("name", METHODS)
def test_every_pass_is_paid_for_by_the_weights_that_it_computes_with(name, tmp_path):
    watched = Watched(tmp_path / "run", name)
    spent = watched.spent()
    assert len(watched.kept) == {"cram": 6 * 2 + 2, "cram with all gradients": 7 * 2 + 1}.get(name, 8)
    assert len(set(watched.kept[:STEPS])) > 1  # within the first epoch, at whose end weights were counted before
    assert spent == by_hand(name, watched)


def test_thresholds_prune_within_an_epoch(tmp_path):
    watched = Watched(tmp_path / "run", "str")
    watched.spent()
    assert watched.kept[0] > watched.kept[STEPS - 1] > watched.kept[-1]


def test_a_global_cut_leaves_other_costs_than_an_equal_one_in_each_layer(tmp_path):
    watched = Watched(tmp_path / "run", "cram")
    watched.spent()
    assert all(first == DENSE for first in watched.kept[0:12:2])
    densities = {cost / DENSE for cost in watched.kept[1:12:2]}
    assert len(densities) > 2
    assert not densities & {0.7, 0.4, 0.1}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_that_was_stopped_within_an_epoch_has_the_same_ledger(name, stop, tmp_path):
    whole = Watched(tmp_path / "whole", name).spent()
    assert not Watched(tmp_path / "run", name, stop=stop).run.execute()
    assert Watched(tmp_path / "run", name).spent() == whole


def test_a_checkpoint_from_before_passes_were_counted_goes_on(tmp_path):
    """Its steps since the last boundary are paid for as they were then: by the weights at the next one."""
    whole = Watched(tmp_path / "whole", "str")
    whole.spent()
    first = Watched(tmp_path / "run", "str", stop=2)
    assert not first.run.execute()
    step, state = first.run.store.latest()  # type: ignore[misc]
    stage = dict(state["state"])
    assert stage.pop("tally")["samples"] == 2 * BATCH
    first.run.store.save({**state, "state": {**stage, "segment_samples": 2 * BATCH}}, step=step)
    spent = Watched(tmp_path / "run", "str").spent()
    assert spent == 3 * (2 * whole.kept[STEPS] + sum(whole.kept[2:]))


class LastIsSmall(Numbers):
    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        inputs, labels = super().batch(number)
        return (inputs[:3], labels[:3]) if number == STEPS - 1 else (inputs, labels)


@pytest.mark.parametrize(("name", "steps_before"), [("snip", 0), ("woodfisher", STEPS)])
def test_sampled_gradients_of_a_batch_that_is_not_full_are_paid_for_by_its_samples(name, steps_before, tmp_path):
    schedule = phases([(steps_before, 0.0), (STEPS, 0.75)] if steps_before else [(STEPS, 0.75)])
    made = make_method(name, schedule, samples=STEPS)
    run = make_run(tmp_path / "run", made, data=LastIsSmall(), learning_rate=FLAT)
    assert run.execute()
    epoch = (STEPS - 1) * BATCH + 3
    passes_before = epoch * (1 + steps_before // STEPS)  # of the samples, and of the dense phase
    expected = 3 * (passes_before * 384 + epoch * 96)
    assert run.folder.last_event()["training_flops"] == expected


def test_an_update_that_overflows_is_not_paid_for(tmp_path):
    data, seen = Numbers(count=12), []
    data.scales[2], data.watch = 1e30, seen.append
    plain = make_run(tmp_path / "plain", METHODS["cram"](), data=Numbers(count=12), precision="fp16")
    spoilt = make_run(tmp_path / "spoilt", METHODS["cram"](), data=data, precision="fp16")
    costs = []
    for run in (plain, spoilt):
        assert run.execute()
        costs.append(run.folder.last_event()["training_flops"])
    assert seen == list(range(9))  # one more than the steps that count
    assert costs[0] == costs[1]  # six draws in six dense steps that count


class Twice(type(METHODS["cram"]())):  # type: ignore[misc]
    """Says that it passes once."""

    def passes(self, phase, *, enters):
        return super().passes(phase, enters=enters)[:1]


def test_a_method_whose_passes_are_not_those_that_it_names_is_refused(tmp_path):
    run = make_run(tmp_path / "run", Twice(schedule=phases([(4, 0.0), (4, 0.5)])))
    with pytest.raises(UsageError, match=r"Twice passed 2 times over a batch, and its passes\(\) names 1"):
        run.execute()
