"""Reference networks, as plain modules: the paper's, and small ones to try things on."""

from sparsetwin.models.cifar_resnets import cifar_resnet, resnet20
from sparsetwin.models.digits import digits_cnn
from sparsetwin.models.language import gpt
from sparsetwin.models.mobilenets import mobilenetv1
from sparsetwin.models.registry import MODELS, build
from sparsetwin.models.resnets import resnet18, resnet50
from sparsetwin.models.wide_resnets import wrn_28_10

__all__ = [
    "MODELS",
    "build",
    "cifar_resnet",
    "digits_cnn",
    "gpt",
    "mobilenetv1",
    "resnet18",
    "resnet20",
    "resnet50",
    "wrn_28_10",
]
