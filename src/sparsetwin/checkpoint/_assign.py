"""Putting single tensors into a model, also into one on the meta device."""

import torch
from torch import Tensor, nn

from sparsetwin._compat import canonical_name
from sparsetwin.errors import StateError


@torch.no_grad()
def assign(model: nn.Module, path: str, tensor: Tensor) -> bool:
    """Give one parameter or buffer its values.

    Args:
        model: A model, bare on the outside.
        path: The name in the model's own ``state_dict``.
        tensor: Of its shape; it becomes the parameter or buffer itself if that is on the meta device, in every place
            where the model has it.

    Returns:
        Whether the model holds the tensor itself now.
    """
    old = _get(model, path)
    if not old.is_meta:
        old.copy_(tensor)
        return False
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for module in model.modules():
        for places in (module._parameters, module._buffers):
            for key, value in places.items():
                if value is old:
                    places[key] = new  # type: ignore[assignment]
    return True


def paths_of(model: nn.Module) -> dict[str, str]:
    """Return canonical name -> name in the model's own ``state_dict``."""
    return {canonical_name(path, model): path for path in model.state_dict()}


def check_loaded(model: nn.Module, *, what: str) -> None:
    """Refuse a model in which something would stay on the meta device.

    Raises:
        StateError: If a buffer that is not part of the ``state_dict`` is there, naming it.
    """
    saved = {canonical_name(name, model) for name in model.state_dict()}
    buffers = {canonical_name(name, model): buffer for name, buffer in model.named_buffers(remove_duplicate=False)}
    lost = [name for name, buffer in buffers.items() if buffer.is_meta and name not in saved]
    if lost:
        raise StateError(
            f"{what} cannot fill {', '.join(lost)}: buffers that are not part of the state_dict are made by the "
            "model's constructor; build the model on the CPU"
        )


def _get(model: nn.Module, path: str) -> Tensor:
    owner, _, key = path.rpartition(".")
    found = getattr(model.get_submodule(owner), key)
    assert isinstance(found, Tensor)
    return found
