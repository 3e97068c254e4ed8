"""How many floating-point operations a forward pass takes, and how many of them non-zero weights cause.

The rules are the paper's: a multiplication with its addition is 2 FLOPs and only non-zero weights count.

- convolution: (2 * non-zeros + output channels if it has a bias) * output positions
- linear layer: (2 * non-zeros + biases) * tokens
- batch norm: 2 * inputs; ReLU module: inputs; pooling: window size * outputs
- all else, such as shortcut additions, functional ReLUs, layer norms and softmax: nothing

One term is ours, as the paper has no rule for it: the two matrix products of ``scaled_dot_product_attention``, whose
cost does not depend on any weight. It is kept apart, in ``ForwardFlops.attention``.

Source: Peste et al., 2021, arXiv 2106.12379, and its published code.
"""

import copy
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin._compat import canonical_name, named_weights
from sparsetwin.errors import ConfigError, StateError
from sparsetwin.metrics._flop_rules import AttentionCounter, call_flops

Example = Tensor | Mapping[str, Tensor]
"""One sample with its batch axis, (1, ...), or keyword argument -> such a tensor."""


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """The forward FLOPs of one module, over all its calls in one forward pass."""

    name: str  # canonical module name
    weight: str | None  # canonical name of its weight; None without one, or if it is computed from other parameters
    weight_size: int  # elements of that weight
    per_nonzero: int  # FLOPs that each non-zero weight causes
    other: int  # FLOPs that do not depend on the weight's zeros


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """The forward FLOPs of a model for one sample."""

    layers: tuple[LayerFlops, ...]  # in the order of their first call
    attention: int  # FLOPs of the matrix products of scaled_dot_product_attention; a causal mask saves nothing
    uncounted: tuple[str, ...]  # weights of two or more axes that no counted layer uses, embeddings aside

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
    and any model is counted at once.

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
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _eager(), AttentionCounter() as attention:
        if isinstance(example_input, Tensor):
            twin(example_input)
        else:
            twin(**example_input)
    return ForwardFlops(layers=layers.counted(), attention=attention.flops, uncounted=layers.uncounted())


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
    """Adds up, by hooks on every module of a model, what its calls cost."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._costs: dict[str, tuple[nn.Module, int, int]] = {}  # module name -> module, per non-zero, other
        for name, module in model.named_modules():
            module.register_forward_hook(self._hook(canonical_name(name, model)), with_kwargs=True)

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            cost = call_flops(module, next(iter([*args, *kwargs.values()]), None), made)
            if cost is not None:
                _, per_nonzero, other = self._costs.get(name, (module, 0, 0))
                self._costs[name] = (module, per_nonzero + cost[0], other + cost[1])

        return add

    def counted(self) -> tuple[LayerFlops, ...]:
        names = {id(weight): name for name, weight in named_weights(self._model).items()}
        layers = []
        for name, (module, per_nonzero, other) in self._costs.items():
            weight = getattr(module, "weight", None) if per_nonzero else None
            size = 0 if weight is None else weight.numel()
            known = names.get(id(weight))
            if known is None:  # a weight that is computed, as by a parametrization, counts as dense
                per_nonzero, other, size = 0, other + per_nonzero * size, 0
            layers.append(LayerFlops(name=name, weight=known, weight_size=size, per_nonzero=per_nonzero, other=other))
        return tuple(layers)

    def uncounted(self) -> tuple[str, ...]:
        used = {layer.weight for layer in self.counted()}
        lookups = {id(module.weight) for module in self._model.modules() if isinstance(module, nn.Embedding)}
        weights = named_weights(self._model).items()
        return tuple(
            name for name, weight in weights if weight.dim() > 1 and name not in used and id(weight) not in lookups
        )
