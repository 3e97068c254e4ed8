"""The machine code for AMX, run where there is none: its instructions trap, and an interpreter does what they say."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from sparsetwin.kernels import host_features

COMPILER = shutil.which("cc") or shutil.which("gcc")
HERE = sys.platform.startswith("linux") and platform.machine().lower() in ("x86_64", "amd64") and COMPILER is not None
pytestmark = [
    pytest.mark.skipif(not HERE, reason="traps instructions on Linux, x86-64, with a C compiler"),
    pytest.mark.skipif(HERE and host_features().get("amx-tile", False), reason="this machine runs them itself"),
]

SCRIPT = """
import ctypes, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from sparsetwin.kernels import *
from sparsetwin.kernels import _cache, _dot

library = ctypes.CDLL(sys.argv[1])
library.interpret()
_cache.checked_target = lambda target: target  # this machine lacks the instructions
host = host_target()
amx = replace(host, name="interpreted", features=(*host.features, "amx-tile", "amx-bf16"))
dots = [_dot.Dot(name="amx", target=amx), _dot.Dot(name="amx", target=host, emulated=True)]

cases = [  # channels, outputs, kernel, side, stride, padding, dilation, groups
    (8, 8, 1, 4, 1, 0, 1, 1), (3, 40, 3, 9, 1, 1, 1, 1), (16, 24, 3, 14, 2, 1, 1, 2), (64, 70, 3, 15, 1, 2, 2, 1),
    (5, 3, 2, 11, 2, 3, 1, 1), (130, 33, 3, 6, 1, 1, 1, 1), (31, 17, 1, 5, 1, 0, 1, 1),
]
for channels, outputs, kernel, side, stride, padding, dilation, groups in cases:
    pair = lambda number: (number, number)
    geometry = ConvolutionGeometry(
        in_channels=channels, out_channels=outputs, kernel=pair(kernel), height=side, width=side,
        stride=pair(stride), padding=pair(padding), dilation=pair(dilation), groups=groups,
    )
    weight = torch.randn(outputs, channels // groups, kernel, kernel)
    x, residual = torch.randn(2, channels, side, side), torch.randn(2, outputs, *geometry.out_size)
    rounded = weight.bfloat16().float(), x.bfloat16().float()
    expected = reference_convolution(*rounded, geometry=geometry, residual=residual, activation="silu")
    for tiling in (Tiling(), Tiling(vectors=3, block=7)):
        for pool in (None, Pool(2)):
            found = []
            for dot in dots:
                tiles = DenseTiles.from_dense(weight, groups=groups, dot=dot)
                made = DenseConvolution(tiles, geometry=geometry, residual=True, activation="silu", tiling=tiling)
                found.append(made.images(x, residual=residual, pool=pool))
            assert torch.equal(*found)
            assert float((found[0] - expected).abs().max() / expected.abs().max()) < 1e-5
print(*(ctypes.c_long * 6).in_dll(library, "counts"))
"""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("amx") / "amx.so"
    source = Path(__file__).with_name("amx_interpreter.c")
    subprocess.run([COMPILER, "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"], check=True)
    return library


def run(script: str, library: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, str(library)], capture_output=True, text=True, timeout=300)


def test_instructions_for_amx_give_the_bits_of_the_emulated_kernel(interpreter):
    done = run(SCRIPT, interpreter)
    assert done.returncode == 0, done.stderr
    configured, released, zeroed, loaded, stored, multiplied = map(int, done.stdout.split())
    assert configured == released > 50  # once a call, and given back
    assert stored > zeroed > 0  # some sums wait for their next block
    assert loaded > multiplied > 0


def test_code_that_forgets_to_configure_tiles_would_be_caught(interpreter):
    script = SCRIPT.replace("library.interpret()", "library.interpret(); from sparsetwin.kernels import _dot_ir")
    script = script.replace(
        "host = host_target()", "_dot_ir.AmxTiles.configure = lambda self: None; host = host_target()"
    )
    done = run(script, interpreter)
    assert done.returncode < 0
    assert "tiles are not configured" in done.stderr
