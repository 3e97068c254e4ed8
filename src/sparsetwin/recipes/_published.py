"""The paper's experiments, with its hyperparameters.

Source of all: Peste et al., 2021, arXiv 2106.12379, and its published configurations.
"""

from sparsetwin.data import Cifar10, Cifar100, ImageNet
from sparsetwin.recipes._recipe import ModelSettings, Recipe
from sparsetwin.recipes._schedule import ScheduleSettings
from sparsetwin.training import LearningRateSettings, OptimizerSettings, TrainSettings


def cifar10_resnet20() -> Recipe:
    """ResNet-20 on CIFAR-10, 200 epochs: the schedule of the paper's CIFAR runs."""
    return Recipe(
        dataset=Cifar10(),
        model=ModelSettings(name="resnet20"),
        schedule=ScheduleSettings(warmup=10, sparse=20, dense=20, final_dense=20, final_sparse=30),
        optimizer=OptimizerSettings(lr=0.1, momentum=0.9, weight_decay=5e-4),
        learning_rate=LearningRateSettings(shape="step", milestones=(66, 126, 186), every="epoch"),
        train=TrainSettings(epochs=200, batch_size=128),
    )


def cifar100_wrn28_10() -> Recipe:
    """WRN-28-10 on CIFAR-100, 200 epochs (``freq20``)."""
    return Recipe(
        dataset=Cifar100(),
        model=ModelSettings(name="wrn_28_10", options={"dropout": 0.3}),
        schedule=ScheduleSettings(paper="cifar-200"),
        optimizer=OptimizerSettings(lr=0.08, momentum=0.9, nesterov=True, weight_decay=5e-4),
        learning_rate=LearningRateSettings(shape="step", milestones=(76, 116, 156), every="epoch"),
        train=TrainSettings(epochs=200, batch_size=128),
    )


def _imagenet(model: str) -> Recipe:
    return Recipe(
        dataset=ImageNet(),
        model=ModelSettings(name=model),
        schedule=ScheduleSettings(paper="imagenet-100"),
        optimizer=OptimizerSettings(lr=0.256, momentum=0.875, weight_decay=1 / 32768),
        learning_rate=LearningRateSettings(shape="cosine", warmup_epochs=5, every="epoch"),
        train=TrainSettings(epochs=100, batch_size=256, precision="fp16", channels_last=True, deterministic=False),
    )


def imagenet_resnet50() -> Recipe:
    """ResNet-50 on ImageNet, 100 epochs."""
    return _imagenet("resnet50")


def imagenet_mobilenetv1() -> Recipe:
    """MobileNetV1 on ImageNet, 100 epochs."""
    return _imagenet("mobilenetv1")
