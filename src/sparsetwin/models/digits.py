"""A small network for the 8x8 digits that come with the library."""

from torch import Tensor, nn

from sparsetwin.errors import ConfigError
from sparsetwin.models._init import kaiming_convolutions_


class DigitsCNN(nn.Module):
    """The network that `digits_cnn` builds; its first convolution is ``conv1``, its last layer ``fc``."""

    def __init__(self, channels: tuple[int, int], *, num_classes: int) -> None:
        super().__init__()
        first, rest = channels
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(first, rest, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(rest)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(rest, rest, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(rest)
        self.relu3 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(rest, num_classes)
        kaiming_convolutions_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, num_classes)."""
        hidden = self.relu1(self.bn1(self.conv1(images)))
        hidden = self.relu2(self.bn2(self.conv2(hidden)))
        hidden = self.relu3(self.bn3(self.conv3(hidden)))
        logits: Tensor = self.fc(self.avgpool(hidden).flatten(1))
        return logits


def digits_cnn(*, num_classes: int = 10, width: float = 1.0) -> DigitsCNN:
    """Build a convolutional network for 1x8x8 images that trains in seconds on a laptop CPU.

    >>> sum(parameter.numel() for parameter in digits_cnn().parameters())
    56554

    Args:
        num_classes: Outputs.
        width: Factor on the channels (32, 64), rounded to whole channels.

    Raises:
        ConfigError: If ``width`` leaves a layer without channels.
    """
    if round(32 * width) < 1:
        raise ConfigError(f"width multiplies 32 and 64 channels and needs to leave at least 1, got {width}")
    return DigitsCNN((round(32 * width), round(64 * width)), num_classes=num_classes)
