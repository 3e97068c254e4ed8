"""What one call of one module costs, and what attention costs."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
WEIGHTED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


def call_flops(module: nn.Module, given: Any, made: Any) -> tuple[int, int] | None:
    """Return what a call costs for each non-zero weight, and what besides; None for a module that is not counted.

    Args:
        module: The module that was called.
        given: Its first argument, (1, ...).
        made: What it returned, (1, ...).

    Source: Peste et al., 2021, arXiv 2106.12379, and its published code.
    """
    if isinstance(made, tuple):  # a max pool that returns indices too
        made = made[0]
    if not (isinstance(given, Tensor) and isinstance(made, Tensor)):
        return None
    if isinstance(module, nn.Linear):
        tokens = made.shape[:-1].numel()
        return 2 * tokens, 0 if module.bias is None else made.numel()
    if isinstance(module, WEIGHTED):
        source = given if isinstance(module, _TRANSPOSED) else made  # each weight is used once at each of its positions
        return 2 * source.shape[2:].numel(), 0 if module.bias is None else made.numel()
    if isinstance(module, _BATCH_NORMS):
        return 0, 2 * given.numel()
    if isinstance(module, nn.ReLU):
        return 0, made.numel()
    if isinstance(module, _POOLS):
        return 0, _window(module.kernel_size, axes=made.dim() - 2) * made.numel()
    if isinstance(module, _ADAPTIVE_POOLS):
        windows = (_adaptive_window(*sizes) for sizes in zip(given.shape[2:], made.shape[2:], strict=True))
        return 0, prod(windows) * made.shape[1]
    return None


def _window(kernel_size: int | tuple[int, ...], *, axes: int) -> int:
    """Return the elements of a pooling window."""
    return prod(kernel_size) if isinstance(kernel_size, tuple) else kernel_size**axes


def _adaptive_window(given: int, made: int) -> int:
    """Return the summed length of an adaptive pool's windows along one axis; they overlap if it does not divide."""
    return sum(-(-(index + 1) * given // made) - index * given // made for index in range(made))


class FunctionCounter(TorchFunctionMode):
    """Counts what attention costs while it is entered, and notes the weights that any function is given.

    Args:
        add: Called with a weight, FLOPs for each of its non-zeros and FLOPs besides, for every projection of
            ``multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls with all its weights.
    """

    def __init__(self, add: Callable[[Tensor, int, int], None]) -> None:
        super().__init__()
        self.flops = 0  # of attention's two matrix products
        self.taken: set[int] = set()  # ids of parameters with two or more axes that may have been in a product
        self._add = add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, and add its FLOPs if it is attention; what it calls in turn is not seen."""
        made = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            keys = given["key"].shape[-2]
            self.flops += 2 * keys * (given["query"].numel() + made.numel())
        elif func is F.multi_head_attention_forward:
            given = _ATTENTION.bind(*args, **(kwargs or {})).arguments
            self.flops += _products(given)
            for projection in _projections(given):
                self._add(*projection)
            return made
        self._note(getattr(func, "__name__", ""), [*args, *(kwargs or {}).values()], made)
        return made

    def _note(self, name: str, given: Sequence[Any], made: Any) -> None:
        """Note parameters that were more than looked up, added or scaled; a call without a tensor computes nothing."""
        results = [result for result in _flat([made]) if isinstance(result, Tensor)]
        if not results or name in _FREE:
            return
        for weight in _flat(given):
            is_free = name in _ELEMENTWISE and isinstance(weight, Tensor) and _is_spread(weight, results[0])
            if isinstance(weight, nn.Parameter) and weight.dim() > 1 and not is_free:
                self.taken.add(id(weight))


_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_FREE = frozenset(("embedding", "embedding_bag", "embedding_renorm_", "expand", "expand_as", "layer_norm", "rms_norm"))
_SPELLINGS = ("{}", "{}_", "r{}", "__{}__", "__r{}__", "__i{}__")
_ELEMENTWISE = frozenset(spelling.format(name) for name in ("add", "sub", "mul", "div") for spelling in _SPELLINGS)


def _products(given: Mapping[str, Any]) -> int:
    """Return the FLOPs of queries by keys and of their scores by values, over all heads."""
    fixed = given.get("static_k")
    keys = given["key"].shape[0] if fixed is None else fixed.shape[1]
    keys += (given["bias_k"] is not None) + bool(given["add_zero_attn"])
    return int(2 * 2 * keys * given["query"].numel())


def _projections(given: Mapping[str, Any]) -> Iterator[tuple[Tensor, int, int]]:
    """Yield each weight, with its FLOPs for each non-zero and besides: queries, keys and values in, outputs out.

    One weight that holds the three projections side by side has the mean of their positions, which differ where keys
    are of another length than queries; what the mean leaves over stays with the FLOPs besides.
    """
    tokens = [given[name].shape[:-1].numel() for name in ("query", "key", "value")]
    bias = given["in_proj_bias"]
    biases = 0 if bias is None else sum(tokens) * bias.numel() // 3
    if given.get("use_separate_proj_weight"):
        for name, count in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
            yield given[name], 2 * count, biases if name.startswith("q") else 0
    else:
        weight = given["in_proj_weight"]
        each, left = divmod(2 * sum(tokens), 3)
        yield weight, each, biases + left * weight.numel() // 3
    bias = given["out_proj_bias"]
    yield given["out_proj_weight"], 2 * tokens[0], 0 if bias is None else tokens[0] * bias.numel()


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values, and those within lists and tuples."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _is_spread(weight: Tensor, made: Tensor) -> bool:
    """Whether an elementwise result is of activations, as with an embedding of positions, and not another weight."""
    return made.shape != weight.shape or (weight.dim() > 2 and weight.shape[0] == 1)
