"""CrAM: two gradients a step, by hand and against a loop that shares no code with it."""

import math

import pytest
import torch
from small_network import PRUNED, batch, loss_of, network
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ConfigError, ScheduleError, SelectionError, UsageError

DENSE = st.schedules.constant(sparsity=0.0, total_steps=8)
OPTIMIZERS = {
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, lr=0.125, momentum=0.9, **options),
    "adamw": lambda parameters, **options: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, **options),
}


class Trial:
    """A model that CrAM trains."""

    def __init__(self, *, optimizer="sgd", schedule=DENSE, seed=3, model=None, options=None, **fields) -> None:
        self.model = network() if model is None else model
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), **(options or {}))
        self.sparsifier = st.Sparsifier(st.CrAM(schedule=schedule, **fields), self.model, self.optimizer, seed=seed)
        self.passes = 0

    def closure(self, scaler=None):
        step = self.sparsifier.steps

        def closure() -> torch.Tensor:
            self.passes += 1
            loss = loss_of(self.model, step)
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        return closure

    def step(self) -> torch.Tensor:
        loss = self.sparsifier.backward(self.closure())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def bits(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.model.state_dict().values()]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # the loss is |w - t|^2 / 2 with t = (0, 0, 1, 0): g = w - t = (1, -0.5, -0.8, 0.1); w + g / 2 =
        # (1.5, -0.75, -0.2, 0.15), of which two are kept; there the gradient is (1.5, -0.75, -1, 0)
        ({}, [1 - 0.1 * 2.5, -0.5 + 0.1 * 1.25, 0.2 + 0.1 * 0.8, 0.1 - 0.1 * 0.1]),
        ({"sparse_gradients": False}, [1 - 0.1 * 2.5, -0.5 + 0.1 * 1.25, 0.2 + 0.1 * 1.8, 0.1 - 0.1 * 0.1]),
        ({"plus": False}, [1 - 0.1 * 1.5, -0.5 + 0.1 * 0.75, 0.2, 0.1]),
        ({"plus": False, "sparse_gradients": False}, [1 - 0.1 * 1.5, -0.5 + 0.1 * 0.75, 0.2 + 0.1, 0.1]),
    ],
)
def test_a_step_by_hand(fields, expected):
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -0.5, 0.2, 0.1]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(st.CrAM(schedule=DENSE, rho=0.5, sparsities=(0.5,), **fields), layer, optimizer)

    def closure():
        loss = (layer.weight - torch.tensor([[0.0, 0.0, 1.0, 0.0]])).square().sum() / 2
        loss.backward()
        return loss

    loss = sparsifier.backward(closure)
    assert loss.item() == pytest.approx((1 + 0.25 + 0.64 + 0.01) / 2)  # at the weights themselves
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([expected]))


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("sparse_gradients", "in_each_layer"), [(True, False), (False, True)])
def test_it_follows_the_plain_loop(optimizer, plus, sparse_gradients, in_each_layer):
    """The published step: up along the gradient in every parameter, the largest kept, statistics of the first pass."""
    rho, sparsities, generator = 0.25, (0.25, 0.5, 0.75), torch.Generator().manual_seed(3)
    trial = Trial(
        optimizer=optimizer,
        rho=rho,
        sparsities=sparsities,
        plus=plus,
        sparse_gradients=sparse_gradients,
        distribution=st.Uniform() if in_each_layer else st.Global(),
    )
    plain = network()
    plain_optimizer = OPTIMIZERS[optimizer](plain.parameters())
    parameters = dict(plain.named_parameters())
    groups = [[name] for name in PRUNED] if in_each_layer else [list(PRUNED)]
    drawn = set()
    for step in range(8):
        trial.step()
        loss_of(plain, step).backward()
        first = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        plain_optimizer.zero_grad()
        sparsity = sparsities[int(torch.randint(3, (), generator=generator))]
        drawn.add(sparsity)
        masks = {}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += rho * first[name]
            for group in groups:
                everything = torch.cat([parameters[name].abs().flatten() for name in group])
                kept = len(everything) - round(sparsity * len(everything))
                least = everything.sort(descending=True).values[kept - 1]
                masks |= {name: (parameters[name].abs() >= least).float() for name in group}
            for name, mask in masks.items():
                parameters[name] *= mask
        plain[1].momentum = 0.0  # the running statistics are not those of the compressed weights
        loss_of(plain, step).backward()
        plain[1].momentum = 0.1
        with torch.no_grad():
            for name, parameter in parameters.items():
                if sparse_gradients and name in masks:
                    parameter.grad *= masks[name]
                parameter.copy_(weights[name])
                if plus:
                    parameter.grad += first[name]
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        for name, tensor in plain.state_dict().items():
            found = trial.model.state_dict()[name]
            expected = torch.tensor(step + 1) if name.endswith("num_batches_tracked") else tensor
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(drawn) > 1
    assert trial.passes == 16


def test_a_sparse_phase_is_a_cut_by_magnitude_and_one_pass_a_step():
    trial = Trial(schedule=st.schedules.phases([(3, 0.0), (2, 0.75), (2, 0.9)]))
    for step in range(7):
        if step == 3:
            trial.sparsifier.begin_step()  # cut here: only evaluate, re-estimate batch norms and save, if that is all
            weights = torch.cat([weight.detach().abs().flatten() for weight in trial.sparsifier.weights.values()])
            assert int(weights.count_nonzero()) == 443 - round(0.75 * 443)
        trial.step()
        assert trial.passes == (2 * step + 2 if step < 3 else 6 + step - 2)
    assert sum(int(mask.sum()) for mask in trial.sparsifier.masks.values()) == 443 - round(0.9 * 443)


def test_the_seed_decides_which_sparsities_are_drawn():
    def trained(seed):
        trial = Trial(seed=seed, sparsities=(0.1, 0.9))
        for _ in range(6):
            trial.step()
        return trial.bits()

    assert_equal(trained(1), trained(1))
    assert not torch.equal(trained(1)[0], trained(2)[0])


def test_a_sparsity_of_zero_is_sharpness_aware_minimization_without_a_norm():
    trial, rho = Trial(sparsities=(0.0,), rho=0.5, plus=False), 0.5
    plain = network()
    first = torch.autograd.grad(loss_of(plain, 0), list(plain.parameters()))
    up = network()
    with torch.no_grad():
        for parameter, gradient in zip(up.parameters(), first, strict=True):
            parameter += rho * gradient
    second = torch.autograd.grad(loss_of(up, 0), list(up.parameters()))
    trial.sparsifier.backward(trial.closure())
    for parameter, gradient in zip(trial.model.parameters(), second, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# The seam: what is in .grad before, scalers, errors


def test_two_dimensional_patterns_compress_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    method = st.CrAM(schedule=DENSE, sparsities=(0.5,), pattern=st.NM(2, 4))
    sparsifier = st.Sparsifier(method, model, optimizer)

    def closure():
        seen.append(model[0].weight.detach().clone())
        loss = model(torch.ones(3, 8)).square().mean()
        loss.backward()
        return loss

    sparsifier.backward(closure)
    assert seen[0].count_nonzero() == 64
    assert torch.equal((seen[1] != 0).view(8, 2, 4).sum(-1), torch.full((8, 2), 2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scaler_leaves_the_step_as_it_is(optimizer, fused):
    plain, scaled = (Trial(optimizer=optimizer, options={"fused": fused}) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)  # a power of two, which grows
    for step in range(8):
        plain.step()
        scaled.sparsifier.backward(scaled.closure(scaler), scaler=scaler)
        if step % 2:
            scaler.unscale_(scaled.optimizer)
        scaler.step(scaled.optimizer)
        scaler.update()
        scaled.optimizer.zero_grad()
        assert_equal(scaled.bits(), plain.bits())
    assert scaler.get_scale() == 2.0**14


def test_a_scaler_that_is_not_given_is_refused_where_it_shows():
    trial, scaler = Trial(options={"fused": True}), torch.amp.GradScaler("cpu", init_scale=2.0)
    trial.sparsifier.backward(trial.closure(scaler))
    with pytest.raises(UsageError, match=r"call sparsifier\.backward\(closure, scaler=scaler\)"):
        scaler.step(trial.optimizer)


@pytest.mark.parametrize("overflowing_pass", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_in_either_pass_skips_the_step(overflowing_pass, fused):
    trial, scaler = Trial(options={"fused": fused}), torch.amp.GradScaler("cpu", init_scale=2.0)
    for _ in range(2):
        trial.step()
    before, passes = trial.bits(), trial.passes
    inner = trial.closure(scaler)

    def closure():
        loss = inner()
        if trial.passes == passes + overflowing_pass:
            trial.model[4].bias.grad[0] = math.inf
        return loss

    generator = trial.sparsifier.state_dict()["rng"]
    trial.sparsifier.backward(closure, scaler=scaler)
    assert trial.passes == passes + overflowing_pass
    scaler.step(trial.optimizer)
    scaler.update()
    assert trial.sparsifier.steps == 2
    assert torch.equal(trial.sparsifier.state_dict()["rng"], generator) == (overflowing_pass == 1)
    names = list(trial.model.state_dict())
    for name, tensor, old in zip(names, trial.bits(), before, strict=True):
        assert torch.equal(tensor, old) == (not name.startswith("1.running") and "tracked" not in name), name
    trial.optimizer.zero_grad()
    trial.step()
    assert trial.sparsifier.steps == 3


def test_gradients_of_an_earlier_batch_are_refused():
    trial = Trial()
    trial.sparsifier.backward(trial.closure())
    with pytest.raises(UsageError, match=r"0\.weight has a gradient before backward\(closure\).*micro-batches"):
        trial.sparsifier.backward(trial.closure())
    trial.optimizer.zero_grad(set_to_none=False)  # zeros are no gradients
    trial.sparsifier.backward(trial.closure())


def test_a_closure_over_micro_batches_is_one_over_their_batch():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 4))

    whole, parts = Trial(model=model(), rho=0.5), Trial(model=model(), rho=0.5)
    for step in range(5):
        whole.step()
        inputs, labels = batch(step)

        def closure(inputs=inputs, labels=labels):
            losses = []
            for x, y in zip(inputs.chunk(3), labels.chunk(3), strict=True):
                losses.append(nn.functional.cross_entropy(parts.model(x), y) / 3)
                losses[-1].backward()
            return sum(losses)

        parts.sparsifier.backward(closure)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        torch.testing.assert_close(parts.bits(), whole.bits(), rtol=1e-4, atol=1e-5)


def test_a_closure_that_fails_leaves_weights_and_statistics():
    trial = Trial()
    before, inner = trial.bits(), trial.closure()

    def closure():
        if trial.passes == 1:
            raise ValueError("no more")
        return inner()

    with pytest.raises(ValueError, match="no more"):
        trial.sparsifier.backward(closure)
    names = list(trial.model.state_dict())
    for name, tensor, old in zip(names, trial.bits(), before, strict=True):
        assert torch.equal(tensor, old) == (not name.startswith("1.running") and "tracked" not in name), name


def test_a_gradient_that_is_not_a_number_is_refused_by_name_and_leaves_the_weights():
    trial = Trial()
    before, inner = trial.bits(), trial.closure()

    def closure():
        loss = inner()
        trial.model[4].weight.grad[0, 0] = math.nan
        return loss

    with pytest.raises(SelectionError, match=r"4\.weight"):
        trial.sparsifier.backward(closure)
    assert torch.equal(trial.bits()[0], before[0])
    assert trial.model[4].weight.isfinite().all()


def test_parameters_without_a_gradient_stay_without():
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    model[0].bias.requires_grad_(False)
    trial = Trial(model=model)
    trial.sparsifier.backward(trial.closure())
    assert model.unused.grad is None
    assert model[0].bias.grad is None
    trial.optimizer.step()
    assert torch.equal(model.unused.detach(), torch.ones(3))


def test_a_loop_without_closure_is_refused_by_name():
    trial = Trial()
    trial.sparsifier.begin_step()
    loss_of(trial.model, 0).backward()
    with pytest.raises(UsageError, match=r"CrAM passes more than once over a batch; call sparsifier\.backward"):
        trial.optimizer.step()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"sparsities": ()}, ConfigError, "one or more numbers"),
        ({"sparsities": 0.5}, ConfigError, r"one or more numbers in \[0, 1\), got 0\.5"),
        ({"sparsities": "0.5"}, ConfigError, "got '0.5'"),
        ({"sparsities": (0.5, 1.0)}, ConfigError, r"in \[0, 1\), got \(0\.5, 1\.0\)"),
        ({"rho": -0.1}, ConfigError, "rho needs to be"),
        ({"rho": math.nan}, ConfigError, "rho needs to be"),
        ({"score": "random"}, ConfigError, "compresses by magnitude"),
        ({"schedule": st.schedules.constant(sparsity=0.5, total_steps=3)}, ScheduleError, "a dense phase, and then"),
        ({"schedule": st.schedules.phases([(1, 0.0), (1, 0.5), (1, 0.0)])}, ScheduleError, "rising sparsity"),
    ],
)
def test_what_cannot_be_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        st.CrAM(**{"schedule": DENSE, **fields})


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (None, (0.5, 0.7, 0.9)),
        (0.5, (0.5, 0.7, 0.9)),
        (0.9, (0.5, 0.7, 0.9)),
        (0.93, (0.5, 0.7, 0.8, 0.9, 0.95)),
        (0.95, (0.5, 0.7, 0.8, 0.9, 0.95)),
        (0.98, (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)),
    ],
)
def test_the_published_sparsities_for_the_final_one_are_drawn(final, expected):
    schedule = DENSE if final is None else st.schedules.phases([(4, 0.0), (4, final)])
    method = st.CrAM(schedule=schedule)
    assert method.drawn_sparsities == expected
    assert method.config()["sparsities"] == list(expected)
    assert st.CrAM(schedule=schedule, sparsities=[0.6]).drawn_sparsities == (0.6,)


def test_the_list_of_the_final_sparsity_trains_like_the_same_list_given():
    schedule, bits = st.schedules.phases([(12, 0.0), (1, 0.95)]), []
    for fields in ({}, {"sparsities": (0.5, 0.7, 0.8, 0.9, 0.95)}, {"sparsities": (0.5, 0.7, 0.9)}):
        trial = Trial(schedule=schedule, **fields)
        for _ in range(12):
            trial.step()
        bits.append(trial.bits())
    assert_equal(bits[0], bits[1])
    assert not all(torch.equal(a, b) for a, b in zip(bits[0], bits[2], strict=True))


def test_a_sparsity_that_leaves_a_layer_empty_is_refused_before_training():
    with pytest.raises(SelectionError, match="3"):
        Trial(sparsities=(0.5, 0.999))
