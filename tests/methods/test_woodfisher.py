"""WoodFisher, by hand and against explicit Fisher matrices that are inverted in double precision."""

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.data.digits import Digits
from sparsetwin.errors import ConfigError, ScheduleError, SelectionError, UsageError
from sparsetwin.methods._inverse_fisher import InverseFisher

TWICE = st.schedules.phases([(1, 0.0), (2, 0.5), (2, 0.8)])
PRUNED = ("0.weight", "4.weight", "6.weight")


def network(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)
    ).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(6, 1, 6, 6, generator=generator).to(model[0].weight.dtype)
    return nn.functional.cross_entropy(model(inputs), torch.randint(4, (6,), generator=generator))


def attached(model, *, optimizer=None, **fields):
    method = st.WoodFisher(**{"schedule": TWICE, "samples": 6, "block_size": 10, "damping": 1e-3, **fields})
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, st.Sparsifier(
        method, model, optimizer, gradient_pass=lambda index: loss_of(model, 100 + index).backward()
    )


def dense_inverse(gradients: torch.Tensor, *, block_size: int, damping: float) -> torch.Tensor:
    """Invert a layer's damped Fisher matrix, zero outside its blocks, with no recursion.

    Args:
        gradients: (samples, weights).
    """
    gradients = gradients.double()
    fisher = gradients.T @ gradients / len(gradients)
    places = torch.arange(gradients.shape[1]) // block_size
    fisher[places.unsqueeze(0) != places.unsqueeze(1)] = 0
    return torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=torch.float64))


# By hand


class Two(nn.Module):
    """Two weights, whose gradient is always (1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize(("repair", "other"), [("joint", 2 + 0.8 / 1.2), ("summed", 2 + 0.8 / 1.2), ("none", 2.0)])
def test_a_pruning_by_hand(repair, other):
    # F = 0.5 * I + (1, 1) (1, 1)^T = ((1.5, 1), (1, 1.5)), its inverse ((1.2, -0.8), (-0.8, 1.2));
    # the first weight is worth 1 / 2.4, the second 4 / 2.4; to make up for the first the second moves by 0.8 / 1.2
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = st.WoodFisher(
        schedule=st.schedules.constant(sparsity=0.5, total_steps=2), samples=3, damping=0.5, repair=repair
    )
    sparsifier = st.Sparsifier(
        method, model, optimizer, gradient_pass=lambda index: model.layer.weight.sum().backward()
    )
    sparsifier.begin_step()
    torch.testing.assert_close(model.layer.weight.detach(), torch.tensor([[0.0, other]]))
    assert sparsifier.masks["layer.weight"].tolist() == [[False, True]]


def test_saliency_is_not_magnitude():
    # only the small weight has a gradient: F = diag(4.5, 0.5), so it is worth 4.5 / 2, the larger one 4 * 0.5 / 2
    inverse = InverseFisher(torch.zeros(2), samples=1, block_size=2, damping=0.5)
    inverse.add_(torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(inverse.saliency(torch.tensor([1.0, 2.0])), torch.tensor([2.25, 1.0]))


# Against explicit matrices


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize(("size", "block_size"), [(23, 5), (20, 5), (4, 50), (7, 1), (1, 3)])
def test_the_recursion_gives_the_inverse(size, block_size, dtype, rtol):
    generator = torch.Generator().manual_seed(size)
    gradients = torch.randn(9, size, generator=generator).to(dtype)
    inverse = InverseFisher(torch.zeros(size, dtype=dtype), samples=9, block_size=block_size, damping=0.01)
    for gradient in gradients:
        inverse.add_(gradient)
    expected = dense_inverse(gradients, block_size=block_size, damping=0.01)
    torch.testing.assert_close(inverse.diagonal.double(), expected.diagonal(), rtol=rtol, atol=1e-6)
    for index, block in enumerate(inverse.blocks):
        start, stop = index * min(block_size, size), min((index + 1) * block_size, size)
        width = stop - start
        torch.testing.assert_close(
            block[:width, :width].double(), expected[start:stop, start:stop], rtol=rtol, atol=1e-4
        )
        assert not block[:width, width:].any()  # what is behind the end does not matter


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_joint_change_is_the_least_that_the_quadratic_model_grows(dtype, rtol):
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(12, 23, generator=generator, dtype=torch.float64)
    weight = torch.randn(23, generator=generator, dtype=torch.float64)
    pruned = torch.rand(23, generator=generator) < 0.6
    pruned[5:10], pruned[10:15] = True, False  # a block that goes altogether, and one that stays
    inverse = InverseFisher(weight.to(dtype), samples=12, block_size=5, damping=0.01)
    for gradient in gradients:
        inverse.add_(gradient)
    change = inverse.change(weight.to(dtype), pruned, repair="joint").double()
    assert torch.equal(change[pruned], -weight.to(dtype).double()[pruned])
    whole = dense_inverse(gradients, block_size=5, damping=0.01)
    expected = -whole[:, pruned] @ torch.linalg.solve(whole[pruned][:, pruned], weight[pruned])
    torch.testing.assert_close(change, expected, rtol=rtol, atol=10 * rtol)
    assert not change[10:15].any()
    fisher = torch.linalg.inv(whole)
    growth = change @ fisher @ change
    for _ in range(50):  # any other change with the same weights pruned is worse
        other = change + torch.where(pruned, 0, 0.1 * torch.randn(23, generator=generator, dtype=torch.float64))
        assert other @ fisher @ other > growth
    summed = inverse.change(weight.to(dtype), pruned, repair="summed").double()
    single = sum(-weight[q] / whole[q, q] * whole[:, q] for q in pruned.nonzero().flatten().tolist())
    torch.testing.assert_close(summed, single, rtol=rtol, atol=10 * rtol)


def test_blocks_are_solved_in_chunks_as_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    weight, gradient = torch.randn(2, 103, generator=generator)
    inverse = InverseFisher(weight, samples=1, block_size=4, damping=0.1)
    inverse.add_(gradient)
    whole = inverse.change(weight, weight < 0, repair="joint")
    monkeypatch.setattr("sparsetwin.methods._inverse_fisher._CHUNK_ELEMENTS", 16)
    assert torch.equal(inverse.change(weight, weight < 0, repair="joint"), whole)


@pytest.mark.parametrize("repair", ["joint", "summed", "none"])
@pytest.mark.parametrize("in_each_layer", [False, True])
def test_two_prunings_follow_the_explicit_matrices(repair, in_each_layer):
    """Gradients at the weights as they are, without those of pruned weights; worth by sorting; change by solving."""
    model, plain = network(), network()
    distribution = st.Uniform() if in_each_layer else st.Global()
    optimizer, sparsifier = attached(model, repair=repair, distribution=distribution)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    weights = {name: dict(plain.named_parameters())[name] for name in PRUNED}
    masks = {name: torch.ones(weight.numel(), dtype=torch.bool) for name, weight in weights.items()}
    for step in range(5):
        sparsity = TWICE.at(step).sparsity
        if step in (1, 3):
            statistics = [buffer.clone() for buffer in plain.buffers()]
            sampled = {name: [] for name in PRUNED}
            for index in range(6):
                plain.zero_grad()
                loss_of(plain, 100 + index).backward()
                for name, weight in weights.items():
                    sampled[name].append(weight.grad.flatten() * masks[name])
            plain.zero_grad()
            for buffer, value in zip(plain.buffers(), statistics, strict=True):
                buffer.copy_(value)
            inverses = {n: dense_inverse(torch.stack(g), block_size=10, damping=1e-3) for n, g in sampled.items()}
            worth = {n: w.detach().flatten() ** 2 / inverses[n].diagonal() / 2 for n, w in weights.items()}
            old = {name: mask.clone() for name, mask in masks.items()}
            for group in [[name] for name in PRUNED] if in_each_layer else [PRUNED]:
                ranked = sorted((worth[n][i].item(), n, i) for n in group for i in range(len(worth[n])) if old[n][i])
                total = sum(len(worth[name]) for name in group)
                gone = round(sparsity * total) - sum(int((~old[name]).sum()) for name in group)
                for _, name, index in ranked[:gone]:
                    masks[name][index] = False
            for name, weight in weights.items():
                flat, pruned = weight.detach().view(-1), old[name] & ~masks[name]
                if repair == "joint":
                    within = inverses[name][pruned][:, pruned]
                    flat -= inverses[name][:, pruned] @ torch.linalg.solve(within, flat[pruned].clone())
                elif repair == "summed":
                    flat -= inverses[name][:, pruned] @ (flat / inverses[name].diagonal())[pruned]
                flat[~masks[name]] = 0
        sparsifier.begin_step()
        for name, mask in sparsifier.masks.items():
            assert torch.equal(mask.flatten(), masks[name])
            assert not model.get_parameter(name)[~mask].any()
            torch.testing.assert_close(model.get_parameter(name), weights[name], rtol=1e-8, atol=1e-10)
        for m, o in ((model, optimizer), (plain, plain_optimizer)):
            loss_of(m, step).backward()
            if sparsity and m is plain:
                for name, weight in weights.items():
                    weight.grad.view(-1)[~masks[name]] = 0
            o.step()
            o.zero_grad()
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_same_run_has_the_same_bits_and_pruned_weights_stay_pruned(optimizer):
    def trained():
        model = network(torch.float32)
        made, sparsifier = attached(model, optimizer=optimizer(model.parameters(), lr=0.01))
        masks = {}
        for step in range(5):
            sparsifier.begin_step()
            for name, mask in sparsifier.masks.items():
                assert not (mask & ~masks.get(name, mask)).any()
            masks = dict(sparsifier.masks)
            loss_of(model, step).backward()
            made.step()
            made.zero_grad()
        return list(model.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))


def test_sampling_leaves_gradients_and_batch_norm_statistics_alone():
    model = network()
    _, sparsifier = attached(model, schedule=st.schedules.constant(sparsity=0.5, total_steps=2))
    before = [buffer.clone() for buffer in model.buffers()]
    sparsifier.begin_step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


# What is refused


def test_sampled_gradients_need_a_gradient_pass():
    model = network()
    with pytest.raises(UsageError, match=r"WoodFisher samples gradients.*gradient_pass"):
        st.Sparsifier(st.WoodFisher(schedule=TWICE), model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(("gradient", "damping"), [((1e30, 1.0), 1e-20), ((1.0, float("nan")), 0.1)])
def test_a_matrix_that_has_no_inverse_in_its_precision_is_refused_by_name(gradient, damping):
    model = Two()
    method = st.WoodFisher(schedule=st.schedules.constant(sparsity=0.5, total_steps=2), samples=3, damping=damping)
    sparsifier = st.Sparsifier(
        method,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        gradient_pass=lambda index: (model.layer.weight @ torch.tensor(gradient)).sum().backward(),
    )
    with pytest.raises(SelectionError, match=r"of layer\.weight is not positive.*larger damping"):
        sparsifier.begin_step()
    assert model.layer.weight.tolist() == [[1.0, 2.0]]


def test_blocks_that_cannot_be_solved_are_refused():
    inverse = InverseFisher(torch.zeros(2), samples=1, block_size=2, damping=1.0)
    inverse.blocks.fill_(1.0)  # singular, with a positive diagonal: what rounding may leave
    inverse.check("a")
    with pytest.raises(SelectionError, match=r"lost its precision.*larger damping"):
        inverse.change(torch.ones(2), torch.tensor([True, True]), repair="joint")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"samples": 0}, ConfigError, "samples is at least 1"),
        ({"block_size": 0}, ConfigError, "block_size is at least 1"),
        ({"minimum_kept": 0}, ConfigError, "minimum_kept is at least 1"),
        ({"damping": 0.0}, ConfigError, "damping needs to be finite and at least 1e-30, got 0"),
        ({"damping": 1e-40}, ConfigError, "damping needs to be finite and at least 1e-30, got 1e-40"),
        ({"damping": float("inf")}, ConfigError, "damping needs to be finite"),
        ({"repair": "some"}, ConfigError, "repair is one of joint, summed, none, got 'some'"),
        ({"distribution": "global"}, ConfigError, "expected a distribution"),
        ({"schedule": st.schedules.phases([(1, 0.5), (1, 0.0)])}, ScheduleError, "WoodFisher brings no weight back"),
        ({"schedule": st.schedules.constant(sparsity=0.0, total_steps=1)}, ScheduleError, "needs a sparse phase"),
    ],
)
def test_what_cannot_be_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        st.WoodFisher(**{"schedule": TWICE, **fields})


# What it is for


def test_the_digits_network_loses_less_when_pruned_so_than_by_magnitude():
    data = Digits().load(None, batch_size=64, eval_batch_size=453, seed=0, device=torch.device("cpu"))
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    batches = [batch for epoch in range(12) for batch in data.train.epoch(epoch)]
    for inputs, labels in batches:
        nn.functional.cross_entropy(trained(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, classes = (torch.cat(parts) for parts in zip(*data.train.epoch(20), strict=True))

    def loss_when_pruned(method) -> float:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        model.load_state_dict(trained.state_dict())

        def gradient_pass(index):
            nn.functional.cross_entropy(model(images[index : index + 1]), classes[index : index + 1]).backward()

        made = torch.optim.SGD(model.parameters(), lr=0.1)
        st.Sparsifier(method, model, made, gradient_pass=gradient_pass).begin_step()
        return sum(nn.functional.cross_entropy(model(x), y).item() for x, y in data.test.epoch(0))

    schedule = st.schedules.constant(sparsity=0.7, total_steps=1)
    by_magnitude = loss_when_pruned(st.OneShot(schedule=schedule))
    joint, none = (
        loss_when_pruned(st.WoodFisher(schedule=schedule, repair=repair, damping=1e-3)) for repair in ("joint", "none")
    )
    assert joint < 0.9 * by_magnitude
    assert joint < 0.9 * none
