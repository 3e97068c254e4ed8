"""What AC/DC does where phases meet (the paper's algorithm, and its published code)."""

import pytest
import torch
from torch import Tensor, nn

import sparsetwin as st

SCHEDULE = st.schedules.phases([(2, 0.0), (3, 0.8), (2, 0.0), (3, 0.8), (1, 0.0)])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 10))


def make(kind=torch.optim.SGD, *, schedule=SCHEDULE, **fields):
    options = {torch.optim.SGD: {"lr": 0.1, "momentum": 0.9}}.get(kind, {"lr": 0.01})
    model = network()
    optimizer = kind(model.parameters(), **options)
    return model, optimizer, st.Sparsifier(st.ACDC(schedule=schedule, **fields), model, optimizer)


def train(model, optimizer, sparsifier, steps: int) -> None:
    for _ in range(steps):
        sparsifier.begin_step()
        backward(model, sparsifier.steps)
        optimizer.step()
        optimizer.zero_grad()


def backward(model, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    inputs, labels = torch.randn(16, 16, generator=generator), torch.randint(10, (16,), generator=generator)
    nn.functional.cross_entropy(model(inputs), labels).backward()


def weights_of(sparsifier) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in sparsifier.weights.items()}


def state_of(model, optimizer) -> dict[str, dict[str, object]]:
    return {
        name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
    }


def test_the_mask_is_fixed_within_a_phase_and_chosen_from_scratch_at_the_next():
    run = make()
    sparsifier, seen = run[2], {}
    for _ in range(SCHEDULE.total_steps):
        train(*run, steps=1)
        index = sparsifier.phase.index
        masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
        assert all(torch.equal(mask, seen.setdefault(index, masks)[name]) for name, mask in masks.items())
    assert any(not torch.equal(mask, seen[3][name]) for name, mask in seen[1].items())
    assert seen[1]["0.weight"].sum() != seen[3]["0.weight"].sum()  # layers trade weights, too


def test_the_choice_depends_on_the_weights_alone_not_on_earlier_masks():
    run = make()
    train(*run, steps=7)
    run[2].begin_step()
    fresh_model, _, fresh = make(schedule=st.schedules.phases([(3, 0.8)]))
    train(*(again := make()), steps=7)
    fresh_model.load_state_dict(again[0].state_dict())
    fresh.begin_step()
    assert all(torch.equal(mask, fresh.masks[name]) for name, mask in run[2].masks.items())


def test_pruning_is_one_shot_and_kept_weights_keep_their_values():
    run = make()
    train(*run, steps=2)
    before = weights_of(run[2])
    run[2].begin_step()
    for name, mask in run[2].masks.items():
        assert torch.equal(run[2].weights[name], torch.where(mask, before[name], 0.0))
    kept = torch.cat([before[name][mask].abs() for name, mask in run[2].masks.items()])
    pruned = torch.cat([before[name][~mask].abs() for name, mask in run[2].masks.items()])
    assert kept.min() >= pruned.max()
    assert run[2].sparsity() == pytest.approx(0.8, abs=0.5 / 520)


def test_optimizer_state_is_untouched_at_pruning():
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        run = make(kind)
        train(*run, steps=2)
        before = state_of(*run[:2])
        run[2].begin_step()
        assert run[2].phase.is_sparse
        after = state_of(*run[:2])
        for name, state in before.items():
            assert state.keys() == after[name].keys()
            assert all(torch.equal(value, after[name][key]) for key, value in state.items())


def test_weights_come_back_as_zeros_and_kept_ones_go_on_from_their_values():
    run = make()
    train(*run, steps=5)
    masks, before = dict(run[2].masks), weights_of(run[2])
    run[2].begin_step()
    assert run[2].masks == {}
    for name, weight in run[2].weights.items():
        assert torch.equal(weight, before[name])
        assert not weight[~masks[name]].any()


def test_weights_that_came_back_are_non_zero_after_one_step_where_their_gradient_is():
    model, optimizer, sparsifier = run = make()
    train(*run, steps=5)
    masks = dict(sparsifier.masks)
    sparsifier.begin_step()
    backward(model, 5)
    with torch.no_grad():
        sparsifier.weights["0.weight"].grad[0] = 0.0  # a dead output
    gradients = {name: weight.grad.clone() for name, weight in sparsifier.weights.items()}
    optimizer.step()
    for name, weight in sparsifier.weights.items():
        assert torch.equal(weight[~masks[name]] != 0, gradients[name][~masks[name]] != 0)
        assert int((weight[~masks[name]] != 0).sum()) > 10


@pytest.mark.parametrize("reset", ["all", "targets", "none"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_momentum_is_zero_at_the_first_dense_step_whatever_the_gradients_are(reset, set_to_none):
    """The published code skips parameters whose gradient is None, that is all of them since PyTorch 2.0."""
    model, optimizer, sparsifier = run = make(reset=reset)
    train(*run, steps=4)
    sparsifier.begin_step()
    backward(model, 4)
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((parameter.grad is None) == set_to_none for parameter in model.parameters())
    before = state_of(model, optimizer)
    sparsifier.begin_step()
    for name, state in state_of(model, optimizer).items():
        is_reset = reset == "all" or (reset == "targets" and name in sparsifier.target_names)
        expected = torch.zeros_like(before[name]["momentum_buffer"]) if is_reset else before[name]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], expected)
        assert before[name]["momentum_buffer"].any()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_the_first_dense_update_is_that_of_a_new_optimizer(kind):
    model, optimizer, sparsifier = run = make(kind)
    train(*run, steps=5)
    twin = network()
    twin.load_state_dict(model.state_dict())
    new = kind(twin.parameters(), lr=0.01)
    sparsifier.begin_step()
    for network_, step in ((model, optimizer), (twin, new)):
        backward(network_, 5)
        step.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_two_sparse_phases_in_a_row_choose_anew_and_reset_nothing():
    run = make(schedule=st.schedules.phases([(2, 0.8), (2, 0.5), (2, 0.9)]))
    for sparsity in (0.8, 0.5, 0.9):
        before = state_of(*run[:2]) if run[2].steps else None
        run[2].begin_step()
        if before:
            after = state_of(*run[:2])
            assert all(torch.equal(before[n]["momentum_buffer"], after[n]["momentum_buffer"]) for n in before)
        assert run[2].sparsity() == pytest.approx(sparsity, abs=0.5 / 520)
        train(*run, steps=2)


def test_two_dense_phases_in_a_row_reset_nothing():
    run = make(schedule=st.schedules.phases([(2, 0.0), (2, 0.0), (2, 0.8)]))
    train(*run, steps=2)
    before = state_of(*run[:2])
    run[2].begin_step()
    assert run[2].phase.index == 1
    after = state_of(*run[:2])
    assert all(torch.equal(before[n]["momentum_buffer"], after[n]["momentum_buffer"]) for n in before)


def test_biases_and_batch_norm_are_never_pruned():
    run = make()
    train(*run, steps=4)
    assert run[2].target_names == ("0.weight", "3.weight")
    for name, parameter in run[0].named_parameters():
        assert name in run[2].masks or bool(parameter.all())


def test_a_floor_of_kept_weights_comes_out_of_the_global_budget():
    def kept(minimum):
        model, _, sparsifier = make(schedule=st.schedules.phases([(1, 0.9)]), minimum_kept=minimum)
        with torch.no_grad():
            model[3].weight.mul_(1e-3)
        with pytest.warns(st.errors.SparsityWarning, match=r"3\.weight"):
            sparsifier.begin_step()
        return {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}

    assert kept(1) == {"0.weight": 51, "3.weight": 1}
    assert kept(5) == {"0.weight": 47, "3.weight": 5}


def test_uniform_keeps_the_same_fraction_in_every_layer():
    run = make(distribution=st.Uniform())
    train(*run, steps=3)
    assert {name: int(mask.sum()) for name, mask in run[2].masks.items()} == {"0.weight": 64, "3.weight": 40}
