"""Layers dense in bfloat16 on planes: measured where allowed, near float32, checked before use, saved with plans."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, pruned, relative_error, slim

from sparsetwin.kernels import ConvolutionGeometry, Tiling, host_dot
from sparsetwin.kernels._dot import emulated_dot
from sparsetwin.models import build
from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._choices import Choice
from sparsetwin.runtime._entries import Entry, Made, layer_plans, make, make_programs, near_float32
from sparsetwin.runtime._file import save_entries
from sparsetwin.runtime._graph import Graph, Layer
from sparsetwin.runtime._lowering import can_use_planes
from sparsetwin.runtime._planner import Planner
from sparsetwin.runtime._products import Packed, density_of
from sparsetwin.runtime._reduced import dense_planes, other_panels
from sparsetwin.runtime._reduced import relative_error as near

BF16 = 2e-2  # of a whole network, relative to float32
MIXED = "sparse and dense bfloat16"


def mixed_resnet() -> nn.Module:
    """Densities from 0.05 to 0.6, as a trained network has them; the first and last layers stay dense."""
    torch.manual_seed(0)
    model = pruned(build("cifar_resnet", depth=8), 1.0)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)][1:]
    generator = torch.Generator().manual_seed(3)
    for place, layer in enumerate(layers):
        density = 0.6 - 0.55 * place / (len(layers) - 1)
        layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) < density
    return model


def chosen(graph: Graph, *, above: float, dot: str = "amx") -> dict[int, Choice]:
    """Everything on planes: layers of more than some density by the dense kernel, the rest by sparse ones."""

    def one(node) -> Choice:
        if not can_use_planes(graph, node):
            return Choice(engine="dense", dot=dot)
        dense = isinstance(node.operation, Layer) and density_of(node) > above
        return Choice(engine="dense planes" if dense else "planes", dot=dot)

    return {node.output: one(node) for node in graph.nodes}


def mixed(graph: Graph, *, above: float, threads: int = 1, dot: str = "amx") -> Made:
    return make(graph, chosen(graph, above=above, dot=dot), packed=Packed(), threads=threads)


def engines(made: Made) -> set[str]:
    return {made.choices[node.output].engine for node in made.graph.layers()}


@pytest.mark.parametrize("name", ["amx", "avx512bf16"])
def test_a_network_of_sparse_and_dense_layers_is_near_float32_with_the_same_answers(name):
    model, x = mixed_resnet(), images(24, 3, 32, 32)
    with emulated_dot(name):
        made = mixed(graph_of(model, x), above=0.3, dot=name)
        assert engines(made) == {"planes", "dense planes"}
        y, expected = made.program.run([x])[0], model(x).detach()
    assert 1e-5 < relative_error(y, expected) <= BF16
    assert (y.argmax(1) == expected.argmax(1)).float().mean() >= 0.95


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit_whoever_calls(threads, count):
    model, inputs = mixed_resnet(), [images(count, 3, 32, 32, seed=seed) for seed in range(2)]
    graph = graph_of(model, inputs[0])
    with emulated_dot("avx512bf16"):
        one, several = (mixed(graph, above=0.3, threads=number, dot="avx512bf16").program for number in (1, threads))
    expected = [one.run([x])[0].clone() for x in inputs]
    with ThreadPoolExecutor(2) as executor:
        found = list(executor.map(lambda x: several.run([x])[0].clone(), inputs * 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 2, strict=True))


def test_every_kind_of_layer_may_run_dense_on_planes():
    model, x = slim(), images(2, 3, 33, 32)  # a stride, a shortcut, groups, activations
    with emulated_dot("amx"):
        made = mixed(graph_of(model, x), above=0.0)
        assert engines(made) == {"dense planes"}
        assert relative_error(made.program.run([x])[0], model(x).detach()) <= BF16


def test_linears_on_tokens_may_run_dense_on_planes():
    torch.manual_seed(0)
    model = pruned(build("gpt", vocabulary=11, layers=1, width=32), 0.8)
    tokens = torch.randint(0, 11, (2, 70))  # two images of tokens
    with emulated_dot("avx512bf16"):
        made = mixed(graph_of(model, tokens), above=0.5, dot="avx512bf16")
        assert "dense planes" in engines(made)
        assert relative_error(made.program.run([tokens])[0], model(tokens).detach()) <= BF16


def test_a_program_without_dense_layers_takes_no_panels():
    model, x = slim(), images(1, 3, 32, 32)
    graph = graph_of(model, x)
    sparse = mixed(graph, above=1.0)
    assert sparse.program.panel_bytes == 0
    with emulated_dot("amx"):
        dense = mixed(graph, above=0.0).program
        assert dense.workspace_bytes() >= sparse.program.workspace_bytes() + dense.panel_bytes > 0


def test_deploy_measures_dense_planes_only_where_reduced_precision_is_allowed():
    model, x = slim(0.9), images(1, 3, 32, 32)
    with emulated_dot("amx"):
        allowed = deploy(model, x, rivals=(), allow_reduced_precision=True)
        refused = deploy(model, x, rivals=())
        assert relative_error(allowed(x), model(x).detach()) <= BF16
        assert relative_error(refused(x), model(x).detach()) <= FP32
    measured = [layer for layer in allowed.plan.layers if "dense planes" in layer.seconds]
    assert {layer.kind.split()[0] for layer in measured} == {"conv"}
    assert len(measured) == 2  # a group of one output and a head of five are too few rows for a tile
    assert "dense planes ms" in str(allowed.plan)
    assert not any("dense planes" in layer.seconds for layer in refused.plan.layers)
    assert not any("bfloat16" in name for name in refused.plan.candidates)


def test_long_sums_and_many_columns_are_measured_with_other_tilings():
    geometry = ConvolutionGeometry(in_channels=128, out_channels=8, kernel=(3, 3), height=28, width=28, padding=(1, 1))
    assert other_panels(geometry) == [Tiling(vectors=8), Tiling(vectors=28), Tiling(block=56)]
    assert other_panels(replace(geometry, in_channels=8, height=4, width=9)) == []


def test_where_there_is_no_instruction_allowing_it_changes_nothing():
    if host_dot() is not None:
        pytest.skip("this machine has one")
    deployed = deploy(slim(), images(1, 3, 32, 32), rivals=(), allow_reduced_precision=True)
    assert not any("dense planes" in layer.seconds for layer in deployed.plan.layers)
    assert MIXED not in deployed.plan.candidates
    assert deployed.plan.notes == ()


def test_a_layer_whose_numbers_bfloat16_cannot_hold_is_left_out_with_a_note():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)).eval()
    model[0].weight.data.fill_(1e-38)  # not a normal number: the instruction reads zero
    with emulated_dot("amx"):
        plan = deploy(model, images(1, 8, 9, 9), rivals=(), allow_reduced_precision=True).plan
    assert ["dense planes" in layer.seconds for layer in plan.layers] == [False, True]
    (note,) = plan.notes
    assert note.startswith(f"{plan.layers[0].name}: dense planes (amx) are off by 1")


def test_a_network_that_bfloat16_does_not_suit_as_a_whole_is_left_out_with_a_note():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False)).eval()
    model[0].bias.data.fill_(1000)  # between numbers of 512 to 1024 that differ by less than 4 bfloat16 sees nothing
    model[1].weight.data[:, ::2], model[1].weight.data[:, 1::2] = 1, -1
    x = images(1, 8, 9, 9)
    graph = graph_of(model, x)
    call = Call((x,), {}, [x], None)
    with emulated_dot("avx512bf16"):
        permission = dense_planes(allowed=True)
        programs = make_programs(graph, chosen(graph, above=0.0, dot="avx512bf16"), threads=1)
        kept = near_float32(programs, call, permission)
    assert set(programs) - set(kept) == {MIXED, "sparse, all on planes"} & set(programs)
    assert MIXED not in kept
    assert [note.split(":")[0] for note in permission.notes] == [name for name in programs if name not in kept]


def test_numbers_that_are_not_finite_are_compared_as_they_are():
    y = torch.tensor([float("inf"), float("nan"), 1.0])
    assert near(y, y) == 0
    assert near(y[2:] * 1.01, y[2:]) == pytest.approx(0.01, rel=1e-3)
    assert not near(torch.tensor([float("nan")]), torch.ones(1)) <= 1


def saved(model: nn.Module, x: torch.Tensor, path: Path) -> torch.Tensor:
    """Save a plan with dense layers on planes, as if they had been the fastest; return what it computes."""
    deployed = deploy(model, x, rivals=())
    planner: Planner = deployed._source.value
    call = deployed._caller.call((x,), {})
    graph = planner.network.graph(call.arguments, call.named)
    made = make_programs(graph, chosen(graph, above=0.3), threads=1)[MIXED]
    assert {layer.engine for layer in layer_plans(graph, made.choices)} == {"planes", "dense planes, amx"}
    plan = replace(deployed.plan, engine=MIXED, candidates={MIXED: 1e-3})
    entry = Entry(call=call.without_numbers(), run=made.run, plan=plan, program=made)
    save_entries(path, [entry], name=planner.name, signature=planner.signature)
    return made.run(call)


def test_a_plan_with_dense_layers_is_saved_and_gives_the_same_bits(tmp_path):
    model, x = mixed_resnet(), images(1, 3, 32, 32)
    with emulated_dot("amx"):
        expected = saved(model, x, tmp_path / "mixed.safetensors")
        loaded = load(tmp_path / "mixed.safetensors")
        assert loaded.plan.engine == MIXED
        assert torch.equal(loaded(x), expected)
        wider = images(1, 3, 32, 40)
        assert relative_error(loaded(wider), model(wider).detach()) <= BF16
    size = (tmp_path / "mixed.safetensors").stat().st_size
    assert size < 4 * sum(weight.numel() for weight in model.parameters()) + 60_000  # weights are there once


def test_a_plan_is_measured_again_where_its_instruction_is_missing(tmp_path):
    model, x = mixed_resnet(), images(1, 3, 32, 32)
    with emulated_dot("amx"):
        saved(model, x, tmp_path / "mixed.safetensors")
    with emulated_dot("avx512bf16"):  # another instruction: allowed, as it was, but not with the old times
        other = load(tmp_path / "mixed.safetensors")
        assert any("dense planes" in layer.seconds for layer in other.plan.layers)
        assert not any("amx" in layer.engine for layer in other.plan.layers)
        assert relative_error(other(x), model(x).detach()) <= BF16
    if host_dot() is None:
        loaded = load(tmp_path / "mixed.safetensors")
        assert not any("dense planes" in layer.engine for layer in loaded.plan.layers)
        assert relative_error(loaded(x), model(x).detach()) <= FP32
