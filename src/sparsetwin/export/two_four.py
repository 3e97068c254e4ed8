"""2:4: of every four neighbouring inputs two weights are zero, which NVIDIA's sparse tensor cores skip.

PyTorch runs such weights of linear layers (`to_two_four`); convolutions have no such kernels there and keep their
zeros, in ONNX too, where TensorRT finds them.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsetwin.errors import ExportError, nearest

_GROUP, _KEPT = 4, 2
_HALVES = (torch.float16, torch.bfloat16)


def check_two_four(tensors: Mapping[str, Tensor], *, names: Sequence[str]) -> None:
    """Refuse weights that are not 2:4 along their inputs.

    Args:
        tensors: Name -> weight, (out, in) or (out, in, kernel ...); groups run along ``in``, at each tap of a kernel.
        names: Those to check, in the order in which they are.

    Raises:
        ExportError: Naming the first weight that is missing or not 2:4, and its first group that keeps more.
    """
    for name in names:
        if name not in tensors:
            raise ExportError(f"no weight {name!r} to check for 2:4{nearest(name, tensors)}")
        weight = tensors[name]
        if weight.ndim < 2 or weight.shape[1] % _GROUP:
            raise ExportError(f"{name} is not 2:4: its shape {tuple(weight.shape)} has no inputs in groups of four")
        inputs_last = weight.detach().movedim(1, -1)
        grouped = inputs_last.reshape(*inputs_last.shape[:-1], -1, _GROUP)  # (out, kernel ..., groups, 4)
        crowded = (grouped.ne(0).sum(-1) > _KEPT).nonzero()
        if len(crowded):
            output, *_, group = crowded[0].tolist()
            first = _GROUP * group
            raise ExportError(
                f"{name} is not 2:4: output {output} keeps {int(grouped[tuple(crowded[0])].ne(0).sum())} of its inputs "
                f"{first} to {first + _GROUP - 1}, {len(crowded)} groups in all; train it with the pattern NM(2, 4)"
            )


def to_two_four(model: nn.Module, *, names: Sequence[str]) -> nn.Module:
    """Return a copy of a model whose linear layers run on sparse tensor cores.

    Args:
        model: On a CUDA device, float16 or bfloat16; it is not changed.
        names: Weights that are 2:4; those of `torch.nn.Linear` are compressed, others keep their zeros.

    Raises:
        ExportError: If one of them is not 2:4, naming the first, the model is not on a CUDA device or of another dtype,
            or torch refuses a shape.
    """
    tensors = model.state_dict()
    check_two_four(tensors, names=names)
    linears = [name for name in names if isinstance(_owner(model, name), nn.Linear)]
    for name in linears:
        if tensors[name].device.type != "cuda" or tensors[name].dtype not in _HALVES:
            raise ExportError(
                f"sparse tensor cores take float16 or bfloat16 on a CUDA device, {name} is {tensors[name].dtype} on "
                f"{tensors[name].device}; the weights are 2:4, use model.half().cuda()"
            )
    twin = copy.deepcopy(model)
    for name in linears:
        layer = _owner(twin, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the prototype may change
                packed = torch.sparse.to_sparse_semi_structured(layer.get_parameter("weight").detach())
        except RuntimeError as error:
            raise ExportError(f"torch cannot compress {name} of shape {tuple(tensors[name].shape)}: {error}") from error
        layer.weight = nn.Parameter(packed, requires_grad=False)
    return twin


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
