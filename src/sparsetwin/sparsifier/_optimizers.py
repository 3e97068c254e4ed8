"""What a method asks of the optimizers beside their updates: state that is reset, parameters of its own."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.optim import Optimizer

from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.masking import Masks
from sparsetwin.methods import Method, SparseState
from sparsetwin.optimizer_state import ResetScope, restore_initial_state_, restore_where_
from sparsetwin.sparsifier._hooks import StepHooks
from sparsetwin.sparsifier._masks import returned_weights

_PARTIAL: set[ResetScope] = {"returned", "returned-mean"}


def check_method(method: Method, state: SparseState, optimizers: Sequence[Optimizer]) -> None:
    """Refuse now what could only fail in the middle of training.

    Raises:
        SparsetwinError: As the method and the optimizers do.
    """
    phases = method.schedule.phases
    method.config()
    method.check(state)
    if method.quantization is not None:
        method.quantization.check(method.schedule)
        method.quantization.check_weights(state.weights)
    scopes = {method.reset_scope(left, entered) for left, entered in pairwise(phases)} - {"none"}
    for optimizer in optimizers:
        if scopes & _PARTIAL:
            restore_where_(optimizer, {})  # of no parameter: refuses what cannot be restored
            _refuse_factored(optimizer, getattr(method, "reset", None))
        if scopes - _PARTIAL:
            restore_initial_state_(optimizer, [])
    sampled = [phase for phase in phases if method.gradient_samples(phase)]
    if sampled and state.gradient_passes is None:
        raise UsageError(
            f"{type(method).__name__} samples gradients on entering {sampled[0]}; give the Sparsifier a "
            "gradient_pass: a function of a number that runs forward and backward on the batch of that number"
        )


def _refuse_factored(optimizer: Optimizer, reset: str | None) -> None:
    """Refuse a choice of ``reset`` that would do nothing; methods without the choice grow weights all the same."""
    if reset in _PARTIAL and isinstance(optimizer, torch.optim.Adafactor):
        raise UsageError(
            f"reset={reset!r} would do nothing with Adafactor, which keeps its second moments by rows and columns and "
            "none of single weights; use reset='all', reset='targets' or reset='none', or another optimizer"
        )


@torch.no_grad()
def begin_learning(method: Method, state: SparseState, optimizer: Optimizer) -> None:
    """Give what the method learns beside the weights to an optimizer, in a group of its own.

    Raises:
        ConfigError: If the optimizer has a learning-rate scheduler already, or takes matrices only.
    """
    state.learned = {name: nn.Parameter(value) for name, value in method.learned(state).items()}
    if state.learned:
        _refuse_to_learn_by(optimizer, type(method).__name__, state.learned)
        optimizer.add_param_group({"params": list(state.learned.values()), **method.learned_group()})


def _refuse_to_learn_by(optimizer: Optimizer, who: str, learned: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that would fail over a new group, or whose scheduler would fail or leave it alone."""
    kind = type(optimizer).__name__
    if any("initial_lr" in group for group in optimizer.param_groups):  # where schedulers note it
        raise ConfigError(
            f"{who} learns parameters of its own, in a new group of {kind}, which has a learning rate scheduler "
            "already; make the scheduler after the Sparsifier (if the scheduler is of a training that is over, make a "
            "new optimizer first)"
        )
    takes_matrices_only = any(base.__name__ == "Muon" for base in type(optimizer).__mro__)
    if takes_matrices_only and any(value.ndim != 2 for value in learned.values()):
        raise ConfigError(
            f"{who} learns parameters that are no matrices, which {kind}, the last optimizer, does not take; give the "
            "Sparsifier one that does, such as AdamW, last, or do without Muon"
        )


def reset_optimizers(
    scope: ResetScope, hooks: StepHooks, weights: Mapping[str, nn.Parameter], *, old: Masks, new: Masks
) -> None:
    """Restore optimizer state between two phases.

    Args:
        scope: Whose.
        hooks: The optimizers.
        weights: Targets.
        old: Masks of the phase that ends.
        new: Masks of the phase that begins.
    """
    for optimizer, names in hooks.owners(weights).items() if scope != "none" else ():
        if scope in _PARTIAL:
            returned = {weights[name]: returned_weights(old[name], new.get(name)) for name in names if old}
            stayed = {weights[name]: old[name] & new.get(name, old[name]) for name in names if old}
            restore_where_(optimizer, returned, like=stayed if scope == "returned-mean" else None)
        else:
            chosen = [weights[name] for name in names] if scope == "targets" else hooks.parameters(optimizer)
            restore_initial_state_(optimizer, chosen, keep_steps=scope == "moments")
