"""The format of sparse weights: exact round trips, and indices that cannot be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import sparse

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import CSRBlocks


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 50),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    block=st.none() | st.integers(1, 60),
)
def test_from_dense_to_dense_is_exact(rows, columns, density, block):
    weight = sparse(rows, columns, density=density)
    matrix = CSRBlocks.from_dense(weight, block_columns=block)
    assert torch.equal(matrix.to_dense(), weight)
    assert matrix.kept == int(weight.count_nonzero())
    assert matrix.row_pointers.dtype == torch.int32
    assert int(matrix.row_pointers[-1, -1]) == matrix.kept


def test_weights_lie_block_by_block_then_row_by_row_then_by_column():
    weight = torch.tensor([[1.0, 0.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [4.0, 5.0, 0.0, 6.0]])
    matrix = CSRBlocks.from_dense(weight, block_columns=2)
    assert matrix.values.tolist() == [1, 4, 5, 2, 3, 6]
    assert matrix.row_pointers.tolist() == [[0, 1, 1, 3], [3, 5, 5, 6]]
    assert matrix.positions.tolist() == [0, 8, 9, 2, 3, 11]


def test_a_mask_decides_what_is_kept_and_nan_is_kept_without_one():
    weight = torch.tensor([[0.0, float("nan")], [2.0, 3.0]])
    assert CSRBlocks.from_dense(weight).kept == 3
    keep = torch.tensor([[True, False], [False, True]])
    matrix = CSRBlocks.from_dense(weight, keep=keep)
    assert matrix.values.tolist() == [0.0, 3.0]


def test_values_are_read_anew_without_new_memory():
    weight = sparse(6, 9, density=0.4)
    matrix = CSRBlocks.from_dense(weight, block_columns=4)
    address = matrix.values.data_ptr()
    matrix.gather_((weight * 3).requires_grad_())
    assert matrix.values.data_ptr() == address
    assert torch.equal(matrix.to_dense(), weight * 3)
    with pytest.raises(ConfigError, match="10 elements"):
        matrix.gather_(torch.zeros(10))


def test_a_vector_may_be_read_behind_the_last_value_and_offset():
    matrix = CSRBlocks.from_dense(sparse(3, 5, density=0.5))
    for array in (matrix.values, matrix.offsets(torch.arange(5) * 64)):
        assert array.untyped_storage().nbytes() >= (array.numel() + array.storage_offset()) * 4 + 64


def test_plain_csr_gives_the_same_matrix_as_dense():
    weight = sparse(7, 11, density=0.3)
    kept = weight != 0
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    rows = {"row_pointers": pointers, "column_indices": kept.nonzero()[:, 1], "values": weight[kept]}
    assert torch.equal(CSRBlocks.from_csr((7, 11), **rows, block_columns=4).to_dense(), weight)


HOSTILE = {
    "rising past the end": ({"row_pointers": [0, 2, 9]}, "rise from 0 to 3"),
    "falling": ({"row_pointers": [0, 4, 3]}, "rise from 0 to 3"),
    "negative start": ({"row_pointers": [-1, 2, 3]}, "rise from 0"),
    "too few row pointers": ({"row_pointers": [0, 3]}, "2 row pointers"),
    "a column beyond the matrix": ({"column_indices": [0, 1, 4]}, "0 to 4; expected 0 to 3"),
    "a negative column": ({"column_indices": [0, -1, 2]}, "-1 to 2"),
    "a huge column": ({"column_indices": [0, 2**62, 2]}, "expected 0 to 3"),
    "a column twice": ({"column_indices": [1, 1, 2]}, "without repetition"),
    "columns out of order": ({"column_indices": [2, 1, 2]}, "must rise"),
    "too few values": ({"values": [1.0, 2.0]}, "2 values"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices_are_refused(name):
    changed, message = HOSTILE[name]
    arrays = {"row_pointers": [0, 2, 3], "column_indices": [0, 1, 2], "values": [1.0, 2.0, 3.0]} | changed
    with pytest.raises(ConfigError, match=message):
        CSRBlocks.from_csr((2, 4), **{key: torch.tensor(array) for key, array in arrays.items()})


def test_hostile_shapes_and_dtypes_are_refused():
    empty = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ConfigError, match="2147483647 elements"):
        CSRBlocks.from_csr((1, 2**40), row_pointers=torch.tensor([0, 0]), column_indices=empty, values=torch.zeros(0))
    with pytest.raises(ConfigError, match="float64"):
        CSRBlocks.from_dense(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ConfigError, match="at least one element"):
        CSRBlocks.from_dense(torch.zeros(0, 3))
    with pytest.raises(ConfigError, match="keep is"):
        CSRBlocks.from_dense(torch.zeros(2, 2), keep=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="block_columns=0"):
        CSRBlocks.from_dense(torch.ones(2, 2), block_columns=0)


def test_offsets_beyond_32_bits_are_refused_by_name():
    matrix = CSRBlocks.from_dense(torch.ones(1, 3))
    assert matrix.offsets(torch.tensor([0, 5, 2**31 - 1])).tolist() == [0, 5, 2**31 - 1]
    for offsets in ([0, 1, 2**31], [-1, 0, 0]):
        with pytest.raises(ConfigError, match="32-bit offsets"):
            matrix.offsets(torch.tensor(offsets))


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_row_ranges_cover_every_row_once_and_share_the_work(parts):
    weight = sparse(50, 40, density=0.5)
    weight[:10] = 1.0  # ten heavy rows
    matrix = CSRBlocks.from_dense(weight, block_columns=16)
    ranges = matrix.row_ranges(parts)
    assert [row for begin, end in ranges for row in range(begin, end)] == list(range(50))
    work = [int((weight[begin:end] != 0).sum()) + end - begin for begin, end in ranges]
    assert len(ranges) <= parts
    assert max(work) <= sum(work) / parts + 2 * 41
