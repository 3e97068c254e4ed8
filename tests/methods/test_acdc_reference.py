"""AC/DC against a plainly written loop that shares no code with it: the same bits at every step."""

import pytest
import torch
from torch import nn

import sparsetwin as st

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
PHASES = [(3, 0.0), (4, 0.9), (3, 0.0), (2, 0.7), (3, 0.0), (5, 0.9)]  # (steps, sparsity)
TOTAL = sum(steps for steps, _ in PHASES)
PRUNED = ("0.weight", "4.weight", "6.weight")  # convolution and linear weights, in the model's order


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


def largest(weights: dict[str, torch.Tensor], sparsity: float, *, in_each_layer: bool) -> dict[str, torch.Tensor]:
    """Sort all weights by magnitude; of equal ones the earlier layer, then the earlier element, is kept."""
    groups = [[name] for name in weights] if in_each_layer else [list(weights)]
    masks = {name: torch.zeros(weight.numel(), dtype=torch.bool) for name, weight in weights.items()}
    for group in groups:
        entries = [
            (-abs(value), layer, index, name)
            for layer, name in enumerate(group)
            for index, value in enumerate(weights[name].flatten().tolist())
        ]
        kept = len(entries) - round(sparsity * len(entries))
        for _, _, index, name in sorted(entries)[:kept]:
            masks[name][index] = True
    assert all(mask.any() for mask in masks.values())
    return {name: mask.view_as(weights[name]) for name, mask in masks.items()}


def reference(*, in_each_layer: bool, reset: str) -> list[dict[str, torch.Tensor]]:
    """Train by hand: explicit masks, SGD with momentum and weight decay written out."""
    model = network()
    parameters = dict(model.named_parameters())
    momentum: dict[str, torch.Tensor] = {}
    trajectory, step = [], 0
    for length, sparsity in PHASES:
        if sparsity:
            pruned = {name: parameters[name].detach() for name in PRUNED}
            masks = largest(pruned, sparsity, in_each_layer=in_each_layer)
            for name, mask in masks.items():
                pruned[name][~mask] = 0.0
        else:
            masks = {}
            if step:  # weights come back
                for name in {"all": list(parameters), "targets": PRUNED, "none": ()}[reset]:
                    momentum.pop(name, None)
        for _ in range(length):
            for parameter in parameters.values():
                parameter.grad = None
            loss_of(model, step).backward()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    gradient = torch.where(masks[name], parameter.grad, 0.0) if name in masks else parameter.grad
                    gradient = torch.add(gradient, parameter, alpha=DECAY)
                    momentum[name] = momentum[name] * MOMENTUM + gradient if name in momentum else gradient
                    parameter.copy_(torch.add(parameter, momentum[name], alpha=-LR))
                    if name in masks:
                        parameter.copy_(torch.where(masks[name], parameter, 0.0))
            step += 1
            trajectory.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return trajectory


@pytest.mark.parametrize("reset", ["all", "targets", "none"])
@pytest.mark.parametrize("in_each_layer", [False, True])
def test_acdc_has_the_bits_of_the_plain_loop_at_every_step(in_each_layer, reset):
    expected = reference(in_each_layer=in_each_layer, reset=reset)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    method = st.ACDC(
        schedule=st.schedules.phases(PHASES),
        distribution=st.Uniform() if in_each_layer else st.Global(),
        reset=reset,
    )
    sparsifier = st.Sparsifier(method, model, optimizer)
    for step in range(TOTAL):
        sparsifier.begin_step()
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[step][name]), f"{name} differs after step {step + 1}"


def test_the_three_resets_are_different_runs():
    runs = [reference(in_each_layer=False, reset=reset)[-1] for reset in ("all", "targets", "none")]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(runs[i]["4.weight"], runs[j]["4.weight"])


def test_ties_decide_in_this_test():
    weights = {name: parameter.detach() for name, parameter in network().named_parameters() if name in PRUNED}
    magnitudes = torch.cat([weight.flatten().abs() for weight in weights.values()]).sort(descending=True).values
    kept = len(magnitudes) - round(0.9 * len(magnitudes))
    assert magnitudes[kept - 1] == magnitudes[kept]
