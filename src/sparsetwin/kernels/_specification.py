"""Everything that decides the machine code of a product kernel, as hashable data: the key of the kernel cache."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sparsetwin.errors import ConfigError, nearest
from sparsetwin.kernels._target import Target

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Element = Literal["float32", "float16"]
IndexFormat = Literal["offset32", "column16"]
ValueFormat = Literal["float32", "bfloat16", "float16", "int8"]
_CHOICES = {
    "index": IndexFormat,
    "value": ValueFormat,
    "element": Element,
    "accumulator": Element,
}
_WAITING_BYTES = 1 << 16  # of sums in float32 that wait for the next block, on the stack


@dataclass(frozen=True, kw_only=True)
class ProductSpecification:
    """A sparse-weight x dense-activation kernel: how wide it is, what it reads, and what it does at the store."""

    target: Target
    lanes: int  # of one vector; the target's, or fewer where there are fewer columns
    vectors: int  # accumulators a row, contiguous columns; a tile has lanes * vectors columns
    chains: int = 1  # independent sums a column, so that few vectors do not wait for each other
    together: int = 1  # consecutive rows worked on at a time; if more than 1, all rows of a block have equal indices
    index: IndexFormat = "offset32"  # byte offset of the activation row, or its number
    value: ValueFormat = "float32"  # of the weights; narrower ones are widened on the way to the multiply-adds
    scaled: bool = False  # whether a row's sums are multiplied with its scale, before the bias is added
    element: Element = "float32"  # of the activations; float16 takes a target that computes with it, and such values
    accumulator: Element = "float32"  # of sums; with float16 elements that of so many products is float16 even so:
    run: int = 32  # of all chains together
    bias: bool = False
    residual: bool = False  # added before the activation
    activation: Activation | None = None
    keep: bool = False  # clear the lanes that a mask of columns does not keep
    masked: bool = False  # the last vector is only partly there: loads and stores leave the rest alone

    def __post_init__(self) -> None:
        for field, choice in _CHOICES.items():
            given = getattr(self, field)
            if given not in get_args(choice):
                raise ConfigError(f"{field}={given!r} has no kernel; expected one of {', '.join(get_args(choice))}")
        check_activation(self.activation)
        self._check_element()
        most = max_vectors(self.target)
        if not 1 <= self.vectors * self.chains <= most:
            raise ConfigError(
                f"{self.vectors} vectors of {self.chains} sums do not fit {self.target.name}; expected 1 to {most}"
            )
        if self.together < 1 or (self.together > 1 and not fit_together(self)):
            raise ConfigError(
                f"{self.together} rows of {self.vectors} vectors, {self.chains} sums, do not fit {self.target.name}"
            )
        if self.lanes not in (1, 2, 4, 8, 16, 32):
            raise ConfigError(f"lanes={self.lanes} is not a power of two up to 32")

    def _check_element(self) -> None:
        if self.element == "float32":
            if self.accumulator != "float32":
                raise ConfigError("sums of float32 numbers are float32")
        elif not self.target.halves:
            raise ConfigError(f"{self.target.name} has no float16 arithmetic; expected elements in float32")
        elif self.run < 1 or self.value != "float16" or self.scaled or self.index != "offset32":
            raise ConfigError(f"float16 activations take float16 weights at offsets, got {self.value}, {self.index}")

    @property
    def waiting_rows(self) -> int:
        """Rows whose float32 sums wait on the stack for the next block; only with float16 elements."""
        rows = max(self.together, _WAITING_BYTES // (4 * self.lanes * self.vectors))
        return rows - rows % self.together


@dataclass(frozen=True, kw_only=True)
class TokenSpecification:
    """What kernels for a few tokens have in common that take a row's weights many at a time."""

    target: Target
    lanes: int  # of one vector
    value: ValueFormat = "float32"
    scaled: bool = False
    bias: bool = False
    activation: Activation | None = None

    def __post_init__(self) -> None:
        check_activation(self.activation)


LINE_BYTES = 64  # of a cache line
ELEMENT_BYTES: dict[Element, int] = {"float32": 4, "float16": 2}
VALUE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_FORMATS: dict[torch.dtype, ValueFormat] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
}


def value_format(values: torch.Tensor) -> ValueFormat:
    """Return the format that kept values have in memory."""
    return _FORMATS[values.dtype]


def element_format(dtype: torch.dtype) -> Element:
    """Return the format of activations of a dtype.

    Raises:
        ConfigError: If kernels do not compute with it.
    """
    if dtype not in (torch.float32, torch.float16):
        raise ConfigError(f"activations in {dtype} have no kernel; expected float32 or float16")
    return "float32" if dtype == torch.float32 else "float16"


def lanes_of(target: Target, element: Element) -> int:
    """Return how many activations fill a vector."""
    return target.lanes if element == "float32" else 2 * target.lanes


def max_vectors(target: Target) -> int:
    """Return how many accumulators fit the registers beside a weight, a mask and scratch."""
    return target.registers - 4


def fit_together(spec: ProductSpecification) -> bool:
    """Tell whether the sums of several rows fit the registers beside the activations and a weight."""
    return spec.chains == 1 and (spec.together + 1) * spec.vectors + 1 <= spec.target.registers


def rows_together(vectors: int, target: Target) -> int:
    """Return how many dense rows of so many vectors a kernel works on at a time: at most six.

    >>> from sparsetwin.kernels._target import AVX2
    >>> [rows_together(vectors, AVX2) for vectors in (1, 2, 3, 4, 6, 8)]
    [6, 6, 4, 2, 1, 1]
    """
    return max(1, min(6, (target.registers - 1) // vectors - 1))


def check_activation(activation: str | None) -> None:
    """Refuse an activation that no kernel fuses.

    Raises:
        ConfigError: If it is not None and unknown.
    """
    if activation is not None and activation not in get_args(Activation):
        known = get_args(Activation)
        raise ConfigError(
            f"activation {activation!r} cannot be fused{nearest(activation, known)}; "
            f"expected None or {', '.join(known)}"
        )
