"""When phases begin and end, and what a training loop sees of it."""

import warnings

import pytest
import torch
from small_runs import SCHEDULE, Run, acdc, assert_same_bits, batch, bits, network, nonzeros, sgd
from torch import nn

import sparsetwin as st
from sparsetwin.errors import SelectionError, SparsityWarning, UsageError

TWO_PHASES = st.schedules.phases([(1, 0.0), (2, 0.8)])


def test_nothing_has_begun_before_the_first_step():
    sparsifier = Run.new().sparsifier
    assert (sparsifier.phase, sparsifier.steps, sparsifier.masks, sparsifier.phase_ends) == (None, 0, {}, False)
    assert sparsifier.sparsity() == 0.0


def test_begin_step_called_again_changes_nothing():
    run, plain = Run.new(), Run.new().train(9)
    for _ in range(9):
        run.sparsifier.begin_step()
        before = bits(run)
        run.sparsifier.begin_step()
        run.sparsifier.begin_step()
        assert_same_bits(bits(run), before)
        run.step()
    assert_same_bits(bits(run), bits(plain))


def test_a_step_without_begin_step_is_refused_by_name():
    run = Run.new().train(2)
    nn.functional.cross_entropy(run.model(batch(2)[0]), batch(2)[1]).backward()
    with pytest.raises(UsageError, match=r"begin_step\(\) was not called before optimizer step 3; call sparsifier"):
        run.optimizers[0].step()
    assert run.sparsifier.steps == 2
    run.optimizers[0].zero_grad()
    run.train(1)


def test_a_second_step_for_one_begin_step_is_refused():
    run = Run.new()
    run.backward()
    run.optimizers[0].step()
    with pytest.raises(UsageError, match=r"begin_step\(\) was not called before optimizer step 2"):
        run.optimizers[0].step()


def test_phase_ends_is_true_exactly_after_the_last_step_of_each_phase():
    run, ends = Run.new(), []
    for _ in range(SCHEDULE.total_steps):
        run.step()
        if run.sparsifier.phase_ends:
            ends.append((run.sparsifier.steps, run.phase.index))
    assert ends == [(2, 0), (5, 1), (7, 2), (8, 3), (10, 4), (12, 5)]
    assert run.sparsifier.phase_ends  # after the run too, however often it is asked


def test_phase_ends_is_true_after_loading_at_a_boundary_and_nowhere_else():
    run = Run.new()
    for _ in range(SCHEDULE.total_steps):
        run.step()
        loaded = Run.new(seed=7).load(run.saved()).sparsifier
        assert (loaded.phase_ends, loaded.phase) == (run.sparsifier.phase_ends, run.phase)


def test_evaluation_and_saving_at_a_boundary_see_the_phase_that_just_ended():
    run = Run.new().train(5)
    sparsifier = run.sparsifier
    assert sparsifier.phase_ends
    assert sparsifier.phase == SCHEDULE.phases[1]
    assert sparsifier.sparsity() == pytest.approx(0.8, abs=0.5 / 443)
    assert nonzeros(run) <= 89
    run.model.eval()(batch(0)[0])
    sparsifier.begin_step()
    assert not sparsifier.phase_ends
    assert (sparsifier.phase, sparsifier.masks, sparsifier.sparsity()) == (SCHEDULE.phases[2], {}, 0.0)


def test_past_the_end_one_warning_comes_and_the_last_phase_holds():
    run = Run.new(acdc(TWO_PHASES)).train(3)
    masks = dict(run.sparsifier.masks)
    with pytest.warns(SparsityWarning, match="the schedule ended after 3 steps; its last phase holds") as caught:
        run.sparsifier.begin_step()
    assert len(caught) == 1
    assert caught[0].filename == __file__  # where begin_step() was called
    run.sparsifier.begin_step()  # warnings are errors here
    run.train(4)
    assert run.sparsifier.steps == 7
    assert run.phase == TWO_PHASES.phases[1]
    assert not run.sparsifier.phase_ends
    assert all(torch.equal(mask, masks[name]) for name, mask in run.sparsifier.masks.items())


def test_callbacks_hear_leave_before_and_enter_after_each_change():
    run, heard = Run.new(), []
    sparsifier = run.sparsifier

    def hear(event, phase):
        heard.append((event, phase.index, sparsifier.steps, sparsifier.phase.index, sparsifier.sparsity() > 0))
        if event == "leave":
            assert sparsifier.phase_ends
            assert not phase.is_sparse or nonzeros(run) <= 89 or phase.sparsity == 0.5
        else:
            assert not sparsifier.phase_ends

    sparsifier.on_phase(hear)
    sparsifier.on_phase(lambda event, phase: heard.append("second"))
    run.train(6)
    assert [item for item in heard if item != "second"] == [
        ("enter", 0, 0, 0, False),
        ("leave", 0, 2, 0, False),
        ("enter", 1, 2, 1, True),
        ("leave", 1, 5, 1, True),
        ("enter", 2, 5, 2, False),
    ]
    assert heard[1::2] == ["second"] * 5


def test_no_callback_is_called_by_loading():
    saved, run, heard = Run.new().train(4).saved(), Run.new(seed=7), []
    run.sparsifier.on_phase(lambda event, phase: heard.append((event, phase.index)))
    run.load(saved)
    assert heard == []
    run.train(2)
    assert heard == [("leave", 1), ("enter", 2)]


def test_step_done_counts_where_no_hook_fires():
    """As in a replayed CUDA graph: weights change, but no Python of the optimizer runs."""
    run = Run.new()
    for step in range(SCHEDULE.total_steps):
        run.sparsifier.begin_step()
        with torch.no_grad():
            for weight in run.weights.values():
                weight.add_(0.01)
        run.sparsifier.step_done()
        assert run.sparsifier.steps == step + 1
        assert nonzeros(run) <= 443 - round(run.phase.sparsity * 443)
    assert run.sparsifier.phase_ends


def test_step_done_can_say_that_the_update_was_skipped():
    sparsifier = Run.new().sparsifier
    sparsifier.begin_step()
    sparsifier.step_done(skipped=True)
    assert sparsifier.steps == 0
    sparsifier.begin_step()
    sparsifier.step_done()
    assert sparsifier.steps == 1


def test_step_done_is_refused_after_a_hook_has_counted_and_without_begin_step():
    run = Run.new()
    with pytest.raises(UsageError, match=r"needs begin_step\(\) before it"):
        run.sparsifier.step_done()
    run.step()
    with pytest.raises(UsageError, match="that no hook has counted"):
        run.sparsifier.step_done()
    assert run.sparsifier.steps == 1


def test_detach_leaves_the_optimizer_as_it_was():
    run = Run.new().train(3)
    optimizer = run.optimizers[0]
    run.sparsifier.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    before = nonzeros(run)
    nn.functional.cross_entropy(run.model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    assert nonzeros(run) > before
    assert run.sparsifier.steps == 3
    with pytest.raises(UsageError, match=r"begin_step\(\) was called after detach\(\)"):
        run.sparsifier.begin_step()
    st.Sparsifier(acdc(), run.model, optimizer)  # and a new one can be attached


def test_several_optimizers_are_counted_by_the_last_one():
    def three(model):
        return [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 4, 6)]

    run = Run.new(make_optimizers=three)
    for optimizer in run.optimizers:
        optimizer.add_param_group({"params": list(network(1)[1].parameters())})  # of no target
    for step in range(SCHEDULE.total_steps):
        run.backward()
        for i, optimizer in enumerate(run.optimizers):
            assert run.sparsifier.steps == step
            optimizer.step()
            assert run.sparsifier.steps == step + (i == 2)
            optimizer.zero_grad()


def test_optimizers_that_step_in_another_order_are_told_so():
    run = Run.new(make_optimizers=lambda model: [sgd(model[:4]), sgd(model[4:])])
    run.backward()
    run.optimizers[1].step()
    with pytest.raises(UsageError, match="of several optimizers the last one given has to step last"):
        run.optimizers[0].step()


def test_a_phase_that_cannot_be_entered_is_tried_again_and_not_passed_over():
    run = Run.new().train(2)
    with torch.no_grad():
        run.weights["4.weight"][0, 0] = float("nan")
    for _ in range(2):
        with pytest.raises(SelectionError, match=r"4\.weight"):
            run.sparsifier.begin_step()
    with torch.no_grad():
        run.weights["4.weight"][0, 0] = 0.0
    run.sparsifier.begin_step()
    assert run.phase.index == 1


def test_thin_layers_are_warned_of_by_name():
    run = Run.new(acdc(st.schedules.phases([(1, 0.0), (1, 0.97)]))).train(1)
    with torch.no_grad():
        run.weights["6.weight"].mul_(1e-3)
    with pytest.warns(
        SparsityWarning, match=r"fewer weights than they have outputs: .*6\.weight \(1 for 4\)"
    ) as caught:
        run.sparsifier.begin_step()
    assert caught[0].filename == __file__
    assert run.sparsifier.masks["6.weight"].sum() == 1


def test_a_warning_made_an_error_leaves_the_phase_entered():
    run = Run.new(acdc(st.schedules.phases([(1, 0.0), (1, 0.97)]))).train(1)
    with torch.no_grad():
        run.weights["6.weight"].mul_(1e-3)
    heard = []
    run.sparsifier.on_phase(lambda event, phase: heard.append(event))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SparsityWarning):
            run.sparsifier.begin_step()
        run.step()
    assert heard == ["leave", "enter"]
    assert run.sparsifier.steps == 2
