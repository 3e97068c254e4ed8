"""`deploy`: from a trained model, or the file of one, to the network that runs fastest here."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import nn

from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.runtime._calls import Call, Caller, example_arguments, plain_mode
from sparsetwin.runtime._choices import Prefer
from sparsetwin.runtime._deployed import Deployed
from sparsetwin.runtime._half import half_target_if
from sparsetwin.runtime._machine import checked_threads
from sparsetwin.runtime._network import InFile, InMemory, Network, opened
from sparsetwin.runtime._planner import Planner
from sparsetwin.runtime._rivals import RIVALS, checked_rivals

Dtype = Literal["auto", "float32"]


@overload
def deploy(
    model: nn.Module,
    example_input: Any,
    /,
    *,
    dtype: Dtype = "auto",
    threads: int | None = None,
    allow_reduced_precision: bool = False,
    calibration: Iterable[Any] | None = None,
    rivals: tuple[str, ...] | None = None,
) -> Deployed: ...


@overload
def deploy(
    file: str | Path,
    model_fn: Callable[[], nn.Module],
    example_input: Any,
    /,
    *,
    half: str = "sparse",
    prefer: Prefer = "time",
    dtype: Dtype = "auto",
    threads: int | None = None,
    allow_reduced_precision: bool = False,
    calibration: Iterable[Any] | None = None,
    rivals: tuple[str, ...] | None = None,
) -> Deployed: ...


def deploy(
    source: nn.Module | str | Path,
    /,
    *given: Any,
    half: str | None = None,
    prefer: Prefer = "time",
    dtype: Dtype = "auto",
    threads: int | None = None,
    allow_reduced_precision: bool = False,
    calibration: Iterable[Any] | None = None,
    rivals: tuple[str, ...] | None = None,
) -> Deployed:
    """Return a network that computes what a model does, as fast as any engine that was measured on this machine.

    ``deploy(model, example)`` takes a model; ``deploy(file, model_fn, example)`` takes the file of a network, which
    stays where it is: it is mapped, and at most one layer's dense weights are there at a time.

    The model is traced for the example's shapes, batch norms are folded, and each layer is timed as a sparse kernel and
    as PyTorch's dense operation; the best combination is then timed as a whole against dense rivals, and the fastest
    is returned. ``print(deployed.plan)`` tells what runs and all that was measured. Pruned weights are those that are
    zero.

    Args:
        source: A float32 model on the CPU, which is copied, in evaluation mode: later changes to it change nothing
            here. Or a file of `save_sparse` or `save_dense`, or the folder of a pair.
        given: The example: a tensor, a tuple of arguments, or a mapping of named ones. For a file, before it a function
            that makes the model; its parameters are put on the meta device as they are made.
        half: Which member of a pair; ``"sparse"`` by default.
        prefer: Where a file's values are int8, float16 or bfloat16: ``"time"`` widens them beforehand for the layers
            that are faster so, ``"memory"`` leaves them as they are wherever a sparse kernel runs. The same numbers
            are computed with.
        dtype: ``"auto"`` is float32, unless reduced precision is allowed and faster. ``"float32"`` is float32 always.
        threads: Of the sparse kernels; as many as PyTorch uses by default, or one where that is faster as a whole.
            PyTorch's own number stays as it is.
        allow_reduced_precision: Whether bfloat16 may be used: dense, and for the weights of linears with few tokens.
            And float16 for sparse kernels, on processors that compute with it.
        calibration: Examples of real inputs, of the example's shapes. They scale what float16 kernels compute with. And
            ONNX Runtime in int8, quantised with them, takes part where it is installed and near enough to float32 on
            them, as the plan tells. Needs ``allow_reduced_precision``.
        rivals: Dense engines to beat besides PyTorch's eager mode: ``"compile"`` and ``"openvino"`` are left out where
            they are not there, or where dense work alone would take longer than what was found already. All by default
            for a model; none, not even eager mode, for a file, since they need all of its weights dense.

    Raises:
        ConfigError: If an argument is unknown or out of range, or the network is not float32 on the CPU.
        UsageError: If the model cannot be made or copied, is deployed already, or does not take the example.
        CheckpointError: If the file is missing, damaged or foreign.
        StateError: If names or shapes in the file are not those of the model.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(
            f"dtype={dtype!r}; expected 'auto' or 'float32'. For bfloat16 and float16 where they are faster: "
            "dtype='auto', allow_reduced_precision=True"
        )
    if dtype == "float32" and allow_reduced_precision:
        raise ConfigError("dtype='float32' and allow_reduced_precision=True contradict each other; use dtype='auto'")
    if prefer not in get_args(Prefer):
        raise ConfigError(f"prefer={prefer!r}; expected 'time' or 'memory'")
    number = checked_threads(threads, default=torch.get_num_threads())
    in_file = isinstance(source, (str, Path))
    if len(given) != 1 + in_file:
        raise UsageError("deploy takes (model, example) or (file, model_fn, example)")
    checked = checked_rivals(rivals if rivals is not None else () if in_file else RIVALS)
    if calibration is not None and not allow_reduced_precision:
        raise ConfigError("calibration is for float16 and int8; it needs allow_reduced_precision=True")
    arguments, named = example_arguments(given[-1])
    with plain_mode():
        network = _network(source, *given[:-1], half=half)
        caller = Caller(network.signature)
        call = caller.call(arguments, named)
        planner = Planner(
            network=network,
            threads=number,
            reduced=allow_reduced_precision,
            rivals=checked,
            prefer=prefer,
            calibration=_calibration(calibration, caller, call),
            half=half_target_if(allowed=allow_reduced_precision),
        )
        return Deployed(planner, (planner.entry(call),))


def _calibration(examples: Iterable[Any] | None, caller: Caller, call: Call) -> tuple[Call, ...]:
    """Return calibration batches as calls.

    Raises:
        ConfigError: If there is none, or one has other shapes than the example.
    """
    if examples is None:
        return ()
    found = tuple(caller.call(*example_arguments(example)) for example in examples)
    if not found:
        raise ConfigError("calibration holds no batch; expected examples of real inputs, or None")
    for batch in found:
        if batch.key is None or batch.key != call.key:
            raise ConfigError(f"a calibration batch is {batch.describe()}; expected the example's {call.describe()}")
    return found


def _network(source: Any, model_fn: Any = None, *, half: str | None) -> Network:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if half is not None and not path.is_dir():
            raise ConfigError(f"half={half!r} is for the folder of a pair; {path} is none")
        return InFile(opened(path, half or "sparse"), model_fn)
    if isinstance(source, Deployed) or not isinstance(source, nn.Module):
        raise UsageError(
            f"deploy takes a torch.nn.Module that is not deployed yet, or a file, got {type(source).__name__}"
        )
    if half is not None:
        raise ConfigError(f"half={half!r} is for the folder of a pair, got a {type(source).__name__}")
    _check_tensors(source)
    return InMemory(_own_copy(source))


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
