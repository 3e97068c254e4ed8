"""A whole run: its members, its numbers, its ledger, and what it reads when."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trials import BATCH, CPU, STEPS, acdc, digits, make_run, network, settings, without

from sparsetwin import ACDC, HAM, Dense, Sparsifier
from sparsetwin.checkpoint import CheckpointStore, Pair
from sparsetwin.data import Digits
from sparsetwin.distributions import Uniform
from sparsetwin.errors import ConfigError, SparsityWarning, TrainingError
from sparsetwin.metrics import count_forward_flops
from sparsetwin.schedules import phases
from sparsetwin.training import LearningRateSettings, OptimizerSettings, Run, TrainSettings, branch_step, evaluate

FOUR = ((STEPS, 0.0), (STEPS, 0.9), (STEPS, 0.0), (STEPS, 0.9))
COSINE = LearningRateSettings(warmup_epochs=1)


def told(run: Run, event: str) -> list[Any]:
    lines = run.folder.metrics.read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


class StopIn:
    """Asks a run for a stop at a step of one of its stages."""

    def __init__(self, stage: str, *, step: int, run: Run) -> None:
        self.stage, self.step, self.run = stage, step, run

    def event(self, event: Any) -> None: ...

    def progress(self, progress: Any) -> None:
        if progress.stage == self.stage and progress.step >= self.step:
            self.run.request_stop()


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    run = make_run(folder, acdc(*FOUR), settings(dense_finetune=True, learning_rate=COSINE))
    assert run.execute()
    return run


class TestDenseFineTuning:
    """``dense_finetune``, as the paper trains its dense half."""

    def test_it_goes_on_from_the_end_of_the_last_dense_phase_to_the_same_end(self, finetuned: Run) -> None:
        epochs = [event for event in told(finetuned, "epoch") if event["stage"] == "dense-finetune"]
        assert [(event["epoch"], event["step"], event["phase_sparsity"]) for event in epochs] == [(4, 72, 0.0)]
        step, state = finetuned.store.load_named("branch")
        assert step == state["session"]["sparsifier"]["steps"] == 54
        raw = finetuned.pair.load("dense-raw", network(batch_norm=True)).state_dict()
        assert all(torch.equal(raw[name], value) for name, value in state["session"]["model"].items())

    def test_the_learning_rate_goes_on_and_does_not_begin_again(self, finetuned: Run) -> None:
        rates = {(event["stage"], event["epoch"]): event["lr"] for event in told(finetuned, "epoch")}
        assert rates["dense-finetune", 4] == rates["main", 4] < rates["main", 3]

    def test_momentum_goes_on_from_the_branch_and_no_state_is_reset(self, finetuned: Run) -> None:
        """The fine-tuning equals steps done by hand with the saved model and optimizer state, to the bit."""
        _, state = finetuned.store.load_named("branch")
        model = network(batch_norm=True)
        model.load_state_dict(state["session"]["model"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        optimizer.load_state_dict(state["session"]["optimizers"][0])
        assert any(float(entry["momentum_buffer"].norm()) > 0 for entry in optimizer.state.values())
        model.train()
        for step, (inputs, labels) in enumerate(digits().train.epoch(3), start=54):
            optimizer.param_groups[0]["lr"] = 0.05 * COSINE.factor(step, steps_per_epoch=STEPS, epochs=4)
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        dense = finetuned.pair.load("dense", network(batch_norm=True)).state_dict()
        assert all(torch.equal(dense[name], value) for name, value in model.state_dict().items())

    def test_it_goes_on_with_the_ham_of_the_method_also_after_a_stop(self, tmp_path: Path) -> None:
        """It equals steps with HAM done by hand, to the bit; without HAM it does not."""
        method = ACDC(schedule=phases(FOUR), ham=HAM(alpha=5.0, beta=0.1))
        given = settings(dense_finetune=True, learning_rate=COSINE, checkpoint_epochs=0.5)
        run = make_run(tmp_path / "run", method, given)
        listener = StopIn("dense-finetune", step=60, run=run)
        run.listen([listener])
        assert not run.execute()
        again = Run(run.folder, run.parts)
        assert again.execute()
        _, state = run.store.load_named("branch")
        found = []
        for ham in (method.ham, None):
            model = network(batch_norm=True)
            model.load_state_dict(state["session"]["model"])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
            optimizer.load_state_dict(state["session"]["optimizers"][0])
            sparsifier = Sparsifier(Dense(schedule=phases([(18, 0.0)]), ham=ham), model, optimizer)
            model.train()
            for step, (inputs, labels) in enumerate(digits().train.epoch(3), start=54):
                sparsifier.begin_step()
                optimizer.param_groups[0]["lr"] = 0.05 * COSINE.factor(step, steps_per_epoch=STEPS, epochs=4)
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
            dense = run.pair.load("dense", network(batch_norm=True)).state_dict()
            found.append(all(torch.equal(dense[name], value) for name, value in model.state_dict().items()))
        assert found == [True, False]

    def test_the_sparse_half_is_that_of_a_run_without_it(self, finetuned: Run, tmp_path: Path) -> None:
        plain = make_run(tmp_path / "run", acdc(*FOUR), settings(learning_rate=COSINE))
        assert plain.execute()
        for ours, theirs in (("sparse", "sparse"), ("dense-raw", "dense")):
            assert (finetuned.folder.pair / f"{ours}.safetensors").read_bytes() == (
                plain.folder.pair / f"{theirs}.safetensors"
            ).read_bytes()

    def test_its_flops_are_paid_once_for_what_it_has_in_common(self, finetuned: Run) -> None:
        final = told(finetuned, "final")[0]
        main = [event for event in told(finetuned, "epoch") if event["stage"] == "main"]
        tuned = [event for event in told(finetuned, "epoch") if event["stage"] == "dense-finetune"]
        assert (
            final["training_flops"]
            == main[-1]["training_flops"] + tuned[-1]["training_flops"] - main[2]["training_flops"]
        )

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            (((72, 0.0),), "dense throughout"),
            (((36, 0.9), (36, 0.0)), "ends dense"),
            (((72, 0.9),), "needs a dense phase before a sparse one"),
        ],
    )
    def test_a_schedule_without_a_place_for_it_is_refused(
        self, tmp_path: Path, lengths: tuple[tuple[int, float], ...], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            make_run(tmp_path / "run", acdc(*lengths), settings(dense_finetune=True))

    def test_the_branch_is_the_end_of_the_last_dense_phase(self) -> None:
        assert branch_step(phases([(5, 0.0), (5, 0.9), (5, 0.0), (5, 0.9), (5, 0.95)])) == 15


class TestMembers:
    """Which networks are kept."""

    def test_the_best_of_each_kind_are_chosen_by_the_holdout(self, finetuned: Run) -> None:
        epochs = told(finetuned, "epoch")
        for name, is_sparse in (("dense-best", False), ("sparse-best", True)):
            held = [(event["holdout"]["accuracy"], -event["holdout"]["loss"], event["step"]) for event in epochs
                    if bool(event["phase_sparsity"]) == is_sparse]  # fmt: skip
            member = finetuned.pair.members[name]
            chosen = member.metrics["holdout"]
            assert isinstance(chosen, dict)
            assert (chosen["accuracy"], -chosen["loss"], member.step) == max(held)  # type: ignore[operator]

    def test_only_the_final_sparsity_can_be_the_best_sparse_one(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", acdc((18, 0.0), (18, 0.3), (18, 0.0), (18, 0.9)), settings())
        assert run.execute()
        assert run.pair.members["sparse-best"].step == 72
        assert run.pair.members["sparse-best"].sparsity == pytest.approx(0.9, abs=1e-3)

    def test_a_member_is_the_model_of_the_phase_that_ended_with_its_own_statistics(self, finetuned: Run) -> None:
        sparse = [event for event in told(finetuned, "phase") if event["member"] == "sparse"][-1]
        loaded = finetuned.pair.sparse(network(batch_norm=True))
        assert evaluate(loaded, digits().holdout.epoch(0)).plain() == sparse["holdout"]

    def test_zeros_and_kept_weights_are_those_of_the_files(self, finetuned: Run) -> None:
        for event in told(finetuned, "phase")[-2:]:
            loaded = finetuned.pair.load(event["member"], network(batch_norm=True))
            weights = [loaded.get_parameter(name) for name in event["layers"]]
            assert sum(int((weight == 0).sum()) for weight in weights) == event["zeros"]
            assert sum(kept for kept, _ in event["layers"].values()) == event["kept"]

    def test_averaged_members_are_averages_and_exactly_sparse(self, finetuned: Run, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", acdc(*FOUR), settings(ema_decay=0.9, learning_rate=COSINE))
        assert run.execute()
        average = run.pair.sparse(network(batch_norm=True))
        plain = finetuned.pair.sparse(network(batch_norm=True))
        masks = run.pair.masks("sparse")
        assert all(torch.equal(mask, finetuned.pair.masks("sparse")[name]) for name, mask in masks.items())
        for name, mask in masks.items():
            assert not average.get_parameter(name)[~mask].any()
            assert not torch.equal(average.get_parameter(name), plain.get_parameter(name))

    def test_recalibrated_statistics_are_those_of_the_training_batches(self, finetuned: Run, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", acdc(*FOUR), settings(recalibrate_batches=3, learning_rate=COSINE))
        assert run.execute()
        ours, plain = (r.pair.sparse(network(batch_norm=True)) for r in (run, finetuned))
        assert all(torch.equal(weight, plain.get_parameter(name)) for name, weight in ours.named_parameters())
        batches = [inputs for inputs, _ in digits().train.epoch(0)][:3]
        hidden = [plain[0](inputs) for inputs in batches]  # type: ignore[index]
        mean = torch.stack([values.mean((0, 2, 3)) for values in hidden]).mean(0)
        torch.testing.assert_close(ours.get_buffer("1.running_mean"), mean, rtol=1e-4, atol=1e-5)
        assert not torch.equal(ours.get_buffer("1.running_mean"), plain.get_buffer("1.running_mean"))


class TestHoldout:
    """When the hold-out is looked at."""

    def test_it_is_looked_at_after_epochs_and_where_a_member_is_saved_and_at_no_other_phase(
        self, tmp_path: Path
    ) -> None:
        lengths = ((4, 0.0), (5, 0.9), (6, 0.9), (7, 0.0), (5, 0.5), (9, 0.9))  # epochs end at 18 and 36
        run = make_run(tmp_path / "run", acdc(*lengths), settings(epochs=2))
        assert run.execute()
        phases_told = told(run, "phase")
        assert [event["step"] for event in phases_told] == [4, 9, 15, 22, 27, 36]
        assert [event["member"] for event in phases_told] == ["dense", None, "sparse", "dense", None, "sparse"]
        assert [event["holdout"] is not None for event in phases_told] == [True, False, True, True, False, True]
        assert all(event["holdout"] for event in told(run, "epoch"))


class TestTestSet:
    """The test set is read once for each member, after everything else."""

    class Watched:
        """A split that notes how much was told when it was read."""

        def __init__(self, split: Any, metrics: Path) -> None:
            self._split, self._metrics = split, metrics
            self.read: list[str] = []

        @property
        def samples(self) -> int:
            return int(self._split.samples)

        def __len__(self) -> int:
            return len(self._split)

        def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            self.read.append(json.loads(self._metrics.read_text().splitlines()[-1])["stage"])
            yield from self._split.epoch(epoch, start=start)

    def test_it_is_read_at_the_end_only(self, tmp_path: Path) -> None:
        splits = digits()
        watched = self.Watched(splits.test, tmp_path / "run" / "metrics.jsonl")
        run = make_run(
            tmp_path / "run", acdc(*FOUR), settings(dense_finetune=True), splits=without(splits, test=watched)
        )
        assert run.execute()
        assert watched.read == ["dense-finetune"] * 6  # five members, and the sparse half once more with int8 values

    def test_a_run_may_do_without_it(self, finetuned: Run, tmp_path: Path) -> None:
        splits = digits()
        watched = self.Watched(splits.test, tmp_path)
        given = settings(dense_finetune=True, learning_rate=COSINE, test=False)
        run = make_run(tmp_path / "run", acdc(*FOUR), given, splits=without(splits, test=watched))
        assert run.execute()
        assert watched.read == []
        tested, untested = told(finetuned, "final")[0]["members"], told(run, "final")[0]["members"]
        for name, member in tested.items():
            assert untested[name] == {field: said for field, said in member.items() if field not in ("test", "int8")}
            assert run.pair.members[name].sha256 == finetuned.pair.members[name].sha256

    def test_it_chooses_nothing(self, finetuned: Run, tmp_path: Path) -> None:
        splits = digits()
        inputs = [(x.flip(0), y) for x, y in splits.test.epoch(0)]  # labels no longer belong to their images

        class Wrong(self.Watched):  # type: ignore[name-defined, misc]
            def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
                return iter(inputs)

        run = make_run(
            tmp_path / "run", acdc(*FOUR), settings(dense_finetune=True, learning_rate=COSINE),
            splits=without(splits, test=Wrong(splits.test, tmp_path)),
        )  # fmt: skip
        assert run.execute()
        for name, member in finetuned.pair.members.items():
            assert run.pair.members[name].sha256 == member.sha256


class TestLedger:
    """Training FLOPs."""

    def test_a_uniform_half_and_half_schedule_costs_half_of_one_plus_the_sparse_share(self, tmp_path: Path) -> None:
        method = acdc(*((18, s) for s in (0.0, 0.75) * 2), distribution=Uniform())

        def bare() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 32, bias=False), nn.Linear(32, 8, bias=False), Padded())

        learning = OptimizerSettings(lr=0.05, momentum=0.9, weight_decay=0.0)
        run = make_run(tmp_path / "run", method, settings(optimizer=learning), make_model=bare)
        assert run.execute()
        final = told(run, "final")[0]
        zeros = told(run, "epoch")[2]["zeros"]  # of the dense phase between
        assert zeros < 0.05 * 2304
        assert final["training_flops"] / final["dense_training_flops"] == pytest.approx(0.5 * (1 + 0.25), abs=0.012)
        assert final["dense_training_flops"] == 3 * 2 * 2304 * 72 * BATCH

    def test_a_dense_run_with_partial_batches_costs_one_dense_training(self, tmp_path: Path) -> None:
        splits = Digits(holdout=0.1, drop_last=False).load(
            None, batch_size=700, eval_batch_size=512, seed=0, device=CPU
        )
        sizes = [len(labels) for _, labels in splits.train.epoch(0)]
        assert len(set(sizes)) == 2
        given = replace(settings(epochs=2, batch_size=700), steps_per_epoch=len(sizes))
        run = make_run(tmp_path / "run", acdc((2 * len(sizes), 0.0)), given, splits=splits)
        assert run.execute()
        start, final = told(run, "start")[0], told(run, "final")[0]
        assert final["training_flops"] == 3 * final["dense_forward_flops"] * 2 * sum(sizes)
        assert final["dense_training_flops"] == start["dense_training_flops"] == final["training_flops"]

    def test_a_run_whose_flops_are_all_counted_says_nothing_of_it(self, finetuned: Run) -> None:
        assert "uncounted" not in told(finetuned, "start")[0]

    def test_every_event_counts_what_its_own_weights_cost(self, finetuned: Run) -> None:
        forward = count_forward_flops(network(batch_norm=True), torch.zeros(1, 1, 8, 8))
        epochs = [event for event in told(finetuned, "epoch") if event["stage"] == "main"]
        spent = 0
        for event in epochs:
            spent += 3 * event["forward_flops"] * STEPS * BATCH
            assert event["training_flops"] == spent
            assert (event["forward_flops"] == forward.total()) == (event["zeros"] == 0)


class Recurrent(nn.Module):
    """Reads an image row by row; no rule counts its LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.rnn(images.squeeze(1))[0][:, -1])
        return logits


def test_a_run_whose_flops_lack_something_says_of_what(tmp_path: Path) -> None:
    names = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    run = make_run(tmp_path / "run", acdc((18, 0.0), (18, 0.5)), settings(epochs=2), make_model=Recurrent)
    with pytest.warns(SparsityWarning, match=f"what is computed with {names[0]}, {names[1]} is not counted"):
        assert run.execute()
    assert told(run, "start")[0]["uncounted"] == names


class Padded(nn.Module):
    """Two further classes that are never predicted, so that ten labels fit."""

    def forward(self, logits: Tensor) -> Tensor:
        return nn.functional.pad(logits, (0, 2))


class Causal(nn.Module):
    """Keeps a mask with -inf in a buffer, as attention does, and adds it to zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(batch_norm=True)
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

    def forward(self, images: Tensor) -> Tensor:
        attended = self.mask.softmax(-1) @ images
        logits: Tensor = self.inner(attended)
        return logits


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_model_with_a_constant_buffer_of_infinities_is_trained_and_resumed(tmp_path: Path, average: float) -> None:
    given = settings(ema_decay=average, dense_finetune=True)
    whole = make_run(tmp_path / "whole", acdc(*FOUR), given, make_model=Causal)
    assert whole.execute()
    run = make_run(tmp_path / "run", acdc(*FOUR), given, make_model=Causal)
    run.listen([StopIn("main", step=20, run=run)])
    assert not run.execute()
    again = Run(run.folder, run.parts)
    assert again.execute()
    for path in whole.folder.pair.iterdir():
        assert (run.folder.pair / path.name).read_bytes() == path.read_bytes()


def test_a_run_with_skipped_updates_still_completes_every_phase(tmp_path: Path) -> None:
    class Overflows(nn.Module):
        """Has an infinite gradient at every seventh batch."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images)
            if self.training:
                self.calls += 1
                if int(self.calls) % 7 == 0:
                    logits.register_hook(lambda gradient: gradient * float("inf"))
            return logits

    run = make_run(tmp_path / "run", acdc(*FOUR), settings(precision="fp16"), make_model=Overflows)
    assert run.execute()
    assert [(event["phase"], event["step"]) for event in told(run, "phase")] == [(0, 18), (1, 36), (2, 54), (3, 72)]
    assert [event["step"] for event in told(run, "epoch")] == [18, 36, 54, 72]
    assert run.pair.members["sparse"].step == 72
    calls = run.pair.sparse(Overflows()).get_buffer("calls")
    assert int(calls) == 72 + 72 // 6 - 1  # every seventh batch came on top, but none after the last step


def test_a_loss_that_never_recovers_ends_the_run_instead_of_skipping_for_ever(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images) * float("nan")  # type: ignore[no-any-return]

    run = make_run(tmp_path / "run", acdc(*FOUR), settings(precision="fp16"), make_model=Broken)
    with pytest.raises(TrainingError, match=r"100 updates in a row overflowed after step 0 .* the loss is nan"):
        run.execute()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_at_lower_precision_ends_with_an_exactly_sparse_half(tmp_path: Path, precision: str) -> None:
    run = make_run(tmp_path / "run", acdc(*FOUR), settings(precision=precision, clip_norm=1.0))
    assert run.execute()
    sparse = run.pair.members["sparse"]
    assert sparse.kept == 1352 - round(0.9 * 1352)
    assert told(run, "final")[0]["members"]["sparse"]["test"]["accuracy"] > 0.15


def test_muon_trains_a_whole_run_of_linear_layers(tmp_path: Path) -> None:
    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    given = settings(optimizer=OptimizerSettings(name="muon", lr=3e-3), dense_finetune=True)
    run = make_run(tmp_path / "run", acdc(*FOUR), given, make_model=linear)
    assert run.execute()
    members = told(run, "final")[0]["members"]
    assert members["dense"]["test"]["accuracy"] > 0.6
    assert members["sparse"]["kept"] == 2368 - round(0.9 * 2368)


@pytest.mark.parametrize("stop_at", [1, 9, 18, 27, 54, 60, 72, 80])
def test_a_run_stopped_on_request_and_begun_anew_ends_with_the_same_bytes(
    finetuned: Run, tmp_path: Path, stop_at: int
) -> None:
    class Stop:
        """Asks for a stop once so many steps are done in all."""

        def __init__(self) -> None:
            self.run: Run | None = None
            self.step = 0

        def event(self, event: Any) -> None: ...

        def progress(self, progress: Any) -> None:
            done = progress.step + (18 if progress.stage != "main" else 0)
            if self.run is not None and done >= stop_at:
                self.run.request_stop()
                self.step = self.step or progress.step

    given = settings(dense_finetune=True, learning_rate=COSINE, checkpoint_epochs=0.5)
    first = Stop()
    run = make_run(tmp_path / "run", acdc(*FOUR), given, listeners=(first,))
    first.run = run
    stopped = run.execute()
    assert not stopped or stop_at > 72
    again = Run(run.folder, run.parts)
    assert stopped or again.execute()
    for path in finetuned.folder.pair.iterdir():
        assert (run.folder.pair / path.name).read_bytes() == path.read_bytes()
    assert run.folder.metrics.read_bytes() == finetuned.folder.metrics.read_bytes()
    times, whole = (
        [json.loads(line) for line in folder.timing.read_text().splitlines()]
        for folder in (run.folder, finetuned.folder)
    )
    parts = [time for time in times if not time["samples"]]  # what a stop cuts off has its wall time too
    ends_at = first.step + (first.step == 72)  # the fine-tuning does one step before it stops
    assert len(parts) == (not stopped and ends_at % 18 != 0)
    assert [(time["stage"], time["epoch"], time["samples"]) for time in times if time not in parts] == [
        (time["stage"], time["epoch"], time["samples"]) for time in whole
    ]


def test_checkpoints_hold_plain_data_only(finetuned: Run) -> None:
    store = CheckpointStore(finetuned.folder.checkpoints)
    state = torch.load(store.folder / f"step-{store.steps[0]:09d}.pt", weights_only=True)
    assert set(state["state"]) == {"version", "config", "step", "log_sizes", "spent", "stage", "state"}


def test_the_pair_of_a_run_is_found_by_its_folder(finetuned: Run) -> None:
    assert set(Pair(finetuned.folder.pair).members) == {"dense", "dense-raw", "dense-best", "sparse", "sparse-best"}


def test_default_settings_are_those_of_the_papers_cifar_runs() -> None:
    assert (TrainSettings().epochs, TrainSettings().batch_size) == (200, 128)
