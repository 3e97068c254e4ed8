"""Settings: learning rates as the paper has them, and values that are refused."""

import pytest

from sparsetwin.errors import ConfigError
from sparsetwin.training import LearningRateSettings, OptimizerSettings, TrainSettings


def test_the_papers_imagenet_learning_rates() -> None:
    shape = LearningRateSettings(warmup_epochs=5, every="epoch")
    found = [0.256 * shape.factor(10 * epoch, steps_per_epoch=10, epochs=100) for epoch in (0, 4, 5, 52, 99)]
    assert found == pytest.approx([0.0512, 0.256, 0.256, 0.130, 7.0e-5], rel=6e-3)


def test_a_rate_that_changes_every_epoch_is_the_same_in_all_its_steps() -> None:
    shape = LearningRateSettings(warmup_epochs=2, every="epoch")
    for epoch in range(5):
        assert len({shape.factor(10 * epoch + step, steps_per_epoch=10, epochs=5) for step in range(10)}) == 1


def test_a_rate_that_changes_every_step_warms_up_to_one_and_falls_to_nearly_nothing() -> None:
    shape = LearningRateSettings(warmup_epochs=2)
    factors = [shape.factor(step, steps_per_epoch=10, epochs=10) for step in range(100)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[20] == 1
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert 0 < factors[99] < 1e-3


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_steps_multiply_at_each_milestone(every: str) -> None:
    shape = LearningRateSettings(shape="step", milestones=(2, 4), gamma=0.5, every=every)  # type: ignore[arg-type]
    assert [shape.factor(10 * epoch, steps_per_epoch=10, epochs=6) for epoch in range(6)] == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
    ]


def test_a_constant_rate_stays() -> None:
    assert {LearningRateSettings(shape="constant").factor(s, steps_per_epoch=3, epochs=4) for s in range(12)} == {1.0}


@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay", "eps", "muon_lr"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_optimizer_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} needs to be a finite number that is not negative"):
        OptimizerSettings(**{field: value})


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="nesterov needs a momentum"):
        OptimizerSettings(momentum=0, nesterov=True)
    with pytest.raises(ConfigError, match="betas"):
        OptimizerSettings(betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="batch_size 64 cannot be cut into 7"):
        TrainSettings(batch_size=64, accumulation=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("accumulation", 0), ("clip_norm", -1), ("label_smoothing", 1), ("ema_decay", 1),
     ("ema_decay", float("nan")), ("recalibrate_batches", -1), ("checkpoint_epochs", 0),
     ("checkpoint_epochs", float("inf"))],
)  # fmt: skip
def test_impossible_training_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainSettings(**{field: value})
