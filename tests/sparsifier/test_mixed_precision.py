"""Autocast and GradScaler: skipped updates do not count, whether or not torch calls the optimizer for them."""

import pytest
import torch
from small_runs import Run, acdc, assert_pruned_are_exact_zeros, assert_same_bits, batch, bits
from torch import nn

import sparsetwin as st

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
