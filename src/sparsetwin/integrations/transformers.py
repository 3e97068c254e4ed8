"""The Hugging Face Trainer: a callback that trains a pair, resumes, and writes both halves.

::

    callback = SparsifierCallback(PhaseLengths(sparsity=0.8, unit="fractions", ...))
    Trainer(..., callbacks=[callback]).train()
    AutoModelForCausalLM.from_pretrained("<output_dir>/pair/sparse")

The Trainer's order is: ``on_step_begin``, forward and backward of each micro-batch, clipping, update, ``on_step_end``,
evaluation and saving. A phase is entered in ``on_step_begin``, so evaluation and saving at a boundary see the phase
that just ended. No hook runs between backward and clipping; gradients are masked during backward instead.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from sparsetwin._compat import local, named_weights
from sparsetwin._sharding import Layout
from sparsetwin.checkpoint import CheckpointStore, Pair
from sparsetwin.errors import CheckpointError, UsageError
from sparsetwin.integrations import hub
from sparsetwin.integrations._backward import MaskedBackward
from sparsetwin.integrations._folder import check_replaceable
from sparsetwin.integrations._gathered import WholeState, group_of_copies, refuse_left_out_sharding
from sparsetwin.integrations._halves import HalfKeeper, compares, half_of, half_of_metric
from sparsetwin.integrations.lengths import MethodFactory, ScheduleFactory, build_method
from sparsetwin.methods import ACDC
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import LAYERS, Targets

STATE_NAME = "sparsetwin"
"""The state is ``checkpoint-<step>/sparsetwin.pt``, beside the Trainer's own files."""


def default_targets(model: nn.Module) -> Targets:
    """Choose every linear and convolution weight, GPT-2's ``Conv1D`` included, but no embedding or head tied to one.

    Args:
        model: Any model.
    """
    kinds = (*LAYERS, Conv1D)
    modules = dict(model.named_modules())
    present = tuple(kind for kind in kinds if any(isinstance(module, kind) for module in modules.values()))
    embedded = {module.weight for module in modules.values() if isinstance(module, nn.Embedding)}
    tied = (name for name, module in modules.items() if isinstance(module, kinds) and module.weight in embedded)
    return Targets(include=present, exclude=tuple(f"{name}.weight" for name in tied))


class SparsifierCallback(TrainerCallback):  # type: ignore[misc]
    """Train dense and sparse halves in turn under the Hugging Face Trainer.

    Pass it in ``callbacks=[...]``. Its state is saved with each checkpoint and loaded by
    ``trainer.train(resume_from_checkpoint=...)``. Each half is saved when its phase ends, in ``<output_dir>/pair``;
    when training ends they become ``pair/dense`` and ``pair/sparse``, which ``from_pretrained`` opens.

    To keep the best network of one half (``load_best_model_at_end``, ``save_strategy="best"``), set
    ``metric_for_best_model`` to the metric with the half's name in front, such as ``"sparse_loss"``: evaluations of the
    other half do not compete.

    Args:
        schedule: Makes the schedule of the number of steps, which the Trainer knows.
        method: Makes the method of ``schedule=``.
        targets: Which parameters may be pruned; by default `default_targets`.
        pair: The pair's folder; by default ``<output_dir>/pair``.
        resume_from: The checkpoint given as ``resume_from_checkpoint``, if it is not in ``output_dir``: callbacks are
            not told.
        seed: For methods that draw.
    """

    def __init__(
        self,
        schedule: ScheduleFactory,
        *,
        method: MethodFactory = ACDC,
        targets: Targets | None = None,
        pair: str | Path | None = None,
        resume_from: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self._schedule = schedule
        self._method = method
        self._targets = targets
        self._pair_folder = pair
        self._resume_from = resume_from
        self._seed = seed
        self._sparsifier: Sparsifier | None = None
        self._backward: MaskedBackward | None = None
        self._halves: HalfKeeper | None = None

    @property
    def sparsifier(self) -> Sparsifier:
        """The `Sparsifier` of the run; there is one from the beginning of training.

        Raises:
            UsageError: Before that.
        """
        if self._sparsifier is None:
            raise UsageError("there is no sparsifier before trainer.train()")
        return self._sparsifier

    @property
    def pair(self) -> Pair:
        """The pair of the run; see `sparsifier`."""
        return self._keeper.pair

    @property
    def _keeper(self) -> HalfKeeper:
        if self._halves is None:
            raise UsageError("there is no pair before trainer.train()")
        return self._halves

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Attach to the model and the optimizer, which hold what was loaded, and load our own state after them."""
        model: nn.Module = given["model"]
        _refuse_unsupported(args, state, given["lr_scheduler"])
        refuse_left_out_sharding(model, asked=bool(getattr(args, "fsdp", None)))
        pair = Path(self._pair_folder or Path(args.output_dir) / "pair")
        if isinstance(model, PreTrainedModel):  # here, and not only when training ends
            check_replaceable([pair / "dense", pair / "sparse"], processor=given.get("processing_class"))
        self._detach()
        total_steps = state.max_steps
        method = build_method(
            self._method,
            self._schedule,
            total_steps=total_steps,
            steps_per_epoch=_steps_per_epoch(args, given["train_dataloader"], total_steps),
        )
        targets = default_targets(model) if self._targets is None else self._targets
        group = group_of_copies(model)
        self._sparsifier = Sparsifier(method, model, given["optimizer"], targets=targets, seed=self._seed, group=group)
        self._backward = MaskedBackward(self._sparsifier)
        self._halves = HalfKeeper(pair)
        if state.global_step:
            inside = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._load(Path(self._resume_from or inside), model, step=state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Enter the phase of the step, before its first forward pass."""
        self.sparsifier.begin_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Save the half whose phase ended with this step."""
        if self.sparsifier.phase_ends:
            self._save_half(state, given["model"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Save the half of a phase that is cut short, before the Trainer puts the best model in its place."""
        if control.should_training_stop:
            self._save_half(state, given["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """List metrics with the half that they were measured on, and let only one half compete for the best model."""
        if self._sparsifier is None:  # trainer.evaluate() without training
            return
        metrics: dict[str, float] = given["metrics"]
        if state.is_world_process_zero and self._keeper.annotate(self._sparsifier, metrics):
            self._refresh_card(given["model"])
        self._add_metric_of_half(args.metric_for_best_model, metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Save our state beside the Trainer's, whose files are complete by now."""
        whole, weights = WholeState(self.sparsifier).state_dict(), _fingerprint(given["model"])  # of all processes
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saved = {"sparsifier": whole, "weights": weights}
            CheckpointStore(folder).save(saved, step=state.global_step, name=STATE_NAME)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write both halves as folders that ``from_pretrained`` opens."""
        model = given["model"]
        is_replaced = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not is_replaced:
            self._save_half(state, model)
        if isinstance(model, PreTrainedModel) and state.is_world_process_zero:
            hub.save_pair(self.pair, model, method=self.sparsifier.method, processor=given.get("processing_class"))
        self._detach()
        if is_replaced:
            best = Path(state.best_model_checkpoint)
            self._keeper.forget()
            self._load(best, model, step=int(best.name.rpartition("-")[2]))

    def _save_half(self, state: TrainerState, model: nn.Module) -> None:
        self._keeper.save(model, self.sparsifier, writes=state.is_world_process_zero)

    def _add_metric_of_half(self, name: str | None, metrics: dict[str, float]) -> None:
        """Add ``eval_sparse_loss`` of ``eval_loss``; NaN, which never is the best, where the other half is measured."""
        half = half_of_metric(name) if name else None
        if half is None or name is None:
            return
        bare = name.removeprefix("eval_")
        measured = metrics.get(f"eval_{bare.removeprefix(f'{half}_')}")
        if measured is not None:
            counts = compares(half, self.sparsifier.phase, self.sparsifier.method.schedule)
            metrics[f"eval_{bare}"] = measured if counts else math.nan

    def _refresh_card(self, model: nn.Module) -> None:
        half = half_of(self.sparsifier.phase)
        folder = self.pair.folder / half
        if isinstance(model, PreTrainedModel) and (folder / "README.md").exists():
            hub.write_card(folder, self.pair.members[half], model=model, method=self.sparsifier.method)

    def _load(self, folder: Path, model: nn.Module, *, step: int) -> None:
        """Load our state, sure that the model holds the weights that were saved with it."""
        try:
            saved_step, saved = CheckpointStore(folder).load_named(STATE_NAME)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_advice(folder)}") from error
        if saved_step != step:
            raise CheckpointError(f"{folder} holds step {step} of the Trainer, but step {saved_step} of the sparsifier")
        found = _fingerprint(model)
        other = [name for name, fingerprint in saved["weights"].items() if found.get(name) != fingerprint]
        if other:
            raise CheckpointError(
                f"the model does not hold the weights of {folder}: {other[0]} and {len(other) - 1} more differ. The "
                "Trainer does not find the weights of architectures that are saved under other names, such as ViT (it "
                "logs 'missing keys'); give the Trainer a model loaded with from_pretrained from this checkpoint. If "
                "you resume from another folder, tell the callback with resume_from="
            )
        WholeState(self.sparsifier).load_state_dict(saved["sparsifier"])
        if self._backward is not None:
            self._backward.refresh()

    def _detach(self) -> None:
        if self._sparsifier is not None:
            self._sparsifier.detach()
        if self._backward is not None:
            self._backward.remove()


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _fingerprint(model: nn.Module) -> dict[str, int]:
    """Return a number for each parameter that other weights hardly share: the sum of its bits as integers."""
    weights = {name: weight.detach() for name, weight in named_weights(model).items() if weight.is_floating_point()}
    layout = Layout.of(weights)
    if layout is None:
        return {name: int(_sum_of_bits(weight)) for name, weight in weights.items()}
    sums = torch.stack([_sum_of_bits(local(weight)) * layout.counts(weight) for weight in weights.values()])
    layout.all_reduce(sums)
    return dict(zip(weights, sums.tolist(), strict=True))


def _sum_of_bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(_BITS[weight.itemsize]).sum(dtype=torch.int64)


def _steps_per_epoch(args: TrainingArguments, loader: Any, total_steps: int) -> int:
    """Return the Trainer's own count; a loader without a length is one long epoch to it."""
    try:
        batches = len(loader)
    except TypeError:
        return total_steps
    return max(math.ceil(int(batches) / int(args.gradient_accumulation_steps)), 1)


def _advice(folder: Path) -> str:
    """Say which checkpoint to resume from instead, as the rest of a message."""
    others = sorted(
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.parent.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    )
    for _, path in reversed(others):
        if (path / "trainer_state.json").is_file() and _is_good(path):
            return (
                f": the run was stopped while it saved, or it was saved without this callback; the last complete "
                f"checkpoint is {path}, resume with resume_from_checkpoint={str(path)!r}"
            )
    return (
        f", nor has any other checkpoint in {folder.parent}. If you resume from a checkpoint elsewhere, tell the "
        "callback with resume_from=; to start a new run from its weights, load them with from_pretrained"
    )


def _is_good(folder: Path) -> bool:
    try:
        CheckpointStore(folder).load_named(STATE_NAME)
    except CheckpointError:
        return False
    return True


def _refuse_unsupported(args: TrainingArguments, state: TrainerState, lr_scheduler: object) -> None:
    """Refuse by name what would compare dense networks with sparse ones, and what the callback cannot serve.

    Raises:
        UsageError: Saying what to do instead.
    """
    name = args.metric_for_best_model
    if isinstance(lr_scheduler, ReduceLROnPlateau) or type(lr_scheduler).__name__ == "GreedyLR":
        raise UsageError(
            f"{type(lr_scheduler).__name__} would take each change of phase for a change of the loss, since dense and "
            "sparse networks are evaluated in turn; use a schedule that does not look at metrics, such as "
            "lr_scheduler_type='cosine'"
        )
    if any("EarlyStopping" in stateful for stateful in state.stateful_callbacks or ()):
        raise UsageError(
            "EarlyStoppingCallback would compare sparse networks with dense ones, and could stop before the final "
            "sparse phase, which the sparse half needs; remove it, and choose fewer num_train_epochs for a shorter run"
        )
    if name and half_of_metric(name) is None:
        raise UsageError(
            f"metric_for_best_model={name!r} would compare sparse networks with dense ones; put the half that is to "
            f"compete in front: metric_for_best_model='sparse_{name.removeprefix('eval_')}' (or 'dense_...'), and set "
            "greater_is_better"
        )
    if state.is_hyper_param_search:
        raise UsageError("hyperparameter_search shares one callback among its trials; make a Trainer for each trial")
    if getattr(args, "enable_jit_checkpoint", False):
        raise UsageError(
            "enable_jit_checkpoint saves without telling callbacks, so such a checkpoint has no masks; use save_steps"
        )
    if getattr(args, "deepspeed", None):
        raise UsageError(
            "DeepSpeed flattens parameters, so that no mask fits them; use fsdp=True with fsdp_config={'version': 2}, "
            "which shards them as they are, or DDP"
        )
