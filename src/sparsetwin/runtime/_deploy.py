"""`deploy`: from a trained model to the network that runs fastest here."""

import copy
from typing import Any, Literal

import torch
from torch import nn

from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.runtime._calls import Caller, example_arguments, plain_mode
from sparsetwin.runtime._deployed import Deployed
from sparsetwin.runtime._planner import Planner
from sparsetwin.runtime._rivals import RIVALS, checked_rivals


def deploy(
    model: nn.Module,
    example_input: Any,
    *,
    dtype: Literal["auto", "float32"] = "auto",
    threads: int | None = None,
    allow_reduced_precision: bool = False,
    rivals: tuple[str, ...] = RIVALS,
) -> Deployed:
    """Return a network that computes what a model does, as fast as any engine that was measured on this machine.

    The model is traced for the example's shapes, batch norms are folded, and each layer is timed as a sparse kernel and
    as PyTorch's dense operation; the best combination is then timed as a whole against dense rivals, and the fastest
    is returned. ``print(deployed.plan)`` tells what runs and all that was measured. Pruned weights are those that are
    zero.

    Args:
        model: Float32, on the CPU. It is copied, in evaluation mode; later changes to it change nothing here.
        example_input: A tensor, a tuple of arguments, or a mapping of named ones.
        dtype: ``"auto"`` is float32, unless reduced precision is allowed and faster. ``"float32"`` is float32 always.
        threads: Of the sparse kernels; as many as PyTorch uses by default. PyTorch's own number stays as it is.
        allow_reduced_precision: Whether bfloat16 may be used: dense, and for the weights of linears with few tokens.
        rivals: Dense engines to beat besides PyTorch's eager mode: ``"compile"`` and ``"openvino"`` are left out where
            they are not there, or where dense work alone would take longer than what was found already.

    Raises:
        ConfigError: If an argument is unknown or out of range, or the model is not float32 on the CPU.
        UsageError: If the model cannot be copied, or is deployed already.
    """
    if isinstance(model, Deployed) or not isinstance(model, nn.Module):
        raise UsageError(f"deploy takes a torch.nn.Module that is not deployed yet, got {type(model).__name__}")
    if dtype not in ("auto", "float32"):
        raise ConfigError(
            f"dtype={dtype!r}; expected 'auto' or 'float32'. For bfloat16 where it is faster: "
            "dtype='auto', allow_reduced_precision=True"
        )
    if dtype == "float32" and allow_reduced_precision:
        raise ConfigError("dtype='float32' and allow_reduced_precision=True contradict each other; use dtype='auto'")
    number = torch.get_num_threads() if threads is None else threads
    if number < 1:
        raise ConfigError(f"threads={threads}; expected at least 1")
    _check_tensors(model)
    checked, (arguments, named) = checked_rivals(rivals), example_arguments(example_input)
    with plain_mode():
        planner = Planner(model=_own_copy(model), threads=number, reduced=allow_reduced_precision, rivals=checked)
        call = Caller(planner.signature).call(arguments, named)
        return Deployed(planner, (planner.entry(call),))


def _check_tensors(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ConfigError(f"{name} is on {tensor.device}, {tensor.layout}; deploy takes dense tensors on the CPU")
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and isinstance(tensor, nn.Parameter):
            raise ConfigError(f"{name} is {tensor.dtype}; deploy takes float32 models: model.float()")


def _own_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:
        raise UsageError(f"{type(model).__name__} cannot be copied by copy.deepcopy: {error}") from error
