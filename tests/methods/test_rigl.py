"""RigL against a plainly written loop that shares no code with it, by hand, and in what it costs."""

import math

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.methods import Pass

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
TOTAL, EVERY, STOP = 22, 4, 16
ALPHA = 0.5
PRUNED = ("0.weight", "4.weight", "6.weight")
BETAS, EPS = (0.9, 0.999), 1e-8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 32).round() / 32)  # many equal magnitudes, so that ties decide
    return model


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 2, 6, 6, generator=generator)
    return nn.functional.cross_entropy(model(inputs), torch.randint(5, (8,), generator=generator))


def moved(weight: torch.Tensor, mask: torch.Tensor, gradient: torch.Tensor, fraction: float) -> torch.Tensor:
    """Algorithm 1 of the paper, one layer: k smallest of the active out, k largest gradients of the inactive in."""
    values, slopes, active = weight.flatten().tolist(), gradient.flatten().tolist(), mask.flatten().tolist()
    order = sorted((place for place, on in enumerate(active) if on), key=lambda place: (-abs(values[place]), place))
    count = int(fraction * len(order))
    keep = order[: len(order) - count]
    inactive = [place for place in range(len(active)) if place not in keep]
    grow = sorted(inactive, key=lambda place: (-abs(slopes[place]), place))[:count]
    new = torch.zeros(len(active), dtype=torch.bool)
    new[keep + grow] = True
    return new.view_as(mask)


def reference(first_masks: dict[str, torch.Tensor], kind: str) -> list[dict[str, torch.Tensor]]:
    """Train by hand: explicit masks, the optimizer written out, no update where masks change."""
    model = network()
    parameters, masks = dict(model.named_parameters()), dict(first_masks)
    state = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in parameters.items()}
    updates, trajectory = 0, []
    with torch.no_grad():
        for name in PRUNED:
            parameters[name].mul_(masks[name])
    for step in range(TOTAL):
        model.zero_grad()
        loss_of(model, step).backward()
        with torch.no_grad():
            if step and step % EVERY == 0 and step < STOP:
                fraction = ALPHA / 2 * (1 + math.cos(math.pi * step / STOP))
                for name in PRUNED:
                    old, masks[name] = (
                        masks[name],
                        moved(parameters[name], masks[name], parameters[name].grad, fraction),
                    )
                    parameters[name][~masks[name]] = 0.0
                    for remembered in state[name]:
                        remembered[masks[name] & ~old] = 0.0
            else:
                updates += 1
                for name, parameter in parameters.items():
                    gradient = torch.where(masks[name], parameter.grad, 0.0) if name in masks else parameter.grad
                    update_(parameter, gradient, state[name], updates, kind)
                    if name in masks:
                        parameter[~masks[name]] = 0.0
        trajectory.append({name: tensor.clone() for name, tensor in model.state_dict().items()} | masks_of(masks))
    return trajectory


def update_(parameter, gradient, state, updates, kind):
    if kind == "sgd":
        gradient = torch.add(gradient, parameter, alpha=DECAY)
        state[0].mul_(MOMENTUM).add_(gradient)
        parameter.add_(state[0], alpha=-LR)
        return
    parameter.mul_(1 - LR / 10 * DECAY)
    state[0].lerp_(gradient, 1 - BETAS[0])
    state[1].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    step_size = LR / 10 / (1 - BETAS[0] ** updates)
    denominator = (state[1].sqrt() / (1 - BETAS[1] ** updates) ** 0.5).add_(EPS)
    parameter.addcdiv_(state[0], denominator, value=-step_size)


def masks_of(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"mask.{name}": mask.clone() for name, mask in masks.items()}


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
    "adamw": lambda model: torch.optim.AdamW(
        model.parameters(), lr=LR / 10, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False
    ),
}


def make(optimizer: str = "sgd", **fields):
    model = network()
    schedule = st.schedules.periodic(sparsity=0.8, total_steps=TOTAL, every_steps=EVERY, stop_step=STOP)
    method = st.RigL(schedule=schedule, drop_fraction=ALPHA, **fields)
    made = OPTIMIZERS[optimizer](model)
    return model, made, st.Sparsifier(method, model, made)


def backward(model, sparsifier, step: int) -> None:
    sparsifier.begin_step()
    loss_of(model, step).backward()


def train(model, optimizer, sparsifier, steps: int) -> None:
    for _ in range(steps):
        backward(model, sparsifier, sparsifier.steps)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("distribution", [st.ERK(), st.Uniform()])
def test_rigl_has_the_bits_of_the_plain_loop_at_every_step(kind, distribution):
    model, optimizer, sparsifier = make(kind, distribution=distribution)
    expected, changes = None, 0
    for step in range(TOTAL):
        before = masks_of(sparsifier.masks)
        backward(model, sparsifier, step)
        expected = expected or reference(dict(sparsifier.masks), kind)
        optimizer.step()
        optimizer.zero_grad()
        found = dict(model.state_dict()) | masks_of(sparsifier.masks)
        for name, tensor in expected[step].items():
            assert torch.equal(found[name], tensor), f"{name} differs after step {step + 1}"
        changes += any(not torch.equal(mask, found[name]) for name, mask in before.items())
    assert changes == 3  # at 4, 8 and 12


def test_the_step_of_an_update_leaves_every_parameter_and_optimizer_state_but_the_grown_ones():
    model, optimizer, sparsifier = run = make()
    train(*run, steps=EVERY)
    old_masks = dict(sparsifier.masks)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    momenta = {name: optimizer.state[tensor]["momentum_buffer"].clone() for name, tensor in model.named_parameters()}
    backward(model, sparsifier, EVERY)
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters()}
    optimizer.step()
    regrown = 0
    for name, parameter in model.named_parameters():
        mask = sparsifier.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        new = mask & ~old_masks.get(name, mask)
        assert torch.equal(parameter, torch.where(mask, before[name], 0.0))  # the grown begin at zero
        expected = torch.where(new, 0.0, momenta[name])
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected)
        assert torch.equal(parameter.grad, gradients[name])  # given back for loggers
        if name in PRUNED:
            assert new.any()
            fraction = sparsifier.method.fraction_at(EVERY)
            kept = before[name].abs()[old_masks[name]].sort().values
            dropped = old_masks[name] & (before[name].abs() <= kept[int(fraction * len(kept)) - 1])
            regrown += int((dropped & mask).sum())
    assert regrown > 0  # dropped, grown at once, with value and momentum as asserted above
    assert sparsifier.steps == EVERY + 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_weight_that_grows_again_later_does_not_meet_its_stale_state(kind):
    """Dropped weights' momentum stays in the optimizer; it must not act when the weight returns."""
    _, optimizer, sparsifier = run = make(kind, decay="constant")
    seen = 0
    for _ in range(TOTAL):
        old = dict(sparsifier.masks)
        train(*run, steps=1)
        for name, mask in old.items():
            new = sparsifier.masks[name] & ~mask
            seen += int(new.sum())
            for key, value in optimizer.state[sparsifier.weights[name]].items():
                assert key == "step" or not value[new].any()
    assert seen > 20


def test_an_update_worked_out_by_hand():
    model = nn.Linear(4, 2, bias=False)
    schedule = st.schedules.phases([(1, 0.5), (1, 0.5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = st.Sparsifier(st.RigL(schedule=schedule, decay="constant", drop_fraction=0.5), model, optimizer)
    mask = torch.tensor([[True, True, False, False], [True, False, False, True]])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.25]]))
    state = sparsifier.state_dict() | {"steps": 1, "phase": 0, "masks": {"weight": mask}}
    sparsifier.load_state_dict(state)
    sparsifier.begin_step()
    model.weight.grad = torch.tensor([[0.0, 5.0, -4.0, 1.0], [9.0, 0.5, 0.0, -3.0]])
    optimizer.step()
    # 2 of 4 are dropped, -1 and 0.25; of what is free then the slopes are 5, -4, 1, 0.5, 0 and -3: -1 grows again
    assert torch.equal(sparsifier.masks["weight"], torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool())
    assert torch.equal(model.weight, torch.tensor([[3.0, -1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]))


def test_a_layer_without_a_gradient_stays_as_it_is():
    model = nn.ModuleDict({"used": nn.Linear(10, 10), "idle": nn.Linear(10, 10)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = st.schedules.periodic(sparsity=0.5, total_steps=6, every_steps=2)
    sparsifier = st.Sparsifier(st.RigL(schedule=schedule), model, optimizer)
    seen = []
    for _ in range(3):
        sparsifier.begin_step()
        model["used"](torch.randn(4, 10)).square().sum().backward()
        optimizer.step()
        seen.append(dict(sparsifier.masks))
    assert torch.equal(seen[0]["idle.weight"], seen[2]["idle.weight"])
    assert not torch.equal(seen[0]["used.weight"], seen[2]["used.weight"])


def test_the_gradient_of_all_batches_of_a_step_decides():
    def after_growth(batches):
        model, optimizer, sparsifier = run = make()
        train(*run, steps=EVERY)
        sparsifier.begin_step()
        with torch.no_grad():
            for module in model:
                module.eval()  # batch norm sees no batches, so that gradients add up
        for batch in batches:
            loss_of(model, batch).backward()
        total = {name: sparsifier.weights[name].grad.clone() for name in PRUNED}
        before = {name: (sparsifier.weights[name].detach().clone(), sparsifier.masks[name]) for name in PRUNED}
        fraction = sparsifier.method.fraction_at(EVERY)
        optimizer.step()
        for name, (weight, mask) in before.items():
            assert torch.equal(sparsifier.masks[name], moved(weight, mask, total[name], fraction))
        return sparsifier.masks

    both, one = after_growth([50, 51]), after_growth([50])
    assert any(not torch.equal(both[name], one[name]) for name in PRUNED)


def test_a_step_that_a_gradscaler_skips_updates_no_mask_and_the_next_does():
    model, optimizer, sparsifier = run = make()
    train(*run, steps=EVERY)
    before = dict(sparsifier.masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for overflows in (True, False):
        scaler.scale(torch.tensor(1.0))
        backward(model, sparsifier, EVERY)
        if overflows:
            sparsifier.weights["4.weight"].grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = [torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items()]
        assert all(same) if overflows else not any(same)
    assert sparsifier.steps == EVERY + 1


@pytest.mark.parametrize(("every", "density"), [(100, 0.1), (5, 0.2), (1, 0.05)])
def test_a_step_costs_what_the_paper_says_on_average(every, density):
    """(3 f_S dT + 2 f_S + f_D) / (dT + 1): the paper counts the step of an update beside the dT others."""
    sparse, dense = density * 8e9, 8e9
    flops = {"kept": sparse, "all": dense}
    method = st.RigL(schedule=st.schedules.periodic(sparsity=1 - density, total_steps=10 * every, every_steps=every))
    phase = method.schedule.phases[1]
    total = 0.0
    for step in range(phase.start, phase.stop):
        for one in method.passes(phase, enters=step == phase.start and method.needs_gradients(phase)):
            total += flops[one.forward] + flops[one.input_gradient] + flops[one.weight_gradient]
    interval = every - 1
    assert total / every == pytest.approx((3 * sparse * interval + 2 * sparse + dense) / (interval + 1), rel=1e-12)


def test_the_first_phase_and_set_never_need_gradients_of_all_weights():
    schedule = st.schedules.periodic(sparsity=0.9, total_steps=20, every_steps=10)
    rigl, evolved = st.RigL(schedule=schedule), st.SET(schedule=schedule)
    assert [rigl.needs_gradients(phase) for phase in schedule.phases] == [False, True]
    assert not any(evolved.needs_gradients(phase) for phase in schedule.phases)
    assert evolved.passes(schedule.phases[1], enters=False) == (Pass(),)
    assert rigl.passes(schedule.phases[1], enters=True) == (Pass(weight_gradient="all"),)


def test_an_optimizer_that_cannot_forget_single_weights_is_refused_unless_nothing_is_grown():
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

    model = nn.Linear(20, 20)
    updated = st.RigL(schedule=st.schedules.periodic(sparsity=0.5, total_steps=4, every_steps=2))
    with pytest.raises(st.errors.UsageError, match="Own cannot forget single weights"):
        st.Sparsifier(updated, model, Own(model.parameters()))
    fixed = st.RigL(schedule=st.schedules.constant(sparsity=0.5, total_steps=4))
    st.Sparsifier(fixed, model, Own(model.parameters()))
