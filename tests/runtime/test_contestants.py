"""Engines that lay tensors out in another way than the model's: the same results, or a reason why they take no part."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error

from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._plain import run_plain
from sparsetwin.runtime._timing import race


class LeNet(nn.Module):
    """As in PyTorch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Strided(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.as_strided(super().forward(x), (2, 5, 3), (96, 7, 2), 1)


class Bits(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(torch.int16).float()


class Pairs(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(super().forward(x)).abs()


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LeNet, (4, 3, 32, 32)),
        (lambda: Strided(3, 6, 3), (2, 3, 6, 6)),
        (lambda: Bits(3, 6, 3), (2, 3, 6, 6)),
        (lambda: Pairs(3, 6, (3, 5)), (2, 3, 6, 6)),
    ],
)
def test_operations_on_strides_get_tensors_that_lie_as_the_models_do(model, shape, planes):
    torch.manual_seed(0)
    network, x = pruned(model(), 0.4), images(*shape)
    graph = graph_of(network, x)
    with torch.no_grad():
        expected = network(x)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        for (found,) in (program(graph, planes=planes).program.run([given]), run_plain(graph, [given])):
            if isinstance(network, Bits):  # the lower half of a float32 number is noise
                assert relative_error(found[..., 1::2], expected[..., 1::2]) <= 1e-3
            else:
                assert relative_error(found, expected) <= FP32


def test_a_network_that_flattens_by_view_is_deployed_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, x = pruned(LeNet(), 0.3), images(4, 3, 32, 32)
    deployed = deploy(model, x, rivals=())
    assert "view size is not compatible" in deployed.plan.skipped["eager channels_last"]
    assert "dense graph" in deployed.plan.candidates
    deployed.save(tmp_path / "lenet.safetensors")
    with torch.no_grad():
        assert relative_error(deployed(x), model(x)) <= FP32
        assert relative_error(load(tmp_path / "lenet.safetensors")(x), model(x)) <= FP32


class Shifted(nn.Module):
    """Makes a float32 tensor in its forward pass, which bfloat16 weights do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x + torch.linspace(0, 1, 64))


def test_a_rival_that_raises_takes_no_part():
    torch.manual_seed(0)
    model, x = pruned(Shifted(), 0.3), images(2, 64)
    deployed = deploy(model, x, rivals=(), allow_reduced_precision=True)
    assert "same dtype" in deployed.plan.skipped["eager bfloat16"]
    assert "eager bfloat16" not in deployed.plan.candidates
    assert "eager bfloat16: RuntimeError" in str(deployed.plan)


def raising() -> None:
    raise ValueError("not today\nnor tomorrow")


def test_a_race_leaves_out_who_raises_but_not_the_last_resort():
    skipped: dict[str, str] = {}
    found = race({"a": raising, "b": int}, rounds=2, threads=1, skipped=skipped, last_resort="b")
    assert (list(found), skipped) == (["b"], {"a": "ValueError: not today"})
    for arguments in ({}, {"skipped": {}, "last_resort": "a"}):
        with pytest.raises(ValueError, match="not today"):
            race({"a": raising, "b": int}, rounds=2, threads=1, **arguments)
    with pytest.raises(ValueError, match="not today"):
        race({"a": raising, "b": raising}, rounds=2, threads=1, skipped={})
