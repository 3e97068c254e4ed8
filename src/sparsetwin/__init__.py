"""Train once, ship twins: AC/DC training that ends with a dense network and its sparse twin."""

from sparsetwin import distributions, errors, metrics, patterns, schedules, scores
from sparsetwin.batch_norm import recalibrate_batch_norm
from sparsetwin.checkpoint import Pair, load_sparse, save_sparse
from sparsetwin.distributions import Global, Uniform
from sparsetwin.methods import ACDC, Dense, Method
from sparsetwin.patterns import Unstructured
from sparsetwin.schedules import Phase, Schedule
from sparsetwin.selection import select_masks
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import Targets

__version__ = "0.1.0"
__all__ = [
    "ACDC",
    "Dense",
    "Global",
    "Method",
    "Pair",
    "Phase",
    "Schedule",
    "Sparsifier",
    "Targets",
    "Uniform",
    "Unstructured",
    "__version__",
    "distributions",
    "errors",
    "load_sparse",
    "metrics",
    "patterns",
    "recalibrate_batch_norm",
    "save_sparse",
    "schedules",
    "scores",
    "select_masks",
]
