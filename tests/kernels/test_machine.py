"""What kernels are compiled for, when, and by whom: targets, cache, threads, forks, and no llvmlite at all."""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kernel_cases import dense, sparse

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import (
    TARGETS,
    ConvolutionGeometry,
    Pool,
    ProductSpecification,
    SparseConvolution,
    SparseLinear,
    SparseProduct,
    TokenProduct,
    checked_target,
    compiled_kernels,
    host_features,
    host_target,
    kernel,
    kernel_ir,
)
from sparsetwin.kernels._bitmask_ir import BitmaskSpecification
from sparsetwin.kernels._llvm import assemble
from sparsetwin.kernels._one_token_ir import OneTokenSpecification

X86 = platform.machine().lower() in ("x86_64", "amd64")


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_library_and_its_kernels_does_not_import_llvmlite():
    assert run_python("import sys, sparsetwin.kernels; print('llvmlite' in sys.modules)").strip() == "False"


def test_without_llvmlite_there_is_one_clear_error():
    script = """
import sys
sys.modules["llvmlite"] = None
import torch
from sparsetwin.errors import ConfigError
from sparsetwin import kernels
print(kernels.is_available())
for make in (lambda: kernels.SparseProduct(torch.ones(2, 2), columns=1), kernels.host_target):
    try:
        make()
    except ConfigError as error:
        print("deploy" in str(error))
"""
    assert run_python(script).split() == ["False", "True", "True"]


def test_the_host_target_is_the_best_whose_features_are_all_there():
    found = host_features()
    assert all(found.get(feature) for feature in host_target().features)
    assert host_target() is next(t for t in TARGETS.values() if all(found.get(f) for f in t.features))
    better = list(TARGETS)[: list(TARGETS).index(host_target().name)]
    for name in better:
        with pytest.raises(ConfigError, match="cannot run here"):
            checked_target(name)


def test_targets_that_are_unknown_or_that_the_machine_lacks_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'avx512'"):
        checked_target("avx51")
    foreign = replace(TARGETS["generic"], name="foreign", features=("no-such-feature",))
    with pytest.raises(ConfigError, match="lacks no-such-feature"):
        checked_target(foreign)
    with pytest.raises(ConfigError, match="foreign cannot run here"):
        kernel(ProductSpecification(target=foreign, lanes=4, vectors=1))


@pytest.mark.skipif(not X86, reason="reads x86 assembly")
@pytest.mark.parametrize(("name", "register"), [("avx512", "%zmm"), ("avx2", "%ymm"), ("generic", "%xmm")])
def test_code_uses_the_widest_registers_of_its_target_and_none_wider(name, register):
    target = TARGETS[name]
    spec = ProductSpecification(target=target, lanes=target.lanes, vectors=6, activation="relu", keep=True)
    text = assemble(kernel_ir(spec), features=target.feature_string)
    assert register in text
    wider = {"%zmm": (), "%ymm": ("%zmm",), "%xmm": ("%zmm", "%ymm")}[register]
    assert not any(name in text for name in wider)
    assert ("vfmadd231ps\t(" in text) == target.fused  # the activations are an operand from memory
    assert "call" not in text


@pytest.mark.skipif(not X86, reason="reads x86 assembly")
@pytest.mark.parametrize(("value", "name"), [("float32", "avx512"), ("bfloat16", "avx512vbmi2")])
def test_masks_are_unpacked_by_one_instruction_where_the_target_has_it(value, name):
    target = TARGETS[name]
    spec = BitmaskSpecification(target=target, lanes=16, tokens=2, value=value)
    text = assemble(kernel_ir(spec), features=target.feature_string)
    assert {"float32": "vexpandps", "bfloat16": "vpexpandw"}[value] in text


@pytest.mark.skipif(not X86, reason="reads x86 assembly")
@pytest.mark.parametrize(
    ("value", "widening"), [("float32", "vfmadd231ps\t("), ("bfloat16", "vpmovzxwd"), ("int8", "vpmovsxbd")]
)
def test_for_one_token_a_vector_of_values_is_loaded_at_once_and_activations_are_picked(value, widening):
    target = TARGETS["avx2"]
    text = assemble(
        kernel_ir(OneTokenSpecification(target=target, lanes=8, value=value)), features=target.feature_string
    )
    assert widening in text
    assert text.count("vinsertps") == 2 * 6  # 8 activations in two halves; in the loop and behind it
    assert "vfmadd" in text
    assert "vgather" not in text
    assert "call" not in text


def test_a_specification_is_compiled_once_whoever_asks_first():
    spec = ProductSpecification(target=host_target(), lanes=host_target().lanes, vectors=5, chains=2)
    before = compiled_kernels()
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(kernel, [spec] * 8))
    assert compiled_kernels() == before + 1
    assert all(one is found[0] for one in found)


@pytest.mark.parametrize(
    "changed", [{"vectors": 0}, {"vectors": 99}, {"lanes": 3}, {"element": "float16"}, {"value": "int4"}]
)
def test_specifications_without_a_kernel_are_refused(changed):
    with pytest.raises(ConfigError):
        replace(ProductSpecification(target=host_target(), lanes=4, vectors=2), **changed)


def results(pool: Pool | None) -> list[torch.Tensor]:
    weight = sparse(700, 500, density=0.5)  # enough work for threads even with one token
    many, few = SparseProduct(weight, columns=300), SparseProduct(weight, columns=3, activation="relu")
    geometry = ConvolutionGeometry(in_channels=64, out_channels=65, kernel=(3, 3), height=15, width=15, padding=(1, 1))
    convolution = SparseConvolution(sparse(65, 64, 3, 3, density=0.3), geometry=geometry)
    return [
        many(many.pad(dense(500, 300)), pool=pool),
        few(few.pad(dense(500, 3)), pool=pool),
        TokenProduct(weight, tokens=1)(dense(1, 500), pool=pool),
        TokenProduct(weight, tokens=8, layout="bitmask")(dense(8, 500), pool=pool),
        SparseLinear(weight)(dense(400, 500), pool=pool),
        SparseLinear(weight)(dense(50, 500), pool=pool),
        convolution.images(dense(1, 64, 15, 15), pool=pool),
        convolution.images(dense(5, 64, 15, 15), pool=pool),
    ]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_number_of_threads_gives_the_same_bits(threads):
    expected = results(None)
    assert all(torch.equal(a, b) for a, b in zip(results(Pool(threads)), expected, strict=True))


def test_calls_from_several_threads_at_once_do_not_disturb_each_other():
    linear, pool = SparseLinear(sparse(400, 60, density=0.9), chunk=32), Pool(2)
    inputs = [dense(10 + 20 * number, 60, seed=number) for number in range(8)]
    expected = [linear(x) for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda x: linear(x, pool=pool), inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 5, strict=True))


def test_a_pool_runs_every_piece_once_and_raises_what_a_piece_raised():
    pool, seen = Pool(3), []
    pool.run([lambda number=number: seen.append(number) for number in range(50)])
    assert sorted(seen) == list(range(50))

    def fail() -> None:
        raise ValueError("from a piece")

    with pytest.raises(ValueError, match="from a piece"):
        pool.run([fail, *[lambda: seen.append(0)] * 4])
    assert len(seen) == 54
    pool.close()
    pool.run([lambda: seen.append(1), lambda: seen.append(2)])
    assert len(seen) == 56
    with pytest.raises(ConfigError, match="threads=0"):
        Pool(0)


def test_kernels_and_pools_work_on_in_a_forked_child():
    script = """
import os, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from sparsetwin.kernels import Pool, SparseProduct
weight, pool = torch.ones(500, 300), Pool(2)
def same(columns):
    product = SparseProduct(weight, columns=columns)
    return bool(product(product.pad(torch.ones(300, columns)), pool=pool).eq(300).all())
assert same(200)
child = os.fork()
if child == 0:
    try:
        ok = same(200) and same(33)  # an old kernel, and one compiled in the child
    finally:
        os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert same(17)
"""
    run_python(script)
