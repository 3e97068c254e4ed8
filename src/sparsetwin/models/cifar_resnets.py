"""Residual networks for 32x32 images: three stages of n blocks, 6n + 2 layers in all."""

from torch import Tensor, nn

from sparsetwin.errors import ConfigError
from sparsetwin.models._init import kaiming_convolutions_


class CifarBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        hidden = self.relu1(self.bn1(self.conv1(images)))
        out: Tensor = self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(images))
        return out


class CifarResNet(nn.Module):
    """The network that `cifar_resnet` builds; its first convolution is ``conv1``, its last layer ``fc``."""

    def __init__(self, blocks: int, channels: tuple[int, int, int], *, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, channels[0], channels[0], stride=1)
        self.layer2 = _stage(blocks, channels[0], channels[1], stride=2)
        self.layer3 = _stage(blocks, channels[1], channels[2], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[2], num_classes)
        kaiming_convolutions_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.fc(self.avgpool(hidden).flatten(1))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    first = CifarBlock(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(CifarBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, *, width: float = 1.0, num_classes: int = 10) -> CifarResNet:
    """Build a CIFAR ResNet with 1x1 convolutions (and batch norms) as shortcuts.

    >>> sum(parameter.numel() for parameter in cifar_resnet(8).parameters())
    78042

    Args:
        depth: Layers, 6n + 2 for a whole n >= 1: 8, 14, 20, 32, 44, 56, ...
        width: Factor on the channels (16, 32, 64), rounded to whole channels.
        num_classes: Outputs.

    Raises:
        ConfigError: If ``depth`` is not 6n + 2, or ``width`` leaves a stage without channels.

    Source: He et al., 2016, arXiv 1512.03385, section 4.2, with its shortcut option B.
    """
    blocks, remainder = divmod(depth - 2, 6)
    if blocks < 1 or remainder:
        raise ConfigError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, 44, 56, ...), got depth {depth}")
    if round(16 * width) < 1:
        raise ConfigError(f"width multiplies 16, 32 and 64 channels and needs to leave at least 1, got {width}")
    channels = (round(16 * width), round(32 * width), round(64 * width))
    return CifarResNet(blocks, channels, num_classes=num_classes)


def resnet20(*, num_classes: int = 10, width: float = 1.0) -> CifarResNet:
    """Build the CIFAR ResNet-20 of the paper's memorization study.

    At width 1 and 10 classes 272,474 parameters; 270,896 are weights of its 22 convolutions and linear layers.
    The paper's runs at 75% sparsity and more leave the two 1x1 shortcuts, ``*.shortcut.0.weight``, dense.

    Args:
        num_classes: Outputs.
        width: Factor on the channels (16, 32, 64).

    Raises:
        ConfigError: As `cifar_resnet` does.

    Source: He et al., 2016, arXiv 1512.03385, section 4.2; used in Peste et al., 2021, arXiv 2106.12379.
    """
    return cifar_resnet(20, width=width, num_classes=num_classes)
