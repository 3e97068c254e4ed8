"""STR: worked by hand, its gradients checked, and against a plain loop that autograd differentiates."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.errors import ConfigError
from sparsetwin.methods import Pass, SparseState
from sparsetwin.schedules import Phase

OPTIMIZERS = {"sgd": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01})}
OPTIMIZERS["adamw"] = (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})
FUNCTIONS = {"sigmoid": torch.sigmoid, "exp": torch.exp}
PRUNED = ("0.weight", "4.weight", "6.weight")


def sparse(steps: int) -> st.Schedule:
    return st.schedules.constant(sparsity=0.5, total_steps=steps)


def numbers(sparsifier: st.Sparsifier) -> dict[str, float]:
    return {name: float(value) for name, value in sparsifier.state_dict()["learned"].items()}


def test_one_step_worked_by_hand():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3.0, 0.5, -0.25]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = st.STR(schedule=sparse(1), initial=0.0, threshold="exp", threshold_decay=0.0)
    sparsifier = st.Sparsifier(method, model, optimizer)
    sparsifier.begin_step()
    assert model.weight.tolist() == [[3, -2, 0, 0]]  # the threshold is exp(0) = 1
    model(torch.tensor([2.0, 1.0, 9.0, 9.0])).backward()
    optimizer.step()
    # gradients 2 and 1 of what is kept; of s: -(sign(4) * 2 + sign(-3) * 1) * exp(0) = -1
    assert numbers(sparsifier) == {"weight": 0.5}
    assert sparsifier.state_dict()["buffers"]["stored"]["weight"].tolist() == [[3, -3.5, 0.5, -0.25]]
    cut = float(torch.tensor(0.5).exp())
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[3 - cut, -3.5 + cut, 0, 0]]), rtol=1e-6, atol=0)


class Rule(torch.autograd.Function):
    """What the method computes, and what it gives for gradients, as one function of weight and s."""

    @staticmethod
    def forward(ctx, weight: Tensor, s: Tensor, function: str) -> Tensor:
        phase = Phase(0, 0, 1, 0.5)
        ctx.method = st.STR(schedule=sparse(1), threshold=function)
        ctx.state = SparseState(
            weights={"w": nn.Parameter(weight.clone())}, learned={"w": nn.Parameter(s.clone())}, phase=phase
        )
        ctx.state.masks = ctx.method.enter(phase, ctx.state)
        return ctx.method.project("w", ctx.state)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, s = ctx.state.weights["w"], ctx.state.learned["w"]
        weight.grad = torch.where(ctx.method.gradient_masks(ctx.state)["w"], gradient, 0)
        ctx.method.before_update(ctx.state)
        return weight.grad, s.grad, None


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("s", [-3.0, -1.0, 0.3])
def test_gradients_of_weights_and_threshold_are_those_of_finite_differences(function, s):
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():  # off the kinks
        distance = weight.abs() - FUNCTIONS[function](s)
        weight[distance.abs() < 0.01] += 0.1
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, s: Rule.apply(w, s, function), (weight, s))
    chosen = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((chosen * soft(weight, s, function)).sum(), (weight, s))
    found = torch.autograd.grad((chosen * Rule.apply(weight, s, function)).sum(), (weight, s))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=0)


def soft(weight: Tensor, s: Tensor, function: str) -> Tensor:
    """The published function, for autograd to differentiate."""
    return torch.sign(weight) * torch.relu(torch.abs(weight) - FUNCTIONS[function](s))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, 6, generator=generator).double(), torch.randint(5, (8,), generator=generator)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("function", "decay"), [("sigmoid", None), ("exp", 0.3)])
def test_training_is_that_of_a_plain_loop_with_thresholds_as_parameters(optimizer, function, decay):
    make, settings = OPTIMIZERS[optimizer]
    model, plain = network(), network()
    update = make(model.parameters(), **settings)
    method = st.STR(schedule=sparse(12), initial=-4.0, threshold=function, threshold_decay=decay)
    sparsifier = st.Sparsifier(method, model, update)
    stored = {name: nn.Parameter(value.detach().clone()) for name, value in plain.named_parameters()}
    thresholds = {name: nn.Parameter(torch.tensor(-4.0, dtype=torch.float64)) for name in PRUNED}
    group = {"params": list(thresholds.values()), **({} if decay is None else {"weight_decay": decay})}
    plain_update = make([{"params": list(stored.values())}, group], **settings)

    def effective() -> dict[str, Tensor]:
        return {n: soft(w, thresholds[n], function) if n in thresholds else w for n, w in stored.items()}

    seen = set()
    for step in range(12):
        inputs, labels = batch(step)
        nn.functional.cross_entropy(torch.func.functional_call(plain, effective(), (inputs,)), labels).backward()
        plain_update.step()
        plain_update.zero_grad()
        sparsifier.begin_step()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update.step()
        update.zero_grad()
        for name, weight in effective().items():
            torch.testing.assert_close(dict(model.named_parameters())[name], weight, rtol=1e-10, atol=1e-12)
            assert name not in PRUNED or torch.equal(sparsifier.masks[name], weight != 0)
        for name, s in numbers(sparsifier).items():
            assert math.isclose(s, thresholds[name].item(), rel_tol=1e-10)
        seen.add(sparsifier.sparsity())
    assert len(seen) > 3
    assert 0 < min(seen) < max(seen) < 1


def test_thresholds_rest_in_dense_phases_and_do_not_forget():
    model = network()
    update = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    schedule = st.schedules.phases([(2, 0.0), (2, 0.5), (3, 0.0), (1, 0.5)])
    sparsifier = st.Sparsifier(st.STR(schedule=schedule, initial=-3.0), model, update)
    course = [numbers(sparsifier)]
    for step in range(8):
        sparsifier.begin_step()
        inputs, labels = batch(step)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update.step()
        update.zero_grad(set_to_none=False)  # leaves gradients of zero, with which weight decay would act
        course.append(numbers(sparsifier))
    assert set(course[0].values()) == {-3.0}
    assert [before == after for before, after in pairwise(course)] == [
        True, True, False, False, True, True, True, False,
    ]  # fmt: skip


def test_the_final_cut_keeps_exactly_the_number_asked_for_of_the_effective_weights():
    model = network()
    update = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    schedule = st.schedules.phases([(4, 0.5), (4, 0.9)])
    sparsifier = st.Sparsifier(st.STR(schedule=schedule, initial=-3.0, exact_final=True), model, update)
    total = 72 + 768 + 60
    for step in range(8):
        before = {name: weight.detach().clone() for name, weight in sparsifier.weights.items()}
        learned = numbers(sparsifier)
        sparsifier.begin_step()
        if step == 4:
            largest = torch.cat([weight.abs().flatten() for weight in before.values()]).sort(descending=True).values
            for name, weight in sparsifier.weights.items():
                assert torch.equal(sparsifier.masks[name], before[name].abs() >= largest[90 - 1])
                assert torch.equal(weight.detach(), torch.where(sparsifier.masks[name], before[name], 0))
        inputs, labels = batch(step)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update.step()
        update.zero_grad()
        if step >= 4:
            assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == total - round(0.9 * total) == 90
            assert learned == numbers(sparsifier)
            assert sum(int(weight.count_nonzero()) for weight in sparsifier.weights.values()) == 90
        else:
            assert learned != numbers(sparsifier)


def test_a_cut_below_what_was_learned_brings_weights_next_to_their_threshold_back_at_zero():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -0.5, 0.9, -0.1]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = st.schedules.phases([(1, 0.5), (2, 0.25)])
    method = st.STR(schedule=schedule, initial=0.0, threshold="exp", threshold_decay=0.0, exact_final=True)
    sparsifier = st.Sparsifier(method, model, optimizer)
    for _ in range(2):
        sparsifier.begin_step()
        model(torch.zeros(4)).backward()
        optimizer.step()
    assert sparsifier.masks["weight"].tolist() == [[True, True, True, False]]
    assert model.weight.tolist() == [[3, 0, 0, 0]]
    optimizer.zero_grad()
    sparsifier.begin_step()
    model(torch.ones(4)).backward()
    optimizer.step()
    assert model.weight.tolist() == [[2.5, -0.5, -0.5, 0]]


def test_thresholds_rise_and_the_network_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
    update = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    sparsifier = st.Sparsifier(st.STR(schedule=sparse(150), threshold_decay=2e-2), model, update)
    truth = torch.randn(20, 4)
    losses, sparsities = [], []
    for _ in range(150):
        inputs = torch.randn(64, 20)
        sparsifier.begin_step()
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ truth).argmax(1))
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(loss.item())
        sparsities.append(sparsifier.sparsity())
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert sparsities[0] < 0.2 < 0.5 < sparsities[-1] < 1


SCHEDULERS = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
}


@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_made_before_the_sparsifier_is_refused_and_one_made_after_it_drives_the_thresholds(make_scheduler):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    make_scheduler(optimizer)
    with pytest.raises(ConfigError, match="make the scheduler after the Sparsifier"):
        st.Sparsifier(st.STR(schedule=sparse(9)), model, optimizer)
    assert len(optimizer.param_groups) == 1
    st.Sparsifier(st.ST3(schedule=sparse(9)), model, optimizer)  # learns nothing, and the optimizer is as it was
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = st.Sparsifier(st.STR(schedule=sparse(9)), model, optimizer)
    scheduler = make_scheduler(optimizer)
    rates = set()
    for step in range(9):
        train_a_step(model, optimizer, sparsifier, step=step)
        first, second = scheduler.get_last_lr()
        assert first == second
        rates.add(first)
        if step < 8:
            scheduler.step()
    assert len(rates) > 4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_as_the_last_optimizer_is_refused_and_as_the_first_leaves_the_thresholds_to_the_last():
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5))
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    muon, adamw = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.1)
    method = st.STR(schedule=sparse(3), initial=-3.0)
    with pytest.raises(ConfigError, match="give the Sparsifier one that does, such as AdamW, last"):
        st.Sparsifier(method, model, [adamw, muon])
    assert [len(optimizer.param_groups) for optimizer in (muon, adamw)] == [1, 1]
    sparsifier = st.Sparsifier(method, model, [muon, adamw])
    for _ in range(3):
        sparsifier.begin_step()
        model(torch.randn(8, 20)).square().sum().backward()
        muon.step()
        adamw.step()
        model.zero_grad()
    assert all(abs(s + 3) > 0.05 for s in numbers(sparsifier).values())


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_with_a_scheduler_resumes_with_the_same_bits(steps):
    def begin():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        sparsifier = st.Sparsifier(st.STR(schedule=sparse(9), initial=-3.0), model, optimizer)
        return model, optimizer, sparsifier, SCHEDULERS["LambdaLR"](optimizer)

    def train(parts, start, stop):
        for step in range(start, stop):
            train_a_step(*parts[:3], step=step)
            parts[3].step()

    whole, resumed = begin(), begin()
    train(whole, 0, steps)
    saved = copy.deepcopy([part.state_dict() for part in (whole[0], whole[1], whole[3], whole[2])])
    for part, state in zip((resumed[0], resumed[1], resumed[3], resumed[2]), saved, strict=True):
        part.load_state_dict(state)
    train(whole, steps, 9)
    train(resumed, steps, 9)
    assert numbers(whole[2]) == numbers(resumed[2])
    for expected, found in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(expected, found)


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: st.Sparsifier, *, step: int) -> None:
    inputs, labels = batch(step)
    sparsifier.begin_step()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": "tanh"}, "threshold is one of sigmoid, exp, got 'tanh'"),
        ({"initial": math.inf}, "initial is a finite number, got inf"),
        ({"threshold_decay": -0.1}, r"threshold_decay is a finite number that is not negative, or None; got -0\.1"),
        ({"exact_final": True}, "exact_final cuts in the last phase, which has to be sparse"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        st.STR(schedule=sparse(4), **fields)


def test_a_step_costs_what_its_kept_weights_do():
    method = st.STR(schedule=sparse(4))
    assert method.passes(method.schedule.phases[0], enters=False) == (Pass(),)
