"""Data sources by name."""

from sparsetwin.data._base import DataSource
from sparsetwin.data.cifar import Cifar10, Cifar100
from sparsetwin.data.digits import Digits
from sparsetwin.data.imagenet import ImageNet
from sparsetwin.data.text import CharText

SOURCES: dict[str, type[DataSource]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "imagenet": ImageNet,
    "chartext": CharText,
}
"""What the command line offers."""
