"""The model stays an ordinary one: compiled, copied, averaged and profiled like any other."""

import copy
import gc
import subprocess
import sys

import pytest
import torch
from small_runs import SCHEDULE, Run, assert_same_bits, batch, bits, loss_of, network, sgd
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsetwin as st
from sparsetwin._compat import named_weights
from sparsetwin.training.ema import PhaseAverage


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_has_one_graph_over_all_phases():
    graphs = CompileCounterWithBackend("eager")
    run = Run.new(model=torch.compile(network(), backend=graphs, fullgraph=True))
    plain = Run.new()
    for _ in range(SCHEDULE.total_steps):
        run.step()
        plain.step()
    assert graphs.frame_count == 1
    assert_same_bits(bits(run), bits(plain))


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
def test_a_compiled_optimizer_step_stops_recompiling_after_the_first_sparse_phase():
    graphs = CompileCounterWithBackend("eager")
    run, plain = Run.new(), Run.new()
    step, counted = torch.compile(run.optimizers[0].step, backend=graphs), []
    for _ in range(SCHEDULE.total_steps):
        plain.step()
        run.backward()
        step()
        run.optimizers[0].zero_grad()
        counted.append(graphs.frame_count)
    assert counted[4] == counted[-1]
    assert run.sparsifier.steps == SCHEDULE.total_steps
    for name, weight in plain.weights.items():
        torch.testing.assert_close(run.weights[name], weight)
        assert torch.equal(run.weights[name] == 0, weight == 0)


def masks_in_memory() -> int:
    """Count the tensors that hold something of a mask of the first linear layer: bools, or integers as wide as it."""
    gc.collect()
    kinds = (torch.bool, torch.int32)
    tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    return sum(tensor.dtype in kinds and tensor.shape == (8, 48) for tensor in tensors)


@pytest.mark.parametrize("options", [{}, {"ham": st.HAM()}, {"score": "movement"}])
def test_a_dense_phase_after_a_sparse_one_holds_nothing_of_its_masks(options):
    before = masks_in_memory()
    run = Run.new(st.ACDC(schedule=SCHEDULE, **options))
    for step in range(SCHEDULE.total_steps):
        run.step()
        assert (masks_in_memory() > before) == SCHEDULE.at(step).is_sparse, step


def test_a_captured_step_finds_the_masks_of_later_phases_where_it_read_those_of_its_own(monkeypatch):
    """As a replayed CUDA graph reads them: at addresses that may not change, in dense phases neither."""
    run = Run.new()
    run.train(2)
    run.sparsifier.begin_step()
    loss_of(run.model, 2).backward()
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        run.optimizers[0].step()
    words = run.sparsifier._held._words._words
    read = {name: (tensor.data_ptr(), tensor) for name, tensor in words.items()}
    run.sparsifier.step_done()
    assert len(read) == 3
    for _ in range(3, SCHEDULE.total_steps):
        run.step()
        assert {name: tensor.data_ptr() for name, tensor in words.items()} == {
            name: at for name, (at, _) in read.items()
        }
    for name, (_, tensor) in read.items():
        assert torch.equal(tensor != 0, run.sparsifier.masks[name])


def test_a_deep_copy_is_an_independent_dense_looking_model_in_any_phase():
    run = Run.new()
    for _ in range(SCHEDULE.total_steps):
        run.step()
        twin = copy.deepcopy(run.model)
        assert all(type(parameter) is nn.Parameter for parameter in twin.parameters())
        before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
        assert torch.equal(twin.eval()(batch(0)[0]), copy.deepcopy(run.model).eval()(batch(0)[0]))
        free = sgd(twin.train())
        for _ in range(3):
            nn.functional.cross_entropy(twin(batch(1)[0]), batch(1)[1]).backward()
            free.step()  # without any Sparsifier
        assert any(not torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())
        if run.phase.is_sparse:
            assert int(twin[4].weight.count_nonzero()) > int(run.weights["4.weight"].count_nonzero())
    assert_same_bits(bits(run), bits(Run.new().train(SCHEDULE.total_steps)))


def test_a_deep_copy_of_the_optimizer_has_no_hooks():
    run = Run.new().train(3)
    twin = copy.deepcopy(run.optimizers[0])
    assert not twin._optimizer_step_pre_hooks
    assert not twin._optimizer_step_post_hooks


def test_an_average_restarted_with_each_phase_is_exactly_as_sparse_as_the_phase():
    run = Run.new()
    average = PhaseAverage(run.model, decay=0.9)
    run.sparsifier.on_phase(lambda event, phase: average.restart() if event == "enter" else None)
    for _ in range(SCHEDULE.total_steps):
        run.step()
        average.update()
        averaged = named_weights(average.masked(run.sparsifier.masks))
        for name, mask in run.sparsifier.masks.items():
            assert not averaged[name][~mask].any()
            assert torch.equal(averaged[name] != 0, run.weights[name] != 0)
        if run.phase.is_sparse:
            nonzero = sum(int(averaged[name].count_nonzero()) for name in run.weights)
            assert nonzero == 443 - round(run.phase.sparsity * 443)


def operators(step) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if not event.name.startswith("ProfilerStep")]


@pytest.mark.parametrize(
    "make_optimizer", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)]
)
def test_a_dense_phase_launches_nothing(make_optimizer):
    model = network()
    optimizer = make_optimizer(model)

    def plain_step():
        inputs, labels = batch(0)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    plain = [operators(plain_step) for _ in range(3)]
    run = Run.new(st.ACDC(schedule=st.schedules.phases([(3, 0.0), (2, 0.8)])), make_optimizers=make_optimizer)
    assert plain == [operators(run.step) for _ in range(3)]  # of which the first enters the phase
    assert run.sparsifier.masks == {}
    assert run.sparsifier.state_dict()["masks"] == {}
    run.step()
    assert operators(run.step) != plain[2]  # in a sparse phase there is something to see


HEAVY = {"transformers", "lightning", "pytorch_lightning", "tyro", "matplotlib", "datasets", "rich", "wandb", "mlflow"}


def test_importing_loads_no_heavy_library():
    code = "import sys, torch; before = set(sys.modules); import sparsetwin; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "sparsetwin" in loaded
    assert not HEAVY & {name.split(".")[0] for name in loaded}
    assert not any(name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed.fsdp")) for name in loaded)


def test_report_and_sparsity_count_what_there_is():
    run = Run.new().train(4)
    rows = run.sparsifier.report()
    assert [row.name for row in rows] == list(run.weights)
    for row in rows:
        mask, weight = run.sparsifier.masks[row.name], run.weights[row.name]
        assert (row.size, row.kept) == (weight.numel(), int(mask.sum()))
        assert row.nonzero == int(weight.count_nonzero()) <= row.kept
        assert row.sparsity == 1 - row.nonzero / row.size
    assert sum(row.kept for row in rows) == 89
    assert run.sparsifier.sparsity() == 1 - 89 / 443
    run.train(2)
    assert run.sparsifier.sparsity() == 0.0
    assert [row.kept for row in run.sparsifier.report()] == [27, 384, 32]


def test_a_query_changes_nothing():
    run, plain = Run.new(), Run.new()
    for _ in range(SCHEDULE.total_steps):
        run.step()
        plain.step()
        sparsifier = run.sparsifier
        _ = (sparsifier.phase, sparsifier.phase_ends, sparsifier.steps, sparsifier.masks, sparsifier.target_names)
        _ = (sparsifier.sparsity(), sparsifier.report(), sparsifier.state_dict(), sparsifier.weights)
    assert_same_bits(bits(run), bits(plain))
