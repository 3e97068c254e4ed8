"""Recipes by name."""

from collections.abc import Callable

from sparsetwin.errors import ConfigError, nearest
from sparsetwin.recipes._imports import import_object
from sparsetwin.recipes._own import charlm_gpt, digits
from sparsetwin.recipes._published import cifar10_resnet20, cifar100_wrn28_10, imagenet_mobilenetv1, imagenet_resnet50
from sparsetwin.recipes._recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "cifar10-resnet20": cifar10_resnet20,
    "cifar100-wrn28-10": cifar100_wrn28_10,
    "imagenet-resnet50": imagenet_resnet50,
    "imagenet-mobilenetv1": imagenet_mobilenetv1,
    "charlm-gpt": charlm_gpt,
}
"""Functions that return a recipe, by the name that the command line knows."""


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name, or that of ``package.module:function``.

    Raises:
        ConfigError: If there is none, or the function returns something else.
    """
    if ":" in name:
        make = import_object(name)
        if not callable(make):
            raise ConfigError(f"{name} is a {type(make).__name__}; expected a function that returns a Recipe")
        recipe = make()
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"{name} returned a {type(recipe).__name__}, not a sparsetwin.recipes.Recipe")
        return recipe
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    return RECIPES[name]()
