"""Autocast and GradScaler: skipped updates do not count, whether or not torch calls the optimizer for them."""

import pytest
import torch
from small_runs import Run, acdc, assert_pruned_are_exact_zeros, assert_same_bits, batch, bits
from torch import nn

import sparsetwin as st
from sparsetwin.errors import SelectionError

SCHEDULE = st.schedules.phases([(2, 0.0), (2, 0.8), (2, 0.0), (2, 0.8)])
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "sgd-fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}


class Scaled:
    """A run with a GradScaler, some of whose backward passes overflow."""

    def __init__(self, optimizer: str, *, method=None, dtype=None, clips=False, enabled=True):
        self.run = Run.new(method or acdc(SCHEDULE), make_optimizers=OPTIMIZERS[optimizer])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6, enabled=enabled)
        self.dtype, self.clips = dtype, clips

    def attempt(self, *, overflows: bool = False) -> None:
        run, optimizer = self.run, self.run.optimizers[0]
        run.sparsifier.begin_step()
        inputs, labels = batch(run.sparsifier.steps)
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            loss = nn.functional.cross_entropy(run.model(inputs).float(), labels)
        self.scaler.scale(loss).backward()
        if overflows:
            run.weights["4.weight"].grad[0, 0] = float("inf")
        if self.clips:
            self.scaler.unscale_(optimizer)
            run.sparsifier.mask_gradients()
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipped_steps_do_not_count(optimizer, clips):
    scaled = Scaled(optimizer, clips=clips)
    sparsifier, done = scaled.run.sparsifier, 0
    overflowing = {0, 2, 3, 5, 8, 9, 12}  # the first step, first and last steps of phases, two in a row
    if optimizer == "sgd-fused":  # torch leaves its momentum uninitialised if its first step of all is skipped
        overflowing -= {0}
    for attempt in range(8 + len(overflowing)):
        before = bits(scaled.run)
        ended = sparsifier.phase_ends
        scaled.attempt(overflows=attempt in overflowing)
        done += attempt not in overflowing
        assert sparsifier.steps == done
        if attempt in overflowing:
            assert not sparsifier.phase_ends
            if not ended:  # otherwise the attempt entered a phase, and that has its effect
                after = bits(scaled.run)
                kept = [n for n in before if n.startswith(("model.0.weight", "model.4", "model.6"))]
                assert_same_bits({n: after[n] for n in kept}, {n: before[n] for n in kept})
        else:
            assert sparsifier.phase_ends == (done in (2, 4, 6, 8))
        assert_pruned_are_exact_zeros(scaled.run)
    assert done == 8
    assert sparsifier.phase.index == 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipped_steps_leave_no_trace_in_the_weights(optimizer):
    """Batch norm counts forward passes, so only what the optimizer moves is compared."""
    overflowing, plain = Scaled(optimizer), Scaled(optimizer)
    for attempt in range(11):
        overflowing.attempt(overflows=attempt in (1, 4, 7))
    for _ in range(8):
        plain.attempt()
    assert overflowing.run.sparsifier.steps == plain.run.sparsifier.steps == 8
    for name, weight in plain.run.weights.items():
        assert torch.equal(overflowing.run.weights[name], weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused"])
def test_autocast_keeps_pruned_weights_at_zero(optimizer, dtype):
    scaled = Scaled(optimizer, dtype=dtype, clips=True, enabled=dtype == torch.float16)
    while scaled.run.sparsifier.steps < 8:
        scaled.attempt()
        assert_pruned_are_exact_zeros(scaled.run)
        if scaled.run.phase.is_sparse:
            assert sum(int(mask.sum()) for mask in scaled.run.sparsifier.masks.values()) == 89
    assert all(weight.dtype == torch.float32 for weight in scaled.run.weights.values())


@pytest.mark.parametrize("fused", [False, True])
def test_of_several_optimizers_the_last_one_is_counted_when_steps_are_skipped(fused):
    def two(model):
        options = {"lr": 0.1, "fused": fused}
        return [torch.optim.SGD(model[:4].parameters(), **options), torch.optim.SGD(model[4:].parameters(), **options)]

    run = Run.new(acdc(SCHEDULE), make_optimizers=two)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for overflowing, counted in (("4.weight", 0), ("0.weight", 1), (None, 2), ("6.weight", 2)):
        run.sparsifier.begin_step()
        inputs, labels = batch(0)
        scaler.scale(nn.functional.cross_entropy(run.model(inputs), labels)).backward()
        if overflowing:
            run.weights[overflowing].grad.fill_(float("nan"))
        for optimizer in run.optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        assert run.sparsifier.steps == counted
        assert_pruned_are_exact_zeros(run)


PERIODIC = st.schedules.periodic(sparsity=0.8, total_steps=8, every_steps=2)
CHOOSING = {  # each has a phase that is entered between the backward and the update of step 0, 2 or 4
    "snip": st.SNIP(schedule=st.schedules.constant(sparsity=0.8, total_steps=8)),
    "rigl": st.RigL(schedule=PERIODIC),
    "granet": st.GraNet(schedule=st.schedules.phases([(2, 0.0), (2, 0.5), (4, 0.8)])),
    "acdc": acdc(SCHEDULE, score="sensitivity"),
}


class ScaledTwo:
    """A run with two optimizers and a GradScaler, in whose order each is unscaled before the first one steps."""

    def __init__(self, method, *, kind=torch.optim.SGD, fused=False):
        options = {"lr": 0.05, "fused": fused}
        self.run = Run.new(
            method,
            make_optimizers=lambda m: [kind(m[:4].parameters(), **options), kind(m[4:].parameters(), **options)],
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)

    def attempt(self, *, overflowing: str | None = None, masks: bool = False) -> None:
        run = self.run
        run.sparsifier.begin_step()
        inputs, labels = batch(run.sparsifier.steps)
        self.scaler.scale(nn.functional.cross_entropy(run.model(inputs), labels)).backward()
        if overflowing:
            run.weights[overflowing].grad.view(-1)[:2] = torch.tensor([float("inf"), float("nan")])
        for optimizer in run.optimizers:
            self.scaler.unscale_(optimizer)
        if masks:
            run.sparsifier.mask_gradients()
        for optimizer in run.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in run.optimizers:
            optimizer.zero_grad()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflowing", ["0.weight", "6.weight"])  # of the first optimizer, and of the last one
@pytest.mark.parametrize("name", CHOOSING)
def test_a_choice_by_gradients_waits_until_those_of_all_optimizers_are_finite(name, overflowing, fused, masks):
    scaled, plain = (ScaledTwo(CHOOSING[name], kind=torch.optim.Adam, fused=fused) for _ in range(2))
    sparsifier, waited = scaled.run.sparsifier, 0
    for step in range(8):
        sparsifier.begin_step()
        if sparsifier.awaits_gradients:
            before, phase = bits(scaled.run), sparsifier.phase
            scaled.attempt(overflowing=overflowing, masks=masks)
            before = {n: tensor for n, tensor in before.items() if not n.startswith("model.1.")}  # batch norm counts
            after = bits(scaled.run)
            assert_same_bits({n: after[n] for n in before}, before, context=f"after step {step}")
            assert (sparsifier.steps, sparsifier.phase, sparsifier.awaits_gradients) == (step, phase, True)
            waited += 1
        scaled.attempt(masks=masks)
        plain.attempt(masks=masks)
        assert sparsifier.steps == step + 1
        for target, mask in plain.run.sparsifier.masks.items():
            assert torch.equal(sparsifier.masks[target], mask), f"step {step}"
        for target, weight in plain.run.weights.items():
            assert torch.equal(scaled.run.weights[target], weight), f"step {step}"
    assert waited


@pytest.mark.parametrize("score", ["movement", "fisher"])
@pytest.mark.parametrize("overflowing", ["0.weight", "6.weight"])
def test_what_a_score_remembers_takes_in_no_gradient_of_a_skipped_update(overflowing, score):
    scaled = ScaledTwo(acdc(SCHEDULE, score=score, minimum_kept=8))
    scaled.attempt(overflowing=overflowing)  # as the first step of all, too: there is a memory, though nothing in it
    memory = {name: memory.clone() for name, memory in scaled.run.sparsifier.state_dict()["buffers"][score].items()}
    assert not any(bool(tensor.any()) for tensor in memory.values())
    while scaled.run.sparsifier.steps < 7:  # the scaler lets the last optimizer update if the first one overflows
        scaled.attempt(overflowing=overflowing)
        scaled.attempt()
        remembered = scaled.run.sparsifier.state_dict()["buffers"].get(score, {})
        assert all(bool(tensor.isfinite().all()) for tensor in remembered.values())
        assert_pruned_are_exact_zeros(scaled.run)


@pytest.mark.parametrize("overflowing", ["0.weight", "6.weight"])
def test_thresholds_learn_nothing_from_an_update_that_is_skipped_in_part(overflowing):
    scaled = ScaledTwo(st.STR(schedule=st.schedules.constant(sparsity=0.8, total_steps=8), initial=-5.0))
    learned = scaled.run.optimizers[-1].param_groups[-1]["params"]
    scaled.attempt()
    before = [value.detach().clone() for value in learned]
    scaled.attempt(overflowing=overflowing)
    assert all(map(torch.equal, learned, before))
    scaled.attempt()
    assert all(bool(value.isfinite()) for value in learned)
    assert not any(map(torch.equal, learned, before))


@pytest.mark.parametrize("wrong", ["0.weight", "6.weight"])
def test_gradients_that_are_not_finite_without_a_scaler_are_an_error_that_names_the_target(wrong):
    run = ScaledTwo(CHOOSING["snip"]).run
    run.backward()
    run.weights[wrong].grad.view(-1)[0] = float("nan")
    with pytest.raises(SelectionError, match=f"1 of the .* scores of {wrong} are NaN"):
        [optimizer.step() for optimizer in run.optimizers]
