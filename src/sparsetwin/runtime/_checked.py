"""Whether programs compute what the network does: each one's result on the example is compared before it may win."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._entries import Made
from sparsetwin.runtime._reduced import LARGEST_ERROR_OF_ALL, largest_error

_MOST_ERROR = 1e-2  # max|y - ref| / max|ref| in float32: far above rounding, far below what a wrong program gives


@torch.no_grad()
def right_programs(
    programs: Mapping[str, Made], call: Call, reference: Callable[[], Any]
) -> tuple[dict[str, Made], dict[str, str]]:
    """Return the programs that compute what the network does, and why the others are left out.

    Nothing is compared where the network does not give the same finite numbers twice.

    Args:
        programs: By name.
        call: To compare on.
        reference: Returns what the network makes of the call.
    """
    expected = [_copied(leaf) for leaf in pytree.tree_leaves(reference())]
    again = pytree.tree_leaves(reference())
    floats = [leaf for leaf in expected if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not all(bool(leaf.isfinite().all()) for leaf in floats) or not _error(again, expected) <= _MOST_ERROR:
        return dict(programs), {}
    right: dict[str, Made] = {}
    wrong: dict[str, str] = {}
    for name, made in programs.items():
        try:
            error = _error(pytree.tree_leaves(made.run(call)), expected)
        except Exception as reason:  # an operation of PyTorch may raise anything
            first = str(reason).strip().splitlines()
            wrong[name] = f"{type(reason).__name__}: {first[0] if first else ''}"
            continue
        rounded = any(choice.engine == "dense planes" for choice in made.choices.values())
        if error <= (LARGEST_ERROR_OF_ALL if rounded else _MOST_ERROR):
            right[name] = made
        else:
            wrong[name] = f"its result on the example is off by {error:.2g} of the network's own"
    return right, wrong


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest relative error; infinite where shapes or dtypes differ."""
    kinds = [[(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in y] for y in (found, expected)]
    return largest_error(found, expected) if kinds[0] == kinds[1] else math.inf


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
