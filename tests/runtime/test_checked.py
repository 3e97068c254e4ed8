"""A program that does not compute what the network does is left out, and the plan says why."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error

from sparsetwin.runtime import deploy
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._checked import right_programs


class Traced(nn.Module):
    """Computes something else where it is traced, as a wrong program would."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(16, 16), factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y * self.factor if torch.compiler.is_exporting() else y


def traced(factor: float) -> nn.Module:
    torch.manual_seed(0)
    return pruned(Traced(factor), 0.3).requires_grad_(False)


def test_a_network_whose_programs_are_all_wrong_runs_as_it_is_with_the_reason_in_the_plan():
    model, x = traced(1.5), images(4, 16)
    deployed = deploy(model, x, rivals=())
    assert relative_error(deployed(x), model(x)) <= FP32
    assert relative_error(deployed(images(3, 16)), model(images(3, 16))) <= FP32
    reasons = [reason for reason in deployed.plan.skipped.values() if "off by 0.5 of the network's own" in reason]
    assert reasons
    assert reasons[0] in str(deployed.plan)


def test_wrong_and_failing_programs_are_left_out_and_right_ones_stay():
    x = images(4, 16)
    right, wrong = (program(graph_of(traced(factor), x)) for factor in (1.0, 1.1))
    other = program(graph_of(traced(1.0), images(5, 16)))
    call, model = Call((x,), {}, [x], None), traced(1.0)
    programs = {"right": right, "wrong": wrong, "of another shape": other}
    found, skipped = right_programs(programs, call, lambda: model(x))
    assert found == {"right": right}
    assert set(skipped) == {"wrong", "of another shape"}


def test_nothing_is_compared_where_the_network_is_random_or_not_finite():
    x = images(4, 16)
    programs = {"any": program(graph_of(traced(7.0), x))}
    call = Call((x,), {}, [x], None)
    assert right_programs(programs, call, lambda: torch.rand(4, 16)) == (programs, {})
    assert right_programs(programs, call, lambda: torch.full((4, 16), float("nan"))) == (programs, {})
