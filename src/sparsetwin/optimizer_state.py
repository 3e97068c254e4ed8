"""What an optimizer remembers of weights that come back when a sparse phase ends, and how to make it forget.

The paper zeroes SGD's momentum there. In general every optimizer gets its *own* initial values back, in place: for
Adam that includes the step count, for NAdam a product of 1. Zeros put over everything are wrong for most optimizers.
Optimizers without bias correction keep their second moments, because zeroed ones would make their next updates far
too large. ``docs/optimizer-state.md`` has the rule of each optimizer and its measured effect.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetwin._compat import local
from sparsetwin.errors import UsageError

ResetScope = Literal["all", "moments", "targets", "returned", "returned-mean", "none"]
"""Whose state is restored when weights come back.

``"all"``: every parameter's; ``"moments"``: every parameter's but for its step count; ``"targets"``: that of the
targets; ``"returned"``: that of the returning weights alone, step counts stay; ``"returned-mean"``: the same, but where
an optimizer scales updates by second moments, a returning weight begins with the mean of the weights that were kept;
``"none"``: nobody's. A method whose ``reset`` is of returning weights refuses Adafactor, which
has no state of single weights.
"""

ParameterState = dict[str, Any]
"""What an optimizer remembers of one parameter: key -> tensor or number."""

InitialStateRule = Callable[[ParameterState, Mapping[str, Any]], object]
"""Restores one parameter's state in place, given that state and the optimizer's parameter group."""


@torch.no_grad()
def restore_initial_state_(optimizer: object, parameters: Iterable[nn.Parameter], *, keep_steps: bool = False) -> None:
    """Restore the optimizer's own initial state values for some parameters, in place.

    Tensors keep their identity, since CUDA graphs, compiled steps and distributed checkpoints hold on to them. Whether
    a parameter has a gradient does not matter. An optimizer without a rule of its own loses the state of these
    parameters and makes it anew at its next step.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.NAdam([weight])
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> restore_initial_state_(optimizer, [weight])
    >>> optimizer.state[weight]["step"].item(), optimizer.state[weight]["mu_product"].item()
    (0.0, 1.0)

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper that `innermost` looks into.
        parameters: Whose state to restore; without state, or of another optimizer: nothing is done.
        keep_steps: Leave step counts, and what is computed from them alone, as they are.

    Raises:
        UsageError: If the optimizer cannot forget single parameters (LBFGS), or has no rule and cannot do without one.
            Nothing has been changed then.

    Source: Peste et al., 2021, arXiv 2106.12379, for SGD; the rules of other optimizers are ours.
    """
    optimizer = innermost(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(
            "LBFGS keeps one history for all parameters together, so single weights cannot come back with a fresh "
            "state; use another optimizer, or reset='none'"
        )
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    chosen = [p for p in dict.fromkeys(parameters) if p in groups and optimizer.state.get(p)]
    rule = _rule_of(type(optimizer))
    if rule is None:
        _check_can_drop(optimizer)
        for parameter in chosen:
            del optimizer.state[parameter]
        return
    if isinstance(rule, _InitialValues):
        for parameter in chosen:
            rule.check(optimizer.state[parameter], type(optimizer))
    if rule is _BUILT_IN["SGD"]:
        _check_fused_sgd(optimizer, chosen)
    for parameter in chosen:
        state = optimizer.state[parameter]
        counts = {key: _copied(state[key]) for key in _COUNTS if key in state} if keep_steps else {}
        rule(state, groups[parameter])
        for key, value in counts.items():
            state[key] = state[key].copy_(value) if isinstance(state[key], Tensor) else value


@torch.no_grad()
def restore_where_(
    optimizer: object,
    returned: Mapping[nn.Parameter, Tensor],
    *,
    like: Mapping[nn.Parameter, Tensor] | None = None,
) -> None:
    """Restore the optimizer's own initial state values for single weights, in place; step counts stay.

    State that is not of single weights, such as Adafactor's of rows and columns, stays as it is.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> restore_where_(optimizer, {weight: torch.tensor([True, False])})
    >>> optimizer.state[weight]["momentum_buffer"]
    tensor([0., 1.])

    Args:
        optimizer: A `torch.optim.Optimizer`, or a wrapper that `innermost` looks into.
        returned: Parameter -> bool of its shape, True where a weight comes back.
        like: Parameter -> bool of its shape: second moments of returning weights begin with the mean of those of the
            weights that it marks, instead.

    Raises:
        UsageError: If the optimizer has no rule that says how its state begins.
    """
    optimizer = innermost(optimizer)
    rule = _rule_of(type(optimizer))
    if rule is None:
        raise UsageError(
            f"{type(optimizer).__name__} cannot forget single weights. {_how_to_register(type(optimizer))}"
        )
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    chosen = [p for p in returned if p in groups and optimizer.state.get(p)]
    if isinstance(rule, _InitialValues):
        for parameter in chosen:
            rule.check(optimizer.state[parameter], type(optimizer))
    for parameter in chosen:
        others = None if like is None else like[parameter]
        _restore_where_(optimizer.state[parameter], groups[parameter], rule, returned[parameter], like=others)


def _restore_where_(
    state: ParameterState, group: Mapping[str, Any], rule: InitialStateRule, where: Tensor, *, like: Tensor | None
) -> None:
    """Apply a rule to a copy and take over what it made of the elements that ``where`` marks."""
    begun = {key: _copied(value) for key, value in state.items()}
    rule(begun, group)
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != where.shape or not where.ndim:
            continue
        initial = begun.get(key)
        here = local(where)
        values = local(value)
        begins = local(initial) if isinstance(initial, Tensor) else torch.zeros((), device=here.device)
        if like is not None and key in _SECOND_MOMENTS:
            begins = _whole(torch.where(like, value, 0).sum()) / _whole(like.sum()).clamp(min=1)
        values.copy_(torch.where(here, begins.to(values.dtype), values))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _whole(value: Tensor) -> Tensor:
    """Return a sum over all of a DTensor's processes as an ordinary tensor."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def register_initial_state(optimizer_class: type[Optimizer], rule: InitialStateRule) -> None:
    """Teach `restore_initial_state_` an optimizer, and its subclasses that have no rule of their own.

    >>> class Lion(torch.optim.Optimizer): ...
    >>> register_initial_state(Lion, lambda state, group: state["exp_avg"].zero_())

    Args:
        optimizer_class: The class; a rule that it has already is replaced.
        rule: Called with the state of one parameter and its parameter group; changes the state in place.

    Raises:
        UsageError: If it is not a class of optimizers.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise UsageError(f"a rule belongs to a subclass of torch.optim.Optimizer, got {optimizer_class!r}")
    _RULES[optimizer_class] = rule


def innermost(optimizer: object) -> Optimizer:
    """Return the optimizer that really steps: the one inside all wrappers.

    A wrapper is an object whose attribute ``optimizer`` is an optimizer or again a wrapper, as accelerate's and
    Lightning's are. Wrappers may lack the hook tables; the innermost optimizer has them.

    Args:
        optimizer: A `torch.optim.Optimizer` or a wrapper of one.

    Raises:
        UsageError: If there is no optimizer inside.
    """
    inner, seen = optimizer, {id(optimizer)}
    while (following := getattr(inner, "optimizer", None)) is not None and id(following) not in seen:
        if not isinstance(following, Optimizer) and not hasattr(following, "optimizer"):
            break
        inner = following
        seen.add(id(inner))
    if not isinstance(inner, Optimizer):
        raise UsageError(f"expected a torch.optim.Optimizer or a wrapper of one, got {type(optimizer).__name__}")
    return inner


_InitialValue = float | Literal["keep"] | Callable[[Mapping[str, Any]], float | None]


class _InitialValues:
    """A rule that is a table: key -> its initial value, or a function of the parameter group that returns it."""

    def __init__(self, **values: _InitialValue) -> None:
        self.values = values

    def __call__(self, state: ParameterState, group: Mapping[str, Any]) -> None:
        for key, value in self.values.items():
            if key in state and value != "keep":
                _fill(state, key, value(group) if callable(value) else float(value))

    def check(self, state: ParameterState, optimizer_class: type[Optimizer]) -> None:
        """Refuse state that the table does not know, such as a subclass may add."""
        unknown = sorted(str(key) for key in state.keys() - self.values.keys())
        if unknown:
            raise UsageError(
                f"{optimizer_class.__name__} keeps {', '.join(unknown)}, whose initial value is unknown; known: "
                f"{', '.join(self.values)}. {_how_to_register(optimizer_class)}"
            )


def _fill(state: ParameterState, key: str, value: float | None) -> None:
    """Set a tensor in place, a number by replacing it; what is None stays None."""
    current = state[key]
    if value is None or current is None:
        state[key] = None
    elif not isinstance(current, Tensor):
        state[key] = type(current)(value)
    elif value == 0:
        current.zero_()  # sparse tensors too
    else:
        current.fill_(complex(value, value) if current.is_complex() else value)


def _learning_rate(group: Mapping[str, Any]) -> float:
    """Return today's learning rate, with which a new optimizer would begin."""
    return float(group["lr"])


def _first_momentum(group: Mapping[str, Any]) -> float | None:
    """With dampening SGD's buffer is removed: its first step alone is not dampened, and None is how it knows."""
    return None if group["dampening"] else 0.0


def _check_fused_sgd(optimizer: Optimizer, chosen: list[nn.Parameter]) -> None:
    """The fused kernel knows one first step for the whole group, not one for each parameter."""
    restored = set(chosen)
    for group in optimizer.param_groups:
        with_momentum = [p for p in group["params"] if optimizer.state.get(p, {}).get("momentum_buffer") is not None]
        count = sum(p in restored for p in with_momentum)
        if group.get("fused") and group["dampening"] and 0 < count < len(with_momentum):
            raise UsageError(
                "fused SGD with dampening cannot make a first step for some parameters of a group only: restore the "
                "whole group (reset='all'), or use fused=False or dampening=0"
            )


_BUILT_IN: dict[str, InitialStateRule] = {
    "SGD": _InitialValues(momentum_buffer=_first_momentum),
    "Adam": _InitialValues(step=0, exp_avg=0, exp_avg_sq=0, max_exp_avg_sq=0),
    "NAdam": _InitialValues(step=0, mu_product=1, exp_avg=0, exp_avg_sq=0),
    "RAdam": _InitialValues(step=0, exp_avg=0, exp_avg_sq=0),
    "SparseAdam": _InitialValues(step=0, exp_avg=0, exp_avg_sq=0),
    "Adamax": _InitialValues(step=0, exp_avg=0, exp_inf=0),
    "Adadelta": _InitialValues(step=0, square_avg=0, acc_delta=0),
    "Adafactor": _InitialValues(step=0, row_var=0, col_var=0, variance=0),
    "ASGD": _InitialValues(step=0, eta=_learning_rate, mu=1, ax=0),
    "Rprop": _InitialValues(step=0, prev=0, step_size=_learning_rate),
    "Muon": _InitialValues(momentum_buffer=0),
    # Without bias correction: second moments stay. The mean gradient that "centered" subtracts stays with them, as
    # their difference is a variance only if both saw the same steps; Adagrad's step counts its learning rate decay.
    "RMSprop": _InitialValues(step="keep", square_avg="keep", grad_avg="keep", momentum_buffer=0),
    "Adagrad": _InitialValues(step="keep", sum="keep"),
}
_BUILT_IN["AdamW"] = _BUILT_IN["Adam"]  # torch >= 2.8 derives it from Adam anyway

_RULES: dict[type[Optimizer], InitialStateRule] = {
    getattr(torch.optim, name): rule for name, rule in _BUILT_IN.items() if hasattr(torch.optim, name)
}


def _rule_of(optimizer_class: type[Optimizer]) -> InitialStateRule | None:
    """Return the rule of the class or of its nearest base that has one."""
    return next((_RULES[base] for base in optimizer_class.__mro__ if base in _RULES), None)


_COUNTS = ("step", "mu_product", "eta", "mu")
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum")
_STEP_COUNTS = ("step", "steps", "step_count", "num_steps", "k", "t")


def _check_can_drop(optimizer: Optimizer) -> None:
    """Refuse an optimizer without a rule that would not make the state of one parameter anew at its next step."""
    kind = type(optimizer)
    if _makes_state_early(kind):
        raise UsageError(
            f"{kind.__name__} makes its state when it is constructed, so dropped state would not come back. "
            f"{_how_to_register(kind)}"
        )
    for group in optimizer.param_groups:
        for key in _STEP_COUNTS:
            if isinstance(group.get(key), (int, float, Tensor)):
                raise UsageError(
                    f"{kind.__name__} counts steps in its parameter groups ({key!r}), so new state of single "
                    f"parameters would meet an old count. {_how_to_register(kind)}"
                )


def _how_to_register(optimizer_class: type[Optimizer]) -> str:
    name = optimizer_class.__name__
    return f"Say how it begins with register_initial_state({name}, rule), or use reset='none'"


def _makes_state_early(optimizer_class: type[Optimizer]) -> bool:
    """Whether the constructor, or a method of the class that it calls, names ``state``."""
    bases = [base for base in optimizer_class.__mro__ if issubclass(base, Optimizer) and base is not Optimizer]
    waiting, seen = {"__init__", "add_param_group"}, set[str]()
    while waiting:
        method = waiting.pop()
        seen.add(method)
        names = {name for base in bases for name in _names_in(base.__dict__.get(method))}
        if "state" in names:
            return True
        waiting |= {name for name in names - seen - {"step"} if any(name in base.__dict__ for base in bases)}
    return False


def _names_in(function: object) -> set[str]:
    """Return every attribute and global that a function's code names, nested functions included."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    names: set[str] = set()
    waiting = [code] if code is not None else []
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names
