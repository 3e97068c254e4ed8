"""A weight as a sparse file holds it: one bit a weight, the kept values in their few bits, a number for each row.

Nothing here is dense until it is asked for. Bits and values may be views of a mapped file.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sparsetwin.errors import ConfigError

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptWeight:
    """A weight is its kept value, times its row's scale if there are scales; all others are zero.

    Raises:
        ConfigError: If bits, values, scales and shape do not agree.
    """

    shape: tuple[int, ...]  # (rows, ...)
    bits: Tensor = field(repr=False)  # uint8, (ceil(numel / 8),), row-major, the lowest bit first
    values: Tensor = field(repr=False)  # (kept,), row-major; float32, bfloat16, float16 or int8
    scales: Tensor | None = field(repr=False, default=None)  # float64, (rows,)

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ConfigError(f"a weight of shape {self.shape} has no kernel; expected at least one element")
        if self.values.dtype not in VALUE_DTYPES or self.values.dim() != 1:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in VALUE_DTYPES)
            raise ConfigError(
                f"kept values are {self.values.dtype}, {self.values.dim()} axes; expected one, of {known}"
            )
        if self.scales is not None and (self.scales.dtype, self.scales.shape) != (torch.float64, (self.shape[0],)):
            raise ConfigError(f"scales are {self.scales.dtype} {tuple(self.scales.shape)}; expected one a row, float64")
        if self.bits.dtype != torch.uint8 or self.bits.shape != ((self.numel + 7) // 8,):
            raise ConfigError(f"a weight of shape {self.shape} has {(self.numel + 7) // 8} bytes of bits, uint8")
        if bit_count(self.bits, self.numel) != self.values.numel():
            raise ConfigError(f"{self.values.numel()} values, but the bits keep {bit_count(self.bits, self.numel)}")

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor) -> Self:
        """Take the weights that are not zero, as float32; ``weight`` is (rows, ...), on the CPU."""
        kept = weight.detach().float().reshape(-1)
        mask = kept != 0
        return cls(shape=tuple(weight.shape), bits=packed_bits(mask), values=kept[mask])

    @property
    def numel(self) -> int:
        """Number of weights, pruned ones included."""
        return torch.Size(self.shape).numel()

    @property
    def density(self) -> float:
        """Fraction of weights that are kept."""
        return self.values.numel() / self.numel

    @property
    def is_narrow(self) -> bool:
        """Whether values take fewer bits than float32."""
        return self.values.itemsize < 4

    def scaled(self, factors: Tensor) -> "KeptWeight":
        """Return the weight with each row times a number; ``factors`` is (rows,)."""
        scales = factors.double() if self.scales is None else self.scales * factors.double()
        return replace(self, scales=scales)

    def reshaped(self, shape: tuple[int, ...]) -> "KeptWeight":
        """Return the weight in another shape with as many rows and elements."""
        return replace(self, shape=shape)

    def positions(self) -> Tensor:
        """Return where the kept weights lie: row-major, rising, int64, (kept,)."""
        return set_bits(self.bits, self.numel)

    @torch.no_grad()
    def float_values(self) -> Tensor:
        """Return the kept weights, scales applied in float64 and rounded once: float32, (kept,)."""
        if self.scales is None:
            return self.values.float()
        row = self.positions() // (self.numel // self.shape[0])
        return (self.values.double() * self.scales[row]).float()

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the dense weight, float32, in memory of its own."""
        dense = torch.zeros(self.numel, dtype=torch.float32, device="cpu")
        dense[self.positions()] = self.float_values()
        return dense.reshape(self.shape)


def packed_bits(mask: Tensor) -> Tensor:
    """Return a bool tensor as one bit an element, row-major, the lowest bit first."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def set_bits(bits: Tensor, numel: int) -> Tensor:
    """Return the places of the bits that are set among the first ``numel``: rising, int64."""
    unpacked = np.unpackbits(bits.numpy(), count=numel, bitorder="little")
    return torch.from_numpy(unpacked.view(np.bool_).nonzero()[0])


def bit_count(bits: Tensor, numel: int) -> int:
    """Return how many bits are set among the first ``numel``."""
    return int(np.count_nonzero(np.unpackbits(bits.numpy(), count=numel, bitorder="little")))
