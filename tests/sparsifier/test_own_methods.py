"""The rules that a method of one's own may give, beyond `enter`."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from small_runs import TARGETS, Run, assert_pruned_are_exact_zeros, assert_same_bits, bits, network, read, sgd
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ConfigError, SelectionError
from sparsetwin.methods import Method, SparseState
from sparsetwin.schedules import Phase

SCHEDULE = st.schedules.phases([(2, 0.0), (2, 0.5), (2, 0.0), (2, 0.5)])


def largest_half(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.abs() >= tensor.abs().median() for name, tensor in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class LargestGradients(Method):
    """Keep the weights with the largest gradients, which exist between backward and update only."""

    def needs_gradients(self, phase: Phase) -> bool:
        return True

    def enter(self, phase: Phase, state: SparseState) -> dict[str, torch.Tensor]:
        return largest_half(state.gradients) if phase.is_sparse else {}


@pytest.mark.parametrize("masks_early", [False, True])
def test_a_method_that_needs_gradients_enters_between_backward_and_update(masks_early):
    run = Run.new(LargestGradients(schedule=SCHEDULE))
    for step in range(8):
        run.sparsifier.begin_step()
        ended = run.phase
        assert ended == (SCHEDULE.at(step - 1) if step else None)  # the old phase holds in the forward pass
        assert not run.sparsifier.phase_ends
        run.backward()
        expected = largest_half({name: weight.grad.clone() for name, weight in run.weights.items()})
        if masks_early:  # before clipping by norm: selection sees gradients as they are
            run.sparsifier.mask_gradients()
            assert run.phase == SCHEDULE.at(step)
            for name, mask in run.sparsifier.masks.items():
                assert not run.weights[name].grad[~mask].any()
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        assert run.phase == SCHEDULE.at(step)
        assert run.sparsifier.phase_ends == ((step + 1) % 2 == 0)
        if step in (2, 6):
            assert all(torch.equal(mask, expected[name]) for name, mask in run.sparsifier.masks.items())
        assert bool(run.sparsifier.masks) == run.phase.is_sparse
        assert_pruned_are_exact_zeros(run)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_a_method_that_needs_gradients_never_enters_on_gradients_that_overflowed(fused, clips):
    run = Run.new(
        LargestGradients(schedule=SCHEDULE),
        make_optimizers=lambda model: torch.optim.AdamW(model.parameters(), fused=fused),
    ).train(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for overflows in (True, True, False):
        scaler.scale(torch.tensor(1.0))  # a scaler starts with what it scales; at 1 the gradients are as they are
        run.backward()
        if overflows:
            run.weights["4.weight"].grad[0] = float("inf")
        if clips:
            scaler.unscale_(run.optimizers[0])
            run.sparsifier.mask_gradients()
        scaler.step(run.optimizers[0])
        scaler.update()
        run.optimizers[0].zero_grad()
        assert run.phase.index == (0 if overflows else 1)
        assert run.sparsifier.steps == (2 if overflows else 3)


@pytest.mark.parametrize("steps", range(9))
def test_a_method_that_needs_gradients_resumes_with_the_same_bits(steps):
    def new(seed):
        return Run.new(LargestGradients(schedule=SCHEDULE), seed=seed)

    run = new(0).train(steps)
    resumed = new(7).load(run.saved())
    assert_same_bits(bits(resumed.train(8 - steps)), bits(run.train(8 - steps)))


@dataclass(frozen=True, kw_only=True)
class Remembering(Method):
    """Sum gradients up, shrink weights after each update, prune at random."""

    @property
    def draws(self) -> bool:
        return True

    def enter(self, phase: Phase, state: SparseState) -> dict[str, torch.Tensor]:
        if not phase.is_sparse:
            return {}
        return {n: torch.rand(w.shape, generator=state.generator) < 0.5 for n, w in state.weights.items()}

    def before_update(self, state: SparseState) -> None:
        sums = state.buffers.setdefault("sums", {n: torch.zeros_like(w) for n, w in state.weights.items()})
        for name, gradient in state.gradients.items():
            sums[name] += gradient

    def after_update(self, state: SparseState) -> None:
        for weight in state.weights.values():
            weight.add_(0.001)  # pruned ones too: masking comes later

    def project(self, name: str, state: SparseState) -> torch.Tensor:
        return torch.where(state.masks[name], state.weights[name].clamp(-0.25, 0.25), 0)


def two_optimizers(model):
    return [sgd(model[:5]), sgd(model[5:])]


@pytest.mark.parametrize("make_optimizers", [sgd, two_optimizers])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 7])
def test_buffers_and_random_numbers_resume_with_the_same_bits(make_optimizers, steps):
    def new(seed):
        return Run.new(Remembering(schedule=SCHEDULE), make_optimizers=make_optimizers, seed=seed)

    run = new(0).train(steps)
    state = read(run.saved())["sparsifier"]
    assert isinstance(state["rng"], torch.Tensor)
    assert state["buffers"].keys() == ({"sums"} if steps else set())
    resumed = new(7).load(run.saved())
    rest = 8 - steps
    assert_same_bits(bits(resumed.train(rest)), bits(run.train(rest)))
    for name, total in run.sparsifier.state_dict()["buffers"]["sums"].items():
        assert torch.equal(resumed.sparsifier.state_dict()["buffers"]["sums"][name], total)


@pytest.mark.parametrize("make_optimizers", [sgd, two_optimizers])
def test_rules_around_the_update_run_once_a_step_and_masking_comes_last(make_optimizers):
    run = Run.new(Remembering(schedule=SCHEDULE), make_optimizers=make_optimizers)
    expected = {name: torch.zeros_like(weight) for name, weight in run.weights.items()}
    for _ in range(8):
        run.backward()
        for name, weight in run.weights.items():
            mask = run.sparsifier.masks.get(name, torch.tensor(True))
            expected[name] += torch.where(mask, weight.grad, 0)
        for optimizer in run.optimizers:
            optimizer.step()
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        sums = run.sparsifier.state_dict()["buffers"]["sums"]
        assert all(torch.equal(sums[name], expected[name]) for name in expected)
        assert_pruned_are_exact_zeros(run)
        for weight in run.weights.values() if run.phase.is_sparse else ():
            assert weight.abs().max() <= 0.25
            assert weight.abs().max() > 0


def test_the_seed_decides_what_a_method_draws():
    def masks(seed):
        run = Run(network(), [], None)
        sparsifier = st.Sparsifier(Remembering(schedule=SCHEDULE), run.model, sgd(run.model), seed=seed)
        sparsifier.prepare_load(2)
        sparsifier.begin_step()
        return sparsifier.masks["4.weight"]

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))


@dataclass(frozen=True, kw_only=True)
class Wrong(Method):
    """Return masks that no method must return."""

    how: str

    def enter(self, phase: Phase, state: SparseState) -> dict[str, torch.Tensor]:
        masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in state.weights.items()}
        if self.how == "dense" or phase.is_sparse:
            return {
                "dense": masks,
                "some": {TARGETS[0]: masks[TARGETS[0]]},
                "shape": masks | {TARGETS[0]: torch.ones(2, dtype=torch.bool)},
                "dtype": {name: mask.float() for name, mask in masks.items()},
            }[self.how]
        return {}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dense", "returned masks for a dense phase"),
        ("some", r"returned masks for 1 of 3 targets \(see 4\.weight\)"),
        ("shape", r"a mask for 0\.weight of torch\.bool and shape \(2,\); expected torch\.bool and \(3, 1, 3, 3\)"),
        ("dtype", r"a mask for 0\.weight of torch\.float32"),
    ],
)
def test_masks_that_do_not_fit_are_refused(how, message):
    run = Run.new(Wrong(schedule=SCHEDULE, how=how))
    with pytest.raises(SelectionError, match=message):
        run.train(3)
    assert run.sparsifier.masks == {}


@dataclass(frozen=True, kw_only=True)
class Configured(Method):
    """Hold a value of any type."""

    value: object

    def enter(self, phase: Phase, state: SparseState) -> dict[str, torch.Tensor]:
        return {}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (1, 1),
        (True, True),
        (None, None),
        ("text", "text"),
        ((1, (2.5, "x")), [1, [2.5, "x"]]),
        ({"layer1.*": 0.5}, {"layer1.*": 0.5}),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (st.Uniform(), {"type": "Uniform"}),
    ],
)
def test_a_method_is_described_as_plain_data(value, plain):
    config = Configured(schedule=SCHEDULE, value=value).config()
    assert config == {
        "name": "Configured",
        "schedule": [[0, 2, 0.0], [2, 4, 0.5], [4, 6, 0.0], [6, 8, 0.5]],
        "value": plain,
    }
    assert type(config["value"]) is type(plain)
    read(Run.new(Configured(schedule=SCHEDULE, value=value)).saved())


def test_a_value_that_cannot_be_saved_is_refused_at_construction():
    model = network()
    with pytest.raises(ConfigError, match="value holds a Linear, which cannot be saved"):
        st.Sparsifier(Configured(schedule=SCHEDULE, value=nn.Linear(1, 1)), model, sgd(model))
