"""How large is the first update of weights that come back, under each way to treat the optimizer's state?

A perceptron learns the embedded digits: dense, then 90% sparse (gradients masked before and weights after each step)
for a number of steps, then one dense step under every policy, all from the same state and on the same batch. Prints
three Markdown tables. Run it with ``python benchmarks/optimizer_reset.py``.
"""

import argparse
import copy
import platform
import statistics
from collections import defaultdict
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor, nn

from sparsetwin.masking import apply_masks_
from sparsetwin.optimizer_state import restore_initial_state_

WARMUP_STEPS, SPARSITY, BATCH, FOLLOWED_STEPS, LOSS_IMAGES = 200, 0.9, 64, 20, 256

OPTIMIZERS = {
    "SGD, momentum 0.9": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 1e-3}),
    "AdamW, beta2 0.95": (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.95)}),
    "AMSGrad": (torch.optim.Adam, {"lr": 1e-3, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-3}),
    "RAdam": (torch.optim.RAdam, {"lr": 1e-3}),
    "Adamax": (torch.optim.Adamax, {"lr": 2e-3}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "RMSprop, momentum 0.9": (torch.optim.RMSprop, {"lr": 3e-4, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "Muon": (getattr(torch.optim, "Muon", None), {"lr": 0.02}),
}
FIRST = {"momentum_buffer", "exp_avg"}
SECOND = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "row_var", "col_var"}


def none(optimizer, weights, masks):
    """Leave the state alone."""


def zero_first_moments(optimizer, weights, masks):
    zero(optimizer, FIRST)


def zero_moments_keep_step(optimizer, weights, masks):
    zero(optimizer, FIRST | SECOND)


def zero_everything(optimizer, weights, masks):
    zero(optimizer, FIRST | SECOND | {"step", "mu_product"})


def initial_values(optimizer, weights, masks):
    """The policy of the library."""
    restore_initial_state_(optimizer, weights.values())


def second_moment_from_kept(optimizer, weights, masks):
    """Zero the momentum; weights that come back get the mean second moment of those that stayed."""
    zero(optimizer, FIRST)
    for name, weight in weights.items():
        for key in SECOND & optimizer.state[weight].keys():
            moment = optimizer.state[weight][key]
            if moment.shape == weight.shape:
                moment[~masks[name]] = moment[masks[name]].mean()


POLICIES = [
    none,
    zero_first_moments,
    zero_moments_keep_step,
    zero_everything,
    initial_values,
    second_moment_from_kept,
]


def zero(optimizer, keys):
    for state in optimizer.state.values():
        for key in keys & state.keys():
            state[key].zero_()


def digits() -> tuple[Tensor, Tensor]:
    with np.load(str(files("sparsetwin.data") / "digits.npz"), allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["images"]).reshape(-1, 64).float() / 16 - 0.3
        return images, torch.from_numpy(arrays["labels"]).long()


class Run:
    """A model, its optimizer and its data; a deep copy of it continues with the same batches."""

    def __init__(self, kind, options, seed, data):
        torch.manual_seed(seed)
        self.draws = np.random.default_rng(seed)
        self.images, self.labels = data
        layers = [nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 128, bias=False), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Linear(128, 10, bias=False))
        self.optimizer = kind(self.model.parameters(), **options)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    @property
    def weights(self):
        return dict(self.model.named_parameters())

    def steps(self, count, masks):
        for _ in range(count):
            batch = torch.from_numpy(self.draws.integers(0, len(self.images), BATCH))
            self.optimizer.zero_grad()
            self.loss(self.model(self.images[batch]), self.labels[batch]).backward()
            apply_masks_({name: weight.grad for name, weight in self.weights.items()}, masks)
            self.optimizer.step()
            apply_masks_(self.weights, masks)

    @torch.no_grad()
    def loss_now(self):
        return self.loss(self.model(self.images[:LOSS_IMAGES]), self.labels[:LOSS_IMAGES]).item()

    def copy(self):
        data = {id(self.images): self.images, id(self.labels): self.labels}
        return copy.deepcopy(self, data)


def magnitude_masks(weights):
    flat = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    threshold = flat.kthvalue(round(SPARSITY * flat.numel())).values
    return {name: weight.detach().abs() > threshold for name, weight in weights.items()}


def measure(run, masks, policy):
    """Return the mean first update of weights that come back and of kept ones, in lr, and the highest rise in loss."""
    run = run.copy()
    before, loss_before = {name: w.detach().clone() for name, w in run.weights.items()}, run.loss_now()
    policy(run.optimizer, run.weights, masks)
    run.steps(1, {})
    lr = run.optimizer.param_groups[0]["lr"]
    updates = {name: (weight.detach() - before[name]).abs() / lr for name, weight in run.weights.items()}
    back = torch.cat([updates[name][~masks[name]] for name in updates]).mean().item()
    kept = torch.cat([updates[name][masks[name]] for name in updates]).mean().item()
    losses = [run.loss_now()]
    for _ in range(FOLLOWED_STEPS - 1):
        run.steps(1, {})
        losses.append(run.loss_now())
    return back, kept, max(losses) - loss_before


def print_table(title, results, index):
    print(f"\n{title}\n\n| optimizer | sparse steps |", " | ".join(p.__name__ for p in POLICIES), "|")
    print("|---|---:|" + "---:|" * len(POLICIES))
    for (name, steps), by_policy in results.items():
        values = [[seed[index] for seed in by_policy[policy.__name__]] for policy in POLICIES]
        cells = [f"{statistics.mean(v):.2g} ± {statistics.pstdev(v):.1g}" for v in values]
        print(f"| {name} | {steps} |", " | ".join(cells), "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparse-steps", type=int, nargs="+", default=[500, 2000, 5000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    results = defaultdict(lambda: defaultdict(list))
    for name, (kind, options) in OPTIMIZERS.items():
        for seed in range(arguments.seeds if kind is not None else 0):
            run = Run(kind, options, seed, data)
            run.steps(WARMUP_STEPS, {})
            masks, done = magnitude_masks(run.weights), 0
            apply_masks_(run.weights, masks)
            for steps in sorted(arguments.sparse_steps):
                run.steps(steps - done, masks)
                done = steps
                for policy in POLICIES:
                    results[name, steps][policy.__name__].append(measure(run, masks, policy))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread; mean ± standard deviation of")
    print(f"seeds 0 to {arguments.seeds - 1}; {WARMUP_STEPS} dense steps, then {SPARSITY:.0%} of all weights pruned")
    print_table("Mean first update of weights that come back, in units of lr", results, 0)
    print_table("Mean first update of weights that stayed, in units of lr", results, 1)
    print_table(f"Highest rise of the loss of {LOSS_IMAGES} images within {FOLLOWED_STEPS} dense steps", results, 2)


if __name__ == "__main__":
    main()
