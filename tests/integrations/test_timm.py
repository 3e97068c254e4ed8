from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import KINDS, SCHEDULE, STEPS
from test_guides import import_timm

import sparsetwin as st
from sparsetwin.errors import CheckpointError, UsageError

timm = import_timm()

from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver  # noqa: E402

from sparsetwin.integrations.timm import SparseTask  # noqa: E402


class Task(SparseTask, ClassificationTask):
    pass


class Run:
    """A task with an EMA on one batch, with or without a sparsifier."""

    def __init__(self, *, sparse: bool = True) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
        model = timm.create_model("test_resnet", num_classes=10)
        self.task: Any = (Task if sparse else ClassificationTask)(model, torch.nn.CrossEntropyLoss(), verbose=False)
        self.task.setup_ema(decay=0.9)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.sparsifier = self.task.attach(st.ACDC(schedule=SCHEDULE), self.optimizer) if sparse else None

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            if self.sparsifier is not None:
                self.sparsifier.begin_step()
            self.task(self.x, self.y)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.task.update_ema(step)

    def save(self, folder: Path) -> Path:
        saver = CheckpointSaver(
            model=self.task.get_trainable_module(), task=self.task, optimizer=self.optimizer,
            checkpoint_dir=str(folder), recovery_dir=str(folder),
        )  # fmt: skip
        saver.save_checkpoint(0)
        return folder / "last.pth.tar"

    def load(self, file: Path) -> None:
        resume_task_checkpoint(self.task, file, optimizer=self.optimizer, log_info=False)
        load_task_ema_checkpoint(self.task, file)

    def tensors(self) -> dict[str, torch.Tensor]:
        states = (self.task.get_checkpoint_state(), self.task.get_checkpoint_state(ema=True))
        return {f"{key}.{name}": t for s in states for key in s if "state_dict" in key for name, t in s[key].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one_as_its_control_does(kind: str, tmp_path: Path):
    for sparse in (False, True):
        whole, stopped, resumed = (Run(sparse=sparse) for _ in range(3))
        whole.train(0, STEPS)
        stopped.train(0, KINDS[kind])
        folder = tmp_path / str(sparse)
        folder.mkdir()
        resumed.load(stopped.save(folder))
        resumed.train(KINDS[kind], STEPS)
        expected = whole.tensors()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.tensors().items())


def test_the_average_is_as_sparse_as_the_model_where_it_is_evaluated_and_saved():
    run = Run()
    run.train(0, STEPS)
    average = run.task.get_eval_model(ema=True).module.state_dict()
    saved = run.task.get_checkpoint_state(ema=True)["state_dict_ema"]
    for name, mask in run.sparsifier.masks.items():
        assert not average[name][~mask].any()
        assert not saved[name][~mask].any()
        assert not torch.equal(average[name], run.sparsifier.weights[name])


def test_a_checkpoint_that_was_saved_without_a_sparsifier_is_refused(tmp_path: Path):
    file = Run(sparse=False).save(tmp_path)
    with pytest.raises(CheckpointError, match="was saved without one"):
        Run().load(file)


def test_a_task_has_one_sparsifier():
    run = Run()
    with pytest.raises(UsageError, match="has a sparsifier already"):
        run.task.attach(st.ACDC(schedule=SCHEDULE), run.optimizer)
