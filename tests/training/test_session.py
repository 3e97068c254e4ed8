"""What each feature of a step does, seen by its effect."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trials import BATCH, acdc, digits, network, session, settings, train, weights

from sparsetwin import ACDC, SNIP, schedules
from sparsetwin.errors import ConfigError
from sparsetwin.methods import STR, Method
from sparsetwin.models import gpt
from sparsetwin.schedules import phases
from sparsetwin.targets import Targets
from sparsetwin.training import LearningRateSettings, OptimizerSettings, Session
from sparsetwin.training.optimizers import make_optimizers

DENSE_THEN_SPARSE = ((6, 0.0), (66, 0.9))
PRECISIONS = ("fp32", "bf16", "fp16")


def assert_exactly_sparse(trained: Session, *, sparsity: float = 0.9) -> None:
    masks = trained.sparsifier.masks
    size = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == size - round(sparsity * size)
    for name, mask in masks.items():
        assert not trained.model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_full_batch(parts: int) -> None:
    whole = session(acdc(*DENSE_THEN_SPARSE), settings())
    cut = session(acdc(*DENSE_THEN_SPARSE), settings(accumulation=parts))
    first, second = train(whole, steps=12), train(cut, steps=12)
    assert first == pytest.approx(second, rel=1e-4)
    for name, mask in whole.sparsifier.masks.items():
        assert torch.equal(mask, cut.sparsifier.masks[name])
    for name, weight in weights(whole.model).items():
        torch.testing.assert_close(weights(cut.model)[name], weight, rtol=1e-3, atol=1e-5)


def test_a_batch_that_does_not_divide_is_accumulated_with_its_true_shares() -> None:
    inputs, labels = next(iter(digits().train.epoch(0)))
    whole, cut = session(acdc((10, 0.0)), settings()), session(acdc((10, 0.0)), settings(accumulation=4))
    for trained in (whole, cut):
        trained.step(inputs[:-3], labels[:-3])
    for name, weight in weights(whole.model).items():
        torch.testing.assert_close(weights(cut.model)[name], weight)


def test_clipping_sees_the_gradients_of_kept_weights_only() -> None:
    limit = 1e-3
    plain = OptimizerSettings(lr=1.0, momentum=0.0, weight_decay=0.0)
    trained = session(acdc(*DENSE_THEN_SPARSE), settings(optimizer=plain, clip_norm=limit))
    train(trained, steps=8)
    before = weights(trained.model)
    inputs, labels = next(iter(digits().train.epoch(1)))
    trained.step(inputs, labels)
    moved = torch.stack([(weight - before[name]).norm() for name, weight in weights(trained.model).items()]).norm()
    assert moved.item() == pytest.approx(limit, rel=1e-3)  # at lr 1 the step is as long as the clipped gradient


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    free, clipped = (session(acdc(*DENSE_THEN_SPARSE), settings(clip_norm=norm)) for norm in (0.0, 1e9))
    assert train(free, steps=9) == train(clipped, steps=9)


def test_label_smoothing_is_that_of_torch() -> None:
    trained = session(acdc((10, 0.0)), settings(label_smoothing=0.2))
    model = copy.deepcopy(trained.model)
    inputs, labels = next(iter(digits().train.epoch(0)))
    loss, correct = trained.step(inputs, labels)
    logits = model(inputs)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.2).item())
    assert int(correct) == int((logits.argmax(1) == labels).sum())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_every_precision_learns_and_stays_exactly_sparse(precision: str, clip_norm: float) -> None:
    trained = session(acdc((30, 0.0), (60, 0.5)), settings(precision=precision, clip_norm=clip_norm))
    losses = train(trained, steps=90)
    assert_exactly_sparse(trained, sparsity=0.5)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(weight.dtype == torch.float32 for weight in weights(trained.model).values())
    assert trained.first_not_finite() is None


def test_lower_precisions_round_the_forward_pass() -> None:
    losses = {p: train(session(acdc((10, 0.0)), settings(precision=p)), steps=1)[0] for p in PRECISIONS}
    assert len(set(losses.values())) == 3
    assert max(losses.values()) - min(losses.values()) < 0.02


def test_an_overflowing_step_is_skipped_and_does_not_count() -> None:
    trained = session(acdc((2, 0.0), (2, 0.9), (2, 0.0)), settings(precision="fp16"))
    inputs, labels = next(iter(digits().train.epoch(0)))
    trained.step(inputs, labels)
    before = weights(trained.model)
    trained.step(inputs * 1e30, labels)
    assert (trained.steps, trained.skipped, trained.skipped_in_a_row) == (1, 1, 1)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trained.model).items())
    trained.step(inputs, labels)
    assert (trained.steps, trained.skipped, trained.skipped_in_a_row) == (2, 1, 0)


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    plain, last = (session(acdc(*DENSE_THEN_SPARSE), settings(channels_last=on)) for on in (False, True))
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index, union-attr]
    assert train(plain, steps=10) == pytest.approx(train(last, steps=10), rel=1e-3)
    assert_exactly_sparse(last)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself, as it is loaded
def test_a_compiled_model_learns_the_same() -> None:
    plain, compiled = (session(acdc((3, 0.0), (3, 0.9), (2, 0.0)), settings(compile=on)) for on in (False, True))
    assert train(plain, steps=8) == pytest.approx(train(compiled, steps=8), rel=1e-3)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


class TestAverage:
    """``ema_decay``."""

    def test_it_is_the_moving_average_of_the_weights_within_a_phase(self) -> None:
        decay = 0.8
        trained = session(acdc((4, 0.0), (6, 0.5)), settings(ema_decay=decay))
        data = iter(digits().train.epoch(0))
        expected: dict[str, torch.Tensor] = {}
        for step in range(10):
            inputs, labels = next(data)
            if step in (0, 4):  # a phase begins: from the weights as it finds them, masked
                probe = copy.deepcopy(trained.model)
                expected = weights(probe)
            trained.step(inputs, labels)
            if step == 4:
                expected = {
                    name: weight * trained.sparsifier.masks.get(name, torch.ones(()))
                    for name, weight in expected.items()
                }
            for name, weight in weights(trained.model).items():
                expected[name] = decay * expected[name] + (1 - decay) * weight
        for name, weight in weights(trained.evaluated_model()).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)

    def test_it_is_exactly_as_sparse_as_the_model_and_not_the_model(self) -> None:
        trained = session(acdc(*DENSE_THEN_SPARSE), settings(ema_decay=0.99), model=network(batch_norm=True))
        train(trained, steps=30)
        average = trained.evaluated_model()
        assert average is not trained.model
        for name, mask in trained.sparsifier.masks.items():
            assert not average.get_parameter(name)[~mask].any()
            assert not torch.equal(average.get_parameter(name), trained.model.get_parameter(name))
        assert torch.equal(average[1].running_mean, trained.model[1].running_mean)  # type: ignore[index]


class TestOptimizers:
    """Every optimizer that a name stands for."""

    @pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad"])
    def test_it_learns_and_stays_exactly_sparse(self, name: str) -> None:
        given = OptimizerSettings(name=name, lr=0.01 if "adam" in name or name == "rmsprop" else 0.1)  # type: ignore[arg-type]
        trained = session(acdc((30, 0.0), (15, 0.5), (15, 0.0), (40, 0.5)), settings(optimizer=given))
        losses = train(trained, steps=100)
        assert_exactly_sparse(trained, sparsity=0.5)
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    def test_muon_takes_hidden_matrices_and_adamw_the_rest(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        given = OptimizerSettings(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.01)
        trained = session(acdc((30, 0.0), (15, 0.5), (15, 0.0), (40, 0.5)), settings(optimizer=given), model=model)
        assert [type(optimizer).__name__ for optimizer in trained.optimizers] == ["Muon", "AdamW"]
        losses = train(trained, steps=100)
        assert_exactly_sparse(trained, sparsity=0.5)
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    def test_thresholds_that_are_learned_beside_muon_are_updated_by_adamw(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        given = OptimizerSettings(name="muon", lr=1e-2, muon_lr=0.02, weight_decay=0.1)
        method = STR(schedule=schedules.constant(sparsity=0.5, total_steps=100), initial=-5.0)
        trained = session(method, settings(optimizer=given), model=model)
        losses = train(trained, steps=100)
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
        learned = trained.sparsifier.state_dict()["learned"]
        assert learned.keys() == {"1.weight", "3.weight"}
        assert all(abs(float(value) + 5) > 0.05 for value in learned.values())
        assert 0.01 < trained.sparsifier.sparsity() < 1

    def test_learned_thresholds_without_an_optimizer_that_takes_them_are_refused(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.Linear(64, 10, bias=False))
        model[2].requires_grad_(False)
        method = STR(schedule=schedules.constant(sparsity=0.5, total_steps=10))
        given = settings(optimizer=OptimizerSettings(name="muon"))
        with pytest.raises(ConfigError, match=r"STR learns parameters that are no matrices.*Muon"):
            Session(model, method, targets=Targets(dense_last=True), settings=given, seed=0)

    def test_muon_leaves_embeddings_and_the_output_head_to_adamw(self) -> None:
        model = gpt(9, context=4, layers=2, heads=1, width=8)
        muon, adamw = make_optimizers(model, OptimizerSettings(name="muon"))
        names = {parameter: name for name, parameter in model.named_parameters()}
        updated = [names[parameter] for parameter in muon.param_groups[0]["params"]]
        assert updated == [name for name in names.values() if name.startswith("blocks") and "weight" in name
                           and model.get_parameter(name).ndim == 2]  # fmt: skip
        others = {names[parameter] for parameter in adamw.param_groups[0]["params"]}
        assert {"token_embedding.weight", "position_embedding.weight", "head.weight"} < others
        assert len(updated) + len(others) == len(names)

    def test_a_head_that_is_tied_to_an_embedding_is_the_head(self) -> None:
        model = gpt(9, context=4, layers=1, heads=1, width=8)
        whole = make_optimizers(model, OptimizerSettings(name="muon"))[0].param_groups[0]["params"]
        model.head.weight = model.token_embedding.weight
        assert make_optimizers(model, OptimizerSettings(name="muon"))[0].param_groups[0]["params"] == whole

    @pytest.mark.parametrize(
        "model",
        [nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), network(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))],
        ids=["convolution", "convolution and head", "head"],
    )
    def test_muon_without_a_hidden_matrix_is_refused(self, model: nn.Module) -> None:
        with pytest.raises(ConfigError, match="no hidden matrix that Muon could update"):
            session(acdc((10, 0.0)), settings(optimizer=OptimizerSettings(name="muon")), model=model)

    def test_the_learning_rate_of_each_group_follows_the_schedule(self) -> None:
        rate = LearningRateSettings(shape="step", milestones=(0.5,), gamma=0.1)
        trained = session(acdc((40, 0.0)), settings(learning_rate=rate))
        found = []
        for inputs, labels in digits().train.epoch(0):
            trained.step(inputs, labels)
            found.append(trained.last_lr)
        assert found == pytest.approx([0.05] * 9 + [0.005] * 9)


@pytest.mark.parametrize("stop", [3, 6, 7, 12, 15])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_session_goes_on_from_its_state_with_the_same_bits(stop: int, optimizer: str) -> None:
    def made() -> Session:
        given = OptimizerSettings(name=optimizer, lr=0.01)  # type: ignore[arg-type]
        model = nn.Sequential(network(batch_norm=True), nn.Dropout(0.1))
        return session(
            acdc((6, 0.0), (6, 0.9), (8, 0.0)), settings(optimizer=given, ema_decay=0.9, precision="fp16"), model=model
        )

    batches = list(digits().train.epoch(0))[:18]
    torch.manual_seed(1)
    whole = made()
    states = []
    losses = []
    for inputs, labels in batches:
        states.append(copy.deepcopy(whole.state_dict()))
        losses.append(whole.step(inputs, labels)[0].item())
    resumed = made()
    resumed.load_state_dict(states[stop])
    torch.manual_seed(99)
    resumed.load_state_dict(states[stop])
    assert [resumed.step(inputs, labels)[0].item() for inputs, labels in batches[stop:]] == losses[stop:]
    for name, value in resumed.evaluated_model().state_dict().items():
        assert torch.equal(value, whole.evaluated_model().state_dict()[name]), name


def test_a_value_that_is_not_finite_is_found_by_name() -> None:
    trained = session(acdc((10, 0.0)), settings(), model=network(batch_norm=True))
    assert trained.first_not_finite() is None
    trained.model.get_buffer("1.running_var")[3] = math.inf
    assert trained.first_not_finite() == "1.running_var"


def test_infinities_that_a_buffer_begins_with_are_its_own_and_further_ones_are_not() -> None:
    def masked() -> nn.Module:
        model = network(batch_norm=True)
        model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        return model

    trained = session(acdc((10, 0.0)), settings(), model=masked())
    assert trained.first_not_finite() is None
    trained.model.get_buffer("mask")[0] = math.nan
    assert trained.first_not_finite() == "mask"


def test_a_weight_that_begins_with_infinities_is_found_by_name() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight")[0] = math.inf
    assert session(acdc((10, 0.0)), settings(), model=model).first_not_finite() == "0.weight"


def test_the_batches_of_these_tests_are_full() -> None:
    assert all(len(labels) == BATCH for _, labels in digits().train.epoch(0))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("name", ["snip", "acdc"])
def test_gradients_of_several_optimizers_are_unscaled_before_weights_are_ranked(name: str, clip_norm: float) -> None:
    """The scale of 65,536 would put all weights of the second optimizer first: convolution and head, beside Muon's."""
    muon = OptimizerSettings(name="muon", lr=0.01, weight_decay=0.0)
    inputs, labels = next(iter(digits().train.epoch(0)))
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for precision in ("fp32", "fp16"):
        if name == "snip":
            method: Method = SNIP(schedule=phases([(10, 0.9)]))
        else:
            method = ACDC(schedule=phases([(1, 0.0), (9, 0.9)]), score="fisher")
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(),
            nn.Linear(32, 10),
        )  # fmt: skip
        trained = session(method, settings(optimizer=muon, precision=precision, clip_norm=clip_norm), model=model)
        while trained.steps < 1 or not trained.sparsifier.masks:  # a step that overflows is done again
            trained.step(inputs, labels)
        kept[precision] = dict(trained.sparsifier.masks)
    for target, mask in kept["fp32"].items():
        assert mask.sum() > 20
        assert (mask & kept["fp16"][target]).sum() > 0.9 * mask.sum(), target
