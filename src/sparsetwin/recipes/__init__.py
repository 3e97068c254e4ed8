"""Run configurations, and the functions that return them."""

from sparsetwin.recipes._build import build_run, check_recipe, describe, model_factory
from sparsetwin.recipes._imports import import_object
from sparsetwin.recipes._recipe import (
    MethodSettings,
    ModelSettings,
    Recipe,
    TargetSettings,
    recipe_from_plain,
)
from sparsetwin.recipes._schedule import ScheduleSettings
from sparsetwin.recipes.registry import RECIPES, find_recipe

__all__ = [
    "RECIPES",
    "MethodSettings",
    "ModelSettings",
    "Recipe",
    "ScheduleSettings",
    "TargetSettings",
    "build_run",
    "check_recipe",
    "describe",
    "find_recipe",
    "import_object",
    "model_factory",
    "recipe_from_plain",
]
