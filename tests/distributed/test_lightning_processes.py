"""Lightning on two processes: DDP, and `ModelParallelStrategy` with FSDP2, train the same pair and resume."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from torch import nn
from torch.distributed.fsdp import fully_shard

import sparsetwin as st
from sparsetwin.errors import UsageError

L = pytest.importorskip("lightning", reason="the adapter of Lightning needs it")
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy  # noqa: E402

STEPS = 12
SIZE = 13 * 40 + 40 * 40 + 40 * 5
SCHEDULE = st.schedules.phases([(3, 0.0), (3, 0.9), (3, 0.0), (3, 0.8)])
KINDS = ("ddp", "fsdp2", "fsdp2, one file")
# where a sparse phase begins, within it, within a dense one
RESUMED = {"ddp": (4,), "fsdp2": (3, 4, 8), "fsdp2, one file": (4,)}


class Module(L.LightningModule):
    """A network that shards itself where the strategy has a mesh."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(13, 40), nn.ReLU(), nn.LayerNorm(40), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)
        )
        self.norms: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is None or any(hasattr(p, "to_local") for p in self.parameters()):
            return
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SaveAt(L.Callback):
    """Saves after some steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def strategy(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint="one file" not in kind,
        process_group_backend="gloo",
    )  # fmt: skip


def fit(kind: str, *callbacks: Any, checkpoint: Path | None = None) -> Any:
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 13, generator=generator).repeat(STEPS, 1),
        torch.randint(0, 5, (32,), generator=generator).repeat(STEPS),
    )  # equal batches: Lightning does not save the place in the data
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=2, strategy=strategy(kind), callbacks=list(callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    module = Module()
    half = slice(0, 16) if trainer.global_rank == 0 else slice(16, 32)
    rows = [data[i] for start in range(0, len(data), 32) for i in range(start + half.start, start + half.stop)]
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=16), ckpt_path=checkpoint)
    return module


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def seen(module: Any) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def callback(folder: Path) -> Any:
    from sparsetwin.integrations.lightning import SparsifierCallback

    return SparsifierCallback(lambda total, epoch: SCHEDULE, folder)


def trial(kind: str, folder: Path) -> dict[str, Any]:
    sparse = callback(folder / "pair")
    module = fit(kind, sparse, SaveAt(folder / "sparse", RESUMED[kind]))
    control = seen(fit(kind, SaveAt(folder / "control", RESUMED[kind])))
    expected = seen(module)
    found: dict[str, Any] = {
        "sharded": any(hasattr(p, "to_local") for p in module.parameters()),
        "weights": expected,
        "masks": {name: whole(mask) for name, mask in sparse.sparsifier.masks.items()},
    }
    for step in RESUMED[kind]:
        plain = fit(kind, checkpoint=folder / "control" / f"{step}.ckpt")
        again = callback(folder / f"pair-{step}")
        resumed = fit(kind, again, checkpoint=folder / "sparse" / f"{step}.ckpt")
        assert again.sparsifier.steps == STEPS
        found[step] = (same(seen(plain), control), same(seen(resumed), expected))
    return found


def trials(rank: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {kind: trial(kind, Path(folder) / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("lightning")
    return folder, run(trials, 2, folder, str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_through_phases_with_the_same_masks_and_exact_counts(kind, outcomes):
    first, second = (found[kind] for found in outcomes[1])
    assert first["sharded"] == (kind != "ddp")
    assert len(first["masks"]) == 3
    assert same(first["masks"], second["masks"])
    assert sum(int(mask.sum()) for mask in first["masks"].values()) == SIZE - round(0.8 * SIZE)
    for name, mask in first["masks"].items():
        assert not first["weights"][name][~mask].any()


def test_fsdp2_has_the_bits_of_ddp(outcomes):
    for found in outcomes[1]:
        assert same(found["ddp"]["weights"], found["fsdp2"]["weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one_as_its_control_has(kind, outcomes):
    for found in outcomes[1]:
        assert {step: found[kind][step] for step in RESUMED[kind]} == dict.fromkeys(RESUMED[kind], (True, True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_pair_holds_whole_weights_of_the_first_process(kind, outcomes):
    folder, (first, _) = outcomes
    members, of_ddp = (st.Pair(folder / k / "pair").members for k in (kind, "ddp"))
    assert {name: member.step for name, member in members.items()} == {"dense": 9, "sparse": STEPS}
    assert same(dict(st.Pair(folder / kind / "pair").sparse(Module()).state_dict()), first[kind]["weights"])
    assert {name: member.sha256 for name, member in members.items()} == {n: m.sha256 for n, m in of_ddp.items()}


@pytest.mark.filterwarnings("ignore")  # of Lightning's own
def test_fsdp1_is_refused_by_name_with_what_to_use_instead(tmp_path):
    class Stand:
        lr_scheduler_configs, early_stopping_callbacks, checkpoint_callbacks = (), (), ()
        strategy = FSDPStrategy()

    from sparsetwin.integrations._lightning_hooks import _refuse_unsupported

    with pytest.raises(UsageError, match=r"FSDPStrategy flattens parameters.*ModelParallelStrategy with fully_shard"):
        _refuse_unsupported(Stand())
