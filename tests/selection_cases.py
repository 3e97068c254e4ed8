"""Layers to select from: every dtype and memory layout, and values that are hard to rank."""

import numpy as np
import torch
from hypothesis import strategies as st

from sparsetwin.scores import magnitude
from sparsetwin.selection import reference_masks, select_masks

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def contiguous(weight):
    return weight.contiguous()


def channels_last(weight):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.contiguous(memory_format=formats.get(weight.ndim, torch.contiguous_format))


def transposed(weight):
    return weight.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(weight):
    """Return the same values as every second column of a wider tensor, between numbers that must not be read."""
    wide = torch.full((*weight.shape, 2), torch.nan, dtype=weight.dtype)
    wide[..., 0] = weight
    return wide[..., 0]


LAYOUTS = (contiguous, channels_last, transposed, sliced)


def values(shape, dtype, seed):
    """Draw weights of which many are equal, zero of either sign, denormal, infinite or one float apart."""
    generator = np.random.default_rng(seed)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.tiny, -info.tiny / 4, info.max, np.inf, -np.inf, 1.0, -1.0, 1.0 + info.eps]
    normal = generator.normal(size=shape)
    picked = generator.choice(special, size=shape)
    share = generator.choice([0.0, 0.5, 1.0])
    return torch.from_numpy(np.where(generator.random(shape) < share, picked, normal)).to(dtype)


@st.composite
def layers(draw, dtypes=DTYPES):
    """Draw one to four named weights of small shapes."""
    made = {}
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
        weight = values(shape, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**32 - 1)))
        made[f"layer{index}"] = draw(st.sampled_from(LAYOUTS))(weight)
    return made


def by_magnitude(weights):
    return lambda name: magnitude(weights[name])


def by_value(weights):
    return lambda name: weights[name]


def shapes_of(weights):
    return {name: weight.shape for name, weight in weights.items()}


def sizes_of(weights):
    return {name: weight.numel() for name, weight in weights.items()}


def select(weights, distribution, sparsity, *, score=by_magnitude, minimum_kept=1):
    budgets = distribution.budgets(shapes_of(weights), sparsity)
    return select_masks(weights, score(weights), budgets, minimum_kept=minimum_kept)


def reference(weights, distribution, sparsity, *, score=by_magnitude, minimum_kept=1):
    budgets = distribution.budgets(shapes_of(weights), sparsity)
    return reference_masks(weights, score(weights), budgets, minimum_kept=minimum_kept)


def assert_same(masks, expected):
    assert list(masks) == list(expected)
    for name in masks:
        assert masks[name].dtype == torch.bool
        assert torch.equal(masks[name], expected[name]), name


def kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}
