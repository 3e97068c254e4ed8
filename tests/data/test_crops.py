import math

import numpy as np
import pytest
from data_sets import Image, noise
from hypothesis import given
from hypothesis import strategies as st

from sparsetwin.data._crops import DRAWS, crop_window, random_resized_crop, resized_center_crop
from sparsetwin.data._draws import fractions


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers())
def test_a_window_lies_within_its_image(width, height, key):
    left, top, wide, high = crop_window(width, height, fractions(DRAWS, key))
    assert 0 < wide <= width
    assert 0 < high <= height
    assert 0 <= left <= width - wide
    assert 0 <= top <= height - high


def test_areas_and_ratios_are_spread_as_stated():
    windows = [crop_window(2000, 2000, fractions(DRAWS, "spread", index)) for index in range(4000)]
    ratios = np.log([wide / high for _, _, wide, high in windows])
    assert np.abs(ratios).max() < math.log(4 / 3) + 0.01
    assert np.median(ratios) == pytest.approx(0, abs=0.02)
    small = [area for _, _, wide, high in windows if (area := wide * high / 4e6) < 0.7]  # all of these fit
    assert min(small) > 0.079
    assert np.histogram(small, 4, (0.08, 0.7))[0] == pytest.approx(np.full(4, len(small) / 4), rel=0.12)


def test_a_window_can_reach_every_border():
    windows = [crop_window(40, 30, fractions(DRAWS, "borders", index)) for index in range(500)]
    assert min(left for left, _, _, _ in windows) == min(top for _, top, _, _ in windows) == 0
    assert max(left + wide for left, _, wide, _ in windows) == 40
    assert max(top + high for _, top, _, high in windows) == 30


@pytest.mark.parametrize(
    ("size", "window"),
    [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13)), ((100, 100), (0, 0, 100, 100))],
)
def test_when_no_window_fits_it_is_the_largest_allowed_one_in_the_middle(size, window):
    draws = np.full(DRAWS, 0.999999)  # nearly the whole area, in the widest shape
    assert crop_window(*size, draws) == window


def test_a_random_crop_is_cut_resized_and_mirrored_every_other_time():
    image = Image.fromarray(noise(1, seed=0, side=50)[0])
    for index in range(20):
        draws = fractions(DRAWS, "crop", index)
        left, top, wide, high = crop_window(50, 50, draws)
        expected = image.crop((left, top, left + wide, top + high)).resize((16, 16), Image.Resampling.BILINEAR)
        pixels = np.asarray(expected)[:, ::-1] if draws[-1] < 0.5 else np.asarray(expected)
        assert np.array_equal(np.asarray(random_resized_crop(image, draws, size=16)), pixels)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (200, 300), (257, 256)])
def test_the_middle_is_cut_from_an_image_whose_shorter_side_has_the_asked_length(size):
    ramp = np.broadcast_to(np.linspace(0, 255, size[0])[None, :, None], (size[1], size[0], 3)).astype(np.uint8)
    middle = np.asarray(resized_center_crop(Image.fromarray(ramp), resize=256, size=224)).astype(float)
    assert middle.shape == (224, 224, 3)
    shown = 224 / (256 * max(1, size[0] / size[1]))  # of the width
    assert middle[0, 0, 0] == pytest.approx(255 * (1 - shown) / 2, abs=3)
    assert middle[0, -1, 0] == pytest.approx(255 * (1 + shown) / 2, abs=3)


def test_images_of_the_asked_size_are_not_changed():
    pixels = noise(1, seed=1)[0]
    assert np.array_equal(np.asarray(resized_center_crop(Image.fromarray(pixels), resize=32, size=32)), pixels)
