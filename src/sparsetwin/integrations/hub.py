"""Networks of the Hugging Face hub, dense and sparse: folders that ``from_pretrained`` opens, with a measured card.

A folder holds a configuration, a card (``README.md``) and the weights in one of two forms: ``model.safetensors``,
which ``AutoModel.from_pretrained`` opens and in which zeros take as much room as other numbers, or
``sparse.safetensors``, one bit a weight and the kept values (`sparsetwin.save_sparse`), which `from_pretrained` here
opens.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel

from sparsetwin.checkpoint import JSON, Member, Pair, load_sparse, save_sparse
from sparsetwin.errors import StateError, UsageError
from sparsetwin.integrations._card import model_card
from sparsetwin.integrations._folder import CARD, check_replaceable, replace_folder
from sparsetwin.integrations._gathered import is_sharded_model
from sparsetwin.integrations._opening import assign, build, check_fits, open_plain, read_config, saved_class
from sparsetwin.masking import Masks, SparseView, count_pruned_nonzero
from sparsetwin.methods import Method

SPARSE_FILE = "sparse.safetensors"
GENERATION_FILE = "generation_config.json"


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    view: SparseView,
    bitmask: bool = False,
    metrics: Mapping[str, JSON] | None = None,
    method: Method | None = None,
    processor: Any = None,
) -> None:
    """Save a model as it is now in a folder of its own, with a card of the measured numbers.

    Args:
        model: The bare model.
        folder: A folder of its own, not the run's: what an earlier call wrote is replaced as a whole, only when the
            new one is complete. What ``processor`` writes counts as written by it.
        view: The `Sparsifier`: its masks say what is kept.
        bitmask: Write the sparse form instead of ``model.safetensors``.
        metrics: Finite numbers for the card.
        method: For the card.
        processor: A tokenizer or image processor to save beside the model.

    Raises:
        StateError: If a pruned weight is not zero.
        UsageError: If the folder holds anything else, which is then untouched. If the model is another one, wrapped or
            sharded; `Pair` keeps halves of sharded runs, and `save_pair` writes their folders.
    """
    check_replaceable([Path(folder)], processor=processor)
    if is_sharded_model(model):
        raise UsageError("the model is sharded; save a half in a Pair with the trainer's adapter, then call save_pair")
    _check_bare(model)
    tensors, masks = model.state_dict(), view.masks
    unknown = [name for name in view.target_names if name not in tensors]
    if unknown:
        raise UsageError(f"there is no {unknown[0]} in {type(model).__name__}; expected the model that was pruned")
    sizes = {name: tensors[name].numel() for name in view.target_names}
    targets = sum(sizes.values())
    kept = sum(int(masks[name].sum()) if name in masks else size for name, size in sizes.items())
    member = Member(
        name="sparse" if masks else "dense",
        sparsity=1 - kept / targets,
        step=view.steps,
        file="",
        sha256="",
        kept=kept,
        targets=targets,
        metrics=dict(metrics or {}),
    )
    _write(model, tensors, masks, Path(folder), member, bitmask=bitmask, method=method, processor=processor)


def save_pair(
    pair: Pair,
    model: PreTrainedModel,
    *,
    folder: str | Path | None = None,
    bitmask: bool = False,
    method: Method | None = None,
    processor: Any = None,
) -> list[Path]:
    """Save every member of a pair as a folder of its own.

    Args:
        pair: The pair.
        model: A bare model of the same architecture; its weights and their dtype do not matter and are not changed.
        folder: Where to; by default the pair's own, so that ``pair/sparse`` stands beside ``pair/pair.json``. Folders
            of the members' names in it are replaced as `save_pretrained` does, and nothing else is touched.
        bitmask: Write the sparse form for members that have masks.
        method: For the cards.
        processor: A tokenizer or image processor to save beside each.

    Returns:
        The folders.

    Raises:
        CheckpointError: If a file of the pair is damaged.
        StateError: If a member's tensors are not those of the model.
        UsageError: If a member's folder holds anything else; no folder is written then. If the model is wrapped.
    """
    _check_bare(model)
    pair.verify()
    root = pair.folder if folder is None else Path(folder)
    check_replaceable([root / name for name in pair.members], processor=processor)
    for name, member in pair.members.items():
        stored = load_sparse(pair.folder / member.file)
        is_packed = bitmask and bool(stored.masks)
        _write(
            model, stored.tensors, stored.masks, root / name, member,
            bitmask=is_packed, method=method, processor=processor,
        )  # fmt: skip
    return [root / name for name in pair.members]


def from_pretrained(folder: str | Path, model_class: Any = None) -> PreTrainedModel:
    """Open a folder of either form.

    Args:
        folder: As `save_pretrained` or `save_pair` wrote it.
        model_class: A model class or an Auto class; by default the class of transformers that was saved. A class of
            your own has to be given: code that lies in the folder is not run.

    Returns:
        The model in evaluation mode, on the CPU, pruned weights exactly zero, with its generation settings. The sparse
        form gives every tensor the dtype that it was saved with; transformers opens ``model.safetensors`` in one
        dtype, that of ``config.json``.

    Raises:
        CheckpointError: If there is no configuration or no weights, they are damaged, or the class has to be given.
        StateError: If the tensors are not those of the model: no weight is drawn at random or left out.
    """
    folder = Path(folder)
    config = read_config(folder, model_class)
    chosen = saved_class(config, folder) if model_class is None else model_class
    if not (folder / SPARSE_FILE).is_file():
        return open_plain(chosen, folder)
    with torch.device("cpu"):  # whatever the default is
        tensors = load_sparse(folder / SPARSE_FILE).tensors
        model = build(chosen, config)
    check_fits(model, tensors, what=str(folder))
    assign(model, tensors)
    if model.can_generate() and (folder / GENERATION_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def masks_of(folder: str | Path) -> Masks:
    """Return the masks of a folder in the sparse form, to train on with them; True keeps.

    Raises:
        CheckpointError: If the folder has no sparse form.
    """
    return load_sparse(Path(folder) / SPARSE_FILE).masks


def write_card(folder: Path, member: Member, *, model: PreTrainedModel, method: Method | None) -> None:
    """Write a folder's card anew, with the metrics that the member has now."""
    is_packed = (folder / SPARSE_FILE).exists()
    text = model_card(member, model_class=_whole_class(model), method=method, is_packed=is_packed)
    (folder / CARD).write_text(text, encoding="utf-8")


def _write(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    masks: Masks,
    folder: Path,
    member: Member,
    *,
    bitmask: bool,
    method: Method | None,
    processor: Any,
) -> None:
    alive = count_pruned_nonzero(tensors, masks)
    if alive:
        name = next(iter(alive))
        raise StateError(f"{alive[name]} pruned weights of {name} are not zero; the masks belong to other weights")

    shell = _unsharded(model)
    check_fits(shell, tensors, what=f"member {member.name}")

    def fill(temporary: Path) -> None:
        if bitmask:
            if shell.can_generate() and getattr(shell, "generation_config", None) is not None:
                shell.generation_config.save_pretrained(temporary)
            save_sparse(temporary / SPARSE_FILE, tensors, masks, card={"kept": member.kept, "targets": member.targets})
        else:
            shell.save_pretrained(temporary, state_dict=dict(tensors))
        config = copy.deepcopy(shell.config)  # transformers would write the shell's dtype and open the weights in it
        config.architectures = [type(shell).__name__]
        config.dtype = _dtype_of(shell, tensors)
        config.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
        write_card(temporary, member, model=shell, method=method)

    replace_folder(folder, fill)


def _unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model to save whole tensors with: of a sharded one an empty twin, since its own saving gathers again."""
    if not is_sharded_model(model):
        return model
    whole: Any = _whole_class(model)
    config = copy.deepcopy(model.config)
    if getattr(config, "distributed_config", None) is not None:
        config.distributed_config = None
    with torch.device("meta"):
        shell: PreTrainedModel = whole(config)
    if shell.can_generate() and getattr(model, "generation_config", None) is not None:
        shell.generation_config = copy.deepcopy(model.generation_config)
    return shell


def _whole_class(model: PreTrainedModel) -> type:
    """Return the model's class, without what FSDP2 puts before it."""
    return next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))


def _dtype_of(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that transformers calls the model's: of the first parameter with a floating-point one."""
    return next(tensors[name].dtype for name, _ in model.named_parameters() if tensors[name].is_floating_point())


def _check_bare(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"expected the bare model of transformers, got {type(model).__name__}; unwrap it first")
