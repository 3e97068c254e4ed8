"""Transposition is exact for every size and pitch, and touches nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import dense, runnable_targets

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import Transpose

TARGETS = runnable_targets()


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 70),
    gaps=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    target=st.sampled_from(sorted(TARGETS)),
)
def test_every_size_and_pitch_is_transposed_exactly(rows, columns, gaps, target):
    whole = torch.full((columns, rows + gaps[1]), 7.0)
    x = dense(rows, columns + gaps[0])[:, :columns]
    out = whole[:, :rows]
    assert torch.equal(Transpose(TARGETS[target])(x, out=out), x.t())
    assert torch.equal(whole[:, rows:], torch.full((columns, gaps[1]), 7.0))


def test_tensors_that_do_not_fit_are_refused():
    transpose, x = Transpose(), dense(4, 6)
    with pytest.raises(ConfigError, match=r"expected \(M, N\) and \(N, M\)"):
        transpose(x, out=torch.empty(4, 6))
    with pytest.raises(ConfigError, match="contiguous columns"):
        transpose(dense(6, 4).t(), out=torch.empty(6, 4))
    square = dense(4, 4)
    with pytest.raises(ConfigError, match="shares memory"):
        transpose(square, out=square)
    with pytest.raises(ConfigError, match="float64"):
        transpose(x.double(), out=torch.empty(6, 4))
