"""What a training run costs in floating-point operations, added up while it goes."""

from collections.abc import Mapping

from sparsetwin.errors import ConfigError, StateError


def training_flops(forward_flops: int, samples: int) -> int:
    """Return the FLOPs of training on samples: the backward pass counts twice the forward pass.

    Selecting masks, the optimizer and re-estimating batch norms are not counted.

    >>> f"{training_flops(8_212_112_872, 100 * 1_281_167):.4g}"  # ResNet-50, 100 epochs of ImageNet
    '3.156e+18'

    Args:
        forward_flops: Of one sample, for the weights as they are now.
        samples: Samples trained on.

    Source: Peste et al., 2021, arXiv 2106.12379, and its published code.
    """
    return 3 * forward_flops * samples


class FlopsLedger:
    """Training FLOPs of a run so far, and what a dense run would have taken.

    Add an entry at the end of each epoch with that epoch's non-zeros, as the paper does, or of each phase.

    >>> ledger = FlopsLedger(dense_forward_flops=100)
    >>> ledger.add(100, samples=10)
    >>> ledger.add(20, samples=10)
    >>> ledger.training_flops, ledger.ratio
    (3600, 0.6)

    Args:
        dense_forward_flops: Of one sample, without any zero.
    """

    def __init__(self, dense_forward_flops: int) -> None:
        if dense_forward_flops < 1:
            raise ConfigError(f"dense_forward_flops needs to be at least 1, got {dense_forward_flops}")
        self._dense_forward_flops = dense_forward_flops
        self._samples = 0
        self._training_flops = 0

    @property
    def training_flops(self) -> int:
        """Training FLOPs so far."""
        return self._training_flops

    @property
    def dense_training_flops(self) -> int:
        """Training FLOPs of a dense run on the same samples."""
        return training_flops(self._dense_forward_flops, self._samples)

    @property
    def samples(self) -> int:
        """Samples trained on so far."""
        return self._samples

    @property
    def ratio(self) -> float:
        """Training FLOPs relative to a dense run on the same samples; 1.0 before the first entry."""
        return self._training_flops / self.dense_training_flops if self._samples else 1.0

    def add(self, forward_flops: int, *, samples: int) -> None:
        """Add training on some samples.

        Args:
            forward_flops: Of one sample, for the weights as they were.
            samples: Samples trained on, 0 or more.

        Raises:
            ConfigError: If a number is negative.
        """
        if forward_flops < 0 or samples < 0:
            raise ConfigError(f"forward_flops and samples are not negative, got {forward_flops} and {samples}")
        self._samples += samples
        self._training_flops += training_flops(forward_flops, samples)

    def add_flops(self, flops: int, *, samples: int = 0) -> None:
        """Add FLOPs that were counted pass by pass.

        Args:
            flops: Of all the samples together.
            samples: Samples trained on; 0 for passes that a dense training does not have.

        Raises:
            ConfigError: If a number is negative.
        """
        if flops < 0 or samples < 0:
            raise ConfigError(f"flops and samples are not negative, got {flops} and {samples}")
        self._samples += samples
        self._training_flops += flops

    def state_dict(self) -> dict[str, int]:
        """Return the state as plain integers."""
        return {
            "dense_forward_flops": self._dense_forward_flops,
            "samples": self._samples,
            "training_flops": self._training_flops,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            StateError: If a field is missing or unknown, or the state is of a model of other dense FLOPs.
        """
        if state.keys() != self.state_dict().keys():
            raise StateError(f"a FLOPs ledger has the fields {sorted(self.state_dict())}, got {sorted(state)}")
        if state["dense_forward_flops"] != self._dense_forward_flops:
            raise StateError(
                f"the ledger's model takes {state['dense_forward_flops']} dense forward FLOPs, "
                f"this one {self._dense_forward_flops}"
            )
        self._samples = int(state["samples"])
        self._training_flops = int(state["training_flops"])
