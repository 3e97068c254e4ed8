"""What cannot be served is refused early and by name."""

import pytest
import torch
from small_runs import Run, acdc, assert_same_bits, bits, network, sgd
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ConfigError, SelectionError, TargetError, UsageError

needs_distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")


def test_a_target_that_no_optimizer_updates_is_refused():
    model = network()
    with pytest.raises(TargetError, match=r"4\.weight and 1 more targets: no given optimizer updates it"):
        st.Sparsifier(acdc(), model, sgd(model[0]))
    assert not sgd(model)._optimizer_step_pre_hooks


def test_a_target_that_two_optimizers_update_is_refused():
    model = network()
    optimizers = [sgd(model), torch.optim.AdamW(model[4:].parameters())]
    with pytest.raises(TargetError, match=r"4\.weight belongs to 2 optimizers \(SGD and AdamW\)"):
        st.Sparsifier(acdc(), model, optimizers)
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in optimizers)


def test_no_optimizer_and_one_given_twice_are_refused():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(UsageError, match="an empty sequence"):
        st.Sparsifier(acdc(), model, [])
    with pytest.raises(UsageError, match="one of them twice"):
        st.Sparsifier(acdc(), model, [optimizer, optimizer])
    with pytest.raises(UsageError, match=r"expected a torch\.optim\.Optimizer or a wrapper of one, got float"):
        st.Sparsifier(acdc(), model, 0.1)


def test_arguments_in_another_order_are_refused():
    model = network()
    with pytest.raises(UsageError, match="expected a method, a model and an optimizer in this order, got Sequential"):
        st.Sparsifier(model, acdc(), sgd(model))
    with pytest.raises(UsageError, match="got Schedule and Sequential first"):
        st.Sparsifier(acdc().schedule, model, sgd(model))


def test_a_second_sparsifier_for_the_same_weights_is_refused_until_the_first_is_detached():
    run = Run.new()
    with pytest.raises(UsageError, match=r"another Sparsifier serves 0\.weight already; detach\(\) it first"):
        st.Sparsifier(acdc(), run.model, run.optimizers)
    run.sparsifier.detach()
    st.Sparsifier(acdc(), run.model, run.optimizers)


def test_two_sparsifiers_may_share_an_optimizer_if_they_prune_different_weights():
    run = Run.new(targets=st.Targets(include=("0.weight",)))
    other = st.Sparsifier(
        acdc(st.schedules.phases([(3, 0.5)])), run.model, run.optimizers, targets=st.Targets(include=("4",))
    )
    for _ in range(3):
        other.begin_step()
        run.step()
    assert other.sparsity() == 0.5
    assert run.sparsifier.sparsity() == pytest.approx(0.8, abs=0.5 / 27)


def replaced(model):
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model[4].weight.requires_grad_(False), r"4\.weight is frozen"),
        (lambda model: model.append(nn.Linear(4, 4)), r"the targets changed after attaching: 7\.weight"),
        (lambda model: model.__setitem__(6, nn.Identity()), r"the targets changed after attaching: 6\.weight"),
        (replaced, r"4\.weight: no given optimizer updates it"),
    ],
)
def test_targets_changed_after_attaching_are_refused_when_a_phase_begins_and_on_loading(change, message):
    run = Run.new().train(2)
    state = run.sparsifier.state_dict()
    change(run.model)
    with pytest.raises(TargetError, match=message):
        run.sparsifier.begin_step()
    with pytest.raises(TargetError, match=message):
        run.sparsifier.load_state_dict(state)
    assert (run.phase.index, run.sparsifier.masks) == (0, {})


def test_too_high_a_sparsity_for_the_number_of_layers_is_refused_at_construction():
    schedule = st.schedules.phases([(2, 0.0), (2, 0.5), (2, 0.0), (2, 0.995)])  # the last keeps 2 of 443
    model = network()
    with pytest.raises(SelectionError, match="2 of 443 weights are too few for 3 layers"):
        st.Sparsifier(acdc(schedule), model, sgd(model))
    with pytest.raises(SelectionError, match="too few"):
        st.Sparsifier(acdc(minimum_kept=40), model, sgd(model))


def test_lbfgs_is_refused_by_name():
    model = network()
    with pytest.raises(UsageError, match="LBFGS"):
        st.Sparsifier(acdc(), model, torch.optim.LBFGS(model.parameters()))


class Forgetful(torch.optim.Optimizer):
    """Makes its state once and for all, so that it cannot be reset."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["average"] = torch.zeros_like(parameter)

    def step(self, closure=None): ...


def test_an_optimizer_that_could_not_be_reset_later_is_refused_at_construction():
    model = network()
    with pytest.raises(UsageError, match=r"Forgetful.*register_initial_state"):
        st.Sparsifier(acdc(), model, Forgetful(model.parameters()))
    st.Sparsifier(acdc(reset="none"), model, Forgetful(model.parameters()))
    never_dense_again = acdc(st.schedules.constant(sparsity=0.5, total_steps=2))
    other = network()
    st.Sparsifier(never_dense_again, other, Forgetful(other.parameters()))


@needs_distributed
@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
def test_optimizer_in_backward_is_refused_by_the_name_of_the_parameter():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = network()
    _apply_optimizer_in_backward(torch.optim.SGD, [model[4].weight], {"lr": 0.1})
    with pytest.raises(UsageError, match=r"4\.weight is updated during backward"):
        st.Sparsifier(acdc(), model, sgd(model))


def test_an_optimizer_stepped_by_gradient_hooks_is_refused_at_its_first_step():
    model = network()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    run = Run(model, list(optimizers.values()), st.Sparsifier(acdc(), model, list(optimizers.values())))
    with pytest.raises(UsageError, match=r"optimizer\.step\(\) was called during backward"):
        run.backward()
    assert run.sparsifier.steps == 0


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@needs_distributed
@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_by_name(one_process, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    with pytest.raises(UsageError, match="FSDP1"):
        st.Sparsifier(acdc(), model, sgd(model))
    with pytest.raises(UsageError, match="FSDP1"):
        st.Sparsifier(acdc(), nn.Sequential(model), sgd(model))


@needs_distributed
@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
def test_distributed_data_parallel_gives_the_bits_of_the_bare_model(one_process):
    run = Run.new(model=nn.parallel.DistributedDataParallel(network()))
    plain = Run.new()
    for _ in range(12):
        run.step()
        plain.step()
    assert run.sparsifier.target_names == plain.sparsifier.target_names
    assert_same_bits(bits(run), bits(plain))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reset": "momentum"}, "reset is one of all, moments, targets, returned, returned-mean, none, got 'momentum'"),
        ({"minimum_kept": 0}, "minimum_kept is at least 1"),
        ({"distribution": "uniform"}, r"a distribution such as Global\(\) or Uniform\(\)"),
        ({"pattern": "2:4"}, r"a pattern such as Unstructured\(\)"),
        ({"score": "magnitud"}, "did you mean 'magnitude'"),
    ],
)
def test_acdc_refuses_values_that_it_does_not_know(fields, message):
    with pytest.raises(ConfigError, match=message):
        acdc(**fields)
