"""What is deployed: a model in memory, or one whose weights stay in a sparse file and are made when they are needed."""

import copy
import inspect
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparsetwin.checkpoint import Pair, SparseFile
from sparsetwin.errors import CheckpointError, ConfigError, UsageError
from sparsetwin.kernels import KeptWeight
from sparsetwin.runtime._fuse import fuse
from sparsetwin.runtime._graph import Graph
from sparsetwin.runtime._kept_weights import KeptWeights
from sparsetwin.runtime._trace import trace

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Network(Protocol):
    """A network that can be traced, and be had as a model."""

    in_memory: bool  # whether the model is there all the time

    @property
    def name(self) -> str:
        """The model's class."""

    @property
    def signature(self) -> inspect.Signature:
        """How it is called."""

    def model(self) -> nn.Module:
        """Return the model, all of its weights dense."""

    def traced(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Graph:
        """Return the graph of a call as it was traced."""

    def graph(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Graph:
        """Return the fused graph of a call."""


class InMemory:
    """A model of our own, in evaluation mode."""

    in_memory = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.name, self.signature = type(model).__name__, inspect.signature(model.forward)

    def model(self) -> nn.Module:
        """Return the model itself."""
        return self._model

    def traced(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Graph:
        """Return the graph of a call; its weights are the model's.

        Raises:
            UsageError: If the model cannot be traced.
        """
        return trace(self._model, arguments, named)

    def graph(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Graph:
        """Return the fused graph of a call, as `traced` does."""
        return fuse(self.traced(arguments, named))


class InFile:
    """A network whose weights stay in a sparse file, which stays mapped.

    Args:
        file: Open.
        model_fn: Makes a model of the file's architecture; its parameters are put on the meta device as they are made.

    Raises:
        UsageError: If ``model_fn`` makes no model, or only with numbers that the meta device does not have.
        StateError: If names or shapes of the file are not the model's.
        ConfigError: If a tensor has a dtype that is not deployed.
    """

    in_memory = False

    def __init__(self, file: SparseFile, model_fn: Callable[[], nn.Module]) -> None:
        self._file = file
        self._skeleton = _without_weights(model_fn).eval().requires_grad_(False).float()
        self.name, self.signature = type(self._skeleton).__name__, inspect.signature(self._skeleton.forward)
        for name in file.names:
            dtype = file.dtype(name)
            if dtype.is_floating_point and dtype not in _FLOATS:
                raise ConfigError(
                    f"{file.path}: {name} is {dtype}; deploy takes float32, bfloat16 and float16 networks"
                )
        file.check_fits(self._skeleton, dtype=torch.float32)

    def model(self) -> nn.Module:
        """Return a new model with all weights decoded."""
        model = copy.deepcopy(self._skeleton)
        return self._file.load_into(model, dtype=torch.float32).requires_grad_(False)

    def graph(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Graph:
        """Return the fused graph of a call, as `traced` does."""
        return fuse(self.traced(arguments, named))

    def traced(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Graph:
        """Return the graph of a call; weights that are stored sparse are kept so.

        Raises:
            UsageError: If the model cannot be traced.
            CheckpointError: If the file is damaged.
        """
        model, kept = copy.deepcopy(self._skeleton), KeptWeights()

        def sparse(name: str) -> Tensor:
            if len(self._file.shape(name)) < 2:
                return self._file.dense(name, dtype=torch.float32)
            return kept.stand_in(_kept(self._file, name))

        self._file.load_into(model, dtype=torch.float32, views=True, sparse=sparse)
        return trace(model.requires_grad_(False), arguments, named, kept=kept)


def opened(path: Path, member: str) -> SparseFile:
    """Return a sparse file, or a member of a pair's folder, mapped.

    Raises:
        CheckpointError: If there is no such file or member, or it is damaged or foreign.
    """
    if not path.is_dir():
        return SparseFile.open(path)
    if not (path / "pair.json").exists():
        raise CheckpointError(f"{path} is a folder without pair.json; expected a pair's folder, or a sparse file")
    return Pair(path).open(member)


def _kept(file: SparseFile, name: str) -> KeptWeight:
    values, scales = file.values(name), file.scales(name)
    if scales is not None and file.dtype(name) != torch.float32:  # decoded values are rounded to that dtype
        return KeptWeight.from_dense(file.dense(name))
    try:
        return KeptWeight(
            shape=file.shape(name),
            bits=file.mask_bits(name),
            values=values,
            scales=None if scales is None else scales.double(),
        )
    except ConfigError as error:
        raise CheckpointError(f"{file.path}: {name} is damaged: {error}") from error


def _without_weights(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose parameters are on the meta device; buffers are made as the constructor makes them."""
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        raise UsageError(
            f"a file is deployed with a function that makes the model, got {type(model_fn).__name__}: "
            "such as st.deploy(file, lambda: build('resnet50'), example)"
        )
    here = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    registered: Callable[..., Any] = to_meta  # what it returns becomes the parameter, which its annotation hides
    hook = register_module_parameter_registration_hook(registered)
    try:
        with torch.random.fork_rng(devices=[]):
            model = model_fn()
    except Exception as error:
        raise UsageError(
            f"the model cannot be made with parameters on the meta device: {type(error).__name__}: {error}"
        ) from error
    finally:
        hook.remove()
    if not isinstance(model, nn.Module):
        raise UsageError(f"model_fn returned a {type(model).__name__}; expected a torch.nn.Module")
    return model
