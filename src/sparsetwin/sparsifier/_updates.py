"""One step's updates, from before the first optimizer's to after the last one's."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetwin._compat import are_finite
from sparsetwin.methods import Method, SparseState
from sparsetwin.sparsifier._hooks import StepHooks, unscale_
from sparsetwin.sparsifier._masks import check_masks
from sparsetwin.sparsifier._weights import TargetWeights


class Updates:
    """Let the method's rules act around the updates of one step, and leave what its phase allows.

    Args:
        method: Its rules.
        state: What they work on.
        held: The targets.
        hooks: The optimizers.
    """

    def __init__(self, method: Method, state: SparseState, held: TargetWeights, hooks: StepHooks) -> None:
        self._method = method
        self._state = state
        self._held = held
        self._hooks = hooks
        self.skips = False  # whether the method has this step's optimizers leave all weights alone
        self.is_put_off = False  # whether optimizers leave all weights alone, in a step that is to be done again
        self._has_begun = False  # whether an optimizer has updated in this step
        self._withheld: dict[nn.Parameter, Tensor] = {}  # gradients that optimizers do not see
        self._given: dict[Optimizer, dict[Tensor, Tensor]] = {}  # gradients for HAM, until the update is done
        self._reads_gradients = type(method).before_update is not Method.before_update
        self._moves_weights = type(method).after_update is not Method.after_update

    def begin(self) -> None:
        """Forget the step before."""
        self._has_begun = self.skips = self.is_put_off = False
        self._given.clear()

    def put_off(self, optimizer: Optimizer, names: Iterable[str]) -> bool:
        """Let an optimizer leave all weights alone, if gradients of others are not finite; return whether it does.

        Called where a phase is about to begin by the gradients of all: a GradScaler skips the others' update, and the
        step is to be done again.

        Args:
            optimizer: About to update.
            names: Of its targets.
        """
        self.is_put_off = self._others_overflowed(names)
        if self.is_put_off:
            self._withhold(optimizer)
        return self.is_put_off

    def before(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        """Do what comes before an optimizer's update.

        Args:
            optimizer: About to update.
            names: Of its targets.
        """
        if self.skips:
            self._withhold(optimizer)
            return
        if not self._has_begun:
            self._held.bring_back()
        if self._reads_gradients and not self._has_begun:
            self._held.mask_gradients(self._state.masks)  # it may read any gradient
            self._state.unscale_gradients = partial(unscale_, optimizer)
            self._state.others_overflowed = partial(self._others_overflowed, names)
            self._method.before_update(self._state)
        else:  # gradients of a later optimizer may be newer than that
            self._held.mask_gradients(names)
        self._has_begun = True
        if self._method.ham is not None:
            unscale_(optimizer)
            self._given[optimizer] = self._method.ham.gradients(self._state, optimizer=optimizer)

    def after(self, optimizer: Optimizer, names: Iterable[str], *, counts: bool, completes: bool) -> None:
        """Do what comes after an optimizer's update.

        Args:
            optimizer: That has updated, or skipped its update.
            names: Of its targets.
            counts: Whether it has updated in a step that was begun.
            completes: Whether it is the last one of the step.
        """
        given = self._given.pop(optimizer, None)  # a class whose step calls its base class's fires the hook twice
        if self._method.ham is not None and given is not None and counts:
            self._method.ham.apply_(given, optimizer=optimizer)
        if self.skips or self.is_put_off:
            if completes or self.is_put_off:
                self._give_back()
        elif completes:
            self._complete(names)
        elif not self._held.settle_together:
            self._held.settle(names)

    @torch.no_grad()
    def close(self) -> None:
        """Settle what some optimizers have updated, where the last one did not step (a GradScaler may skip it)."""
        self.is_put_off = False
        if self._has_begun and self._held.settle_together:
            self._has_begun = False
            self._complete(())

    def _complete(self, names: Iterable[str]) -> None:
        """Let the method work on the weights of the whole step, then leave what the phase allows."""
        masks = self._method.after_update(self._state) if self._moves_weights else None
        if masks is not None:
            assert self._state.phase is not None
            check_masks(masks, self._state.weights, self._state.phase)
            self._state.masks = masks
            self._held.take_masks()
        self._held.store()
        everything = self._moves_weights or self._held.settle_together  # any weight may have changed
        self._held.settle(self._state.masks if everything else names)

    def _others_overflowed(self, names: Iterable[str]) -> bool:
        """Return whether gradients of other optimizers' targets are not finite, while those of these targets are.

        Where these are not finite either, no GradScaler is there to skip, and whoever reads them is to notice.
        """
        if len(self._hooks.optimizers) == 1:
            return False
        gradients, own = self._state.gradients, set(names)
        if are_finite(gradient for name, gradient in gradients.items() if name not in own):
            return False
        return are_finite(gradient for name, gradient in gradients.items() if name in own)

    def _withhold(self, optimizer: Optimizer) -> None:
        """Take the gradients away from an optimizer, which leaves parameters without one alone."""
        for parameter in self._hooks.parameters(optimizer):
            if parameter.grad is not None:
                self._withheld[parameter] = parameter.grad
                parameter.grad = None

    def _give_back(self) -> None:
        for parameter, gradient in self._withheld.items():
            parameter.grad = gradient
        self._withheld.clear()
