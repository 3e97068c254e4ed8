"""Drop-and-grow methods on several processes: the masks and weights of one process fed the same gradients."""

import warnings

import pytest
import torch
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st

STEPS = 7
PERIODIC = st.schedules.periodic(sparsity=0.8, total_steps=STEPS, every_steps=2)
METHODS = {
    "set": st.SET(schedule=PERIODIC),
    "rigl": st.RigL(schedule=PERIODIC, drop_fraction=0.5),
    "granet": st.GraNet(schedule=st.schedules.phases([(2, 0.5), (2, 0.7), (3, 0.8)])),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(16, 13, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    nn.functional.cross_entropy(model(inputs), labels).backward()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Trial:
    """A run on one process, on copies (ddp) or on shards (fsdp2)."""

    def __init__(self, kind: str, method: str) -> None:
        self.model = network()
        if kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif kind == "fsdp2":
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        self.sparsifier = st.Sparsifier(METHODS[method], self.model, self.optimizer)

    def update(self) -> list[torch.Tensor]:
        self.optimizer.step()
        self.optimizer.zero_grad()
        weights = [whole(parameter).clone() for parameter in self.model.parameters()]
        return weights + [whole(mask) for mask in self.sparsifier.masks.values()]

    def course(self) -> list[list[torch.Tensor]]:
        """Every process has the same batches."""
        seen = []
        for step in range(STEPS):
            self.sparsifier.begin_step()
            backward(self.model, step)
            seen.append(self.update())
        return seen


def different(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(mine) != len(theirs) or not all(map(torch.equal, mine, theirs))


def accumulated(rank: int) -> list[str]:
    """Each process has batches of its own, two a step, and averages after the second: one process takes all four."""
    found, copies, alone = [], Trial("ddp", "rigl"), Trial("one process", "rigl")
    for step in range(STEPS):
        first, second = 4 * step + 2 * rank, 4 * step + 2 * rank + 1
        copies.sparsifier.begin_step()
        with copies.model.no_sync():
            backward(copies.model, first)
        backward(copies.model, second)
        alone.sparsifier.begin_step()
        gradients = []
        for other in range(2):
            alone.model.zero_grad()
            backward(alone.model, 4 * step + 2 * other)
            backward(alone.model, 4 * step + 2 * other + 1)
            gradients.append([parameter.grad.clone() for parameter in alone.model.parameters()])
        for parameter, one, two in zip(alone.model.parameters(), *gradients, strict=True):
            parameter.grad = one / 2 + two / 2
        if different(copies.update(), alone.update()):
            found.append(f"accumulated, step {step}")
    return found


def overflowed(rank: int) -> list[str]:
    """A growth step is tried with one process's part of a gradient infinite, then done as it was to be."""
    warnings.simplefilter("ignore")
    found, trial, plain = [], Trial("fsdp2", "rigl"), Trial("fsdp2", "rigl").course()
    for step in range(STEPS):
        trial.sparsifier.begin_step()
        before = {name: whole(mask).clone() for name, mask in trial.sparsifier.masks.items()}
        if trial.sparsifier.awaits_gradients:
            backward(trial.model, step)
            if rank == 1:
                trial.model[0].weight.grad.to_local()[0, 0] = float("inf")
            trial.sparsifier.mask_gradients()  # only then a GradScaler skips the update
            after = {name: whole(mask) for name, mask in trial.sparsifier.masks.items()}
            if not trial.sparsifier.awaits_gradients or different([*after.values()], [*before.values()]):
                found.append(f"a phase began at step {step} by gradients that are not finite")
            trial.optimizer.zero_grad()
            trial.sparsifier.begin_step()
        backward(trial.model, step)
        trial.sparsifier.mask_gradients()
        if different(trial.update(), plain[step]):
            found.append(f"step {step}")
    return found + overflowed_in_the_second(rank)


def overflowed_in_the_second(rank: int) -> list[str]:
    """Of two optimizers the second one's gradient is infinite in one process's part, so a GradScaler would skip it."""
    trial = Trial("fsdp2", "rigl")
    trial.sparsifier.detach()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1, momentum=0.9) for part in (trial.model[:2], trial.model[2:])]
    sparsifier = st.Sparsifier(METHODS["rigl"], trial.model, optimizers)
    while not sparsifier.awaits_gradients:
        sparsifier.begin_step()
        backward(trial.model, sparsifier.steps)
        for optimizer in optimizers if not sparsifier.awaits_gradients else ():
            optimizer.step()
            optimizer.zero_grad()
    before = [whole(tensor).clone() for tensor in (*trial.model.parameters(), *sparsifier.masks.values())]
    if rank == 1:
        trial.model[4].weight.grad.to_local()[0, 0] = float("inf")
    optimizers[0].step()
    after = [whole(tensor) for tensor in (*trial.model.parameters(), *sparsifier.masks.values())]
    waits = sparsifier.awaits_gradients and not different(after, before)
    return [] if waits else ["a phase began by gradients of a second optimizer that are not finite"]


def test_all_processes_put_a_choice_off_if_the_part_of_one_is_not_finite(tmp_path):
    assert run(overflowed, 2, tmp_path) == [[], []]


def differences(rank: int) -> list[str]:
    warnings.simplefilter("ignore")
    found = accumulated(rank)
    for method in METHODS:
        expected = Trial("one process", method).course()
        for kind in ("ddp", "fsdp2"):
            trial = Trial(kind, method)
            for step, (theirs, mine) in enumerate(zip(expected, trial.course(), strict=True)):
                if different(mine, theirs):
                    found.append(f"{kind}, {method}: step {step}")
            if method != "granet":
                share = st.methods.exploration(trial.sparsifier.state_dict())
                if not 1 - trial.sparsifier.sparsity() < share < 1:
                    found.append(f"{kind}, {method}: explored {share}")
    return found


@pytest.mark.parametrize("world_size", [2])
def test_masks_and_weights_are_those_of_one_process(world_size, tmp_path):
    assert run(differences, world_size, tmp_path) == [[]] * world_size
