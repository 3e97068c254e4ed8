"""Masked gradients for trainers that clip before any of their hooks runs."""

from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparsetwin._compat import local
from sparsetwin.masking import expand_bits, keep_
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier import PhaseEvent, Sparsifier


class MaskedBackward:
    """Set the gradients of pruned weights to zero as soon as backward has accumulated them.

    Whatever reads gradients after that sees only those of kept weights: clipping by norm, logged norms, the average
    over processes of DDP (its reduction starts after these hooks). In dense phases no hook is registered. A step in
    which a method chooses weights by the gradients of all of them is left as it is.

    Args:
        sparsifier: Whose masks count.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._handles: list[RemovableHandle] = []
        sparsifier.on_phase(self._on_phase)

    def refresh(self) -> None:
        """Take the masks in force; `Sparsifier.load_state_dict` changes them without a phase event."""
        self.remove()
        weights = self._sparsifier.weights
        for name, mask in self._sparsifier.masks.items():
            bits = expand_bits(local(mask), dtype=weights[name].dtype)
            hook = partial(self._mask_gradient, bits)
            self._handles.append(weights[name].register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_phase(self, event: PhaseEvent, phase: Phase) -> None:
        if event == "enter":
            self.refresh()

    def _mask_gradient(self, bits: Tensor, weight: Tensor) -> None:
        if weight.grad is not None and not self._sparsifier.awaits_gradients:
            keep_(local(weight.grad), bits)
