"""What int8 values cost a sparse network whose inputs were never standardised, with and without rounding in training.

Every pixel of the digits is multiplied by a factor of its own, from 10^-SPREAD to 10^SPREAD, and a perceptron of static
masks learns from that. Its weights then span as many orders within one output, while a scale has 127 steps.

    python benchmarks/quantization.py --spread 2 --seeds 3
"""

import argparse

import torch
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.data import Digits

SPARSITY, EPOCHS, HIDDEN = 0.9, 40, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spread", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for start in (None, 0.5, 0.75, 0.875):
        for seed in range(args.seeds):
            exact, rounded = trained(args.spread, seed=seed, start=start)
            told = "none" if start is None else f"from {start:g} of the run"
            print(f"rounding {told}, seed {seed}: {exact:.2%} as trained, {rounded:.2%} with int8 values", flush=True)


def trained(spread: float, *, seed: int, start: float | None) -> tuple[float, float]:
    """Train; return the test accuracy of the network as it is, and of what an int8 file gives back."""
    splits = Digits(holdout=0.0).load(None, batch_size=64, eval_batch_size=512, seed=0, device=torch.device("cpu"))
    factors = 10 ** (spread * (2 * torch.rand(64, generator=torch.Generator().manual_seed(5)) - 1))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    with torch.no_grad():
        model[0].weight.div_(factors)
    steps = len(splits.train) * EPOCHS
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    quantization = None if start is None else st.Int8(start_step=round(start * steps))
    schedule = st.schedules.constant(sparsity=SPARSITY, total_steps=steps)
    method = st.Static(schedule=schedule, distribution=st.Uniform(), quantization=quantization)
    sparsifier = st.Sparsifier(method, model, optimizer)
    for epoch in range(EPOCHS):
        for inputs, labels in splits.train.epoch(epoch):
            sparsifier.begin_step()
            nn.functional.cross_entropy(model(inputs.flatten(1) * factors), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    exact = accuracy(model, splits, factors)
    st.Int8().round_(sparsifier.weights)
    return exact, accuracy(model, splits, factors)


@torch.no_grad()
def accuracy(model: nn.Module, splits, factors: Tensor) -> float:
    found = [(model(inputs.flatten(1) * factors).argmax(1) == labels) for inputs, labels in splits.test.epoch(0)]
    return float(torch.cat(found).float().mean())


if __name__ == "__main__":
    main()
