"""A small data set of every kind, and a way to load it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import KINDS, Load, loader, write_cifar, write_photograph_shards, write_tree

from sparsetwin.data import CharText, Cifar10, Cifar100, Digits, ImageNet


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    root = tmp_path_factory.mktemp("data")
    text = root / "text"
    text.mkdir()
    generator = np.random.default_rng(0)
    (text / "input.txt").write_text("".join(generator.choice(list("abcdef \nö"), 3000)), encoding="utf-8")
    return {
        "digits": None,
        "cifar10": write_cifar(root / "cifar10"),
        "cifar100": write_cifar(
            root / "cifar100" / "data", classes=100, per_class=3, columns=("img", "fine_label")
        ).parent,
        "imagenet-tree": write_tree(root / "tree"),
        "imagenet-shards": write_photograph_shards(root / "shards"),
        "chartext": text,
        "cache": root / "cache",
    }


@pytest.fixture
def make(folders: dict[str, Path | None]) -> Callable[..., Load]:
    """Return a function from a kind and field values to a loader."""

    def made(kind: str, **fields: object) -> Load:
        name, _, _ = kind.partition("-")
        given: dict[str, object] = {
            "digits": {},
            "cifar10": {"cache": folders["cache"]},
            "cifar100": {"cache": folders["cache"]},
            "imagenet": {"size": 16, "resize": 18, "workers": 0, "holdout": 0.2, "shuffle_window": 15},
            "chartext": {"context": 16, "holdout": 0.1},
        }[name]
        types = {"digits": Digits, "cifar10": Cifar10, "cifar100": Cifar100, "imagenet": ImageNet, "chartext": CharText}
        return loader(types[name](**{**given, **fields}), folders[kind])

    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
