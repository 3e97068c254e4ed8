"""Sparse-training methods, one file each."""

from sparsetwin.methods._base import Method, Pass
from sparsetwin.methods._course import BATCHES_AFTER_CUT, Course, Kind
from sparsetwin.methods._drop_and_grow import DropAndGrowMethod, exploration
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod
from sparsetwin.methods._state import STORED, SparseState
from sparsetwin.methods._stored import StoredWeightsMethod
from sparsetwin.methods.acdc import ACDC
from sparsetwin.methods.cram import CrAM
from sparsetwin.methods.dense import Dense
from sparsetwin.methods.gmp import GMP
from sparsetwin.methods.granet import GraNet
from sparsetwin.methods.ham import HAM
from sparsetwin.methods.imp import IMP
from sparsetwin.methods.int8 import Int8
from sparsetwin.methods.oneshot import OneShot
from sparsetwin.methods.rigl import RigL
from sparsetwin.methods.set import SET
from sparsetwin.methods.snip import SNIP
from sparsetwin.methods.soft_threshold import STR
from sparsetwin.methods.st3 import ST3
from sparsetwin.methods.static import Static
from sparsetwin.methods.topkast import TopKAST
from sparsetwin.methods.woodfisher import WoodFisher

METHODS: dict[str, type[Method]] = {
    "acdc": ACDC,
    "cram": CrAM,
    "dense": Dense,
    "gmp": GMP,
    "granet": GraNet,
    "imp": IMP,
    "oneshot": OneShot,
    "rigl": RigL,
    "set": SET,
    "snip": SNIP,
    "st3": ST3,
    "static": Static,
    "str": STR,
    "topkast": TopKAST,
    "woodfisher": WoodFisher,
}
"""Methods by the name under which recipes and the command line know them."""

__all__ = [
    "ACDC",
    "BATCHES_AFTER_CUT",
    "GMP",
    "HAM",
    "IMP",
    "METHODS",
    "SET",
    "SNIP",
    "ST3",
    "STORED",
    "STR",
    "Course",
    "CrAM",
    "Dense",
    "DropAndGrowMethod",
    "GraNet",
    "Int8",
    "Kind",
    "Knob",
    "Method",
    "OneShot",
    "Pass",
    "RankingMethod",
    "RigL",
    "SparseState",
    "Static",
    "StoredWeightsMethod",
    "TopKAST",
    "WoodFisher",
    "exploration",
]
