"""Networks and runs on disk: sparse and dense files, the pair, run checkpoints and logs. Nothing is half-written."""

from sparsetwin.checkpoint._pair_file import Member
from sparsetwin.checkpoint._plain import JSON
from sparsetwin.checkpoint.logs import append_line, truncate_log
from sparsetwin.checkpoint.pair import Pair
from sparsetwin.checkpoint.sparse_file import (
    SparseFile,
    SparseSize,
    iter_sparse,
    load_dense,
    load_masks,
    load_sparse,
    read_card,
    save_dense,
    save_sparse,
    sparse_size,
)
from sparsetwin.checkpoint.store import CheckpointStore, CheckpointWarning

__all__ = [
    "JSON",
    "CheckpointStore",
    "CheckpointWarning",
    "Member",
    "Pair",
    "SparseFile",
    "SparseSize",
    "append_line",
    "iter_sparse",
    "load_dense",
    "load_masks",
    "load_sparse",
    "read_card",
    "save_dense",
    "save_sparse",
    "sparse_size",
    "truncate_log",
]
