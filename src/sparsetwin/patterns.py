"""Which weights live and die together: pure descriptions; `sparsetwin.selection` turns them into masks.

A weight is seen as a matrix whose rows are outputs and whose columns are inputs, once for every tap of a kernel: its
shape is read as (outputs, inputs, kernel ...), as `torch.nn.Linear` and `torch.nn.Conv2d` store it. A convolution's
weight is permuted to (outputs, kernel ..., inputs) before it is cut into groups: they run along input channels within
one tap of one filter, which is the order in which hardware multiplies. In a grouped convolution the inputs are those of
one group; a depthwise one has a single input, so that no group of more fits. A vector is a matrix of one column.
Layers that store their inputs first (transposed convolutions, GPT-2's ``Conv1D``) are read with the two exchanged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsetwin.errors import ConfigError, SelectionError

_GRADUAL_TRANSPOSABLE = 4  # for larger blocks, what is kept of them need not lie within what was kept before


@dataclass(frozen=True)
class Unstructured:
    """Every weight by itself."""


@dataclass(frozen=True)
class NM:
    """Of every ``m`` neighbouring input channels ``n`` are kept, for each output and each tap of a kernel.

    The sparsity is ``1 - n / m`` in every layer, and the last sparse phase of a run has it. Phases before that may keep
    more of every group: `pattern_at`. A transposable mask is cut into blocks of ``m`` outputs by ``m`` inputs, with
    ``n`` kept in each row and in each column, so that the transposed weight has the pattern, too, and the backward pass
    can use it. For ``m`` up to 4 the choice is the best there is; for larger ones it is a good one.

    Raises:
        ConfigError: Unless 0 < n < m.

    Source: Zhou et al., 2021, arXiv 2102.04010; transposable masks: Hubara et al., 2021, arXiv 2102.08124.
    """

    n: int
    """Weights that are kept in each group."""
    m: int
    """Weights of a group."""
    transposable: bool = False
    """Whether the transposed weight has the pattern, too."""

    def __post_init__(self) -> None:
        if not (_is_count(self.n) and _is_count(self.m) and self.n < self.m):
            raise ConfigError(f"n of every m weights are kept, so 0 < n < m in whole numbers; got {self.n}:{self.m}")

    @property
    def sparsity(self) -> float:
        """Fraction of zero weights, ``(m - n) / m``."""
        return (self.m - self.n) / self.m

    @property
    def tile(self) -> tuple[int, int]:
        """Outputs and inputs that a group spans."""
        return (self.m if self.transposable else 1), self.m


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` outputs by ``columns`` inputs live and die as one, at one tap of a kernel.

    Raises:
        ConfigError: Unless both are whole numbers above 0.
    """

    rows: int
    """Outputs of a block."""
    columns: int
    """Inputs of a block."""

    def __post_init__(self) -> None:
        if not (_is_count(self.rows) and _is_count(self.columns)):
            raise ConfigError(f"a block has at least 1 row and 1 column, got {self.rows} x {self.columns}")

    @property
    def tile(self) -> tuple[int, int]:
        """Outputs and inputs that a group spans."""
        return self.rows, self.columns


@dataclass(frozen=True)
class Channel:
    """All weights with the same index on one axis live and die as one: axis 0 is outputs, axis 1 inputs.

    Raises:
        ConfigError: If the axis is no whole number of at least 0.
    """

    axis: int = 0
    """Axis of the weight as the layer stores it."""

    def __post_init__(self) -> None:
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis < 0:
            raise ConfigError(f"an axis is 0 (output channels), 1 (input channels) or a later one, got {self.axis!r}")


Pattern = Unstructured | NM | Block | Channel


def pattern_at(pattern: Pattern, sparsity: float) -> Pattern:
    """Return what a pattern keeps in a phase of a sparsity: on the way to N:M more than ``n`` of every ``m``.

    >>> pattern_at(NM(2, 4), 0.25)
    NM(n=3, m=4, transposable=False)
    >>> pattern_at(Block(4, 4), 0.9)
    Block(rows=4, columns=4)

    Args:
        pattern: Which weights live and die together.
        sparsity: Fraction in (0, 1) that the phase asks for.

    Raises:
        ConfigError: If groups of N:M cannot have that sparsity, or are pruned further than the pattern.
    """
    if not isinstance(pattern, NM):
        return pattern
    kept = round(pattern.m * (1 - sparsity))
    found = math.isclose((pattern.m - kept) / pattern.m, sparsity, rel_tol=0.0, abs_tol=1e-9)
    if found and kept == pattern.n:
        return pattern
    before = _sparsities_before(pattern)
    if found and (pattern.m - kept) / pattern.m in before:
        return NM(kept, pattern.m, pattern.transposable)
    says = (
        f"{pattern.n}:{pattern.m} keeps {pattern.n} of every {pattern.m} weights, a sparsity of {pattern.sparsity!r}; "
        f"got {sparsity!r}"
    )
    if before:
        listed = ", ".join(map(str, before))
        says += f"; phases on the way to it may have {listed}, as schedules.grouped(schedule, m={pattern.m}) gives them"
    elif pattern.n + 1 < pattern.m:
        says += f"; a transposable pattern is pruned step by step for m up to {_GRADUAL_TRANSPOSABLE} only"
    raise ConfigError(says)


def _sparsities_before(pattern: NM) -> list[float]:
    """Return the sparsities that groups can have on the way to a pattern, rising."""
    if pattern.transposable and pattern.m > _GRADUAL_TRANSPOSABLE:
        return []
    return [pruned / pattern.m for pruned in range(1, pattern.m - pattern.n)]


def check_pattern(pattern: Pattern, shapes: Mapping[str, Sequence[int]], sparsity: float) -> None:
    """Refuse, before training, a pattern that does not fit the layers or the sparsity.

    >>> check_pattern(NM(2, 4), {"fc": (10, 64)}, 0.5)
    >>> check_pattern(NM(2, 3), {"fc": (10, 63)}, 0.9)
    Traceback (most recent call last):
    sparsetwin.errors.ConfigError: 2:3 keeps 2 of every 3 weights, a sparsity of 0.3333333333333333; got 0.9

    Args:
        pattern: Which weights live and die together.
        shapes: Canonical name -> shape of the weight.
        sparsity: Fraction in [0, 1) that a sparse phase asks for.

    Raises:
        SelectionError: If the groups of the pattern do not divide a layer.
        ConfigError: If groups of N:M cannot have the sparsity, or are pruned further than the pattern.
    """
    pattern_at(pattern, sparsity)
    check_shapes(pattern, shapes)


def check_shapes(pattern: Pattern, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse layers that the groups of a pattern do not divide.

    Args:
        pattern: Which weights live and die together.
        shapes: Canonical name -> shape of the weight.

    Raises:
        SelectionError: With the name and shape of such a layer.
    """
    for name, shape in shapes.items():
        _check_shape(pattern, name, tuple(shape))


def _check_shape(pattern: Pattern, name: str, shape: tuple[int, ...]) -> None:
    if isinstance(pattern, Unstructured):
        return
    leave_out = f"leave the layer out with exclude=({name!r},)"
    if isinstance(pattern, Channel):
        if pattern.axis >= len(shape):
            raise SelectionError(
                f"{name} of shape {shape} has no axis {pattern.axis} to cut channels from; {leave_out}"
            )
        return
    outputs, inputs = (*shape[:2], 1, 1)[:2]
    rows, columns = pattern.tile
    if inputs % columns:
        depthwise = len(shape) > 2 and inputs == 1
        raise SelectionError(
            f"{name} of shape {shape} has {_counted(inputs, 'input channel')} for each output, which groups of "
            f"{columns} do not divide; {leave_out}{' or dense_depthwise=True' if depthwise else ''}"
        )
    if outputs % rows:
        raise SelectionError(
            f"{name} of shape {shape} has {_counted(outputs, 'output')}, which groups of {rows} do not divide; "
            f"{leave_out}"
        )


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
