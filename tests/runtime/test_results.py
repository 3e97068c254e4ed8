"""What a deployed network returns is the caller's: no later call, and no later layer, writes into it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error

from sparsetwin.runtime import deploy
from sparsetwin.runtime._graph import Torch
from sparsetwin.runtime._native import hides_view
from sparsetwin.runtime._tensors import may_be_view

aten = torch.ops.aten
VIEWS = {  # that no schema tells of; each gets (6, 6)
    "alpha_dropout": lambda y: torch.alpha_dropout(y, 0.5, False),
    "atleast_1d": torch.atleast_1d,
    "atleast_2d": torch.atleast_2d,
    "atleast_3d": lambda y: torch.atleast_3d(y)[:, :, 0],
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, y)[1],
    "cartesian_prod": lambda y: torch.cartesian_prod(y.reshape(-1)).reshape(6, 6),
    "conj_physical": torch.conj_physical,
    "einsum": lambda y: torch.einsum("ij->ji", y),
    "feature_alpha_dropout": lambda y: torch.feature_alpha_dropout(y, 0.5, False),
    "meshgrid": lambda y: torch.meshgrid(y.reshape(-1), y.reshape(-1), indexing="ij")[0][:, :6],
    "sum_to_size": lambda y: y.sum_to_size(6, 6),
    "type_as": lambda y: y.type_as(torch.zeros(1)),
    "unsafe_chunk": lambda y: torch.unsafe_chunk(y, 2, 1)[0].sum() + torch.unsafe_chunk(y, 1, 1)[0],
    "unsafe_split": lambda y: torch.unsafe_split(y, 6, 1)[0],
}


class Seen(nn.Module):
    """Two linear layers; a view of what the second, or the first, makes is used where memory might be used again."""

    def __init__(self, view, *, inside: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.view, self.inside = view, inside

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            return self.view(self.b(F.relu(self.a(x))))
        y = self.view(self.a(x))
        return self.c(torch.sigmoid(self.b(torch.sigmoid(y)))).sum() * y


def seen(name: str, *, inside: bool) -> nn.Module:
    torch.manual_seed(0)
    return pruned(Seen(VIEWS[name], inside=inside), 0.5).requires_grad_(False)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_what_a_kernel_wrote_outlives_the_next_call(name):
    model, x = seen(name, inside=False), images(6, 6)
    made = program(graph_of(model, x)).program
    (first,) = made.run([x])
    kept = first.clone()
    made.run([-x])
    assert torch.equal(first, kept)
    assert relative_error(first, model(x)) <= FP32


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_what_a_kernel_wrote_outlives_the_layers_behind_it(name):
    model, x = seen(name, inside=True), images(6, 6)
    (found,) = program(graph_of(model, x)).program.run([x])
    assert relative_error(found, model(x)) <= FP32


def test_an_activation_in_place_changes_what_a_view_shows():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return F.relu_(torch.einsum("ij->ji", y)) + y.t()

    x = images(6, 6)
    expected = InPlace()(x)
    (found,) = program(graph_of(InPlace(), x)).program.run([x])
    assert torch.equal(found, expected)


A, B, P = images(6, 6), images(1, 6, 4, 4), torch.ones(6)
NEW = {  # made of others, and their results share nothing with their arguments
    aten.adaptive_avg_pool2d.default: (B, (1, 1)),
    aten.batch_norm.default: (B, P, P, P, P, False, 0.1, 1e-5, False),
    aten.conv1d.default: (A, torch.ones(6, 6, 1)),
    aten.conv2d.default: (B, torch.ones(6, 6, 1, 1)),
    aten.group_norm.default: (B, 1),
    aten.layer_norm.default: (A, (6,)),
    aten.linear.default: (A, torch.eye(6)),
    aten.log_softmax.int: (A, 1),
    aten.matmul.default: (A, torch.eye(6)),
    aten.max_pool2d.default: (B, 1),
    aten.scaled_dot_product_attention.default: (B, B, B),
    aten.softmax.int: (A, 1),
}


@pytest.mark.parametrize("function", NEW, ids=str)
def test_operations_that_always_compute_something_new_do_so(function):
    arguments = NEW[function]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
    assert not hides_view(function)
    memory = {part.untyped_storage().data_ptr() for part in arguments if isinstance(part, Tensor)}
    assert function(*arguments).untyped_storage().data_ptr() not in memory


def test_what_pytorch_runs_between_kernels_is_known_as_a_view_or_not():
    graph = graph_of(seen("type_as", inside=True), images(6, 6))
    found = {
        str(node.operation.function): may_be_view(node) for node in graph.nodes if isinstance(node.operation, Torch)
    }
    assert found["aten.type_as.default"]
    assert not found["aten.sigmoid.default"]


class Constants(nn.Module):
    """Returns constants, and views of them, beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)
        self.register_buffer("table", images(6, 6, seed=3))
        self.register_buffer("large", torch.arange(5_000_000.0))  # too large to be computed once

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(x.shape[1]).float()
        return self.f(x), positions, self.table, self.large[:6], self.large.view(-1), self.table.expand_as(x)


@pytest.mark.parametrize("planes", [True, False])
def test_a_caller_may_change_constant_results_and_no_later_call_shows_it(planes):
    torch.manual_seed(0)
    model, x = Constants().eval().requires_grad_(False), images(6, 6)
    made = program(graph_of(model, x), planes=planes).program
    for _ in range(2):
        results = made.run([x])
        for found, expected in zip(results, model(x), strict=True):
            assert relative_error(found, expected) <= FP32
            found.mul_(0)
    assert float(model.table.abs().max()) > 0


IN_PLACE = {
    "added to zeros": lambda x: torch.zeros(6, 6).add_(x),
    "an activation of a constant": lambda x: x + F.silu(torch.arange(6.0), inplace=True),
    "a buffer of zeros, filled": lambda x: torch.zeros(6, 12).index_add_(1, torch.arange(6), x),
    "written into": lambda x: torch.ones(6, 6).mul_(2).sub_(x),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_a_call_makes_and_changes_in_place_begins_anew_in_the_next(name):
    class Filled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return IN_PLACE[name](x)

    x = images(6, 6)
    made = program(graph_of(Filled(), x)).program
    for number in range(3):
        assert torch.equal(made.run([x + number])[0], Filled()(x + number))


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.inner(x.sub_(shift))


def test_deploy_leaves_the_example_as_it_is_and_a_call_changes_its_input_once():
    torch.manual_seed(0)
    model, x, shift = ChangesItsInput().eval().requires_grad_(False), images(4, 6), images(4, 6, seed=2)
    given = x.clone()
    deployed = deploy(model, {"x": given, "shift": shift}, rivals=())
    assert torch.equal(given, x)
    assert "changes its input x" in str(deployed.plan)
    for rows in (4, 3):  # as planned, and planned in the call
        y, z = x[:rows].clone(), x[:rows].clone()
        found = deployed(y, shift=shift[:rows])
        assert relative_error(found, model(z, shift=shift[:rows])) <= FP32
        assert torch.equal(y, z)
