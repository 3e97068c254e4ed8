"""Compiled kernels of this process: each specification is compiled once, whoever asks first."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from sparsetwin.kernels._bitmask_ir import BitmaskSpecification, bitmask_ir
from sparsetwin.kernels._dense_ir import DenseSpecification, dense_ir
from sparsetwin.kernels._emitter import FUNCTION
from sparsetwin.kernels._llvm import MachineCode, compile_function, compile_lock
from sparsetwin.kernels._one_token_ir import OneTokenSpecification, one_token_ir
from sparsetwin.kernels._product_ir import product_ir
from sparsetwin.kernels._specification import ProductSpecification
from sparsetwin.kernels._target import checked_target
from sparsetwin.kernels._team_ir import WalkSpecification, walk_ir
from sparsetwin.kernels._transpose_ir import TransposeSpecification, transpose_ir
from sparsetwin.kernels._window_ir import WindowSpecification, window_ir

Specification = (
    ProductSpecification
    | BitmaskSpecification
    | WindowSpecification
    | TransposeSpecification
    | WalkSpecification
    | DenseSpecification
    | OneTokenSpecification
)


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to run. Calling it releases the GIL."""

    specification: Specification
    call: Callable[..., None]  # the table's address, then the tile and row ranges
    code: MachineCode


_KERNELS: dict[Specification, Kernel] = {}
_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 4)


def kernel(specification: Specification) -> Kernel:
    """Return the compiled kernel of a specification; threads may ask at once.

    Raises:
        ConfigError: If this machine lacks a feature of its target, or llvmlite is not installed.
    """
    found = _KERNELS.get(specification)
    if found is not None:
        return found
    with compile_lock():
        if specification not in _KERNELS:
            target = checked_target(specification.target)
            text = kernel_ir(specification)
            code = compile_function(text, name=FUNCTION, features=target.feature_string)
            _KERNELS[specification] = Kernel(specification, _SIGNATURE(code.address), code)
        return _KERNELS[specification]


def kernel_ir(specification: Specification) -> str:
    """Return the LLVM IR of a specification, also of one for another machine."""
    if isinstance(specification, ProductSpecification):
        return product_ir(specification)
    if isinstance(specification, WindowSpecification):
        return window_ir(specification)
    if isinstance(specification, TransposeSpecification):
        return transpose_ir(specification)
    if isinstance(specification, WalkSpecification):
        return walk_ir(specification)
    if isinstance(specification, DenseSpecification):
        return dense_ir(specification)
    if isinstance(specification, OneTokenSpecification):
        return one_token_ir(specification)
    return bitmask_ir(specification)


def compiled_kernels() -> int:
    """Return how many kernels this process has compiled."""
    return len(_KERNELS)
