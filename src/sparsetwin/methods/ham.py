"""HAM: a hyperbolic mirror step after each update, which moves weights in proportion to themselves."""

import math
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
    def apply_(self, state: SparseState, *, optimizer: Optimizer) -> None:
        """Do the mirror step on the parameters that an optimizer has updated, before weights are masked.

        Args:
            state: Says which parameters are the model's; what a method learns beside them is left alone.
            optimizer: Gives gradients and learning rates.
        """
        trained = set(state.parameters.values())
        for group in optimizer.param_groups:
            alpha = -self.alpha if group.get("maximize") else self.alpha  # the gradient of what is minimized
            for parameter in group["params"]:
                if parameter.ndim >= 2 and parameter.grad is not None and parameter in trained:
                    exponent = self._exponent(parameter, alpha=alpha).mul_(group["lr"])
                    local(parameter).mul_(exponent.clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp_())

    def _exponent(self, parameter: Tensor, *, alpha: float) -> Tensor:
        """Return the exponent for each weight of this process's part, for a learning rate of 1."""
        assert parameter.grad is not None
        weight, gradient = local(parameter), local(parameter.grad)
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        return weight.sign().mul_(gradient.to(weight.dtype)).mul_(-alpha).sub_(self.beta)
