"""MobileNetV1: depthwise and pointwise convolutions in turn."""

from torch import Tensor, nn

from sparsetwin.models._init import kaiming_convolutions_

_BLOCKS = (  # output channels and stride of the 13 blocks
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel by itself (``depthwise``), then a 1x1 over all channels (``pointwise``)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        hidden = self.relu1(self.bn1(self.depthwise(images)))
        out: Tensor = self.relu2(self.bn2(self.pointwise(hidden)))
        return out


class MobileNetV1(nn.Module):
    """The network that `mobilenetv1` builds; its first convolution is ``conv1``, its last layer ``fc``."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        inputs = [32, *(outputs for outputs, _ in _BLOCKS)]
        self.blocks = nn.Sequential(
            *(SeparableBlock(i, outputs, stride=stride) for i, (outputs, stride) in zip(inputs, _BLOCKS, strict=False))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)
        kaiming_convolutions_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, height, width) to logits (batch, num_classes)."""
        hidden = self.blocks(self.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(self.avgpool(hidden).flatten(1))
        return logits


def mobilenetv1(*, num_classes: int = 1000) -> MobileNetV1:
    """Build a MobileNetV1 of width 1.

    For ImageNet 4,231,976 parameters; 4,209,088 are weights of its 28 convolutions and linear layers. The paper's
    variant with ``conv1`` and the depthwise convolutions dense excludes ``conv1.weight`` and ``*.depthwise.weight``.

    Args:
        num_classes: Outputs.

    Source: Howard et al., 2017, arXiv 1704.04861, table 1.
    """
    return MobileNetV1(num_classes=num_classes)
