"""Train a dense network of digits and its sparse twin with Accelerate."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsetwin as st
from sparsetwin.data import Digits
from sparsetwin.integrations.accelerate import clip_grad_norm_, prepare, save_half

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--resume", type=int, default=0, help="epochs done in the state to go on from")
options = parser.parse_args()

digits = Digits(shift=0).load(None, batch_size=32, eval_batch_size=500, seed=0, device=torch.device("cpu"))
images, labels = (torch.cat(parts) for parts in zip(*digits.train.epoch(0), strict=True))
order = torch.Generator().manual_seed(0)
loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True, generator=order)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

accelerator = Accelerator(gradient_accumulation_steps=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

steps_per_epoch = -(-len(loader) // 4)
schedule = st.schedules.alternating(
    sparsity=0.8,
    total_steps=options.epochs * steps_per_epoch,
    warmup_steps=options.epochs * steps_per_epoch // 10,
    sparse_steps=2 * steps_per_epoch,
    dense_steps=2 * steps_per_epoch,
    final_dense_steps=2 * steps_per_epoch,
    final_sparse_steps=4 * steps_per_epoch,
)
sparsifier = prepare(accelerator, st.ACDC(schedule=schedule), model, optimizer)
pair = st.Pair(options.out / "pair")

if options.resume:
    accelerator.load_state(str(options.out / f"epoch-{options.resume}"))

for epoch in range(options.resume, options.epochs):
    order.manual_seed(epoch)  # the order of an epoch does not depend on where the run was resumed
    for x, y in loader:
        with accelerator.accumulate(model):
            sparsifier.begin_step()
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clip_grad_norm_(accelerator, sparsifier, model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if sparsifier.phase_ends:
            save_half(accelerator, pair, model, sparsifier)
    accelerator.save_state(str(options.out / f"epoch-{epoch + 1}"))

for name, member in pair.members.items():
    half = pair.load(name, model).eval()
    with torch.no_grad():
        right = sum(int((half(x).argmax(1) == y).sum()) for x, y in digits.test.epoch(0))
    pair.annotate(name, {"test_accuracy": right / digits.test.samples})
    print(f"{name}: {member.kept:,} of {member.targets:,} weights kept, accuracy {right / digits.test.samples:.1%}")
