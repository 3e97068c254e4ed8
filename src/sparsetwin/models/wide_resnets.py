"""WRN-28-10, laid out as in the AC/DC experiments on CIFAR-100."""

from torch import Tensor, nn

from sparsetwin.models._init import kaiming_convolutions_


class WideBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice, with dropout between, beside a shortcut.

    The stride is on the second convolution, the convolutions have biases, and a 1x1 shortcut sees the block's
    input before its batch norm. The WRN paper has the stride on the first one, no biases, and shares the batch norm.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=True)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        hidden = self.dropout(self.conv1(self.relu1(self.bn1(images))))
        out: Tensor = self.conv2(self.relu2(self.bn2(hidden))) + self.shortcut(images)
        return out


class WideResNet(nn.Module):
    """The network that `wrn_28_10` builds; its first convolution is ``conv1``, its last layer ``fc``."""

    def __init__(self, blocks: int, channels: tuple[int, int, int], *, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=True)
        self.layer1 = _stage(blocks, 16, channels[0], stride=1, dropout=dropout)
        self.layer2 = _stage(blocks, channels[0], channels[1], stride=2, dropout=dropout)
        self.layer3 = _stage(blocks, channels[1], channels[2], stride=2, dropout=dropout)
        self.bn = nn.BatchNorm2d(channels[2], momentum=0.9)  # the only one with another momentum than 0.1
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[2], num_classes)
        kaiming_convolutions_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        logits: Tensor = self.fc(self.avgpool(self.relu(self.bn(hidden))).flatten(1))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, *, stride: int, dropout: float) -> nn.Sequential:
    rest = (WideBlock(outputs, outputs, stride=1, dropout=dropout) for _ in range(blocks - 1))
    return nn.Sequential(WideBlock(inputs, outputs, stride=stride, dropout=dropout), *rest)


def wrn_28_10(*, num_classes: int = 100, dropout: float = 0.3) -> WideResNet:
    """Build a WRN-28-10 for 32x32 images.

    With 100 classes 36,546,980 parameters; 36,518,832 are weights of its 29 convolutions and linear layers.

    Args:
        num_classes: Outputs.
        dropout: Chance that an activation between a block's two convolutions is dropped.

    Source: Zagoruyko & Komodakis, 2016, arXiv 1605.07146; layout as counted for Peste et al., 2021, arXiv 2106.12379.
    """
    return WideResNet(4, (160, 320, 640), num_classes=num_classes, dropout=dropout)
