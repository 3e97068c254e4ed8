"""Reference networks by name."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from sparsetwin.errors import ConfigError, nearest
from sparsetwin.models.cifar_resnets import cifar_resnet, resnet20
from sparsetwin.models.digits import digits_cnn
from sparsetwin.models.language import gpt
from sparsetwin.models.mobilenets import mobilenetv1
from sparsetwin.models.resnets import resnet18, resnet50
from sparsetwin.models.wide_resnets import wrn_28_10

MODELS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet": cifar_resnet,
    "digits_cnn": digits_cnn,
    "gpt": gpt,
    "mobilenetv1": mobilenetv1,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "wrn_28_10": wrn_28_10,
}
"""Name -> function that builds the network."""


def build(name: str, **options: Any) -> nn.Module:
    """Build a reference network by name, as a configuration file or a command line gives it.

    >>> build("resnet20", num_classes=100).fc.out_features
    100

    Args:
        name: One of `MODELS`.
        **options: Arguments of that network's function.

    Raises:
        ConfigError: If the name or an option is unknown, an option without default is missing, or a value is refused.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model {name!r}; known: {', '.join(MODELS)}{nearest(name, MODELS)}")
    known = inspect.signature(MODELS[name]).parameters
    for option in options:
        if option not in known:
            raise ConfigError(
                f"model {name} has no option {option!r}; it has: {', '.join(known)}{nearest(option, known)}"
            )
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ConfigError(f"model {name} needs the option {option!r}, got: {', '.join(options) or 'none'}")
    return MODELS[name](**options)
