"""Reference networks by name."""

import pytest
import torch

from sparsetwin import models
from sparsetwin.errors import ConfigError
from sparsetwin.models import MODELS, build

REQUIRED = {"gpt": {"vocabulary": 20, "width": 8, "layers": 1}, "cifar_resnet": {"depth": 8}}


def test_every_public_network_has_its_own_name_in_the_table():
    assert {name: getattr(models, name) for name in models.__all__ if name not in ("MODELS", "build")} == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_every_network_can_be_built_by_name(name):
    options = REQUIRED.get(name, {})
    with torch.device("meta"):
        built, expected = build(name, **options), MODELS[name](**options)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (built, expected)]
    assert shapes[0] == shapes[1] != {}


def test_options_reach_the_network():
    assert build("digits_cnn", num_classes=3).fc.out_features == 3


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown model 'resnet_20'; known: .*did you mean 'resnet20'"):
        build("resnet_20")


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"resnet20 has no option 'num_class'; it has: .*did you mean 'num_classes'"):
        build("resnet20", num_class=10)


def test_a_missing_option_is_named():
    with pytest.raises(ConfigError, match="gpt needs the option 'vocabulary', got: layers"):
        build("gpt", layers=2)
