"""HAM: a hyperbolic mirror step after each update, which moves weights in proportion to themselves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetwin._compat import local
from sparsetwin.errors import ConfigError
from sparsetwin.methods._state import SparseState

_LARGEST_EXPONENT = 5.0


@dataclass(frozen=True, kw_only=True)
class HAM:
    """Multiply every non-zero weight by ``exp(lr * (-alpha * sign(w) * gradient - beta))`` after the optimizer's step.

    It acts on all trained parameters of two or more dimensions, targets or not, with the gradient that the optimizer
    was given and its learning rate of the step. A weight at zero stays at zero. The exponent is held within 5 of zero.

    Raises:
        ConfigError: If a number is negative or not finite.

    Source: Jacobs, Gadhikar, Rubio-Madrigal & Burkholz, *Hyperbolic Aware Minimization: Implicit Bias for Sparsity*,
        ICLR 2026, arXiv 2506.02630, and its published code.
    """

    alpha: float = 200.0
    """Strength of the mirror step."""
    beta: float = 1e-3
    """Shrinkage of every weight, in proportion to it."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} needs to be a finite number that is not negative, got {getattr(self, name)}")

    @torch.no_grad()
    def gradients(self, state: SparseState, *, optimizer: Optimizer) -> dict[Tensor, Tensor]:
        """Return a copy of the gradients that an optimizer is about to be given.

        Some optimizers compute within ``.grad``: torch's SGD with Nesterov's momentum adds the momentum to it, where it
        updates many tensors at once. So what ``.grad`` holds after a step need not be the gradient.

        Args:
            state: Says which parameters are the model's.
            optimizer: Its gradients are without the scale of a GradScaler.

        Returns:
            Parameter of two or more dimensions -> this process's part of its gradient, dense, of the weight's dtype.
        """
        trained = set(state.parameters.values())
        given = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return {p: _gradient(p, p.grad) for p in given if p.ndim >= 2 and p.grad is not None and p in trained}

    @torch.no_grad()
    def apply_(self, gradients: Mapping[Tensor, Tensor], *, optimizer: Optimizer) -> None:
        """Do the mirror step on the parameters that an optimizer has updated, before weights are masked.

        Args:
            gradients: What `gradients` returned before the update; they are overwritten.
            optimizer: Gives the learning rates.
        """
        for group in optimizer.param_groups:
            alpha = -self.alpha if group.get("maximize") else self.alpha  # the gradient of what is minimized
            for parameter in group["params"]:
                if parameter in gradients:
                    weight = local(parameter)
                    exponent = gradients[parameter].mul_(weight.sign()).mul_(-alpha).sub_(self.beta).mul_(group["lr"])
                    weight.mul_(exponent.clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp_())


def _gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    part = local(gradient)
    return part.to_dense() if part.is_sparse else part.to(local(parameter).dtype, copy=True)
