"""What a user might write in a module of their own."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsetwin.data import DataSource, Digits, Splits
from sparsetwin.recipes import ModelSettings, Recipe, ScheduleSettings
from sparsetwin.training import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Mirrored(DataSource):
    """The digits under another name, with an option of its own."""

    holdout: float = 0.1
    note: str | None = None
    """Anything."""

    def load(
        self, folder: Path | None, *, batch_size: int, eval_batch_size: int, seed: int, device: torch.device
    ) -> Splits:
        """Read the digits."""
        digits = Digits(holdout=self.holdout, shift=0)
        return digits.load(folder, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, device=device)


def mirrored() -> Recipe:
    """Two linear layers on the mirrored digits."""
    return Recipe(
        dataset=Mirrored(),
        model=ModelSettings(name="tiny_networks:Linear", options={"hidden": 16}),
        schedule=ScheduleSettings(warmup=1, sparse=1, dense=1, final_dense=1, final_sparse=1),
        train=TrainSettings(epochs=4, batch_size=64),
        threads=1,
    )
