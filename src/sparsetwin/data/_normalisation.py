"""From the bytes of images to what a network sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """(pixel / white - mean) / deviation, in float32."""

    white: int  # byte of a white pixel
    mean: Tensor  # (1, channels, 1, 1), white being 1, on the device
    deviation: Tensor  # like mean

    @classmethod
    def per_channel(
        cls, mean: Sequence[float], deviation: Sequence[float], *, white: int, device: torch.device
    ) -> "Normalisation":
        """Make one from a mean and a deviation for each channel; ``white`` is 1 in their units."""
        means, deviations = (
            torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
            for values in (mean, deviation)
        )
        return cls(white, means, deviations)

    @property
    def device(self) -> torch.device:
        """Where inputs are put."""
        return self.mean.device

    def apply(self, images: Tensor) -> Tensor:
        """Return normalised images.

        Args:
            images: (samples, channels, height, width), uint8; if they are on another device, best in pinned memory.

        Returns:
            The same shape, float32, on the device.
        """
        return images.to(self.device, non_blocking=True).float().div_(self.white).sub_(self.mean).div_(self.deviation)
