"""Calls as data: leaves and their structure, bound to the model's signature; what makes two calls alike."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.errors import ConfigError, UsageError

_PLAIN = (type(None), bool, int, float, str, torch.dtype)


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments in the order of the signature, their leaves, and what a plan is found by."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    leaves: Sequence[Any]
    key: Any  # hashable; None for calls with leaves of other kinds, which no graph is traced for

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def without_numbers(self) -> "Call":
        """Return the call with tensors that have shapes and dtypes only."""
        leaves, spec = pytree.tree_flatten((self.arguments, dict(self.named)))
        bare = [torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments, named = pytree.tree_unflatten(bare, spec)
        return Call(arguments, named, bare, self.key)

    def describe(self) -> str:
        """Return the tensors' shapes and dtypes in short."""
        return ", ".join(
            f"{'x'.join(map(str, leaf.shape)) or 'scalar'} {str(leaf.dtype).removeprefix('torch.')}"
            for leaf in self.tensors
        )


class Caller:
    """Turns arguments into a `Call`, the same for a tensor given by position or by name."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature

    def call(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Call:
        """Return a call.

        Raises:
            UsageError: If a tensor requires a gradient or is not on the CPU, or arrays of NumPy stand for tensors.
            TypeError: As the model itself: an argument is missing or unknown.
        """
        if named or len(arguments) != 1:
            bound = self.signature.bind(*arguments, **named)
            arguments = bound.args
            named = dict(sorted(bound.kwargs.items()))
        leaves, spec = pytree.tree_flatten((arguments, dict(named)))
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                _check(leaf)
        if any(map(_is_array, leaves)) and not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise UsageError("the inputs are numpy arrays and no tensors; pass torch.from_numpy(array)")
        return Call(arguments, named, leaves, call_key(leaves, spec))


def quick_key(arguments: tuple[Any, ...]) -> Any:
    """Return what tells apart calls with plain tensors alone, by position; None for all others.

    It is much cheaper than a `Call`, and says as much: who finds a plan by it has nothing left to check.
    """
    for leaf in arguments:
        if type(leaf) is not Tensor or leaf.requires_grad or not leaf.is_cpu:
            return None
    return tuple([(leaf.shape, leaf.dtype) for leaf in arguments])


def call_key(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """Return what calls of one plan have in common: structure, shapes, dtypes, and the values of plain data."""
    shapes: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            shapes.append((tuple(leaf.shape), leaf.dtype))
        else:
            shapes.append((type(leaf), leaf) if isinstance(leaf, _PLAIN) else None)
    return (spec, tuple(shapes)) if None not in shapes and _is_plain(spec) else None


def example_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that an example stands for: a tensor, a tuple of arguments, or a mapping of named ones.

    Raises:
        ConfigError: If it is nothing of these, or holds no tensor.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        arguments, named = (), dict(example)
    elif isinstance(example, (tuple, list)):
        arguments, named = tuple(example), {}
    else:
        raise ConfigError(
            f"the example is a {type(example).__name__}; expected a tensor, a tuple of arguments, "
            f"or a mapping of named arguments{'; pass torch.from_numpy(array)' if _is_array(example) else ''}"
        )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((arguments, named))):
        raise ConfigError("the example holds no tensor; expected the arguments of a call of the model")
    return arguments, named


def _is_array(leaf: Any) -> bool:
    return (type(leaf).__module__, type(leaf).__name__) == ("numpy", "ndarray")


def _check(leaf: Tensor) -> None:
    if leaf.requires_grad:
        raise UsageError(
            f"an input of shape {tuple(leaf.shape)} requires a gradient; a deployed network has none: "
            "pass tensor.detach(), or train the original model"
        )
    if leaf.device.type != "cpu":
        raise UsageError(f"an input is on {leaf.device}; deployed networks run on the CPU: pass tensor.cpu()")


def _is_plain(spec: pytree.TreeSpec) -> bool:
    """Tell whether a structure is made of tuples, lists and dicts: a model may change objects of other kinds."""
    if spec.type is not None and spec.type not in (tuple, list, dict):
        return False
    return all(_is_plain(child) for child in spec.children())


def is_finite(result: Any) -> bool:
    """Tell whether every floating-point tensor in a result has finite numbers only."""
    leaves = (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        if not math.isfinite(leaf.sum().item()) and not bool(leaf.isfinite().all()):  # a sum may overflow
            return False
    return True


def plain_mode() -> AbstractContextManager[Any]:
    """Run without gradients, and without the caller's autocast and inference mode: memory here outlives both."""
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
        return _outside()
    return torch.no_grad()


@contextmanager
def _outside() -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.no_grad())
        yield
