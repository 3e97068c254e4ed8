"""PyTorch's default dtype and device are the caller's: kernels write into float32 on the CPU whatever they are."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error, slim

import sparsetwin
from sparsetwin.kernels import CSRBlocks, KeptWeight, SparseLinear, TokenProduct
from sparsetwin.runtime import deploy
from sparsetwin.runtime._choices import Choice
from sparsetwin.runtime._entries import make
from sparsetwin.runtime._products import Packed

DEFAULTS = (torch.bfloat16, torch.float64, torch.device("meta"))
MAKERS = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


@contextmanager
def default(found: torch.dtype | torch.device) -> Iterator[None]:
    if isinstance(found, torch.device):
        with found:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(found)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def linear(density: float = 0.1) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(70, 90).eval()
    layer.weight.data *= torch.rand(90, 70) < density
    return layer.requires_grad_(False)


@pytest.mark.parametrize("found", DEFAULTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 300])
def test_linears_give_the_same_bits_under_any_default(tokens, found):
    layer, x, residual = linear(), images(tokens, 70), images(tokens, 90)
    kernel = SparseLinear(layer.weight, bias=layer.bias)
    plain, added = kernel(x), kernel(x, residual=residual)
    with default(found):
        again = SparseLinear(layer.weight, bias=layer.bias)
        for one in (kernel, again):  # made before, and under this default
            assert torch.equal(one(x), plain)
            assert torch.equal(one(x, residual=residual), added)


@pytest.mark.parametrize("found", DEFAULTS, ids=str)
@pytest.mark.parametrize("layout", ["columns", "bitmask"])
def test_few_tokens_give_the_same_bits_under_any_default(layout, found):
    layer = linear()
    for tokens in (1, 5):
        x = images(tokens, 70)
        kernel = TokenProduct(layer.weight, tokens=tokens, layout=layout)
        expected = kernel(x)
        with default(found):
            assert torch.equal(kernel(x), expected)
            assert torch.equal(TokenProduct(layer.weight, tokens=tokens, layout=layout)(x), expected)


@pytest.mark.parametrize("found", DEFAULTS, ids=str)
def test_packed_weights_become_dense_in_float32_and_rows_are_cut_alike_under_any_default(found):
    weight = linear().weight
    cut = CSRBlocks.from_dense(weight).row_ranges(7)
    with default(found):
        matrix = CSRBlocks.from_dense(weight, block_columns=13)
        assert torch.equal(matrix.to_dense(), weight)
        assert torch.equal(matrix.in_one_block().to_dense(), weight)
        assert torch.equal(KeptWeight.from_dense(weight).dense(), weight)
        assert CSRBlocks.from_dense(weight).row_ranges(7) == cut


@pytest.mark.parametrize("found", DEFAULTS, ids=str)
@pytest.mark.parametrize("planes", [True, False])
def test_programs_give_the_same_bits_under_any_default(planes, found):
    model, x = slim(), images(2, 3, 33, 40)
    graph = graph_of(model, x)
    made = program(graph, planes=planes)
    (expected,) = made.program.run([x])
    expected = expected.clone()
    with default(found):  # with a workspace that is there, and with new ones
        for one in (made, program(graph, planes=planes), program(graph_of(model, x), planes=planes)):
            (y,) = one.program.run([x])
            assert torch.equal(y, expected)


@pytest.mark.parametrize("found", DEFAULTS, ids=str)
def test_programs_on_rows_of_tokens_give_the_same_bits_under_any_default(found):
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(90, 70)).eval()
    x = images(1, 70)
    graph = graph_of(pruned(model, 0.2), x)
    rows = {node.output: Choice(engine="rows") for node in graph.nodes}
    made = make(graph, rows, packed=Packed(), threads=1)
    (expected,) = made.program.run([x])
    with default(found):
        (y,) = made.program.run([x])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("found", DEFAULTS, ids=str)
def test_deploy_measures_under_any_default_and_what_it_returns_runs_under_it(found):
    model, x = slim(), images(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
    with default(found):
        deployed = deploy(model, x, rivals=())
        assert relative_error(deployed(x), expected) <= FP32
    assert relative_error(deployed(x), expected) <= FP32


@pytest.mark.parametrize("package", ["kernels", "runtime"])
def test_whatever_makes_a_tensor_says_its_dtype_and_device(package):
    for path in sorted((Path(sparsetwin.__file__).parent / package).glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch" and call.func.attr in MAKERS:
                given = {keyword.arg for keyword in call.keywords}
                assert {"dtype", "device"} <= given, f"{path.name}, line {call.lineno}: {ast.unparse(call)}"
