"""Train a dense network of digits and its sparse twin with Lightning."""

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsetwin.data import Digits
from sparsetwin.integrations.lengths import PhaseLengths
from sparsetwin.integrations.lightning import SparsifierCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
options = parser.parse_args()

digits = Digits(shift=0).load(None, batch_size=32, eval_batch_size=500, seed=0, device=torch.device("cpu"))
images, labels = (torch.cat(parts) for parts in zip(*digits.train.epoch(0), strict=True))
train = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
images, labels = (torch.cat(parts) for parts in zip(*digits.test.epoch(0), strict=True))
test = DataLoader(TensorDataset(images, labels), batch_size=500)


class Network(L.LightningModule):
    """A small network of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        """Log the accuracy, and once more for the sparse half alone."""
        x, y = batch
        accuracy = (self.layers(x).argmax(1) == y).float().mean()
        self.log("accuracy", accuracy)
        self.log("sparse_accuracy", accuracy if callback.half == "sparse" else torch.nan)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lengths = PhaseLengths(sparsity=0.8, unit="epochs", warmup=2, sparse=2, dense=2, final_dense=2, final_sparse=4)
callback = SparsifierCallback(lengths, options.out / "pair")
best = ModelCheckpoint(options.out, filename="best", monitor="sparse_accuracy", mode="max", save_last=True)
trainer = L.Trainer(
    max_epochs=options.epochs,
    accelerator="cpu",
    gradient_clip_val=1.0,
    callbacks=[callback, best],
    logger=False,
    default_root_dir=options.out,
)
torch.manual_seed(0)
network = Network()
trainer.fit(network, train, test, ckpt_path=options.resume)

for name, member in callback.pair.members.items():
    print(f"{name}: {member.kept:,} of {member.targets:,} weights kept, {member.metrics}")
sparse = callback.pair.sparse(network)
