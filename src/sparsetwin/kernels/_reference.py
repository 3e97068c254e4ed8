"""Plain twins of the kernels, obviously right: products over kept weights, in float64.

They share nothing with the kernels but the meaning of "kept". A pruned weight contributes nothing, whatever it would
be multiplied with.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetwin.kernels._geometry import ConvolutionGeometry
from sparsetwin.kernels._kept import KeptWeight
from sparsetwin.kernels._specification import Activation


def reference_weight(weight: KeptWeight) -> tuple[Tensor, Tensor]:
    """Return a weight's numbers and which are kept, bit by bit.

    Returns:
        Dense float64 with zeros for pruned weights, and bool, both of the weight's shape.
    """
    dense = torch.zeros(weight.numel, dtype=torch.float64, device="cpu")
    keep = torch.zeros(weight.numel, dtype=torch.bool, device="cpu")
    values, bits = iter(weight.values.double().tolist()), weight.bits.tolist()
    for index in range(weight.numel):
        if bits[index // 8] >> (index % 8) & 1:
            row = index // (weight.numel // weight.shape[0])
            dense[index] = next(values) * (1.0 if weight.scales is None else float(weight.scales[row]))
            keep[index] = True
    return dense.reshape(weight.shape), keep.reshape(weight.shape)


def reference_product(
    weight: KeptWeight | Tensor,
    x: Tensor,
    *,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Return ``activation(W x + bias + residual)`` over the kept weights.

    Args:
        weight: (M, K), dense or kept.
        x: (K, N).
        keep: Bool, (M, K); weights that are not zero by default.
        bias: (M,).
        residual: (M, N).
        activation: As the kernels fuse it.

    Returns:
        (M, N), float64.
    """
    if isinstance(weight, KeptWeight):
        weight, keep = reference_weight(weight)
    kept = weight != 0 if keep is None else keep
    rows = []
    for row in range(weight.shape[0]):
        chosen = kept[row].nonzero().squeeze(1)
        rows.append((weight[row, chosen].double().unsqueeze(1) * x[chosen].double()).sum(0))
    y = torch.stack(rows)
    if bias is not None:
        y = y + bias.double().unsqueeze(1)
    if residual is not None:
        y = y + residual.double()
    return reference_activation(y, activation)


def reference_convolution(
    weight: KeptWeight | Tensor,
    x: Tensor,
    *,
    geometry: ConvolutionGeometry,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Return ``activation(conv2d(x, W) + bias + residual)`` for finite x: dense, with zeros for pruned weights.

    Args:
        weight: (out, in / groups, kh, kw), dense or kept.
        x: (N, in, H, W).
        geometry: Stride, padding, dilation, groups.
        bias: (out,).
        residual: (N, out, OH, OW).
        activation: As the kernels fuse it.

    Returns:
        (N, out, OH, OW), float64.
    """
    if isinstance(weight, KeptWeight):
        weight, _ = reference_weight(weight)
    y = F.conv2d(
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    return reference_activation(y if residual is None else y + residual.double(), activation)


def reference_activation(y: Tensor, activation: Activation | None) -> Tensor:
    """Return PyTorch's function of that name."""
    if activation is None:
        return y
    if activation == "relu":
        return F.relu(y)
    if activation == "silu":
        return F.silu(y)
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
