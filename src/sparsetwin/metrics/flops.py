"""How many floating-point operations a forward pass takes, and how many of them non-zero weights cause.

The rules are the paper's: a multiplication with its addition is 2 FLOPs and only non-zero weights count.

- convolution: (2 * non-zeros + output channels if it has a bias) * output positions
- linear layer: (2 * non-zeros + biases) * tokens
- batch norm: 2 * inputs; ReLU module: inputs; pooling: window size * outputs
- all else, such as shortcut additions, functional ReLUs, layer norms and softmax: nothing

Two rules are ours, as the paper has none:

- ``nn.MultiheadAttention``: its projections are linear layers, of queries, keys and values, and of what comes out
- attention's two matrix products, whose cost does not depend on any weight, are kept apart: ``ForwardFlops.attention``

What no rule covers, such as an LSTM, is not counted: a warning names the weights, and so does
``ForwardFlops.uncounted``.

Source: Peste et al., 2021, arXiv 2106.12379, and its published code.
"""

import copy
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin._compat import canonical_name, named_weights
from sparsetwin.errors import ConfigError, SparsityWarning, StateError
from sparsetwin.metrics._flop_rules import FunctionCounter, call_flops

Example = Tensor | Mapping[str, Tensor]
"""One sample with its batch axis, (1, ...), or keyword argument -> such a tensor."""


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """The forward FLOPs of one module, over all its calls in one forward pass; of attention, of each of its weights."""

    name: str  # canonical module name; that of the function for an attention whose weight is computed
    weight: str | None  # canonical name of its weight; None without one, or if it is computed from other parameters
    weight_size: int  # elements of that weight
    per_nonzero: int  # FLOPs that each non-zero weight causes
    other: int  # FLOPs that do not depend on the weight's zeros


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """The forward FLOPs of a model for one sample."""

    layers: tuple[LayerFlops, ...]  # in the order of their first call
    attention: int  # FLOPs of attention's two matrix products; a causal mask saves nothing
    uncounted: tuple[str, ...]  # weights of two or more axes in what no rule covers, so that its FLOPs are missing

    @property
    def weight_sizes(self) -> dict[str, int]:
        """Canonical name -> elements of every weight that is counted."""
        return {layer.weight: layer.weight_size for layer in self.layers if layer.weight is not None}

    def total(self, nonzero: Mapping[str, int] | None = None, *, samples: int = 1) -> int:
        """Return the FLOPs of one sample, or of several.

        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> forward = count_forward_flops(model, torch.zeros(1, 3))
        >>> forward.total(), forward.total({"0.weight": 1})
        (16, 6)
        >>> forward.total({"0.weight": 1 + 5}, samples=2)  # of one sample with 1 non-zero weight and one with 5
        20

        Args:
            nonzero: Canonical name -> non-zero elements, for at least the names in ``weight_sizes``, as
                `nonzero_counts` returns; by default every weight is dense. Of several samples their sum.
            samples: How many.

        Raises:
            StateError: If a weight is missing, or has less than 0 or more non-zeros than elements.
        """
        sizes = {name: size * samples for name, size in self.weight_sizes.items()}
        counts = sizes if nonzero is None else nonzero
        for name, size in sizes.items():
            if not 0 <= counts.get(name, -1) <= size:
                raise StateError(f"{name} has {size} elements; its non-zeros: {counts.get(name, 'not given')}")
        weighted = sum(layer.per_nonzero * counts[layer.weight] for layer in self.layers if layer.weight is not None)
        return weighted + samples * (sum(layer.other for layer in self.layers) + self.attention)


@torch.no_grad()
def count_forward_flops(model: nn.Module, example_input: Example) -> ForwardFlops:
    """Count the FLOPs of one forward pass in evaluation mode.

    The pass runs on a copy that shares the parameters, so the model's mode, buffers and hooks and the random
    generators stay as they are. An example on ``torch.device("meta")`` moves the copy there: then nothing is computed,
    and any model is counted at once. What no rule covers is warned of: a `SparsityWarning` names its weights. Weights
    that are looked up, as embeddings are, or added to activations are not meant.

    >>> count_forward_flops(nn.Conv2d(1, 4, 3, padding=1), torch.zeros(1, 1, 8, 8, device="meta")).total()
    4864

    Args:
        model: Any module, on the example's device unless that is ``meta``.
        example_input: One sample with its batch axis, (1, ...), or keyword argument -> such a tensor.

    Returns:
        FLOPs by module, for any number of non-zero weights.

    Raises:
        ConfigError: If the example holds no sample or several.

    Source: Peste et al., 2021, arXiv 2106.12379, and its published code.
    """
    inputs = [example_input] if isinstance(example_input, Tensor) else list(example_input.values())
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if not shapes or any(shape[:1] != (1,) for shape in shapes):
        raise ConfigError(f"FLOPs are counted for one sample, an example of shape (1, ...), got {shapes}")
    device = inputs[0].device
    twin = _copy(model, to_meta=device.type == "meta").eval()
    layers = _Layers(twin)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _eager(), layers.functions:
        if isinstance(example_input, Tensor):
            twin(example_input)
        else:
            twin(**example_input)
    found = ForwardFlops(layers=layers.counted(), attention=layers.functions.flops, uncounted=layers.uncounted())
    if found.uncounted:
        _warn_of_uncounted(found.uncounted)
    return found


def _warn_of_uncounted(names: tuple[str, ...]) -> None:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    warnings.warn(
        f"FLOPs are too low: what is computed with {shown} is not counted, as there is no rule for it",
        SparsityWarning,
        stacklevel=4,  # where count_forward_flops() was called; it is decorated
    )


def _copy(model: nn.Module, *, to_meta: bool) -> nn.Module:
    """Copy a model but for its parameters; with ``to_meta``, copy no numbers at all."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    if to_meta:
        memo = {id(weight): nn.Parameter(weight.detach().to("meta"), weight.requires_grad) for weight in memo.values()}
        memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _eager() -> AbstractContextManager[Any]:
    """Run compiled models as they were written; importing the compiler to say so would cost a second."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Layers:
    """Adds up, by hooks on every module of a model and on functions, what its calls cost."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # module name, or id of the weight of an attention -> the module or that weight, per non-zero, other
        self._costs: dict[str | int, tuple[nn.Module | Tensor, int, int]] = {}
        self.functions = FunctionCounter(lambda weight, each, other: self._add(id(weight), weight, (each, other)))
        for name, module in model.named_modules():
            module.register_forward_hook(self._hook(canonical_name(name, model)), with_kwargs=True)

    def _add(self, key: str | int, source: nn.Module | Tensor, cost: tuple[int, int]) -> None:
        _, per_nonzero, other = self._costs.get(key, (source, 0, 0))
        self._costs[key] = (source, per_nonzero + cost[0], other + cost[1])

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            cost = call_flops(module, next(iter([*args, *kwargs.values()]), None), made)
            if cost is not None:
                self._add(name, module, cost)

        return add

    def counted(self) -> tuple[LayerFlops, ...]:
        names = {id(weight): name for name, weight in named_weights(self._model).items()}
        layers = []
        for key, (source, per_nonzero, other) in self._costs.items():
            weight = source if isinstance(source, Tensor) else getattr(source, "weight", None) if per_nonzero else None
            size = 0 if weight is None else weight.numel()
            known = names.get(id(weight))
            if known is None:  # a weight that is computed, as by a parametrization, counts as dense
                per_nonzero, other, size = 0, other + per_nonzero * size, 0
            name = key if isinstance(key, str) else _owner(known)
            layers.append(LayerFlops(name=name, weight=known, weight_size=size, per_nonzero=per_nonzero, other=other))
        return tuple(layers)

    def uncounted(self) -> tuple[str, ...]:
        counted = {layer.weight for layer in self.counted()}
        computed = self._computed_from()
        return tuple(
            name
            for name, weight in named_weights(self._model).items()
            if id(weight) in self.functions.taken and name not in counted and id(weight) not in computed
        )

    def _computed_from(self) -> set[int]:
        """Return the ids of the parameters that weights of counted layers are computed from."""
        layers = [source for source, _, _ in self._costs.values() if isinstance(source, nn.Module)]
        found = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for module in self._model.modules():
            if isinstance(module, nn.MultiheadAttention):
                found |= {id(parameter) for name, parameter in module.named_parameters() if "parametrizations." in name}
        return found


def _owner(weight: str | None) -> str:
    """Return the name of the module that holds an attention's weight."""
    return "multi_head_attention_forward" if weight is None else weight.rpartition(".")[0]
