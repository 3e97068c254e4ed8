"""Accelerate on two processes: DDP and FSDP2 train a pair with the same bits, and resume from `save_state`."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from torch import nn

import sparsetwin as st
from sparsetwin.errors import UsageError

pytest.importorskip("accelerate", reason="the adapter of Accelerate needs it")

STEPS = 14
KINDS = ("ddp", "fsdp2", "fsdp2, full state")
# where a sparse phase begins, within it, within a dense one
RESUMED = {"ddp": (5,), "fsdp2": (3, 5, 9), "fsdp2, full state": (5,)}
SIZE = 13 * 40 + 40 * 40 + 40 * 5


class Network(nn.Sequential):
    """A network whose layers FSDP2 wraps by their class."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(13, 40), nn.ReLU(), nn.BatchNorm1d(40), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)
        )


def method() -> st.ACDC:
    return st.ACDC(schedule=st.schedules.phases([(3, 0.0), (4, 0.9), (3, 0.0), (4, 0.8)]))


def accelerator(kind: str) -> Any:
    """Return an Accelerator for this process.

    Accelerate takes its FSDP plugin on accelerators only. To run its own code of FSDP2 on CPUs, this sets the two
    fields of its state that it sets there.
    """
    import os

    import accelerate
    from accelerate.state import AcceleratorState, PartialState

    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    if kind == "ddp":
        return accelerate.Accelerator(cpu=True)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"],
        state_dict_type="FULL_STATE_DICT" if "full" in kind else "SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    made = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    if kind != "left out":
        PartialState._shared_state["distributed_type"] = made.state.distributed_type = accelerate.DistributedType.FSDP
        made.state.fsdp_plugin = plugin
    return made


class Run:
    """A run of 14 steps under Accelerate, each process with batches of its own."""

    def __init__(self, kind: str, *, sparse: bool = True) -> None:
        from sparsetwin.integrations.accelerate import prepare

        torch.manual_seed(0)
        self.accelerator = accelerator(kind)
        model = Network()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.sparsifier = prepare(self.accelerator, method(), self.model, self.optimizer) if sparse else None
        self.step = 0

    def train(self, stop: int = STEPS, pair: st.Pair | None = None) -> "Run":
        from sparsetwin.integrations.accelerate import save_half

        while self.step < stop:
            generator = torch.Generator().manual_seed(2 * self.step + self.accelerator.process_index)
            x, y = torch.randn(16, 13, generator=generator), torch.randint(0, 5, (16,), generator=generator)
            if self.sparsifier is not None:
                self.sparsifier.begin_step()
            self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if pair is not None and self.sparsifier is not None and self.sparsifier.phase_ends:
                save_half(self.accelerator, pair, self.model, self.sparsifier)
        return self

    def seen(self) -> dict[str, torch.Tensor]:
        state = {name.removeprefix("module."): tensor for name, tensor in self.model.state_dict().items()}
        masks = self.sparsifier.masks if self.sparsifier is not None else {}
        return {name: whole(tensor) for name, tensor in {**state, **{f"mask {n}": m for n, m in masks.items()}}.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def shared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out batch-norm statistics: under FSDP2 each process has its own, and only the main one's are saved."""
    return {name: tensor for name, tensor in tensors.items() if "running" not in name}


def trial(rank: int, kind: str, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    pair = st.Pair(Path(folder) / kind / "pair")
    uninterrupted = Run(kind).train(pair=pair)
    found: dict[str, Any] = {
        "sharded": sum(hasattr(p, "to_local") for p in uninterrupted.model.parameters()),
        "weights": uninterrupted.seen(),
        "kept": sum(int(mask.sum()) for name, mask in uninterrupted.seen().items() if name.startswith("mask")),
    }
    for sparse in (False, True):
        expected = Run(kind, sparse=sparse).train().seen()
        for step in RESUMED[kind]:
            saved = str(Path(folder) / kind / f"{sparse}-{step}")
            Run(kind, sparse=sparse).train(step).accelerator.save_state(saved)
            resumed = Run(kind, sparse=sparse)
            resumed.accelerator.load_state(saved)
            resumed.step = step
            resumed.train()
            if sparse and resumed.sparsifier is not None:
                assert resumed.sparsifier.steps == STEPS
            name = f"resumed {'with' if sparse else 'without'} a sparsifier at {step}"
            found[name] = same(shared(resumed.seen()), shared(expected))
    return found


def trials(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {kind: trial(rank, kind, folder) for kind in KINDS}
    try:
        Run("left out")
    except UsageError as error:
        found["left out"] = str(error)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("accelerate")
    return folder, run(trials, 2, folder, str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_through_phases_with_the_same_masks_and_exact_counts(kind, outcomes):
    first, second = (found[kind] for found in outcomes[1])
    assert first["sharded"] == (0 if kind == "ddp" else 8)
    masks = {name: tensor for name, tensor in first["weights"].items() if name.startswith("mask")}
    assert len(masks) == 3
    assert same(masks, {name: tensor for name, tensor in second["weights"].items() if name.startswith("mask")})
    assert first["kept"] == second["kept"] == SIZE - round(0.8 * SIZE)


def test_fsdp2_has_the_bits_of_ddp(outcomes):
    for found in outcomes[1]:
        for kind in KINDS[1:]:
            assert same(shared(found["ddp"]["weights"]), shared(found[kind]["weights"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one_as_its_control_has(kind, outcomes):
    for found in outcomes[1]:
        resumed = {name: value for name, value in found[kind].items() if name.startswith("resumed")}
        assert len(resumed) == 2 * len(RESUMED[kind])
        assert all(resumed.values()), resumed


@pytest.mark.parametrize("kind", KINDS)
def test_the_pair_holds_whole_weights_of_the_main_process(kind, outcomes):
    folder, (first, _) = outcomes
    pair = st.Pair(folder / kind / "pair")
    assert {name: member.step for name, member in pair.members.items()} == {"dense": 10, "sparse": STEPS}
    assert pair.members["sparse"].kept == SIZE - round(0.8 * SIZE)
    sparse = pair.sparse(Network()).state_dict()
    assert same(dict(sparse), {n: t for n, t in first[kind]["weights"].items() if not n.startswith("mask")})
    if kind != "ddp":
        dense, expected = (st.Pair(folder / k / "pair").dense(Network()).state_dict() for k in (kind, "ddp"))
        assert same(shared(dict(dense)), shared(dict(expected)))


def test_fsdp_that_accelerate_leaves_out_is_refused_by_name(outcomes):
    for found in outcomes[1]:
        assert "Accelerate leaves FSDP out on CPUs" in found["left out"]
