"""Masked gradients for trainers that clip before any of their hooks runs."""

from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparsetwin._compat import local
from sparsetwin.masking import expand_bits, keep_
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier import PhaseEvent, Sparsifier


class MaskedBackward:
    """Set the gradients that the optimizer is not to see to zero as soon as backward has accumulated them.

    Whatever reads gradients after that sees those of `Sparsifier.gradient_masks` only: for most methods those of kept
    weights, for Top-KAST those of a wider set, for ST-3 all. That holds for clipping by norm, logged norms, and the
    average over processes of DDP (its reduction starts after these hooks). The masks are looked up at every backward
    pass, since some methods change them at every step. In dense phases no hook is registered. A step in which a method
    chooses weights by the gradients of all of them is left as it is.

    Args:
        sparsifier: Whose masks count.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._handles: list[RemovableHandle] = []
        self._bits: dict[str, tuple[Tensor, Tensor]] = {}  # name -> a mask, and its bits as the gradient's words
        sparsifier.on_phase(self._on_phase)

    def refresh(self) -> None:
        """Hook the weights if masks are in force; `Sparsifier.load_state_dict` changes that without a phase event."""
        self.remove()
        for name, weight in self._sparsifier.weights.items() if self._sparsifier.masks else ():
            hook = partial(self._mask_gradient, name)
            self._handles.append(weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._bits.clear()

    def _on_phase(self, event: PhaseEvent, phase: Phase) -> None:
        if event == "enter":
            self.refresh()

    def _mask_gradient(self, name: str, weight: Tensor) -> None:
        if weight.grad is None or self._sparsifier.awaits_gradients:
            return
        mask = self._sparsifier.gradient_masks.get(name)
        if mask is None:  # the optimizer sees all of this weight's gradients
            return
        found = self._bits.get(name)
        if found is None or found[0] is not mask:
            found = self._bits[name] = (mask, expand_bits(local(mask), dtype=weight.grad.dtype))
        keep_(local(weight.grad), found[1])
