"""Quantization-aware training as a recipe asks for it, and run.json of releases that did not know it."""

from dataclasses import replace

import pytest

import sparsetwin as st
from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.recipes import MethodSettings, ScheduleSettings, check_recipe, find_recipe, recipe_from_plain

STEPS = 100  # of an epoch
LENGTHS = {"warmup": 2, "sparse": 1, "dense": 1, "final_dense": 2, "final_sparse": 3}


def built(name: str = "acdc", *, unit: str = "epochs", scale: float = 1.0, **fields: object) -> st.Method:
    schedule = ScheduleSettings(unit=unit, **{key: value * scale for key, value in LENGTHS.items()})
    return MethodSettings(name=name, **fields).build(schedule, steps_per_epoch=STEPS, epochs=10)


def test_it_is_off_unless_asked_for():
    assert built().quantization is None
    assert built(qat=True).quantization == st.Int8()
    assert built(qat=True).first_quantized == 700


@pytest.mark.parametrize(("unit", "scale"), [("epochs", 1.0), ("steps", 100.0), ("fractions", 0.1)])
def test_its_begin_is_given_in_the_unit_of_the_schedule(unit, scale):
    found = built(unit=unit, scale=scale, qat=True, qat_start=8.5 * scale)
    assert found.quantization == st.Int8(start_step=850)


@pytest.mark.parametrize(("fields", "error", "message"), [
    ({"qat_start": 8.0}, ConfigError, "add --qat"),
    ({"qat": True, "qat_start": 3.0}, ConfigError, "begins at step 300.*let it begin from step 700 to 999"),
    ({"qat": True, "qat_start": 10.0}, ConfigError, "begins at step 1000"),
    ({"qat": True, "qat_start": -1.0}, ScheduleError, "not negative"),
    ({"qat": True, "name": "dense"}, ConfigError, "ends dense"),
    ({"options": {"quantization": 8}}, ConfigError, "asked for by --qat"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_trained(fields, error, message):
    with pytest.raises(error, match=message):
        built(**fields)


def test_a_recipe_is_checked_with_it():
    recipe = find_recipe("digits")
    check_recipe(replace(recipe, method=MethodSettings(qat=True)))
    with pytest.raises(ConfigError, match="ends dense"):
        check_recipe(replace(recipe, method=MethodSettings(name="dense", qat=True)))


def test_a_recipe_with_it_is_plain_data_and_back():
    recipe = replace(find_recipe("digits"), method=MethodSettings(qat=True, qat_start=50.0))
    assert (recipe.plain()["method"]["qat"], recipe.plain()["method"]["qat_start"]) == (True, 50.0)
    assert recipe_from_plain(recipe.plain()) == recipe


def test_a_recipe_without_it_is_written_as_by_older_releases_and_theirs_are_read():
    recipe = find_recipe("digits")
    assert not {"qat", "qat_start"} & recipe.plain()["method"].keys()
    assert recipe_from_plain(recipe.plain()) == recipe
    partly = recipe.plain()
    partly["method"]["qat"] = True
    with pytest.raises(ConfigError, match="'qat_start' of MethodSettings is missing"):
        recipe_from_plain(partly)
