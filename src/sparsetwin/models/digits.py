"""A small network for the 8x8 digits that come with the library."""

from torch import Tensor, nn

from sparsetwin.models._init import kaiming_convolutions_


class DigitsCNN(nn.Module):
    """The network that `digits_cnn` builds; its first convolution is ``conv1``, its last layer ``fc``."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.relu3 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        kaiming_convolutions_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, num_classes)."""
        hidden = self.relu1(self.bn1(self.conv1(images)))
        hidden = self.relu2(self.bn2(self.conv2(hidden)))
        hidden = self.relu3(self.bn3(self.conv3(hidden)))
        logits: Tensor = self.fc(self.avgpool(hidden).flatten(1))
        return logits


def digits_cnn(*, num_classes: int = 10) -> DigitsCNN:
    """Build a convolutional network for 1x8x8 images that trains in seconds on a laptop CPU.

    >>> sum(parameter.numel() for parameter in digits_cnn().parameters())
    56554

    Args:
        num_classes: Outputs.
    """
    return DigitsCNN(num_classes=num_classes)
