"""Every exporter gives a network that its real engine runs to the model's outputs, with every pruned weight at zero."""

import copy
import importlib.util
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_networks import Branches, networks, pruned
from torch import nn

from sparsetwin.errors import ExportError
from sparsetwin.export import export_onnx, export_openvino, export_program
from sparsetwin.export._checking import relative_difference
from sparsetwin.export.onnx_file import check_onnx

has_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino, of 180 MB, is not installed"
)
EXPORTERS = [
    pytest.param(export_onnx, "m.onnx", id="onnx"),
    pytest.param(export_program, "m.pt2", id="torch-export"),
    pytest.param(export_openvino, "m.xml", id="openvino", marks=has_openvino),
]


def other_batch(inputs, size=3):
    """Other inputs than those that the export saw."""
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randint(0, 11, (size, *value.shape[1:]), generator=generator)
        if value.dtype == torch.int64
        else torch.randn(size, *value.shape[1:], generator=generator)
        for value in inputs
    )


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})


def run_program(path, inputs):
    found = torch.export.load(path).module()(*inputs)
    return [value.detach().numpy() for value in (found if isinstance(found, tuple) else (found,))]


def run_openvino(path, inputs):
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([value.numpy() for value in inputs])
    return [found[output] for output in compiled.outputs]


RUN = {export_onnx: run_onnx, export_program: run_program, export_openvino: run_openvino}


@pytest.mark.parametrize("kind", networks())
@pytest.mark.parametrize(("export", "file"), EXPORTERS)
def test_the_engine_gives_the_models_outputs_for_any_batch_from_exactly_the_kept_weights(tmp_path, export, file, kind):
    model, example = networks()[kind]
    masks = pruned(model)
    model.train()
    model.norm.eval() if kind == "branches" else None
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checked = export(model, example, path=tmp_path / file, masks=masks)
    if export is export_onnx:
        assert checked is True
        assert zeros_are_those_of_the_masks(tmp_path / file, masks)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for size in (1, 3):
        inputs = other_batch(example, size)
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(*inputs)
        for found, reference in zip(
            RUN[export](tmp_path / file, inputs), expected if isinstance(expected, tuple) else (expected,), strict=True
        ):
            assert relative_difference(found, reference.numpy()) < 1e-5
    assert {path.suffix for path in tmp_path.iterdir()} == (
        {".xml", ".bin"} if file == "m.xml" else {tmp_path.joinpath(file).suffix}
    )


def zeros_are_those_of_the_masks(path, masks):
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}
    for name, mask in masks.items():
        assert stored[name].shape == tuple(mask.shape)
        np.testing.assert_array_equal(stored[name] == 0, ~mask.numpy(), err_msg=name)
    zeros = sum(int((stored[name] == 0).sum()) for name in masks)
    return zeros == sum(int((~mask).sum()) for mask in masks.values()) > 0


def test_the_onnx_file_has_opset_18_a_free_batch_the_notes_and_no_paths(tmp_path):
    model, example = networks()["branches"]
    export_onnx(model, example, path=tmp_path / "m.onnx", notes={"data_notice": "CC BY 4.0"})
    proto = onnx.load(tmp_path / "m.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    assert [value.name for value in proto.graph.input] == ["input_0", "input_1"]
    batches = {value.type.tensor_type.shape.dim[0].dim_param for value in [*proto.graph.input, *proto.graph.output]}
    assert len(batches) == 1
    assert batches != {""}
    assert {prop.key: prop.value for prop in proto.metadata_props} == {"data_notice": "CC BY 4.0"}
    content = (tmp_path / "m.onnx").read_bytes()
    assert b".py" not in content
    assert str(tmp_path).encode() not in content
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}  # folded
    export_onnx(nn.Linear(4, 2), torch.ones(1, 4), path=tmp_path / "m.onnx", opset=20)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 20


def test_the_program_keeps_the_notes(tmp_path):
    model, example = networks()["digits_cnn"]
    with pytest.raises(ExportError, match=r"torch.export loads files \*.pt2, got m.bin"):
        export_program(model, example, path=tmp_path / "m.bin")
    export_program(model, example, path=tmp_path / "m.pt2", notes={"data_notice": "CC BY 4.0"})
    files = {"sparsetwin.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=files)
    assert json.loads(files["sparsetwin.json"]) == {"data_notice": "CC BY 4.0"}


class Fickle(nn.Module):
    """Gives another output when it is called again: what no export can reproduce."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class Branching(nn.Module):
    """Decides by a value, which cannot be traced."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


@pytest.mark.parametrize(("export", "file"), EXPORTERS)
def test_an_export_that_gives_other_outputs_is_refused_and_the_old_file_kept(tmp_path, export, file):
    (tmp_path / file).write_bytes(b"old")
    with pytest.raises(ExportError, match="gives another output than PyTorch for one sample: they differ by"):
        export(Fickle(), torch.randn(2, 4), path=tmp_path / file)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(file, b"old")]


@pytest.mark.parametrize(("export", "file"), EXPORTERS)
def test_a_model_that_cannot_be_traced_is_named(tmp_path, export, file):
    with pytest.raises(
        ExportError, match=r"Branching cannot be (traced|exported to ONNX): .*; torch.export has to"
    ) as told:
        export(Branching(), torch.randn(2, 4), path=tmp_path / file)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("export", "file"), EXPORTERS)
def test_weights_that_are_not_pruned_are_named(tmp_path, export, file):
    model = nn.Linear(4, 2)
    with pytest.raises(ExportError, match=r"4 pruned weights of weight are not zero; apply the masks with sparsetwin"):
        export(model, torch.randn(2, 4), path=tmp_path / file, masks={"weight": torch.arange(8).reshape(2, 4) < 4})
    with pytest.raises(ExportError, match=r"the masks are not those of Linear: .*\(2, 4\)"):
        export(model, torch.randn(2, 4), path=tmp_path / file, masks={"weight": torch.ones(4, 2, dtype=torch.bool)})
    with pytest.raises(ExportError, match=r"the masks are not those of Linear: .*other"):
        export(model, torch.randn(2, 4), path=tmp_path / file, masks={"other": torch.ones(2, 4, dtype=torch.bool)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("export", "file"), EXPORTERS)
def test_a_place_where_nothing_can_be_written_is_named(tmp_path, export, file):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExportError, match=f"cannot write .*{file}"):
        export(nn.Linear(4, 2), torch.randn(2, 4), path=tmp_path / "taken" / file)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "got nothing"),
        ((torch.ones(1, 3), 3), "got Tensor, int"),
        (torch.tensor(1.0), "a tensor \\(batch, ...\\)"),
        ((torch.ones(1, 3), torch.ones(2, 4)), r"one batch size of 1 or more, got \[1, 2\]"),
        (torch.ones(0, 3), r"got \[0\]"),
    ],
)
def test_an_example_that_is_none_is_refused(tmp_path, example, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(Branches(), example, path=tmp_path / "m.onnx")


def test_what_onnx_cannot_be_asked_for_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"ONNX opset 18 and later, onnx here up to .*got 17"):
        export_onnx(nn.Linear(4, 2), torch.ones(1, 4), path=tmp_path / "m.onnx", opset=17)
    with pytest.raises(ExportError, match=r"onnx here up to \d+; got 99"):
        export_onnx(nn.Linear(4, 2), torch.ones(1, 4), path=tmp_path / "m.onnx", opset=99)
    with pytest.raises(ExportError, match=r"a model is exported from the CPU, but weight is on meta"):
        export_onnx(nn.Linear(4, 2, device="meta"), torch.ones(1, 4), path=tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("export", "file", "package", "command"),
    [
        (export_onnx, "m.onnx", "onnx", r"pip install 'sparsetwin\[export\]'"),
        (export_onnx, "m.onnx", "onnxscript", r"pip install 'sparsetwin\[export\]'"),
        (export_openvino, "m.xml", "openvino", "pip install openvino"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, export, file, package, command
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=f"needs {package}, which is not installed; run: {command}"):
        export(nn.Linear(4, 2), torch.ones(1, 4), path=tmp_path / file)


def test_a_file_that_onnx_runtime_does_not_load_is_told_of(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no network")
    with pytest.raises(ExportError, match=r"ONNX Runtime [\d.]+ does not load what Linear became: .*; a newer one may"):
        check_onnx(nn.Linear(4, 2), (torch.ones(2, 4),), tmp_path / "m.onnx")


@has_openvino
def test_openvinos_graph_has_its_name_and_the_notes(tmp_path):
    import openvino

    model, example = networks()["digits_cnn"]
    with pytest.raises(ExportError, match=r"got m.bin"):
        export_openvino(model, example, path=tmp_path / "m.bin")
    export_openvino(model, example, path=tmp_path / "m.xml", notes={"data_notice": "CC BY 4.0"})
    graph = openvino.Core().read_model(tmp_path / "m.xml")
    assert graph.get_rt_info(["sparsetwin", "data_notice"]).astype(str) == "CC BY 4.0"


def test_differences_are_relative_and_nan_is_equal_to_itself():
    reference = np.array([1.0, np.nan, -4.0])
    assert relative_difference(reference.copy(), reference) == 0
    assert relative_difference(np.array([1.0, np.nan, -4.4]), reference) == pytest.approx(0.1)
    for other in ([1.0, 2.0, -4.0], [np.nan, np.nan, -4.0], [1.0, np.nan]):
        assert relative_difference(np.array(other), reference) == np.inf
