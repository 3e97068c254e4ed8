"""Static, one-shot, gradual, iterative pruning and SNIP against hand-worked numbers and loops of their own."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.errors import ConfigError, ScheduleError, UsageError
from sparsetwin.methods import Method

phases = st.schedules.phases


class Line:
    """One linear layer whose every gradient is given, trained by SGD with learning rate 1."""

    def __init__(self, method: Method, weights: list[float], *, momentum: float = 0.0, **arguments) -> None:
        self.model = nn.Linear(len(weights), 1, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([weights]))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=momentum)
        self.sparsifier = st.Sparsifier(method, self.model, self.optimizer, **arguments)

    def step(self, gradient: list[float]) -> list[float]:
        self.sparsifier.begin_step()
        self.model.weight.grad = torch.tensor([gradient], dtype=torch.float32)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.weights

    @property
    def weights(self) -> list[float]:
        return [round(value, 4) for value in self.model.weight[0].tolist()]


@pytest.mark.filterwarnings("ignore:layers that keep fewer")
class TestByHand:
    def test_gmp_prunes_the_smallest_of_those_left_and_lets_none_grow_again(self):
        run = Line(st.GMP(schedule=phases([(1, 0.0), (1, 0.25), (1, 0.5)])), [4.0, 3.0, 2.0, 1.0])
        assert run.step([0, 0, 0, -1]) == [4, 3, 2, 2]
        assert run.step([4, 0, 0, -9]) == [0, 3, 2, 0]  # the last of the equal ones went; then the first moves to zero
        # two are kept of the three left: the first is zero as the pruned last one is, and ranks above it all the same
        assert run.step([-1, -1, -1, -1]) == [0, 4, 3, 0]

    def test_gmp_keeps_a_weight_at_zero_rather_than_a_pruned_one(self):
        run = Line(st.GMP(schedule=phases([(1, 0.25), (1, 0.26)])), [1.0, 2.0, 3.0, 4.0])
        assert run.step([0, 0, 0, 4]) == [0, 2, 3, 0]
        run.step([0, 0, 0, 0])
        assert run.sparsifier.masks["weight"].tolist() == [[False, True, True, True]]

    def test_movement_keeps_what_moves_away_from_zero(self):
        run = Line(st.GMP(schedule=phases([(2, 0.0), (1, 0.5)]), score="movement"), [1.0, 1.0, -1.0, 5.0])
        run.step([-0.5, 0.5, 0.5, 1.0])  # -w g: 0.5, -0.5, 0.5, -5
        run.step([-0.5, -0.5, 0.25, 1.0])  # 1.5 * 0.5, 0.5 * 0.5, 1.5 * 0.25, -4: sums 1.25, -0.25, 0.875, -9
        assert run.step([0, 0, 0, 0]) == [2, 0, -1.75, 0]

    def test_fisher_weighs_the_square_of_a_weight_with_the_squares_of_its_gradients(self):
        run = Line(st.OneShot(schedule=phases([(1, 0.0), (1, 0.5)]), score="fisher"), [3.0, 1.0, 2.0, 1.0])
        run.step([0.1, 1.0, 0.0, 2.0])  # w = 2.9, 0, 2, -1; squares 0.01, 1, 0, 4; half w^2 F = 0.042, 0, 0, 2
        assert run.step([0, 0, 0, 0]) == [2.9, 0, 0, -1]

    def test_movement_in_acdc_is_summed_over_one_dense_phase(self):
        schedule = phases([(1, 0.0), (1, 0.5), (1, 0.0), (1, 0.5)])
        run = Line(st.ACDC(schedule=schedule, score="movement", reset="none"), [1.0, 1.0])
        run.step([-9.0, 1.0])
        assert run.step([0, 0]) == [10, 0]
        run.step([1.0, -1.0])  # -10 for the first; 0 for the second, which stood at zero
        assert run.step([0, 0]) == [0, 1]

    def test_one_shot_prunes_once(self):
        run = Line(st.OneShot(schedule=phases([(1, 0.0), (2, 0.5)])), [1.0, 2.0, 3.0, 4.0])
        run.step([0, 0, 2.5, 0])
        assert run.step([1, 1, 1, 1]) == [0, 1, 0, 3]
        assert run.step([1, 1, 1, 1]) == [0, 0, 0, 2]

    def test_snip_ranks_by_weight_times_gradient_and_updates_nothing_on_that_batch(self):
        run = Line(st.SNIP(schedule=phases([(3, 0.5)])), [1.0, -2.0, 3.0, 4.0], momentum=0.9)
        assert run.step([5.0, 3.0, 1.0, 0.1]) == [1, -2, 0, 0]  # 5, 6, 3, 0.4
        assert not run.optimizer.state
        assert run.sparsifier.steps == 1
        assert run.step([1, 1, 1, 1]) == [0, -3, 0, 0]

    def test_snip_averages_the_gradients_of_its_samples(self):
        model = nn.Linear(4, 1, bias=False)

        def gradient_pass(index: int) -> None:
            gradients = torch.tensor([[[4.0, 0, 0, 3], [-4.0, 1, 3, -1]][index]])
            model.weight.grad = gradients if model.weight.grad is None else model.weight.grad + gradients

        with torch.no_grad():
            model.weight.fill_(1.0)
        kept = torch.ones(1, 4)
        model.weight.grad = kept
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        method = st.SNIP(schedule=phases([(2, 0.5)]), samples=2)  # sums 0, 1, 3, 2
        sparsifier = st.Sparsifier(method, model, optimizer, gradient_pass=gradient_pass)
        sparsifier.begin_step()
        assert sparsifier.masks["weight"].tolist() == [[False, False, True, True]]
        assert model.weight.grad is kept

    def test_rescaling_keeps_the_norm_of_a_layer(self):
        l1 = Line(st.ACDC(schedule=phases([(1, 0.5)]), rescale="l1"), [3.0, -4.0, 1.0, 0.0])
        assert l1.step([0, 0, 0, 0]) == [round(3 * 8 / 7, 4), round(-4 * 8 / 7, 4), 0, 0]
        l2 = Line(st.ACDC(schedule=phases([(1, 0.5)]), rescale="l2"), [3.0, -4.0, 1.0, 0.0])
        assert l2.step([0, 0, 0, 0]) == [round(3 * 26**0.5 / 5, 4), round(-4 * 26**0.5 / 5, 4), 0, 0]

    @pytest.mark.parametrize("rewind", ["weights", "learning-rate"])
    def test_imp_prunes_the_trained_weights_and_goes_back_to_the_rewind_step(self, rewind):
        schedule = st.schedules.rounds(sparsity=0.5, count=1, round_steps=3, rewind_step=1)
        run = Line(st.IMP(schedule=schedule, rewind=rewind), [1.0, 2.0, 3.0, 4.0], momentum=0.5)
        assert run.step([0, 0, 0, 1]) == [1, 2, 3, 3]
        assert run.step([-9, 0, 0, 0]) == [10, 2, 3, 2.5]
        assert run.step([0, 0, 0, 0]) == [14.5, 2, 3, 2.25]
        run.step([0, 0, 1, 0])  # the first and the third are kept; momentum begins anew
        assert run.weights == ([1, 0, 2, 0] if rewind == "weights" else [14.5, 0, 2, 0])
        assert [run.sparsifier.method.learning_rate_step(step) for step in range(5)] == [0, 1, 2, 1, 2]
        assert run.sparsifier.method.learning_rate_steps == 3


def test_static_masks_hold_for_the_run_and_depend_on_the_seed_alone():
    def masks(seed: int, steps: int) -> dict[str, Tensor]:
        torch.manual_seed(steps)
        model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = st.Static(schedule=st.schedules.constant(sparsity=0.7, total_steps=5))
        sparsifier = st.Sparsifier(method, model, optimizer, seed=seed)
        for _ in range(steps):
            sparsifier.begin_step()
            model(torch.randn(4, 20)).sum().backward()
            optimizer.step()
        return sparsifier.masks

    first, last, other = masks(1, 1), masks(1, 5), masks(2, 1)
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    kept = {name: int(mask.sum()) for name, mask in first.items()}
    assert sum(kept.values()) == 750 - round(0.7 * 750)
    assert kept["1.weight"] / 150 > kept["0.weight"] / 600  # ERK: the small layer is denser


def test_imp_repeats_the_training_of_a_fresh_network_within_the_ticket():
    """An oracle: a plain loop that trains, prunes by sorting, rewinds by a deep copy, trains with masks."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 6), torch.randn(16, 2)) for _ in range(40)]
    start = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    targets = ["0.weight", "3.weight"]

    def plain_training(model, masks, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for x, y in (batches[step] for step in steps):
            nn.functional.mse_loss(model(x), y).backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, mask in masks.items():
                    model.get_parameter(name).mul_(mask)

    model = copy.deepcopy(start)
    plain_training(model, {}, range(4))
    early = copy.deepcopy(model)  # optimizer state goes on in the dense training, so it is trained again in one piece
    model = copy.deepcopy(start)
    plain_training(model, {}, range(12))
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in targets}
    for index, sparsity in enumerate((1 - 0.4**0.5, 0.6)):
        alive = torch.cat([torch.where(masks[n] > 0, model.get_parameter(n).abs(), -1.0).flatten() for n in targets])
        threshold = alive.sort(descending=True).values[64 - round(sparsity * 64) - 1]
        sizes = [model.get_parameter(name).numel() for name in targets]
        parts = zip(targets, (alive >= threshold).float().split(sizes), strict=True)
        masks = {name: part.view_as(model.get_parameter(name)) for name, part in parts}
        model = copy.deepcopy(early)
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
        plain_training(model, masks, range(12 + 8 * index, 20 + 8 * index))

    ours = copy.deepcopy(start)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05, momentum=0.9)
    schedule = st.schedules.rounds(sparsity=0.6, count=2, round_steps=12, rewind_step=4)
    sparsifier = st.Sparsifier(st.IMP(schedule=schedule), ours, optimizer)
    for x, y in batches[: schedule.total_steps]:
        sparsifier.begin_step()
        nn.functional.mse_loss(ours(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, found), expected in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: st.GMP(schedule=phases([(1, 0.5), (1, 0.0)])), "GMP brings no weight back"),
            (lambda: st.GMP(schedule=phases([(1, 0.0)])), "GMP needs a sparse phase"),
            (lambda: st.OneShot(schedule=phases([(1, 0.5), (1, 0.6)])), "one-shot pruning has a dense phase and then"),
            (lambda: st.Static(schedule=phases([(1, 0.0), (1, 0.6)])), "static masks have one sparsity"),
            (lambda: st.SNIP(schedule=phases([(1, 0.0), (1, 0.6)])), "SNIP prunes once, before training"),
            (lambda: st.IMP(schedule=phases([(2, 0.0), (1, 0.6)])), "use schedules.rounds"),
            (lambda: st.IMP(schedule=phases([(2, 0.6)])), "use schedules.rounds"),
        ],
    )
    def test_schedules_that_do_not_fit_the_method(self, make, message):
        with pytest.raises(ScheduleError, match=message):
            make()

    def test_values_that_do_not_fit(self):
        schedule = phases([(2, 0.5)])
        with pytest.raises(ConfigError, match="samples of at least 0 and the score 'sensitivity'"):
            st.SNIP(schedule=schedule, samples=-1)
        with pytest.raises(ConfigError, match="rewind is one of weights, learning-rate, got 'all'"):
            st.IMP(schedule=st.schedules.rounds(sparsity=0.5, count=1, round_steps=2), rewind="all")
        with pytest.raises(ConfigError, match="rescale is one of none, l1, l2, got 'max'"):
            st.ACDC(schedule=schedule, rescale="max")

    def test_a_remembered_score_with_nothing_to_remember(self):
        with pytest.raises(ConfigError, match="the first phase cannot be sparse"):
            Line(st.GMP(schedule=phases([(2, 0.5)]), score="movement"), [1.0, 2.0])

    @pytest.mark.parametrize("kind", [st.GMP, st.ACDC, st.OneShot, st.SNIP])
    def test_a_target_without_a_gradient_where_gradients_rank(self, kind):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = st.Sparsifier(kind(schedule=phases([(2, 0.5)]), score="sensitivity"), model, optimizer)
        sparsifier.begin_step()
        model[0](torch.ones(1, 2)).sum().backward()  # the second layer takes no part
        with pytest.raises(ConfigError, match=r"1\.weight has no gradient to rank its weights by; exclude it"):
            optimizer.step()

    def test_samples_without_a_gradient_pass(self):
        with pytest.raises(
            UsageError, match=r"SNIP samples gradients on entering Phase.*give the Sparsifier a gradient_"
        ):
            Line(st.SNIP(schedule=phases([(2, 0.5)]), samples=1), [1.0, 2.0])
