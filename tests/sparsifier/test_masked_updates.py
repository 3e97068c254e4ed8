"""Pruned weights are exactly zero after every update, whatever optimizer and loop make it."""

import pytest
import torch
from small_runs import Run, acdc, assert_pruned_are_exact_zeros, assert_same_bits, batch, bits, network, nonzeros, sgd
from torch import nn

import sparsetwin as st

SPARSE_AT_ONCE = st.schedules.phases([(6, 0.8)])


def of(kind, **options):
    return lambda model: kind(model.parameters(), **options)


def muon_and_adamw(model):
    """Muon takes matrices only, so two optimizers share the model."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS = {
    "sgd": of(SGD, lr=0.1),
    "sgd-momentum": of(SGD, lr=0.1, momentum=0.9),
    "sgd-nesterov-decay": of(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-dampening": of(SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "sgd-maximize": of(SGD, lr=0.001, momentum=0.9, maximize=True),
    "sgd-foreach": of(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": of(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": of(ADAM, lr=0.01, weight_decay=0.1),
    "adam-amsgrad": of(ADAM, lr=0.01, amsgrad=True),
    "adam-foreach": of(ADAM, lr=0.01, foreach=True),
    "adam-fused": of(ADAM, lr=0.01, fused=True),
    "adamw": of(ADAMW, lr=0.01, weight_decay=0.1),
    "adamw-amsgrad-foreach": of(ADAMW, lr=0.01, amsgrad=True, foreach=True),
    "adamw-fused": of(ADAMW, lr=0.01, fused=True),
    "adagrad": of(torch.optim.Adagrad, lr=0.1),
    "adagrad-fused": of(torch.optim.Adagrad, lr=0.1, fused=True),
    "rmsprop": of(torch.optim.RMSprop, lr=0.001, momentum=0.9, centered=True),
    "nadam": of(torch.optim.NAdam, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": of(torch.optim.RAdam, lr=0.01),
    "adadelta": of(torch.optim.Adadelta),
    "muon-and-adamw": muon_and_adamw,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_exact_zeros_after_every_step(name):
    run = Run.new(make_optimizers=OPTIMIZERS[name])
    for _ in range(run.sparsifier.method.schedule.total_steps):
        before = nonzeros(run)
        run.step()
        assert_pruned_are_exact_zeros(run)
        assert all(bool(weight.isfinite().all()) for weight in run.weights.values())
        if run.phase.is_sparse:
            kept = sum(int(mask.sum()) for mask in run.sparsifier.masks.values())
            assert nonzeros(run) <= kept == 443 - round(run.phase.sparsity * 443)
        elif run.phase.index > 0 and run.sparsifier.steps == run.phase.start + 1:
            assert nonzeros(run) > before  # weights come back


@pytest.mark.parametrize("name", ["sgd-nesterov-decay", "adamw-fused", "muon-and-adamw"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_both_kinds_of_zero_grad_give_the_same_bits(name, set_to_none):
    run, plain = (Run.new(make_optimizers=OPTIMIZERS[name]) for _ in range(2))
    for _ in range(run.sparsifier.method.schedule.total_steps):
        plain.step()
        run.backward()
        for optimizer in run.optimizers:
            optimizer.step()
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        assert_pruned_are_exact_zeros(run)
    assert_same_bits(bits(run), bits(plain))


@pytest.mark.parametrize("name", ["sgd-nesterov-decay", "adam", "adamw-fused", "muon-and-adamw"])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_closure_gives_the_same_bits_as_a_plain_loop(name, by_keyword):
    run, plain = (Run.new(make_optimizers=OPTIMIZERS[name]) for _ in range(2))
    for _ in range(run.sparsifier.method.schedule.total_steps):
        plain.step()
        run.sparsifier.begin_step()
        *others, last = run.optimizers

        inputs, labels = batch(run.sparsifier.steps)

        def closure(others=others, inputs=inputs, labels=labels):
            loss = nn.functional.cross_entropy(run.model(inputs), labels)
            loss.backward()
            for optimizer in others:  # they need the same gradients
                optimizer.step()
            return loss

        loss = last.step(closure=closure) if by_keyword else last.step(closure)
        assert loss.item() > 0
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        assert_pruned_are_exact_zeros(run)
    assert_same_bits(bits(run), bits(plain))


def test_a_closure_may_begin_the_step_itself():
    run, plain = Run.new(), Run.new().train(4)
    for _ in range(4):
        run.optimizers[0].step(lambda: run.backward())
        run.optimizers[0].zero_grad()
    assert_same_bits(bits(run), bits(plain))


@pytest.mark.parametrize("use_closure", [False, True])
def test_gradients_are_masked_before_the_update_and_after_a_closure(use_closure):
    run = Run.new(acdc(SPARSE_AT_ONCE))
    if use_closure:
        run.optimizers[0].step(lambda: run.backward())
    else:
        run.backward()
        assert any(bool(run.weights[name].grad[~mask].any()) for name, mask in run.sparsifier.masks.items())
        run.optimizers[0].step()
    for name, mask in run.sparsifier.masks.items():
        assert not run.weights[name].grad[~mask].any()
        assert run.weights[name].grad[mask].any()


def test_masked_momentum_of_pruned_weights_stays_zero():
    run = Run.new(acdc(SPARSE_AT_ONCE)).train(5)
    for name, mask in run.sparsifier.masks.items():
        momentum = run.optimizers[0].state[run.weights[name]]["momentum_buffer"]
        assert not momentum[~mask].any()
        assert momentum[mask].any()


def test_accumulated_gradients_make_one_step():
    run, plain = Run.new(), Run.new()
    for step in range(8):
        inputs, labels = batch(step)
        for part in range(3):
            run.sparsifier.begin_step()  # before every forward pass is fine too
            logits = run.model(inputs)
            (nn.functional.cross_entropy(logits, labels) / (2 if part else 1)).backward()
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        assert run.sparsifier.steps == step + 1
        assert_pruned_are_exact_zeros(run)
        plain.step()
    assert [run.phase, run.sparsifier.phase_ends] == [plain.phase, plain.sparsifier.phase_ends]


def test_mask_gradients_makes_the_norm_that_of_kept_weights():
    run = Run.new(acdc(SPARSE_AT_ONCE))
    run.backward()
    unmasked = nn.utils.get_total_norm([parameter.grad for parameter in run.model.parameters()])
    kept = [weight.grad[run.sparsifier.masks[name]] for name, weight in run.weights.items()]
    others = [p.grad.clone() for name, p in run.model.named_parameters() if name not in run.sparsifier.target_names]
    run.sparsifier.mask_gradients()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
    torch.testing.assert_close(norm, nn.utils.get_total_norm([*kept, *others]))
    assert norm < 0.9 * unmasked
    run.optimizers[0].step()
    assert_pruned_are_exact_zeros(run)


def test_mask_gradients_does_nothing_in_a_dense_phase():
    run = Run.new()
    run.backward()
    before = {name: weight.grad.clone() for name, weight in run.weights.items()}
    run.sparsifier.mask_gradients()
    assert all(torch.equal(weight.grad, before[name]) for name, weight in run.weights.items())


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_learning_rate_schedulers_work_as_without_us(name):
    run, bare = Run.new(make_optimizers=OPTIMIZERS[name]), OPTIMIZERS[name](network())
    schedulers = [
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
            ],
            milestones=[3],
        )
        for optimizer in (run.optimizers[0], bare)
    ]
    for _ in range(12):
        run.step()
        bare.step()
        for scheduler in schedulers:
            scheduler.step()  # warns, which is an error here, if it saw no optimizer step
        assert run.optimizers[0].param_groups[0]["lr"] == bare.param_groups[0]["lr"]
        assert_pruned_are_exact_zeros(run)


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-fused", "muon-and-adamw"])
def test_a_target_without_gradient_is_pruned_all_the_same(name):
    run = Run.new(make_optimizers=OPTIMIZERS[name])
    for _ in range(run.sparsifier.method.schedule.total_steps):
        run.backward()
        run.weights["4.weight"].grad = None
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_pruned_are_exact_zeros(run)
    assert bool(run.weights["4.weight"].any())


def test_not_finite_gradients_of_pruned_weights_do_no_harm():
    run = Run.new(acdc(SPARSE_AT_ONCE), make_optimizers=OPTIMIZERS["sgd-momentum"])
    run.backward()
    for name, mask in run.sparsifier.masks.items():
        run.weights[name].grad[~mask] = torch.tensor([float("nan"), float("inf")]).repeat(mask.numel())[: (~mask).sum()]
    run.optimizers[0].step()
    assert_pruned_are_exact_zeros(run)
    assert all(bool(weight.isfinite().all()) for weight in run.weights.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_float_dtype_are_pruned_exactly(dtype):
    run = Run.new(acdc(SPARSE_AT_ONCE), model=network().to(dtype))
    for step in range(4):
        run.sparsifier.begin_step()
        inputs, labels = batch(step)
        nn.functional.cross_entropy(run.model(inputs.to(dtype)).float(), labels).backward()
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        for name, mask in run.sparsifier.masks.items():
            assert not run.weights[name][~mask].any()
        assert sum(int(mask.sum()) for mask in run.sparsifier.masks.values()) == 89


def test_channels_last_weights_get_the_same_masks():
    plain, channels_last = Run.new(), Run.new(model=network().to(memory_format=torch.channels_last))
    for run in (plain, channels_last):
        run.train(3)
    for name, mask in plain.sparsifier.masks.items():
        assert torch.equal(channels_last.sparsifier.masks[name], mask)
    assert_pruned_are_exact_zeros(channels_last)


class DecayedSGD(torch.optim.SGD):
    """A ``step`` around its base class's: torch fires the hooks of both."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99).add_(0.001)  # would bring pruned weights back
        return loss


def test_an_optimizer_that_calls_the_step_of_its_base_class_counts_once():
    sgd(network())  # torch patches the base class's step when an object of it is made
    run = Run.new(make_optimizers=lambda model: DecayedSGD(model.parameters(), lr=0.1))
    for step in range(6):
        run.step()
        assert run.sparsifier.steps == step + 1
        assert_pruned_are_exact_zeros(run)


@pytest.mark.parametrize("method", [acdc, st.GMP], ids=["acdc", "gmp"])
def test_every_optimizer_gets_masked_gradients_where_each_has_a_backward_of_its_own(method):
    """As generator and discriminator have it: the second one's gradients do not exist when the first one steps."""

    def two(model):
        return [ADAM(model[:4].parameters(), lr=0.01), ADAM(model[4:].parameters(), lr=0.01)]

    run = Run.new(method(schedule=SPARSE_AT_ONCE), make_optimizers=two)
    for step in range(3):
        run.sparsifier.begin_step()
        for optimizer in run.optimizers:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run.model(batch(step)[0]), batch(step)[1])
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            loss.backward(inputs=held)
            optimizer.step()
        assert_pruned_are_exact_zeros(run)
    for name, mask in run.sparsifier.masks.items():
        optimizer = run.optimizers[0 if name.startswith("0.") else 1]
        moments = optimizer.state[run.weights[name]]["exp_avg"]
        assert not moments[~mask].any(), name
        assert moments[mask].any()
