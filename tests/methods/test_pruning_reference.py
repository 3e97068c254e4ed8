"""GMP, one-shot pruning, SET and SNIP against plainly written loops that share no code with them: the same bits."""

import copy
import math

import pytest
import torch
from small_network import PRUNED, batch, loss_of, network
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.methods import Method
from sparsetwin.schedules import Schedule
from sparsetwin.scores import sensitivity

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01
TOTAL = 24
Masks = dict[str, Tensor]


class PlainLoop:
    """SGD with momentum and weight decay written out, and masks that are applied by hand."""

    def __init__(self) -> None:
        self.model = network()
        self.parameters = dict(self.model.named_parameters())
        self.momentum: dict[str, Tensor] = {}
        self.masks: Masks = {}

    @torch.no_grad()
    def put_in_force(self, masks: Masks) -> None:
        self.masks = masks
        for name, mask in masks.items():
            self.parameters[name][~mask] = 0.0

    def step(self, number: int) -> None:
        self.model.zero_grad()
        loss_of(self.model, number).backward()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                gradient = parameter.grad
                if name in self.masks:
                    gradient = torch.where(self.masks[name], gradient, 0.0)
                gradient = torch.add(gradient, parameter, alpha=DECAY)
                before = self.momentum.get(name)
                self.momentum[name] = gradient if before is None else before * MOMENTUM + gradient
                parameter.copy_(torch.add(parameter, self.momentum[name], alpha=-LR))
                if name in self.masks:
                    parameter[~self.masks[name]] = 0.0


def largest(model: nn.Module, sparsity: float, alive: Masks, *, in_each_layer: bool) -> Masks:
    """Sort the magnitudes of what lives, all layers one after the other or each by itself."""
    found: Masks = {}
    for group in [[name] for name in PRUNED] if in_each_layer else [PRUNED]:
        weights = [model.get_parameter(name).detach() for name in group]
        ranked = torch.cat([
            torch.where(alive.get(name, torch.tensor(True)), weight.abs(), -1.0).flatten()
            for name, weight in zip(group, weights, strict=True)
        ])  # fmt: skip
        kept = torch.zeros(len(ranked), dtype=torch.bool)
        kept[ranked.sort(descending=True, stable=True).indices[: len(ranked) - round(sparsity * len(ranked))]] = True
        parts = kept.split([weight.numel() for weight in weights])
        found |= {name: part.view_as(w) for name, part, w in zip(group, parts, weights, strict=True)}
    return found


def trained(method: Method, *, watch) -> None:
    """Train with the library, and call ``watch(step, model, sparsifier)`` before and after each update."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    sparsifier = st.Sparsifier(method, model, optimizer)
    for step in range(TOTAL):
        sparsifier.begin_step()
        watch(step, "begun", model, sparsifier)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch(step, "done", model, sparsifier)


def assert_equal(loop: PlainLoop, model: nn.Module, masks: Masks, context: object) -> None:
    assert masks.keys() == loop.masks.keys(), context
    for name, mask in masks.items():
        assert torch.equal(mask, loop.masks[name]), f"the mask of {name} differs {context}"
    for name, tensor in loop.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), f"{name} differs {context}"


def cubic(step: int) -> float:
    """Zhu & Gupta's equation 1: from 0.2 at step 3 to 0.9 at step 18."""
    return 0.9 + (0.2 - 0.9) * (1 - (step - 3) / (18 - 3)) ** 3


GRADUAL = st.schedules.gradual(
    sparsity=0.9, total_steps=TOTAL, start_step=3, stop_step=18, every_steps=3, initial_sparsity=0.2
)


@pytest.mark.filterwarnings("ignore:layers that keep fewer")
@pytest.mark.parametrize("in_each_layer", [False, True])
@pytest.mark.parametrize(
    ("method", "schedule", "prunings"),
    [
        (st.GMP, GRADUAL, {step: cubic(step) for step in range(3, 19, 3)}),
        (st.OneShot, st.schedules.phases([(10, 0.0), (14, 0.85)]), {10: 0.85}),
        (st.OneShot, st.schedules.phases([(24, 0.7)]), {0: 0.7}),
    ],
)
def test_pruning_has_the_bits_of_the_plain_loop_at_every_step(
    method: type[st.GMP] | type[st.OneShot], schedule: Schedule, prunings: dict[int, float], in_each_layer: bool
):
    loop = PlainLoop()

    def watch(step: int, when: str, model: nn.Module, sparsifier: st.Sparsifier) -> None:
        if when == "done":
            loop.step(step)
        elif step in prunings:
            loop.put_in_force(largest(loop.model, prunings[step], loop.masks, in_each_layer=in_each_layer))
        assert_equal(loop, model, sparsifier.masks, (step, when))

    trained(method(schedule=schedule, distribution=st.Uniform() if in_each_layer else st.Global()), watch=watch)
    sizes = [loop.parameters[name].numel() for name in PRUNED]
    final = max(prunings.values())
    kept = sum(n - round(final * n) for n in sizes) if in_each_layer else sum(sizes) - round(final * sum(sizes))
    assert sum(int(mask.sum()) for mask in loop.masks.values()) == kept


def test_set_has_the_bits_of_the_plain_loop_that_is_told_where_its_weights_grew():
    """Where weights grow is drawn, so it is read off; that it is allowed, and all that follows, is worked out here."""
    loop = PlainLoop()
    fraction, grown = 0.4, 0

    def updated(old: Masks, drawn: Masks) -> Masks:
        nonlocal grown
        found: Masks = {}
        for name, mask in old.items():
            magnitudes = torch.where(mask, loop.parameters[name].detach().abs(), -1.0).flatten()
            kept = int(mask.sum())
            survivors = torch.zeros(mask.numel(), dtype=torch.bool)
            survivors[magnitudes.sort(descending=True, stable=True).indices[: kept - math.floor(fraction * kept)]] = (
                True
            )
            new = drawn[name] & ~survivors.view_as(mask)
            assert int(new.sum()) == math.floor(fraction * kept)
            found[name] = survivors.view_as(mask) | new
            loop.momentum[name][new & ~mask] = 0.0  # what lived is dropped and grown again with its momentum
            grown += int((new & ~mask).sum())
        return found

    def watch(step: int, when: str, model: nn.Module, sparsifier: st.Sparsifier) -> None:
        if when == "done":
            loop.step(step)
        elif step == 0:
            loop.put_in_force({name: mask.clone() for name, mask in sparsifier.masks.items()})
        elif step % 4 == 0:
            loop.put_in_force(updated(loop.masks, sparsifier.masks))
        assert_equal(loop, model, sparsifier.masks, (step, when))

    schedule = st.schedules.periodic(sparsity=0.7, total_steps=TOTAL, every_steps=4)
    trained(st.SET(schedule=schedule, drop_fraction=fraction), watch=watch)
    assert grown > 50


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_snip_ranks_by_how_much_the_loss_depends_on_a_mask_multiplied_into_the_weights(sparsity: float):
    """The definition: |dL/dc| at c = 1, by autograd through w * c, over its sum, ranked over all layers."""
    model = network()
    twin = copy.deepcopy(model)
    connected = {name: torch.ones_like(twin.get_parameter(name), requires_grad=True) for name in PRUNED}
    masked = {name: twin.get_parameter(name).detach() * c for name, c in connected.items()}
    inputs, labels = batch(0)
    loss = nn.functional.cross_entropy(torch.func.functional_call(twin, masked, (inputs,)), labels)
    saliency = torch.cat([g.abs().flatten() for g in torch.autograd.grad(loss, list(connected.values()))])
    normalised = saliency / saliency.sum()
    kept = len(normalised) - round(sparsity * len(normalised))
    chosen = torch.zeros(len(normalised), dtype=torch.bool)
    chosen[normalised.topk(kept).indices] = True
    cut = normalised.sort(descending=True).values
    assert cut[kept - 1] > cut[kept]  # no tie decides

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = st.schedules.constant(sparsity=sparsity, total_steps=3)
    sparsifier = st.Sparsifier(st.SNIP(schedule=schedule), model, optimizer)
    sparsifier.begin_step()
    loss_of(model, 0).backward()
    found = [sensitivity(model.get_parameter(name), model.get_parameter(name).grad).flatten() for name in PRUNED]
    assert torch.equal(torch.cat(found), saliency)
    optimizer.step()
    assert list(sparsifier.masks) == list(PRUNED)
    assert torch.equal(torch.cat([mask.flatten() for mask in sparsifier.masks.values()]), chosen)
