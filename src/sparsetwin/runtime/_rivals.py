"""Dense ways to run a whole model, which a sparse program has to beat."""

import copy
import importlib
import importlib.util
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetwin.errors import ConfigError, nearest
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._graph import Convolution, Graph, Layer
from sparsetwin.runtime._timing import shortest

Rival = Literal["eager", "compile", "openvino"]
RIVALS: tuple[Rival, ...] = ("eager", "compile", "openvino")
Runner = Callable[[Call], Any]


class NotHereError(Exception):
    """Why a rival does not run on this machine or for this model."""


def checked_rivals(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names after a check that each is known.

    Raises:
        ConfigError: If one is not.
    """
    for name in names:
        if name not in RIVALS:
            raise ConfigError(f"unknown rival {name!r}{nearest(name, RIVALS)}; known: {', '.join(RIVALS)}")
    return names


def eager_runner(model: Callable[..., Any]) -> Runner:
    """Return the model as it is."""
    return lambda call: model(*call.arguments, **call.named)


def channels_last_runner(model: nn.Module) -> Runner:
    """Return the model on images whose channels lie last; its 4-d weights must lie so too."""

    def run(call: Call) -> Any:
        arguments, named = pytree.tree_map_only(Tensor, _channels_last, (call.arguments, dict(call.named)))
        return pytree.tree_map_only(Tensor, Tensor.contiguous, model(*arguments, **named))

    return run


def bfloat16_runner(model: nn.Module) -> Runner:
    """Return a bfloat16 copy of the model; its results are turned back into float32."""
    return bfloat16_call(copy.deepcopy(model).bfloat16())


def compiled_runner(model: nn.Module, call: Call, *, reduced: bool = False) -> Runner:
    """Return the model compiled by ``torch.compile``, after a first call.

    Raises:
        NotHereError: If it does not compile here.
    """
    inner = copy.deepcopy(model).bfloat16() if reduced else copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = importlib.import_module("torch._inductor.config")
            compiled = torch.compile(inner)
            run = bfloat16_call(compiled) if reduced else eager_runner(compiled)
            with config.patch(freezing=True), torch.no_grad():  # as an option of compile it has half the effect
                run(call)
    except Exception as error:  # no compiler, an operation that it does not know, ...
        first = str(error).strip().splitlines()
        raise NotHereError(f"{type(error).__name__}: {first[0] if first else ''}") from error
    return run


def bfloat16_call(model: Callable[..., Any]) -> Runner:
    """Return what calls a bfloat16 model with float32 inputs."""

    def run(call: Call) -> Any:
        arguments, named = pytree.tree_map_only(Tensor, _bfloat16, (call.arguments, dict(call.named)))
        return pytree.tree_map_only(Tensor, _float32, model(*arguments, **named))

    return run


def openvino_runner(model: nn.Module, call: Call, *, threads: int, reduced: bool = False) -> Runner:
    """Return the model in OpenVINO; calls may run at once.

    Raises:
        NotHereError: If it is not installed, or does not take the model.
    """
    if importlib.util.find_spec("openvino") is None:
        raise NotHereError("openvino is not installed")
    if call.named or len(call.tensors) != len(call.leaves) or len(call.leaves) != len(call.arguments):
        raise NotHereError("takes calls of tensors by position only")
    try:
        openvino: Any = importlib.import_module("openvino")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(model, example_input=call.arguments)
            converted.reshape({number: list(leaf.shape) for number, leaf in enumerate(call.tensors)})
        precision = "bf16" if reduced else "f32"
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        compiled = openvino.Core().compile_model(converted, "CPU", settings)
        free = deque([compiled.create_infer_request()])  # append and pop are atomic
        with torch.no_grad():
            single = isinstance(model(*call.arguments), Tensor)
    except Exception as error:
        first = str(error).strip().splitlines()
        raise NotHereError(f"{type(error).__name__}: {first[0] if first else ''}") from error
    if not single:
        raise NotHereError("takes models with one tensor as result only")

    def run(call: Call) -> Any:
        try:
            request = free.pop()
        except IndexError:  # all are in use: a request runs one call at a time
            request = compiled.create_infer_request()
        try:
            found = request.infer([leaf.numpy() for leaf in call.tensors])
            return torch.from_numpy(found[compiled.output(0)].copy())
        finally:
            free.append(request)

    return run


def dense_bound(graph: Graph, dtype: torch.dtype) -> float:
    """Return about the least seconds of a dense call: its multiply-adds at the speed of a large matrix product here."""
    flops = 0
    for node in graph.layers():
        operation, out = node.operation, graph.values[node.output]
        assert isinstance(operation, Layer)
        assert out is not None
        columns = torch.Size(out.shape).numel() // operation.weight.shape[0]
        flops += 2 * operation.weight.numel() * columns
        if isinstance(operation, Convolution) and max(operation.weight.shape[2:]) == 3:
            flops -= flops_saved_by_winograd(operation, columns)
    side = 768
    a, b = (torch.randn(side, side, dtype=dtype, device="cpu") for _ in range(2))
    best = shortest(lambda: a @ b, threads=torch.get_num_threads(), runs=10)
    return flops * best / (2 * side**3)


def flops_saved_by_winograd(operation: Convolution, columns: int) -> int:
    """Return what a 3x3 convolution of stride 1 may save: five of nine multiplications."""
    if operation.stride != (1, 1) or tuple(operation.weight.shape[2:]) != (3, 3):
        return 0
    return 2 * operation.weight.numel() * columns * 5 // 9


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _bfloat16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
