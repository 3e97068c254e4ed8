"""What is saved, and that state which does not fit is refused by the name of what differs."""

import copy

import pytest
import torch
from small_runs import SCHEDULE, TARGETS, Run, acdc, assert_same_bits, bits, network, read
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ScheduleError, StateError


def state_after(steps: int, **arguments) -> dict:
    return read(Run.new(**arguments).train(steps).saved())["sparsifier"]


def loads(state, run: Run | None = None) -> None:
    (run or Run.new(seed=7)).sparsifier.load_state_dict(state)


def types_in(value) -> set[type]:
    if isinstance(value, dict):
        return set().union(*({type(key)} | types_in(item) for key, item in value.items()), {dict})
    if isinstance(value, list):
        return set().union(*(types_in(item) for item in value), {list})
    return {type(value)}


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 12])
def test_the_state_is_plain_data_and_tensors(steps):
    state = Run.new().train(steps).sparsifier.state_dict()
    assert types_in(state) <= {int, float, str, torch.Tensor, dict, list}
    assert set(state) == {"version", "method", "targets", "steps", "phase", "masks", "buffers"}
    assert state["version"] == 1
    assert (state["steps"], state["phase"]) == (steps, {0: -1, 1: 0, 4: 1, 5: 1, 12: 5}[steps])
    assert bool(state["masks"]) == (steps in (4, 5, 12))


def test_a_saved_state_does_not_change_while_training_goes_on():
    run = Run.new().train(4)
    state = run.sparsifier.state_dict()
    before = copy.deepcopy(state)
    run.train(8)
    assert all(torch.equal(state["masks"][name], mask) for name, mask in before["masks"].items())
    assert (state["steps"], state["phase"]) == (before["steps"], before["phase"])


@pytest.mark.parametrize("steps", [0, 2, 3, 5, 7, 8])
def test_saving_after_begin_step_resumes_with_the_same_bits_too(steps):
    run = Run.new().train(steps)
    run.sparsifier.begin_step()
    resumed = Run.new(seed=7).load(run.saved())
    assert resumed.phase == run.phase
    assert_same_bits(bits(resumed.train(4)), bits(run.train(4)))


def test_loading_forgets_a_step_that_has_begun():
    run = Run.new().train(5)
    saved = run.saved()
    run.sparsifier.begin_step()  # enters the next phase
    run.load(saved)
    assert run.sparsifier.phase_ends
    assert_same_bits(bits(run.train(4)), bits(Run.new().train(9)))


def test_a_run_may_go_back_to_an_earlier_state():
    run = Run.new()
    saved, expected = run.train(4).saved(), bits(run.train(8))
    for _ in range(2):
        assert_same_bits(bits(run.load(saved).train(8)), expected)


REFUSED = {
    "method": (st.Dense(schedule=st.schedules.phases([(12, 0.0)])), r"name = 'ACDC', this method has 'Dense'"),
    "field": (acdc(reset="targets"), r"reset = 'all', this method has 'targets'"),
    "nested field": (acdc(distribution=st.Uniform()), r"distribution = .*Global.*, this method has .*Uniform"),
    "sparsity": (
        acdc(st.schedules.phases([(2, 0.0), (3, 0.9), (2, 0.0), (1, 0.5), (2, 0.0), (2, 0.8)])),
        r"schedule\[1\] = \[2, 5, 0\.8\], this method has \[2, 5, 0\.9\]",
    ),
    "number of phases": (
        acdc(st.schedules.phases([(2, 0.0), (3, 0.8), (2, 0.0), (1, 0.5), (4, 0.0)])),
        r"schedule\[4\] = \[8, 10, 0\.0\], this method has \[8, 12, 0\.0\]",
    ),
    "length": (acdc(st.schedules.phases([(2, 0.0), (3, 0.8)])), r"schedule\[2\] = .*, this method has 'nothing'"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("steps", [1, 4])
def test_state_of_another_method_is_refused_by_the_field_that_differs(what, steps):
    method, message = REFUSED[what]
    fresh = Run.new(method)
    with pytest.raises(StateError, match=message):
        loads(state_after(steps), fresh)
    assert fresh.sparsifier.steps == 0


@pytest.mark.parametrize("steps", [1, 4])  # in a dense phase there is no mask to see it from
def test_state_of_another_model_is_refused_by_the_target_that_differs(steps):
    wider = network()
    wider[6] = nn.Linear(8, 5)
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(StateError, match=r"target 6\.weight = \[4, 8\], this model has \[5, 8\]"):
        loads(state_after(steps), Run.new(model=wider))
    with pytest.raises(StateError, match=r"target 0\.weight = \[3, 1, 3, 3\], this model has \[4, 4\]"):
        loads(state_after(steps), Run.new(acdc(), model=other))
    with pytest.raises(StateError, match=r"target 6\.weight = \[4, 8\], this model has 'nothing'"):
        loads(state_after(steps), Run.new(targets=st.Targets(dense_last=True)))


def broken(change) -> dict:
    state = state_after(4)
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(version=2), "of version 2; this release reads version 1"),
        (lambda state: state.pop("version"), "this is no sparsifier state"),
        (lambda state: state.pop("targets"), "lacks targets"),
        (lambda state: state.update(steps=2, phase=4), "phase 4 at step 2 is not in this schedule"),
        (lambda state: state.update(phase=17), "phase 17 at step 4 is not in this schedule"),
        (lambda state: state.update(steps=-1), "phase 1 at step -1"),
        (lambda state: state.update(steps=6, phase=2), "has masks, but its phase is not sparse"),
        (lambda state: state["masks"].pop("0.weight"), r"the saved masks lack 0\.weight"),
        (lambda state: state["masks"].update(more=torch.ones(1)), "a mask for more, which is no target"),
        (lambda state: state["masks"].update({"0.weight": torch.ones(2).bool()}), r"of 0\.weight has shape \(2,\)"),
        (lambda state: state["masks"].update({"0.weight": torch.ones(3, 1, 3, 3)}), r"has dtype torch\.float32"),
        (lambda state: state["buffers"].update(scores={"0.weight": torch.ones(2)}), r"the saved scores of 0\.weight"),
    ],
)
def test_broken_state_is_refused_and_nothing_is_loaded(change, message):
    run = Run.new().train(4)
    before = bits(run)
    with pytest.raises(StateError, match=message):
        loads(broken(change), run)
    assert_same_bits(bits(run), before)
    assert run.sparsifier.steps == 4


def test_something_else_than_a_state_is_refused():
    with pytest.raises(StateError, match=r"expected what Sparsifier\.state_dict"):
        loads([1, 2])


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 7, 8, 12])
def test_prepare_load_makes_the_tensors_that_a_filling_loader_needs(steps):
    run = Run.new().train(steps)
    saved, expected = read(run.saved()), bits(Run.new().train(12))
    fresh = Run.new(seed=7)
    fresh.model.load_state_dict(saved["model"])
    fresh.optimizers[0].load_state_dict(saved["optimizers"][0])
    fresh.sparsifier.prepare_load(steps)
    state = fresh.sparsifier.state_dict()
    assert (state["steps"], state["phase"]) == (saved["sparsifier"]["steps"], saved["sparsifier"]["phase"])
    assert state["masks"].keys() == saved["sparsifier"]["masks"].keys()
    for name, mask in state["masks"].items():
        mask.copy_(saved["sparsifier"]["masks"][name])
    fresh.sparsifier.load_state_dict(state)
    assert_same_bits(bits(fresh.train(12 - steps)), expected)


@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("steps", [4, 5, 6])
def test_distributed_checkpoint_saves_and_fills_a_run(steps, tmp_path):
    from torch.distributed import checkpoint

    run = Run.new().train(steps)
    whole = {"model": run.model.state_dict(), "sparsifier": run.sparsifier.state_dict()}
    checkpoint.save(whole, checkpoint_id=tmp_path, no_dist=True)
    fresh = Run.new(seed=7)
    fresh.optimizers[0].load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))
    fresh.sparsifier.prepare_load(steps)
    filled = {"model": fresh.model.state_dict(), "sparsifier": fresh.sparsifier.state_dict()}
    checkpoint.load(filled, checkpoint_id=tmp_path, no_dist=True)
    fresh.model.load_state_dict(filled["model"])
    fresh.sparsifier.load_state_dict(filled["sparsifier"])
    assert_same_bits(bits(fresh.train(3)), bits(run.train(3)))


def test_prepare_load_refuses_negative_steps():
    with pytest.raises(ScheduleError, match="got -1"):
        Run.new().sparsifier.prepare_load(-1)


def test_prepare_load_past_the_end_is_the_last_phase():
    sparsifier = Run.new().sparsifier
    sparsifier.prepare_load(40)
    assert (sparsifier.steps, sparsifier.phase, tuple(sparsifier.masks)) == (40, SCHEDULE.phases[-1], TARGETS)
