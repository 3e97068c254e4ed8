"""Loaded networks and sizes: new ones are taken where no operation depends on them, and refused by name elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, images, pruned, relative_error, slim
from test_deploy_file import edit

from sparsetwin.errors import CheckpointError, UsageError
from sparsetwin.runtime import deploy, load


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.relu(self.conv(x)))

    def after(self, y: Tensor) -> Tensor:
        return y


class ScaledByWidth(Body):
    def after(self, y: Tensor) -> Tensor:
        return y * y.shape[-1] ** -0.5


class ScaledByConstant(Body):
    def after(self, y: Tensor) -> Tensor:
        return y + torch.tensor(float(y.shape[2]))


class AveragePool(Body):
    def after(self, y: Tensor) -> Tensor:
        return F.avg_pool2d(y, y.size()[3]).flatten(1)


class LargestPool(Body):
    def after(self, y: Tensor) -> Tensor:
        return F.max_pool2d(y, y.size()[2:]).flatten(1)


class LargeOnly(Body):
    def after(self, y: Tensor) -> Tensor:
        return y * 2 if y.shape[-1] > 20 else y


class FixedScale(Body):
    def after(self, y: Tensor) -> Tensor:
        return y * 0.5


class Plain(Body):
    def after(self, y: Tensor) -> Tensor:
        return y.mean((2, 3))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.first(a) + self.second(b)


def saved(tmp_path, kind: type[nn.Module], *example: Tensor) -> tuple[nn.Module, "object"]:
    torch.manual_seed(0)
    model = pruned(kind(), 0.3)
    path = tmp_path / "network.safetensors"
    deploy(model, example or images(1, 3, 16, 16), rivals=()).save(path)
    return model, path


def of_older_release(content) -> None:
    del content["free_axes"]


def check(model: nn.Module, loaded: nn.Module, *x: Tensor) -> None:
    with torch.no_grad():
        assert relative_error(loaded(*x), model(*x)) <= FP32


@pytest.mark.parametrize("kind", [ScaledByWidth, ScaledByConstant, AveragePool, LargestPool, LargeOnly])
def test_what_was_computed_from_an_images_size_is_not_used_for_another_size(tmp_path, kind):
    model, path = saved(tmp_path, kind)
    for _ in range(2):
        loaded = load(path)
        check(model, loaded, images(1, 3, 16, 16))
        check(model, loaded, images(3, 3, 16, 16))  # a batch is no image's size
        with pytest.raises(UsageError, match="does not take other sizes of axis 2, 3"):
            loaded(images(1, 3, 32, 32))
        loaded.save(path)  # and so again


@pytest.mark.parametrize("kind", [ScaledByWidth, ScaledByConstant, AveragePool, LargestPool, FixedScale])
def test_a_file_that_does_not_tell_takes_its_own_sizes_where_numbers_may_be_sizes(tmp_path, kind):
    model, path = saved(tmp_path, kind)
    edit(path, of_older_release)
    loaded = load(path)
    check(model, loaded, images(1, 3, 16, 16))
    with pytest.raises(UsageError, match="have numbers that may be sizes"):
        loaded(images(1, 3, 32, 32))


def test_a_file_that_does_not_tell_takes_new_sizes_where_there_are_no_such_numbers(tmp_path):
    model, path = saved(tmp_path, Plain)
    edit(path, of_older_release)
    check(model, load(path), images(2, 3, 32, 24))


@pytest.mark.parametrize("kind", [FixedScale, Plain])
def test_numbers_of_the_models_own_do_not_fix_sizes(tmp_path, kind):
    model, path = saved(tmp_path, kind)
    check(model, load(path), images(2, 3, 32, 24))


def test_values_that_were_added_in_one_shape_are_not_added_in_two(tmp_path):
    model, path = saved(tmp_path, Two, images(1, 3, 8, 8), images(1, 3, 8, 8, seed=2))
    loaded = load(path)
    check(model, loaded, images(2, 3, 9, 9), images(2, 3, 9, 9, seed=2))
    with pytest.raises(UsageError, match="adds values of one shape"):
        loaded(images(2, 3, 8, 8), images(1, 3, 8, 8))


def test_a_file_tells_which_axes_are_free(tmp_path):
    slim_path = tmp_path / "slim.safetensors"
    deploy(slim(), images(1, 3, 32, 32), rivals=()).save(slim_path)
    with safe_open(slim_path, "pt") as file:
        assert '\\"free_axes\\": [[0, 2, 3]]' in file.metadata()["sparsetwin"]
    edit(slim_path, lambda content: content.update(free_axes=[[0], [0]]))
    with pytest.raises(CheckpointError, match="another call"):
        load(slim_path)
