"""Nodes on tensors: dense operations with weights laid out beforehand, and sparse linears on rows of tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetwin.kernels import Activation, Pool, SparseLinear, Tiling
from sparsetwin.runtime._graph import Convolution, Layer, Linear, Node, Value, with_weight
from sparsetwin.runtime._plain import activate, apply

Function = Callable[..., Tensor]
_NAMES: dict[Activation | None, tuple[str, str]] = {  # as oneDNN calls them
    None: ("none", ""),
    "relu": ("none", ""),  # oneDNN's own turns NaN into zero
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
TensorEngine = Literal["dense", "rows"]


def tensor_function(
    node: Node, value: Value | None, engine: TensorEngine, *, tiling: Tiling, pool: Pool | None = None
) -> Function:
    """Return what runs a node on tensors.

    Args:
        node: Not one that PyTorch runs as it is.
        value: The node's first input.
        engine: ``rows`` is the sparse kernel on rows of tokens, for linear layers.
        tiling: How that is cut.
        pool: Its threads.
    """
    operation = node.operation
    if engine == "rows":
        assert isinstance(operation, Linear)
        return sparse_rows(operation, tiling, pool)
    if isinstance(operation, Layer):
        operation = with_weight(operation)
    if isinstance(operation, Convolution) and value is not None:
        return _prepared(operation, value.shape) or _convolution(operation)
    if isinstance(operation, Linear):
        return partial(_linear, operation)
    return lambda *inputs: apply(operation, inputs)


def sparse_rows(operation: Linear, tiling: Tiling, pool: Pool | None) -> Function:
    """Return a sparse linear layer that takes tokens by features."""
    weight = operation.weight if operation.kept is None else operation.kept
    layer = SparseLinear(weight, bias=operation.bias, activation=operation.activation, tiling=tiling)
    if not operation.residual:
        return partial(layer, pool=pool)
    return lambda x, residual: layer(x, residual=residual, pool=pool)


def _linear(operation: Linear, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.linear(x, operation.weight, operation.bias)
    if residual is not None:
        y += residual
    return activate(y, operation.activation)


def _convolution(operation: Convolution) -> Function:
    """Return a convolution in channels-last layout, without what only some builds of PyTorch have."""
    weight = operation.weight.contiguous(memory_format=torch.channels_last)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(
            x.contiguous(memory_format=torch.channels_last),
            weight,
            operation.bias,
            operation.stride,
            operation.padding,
            operation.dilation,
            operation.groups,
        )
        return activate(y if residual is None else y.add_(residual), operation.activation)

    return run


def _prepared(operation: Convolution, shape: Sequence[int]) -> Function | None:
    """Return a convolution whose weight lies as oneDNN wants it; None where that is not to be had."""
    geometry: tuple[Any, ...] = (operation.padding, operation.stride, operation.dilation, operation.groups)
    try:
        pointwise = torch.ops.mkldnn._convolution_pointwise
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        weight = reorder(operation.weight.to_mkldnn(), *geometry, tuple(shape))
    except (AttributeError, RuntimeError):  # not public: another version of PyTorch may have neither
        return None
    bias, activation = operation.bias, operation.activation
    name, algorithm = _NAMES[activation]

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y: Tensor
        if residual is None:
            y = pointwise(x, weight, bias, *geometry, name, [], algorithm)
            return y.relu_() if activation == "relu" else y
        residual = residual.contiguous(memory_format=torch.channels_last)
        y = pointwise.binary(x, residual, weight, bias, *geometry, "add", None, None, [], None)
        return y.relu_() if activation == "relu" else activate(y, activation)

    return run


def worth_trying(node: Node, density: float) -> bool:
    """Tell whether a sparse kernel for a layer may pay; packing large dense weights takes memory for nothing."""
    assert isinstance(node.operation, Layer)
    return density <= 0.5 or node.operation.weight.numel() <= 1 << 20
