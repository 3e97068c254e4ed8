"""The only file that knows llvmlite: found on demand, machine code out of IR, safe under threads and fork.

llvmlite is an optional dependency; nothing imports it before the first kernel is asked for.
"""

import importlib
import importlib.util
import itertools
import os
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

from sparsetwin.errors import ConfigError

_NUMBERS = itertools.count()
_LOCK = threading.RLock()  # LLVM's set-up and our cache of kernels are not for two threads at once
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


def compile_lock() -> AbstractContextManager[Any]:
    """Return the lock under which kernels are compiled; a fork waits for it, so that no child inherits it held."""
    return _LOCK


def is_available() -> bool:
    """Tell whether llvmlite is installed, without importing it."""
    return importlib.util.find_spec("llvmlite") is not None


@cache
def _ready() -> Any:
    if not is_available():
        raise ConfigError(
            "sparse CPU kernels are generated with llvmlite, which is not installed; "
            "`pip install 'sparsetwin[deploy]'` brings it, and sparsetwin.kernels.is_available() tells beforehand"
        )
    binding = importlib.import_module("llvmlite.binding")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


def llvm_ir() -> Any:
    """Return the module ``llvmlite.ir``.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    _ready()
    return importlib.import_module("llvmlite.ir")


def host_features() -> Mapping[str, bool]:
    """Return what LLVM finds this processor to have: feature name -> whether it is there.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    with _LOCK:
        return dict(_ready().get_host_cpu_features())


@dataclass(frozen=True)
class MachineCode:
    """A compiled function: its address, and what must live as long as the address is used."""

    address: int
    keep_alive: Any


_ENGINES: dict[str, Any] = {}  # by features; one for all functions, since each takes close to a megabyte


def _machine(binding: Any, features: str, triple: str) -> Any:
    cpu = "x86-64" if triple.startswith(("x86_64", "amd64")) else "generic"
    target = binding.Target.from_triple(triple)
    return target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="jitdefault")


def compile_function(ir_text: str, *, name: str, features: str) -> MachineCode:
    """Compile a module of LLVM IR for this process.

    No optimisation pass runs: the IR is written as it is to be executed, and instruction selection does the rest.

    Args:
        ir_text: The module.
        name: The function wanted.
        features: LLVM's feature string, such as ``"+avx2,+fma"``. Only these are used, on top of the architecture's
            baseline, whatever else the machine has.

    Raises:
        ConfigError: If llvmlite is not installed.
    """
    with _LOCK:
        binding = _ready()
        engine = _ENGINES.get(features)
        if engine is None:
            engine = binding.create_mcjit_compiler(
                binding.parse_assembly(""), _machine(binding, features, binding.get_process_triple())
            )
            _ENGINES[features] = engine
        module = binding.parse_assembly(ir_text)
        module.verify()
        unique = f"{name}_{next(_NUMBERS)}"
        module.get_function(name).name = unique
        engine.add_module(module)
        engine.finalize_object()
        address = engine.get_function_address(unique)
        engine.remove_module(module)  # the code stays
        module.close()
        return MachineCode(address, engine)


def assemble(ir_text: str, *, features: str, triple: str | None = None) -> str:
    """Return the assembly text that `compile_function` would run, also for what this machine lacks.

    Args:
        ir_text: The module.
        features: As for `compile_function`.
        triple: LLVM's name of another architecture; this machine's by default.

    Raises:
        ConfigError: If llvmlite is not installed, or does not know the architecture.
    """
    with _LOCK:
        binding = _ready()
        if triple is not None:
            binding.initialize_all_targets()
            binding.initialize_all_asmprinters()
        module = binding.parse_assembly(ir_text)
        module.verify()
        try:
            machine = _machine(binding, features, triple or binding.get_process_triple())
        except RuntimeError as error:
            raise ConfigError(f"llvmlite was built without {triple}: {error}") from error
        return str(machine.emit_assembly(module))
