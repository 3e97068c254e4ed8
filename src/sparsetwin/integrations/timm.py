"""timm: what its training task needs, resume and an EMA that agrees with the masks; the loop stays timm's.

::

    class Task(SparseTask, ClassificationTask):
        pass

    task = Task(model, criterion)
    task.setup_ema(decay=0.999)
    sparsifier = task.attach(st.ACDC(schedule=schedule), optimizer)   # after prepare_distributed()
    for step, (x, y) in enumerate(loader):
        sparsifier.begin_step()                                       # before the forward pass
        task(x, y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step)

timm's `CheckpointSaver` and ``resume_task_checkpoint`` save and load the state with the task's own. To rank checkpoints
of one half only, give the saver ``metric=None`` in phases of the other: unranked ones never displace ranked ones.
"""

from typing import Any

from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from sparsetwin._compat import named_weights
from sparsetwin.errors import CheckpointError, UsageError
from sparsetwin.masking import apply_masks_
from sparsetwin.methods import Method
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier import PhaseEvent, Sparsifier
from sparsetwin.targets import Targets

_KEY = "sparsetwin"


class SparseTask(TrainingTask):  # type: ignore[misc]
    """A base to put before one of timm's tasks, as in ``class Task(SparseTask, ClassificationTask)``.

    An average across a phase boundary mixes weights of different masks, and soon is not sparse. So the EMA starts anew
    from the model with each phase, and its pruned weights are set to zero wherever it is evaluated or saved.
    """

    _sparsifier: Sparsifier | None = None
    _phase_is_new = False

    def attach(self, method: Method, optimizer: Any, *, targets: Targets | None = None, seed: int = 0) -> Sparsifier:
        """Attach a method to the trainable module, before ``resume_task_checkpoint``.

        Args:
            method: What to do; its schedule counts optimizer steps.
            optimizer: One, or a sequence; the steps of the last are counted.
            targets: Which parameters may be pruned; by default as `Targets` says.
            seed: For methods that draw.

        Raises:
            UsageError: If the task is attached already.
        """
        if self._sparsifier is not None:
            raise UsageError("this task has a sparsifier already; make a new task for a new run")
        self._sparsifier = Sparsifier(method, self.get_trainable_module(), optimizer, targets=targets, seed=seed)
        self._sparsifier.on_phase(self._on_phase)
        return self._sparsifier

    def update_ema(self, step: int | None = None) -> None:
        """Update the EMA after an optimizer step; after the first one of a phase it is the model itself."""
        if self._phase_is_new and self.has_ema():
            self.get_trainable_module(ema=True).set(unwrap_model(self.get_trainable_module()))
        else:
            super().update_ema(step)
        self._phase_is_new = False

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the model to evaluate or save, with the masks of the phase if it is the EMA."""
        if ema and self.has_ema() and self._sparsifier is not None:
            average = self.get_trainable_module(ema=True).module
            apply_masks_(named_weights(average), self._sparsifier.masks)
        found: nn.Module | None = super().get_eval_model(module, ema=ema)
        return found

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the task's state for a checkpoint, ours among it."""
        state: dict[str, Any] = super().get_task_state(module, ema=ema)
        if ema or self._sparsifier is None:
            return state
        return {**state, _KEY: self._sparsifier.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Load what `get_task_state` returned; the model is loaded by then.

        Raises:
            CheckpointError: If the checkpoint was saved without a sparsifier.
        """
        others = {key: value for key, value in (state or {}).items() if key != _KEY}
        super().load_task_state(others or None, strict=strict, module=module, ema=ema)
        if ema or self._sparsifier is None:
            return
        if not state or _KEY not in state:
            raise CheckpointError("the checkpoint has no state of a sparsifier: it was saved without one")
        self._sparsifier.load_state_dict(state[_KEY])

    def _on_phase(self, event: PhaseEvent, phase: Phase) -> None:
        self._phase_is_new = self._phase_is_new or event == "enter"
