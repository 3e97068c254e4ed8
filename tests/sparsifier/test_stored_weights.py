"""Methods whose parameters hold effective weights: what evaluation, saving, clipping, scalers and averages see."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from small_runs import (
    SIZES,
    TARGETS,
    Run,
    assert_pruned_are_exact_zeros,
    assert_same_bits,
    batch,
    bits,
    loss_of,
    network,
    read,
    sgd,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsetwin as st
from sparsetwin.errors import StateError, UsageError
from sparsetwin.methods import Method, SparseState
from sparsetwin.schedules import Phase

SCHEDULE = st.schedules.phases([(2, 0.0), (3, 0.5), (2, 0.0), (3, 0.5)])
METHODS = {
    "topkast": lambda: st.TopKAST(schedule=SCHEDULE, exploration=0.01),
    "str": lambda: st.STR(schedule=SCHEDULE, initial=-3.0),
    "st3": lambda: st.ST3(schedule=SCHEDULE),
}


@dataclass(frozen=True, kw_only=True)
class Halved(Method):
    """Compute with half of the larger weights, and update all of the first target and the kept ones of the others."""

    stores_weights: ClassVar[bool] = True
    fails: bool = False

    def enter(self, phase: Phase, state: SparseState) -> dict[str, Tensor]:
        if self.fails and phase.index:
            raise ValueError("no masks today")
        if not phase.is_sparse:
            return {}
        state.buffers["half"] = {n: torch.full([1] * w.ndim, 0.5) for n, w in state.weights.items()}
        return {n: w.abs() >= w.abs().median() for n, w in state.weights.items()}

    def gradient_masks(self, state: SparseState) -> dict[str, Tensor]:
        return {name: mask for name, mask in state.masks.items() if name != TARGETS[0]}

    def project(self, name: str, state: SparseState) -> Tensor:
        return torch.where(state.masks[name], state.weights[name] * state.buffers["half"][name], 0)


def stored(run: Run) -> dict[str, Tensor]:
    return run.sparsifier.state_dict()["buffers"].get("stored", {})


def effective(run: Run) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in run.weights.items()}


def two_optimizers(model):
    return [sgd(model[:5]), sgd(model[5:])]


def test_dense_phases_store_nothing_and_sparse_ones_go_on_from_the_stored_weights():
    run = Run.new(Halved(schedule=SCHEDULE))
    for _ in range(10):
        before = stored(run) or effective(run)
        before = {name: weight.clone() for name, weight in before.items()}
        run.sparsifier.begin_step()
        seen = effective(run)
        masks = run.sparsifier.masks
        for name, weight in before.items():  # whether the phase is new or not
            expected = torch.where(masks[name], weight / 2, 0) if masks else weight
            assert torch.equal(seen[name], expected)
        run.backward()
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        assert set(stored(run)) == (set(TARGETS) if run.phase.is_sparse else set())
        for name, weight in stored(run).items():
            assert torch.equal(effective(run)[name], torch.where(masks[name], weight / 2, 0))


def test_the_optimizer_updates_stored_weights_by_the_gradients_of_effective_ones():
    run = Run.new(Halved(schedule=SCHEDULE), make_optimizers=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    run.train(2)
    for _ in range(3):
        before = stored(run) or effective(run)
        before = {name: weight.clone() for name, weight in before.items()}
        run.backward()
        gradients = {name: weight.grad.clone() for name, weight in run.weights.items()}
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        for name, weight in stored(run).items():
            seen = run.sparsifier.masks[name] | (name == TARGETS[0])
            torch.testing.assert_close(weight, before[name] - 0.1 * torch.where(seen, gradients[name], 0))
            assert torch.equal(weight[~seen], before[name][~seen])


@pytest.mark.parametrize("method", METHODS)
def test_several_optimizers_give_the_bits_of_one(method):
    one = Run.new(METHODS[method]())
    several = Run.new(METHODS[method](), make_optimizers=two_optimizers)
    for _ in range(10):
        one.step()
        several.step()
        for found, expected in zip(several.model.parameters(), one.model.parameters(), strict=True):
            assert torch.equal(found, expected)
        assert_same_bits(stored(several), stored(one))
    assert one.sparsifier.steps == several.sparsifier.steps == 10


class Scaled:
    """A run with a GradScaler, some of whose backward passes overflow."""

    def __init__(self, method: Method, make_optimizers, *, clips: bool = False, enabled: bool = True):
        self.run = Run.new(method, make_optimizers=make_optimizers)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6, enabled=enabled)
        self.clips = clips

    def attempt(self, *, overflows: str | None = None) -> None:
        run = self.run
        run.sparsifier.begin_step()
        inputs, labels = batch(run.sparsifier.steps)
        run.model.eval()  # batch norm would count skipped steps, too
        self.scaler.scale(nn.functional.cross_entropy(run.model(inputs), labels)).backward()
        if overflows:
            run.weights[overflows].grad.fill_(torch.inf)
        if self.clips:
            for optimizer in run.optimizers:
                self.scaler.unscale_(optimizer)
            run.sparsifier.mask_gradients()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in run.optimizers:
            optimizer.zero_grad()


SCALED_OPTIMIZERS = {
    "sgd": sgd,
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("optimizer", SCALED_OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_and_the_steps_that_it_skips_leave_no_trace(method, optimizer, clips):
    """A scale of a power of two rounds nothing, so that not even rules that read gradients see it."""
    plain = Scaled(METHODS[method](), SCALED_OPTIMIZERS[optimizer], clips=clips, enabled=False)
    scaled = Scaled(METHODS[method](), SCALED_OPTIMIZERS[optimizer], clips=clips)
    for _ in range(10):
        plain.attempt()
    for attempt in range(14):
        before = stored(scaled.run), effective(scaled.run), scaled.run.phase
        overflows = attempt in (1, 3, 6, 12)
        scaled.attempt(overflows="4.weight" if overflows else None)
        if overflows and scaled.run.phase == before[2]:
            assert_same_bits(stored(scaled.run), before[0])
            assert_same_bits(effective(scaled.run), before[1])
        assert_pruned_are_exact_zeros(scaled.run)
    assert scaled.run.sparsifier.steps == plain.run.sparsifier.steps == 10
    found, expected = bits(scaled.run), bits(plain.run)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_an_update_that_a_scaler_cuts_in_half_is_settled_when_the_next_step_begins(method):
    """The first optimizer updates, the second one's gradients have overflowed: the step does not count."""
    trial = Scaled(METHODS[method](), two_optimizers)
    for _ in range(3):
        trial.attempt()
    before = {name: weight.clone() for name, weight in stored(trial.run).items()}
    trial.attempt(overflows="6.weight")
    run = trial.run
    assert run.sparsifier.steps == 3
    run.sparsifier.begin_step()
    assert_pruned_are_exact_zeros(run)
    after = stored(run)
    assert not torch.equal(after["4.weight"], before["4.weight"])
    assert torch.equal(after["6.weight"], before["6.weight"])
    if method == "topkast":
        outside = ~run.sparsifier.state_dict()["buffers"]["updated"]["4.weight"]
        assert torch.equal(run.weights["4.weight"][run.sparsifier.masks["4.weight"]] != 0, torch.ones(192) > 0)
        assert (after["4.weight"] == before["4.weight"])[outside].float().mean() > 0.9
    settled = effective(run)
    run.sparsifier.begin_step()  # again: nothing more to settle
    assert_same_bits(effective(run), settled)
    trial.attempt()
    assert run.sparsifier.steps == 4
    assert_pruned_are_exact_zeros(run)


@pytest.mark.parametrize("method", METHODS)
def test_an_average_of_torch_averages_what_the_network_computes_with(method):
    run = Run.new(METHODS[method]())
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for _ in range(10):
        run.step()
        average.update_parameters(run.model)
        now = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
        expected = {n: w.clone() for n, w in now.items()} if expected is None else expected
        expected = {name: value.lerp(now[name], 0.5) for name, value in expected.items()}
    assert average.module.state_dict().keys() == network().state_dict().keys()
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_the_model_and_a_half_of_the_pair_are_what_the_network_computes_with(method, tmp_path):
    run = Run.new(METHODS[method]()).train(4)
    inputs, _ = batch(50)
    run.model.eval()
    expected = run.model(inputs)
    pair = st.Pair(tmp_path)
    pair.save(run.model, run.sparsifier)
    assert torch.equal(copy.deepcopy(run.model)(inputs), expected)
    assert torch.equal(pair.sparse(network()).eval()(inputs), expected)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_sees_the_gradients_that_the_optimizer_does(method):
    run = Run.new(METHODS[method]()).train(3)
    run.backward()
    buffers = run.sparsifier.state_dict()["buffers"]
    seen = {
        "topkast": buffers.get("updated"),
        "str": run.sparsifier.masks,
        "st3": {name: torch.ones_like(mask) for name, mask in run.sparsifier.masks.items()},
    }[method]
    expected = {name: torch.where(seen[name], weight.grad, 0) for name, weight in run.weights.items()}
    whole = [gradient.norm() for gradient in expected.values()]
    others = [p.grad.norm() for n, p in run.model.named_parameters() if n not in run.weights]
    run.sparsifier.mask_gradients()
    assert all(torch.equal(run.weights[name].grad, gradient) for name, gradient in expected.items())
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1e9)
    torch.testing.assert_close(norm, torch.stack([*whole, *others]).norm())
    before = {name: gradient.clone() for name, gradient in expected.items()}
    run.optimizers[0].step()
    if method != "topkast":  # which adds its penalty after clipping, as weight decay is added
        assert all(torch.equal(run.weights[name].grad, gradient) for name, gradient in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_gradients_are_those_of_effective_weights(method):
    run = Run.new(METHODS[method]()).train(3)
    run.sparsifier.begin_step()
    before = effective(run)
    for step in (30, 31):
        run.sparsifier.begin_step()
        loss_of(run.model, step).backward()
        assert_same_bits(effective(run), before)
    run.optimizers[0].step()
    assert run.sparsifier.steps == 4


def test_what_a_method_learns_is_a_group_of_the_last_optimizer():
    run = Run.new(st.STR(schedule=SCHEDULE, threshold_decay=0.25), make_optimizers=two_optimizers)
    first, last = run.optimizers
    assert len(first.param_groups) == 1
    group = last.param_groups[1]
    assert (group["weight_decay"], group["lr"], [p.shape for p in group["params"]]) == (0.25, 0.1, [torch.Size()] * 3)
    assert not any(p is q for p in group["params"] for q in run.model.parameters())
    torch.optim.lr_scheduler.ConstantLR(last, factor=0.5)
    assert group["lr"] == 0.05


@pytest.mark.parametrize("what", ["stored", "half"])
def test_state_without_its_stored_weights_or_of_another_shape_is_refused(what):
    run = Run.new(Halved(schedule=SCHEDULE)).train(3)
    saved = read(run.saved())
    fresh = Run.new(Halved(schedule=SCHEDULE), seed=7)
    fresh.model.load_state_dict(saved["model"])
    state = saved["sparsifier"]
    assert state["buffers"]["half"]["0.weight"].shape == (1, 1, 1, 1)
    if what == "stored":
        del state["buffers"]["stored"]["4.weight"]
        message = "masks of 3 targets and stored weights of others"
    else:
        state["buffers"]["half"]["4.weight"] = torch.ones(2, 1)
        message = r"the saved half of 4\.weight has shape \(2, 1\), the weight \(8, 48\)"
    with pytest.raises(StateError, match=message):
        fresh.sparsifier.load_state_dict(state)
    assert fresh.sparsifier.steps == 0


@pytest.mark.parametrize("steps", range(11))
def test_a_run_of_an_own_method_resumes_with_the_same_bits(steps):
    run = Run.new(Halved(schedule=SCHEDULE)).train(steps)
    resumed = Run.new(Halved(schedule=SCHEDULE), seed=7).load(run.saved())
    assert_same_bits(bits(resumed.train(10 - steps)), bits(run.train(10 - steps)))
    assert_same_bits(stored(resumed), stored(run))


@pytest.mark.parametrize("steps", [0, 2, 3, 5, 6, 10])
@pytest.mark.parametrize("method", METHODS)
def test_a_loader_that_fills_existing_tensors_finds_all_of_them(method, steps):
    run = Run.new(METHODS[method]()).train(steps)
    saved, state = read(run.saved()), {}
    fresh = Run.new(METHODS[method](), seed=7)
    fresh.model.load_state_dict(saved["model"])
    fresh.optimizers[0].load_state_dict(saved["optimizers"][0])
    fresh.sparsifier.prepare_load(steps)
    state = fresh.sparsifier.state_dict()
    for what in ("masks", "learned"):
        assert state.get(what, {}).keys() == saved["sparsifier"].get(what, {}).keys()
        for name, tensor in state.get(what, {}).items():
            tensor.copy_(saved["sparsifier"][what][name])
    assert state["buffers"].keys() == saved["sparsifier"]["buffers"].keys()
    for what, tensors in state["buffers"].items():
        for name, tensor in tensors.items():
            tensor.copy_(saved["sparsifier"]["buffers"][what][name])
    fresh.sparsifier.load_state_dict(state)
    assert_same_bits(bits(fresh.train(10 - steps)), bits(run.train(10 - steps)))


def test_a_phase_that_cannot_be_entered_leaves_the_effective_weights():
    schedule = st.schedules.phases([(2, 0.5), (2, 0.5)])
    run = Run.new(Halved(schedule=schedule, fails=True)).train(2)
    before, kept = effective(run), {name: weight.clone() for name, weight in stored(run).items()}
    with pytest.raises(ValueError, match="no masks today"):
        run.sparsifier.begin_step()
    assert_same_bits(effective(run), before)
    assert_same_bits(stored(run), kept)


def test_a_replayed_step_is_refused():
    run = Run.new(Halved(schedule=SCHEDULE))
    run.sparsifier.begin_step()
    with pytest.raises(UsageError, match="Halved works on each step in Python and cannot be replayed"):
        run.sparsifier.step_done()


def test_detaching_leaves_what_the_network_computes_with():
    run = Run.new(Halved(schedule=SCHEDULE)).train(4)
    before = effective(run)
    run.sparsifier.detach()
    assert_same_bits(effective(run), before)
    assert sum(int(weight.count_nonzero()) for weight in run.weights.values()) <= sum(SIZES.values()) // 2 + 3


def test_packed_gradients_are_refused_where_more_than_kept_ones_are_needed(tmp_path):
    from sparsetwin.integrations.ddp import pack_gradients

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for method, refused in ((METHODS["topkast"](), True), (METHODS["st3"](), True), (METHODS["str"](), False)):
            run = Run.new(method, model=nn.parallel.DistributedDataParallel(network()))
            if refused:
                with pytest.raises(UsageError, match="needs the gradients of pruned weights"):
                    pack_gradients(run.model, run.sparsifier)
            else:
                pack_gradients(run.model, run.sparsifier)
                expected = Run.new(METHODS["str"]()).train(10)
                for found, parameter in zip(run.train(10).model.parameters(), expected.model.parameters(), strict=True):
                    assert torch.equal(found, parameter)
    finally:
        torch.distributed.destroy_process_group()
