"""Opening a folder of either form: nothing is made up, left out or run that lies in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from sparsetwin.errors import CheckpointError, StateError


def read_config(folder: Path, model_class: Any) -> Any:
    """Return the configuration of a folder, of the given class or of one that transformers knows.

    Raises:
        CheckpointError: If there is none, it is damaged, or its class has to be given.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a folder of save_pretrained")
    try:
        is_config = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        is_config = False
    if not is_config:
        raise CheckpointError(f"{path} is damaged; expected a JSON object")
    own = getattr(model_class, "config_class", None)
    try:
        return own.from_pretrained(folder) if own else AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise CheckpointError(
            f"transformers does not know the model of {folder}; pass model_class= for one of your own: {error}"
        ) from error


def saved_class(config: Any, folder: Path) -> Any:
    """Return the class of transformers that a configuration names.

    Raises:
        CheckpointError: If it names none.
    """
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(f"{folder} was saved from {names or 'an unknown class'}; pass model_class=")
    return found


def open_plain(chosen: Any, folder: Path) -> PreTrainedModel:
    """Return what transformers opens, if it found every weight and used every weight that it found.

    Raises:
        CheckpointError: If weights are missing as files, or damaged.
        StateError: If the tensors are not those of the model.
    """
    try:
        opened = chosen.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be read: {error}") from error
    model: PreTrainedModel = opened[0]
    kinds = {"missing_keys": "missing", "unexpected_keys": "not in the model", "mismatched_keys": "of another shape"}
    different = [(key, words) for kind, words in kinds.items() for key in sorted(opened[1][kind])]
    if different:
        key, words = different[0]
        name = key if isinstance(key, str) else key[0]  # shapes stand beside the names of mismatched ones
        raise StateError(
            f"{folder} does not fit {type(model).__name__}: {name} is {words} ({len(different)} differ); to take "
            f"a part of the weights, call {type(model).__name__}.from_pretrained"
        )
    return model


def build(chosen: Any, config: Any) -> PreTrainedModel:
    """Return a model with any weights, its other buffers as transformers makes them when it opens such a folder."""
    dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or default)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away
            model: PreTrainedModel = chosen.from_config(config) if hasattr(chosen, "from_config") else chosen(config)
    finally:
        torch.set_default_dtype(default)
    return model


def assign(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give every parameter and buffer its tensor itself, dtype included; parameters that are one stay one.

    Args:
        model: Its tied weights are untied where the tensors differ, as they were when they were saved.
        tensors: By the names of its ``state_dict``, on the CPU.
    """
    owners: dict[int, str] = {}
    given: dict[str, Tensor] = {}
    for name, old in model.state_dict(keep_vars=True).items():
        owner = owners.setdefault(id(old), name)
        if owner != name and torch.equal(tensors[owner], tensors[name]):
            given[name] = given[owner]
        elif isinstance(old, nn.Parameter):
            given[name] = nn.Parameter(tensors[name], requires_grad=old.requires_grad)
        else:
            given[name] = tensors[name]
    model.load_state_dict(given, assign=True)


def check_fits(model: PreTrainedModel, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """Refuse tensors that are not all those of a model.

    Args:
        model: The model.
        tensors: By the names of its ``state_dict``.
        what: Where they come from, for the message.

    Raises:
        StateError: If names or shapes differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
    if different:
        name = different[0]
        raise StateError(
            f"{what} does not fit {type(model).__name__}: {name} is {given.get(name, 'missing')}, the model's "
            f"{expected.get(name, 'does not exist')} ({len(different)} differ)"
        )
