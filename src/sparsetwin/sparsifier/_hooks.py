"""Hooks around ``optimizer.step``: what torch's optimizers, closures, AMP and CUDA graphs need known about them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetwin._compat import is_capturing, local
from sparsetwin.errors import TargetError, UsageError
from sparsetwin.optimizer_state import innermost

OnUpdate = Callable[[Optimizer, bool], None]


class StepHooks:
    """Call ``before`` once gradients are final and ``after`` once weights are updated, for each optimizer.

    A class of optimizers whose ``step`` calls its base class's may fire both twice for one update.

    Args:
        optimizers: The optimizers; wrappers such as Accelerate's are looked through.
        before: Gets the optimizer, and whether it will skip the update because a gradient is not finite. With a closure
            it runs at the end of the closure, where gradients exist.
        after: Gets the same.

    Raises:
        UsageError: If there is no optimizer, or one of them twice.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, before: OnUpdate, after: OnUpdate) -> None:
        self.optimizers = [innermost(optimizer) for optimizer in optimizers]
        if not self.optimizers:
            raise UsageError("expected an optimizer or a sequence of them, got an empty sequence")
        if len(set(self.optimizers)) < len(self.optimizers):
            raise UsageError("expected different optimizers, got one of them twice")
        self._before = before
        self._after = after
        self._skips: dict[Optimizer, bool] = {}  # read once for each update, since reading waits for the device
        self._served: set[nn.Parameter] = set()
        self._handles: list[RemovableHandle] = []

    @property
    def are_attached(self) -> bool:
        """Whether the optimizers call the hooks."""
        return bool(self._handles)

    def attach(self, targets: Mapping[str, nn.Parameter]) -> None:
        """Put the hooks on the optimizers.

        Raises:
            UsageError: If hooks of another `Sparsifier` serve one of the targets already.
        """
        for optimizer in self.optimizers:
            for hook in optimizer._optimizer_step_pre_hooks.values():
                other = getattr(hook, "__self__", None)
                shared = [n for n, p in targets.items() if isinstance(other, StepHooks) and p in other._served]
                if shared:
                    raise UsageError(
                        f"another Sparsifier serves {shared[0]} already; detach() it first, or make a new optimizer"
                    )
        self._served = set(targets.values())
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

    def groups(self, tensors: Mapping[str, Tensor]) -> dict[str, Mapping[str, Any]]:
        """Return the parameter group of each parameter that an optimizer updates, as it is now."""
        every_group = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        groups = {parameter: group for group in every_group for parameter in group["params"]}
        return {name: groups[tensor] for name, tensor in tensors.items() if tensor in groups}

    def owners(self, targets: Mapping[str, nn.Parameter]) -> dict[Optimizer, list[str]]:
        """Return which targets each optimizer updates.

        Raises:
            TargetError: If a target belongs to no optimizer, or to more than one.
        """
        held = {optimizer: set(self.parameters(optimizer)) for optimizer in self.optimizers}
        owned: dict[Optimizer, list[str]] = {optimizer: [] for optimizer in self.optimizers}
        lost: list[str] = []
        for name, parameter in targets.items():
            owners = [optimizer for optimizer in self.optimizers if parameter in held[optimizer]]
            if len(owners) > 1:
                kinds = " and ".join(type(optimizer).__name__ for optimizer in owners)
                raise TargetError(f"{name} belongs to {len(owners)} optimizers ({kinds}); let one of them update it")
            if owners:
                owned[owners[0]].append(name)
            else:
                lost.append(name)
        if lost:
            more = f" and {len(lost) - 1} more targets" if len(lost) > 1 else ""
            raise TargetError(
                f"{lost[0]}{more}: no given optimizer updates it; pass all optimizers, and attach after "
                "parameters were replaced, as sharding and some adapters do"
            )
        return owned

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._skips[optimizer] = _will_skip(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer itself
        if closure is None:
            _refuse_backward()
            self._before(optimizer, self._skips[optimizer])
            return None

        def closure_then_before() -> Any:
            loss = closure()
            self._before(optimizer, self._skips[optimizer])
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_before}
        return (args[0], closure_then_before, *args[2:]), kwargs

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._after(optimizer, self._skips[optimizer])


def changes_nothing(optimizer: Optimizer) -> bool:
    """Whether all learning rates are zero: loaders of distributed checkpoints step so to make an optimizer's state."""
    return all(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)


@torch.no_grad()
def unscale_(optimizer: Optimizer) -> None:
    """Divide gradients by the scale of a GradScaler now, where a fused optimizer would do it within its update."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    inverse = scale.double().reciprocal().float()  # as GradScaler.unscale_ does
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradient.mul_(inverse.to(gradient.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _will_skip(optimizer: Optimizer) -> bool:
    """Whether a GradScaler makes a fused optimizer skip its update; an unfused one is not called at all then."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, torch.Tensor) and not is_capturing() and bool(found_inf.item())


def _refuse_backward() -> None:
    """Refuse an update from within backward, which hooks on gradients make: there is no one step to count."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise UsageError("optimizer.step() was called during backward; call it after backward instead")


def refuse_unsupported(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse by name what no hook around ``optimizer.step`` can serve.

    Raises:
        UsageError: For FSDP1, DeepSpeed, optimizer-in-backward and LBFGS; it says what to use instead.
    """
    for optimizer in optimizers:
        if isinstance(innermost(optimizer), torch.optim.LBFGS):
            raise UsageError("LBFGS searches along a line of weights and cannot keep masks; use SGD, Adam or another")
    for module in model.modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise UsageError(
                "FSDP1 (FullyShardedDataParallel) flattens weights into one parameter, whose layers cannot be masked; "
                "use fully_shard (FSDP2), which shards them as they are, or DistributedDataParallel"
            )
        if "DeepSpeedEngine" in kinds:
            raise UsageError(
                "DeepSpeed ZeRO flattens weights, so that no mask fits them, and updates them by itself; use "
                "fully_shard (FSDP2), which shards them as they are, or DistributedDataParallel"
            )
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_is_flat_param", False):
            raise UsageError(f"{name} is a flat parameter of FSDP1, whose layers cannot be masked")
        if hasattr(parameter, "_in_backward_optimizers"):
            raise UsageError(f"{name} is updated during backward; call optimizer.step() after backward instead")
