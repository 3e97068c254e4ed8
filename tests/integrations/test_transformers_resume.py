import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import STEPS, Case, bert, callback, gpt2, same, state, trainer, transformers, vit

from sparsetwin.errors import CheckpointError, StateError
from sparsetwin.integrations.lengths import PhaseLengths
from sparsetwin.integrations.transformers import SparsifierCallback

KINDS = {
    "in the warm-up": 2,
    "where a sparse phase begins": 3,
    "in a sparse phase": 4,
    "where a dense phase begins and an epoch ends": 6,
    "in a dense phase": 8,
    "where the final sparse phase begins": 9,
    "in the final sparse phase": 13,
    "at the end": STEPS,
}
SAVING = {"save_strategy": "steps", "save_steps": 1}
Make = Callable[[pytest.FixtureRequest], Case]


@pytest.fixture(scope="module", params=["bert", "gpt2", "vit"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Any]:
    """A case and two runs of it that save after every step: one without the callback, and one with it."""
    torch.set_num_threads(1)
    if request.param == "vit":
        case = vit(request.getfixturevalue("images"))
    else:
        case = {"bert": bert, "gpt2": gpt2}[request.param](request.getfixturevalue("tokens"))
    control = trainer(case, tmp_path_factory.mktemp("control"), **SAVING)
    control.train()
    sparse = callback()
    run = trainer(case, tmp_path_factory.mktemp("sparse"), callbacks=[sparse], **SAVING)
    run.train()
    return case, control, (run, sparse)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one_as_its_control_does(
    kind: str, uninterrupted: tuple[Case, Any, Any], tmp_path: Path
):
    case, control, (run, sparse) = uninterrupted
    checkpoint = f"checkpoint-{KINDS[kind]}"

    source = Path(control.args.output_dir) / checkpoint
    plain = trainer(case, tmp_path / "control", model=_model(case, source))
    plain.train(resume_from_checkpoint=str(source))
    assert same(state(plain), state(control))

    source = Path(run.args.output_dir) / checkpoint
    again = callback(resume_from=source)
    resumed = trainer(case, tmp_path / "sparse", model=_model(case, source), callbacks=[again])
    resumed.train(resume_from_checkpoint=str(source))
    assert same(state(resumed), state(run))
    assert same(again.sparsifier.state_dict(), sparse.sparsifier.state_dict())
    ended = {name: member for name, member in again.pair.members.items() if member.step > KINDS[kind]}
    assert {name: member.sha256 for name, member in ended.items()} == {
        name: sparse.pair.members[name].sha256 for name in ended
    }


def _model(case: Case, checkpoint: Path) -> Any:
    """Return what the Trainer has to be given to resume: of a ViT, whose weights it does not find, the loaded model."""
    return transformers.AutoModelForImageClassification.from_pretrained(checkpoint) if "Image" in case.auto else None


@pytest.mark.parametrize("step", [2, 4, 8], ids=["in the warm-up", "in a sparse phase", "in a dense phase"])
def test_weights_that_the_trainer_did_not_load_are_noticed(step: int, images: Any, tmp_path: Path):
    case = vit(images)
    trainer(case, tmp_path, callbacks=[callback()], save_strategy="steps", save_steps=step).train()
    resumed = trainer(case, tmp_path, callbacks=[callback()])
    with pytest.raises(CheckpointError, match=r"does not hold the weights of .* loaded with from_pretrained"):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


def test_a_best_model_that_the_trainer_did_not_load_is_noticed_when_all_is_saved(images: Any, tmp_path: Path):
    run = trainer(
        vit(images), tmp_path, callbacks=[callback()], eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="dense_loss",
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        run.train()
    assert (tmp_path / "pair" / "sparse" / "model.safetensors").is_file()


def _stopped(case: Case, folder: Path, *, at: int, **settings: Any) -> None:
    """Train and save at every second step until a step, as a run that is killed there leaves its folder."""
    every_second = {"save_strategy": "steps", "save_steps": 2, **settings}
    trainer(case, folder, callbacks=[callback()], **every_second).train()
    for step in range(at + 2, STEPS + 1, 2):
        shutil.rmtree(folder / f"checkpoint-{step}")


def test_resume_from_checkpoint_true_finds_the_state_beside_the_last_checkpoint(tokens: torch.Tensor, tmp_path: Path):
    case = gpt2(tokens)
    whole = trainer(case, tmp_path / "whole", callbacks=[callback()])
    whole.train()
    _stopped(case, tmp_path / "run", at=12)
    again = callback()
    resumed = trainer(case, tmp_path / "run", callbacks=[again], restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert same(state(resumed), state(whole))
    assert again.sparsifier.steps == STEPS  # the callback that was passed in is the one that runs


def test_accumulation_and_adam_resume_with_the_same_bits(tokens: torch.Tensor, tmp_path: Path):
    case = gpt2(tokens)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 5}
    whole = trainer(case, tmp_path / "whole", callbacks=[callback()], **settings)
    whole.train()
    _stopped(case, tmp_path / "run", at=10, **settings)
    resumed = trainer(case, tmp_path / "run", callbacks=[callback()], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(state(resumed), state(whole))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_checkpoint_without_our_whole_file_is_refused_and_the_last_complete_one_named(
    damage: str, tokens: torch.Tensor, tmp_path: Path
):
    case = gpt2(tokens)
    _stopped(case, tmp_path, at=12)
    for step in (10, 12):
        file = tmp_path / f"checkpoint-{step}" / "sparsetwin.pt"
        content = file.read_bytes()
        file.unlink()
        if damage == "truncated":
            file.write_bytes(content[:-100])
    resumed = trainer(case, tmp_path, callbacks=[callback()])
    with pytest.raises(CheckpointError, match=r"last complete checkpoint is .*checkpoint-8, resume with"):
        resumed.train(resume_from_checkpoint=True)
    resumed = trainer(case, tmp_path, callbacks=[callback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_run_without_the_callback_is_not_continued_with_it(tokens: torch.Tensor, tmp_path: Path):
    case = gpt2(tokens)
    trainer(case, tmp_path, save_strategy="steps", save_steps=8).train()
    run = trainer(case, tmp_path, callbacks=[callback()])
    with pytest.raises(CheckpointError, match=r"nor has any other checkpoint .* load them with from_pretrained"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_the_state_of_another_step_is_refused(tokens: torch.Tensor, tmp_path: Path):
    case = gpt2(tokens)
    _stopped(case, tmp_path, at=12)
    shutil.copy(tmp_path / "checkpoint-8" / "sparsetwin.pt", tmp_path / "checkpoint-12" / "sparsetwin.pt")
    run = trainer(case, tmp_path, callbacks=[callback()])
    with pytest.raises(CheckpointError, match="step 12 of the Trainer, but step 8"):
        run.train(resume_from_checkpoint=True)


def test_another_schedule_is_refused_on_resuming(tokens: torch.Tensor, tmp_path: Path):
    case = gpt2(tokens)
    _stopped(case, tmp_path, at=12)
    other = PhaseLengths(sparsity=0.9, unit="steps", warmup=3, sparse=3, dense=3, final_dense=3, final_sparse=4)
    run = trainer(case, tmp_path, callbacks=[SparsifierCallback(other)])
    with pytest.raises(StateError, match="schedule"):
        run.train(resume_from_checkpoint=True)
