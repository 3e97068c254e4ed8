"""A model's parameters and buffers under the names that the bare model gives them."""

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from sparsetwin._compat import canonical_name
from sparsetwin.errors import StateError, nearest


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers such as DDP and ``torch.compile``."""
    for name, child in model.named_children():
        if canonical_name(f"{name}.x", model) == "x":  # the wrapper leaves no trace in the names
            return bare(child)
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by canonical name, as its ``state_dict`` holds them."""
    return {canonical_name(name, model): tensor for name, tensor in model.state_dict().items()}


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Copy tensors into a model's parameters and buffers, all of them and nothing else.

    Args:
        model: A model, bare on the outside.
        tensors: Canonical name -> tensor of exactly the model's shape and dtype, on any device.
        what: Where they come from, for messages.

    Raises:
        StateError: If names, shapes or dtypes differ, naming up to five; the model is then as it was.
    """
    names = {canonical_name(name, model): name for name in model.state_dict()}
    given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    check_matches(state_of(model), given, what=what)
    model.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})


def check_matches(
    state: Mapping[str, Tensor],
    given: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    *,
    what: str,
    ignoring_dtype: Container[str] = (),
) -> None:
    """Refuse tensors that are not exactly those of a model.

    Args:
        state: The model's, by canonical name.
        given: Canonical name -> shape and dtype of what is to be loaded.
        what: Where they come from, for messages.
        ignoring_dtype: Names whose dtype in the model does not matter.

    Raises:
        StateError: If names, shapes or dtypes differ, naming up to five.
    """
    problems = [f"{name} is missing" for name in state if name not in given]
    problems += [f"{name} is not in the model{nearest(name, state)}" for name in given if name not in state]
    for name in [name for name in state if name in given]:
        (shape, dtype), expected = given[name], state[name]
        if shape != tuple(expected.shape) or (dtype != expected.dtype and name not in ignoring_dtype):
            problems.append(f"{name} is {shape} {dtype}, the model's {tuple(expected.shape)} {expected.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise StateError(f"{what} does not fit the model: {'; '.join(problems[:5])}{more}")
