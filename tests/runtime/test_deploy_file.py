"""Deployed networks in files: the same bits, mapped memory, and an error for whatever is damaged."""

import json
import multiprocessing
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error, slim

from sparsetwin.errors import CheckpointError, ConfigError, SparsityWarning, UsageError
from sparsetwin.kernels import CSRBlocks, KeptWeight
from sparsetwin.models import build
from sparsetwin.runtime import Deployed, deploy, load
from sparsetwin.runtime._coding import Store, decoded_graph, decoded_matrix, encoded_graph, encoded_matrix
from sparsetwin.runtime._entries import PROGRAMS
from sparsetwin.runtime._plain import run_plain


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return slim()


@pytest.fixture(scope="module")
def deployed(model) -> Deployed:
    found = deploy(model, images(1, 3, 32, 32), rivals=())
    found.prepare(images(2, 3, 40, 32))
    return found


@pytest.fixture
def path(deployed, tmp_path) -> Path:
    deployed.save(tmp_path / "slim.safetensors")
    return tmp_path / "slim.safetensors"


def by_program(deployed: Deployed, x: torch.Tensor) -> torch.Tensor:
    """A file holds the fastest program, even where the model itself was faster still."""
    call = deployed._caller.call((x,), {})
    return deployed._entries[call.key].program.run(call)


def test_a_loaded_network_gives_the_same_bits_for_every_shape_that_was_planned(deployed, path):
    loaded = load(path)
    for x in (images(1, 3, 32, 32), images(2, 3, 40, 32)):
        assert torch.equal(loaded(x), by_program(deployed, x))
        assert torch.equal(loaded(images=x), loaded(x))
    assert len(loaded.plans) == 2
    assert loaded.plan.layers == deployed.plan.layers
    assert loaded.plan.engine.removesuffix(", one thread") in PROGRAMS  # a file holds no model
    assert list(path.parent.iterdir()) == [path]


def test_networks_of_convolutions_take_new_sizes_after_loading(model, path):
    loaded, x = load(path), images(3, 3, 25, 50)
    assert relative_error(loaded(x), model(x).detach()) <= FP32
    with pytest.raises(UsageError, match="does not take"):
        loaded(images(1, 4, 32, 32))
    with pytest.raises(UsageError, match="plans for 1x3x32x32 float32"):
        loaded(images(1, 3, 32, 32).double())


def test_a_loaded_network_may_be_saved_again(path, tmp_path):
    loaded = load(path)
    loaded.save(tmp_path / "again.safetensors")
    x = images(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "again.safetensors")(x), loaded(x))


def test_not_finite_results_of_a_loaded_network_are_those_of_the_dense_one(model, path):
    loaded, x = load(path), images(1, 3, 32, 32)
    x[0, 0, 3, 3] = float("nan")
    with pytest.warns(SparsityWarning, match="not finite"):
        found = loaded(x)
    assert torch.equal(found.isnan(), model(x).isnan())


def test_another_number_of_threads_is_measured_again(model, path):
    x = images(1, 3, 32, 32)
    loaded = load(path, threads=2)
    assert loaded.plan.threads == 2
    assert relative_error(loaded(x), model(x).detach()) <= FP32
    for threads in (0, "2", 1.5):
        with pytest.raises(ConfigError, match="threads="):
            load(path, threads=threads)


def test_a_plan_from_another_processor_is_measured_again(model, path):
    edit(path, lambda content: [shape["plan"].update(machine="another, avx2") for shape in content["shapes"]])
    loaded, x = load(path), images(1, 3, 32, 32)
    assert "another" not in loaded.plan.machine
    assert relative_error(loaded(x), model(x).detach()) <= FP32


def test_what_a_file_cannot_do_is_refused_by_name(path):
    loaded = load(path)
    with pytest.raises(UsageError, match="holds no model"):
        _ = loaded.layers


def test_token_networks_take_the_shapes_that_they_were_saved_with(tmp_path):
    torch.manual_seed(0)
    model = pruned(build("gpt", vocabulary=11, layers=1, width=32), 0.2)
    tokens = torch.randint(0, 11, (2, 9))
    deployed = deploy(model, tokens, rivals=())
    deployed.save(tmp_path / "gpt.safetensors")
    loaded = load(tmp_path / "gpt.safetensors")
    assert torch.equal(loaded(tokens), by_program(deployed, tokens))
    with pytest.raises(UsageError, match=r"aten\.view\.default"):
        loaded(tokens[:, :5])


def test_sparse_layers_are_stored_without_their_zeros_on_mapped_memory(tmp_path):
    model = pruned(build("cifar_resnet", depth=8), 0.05)
    x = images(1, 3, 32, 32)
    graph = graph_of(model, x)
    made, store = program(graph), Store()
    for matrix in made.packed.matrices.values():
        encoded_matrix(matrix, store)
    encoded_graph(made.graph, store)
    kept = sum(int(node.operation.weight.count_nonzero()) for node in graph.layers())
    total = sum(node.operation.weight.numel() for node in graph.layers())
    size = sum(tensor.nbytes for tensor in store.tensors.values())
    assert (
        4 * kept + total / 8 < size < 4 * kept + total / 8 + 64 * len(store.tensors) + 20_000
    )  # batch norms, the rest
    save_file(store.tensors, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    matrix = next(iter(made.packed.matrices.values()))
    found = decoded_matrix(encoded_matrix(matrix, Store()), parts)
    name = encoded_matrix(matrix, Store())["values"]
    assert found.values.data_ptr() == parts[name].data_ptr()  # no copy


def test_graphs_survive_json(model):
    x = images(2, 3, 20, 20)
    graph, store = graph_of(model, x), Store()
    text = json.dumps(encoded_graph(graph, store))
    found = decoded_graph(json.loads(text), store.tensors)
    assert torch.equal(run_plain(found, [x])[0], run_plain(graph, [x])[0])


def child(path: str, x: torch.Tensor, queue: "multiprocessing.Queue[list[float]]") -> None:
    torch.set_num_threads(1)
    queue.put(load(path)(x).flatten().tolist())


def test_spawned_processes_load_the_file(path):
    x = images(1, 3, 32, 32)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(str(path), x, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    assert found == load(path)(x).flatten().tolist()


def edit(path: Path, change) -> None:
    """Change a file's text as an attacker would, hashes and all."""
    import hashlib

    with safe_open(path, "pt") as file:
        outer = json.loads(file.metadata()["sparsetwin"])
    content = json.loads(outer["content"])
    change(content)
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    metadata = {"sparsetwin": json.dumps({"sha256": digest, "content": text})}
    save_file(load_file(path), path, metadata=metadata)


def first_torch(content):
    return next(
        node["operation"] for node in content["shapes"][0]["graph"]["nodes"] if node["operation"]["kind"] == "Torch"
    )


def first_matrix(content):
    return content["shapes"][0]["matrices"][0]["matrix"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=99), "version 99"),
        (lambda content: content.pop("shapes"), "shapes"),
        (lambda content: content.update(shapes=[]), "holds no plan"),
        (lambda content: first_torch(content).update(function="aten.from_file.default"), "may name"),
        (lambda content: first_torch(content).update(function="os.system"), "not one of PyTorch's"),
        (lambda content: first_torch(content).update(function="aten.relu_.default"), "not one of PyTorch's"),
        (lambda content: first_torch(content).update(kind="Code"), "does not know"),
        (lambda content: content["shapes"][0]["graph"]["nodes"].reverse(), "reads what is not there"),
        (lambda content: content["shapes"][0]["graph"].update(outputs=[{"value": 999}]), "not there"),
        (lambda content: content["shapes"][0]["choices"].clear(), "no engine"),
        (lambda content: content["shapes"][0]["plan"].pop("engine"), "plan"),
        (lambda content: content["tensors"].update({next(iter(content["tensors"])): [7]}), "hash|short"),
    ],
)
def test_texts_that_do_not_fit_are_refused(path, change, message):
    edit(path, change)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_packed_weights_whose_parts_do_not_fit_are_refused():
    weight = pruned(torch.nn.Linear(12, 5), 0.4).weight.detach()
    matrix = CSRBlocks.from_kept(KeptWeight.from_dense(weight), block_columns=5)
    store = Store()
    good = encoded_matrix(matrix, store)
    assert torch.equal(decoded_matrix(good, store.tensors).to_dense(), weight)
    assert torch.equal(decoded_matrix(good, store.tensors).row_pointers, matrix.row_pointers)

    def bad(**changed):
        tensors = dict(store.tensors)
        found = {**good}
        for name, value in changed.items():
            if isinstance(value, torch.Tensor):
                tensors["changed"] = value
                value = "changed"
            found[name] = value
        with pytest.raises(CheckpointError, match="packed weights are damaged"):
            decoded_matrix(found, tensors)

    bits = store.tensors[good["bits"]]
    for place in range(60):  # a weight more or less than there are values; whatever bits say lies within the matrix
        changed = bits.clone()
        changed[place // 8] ^= 1 << place % 8
        bad(bits=changed)
    bad(bits=bits[:-1])
    bad(bits=bits.to(torch.int8))
    bad(rows=6)
    bad(rows=0)
    bad(columns=2**40)
    bad(columns=-12)
    bad(block_columns=0)
    bad(values=torch.zeros(3))
    bad(values=store.tensors[good["values"]].double())
    bad(values="missing")
    bad(scales=torch.zeros(4))
    bad(scales=torch.zeros(5, dtype=torch.float64))


def test_damaged_files_are_refused_and_never_crash(path):
    whole = path.read_bytes()
    chosen = random.Random(0)
    cases = [b"", b"x", b"\xff" * 100, whole[: len(whole) // 2], whole[:-1], whole[:9]]
    for _ in range(60):
        changed = bytearray(whole)
        changed[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        cases.append(bytes(changed))
    refused = 0
    for case in cases:
        path.write_bytes(case)
        try:
            load(path)
        except CheckpointError:
            refused += 1
    assert refused >= len(cases) - 12  # a bit of what fills up cache lines means nothing
    path.unlink()
    with pytest.raises(CheckpointError, match="no file"):
        load(path)


def test_files_of_others_are_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no deployed network"):
        load(tmp_path / "other.safetensors")


def test_a_model_that_was_not_traced_cannot_be_saved(tmp_path):
    class Branching(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    deployed = deploy(Branching(4, 4), images(2, 4), rivals=())
    with pytest.raises(UsageError, match="save the model itself"):
        deployed.save(tmp_path / "none.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_made_and_what_cannot_be_written_is_an_error_of_ours(deployed, tmp_path):
    path = tmp_path / "new" / "folder" / "slim.safetensors"
    deployed.save(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot write"):
        deployed.save(path / "below a file")
    (tmp_path / "a folder").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        deployed.save(tmp_path / "a folder")
    assert path.read_bytes() == before
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["a folder", "folder", "new", "slim.safetensors"]


def test_a_full_disk_is_said_to_be_one(deployed, tmp_path, monkeypatch):
    path = tmp_path / "slim.safetensors"
    path.write_bytes(b"old")

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sparsetwin.runtime._file.save_file", full)
    with pytest.raises(CheckpointError, match=r"disk full .*the previous file is kept"):
        deployed.save(path)
    assert [found.read_bytes() for found in tmp_path.iterdir()] == [b"old"]


def test_many_threads_may_save_to_one_file(deployed, tmp_path):
    path = tmp_path / "slim.safetensors"
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: deployed.save(path), range(4)))
    assert len(load(path).plans) == 2
    assert list(tmp_path.iterdir()) == [path]
