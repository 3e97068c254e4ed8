"""Top-KAST: worked by hand, and against a plain loop with an autograd function of its own."""

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ConfigError
from sparsetwin.methods import Pass

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}
PRUNED = ("0.weight", "4.weight", "6.weight")
STEPS = 12


def sparse(sparsity: float, steps: int = STEPS) -> st.Schedule:
    return st.schedules.constant(sparsity=sparsity, total_steps=steps)


def test_one_step_worked_by_hand():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = st.TopKAST(schedule=sparse(0.5), backward_sparsity=0.25, exploration=0.5)
    sparsifier = st.Sparsifier(method, model, optimizer)
    sparsifier.begin_step()
    assert model.weight.tolist() == [[4, -3, 0, 0]]  # A: the two largest
    out = model(torch.tensor([1.0, 1.0, -8.0, 100.0]))
    assert out.item() == 1
    out.backward()
    optimizer.step()
    # gradients of B, the three largest: 1, 1, -8; penalty: 0.5 * 4, 0.5 * -3, and for the third 0.5 / 0.5 * 2
    stored = [4 - 0.5 * 3, -3 - 0.5 * -0.5, 2 - 0.5 * -6, 1.0]
    assert sparsifier.state_dict()["buffers"]["stored"]["weight"].tolist() == [stored]
    assert stored == [2.5, -2.75, 5, 1]
    assert model.weight.tolist() == [[0, -2.75, 5, 0]]
    assert sparsifier.masks["weight"].tolist() == [[False, True, True, False]]
    assert sparsifier.state_dict()["buffers"]["updated"]["weight"].tolist() == [[True, True, True, False]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, 6, generator=generator).double(), torch.randint(5, (8,), generator=generator)


class ForwardWithA(torch.autograd.Function):
    """The network sees A; the loss's gradient reaches B."""

    @staticmethod
    def forward(ctx, weight, used, updated):
        ctx.save_for_backward(updated)
        return weight * used

    @staticmethod
    def backward(ctx, gradient):
        (updated,) = ctx.saved_tensors
        return gradient * updated, None, None


def largest(weights: dict[str, torch.Tensor], sparsity: float, *, in_each_layer: bool) -> dict[str, torch.Tensor]:
    groups = [[name] for name in weights] if in_each_layer else [list(weights)]
    masks = {}
    for group in groups:
        sizes = torch.cat([weights[name].detach().abs().flatten() for name in group])
        kept = len(sizes) - round(sparsity * len(sizes))
        cut = sizes.sort(descending=True).values[kept - 1]
        masks |= {name: (weights[name].detach().abs() >= cut).double() for name in group}
    return masks


def reference(optimizer: str, *, in_each_layer: bool, exploration: float, every_steps: int):
    """Yield effective and stored weights and B after each step of a plain loop."""
    model = network()
    stored = {name: nn.Parameter(value.detach().clone()) for name, value in model.named_parameters()}
    update = OPTIMIZERS[optimizer](list(stored.values()))
    pruned = {name: stored[name] for name in PRUNED}
    density = 1 - 0.8
    used = largest(pruned, 0.8, in_each_layer=in_each_layer)
    updated = largest(pruned, 0.5, in_each_layer=in_each_layer)
    for step in range(STEPS):
        effective = {n: ForwardWithA.apply(w, used[n], updated[n]) if n in pruned else w for n, w in stored.items()}
        inputs, labels = batch(step)
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, effective, (inputs,)), labels)
        for name, weight in pruned.items():
            rest = updated[name] - used[name]
            loss = loss + exploration / 2 * ((used[name] * weight**2).sum() + (rest * weight**2).sum() / density)
        update.zero_grad()
        loss.backward()
        before = {name: weight.detach().clone() for name, weight in pruned.items()}
        update.step()
        with torch.no_grad():
            for name, weight in pruned.items():
                weight.copy_(torch.where(updated[name] > 0, weight, before[name]))
        if (step + 1) % every_steps == 0:
            used = largest(pruned, 0.8, in_each_layer=in_each_layer)
            updated = largest(pruned, 0.5, in_each_layer=in_each_layer)
        yield (
            {n: (w * used[n] if n in pruned else w).detach().clone() for n, w in stored.items()},
            {name: weight.detach().clone() for name, weight in pruned.items()},
            {name: mask.bool() for name, mask in updated.items()},
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("distribution", "exploration", "every_steps"),
    [(st.Uniform(), 0.0, 1), (st.Global(), 0.0, 4), (st.Uniform(), 0.01, 1), (st.Global(), 0.01, 3)],
)
def test_training_is_that_of_a_plain_loop(optimizer, distribution, exploration, every_steps):
    model = network()
    update = OPTIMIZERS[optimizer](model.parameters())
    method = st.TopKAST(
        schedule=sparse(0.8), distribution=distribution, exploration=exploration, every_steps=every_steps
    )
    sparsifier = st.Sparsifier(method, model, update)
    in_each_layer = distribution == st.Uniform()
    loop = reference(optimizer, in_each_layer=in_each_layer, exploration=exploration, every_steps=every_steps)
    for step, (effective, stored, updated) in enumerate(loop):
        sparsifier.begin_step()
        inputs, labels = batch(step)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update.step()
        update.zero_grad()
        buffers = sparsifier.state_dict()["buffers"]
        found = [*dict(model.named_parameters()).values(), *buffers["stored"].values()]
        for mine, theirs in zip(found, [*effective.values(), *stored.values()], strict=True):
            if exploration:  # autograd adds the penalty up in another order
                torch.testing.assert_close(mine.detach(), theirs, rtol=1e-10, atol=1e-12)
            else:
                assert torch.equal(mine, theirs), step
        assert all(torch.equal(buffers["updated"][name], mask) for name, mask in updated.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_outside_b_keep_their_bits_whatever_the_optimizer_remembers(optimizer):
    """Momentum and moments of the dense warm-up are stale, and weight decay acts on every weight."""
    model = network()
    update = OPTIMIZERS[optimizer](model.parameters())
    schedule = st.schedules.constant(sparsity=0.8, total_steps=STEPS, warmup_steps=3)
    sparsifier = st.Sparsifier(st.TopKAST(schedule=schedule, every_steps=5), model, update)
    moved = 0
    for step in range(STEPS):
        sparsifier.begin_step()
        state = sparsifier.state_dict()["buffers"]
        before = {name: weight.clone() for name, weight in state.get("stored", {}).items()}
        updated = {name: mask.clone() for name, mask in state.get("updated", {}).items()}
        inputs, labels = batch(step)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update.step()
        update.zero_grad()
        after = sparsifier.state_dict()["buffers"].get("stored", {})
        assert before.keys() == after.keys() == (set(PRUNED) if step >= 3 else set())
        for name, weight in after.items():
            outside = ~updated[name]
            assert torch.equal(weight[outside], before[name][outside])
            moved += int((weight != before[name]).sum())
    assert moved


def test_b_holds_a_at_every_step():
    model = network()
    update = OPTIMIZERS["sgd"](model.parameters())
    schedule = st.schedules.phases([(2, 0.52), (2, 0.51), (2, 0.9)])
    method = st.TopKAST(schedule=schedule, distribution=st.ERK(), backward_sparsity=0.5)
    sparsifier = st.Sparsifier(method, model, update)
    for step in range(6):
        sparsifier.begin_step()
        inputs, labels = batch(step)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        update.step()
        update.zero_grad()
        for name, updated in sparsifier.state_dict()["buffers"]["updated"].items():
            assert not (sparsifier.masks[name] & ~updated).any()


def test_the_mask_moves_and_the_network_learns():
    """The labels are a linear function of the inputs, of which most of the first weights know nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 4))
    update = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    sparsifier = st.Sparsifier(st.TopKAST(schedule=sparse(0.8, 150)), model, update)
    truth = torch.randn(20, 4)
    losses, first = [], None
    for _ in range(150):
        inputs = torch.randn(64, 20)
        sparsifier.begin_step()
        first = first or {name: mask.clone() for name, mask in sparsifier.masks.items()}
        loss = nn.functional.cross_entropy(model(inputs), (inputs @ truth).argmax(1))
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert any(not torch.equal(mask, first[name]) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backward_sparsity": 0.9}, r"backward_sparsity = 0\.9 may not exceed the sparsity of any sparse phase"),
        ({"backward_sparsity": 1.0}, r"backward_sparsity is a fraction in \[0, 1\), got 1\.0"),
        ({"exploration": -1.0}, r"exploration is a finite number that is not negative, got -1\.0"),
        ({"every_steps": 0}, "every_steps is a whole number of steps, at least 1; got 0"),
        ({"minimum_kept": 0}, "minimum_kept is at least 1"),
        ({"distribution": "uniform"}, "expected a distribution"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        st.TopKAST(schedule=sparse(0.8), **fields)


def test_a_step_costs_two_forward_densities_and_one_backward_density():
    method = st.TopKAST(schedule=sparse(0.8))
    assert method.passes(method.schedule.phases[0], enters=False) == (
        Pass(forward="kept", input_gradient="kept", weight_gradient="updated"),
    )
