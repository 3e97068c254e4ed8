"""The masks in force: checked once when a phase begins, applied fast at every step."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsetwin._compat import is_capturing, local, total
from sparsetwin.errors import SelectionError, SparsityWarning
from sparsetwin.masking import Masks, expand_bits, keep_
from sparsetwin.schedules import Phase


class MaskWords:
    """Masks spread to whole words, as wide as their weights, so that masking is one bitwise operation.

    In a dense phase there are none, unless a CUDA graph was captured that reads them: then the tensors outlive every
    phase and are filled anew, for the graph to find the masks of later phases at the same addresses.
    """

    def __init__(self) -> None:
        self._words: dict[str, Tensor] = {}
        self._is_captured = False

    def note_capture(self) -> None:
        """Keep the tensors from here on if a CUDA graph is being captured."""
        if is_capturing():
            self._is_captured = True

    def fill(self, masks: Masks, weights: Mapping[str, Tensor]) -> None:
        """Take the masks of a phase that begins.

        Args:
            masks: Canonical name -> bool; none in a dense phase.
            weights: Canonical name -> weight, for its dtype.
        """
        if not masks and not self._is_captured:
            self._words.clear()
        for name, mask in masks.items():
            words = expand_bits(local(mask), dtype=local(weights[name]).dtype)
            old = self._words.get(name)
            if old is not None and (old.dtype, old.device, old.shape) == (words.dtype, words.device, words.shape):
                old.copy_(words)
            else:
                self._words[name] = words

    def keep_(self, tensor: Tensor, name: str) -> None:
        """Set the pruned elements of a weight, or of its gradient, to zero.

        Args:
            tensor: The weight's shape and dtype.
            name: Canonical name of the weight.
        """
        keep_(local(tensor), self._words[name])


def check_masks(masks: Masks, weights: Mapping[str, Tensor], phase: Phase) -> None:
    """Refuse masks that a method must not return.

    Raises:
        SelectionError: If there are masks in a dense phase, masks for some targets only, or one of another shape or
            dtype.
    """
    if masks and not phase.is_sparse:
        raise SelectionError(f"the method returned masks for a dense phase, {phase}; expected none")
    if masks and set(masks) != set(weights):
        name = sorted(set(masks) ^ set(weights))[0]
        raise SelectionError(
            f"the method returned masks for {len(masks)} of {len(weights)} targets (see {name}); "
            "expected one for every target, or none"
        )
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape != weights[name].shape:
            raise SelectionError(
                f"the method returned a mask for {name} of {mask.dtype} and shape {tuple(mask.shape)}; "
                f"expected torch.bool and {tuple(weights[name].shape)}"
            )


def warn_of_thin_layers(masks: Masks, *, stacklevel: int) -> None:
    """Name the layers that keep fewer weights than they have outputs, so that some output must be constant."""
    thin = [
        f"{name} ({kept} for {len(mask)})"
        for name, mask in masks.items()
        if mask.ndim > 1 and (kept := total(mask.sum())) < len(mask)
    ]
    if thin:
        more = f" and {len(thin) - 5} more" if len(thin) > 5 else ""
        warnings.warn(
            f"layers that keep fewer weights than they have outputs: {', '.join(thin[:5])}{more}",
            SparsityWarning,
            stacklevel=stacklevel + 1,
        )


def returned_weights(old: Tensor, new: Tensor | None) -> Tensor:
    """Return which weights come back: pruned by the old mask, and not by the new one, if there is one.

    Args:
        old: Bool mask.
        new: Bool mask of the same shape, or None in a dense phase.
    """
    return ~old if new is None else new & ~old
