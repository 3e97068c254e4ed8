"""N:M, blocks and channels: the same masks as the plain twin, hand-worked ones, exact counts and clear refusals."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selection_cases import DTYPES, LAYOUTS, assert_same, by_value, kept, shapes_of, sizes_of, values
from sparsetwin.distributions import Budget, Global, Uniform
from sparsetwin.errors import SelectionError
from sparsetwin.grouped_selection import check_groups, is_nm, kept_by, reference_grouped_masks
from sparsetwin.patterns import NM, Block, Channel
from sparsetwin.selection import select_masks

NM_PATTERNS = (NM(1, 2), NM(2, 4), NM(1, 3), NM(3, 4), NM(2, 17), NM(5, 8))
TRANSPOSABLE = tuple(NM(n, m, transposable=True) for n, m in [(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (2, 5), (4, 8)])
RANKED = (Block(1, 1), Block(2, 3), Block(4, 1), Block(1, 4), Channel(0), Channel(1))


def half(weights, pattern):
    """Return what N:M keeps of each layer as budgets of one layer each, and of all in one budget."""
    counts = {name: weight.numel() // pattern.m * pattern.n for name, weight in weights.items()}
    return st.sampled_from(
        [[Budget((name,), count) for name, count in counts.items()], [Budget(tuple(counts), sum(counts.values()))]]
    )


@st.composite
def divisible(draw, pattern, *, largest=3, most=3):
    """Draw one to three layers that the groups of a pattern divide, linear, convolution or vector."""
    rows, columns = (1, 1) if isinstance(pattern, Channel) else pattern.tile
    made = {}
    for index in range(draw(st.integers(1, most))):
        taps = tuple(draw(st.lists(st.integers(1, 2), max_size=3)))
        shape = (rows * draw(st.integers(1, largest)), columns * draw(st.integers(1, largest)), *taps)
        weight = values(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**32 - 1)))
        made[f"layer{index}"] = draw(st.sampled_from(LAYOUTS))(weight)
    return made


def group_size_of(weight, pattern):
    """Return how many weights each group of a layer holds."""
    if isinstance(pattern, Channel):
        return weight.numel() // weight.shape[pattern.axis]
    return pattern.rows * pattern.columns


def twins(weights, budgets, pattern, minimum_kept=1):
    masks = select_masks(weights, by_value(weights), budgets, minimum_kept=minimum_kept, pattern=pattern)
    plain = reference_grouped_masks(weights, by_value(weights), budgets, minimum_kept=minimum_kept, pattern=pattern)
    assert_same(masks, plain)
    return masks


@settings(deadline=None)
@given(st.data())
def test_nm_is_its_plain_twin_and_has_the_structure(data):
    pattern = data.draw(st.sampled_from(NM_PATTERNS))
    weights = data.draw(divisible(pattern))
    for name, mask in twins(weights, data.draw(half(weights, pattern)), pattern).items():
        assert is_nm(mask, pattern.n, pattern.m)
        assert mask.stride() == torch.empty_like(weights[name], dtype=torch.bool).stride()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_transposable_nm_is_its_plain_twin_and_has_the_structure_both_ways(data):
    pattern = data.draw(st.sampled_from(TRANSPOSABLE))
    weights = data.draw(divisible(pattern, largest=2, most=2))
    for mask in twins(weights, data.draw(half(weights, pattern)), pattern).values():
        assert is_nm(mask, pattern.n, pattern.m, transposable=True)
        assert is_nm(mask.transpose(0, 1), pattern.n, pattern.m, transposable=True)


@settings(deadline=None)
@given(st.data())
def test_blocks_and_channels_are_their_plain_twins(data):
    pattern = data.draw(st.sampled_from(RANKED))
    weights = data.draw(divisible(pattern))
    minimum_kept = data.draw(st.integers(0, 5))
    distribution = data.draw(st.sampled_from([Global(), Uniform()]))
    budgets = distribution.budgets(shapes_of(weights), data.draw(st.floats(0, 1, exclude_max=True)))
    sizes = sizes_of(weights)
    least = sum(
        -(-min(minimum_kept, size) // group_size_of(weights[n], pattern)) * group_size_of(weights[n], pattern)
        for n, size in sizes.items()
    )
    if any(budget.kept < sum(min(minimum_kept, sizes[n]) for n in budget.names) for budget in budgets) or (
        len(budgets) == 1 < len(weights) and budgets[0].kept < least
    ):
        with pytest.raises(SelectionError, match="too few for"):
            twins(weights, budgets, pattern, minimum_kept)
        return
    masks = twins(weights, budgets, pattern, minimum_kept)
    assert all(count >= min(minimum_kept, sizes[name]) for name, count in kept(masks).items())
    expected = kept_by(pattern, budgets, shapes_of(weights), minimum_kept=minimum_kept)
    assert expected in (None, sum(kept(masks).values()))


def test_nm_keeps_the_larger_ones_and_of_equal_ones_the_earlier_input():
    weight = torch.tensor([[1.0, 3.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0], [-0.0, 0.0, 0.0, -0.0, -1.0, 0.0, -2.0, 1.0]])
    masks = select_masks({"a": weight}, lambda name: weight, [Budget(("a",), 8)], pattern=NM(2, 4))
    assert masks["a"].int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1, 0, 1]]
    long = torch.cat([-torch.zeros(1, 20), torch.zeros(1, 20)], dim=1)  # longer groups are sorted, shorter compared
    masks = select_masks({"a": long}, lambda name: long, [Budget(("a",), 10)], pattern=NM(10, 40))
    assert masks["a"].nonzero()[:, 1].tolist() == list(range(10))


def test_group_size_of_a_convolution_run_along_the_inputs_of_one_tap():
    weight = torch.zeros(2, 4, 3, 3)
    weight[0, 1:3] = 1.0
    weight[0, 0, 1, 2] = 2.0
    mask = select_masks({"a": weight}, lambda name: weight, [Budget(("a",), 36)], pattern=NM(2, 4))["a"]
    assert mask[0, :, 0, 0].tolist() == [False, True, True, False]
    assert mask[0, :, 1, 2].tolist() == [True, True, False, False]
    assert mask[1, :, 2, 2].tolist() == [True, True, False, False]


def test_a_block_spans_outputs_and_inputs_at_one_tap():
    weight = torch.zeros(4, 4, 2, 2)
    weight[2:, :2, 0, 1] = 1.0
    mask = select_masks({"a": weight}, lambda name: weight, [Budget(("a",), 4)], pattern=Block(2, 2))["a"]
    assert torch.equal(mask, weight.bool())


@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_is_all_that_shares_an_index_on_its_axis(axis):
    weight = torch.full((6, 4, 3, 3), 0.1)
    weight.select(axis, 2).fill_(1.0)
    weight.select(axis, 0)[0] = 3.0  # one large weight, a smaller mean
    count = weight.select(axis, 2).numel()
    mask = select_masks({"a": weight}, lambda name: weight, [Budget(("a",), count)], pattern=Channel(axis))["a"]
    assert mask.select(axis, 2).all()
    assert int(mask.sum()) == count


def test_group_size_of_different_size_compare_by_their_mean_and_the_nearest_count_is_kept():
    weights = {"a": torch.tensor([[1.0, 2.0], [4.0, 4.0]]), "b": torch.tensor([[3.0] * 6, [5.0] * 6, [0.0] * 6])}
    expected = {2: (2, 6), 8: (2, 6), 10: (2, 6), 11: (2, 6), 12: (2, 12), 14: (2, 12), 15: (2, 12), 16: (4, 12)}
    for count, numbers in expected.items():
        budgets = [Budget(("a", "b"), count)]
        if count < 8:  # the best group of each
            with pytest.raises(SelectionError, match=r"2 weights are too few for 2 layers .* are 8 weights"):
                select_masks(weights, by_value(weights), budgets, pattern=Channel(0))
            continue
        masks = select_masks(weights, by_value(weights), budgets, pattern=Channel(0))
        assert tuple(kept(masks).values()) == numbers, count
        assert kept_by(Channel(0), budgets, shapes_of(weights)) is None
    alone = select_masks(weights, by_value(weights), [Budget(("b",), 1)], pattern=Channel(0))
    assert kept(alone) == {"b": 6}  # its best channel, though the budget is less
    assert kept_by(Channel(0), [Budget(("b",), 1)], shapes_of(weights)) == 6


def test_ties_of_groups_go_to_the_earlier_layer_then_to_the_lower_index():
    weights = {"a": torch.ones(4, 4), "b": torch.ones(4, 4)}
    masks = select_masks(weights, by_value(weights), [Budget(("a", "b"), 12)], pattern=Block(2, 2))
    assert masks["a"].int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert masks["b"].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def all_transposable(n, m):
    for rows in itertools.product(itertools.combinations(range(m), n), repeat=m):
        mask = torch.zeros(m, m, dtype=torch.bool)
        for row, columns in enumerate(rows):
            mask[row, list(columns)] = True
        if (mask.sum(dim=0) == n).all():
            yield mask


@pytest.mark.parametrize(("n", "m", "masks"), [(1, 2, 2), (2, 4, 90), (1, 4, 24), (3, 4, 24), (1, 3, 6)])
def test_transposable_blocks_of_up_to_four_have_the_largest_sum_there_is(n, m, masks):
    candidates = torch.stack(list(all_transposable(n, m)))
    assert len(candidates) == masks
    weight = torch.randn(m * 20, m * 20, generator=torch.Generator().manual_seed(m * n)).abs()
    found = select_masks(
        {"a": weight},
        lambda name: weight,
        [Budget(("a",), weight.numel() // m * n)],
        pattern=NM(n, m, transposable=True),
    )["a"]
    tiles = weight.double().unfold(0, m, m).unfold(1, m, m).reshape(-1, m, m)
    best = (tiles[:, None] * candidates).sum(dim=(2, 3)).amax(dim=1)
    reached = (tiles * found.unfold(0, m, m).unfold(1, m, m).reshape(-1, m, m)).sum(dim=(1, 2))
    torch.testing.assert_close(reached, best, rtol=1e-12, atol=0)


def largest_sum(block, n):
    """Return the optimum of one block: the cheapest flow from rows to columns, grown path by path."""
    m = len(block)
    held = np.zeros((m, m), dtype=bool)
    for _ in range(n * m):
        cost = np.where(held.sum(axis=1) < n, 0.0, np.inf)  # of reaching each row from a row with room
        parents = {}
        for _ in range(2 * m):  # Bellman-Ford over rows; along a free cell forth, along a held one back
            columns = np.where(held, np.inf, cost[:, None] - block)
            best_row, reach = columns.argmin(axis=0), columns.min(axis=0)
            back = np.where(held, reach[None, :] + block, np.inf)
            better = back.min(axis=1) < cost - 1e-12
            for row in np.flatnonzero(better):
                parents[row] = (back[row].argmin(), best_row[back[row].argmin()])
            if not better.any():
                break
            cost = np.where(better, back.min(axis=1), cost)
        open_columns = np.where(held.sum(axis=0) < n, reach, np.inf)
        column = int(open_columns.argmin())
        row = int(best_row[column])
        held[row, column] = True
        while row in parents and held[row].sum() > n:
            column, giver = parents[row]
            held[row, column] = False
            held[giver, column] = True
            row = int(giver)
    assert (held.sum(axis=0) == n).all()
    assert (held.sum(axis=1) == n).all()
    return float(block[held].sum())


@pytest.mark.parametrize(("n", "m"), [(4, 8), (2, 8), (8, 16)])
def test_larger_transposable_blocks_reach_nearly_the_largest_sum(n, m):
    weight = torch.randn(4 * m, 4 * m, generator=torch.Generator().manual_seed(m)).abs()
    pattern = NM(n, m, transposable=True)
    mask = select_masks({"a": weight}, lambda name: weight, [Budget(("a",), weight.numel() // m * n)], pattern=pattern)[
        "a"
    ]
    tiles = weight.double().unfold(0, m, m).unfold(1, m, m).reshape(-1, m, m).numpy()
    optimum = sum(largest_sum(tile, n) for tile in tiles)
    reached = float(weight.double()[mask].sum())
    assert reached <= optimum + 1e-9
    assert reached >= 0.995 * optimum


def test_the_oracle_for_larger_blocks_finds_the_best_of_all_masks_of_small_ones():
    candidates = torch.stack(list(all_transposable(2, 4))).double()
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        block = torch.randn(4, 4, dtype=torch.float64, generator=generator).abs()
        assert largest_sum(block.numpy(), 2) == pytest.approx(float((candidates * block).sum(dim=(1, 2)).max()))


@pytest.mark.parametrize("m", [5, 8, 16])
def test_transposable_structure_is_exact_where_greedy_filling_gets_stuck(m):
    """Scores that grow along the diagonal leave rows and columns short; equal and one-sided ones are hard, too."""
    index = torch.arange(m, dtype=torch.float32)
    hard = [torch.zeros(m, m), -(index[:, None] - index).abs(), index[:, None] * index, torch.eye(m), -torch.eye(m)]
    hard += [torch.full((m, m), torch.inf), torch.full((m, m), -torch.inf)]
    hard += [torch.where(torch.eye(m).bool(), torch.inf, -1.0)]
    weight = torch.cat(hard, dim=1)
    for n in range(1, m):
        pattern = NM(n, m, transposable=True)
        budget = Budget(("a",), weight.numel() // m * n)
        mask = select_masks({"a": weight}, lambda name: weight, [budget], pattern=pattern)["a"]
        assert is_nm(mask, n, m, transposable=True)
        diagonal = mask[:, -m:].diagonal()
        assert diagonal.all()  # infinite scores are kept


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(2, 4, transposable=True), NM(4, 8, transposable=True), Block(4, 4), Channel(0)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_threads_and_layout_do_not_change_a_mask(pattern, threads, monkeypatch):
    shape = (32, 64, 3, 3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    budget = Budget(("a",), round(math.prod(shape) * (1 - getattr(pattern, "sparsity", 0.75))))
    whole = select_masks({"a": weight}, lambda name: weight.abs(), [budget], pattern=pattern)["a"]
    monkeypatch.setattr("sparsetwin.grouped_selection._layout._PIECE", 1 << 11)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layout in LAYOUTS:
            weights = {"a": layout(weight)}
            mask = select_masks(weights, lambda name, w=weights: w[name].abs(), [budget], pattern=pattern)["a"]
            assert torch.equal(mask, whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 4, transposable=True), Block(2, 4), Channel(1)])
def test_nan_scores_are_refused_by_name(pattern):
    weights = {"fine": torch.ones(4, 4), "broken": torch.ones(4, 8)}
    weights["broken"][1, 3] = torch.nan
    budget = Budget(("fine", "broken"), 24)
    with pytest.raises(SelectionError, match="1 of the 32 scores of broken are NaN"):
        select_masks(weights, by_value(weights), [budget], pattern=pattern)


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(2, 4), Channel(1)])
def test_scores_of_another_shape_or_dtype_and_layers_that_do_not_divide_are_refused(pattern):
    weights = {"a": torch.ones(4, 8)}
    budgets = [Budget(("a",), 16)]
    with pytest.raises(SelectionError, match=re.escape("the scores of a have shape (8, 4), its weight (4, 8)")):
        select_masks(weights, lambda name: weights[name].t(), budgets, pattern=pattern)
    with pytest.raises(SelectionError, match=r"the scores of a have dtype torch\.int64"):
        select_masks(weights, lambda name: weights[name].long(), budgets, pattern=pattern)
    weights = {"a": torch.ones(32)} if isinstance(pattern, Channel) else {"a": torch.ones(2, 6)}
    with pytest.raises(SelectionError, match="exclude="):
        select_masks(weights, by_value(weights), [Budget(("a",), 6)], pattern=pattern)


def test_budgets_that_do_not_agree_with_nm_are_refused():
    shapes = {"a": (4, 8), "b": (8, 8)}
    for budgets in (Global().budgets(shapes, 0.5), Uniform().budgets(shapes, 0.5)):
        check_groups(budgets, shapes, pattern=NM(2, 4))
    with pytest.raises(SelectionError, match=re.escape("2:4 keeps 48 weights of a, b, the budget says 47")):
        check_groups([Budget(("a", "b"), 47)], shapes, pattern=NM(2, 4))
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(SelectionError, match=re.escape("a sparsity of 0.5, so ask for that")):
        select_masks(weights, by_value(weights), [Budget(("a",), 20), Budget(("b",), 28)], pattern=NM(2, 4))
    with pytest.raises(SelectionError, match="keeps 16 weights of a, less than minimum_kept=17"):
        check_groups([Budget(("a", "b"), 48)], shapes, pattern=NM(2, 4), minimum_kept=17)


def test_a_layer_in_no_budget_gets_no_mask_and_masks_come_in_the_order_of_the_weights():
    weights = {"a": torch.ones(4, 4), "b": torch.ones(3, 3), "c": torch.ones(4, 4)}
    for pattern in (NM(2, 4), Block(4, 1), Channel(0)):
        budgets = [Budget(("c",), 8), Budget(("a",), 8)]
        masks = select_masks(weights, by_value(weights), budgets, pattern=pattern)
        assert list(masks) == ["a", "c"]
        assert kept(masks) == {"a": 8, "c": 8}
        assert select_masks(weights, by_value(weights), [], pattern=pattern) == {}


@pytest.mark.parametrize(
    ("mask", "n", "m", "structured", "at_most"),
    [
        ([[1, 1, 0, 0]], 2, 4, True, True),
        ([[1, 0, 0, 0]], 2, 4, False, True),
        ([[1, 1, 1, 0]], 2, 4, False, False),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], 2, 4, False, False),
        ([[0, 1, 1, 0, 0, 1]], 2, 4, False, False),
        ([[1, 0, 1, 0, 0, 1]], 1, 2, True, True),
        ([[1, 1, 0, 0, 0, 1]], 1, 2, False, False),
    ],
)
def test_the_structure_checker_counts_every_group(mask, n, m, structured, at_most):
    mask = torch.tensor(mask).bool()
    assert is_nm(mask, n, m) is structured
    assert is_nm(mask, n, m, exact=False) is at_most
    assert is_nm(mask[:, :, None, None].expand(-1, -1, 3, 2), n, m) is structured


def test_the_structure_checker_tells_one_way_from_both():
    one_way = torch.tensor([[1, 1, 0, 0]] * 4).bool()
    assert is_nm(one_way, 2, 4)
    assert not is_nm(one_way, 2, 4, transposable=True)
    assert is_nm(one_way.t().logical_xor(one_way), 2, 4, transposable=True)
    assert not is_nm(torch.ones(4).bool(), 2, 4)
    assert not is_nm(torch.tensor([[1, 1, 0, 0]] * 3).bool(), 2, 4, transposable=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "pattern", [*NM_PATTERNS[:2], NM(8, 32), *TRANSPOSABLE[:2], NM(4, 8, True), Block(4, 4), Channel(1)]
)
def test_a_cuda_device_chooses_the_same_masks(pattern):
    for seed, dtype in itertools.product(range(4), DTYPES):
        weight = values((96, 96, 3, 3), dtype, seed)
        budget = Budget(("a",), round(weight.numel() * (1 - getattr(pattern, "sparsity", 0.75))))
        here = select_masks({"a": weight}, lambda name, w=weight: w, [budget], pattern=pattern)["a"]
        moved = weight.cuda()
        there = select_masks({"a": moved}, lambda name, w=moved: w, [budget], pattern=pattern)["a"]
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), here)
