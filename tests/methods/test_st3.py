"""ST-3: worked by hand, and against a plain loop with the published arithmetic and an autograd function of its own."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.errors import ConfigError, SparsityWarning, UsageError
from sparsetwin.methods import Pass

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.875, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}
PRUNED = ("0.weight", "4.weight", "6.weight")
STEPS = 12


def sparse(sparsity: float, steps: int = STEPS) -> st.Schedule:
    return st.schedules.constant(sparsity=sparsity, total_steps=steps)


def test_one_step_worked_by_hand():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3.0], [2.0, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier = st.Sparsifier(st.ST3(schedule=sparse(0.5)), model, optimizer)
    sparsifier.begin_step()
    # the median of 1, 2, 3, 4 is 2.5; the first output keeps all of its magnitude, the second none
    first = 1.01 / (1 + 0.01)
    expected = torch.tensor([[1.5 * first, -0.5 * first], [0, 0]])
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=0)
    model(torch.tensor([1.0, 2.0])).sum().backward()
    optimizer.step()
    assert sparsifier.state_dict()["buffers"]["stored"]["weight"].tolist() == [[3.5, -4.0], [1.5, 0.0]]
    # 0, 1.5, 3.5, 4: still 2.5
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.0, -1.5], [0, 0]]), rtol=1e-5, atol=0)


def test_an_output_is_scaled_by_what_the_mask_left_of_its_mean_magnitude():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier = st.Sparsifier(st.ST3(schedule=sparse(0.5)), model, optimizer)
    sparsifier.begin_step()
    scale = 1.01 / ((1.75 + 1e-6) / (2.5 + 1e-6) + 0.01)
    expected = torch.tensor([[1.5 * scale, -0.5 * scale, 0, 0]])
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-6, atol=0)


def network() -> nn.Sequential:
    """72 + 768 + 60 = 900 weights that may be pruned, so that sparsities of one digit fit exactly."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    with torch.no_grad():
        layers[0].weight *= 3  # or ST-3 sigma would leave the layer without weights, which ours does not
    return nn.Sequential(*layers, nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, threshold: float, mask: Tensor, scale: Tensor) -> Tensor:
        return scale * ((weight - torch.sign(weight) * threshold) * mask)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None, None


def published(weights: dict[str, Tensor], sparsity: float, *, sigma: bool, rescale: bool) -> dict[str, tuple]:
    """Thresholds by linear quantiles of all magnitudes, masks by comparing with them, scales of outputs."""
    units = {name: 1 / math.sqrt(sum(weight.shape)) if sigma else 1.0 for name, weight in weights.items()}
    scores = torch.cat([(weight / units[name]).abs().flatten() for name, weight in weights.items()]).sort().values
    place = (len(scores) - 1) * sparsity
    low = math.floor(place)
    threshold = float(scores[low] + (scores[low + 1] - scores[low]) * (place - low))
    assert math.isclose(threshold, np.quantile(scores.numpy(), sparsity), rel_tol=1e-6)
    found = {}
    for name, weight in weights.items():
        mask = (weight.abs() > threshold * units[name]).to(weight)
        axes = tuple(range(1, weight.ndim))
        left = (weight.abs() * mask).mean(axes, keepdim=True) + 1e-6
        share = left / (weight.abs().mean(axes, keepdim=True) + 1e-6)
        scale = 1.01 / (share + 0.01) if rescale else torch.ones(1)
        found[name] = (threshold * units[name], mask, scale)
    return found


def reference(optimizer: str, phases: list[float], *, sigma: bool, rescale: bool):
    """Yield effective and stored weights after each step; one sparsity a step, 0 being dense."""
    model = network()
    stored = {name: nn.Parameter(value.detach().clone()) for name, value in model.named_parameters()}
    pruned = {name: stored[name] for name in PRUNED}
    update = OPTIMIZERS[optimizer](list(stored.values()))

    def effective(sparsity: float) -> dict[str, Tensor]:
        if not sparsity:
            return dict(stored)
        with torch.no_grad():
            rule = published(pruned, sparsity, sigma=sigma, rescale=rescale)
        return {n: StraightThrough.apply(w, *rule[n]) if n in pruned else w for n, w in stored.items()}

    for step, sparsity in enumerate(phases):
        inputs, labels = batch(step)
        update.zero_grad()
        output = torch.func.functional_call(model, effective(sparsity), (inputs,))
        nn.functional.cross_entropy(output, labels).backward()
        update.step()
        yield (
            {name: weight.detach().clone() for name, weight in effective(sparsity).items()},
            {name: weight.detach().clone() for name, weight in pruned.items()},
        )


@pytest.mark.filterwarnings("ignore:layers that keep fewer weights")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("sigma", "rescale"), [(False, True), (True, True), (False, False)])
def test_training_is_that_of_a_plain_loop(optimizer, sigma, rescale):
    model = network()
    update = OPTIMIZERS[optimizer](model.parameters())
    schedule = st.schedules.phases([(2, 0.0), (3, 0.5), (3, 0.8), (4, 0.9)])
    sparsifier = st.Sparsifier(st.ST3(schedule=schedule, sigma=sigma, rescale=rescale), model, update)
    sparsities = [0.0] * 2 + [0.5] * 3 + [0.8] * 3 + [0.9] * 4
    loop = reference(optimizer, sparsities, sigma=sigma, rescale=rescale)
    for step, (effective, stored) in enumerate(loop):
        sparsifier.begin_step()
        inputs, labels = batch(step)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update.step()
        update.zero_grad()
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], weight) for name, weight in effective.items()), step
        kept = sparsifier.state_dict()["buffers"].get("stored", found)
        assert all(torch.equal(kept[name], weight) for name, weight in stored.items()), step
        assert sum(int(mask.sum()) for mask in sparsifier.masks.values()) == (
            900 - round(900 * sparsities[step]) if sparsities[step] else 0
        )


def test_the_cubic_ramp_of_single_steps_is_the_published_one():
    """1 - (1 - k / n) ** 3 of the final sparsity in the k-th step of the ramp, counted from 0."""
    schedule = st.schedules.gradual(sparsity=0.9, total_steps=20, start_step=3, stop_step=13, every_steps=1)
    for step in range(20):
        share = min(max(step - 3, 0) / 10, 1)
        assert math.isclose(schedule.at(step).sparsity, 0.9 * (1 - (1 - share) ** 3), abs_tol=1e-12)


def test_between_new_thresholds_the_mask_rests_and_no_weight_changes_its_sign():
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 1.0, 2.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = st.Sparsifier(st.ST3(schedule=sparse(0.4, 8), rescale=False, every_steps=2), model, optimizer)
    seen = []
    for _ in range(4):
        sparsifier.begin_step()
        model(torch.tensor([0.0, -1.0, 1.0])).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((sparsifier.masks["weight"].tolist()[0], model.weight.tolist()[0]))
    # 40% of three is one weight pruned; thresholds lie at 0.8 of the way from the largest pruned to the next
    stay, turned = [True, False, True], [True, True, False]
    assert [mask for mask, _ in seen] == [stay, turned, turned, turned]
    cut = 1 + (2 - 1) * 0.8
    assert seen[0][1] == pytest.approx([4 - cut, 0, 0])  # 1 is below the threshold, and kept
    cut = 0 + (3 - 0) * 0.8
    assert seen[1][1] == pytest.approx([4 - cut, 3 - cut, 0])
    assert seen[2][1] == pytest.approx([4 - cut, 4 - cut, 0])


def test_a_layer_that_keeps_its_minimum_has_a_threshold_of_its_own():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
        model[1].weight.copy_(torch.tensor([[4.0], [3.0], [2.0], [1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = st.ST3(schedule=sparse(0.5), rescale=False, minimum_kept=1)
    sparsifier = st.Sparsifier(method, model, optimizer)
    with pytest.warns(SparsityWarning, match="fewer weights than they have outputs: 1"):
        sparsifier.begin_step()
    assert sparsifier.masks["0.weight"].tolist() == [[True, False, False, False]]
    assert model[0].weight.tolist()[0] == pytest.approx([0.4 - 0.3, 0, 0, 0])
    assert model[1].weight.flatten().tolist() == pytest.approx([4 - 1.5, 3 - 1.5, 2 - 1.5, 0])


def test_equal_magnitudes_at_the_cut_are_kept_in_exact_number_with_no_effect():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0, 1.0, 1.0]]))
    sparsifier = st.Sparsifier(st.ST3(schedule=sparse(0.5)), model, torch.optim.SGD(model.parameters(), lr=0.5))
    sparsifier.begin_step()
    assert sparsifier.masks["weight"].tolist() == [[True, True, False, False]]
    assert model.weight[0, 0] > 0
    assert model.weight[0, 1:].tolist() == [0, 0, 0]


def test_the_network_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
    update = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = st.schedules.gradual(sparsity=0.9, total_steps=150, start_step=10, stop_step=90, every_steps=5)
    sparsifier = st.Sparsifier(st.ST3(schedule=schedule), model, update)
    truth = torch.randn(20, 4)
    losses = []
    for _ in range(150):
        inputs = torch.randn(64, 20)
        sparsifier.begin_step()
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ truth).argmax(1))
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert round(sparsifier.sparsity(), 2) == 0.9


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"every_steps is a whole number of steps, at least 1; got 1\.5"):
        st.ST3(schedule=sparse(0.5), every_steps=1.5)


@pytest.mark.parametrize("method", [st.ST3, st.STR])
def test_sharded_weights_are_refused_by_name(method):
    class Sharded(nn.Parameter):
        def to_local(self):
            return self

    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(method(schedule=sparse(0.5)), model, optimizer)
    sparsifier._state.weights = {"weight": Sharded(torch.ones(4, 4))}
    with pytest.raises(UsageError, match=r"cannot train sharded weights \(DTensor\) such as weight"):
        sparsifier.method.check(sparsifier._state)


def test_a_step_costs_the_gradients_of_all_weights():
    method = st.ST3(schedule=sparse(0.5))
    assert method.passes(method.schedule.phases[0], enters=False) == (Pass(weight_gradient="all"),)
