"""The plain training loop that the command line and the benchmarks share."""

from sparsetwin.training.branching import branch_step
from sparsetwin.training.environment import choose_device, make_deterministic, seed_everything
from sparsetwin.training.evaluate import Score, evaluate
from sparsetwin.training.journal import Event, Journal, Listener, Progress
from sparsetwin.training.run import Run, RunParts
from sparsetwin.training.run_folder import RunFolder
from sparsetwin.training.session import LoopSettings, Session
from sparsetwin.training.settings import LearningRateSettings, OptimizerSettings, TrainSettings

__all__ = [
    "Event",
    "Journal",
    "LearningRateSettings",
    "Listener",
    "LoopSettings",
    "OptimizerSettings",
    "Progress",
    "Run",
    "RunFolder",
    "RunParts",
    "Score",
    "Session",
    "TrainSettings",
    "branch_step",
    "choose_device",
    "evaluate",
    "make_deterministic",
    "seed_everything",
]
