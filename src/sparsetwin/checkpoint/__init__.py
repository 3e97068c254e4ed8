"""Networks and runs on disk: sparse and dense files, the pair, run checkpoints and logs. Nothing is half-written."""

from sparsetwin.checkpoint._atomic import replace_by_name
from sparsetwin.checkpoint._pair_file import Member
from sparsetwin.checkpoint._plain import JSON
from sparsetwin.checkpoint._values import VALUES, Values
from sparsetwin.checkpoint.logs import append_line, truncate_log
from sparsetwin.checkpoint.mapped import SparseFile
from sparsetwin.checkpoint.pair import Pair
from sparsetwin.checkpoint.sparse_bitmask import (
    from_sparse_bitmask,
    is_sparse_bitmask,
    load_sparse_bitmask,
    save_sparse_bitmask,
    to_sparse_bitmask,
)
from sparsetwin.checkpoint.sparse_file import (
    SparseNetwork,
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
    "VALUES",
    "CheckpointStore",
    "CheckpointWarning",
    "Member",
    "Pair",
    "SparseFile",
    "SparseNetwork",
    "SparseSize",
    "Values",
    "append_line",
    "from_sparse_bitmask",
    "is_sparse_bitmask",
    "iter_sparse",
    "load_dense",
    "load_masks",
    "load_sparse",
    "load_sparse_bitmask",
    "read_card",
    "replace_by_name",
    "save_dense",
    "save_sparse",
    "save_sparse_bitmask",
    "sparse_size",
    "to_sparse_bitmask",
    "truncate_log",
]
