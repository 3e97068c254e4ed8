"""Which parameters may be pruned: chosen by name, glob, ``re:`` expression or module class."""

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from sparsetwin._compat import canonical_name
from sparsetwin.errors import TargetError, nearest

Selector = str | type[nn.Module]

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Module classes whose ``weight`` is a target by default."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A choice of parameters.

    By default every ``weight`` of a linear or convolution layer is a target, unless an embedding shares it. A selector
    is a parameter's name (``"fc.weight"``), a module's name (``"fc"``: its weight), a glob (``"layer1.*"``), a regular
    expression that matches a whole parameter name (``"re:layer[12].*"``) or a module class (``nn.Conv2d``).
    A parameter that goes by several names is chosen, or left out, by any of them, and is one target.
    """

    include: tuple[Selector, ...] = ()  # nothing means the default
    exclude: tuple[Selector, ...] = ()  # taken out of what is included
    dense_first: bool = False  # leave out the first target, such as a network's stem
    dense_last: bool = False  # leave out the last target, such as its classifier
    dense_depthwise: bool = False  # leave out depthwise convolutions

    def resolve(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the targets of a model by canonical name, in the order of its ``named_parameters()``.

        Raises:
            TargetError: If a selector matches nothing, a target is frozen or not a float, or no target is left.
        """
        uses = _uses(model)
        chosen = self._included(uses)
        for selector in self.exclude:
            chosen -= _match(selector, uses)
        if self.dense_depthwise:
            chosen -= {use.parameter for use in uses if _is_depthwise(use.module)}
        order = {canonical_name(name, model): parameter for name, parameter in model.named_parameters()}
        targets = {name: parameter for name, parameter in order.items() if parameter in chosen}
        names = list(targets)
        if self.dense_first:
            del targets[names[0]]
        if self.dense_last and names[-1] in targets:
            del targets[names[-1]]
        _check(targets)
        return targets

    def _included(self, uses: "list[_Use]") -> set[nn.Parameter]:
        if self.include:
            return set().union(*(_match(selector, uses) for selector in self.include))
        embedded = {use.parameter for use in uses if isinstance(use.module, (nn.Embedding, nn.EmbeddingBag))}
        layers = {use.parameter for use in uses if isinstance(use.module, LAYERS) and use.attribute == "weight"}
        if not layers - embedded:
            raise TargetError("the model has no linear or convolution weight; name its targets with include=")
        return layers - embedded


@dataclass(frozen=True)
class _Use:
    """One place where a module holds a parameter; a shared parameter has several."""

    name: str
    attribute: str
    module: nn.Module
    parameter: nn.Parameter


def _uses(model: nn.Module) -> list[_Use]:
    uses: list[_Use] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{prefix}.{attribute}" if prefix else attribute
            uses.append(_Use(canonical_name(full, model), attribute, module, parameter))
    return uses


def _match(selector: Selector, uses: Iterable[_Use]) -> set[nn.Parameter]:
    uses = list(uses)
    if isinstance(selector, type):
        found = {use.parameter for use in uses if isinstance(use.module, selector) and use.attribute == "weight"}
        shown = selector.__name__
    else:
        matches = _name_matcher(selector)
        found = {use.parameter for use in uses if matches(use.name)}
        shown = repr(selector)
    if not found:
        names = [use.name for use in uses]
        hint = nearest(selector, names) if isinstance(selector, str) else ""
        raise TargetError(f"{shown} matches no parameter of the model{hint or '; it has ' + _some(names)}")
    return found


def _name_matcher(selector: str) -> Callable[[str], bool]:
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector[3:])
        except re.error as error:
            raise TargetError(f"{selector!r} is not a regular expression: {error}") from error
        return lambda name: pattern.fullmatch(name) is not None
    if any(character in selector for character in "*?["):
        return lambda name: fnmatch.fnmatchcase(name, selector)
    return lambda name: name in (selector, f"{selector}.weight")


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels > 1


def _check(targets: dict[str, nn.Parameter]) -> None:
    if not targets:
        raise TargetError("no target is left after the exclusions")
    for name, parameter in targets.items():
        if not parameter.requires_grad:
            raise TargetError(f"{name} is frozen (requires_grad=False); unfreeze it or exclude it")
        if not parameter.dtype.is_floating_point:
            raise TargetError(f"{name} has dtype {parameter.dtype}; only floating-point weights can be pruned")
        if parameter.numel() == 0:
            raise TargetError(f"{name} has no elements; exclude it")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
