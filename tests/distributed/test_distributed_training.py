"""Training on several processes: DDP and FSDP2 give the masks and weights of one process fed the same batches."""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st

STEPS = 14
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


def method() -> st.ACDC:
    return st.ACDC(schedule=st.schedules.phases([(3, 0.0), (4, 0.9), (3, 0.0), (4, 0.8)]))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 13, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


class Trial:
    """A run on whichever wrapper, which records whole masks and weights."""

    def __init__(self, kind: str, optimizer: str) -> None:
        self.model = network()
        if kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif kind == "fsdp2":
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.sparsifier = st.Sparsifier(method(), self.model, self.optimizer)

    def step(self) -> None:
        x, y = batch(self.sparsifier.steps)
        self.sparsifier.begin_step()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seen(self) -> list[torch.Tensor]:
        weights = [whole(parameter) for parameter in self.model.parameters()]
        return weights + [whole(mask) for mask in self.sparsifier.masks.values()]

    def course(self) -> list[list[torch.Tensor]]:
        seen = []
        for _ in range(STEPS):
            self.step()
            seen.append(self.seen())
        return seen


def differences(rank: int, kind: str) -> list[str]:
    warnings.simplefilter("ignore")
    found = []
    for optimizer in OPTIMIZERS:
        expected = Trial("one process", optimizer).course()
        actual = Trial(kind, optimizer).course()
        for step, (theirs, mine) in enumerate(zip(expected, actual, strict=True)):
            if len(theirs) != len(mine) or not all(map(torch.equal, theirs, mine)):
                found.append(f"{kind}, {optimizer}: step {step}")
    return found


@pytest.mark.parametrize(("kind", "world_size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)])
def test_masks_and_weights_are_those_of_one_process_on_the_same_batches(kind, world_size, tmp_path):
    assert run(differences, world_size, tmp_path, kind) == [[]] * world_size


def save(rank: int, folder: str, steps: int) -> bytes:
    warnings.simplefilter("ignore")
    trial = Trial("fsdp2", "adamw")
    for _ in range(steps):
        trial.step()
    model, optimizer = get_state_dict(trial.model, trial.optimizer)
    dcp.save(
        {"model": model, "optimizer": optimizer, "masks": trial.sparsifier.state_dict()["masks"]}, checkpoint_id=folder
    )
    plain = {k: v for k, v in trial.sparsifier.state_dict().items() if k != "masks"}
    for _ in range(STEPS - steps):
        trial.step()
    buffer = io.BytesIO()
    torch.save((plain, trial.seen()), buffer)
    return buffer.getvalue()


def load_and_go_on(rank: int, folder: str, steps: int, saved: bytes) -> bool:
    warnings.simplefilter("ignore")
    plain, expected = torch.load(io.BytesIO(saved), weights_only=True)
    trial = Trial("fsdp2", "adamw")
    trial.sparsifier.prepare_load(steps)
    model, optimizer = get_state_dict(trial.model, trial.optimizer)
    state = {"model": model, "optimizer": optimizer, "masks": trial.sparsifier.state_dict()["masks"]}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(trial.model, trial.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    trial.sparsifier.load_state_dict({**copy.deepcopy(plain), "masks": state["masks"]})
    for _ in range(STEPS - steps):
        trial.step()
    return all(map(torch.equal, expected, trial.seen()))


@pytest.mark.parametrize("steps", [5, 7])
def test_a_distributed_checkpoint_continues_to_the_bit_on_another_number_of_processes(steps, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    saved = run(save, 2, tmp_path / "a", str(tmp_path / "checkpoint"), steps)[0]
    assert run(load_and_go_on, 4, tmp_path / "b", str(tmp_path / "checkpoint"), steps, saved) == [True] * 4
