"""The FLOPs that a run of each method adds up, against sums worked out from masks by hand."""

from pathlib import Path
from statistics import fmean

import pytest
import torch
from tiny import BATCH, DENSE, HALF, QUARTER, SCHEDULES, STEPS, Numbers, make_method, make_run, network
from torch import nn

from sparsetwin.masking import Masks
from sparsetwin.methods import METHODS, Method
from sparsetwin.metrics import ForwardFlops, count_forward_flops
from sparsetwin.models import MODELS
from sparsetwin.schedules import periodic, phases
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import Targets
from sparsetwin.training import OWN
from sparsetwin.training.costs import Density, step_flops

_DRAWS = torch.Generator().manual_seed(0)  # the seed of the runs
DRAWN = [(HALF, QUARTER)[int(torch.randint(2, (), generator=_DRAWS))] for _ in range(6)]
"""FLOPs of a forward pass with the weights of CrAM's second pass, in each of its dense steps."""
BY_HAND = {
    "acdc": 3 * (4 * DENSE + 4 * QUARTER) * 2,
    "cram": 6 * 3 * DENSE + 3 * sum(DRAWN) + 2 * 3 * QUARTER,
    "dense": 8 * 3 * DENSE,
    "gmp": 3 * (2 * DENSE + 2 * HALF + 4 * QUARTER),
    # the step that ends the dense phase has its masks, none; the next one those of half of the weights
    "granet": 2 * 3 * DENSE + (2 * DENSE + DENSE) + 3 * HALF + (2 * HALF + DENSE) + 3 * 3 * QUARTER,
    "imp": 3 * (8 * DENSE + 4 * HALF + 4 * QUARTER),
    "oneshot": 3 * (4 * DENSE + 4 * QUARTER),
    "rigl": 4 * 3 * QUARTER + 2 * (2 * QUARTER + DENSE + 3 * 3 * QUARTER),
    "set": 12 * 3 * QUARTER,
    "snip": 3 * DENSE + 7 * 3 * QUARTER,
    "st3": 2 * (2 * DENSE + DENSE) + 2 * (2 * HALF + DENSE) + 4 * (2 * QUARTER + DENSE),
    "static": 8 * 3 * QUARTER,
    "str": 4 * 3 * DENSE + 4 * 3 * QUARTER,  # with thresholds of zero nothing is pruned before the final cut
    "topkast": 8 * (2 * QUARTER + HALF),
    "woodfisher": 3 * (2 * DENSE + 2 * HALF + 4 * QUARTER) + 3 * 3 * (DENSE + HALF),  # three samples at each pruning
}
"""Of all steps together, for one sample of each batch."""
FIELDS = {
    "set": {"drop_fraction": 0.0},  # a weight that is grown where no gradient flows stays zero and is not counted
    "str": {"initial": -60.0, "exact_final": True},
    "topkast": {"backward_sparsity": 0.5},
}


def spent(folder: Path, method: Method, **given: object) -> float:
    """Return the training FLOPs of a run, for one sample of each batch."""
    run = make_run(folder / "run", method, **given)  # type: ignore[arg-type]
    assert run.execute()
    return run.folder.last_event()["training_flops"] / BATCH


def from_passes(method: Method) -> float:
    """Return what a plain loop adds up, step by step, from the masks that it finds in force and the method's passes."""
    model, data, costs = network(), Numbers(), 0.0

    def backward(number: int) -> torch.Tensor:
        inputs, labels = data.batch(number % STEPS)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(method, model, optimizer, gradient_pass=backward)

    def share(masks: Masks) -> float:
        return sum(float(mask.sum()) for mask in masks.values()) / (DENSE / 2) if masks else 1.0

    for step in range(method.schedule.total_steps):
        before, left = share(sparsifier.masks), sparsifier.phase
        phase = method.schedule.at(step)
        if phase != left:
            costs += method.gradient_samples(phase) * 3 * before * DENSE
        sparsifier.backward(lambda step=step: backward(step))  # type: ignore[misc]
        shares = {"all": 1.0, "kept": share(sparsifier.masks), "updated": share(sparsifier.gradient_masks)}
        enters = phase != left and method.needs_gradients(phase) and not method.gradient_samples(phase)
        optimizer.step()
        optimizer.zero_grad()
        for each in method.passes(phase, enters=enters):
            density = shares if each.density is None else {**shares, "kept": each.density}
            parts = (each.forward, each.input_gradient, each.weight_gradient)
            costs += DENSE * sum(density[part] for part in parts if part is not None)
    return costs


@pytest.mark.parametrize("name", METHODS)
def test_a_run_costs_what_its_masks_say(name, tmp_path):
    """Those of the library by hand; another method by its passes, which its card explains."""
    method = make_method(name, **FIELDS.get(name, {}))
    expected = BY_HAND[name] if name in BY_HAND else pytest.approx(from_passes(method), rel=1e-6)
    assert spent(tmp_path, method) == expected


@pytest.mark.parametrize("name", sorted(BY_HAND.keys() - {"cram"}))  # whose second passes are drawn
def test_what_passes_and_masks_add_up_to_is_the_sum_by_hand(name):
    assert from_passes(make_method(name, **FIELDS.get(name, {}))) == pytest.approx(BY_HAND[name], rel=1e-6)


class TestFormulas:
    """Of the papers, for shares of the dense cost."""

    def shares(self, tmp_path: Path, method: Method) -> float:
        return spent(tmp_path, method) / (3 * DENSE * method.schedule.total_steps)

    def test_static_costs_three_sparse_forward_passes(self, tmp_path):
        assert self.shares(tmp_path, make_method("static")) == QUARTER / DENSE

    def test_acdc_costs_half_of_one_plus_the_sparse_share(self, tmp_path):
        assert self.shares(tmp_path, make_method("acdc")) == 0.5 * (1 + QUARTER / DENSE)

    def test_gmp_costs_the_mean_density(self, tmp_path):
        schedule = SCHEDULES["gmp"]
        density = fmean(1 - schedule.at(step).sparsity for step in range(schedule.total_steps))
        assert self.shares(tmp_path, make_method("gmp")) == density

    def test_rigl_adds_a_dense_gradient_at_each_update(self, tmp_path):
        first = make_method("rigl", periodic(sparsity=0.75, total_steps=4, every_steps=4))
        longer = make_method("rigl", periodic(sparsity=0.75, total_steps=16, every_steps=4))
        interval = (spent(tmp_path / "b", longer) - spent(tmp_path / "a", first)) / 12
        between = 3  # steps for each update, dT in the paper
        assert interval == (3 * QUARTER * between + 2 * QUARTER + DENSE) / (between + 1)

    @pytest.mark.parametrize(
        ("forward", "backward", "share"), [(0.8, 0.5, 0.323), (0.9, 0.8, 0.162), (0.95, 0.5, 0.227), (0.98, 0.9, 0.078)]
    )
    def test_topkast_on_resnet50_costs_what_its_paper_reports(self, forward, backward, share):
        with torch.device("meta"):
            model = MODELS["resnet50"](num_classes=1000)
        targets = Targets(dense_first=True, dense_last=True).resolve(model)
        dense = count_forward_flops(model, torch.zeros(1, 3, 224, 224, device="meta"))
        method = make_method("topkast", phases([(1, forward)]), backward_sparsity=backward)
        density = Density(
            all=dense.total(), kept=uniform(dense, targets, forward), updated=uniform(dense, targets, backward)
        )
        found = step_flops(method, method.schedule.phases[0], density, enters=False)
        assert found / (3 * dense.total()) == pytest.approx(share, abs=1.2e-3)


def uniform(forward: ForwardFlops, targets: object, sparsity: float) -> int:
    sizes = forward.weight_sizes
    return forward.total({n: size - round(sparsity * size) * (n in targets) for n, size in sizes.items()})  # type: ignore[operator]


class TestOneStep:
    """`step_flops`, with numbers that cannot be mistaken for each other."""

    density = Density(all=1000, kept=100, updated=300, fixed=40)

    @pytest.mark.parametrize(
        ("name", "enters", "expected"),
        [
            ("static", False, 300),
            ("set", False, 300),
            ("rigl", False, 300),
            ("rigl", True, 2 * 100 + 1000),
            ("granet", True, 2 * 100 + 1000),
            ("snip", True, 3 * 1000),
            ("snip", False, 300),
            ("topkast", False, 2 * 100 + 300),
            ("st3", False, 2 * 100 + 1000),
        ],
    )
    def test_passes_count_the_weights_that_they_compute_with(self, name, enters, expected):
        method = make_method(name)
        assert step_flops(method, method.schedule.phases[-1], self.density, enters=enters) == expected

    @pytest.mark.parametrize(("fields", "second"), [({}, 3 * 400), ({"sparse_gradients": False}, 2 * 400 + 1000)])
    def test_crams_second_pass_is_expected_to_have_the_mean_of_its_densities(self, fields, second):
        method = make_method("cram", sparsities=(0.5, 0.75), **fields)
        dense = Density(all=1000, kept=1000, updated=1000, fixed=40)
        at = 40 + round(0.375 * 960)  # weights that are never pruned count in full
        assert at == 400
        assert step_flops(method, method.schedule.phases[0], dense, enters=False) == 3 * 1000 + second


class TestSamples:
    """Gradients that choose masks."""

    def test_those_of_snip_are_dense_ones_before_the_first_step(self, tmp_path):
        method = make_method("snip", samples=2)
        assert spent(tmp_path, method) == 2 * 3 * DENSE + 8 * 3 * QUARTER

    def test_they_are_paid_for_where_the_step_overflows(self, tmp_path):
        schedule = phases([(5, 0.0), (3, 0.75)])
        method = make_method("woodfisher", schedule, samples=2)
        data = Numbers(count=12)  # an epoch longer than the run, so that the batch comes once
        data.scales[5] = 1e30
        run = make_run(tmp_path / "run", method, data=data, precision="fp16")
        assert run.execute()
        assert run._stage is None
        final = run.folder.last_event()["training_flops"] / BATCH
        assert final == 3 * (5 * DENSE + 3 * QUARTER) + 2 * 3 * DENSE


class TestTeachers:
    """A teacher answers once in every pass in which it teaches."""

    def test_the_runs_own_teaches_in_sparse_phases(self, tmp_path):
        found = spent(tmp_path, make_method("acdc"), teacher_name=OWN)
        assert found == BY_HAND["acdc"] + 8 * DENSE

    def test_its_own_has_not_begun_in_the_pass_that_chooses_masks(self, tmp_path):
        found = spent(tmp_path, make_method("granet"), teacher_name=OWN)
        assert found == BY_HAND["granet"] + 5 * DENSE  # six sparse steps, the first of which began as a dense one

    @pytest.mark.parametrize(("name", "answers"), [("static", 8), ("snip", 8), ("rigl", 12), ("cram", 6 * 2 + 2)])
    def test_another_one_costs_what_its_own_network_does(self, name, answers, tmp_path):
        found = spent(tmp_path, make_method(name), teacher=lambda: network(hidden=5), teacher_name="elsewhere")
        assert found == BY_HAND[name] + answers * 2 * (8 * 5 + 5 * 4)

    def test_it_is_asked_on_samples_too(self, tmp_path):
        found = spent(tmp_path, make_method("snip", samples=2), teacher=network, teacher_name="elsewhere")
        assert found == (2 + 0) * 3 * DENSE + 8 * 3 * QUARTER + (2 + 8) * DENSE


def test_what_a_dense_phase_leaves_at_zero_is_not_counted(tmp_path):
    """As the paper counts: weights that no gradient brings back, here those of an input that is always zero."""

    def blind() -> nn.Module:
        return nn.Sequential(Blind(), *network())

    method = make_method("acdc", phases([(4, 0.0), (4, 0.75), (4, 0.0), (4, 0.75)]))
    found = spent(tmp_path, method, model=blind)
    lost = BY_HAND["acdc"] - found
    kept_of_blind = 16 - lost / (3 * 4 * 2)
    assert 0 < kept_of_blind < 16  # of 16 weights, each 2 FLOPs in 3 products of 4 steps


class Blind(nn.Module):
    """Sets the first number to zero."""

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(numbers[:, :1]), numbers[:, 1:]], dim=1)
