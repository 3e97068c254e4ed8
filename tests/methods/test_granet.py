"""GraNet against a plainly written loop that shares no code with it, and by hand."""

import math

import pytest
import torch
from torch import nn

import sparsetwin as st

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
TARGETS = ("0.weight", "4.weight", "6.weight")
FROM_DENSE = st.schedules.gradual(sparsity=0.85, total_steps=18, start_step=2, stop_step=12, every_steps=3)
FROM_HALF = st.schedules.gradual(
    sparsity=0.85, total_steps=18, start_step=0, stop_step=12, every_steps=3, initial_sparsity=0.5
)
REGENERATES = st.schedules.gradual(
    sparsity=0.85, total_steps=18, start_step=2, stop_step=8, every_steps=3, final_every_steps=2
)
GOES_ON = st.schedules.phases([(3, 0.5), (3, 0.7), (4, 0.7), (4, 0.7), (4, 0.8)])


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


def by_magnitude(weights: dict[str, list[float]], active: dict[str, list[int]]) -> list[tuple[str, int]]:
    """Active weights, the largest first; of equal ones the earlier layer, then the earlier element."""
    entries = [(-abs(weights[name][i]), layer, i, name) for layer, name in enumerate(active) for i in active[name]]
    return [(name, i) for _, _, i, name in sorted(entries)]


def pruned(weights, active, phase, sizes, *, in_each_layer) -> dict[str, list[int]]:
    """Keep the largest of the active ones, over all layers or in each."""
    if in_each_layer:
        best = {name: by_magnitude(weights, {name: active[name]}) for name in active}
        counts = {name: sizes[name] - round(phase.sparsity * sizes[name]) for name in active}
        return {name: [i for _, i in best[name][: counts[name]]] for name in active}
    total = sum(sizes.values())
    best = by_magnitude(weights, active)[: total - round(phase.sparsity * total)]
    return {name: [i for layer, i in best if layer == name] for name in active}


def regenerated(weights, slopes, active, fraction) -> dict[str, list[int]]:
    """Drop the smallest of each layer and grow as many of the inactive with the largest gradients."""
    found = {}
    for name in active:
        order = [i for _, i in by_magnitude(weights, {name: active[name]})]
        count = int(fraction * len(order))
        keep = order[: len(order) - count]
        free = [i for i in range(len(weights[name])) if i not in keep]
        found[name] = keep + sorted(free, key=lambda i: (-abs(slopes[name][i]), i))[:count]
    return found


def reference(schedule, first_masks, *, in_each_layer) -> list[dict[str, torch.Tensor]]:
    """Train by hand: explicit masks, SGD with momentum written out, updates in every step."""
    model = network()
    parameters = dict(model.named_parameters())
    sizes = {name: parameters[name].numel() for name in TARGETS}
    masks = {name: mask.clone() for name, mask in first_masks.items()}
    momentum = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    trajectory, left = [], None
    for name, mask in masks.items():
        with torch.no_grad():
            parameters[name][~mask] = 0.0
    for step in range(schedule.total_steps):
        model.zero_grad()
        loss_of(model, step).backward()
        phase = schedule.at(step)
        with torch.no_grad():
            if left is not None and phase is not left and phase.sparsity > 0:
                old = masks or {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in TARGETS}
                weights = {name: parameters[name].flatten().tolist() for name in TARGETS}
                slopes = {name: parameters[name].grad.flatten().tolist() for name in TARGETS}
                active = {name: old[name].flatten().nonzero().flatten().tolist() for name in TARGETS}
                if phase.sparsity > left.sparsity:
                    active = pruned(weights, active, phase, sizes, in_each_layer=in_each_layer)
                fraction = 0.5 / 2 * (1 + math.cos(math.pi * step / schedule.total_steps))
                masks = {}
                for name, places in regenerated(weights, slopes, active, fraction).items():
                    masks[name] = torch.zeros(sizes[name], dtype=torch.bool)
                    masks[name][places] = True
                    masks[name] = masks[name].view_as(parameters[name])
                    parameters[name][~masks[name]] = 0.0
                    momentum[name][masks[name] & ~old[name]] = 0.0
            for name, parameter in parameters.items():
                gradient = torch.where(masks[name], parameter.grad, 0.0) if name in masks else parameter.grad
                gradient = torch.add(gradient, parameter, alpha=DECAY)
                momentum[name].mul_(MOMENTUM).add_(gradient)
                parameter.add_(momentum[name], alpha=-LR)
                if name in masks:
                    parameter[~masks[name]] = 0.0
        left = phase
        trajectory.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        trajectory[-1] |= {f"mask.{name}": mask for name, mask in masks.items()}
    return trajectory


@pytest.mark.parametrize("schedule", [FROM_DENSE, FROM_HALF, REGENERATES, GOES_ON], ids=str)
@pytest.mark.parametrize("in_each_layer", [False, True])
def test_granet_has_the_bits_of_the_plain_loop_at_every_step(schedule, in_each_layer):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    distributions = {"distribution": st.Uniform(), "initial_distribution": st.Uniform()} if in_each_layer else {}
    sparsifier = st.Sparsifier(st.GraNet(schedule=schedule, **distributions), model, optimizer)
    expected = None
    for step in range(schedule.total_steps):
        sparsifier.begin_step()
        expected = expected or reference(schedule, sparsifier.masks, in_each_layer=in_each_layer)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        found = dict(model.state_dict()) | {f"mask.{name}": mask for name, mask in sparsifier.masks.items()}
        assert found.keys() == expected[step].keys()
        for name, tensor in expected[step].items():
            assert torch.equal(found[name], tensor), f"{name} differs after step {step + 1}"


def entered(weight, gradient, mask, *, sparsities, **fields) -> st.Sparsifier:
    """Enter the second phase with a given weight, gradient and mask."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    schedule = st.schedules.phases([(1, sparsity) for sparsity in sparsities])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    method = st.GraNet(schedule=schedule, decay="constant", **fields)
    sparsifier = st.Sparsifier(method, model, optimizer)
    with torch.no_grad():
        model.weight.copy_(weight)
    masks = {} if mask is None else {"weight": mask}
    sparsifier.load_state_dict(sparsifier.state_dict() | {"steps": 1, "phase": 0, "masks": masks})
    sparsifier.begin_step()
    model.weight.grad = gradient.clone()
    sparsifier.mask_gradients()
    return sparsifier


def test_a_pruning_with_regeneration_worked_out_by_hand():
    weight = torch.tensor([[8.0, -7.0, 6.0, 5.0], [-4.0, 3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    gradient = torch.tensor([[0.0, 9.0, 0.0, 2.0], [1.0, 6.0, 0.0, 5.0]])
    # From 6 of 8 to 4: 8, 7, 6, 5 stay. Half of them are dropped, 6 and 5; free then: slopes 0, 2, 1, 6, 0, 5.
    # The weight of 3, pruned right now, comes back with its value; that at the end begins at zero.
    sparsifier = entered(weight, gradient, mask, sparsities=[0.25, 0.5], drop_fraction=0.5)
    assert torch.equal(sparsifier.masks["weight"], torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]]).bool())
    expected = torch.tensor([[8.0, -7.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    assert torch.equal(sparsifier.weights["weight"], expected)


def test_from_a_dense_phase_the_whole_layer_is_pruned():
    weight = torch.tensor([[8.0, -7.0], [6.0, 5.0]])
    gradient = torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    sparsifier = entered(weight, gradient, None, sparsities=[0.0, 0.5], drop_fraction=0.5)
    # 8 and 7 stay, 7 is dropped, and 6 grows
    assert torch.equal(sparsifier.weights["weight"], torch.tensor([[8.0, 0.0], [6.0, 0.0]]))


def test_regeneration_leaves_the_number_of_kept_weights_of_every_layer():
    def counts(fraction):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = st.Sparsifier(st.GraNet(schedule=FROM_DENSE, drop_fraction=fraction), model, optimizer)
        for step in range(3):  # up to the first pruning
            sparsifier.begin_step()
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if sparsifier.masks:
                break
        return sparsifier.masks

    without, with_half = counts(0.0), counts(0.5)
    assert {n: int(m.sum()) for n, m in without.items()} == {n: int(m.sum()) for n, m in with_half.items()}
    assert all(not torch.equal(mask, with_half[name]) for name, mask in without.items())


def test_after_the_last_pruning_weights_are_still_dropped_and_grown():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(st.GraNet(schedule=REGENERATES), model, optimizer)
    seen = []
    for step in range(18):
        sparsifier.begin_step()
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(dict(sparsifier.masks))
    at_the_end = [8, 10, 12, 14, 16]
    assert [phase.start for phase in REGENERATES.phases][-5:] == at_the_end
    counts = [{name: int(mask.sum()) for name, mask in masks.items()} for masks in seen]
    assert counts[8] == counts[17]
    for step in range(9, 18):
        moved = any(not torch.equal(mask, seen[step - 1][name]) for name, mask in seen[step].items())
        assert moved == (step in at_the_end)


def test_gradients_of_all_weights_are_asked_for_where_a_sparse_phase_begins_but_not_at_the_first_step():
    def asked(schedule):
        method = st.GraNet(schedule=schedule)
        return [method.needs_gradients(phase) for phase in schedule.phases]

    assert asked(FROM_DENSE) == [False, *[True] * (len(FROM_DENSE.phases) - 1)]
    assert asked(FROM_HALF) == [False, *[True] * (len(FROM_HALF.phases) - 1)]


def test_a_layer_that_is_due_more_weights_than_before_grows_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 4, bias=False))
    first = st.PerLayer({"0.weight": 0.5, "1.weight": 0.9})
    method = st.GraNet(
        schedule=st.schedules.phases([(2, 0.6), (2, 0.7)]), distribution=st.Uniform(), initial_distribution=first
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(method, model, optimizer)
    kept = []
    for _ in range(4):
        sparsifier.begin_step()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append([int(mask.sum()) for mask in sparsifier.masks.values()])
    assert kept[0][1] < kept[2][1] == 80 - round(0.7 * 80)
    assert kept[0][0] > kept[2][0] == 400 - round(0.7 * 400)


def test_a_kept_weight_at_zero_outlives_pruned_ones():
    """A weight that was grown and got no gradient yet is at zero, as pruned ones are; only it is kept."""
    model = nn.ModuleList([nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)])
    schedule = st.schedules.phases([(1, 0.375), (1, 0.625)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = st.Sparsifier(st.GraNet(schedule=schedule, drop_fraction=0.0), model, optimizer)
    masks = {"0.weight": torch.tensor([[True, False, False, False]]), "1.weight": torch.ones(1, 4, dtype=torch.bool)}
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[5.0, 0.0, 0.0, 0.0]]))
        model[1].weight.zero_()
    sparsifier.load_state_dict(sparsifier.state_dict() | {"steps": 1, "phase": 0, "masks": masks})
    sparsifier.begin_step()
    for layer in model:
        layer.weight.grad = torch.ones(1, 4)
    sparsifier.mask_gradients()
    assert torch.equal(sparsifier.masks["0.weight"], masks["0.weight"])
    assert torch.equal(sparsifier.masks["1.weight"], torch.tensor([[True, True, False, False]]))
