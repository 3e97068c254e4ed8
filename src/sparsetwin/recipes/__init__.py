"""Run configurations, and the functions that return them."""

from sparsetwin.recipes._build import build_run, check_recipe, describe, leaves_dense_half, model_factory, options_of
from sparsetwin.recipes._imports import import_object
from sparsetwin.recipes._methods import MethodSettings
from sparsetwin.recipes._recipe import (
    ModelSettings,
    Recipe,
    TargetSettings,
    recipe_from_plain,
)
from sparsetwin.recipes._schedule import ScheduleSettings
from sparsetwin.recipes._shape import check_layers, example_input, meta_model, training_samples
from sparsetwin.recipes.registry import RECIPES, find_recipe

__all__ = [
    "RECIPES",
    "MethodSettings",
    "ModelSettings",
    "Recipe",
    "ScheduleSettings",
    "TargetSettings",
    "build_run",
    "check_layers",
    "check_recipe",
    "describe",
    "example_input",
    "find_recipe",
    "import_object",
    "leaves_dense_half",
    "meta_model",
    "model_factory",
    "options_of",
    "recipe_from_plain",
    "training_samples",
]
