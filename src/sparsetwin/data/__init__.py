"""Data sets: where they come from, and the batches that a training loop reads."""

from sparsetwin.data._base import Batch, Batches, DataSource, Splits
from sparsetwin.data._sources import SOURCES
from sparsetwin.data.cifar import Cifar10, Cifar100, Relabelled
from sparsetwin.data.digits import Digits
from sparsetwin.data.imagenet import ImageNet
from sparsetwin.data.text import CharText, read_text, vocabulary

__all__ = [
    "SOURCES",
    "Batch",
    "Batches",
    "CharText",
    "Cifar10",
    "Cifar100",
    "DataSource",
    "Digits",
    "ImageNet",
    "Relabelled",
    "Splits",
    "read_text",
    "vocabulary",
]
