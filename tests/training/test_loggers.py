import math
import sys
import warnings

import pytest

from sparsetwin.errors import ConfigError
from sparsetwin.training.loggers import (
    MlflowLogger,
    TensorBoardLogger,
    WandbLogger,
    make_logger,
    scalars,
    step_of,
)

START = {"event": "start", "stage": "main", "steps_per_epoch": 40, "targets": {"conv.weight": 288}}
EPOCH = {
    "event": "epoch", "stage": "main", "epoch": 3, "step": 120, "phase": 1, "phase_sparsity": 0.9, "lr": 0.05,
    "train": {"loss": 0.5, "accuracy": 0.8}, "holdout": None, "kept": 29, "zeros": 259, "forward_flops": 1000,
    "training_flops": 90_000,
}  # fmt: skip
PHASE = {
    "event": "phase", "stage": "main", "phase": 1, "start": 40, "stop": 120, "sparsity": 0.9, "step": 120,
    "holdout": {"loss": 0.6, "accuracy": 0.75}, "layers": {"conv.weight": [72, 288]}, "zeros": 216,
    "mask_change": {"reactivated": 4, "iou": 0.8, "new_share": 0.1, "percent": 2.5}, "member": "sparse",
}  # fmt: skip
BRANCH = EPOCH | {"stage": "dense-finetune", "epoch": 2, "step": 80}
FINAL = {
    "event": "final", "training_flops": 1_000_000, "dense_file_bytes": None,
    "members": {"sparse": {"step": 120, "test": {"accuracy": 0.9}}, "dense": {"step": 80, "test": {"accuracy": 0.95}}},
}  # fmt: skip
EVENTS = (START, EPOCH, PHASE, BRANCH, FINAL)


def log_all(logger):
    for event in EVENTS:
        logger.log(event)
    logger.close()


def test_scalars_of_an_epoch_are_its_numbers_under_the_stage():
    found = scalars(EPOCH)
    assert found["main/train/loss"] == 0.5
    assert found["main/training_flops"] == 90_000
    assert found["main/phase_sparsity"] == 0.9
    assert not any("holdout" in name or name.endswith("/step") for name in found)


def test_scalars_of_a_phase_hold_mask_change_and_the_sparsity_of_every_layer():
    found = scalars(PHASE)
    assert found["main/phase/layers/conv.weight"] == 0.75
    assert found["main/phase/mask_change/percent"] == 2.5
    assert found["main/phase/holdout/accuracy"] == 0.75
    assert "main/phase/member" not in found


def test_scalars_of_the_final_test_are_under_each_member():
    assert scalars(FINAL)["final/members/dense/test/accuracy"] == 0.95
    assert "final/dense_file_bytes" not in scalars(FINAL)


def test_scalars_leave_out_what_is_no_curve():
    assert scalars(START) == {}
    assert scalars({"event": "epoch", "stage": "main", "lr": math.nan, "flag": True, "text": "a"}) == {}
    assert scalars({"event": "something new", "value": 1}) == {}


def test_the_final_test_stands_at_its_latest_member():
    assert [step_of(event) for event in EVENTS] == [0, 120, 120, 80, 120]


def test_an_unknown_logger_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown logger 'tensorbord'; known: .*did you mean 'tensorboard'"):
        make_logger("tensorbord", "runs/a")


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_library_is_named_with_what_installs_it(name, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"'{name}' .*pip install 'sparsetwin\[loggers\]'"):
        make_logger(name, tmp_path)


def test_a_mere_folder_of_a_librarys_name_is_not_taken_for_it(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="pip install"):
        WandbLogger(tmp_path)
    sys.modules.pop("wandb", None)


@pytest.fixture
def _their_warnings():
    """Other libraries' deprecations are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_their_warnings")
def test_tensorboard_shows_every_number_at_its_step(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, of sparsetwin[loggers]")
    log_all(TensorBoardLogger(tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert set(shown.Tags()["scalars"]) == {name for event in EVENTS for name in scalars(event)}
    assert [(point.step, point.value) for point in shown.Scalars("main/train/loss")] == [(120, 0.5)]
    assert [point.step for point in shown.Scalars("dense-finetune/train/loss")] == [80]


@pytest.mark.usefixtures("_their_warnings")
def test_mlflow_shows_every_number_at_its_step(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow, of sparsetwin[loggers]", exc_type=ImportError)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    log_all(MlflowLogger(tmp_path / "a", experiment="twins"))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'a' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("twins")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert set(run.data.metrics) == {name for event in EVENTS for name in scalars(event)}
    (point,) = client.get_metric_history(run.info.run_id, "dense-finetune/train/loss")
    assert (point.step, point.value) == (80, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("_their_warnings")
def test_wandb_shows_every_number_of_stages_that_go_over_the_same_steps(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb, of sparsetwin[loggers]", exc_type=ImportError)
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(tmp_path / "a", mode="offline")
    run = wandb.run
    assert run is not None
    for event in EVENTS:
        logger.log(event)
    shown = dict(run.summary)
    logger.close()
    for event in (EPOCH, PHASE, BRANCH, FINAL):
        assert scalars(event).items() <= shown.items()
    assert shown["optimizer_step"] == step_of(FINAL)
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))
    assert wandb.run is None
