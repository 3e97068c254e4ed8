from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import LENGTHS, STEPS, Case, bert, callback, gpt2, trainer, transformers, vit

import sparsetwin as st
from sparsetwin.errors import ConfigError, ScheduleError, UsageError
from sparsetwin.integrations.transformers import SparsifierCallback, default_targets
from sparsetwin.methods import Method

SPARSE_STEPS = {*range(4, 7), *range(10, STEPS + 1)}  # after these, a sparse phase is in force or has just ended


@pytest.fixture(params=["bert", "gpt2", "vit"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "vit":
        return vit(request.getfixturevalue("images"))
    return {"bert": bert, "gpt2": gpt2}[request.param](request.getfixturevalue("tokens"))


class Watch(transformers.TrainerCallback):
    """Notes at every evaluation and update what the model and the gradients are."""

    def __init__(self, watched: SparsifierCallback) -> None:
        self.watched = watched
        self.zeros: dict[int, float] = {}
        self.norms: dict[int, float] = {}
        self.pruned_gradients = 0
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        gradients = [p.grad.norm() for p in given["model"].parameters() if p.grad is not None]
        self.norms[state.global_step + 1] = float(torch.stack(gradients).norm())
        sparsifier = self.watched.sparsifier
        for name, mask in sparsifier.masks.items():
            self.pruned_gradients += int(sparsifier.weights[name].grad[~mask].count_nonzero())

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        rows = self.watched.sparsifier.report()
        self.zeros[state.global_step] = 1 - sum(r.nonzero for r in rows) / sum(r.size for r in rows)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if "loss" in given["logs"]:
            self.losses.append(given["logs"]["loss"])


def test_a_network_trains_at_80_percent_and_both_halves_open_with_from_pretrained(case: Case, tmp_path: Path):
    sparse = callback()
    watch = Watch(sparse)
    run = trainer(case, tmp_path, callbacks=[sparse, watch], eval_strategy="steps", eval_steps=1)
    run.train()

    size = sum(weight.numel() for weight in sparse.sparsifier.weights.values())
    kept = size - round(0.8 * size)
    assert sum(int(mask.sum()) for mask in sparse.sparsifier.masks.values()) == kept
    assert sum(watch.losses[-3:]) < sum(watch.losses[:3])
    for step, zeros in watch.zeros.items():  # the phase that just ended, at boundaries too
        assert (zeros >= 0.8 - 1 / size) == (step in SPARSE_STEPS), step
    members = sparse.pair.members
    assert {name: (m.step, m.kept) for name, m in members.items()} == {"dense": (9, size), "sparse": (STEPS, kept)}
    for name, member in members.items():
        opened = getattr(transformers, case.auto).from_pretrained(tmp_path / "pair" / name)
        expected = sparse.pair.load(name, run.model).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in opened.state_dict().items())
        logged = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
        assert member.metrics == {"eval_loss": logged[member.step]}
        card = (tmp_path / "pair" / name / "README.md").read_text()
        assert f"| of these kept | {member.kept:,} |" in card
        assert f"| eval_loss | {logged[member.step]:.6g} |" in card


def test_clipping_sees_the_gradients_of_kept_weights_only(tokens: torch.Tensor, tmp_path: Path):
    sparse = callback()
    watch = Watch(sparse)
    run = trainer(gpt2(tokens), tmp_path, callbacks=[sparse, watch], max_grad_norm=1e-3)
    run.train()
    assert watch.pruned_gradients == 0
    assert watch.norms == pytest.approx(dict.fromkeys(range(1, STEPS + 1), 1e-3), rel=1e-2)  # less, if masked later


@pytest.mark.parametrize("method", [partial(st.TopKAST, exploration=0), st.ST3])
def test_methods_that_update_more_than_they_compute_with_get_those_gradients(
    method: Callable[..., Method], tmp_path: Path
):
    sparse = callback(method=method, targets=st.Targets(include=("transformer.h.*.mlp.c_fc.weight",)))
    seen: list[bool] = []

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            masks = sparse.sparsifier.gradient_masks
            for name, used in sparse.sparsifier.masks.items():
                gradient = sparse.sparsifier.weights[name].grad
                updated = masks.get(name, torch.ones_like(used))
                assert int((updated & ~used).sum()) > 0.2 * used.numel()
                seen.append(torch.equal(gradient != 0, updated))

    made = gpt2(torch.randint(256, (20_000,)))
    trainer(made, tmp_path, callbacks=[sparse, Gradients()], max_grad_norm=1e-3).train()
    assert seen == [True] * 24  # two weights, twelve sparse steps


class Choosing(transformers.TrainerCallback):
    """Notes the masks after each step, and before each update that chooses weights the norm of all gradients."""

    def __init__(self, watched: SparsifierCallback) -> None:
        self.watched = watched
        self.norms: list[float] = []
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.watched.sparsifier.awaits_gradients:
            gradients = [p.grad.norm() for p in given["model"].parameters() if p.grad is not None]
            self.norms.append(float(torch.stack(gradients).norm()))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.masks.append(dict(self.watched.sparsifier.masks))


@pytest.mark.parametrize(("method", "choices"), [(st.RigL, 2), (st.SNIP, 1)])
def test_weights_are_chosen_by_clipped_gradients_which_choose_as_unclipped_ones_do(
    method: Callable[..., Method], choices: int, tmp_path: Path
):
    made = gpt2(torch.randint(256, (20_000,)))
    found = []
    for max_norm in (0.0, 1e-3):  # 0: the Trainer does not clip
        sparse = SparsifierCallback(
            lambda total, epoch: st.schedules.periodic(sparsity=0.8, total_steps=total, every_steps=6), method=method
        )
        choosing = Choosing(sparse)
        run = trainer(made, tmp_path, callbacks=[sparse, choosing], max_grad_norm=max_norm, learning_rate=0.0)
        run.train()  # at learning rate 0, so that both runs choose by gradients at the same weights
        found.append(choosing)
    unclipped, clipped = found
    assert len(unclipped.norms) == choices
    assert min(unclipped.norms) > 0.1
    assert clipped.norms == pytest.approx([1e-3] * choices, rel=1e-2)
    for expected, masks in zip(unclipped.masks, clipped.masks, strict=True):
        assert masks.keys() == expected.keys() != set()
        assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


def test_accumulated_micro_batches_are_one_step(tokens: torch.Tensor, tmp_path: Path):
    sparse = callback()
    watch = Watch(sparse)
    run = trainer(
        gpt2(tokens),
        tmp_path,
        callbacks=[sparse, watch],
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=5,
    )  # fmt: skip  12 batches an epoch: steps of 5, 5 and 2
    run.train()
    assert sparse.sparsifier.steps == STEPS
    assert {step for step, zeros in watch.zeros.items() if zeros > 0.7} == SPARSE_STEPS


def test_lengths_in_epochs_count_the_epochs_of_the_trainer(tokens: torch.Tensor, tmp_path: Path):
    seen: list[tuple[int, int]] = []

    def schedule(total_steps: int, steps_per_epoch: int) -> Any:
        seen.append((total_steps, steps_per_epoch))
        return LENGTHS(total_steps, steps_per_epoch)

    run = trainer(
        gpt2(tokens), tmp_path, callbacks=[SparsifierCallback(schedule)], max_steps=-1, num_train_epochs=5,
        per_device_train_batch_size=4, gradient_accumulation_steps=3,
    )  # fmt: skip
    run.train()
    assert seen == [(20, 4)]


def test_mixed_precision_runs_to_a_pair(tokens: torch.Tensor, tmp_path: Path):
    sparse = callback()
    trainer(gpt2(tokens), tmp_path, callbacks=[sparse], bf16=True).train()
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "sparse")
    assert opened.dtype == torch.float32
    assert 0.79 < 1 - sum(r.nonzero for r in sparse.sparsifier.report()) / 24576 < 0.81


def test_a_second_call_of_train_begins_a_new_schedule(tokens: torch.Tensor, tmp_path: Path):
    sparse = callback()
    run = trainer(gpt2(tokens), tmp_path, callbacks=[sparse])
    run.train()
    first = sparse.sparsifier
    run.train()
    assert sparse.sparsifier is not first
    assert (first.steps, sparse.sparsifier.steps) == (STEPS, STEPS)


def test_a_phase_that_is_cut_short_is_saved_as_it_is(tokens: torch.Tensor, tmp_path: Path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_training_stop = state.global_step == 12

    sparse = callback()
    trainer(gpt2(tokens), tmp_path, callbacks=[sparse, Stop()]).train()
    assert {name: member.step for name, member in sparse.pair.members.items()} == {"dense": 9, "sparse": 12}


@pytest.mark.parametrize("half", ["dense", "sparse"])
def test_the_best_checkpoint_is_that_of_one_half(half: str, tokens: torch.Tensor, tmp_path: Path):
    sparse = callback()
    run = trainer(
        gpt2(tokens), tmp_path, callbacks=[sparse], eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model=f"{half}_loss",
    )  # fmt: skip
    run.train()
    losses = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    competing = [step for step in losses if (step in SPARSE_STEPS) == (half == "sparse")]
    best = min(competing, key=losses.__getitem__)
    assert run.state.best_global_step == best
    assert run.state.best_metric == losses[best]
    assert sparse.sparsifier.steps == best  # the masks are those of the weights that were loaded
    assert bool(sparse.sparsifier.masks) == (half == "sparse")
    assert not any(weight[~mask].any() for weight, mask in _masked(sparse))
    assert sparse.pair.members["sparse"].step == STEPS


def _masked(sparse: SparsifierCallback) -> list[tuple[torch.Tensor, torch.Tensor]]:
    masks = sparse.sparsifier.masks
    return [(sparse.sparsifier.weights[name].detach(), mask) for name, mask in masks.items()]


def test_embeddings_and_heads_tied_to_them_are_no_targets(tokens: torch.Tensor, images: Any):
    masked_lm = transformers.BertForMaskedLM(bert(tokens).make().config)
    for model in (masked_lm, gpt2(tokens).make(), vit(images).make()):
        chosen = default_targets(model).resolve(model)
        embedded = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        assert not embedded & set(chosen.values())
        matrices = {name for name, weight in model.named_parameters() if weight.ndim >= 2 and weight not in embedded}
        assert set(chosen) == {name for name in matrices if "token" not in name and "position" not in name}


def _greedy(**given: Any) -> dict[str, Any]:
    return {"eval_strategy": "steps", "eval_steps": 2, **given}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (_greedy(metric_for_best_model="loss"), "metric_for_best_model='sparse_loss'"),
        (_greedy(metric_for_best_model="eval_accuracy"), "metric_for_best_model='sparse_accuracy'"),
        (_greedy(load_best_model_at_end=True, save_strategy="steps", save_steps=2), "sparse_loss"),
        (_greedy(lr_scheduler_type="reduce_lr_on_plateau"), "ReduceLROnPlateau would take"),
        ({"enable_jit_checkpoint": True}, "use save_steps"),
    ],
)
def test_what_would_mix_the_halves_or_cannot_be_served_is_refused(
    settings: dict[str, Any], message: str, tokens: torch.Tensor, tmp_path: Path
):
    run = trainer(gpt2(tokens), tmp_path, callbacks=[callback()], **settings)
    with pytest.raises(UsageError, match=message):
        run.train()


def test_early_stopping_is_refused_by_name(tokens: torch.Tensor, tmp_path: Path):
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    run = trainer(gpt2(tokens), tmp_path, callbacks=[callback(), stopping], **_greedy(metric_for_best_model="loss"))
    with pytest.raises(UsageError, match="EarlyStoppingCallback would compare"):
        run.train()


def test_a_schedule_of_another_length_than_the_run_is_refused(tokens: torch.Tensor, tmp_path: Path):
    run = trainer(gpt2(tokens), tmp_path, callbacks=[SparsifierCallback(lambda total, epoch: LENGTHS(20, 5))])
    with pytest.raises(ScheduleError, match="has 20 steps, the trainer will do 18"):
        run.train()


def test_a_method_that_learns_parameters_is_refused_with_what_to_use_instead(tmp_path: Path):
    run = trainer(gpt2(torch.randint(256, (20_000,))), tmp_path, callbacks=[callback(method=st.STR)])
    with pytest.raises(ConfigError, match=r"STR learns parameters.*`sparsetwin train`.*loop of your own"):
        run.train()
    assert len(run.optimizer.param_groups) == 2  # the Trainer's own: with weight decay and without


def test_there_is_no_sparsifier_before_training():
    with pytest.raises(UsageError, match=r"before trainer\.train"):
        _ = callback().sparsifier
