"""Which operations of PyTorch are operations of a `Graph`: one small function for each kind."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsetwin.kernels import Activation
from sparsetwin.runtime._graph import (
    Activate,
    Add,
    Affine,
    Convolution,
    GlobalMean,
    Linear,
    MaxPool,
    Operation,
    Pair,
    Ref,
    Value,
)

Values = Mapping[int, Value | None]
Found = tuple[Operation, tuple[int, ...]] | None
Reader = Callable[[dict[str, Any], Values], Found]


def schema_arguments(target: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operation's arguments by the names of its schema, defaults included."""
    found = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(arguments):
            found[argument.name] = arguments[position]
        else:
            found[argument.name] = named.get(argument.name, argument.default_value)
    return found


def gives_back_argument(target: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Tell whether an operation does nothing but give back its first argument; dropout may be on in any network."""
    name = str(target)
    if name in _DROPOUTS:
        return not schema_arguments(target, arguments, named)["train"]
    return name in _SAME


_DROPOUTS = frozenset({"aten.dropout.default", "aten.dropout_.default", "aten.feature_dropout.default"})
_SAME = frozenset({"aten.detach.default", "aten.detach_.default", "aten.alias.default", "aten.lift_fresh_copy.default"})


def hides_view(function: Any) -> bool:
    """Tell whether an operation's result may be a view of what it reads, though its schema does not say so.

    What an operation that is made of others returns is what these return: ``einsum`` or ``type_as`` may give back their
    argument. Those that compute something new in any case are known by name.
    """
    name = str(function)  # an OpOverload
    if name in _UNDECLARED_VIEWS:
        return True
    made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
    return made_of_others and name not in NATIVE and name not in _ALWAYS_NEW


_UNDECLARED_VIEWS = frozenset(
    {
        "aten._unsafe_view.default",
        "aten.unsafe_chunk.default",
        "aten.unsafe_split.Tensor",
        "aten.unsafe_split_with_sizes.default",
    }
)
_ALWAYS_NEW = frozenset(  # like all of `NATIVE`
    {
        "aten.conv1d.default",
        "aten.group_norm.default",
        "aten.layer_norm.default",
        "aten.log_softmax.int",
        "aten.scaled_dot_product_attention.default",
        "aten.softmax.int",
    }
)


def _float32(argument: Any, values: Values, *, axes: int | None = None) -> bool:
    """Tell whether an argument is a float32 value of so many axes."""
    value = values[argument.value] if isinstance(argument, Ref) else None
    return value is not None and value.dtype == torch.float32 and axes in (None, len(value.shape))


def _weight(argument: Any, axes: int) -> bool:
    return isinstance(argument, Tensor) and argument.dtype == torch.float32 and argument.dim() == axes


def _optional_weight(argument: Any) -> bool:
    return argument is None or _weight(argument, 1)


def _pair(numbers: Any) -> Pair:
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    return (int(numbers[0]), int(numbers[-1]))


def _convolution(a: dict[str, Any], values: Values) -> Found:
    weight = a["weight"]
    plain = not a.get("transposed", False) and not any(_numbers(a.get("output_padding", 0)))
    if not plain or not _float32(a["input"], values, axes=4) or not _weight(weight, 4):
        return None
    if not _optional_weight(a["bias"]) or isinstance(a["padding"], str):
        return None
    operation = Convolution(
        weight=weight,
        bias=a["bias"],
        stride=_pair(a["stride"]),
        padding=_pair(a["padding"]),
        dilation=_pair(a["dilation"]),
        groups=int(a["groups"]),
    )
    return operation, (a["input"].value,)


def _numbers(argument: Any) -> list[int]:
    return [argument] if isinstance(argument, int) else list(argument)


def _linear(a: dict[str, Any], values: Values) -> Found:
    if not _float32(a["input"], values) or not _weight(a["weight"], 2) or not _optional_weight(a["bias"]):
        return None
    return Linear(weight=a["weight"], bias=a["bias"]), (a["input"].value,)


def _addmm(a: dict[str, Any], values: Values) -> Found:
    plain = a["beta"] == 1 and a["alpha"] == 1 and _weight(a["self"], 1)
    if not plain or not _float32(a["mat1"], values) or not _weight(a["mat2"], 2):
        return None
    return Linear(weight=a["mat2"].t(), bias=a["self"]), (a["mat1"].value,)


def _matmul(a: dict[str, Any], values: Values) -> Found:
    left: Any = a["self"]
    right: Any = a["other"] if "other" in a else a["mat2"]
    if not _float32(left, values) or not _weight(right, 2):
        return None
    return Linear(weight=right.t(), bias=None), (left.value,)


def _batch_norm(a: dict[str, Any], values: Values) -> Found:
    mean, variance = a["running_mean"], a["running_var"]
    affine = _optional_weight(a["weight"]) and _optional_weight(a["bias"])
    if a.get("training", False) or not _weight(mean, 1) or not _weight(variance, 1) or not affine:
        return None
    if not _float32(a["input"], values, axes=4):
        return None
    scale = (variance.double() + a["eps"]).rsqrt()
    scale = scale if a["weight"] is None else scale * a["weight"].double()
    shift = -mean.double() * scale
    shift = shift if a["bias"] is None else shift + a["bias"].double()
    return Affine(scale=scale, shift=shift), (a["input"].value,)  # float64 until everything is folded


def _activation(name: Activation) -> Reader:
    def read(a: dict[str, Any], values: Values) -> Found:
        x = a["self"]
        if not _float32(x, values):
            return None
        chosen: Activation = "gelu_tanh" if a.get("approximate", "none") == "tanh" else name
        return Activate(activation=chosen), (x.value,)

    return read


def _add(a: dict[str, Any], values: Values) -> Found:
    first, second = a["self"], a["other"]
    if a["alpha"] != 1 or not _float32(first, values) or not _float32(second, values):
        return None
    one, other = values[first.value], values[second.value]
    if one is None or other is None or one.shape != other.shape:
        return None
    return Add(), (first.value, second.value)


def _max_pool(a: dict[str, Any], values: Values) -> Found:
    if not _float32(a["self"], values, axes=4) or _pair(a["dilation"]) != (1, 1) or a["ceil_mode"]:
        return None
    kernel = _pair(a["kernel_size"])
    stride = _pair(a["stride"]) if a["stride"] else kernel
    return MaxPool(kernel=kernel, stride=stride, padding=_pair(a["padding"])), (a["self"].value,)


def _adaptive_mean(a: dict[str, Any], values: Values) -> Found:
    if not _float32(a["self"], values, axes=4) or _pair(a["output_size"]) != (1, 1):
        return None
    return GlobalMean(keep=True), (a["self"].value,)


def _mean(a: dict[str, Any], values: Values) -> Found:
    if not _float32(a["self"], values, axes=4) or a["dim"] is None or a.get("dtype") is not None:
        return None
    if sorted(axis % 4 for axis in _numbers(a["dim"])) != [2, 3]:
        return None
    return GlobalMean(keep=bool(a["keepdim"])), (a["self"].value,)


NATIVE: dict[str, Reader] = {
    "aten.conv2d.default": _convolution,
    "aten.convolution.default": _convolution,
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.relu.default": _activation("relu"),
    "aten.relu_.default": _activation("relu"),
    "aten.gelu.default": _activation("gelu"),
    "aten.silu.default": _activation("silu"),
    "aten.silu_.default": _activation("silu"),
    "aten.add.Tensor": _add,
    "aten.add_.Tensor": _add,
    "aten.max_pool2d.default": _max_pool,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.adaptive_avg_pool2d.default": _adaptive_mean,
    "aten.mean.dim": _mean,
}
"""Name of an operation -> what reads it; a reader returns None for arguments that no kernel is for."""
