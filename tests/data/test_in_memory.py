import numpy as np
import pytest
import torch

from sparsetwin.data._draws import below
from sparsetwin.data._in_memory import shifted
from sparsetwin.data._normalisation import Normalisation


def shifted_one_by_one(images, *key, padding, flip):
    """The plain twin: pad, cut, mirror, image after image."""
    count, _, height, width = images.shape
    tops, lefts = (below(2 * padding + 1, count, *key, side) for side in ("top", "left"))
    mirrored = below(2, count, *key, "flip") if flip else np.zeros(count)
    made = []
    for image, top, left, mirror in zip(images, tops, lefts, mirrored, strict=True):
        padded = torch.nn.functional.pad(image, (padding,) * 4)
        window = padded[:, top : top + height, left : left + width]
        made.append(window.flip(2) if mirror else window)
    return torch.stack(made)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (1, False), (4, True), (7, True)])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (64, 3, 32, 32), (9, 1, 8, 12)])
def test_shifting_a_batch_at_once_equals_shifting_one_by_one(padding, flip, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    key = (1, "augment", 2, 3)
    expected = shifted_one_by_one(images, *key, padding=padding, flip=flip)
    assert torch.equal(shifted(images, *key, padding=padding, flip=flip), expected)


def test_every_shift_and_both_mirrorings_occur_alike():
    dot = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    dot[:, :, 4, 3] = 1
    moved = shifted(dot, "count", padding=1, flip=True).sum(0)[0]
    mirrored = moved[3:6, 4:7].sum().item() - moved[3:6, 4].sum().item()  # columns 4 to 6; 4 is reached both ways
    assert moved.sum() == 20_000
    assert moved[3:6, 2:7].sum() == 20_000
    assert mirrored == pytest.approx(20_000 / 3, rel=0.05)


def test_normalisation_takes_white_for_one():
    normalisation = Normalisation.per_channel([0.5, 0.0], [0.5, 1.0], white=16, device=torch.device("cpu"))
    images = torch.tensor([[[[0, 8, 16]], [[0, 8, 16]]]], dtype=torch.uint8)
    assert normalisation.apply(images).tolist() == [[[[-1.0, 0.0, 1.0]], [[0.0, 0.5, 1.0]]]]
