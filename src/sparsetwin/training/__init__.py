"""The plain training loop that the command line and the benchmarks share."""

from sparsetwin.sparsifier import whole_view
from sparsetwin.training.branching import branch_step, finetuning_step, has_dense_half
from sparsetwin.training.distillation import OWN, distillation_loss
from sparsetwin.training.environment import choose_device, make_deterministic, seed_everything
from sparsetwin.training.evaluate import Score, evaluate
from sparsetwin.training.journal import Event, Journal, Listener, Progress
from sparsetwin.training.processes import ALONE, Processes, joined_processes
from sparsetwin.training.run import Run, RunParts
from sparsetwin.training.run_folder import RunFolder
from sparsetwin.training.session import LoopSettings, Session
from sparsetwin.training.settings import DistributedSettings, LearningRateSettings, OptimizerSettings, TrainSettings
from sparsetwin.training.sharding import check_distributed, whole_twin

__all__ = [
    "ALONE",
    "OWN",
    "DistributedSettings",
    "Event",
    "Journal",
    "LearningRateSettings",
    "Listener",
    "LoopSettings",
    "OptimizerSettings",
    "Processes",
    "Progress",
    "Run",
    "RunFolder",
    "RunParts",
    "Score",
    "Session",
    "TrainSettings",
    "branch_step",
    "check_distributed",
    "choose_device",
    "distillation_loss",
    "evaluate",
    "finetuning_step",
    "has_dense_half",
    "joined_processes",
    "make_deterministic",
    "seed_everything",
    "whole_twin",
    "whole_view",
]
