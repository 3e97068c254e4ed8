"""Windows over planes: equal to PyTorch's max pooling, exact copies of phases, and zero between the pixels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import dense, runnable_targets

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import PlaneLayout, PlaneWindow, Pool, Window, make_layout

TARGETS = runnable_targets()


def layouts(window: Window, channels: int, height: int, width: int) -> tuple[PlaneLayout, PlaneLayout]:
    pitch = window.least_pitch(width)
    body = window.body(height, width, pitch)
    source = make_layout(channels=channels, height=height, width=width, pitch=pitch, lead=window.lead(pitch), body=body)
    rows, columns = window.out_size(height, width)
    return source, make_layout(channels=channels, height=rows, width=columns, pitch=columns + 3, lead=5)


@settings(max_examples=80, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padded=st.booleans(),
    size=st.tuples(st.integers(1, 21), st.integers(1, 37)),
    images=st.sampled_from([1, 3]),
    target=st.sampled_from(sorted(TARGETS)),
)
def test_pooling_what_is_not_negative_equals_pytorch(kernel, stride, padded, size, images, target):
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
    window = Window(kernel=kernel, stride=stride, padding=padding)
    assume(min(window.out_size(*size)) >= 1)
    source, destination = layouts(window, 3, *size)
    x = dense(images, 3, *size).relu()
    pool = PlaneWindow(window, source=source, destination=destination, target=TARGETS[target])
    out = pool(source.pack(x))
    expected = F.max_pool2d(x, kernel, stride, padding)
    assert torch.equal(destination.unpack(out), expected)
    assert torch.equal(out, destination.pack(expected))  # zero between the pixels


def test_pooling_passes_nan_of_either_sign_on_and_takes_minus_zero_for_zero():
    window = Window(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    source, destination = layouts(window, 1, 9, 9)
    x = torch.full((1, 1, 9, 9), -0.0)
    x[0, 0, 2, 2], x[0, 0, 8, 8] = float("nan"), -torch.tensor(float("nan"))
    found = destination.unpack(PlaneWindow(window, source=source, destination=destination)(source.pack(x)))
    assert torch.equal(found.isnan(), F.max_pool2d(x, 3, 2, 1).isnan())
    assert not found.nan_to_num(0.0).any()


@pytest.mark.parametrize("size", [(7, 10), (1, 1), (2, 5), (16, 33)])
def test_splitting_into_phases_equals_packing_into_them(size):
    pitch = size[1] + 2
    source = make_layout(channels=3, height=size[0], width=size[1], pitch=pitch, body=size[0] * pitch + 96)
    split = make_layout(channels=3, height=size[0], width=size[1], phases=(2, 2), pitch=20, lead=3)
    x, out = dense(2, 3, *size), split.empty(2)
    planes = source.pack(x)
    for row in range(min(2, size[0])):
        for column in range(min(2, size[1])):
            window = Window(stride=(2, 2))
            origin = (row, column)
            PlaneWindow(window, source=source, destination=split, origin=origin, phase=origin)(planes, out=out)
    assert torch.equal(out, split.pack(x))


def test_bound_work_runs_again_on_threads_and_sees_new_numbers():
    window = Window(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    source, destination = layouts(window, 40, 60, 60)
    planes, out = source.empty(2), destination.empty(2)
    pieces = PlaneWindow(window, source=source, destination=destination).bound(planes, out=out, threads=3)
    assert len(pieces) == 6
    for seed in (1, 2):
        x = dense(2, 40, 60, 60, seed=seed).relu()
        source.pack(x, out=planes)
        Pool(2).run(pieces)
        assert torch.equal(destination.unpack(out), F.max_pool2d(x, 3, 2, 1))


def test_layouts_that_do_not_fit_are_refused():
    window = Window(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    source, destination = layouts(window, 2, 8, 8)
    bare = make_layout(channels=2, height=8, width=8, pitch=8)
    with pytest.raises(ConfigError, match="margins too small"):
        PlaneWindow(window, source=bare, destination=destination)
    small = make_layout(channels=2, height=2, width=2, pitch=4)
    with pytest.raises(ConfigError, match="does not fit"):
        PlaneWindow(window, source=source, destination=small)
    wide = Window(stride=(3, 3))
    with pytest.raises(ConfigError, match="step of 1 or 2"):
        PlaneWindow(wide, source=layouts(wide, 2, 8, 8)[0], destination=destination)
    with pytest.raises(ConfigError, match="expected contiguous planes"):
        PlaneWindow(window, source=source, destination=destination)(torch.zeros(1, 5))
