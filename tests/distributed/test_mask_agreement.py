"""Processes that train one model find out, when a phase begins, that they have come apart."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st
from sparsetwin.errors import AgreementError, SelectionError

PHASES = [(2, 0.0), (3, 0.8), (2, 0.0), (2, 0.9)]
TARGETS = ("0.weight", "2.weight")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))


@dataclass(frozen=True, kw_only=True)
class Drawn(st.ACDC):
    """Masks drawn by chance, from the generator of the sparsifier."""

    def enter(self, phase: Any, state: Any) -> dict[str, torch.Tensor]:
        if not phase.is_sparse:
            return {}
        return {name: torch.rand(w.shape, generator=state.generator) > 0.5 for name, w in state.weights.items()}


def method(kind: type[st.ACDC] = st.ACDC, phases: Any = PHASES) -> st.ACDC:
    return kind(schedule=st.schedules.phases(phases))


class Loop:
    """A model on this process, wrapped or sharded, trained on data that all share."""

    def __init__(self, kind: str, *, method: st.ACDC, seed: int = 0, group: Any = None, bare: bool = False) -> None:
        warnings.simplefilter("ignore")
        self.model = network()
        outer = self.model
        if kind == "ddp":
            outer = DistributedDataParallel(self.model)
        elif kind != "plain":
            shape, names = ((2, 2), ("copies", "parts")) if kind == "hsdp" else ((dist.get_world_size(),), ("parts",))
            fully_shard(self.model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        self.outer = outer
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.sparsifier = st.Sparsifier(method, self.model if bare else outer, self.optimizer, seed=seed, group=group)

    def step(self) -> None:
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(self.sparsifier.steps))
        self.sparsifier.begin_step()
        self.outer(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def error(self, steps: int) -> str:
        """Train on, and return what stopped it."""
        try:
            for _ in range(steps):
                self.step()
        except AgreementError as error:
            return str(error)
        return ""

    @torch.no_grad()
    def spoil(self, layer: int) -> None:
        """Change a layer's weights by hand, so that others of them, but as many, are kept."""
        weight = self.model[layer].weight
        weight = weight.to_local() if hasattr(weight, "to_local") else weight
        weight.copy_(weight.flip(1))


def healthy(kind: str) -> tuple[str, int]:
    loop = Loop(kind, method=method(), group=dist.group.WORLD if kind == "plain" else None)
    return loop.error(9), loop.sparsifier.steps


def spoilt(rank: int, kind: str, *, bare: bool = False) -> tuple[str, int]:
    loop = Loop(kind, method=method(), group=dist.group.WORLD if bare else None, bare=bare)
    for _ in range(2):
        loop.step()
    if rank == 1:
        loop.spoil(2)
    return loop.error(7), loop.sparsifier.steps


def apart(rank: int, kind: str, case: str) -> str:
    """Train where one process stands elsewhere, or trains something else."""
    given = method()
    if rank == 1 and case == "settings":
        given = replace(given, minimum_kept=2)
    if rank == 1 and case == "schedule":
        given = method(phases=[(1, 0.0), *PHASES])
    loop = Loop(kind, method=given)
    if case == "steps":
        state = loop.sparsifier.state_dict()
        loop.sparsifier.load_state_dict({**state, "steps": rank, "phase": rank - 1})
    if case == "targets" and rank == 1:
        loop.sparsifier.detach()
        targets = st.Targets(exclude=("2.weight",))
        loop.sparsifier = st.Sparsifier(given, loop.outer, loop.optimizer, targets=targets)
    return loop.error(9)


def failing(rank: int) -> str:
    loop = Loop("ddp", method=method(phases=[(3, 0.8)]))
    if rank == 1:
        with torch.no_grad():
            loop.model[0].weight[0, 0] = torch.nan
    try:
        loop.step()
    except (AgreementError, SelectionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def bytes_sent(kind: str) -> list[list[int]]:
    """Return, for each step, the bytes of each comparison."""
    loop = Loop(kind, method=method())
    plain, sent = dist.all_reduce, list[list[int]]()

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("op") == dist.ReduceOp.MAX:
            sent[-1].append(tensor.numel() * tensor.element_size())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counted
    for _ in range(9):
        sent.append([])
        loop.step()
    dist.all_reduce = plain
    return sent


PLACES = [(kind, case) for kind in ("ddp", "fsdp") for case in ("settings", "schedule", "steps", "targets")]


def all_of_two(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {kind: healthy(kind) for kind in ("ddp", "fsdp", "plain")}
    found |= {("spoilt", bare): spoilt(rank, "ddp", bare=bare) for bare in (False, True)}
    found |= {place: apart(rank, *place) for place in PLACES}
    for name, seed in (("same", 5), ("other", 5 + rank)):
        found["drawn", name] = Loop("ddp", method=method(Drawn), seed=seed).error(9)
    found |= {("bytes", kind): bytes_sent(kind) for kind in ("ddp", "fsdp")}
    return found | {"failing": failing(rank)}


def all_of_four(rank: int) -> dict[Any, Any]:
    return {"hsdp": healthy("hsdp"), "spoilt": spoilt(rank, "hsdp")}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes saw, of all cases in one start."""
    return run(all_of_two, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run(all_of_four, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "plain"])
def test_processes_that_agree_train_through_all_phases(kind, two):
    assert [found[kind] for found in two] == [("", 9)] * 2


def test_copies_of_shards_that_agree_train_through_all_phases(four):
    assert [found["hsdp"] for found in four] == [("", 9)] * 4


@pytest.mark.parametrize("bare", [False, True], ids=["wrapper shows the group", "group is given"])
def test_a_weight_changed_on_one_copy_is_an_error_on_all_that_names_it(bare, two):
    for message, steps in (found["spoilt", bare] for found in two):
        assert "the masks of 2.weight are not the same in all processes" in message
        assert steps == 2


def test_a_shard_changed_on_one_copy_is_an_error_also_where_all_copies_agree(four):
    for message, steps in (found["spoilt"] for found in four):
        assert "the masks of 2.weight are not the same in all processes" in message
        assert steps == 2


def test_masks_drawn_with_other_seeds_are_an_error_on_all(two):
    assert all(found["drawn", "same"] == "" for found in two)
    assert all("the masks of 0.weight" in found["drawn", "other"] for found in two)


@pytest.mark.parametrize(("kind", "case"), PLACES)
def test_processes_that_are_not_at_the_same_place_all_say_so(kind, case, two):
    messages = [found[kind, case] for found in two]
    told = {"settings": "method", "schedule": "method", "steps": "step"}.get(case, case)
    assert all(f"the processes that train together differ in their {told}: this one" in m for m in messages)
    assert messages[0] != messages[1]


def test_a_choice_that_fails_on_one_process_stops_the_others(two):
    first, second = (found["failing"] for found in two)
    assert "AgreementError: another process failed to choose its masks" in first
    assert "SelectionError" in second
    assert "NaN" in second


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_few_bytes_move_when_a_phase_begins_and_none_at_other_steps(kind, two):
    place, masks = 16 * 4, 16 * (1 + len(TARGETS))
    expected = [[place, masks] if step in (0, 2, 5, 7) else [] for step in range(9)]
    assert [found["bytes", kind] for found in two] == [expected] * 2


def test_one_process_compares_nothing(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert Loop("plain", method=method(), group=dist.group.WORLD).error(9) == ""
    finally:
        dist.destroy_process_group()
