"""Every method in the real trainer: it resumes with the same bits, and its learning rates are those it asks for."""

from pathlib import Path

import pytest
import torch
from tiny import STEPS, Numbers, make_method, make_run, network, usual_schedule

from sparsetwin.checkpoint import Pair
from sparsetwin.errors import ConfigError, TrainingError
from sparsetwin.methods import METHODS
from sparsetwin.schedules import phases, rounds
from sparsetwin.training import LearningRateSettings, Run, branch_step, finetuning_step, has_dense_half

FIELDS = {
    "snip": {"samples": 2},
    "str": {"initial": -3.0, "exact_final": True},
    "st3": {"every_steps": 2},
    "acdc": {"score": "movement"},
}


def network_with_dropout() -> torch.nn.Module:
    return network(dropout=0.2)


def started(folder: Path, name: str, *, stop: int | None = None) -> Run:
    """Return a run of a method, new or to be resumed; it stops after so many steps."""
    data = Numbers()
    run = make_run(
        folder, make_method(name, **FIELDS.get(name, {})), data=data, model=network_with_dropout, accumulation=2,
        checkpoint_epochs=100.0, ema_decay=0.5 if name in ("rigl", "str") else 0.0,
    )  # fmt: skip
    if stop is not None:
        data.watch = lambda number: run.request_stop() if number == stop - 1 else None
    return run


def outcome(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [run.folder.metrics, *sorted(run.folder.pair.iterdir())]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each method's run without a stop, trained when it is first asked for."""
    found: dict[str, dict[str, bytes]] = {}

    def of(name: str) -> dict[str, bytes]:
        if name not in found:
            run = started(tmp_path_factory.mktemp(name) / "run", name)
            assert run.execute()
            found[name] = outcome(run)
        return found[name]

    return of


def stops(name: str) -> list[int]:
    """Return the end of a phase, one step after it, and one before the end of the run."""
    schedule = usual_schedule(name)
    middle = schedule.phases[len(schedule.phases) // 2].start or schedule.total_steps // 2
    return sorted({middle, middle + 1, schedule.total_steps - 1})


@pytest.mark.parametrize(("name", "stop"), [(name, stop) for name in METHODS for stop in stops(name)])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(name, stop, whole, tmp_path):
    first = started(tmp_path / "run", name, stop=stop)
    assert not first.execute()
    assert first.store.steps == (stop,)
    torch.manual_seed(99)
    second = started(tmp_path / "run", name)
    assert second.execute()
    assert outcome(second) == whole(name)


def test_the_runs_of_different_methods_differ(whole):
    sparse = {whole(name)["sparse.safetensors"] for name in METHODS if name != "dense"}
    assert len(sparse) == len(METHODS) - 1


def rates(run: Run, tmp_path: Path) -> list[float]:
    """Return the learning rate of every step."""
    found: list[float] = []
    data = run.parts.splits.train
    data.watch = lambda number: found.append(run._stage.session.last_lr) if number else None  # type: ignore[attr-defined, union-attr, func-returns-value]
    assert run._stage is None
    assert run.execute()
    return found


class TestLearningRates:
    def test_a_round_of_imp_repeats_the_end_of_the_dense_training(self, tmp_path):
        schedule = rounds(sparsity=0.75, count=2, round_steps=8, rewind_step=4)
        found = rates(make_run(tmp_path / "run", make_method("imp", schedule), data=Numbers()), tmp_path)
        assert len(found) == schedule.total_steps - 1  # all but the last step's
        assert found[4:8] == found[8:12]
        assert found[4:7] == found[12:15]
        assert found[:8] == sorted(found[:8], reverse=True)
        assert found[7] < 0.1 * found[0]

    def test_milestones_and_warmup_are_those_of_the_run_in_proportion(self, tmp_path):
        schedule = rounds(sparsity=0.75, count=2, round_steps=8, rewind_step=4)  # 4 epochs, the dense training 2
        rate = LearningRateSettings(shape="step", milestones=(3.0,), gamma=0.1, warmup_epochs=1.0)
        run = make_run(tmp_path / "run", make_method("imp", schedule), data=Numbers(), learning_rate=rate)
        assert rates(run, tmp_path)[:8] == pytest.approx([0.05 / 4, 3 * 0.05 / 4, 0.05, 0.05, 0.05, 0.05, 0.005, 0.005])

    def test_the_thresholds_of_str_follow_the_schedule(self, tmp_path):
        run = make_run(tmp_path / "run", make_method("str"), data=Numbers())
        seen = []
        run.parts.splits.train.watch = lambda number: (  # type: ignore[attr-defined]
            seen.append([group["lr"] for group in run._stage.session.optimizers[0].param_groups]) if number else None  # type: ignore[union-attr]
        )
        assert run.execute()
        assert all(len(rates) == 2 and rates[0] == rates[1] for rates in seen)
        assert len({rates[0] for rates in seen}) == len(seen)


class TestDenseHalves:
    """What dense phases leave behind, and what can be trained on."""

    @pytest.mark.parametrize(
        ("name", "has"),
        [("acdc", True), ("dense", True), ("oneshot", True), ("cram", True), ("imp", True), ("gmp", False),
         ("granet", False), ("st3", False), ("woodfisher", False), ("static", False), ("rigl", False)],
    )  # fmt: skip
    def test_a_member_is_called_dense_only_if_it_was_trained_to_be_one(self, name, has, whole):
        assert has_dense_half(make_method(name)) == has
        files = whole(name)
        assert ("dense.safetensors" in files) == has
        assert ("dense-start.safetensors" in files) == (name in ("gmp", "granet", "st3", "woodfisher"))

    def test_a_method_with_learned_thresholds_can_train_its_dense_half_on(self, tmp_path):
        method = make_method("str", phases([(4, 0.0), (4, 0.75)]))
        run = make_run(tmp_path / "run", method, dense_finetune=True)
        assert run.execute()
        assert set(run.pair.members) == {"dense-raw", "sparse", "dense"}
        assert run.pair.members["dense"].step == 8

    def test_gmp_trains_a_dense_half_on_where_it_is_asked_to(self, tmp_path):
        run = make_run(tmp_path / "run", make_method("gmp"), dense_finetune=True)
        assert run.execute()
        assert set(run.pair.members) == {"dense-raw", "sparse", "dense"}

    def test_imp_has_nothing_to_train_on(self, tmp_path):
        method = make_method("imp")
        assert branch_step(method.schedule) == 8
        with pytest.raises(ConfigError, match="IMP takes its dense half to the end of the learning-rate schedule"):
            finetuning_step(method)
        with pytest.raises(ConfigError, match="nothing to train on"):
            make_run(tmp_path / "run", method, dense_finetune=True)

    def test_of_sparse_phases_in_a_row_the_last_is_saved(self, tmp_path):
        run = make_run(tmp_path / "run", make_method("gmp"))
        saved = []
        pair_save = run.pair.save
        run.pair.save = lambda model, view, **given: (saved.append(given["name"]), pair_save(model, view, **given))  # type: ignore[method-assign]
        assert run.execute()
        assert saved == ["dense-start", "sparse"]
        assert Pair(run.folder.pair).members["sparse"].step == 8


@pytest.mark.parametrize("name", ["st3", "topkast", "rigl", "acdc", "gmp"])
def test_a_run_that_diverges_says_so_whatever_chooses_masks(name, tmp_path):
    data = Numbers(count=20)
    data.scales[STEPS + 1] = float("nan")
    method = make_method(name, phases([(STEPS + 2, 0.75), (6, 0.75)]) if name in ("rigl", "topkast") else None)
    run = make_run(tmp_path / "run", method, data=data)
    with pytest.raises(TrainingError, match="a lower learning rate"):
        run.execute()
