"""Which parameters may be pruned: chosen by name, glob, ``re:`` expression or module class."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from sparsetwin._compat import canonical_name, named_weights
from sparsetwin._matching import name_matcher
from sparsetwin.errors import SparsityWarning, TargetError, nearest

Selector = str | type[nn.Module]

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Module classes whose ``weight`` is a target by default."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention
_WEIGHTS = ("weight", *_PROJECTIONS)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A choice of parameters.

    By default every ``weight`` of a ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` is a target, unless an
    embedding shares it. No targets by default are the projections that ``nn.MultiheadAttention`` holds itself (its
    output projection is one), transposed convolutions, and weights that are computed from others, as by a
    parametrization or weight norm: a `Sparsifier` warns of those that are neither targets nor excluded. Recurrent
    layers are no targets either. A selector is one of

    - a parameter's name (``"fc.weight"``), or a module's, which stands for its weight (``"fc"``);
    - a glob over such names (``"layer1.*.conv2"``; ``"layer1.*"`` matches the biases and norms in there, too);
    - ``re:`` and a regular expression that matches a whole parameter name (``"re:layer[12].*weight"``);
    - a module class (``nn.Conv2d``), which stands for the weights of its instances (``nn.MultiheadAttention`` for the
      projections that it holds itself).

    A parameter that goes by several names is chosen, or left out, by any of them, and is one target.
    """

    include: tuple[Selector, ...] = ()  # nothing means the default
    exclude: tuple[Selector, ...] = ()  # taken out of what is included
    dense_first: bool = False  # leave out the first of what is left, such as a network's stem
    dense_last: bool = False  # leave out the last of what is left, such as its classifier
    dense_depthwise: bool = False  # leave out depthwise convolutions

    def __post_init__(self) -> None:
        for field, selectors in (("include", self.include), ("exclude", self.exclude)):
            if isinstance(selectors, (str, type)):
                raise TargetError(
                    f"{field} is a tuple of selectors, got {selectors!r}; write a comma: ({selectors!r},)"
                )

    def resolve(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the targets of a model by canonical name, in the order of its ``named_parameters()``.

        Raises:
            TargetError: If a selector matches nothing, a target is frozen, not a float, without elements or not yet
                initialised, or no target is left.
        """
        uses = _uses(model)
        chosen = self._included(uses)
        for selector in self.exclude:
            chosen -= _match(selector, uses)
        if self.dense_depthwise:
            chosen -= {use.parameter for use in uses if _is_depthwise(use.module)}
        weights = named_weights(model)
        names = [name for name, parameter in weights.items() if parameter in chosen]
        left = names[int(self.dense_first) : len(names) - int(self.dense_last)]
        targets = {name: weights[name] for name in left}
        _check(targets)
        return targets

    def passed_over(self, model: nn.Module) -> tuple[str, ...]:
        """Return what is no target by default although it works as a linear or convolution layer, and is trained.

        Args:
            model: Any module.

        Returns:
            Canonical names of projections of ``nn.MultiheadAttention``, transposed convolutions and computed weights
            that are not excluded; none where targets are named by ``include``.
        """
        if self.include:
            return ()
        uses = _uses(model) if self.exclude else []
        excluded = {parameter for selector in self.exclude for parameter in _match(selector, uses)}
        names = []
        for prefix, module in model.named_modules():
            for attribute, sources in _unusual(module):
                if any(source.requires_grad for source in sources) and not excluded & set(sources):
                    names.append(canonical_name(f"{prefix}.{attribute}" if prefix else attribute, model))
        return tuple(names)

    def warn_of_passed_over(self, model: nn.Module, *, stacklevel: int) -> None:
        """Name in a `SparsityWarning` what `passed_over` returns.

        Args:
            model: Any module.
            stacklevel: Of the caller to whom it is told, as in ``warnings.warn``.
        """
        names = self.passed_over(model)
        if names:
            warnings.warn(
                f"no targets by default: {_some(list(names))} stay dense. Name attention's projections and transposed "
                "convolutions in include=, take parametrizations off before training, or name what is to stay dense in "
                "exclude=",
                SparsityWarning,
                stacklevel=stacklevel + 1,
            )

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


def _unusual(module: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Yield each weight of a module that is no target by default, with the parameters that it is computed from."""
    attributes: tuple[str, ...]
    if isinstance(module, nn.MultiheadAttention):
        attributes = _PROJECTIONS
    elif isinstance(module, (*LAYERS, *_TRANSPOSED)):
        attributes = ("weight",)
    else:
        return
    for attribute in attributes:
        if attribute in module._parameters:
            parameter = module._parameters[attribute]
            if parameter is not None and not isinstance(module, LAYERS):
                yield attribute, [parameter]
        else:
            names = (f"parametrizations.{attribute}.", f"{attribute}_")  # as weight_g and weight_v
            sources = [parameter for name, parameter in module.named_parameters() if name.startswith(names)]
            if sources:
                yield attribute, sources


def _match(selector: Selector, uses: Iterable[_Use]) -> set[nn.Parameter]:
    uses = list(uses)
    if isinstance(selector, type):
        found = {use.parameter for use in uses if isinstance(use.module, selector) and use.attribute in _WEIGHTS}
        shown = selector.__name__
    else:
        matches = name_matcher(selector)
        found = {use.parameter for use in uses if matches(use.name)}
        shown = repr(selector)
    if not found:
        names = [use.name for use in uses]
        hint = nearest(selector, names) if isinstance(selector, str) else ""
        raise TargetError(f"{shown} matches no parameter of the model{hint or '; it has ' + _some(names)}")
    return found


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels > 1


def _check(targets: dict[str, nn.Parameter]) -> None:
    if not targets:
        raise TargetError("no target is left after the exclusions")
    for name, parameter in targets.items():
        if isinstance(parameter, nn.UninitializedParameter):
            raise TargetError(f"{name} has no shape yet; run the lazy layer once on an input before choosing targets")
        if not parameter.dtype.is_floating_point:
            raise TargetError(f"{name} has dtype {parameter.dtype}; only floating-point weights can be pruned")
        if not parameter.requires_grad:
            raise TargetError(f"{name} is frozen (requires_grad=False); unfreeze it or exclude it")
        if parameter.numel() == 0:
            raise TargetError(f"{name} has no elements; exclude it")


def _some(names: list[str]) -> str:
    return (", ".join(names[:5]) or "none") + (f" and {len(names) - 5} more" if len(names) > 5 else "")
