"""Which schedule a method usually has: data that recipes make it from."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["alternating", "gradual", "periodic", "constant", "oneshot", "rounds", "cut"]
"""alternating: AC/DC's; gradual: sparsity rises; periodic: one sparsity, masks updated now and then; constant: one
sparsity and one mask; oneshot: dense, then sparse; rounds: train, prune and rewind; cut: dense, sparse at the very
end, in the last step if nothing else is said."""

BATCHES_AFTER_CUT = 20
"""Training batches over which batch-norm statistics are computed anew where the last step cuts, if nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A schedule's kind, with its usual places as fractions of a run."""

    kind: Kind
    start: float = 0.0
    stop: float = 1.0
    every: float = 0.01
    goes_on: bool = False  # at the final sparsity of a gradual schedule, whether phases of ``every`` follow to the end
