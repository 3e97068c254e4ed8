"""The convolutional reference networks: the published sizes, layouts and initial weights."""

import math

import pytest
import torch
from torch import nn

from sparsetwin.errors import ConfigError
from sparsetwin.models import cifar_resnet, digits_cnn, mobilenetv1, resnet18, resnet20, resnet50, wrn_28_10

PUBLISHED = {  # network: all parameters, prunable weights, prunable tensors
    resnet20: (272_474, 270_896, 22),
    resnet50: (25_557_032, 25_502_912, 54),
    mobilenetv1: (4_231_976, 4_209_088, 28),
    wrn_28_10: (36_546_980, 36_518_832, 29),
}
SMALL_IMAGES = {
    resnet20: (3, 32),
    resnet18: (3, 32),
    resnet50: (3, 64),
    mobilenetv1: (3, 64),
    digits_cnn: (1, 8),
}


def on_meta(network, **options):
    with torch.device("meta"):
        return network(**options)


def prunable(model):
    return [module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("network", PUBLISHED)
def test_parameter_counts_are_the_published_ones(network):
    model = on_meta(network)
    weights = prunable(model)
    found = sum(p.numel() for p in model.parameters()), sum(w.numel() for w in weights), len(weights)
    assert found == PUBLISHED[network]


def test_resnet50_keeps_8_percent_of_its_prunable_weights_in_its_first_and_last_layer():
    model = on_meta(resnet50)
    assert (model.conv1.weight.numel(), model.fc.weight.numel()) == (9_408, 2_048_000)
    assert round(100 * (9_408 + 2_048_000) / 25_502_912, 2) == 8.07


def test_mobilenet_has_1_percent_of_its_prunable_weights_in_depthwise_convolutions():
    depthwise = [p for name, p in on_meta(mobilenetv1).named_parameters() if name.endswith("depthwise.weight")]
    assert len(depthwise) == 13
    assert round(100 * sum(p.numel() for p in depthwise) / 4_209_088, 2) == 1.06


def test_resnet18_has_torchvision_s_size_on_imagenet():
    assert sum(p.numel() for p in on_meta(resnet18, num_classes=1000, small_input=False).parameters()) == 11_689_512


@pytest.mark.parametrize("network", [*PUBLISHED, resnet18, digits_cnn])
def test_first_convolution_is_conv1_and_last_layer_fc(network):
    names = [name for name, module in on_meta(network).named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert (names[0], names[-1]) == ("conv1", "fc")


@pytest.mark.parametrize("network", SMALL_IMAGES)
def test_every_parameter_gets_a_gradient(network):
    channels, size = SMALL_IMAGES[network]
    torch.manual_seed(0)
    model = network(num_classes=7)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("network", "shape"), [(wrn_28_10, (5, 100)), (resnet50, (5, 1000))])
def test_logits_have_one_column_a_class(network, shape):
    assert on_meta(network)(torch.zeros(5, 3, 32, 32, device="meta")).shape == shape


@pytest.mark.parametrize("network", [resnet20, digits_cnn])
def test_a_seed_reproduces_the_initial_weights(network):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(network().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_convolutions_start_with_variance_2_over_fan_out():
    torch.manual_seed(0)
    model = resnet18()
    for weight in (model.conv1.weight, model.layer3[1].conv2.weight):
        fan_out = weight.shape[0] * 9
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)


def test_resnet50_has_its_stride_on_the_3x3_convolutions():
    block = on_meta(resnet50).layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_resnet50_has_torchvision_s_parameter_names():
    state = on_meta(resnet50).state_dict()
    assert len(state) == 320
    assert {"bn1.running_var", "layer1.0.downsample.1.num_batches_tracked", "layer4.2.conv3.weight"} <= state.keys()


@pytest.mark.parametrize(("small_input", "conv1_out", "pooled"), [(True, 32, 32), (False, 16, 8)])
def test_small_input_changes_the_stem_only(small_input, conv1_out, pooled):
    model = on_meta(resnet18, small_input=small_input)
    hidden = model.conv1(torch.zeros(1, 3, 32, 32, device="meta"))
    assert hidden.shape[-1] == conv1_out
    assert model.maxpool(hidden).shape[-1] == pooled
    assert model.layer2[0].conv1.stride == (2, 2)


def test_only_the_last_batch_norm_of_wrn_28_10_has_momentum_0_9():
    momenta = [module.momentum for module in on_meta(wrn_28_10).modules() if isinstance(module, nn.BatchNorm2d)]
    assert momenta == [0.1] * 24 + [0.9]


def test_wrn_28_10_drops_out_in_training_only():
    model = on_meta(wrn_28_10, dropout=0.4)
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.4] * 12
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize(("depth", "convolutions"), [(8, 9), (14, 15), (20, 21), (56, 57)])
def test_cifar_resnet_has_its_depth_beside_two_shortcuts(depth, convolutions):
    weights = prunable(on_meta(cifar_resnet, depth=depth))
    assert sum(weight.dim() == 4 for weight in weights) == convolutions
    assert sum(weight.shape[2:] != (1, 1) for weight in weights) == depth  # all but the two 1x1 shortcuts


def test_cifar_resnet_width_multiplies_every_channel():
    model = on_meta(cifar_resnet, depth=8, width=0.5, num_classes=3)
    assert (model.conv1.out_channels, model.fc.in_features, model.fc.out_features) == (8, 32, 3)


@pytest.mark.parametrize("depth", [2, 0, 19, 51, -4])
def test_cifar_resnet_refuses_other_depths(depth):
    with pytest.raises(ConfigError, match=f"6n \\+ 2 layers .*got depth {depth}"):
        cifar_resnet(depth)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.02])
def test_cifar_resnet_refuses_a_width_without_channels(width):
    with pytest.raises(ConfigError, match="needs to leave at least 1"):
        resnet20(width=width)


def test_digits_cnn_learns_a_small_set_by_heart_in_seconds():
    torch.manual_seed(0)
    model = digits_cnn()
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.95
