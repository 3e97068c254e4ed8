"""Whole networks with float16 planes: near themselves, scaled by calibration, and what plans and files make of them.

Where the machine has no such arithmetic, it is emulated: rounded to float16 after each operation, and slow. So it is
never the fastest, and tests that need it chosen build the plan's entry themselves.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP16, FP32, emulated_half, graph_of, images, program, pruned, relative_error, slim

from sparsetwin.checkpoint import save_sparse
from sparsetwin.errors import CheckpointError, SparsityWarning
from sparsetwin.kernels import host_target
from sparsetwin.kernels._dot import emulated_dot, host_dot
from sparsetwin.models import build
from sparsetwin.runtime import Deployed, deploy
from sparsetwin.runtime._calls import Call, Caller
from sparsetwin.runtime._choices import Choice, half_choices, measured_choices
from sparsetwin.runtime._entries import HALF, HALF_MIXED, Entry, Made, make
from sparsetwin.runtime._file import _decoded_half, _encoded_half
from sparsetwin.runtime._graph import Graph, Layer, Node
from sparsetwin.runtime._half import Half, exponents_for, largest_values
from sparsetwin.runtime._half_programs import half_programs
from sparsetwin.runtime._load import loaded
from sparsetwin.runtime._lowering import can_use_planes
from sparsetwin.runtime._network import InFile, InMemory, opened
from sparsetwin.runtime._planner import Planner
from sparsetwin.runtime._products import Packed, density_of
from sparsetwin.runtime._reduced import dense_planes

pytestmark = pytest.mark.skipif(not host_target().half, reason="float16 would be converted by library calls here")


def half_program(graph: Graph, *calibration: list[torch.Tensor], threads: int = 1, dense_above: float = 1.0) -> Made:
    """A program with every node on float16 planes that can be; nothing is measured."""

    def one(node: Node) -> Choice:
        if not can_use_planes(graph, node):
            return Choice(engine="dense", dot="amx")
        dense = isinstance(node.operation, Layer) and density_of(node) > dense_above
        return Choice(engine="dense planes" if dense else "planes", dot="amx")

    choices = {node.output: one(node) for node in graph.nodes}
    exponents = exponents_for(graph, largest_values(graph, calibration))
    half = Half(target=emulated_half(), exponents=exponents)
    return make(graph, choices, packed=Packed(half=half), threads=threads)


def planner(model: nn.Module, **terms: object) -> Planner:
    return Planner(network=InMemory(model), threads=1, reduced=True, rivals=(), half=emulated_half(), **terms)


def call_of(model: nn.Module, *arguments: torch.Tensor) -> Call:
    return Caller(InMemory(model).signature).call(arguments, {})


def chosen(source: Planner, call: Call, *calibration: list[torch.Tensor], made: Made | None = None) -> Entry:
    """The entry that a planner would return if float16 were the fastest."""
    entry, name = source.entry(call), HALF if made is None else HALF_MIXED
    graph = source.network.graph(call.arguments, call.named)
    made = replace(made or half_program(graph, *calibration), float32=entry.program.choices)
    seconds = {**entry.plan.candidates, name: 0.0}
    return replace(entry, run=made.run, program=made, plan=replace(entry.plan, engine=name, candidates=seconds))


@torch.no_grad()
def reference(model: nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
    y = model.double()(*(x.double() if x.is_floating_point() else x for x in arguments)).float()
    model.float()
    return y


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("name", "shape", "density"),
    [
        ("resnet20", (5, 3, 32, 32), 0.1),
        ("resnet20", (1, 3, 27, 33), 1.0),
        ("mobilenetv1", (1, 3, 64, 64), 0.2),
        ("digits_cnn", (5, 1, 8, 8), 0.3),
    ],
)
def test_networks_are_near_themselves_and_choose_the_same_class(name, shape, density, calibrated):
    torch.manual_seed(0)
    model, x = pruned(build(name), density), images(*shape)
    graph = graph_of(model, x)
    (y,) = half_program(graph, *([[x]] if calibrated else [])).program.run([x])
    expected = reference(model, x)
    assert relative_error(y, expected) <= FP16
    best = expected.sort(dim=-1, descending=True).values
    decided = best[:, 0] - best[:, 1] > FP16 * expected.abs().max()
    assert torch.equal(y.argmax(-1)[decided], expected.argmax(-1)[decided])


def test_resnet50_is_near_itself_and_threads_change_no_bit():
    torch.manual_seed(0)
    model, x = pruned(build("resnet50"), 0.1), images(1, 3, 48, 40)
    graph = graph_of(model, x)
    one = half_program(graph).program.run([x])[0]
    assert relative_error(one, reference(model, x)) <= FP16
    assert torch.equal(half_program(graph, threads=2).program.run([x])[0], one)


@pytest.mark.parametrize("shape", [(1, 3), (2, 100)])
def test_gpt_with_tokens_as_columns_is_near_itself(shape):
    torch.manual_seed(0)
    model = pruned(build("gpt", vocabulary=65, layers=2, width=64), 0.2)
    tokens = torch.randint(0, 65, shape, generator=torch.Generator().manual_seed(1))
    graph = graph_of(model, tokens)
    for calibration in ([], [[tokens]]):
        (y,) = half_program(graph, *calibration).program.run([tokens])
        assert relative_error(y, reference(model, tokens)) <= FP16


def test_a_transformer_encoder_is_near_itself():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(48, 4, 96, activation="gelu", batch_first=True, norm_first=True)
    model = pruned(nn.Sequential(nn.Conv2d(3, 48, 8, 8), nn.Flatten(2), _Across(), layer, nn.Linear(48, 10)), 0.3)
    x = images(2, 3, 64, 64)
    (y,) = half_program(graph_of(model, x)).program.run([x])
    assert relative_error(y, reference(model, x)) <= FP16


class _Across(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class Loud(nn.Module):
    """Activations beyond what float16 holds between its layers, and results that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three, self.curved = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.one(x) * 1.0)
        hidden = torch.relu(self.two(hidden) + hidden)
        hidden = nn.functional.max_pool2d(hidden, 2)
        return self.curved(nn.functional.silu(self.three(hidden))).mean((2, 3))


@pytest.fixture
def loud() -> nn.Module:
    torch.manual_seed(0)
    model = pruned(Loud(), 0.5)
    model.one.weight.data *= 1e6
    model.one.bias.data *= 1e6
    model.three.weight.data *= 1e-6
    return model


def test_calibration_scales_what_float16_could_not_hold(loud):
    x = images(2, 3, 16, 16)
    graph = graph_of(loud, x)
    assert not bool(half_program(graph).program.run([x])[0].isfinite().all())
    made = half_program(graph, [x])
    (y,) = made.program.run([x])
    assert relative_error(y, reference(loud, x)) <= FP16
    assert max(made.packed.half.exponents.values()) >= 14


def test_values_that_are_added_or_compared_as_they_lie_have_one_exponent_and_curved_ones_none(loud):
    x = images(2, 3, 16, 16)
    graph = graph_of(loud, x)
    largest = largest_values(graph, [[x], [x * 3]])
    exponents = exponents_for(graph, largest)
    for node in graph.nodes:
        if getattr(node.operation, "residual", False):
            assert exponents[node.inputs[1]] == exponents[node.output]
        if getattr(node.operation, "activation", None) == "silu":
            assert node.output not in exponents
        if type(node.operation).__name__ == "MaxPool":
            assert exponents[node.inputs[0]] == exponents[node.output]
    for value, exponent in exponents.items():
        assert largest[value] * 2.0**-exponent < 32


def test_a_program_that_is_not_near_float32_does_not_take_part(loud):
    x = images(1, 3, 16, 16)
    graph = graph_of(loud, x)
    found = half_programs(graph, _measured(graph), Half(target=emulated_half()), threads=1, examples=[[x]])
    assert not found.made
    assert "too far from float32: relative error inf" in found.skipped[HALF]


def _measured(graph: Graph) -> Made:
    """A float32 program whose choices say that planes were measured and are fast."""
    made = program(graph)
    choices = {output: replace(one, seconds={one.engine: 1e-9, "dense": 1.0}) for output, one in made.choices.items()}
    return replace(made, choices=choices)


@pytest.mark.parametrize("threads", [1, 2])
def test_float16_takes_part_beside_the_others_and_its_error_is_noted(threads):
    model, x = slim(), images(1, 3, 32, 32)
    source = replace(planner(model), threads=threads)
    entry = source.entry(call_of(model, x))
    where = entry.plan.candidates if HALF in entry.plan.candidates else entry.plan.skipped
    assert HALF in where
    if where is entry.plan.candidates:
        assert (f"{HALF}, one thread" in where) == (threads > 1)
        assert any(note.startswith(f"{HALF}: relative error") for note in entry.plan.notes)
    else:
        assert where[HALF] == "no layer is faster on planes of float16"  # emulated, it is slow
    deployed = Deployed(source, (entry,))
    assert relative_error(deployed(x), reference(model, x)) <= FP16


def test_weights_of_a_file_in_int8_are_computed_in_float16(tmp_path):
    model, x = slim(), images(1, 3, 32, 32)
    masks = {name: weight != 0 for name, weight in model.named_parameters() if weight.ndim > 1}
    save_sparse(tmp_path / "slim.int8", model.state_dict(), masks, values="int8")
    network = InFile(opened(tmp_path / "slim.int8", "sparse"), slim)
    call = Caller(network.signature).call((x,), {})
    (y,) = half_program(network.graph(call.arguments, call.named), [x]).program.run([x])
    assert relative_error(y, reference(network.model(), x)) <= FP16


@pytest.mark.parametrize("calibrated", [False, True])
def test_dense_bfloat16_layers_run_on_float16_planes_too(calibrated, tmp_path):
    torch.manual_seed(0)
    model, x = pruned(build("cifar_resnet", depth=8), 0.5), images(1, 3, 32, 32)
    graph = graph_of(model, x)
    with emulated_dot("amx"):
        made = half_program(graph, *([[x * 50]] if calibrated else []), dense_above=0.49)
        (y,) = made.program.run([x])
        assert {one.engine for one in made.choices.values()} == {"planes", "dense planes", "dense"}
        assert FP16 / 10 < relative_error(y, reference(model, x)) <= 2e-2
        found = half_programs(
            graph, _measured(graph), made.packed.half, threads=1, examples=[[x]], choices=made.choices
        )
        assert torch.equal(found.made[HALF_MIXED].program.run([x])[0], y)
        source = planner(model)
        entry = chosen(source, call_of(model, x), made=found.made[HALF_MIXED])
        deployed = Deployed(source, (entry,))
        deployed.save(tmp_path / "mixed.safetensors")
        again = loaded(tmp_path / "mixed.safetensors", threads=None, half=emulated_half())
        assert torch.equal(again(x), y)
    here = loaded(tmp_path / "mixed.safetensors", threads=None, half=None)
    bound = FP32 if host_dot() is None else 2e-2  # dense bfloat16 was allowed and may be faster here
    assert relative_error(here(x), reference(model, x)) <= bound


def test_dense_layers_are_measured_on_float16_planes_where_they_were_on_float32_ones():
    model, x = slim(0.9), images(1, 3, 32, 32)
    graph = graph_of(model, x)
    with emulated_dot("amx"):
        permission = dense_planes(allowed=True)
        float32, _ = measured_choices(graph, packed=Packed(), threads=1, bfloat16=permission)
        packed = Packed(half=Half(target=emulated_half(), exponents=exponents_for(graph, largest_values(graph, [[x]]))))
        alone, mixed = half_choices(graph, float32, packed=packed, threads=1, bfloat16=permission)
    assert permission.notes == []
    for node in graph.nodes:
        measured = {"planes", "dense planes"} & set(float32[node.output].seconds)
        assert measured == {"planes", "dense planes"} & set(mixed[node.output].seconds)
        assert alone[node.output].engine != "dense planes"
    assert any("dense planes" in choice.seconds for choice in mixed.values())


def test_programs_for_several_threads_are_there_for_one_as_well():
    x = images(1, 3, 32, 32)
    graph = graph_of(slim(), x)
    float32, half = _measured(graph), Half(target=emulated_half())
    choices = {output: replace(one, seconds={}) for output, one in float32.choices.items()}
    found = half_programs(graph, float32, half, threads=2, examples=[[x]], choices=choices)
    assert list(found.made) == [HALF, f"{HALF}, one thread"]
    one, two = (made.program.run([x])[0] for made in found.made.values())
    assert torch.equal(one, two)
    assert found.notes[0].endswith("against float32 on 1 calls")


def test_only_plans_that_may_reduce_precision_know_float16():
    model, x = slim(), images(1, 3, 32, 32)
    plan = deploy(model, x, rivals=()).plan
    assert HALF not in {**plan.candidates, **plan.skipped}
    source = planner(model, prefer="memory")
    assert "narrow" in source.entry(call_of(model, x)).plan.skipped[HALF]


def test_a_chosen_float16_plan_says_so_takes_new_shapes_and_leaves_overflow_to_the_original():
    model, x, other = slim(), images(1, 3, 32, 32), images(2, 3, 24, 40)
    source = planner(model)
    deployed = Deployed(source, (chosen(source, call_of(model, x)),))
    assert 0 < relative_error(deployed(x), reference(model, x)) <= FP16
    assert relative_error(deployed(other), reference(model, other)) <= FP16
    assert HALF in deployed.plans[1].candidates
    with pytest.warns(SparsityWarning, match="not finite"):
        y = deployed(x * 1e7)
    assert relative_error(y, reference(model, x * 1e7)) <= FP32


def test_a_saved_float16_plan_gives_the_same_bits_and_elsewhere_float32(tmp_path):
    model, x, other = slim(), images(1, 3, 32, 32), images(2, 3, 24, 40)
    source = planner(model)
    deployed = Deployed(source, (chosen(source, call_of(model, x), [x * 100]),))
    deployed.save(tmp_path / "half.safetensors")
    again = loaded(tmp_path / "half.safetensors", threads=None, half=emulated_half())
    assert torch.equal(again(x), deployed(x))
    assert again.plan.engine == HALF
    made = again.plans_by_shape[0].program
    assert made.packed.half.exponents == deployed.plans_by_shape[0].program.packed.half.exponents != {}
    assert relative_error(again(other), reference(model, other)) <= FP16
    assert HALF in again.plans[1].candidates
    with pytest.warns(SparsityWarning, match="not finite"):
        assert relative_error(again(x * 1e9), reference(model, x * 1e9)) <= FP32
    here = loaded(tmp_path / "half.safetensors", threads=None, half=None)
    assert relative_error(here(x), reference(model, x)) <= FP32
    assert HALF not in here.plan.candidates


def test_a_saved_float16_plan_is_measured_again_for_other_threads(tmp_path):
    model, x = slim(), images(1, 3, 32, 32)
    source = planner(model)
    deployed = Deployed(source, (chosen(source, call_of(model, x)),))
    deployed.save(tmp_path / "half.safetensors")
    again = loaded(tmp_path / "half.safetensors", threads=2, half=emulated_half())
    assert relative_error(again(x), reference(model, x)) <= FP16
    assert HALF in {**again.plan.candidates, **again.plan.skipped}


@pytest.mark.parametrize(
    "damage", [{"exponents": {"0": 10**6}}, {"choices": {}}, {"exponents": {"0": "x"}}, {"exponents": None}]
)
def test_damaged_float16_plans_are_refused(damage):
    model, x = slim(), images(1, 3, 32, 32)
    graph = graph_of(model, x)
    made = replace(half_program(graph, [x]), float32=program(graph).choices)
    found = _encoded_half(made)["half"]
    assert _decoded_half(found, graph).exponents == made.packed.half.exponents
    with pytest.raises((CheckpointError, ValueError, AttributeError)):  # which `read_file` turns into the first
        _decoded_half({**found, **damage}, graph)
