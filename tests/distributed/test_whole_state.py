"""State that was put together from shards is cut again on loading, also what is remembered of biases and norms."""

import copy
import io
import itertools
import warnings
from typing import Any

import torch
from processes import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsetwin as st
from sparsetwin.integrations._gathered import WholeState
from sparsetwin.sparsifier import gathered

STEPS = 9
METHODS = {
    "imp": st.IMP(schedule=st.schedules.rounds(sparsity=0.8, count=2, round_steps=4, rewind_step=1)),
    "acdc-movement": st.ACDC(schedule=st.schedules.phases([(3, 0.0), (3, 0.8), (3, 0.0)]), score="movement"),
    "rigl": st.RigL(schedule=st.schedules.periodic(sparsity=0.8, total_steps=STEPS, every_steps=2)),
    "topkast": st.TopKAST(schedule=st.schedules.constant(sparsity=0.8, total_steps=STEPS)),
}


class Trial:
    """A run on shards, of a model with biases, norms and their statistics."""

    def __init__(self, method: str) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(13, 41), nn.BatchNorm1d(41), nn.ReLU(), nn.Linear(41, 20), nn.LayerNorm(20)]
        self.model = nn.Sequential(*layers, nn.Linear(20, 4))
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.sparsifier = st.Sparsifier(METHODS[method], self.model, self.optimizer)

    def train(self, steps: int) -> "Trial":
        for _ in range(steps):
            self.sparsifier.begin_step()
            generator = torch.Generator().manual_seed(self.sparsifier.steps)
            inputs, labels = torch.randn(16, 13, generator=generator), torch.randint(4, (16,), generator=generator)
            nn.functional.cross_entropy(self.model(inputs), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def seen(self) -> dict[str, Any]:
        """All that training goes on from, whole."""
        state = self.sparsifier.state_dict()
        return gathered({"model": self.model.state_dict(), "masks": state["masks"], **state["buffers"]})

    def load(self, parts: tuple[Any, Any], state: dict[str, Any], *, by: str) -> "Trial":
        model, optimizer = copy.deepcopy(parts)  # an optimizer trains on in what it is given
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        (WholeState(self.sparsifier) if by == "integrations" else self.sparsifier).load_state_dict(state)
        return self


def differences(rank: int) -> list[str]:
    warnings.simplefilter("ignore")
    found = []
    for method, steps in itertools.product(METHODS, (1, 4, 5, 8)):
        trial = Trial(method).train(steps)
        file = io.BytesIO()
        torch.save(WholeState(trial.sparsifier).state_dict(), file)
        parts = copy.deepcopy(get_state_dict(trial.model, trial.optimizer))
        expected = trial.train(STEPS - steps).seen()
        for by in ("integrations", "sparsifier") if method == "imp" else ("sparsifier",):
            state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            resumed = Trial(method).train(1).load(parts, state, by=by).train(STEPS - steps).seen()
            different = [what for what in expected if not same(resumed[what], expected[what])]
            found += [f"{method}, {by}: {what} after {steps}" for what in different]
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_whole_state_goes_on_as_shards_to_the_bit(tmp_path):
    assert run(differences, 2, tmp_path) == [[], []]
