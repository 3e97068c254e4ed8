"""2:4 masks are what PyTorch's semi-structured format holds: nothing is lost on the way there and back."""

import pytest
import torch
from torch.sparse import to_sparse_semi_structured
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsetwin.distributions import Global
from sparsetwin.patterns import NM
from sparsetwin.scores import magnitude
from sparsetwin.selection import select_masks

DTYPES = (torch.float16, torch.bfloat16)


def pruned(shape, dtype, *, transposable=False, device="cpu"):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    budgets = Global().budgets({"a": shape}, 0.5)
    pattern = NM(2, 4, transposable=transposable)
    mask = select_masks({"a": weight}, lambda name: magnitude(weight), budgets, pattern=pattern)["a"]
    return torch.where(mask, weight, 0)


def there_and_back(matrix):
    values, metadata = sparse_semi_structured_from_dense_cutlass(matrix)
    assert values.shape == (matrix.shape[0], matrix.shape[1] // 2)
    return sparse_semi_structured_to_dense_cutlass(values, metadata)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposable", [False, True])
def test_a_linear_weight_survives_the_round_trip_to_the_bit(dtype, transposable):
    weight = pruned((64, 128), dtype, transposable=transposable)
    assert torch.equal(there_and_back(weight), weight)
    assert int(weight.count_nonzero()) == weight.numel() // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposable_weight_survives_it_when_transposed_and_another_does_not(dtype):
    both_ways = pruned((64, 128), dtype, transposable=True).t().contiguous()
    assert torch.equal(there_and_back(both_ways), both_ways)
    one_way = pruned((64, 128), dtype).t().contiguous()
    assert not torch.equal(there_and_back(one_way), one_way)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposable", [False, True])
def test_a_convolution_survives_it_as_a_matrix_of_taps_by_inputs(dtype, transposable):
    weight = pruned((32, 64, 3, 3), dtype, transposable=transposable)
    matrix = weight.permute(0, 2, 3, 1).reshape(32, -1)
    assert torch.equal(there_and_back(matrix), matrix)
    backward = weight.permute(1, 2, 3, 0).reshape(64, -1)  # the weight that the gradient of the input is made with
    assert torch.equal(there_and_back(backward), backward) is transposable


def test_an_unstructured_weight_does_not_survive_it():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).half()
    mask = select_masks({"a": weight}, lambda name: weight.abs(), Global().budgets({"a": weight.shape}, 0.5))["a"]
    assert not torch.equal(there_and_back(weight * mask), weight * mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposable", [False, True])
def test_the_semi_structured_tensor_on_cuda_multiplies_as_the_dense_one(dtype, transposable):
    weight = pruned((256, 512), dtype, transposable=transposable, device="cuda")
    given = torch.randn(512, 128, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    compressed = to_sparse_semi_structured(weight)
    assert torch.equal(compressed.to_dense(), weight)
    torch.testing.assert_close(torch.mm(compressed, given), weight @ given, rtol=2e-2, atol=2e-1)
    if transposable:
        turned = weight.t().contiguous()
        assert torch.equal(to_sparse_semi_structured(turned).to_dense(), turned)
