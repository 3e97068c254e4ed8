"""How to train: frozen settings that recipes fill in and the command line overrides field by field."""

import math
from dataclasses import dataclass
from typing import Literal

from sparsetwin.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "muon"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Which optimizer, and its own settings; fields that it does not have are ignored."""

    name: OptimizerName = "sgd"
    """sgd, adam, adamw, nadam, rmsprop, adagrad, or muon (hidden matrices by Muon; embeddings, the last linear layer
    and all that is no matrix, such as convolutions, by AdamW)."""
    lr: float = 0.1
    """Base learning rate, which the learning-rate schedule multiplies."""
    momentum: float = 0.9
    """Momentum of sgd, rmsprop and muon."""
    nesterov: bool = False
    """Nesterov momentum for sgd."""
    weight_decay: float = 5e-4
    """Weight decay on every parameter, biases and batch norm included, as in the paper."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments of adam, adamw and nadam."""
    eps: float = 1e-8
    """Term added to the denominator of adam, adamw, nadam and rmsprop."""
    muon_lr: float = 0.02
    """Base learning rate of the hidden matrices, which muon updates; lr is then AdamW's."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "lr", "momentum", "weight_decay", "eps", "muon_lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas need to be in [0, 1), got {self.betas}")
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ConfigError("nesterov needs a momentum above 0")


@dataclass(frozen=True, kw_only=True)
class LearningRateSettings:
    """How the learning rate moves: a linear warm-up, then a shape. A pure function of the step, so it has no state."""

    shape: Literal["cosine", "step", "constant"] = "cosine"
    """cosine to zero, step (times gamma at each milestone) or constant."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up."""
    milestones: tuple[float, ...] = ()
    """Epochs at which shape=step multiplies by gamma."""
    gamma: float = 0.1
    """Factor at each milestone."""
    every: Literal["step", "epoch"] = "step"
    """Change at every optimizer step, or once an epoch as the paper does."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "warmup_epochs", "gamma")

    def factor(self, step: int, *, steps_per_epoch: int, epochs: float) -> float:
        """Return what the base learning rate is multiplied with.

        >>> imagenet = LearningRateSettings(warmup_epochs=5, every="epoch")
        >>> [f"{0.256 * imagenet.factor(e, steps_per_epoch=1, epochs=100):.3g}" for e in (0, 4, 5, 52, 99)]
        ['0.0512', '0.256', '0.256', '0.13', '7e-05']

        Args:
            step: Optimizer steps done, from 0.
            steps_per_epoch: Optimizer steps of one epoch.
            epochs: Length of the whole schedule.
        """
        if self.every == "epoch":
            epoch = float(step // steps_per_epoch)
            warmup = (epoch + 1) / self.warmup_epochs if self.warmup_epochs else 1.0
        else:
            epoch = step / steps_per_epoch
            warmup = (epoch + 1 / steps_per_epoch) / self.warmup_epochs if self.warmup_epochs else 1.0
        if epoch < self.warmup_epochs:
            return min(warmup, 1.0)
        if self.shape == "cosine":
            done = (epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-12)
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if self.shape == "step":
            return float(self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
        return 1.0


@dataclass(frozen=True, kw_only=True)
class DistributedSettings:
    """How several processes that torchrun started train one model; a single process has no use for it."""

    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP2); without it each has a copy (DDP)."""
    sync_batch_norm: bool = False
    """Take batch-norm statistics over the whole batch instead of each process's part of it; on GPUs only."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The training loop."""

    epochs: int = 200
    """Passes over the training set."""
    batch_size: int = 128
    """Samples of one optimizer step, over all processes together."""
    eval_batch_size: int = 512
    """Samples of one evaluation batch."""
    accumulation: int = 1
    """Parts into which a batch is cut, to need less memory; their gradients add up to one step."""
    precision: Precision = "fp32"
    """fp32, or autocast to bf16 or fp16 (with loss scaling; an overflowing step is skipped and does not count)."""
    clip_norm: float = 0.0
    """Largest gradient norm, taken over kept weights only; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights within a phase, which is evaluated and saved; 0 is none."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last memory format."""
    teacher: str | None = None
    """Network to distil from: a run folder, whose dense half teaches, or a file of safetensors of the same network;
    or own, the run's own dense half as the last dense phase left it, which teaches in sparse phases. A path is kept as
    that of --pretrained is, but resuming reads it again."""
    teacher_weight: float = 0.5
    """Share of the teacher in the loss."""
    teacher_temperature: float = 4.0
    """What outputs are divided by before they are compared with the teacher's."""
    compile: bool = False
    """Run the model through torch.compile."""
    recalibrate_batches: int = 0
    """Training batches over which each half's batch-norm statistics are computed anew before it is saved; with cram the
    command line takes 20 if nothing is said."""
    dense_finetune: bool = False
    """Train the dense half on, from the end of the last dense phase to the end of the same learning-rate schedule."""
    checkpoint_epochs: float = 1.0
    """Epochs between checkpoints of the run."""
    test: bool = True
    """Score the halves on the test set at the end; without it they are judged by the hold-out, and the test set is not
    looked at."""
    deterministic: bool = True
    """Use deterministic algorithms only. On a CPU, runs of one seed and thread count are then equal to the bit."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} needs to be at least 1, got {getattr(self, name)}")
        _check_not_negative(self, "clip_norm", "label_smoothing", "ema_decay", "recalibrate_batches")
        for name in ("ema_decay", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name} needs to be below 1, got {getattr(self, name)}")
        if not 0 < self.teacher_weight <= 1 or not 0 < self.teacher_temperature < math.inf:
            raise ConfigError(
                "teacher_weight needs to be in (0, 1] and teacher_temperature positive, got "
                f"{self.teacher_weight} and {self.teacher_temperature}"
            )
        if self.batch_size % self.accumulation:
            raise ConfigError(f"batch_size {self.batch_size} cannot be cut into {self.accumulation} equal parts")
        if not 0 < self.checkpoint_epochs < math.inf:
            raise ConfigError(f"checkpoint_epochs needs to be positive, got {self.checkpoint_epochs}")


def _check_not_negative(settings: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < math.inf:
            raise ConfigError(f"{name} needs to be a finite number that is not negative, got {getattr(settings, name)}")
