"""What a stage pays for: every pass of every step, by the weights that it computes with."""

from collections.abc import Mapping
from typing import Any

from sparsetwin.methods import Pass
from sparsetwin.metrics import FlopsLedger, ForwardFlops
from sparsetwin.schedules import Phase
from sparsetwin.training.costs import Density, density_of, pass_flops, step_flops, updated_counts
from sparsetwin.training.session import Session
from sparsetwin.training.tally import Tally, changes_weights


class Billing:
    """Enters into a ledger what the steps of a session cost.

    ``begin_step`` and ``end_step`` stand around each step; ``end_segment`` at each boundary, where weights are counted.
    Steps between two boundaries have the weights that are counted at the second one. Where weights change within a
    phase, they are counted at every pass instead.

    Args:
        session: In training.
        forward: FLOPs of the dense model, for one sample.
        teacher_flops: Of a forward pass of the teacher for one sample.
    """

    def __init__(self, session: Session, forward: ForwardFlops, *, teacher_flops: int = 0) -> None:
        self.ledger = FlopsLedger(forward.total())
        self.forward = forward
        self._session = session
        self._teacher_flops = teacher_flops
        self._samples = 0  # of steps since the ledger's last entry that the weights at the next boundary pay for
        self._left_flops = forward.total()  # of a forward pass of one sample, at the latest boundary
        self._tally = Tally(session.sparsifier, session.processes)
        self._counts_passes = changes_weights(session.sparsifier.method)
        if self._counts_passes:
            session.before_pass = self._tally.count
        self._phase_before: Phase | None = None
        self._was_taught = False
        self._sampled_before = 0

    def begin_step(self) -> None:
        """Remember how things are before a step."""
        self._tally.begin_step()
        self._phase_before, self._was_taught = self._session.sparsifier.phase, self._is_taught
        self._sampled_before = self._session.sampled

    def end_step(self, samples: int, *, counts: bool) -> None:
        """Take in a step.

        Args:
            samples: Of its batch.
            counts: Whether its update was done; what is not counted as a step is not paid for, but for the gradients
                that were sampled in it.
        """
        method, phase = self._session.sparsifier.method, self._session.sparsifier.phase
        enters = phase is not None and phase != self._phase_before
        sampled = self._session.sampled - self._sampled_before
        if sampled:
            self._pay_for_samples(sampled)
        if phase is None or not counts:
            return
        if enters and method.needs_gradients(phase):
            self._pay_for_entering(phase, samples)
        elif self._counts_passes:
            self._tally.add(samples, passes=len(method.passes(phase, enters=False)))
        else:
            self._samples += samples

    def end_segment(self, nonzero: Mapping[str, int]) -> int:
        """Pay for the steps since the last boundary.

        Args:
            nonzero: Canonical name -> weights that are not zero, of every parameter.

        Returns:
            FLOPs of a forward pass of one sample.
        """
        sparsifier = self._session.sparsifier
        density = density_of(self.forward, nonzero, updated_counts(sparsifier), sparsifier.target_names)
        if self._samples:
            phase = sparsifier.phase
            assert phase is not None
            each = self._flops_each(phase, density, enters=False, is_taught=self._is_taught)
            self.ledger.add_flops(self._samples * each, samples=self._samples)
        if self._tally.samples:
            self._pay_for_passes(nonzero)
        self._samples, self._left_flops = 0, density.kept
        return density.kept

    def _pay_for_samples(self, samples: int) -> None:
        """Pay for the gradients that were sampled to choose masks, with the weights of the phase that ended."""
        each = 3 * self._left_flops + (self._teacher_flops if self._is_taught else 0)
        self.ledger.add_flops(each * samples)

    def _pay_for_entering(self, phase: Phase, samples: int) -> None:
        """Pay for a step between whose backward and update a phase began; its passes had the weights before it."""
        density = Density(all=self.forward.total(), kept=self._left_flops, updated=self._left_flops)
        each = self._flops_each(phase, density, enters=True, is_taught=self._was_taught)
        self.ledger.add_flops(samples * each, samples=samples)

    def _pay_for_passes(self, nonzero: Mapping[str, int]) -> None:
        """Pay for steps whose passes were counted one by one; ``nonzero`` is for the weights that are no targets."""
        samples = self._tally.samples
        others = {name: samples * count for name, count in nonzero.items()}
        passes, flops = self._passes(), 0
        for each, counts in zip(passes, self._tally.take(), strict=True):
            found = {**others, **counts.nonzero}
            density = density_of(self.forward, found, counts.updated, counts.nonzero, samples=samples)
            flops += pass_flops(each, density)
        if self._is_taught:
            flops += samples * self._teacher_flops * len(passes)
        self.ledger.add_flops(flops, samples=samples)

    def _passes(self) -> tuple[Pass, ...]:
        phase = self._session.sparsifier.phase
        assert phase is not None
        return self._session.sparsifier.method.passes(phase, enters=False)

    def _flops_each(self, phase: Phase, density: Density, *, enters: bool, is_taught: bool) -> int:
        """Return the FLOPs of one sample in one step; a teacher answers in every pass."""
        method = self._session.sparsifier.method
        taught = self._teacher_flops * len(method.passes(phase, enters=enters)) if is_taught else 0
        return step_flops(method, phase, density, enters=enters) + taught

    @property
    def _is_taught(self) -> bool:
        teacher = self._session.teacher
        return teacher is not None and teacher.teaches

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the ledger depends on. All processes have to call it."""
        return {
            "ledger": self.ledger.state_dict(),
            "segment_samples": self._samples,
            "left_flops": self._left_flops,
            "tally": self._tally.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, now or before single passes were counted."""
        self.ledger.load_state_dict(state["ledger"])
        self._samples = state["segment_samples"]
        self._left_flops = state["left_flops"]
        if "tally" in state:
            self._tally.load_state_dict(state["tally"])
