"""Drop-and-grow methods learn at 90% sparsity; which is better is not asked."""

import itertools

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.data import Digits


@pytest.mark.parametrize(
    "method",
    [
        lambda steps: st.SET(schedule=st.schedules.periodic(sparsity=0.9, total_steps=steps, every_steps=20)),
        lambda steps: st.RigL(
            schedule=st.schedules.periodic(sparsity=0.9, total_steps=steps, every_steps=20, stop_step=3 * steps // 4)
        ),
        lambda steps: st.GraNet(
            schedule=st.schedules.gradual(
                sparsity=0.9,
                total_steps=steps,
                start_step=0,
                stop_step=steps // 2,
                every_steps=20,
                initial_sparsity=0.5,
            )
        ),
    ],
    ids=["set", "rigl", "granet"],
)
def test_drop_and_grow_learns_digits(method):
    steps = 300
    splits = Digits().load(None, batch_size=64, eval_batch_size=1000, seed=0, device=torch.device("cpu"))
    torch.manual_seed(0)
    pixels = splits.example_input.numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = st.Sparsifier(method(steps), model, optimizer)
    batches = (batch for epoch in range(steps) for batch in splits.train.epoch(epoch))
    for images, labels in itertools.islice(batches, steps):
        sparsifier.begin_step()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = total = 0
    for images, labels in splits.holdout.epoch(0):
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    assert right / total > 0.75  # a tenth by chance
