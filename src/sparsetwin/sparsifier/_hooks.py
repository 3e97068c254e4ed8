"""Hooks around ``optimizer.step``: what torch's optimizers, closures, AMP and CUDA graphs need known about them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetwin._compat import is_capturing
from sparsetwin.errors import TargetError, UsageError
from sparsetwin.optimizer_state import innermost

Before = Callable[[Optimizer], None]
After = Callable[[Optimizer, bool], None]


class StepHooks:
    """Call ``before`` once gradients are final and ``after`` once weights are updated, for each optimizer.

    Args:
        optimizers: The optimizers; wrappers such as Accelerate's are looked through.
        before: Gets the optimizer. With a closure it runs at the end of the closure, where gradients exist.
        after: Gets the optimizer and whether its update was skipped because a gradient was not finite.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, before: Before, after: After) -> None:
        self.optimizers = [innermost(optimizer) for optimizer in optimizers]
        self._before = before
        self._after = after
        self._handles: list[RemovableHandle] = []
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._pre))
            self._handles.append(optimizer.register_step_post_hook(self._post))

    def remove(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def parameters(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Return all parameters of an optimizer."""
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def owners(self, targets: dict[str, nn.Parameter]) -> dict[Optimizer, list[str]]:
        """Return which targets each optimizer updates.

        Raises:
            TargetError: If a target belongs to no optimizer, or to more than one.
        """
        owner: dict[int, Optimizer] = {}
        for optimizer in self.optimizers:
            for parameter in self.parameters(optimizer):
                if id(parameter) in owner and owner[id(parameter)] is not optimizer:
                    raise TargetError("a parameter belongs to two optimizers; let one of them update it")
                owner[id(parameter)] = optimizer
        lost = [name for name, parameter in targets.items() if id(parameter) not in owner]
        if lost:
            more = f" and {len(lost) - 1} more targets" if len(lost) > 1 else ""
            raise TargetError(
                f"{lost[0]}{more}: no given optimizer updates it; pass all optimizers, or attach after the model was "
                "sharded (fully_shard) or its parameters replaced"
            )
        owned: dict[Optimizer, list[str]] = {optimizer: [] for optimizer in self.optimizers}
        for name, parameter in targets.items():
            owned[owner[id(parameter)]].append(name)
        return owned

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer itself
        if closure is None:
            self._before(optimizer)
            return None

        def closure_then_before() -> Any:
            loss = closure()
            self._before(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_before}
        return (args[0], closure_then_before, *args[2:]), kwargs

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._after(optimizer, _was_skipped(optimizer))


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler made a fused optimizer skip its update; an unfused one is not called at all then."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, torch.Tensor) and not is_capturing() and bool(found_inf.item())


def refuse_unsupported(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse by name what no hook around ``optimizer.step`` can serve.

    Raises:
        UsageError: For FSDP1 flat parameters, optimizer-in-backward and LBFGS; it says what to use instead.
    """
    for optimizer in optimizers:
        if isinstance(innermost(optimizer), torch.optim.LBFGS):
            raise UsageError("LBFGS searches along a line of weights and cannot keep masks; use SGD, Adam or another")
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "FlatParameter":
            raise UsageError(f"{name} is a flat parameter of FSDP1; shard with fully_shard (FSDP2) instead")
        if hasattr(parameter, "_in_backward_optimizers"):
            raise UsageError(f"{name} is updated during backward; call optimizer.step() after backward instead")
