"""Train a dense ResNet of digits and its sparse twin with timm's training task, EMA and checkpoints."""

import argparse
from pathlib import Path

import timm
import torch
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

import sparsetwin as st
from sparsetwin.data import Digits
from sparsetwin.integrations.timm import SparseTask

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/timm"))
parser.add_argument("--model", default="resnet10t")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
options = parser.parse_args()


class Task(SparseTask, ClassificationTask):
    """timm's classification task with a sparsifier."""


digits = Digits().load(None, batch_size=64, eval_batch_size=500, seed=0, device=torch.device("cpu"))
torch.manual_seed(0)
model = timm.create_model(options.model, in_chans=1, num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

task = Task(model, nn.CrossEntropyLoss(), verbose=False)
task.setup_ema(decay=0.99)

epoch_steps = len(digits.train)
schedule = st.schedules.alternating(
    sparsity=0.8,
    total_steps=options.epochs * epoch_steps,
    warmup_steps=epoch_steps,
    sparse_steps=epoch_steps,
    dense_steps=epoch_steps,
    final_dense_steps=epoch_steps,
    final_sparse_steps=2 * epoch_steps,
)
sparsifier = task.attach(st.ACDC(schedule=schedule), optimizer)
pair = st.Pair(options.out / "pair")

options.out.mkdir(parents=True, exist_ok=True)
saver = CheckpointSaver(
    model=model, task=task, optimizer=optimizer, checkpoint_dir=str(options.out), recovery_dir=str(options.out)
)
first_epoch = 0
if options.resume:
    first_epoch = resume_task_checkpoint(task, options.resume, optimizer=optimizer)
    load_task_ema_checkpoint(task, options.resume)

for epoch in range(first_epoch, options.epochs):
    for index, (x, y) in enumerate(digits.train.epoch(epoch)):
        sparsifier.begin_step()
        task(x, y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=epoch * epoch_steps + index)
        if sparsifier.phase_ends:
            pair.save(task.get_eval_model(ema=True).module, sparsifier)
    average = task.get_eval_model(ema=True).eval()
    with torch.no_grad():
        right = sum(int((average(x).argmax(1) == y).sum()) for x, y in digits.holdout.epoch(0))
    is_sparse = sparsifier.phase is not None and sparsifier.phase.is_sparse
    saver.save_checkpoint(epoch, metric=right / digits.holdout.samples if is_sparse else None)

for name, member in pair.members.items():
    print(f"{name}: {member.kept:,} of {member.targets:,} weights kept")
