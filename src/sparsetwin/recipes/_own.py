"""Recipes of our own: small ones to begin with."""

from sparsetwin.data import CharText, Digits
from sparsetwin.recipes._recipe import ModelSettings, Recipe, TargetSettings
from sparsetwin.recipes._schedule import ScheduleSettings
from sparsetwin.training import LearningRateSettings, OptimizerSettings, TrainSettings


def digits() -> Recipe:
    """Handwritten digits, embedded: a real pair in under a minute on a laptop CPU."""
    return Recipe(
        dataset=Digits(),
        model=ModelSettings(name="digits_cnn"),
        schedule=ScheduleSettings(warmup=5, sparse=5, dense=5, final_dense=5, final_sparse=15),
        optimizer=OptimizerSettings(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        learning_rate=LearningRateSettings(shape="cosine", warmup_epochs=2),
        train=TrainSettings(epochs=60, batch_size=64, dense_finetune=True),
        threads=1,
    )


def charlm_gpt() -> Recipe:
    """A small GPT on the characters of Tiny Shakespeare; embeddings and head stay dense."""
    return Recipe(
        dataset=CharText(),
        model=ModelSettings(name="gpt", options={"context": 128, "layers": 4, "heads": 4, "width": 128}),
        schedule=ScheduleSettings(
            unit="fractions", warmup=0.1, sparse=0.1, dense=0.1, final_dense=0.15, final_sparse=0.25
        ),
        targets=TargetSettings(dense_last=True),
        optimizer=OptimizerSettings(name="adamw", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
        learning_rate=LearningRateSettings(shape="cosine", warmup_epochs=0.2),
        train=TrainSettings(epochs=10, batch_size=32, clip_norm=1.0),
    )
