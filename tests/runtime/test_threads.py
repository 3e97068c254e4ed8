"""Several threads in a deployed network: the same bits, whoever calls, and one thread where that is faster."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error, slim

from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._memory import Segment
from sparsetwin.runtime._segments import _ranks
from sparsetwin.runtime._serial import is_small, serial


class Strided(nn.Module):
    """Layers that read one result at once, one of them in four phases; large enough to be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 48, 3, padding=1)
        self.left, self.right = nn.Conv2d(48, 64, 3, 2, 1), nn.Conv2d(48, 64, 1, 2)
        self.last = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return torch.relu(self.last(torch.relu(self.left(x)) + self.right(x))).mean((2, 3))


def strided() -> nn.Module:
    torch.manual_seed(0)
    return pruned(Strided(), 0.3)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_threads_change_no_bit_whoever_calls(threads, count):
    graph = graph_of(strided(), images(count, 16, 40, 36))
    one, several = (program(graph, threads=number).program for number in (1, threads))
    inputs = [images(count, 16, 40, 36, seed=seed) for seed in range(4)]
    expected = [one.run([x])[0].clone() for x in inputs]
    with ThreadPoolExecutor(3) as executor:
        found = list(executor.map(lambda x: several.run([x])[0].clone(), inputs * 6))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 6, strict=True))


def test_kernels_that_do_not_touch_each_others_memory_share_a_rank():
    made = program(graph_of(strided(), images(1, 16, 40, 36)), threads=2).program
    (segment,) = [part for part in made.parts if isinstance(part, Segment)]
    steps = [step for step in segment.steps if step in made.kernels]
    memory = {sheet: torch.empty(1) for sheet in made.sheets}
    apart = _ranks(steps, memory.__getitem__)
    assert max(apart) + 1 < len(steps)  # the phases of one sheet are written at once
    same = torch.empty(1)
    phases = [step for step in steps if type(step).__name__ == "Pool"]
    products = [step for step in steps if step not in phases]
    assert _ranks(products, lambda sheet: same) == list(range(len(products)))  # all in one buffer: in order


def test_a_plan_of_several_threads_tells_what_one_thread_takes(tmp_path):
    model, x = strided(), images(1, 16, 40, 36)
    deployed = deploy(model, x, threads=2, rivals=())
    plan = deployed.plan
    assert {name.removesuffix(", one thread") for name in plan.candidates if "one thread" in name} <= {*plan.candidates}
    assert any("one thread" in name for name in plan.candidates)
    assert plan.engine == min(plan.candidates, key=plan.candidates.__getitem__)
    assert not any("one thread" in name for name in deploy(model, x, threads=1, rivals=()).plan.candidates)


@pytest.mark.parametrize(("engine", "threads"), [("sparse, one thread", 1), ("sparse", 2)])
def test_a_saved_program_keeps_the_threads_that_were_faster(tmp_path, engine, threads):
    model, x = strided(), images(1, 16, 40, 36)
    deployed = deploy(model, x, threads=2, rivals=())
    first = deployed._first
    forced = replace(first, plan=replace(first.plan, candidates={**first.plan.candidates, engine: 0.0}))
    deployed._first = forced
    deployed._entries = {forced.call.key: forced}
    deployed.save(tmp_path / "network.safetensors")
    loaded = load(tmp_path / "network.safetensors")
    assert loaded.plan.threads == 2
    assert loaded.plan.engine == engine
    assert loaded._first.program.program.threads == threads
    assert relative_error(loaded(x), model(x).detach()) <= FP32


def test_small_steps_run_on_one_of_pytorchs_threads_and_leave_its_number():
    before = torch.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(3)
        assert serial(lambda x: seen.append(torch.get_num_threads()) or x)(5) == 5
        with pytest.raises(ZeroDivisionError):
            serial(lambda: 1 / 0)()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_a_step_is_small_by_its_work():
    graph = graph_of(slim(), images(1, 3, 32, 32))
    assert all(is_small(node, graph.values) for node in graph.nodes)
    wide = graph_of(nn.Conv2d(64, 64, 3), images(1, 64, 32, 32))
    assert not any(is_small(node, wide.values) for node in wide.layers())
