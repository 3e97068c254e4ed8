"""The operations of PyTorch that a file may name: those of inference that check their arguments, or are checked here.

A file is data of others. Operations with effects, on memory of any place and strides (``as_strided``, ``set``,
``resize``), that leave memory uninitialised, and the insides of others, which trust their callers, are not among them.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.errors import UsageError

_ELEMENTWISE = """
abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp
clamp_max clamp_min clip complex conj conj_physical copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv
exp exp2 expm1 fill fix float_power floor floor_divide fmax fmin fmod frac ge gelu glu greater greater_equal gt
hardshrink hardsigmoid hardswish hardtanh heaviside hypot isclose isfinite isinf isnan ldexp le leaky_relu lerp less
less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
logit lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal polar positive pow prelu
rad2deg real imag reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc
sinh softplus softshrink special_erf special_expit special_gammaln special_log1p sqrt square sub subtract tan tanh
threshold true_divide trunc where xlogy __and__ __or__ __xor__ _prelu_kernel
"""
_REDUCTIONS = """
all amax amin aminmax any argmax argmin argsort bincount count_nonzero cummax cummin cumprod cumsum dist
linalg_matrix_norm linalg_norm linalg_vector_norm log_softmax logcumsumexp logsumexp max mean median min mode nanmean
nansum norm prod softmax sort special_log_softmax special_softmax std std_mean sum topk var var_mean
_log_softmax _safe_softmax _softmax
"""
_SHAPES = """
adjoint alias alias_copy atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cat channel_shuffle
chunk clone column_stack concat concatenate constant_pad_nd contiguous detach diag diag_embed diagflat diagonal dropout
dsplit dstack expand expand_as feature_dropout flatten flip fliplr flipud hsplit hstack im2col lift_fresh_copy
linalg_diagonal meshgrid moveaxis movedim narrow numpy_T pad permute pixel_shuffle
pixel_unshuffle ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg roll rot90 row_stack select
select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile to
transpose tril triu type_as unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view
view_as view_as_complex view_as_real vsplit vstack _conj _to_copy _unsafe_view
"""
_INDEXING = """
bucketize embedding  gather grid_sampler grid_sampler_2d grid_sampler_3d
index index_add index_copy index_fill index_put index_select masked_scatter
masked_select one_hot scatter scatter_add scatter_reduce searchsorted take take_along_dim _unsafe_index
_unsafe_index_put
"""
_MAKERS = "full_like new_full new_ones new_zeros ones_like zeros_like rand_like randn_like"
_PRODUCTS = """
addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d convolution cosine_similarity cross dot einsum inner kron linalg_cross linalg_inv linalg_matmul
linalg_solve linalg_vecdot linear matmul matrix_power mm mv outer pairwise_distance tensordot vdot
"""
_LAYERS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
avg_pool1d avg_pool2d avg_pool3d batch_norm group_norm gru gru_cell instance_norm layer_norm lstm lstm_cell max_pool1d
max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices native_group_norm
native_layer_norm rms_norm rnn_relu rnn_tanh scaled_dot_product_attention upsample_bicubic2d upsample_bilinear2d
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d _adaptive_avg_pool2d
_adaptive_avg_pool3d _native_batch_norm_legit_no_training _scaled_dot_product_flash_attention_for_cpu
_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d
"""
_SPECTRA = """
fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn
fft_rfft fft_rfft2 fft_rfftn
"""
ALLOWED = frozenset(
    " ".join((_ELEMENTWISE, _REDUCTIONS, _SHAPES, _INDEXING, _MAKERS, _PRODUCTS, _LAYERS, _SPECTRA)).split()
)
"""Names of operations without overloads."""


def is_allowed(function: Any) -> bool:
    """Tell whether a file may name an operation: on tensors, without effects, and safe for any arguments."""
    if function is operator.getitem:
        return True
    if not isinstance(function, torch._ops.OpOverload) or function.namespace != "aten" or function._schema.is_mutable:
        return False
    name = function._schema.name.removeprefix("aten::")
    if function._overloadname == "data":  # recurrent networks on packed sequences
        return False
    return name in ALLOWED and any("Tensor" in str(argument.type) for argument in function._schema.arguments)


def functional(function: Any) -> Any:
    """Return the operation that computes the same and changes no argument; those that change none are it themselves.

    >>> functional(torch.ops.aten.add_.Tensor)
    <OpOverload(op='aten.add', overload='Tensor')>
    """
    if not isinstance(function, torch._ops.OpOverload) or not function._schema.is_mutable:
        return function
    packet = getattr(torch.ops.aten, function._schema.name.removeprefix("aten::").removesuffix("_"))
    return getattr(packet, function._overloadname)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operation that refuses the arguments for which PyTorch's own would read beyond its inputs.

    Raises:
        UsageError: In a call with such arguments.
    """
    name = str(function).rpartition(".")[0].removeprefix("aten.")
    check = _check_upsampling if "upsample_" in name else _CHECKS.get(name)
    if check is None or not isinstance(function, torch._ops.OpOverload):
        return function
    names = [argument.name for argument in function._schema.arguments]

    def run(*arguments: Any, **named: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **named}
        if not check(given):
            shapes = {name: tuple(part.shape) for name, part in given.items() if isinstance(part, Tensor)}
            raise UsageError(f"{function} does not take these arguments: shapes {shapes}")
        return function(*arguments, **named)

    return run


def _check_attention(given: Mapping[str, Any]) -> bool:
    query, key, value = (given[name].shape for name in ("query", "key", "value"))
    return bool(key[-2] == value[-2] and query[-1] == key[-1])


def _check_whole_attention(given: Mapping[str, Any]) -> bool:
    query, key, value = (given[name].shape for name in ("query", "key", "value"))
    return bool(query[:-2] == key[:-2] and key == value and query[-1] == key[-1])


def _check_batch_norm(given: Mapping[str, Any]) -> bool:
    parts = (given[name] for name in ("weight", "bias", "running_mean", "running_var"))
    return all(part is None or part.shape == (given["input"].shape[1],) for part in parts)


def _check_grid(given: Mapping[str, Any]) -> bool:
    return given["interpolation_mode"] in (0, 1, 2) and given["padding_mode"] in (0, 1, 2)


def _check_upsampling(given: Mapping[str, Any]) -> bool:
    """Check scales: PyTorch turns their quotients into positions without a look at how large they are."""
    scales = pytree.tree_leaves([part for name, part in given.items() if "scale" in name])
    return all(scale is None or 1e-6 < scale < 1e6 for scale in scales)


def _check_lstm(given: Mapping[str, Any]) -> bool:
    """Check the weights of each layer and direction: (4 h, in), (4 h, out), and with biases twice (4 h,)."""
    hidden, directions = given["hx"], 2 if given["bidirectional"] else 1
    parts = given["params"]
    if len(hidden) != 2 or given["num_layers"] < 1 or any(part.dim() < 2 for part in (given["input"], *hidden)):
        return False
    out, size = hidden[0].shape[-1], hidden[1].shape[-1]
    each = (4 if given["has_biases"] else 2) + (out != size)
    if len(parts) != each * directions * given["num_layers"]:
        return False
    for number in range(directions * given["num_layers"]):
        one = [tuple(part.shape) for part in parts[number * each : (number + 1) * each]]
        features = given["input"].shape[-1] if number < directions else directions * out
        wanted = [(4 * size, features), (4 * size, out), *([(4 * size,)] * 2 if given["has_biases"] else [])]
        if one != wanted + ([(out, size)] if out != size else []):
            return False
    return True


_CHECKS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "scaled_dot_product_attention": _check_attention,
    "_scaled_dot_product_flash_attention_for_cpu": _check_whole_attention,
    "_native_batch_norm_legit_no_training": _check_batch_norm,
    "grid_sampler": _check_grid,
    "grid_sampler_2d": _check_grid,
    "grid_sampler_3d": _check_grid,
    "lstm": _check_lstm,
}
