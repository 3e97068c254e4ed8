"""Sparse-training methods, one file each."""

from sparsetwin.methods._base import Method, SparseState
from sparsetwin.methods.acdc import ACDC
from sparsetwin.methods.dense import Dense

METHODS: dict[str, type[Method]] = {"acdc": ACDC, "dense": Dense}
"""Methods by the name under which recipes and the command line know them."""

__all__ = ["ACDC", "METHODS", "Dense", "Method", "SparseState"]
