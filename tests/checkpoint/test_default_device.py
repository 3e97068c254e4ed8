"""Files are read and written on the CPU, whatever PyTorch's default device is."""

import pytest
import torch
from torch import Tensor

from sparsetwin.checkpoint import (
    SparseFile,
    iter_sparse,
    load_masks,
    load_sparse,
    load_sparse_bitmask,
    save_sparse,
    save_sparse_bitmask,
)


@pytest.fixture
def network() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(16, 24, generator=generator) > 0.8
    tensors = {"layer.weight": torch.randn(16, 24, generator=generator) * mask, "layer.bias": torch.ones(16)}
    tensors["empty.weight"] = torch.zeros(0, 4)
    return tensors, {"layer.weight": mask, "empty.weight": torch.zeros(0, 4, dtype=torch.bool)}


@pytest.mark.parametrize("values", ["exact", "bfloat16", "float16", "int8"])
def test_a_sparse_file_is_written_and_read_under_another_default_device(tmp_path, network, values):
    tensors, masks = network
    save_sparse(tmp_path / "here", tensors, masks, values=values)
    expected = load_sparse(tmp_path / "here").tensors
    with torch.device("meta"):
        save_sparse(tmp_path / "file", tensors, masks, values=values)
        found = load_sparse(tmp_path / "file")
        one_by_one = dict(iter_sparse(tmp_path / "file"))
        with SparseFile.open(tmp_path / "file") as file:
            single = {name: file.dense(name) for name in tensors}
        read_masks = load_masks(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "here").read_bytes()
    for tensors_read in (found.tensors, one_by_one, single):
        assert all(torch.equal(tensors_read[name], tensor) for name, tensor in expected.items())
    for masks_read in (found.masks, read_masks):
        assert all(torch.equal(masks_read[name], mask) for name, mask in masks.items())


def test_a_sparse_bitmask_file_is_written_and_read_under_another_default_device(tmp_path, network):
    tensors, masks = network
    with torch.device("meta"):
        save_sparse_bitmask(tmp_path / "file", tensors, masks)
        found = load_sparse_bitmask(tmp_path / "file")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert all(torch.equal(found.masks[name], mask) for name, mask in masks.items())
