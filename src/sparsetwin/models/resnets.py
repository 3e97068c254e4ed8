"""ResNet-18 and ResNet-50, with torchvision's layout and parameter names."""

from torch import Tensor, nn

from sparsetwin.models._init import kaiming_convolutions_


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1  # output channels / channels

    def __init__(self, inputs: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(inputs, channels, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, channels, height / stride, width / stride)."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.bn2(self.conv2(hidden))
        shortcut = images if self.downsample is None else self.downsample(images)
        out: Tensor = self.relu(hidden + shortcut)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride is on the 3x3."""

    expansion = 4  # output channels / channels

    def __init__(self, inputs: int, channels: int, *, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, 4 * channels, height / stride, width / stride)."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(hidden))
        shortcut = images if self.downsample is None else self.downsample(images)
        out: Tensor = self.relu(hidden + shortcut)
        return out


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """The network that `resnet18` and `resnet50` build; its first convolution is ``conv1``, its last layer ``fc``."""

    def __init__(self, block: Block, blocks: tuple[int, ...], *, num_classes: int, small_input: bool) -> None:
        super().__init__()
        if small_input:
            self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, blocks[0], 64, 64, stride=1)
        self.layer2 = _stage(block, blocks[1], 64 * block.expansion, 128, stride=2)
        self.layer3 = _stage(block, blocks[2], 128 * block.expansion, 256, stride=2)
        self.layer4 = _stage(block, blocks[3], 256 * block.expansion, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        kaiming_convolutions_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        hidden = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        logits: Tensor = self.fc(self.avgpool(hidden).flatten(1))
        return logits


def _shortcut(inputs: int, outputs: int, *, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(block: Block, blocks: int, inputs: int, channels: int, *, stride: int) -> nn.Sequential:
    rest = (block(channels * block.expansion, channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(block(inputs, channels, stride=stride), *rest)


def resnet18(*, num_classes: int = 10, small_input: bool = True) -> ResNet:
    """Build a ResNet-18.

    >>> sum(parameter.numel() for parameter in resnet18(num_classes=1000, small_input=False).parameters())
    11689512

    Args:
        num_classes: Outputs.
        small_input: True for 32x32 images: ``conv1`` is 3x3 with stride 1 and there is no max pool. False for
            ImageNet's 224x224: 7x7 with stride 2 and a max pool.

    Source: He et al., 2016, arXiv 1512.03385, table 1.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, small_input=small_input)


def resnet50(*, num_classes: int = 1000, small_input: bool = False) -> ResNet:
    """Build a ResNet-50.

    For ImageNet 25,557,032 parameters; 25,502,912 are weights of its 54 convolutions and linear layers.

    Args:
        num_classes: Outputs.
        small_input: As for `resnet18`.

    Source: He et al., 2016, arXiv 1512.03385, table 1, with the stride on the 3x3 convolutions as in torchvision.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, small_input=small_input)
