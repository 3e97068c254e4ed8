"""A narrower dense network that costs what a sparse one costs: the baseline that sparsity has to beat."""

import inspect
import json
import math
from bisect import bisect_left
from functools import cache, lru_cache

from sparsetwin.comparison._contenders import changed
from sparsetwin.errors import ConfigError
from sparsetwin.metrics import count_forward_flops
from sparsetwin.models import MODELS
from sparsetwin.recipes import Recipe, example_input, meta_model, recipe_from_plain

_STEPS = 200  # widths that there are


def small_width(recipe: Recipe, *, sparsity: float, measure: str, goal: int | None = None) -> float:
    """Return the width at which the recipe's dense network comes nearest to a sparse one.

    The sparse one keeps ``1 - sparsity`` of its target weights, the same in each layer, and all of the rest. What one
    ranking over all layers leaves costs more, as it keeps more where weights are used often: give that as the goal.

    Args:
        recipe: Of a network that has an option ``width``, a factor on its channels.
        sparsity: Fraction in [0, 1).
        measure: ``"parameters"`` or ``"flops"`` (of inference).
        goal: Cost of the sparse network, where it is known.

    Raises:
        ConfigError: If the network has no such option.
    """
    return _small_width(json.dumps(recipe.plain()), sparsity, measure, goal)


@lru_cache(maxsize=256)
def _small_width(plain: str, sparsity: float, measure: str, given: int | None) -> float:
    recipe = recipe_from_plain(json.loads(plain))
    width = (
        inspect.signature(MODELS[recipe.model.name]).parameters.get("width") if recipe.model.name in MODELS else None
    )
    if width is None or not isinstance(width.default, float):
        raise ConfigError(f"{recipe.model.name} has no option width that is a factor on its channels")
    goal = _cost(recipe, sparsity, measure) if given is None else given
    base = float(recipe.model.options.get("width", width.default))

    @cache
    def cost(step: int) -> float:
        try:
            return _cost(changed(recipe, {"model.options.width": base * step / _STEPS}), 0.0, measure)
        except ConfigError:  # too narrow to have any channels
            return -math.inf

    above = bisect_left(range(1, _STEPS + 1), goal, key=cost) + 1  # a wider network costs more
    nearest = min((step for step in (above - 1, above) if 1 <= step <= _STEPS), key=lambda step: abs(cost(step) - goal))
    return base * nearest / _STEPS


def _cost(recipe: Recipe, sparsity: float, measure: str) -> float:
    model = meta_model(recipe)
    targets = recipe.targets.build().resolve(model)
    if measure == "parameters":
        pruned = sum(round(sparsity * weight.numel()) for weight in targets.values())
        return sum(parameter.numel() for parameter in model.parameters()) - pruned
    forward = count_forward_flops(model, example_input(recipe.dataset))
    sizes = forward.weight_sizes
    return forward.total({n: size - round(sparsity * size) * (n in targets) for n, size in sizes.items()})
