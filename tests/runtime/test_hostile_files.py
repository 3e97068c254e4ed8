"""What a file may name: plain containers and operations that are safe; all else is refused before it is used."""

import json
import sys
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import images
from test_deploy_file import edit, first_torch

from sparsetwin.errors import CheckpointError, UsageError
from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._coding import decoded_spec, encoded_spec
from sparsetwin.runtime._graph import Ref, Torch
from sparsetwin.runtime._operations import is_allowed
from sparsetwin.runtime._plain import apply_torch, torch_function

LEAF = {"type": None, "context": None, "children_spec": []}
Known = namedtuple("Known", "a b")


def spec(kind: object, context: object, parts: int = 1) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [LEAF] * parts}])


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    (tmp_path / "named_by_a_file.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "named_by_a_file"
    assert "named_by_a_file" not in sys.modules


def factory(module: str) -> str:
    context = {"default_factory_module": module, "default_factory_name": "x", "dict_context": ["a"]}
    return spec("collections.defaultdict", context)


def enumeration(module: str) -> str:
    return spec("builtins.dict", json.dumps([{"__enum__": True, "fqn": f"{module}:X", "name": "y"}]))


@pytest.mark.parametrize("made", [factory, enumeration])
def test_a_structure_that_names_a_module_is_refused_before_it_is_imported(module_file, made):
    with pytest.raises(CheckpointError, match="cannot be read"):
        decoded_spec(made(module_file))


@pytest.mark.parametrize(
    "text",
    [
        spec("some.Class", "null"),
        spec("NO_SERIALIZED_TYPE_NAME_FOUND", "null"),
        spec("collections.namedtuple", "torch.Size"),
        spec("collections.namedtuple", ["builtins.list"]),
        spec(["builtins.list"], "null"),
        spec("builtins.dict", '[["a"]]'),
        spec("builtins.list", None),
        spec(None, "null"),
        "[]",
        "7",
        "[1, {}]",
    ],
)
def test_structures_of_other_things_are_refused(text):
    with pytest.raises(CheckpointError, match="cannot be read"):
        decoded_spec(text)


def test_plain_structures_and_known_classes_are_read():
    pytree._register_namedtuple(Known, serialized_type_name="test_hostile_files.Known")
    try:
        for found in ((1, [2], {"a": 3}), OrderedDict(b=1), {1: (), "x": {}}, Known(1, [2]), torch.Size([2])):
            structure = pytree.tree_structure(found)
            assert decoded_spec(encoded_spec(structure)) == structure
    finally:
        pytree._deregister_pytree_node(Known)


def test_what_load_would_refuse_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(UsageError, match="cannot be in a file"):
        encoded_spec(pytree.tree_structure(defaultdict(list, a=1)))

    class Strided(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_strided(super().forward(x), (2, 2), (1, 1))

    deployed = deploy(Strided(4, 4), images(2, 4), rivals=())
    with pytest.raises(UsageError, match=r"aten\.as_strided\.default cannot be saved"):
        deployed.save(tmp_path / "none.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "_reshape_alias.default",
        "as_strided.default",
        "as_strided_copy.default",
        "set.source_Tensor",
        "resize.default",
        "lstm.data",
        "new_empty_strided.default",
        "empty_like.default",
        "_softmax_backward_data.default",
        "segment_reduce.default",
        "relu_.default",
        "_resize_output.default",
        "_weight_norm_interface.default",
    ],
)
def test_operations_that_may_read_beyond_their_tensors_are_refused(tmp_path, name):
    class Powers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).pow(2)

    path = tmp_path / "network.safetensors"
    deploy(Powers(4, 4), images(2, 4), rivals=()).save(path)
    load(path)
    edit(path, lambda content: first_torch(content).update(function=f"aten.{name}"))
    with pytest.raises(CheckpointError, match=r"may name|not one of PyTorch's"):
        load(path)


A = torch.ops.aten
SMALL = torch.zeros(1)
FEW_WEIGHTS = ([torch.zeros(1, 1, 64)] * 2, [torch.zeros(4, 8), torch.zeros(4, 1), torch.zeros(4), torch.zeros(4)])


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (A.scaled_dot_product_attention.default, [(1, 1, 4, 8), (1, 1, 99, 8), (1, 1, 1, 8)]),
        (A._scaled_dot_product_flash_attention_for_cpu.default, [(9, 8, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8)]),
        (A._native_batch_norm_legit_no_training.default, [(2, 9, 4), SMALL, SMALL, SMALL, SMALL, 0.1, 1e-5]),
        (A.upsample_nearest2d.default, [(1, 1, 4, 4), [8, 8], 1e-30, 1e-30]),
        (A.grid_sampler.default, [(1, 1, 4, 4), (1, 4, 4, 2), 7, 0, False]),
        (A.lstm.input, [(2, 1, 8), *FEW_WEIGHTS, True, 1, 0.0, False, False, False]),
    ],
)
def test_arguments_that_pytorch_does_not_check_are_checked(function, arguments):
    tensors = {number: torch.zeros(part) for number, part in enumerate(arguments) if isinstance(part, tuple)}
    filled = tuple(Ref(value=number) if number in tensors else part for number, part in enumerate(arguments))
    operation = Torch(function=function, arguments=filled)
    assert is_allowed(function)
    with pytest.raises(UsageError, match="does not take these arguments"):
        apply_torch(operation, tensors)
    with pytest.raises(UsageError, match="does not take these arguments"):
        torch_function(operation)(tensors)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(8, 16, 2, bidirectional=True, proj_size=6)
        self.second, self.third = nn.LSTM(12, 5, bias=False), nn.GRU(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(self.second(self.first(x)[0])[0])[0]
        y = F.scaled_dot_product_attention(y, y, y)
        return F.interpolate(y, scale_factor=2.0)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_networks_that_need_the_checked_operations_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model, x = Recurrent().eval(), images(5, 2, 8)
    deploy(model, x, rivals=()).save(tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "network.safetensors")(x), model(x), atol=1e-6)
