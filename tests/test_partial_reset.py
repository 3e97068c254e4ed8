"""Optimizer state of single weights that come back, and of everything but step counts."""

import dataclasses

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.errors import UsageError
from sparsetwin.optimizer_state import restore_initial_state_, restore_where_

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}
KEPT_ANYWAY = {"square_avg", "grad_avg", "sum"}  # of optimizers without bias correction
WHERE = torch.tensor([[True, False, False], [False, True, False]])
STAYED = torch.tensor([[False, True, False], [False, False, True]])  # the others are pruned still


def trained(name: str) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 3))
    optimizer = OPTIMIZERS[name]([weight])
    for _ in range(4):
        weight.grad = torch.randn(2, 3)
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_state_of_returning_weights_goes_back_and_tensors_stay_the_same_objects(name):
    weight, optimizer = trained(name)
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    objects = {key: id(value) for key, value in optimizer.state[weight].items()}
    restore_where_(optimizer, {weight: WHERE})
    after = optimizer.state[weight]
    assert {key: id(value) for key, value in after.items()} == objects
    for key, value in before.items():
        if value.shape != WHERE.shape:
            assert torch.equal(after[key], value), key  # step counts
            continue
        assert torch.equal(after[key][~WHERE], value[~WHERE]), key
        if name in ("rmsprop", "adagrad", "adadelta") and key in KEPT_ANYWAY and name != "adadelta":
            assert torch.equal(after[key], value), key
        else:
            initial = 0.1 if key == "step_size" else 0.0
            assert torch.equal(after[key][WHERE], torch.full((2,), initial)), key


@pytest.mark.parametrize(
    ("name", "key"), [("adam", "exp_avg_sq"), ("adamax", "exp_inf"), ("rmsprop", "square_avg"), ("adagrad", "sum")]
)
def test_second_moments_of_returning_weights_can_begin_with_the_mean_of_the_others(name, key):
    weight, optimizer = trained(name)
    before = optimizer.state[weight][key].clone()
    restore_where_(optimizer, {weight: WHERE}, like={weight: STAYED})
    after = optimizer.state[weight][key]
    assert torch.equal(after[~WHERE], before[~WHERE])
    torch.testing.assert_close(after[WHERE], before[STAYED].mean().expand(2))


def test_a_mean_makes_the_first_update_of_a_returning_weight_one_of_usual_size():
    sizes = {}
    for mean in (False, True):
        weight, optimizer = trained("rmsprop")
        optimizer.state[weight]["square_avg"][WHERE] = (
            0.0  # as after a long sparse phase, in which gradients are masked
        )
        restore_where_(optimizer, {weight: WHERE}, like={weight: ~WHERE} if mean else None)
        before = weight.detach().clone()
        weight.grad = torch.ones(2, 3)
        optimizer.step()
        sizes[mean] = (weight.detach() - before)[WHERE].abs().max().item()
    assert sizes[True] < 0.6 * sizes[False]


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "sgd"])
def test_moments_can_go_back_while_step_counts_stay(name):
    weight, optimizer = trained(name)
    counts = {k: v.clone() for k, v in optimizer.state[weight].items() if k in ("step", "mu_product")}
    objects = {key: id(value) for key, value in optimizer.state[weight].items()}
    restore_initial_state_(optimizer, [weight], keep_steps=True)
    state = optimizer.state[weight]
    assert {key: id(value) for key, value in state.items()} == objects
    assert all(torch.equal(state[key], value) for key, value in counts.items())
    assert all(not value.any() for key, value in state.items() if key not in counts)


def test_an_optimizer_without_a_rule_is_refused():
    class Unknown(torch.optim.Optimizer): ...

    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match=r"Unknown cannot forget single weights. Say how it begins with register_init"):
        restore_where_(Unknown([weight], {}), {weight: torch.tensor([True, False])})


@pytest.mark.parametrize("reset", ["returned", "returned-mean"])
def test_adafactor_has_no_state_of_single_weights_and_is_refused_at_once(reset):
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.Adafactor(model.parameters())
    method = st.ACDC(schedule=st.schedules.phases([(2, 0.0), (2, 0.5), (2, 0.0)]), reset=reset)
    with pytest.raises(UsageError, match=rf"reset='{reset}' would do nothing with Adafactor.*reset='targets'"):
        st.Sparsifier(method, model, optimizer)
    assert optimizer._optimizer_step_pre_hooks == {}
    st.Sparsifier(dataclasses.replace(method, reset="targets"), model, optimizer)


def test_adafactor_is_served_where_no_weight_comes_back():
    model = nn.Sequential(nn.Linear(4, 4))
    method = st.ACDC(schedule=st.schedules.phases([(2, 0.0), (2, 0.5)]), reset="returned")
    sparsifier = st.Sparsifier(method, model, torch.optim.Adafactor(model.parameters()))
    assert sparsifier.phase is None


def test_methods_that_grow_weights_train_by_adafactor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    method = st.SET(schedule=st.schedules.periodic(sparsity=0.5, total_steps=6, every_steps=2))
    sparsifier = st.Sparsifier(method, model, optimizer)
    for _ in range(6):
        sparsifier.begin_step()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.sparsity() == 0.5
