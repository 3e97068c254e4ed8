"""State that one process saves of what is sharded over several, put together; `Sparsifier.load_state_dict` cuts it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsetwin._compat import is_sharded
from sparsetwin.masking import Masks, SparseView
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier._core import Sparsifier


@dataclass(frozen=True)
class WholeView:
    """What a member of the pair is saved by, where masks were put together from shards."""

    phase: Phase | None
    steps: int
    masks: Masks
    target_names: tuple[str, ...]


def whole_view(sparsifier: Sparsifier) -> SparseView:
    """Return a sparsifier as `Pair.save` takes it: with whole masks. All processes have to call it.

    Args:
        sparsifier: Of a model that is sharded or not; if not, it is returned as it is.
    """
    if not any(map(is_sharded, sparsifier.weights.values())):
        return sparsifier
    masks = gathered(sparsifier.masks)
    return WholeView(sparsifier.phase, sparsifier.steps, masks, sparsifier.target_names)


def gathered(state: Any, *, keep: bool = True) -> Any:
    """Return state with every shard put together; all processes have to call it.

    Args:
        state: Nested dicts and lists of tensors and plain data; without shards it is returned as it is.
        keep: Whether this process needs the result; if not, it gets None in place of whole tensors.
    """
    if isinstance(state, Tensor) and is_sharded(state):
        whole = state.full_tensor()  # type: ignore[attr-defined]
        return whole if keep else None
    if isinstance(state, dict):
        return {key: gathered(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep=keep) for value in state]
    return state
