"""The benchmark of inference: every engine gives the same answers, and whatever fails is told."""

import json
import os
import statistics
import time

import pytest
import torch
from bench_networks import deepsparse_python, pruned_network
from torch import nn

from sparsetwin.bench import ENGINES, BenchSettings, DeepSparse, bench_inference, write_result
from sparsetwin.bench._deepsparse import older_onnx
from sparsetwin.bench._pinning import TooLongError, pinned, time_limit
from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.export import export_onnx

SHORT = {"rounds": 3, "turn_seconds": 1e-4, "batch": 3}
SAMPLES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def bench(network, samples=SAMPLES, **settings):
    chosen = BenchSettings(**{**SHORT, **settings})
    return bench_inference(network, samples, name="tiny", settings=chosen, machine={"cpu_features": ["avx2"]})


def named(contest):
    return {(row.engine, row.precision): row for row in contest.rows}


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("onnxruntime")
    return bench(pruned_network(), engines=("eager", "csr", "onnxruntime", "sparsetwin", "deepsparse"))


def test_every_engine_has_a_row_at_batch_one_and_at_the_batch(result):
    assert [contest.batch for contest in result.contests] == [1, 3]
    for contest in result.contests:
        assert set(named(contest)) == {
            ("PyTorch eager", "fp32"), ("PyTorch eager, channels last", "fp32"), ("PyTorch eager", "bf16"),
            ("PyTorch eager, channels last", "bf16"), ("torch CSR", "fp32"), ("ONNX Runtime", "fp32"),
            ("ONNX Runtime", "int8"), ("sparsetwin", "fp32"), ("sparsetwin", "bf16"),
        }  # fmt: skip


def test_answers_are_those_of_pytorch_and_rounding_shows(result):
    for contest in result.contests:
        rows = named(contest)
        for row in rows.values():
            assert row.relative_error <= {"fp32": 1e-5, "bf16": 3e-2, "int8": 0.2}[row.precision]
            assert row.precision != "fp32" or row.same_predictions == 1
        assert rows["PyTorch eager", "bf16"].relative_error > 1e-5
        assert rows["ONNX Runtime", "int8"].relative_error > 1e-5


def test_the_figures_of_a_row_are_those_of_its_turns(result):
    for contest in result.contests:
        for row in contest.rows:
            assert len(row.turn_medians_ms) == 3
            assert row.median_ms == pytest.approx(statistics.median(row.turn_medians_ms), rel=1e-3)
            low, high = row.quartiles_ms
            assert 0 < row.min_ms <= low <= row.median_ms <= high
            assert row.per_second == pytest.approx(1e3 * contest.batch / row.median_ms)
        assert [row.median_ms for row in contest.rows] == sorted(row.median_ms for row in contest.rows)


def test_an_engine_that_is_not_there_is_listed_with_the_reason(result):
    for contest in result.contests:
        assert contest.missing == {"DeepSparse, fp32": "no interpreter was given: --deepsparse-python PATH"}


def test_the_verdict_compares_with_the_fastest_other_engine_under_the_same_permission(result):
    for contest in result.contests:
        rows = named(contest)
        fp32 = [row for row in rows.values() if row.precision == "fp32" and row.engine != "sparsetwin"]
        best = min(fp32, key=lambda row: row.median_ms)
        words, rounded = contest.verdicts()
        assert words.startswith("fp32 only: sparsetwin takes")
        assert f"({best.engine}, fp32)" in words
        assert words.endswith(f"{best.median_ms / rows['sparsetwin', 'fp32'].median_ms:.2f} times as fast")
        assert rounded.startswith("bf16 allowed: ")


def test_a_result_is_written_whole_as_json(result, tmp_path):
    path = tmp_path / "new" / "result.json"
    write_result(result, path)
    found = json.loads(path.read_text())
    assert found["version"] == 1
    assert found["inputs"] == "(batch, 1, 8, 8) float32"
    assert found["machine"]["cpu_features"] == ["avx2"]
    assert found["settings"]["threads"] == 1
    assert found["contests"][1]["rows"][0]["turn_medians_ms"] == list(result.contests[1].rows[0].turn_medians_ms)
    assert [path.name for path in path.parent.iterdir()] == ["result.json"]


def test_the_processor_without_bf16_is_told_of(result):
    assert any("no bf16 instructions" in note for note in result.notes)


def test_deepsparse_runs_in_another_interpreter(tmp_path):
    pytest.importorskip("onnxruntime")
    found = bench(pruned_network(), engines=("deepsparse",), deepsparse_python=deepsparse_python(tmp_path))
    for contest in found.contests:
        (row,) = contest.rows
        assert row.relative_error <= 1e-5
        assert row.note == "version stand-in, own process, 88% of operations in its own kernels"
    assert str(tmp_path) not in json.dumps(found.plain())


@pytest.mark.parametrize(
    ("fails_at", "reason"),
    [("start", "RuntimeError: unsupported masks"), ("3", "its process ended with code 139: illegal masks")],
)
def test_a_crash_of_deepsparse_costs_its_row_only(tmp_path, fails_at, reason):
    pytest.importorskip("onnxruntime")
    python = deepsparse_python(tmp_path, fails_at=fails_at)
    found = bench(pruned_network(), engines=("eager", "deepsparse"), precisions=("fp32",), deepsparse_python=python)
    for contest in found.contests:
        assert [row.engine.split(",")[0] for row in contest.rows] == ["PyTorch eager"] * 2
        assert reason in contest.missing["DeepSparse, fp32"]


def test_an_interpreter_that_is_none_is_told_of(tmp_path):
    pytest.importorskip("onnxruntime")
    found = bench(pruned_network(), engines=("deepsparse",), deepsparse_python=tmp_path / "nothing")
    assert "cannot start" in found.contests[0].missing["DeepSparse, fp32"]


def test_deepsparse_reads_the_clock_of_its_own_process(tmp_path):
    pytest.importorskip("onnxruntime")
    export_onnx(pruned_network(), SAMPLES, path=tmp_path / "m.onnx")
    engine = DeepSparse(deepsparse_python(tmp_path), tmp_path / "m.onnx", inputs=[SAMPLES], folder=tmp_path, threads=1)
    try:
        found = [engine.seconds(20, clock=clock) for clock in ("processor", "wall")]
        assert [len(seconds) for seconds in found] == [20, 20]
        assert all(second > 0 for seconds in found for second in seconds)
        with torch.no_grad():
            torch.testing.assert_close(engine.output, pruned_network()(SAMPLES), atol=1e-5, rtol=1e-5)
    finally:
        engine.close()
    with pytest.raises(UsageError, match="DeepSparse is closed"):
        engine.seconds(1)


class Averaging(nn.Module):
    """Has a mean, whose axes are an attribute up to opset 17 and an input from 18 on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.convolution(images).mean((2, 3)))


def test_deepsparse_gets_the_last_opset_that_it_has_kernels_for_with_the_same_weights(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    export_onnx(Averaging(), SAMPLES, path=tmp_path / "new.onnx")
    old = onnx.load(older_onnx(tmp_path / "new.onnx", tmp_path / "old.onnx"))
    new = onnx.load(tmp_path / "new.onnx")
    assert [network.opset_import[0].version for network in (new, old)] == [18, 17]
    assert old.ir_version == 9
    weights = [
        {part.name: onnx.numpy_helper.to_array(part).tobytes() for part in network.graph.initializer}
        for network in (new, old)
    ]
    assert {"convolution.weight", "head.weight"} <= weights[1].keys()
    assert weights[1].items() <= weights[0].items()
    session = runtime.InferenceSession(str(tmp_path / "old.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = Averaging()(SAMPLES)
    torch.testing.assert_close(
        torch.from_numpy(session.run(None, {"input": SAMPLES.numpy()})[0]), expected, atol=1e-6, rtol=1e-5
    )


def test_a_network_with_a_younger_operation_keeps_its_opset(tmp_path):
    onnx = pytest.importorskip("onnx")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [2]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("BitwiseNot", ["x"], ["y"])], "g", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save_model(onnx.helper.make_model(graph, opset_imports=opset), tmp_path / "new.onnx")
    old = onnx.load(older_onnx(tmp_path / "new.onnx", tmp_path / "old.onnx"))
    assert old.opset_import[0].version == 18
    assert old.ir_version <= 9
    assert [node.op_type for node in old.graph.node] == ["BitwiseNot"]


class Counting(nn.Module):
    """Gives another answer at every call."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return self.head(images.flatten(1)) * self.calls


def test_an_engine_with_other_answers_has_no_row():
    found = bench(Counting(), engines=("eager",), precisions=("fp32",))
    for contest in found.contests:
        assert not contest.rows
        assert "gives other answers than PyTorch" in contest.missing["PyTorch eager, fp32"]


class Overflowing(nn.Module):
    """Has an output that is infinite in bfloat16 and finite in float32."""

    def forward(self, images):
        return images.flatten(1) * (3.4e38 / 4)


def test_an_engine_whose_answers_are_not_finite_has_no_row():
    samples = torch.full((2, 1, 8, 8), 3.9999)
    found = bench(Overflowing(), samples, engines=("eager",))
    for contest in found.contests:
        assert {row.precision for row in contest.rows} == {"fp32"}
        assert "gives other answers" in contest.missing["PyTorch eager, bf16"]


def test_a_network_without_pruned_linears_has_no_row_of_sparse_matrices():
    found = bench(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), engines=("csr",))
    assert "no linear layer is pruned" in found.contests[0].missing["torch CSR, fp32"]


def test_tokens_are_no_images():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 20))
    found = bench(network, torch.randint(0, 20, (2, 6)), engines=("eager", "sparsetwin"))
    for contest in found.contests:
        assert set(named(contest)) == {
            ("PyTorch eager", "fp32"), ("PyTorch eager", "bf16"), ("sparsetwin", "fp32"), ("sparsetwin", "bf16"),
        }  # fmt: skip
        assert contest.missing["PyTorch eager, channels last, fp32"] == "channels last is for images"


def test_samples_are_repeated_for_a_larger_batch():
    found = bench(pruned_network(), SAMPLES[:1], engines=("eager",), precisions=("fp32",), batch=4)
    assert [contest.batch for contest in found.contests] == [1, 4]


def test_the_model_and_the_number_of_threads_stay_as_they_were():
    network = pruned_network().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    threads = torch.get_num_threads()
    bench(network, engines=("eager", "sparsetwin"))
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system holds no process on processors")
def test_a_run_is_held_on_as_many_processors_as_it_has_threads():
    before = os.sched_getaffinity(0)
    with pinned(1) as held:
        assert os.sched_getaffinity(0) == set(held)
        assert len(held) == 1
        assert held[0] in before
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == before


def test_what_takes_too_long_is_interrupted_even_if_it_swallows_that_once():
    def deaf():
        try:
            time.sleep(30)
        except TooLongError:
            time.sleep(30)

    with pytest.raises(TooLongError, match=r"took longer than 0\.05 s"), time_limit(0.05):
        deaf()


def test_an_error_made_of_the_interruption_is_told_as_such():
    def compiler():
        try:
            time.sleep(30)
        except TooLongError as error:
            raise RuntimeError("the backend failed") from error

    with pytest.raises(TooLongError), time_limit(0.05):
        compiler()
    with pytest.raises(RuntimeError, match="of its own"), time_limit(5):
        raise RuntimeError("of its own")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch should be at least 1"),
        ({"threads": 0}, "threads should be at least 1"),
        ({"rounds": 2}, "rounds should be at least 3"),
        ({"turn_seconds": 0}, "turn_seconds should be more than 0"),
        ({"engines": ("eager", "tensorrt")}, f"engines should be some of {', '.join(ENGINES)}; got tensorrt"),
        ({"precisions": ()}, "precisions should be some of fp32, bf16, int8; got none"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**settings)


def test_more_threads_than_processors_are_refused():
    with pytest.raises(ConfigError, match="this process may run on"):
        bench(pruned_network(), threads=4096, engines=("eager",))


def test_no_samples_and_no_tensor_are_refused():
    with pytest.raises(UsageError, match="at least one sample"):
        bench(pruned_network(), SAMPLES[:0])

    class Two(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(UsageError, match="gives a tuple"):
        bench(Two())


@pytest.mark.slow
def test_torch_compile_takes_part():
    found = bench(pruned_network(), engines=("compile",), precisions=("fp32",), batch=1)
    (contest,) = found.contests
    if contest.missing:
        pytest.skip(f"no compiler here: {contest.missing}")
    assert named(contest)["torch.compile", "fp32"].relative_error <= 1e-5
