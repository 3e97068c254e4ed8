"""PyTorch's own ways to run a network, and `deploy`."""

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.bench._entrants import Case, Entrant, NotHereError, in_process
from sparsetwin.runtime import deploy


def eager(case: Case, *, bfloat16: bool, channels_last: bool) -> Entrant:
    """Return PyTorch's eager mode."""
    model = _twin(case.model, bfloat16=bfloat16)
    if channels_last:
        if case.inputs.dim() != 4:
            raise NotHereError("channels last is for images")
        to: Any = model.to  # whose annotations lack memory formats
        to(memory_format=torch.channels_last)
    return in_process(_call(model, case.inputs, bfloat16=bfloat16, channels_last=channels_last))


def compiled(case: Case, *, bfloat16: bool) -> Entrant:
    """Return ``torch.compile`` with frozen weights, after its first calls."""
    model = torch.compile(_twin(case.model, bfloat16=bfloat16), dynamic=False)
    run = _call(model, case.inputs, bfloat16=bfloat16)
    config: Any = importlib.import_module("torch._inductor.config")
    with config.patch(freezing=True):  # as an option of torch.compile it has half the effect
        run()
        run()
    return in_process(run, "weights frozen")


def load_compiler() -> None:
    """Import the compiler, so that no time limit can interrupt that and leave half of it behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch._dynamo", "torch._dynamo.convert_frame", "torch._inductor.compile_fx"):
            importlib.import_module(name)


def csr(case: Case) -> Entrant:
    """Return PyTorch's eager mode with the weights of pruned linear layers as sparse matrices."""
    model = _twin(case.model)
    pruned = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and bool((layer.weight == 0).float().mean() > 0.1)
    ]
    if not pruned:
        raise NotHereError("no linear layer is pruned; PyTorch has no sparse convolutions")
    for layer in pruned:
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    return in_process(_call(model, case.inputs), f"{len(pruned)} linear layers sparse")


def deployed(case: Case, *, reduced: bool) -> Entrant:
    """Return `sparsetwin.deploy`, without the rivals that have rows of their own."""
    threads = case.settings.threads
    model = deploy(case.model, case.inputs, threads=threads, allow_reduced_precision=reduced, rivals=())
    note = f"{'bf16 allowed, ' if reduced else ''}runs as: {model.plan.engine}"
    return in_process(lambda: _tensor(model(case.inputs)), note)


def _twin(model: nn.Module, *, bfloat16: bool = False) -> nn.Module:
    twin = copy.deepcopy(model).requires_grad_(False)
    return twin.bfloat16() if bfloat16 else twin


def _call(
    model: Callable[..., Any], inputs: Tensor, *, bfloat16: bool = False, channels_last: bool = False
) -> Callable[[], Tensor]:
    """Return a call from float32 to float32, conversions included."""
    is_converted = bfloat16 and inputs.is_floating_point()

    def run() -> Tensor:
        given = inputs.bfloat16() if is_converted else inputs
        given = given.contiguous(memory_format=torch.channels_last) if channels_last else given
        return _tensor(model(given)).float()

    return run


def _tensor(found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        raise NotHereError(f"the network gives a {type(found).__name__}; one tensor can be compared")
    return found


def quietly(make: Callable[[Case], Entrant]) -> Callable[[Case], Entrant]:
    """Return a maker that keeps warnings of other libraries to itself."""

    def made(case: Case) -> Entrant:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(case)

    return made
