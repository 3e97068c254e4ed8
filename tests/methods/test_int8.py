"""Quantization-aware training, by hand and against loops that share no code with it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hypothesis_st
from int8_training import FIRST, OPTIMIZERS, SCHEDULE, TOTAL, Straight, Training, acdc, assert_same, is_on_grid, rounded
from small_network import PRUNED, batch, loss_of, network
from torch import nn
from torch.func import functional_call

import sparsetwin as st
from sparsetwin.errors import ConfigError, ScheduleError, UsageError
from sparsetwin.methods import METHODS, STORED
from sparsetwin.recipes import MethodSettings, ScheduleSettings


def test_two_steps_by_hand():
    model = nn.Linear(4, 1, bias=False)
    model.weight.detach().copy_(torch.tensor([[2.54, -1.013, 0.013, 0.315]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = st.schedules.constant(sparsity=0.25, total_steps=2)
    method = st.ACDC(schedule=schedule, quantization=st.Int8(start_step=0))
    sparsifier = st.Sparsifier(method, model, optimizer)

    def step() -> torch.Tensor:
        sparsifier.begin_step()
        used = model.weight.detach().clone()
        (model.weight.square().sum() / 2).backward()  # the gradient is the weight that was computed with
        optimizer.step()
        optimizer.zero_grad()
        return used

    def assert_stored(*expected: float) -> None:
        (stored,) = sparsifier.state_dict()["buffers"][STORED].values()
        torch.testing.assert_close(stored, torch.tensor([expected]))

    # 2.54 / 127 = 0.02: 127, -50.65 and 15.75 steps are 127, -51 and 16
    torch.testing.assert_close(step(), torch.tensor([[2.54, -1.02, 0.0, 0.32]]))
    assert_stored(2.54 - 0.254, -1.013 + 0.102, 0.0, 0.315 - 0.032)  # 2.286, -0.911, 0, 0.283
    # 2.286 / 127 = 0.018: 127, -50.61 and 15.72 steps are 127, -51 and 16
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[2.286, -0.918, 0.0, 0.288]]))
    assert torch.equal(step()[0, 2], torch.tensor(0.0))
    assert_stored(2.286 - 0.2286, -0.911 + 0.0918, 0.0, 0.283 - 0.0288)


@pytest.mark.parametrize("first", [7, FIRST])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_acdc_with_it_follows_a_plain_loop_with_straight_through_gradients(optimizer, first):
    """The plain loop's optimizer holds full-precision weights, and its network is called with rounded ones."""
    run, plain = Training(acdc(first), optimizer), network()
    plain_optimizer = OPTIMIZERS[optimizer](plain.parameters())
    parameters, masks = dict(plain.named_parameters()), {}
    for step in range(TOTAL):
        if step in (2, 7):
            largest = torch.cat([parameters[name].detach().abs().flatten() for name in PRUNED]).sort().values[-89]
            masks = {name: parameters[name].detach().abs() >= largest for name in PRUNED}
        masks = {} if step == 5 else masks
        for name, mask in masks.items():
            parameters[name].detach()[~mask] = 0.0
        used = {name: Straight.apply(parameters[name]) for name in PRUNED} if step >= first else {}
        inputs, labels = batch(step)
        nn.functional.cross_entropy(functional_call(plain, used, (inputs,)), labels).backward()
        for name, mask in masks.items():
            parameters[name].grad[~mask] = 0.0
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        for name, mask in masks.items():
            parameters[name].detach()[~mask] = 0.0
        run.attempt()
        assert_same(run.sparsifier.masks, masks)
        expected = {name: parameter.detach() for name, parameter in parameters.items()}
        assert_same(run.stored, {name: expected[name] for name in PRUNED} if step >= first else {})
        shown = {name: rounded(expected[name]) for name in PRUNED} if step >= first else {}
        found = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
        assert_same(found, {**expected, **shown})
        assert (run.sparsifier.quantization is not None) == (step >= first)


@settings(deadline=None, max_examples=25)
@given(
    seed=hypothesis_st.integers(0, 2**32),
    shape=hypothesis_st.sampled_from([(), (5,), (0,), (200, 7), (40, 3, 3, 3), (0, 4), (3, 0, 2)]),
    dtype=hypothesis_st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale=hypothesis_st.sampled_from([1e-43, 1e-38, 1e-6, 0.05, 300.0]),
    density=hypothesis_st.sampled_from([0.0, 0.1, 1.0]),
)
def test_rounded_weights_come_back_from_an_int8_file_with_the_same_bits(
    seed, shape, dtype, scale, density, tmp_path_factory
):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight = torch.where(mask, (torch.randn(shape, generator=generator) * scale).to(dtype), 0)
    before = weight.clone()
    st.Int8().round_({"w": weight})
    path = tmp_path_factory.mktemp("int8") / "f"
    st.save_sparse(path, {"w": weight}, {"w": mask}, values="int8")
    found = st.load_sparse(path).tensors["w"]
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(found.view(integer), weight.view(integer))  # not even the sign of a zero differs
    again = weight.clone()
    st.Int8().round_({"w": again})
    assert torch.equal(again, weight)
    if scale > 1e-38:  # what a file makes of the weights themselves
        st.save_sparse(path, {"w": before}, {"w": mask}, values="int8")
        assert torch.equal(st.load_sparse(path).tensors["w"], weight)


def int8_method(name):
    """Return a method at half of the weights, on phases of that sparsity, or else on its usual schedule."""
    if name == "imp":
        schedule = st.schedules.rounds(sparsity=0.5, count=2, round_steps=3, rewind_step=1)
        return METHODS[name](schedule=schedule, quantization=st.Int8())
    try:
        schedule = st.schedules.phases([(2, 0.5), (2, 0.5), (4, 0.5)])
        return METHODS[name](schedule=schedule, quantization=st.Int8())
    except ScheduleError:
        usual = ScheduleSettings(
            sparsity=0.5, unit="fractions", warmup=0.2, sparse=0.1, dense=0.1, final_dense=0.2, final_sparse=0.4
        )
        return MethodSettings(name=name, qat=True).build(usual, steps_per_epoch=10, epochs=1)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dense", "snip")])
def test_the_sparse_half_of_every_method_comes_back_from_an_int8_file_with_the_same_bits(name, tmp_path):
    method = int8_method(name)
    if method.needs_closure or any(map(method.gradient_samples, method.schedule.phases)):
        pytest.skip("needs more than a plain loop")
    run = Training(method).train(method.schedule.total_steps)
    pair = st.Pair(tmp_path)
    pair.save(run.model, run.sparsifier)
    network = pair.network("sparse")
    st.save_sparse(tmp_path / "int8", network.tensors, network.masks, values="int8")
    found = st.load_sparse(tmp_path / "int8").tensors
    assert_same(found, network.tensors)
    assert not all(torch.equal(run.stored[weight], found[weight]) for weight in PRUNED)


def test_before_it_begins_nothing_is_stored_and_nothing_is_rounded():
    run, plain = Training(), Training(st.ACDC(schedule=SCHEDULE, reset="none"))
    assert_same(run.train(FIRST).weights, plain.train(FIRST).weights)
    assert (run.stored, run.sparsifier.quantization) == ({}, None)
    assert not any(map(is_on_grid, run.weights.values()))
    run.sparsifier.begin_step()
    assert_same(run.stored, plain.weights)
    assert_same(run.weights, {name: rounded(weight) for name, weight in plain.weights.items()})
    assert run.sparsifier.quantization == st.Int8(start_step=FIRST)
    run.sparsifier.begin_step()  # again: nothing more to do
    assert_same(run.stored, plain.weights)


@pytest.mark.parametrize(
    ("phases", "first"),
    [
        ([(40, 0.0), (60, 0.9)], 50),
        ([(60, 0.0), (40, 0.9)], 60),
        ([(10, 0.0), (10, 0.5), (20, 0.7), (5, 0.9), (5, 0.9)], 40),
        ([(10, 0.9), (10, 0.9), (11, 0.9)], 15),
        ([(10, 0.9), (5, 0.0), (1, 0.9)], 15),
    ],
)
def test_it_begins_with_the_final_sparsity_but_not_in_the_first_half(phases, first):
    assert st.Int8().first_step(st.schedules.phases(phases)) == first


def test_several_optimizers_do_what_one_does():
    def two(model):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:5], model[5:])]

    one = Training(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1)).train(TOTAL)
    several = Training(optimizer=two).train(TOTAL)
    assert_same(several.weights, one.weights)
    assert_same(several.stored, one.stored)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_a_scaler_skips_changes_nothing(optimizer):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)

    run, plain = Training(optimizer=optimizer, scaler=scaler()), Training(optimizer=optimizer, scaler=scaler())
    for step in range(TOTAL):
        plain.attempt()
        if step >= FIRST:
            run.sparsifier.begin_step()
            before = run.weights, run.stored
            run.attempt(overflows=True)
            assert_same(run.weights, before[0])
            assert_same(run.stored, before[1])
        run.attempt()
        assert run.sparsifier.steps == step + 1
        for name in ("0.weight", "4.weight", "6.weight"):
            assert torch.equal(run.weights[name], plain.weights[name])


def test_of_several_optimizers_one_that_a_scaler_skips_leaves_its_stored_weights():
    def two(model):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:5], model[5:])]

    run = Training(optimizer=two, scaler=torch.amp.GradScaler("cpu", init_scale=4.0)).train(FIRST + 1)
    before = run.stored
    run.attempt(overflows=True)
    assert run.sparsifier.steps == FIRST + 1  # the last optimizer's step did not happen
    run.sparsifier.begin_step()
    assert not torch.equal(run.stored["4.weight"], before["4.weight"])
    assert torch.equal(run.stored["6.weight"], before["6.weight"])
    assert all(map(is_on_grid, run.weights.values()))


def test_a_weight_that_rounds_to_zero_can_come_back():
    model = nn.Linear(2, 1, bias=False)
    model.weight.detach().copy_(torch.tensor([[1.27, 0.004]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = st.schedules.constant(sparsity=0.01, total_steps=9)  # keeps both
    sparsifier = st.Sparsifier(st.Static(schedule=schedule, quantization=st.Int8(start_step=0)), model, optimizer)
    seen = []
    for _ in range(3):
        sparsifier.begin_step()
        seen.append(round(100 * float(model.weight.detach()[0, 1])))
        (model.weight * torch.tensor([[0.0, -0.0004]])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [0, 0, 0]
    assert round(100 * float(model.weight.detach()[0, 1])) == 1  # 0.0052: more than half a step of 0.01
    assert bool(sparsifier.masks["weight"].all())


def test_an_output_with_nan_is_spoilt_and_its_pruned_weights_stay_zero():
    run = Training().train(FIRST + 1)
    run.sparsifier.begin_step()
    loss_of(run.model, 0).backward()
    mask = run.sparsifier.masks["4.weight"]
    row = int(mask.sum(1).argmax())
    column = int(mask[row].int().argmax())
    run.model[4].weight.grad[row, column] = math.nan
    run.optimizers[0].step()
    weight = run.weights["4.weight"]
    assert bool(weight[row][mask[row]].isnan().all())
    assert torch.equal(weight[~mask], torch.zeros(int((~mask).sum())))
    others = torch.arange(8) != row
    assert is_on_grid(weight[others])


def test_an_average_is_rounded_without_a_change_of_the_average_itself():
    from sparsetwin._compat import named_weights

    run = Training().train(TOTAL)
    average = copy.deepcopy(run.model)
    for weight in named_weights(average).values():
        weight.detach().mul_(0.987)
    rounded_twin = copy.deepcopy(average)
    weights = named_weights(rounded_twin)
    assert run.sparsifier.quantization is not None
    run.sparsifier.quantization.round_({name: weights[name] for name in PRUNED})
    assert all(is_on_grid(weights[name]) for name in PRUNED)
    assert torch.equal(weights["4.bias"], named_weights(average)["4.bias"])


def test_in_channels_last_memory_weights_are_the_same():
    model = network().to(memory_format=torch.channels_last)
    run = Training(model=model).train(TOTAL)
    for name, weight in Training().train(TOTAL).weights.items():
        torch.testing.assert_close(run.weights[name], weight, rtol=1e-4, atol=1e-5)
        assert is_on_grid(run.weights[name])
    assert run.model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("start_step", [-1, 2.5, True, "now"])
def test_what_is_no_step_is_refused(start_step):
    with pytest.raises(ConfigError, match="a number of steps, or None"):
        st.Int8(start_step=start_step)


@pytest.mark.parametrize(
    ("phases", "start_step", "message"),
    [
        ([(4, 0.8), (4, 0.0)], None, "this schedule ends dense"),
        ([(8, 0.0)], None, "this schedule ends dense"),
        ([(4, 0.0), (4, 0.8)], 3, "begins at step 3.*let it begin from step 4 to 7"),
        ([(4, 0.0), (4, 0.8)], 8, "begins at step 8.*let it begin from step 4 to 7"),
        ([(2, 0.0), (2, 0.8), (2, 0.0), (2, 0.8)], 3, "let it begin from step 6 to 7"),
    ],
)
def test_a_schedule_that_is_not_sparse_from_there_on_is_refused(phases, start_step, message):
    method = st.ACDC(schedule=st.schedules.phases(phases), quantization=st.Int8(start_step=start_step))
    with pytest.raises(ConfigError, match=message):
        Training(method)


def test_a_replayed_step_is_refused():
    run = Training()
    run.sparsifier.begin_step()
    with pytest.raises(UsageError, match="cannot be replayed"):
        run.sparsifier.step_done()


def test_state_without_it_is_refused_by_name_and_one_that_lacks_its_stored_weights_too():
    from sparsetwin.errors import StateError

    saved = Training().train(FIRST + 1).sparsifier.state_dict()
    assert saved["method"]["quantization"] == {"type": "Int8", "start_step": FIRST}
    with pytest.raises(StateError, match="quantization"):
        Training(st.ACDC(schedule=SCHEDULE, reset="none")).sparsifier.load_state_dict(saved)
    run = Training().train(FIRST + 1)
    state = run.sparsifier.state_dict()
    del state["buffers"][STORED]
    fresh = Training()
    fresh.model.load_state_dict(run.model.state_dict())
    with pytest.raises(StateError, match="stored weights of others"):
        fresh.sparsifier.load_state_dict(state)
    assert "quantization" not in st.ACDC(schedule=SCHEDULE).config()


def test_a_loader_that_fills_existing_tensors_finds_all_of_them():
    for steps in (FIRST - 1, FIRST, FIRST + 1, TOTAL - 1):
        run, fresh = Training().train(steps), Training(model=network(7))
        fresh.model.load_state_dict(run.model.state_dict())
        fresh.optimizers[0].load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))
        fresh.sparsifier.prepare_load(steps)
        state, saved = fresh.sparsifier.state_dict(), run.sparsifier.state_dict()
        assert state["buffers"].keys() == saved["buffers"].keys()
        for kind in ("masks", *saved["buffers"]):
            into, filled = (s["masks"] if kind == "masks" else s["buffers"][kind] for s in (state, saved))
            for name, tensor in filled.items():
                into[name].copy_(tensor)
        fresh.sparsifier.load_state_dict(state)
        assert_same(fresh.train(TOTAL - steps).weights, run.train(TOTAL - steps).weights)


class TestShards:
    @pytest.fixture
    def mesh(self, tmp_path):
        from torch.distributed.device_mesh import init_device_mesh

        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()

    def test_shards_of_whole_outputs_train_as_whole_weights_do(self, mesh):
        from torch.distributed.fsdp import fully_shard

        model = network()
        fully_shard(model, mesh=mesh)
        run, plain = Training(model=model).train(TOTAL), Training().train(TOTAL)
        assert_same({name: weight.full_tensor() for name, weight in run.weights.items()}, plain.weights)
        assert_same({name: weight.full_tensor() for name, weight in run.stored.items()}, plain.stored)

    def test_shards_that_cut_outputs_are_refused_by_name(self, mesh):
        from torch.distributed.tensor import Shard, distribute_tensor

        model = network()
        model[4].weight = nn.Parameter(distribute_tensor(model[4].weight.detach(), mesh, [Shard(1)]))
        with pytest.raises(UsageError, match=r"4\.weight is sharded as \(Shard\(dim=1\),\)"):
            Training(model=model)
