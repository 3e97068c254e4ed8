"""The network that deploy returns: called as the model, safe for many callers, and honest about what it cannot do."""

import copy
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, Slim, graph_of, images, program, relative_error, slim

import sparsetwin
from sparsetwin.errors import ConfigError, SparsityWarning, UsageError
from sparsetwin.runtime import Deployed, deploy
from sparsetwin.runtime._deployed import SHAPES
from sparsetwin.runtime._rivals import bfloat16_runner, compiled_runner


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return slim()


@pytest.fixture(scope="module")
def deployed(model) -> Deployed:
    return deploy(model, images(2, 3, 33, 40), rivals=())


def expected(model, x, **named):
    with torch.no_grad():
        return model(x, **named)


def test_calls_take_what_the_model_takes(model, deployed):
    x = images(2, 3, 33, 40, seed=2)
    assert sparsetwin.deploy is deploy
    assert relative_error(deployed(x), expected(model, x)) <= FP32
    assert torch.equal(deployed(images=x), deployed(x))
    assert relative_error(deployed(x, scale=2.0), expected(model, x, scale=2.0)) <= FP32
    with pytest.raises(TypeError, match="missing a required argument: 'images'"):
        deployed()
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        deployed(x, size=3)


def test_results_are_fresh_tensors_that_need_no_gradient(deployed):
    x = images(2, 3, 33, 40)
    first = deployed(x)
    kept = first.clone()
    deployed(-x)
    assert torch.equal(first, kept)
    assert not first.requires_grad
    (first * torch.ones(5, requires_grad=True)).sum().backward()  # no inference tensor: it may be part of a graph


def test_inference_mode_and_autocast_of_the_caller_change_nothing(model):
    x, y = images(1, 3, 32, 32), images(2, 3, 24, 24)
    with torch.inference_mode():
        deployed = deploy(model, x, rivals=())
        inside = [deployed(x), deployed(y)]
    assert [torch.equal(deployed(a), b) for a, b in zip((x, y), inside, strict=True)] == [True, True]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(deployed(x), inside[0])
    assert not inside[1].is_inference()


def test_the_plan_names_every_layer_with_its_density_and_all_measured_times(model, deployed):
    plan = deployed.plan
    assert [layer.name for layer in plan.layers] == ["stem", "conv", "depthwise", "head"]
    for layer in plan.layers:
        weight = model.get_submodule(layer.name).weight
        assert layer.density == int(weight.count_nonzero()) / weight.numel()
        assert {"dense", "planes"} <= set(layer.seconds)
        assert all(seconds > 0 for seconds in layer.seconds.values())
        assert layer.name in str(plan)
    assert plan.layers[0].kind == "conv 3x3 3->8 /2 relu"
    assert plan.layers[1].kind == "conv 3x3 8->8 +residual relu"
    assert plan.layers[2].kind == "conv 3x3 8->8 groups 8 silu"
    assert plan.engine == min(plan.candidates, key=plan.candidates.__getitem__)
    assert {"eager", "eager channels_last"} <= set(plan.candidates)
    assert f"runs as: {plan.engine}" in str(plan)


def test_new_batch_sizes_and_image_sizes_are_planned_when_they_come_and_kept(model):
    deployed = deploy(model, images(1, 3, 32, 32), rivals=())
    for number, shape in enumerate([(2, 3, 32, 32), (1, 3, 47, 33), (2, 3, 32, 32)]):
        x = images(*shape)
        assert relative_error(deployed(x), expected(model, x)) <= FP32
        assert len(deployed.plans) == 2 + (number > 0)
    assert [plan.inputs for plan in deployed.plans] == [
        "1x3x32x32 float32",
        "2x3x32x32 float32",
        "1x3x47x33 float32",
    ]
    assert deployed.prepare(images(1, 3, 20, 20)).inputs == "1x3x20x20 float32"
    assert len(deployed.plans) == 4


def test_beyond_so_many_shapes_calls_run_without_a_plan(model):
    deployed = deploy(nn.Linear(6, 4).eval(), images(1, 6), rivals=())
    for rows in range(2, SHAPES + 4):
        x = images(rows, 6)
        assert relative_error(deployed(x), expected(deployed._source.value.model, x)) <= FP32
    assert len(deployed.plans) == SHAPES


def test_later_changes_to_the_model_do_not_reach_it():
    model, x = slim(), images(1, 3, 32, 32)
    deployed = deploy(model, x, rivals=())
    before = deployed(x)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(deployed(x), before)
    assert model.stem.weight.requires_grad  # and it did not reach the model
    training = deploy(Slim().train(), x, rivals=())
    assert not training.training


def test_what_cannot_be_done_is_refused_by_name(deployed, model):
    x = images(2, 3, 33, 40)
    with pytest.raises(UsageError, match="cannot be trained"):
        deployed.train()
    assert deployed.eval() is deployed
    with pytest.raises(UsageError, match="requires a gradient"):
        deployed(x.requires_grad_())
    with pytest.raises(UsageError, match=r"deployed\.save\(path\)"):
        pickle.dumps(deployed)
    for move in (deployed.half, deployed.double, lambda: deployed.to("meta"), deployed.share_memory):
        with pytest.raises(UsageError, match="stays in float32"):
            move()
    assert list(deployed.parameters()) == []
    assert deployed.state_dict() == {}
    assert "Slim, runs as" in repr(deployed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float16"}, ConfigError, "allow_reduced_precision=True"),
        ({"dtype": "float32", "allow_reduced_precision": True}, ConfigError, "contradict"),
        ({"threads": 0}, ConfigError, "threads=0"),
        ({"threads": "2"}, ConfigError, "threads='2'; expected a whole number"),
        ({"threads": 1.5}, ConfigError, r"threads=1\.5; expected a whole number"),
        ({"threads": True}, ConfigError, "threads=True; expected a whole number"),
        ({"rivals": ("compiled",)}, ConfigError, "did you mean 'compile'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        deploy(model, images(1, 3, 32, 32), **arguments)


def test_models_that_cannot_be_deployed_are_refused(deployed):
    x = images(1, 3, 32, 32)
    with pytest.raises(UsageError, match="not deployed yet"):
        deploy(deployed, x)
    with pytest.raises(ConfigError, match=r"model\.float\(\)"):
        deploy(slim().half(), x)
    with pytest.raises(ConfigError, match="on meta"):
        deploy(nn.Linear(2, 2, device="meta"), x)
    with pytest.raises(ConfigError, match="expected a tensor"):
        deploy(slim(), 3)
    with pytest.raises(ConfigError, match="holds no tensor"):
        deploy(slim(), (3,))
    with pytest.raises(ConfigError, match=r"torch\.from_numpy"):
        deploy(slim(), x.numpy())


def test_arrays_are_refused_with_what_to_pass(deployed):
    array = images(2, 3, 33, 40).numpy()
    for call in (deployed, deployed.prepare):
        with pytest.raises(UsageError, match=r"torch\.from_numpy"):
            call(array)
        with pytest.raises(UsageError, match=r"torch\.from_numpy"):
            call(images=array)


def test_a_deep_copy_gives_the_same_bits(deployed):
    x = images(2, 3, 33, 40)
    twin = copy.deepcopy(deployed)
    assert torch.equal(twin(x), deployed(x))
    assert twin.plan == deployed.plan


def test_results_that_are_not_finite_are_those_of_the_model_with_one_warning(model):
    deployed = deploy(model, images(1, 3, 32, 32), rivals=())
    x = images(1, 3, 32, 32)
    x[0, :, 4:7, 4:7] = float("nan")
    for times in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = deployed(x)
        assert [entry.category for entry in caught] == ([] if times else [SparsityWarning])
        assert found.isnan().all()
        assert torch.equal(found.nan_to_num(7.0), expected(model, x).nan_to_num(7.0))


@pytest.mark.parametrize("planes", [True, False])
def test_nan_passes_every_kind_of_layer(model, planes):
    x = images(1, 3, 32, 32)
    x[0, :, 4:7, 4:7] = float("nan")
    (found,) = program(graph_of(model, x), planes=planes).program.run([x])
    assert found.isnan().all()


def test_what_only_pruned_weights_read_does_not_reach_the_result():
    layer = nn.Conv2d(2, 3, 1)
    layer.weight.data[:, 1] = 0
    x = images(1, 2, 4, 4)
    x[0, 1] = float("nan")
    (found,) = program(graph_of(layer, x)).program.run([x])
    assert found.isfinite().all()  # a dense product with zeros would give NaN
    assert expected(layer, x).isnan().all()


def test_many_threads_may_call_at_once(model):
    deployed = deploy(model, images(2, 3, 33, 40), rivals=(), threads=2)
    inputs = [images(2, 3, 33, 40, seed=seed) for seed in range(6)] + [images(1, 3, 24, 24)]
    alone = [deployed(x) for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(deployed, inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 5, strict=True))


@pytest.mark.slow
def test_compiled_and_bfloat16_rivals_are_timed_and_compute_the_same():
    model, x = slim(1.0), images(4, 3, 64, 64)
    deployed = deploy(model, x, allow_reduced_precision=True, rivals=("compile",))
    assert "eager bfloat16" in deployed.plan.candidates
    assert "compile" in {**deployed.plan.candidates, **deployed.plan.skipped}
    call = deployed._caller.call((x,), {})
    with torch.no_grad():
        assert relative_error(compiled_runner(model, call)(call), expected(model, x)) <= FP32
        assert relative_error(bfloat16_runner(model)(call), expected(model, x)) <= 2e-2


class Branching(nn.Module):
    """Control flow on values: nothing that a trace can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 300), nn.Linear(300, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.wide(x)
        while hidden.abs().max() > 1:
            hidden = hidden / 2
        return self.narrow(hidden)


@pytest.mark.parametrize(("model", "shape"), [(nn.Linear(6, 2), (4, 5)), (Branching(), (4, 5))])
def test_an_example_that_does_not_fit_is_refused_with_what_the_model_says(model, shape):
    message = rf"{type(model).__name__} does not take 4x5 float32: RuntimeError: .*cannot be multiplied"
    with pytest.raises(UsageError, match=message):
        deploy(model, images(*shape), rivals=())
    deployed = deploy(model, images(4, 6), rivals=())
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        deployed(images(*shape))


def test_a_model_that_cannot_be_traced_runs_with_the_reason_in_the_plan():
    torch.manual_seed(0)
    model = Branching().eval()
    deployed = deploy(model, images(4, 6), rivals=())
    assert "cannot be traced by torch.export" in deployed.plan.notes[0]
    assert "Branching cannot be traced" in str(deployed.plan)
    for x in (images(4, 6), images(9, 6) * 100):
        assert relative_error(deployed(x), expected(model, x)) <= FP32


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_llvmlite_pytorch_runs_everything_and_one_warning_says_so():
    script = """
import sys, warnings
sys.modules["llvmlite"] = None
import torch
from torch import nn
torch.set_num_threads(1)
import sparsetwin
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
x = torch.randn(1, 3, 8, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = (sparsetwin.deploy(model, x, rivals=()) for _ in range(2))
own = [w for w in caught if issubclass(w.category, sparsetwin.errors.SparsityWarning)]
print(len(own), "llvmlite" in str(own[0].message))
with torch.no_grad():
    print(torch.equal(first(x), model(x)), first.plan.engine.startswith("eager"))
    y = torch.randn(2, 3, 9, 9)
    print(torch.equal(first(y), model(y)), "cannot be made here" in str(first.plan))
"""
    assert run_python(script).split() == ["1", "True", "True", "True", "True", "True"]


def test_a_forked_child_computes_the_same_bits_with_threads_of_its_own():
    script = """
import os
import torch
from torch import nn
torch.set_num_threads(1)
from sparsetwin.runtime import deploy
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
for layer in (model[0], model[2]):
    layer.weight.data *= torch.rand_like(layer.weight) < 0.2
x = torch.randn(2, 3, 40, 40)
deployed = deploy(model, x, threads=2, rivals=())
expected = deployed(x)
child = os.fork()
if child == 0:
    same = False
    try:
        same = torch.equal(deployed(x), expected) and deployed(torch.randn(1, 3, 20, 21)).shape == (1, 32, 18, 19)
    finally:
        os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(deployed(x), expected)
"""
    run_python(script)


def test_a_plan_that_was_found_once_is_found_quickly_and_only_for_calls_like_it(model):
    deployed = deploy(model, images(1, 3, 32, 32), rivals=())
    x, other = images(1, 3, 32, 32, seed=3), images(1, 3, 32, 32).to(torch.float64)
    assert deployed._quick == {}
    first = deployed(x)
    assert list(deployed._quick) == [((x.shape, torch.float32),)]
    assert torch.equal(deployed(x), first)
    assert torch.equal(deployed(nn.Parameter(x, requires_grad=False)), first)  # a subclass takes the long way
    assert torch.equal(deployed(images=x), first)
    with pytest.raises(UsageError, match="requires a gradient"):
        deployed(x.clone().requires_grad_())
    with pytest.raises(UsageError, match="is on meta"):
        deployed(x.to("meta"))
    with pytest.raises(RuntimeError):
        deployed(other)  # as the model itself: double input, float weights
    with torch.inference_mode():
        assert torch.equal(deployed(x), first)
    assert len(deployed._quick) == 1
    for size in range(20, 20 + SHAPES + 2):
        deployed.prepare(images(1, 3, size, size))
        deployed(images(1, 3, size, size))
    assert relative_error(deployed(images(1, 3, 21, 21)), expected(model, images(1, 3, 21, 21))) <= FP32
