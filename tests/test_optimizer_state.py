import copy

import pytest
import torch
from torch import Tensor, nn

from sparsetwin.errors import UsageError
from sparsetwin.optimizer_state import innermost, register_initial_state, restore_initial_state_

SHAPES = [(4, 3), (5,), (2, 3, 2)]

FORGETS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd-nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd-foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "sgd-fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "sgd-maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam-amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adam-foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "adam-fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.9, 0.95)}),
    "adamw-amsgrad-fused": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "fused": True}),
    "adamw-tensor-lr": (torch.optim.AdamW, {"lr": torch.tensor(0.01)}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "nadam-decoupled-foreach": (torch.optim.NAdam, {"lr": 0.01, "decoupled_weight_decay": True, "foreach": True}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "asgd": (torch.optim.ASGD, {"lr": 0.01, "t0": 3.0, "lambd": 0.1}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "adafactor-foreach": (torch.optim.Adafactor, {"lr": 0.01, "foreach": True}),
}
DAMPENED = {
    "sgd-dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "sgd-dampening-foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "foreach": True}),
    "sgd-dampening-fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "fused": True}),
}
KEEPS = {
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop-centered-momentum": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    "adagrad-fused": (torch.optim.Adagrad, {"lr": 0.1, "fused": True}),
}


def parameters(shapes=SHAPES, seed=0, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def train(optimizer, weights, steps: range) -> list[list[Tensor]]:
    trajectory = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trajectory.append([weight.detach().clone() for weight in weights])
    return trajectory


def tensors_of(optimizer, weights) -> dict[tuple[int, str], Tensor]:
    return {
        (i, key): value
        for i, weight in enumerate(weights)
        for key, value in optimizer.state[weight].items()
        if isinstance(value, Tensor)
    }


def assert_continues_as_a_fresh_one(kind, options, weights, *, lr_after=None):
    optimizer = kind(weights, **options)
    train(optimizer, weights, range(4))
    held = tensors_of(optimizer, weights)
    addresses = {key: tensor.data_ptr() for key, tensor in held.items()}
    if lr_after is not None:
        optimizer.param_groups[0]["lr"] = lr_after
        options = {**options, "lr": lr_after}

    assert all(weight.grad is None for weight in weights)
    restore_initial_state_(optimizer, weights)

    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    fresh = kind(others, **options)
    pairs = zip(train(optimizer, weights, range(4, 10)), train(fresh, others, range(4, 10)), strict=True)
    assert all(torch.equal(a, b) for step in pairs for a, b in zip(*step, strict=True))
    return optimizer, held, addresses


@pytest.mark.parametrize("name", FORGETS)
def test_after_restoring_every_update_has_the_bits_of_a_fresh_optimizer_and_state_is_in_place(name):
    kind, options = FORGETS[name]
    weights = parameters()
    optimizer, held, addresses = assert_continues_as_a_fresh_one(kind, options, weights)
    assert all(optimizer.state[weights[i]][key] is tensor for (i, key), tensor in held.items())
    assert {key: tensor.data_ptr() for key, tensor in held.items()} == addresses


@pytest.mark.parametrize("name", DAMPENED)
def test_dampened_sgd_makes_its_undampened_first_step_again(name):
    kind, options = DAMPENED[name]
    assert_continues_as_a_fresh_one(kind, options, parameters())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_continues_as_a_fresh_one_in_place(nesterov):
    weights = parameters([(4, 3), (3, 5)])
    optimizer, held, _ = assert_continues_as_a_fresh_one(torch.optim.Muon, {"nesterov": nesterov}, weights)
    assert all(optimizer.state[weights[i]][key] is tensor for (i, key), tensor in held.items())


@pytest.mark.parametrize("name", ["asgd", "rprop"])
def test_state_that_begins_with_the_learning_rate_begins_with_todays(name):
    kind, options = FORGETS[name]
    assert_continues_as_a_fresh_one(kind, options, parameters(), lr_after=0.005)


@pytest.mark.parametrize("name", ["adam-amsgrad", "nadam", "rprop", "asgd", "sgd-momentum"])
def test_complex_and_double_parameters_continue_as_with_a_fresh_one(name):
    kind, options = FORGETS[name]
    assert_continues_as_a_fresh_one(kind, options, parameters(dtype=torch.complex64))
    assert_continues_as_a_fresh_one(kind, options, parameters(dtype=torch.float64))


def test_sparse_adam_with_its_python_step_continues_as_a_fresh_one():
    def sparse_steps(optimizer, weight, steps):
        for step in steps:
            rows, values = torch.tensor([[0, 2 + step % 2]]), torch.full((2, 3), 0.1 * (step + 1))
            weight.grad = torch.sparse_coo_tensor(rows, values, (4, 3), check_invariants=True)
            optimizer.step()
        return weight

    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.SparseAdam([weight], lr=0.1)
    sparse_steps(optimizer, weight, range(3))
    moment = optimizer.state[weight]["exp_avg"]
    restore_initial_state_(optimizer, [weight])
    assert type(optimizer.state[weight]["step"]) is int
    assert optimizer.state[weight]["exp_avg"] is moment
    other = nn.Parameter(weight.detach().clone())
    fresh = torch.optim.SparseAdam([other], lr=0.1)
    assert torch.equal(sparse_steps(optimizer, weight, range(3, 6)), sparse_steps(fresh, other, range(3, 6)))


def test_a_step_that_is_a_python_number_returns_to_zero():
    weights = parameters()
    optimizer = torch.optim.Adam(weights)
    train(optimizer, weights, range(2))
    optimizer.state[weights[0]]["step"] = 2.0
    restore_initial_state_(optimizer, weights)
    assert repr(optimizer.state[weights[0]]["step"]) == "0.0"


@pytest.mark.parametrize("name", KEEPS)
def test_optimizers_without_bias_correction_keep_second_moments_and_lose_momentum(name):
    kind, options = KEEPS[name]
    weights = parameters()
    optimizer = kind(weights, **options)
    train(optimizer, weights, range(4))
    before = copy.deepcopy([optimizer.state[weight] for weight in weights])
    held = tensors_of(optimizer, weights)
    restore_initial_state_(optimizer, weights)
    for old, weight in zip(before, weights, strict=True):
        for key, value in optimizer.state[weight].items():
            expected = torch.zeros_like(value) if key == "momentum_buffer" else old[key]
            assert torch.equal(value, expected), key
    assert all(optimizer.state[weights[i]][key] is tensor for (i, key), tensor in held.items())
    assert all(torch.isfinite(weight).all() for weight in train(optimizer, weights, range(4, 9))[-1])


def test_every_optimizer_of_this_torch_is_known():
    covered = {kind for kind, _ in {**FORGETS, **DAMPENED, **KEEPS}.values()} | {torch.optim.SparseAdam}
    covered |= {torch.optim.LBFGS, torch.optim.Optimizer, getattr(torch.optim, "Muon", torch.optim.SGD)}
    found = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)}
    assert {kind for kind in found if issubclass(kind, torch.optim.Optimizer)} <= covered


def test_gradients_that_are_none_do_not_prevent_the_reset():
    # The published code skips parameters without a gradient, which since torch 2.0 is every one after zero_grad().
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    train(optimizer, [weight], range(3))
    assert weight.grad is None
    assert optimizer.state[weight]["momentum_buffer"].abs().sum() > 0
    restore_initial_state_(optimizer, [weight])
    assert not optimizer.state[weight]["momentum_buffer"].any()


def test_only_the_given_parameters_are_touched():
    weights = parameters()
    optimizer = torch.optim.Adam(weights)
    train(optimizer, weights, range(3))
    untouched = copy.deepcopy([optimizer.state[weight] for weight in weights[1:]])
    restore_initial_state_(optimizer, iter([weights[0], weights[0]]))
    assert optimizer.state[weights[0]]["step"] == 0
    for old, weight in zip(untouched, weights[1:], strict=True):
        assert all(torch.equal(old[key], optimizer.state[weight][key]) for key in old)


def test_parameters_without_state_or_of_another_optimizer_get_none():
    mine, foreign = parameters()[:2]
    optimizer = torch.optim.Adam([mine])
    restore_initial_state_(optimizer, [mine, foreign])
    assert len(optimizer.state) == 0


def test_lbfgs_is_refused_by_name():
    with pytest.raises(UsageError, match="LBFGS keeps one history for all parameters"):
        restore_initial_state_(torch.optim.LBFGS(parameters()), [])


def test_fused_sgd_with_dampening_restores_all_or_refuses():
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    train(optimizer, weights, range(2))
    before = optimizer.state[weights[0]]["momentum_buffer"]
    with pytest.raises(UsageError, match="fused SGD with dampening"):
        restore_initial_state_(optimizer, weights[:1])
    assert optimizer.state[weights[0]]["momentum_buffer"] is before


class MyAdam(torch.optim.Adam):
    """A subclass that adds nothing."""


class AdamWithMore(torch.optim.Adam):
    def step(self, closure=None):
        loss = super().step(closure)
        for state in self.state.values():
            state["slow_weights"] = torch.ones(1)
        return loss


class Lazy(torch.optim.Optimizer):
    """Makes its state at the first step of a parameter; begins with ones."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["second"] = torch.ones_like(weight)
                state["second"].mul_(0.9).addcmul_(weight.grad, weight.grad, value=0.1)
                weight.addcdiv_(weight.grad, state["second"].sqrt(), value=-group["lr"])


class Eager(Lazy):  # makes its state in a method that the constructor calls
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.prepare()

    def prepare(self):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["second"] = torch.ones_like(weight)


class CountsInGroup(Lazy):
    """Counts the steps of a whole group, as several fused implementations do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


def test_a_subclass_follows_the_rule_of_its_base():
    assert_continues_as_a_fresh_one(MyAdam, {"lr": 0.01}, parameters())


def test_a_subclass_with_unknown_state_is_refused_before_anything_changes():
    weights = parameters()
    optimizer = AdamWithMore(weights)
    train(optimizer, weights, range(2))
    with pytest.raises(UsageError, match=r"slow_weights.*register_initial_state\(AdamWithMore"):
        restore_initial_state_(optimizer, weights)
    assert all(optimizer.state[weight]["step"] == 2 for weight in weights)


def test_an_unknown_optimizer_makes_its_own_initial_state_at_the_next_step():
    optimizer, *_ = assert_continues_as_a_fresh_one(Lazy, {"lr": 0.1}, weights := parameters())
    other = optimizer.state[weights[1]]["second"]
    restore_initial_state_(optimizer, weights[:1])
    assert weights[0] not in optimizer.state
    assert optimizer.state[weights[1]]["second"] is other


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Eager, "makes its state when it is constructed"), (CountsInGroup, r"counts steps in its parameter groups \('st")],
)
def test_an_unknown_optimizer_that_cannot_make_new_state_is_refused_by_name(kind, message):
    weights = parameters()
    optimizer = kind(weights)
    train(optimizer, weights, range(2))
    with pytest.raises(UsageError, match=message):
        restore_initial_state_(optimizer, weights)
    assert all(optimizer.state[weight] for weight in weights)


def test_a_registered_rule_serves_an_optimizer_in_place():
    class Registered(Eager):
        pass

    with pytest.raises(UsageError, match=r"subclass of torch\.optim\.Optimizer"):
        register_initial_state("Registered", lambda state, group: None)
    register_initial_state(Registered, lambda state, group: state["second"].fill_(group["lr"]))
    weights = parameters()
    optimizer = Registered(weights, lr=0.25)
    train(optimizer, weights, range(2))
    held = optimizer.state[weights[0]]["second"]
    restore_initial_state_(optimizer, weights)
    assert optimizer.state[weights[0]]["second"] is held
    assert torch.equal(held, torch.full((4, 3), 0.25))


class Wrapper:  # as Lightning's
    def __init__(self, optimizer):
        self.optimizer = optimizer


class OptimizerWrapper(torch.optim.Optimizer):  # as accelerate's: without hook tables of its own
    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state


def test_innermost_finds_the_optimizer_with_the_hook_tables_and_restoring_looks_there():
    weights = parameters()
    optimizer = torch.optim.Adam(weights)
    train(optimizer, weights, range(2))
    restore_initial_state_(OptimizerWrapper(optimizer), weights)
    assert optimizer.state[weights[0]]["step"] == 0
    for wrapped in (optimizer, Wrapper(optimizer), OptimizerWrapper(optimizer), Wrapper(OptimizerWrapper(optimizer))):
        assert innermost(wrapped) is optimizer
    optimizer.optimizer = optimizer
    assert innermost(optimizer) is optimizer
    optimizer.optimizer = "a name"
    assert innermost(optimizer) is optimizer


@pytest.mark.parametrize("thing", [None, nn.Linear(1, 1), Wrapper(None), Wrapper("sgd")])
def test_innermost_refuses_what_holds_no_optimizer(thing):
    with pytest.raises(UsageError, match=r"expected a torch\.optim\.Optimizer"):
        innermost(thing)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "nadam", "asgd"])
def test_sharded_parameters_are_restored_in_place(mesh, name):
    from torch.distributed.tensor import Shard, distribute_tensor

    kind, options = FORGETS[name]
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = kind([weight], **options)
    for _ in range(3):
        weight.grad = distribute_tensor(torch.full((4, 3), 0.5), mesh, [Shard(0)])
        optimizer.step()
    held = dict(optimizer.state[weight])
    restore_initial_state_(optimizer, [weight])
    plain = nn.Parameter(weight.detach().to_local().clone())
    fresh = kind([plain], **options)
    weight.grad = distribute_tensor(torch.full((4, 3), 0.5), mesh, [Shard(0)])
    plain.grad = torch.full((4, 3), 0.5)
    optimizer.step()
    fresh.step()
    assert torch.equal(weight.detach().to_local(), plain)
    assert all(optimizer.state[weight][key] is value for key, value in held.items())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Rprop])
def test_capturable_state_on_the_device_is_restored_in_place(kind):
    weights = [nn.Parameter(weight.detach().cuda()) for weight in parameters()]
    optimizer, held, addresses = assert_continues_as_a_fresh_one(kind, {"lr": 0.01, "capturable": True}, weights)
    assert all(optimizer.state[weights[i]][key] is tensor and tensor.is_cuda for (i, key), tensor in held.items())
    assert {key: tensor.data_ptr() for key, tensor in held.items()} == addresses
