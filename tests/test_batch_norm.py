import copy

import pytest
import torch
from torch import nn

from sparsetwin.batch_norm import recalibrate_batch_norm
from sparsetwin.errors import UsageError


class Network(nn.Module):
    """Convolutions with batch norm, dropout before the second one, and a layer that keeps no statistics."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3, momentum=0.1)
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.BatchNorm2d(4, momentum=None)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.unreached = nn.BatchNorm1d(2)

    def forward(self, x, scale=1.0):
        return self.stateless(self.second(self.dropout(self.conv(self.first(x * scale)))))


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    model(torch.randn(8, 3, 6, 6))  # statistics that are not the initial ones
    model.unreached.running_mean.fill_(7.0)
    return model


def batches(count=3, sizes=(8, 8, 4)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=generator) * 2 + 1 for size in sizes[:count]]


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_statistics_are_the_mean_over_batches_of_mean_and_unbiased_variance():
    model, data = network(), batches()
    assert recalibrate_batch_norm(model, data) == 3
    means = torch.stack([x.mean((0, 2, 3)) for x in data])
    variances = torch.stack([x.var((0, 2, 3), correction=1) for x in data])
    torch.testing.assert_close(model.first.running_mean, means.mean(0))
    torch.testing.assert_close(model.first.running_var, variances.mean(0))
    assert int(model.first.num_batches_tracked) == int(model.second.num_batches_tracked) == 3


def test_dropout_is_off_so_that_the_result_is_the_same_each_time_and_the_random_state_too():
    first, second, data = network(), network(), batches()
    recalibrate_batch_norm(first, data)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    recalibrate_batch_norm(second, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(statistics(first), statistics(second))

    with torch.no_grad():  # the second layer by hand: its input has no dropout and the first layer's batch statistics
        hidden = []
        for x in data:
            normed = nn.functional.batch_norm(x, None, None, first.first.weight, first.first.bias, training=True)
            hidden.append(first.conv(normed).mean((0, 2, 3)))
    torch.testing.assert_close(first.second.running_mean, torch.stack(hidden).mean(0))


def test_flags_momentum_weights_and_buffer_objects_are_the_same_afterwards():
    model = network()
    model.train()
    model.conv.eval()
    model.second.eval()
    model.conv.weight.requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(dict(model.named_parameters()))
    buffers = dict(model.named_buffers())
    recalibrate_batch_norm(model, batches())
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert (model.first.momentum, model.second.momentum) == (0.1, None)
    assert_equal(weights, dict(model.named_parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())


def test_layers_without_statistics_or_out_of_reach_stay_as_they_are():
    model = network()
    recalibrate_batch_norm(model, batches())
    assert model.stateless.running_mean is None
    assert torch.equal(model.unreached.running_mean, torch.full((2,), 7.0))
    assert int(model.unreached.num_batches_tracked) == 0


def test_a_layer_used_twice_averages_over_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            self.norm(x)
            return self.norm(x + 2)

    model = Twice()
    assert recalibrate_batch_norm(model, [torch.tensor([[0.0], [2.0]])]) == 1
    assert model.norm.running_mean.item() == 2.0
    assert int(model.norm.num_batches_tracked) == 2


def test_sync_batch_norm_counts_as_batch_norm():
    model, data = nn.Sequential(nn.SyncBatchNorm(3)), batches()
    assert recalibrate_batch_norm(model, data) == 3
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0))


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, torch.zeros(1)), lambda x: [x], lambda x: {"x": x}, lambda x: {"x": x / 2, "scale": 2.0}],
    ids=["tuple", "list", "mapping", "mapping-with-a-number"],
)
def test_batches_may_be_what_data_loaders_give(wrap):
    plain, wrapped, data = network(), network(), batches()
    recalibrate_batch_norm(plain, data)
    assert recalibrate_batch_norm(wrapped, (wrap(x) for x in data)) == 3
    assert_equal(statistics(plain), statistics(wrapped))


def test_limit_uses_and_draws_no_more_batches():
    model, other, drawn = network(), network(), iter(batches())
    assert recalibrate_batch_norm(model, drawn, limit=2) == 2
    assert len(list(drawn)) == 1
    recalibrate_batch_norm(other, batches(2))
    assert_equal(statistics(model), statistics(other))
    assert recalibrate_batch_norm(model, batches(), limit=100) == 3


def test_a_model_without_batch_norm_returns_zero_and_does_not_run():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("ran")

    drawn = iter(batches())
    assert recalibrate_batch_norm(Never(), drawn) == 0
    assert len(list(drawn)) == 3
    assert recalibrate_batch_norm(nn.BatchNorm2d(3, track_running_stats=False), drawn) == 0


def second_batch_is(thing):
    yield batches()[0]
    yield thing


def test_no_batch_is_an_error():
    with pytest.raises(UsageError, match="at least one batch"):
        recalibrate_batch_norm(network(), [])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (lambda: [], UsageError),
        (lambda: second_batch_is("text"), UsageError),
        (lambda: second_batch_is(()), UsageError),
        (lambda: second_batch_is(None), UsageError),
        (lambda: second_batch_is(torch.ones(8, 5, 6, 6)), RuntimeError),
        (lambda: second_batch_is({"y": torch.ones(8, 3, 6, 6)}), TypeError),
    ],
    ids=["none", "text", "empty-tuple", "None", "wrong-shape", "wrong-name"],
)
def test_after_an_error_statistics_flags_and_momentum_are_the_old_ones(data, error):
    model = network().train()
    before = statistics(model)
    with pytest.raises(error):
        recalibrate_batch_norm(model, data())
    assert_equal(before, statistics(model))
    assert all(module.training for module in model.modules())
    assert model.first.momentum == 0.1


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(UsageError, match="at least 1"):
        recalibrate_batch_norm(network(), batches(), limit=limit)


def test_a_lazy_layer_without_statistics_is_refused_by_name():
    model = nn.Sequential(nn.Identity(), nn.LazyBatchNorm2d())
    with pytest.raises(UsageError, match="lazy batch-norm layer '1'"):
        recalibrate_batch_norm(model, batches())
    model(batches()[0])
    assert recalibrate_batch_norm(model, batches()) == 3


def test_recalibration_repairs_the_evaluation_of_changed_weights():
    model, data = network(), batches()
    model.first.running_mean.fill_(100.0)
    broken = model.eval()(data[0])
    recalibrate_batch_norm(model, data)
    normed = model.first(data[0])
    assert normed.mean().abs() < 0.1
    assert not torch.equal(model(data[0]), broken)
