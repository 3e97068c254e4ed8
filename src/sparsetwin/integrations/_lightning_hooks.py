"""What the callback does under Lightning, whichever of its two packages is imported."""

import math
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from sparsetwin.checkpoint import Pair
from sparsetwin.errors import CheckpointError, ScheduleError, UsageError
from sparsetwin.integrations._backward import MaskedBackward
from sparsetwin.integrations._gathered import WholeState, group_of_copies
from sparsetwin.integrations._halves import Half, HalfKeeper, half_of, half_of_metric
from sparsetwin.integrations.lengths import MethodFactory, ScheduleFactory, build_method
from sparsetwin.methods import ACDC
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import Targets


class SparsifierHooks:
    """Train dense and sparse halves in turn under Lightning.

    Pass it in ``Trainer(callbacks=[...])``. Its state is part of every checkpoint, and
    ``trainer.fit(model, ckpt_path=...)`` loads it. Each half is saved when its phase ends.

    Lightning's order is: ``on_train_batch_start``, then inside ``optimizer.step`` forward, backward,
    ``on_before_optimizer_step``, clipping and the update, then ``on_train_batch_end``, checkpoints and validation. A
    phase is entered in ``on_train_batch_start``, so validation and checkpoints at a boundary see the phase that just
    ended, and gradients are masked before they are clipped. With manual optimization, gradients are masked during
    backward, so that ``clip_gradients`` sees masked ones too; a batch may hold one update of the counted
    optimizer, or call ``callback.sparsifier.begin_step()`` before each further one.

    To keep the best checkpoint of one half, log a metric of that half only and monitor it::

        self.log("sparse_val_loss", loss if callback.half == "sparse" else float("nan"))

    Args:
        schedule: Makes the schedule of the number of optimizer steps, which the Trainer knows. With manual
            optimization Lightning counts batches for it.
        pair: The pair's folder.
        method: Makes the method of ``schedule=``.
        targets: Which parameters may be pruned; by default as `Targets` says.
        seed: For methods that draw.
    """

    def __init__(
        self,
        schedule: ScheduleFactory,
        pair: str | Path,
        *,
        method: MethodFactory = ACDC,
        targets: Targets | None = None,
        seed: int = 0,
    ) -> None:
        self._schedule = schedule
        self._method = method
        self._targets = targets
        self._seed = seed
        self._halves = HalfKeeper(pair)
        self._sparsifier: Sparsifier | None = None
        self._backward: MaskedBackward | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """The key of our state in checkpoints, the same for both packages."""
        return "sparsetwin.Sparsifier"

    @property
    def sparsifier(self) -> Sparsifier:
        """The `Sparsifier` of the run; there is one from the beginning of training.

        Raises:
            UsageError: Before that.
        """
        if self._sparsifier is None:
            raise UsageError("there is no sparsifier before trainer.fit() has begun to train")
        return self._sparsifier

    @property
    def pair(self) -> Pair:
        """The pair of the run."""
        return self._halves.pair

    @property
    def half(self) -> Half:
        """The half that the model is now; at a boundary still that of the phase that just ended."""
        return half_of(None if self._sparsifier is None else self._sparsifier.phase)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep our state until the optimizers exist and are loaded.

        Raises:
            CheckpointError: If training is to go on from a checkpoint that has no such state.
        """
        if trainer.state.fn != "fit":
            return
        self._loaded = checkpoint["callbacks"].get(self.state_key)
        if self._loaded is None:
            raise CheckpointError(_no_state(trainer.ckpt_path))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the model and the optimizers, which hold what was loaded, and load our own state after them."""
        _refuse_unsupported(trainer)
        self._detach()
        total_steps = trainer.estimated_stepping_batches
        if not math.isfinite(total_steps) or total_steps < 1:
            raise ScheduleError(
                f"the number of steps of the run is {total_steps}; set max_steps or max_epochs of the Trainer"
            )
        batches = trainer.num_training_batches
        steps_per_epoch = (
            math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else total_steps
        )
        method = build_method(
            self._method, self._schedule, total_steps=int(total_steps), steps_per_epoch=int(steps_per_epoch)
        )
        sparsifier = Sparsifier(
            method,
            pl_module,
            trainer.optimizers,
            targets=self._targets,
            seed=self._seed,
            group=group_of_copies(pl_module),
        )
        self._sparsifier = sparsifier
        if self._loaded is not None:
            WholeState(sparsifier).load_state_dict(self._loaded)
        elif trainer.global_step:
            where = trainer.ckpt_path
            raise CheckpointError(_no_state(where) if where else "this Trainer has trained already; make a new one")
        self._loaded = None
        if not pl_module.automatic_optimization:  # a manual loop clips whenever it likes
            self._backward = MaskedBackward(sparsifier)
            self._backward.refresh()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Enter the phase of the step, before its first forward pass."""
        self.sparsifier.begin_step()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Mask gradients; automatic clipping comes next."""
        self.sparsifier.mask_gradients()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save the half whose phase ended with this step."""
        if self.sparsifier.phase_ends:
            self._halves.save(pl_module, self.sparsifier, writes=trainer.is_global_zero)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """List metrics with the half that they were measured on."""
        if self._sparsifier is not None and trainer.is_global_zero and not trainer.sanity_checking:
            self._halves.annotate(self._sparsifier, trainer.callback_metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the half of a phase that was cut short, and let go of the optimizers."""
        self._halves.save(pl_module, self.sparsifier, writes=trainer.is_global_zero)
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsifier's state for a checkpoint, with whole masks; Lightning asks every process for it."""
        return WholeState(self._sparsifier).state_dict() if self._sparsifier is not None else {}

    def _detach(self) -> None:
        if self._sparsifier is not None:
            self._sparsifier.detach()
        if self._backward is not None:
            self._backward.remove()


def _no_state(where: object) -> str:
    return (
        f"{where} has no state of this callback: it was saved without it; to start a new run from its weights, load "
        "them with load_from_checkpoint"
    )


def _refuse_unsupported(trainer: Any) -> None:
    """Refuse by name what would compare dense networks with sparse ones, and what the callback cannot serve.

    Raises:
        UsageError: Saying what to do instead.
    """
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau or isinstance(config.scheduler, ReduceLROnPlateau):
            raise UsageError(
                "ReduceLROnPlateau would take each change of phase for a change of the loss, since dense and sparse "
                "networks are validated in turn; use a schedule that does not look at metrics"
            )
    for callback in trainer.early_stopping_callbacks:
        raise UsageError(
            f"{type(callback).__name__}(monitor={callback.monitor!r}) would compare sparse networks with dense ones, "
            "and could stop before the final sparse phase, which the sparse half needs; remove it"
        )
    for callback in trainer.checkpoint_callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor not in (None, "step", "epoch") and half_of_metric(monitor) is None:
            raise UsageError(
                f"{type(callback).__name__}(monitor={monitor!r}) would compare sparse networks with dense ones; log "
                f"'sparse_{monitor}' in sparse phases and NaN in dense ones (callback.half tells which), monitor that"
            )
    strategy = type(trainer.strategy).__name__
    if strategy in ("DeepSpeedStrategy", "FSDPStrategy"):
        raise UsageError(
            f"{strategy} flattens parameters, so that no mask fits them; use ModelParallelStrategy with fully_shard in "
            "configure_model(), which shards them as they are, or DDP"
        )
