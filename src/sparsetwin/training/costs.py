"""What the steps of a method cost, pass by pass, from the weights that each pass computes with."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sparsetwin._compat import total
from sparsetwin.methods import Method, Pass
from sparsetwin.metrics import ForwardFlops
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class Density:
    """Weights that passes compute with, as FLOPs of a forward pass of one sample, or of several together."""

    all: int  # with every weight
    kept: int  # with those that are not zero
    updated: int  # with those whose gradients the optimizer sees
    fixed: int = 0  # with no target

    def at(self, density: float) -> int:
        """Return the FLOPs with a fraction of every target."""
        return round(self.fixed + density * (self.all - self.fixed))


def step_flops(method: Method, phase: Phase, density: Density, *, enters: bool) -> int:
    """Return the training FLOPs of one sample in one step, as they are expected where passes differ by chance.

    >>> from sparsetwin import ACDC, schedules
    >>> method = ACDC(schedule=schedules.constant(sparsity=0.9, total_steps=1))
    >>> step_flops(method, method.schedule.phases[0], Density(all=100, kept=10, updated=10), enters=False)
    30

    Args:
        method: Says which passes a step has.
        phase: In force.
        density: Weights that are kept and updated in it.
        enters: Whether the phase was entered in this step, between backward and update.
    """
    return sum(pass_flops(each, _expected(each, density)) for each in method.passes(phase, enters=enters))


def pass_flops(each: Pass, density: Density) -> int:
    """Return the training FLOPs of one pass.

    A backward pass is two products as large as the forward one: by the weights for the gradient of the inputs, and by
    the inputs for the gradient of the weights.

    >>> pass_flops(Pass(weight_gradient="all"), Density(all=100, kept=10, updated=20))
    120

    Args:
        each: Says which weights take part in which product.
        density: What these weights are.
    """
    parts = (each.forward, each.input_gradient, each.weight_gradient)
    return sum(getattr(density, part) for part in parts if part is not None)


def _expected(each: Pass, density: Density) -> Density:
    return density if each.density is None else dataclasses.replace(density, kept=density.at(each.density))


def has_gradient_masks(method: Method) -> bool:
    """Return whether a method may let the optimizer see other gradients than those of kept weights."""
    return type(method).gradient_masks is not Method.gradient_masks


def updated_counts(sparsifier: Sparsifier) -> dict[str, int]:
    """Return how many weights' gradients the optimizer sees, where these are not those of kept weights."""
    if not has_gradient_masks(sparsifier.method) or not sparsifier.masks:
        return {}
    sizes = {name: weight.numel() for name, weight in sparsifier.weights.items()}
    return {**sizes, **{name: total(mask.count_nonzero()) for name, mask in sparsifier.gradient_masks.items()}}


def density_of(
    forward: ForwardFlops,
    nonzero: Mapping[str, int],
    updated: Mapping[str, int],
    targets: Iterable[str],
    *,
    samples: int = 1,
) -> Density:
    """Return what passes compute with.

    Args:
        forward: Of the model.
        nonzero: Canonical name -> weights that are not zero; of several samples their sum.
        updated: Canonical name -> weights whose gradients the optimizer sees, for some or all of them; likewise.
        targets: Canonical names of the weights that may be pruned.
        samples: How many.
    """
    none = {**{name: size * samples for name, size in forward.weight_sizes.items()}, **dict.fromkeys(targets, 0)}
    return Density(
        all=forward.total(samples=samples),
        kept=forward.total(nonzero, samples=samples),
        updated=forward.total({**nonzero, **updated}, samples=samples),
        fixed=forward.total(none, samples=samples),
    )
