"""The FLOPs of the paper's networks, against reference values worked out from its published code."""

import pytest
import torch

from sparsetwin.metrics import FlopsLedger, count_forward_flops, training_flops
from sparsetwin.models import build

IMAGE_SIZES = {"resnet50": 224, "mobilenetv1": 224, "wrn_28_10": 32, "resnet20": 32}


def forward_flops(name):
    with torch.device("meta"):
        return count_forward_flops(build(name), torch.zeros(1, 3, IMAGE_SIZES[name], IMAGE_SIZES[name]))


def uniform(sizes, sparsity, dense=()):
    return {name: size if name in dense else size - round(sparsity * size) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def resnet50():
    return forward_flops("resnet50")


@pytest.mark.parametrize(
    ("name", "giga", "digits", "exact"),
    [
        ("resnet50", 8.212, 3, 8_212_112_872),
        ("mobilenetv1", 1.153, 3, 1_152_659_944),
        ("wrn_28_10", 11.91, 2, 11_913_393_252),
        ("resnet20", 0.0822, 4, 82_220_298),
    ],
)
def test_dense_forward_flops_are_the_reference_values(name, giga, digits, exact):
    forward = forward_flops(name)
    assert round(forward.total() / 1e9, digits) == giga
    assert forward.total() == exact
    assert (forward.attention, forward.uncounted) == (0, ())


def test_resnet50_spends_nearly_all_in_convolutions_and_its_last_layer(resnet50):
    cost = {layer.name: layer.per_nonzero * layer.weight_size for layer in resnet50.layers}
    assert round(sum(cost.values()) / 1e9, 3) == 8.178
    assert round(100 * cost["conv1"] / resnet50.total(), 2) == 2.87
    assert round(100 * cost["fc"] / resnet50.total(), 2) == 0.05
    assert round(100 * (1 - sum(cost.values()) / resnet50.total()), 1) == 0.4


@pytest.mark.parametrize(
    ("sparsity", "inference", "training", "overall"),
    [
        (0.5, 0.517, 0.758, 0.460),
        (0.8, 0.227, 0.613, 0.735),
        (0.9, 0.130, 0.565, 0.827),
        (0.95, 0.082, 0.541, 0.873),
        (0.98, 0.053, 0.526, 0.901),
    ],
)
def test_uniform_resnet50_with_dense_ends_has_the_reference_ratios(resnet50, sparsity, inference, training, overall):
    sizes = resnet50.weight_sizes
    kept = uniform(sizes, sparsity, dense=("conv1.weight", "fc.weight"))
    assert len(sizes) == 54
    assert round(resnet50.total(kept) / resnet50.total(), 3) == inference
    assert round(1 - sum(kept.values()) / sum(sizes.values()), 3) == overall
    ledger = FlopsLedger(resnet50.total())
    for epoch in range(100):
        ledger.add(resnet50.total(kept) if epoch % 2 else resnet50.total(), samples=1_281_167)
    assert round(ledger.ratio, 3) == training


@pytest.mark.parametrize(
    ("sparsity", "inference"), [(0.5, 0.502), (0.8, 0.203), (0.9, 0.104), (0.95, 0.054), (0.98, 0.024)]
)
def test_uniform_resnet50_over_all_layers_has_the_reference_ratios(resnet50, sparsity, inference):
    kept = uniform(resnet50.weight_sizes, sparsity)
    assert round(resnet50.total(kept) / resnet50.total(), 3) == inference


def test_training_costs_are_the_reference_values(resnet50):
    convolutions = sum(layer.per_nonzero * layer.weight_size for layer in resnet50.layers)
    assert round(training_flops(convolutions, 1_281_167 * 100) / 1e18, 3) == 3.143
    assert round(training_flops(forward_flops("wrn_28_10").total(), 50_000 * 200) / 1e18, 3) == 0.357
