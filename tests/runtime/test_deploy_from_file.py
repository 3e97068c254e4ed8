"""Networks deployed from their sparse files: the numbers of the decoded weights, without ever holding them all."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, Slim, images, pruned, relative_error, slim

import sparsetwin
from sparsetwin.checkpoint import SparseFile, load_sparse, save_dense, save_sparse
from sparsetwin.errors import CheckpointError, ConfigError, SparsityWarning, StateError, UsageError
from sparsetwin.kernels import KeptWeight
from sparsetwin.models import build
from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._entries import PROGRAMS
from sparsetwin.runtime._graph import Layer, Linear
from sparsetwin.runtime._network import InFile
from sparsetwin.runtime._plain import run_plain

X = (1, 3, 32, 32)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.weight.detach() != 0
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and int((module.weight == 0).sum())
    }


def saved(path: Path, model: nn.Module, values: str = "exact") -> nn.Module:
    """Save a model sparse; return it with the weights that the file holds."""
    save_sparse(path, model.state_dict(), masks_of(model), values=values)
    model.load_state_dict(load_sparse(path).tensors)
    return model


def double(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.double()(x.double()).float()
    model.float()
    return y


@pytest.mark.parametrize("prefer", ["time", "memory"])
@pytest.mark.parametrize("values", ["exact", "bfloat16", "float16", "int8"])
def test_results_are_those_of_the_decoded_weights(tmp_path, values, prefer):
    model = saved(tmp_path / "f", slim(), values)
    deployed = deploy(tmp_path / "f", Slim, images(*X), prefer=prefer)
    for x in (images(*X), images(2, 3, 25, 40)):
        assert relative_error(deployed(x), double(model, x)) <= FP32
    assert [layer.name for layer in deployed.plan.layers] == ["stem", "conv", "depthwise", "head"]
    narrow = [layer for layer in deployed.plan.layers if "narrow" in layer.engine]
    sparse = [layer for layer in deployed.plan.layers if not layer.engine.startswith("dense")]
    if values == "exact":
        assert narrow == []
    elif prefer == "memory":
        assert narrow == sparse
    assert all(any("narrow" in name for name in layer.seconds) == (values != "exact") for layer in sparse)


class Reworked(nn.Module):
    """Computes with what a function makes of its weight."""

    def __init__(self, rework: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.rework = nn.Linear(20, 30, bias=False), rework

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.rework(self.inner.weight))


REWORKED = {
    "converted": lambda weight: weight.double().float(),
    "converted like another": lambda weight: weight.type_as(torch.zeros(1, dtype=torch.float64)).float(),
    "copied": lambda weight: weight.t().contiguous().t(),
    "laid out anew": lambda weight: weight.t().reshape(-1).reshape(20, 30).t(),
    "seen as it is": lambda weight: weight.t().t(),
    "the same type": lambda weight: weight.type_as(torch.zeros(1)),
    "computed": lambda weight: torch.einsum("oi,o->oi", weight, torch.ones(30)),
}


@pytest.mark.parametrize("name", REWORKED)
def test_weights_that_are_converted_or_copied_have_the_numbers_of_the_file(tmp_path, name):
    rework = REWORKED[name]
    model, x = saved(tmp_path / "f", pruned(Reworked(rework), 0.2)), images(4, 20)
    graph = InFile(SparseFile.open(tmp_path / "f"), lambda: Reworked(rework)).graph((x,), {})
    assert relative_error(run_plain(graph, [x])[0], model(x).detach()) <= FP32


def test_a_weight_that_is_returned_has_the_numbers_of_the_file(tmp_path):
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(20, 30)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner.weight.t()

    model, x = saved(tmp_path / "f", pruned(Shown(), 0.2)), images(4, 20)
    graph = InFile(SparseFile.open(tmp_path / "f"), Shown).graph((x,), {})
    assert torch.equal(run_plain(graph, [x])[1], model.inner.weight.t())


@pytest.mark.parametrize("values", ["exact", "int8"])
def test_a_saved_network_keeps_what_the_file_had_in_few_bits(tmp_path, values):
    torch.manual_seed(0)
    model = build("resnet20").eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= torch.rand_like(layer.weight) < 0.1
    saved(tmp_path / "f", model, values)
    deployed = deploy(tmp_path / "f", lambda: build("resnet20"), images(*X), prefer="memory")
    deployed.save(tmp_path / "deployed")
    loaded, x = load(tmp_path / "deployed"), images(*X)
    assert relative_error(loaded(x), double(model, x)) <= FP32
    assert relative_error(loaded(images(2, 3, 40, 33)), double(model, images(2, 3, 40, 33))) <= FP32
    size = (tmp_path / "deployed").stat().st_size
    kept = sum(int(mask.sum()) for mask in masks_of(model).values())
    plain = size - kept * (1 if values == "int8" else 4)
    assert plain < 270_000 / 8 + 80_000  # one bit a weight; biases, scales, the classifier and the plan
    loaded.save(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(x), loaded(x))


def test_a_pairs_half_is_deployed_from_its_folder(tmp_path):
    torch.manual_seed(0)
    model, pair = slim(), sparsetwin.Pair(tmp_path / "pair")

    class View:
        masks = masks_of(model)
        target_names = tuple(masks)
        steps = 1

    pair.save(model, View())
    pair.save(model, View(), name="other")
    for half in (None, "sparse", "other"):
        chosen = {} if half is None else {"half": half}
        deployed = deploy(tmp_path / "pair", Slim, images(*X), **chosen)
        assert relative_error(deployed(images(*X)), double(model, images(*X))) <= FP32
    with pytest.raises(CheckpointError, match=r"no member 'spars'.*did you mean 'sparse'"):
        deploy(tmp_path / "pair", Slim, images(*X), half="spars")
    with pytest.raises(CheckpointError, match=r"folder without pair\.json"):
        deploy(tmp_path, Slim, images(*X))


class Tokens(nn.Module):
    """What is hard to keep sparse: a tied embedding, a transposed weight, a weight that is computed, a lost buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 24)
        self.across = nn.Parameter(torch.randn(24, 40) / 5)  # (in, out)
        self.part = nn.Parameter(torch.randn(30, 40) / 6)
        self.scaled = nn.Linear(24, 24)
        self.head = nn.Linear(24, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.linspace(-1, 1, 50 * 24).sin().view(50, 24), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        hidden = nn.functional.gelu(hidden @ self.across)
        hidden = nn.functional.linear(hidden, self.part[3:27])
        hidden = nn.functional.linear(hidden, self.scaled.weight * 2, self.scaled.bias)
        return self.head(hidden)


def tokens_model(density: float = 0.2) -> Tokens:
    torch.manual_seed(0)
    model = Tokens().eval()
    for weight in (model.embedding.weight, model.across, model.part, model.scaled.weight):
        weight.data *= torch.rand_like(weight) < density
    return model


@pytest.mark.parametrize("values", ["exact", "int8"])
def test_weights_that_are_tied_transposed_cut_or_computed_are_right(tmp_path, values):
    model = tokens_model()
    names = ("embedding.weight", "across", "part", "scaled.weight", "head.weight")
    masks = {name: model.state_dict()[name] != 0 for name in names}
    save_sparse(tmp_path / "f", model.state_dict(), masks, values=values)
    model.load_state_dict(load_sparse(tmp_path / "f").tensors)
    tokens = torch.randint(0, 11, (2, 20), generator=torch.Generator().manual_seed(1))
    with SparseFile.open(tmp_path / "f") as file:
        graph = InFile(file, Tokens).graph((tokens,), {})
    kept = [node.operation.kept for node in graph.nodes if isinstance(node.operation, Linear)]
    assert [part is not None for part in kept] == [True, True, False, True]  # twice a weight is a weight of its own
    assert [part.is_narrow for part in kept if part is not None] == [False, False, values == "int8"]
    with torch.no_grad():
        expected = model(tokens)
    for prefer in ("time", "memory"):
        deployed = deploy(tmp_path / "f", Tokens, tokens, prefer=prefer)
        assert relative_error(deployed(tokens), expected) <= FP32
        assert deployed.layers(tokens).shape == expected.shape


def test_no_layer_of_a_traced_network_holds_a_dense_weight_that_is_stored_sparse(tmp_path):
    saved(tmp_path / "f", slim())
    with SparseFile.open(tmp_path / "f") as file:
        graph = InFile(file, Slim).graph((images(*X),), {})
    operations = [node.operation for node in graph.nodes if isinstance(node.operation, Layer)]
    assert all(operation.weight.is_meta and isinstance(operation.kept, KeptWeight) for operation in operations)


def test_a_dense_half_is_deployed_too(tmp_path):
    model = slim(1.0)
    save_dense(tmp_path / "f", model.state_dict())
    deployed = deploy(tmp_path / "f", Slim, images(*X))
    assert relative_error(deployed(images(*X)), double(model, images(*X))) <= FP32


def test_dense_rivals_take_part_when_they_are_named(tmp_path):
    saved(tmp_path / "f", slim())
    without = deploy(tmp_path / "f", Slim, images(*X))
    assert "eager" in without.plan.skipped
    assert {name.removesuffix(", one thread") for name in without.plan.candidates} <= set(PROGRAMS)
    deployed = deploy(tmp_path / "f", Slim, images(*X), rivals=("eager",))
    assert {"eager", "eager channels_last"} <= set(deployed.plan.candidates)


def test_results_that_are_not_finite_are_those_of_the_network_made_anew(tmp_path):
    model = saved(tmp_path / "f", slim())
    deployed, x = deploy(tmp_path / "f", Slim, images(*X)), images(*X)
    x[0, 0, 3, 3] = float("nan")
    with pytest.warns(SparsityWarning, match="not finite"):
        found = deployed(x)
    with torch.no_grad():
        assert torch.equal(found.isnan(), model(x).isnan())


def test_the_file_may_be_replaced_or_removed_afterwards(tmp_path):
    model = saved(tmp_path / "f", slim())
    deployed = deploy(tmp_path / "f", Slim, images(*X))
    (tmp_path / "f").unlink()
    x = images(2, 3, 30, 30)
    assert relative_error(deployed(x), double(model, x)) <= FP32  # planned anew, from the mapped file


class Wider(Slim):
    """Slim with another head and one layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 6)
        self.more = nn.Linear(2, 2)


def test_names_and_shapes_that_differ_are_named(tmp_path):
    saved(tmp_path / "f", slim())
    with pytest.raises(StateError, match=r"f does not fit the model: more.weight is missing.*head.weight is \(5, 8\)"):
        deploy(tmp_path / "f", Wider, images(*X))


def test_what_is_no_network_is_refused_by_name(tmp_path):
    path, x = tmp_path / "f", images(*X)
    saved(path, slim())
    with pytest.raises(UsageError, match="with a function that makes the model, got Slim"):
        deploy(path, Slim(), x)
    with pytest.raises(UsageError, match="model_fn returned a int"):
        deploy(path, lambda: 3, x)
    with pytest.raises(UsageError, match=r"cannot be made with parameters on the meta device: ZeroDivisionError"):
        deploy(path, lambda: 1 // 0, x)
    with pytest.raises(UsageError, match=r"\(file, model_fn, example\)"):
        deploy(path, x)
    with pytest.raises(UsageError, match=r"\(model, example\)"):
        deploy(slim(), Slim, x)
    with pytest.raises(ConfigError, match="half='sparse' is for the folder of a pair"):
        deploy(path, Slim, x, half="sparse")
    with pytest.raises(ConfigError, match="prefer='speed'"):
        deploy(path, Slim, x, prefer="speed")
    save_dense(path, slim().double().state_dict())
    with pytest.raises(ConfigError, match=r"bn.bias is torch.float64; deploy takes float32"):
        deploy(path, Slim, x)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        deploy(tmp_path / "absent", Slim, x)


def test_files_in_which_a_bit_is_wrong_are_refused_by_name(tmp_path):
    path = tmp_path / "f"
    saved(path, slim(), "int8")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cases = [whole[:place] for place in (0, 7, header // 2, len(whole) - 1)]
    for place in range(header // 3, len(whole), max(1, len(whole) // 40)):
        cases.append(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(CheckpointError, match=r"f[: ]"):
            deploy(path, Slim, images(*X))


def test_making_a_model_leaves_the_random_state_and_other_models_alone(tmp_path):
    saved(tmp_path / "f", slim())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    deploy(tmp_path / "f", Slim, images(*X))
    assert torch.equal(torch.rand(4), expected)
    assert not nn.Linear(2, 2).weight.is_meta


PEAK = """
import sys
from pathlib import Path
import torch
from torch import nn
torch.set_num_threads(1)
from sparsetwin.runtime import deploy

def kibibytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

def make(channels=512):
    layers = [nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.ReLU()) for _ in range(6)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

x = torch.zeros(1, 512, 8, 8)
deploy(make(16).eval(), x[:, :16], rivals=())  # the code that it takes is loaded on first use
Path("/proc/self/clear_refs").write_text("5")
start = kibibytes("VmRSS")
deployed = deploy(sys.argv[1], make, x)
deployed(x)
print(1024 * (kibibytes("VmHWM") - start))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_a_network_is_deployed_in_a_fraction_of_its_dense_size(tmp_path):
    space: dict[str, Any] = {}
    exec(PEAK[PEAK.index("def make") : PEAK.index("x = torch")], {"nn": nn}, space)
    torch.manual_seed(0)
    model = space["make"]()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= torch.rand_like(layer.weight) < 0.05
    saved(tmp_path / "f", model)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert dense > 56e6
    assert int(done.stdout) < 0.8 * dense, f"{int(done.stdout) / dense:.2f} of the dense size"
